"""The servers of an account on a machine: listed, found by name, ended; whoever started them."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from bokeh_ssh._core.errors import (
    BokehSSHError,
    ConnectionLostError,
    LaunchTimeoutError,
    ServerNotFoundError,
    UsageError,
)
from bokeh_ssh._core.framing import Reader, Tail, plain
from bokeh_ssh._core.waiting import wait_for
from bokeh_ssh._server.bootstrap import control_client_script, list_pythons
from bokeh_ssh._server.diagnosis import refused, refused_command
from bokeh_ssh._server.launch_spec import encode_message
from bokeh_ssh._server.payload import payload
from bokeh_ssh._server.server_ref import ServerRef, as_paths
from bokeh_ssh._ssh.remote_shell import exec_line
from bokeh_ssh._ssh.runner import Runner, Signals

_MOST = 1000  # servers that are listed: a bound on what the far side can make us keep
_MOST_BYTES = 32 << 20  # of what it says in all
_PATIENCE = 5.0  # seconds between TERM and KILL


@dataclass(frozen=True, kw_only=True)
class RemoteServer:
    """A server of this account on a machine, as its supervisor describes it.

    :ivar host: the machine, as the user named it
    :ivar node: the machine's own name for itself
    :ivar id: names it among those of the account there
    :ivar state: ``"starting"``, ``"running"``, ``"stopped"`` (its process is halted), ``"silent"`` (its
        supervisor does not answer), or ``"ended"`` (by itself, while nobody was there; see ``status``)
    :ivar attached: whether a client is there
    :ivar detached: whether it was left running on purpose; others end when their client is away for long
    :ivar since: when its client came or went, in seconds since the epoch
    :ivar born: when it was started, likewise
    :ivar pid: its process there
    :ivar port: of that machine's loopback; 0 where it has none
    :ivar socket: the path of its socket; empty where it has none
    :ivar routes: the paths of its apps, ready for a URL
    :ivar apps: the paths of its apps there, as they were given
    :ivar command: its command line, without what looks like a secret
    :ivar versions: such as ``"Bokeh 3.9.2, Tornado 6.6.1"``
    :ivar within: the id of the server that it was started by, such as that of a publication; else empty
    :ivar elsewhere: whether ``port`` or ``socket`` is another machine's, as of what publishes on a gateway
    :ivar published: where it can be opened by name, as ``"sliders on gateway.example:22"``; empty where it is
        not, or by a publication that started it
    :ivar status: how it ended; None while it runs
    :ivar log: the last lines of one that has ended
    """

    host: str
    node: str
    id: str
    state: str
    attached: bool = False
    detached: bool = False
    since: float = 0.0
    born: float = 0.0
    pid: int = 0
    port: int = 0
    socket: str = ""
    routes: tuple[str, ...] = ()
    apps: tuple[str, ...] = ()
    command: tuple[str, ...] = ()
    versions: str = ""
    within: str = ""
    elsewhere: bool = False
    published: str = ""
    status: int | None = None
    log: tuple[str, ...] = ()
    python: str = ""
    libraries: str = ""
    place: str = ""

    @property
    def server_ref(self) -> ServerRef:
        """What ``Server.adopt`` needs, without the right to take it from a client that is there."""
        return ServerRef.of(vars(self))

    @property
    def pages(self) -> tuple[int, ...]:
        """The ports of a person's own machine whose pages it takes (``--allow-websocket-origin``)."""
        pairs = zip(self.command, self.command[1:], strict=False)
        ends = [value.rpartition(":") for option, value in pairs if option == "--allow-websocket-origin"]
        ports = [port for name, _, port in ends if name == "localhost" and port.isdecimal()]
        return tuple(int(port) for port in ports if 0 < int(port[:6]) < 65536)

    @property
    def names(self) -> frozenset[str]:
        """What it can be called: its id, its routes without the slash, its apps with and without path."""
        ends = {app.rstrip("/").rpartition("/")[2] for app in self.apps}
        routes = {route.strip("/") for route in self.routes}
        stems = {end.removesuffix(".py").removesuffix(".ipynb") for end in ends}
        return frozenset(name for name in {self.id, *self.apps, *ends, *stems, *routes} if name)


def list_servers(runner: Runner, *, python: str | None = None, timeout: float = 20) -> list[RemoteServer]:
    """List the servers that this account has on a machine, in the order they were started.

    Those of a machine that shares only the home with this one are not among them. What supervisors that were
    killed left behind is removed on the way.

    :param python: an interpreter there; None takes ``python3`` or ``python``
    :raises BokehSSHError: if the machine cannot be asked
    """
    run = ControlRequest(runner, {"do": "list"}, python, timeout)
    messages = run.carry_out("end")
    node = str(messages[-1].get("node", ""))
    found = [_server(runner.name, node, message) for message in messages if message["event"] == "server"]
    return sorted((server for server in found if server), key=lambda server: server.born)


def choose(servers: Iterable[RemoteServer], name: str | None, *, host: str) -> RemoteServer:
    """Choose one by id, route or app; None takes the only one. One that was started by another comes last.

    :raises ServerNotFoundError: if there is none of that name
    :raises UsageError: if there are several
    """
    every = list(servers)
    fits = [server for server in every if name is None or name in server.names]
    exact = [server for server in fits if server.id == name]
    # A server that a publication started is the publication's; who means it names its id.
    inner = {server.id for server in every}
    fits = exact or [server for server in fits if server.within not in inner] or fits
    what = "server" if name is None else f"server named {name!r}"
    if not fits:
        have = ", ".join(sorted(f"{server.id} {' '.join(server.apps)}".strip() for server in every))
        msg = f"there is no {what} of yours" + (f" (there are: {have})" if have else "")
        hint = f"list them: bokeh-ssh ls {host}" if have else f"start one: bokeh-ssh {host} app.py"
        raise ServerNotFoundError(msg, host=host, hint=hint)
    if len(fits) > 1:
        listed = ", ".join(f"{server.id} {' '.join(server.routes)}".strip() for server in fits)
        msg = f"there is more than one {what} on {host}: {listed}"
        raise UsageError(msg, hint="give the id of the one you mean")
    return fits[0]


def stop_server(
    runner: Runner, server: str | RemoteServer, *, python: str | None = None, timeout: float = 20
) -> None:
    """End a server and all that it started, whoever holds it; what is kept of one that has ended goes too.

    :param server: its id, or what was listed
    :raises ServerGoneError: if there is none of that id
    :raises LaunchTimeoutError: if it does not end in time
    :raises BokehSSHError: if the machine cannot be asked
    """
    known = server.id if isinstance(server, RemoteServer) else server
    tool = python or (server.python if isinstance(server, RemoteServer) else None) or None
    order = {"do": "stop", "id": known, "patience": min(_PATIENCE, timeout / 3)}
    ControlRequest(runner, order, tool, timeout).carry_out("over")


class ControlRequest:
    """One order that is carried out there, in a session of its own.

    :param order: what ``_remote.control_client`` is to do
    :param python: an interpreter there; None takes ``python3`` or ``python``
    :param timeout: seconds for all of it
    :param on_message: called with each message as it comes, on the connection's thread; its ``data`` is not
        kept
    """

    def __init__(
        self,
        runner: Runner,
        order: Mapping[str, Any],
        python: str | None,
        timeout: float,
        on_message: Callable[[dict[str, Any]], object] | None = None,
    ) -> None:
        self._runner = runner
        self._on_message = on_message
        self._nonce = secrets.token_hex(16)
        self._order = {**order, "mark": self._nonce}
        self._pythons = list_pythons(python)
        self._timeout = timeout
        self._reader = Reader(self._nonce)
        self._stderr = Tail()
        self._change = threading.Condition()
        self._messages: list[dict[str, Any]] = []
        self._heard_bytes = 0
        self._over = False
        self._status: int | None = None

    def carry_out(self, last: str) -> list[dict[str, Any]]:
        """Return all that was said, up to the message ``last``."""
        deadline = time.monotonic() + self._timeout
        session = self._runner.run(
            exec_line(self._nonce),
            on_stdout=self._on_stdout,
            on_stderr=self._stderr.feed,
            on_exit=self._on_exit,
            timeout=self._timeout,
        )
        try:
            if self._wait(lambda: self._messages_of("hello"), deadline):
                text = control_client_script(
                    self._pythons, {}, self._nonce, payload("control_client"), encode_message(self._order)
                )
                session.write(text)
            self._wait(lambda: self._messages_of(last, "refused"), deadline)
            if not self._messages_of(last):
                raise self._error()
            return self._messages
        except BaseException:
            if not self._over and isinstance(session, Signals):
                session.signal("KILL")
            raise
        finally:
            session.write_eof()
            session.close()

    def cancel(self) -> None:
        """Wait no longer, from another thread."""
        self._on_exit(None)

    def _wait(self, met: Callable[[], object], deadline: float) -> bool:
        with self._change:
            wait_for(self._change, lambda: met() or self._over, deadline - time.monotonic())
            return bool(met())

    def _messages_of(self, *events: str) -> list[dict[str, Any]]:
        return [message for message in self._messages if message["event"] in events]

    def _error(self) -> BokehSSHError:
        host = self._runner.name
        for message in self._messages_of("refused"):
            return refused(host, message)
        said = self._reader.last_words(self._stderr)
        if not self._over:
            msg = f"the machine did not answer within {self._timeout:g} s"
            return LaunchTimeoutError(msg, host=host, hint="try again, or allow more time")
        if self._status is None:
            return ConnectionLostError("the connection ended meanwhile", host=host, hint="try again")
        return refused_command(host, self._status, said)

    def _on_stdout(self, data: bytes) -> None:
        self._heard_bytes += len(data)
        if self._heard_bytes > _MOST_BYTES:
            return  # then the end does not come, and that is reported
        messages = self._reader.feed(data)
        if self._on_message:
            for message in messages:
                self._on_message(message)
                message.pop("data", None)
        with self._change:
            self._messages += messages[: max(0, _MOST - len(self._messages))]
            self._change.notify_all()

    def _on_exit(self, status: int | None) -> None:
        with self._change:
            self._over, self._status = True, status
            self._change.notify_all()


def _server(host: str, node: str, message: Mapping[str, Any]) -> RemoteServer | None:
    """Make a record of a message; None for one that is none, since the far side can say anything."""
    ready = message.get("ready")
    ready = ready if isinstance(ready, dict) else {}
    state = _text(message.get("state"))
    if state == "running":
        state = "stopped" if message.get("halted") is True else "running" if ready else "starting"
    port = _number(ready.get("port"))
    status = message.get("status")
    number = _text(message.get("id"))
    if not number:
        return None
    return RemoteServer(
        host=host,
        node=_text(message.get("node")) or plain(node),
        id=number,
        state=state,
        attached=message.get("attached") is True and state != "ended",
        detached=message.get("detached") is True,
        since=_time(message.get("since")),
        born=_time(message.get("born")),
        pid=_number(ready.get("pid") or message.get("pid")),
        port=port if port < 65536 else 0,
        socket=_text(ready.get("socket")),
        routes=as_paths(_texts(ready.get("routes"))),
        apps=_texts(message.get("apps")),
        command=_texts(message.get("argv")),
        versions=_text(ready.get("versions")),
        within=_text(message.get("within")),
        elsewhere=message.get("elsewhere") is True,
        published=_published(message.get("along")),
        status=status if isinstance(status, int) else None,
        log=_texts(message.get("log")),
        python=_text(message.get("python")),
        libraries=_text(message.get("libraries")),
        place=_text(message.get("place")),
    )


def _published(word: object) -> str:
    if not isinstance(word, dict):
        return ""
    name, gateway = _text(word.get("name")), _text(word.get("gateway"))
    return f"{name} on {gateway}" if name and gateway else ""


def _text(value: object) -> str:
    return plain(value) if isinstance(value, str) else ""


def _texts(value: object) -> tuple[str, ...]:
    return tuple(plain(str(item)) for item in value) if isinstance(value, list) else ()


def _number(value: object) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0


def _time(value: object) -> float:
    return float(value) if isinstance(value, (int, float)) and 0 <= value < 1e11 else 0.0
