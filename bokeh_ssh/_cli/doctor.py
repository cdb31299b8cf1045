"""What ``bokeh-ssh doctor`` looks at: everything on the way to a server, one thing after the other.

Nothing is guessed from settings: each check tries what a tunnel would do, and undoes it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from bokeh_ssh._cli.messages import describe_error, next_step
from bokeh_ssh._cli.options.words import as_flag
from bokeh_ssh._core.errors import (
    BokehSSHError,
    ConnectionLostError,
    ForwardError,
    ForwardingRefusedError,
    HostKeyError,
    PortInUseError,
    ResolveError,
    ServerExitedError,
    ServerGoneError,
    UsageError,
)
from bokeh_ssh._core.events import (
    Authenticated,
    Connecting,
    Event,
    HostKeyAdded,
    HostKeyVerified,
    TouchRequested,
    Warned,
    ignore,
)
from bokeh_ssh._core.host import Host
from bokeh_ssh._core.settings import word
from bokeh_ssh._core.waiting import wait
from bokeh_ssh._forwarding.listener import bind
from bokeh_ssh._forwarding.listener_probe import ListenerProbe
from bokeh_ssh._forwarding.published_sockets import private_directory, private_socket, published
from bokeh_ssh._jobs.batch import Batch
from bokeh_ssh._jobs.cluster_check import ClusterCheck, ClusterFact
from bokeh_ssh._server.bootstrap import list_pythons
from bokeh_ssh._server.options import BOKEH_PORT, LOOPBACK, ServerOptions
from bokeh_ssh._server.probe import probe_port
from bokeh_ssh._server.registry import list_servers
from bokeh_ssh._server.server import Server
from bokeh_ssh._ssh.auth.kerberos import KerberosError, find_ticket
from bokeh_ssh._ssh.auth.login import wants_kerberos
from bokeh_ssh._ssh.auth.prompt_cache import PromptCache
from bokeh_ssh._ssh.config.lookup import SYSTEM
from bokeh_ssh._ssh.connect import connect
from bokeh_ssh._ssh.connection import Connection
from bokeh_ssh._ssh.route import Hop, find_route
from bokeh_ssh._ssh.sftp_writer import Sftp, SftpError
from bokeh_ssh._tunnels.remote_forward import is_exposed

Verdict = Literal["good", "note", "bad"]

#: What a tunnel does without.
_OPTIONAL = ("sockets", "as a gateway", "files")
#: Seconds for a connection that has failed to end.
_DYING = 2.0
#: Seconds that a server which was started for a look outlives its session, should we not come back.
_MOMENT = 15.0
#: Milliseconds of a round trip from which on a page feels it.
_SLOW = 150.0


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    :ivar check: what, in a word or two
    :ivar verdict: "good"; "note" is what works otherwise than it best would; "bad" stops a tunnel
    :ivar hint: what to do about it; empty where there is nothing
    """

    check: str
    verdict: Verdict
    text: str
    hint: str = ""


def examine(
    host: Host,
    serve: ServerOptions,
    begin: Callable[[str], None],
    batch: Batch | None = None,
    advise: Callable[[BokehSSHError], object] = ignore,
) -> Iterator[Finding]:
    """Look at all there is on the way to a server on ``host``; what is bad ends it where nothing can follow.

    A server is started there for a moment, with no app, as ``serve`` says.

    :param begin: gets what is looked at next
    :param batch: look at this job in place of a server on that machine itself; nothing is submitted
    :param advise: gives the error of a machine that is not reached the next step that fits what was typed
    """
    yield _check_port_here()
    try:
        route = find_route(host)
    except BokehSSHError as exc:
        yield _bad("name", exc)
        return
    names = [
        f"{hop.label} is {hop.hostname}, port {hop.port}, user {hop.account}"
        + (", by its ProxyCommand" if hop.proxy_command else "")
        for hop in route
    ]
    yield Finding("name", "good", ", then ".join(names))
    yield from _check_ticket(route)
    begin("Connecting")
    met: list[Finding] = []
    prompt_cache = PromptCache()
    try:
        connection = connect(host, on_event=_Meeting(met, begin).on_event, prompt_cache=prompt_cache)
    except BokehSSHError as exc:
        advise(exc)
        yield from met
        yield _bad(_stage(exc), exc)
        return
    with contextlib.ExitStack() as lines:

        def line() -> Connection:
            """Return the connection; a new one, logged in to as before, where a check has cost the last."""
            nonlocal connection
            if not connection.alive:
                again = _Meeting([], begin)
                connection = lines.enter_context(
                    connect(host, on_event=again.on_event, prompt_cache=prompt_cache)
                )
            return connection

        lines.enter_context(connection)
        yield from met
        checks = _cluster_checks(lines, batch, serve) if batch else _machine_checks(serve)
        yield from _run_checks(line, checks, begin)


def _cluster_checks(
    stack: contextlib.ExitStack, batch: Batch, serve: ServerOptions
) -> dict[str, Callable[[Connection], Finding | None]]:
    cluster = ClusterCheck(batch, list_pythons(serve.python_path), serve.setup)
    stack.callback(cluster.close)

    def check(name: str, look: Callable[[Connection], ClusterFact]) -> Callable[[Connection], Finding | None]:
        def find(connection: Connection) -> Finding | None:
            if cluster.missing:  # that is reported already
                return None
            fact = look(connection)
            return Finding(name, "good" if fact.good else "bad", fact.text, word(fact.hint, as_flag))

        return find

    every = {name: check(name, look) for name, look in cluster.checks.items()}
    return {"round trip": _check_round_trip, **every}


def _machine_checks(serve: ServerOptions) -> dict[str, Callable[[Connection], Finding | None]]:
    lasting: list[Finding] = []
    seen: list[Finding] = []

    def check_sockets(connection: Connection) -> Finding:
        seen.append(_check_sockets(connection))
        return seen[-1]

    def sockets() -> bool:
        return any(found.verdict == "good" for found in seen)

    return {
        "round trip": _check_round_trip,
        "forwarding": _check_forwarding,
        "sockets": check_sockets,
        "as a gateway": _check_gateway,
        "files": _check_files,
        "server": lambda connection: _check_server(connection, serve, lasting, sockets=sockets()),
        "after a loss": lambda _: next(iter(lasting), None),
        "your servers": lambda connection: _check_servers(connection, serve.python_path),
    }


def _run_checks(
    line: Callable[[], Connection],
    checks: dict[str, Callable[[Connection], Finding | None]],
    begin: Callable[[str], None],
) -> Iterator[Finding]:
    for name, check in checks.items():
        begin(f"Looking at: {name}")
        try:
            connection = line()
        except BokehSSHError as exc:
            yield _bad(_stage(exc), exc)
            return
        try:
            found = check(connection)
        except BokehSSHError as exc:
            found = _bad(name, exc)
            if isinstance(exc, ConnectionLostError):
                wait(connection.lost, _DYING)
                if name in _OPTIONAL and not connection.alive:
                    text = (
                        f"it is not possible: the server ends the connection at that ({describe_error(exc)})"
                    )
                    found = Finding(name, "note", text, "a tunnel works without")
        if found:
            yield found


def _bad(check: str, error: BokehSSHError) -> Finding:
    text = describe_error(error).strip()
    last = next(reversed(getattr(error, "log", ())), "")
    return Finding(check, "bad", f"{text} ({last})" if last and last not in text else text, next_step(error))


def _stage(error: BokehSSHError) -> str:
    if isinstance(error, (ResolveError, UsageError)):
        return "name"
    if isinstance(error, HostKeyError):
        return "host key"
    return {"connect": "port", "auth": "login"}.get(error.stage, error.stage)


class _Meeting:
    """Turns the events of connecting into findings."""

    def __init__(self, found: list[Finding], begin: Callable[[str], None]) -> None:
        self._found = found
        self._begin = begin
        self._began = time.monotonic()

    def on_event(self, event: Event) -> None:
        took = f" ({time.monotonic() - self._began:.1f} s)"
        if isinstance(event, Connecting):
            self._began = time.monotonic()
            if event.via.startswith("the ControlMaster"):
                text = f"{event.host} is reached through {event.via}, which your ssh keeps open"
                self._found.append(Finding("port", "good", text))
        elif isinstance(event, Warned):  # a keyword of the ssh config that nobody knows, a ticket
            self._found.append(Finding("warning", "note", event.text))
        elif isinstance(event, HostKeyAdded):
            text = f"the {event.key_type} key of {event.host} was added to {event.path}"
            self._found.append(Finding("host key", "note", text))
        elif isinstance(event, HostKeyVerified):
            self._found.append(Finding("port", "good", f"{event.host} answers as an SSH server{took}"))
            text = f"that of {event.host} is known ({event.key_type} {event.fingerprint})"
            self._found.append(Finding("host key", "good", text))
            self._began = time.monotonic()
        elif isinstance(event, TouchRequested):
            self._begin(f"Touch the security key of {event.key}")
        elif isinstance(event, Authenticated):
            text = f"{event.user} is logged in to {event.host} by {' and '.join(event.methods)}{took}"
            self._found.append(Finding("login", "good", text))


def _check_port_here() -> Finding:
    try:
        for sock in bind(BOKEH_PORT):
            sock.close()
    except PortInUseError:
        text = f"port {BOKEH_PORT} is taken here; a tunnel takes another one that is free"
        return Finding("this machine", "note", text)
    return Finding("this machine", "good", f"port {BOKEH_PORT} is free here")


def _check_ticket(route: Sequence[Hop]) -> Iterator[Finding]:
    """Look for a Kerberos ticket, where a login would use one.

    Distributions turn that on for everybody: who has no ticket, and has not asked for it, hears nothing.
    """
    wanted = [hop for hop in route if wants_kerberos(hop.host, hop.config)[1]]
    if not wanted:
        return
    hop = wanted[-1]
    line = hop.config.lines.get("gssapiauthentication", "")
    asked = bool(hop.host.gss_auth or hop.host.gss_deleg_creds) or not line.startswith(str(SYSTEM))
    try:
        ticket = find_ticket(client=hop.config.gssapi_client_identity, timeout=hop.timeout)
    except KerberosError as exc:
        if asked or exc.has_run_out:
            yield Finding("ticket", "note", str(exc), exc.hint)
        return
    left = f"{ticket.seconds / 3600:.1f} hours"
    yield Finding("ticket", "good", f"a Kerberos ticket of {ticket.principal} is good for {left}")


def _check_round_trip(connection: Connection) -> Finding:
    for _ in range(3):
        connection.ping(connection.hop.timeout)
    took = connection.transport.rtt * 1000
    if not took and connection.lost.is_set():
        raise connection.lost_error()
    if took > _SLOW:
        hint = "the first page takes a dozen round trips; --compression helps if the bandwidth is low too"
        return Finding("round trip", "note", f"{took:.0f} ms, which is noticeable", hint)
    return Finding("round trip", "good", f"{took:.1f} ms")


def _check_forwarding(connection: Connection) -> Finding:
    """Ask for what a tunnel would: whether something listens there does not matter."""
    what = f"to port {BOKEH_PORT} there"
    try:
        found = probe_port(connection, BOKEH_PORT, timeout=connection.hop.timeout)
    except ForwardingRefusedError as exc:
        return Finding("forwarding", "bad", f"the server forbids it {what}", next_step(exc))
    if found is None:
        return Finding("forwarding", "good", f"allowed {what}, where nothing listens")
    return Finding("forwarding", "good", f"allowed {what}, where something listens (see --attach)")


def _check_sockets(connection: Connection) -> Finding:
    folder = private_directory(connection)
    if folder is None:
        text = "there is no private directory, so servers listen on a port, with signed sessions"
        return Finding("sockets", "note", text, "name one in BOKEH_SSH_DIR there, of mode 700")
    with private_socket(connection) as spot:
        works = spot.path is not None
    if not works:
        text = "they cannot be forwarded, so servers listen on a port, with signed sessions"
        return Finding("sockets", "note", text, "ask the administrator for AllowStreamLocalForwarding")
    return Finding("sockets", "good", f"private ones work, in {folder}")


def _check_gateway(connection: Connection) -> Finding:
    proof = ListenerProbe(connection)
    try:
        where = connection.listen((LOOPBACK, 0), proof.handle)
    except ForwardError as exc:
        text = "it cannot be one by port: the server refuses to listen for others"
        return Finding("as a gateway", "note", text, next_step(exc))
    try:
        port = int(where[1])
        reached, exposed = proof.reaches((LOOPBACK, port)), is_exposed(proof, port)
    finally:
        proof.close()
        connection.unlisten(where)
    if reached is False:
        text = (
            f"it cannot be one by port: it says that it listens on port {port}, but nothing comes from there"
        )
        return Finding("as a gateway", "note", text, "publish by name, which uses a private socket")
    names = sorted(published(connection))
    text = "it can be one" + (f"; published there: {', '.join(names)}" if names else "")
    if exposed:
        text = "its ports are open to its whole network (GatewayPorts yes)"
        hint = "publish by name, which uses a private socket, or ask for GatewayPorts clientspecified"
        return Finding("as a gateway", "note", text, hint)
    return Finding("as a gateway", "good", text)


def _check_files(connection: Connection) -> Finding:
    with contextlib.closing(Sftp(connection)) as sftp:
        try:
            sftp.wait()
        except SftpError as exc:
            text = f"no SFTP ({exc}), so what --upload brings goes a slower way"
            return Finding("files", "note", text, "ask the administrator for Subsystem sftp and MaxSessions")
    return Finding("files", "good", "SFTP works, for --upload")


def _check_server(
    connection: Connection, serve: ServerOptions, lasting: list[Finding], *, sockets: bool
) -> Finding:
    """Start a server for a moment.

    :param lasting: gets what became of it when its session ended
    """
    began = time.monotonic()
    launch = serve.launch_spec(BOKEH_PORT)
    launch = dataclasses.replace(launch, socket=launch.socket and sockets, grace=_MOMENT)
    server = Server.start(connection, launch)
    took = time.monotonic() - began
    lasting.append(_check_loss(connection, server))
    where = "a private socket" if server.socket else f"port {server.port}"
    text = f"{server.versions} started in {took:.1f} s, on {where}"
    there, here = _version(server.versions), _version_here()
    if here and there and here.split(".")[:2] != there.split(".")[:2]:
        hint = f"pages do not mind; for pull_session, install the same one: pip install 'bokeh~={there}'"
        return Finding("server", "note", f"{text}; Bokeh here is {here}", hint)
    return Finding("server", "good", text)


def _check_loss(connection: Connection, server: Server) -> Finding:
    """End a server's session, and have the server back; ends the server."""
    server_ref = server.server_ref
    if server_ref is None or server.doomed:
        server.stop()
        why = (
            f"it ends when the connection does ({server.doomed})" if server.doomed else "nobody could find it"
        )
        return _lost(why)
    server.close()
    try:
        Server.adopt(connection, server_ref, launch=server.launch).stop()
    except (ServerGoneError, ServerExitedError):
        return _lost("the SSH server ends it with its session")
    except BokehSSHError as exc:
        return Finding(
            "after a loss", "note", f"it could not be seen ({describe_error(exc)})", next_step(exc)
        )
    return Finding(
        "after a loss", "good", "a server waits for its tunnel, and can be left running (--detach)"
    )


def _lost(why: str) -> Finding:
    text = f"a new server is started, and none can be left running (--detach): {why}"
    return Finding("after a loss", "note", text, "ask the administrator, or run the server by other means")


def _version(text: str) -> str:
    found = re.search(r"Bokeh\D{0,20}(\d{1,9}\.\d{1,9}(?:\.\d{1,9})?)", text)
    return found[1] if found else ""


def _version_here() -> str:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version("bokeh")
    return ""


def _check_servers(connection: Connection, python: str | None) -> Finding:
    every = list_servers(connection, python=python)
    if not every:
        return Finding("your servers", "good", "none runs there")
    names = ", ".join(f"{each.id} ({' '.join(each.apps) or each.state})" for each in every)
    hint = f"bokeh-ssh attach {connection.name} opens one, bokeh-ssh stop {connection.name} ends one"
    return Finding("your servers", "note", f"{len(every)}: {names}", hint)
