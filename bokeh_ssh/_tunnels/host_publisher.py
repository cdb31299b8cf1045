"""Let the Bokeh host dial the gateway itself, where bokeh_ssh is installed there and it can log in.

Nothing secret goes to the host: it logs in with keys of its own, or has the login signed by an agent that it
is lent for that (``_ssh.agent_forwarding``). The gateway's host key goes there, as we have verified it, so
that the host need not know the gateway yet.

What does that there (``_tunnels.publisher_main``) runs in a session of ours, and ends with it; or, where the
server is left running, beside the server, and ends with that.
"""

from __future__ import annotations

import base64
import contextlib
import json
import secrets
import shlex
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bokeh_ssh._core.endpoint import Endpoint, is_name
from bokeh_ssh._core.errors import BokehSSHError, ConnectionLostError, ForwardError
from bokeh_ssh._core.framing import Reader, plain
from bokeh_ssh._core.host import Target
from bokeh_ssh._core.settings import setting
from bokeh_ssh._core.waiting import wait_for
from bokeh_ssh._server.bootstrap import APART, BACK, OWN, list_pythons
from bokeh_ssh._server.server import Server
from bokeh_ssh._ssh.agent_forwarding import lend_agent
from bokeh_ssh._ssh.auth.agent import Agent
from bokeh_ssh._ssh.connection import Connection
from bokeh_ssh._ssh.remote_shell import encode, exec_line

#: Seconds that the host has to start Python, reach the gateway and log in.
_TIMEOUT = 30.0
#: Kinds of messages that are kept.
_MOST_EVENTS = 20
#: Where a publisher beside a server finds what it is to do: a variable of its environment.
SPECIFICATION = "BOKEH_SSH_PUBLICATION"
_STOPPED = "the Bokeh host stopped publishing"


class UnavailableError(Exception):
    """The host cannot publish by itself; ``error`` says why."""

    def __init__(self, error: BokehSSHError) -> None:
        super().__init__(str(error))
        self.error = error


class _Publisher:
    """The far process, as far as it has spoken."""

    def __init__(self, mark: str, lost: Callable[[str], None]) -> None:
        self._reader = Reader(mark)
        self._lost = lost
        self._errors = bytearray()
        self._change = threading.Condition()
        self._messages: dict[str, dict[str, Any]] = {}
        self._ended = False
        self.leaving = False

    def on_stdout(self, data: bytes) -> None:
        messages = self._reader.feed(data)
        with self._change:
            for message in messages:
                if message["event"] in self._messages or len(self._messages) < _MOST_EVENTS:
                    self._messages[message["event"]] = message
            self._change.notify_all()

    def on_stderr(self, data: bytes) -> None:
        self._errors += data
        del self._errors[:-2000]

    def on_exit(self, status: int | None) -> None:
        with self._change:
            self._ended = True
            published = "port" in self._messages
            error = self._messages.get("error", {})
            self._change.notify_all()
        if published and not self.leaving:
            self._lost(str(error.get("message", _STOPPED)))

    def wait(self, event: str) -> dict[str, Any] | None:
        """Wait for a message; None if it does not come."""
        with self._change:
            wait_for(self._change, lambda: event in self._messages or self._ended, _TIMEOUT)
            return self._messages.get(event)

    def await_end(self, timeout: float) -> None:
        """Wait until it has ended, for ``timeout`` seconds at most."""
        with self._change:
            wait_for(self._change, lambda: self._ended, timeout)

    @property
    def complaint(self) -> str:
        """Why it ended, in one line."""
        for word in self._messages.values():
            if _complaint(word):
                return _complaint(word)
        lines = self._errors.decode("utf-8", "replace").strip().splitlines()
        return lines[-1][:200] if lines else f"it did not answer within {_TIMEOUT:g} s"


@dataclass(frozen=True)
class PublicationRequest:
    """What is to be published on a gateway, and where.

    :ivar host: where the server runs
    :ivar target: the server, as seen from there
    :ivar wanted: where the gateway is to listen; port 0 takes any free one
    :ivar allow_exposed: whether the port may be open to the gateway's network
    :ivar seen_as: the gateway's address as the host sees it, where that differs from ours
    """

    host: Connection
    gateway: Connection
    target: Endpoint
    wanted: Endpoint
    allow_exposed: bool
    seen_as: Target | None


@contextlib.contextmanager
def publish_from_host(
    request: PublicationRequest,
    *,
    python: str | None,
    env: dict[str, str],
    agent: Agent | None,
    on_lost: Callable[[BokehSSHError], None],
) -> Iterator[Endpoint]:
    """Run the publisher on the host while the context lasts; yield where the gateway listens.

    :param python: the interpreter to try first
    :param agent: lent to the host while it logs in to the gateway; None: it has a login of its own
    :param on_lost: called when it ends by itself
    :raises UnavailableError: if it cannot be done that way
    """
    host, wanted = request.host, request.wanted

    def lost(reason: str) -> None:
        on_lost(ConnectionLostError(f"{_STOPPED} ({reason})", host=host.name, hint="open it again"))

    mark = secrets.token_hex(16)
    publisher = _Publisher(mark, lost)
    session = host.run(
        exec_line(mark),
        on_stdout=publisher.on_stdout,
        on_stderr=publisher.on_stderr,
        on_exit=publisher.on_exit,
        timeout=_TIMEOUT,
        agent=agent is not None,
    )
    try:
        # The whole way is made again from here; what it lost may be somebody else's by then.
        forward = _keywords(request) | {"reconnect": False}
        there = {"remote_socket": wanted} if isinstance(wanted, str) else {"remote_port": wanted[1]}
        spec = _spec(request) | {"mark": mark, "forward": forward, "places": [there]}
        with lend_agent(host, agent, spec["user"]) if agent else contextlib.nullcontext():
            if publisher.wait("hello"):
                session.write(encode(_script([python] if python else list_pythons(), env, mark)))
                session.write(json.dumps(spec).encode() + b"\n")
            message = publisher.wait("port")
        if message is None:
            lend = "" if agent else f"lend it your SSH agent with {setting('forward_agent=True')}, "
            raise _unavailable(host.name, publisher.complaint, f"{lend}or use {setting('reverse=relay')}")
        yield wanted if isinstance(wanted, str) else (wanted[0], int(message["port"]))
    finally:
        publisher.leaving = True
        session.write_eof()  # its order to stop; the gateway's port is free when it has
        publisher.await_end(3)
        session.close()


def sidecar_endpoint(server: Server, request: PublicationRequest) -> tuple[Endpoint, str | None] | None:
    """Return where on the gateway a program beside the server publishes it: the place, and its name there.

    :returns: None where there is none, or not on that gateway
    """
    word, spec, wanted = server.sidecar_status, _spec(request), request.wanted
    if word.get("event") != "port" or word.get("gateway") != f"{spec['gateway']}:{spec['port']}":
        return None
    name = word.get("name")
    if isinstance(wanted, str):
        # Not the path that the host says: it could name any socket of ours on the gateway.
        folder = wanted.rpartition("/")[0]
        return (f"{folder}/pub-{name}", name) if isinstance(name, str) and is_name(name) else None
    port = word.get("port")
    return ((wanted[0], port), None) if isinstance(port, int) and 0 < port < 65536 else None


def start_publisher_sidecar(
    server: Server, request: PublicationRequest, names: Sequence[str]
) -> tuple[Endpoint, str | None]:
    """Start a program beside the server that publishes it on the gateway, for as long as the server lives.

    A socket that is wanted names the directory where sockets are found by name.

    :param names: to publish it under: the first that is not taken
    :returns: where, and under which name; a port has none
    :raises UnavailableError: if it cannot be done that way
    """
    wanted = request.wanted
    forward = _keywords(request) | {"reconnect": True}
    places = [{"name": name} for name in names] if isinstance(wanted, str) else [{"remote_port": wanted[1]}]
    spec = _spec(request) | {"mark": "", "forward": forward, "places": places}
    script = _script(list_pythons(server.server_ref.python if server.server_ref else None))
    word = server.start_sidecar(("/bin/sh", "-c", script), {SPECIFICATION: json.dumps(spec)}, _TIMEOUT)
    made = sidecar_endpoint(server, request)
    if made is None:
        complaint = _complaint(word) or f"it did not answer within {_TIMEOUT:g} s"
        raise _unavailable(
            request.host.name, complaint, "or publish it there: bokeh-ssh publish --background"
        )
    return made


def _complaint(word: dict[str, Any]) -> str:
    """Say why a publisher does not publish; empty where it does."""
    if word.get("event") == "error":
        return plain(str(word.get("message", "")))
    return "no Python there has bokeh_ssh" if word.get("event") == "missing" else ""


def _unavailable(host: str, complaint: str, otherwise: str) -> UnavailableError:
    msg = f"it cannot publish by itself ({complaint})"
    hint = f"install bokeh_ssh there and give it a key for the gateway, {otherwise}"
    return UnavailableError(ForwardError(msg, host=host, hint=hint))


def _script(pythons: Sequence[str], env: Mapping[str, str] | None = None, mark: str = "") -> str:
    lines = [
        f"{name}={shlex.quote(value)}; export {name}"
        for name, value in (env or {}).items()
        if name.isidentifier()
    ]
    names = " ".join(map(shlex.quote, pythons))
    look = shlex.quote(f"{OWN}import bokeh_ssh")
    run = shlex.quote(f"{OWN}{BACK}from bokeh_ssh._tunnels.publisher_main import main\nsys.exit(main())")
    lines.append(APART)
    lines.append(
        f"for p in {names}; do "
        f'command -v "$p" >/dev/null 2>&1 && "$p" -c {look} </dev/null >/dev/null 2>&1 && '
        f'exec "$p" -u -c {run}; done'
    )
    lines.append(f'echo \'{mark}{{"event":"missing"}}\'; exit 127')
    return "\n".join(lines)


def _spec(request: PublicationRequest) -> dict[str, Any]:
    """Say which gateway it is, as the host is to see it."""
    gateway, hop, seen_as = request.gateway, request.gateway.hop, request.seen_as
    name = seen_as.host if seen_as else hop.hostname
    port = (seen_as.port if seen_as else hop.port) or 22
    key = gateway.transport.host_key_blob
    kind = key[4 : 4 + int.from_bytes(key[:4], "big")].decode("ascii", "replace")
    entry = name if port == 22 else f"[{name}]:{port}"
    return {
        "gateway": name,
        "port": port,
        "user": (seen_as.user if seen_as else None) or hop.user,
        # A certificate cannot be pinned as a key; the host then needs its authority in files of its own.
        "known_hosts": None if "-cert-" in kind else f"{entry} {kind} {base64.b64encode(key).decode()}\n",
        "timeout": hop.timeout,
    }


def _keywords(request: PublicationRequest) -> dict[str, Any]:
    """Say what is published, as the publisher's ``RemoteForward`` takes it."""
    target, words = request.target, {"allow_exposed": request.allow_exposed}
    if isinstance(target, str):
        return {"local_socket": target, **words}
    return {"local_host": target[0], "local_port": target[1], **words}
