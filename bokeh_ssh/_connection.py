"""One SSH connection: reached, verified and logged in to, through all its hops."""

from __future__ import annotations

import contextlib
import logging
import random
import socket
import struct
import threading
import time
from collections.abc import Callable

import paramiko

from bokeh_ssh import _auth, _hostkeys
from bokeh_ssh._dial import dial
from bokeh_ssh._errors import (
    BokehSSHError,
    ConnectionLostError,
    ConnectTimeoutError,
    ForwardError,
    ForwardingRefusedError,
    PortInUseError,
    ProtocolError,
    RefusedError,
    SessionError,
    TargetUnreachableError,
)
from bokeh_ssh._events import Authenticated, Connecting, OnEvent, ignore
from bokeh_ssh._fork import in_child
from bokeh_ssh._pump import Pump, reset
from bokeh_ssh._route import Hop, find_route
from bokeh_ssh._session import Session
from bokeh_ssh._stream import Stream
from bokeh_ssh._target import Host
from bokeh_ssh._transport import IncomingHandler, Transport
from bokeh_ssh._wait import wait

log = logging.getLogger("bokeh_ssh.connection")

#: Seconds between questions whether the server is still there, and how many may go unanswered
#: (ServerAliveInterval and ServerAliveCountMax).
_ALIVE_INTERVAL = 5.0
_ALIVE_COUNT = 3
#: Seconds for a server that may be busy to answer a question that costs it nothing.
_PING = 2.0
_PROHIBITED = 1
_CONNECT_FAILED = 2
#: An sshd that is full (MaxStartups) hangs up before its banner; trying again soon is what helps.
_HANG_UP_RETRIES = 3
#: What newer ones say before they do (sshd.c, drop_connection).
_FULL = ("Exceeded MaxStartups", "Not allowed at this time")


class Connection:
    """A verified, authenticated SSH connection. Made by :func:`connect`; a context manager."""

    def __init__(self, hop: Hop, transport: Transport, pump: Pump, methods: tuple[str, ...]) -> None:
        self.hop = hop
        self.name = hop.label
        self.transport = transport
        self.pump = pump
        self.methods = methods
        self.lost = threading.Event()
        self.reason = ""
        self._on_lost: list[Callable[[str], None]] = []
        self._under: Connection | None = None
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self._watchdog: threading.Thread | None = None
        in_child(self, Connection._abandon)

    def _abandon(self) -> None:
        """Be closed in a forked child: not one byte of its may go out."""
        self._closing = threading.Event()
        self._closing.set()
        self.transport.abandon()

    def __repr__(self) -> str:
        state = "closed" if self._closing.is_set() else "lost" if self.lost.is_set() else "open"
        return f"<Connection {self.hop.user}@{self.name} {state}>"

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # Life and death.

    @property
    def alive(self) -> bool:
        """Whether the connection works, as far as is known."""
        return self.transport.alive and not self._closing.is_set()

    def on_lost(self, call: Callable[[str], None]) -> None:
        """Have ``call`` told the reason when the connection is lost, but not when it is closed."""
        with self._lock:
            if not self.lost.is_set():
                self._on_lost.append(call)
                return
        call(self.reason)

    def _ended(self) -> None:
        if self._closing.is_set():
            return
        with self._lock:
            if self.lost.is_set():
                return
            if not self.reason:
                said = self.transport.disconnect_message
                self.reason = f"the server ended it: {said}" if said else "the line went down"
            self.lost.set()
            calls = list(self._on_lost)
        for call in calls:
            call(self.reason)

    def watch(self) -> None:
        """Start to ask regularly whether the server is still there (``ServerAliveInterval``)."""
        config = self.hop.config
        self.transport.ask(b"keepalive@openssh.com")  # its answer tells the round trip, for the windows
        interval = _ALIVE_INTERVAL if config.server_alive_interval is None else config.server_alive_interval
        count = config.server_alive_count or _ALIVE_COUNT
        if interval > 0:
            name = f"bokeh-ssh watchdog {self.name}"
            self._watchdog = threading.Thread(
                target=self._keep_watch, args=(interval, count), name=name, daemon=True
            )
            self._watchdog.start()

    def _keep_watch(self, interval: float, count: int) -> None:
        pending: list[tuple[float, Callable[[float], bool]]] = []
        while not self._closing.wait(interval) and not self.lost.is_set():
            # One question an interval, and the oldest must be answered within count intervals.
            pending.append((time.monotonic(), self.transport.ask(b"keepalive@openssh.com").wait))
            while pending and pending[0][1](0):
                pending.pop(0)
            if pending and time.monotonic() - pending[0][0] > interval * (count - 1):
                with self._lock:
                    self.reason = self.reason or f"the server did not answer for {interval * count:g} s"
                self.transport.shut(0)
                return

    def ping(self, timeout: float) -> bool:
        """Ask the server for any answer; False if none comes within ``timeout`` seconds."""
        reply = self.transport.ask(b"keepalive@openssh.com")
        return reply.wait(timeout) and not reply.lost

    def close(self) -> None:
        """End the connection and those of its hops; idempotent, within two seconds on a dead line."""
        if self._closing.is_set():
            return
        self._closing.set()
        if self.transport.alive:
            # Let what was queued (closes, cancelled listeners) go out, then say goodbye (RFC 4253, 11.1).
            bye = b"closed by user"
            self.transport.send_later(struct.pack(">BII", 1, 11, len(bye)) + bye + struct.pack(">I", 0))
            self.pump.drain(0.5)
        self.transport.shut(0.5)
        self.pump.close(0.5)
        if self._watchdog and threading.current_thread() is not self._watchdog:
            self._watchdog.join(0.5)
        if self._under:
            self._under.close()

    # What it carries.

    def run(
        self,
        command: str,
        *,
        on_stdout: Callable[[bytes], None],
        on_stderr: Callable[[bytes], None],
        on_exit: Callable[[int | None], None],
        timeout: float,
    ) -> Session:
        """Run a command through the user's login shell, without a terminal (``ssh -T host command``).

        :param on_exit: gets the exit status (negative for a signal), or None where none came
        :raises SessionError: if the server refuses
        :raises ConnectionLostError: if the line goes down, or nothing answers within ``timeout`` seconds
        """
        deadline = time.monotonic() + timeout
        session = Session(self.pump, on_stdout, on_stderr, on_exit)
        opened = self._open(b"session", b"", timeout, session)
        if isinstance(opened, tuple):
            code, text = opened
            msg = f"the server refuses to open a session ({text or f'reason {code}'})"
            hint = (
                "the account may be limited to forwarding; ask the administrator (MaxSessions, ForceCommand)"
            )
            raise SessionError(msg, host=self.name, hint=hint)
        raw = command.encode()
        opened.request(b"exec", struct.pack(">I", len(raw)) + raw)
        if not wait(session.replied, deadline - time.monotonic()) and not session.ended.is_set():
            session.close()
            raise self._silence("running a command", timeout)
        if not session.accepted:
            session.close()
            if self.lost.is_set():
                raise self.lost_error()
            msg = "the server refuses to run a command"
            raise SessionError(msg, host=self.name, hint="the account may be limited to forwarding")
        return session

    def open_socket(self, host: str, port: int, *, timeout: float) -> socket.socket:
        """Connect to ``host:port`` as seen from the server (``ssh -W``); gives a local socket.

        :raises ForwardingRefusedError: the server forbids it
        :raises TargetUnreachableError: the server cannot connect there
        :raises ConnectionLostError: the line went down, or nothing answered within ``timeout`` seconds
        """
        ours, theirs = socket.socketpair()
        try:
            splice = _Splice(self.pump, theirs)
            try:
                opened = self._open(b"direct-tcpip", _tcp(host, port, ("127.0.0.1", 0)), timeout, splice)
            except ConnectionLostError as exc:
                if not self.alive or not self.ping(_PING):
                    raise
                # The server itself answers: it still waits for the target.
                msg = f"{host} port {port} there did not answer within {timeout:.3g} s"
                hint = "check that the server can reach it: a firewall may stand between"
                raise TargetUnreachableError(msg, host=self.name, hint=hint) from exc
            if isinstance(opened, tuple):
                raise self.refusal(opened[0], opened[1], host, port)
        except BaseException:
            ours.close()
            theirs.close()
            raise
        return ours

    def forward(self, sock: socket.socket, host: str, port: int, origin: tuple[str, int]) -> None:
        """Join an accepted local connection to ``host:port`` as seen from the server; returns at once.

        Where the server refuses, the local connection is reset.
        """

        def refused(code: int, text: str) -> None:
            log.info("%s: %s port %d: %s", self.name, host, port, text or f"refused, reason {code}")
            reset(sock)

        def opened(stream: Stream) -> None:
            stream.attach(self.pump.splice(sock, stream))

        self.open_tcp(host, port, origin, opened, refused)

    def open_tcp(
        self,
        host: str,
        port: int,
        origin: tuple[str, int],
        opened: Callable[[Stream], None],
        refused: Callable[[int, str], None],
    ) -> None:
        """Ask for a channel to ``host:port`` (RFC 4254, section 7.2); the callbacks tell."""
        self.transport.open_stream(b"direct-tcpip", _tcp(host, port, origin), opened, refused)

    def listen(self, address: str, port: int, handler: IncomingHandler) -> int:
        """Have the server listen (``ssh -R``; RFC 4254, section 7.1); gives the port, also for ``port=0``.

        :raises PortInUseError: the port is taken there
        :raises ForwardingRefusedError: the server forbids it
        """
        timeout = self.hop.timeout
        ok, payload = self._ask(b"tcpip-forward", _address(address, port), timeout)
        if ok and not port and len(payload) < 4:
            msg = "the server listens on a free port, but does not say which port"
            raise ForwardError(msg, host=self.name, hint="choose a remote_port")
        if ok:
            bound = port or struct.unpack(">I", payload[:4])[0]
            self.transport.listen(address, bound, handler)
            return int(bound)
        hint = "ask the administrator for AllowTcpForwarding and PermitListen"
        if port:
            # The refusal has no reason in it; whether another port is to be had tells which it was.
            free, payload = self._ask(b"tcpip-forward", _address(address, 0), timeout)
            if free and len(payload) >= 4:
                other = struct.unpack(">I", payload[:4])[0]
                self._ask(b"cancel-tcpip-forward", _address(address, other), timeout)
                msg = f"port {port} is taken, or not permitted"
                hint = "choose another remote_port, or 0 for any free one"
                raise PortInUseError(msg, host=self.name, hint=hint, port=port, side="remote")
        msg = f"the server refuses to listen on {address} port {port}"
        raise ForwardingRefusedError(msg, host=self.name, hint=hint)

    def unlisten(self, address: str, port: int, *, timeout: float = 2) -> None:
        """Have the server stop listening; quietly, since a dead connection has stopped by itself."""
        self.transport.unlisten(address, port)
        with contextlib.suppress(ConnectionLostError):
            self._ask(b"cancel-tcpip-forward", _address(address, port), timeout)

    # Waiting for the server's answers.

    def _ask(self, kind: bytes, payload: bytes, timeout: float) -> tuple[bool, bytes]:
        reply = self.transport.ask(kind, payload)
        if not reply.wait(timeout):
            raise self._silence("a request", timeout)
        if reply.lost:
            raise self.lost_error()
        return reply.ok, reply.payload

    def _open(
        self, kind: bytes, payload: bytes, timeout: float, sink: Session | _Splice
    ) -> Stream | tuple[int, str]:
        """Open a channel; the stream, or the code and text of the refusal."""
        answered = threading.Event()
        refusal: list[tuple[int, str]] = []

        def opened(stream: Stream) -> None:
            sink.opened(stream)
            answered.set()

        def refused(code: int, text: str) -> None:
            refusal.append((code, text))
            answered.set()

        stream = self.transport.open_stream(kind, payload, opened, refused)
        try:
            if not wait(answered, timeout):
                raise self._silence("opening a channel", timeout)
        except BaseException:
            stream.close()
            raise
        if refusal and refusal[0][0] == 0:
            raise self.lost_error()
        return refusal[0] if refusal else stream

    def refusal(self, code: int, text: str, host: str, port: int) -> ForwardError:
        """Make the error for a channel to ``host:port`` that was refused with this reason."""
        where = f"{host} port {port}"
        if code == _PROHIBITED:
            msg = f"the server forbids forwarding to {where}"
            hint = "ask the administrator for AllowTcpForwarding and PermitOpen"
            return ForwardingRefusedError(msg, host=self.name, hint=hint)
        if code == _CONNECT_FAILED:
            msg = f"nothing answers on {where} there ({text or 'connect failed'})"
            return TargetUnreachableError(msg, host=self.name, hint="check that the server runs and the port")
        return ForwardError(f"no channel to {where} ({text or f'reason {code}'})", host=self.name)

    def lost_error(self) -> ConnectionLostError:
        """Make the error for a connection that ended."""
        reason = self.reason or self.transport.disconnect_message or "the line went down"
        return ConnectionLostError(
            f"the SSH connection was lost ({reason})", host=self.name, hint="open it again"
        )

    def _silence(self, what: str, timeout: float) -> ConnectionLostError:
        msg = f"{what} got no answer within {timeout:g} s"
        return ConnectionLostError(msg, host=self.name, hint="the line may be down; try again")


class _Splice:
    """Joins a socket to a stream at the moment that it opens."""

    def __init__(self, pump: Pump, sock: socket.socket) -> None:
        self._pump = pump
        self._sock = sock

    def opened(self, stream: Stream) -> None:
        stream.attach(self._pump.splice(self._sock, stream))


def _address(host: str, port: int) -> bytes:
    raw = host.encode()
    return struct.pack(">I", len(raw)) + raw + struct.pack(">I", port)


def _tcp(host: str, port: int, origin: tuple[str, int]) -> bytes:
    return _address(host, port) + _address(*origin)


def connect(host: Host, *, via: Connection | None = None, on_event: OnEvent = ignore) -> Connection:
    """Connect and log in, through all hops (``ssh``).

    Every host key is verified before any credential is sent.

    :param via: an open connection to go through; stays open when this one is closed
    :raises BokehSSHError: whatever went wrong, by stage; nothing is left open
    """
    route = find_route(host) if via is None else find_route(host)[-1:]
    for hop in route:
        _auth.check_keys(hop.host)  # a key file that is missing is told before anything is dialled
    made: list[Connection] = []
    try:
        for hop in route:
            under = made[-1] if made else via
            made.append(_connect_hop(hop, under, on_event))
            if len(made) > 1:
                made[-1]._under = made[-2]
    except BaseException:
        for connection in reversed(made):
            connection.close()
        raise
    return made[-1]


def _connect_hop(hop: Hop, under: Connection | None, on_event: OnEvent) -> Connection:
    via = under.name if under else ""
    on_event(Connecting(host=hop.label, address=hop.hostname, port=hop.port, via=via))
    files = hop.known_hosts
    known = _hostkeys.known_algorithms(hop.known_as, hop.known_port, files)
    with contextlib.ExitStack() as stack:
        transport = _handshake(hop, under, known, stack)
        peer = transport.getpeername()
        added = _hostkeys.verify(
            hop.label,
            transport.host_key_blob,
            name=hop.known_as,
            address=str(peer[0]) if under is None and isinstance(peer, tuple) else None,
            port=hop.known_port,
            files=files,
            writable=next(iter(hop.own_known_hosts), None),
            policy=hop.host.host_keys,
            ask=hop.host.prompt,
        )
        if added:
            on_event(added)
        methods = _auth.login(transport, hop.host, hop.config, user=hop.user, timeout=hop.timeout)
        connection = Connection(hop, transport, transport.pump, methods)
        stack.callback(connection.close)
        transport.on_end(connection._ended)
        connection.watch()
        on_event(Authenticated(host=hop.label, user=hop.user, methods=methods))
        stack.pop_all()  # the last step: until then Ctrl-C closes it
    return connection


def _handshake(
    hop: Hop, under: Connection | None, known: tuple[str, ...], stack: contextlib.ExitStack
) -> Transport:
    """Reach the server and exchange keys; the transport and its pump are put on ``stack``."""
    deadline = time.monotonic() + hop.timeout
    for attempt in range(_HANG_UP_RETRIES + 1):
        with contextlib.ExitStack() as attempt_stack:
            sock = _reach(hop, under, max(0.1, deadline - time.monotonic()))
            attempt_stack.callback(sock.close)
            pump = Pump(hop.label)
            attempt_stack.callback(pump.close)
            transport = Transport(sock, pump, prefer_host_keys=known)
            transport.use_compression(hop.host.compression or bool(hop.config.compression))
            # Ours is the deadline that tells what happened; paramiko's own only ends its thread.
            transport.banner_timeout = transport.handshake_timeout = hop.timeout + 5
            attempt_stack.callback(transport.shut, 0.5)
            done = threading.Event()
            transport.start_client(event=done)
            finished = wait(done, max(0.1, deadline - time.monotonic()))
            if finished and transport.alive:
                transport.packetizer.settle()
                stack.push(attempt_stack.pop_all())
                return transport
            cause = transport.get_exception()
            hung_up = finished and _hung_up(transport, cause)
        error = _handshake_error(hop, transport, cause, finished=finished, hung_up=hung_up)
        pause = random.uniform(0.2, 0.6) * 2**attempt  # noqa: S311  # jitter, not a secret
        if not hung_up or attempt == _HANG_UP_RETRIES or time.monotonic() + pause > deadline:
            raise error from cause
        time.sleep(pause)
    raise AssertionError  # the loop returns or raises


def _hung_up(transport: Transport, cause: BaseException | None) -> bool:
    """Tell whether the server ended it before its version, which is worth another try."""
    cause = getattr(cause, "__cause__", None) or cause
    broke = isinstance(cause, (EOFError, OSError)) and not isinstance(cause, TimeoutError)
    silent = all(line.startswith(_FULL) for line in transport.preamble)
    return broke and silent and not transport.remote_version


def _reach(hop: Hop, under: Connection | None, timeout: float) -> socket.socket:
    if under is None:
        return dial(hop.hostname, hop.port, name=hop.label, timeout=timeout)
    try:
        return under.open_socket(hop.hostname, hop.port, timeout=timeout)
    except TargetUnreachableError as exc:
        msg = f"{under.name} cannot connect to {hop.hostname} port {hop.port}"
        hint = f"check the name as {under.name} sees it, and that an SSH server runs there"
        raise RefusedError(msg, host=hop.label, hint=hint) from exc


def _handshake_error(
    hop: Hop, transport: Transport, cause: BaseException | None, *, finished: bool, hung_up: bool
) -> BokehSSHError:
    where = f"{hop.hostname} port {hop.port}"
    said = transport.preamble[0].strip()[:80] if transport.preamble else ""
    if hung_up:
        msg = f"{where} hung up before its version" + (f" ({said})" if said else "")
        hint = "the server may be full (MaxStartups) or refuse this address; try again later"
        return RefusedError(msg, host=hop.label, hint=hint)
    if said:
        msg = f"{where} is not an SSH server: it says {said!r}"
        return ProtocolError(msg, host=hop.label, hint="check the port")
    if not finished or isinstance(cause, socket.timeout) or "timed out" in str(cause):
        msg = f"{where} takes connections but does not answer as an SSH server within {hop.timeout:g} s"
        return ConnectTimeoutError(msg, host=hop.label, hint="check the port, or give a longer timeout")
    if isinstance(cause, paramiko.ssh_exception.IncompatiblePeer):
        msg = f"no common algorithm with {where} ({cause})"
        return ProtocolError(msg, host=hop.label, hint="the server is too old, or set up too narrowly")
    said = transport.disconnect_message or str(cause or "it hung up")
    return ProtocolError(f"the key exchange with {where} failed ({said})", host=hop.label)
