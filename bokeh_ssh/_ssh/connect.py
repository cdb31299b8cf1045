"""Open a connection: reach the server, exchange keys, verify its host key, log in; hop by hop."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import ipaddress
import random
import socket
import threading
import time
from collections.abc import Callable, Sequence

from bokeh_ssh._core.endpoint import HERE, Endpoint
from bokeh_ssh._core.errors import (
    AlgorithmError,
    AuthenticationError,
    BokehSSHError,
    ConnectError,
    ConnectionLostError,
    ConnectTimeoutError,
    ProtocolError,
    RefusedError,
    TargetUnreachableError,
)
from bokeh_ssh._core.events import Authenticated, Connecting, OnEvent, TouchRequested, Warned, ignore
from bokeh_ssh._core.host import Host, HostKeys
from bokeh_ssh._core.settings import setting
from bokeh_ssh._core.waiting import wait
from bokeh_ssh._ssh import algorithms
from bokeh_ssh._ssh.algorithms import Mismatch
from bokeh_ssh._ssh.auth import host_keys, login
from bokeh_ssh._ssh.auth.identities import check_keys
from bokeh_ssh._ssh.auth.key_memory import KeyMemory
from bokeh_ssh._ssh.auth.own_server import OwnServer, OwnServerError
from bokeh_ssh._ssh.auth.prompt_cache import PromptCache
from bokeh_ssh._ssh.config.lookup import HostConfig, Session
from bokeh_ssh._ssh.connection import Connection, Jump, opening
from bokeh_ssh._ssh.control_master import ControlMaster, MasterError
from bokeh_ssh._ssh.io_loop import IOLoop
from bokeh_ssh._ssh.proxy_command import ProxySocket
from bokeh_ssh._ssh.route import Hop, find_route
from bokeh_ssh._ssh.tcp import dial, resolve
from bokeh_ssh._ssh.transport import Transport

#: Opens the way to a host within so many seconds.
OpenStream = Callable[[float], socket.socket]

#: An sshd that is full (MaxStartups) hangs up before its banner; trying again soon is what helps.
_HANG_UP_RETRIES = 3
#: What newer ones say before they do (sshd.c, drop_connection); the second where failed logins have cost the
#: address its turn for a while (PerSourcePenalties), which no further try shortens.
_PENALTY = "Not allowed at this time"
_FULL = ("Exceeded MaxStartups", _PENALTY)


def connect(
    host: Host,
    *,
    via: Connection | None = None,
    on_event: OnEvent = ignore,
    prompt_cache: PromptCache | None = None,
    stream: OpenStream | None = None,
    stream_by: str = "",
    prefer: Sequence[str] = (),
    avoid: Sequence[str] = (),
    session: Session = "exec",
    ahead: Sequence[Endpoint | None] = (),
    on_dialled: Callable[[socket.socket, str], object] = ignore,
) -> Connection:
    """Connect and log in, through all hops (``ssh``), or through what ``ssh`` keeps open to one of them.

    Every host key is verified before any credential is sent.

    :param via: an open connection to go through; stays open when this one is closed
    :param prompt_cache: answers for a person where it can, and learns what worked
    :param stream: opens the way to the host, where that is no TCP connection: gets the seconds that it may
        take, returns a connected socket; a host that is reached so has no jump host and no ProxyCommand
    :param stream_by: the machine that the stream goes through
    :param prefer: addresses that were reached before: of a name with several, as login nodes have, the one
        that leads to the same machine again is dialled first
    :param avoid: addresses of machines that were of no use: they are dialled last
    :param session: whether commands are run on it, or nothing is but forwards (``ssh -N``)
    :param ahead: what channels will be wanted to, as often as they will, and None for a session: they are
        asked for with the login, where that is known to succeed
    :param on_dialled: gets what was dialled from here, and for which machine; raises where that leads nowhere
    :raises BokehSSHError: whatever went wrong, by stage; nothing is left open
    """
    route = find_route(host, via=via.hop.hostname if via else None, session=session)
    if stream:
        route = [dataclasses.replace(hop, by=stream_by) for hop in route]
    prompt_cache = prompt_cache or PromptCache()
    for text in dict.fromkeys(text for hop in route for text in hop.config.warnings):
        on_event(Warned(host=route[-1].label, text=text))
    for hop in route:
        check_keys(hop.host)  # a key file that is missing is told before anything is dialled

    def connect_all(route: Sequence[Hop], jump: Jump | None) -> Connection:
        try:
            for number, hop in enumerate(route, 1):
                wanted = [(each.hostname, each.port) for each in route[number : number + 1]] or ahead
                closed: list[str] = []
                care = 0
                while True:
                    open_stream = stream or _dialler(hop, jump or via, prefer, (*avoid, *closed), on_dialled)
                    args = hop, jump, via, on_event, prompt_cache, open_stream, wanted
                    try:
                        connection = _connect_hop(*args, care)
                        break
                    except _ObjectionError as exc:
                        care = exc.care
                    except AuthenticationError as exc:
                        if not exc.ended_by or exc.ended_by in closed:
                            raise
                        closed.append(exc.ended_by)
                        care = 0
                        if not has_others(hop, (*avoid, *closed)):
                            raise
                        text = f"{exc.message}; another machine of that name is tried"
                        on_event(Warned(host=hop.label, text=text))
                jump = connection
        except BaseException:
            if jump:
                jump.close()
            raise
        return connection  # a route has a hop

    # Who has logged in with ssh need not do so again: nothing before that machine is dialled either.
    usable = len(route) if via is None and stream is None else 0
    for at in range(usable - 1, -1, -1):
        try:
            path = route[at].control_path
            if path and (master := ControlMaster.find(path, route[at].label)):
                rest = route[at + 1 :]
                return connect_all(rest, master) if rest else _connect_by_session(route[-1], master, on_event)
        except (MasterError, OwnServerError) as exc:
            text = f"the ControlMaster of {route[at].label} is not used ({exc}); logging in"
            on_event(Warned(host=route[at].label, text=text))
    return connect_all(route, None)


def has_others(hop: Hop, known: Sequence[str]) -> bool:
    """Return whether a machine's name has other addresses than these."""
    origin = hop.origin
    found = resolve(hop.hostname, hop.port, name=hop.label, timeout=hop.timeout, family=origin.family)
    return any(end[0] not in known for _, end in found)


class _ObjectionError(Exception):
    """The server has hung up at a login that began with a key.

    :ivar care: with how much the next is to be made, see :class:`KeyMemory`
    """

    def __init__(self, care: int) -> None:
        super().__init__(care)
        self.care = care


def _connect_by_session(hop: Hop, master: ControlMaster, on_event: OnEvent) -> Connection:
    """Log in by an SSH server that a session of the master starts, for a connection of our own.

    :raises MasterError: if no session can be had
    :raises OwnServerError: if none can be started, or it does not let us in
    """
    on_event(Connecting(host=hop.label, address=hop.hostname, port=hop.port, via=master.name))
    server = OwnServer(lambda command: master.open_session(command, timeout=hop.timeout), hop.timeout)
    own = dataclasses.replace(
        hop,
        host=Host(hop.label, hop.user, pkey=server.key, allow_agent=False, look_for_keys=False),
        config=HostConfig(hop.hostname, compression=hop.host.compression or hop.config.compression),
    )
    with contextlib.ExitStack() as stack:
        try:
            transport = _handshake(own, (), stack, lambda _: server.sock)
            if transport.host_key_blob != server.host_key:
                msg = "it has another host key than it said"
                raise OwnServerError(msg)
            login.login(transport, own.host, own.config, user=hop.user, timeout=hop.timeout)
        except (ConnectError, AuthenticationError, ConnectionLostError) as exc:
            raise OwnServerError(exc.message) from exc
        connection = Connection(hop, transport, ("ControlMaster",))
        stack.callback(connection.close)
        on_event(Authenticated(host=hop.label, user=hop.account, methods=connection.methods))
        stack.pop_all()  # the last step: until then Ctrl-C closes it
    return connection


def _connect_hop(
    hop: Hop,
    jump: Jump | None,
    via: Connection | None,
    on_event: OnEvent,
    prompt_cache: PromptCache,
    stream: OpenStream,
    ahead: Sequence[Endpoint | None],
    care: int,
) -> Connection:
    proxy_connection = jump or via
    host = hop.host
    if host.prompt:
        prompt = None if hop.config.batch_mode else prompt_cache.begin(host.prompt)
        host = dataclasses.replace(host, prompt=prompt)
    program = "its ProxyCommand" if hop.proxy_command else ""
    through = proxy_connection.name if proxy_connection else hop.by or program
    port = 0 if hop.by else hop.port
    on_event(Connecting(host=hop.label, address=hop.hostname, port=port, via=through))
    files = hop.known_hosts
    command = hop.config.known_hosts_command
    known = host_keys.known_algorithms(hop.known_as, hop.known_port, files, command)
    with contextlib.ExitStack() as stack:
        transport = _handshake(hop, known, stack, stream)
        try:
            peer = transport.getpeername()
        except OSError as exc:  # it has ended since
            raise _cut(hop) from exc
        key = transport.host_key_blob
        address = str(peer[0]) if proxy_connection is None and isinstance(peer, tuple) else None
        for event in host_keys.verify(
            hop.label,
            key,
            name=hop.known_as,
            address=address,
            port=hop.known_port,
            files=files,
            writable=next(iter(hop.own_known_hosts), None),
            policy=_host_key_policy(hop),
            ask=host.prompt,
            rules=_host_key_rules(hop, address),
        ):
            on_event(event)
        memory = KeyMemory(key, hop.user, care=care)
        try:
            methods = login.login(
                transport,
                host,
                hop.config,
                user=hop.user,
                timeout=hop.timeout,
                warn=lambda text: on_event(Warned(host=hop.label, text=text)),
                touch=lambda key: on_event(TouchRequested(host=hop.label, key=key)),
                memory=memory,
                ahead=functools.partial(transport.ask_ahead, [*map(_request, ahead)]) if ahead else None,
            )
        except (AuthenticationError, ConnectionLostError) as exc:
            if not memory.objected:
                if isinstance(exc, AuthenticationError) and exc.ended_by is not None:
                    exc.ended_by = address or ""
                raise
            raise _ObjectionError(memory.note_objection()) from exc
        except ConnectTimeoutError:
            if memory.unanswered:  # the line, or the server: the next login is made with more care
                memory.note_objection(silent=True)
            raise
        if memory.refused:
            transport.drop_ahead()
        if host.prompt:
            prompt_cache.keep()
        connection = Connection(hop, transport, methods, jump)
        stack.callback(connection.close)
        on_event(Authenticated(host=hop.label, user=hop.account, methods=methods))
        stack.pop_all()  # the last step: until then Ctrl-C closes it
    return connection


def _request(wanted: Endpoint | None) -> tuple[bytes, bytes]:
    """Return what a channel to an endpoint is asked for with, or a session."""
    return (b"session", b"") if wanted is None else opening(wanted, HERE)


def _host_key_policy(hop: Hop) -> HostKeys:
    """Return what becomes of an unknown key; StrictHostKeyChecking yes has nobody asked, as with ``ssh``.

    "accept-new" is never a default: who says it means it, as with ``ssh -o``.
    """
    asked = hop.host.host_keys == "ask"
    return "strict" if asked and hop.config.strict_host_key_checking else hop.host.host_keys


def _host_key_rules(hop: Hop, address: str | None) -> host_keys.Rules:
    """Return what the config says about host keys, besides the names of files.

    :param address: what was dialled; None where we did not
    """
    config, cas = hop.config, hop.config.algorithms.get("casignaturealgorithms")
    note = ""
    if hop.host.host_keys != _host_key_policy(hop):
        note = f"nobody is asked: StrictHostKeyChecking yes ({config.lines['stricthostkeychecking']})"
    if config.unchecked_localhost and address and not config.host_key_alias:
        where = config.lines.get("nohostauthenticationforlocalhost", "")
        if ipaddress.ip_address(address.partition("%")[0]).is_loopback:
            note = f"NoHostAuthenticationForLocalhost is not followed ({where}): others could listen there"
    for keyword, is_said in (
        ("GSSAPIKeyExchange", config.gssapi_key_exchange),
        ("VerifyHostKeyDNS", config.verify_host_key_dns),
    ):
        if is_said and not note:
            note = f"{keyword} is not followed ({config.lines[keyword.lower()]}): the key must be known"
    return host_keys.Rules(
        command=config.known_hosts_command,
        revoked=config.revoked_host_keys,
        hash_names=bool(config.hash_known_hosts),
        check_address=bool(config.check_host_ip),
        least_rsa_bits=config.required_rsa_size or 0,
        ca_algorithms=algorithms.ca_signatures(cas) if cas else None,
        note=note,
    )


def _handshake(
    hop: Hop,
    known: tuple[str, ...],
    stack: contextlib.ExitStack,
    stream: OpenStream,
) -> Transport:
    """Reach the server and exchange keys; the transport and its loop are put on ``stack``."""
    asked = algorithms.select(hop.config.algorithms, hop.config.lines, hop.label)
    deadline = time.monotonic() + hop.timeout
    for attempt in range(_HANG_UP_RETRIES + 1):
        with contextlib.ExitStack() as attempt_stack:
            sock = stream(max(0.1, deadline - time.monotonic()))
            attempt_stack.callback(sock.close)
            if hop.origin.attempts > 1:  # which have taken their time
                deadline = max(deadline, time.monotonic() + hop.timeout)
            io_loop = IOLoop(hop.label)
            attempt_stack.callback(io_loop.close)
            transport = Transport(sock, io_loop, prefer_host_keys=known, algorithms=asked)
            transport.use_compression(hop.host.compression or bool(hop.config.compression))
            # Ours is the deadline that tells what happened; paramiko's own only ends its thread.
            transport.banner_timeout = transport.handshake_timeout = hop.timeout + 5
            attempt_stack.callback(transport.shut, 0.5)
            done = threading.Event()
            transport.start_client(event=done)
            finished = wait(done, max(0.1, deadline - time.monotonic()))
            if finished and transport.alive:
                with contextlib.suppress(OSError):  # it has ended since, as whoever goes on is told
                    transport.packetizer.settle()
                stack.push(attempt_stack.pop_all())
                return transport
            cause = transport.get_exception()
            hung_up = finished and _hung_up(transport, cause)
            error = _handshake_error(hop, transport, cause, finished=finished, hung_up=hung_up)
            status, ended = sock.ended() if isinstance(sock, ProxySocket) and hung_up else (None, "")
            if status is not None and not transport.preamble:
                msg = f"its ProxyCommand ended before an SSH server answered ({ended})"
                hint = "run that line of your ssh config in a shell, with the host and port put in"
                if status:
                    raise ConnectError(msg, host=hop.label, hint=hint) from cause
                # As nc does where a full server hangs up.
                hint += "; if that works, the server may be full (MaxStartups): try again later"
                error = RefusedError(msg, host=hop.label, hint=hint)
        pause = random.uniform(0.2, 0.6) * 2**attempt  # noqa: S311  # jitter, not a secret
        penalized = any(line.startswith(_PENALTY) for line in transport.preamble)
        if penalized or not hung_up or attempt == _HANG_UP_RETRIES or time.monotonic() + pause > deadline:
            raise error from cause
        time.sleep(pause)
    raise AssertionError  # the loop returns or raises


def _hung_up(transport: Transport, cause: BaseException | None) -> bool:
    """Return whether the server ended it before its version, which is worth another try."""
    cause = getattr(cause, "__cause__", None) or cause
    broke = isinstance(cause, (EOFError, OSError)) and not isinstance(cause, TimeoutError)
    silent = all(line.startswith(_FULL) for line in transport.preamble)
    return broke and silent and not transport.remote_version


def _dialler(
    hop: Hop,
    proxy_connection: Jump | None,
    prefer: Sequence[str],
    avoid: Sequence[str],
    on_dialled: Callable[[socket.socket, str], object],
) -> OpenStream:
    def open_stream(timeout: float) -> socket.socket:
        with contextlib.ExitStack() as stack:
            sock = _open_socket(hop, proxy_connection, prefer, avoid, timeout)
            stack.callback(sock.close)
            if proxy_connection is None and not hop.proxy_command:
                on_dialled(sock, hop.label)
            stack.pop_all()
        return sock

    return open_stream


def _open_socket(
    hop: Hop, proxy_connection: Jump | None, prefer: Sequence[str], avoid: Sequence[str], timeout: float
) -> socket.socket:
    if proxy_connection is None and hop.proxy_command:
        return ProxySocket.start(hop.proxy_command, name=hop.label)
    if proxy_connection is None:
        order = {"prefer": prefer, "avoid": avoid}
        return dial(hop.hostname, hop.port, name=hop.label, timeout=timeout, origin=hop.origin, **order)
    try:
        return proxy_connection.open_socket((hop.hostname, hop.port), timeout=timeout)
    except TargetUnreachableError as exc:
        msg = f"{proxy_connection.name} cannot connect to {hop.where}"
        hint = f"check the name as {proxy_connection.name} sees it, and that an SSH server runs there"
        raise RefusedError(msg, host=hop.label, hint=hint) from exc


def _handshake_error(
    hop: Hop, transport: Transport, cause: BaseException | None, *, finished: bool, hung_up: bool
) -> BokehSSHError:
    where = hop.where
    said = transport.preamble[0].strip()[:80] if transport.preamble else ""
    if hung_up:
        msg = f"{where} hung up before its version" + (f" ({said})" if said else "")
        hint = "the server may be full (MaxStartups) or refuse this address; try again later"
        if said.startswith(_PENALTY):
            hint = "after failed logins it refuses this address for a while (PerSourcePenalties): wait 10 min"
        return RefusedError(msg, host=hop.label, hint=hint)
    if said and not transport.remote_version:  # lines before that are allowed (RFC 4253, section 4.2)
        msg = f"{where} is not an SSH server: it says {said!r}"
        return ProtocolError(msg, host=hop.label, hint="check the port")
    if not finished or isinstance(cause, socket.timeout) or "timed out" in str(cause):
        msg = f"{where} takes connections but does not answer as an SSH server within {hop.timeout:g} s"
        longer = f"give a longer {setting('timeout')}"
        hint = f"check the port, or {longer}"
        if transport.remote_version:
            msg = f"{where} answers as an SSH server, but does not exchange keys within {hop.timeout:g} s"
            hint = (
                "try again; if it is always so, something between loses large packets, as a VPN with too "
                f"large an MTU does, or the server is too busy: {longer}"
            )
        return ConnectTimeoutError(msg, host=hop.label, hint=hint)
    if mismatch := transport.mismatch:
        return _algorithm_error(hop, where, mismatch)
    said = transport.disconnect_message
    if transport.speaks and not said and (cause is None or isinstance(cause, (EOFError, OSError))):
        return _cut(hop)
    said = said or str(cause or "") or "it hung up"
    return ProtocolError(f"the key exchange with {where} failed ({said})", host=hop.label)


def _cut(hop: Hop) -> ConnectionLostError:
    msg = f"the connection to {hop.where} ended during the key exchange"
    return ConnectionLostError(msg, host=hop.label, hint="try again")


def _algorithm_error(hop: Hop, where: str, mismatch: Mismatch) -> AlgorithmError:
    line = hop.config.lines.get(mismatch.keyword.lower(), "")
    said = f" ({mismatch.keyword} in {line})" if line else ""
    theirs, ours = ", ".join(mismatch.theirs) or "none", ", ".join(mismatch.ours)
    msg = f"no common {mismatch.what} with {where}: the server has {theirs}; asked for were {ours}{said}"
    hint = f"have the server allow one of these ({mismatch.keyword} in its sshd_config)"
    if line and mismatch.has_others:
        hint = f"change {line}, which leaves out what the server has"
    return AlgorithmError(
        msg, host=hop.label, hint=hint, kind=mismatch.what, theirs=mismatch.theirs, ours=mismatch.ours
    )
