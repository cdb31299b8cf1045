"""One SSH connection, once it is up: its life, and what it carries."""

from __future__ import annotations

import contextlib
import logging
import re
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

from bokeh_ssh._core.endpoint import HERE, Endpoint, Origin, format_endpoint
from bokeh_ssh._core.errors import (
    ConnectionLostError,
    ForwardError,
    ForwardingRefusedError,
    PortInUseError,
    SessionError,
    TargetUnreachableError,
)
from bokeh_ssh._core.settings import setting
from bokeh_ssh._core.threads import Thread
from bokeh_ssh._core.waiting import clocks, wait
from bokeh_ssh._ssh.io_loop import IOLoop
from bokeh_ssh._ssh.messages import AGENT_REQUEST, CONNECT_FAILED, PROHIBITED, SHORTAGE, UNKNOWN_TYPE, string
from bokeh_ssh._ssh.relay import MakeRelay, SocketRelay, reset
from bokeh_ssh._ssh.route import Hop
from bokeh_ssh._ssh.session import Session
from bokeh_ssh._ssh.transport import LOST, Channel, EarlyChannel, IncomingHandler, Reply, Transport

log = logging.getLogger("bokeh_ssh.connection")

#: Seconds between questions whether the server is still there, and how many may go unanswered
#: (ServerAliveInterval and ServerAliveCountMax).
_ALIVE_INTERVAL = 5.0
_ALIVE_COUNT = 3
#: Seconds for a server that may be busy to answer a question that costs it nothing.
_PING = 2.0
#: A Unix socket with more connections than it accepts is tried again: seconds for which it may take none, the
#: most for one connection, as long as it takes others, and those between tries.
_TAKES_NONE = 5.0
_CROWDED = 60.0
_RETRY = 0.05
#: What forbids as much as sshd_config, and belongs to the account.
_OF_KEY = ", unless it is your key's own line in authorized_keys there (restrict, permitopen, permitlisten)"
#: As OpenSSH's server does since 9.2 where its administrator says so; it gives no reason.
_EARLY = "it ended right after the login"
_EARLY_HINT = (
    "open it again; if it always ends there, the log of the SSH server says why, such as a ChrootDirectory "
    "that others may write to"
)
_UNUSED = "it was closed while nothing used it, perhaps by the server's UnusedConnectionTimeout"
#: A port that hardly anything listens on (tcpmux).
_NO_PORT = 1
#: What servers say that forbid a target with the reason of one that cannot be reached (Erlang: "Forwarding
#: disabled"); an errno's words are none of these.
_FORBIDS = re.compile(
    r"(?<!operation )not (permitted|allowed)|disabled|forbid|prohibit|administrat|disallowed|by policy", re.I
)


class Jump(Protocol):
    """What a connection goes through: another, or one that ``ssh`` keeps open.

    :ivar name: what it is, for messages
    """

    name: str

    @property
    def peers(self) -> tuple[str, ...]: ...

    def open_socket(self, target: tuple[str, int], *, timeout: float) -> socket.socket: ...

    def close(self) -> None: ...


class Connection:
    """A verified, authenticated SSH connection. Made by ``_ssh.connect.connect``; a context manager.

    :param jump: what it goes through, if that is to be closed with it
    :ivar lost: set once it has ended without having been closed
    :ivar unused: the server hung up on it while nothing was open on it
    """

    def __init__(
        self, hop: Hop, transport: Transport, methods: tuple[str, ...], jump: Jump | None = None
    ) -> None:
        self.hop = hop
        self.name = hop.label
        self.transport = transport
        self.io_loop = transport.io_loop
        self.methods = methods
        self.lost = threading.Event()
        self.reason = ""
        self.unused = False
        self._reached: dict[Endpoint, float] = {}  # when each target has last taken a connection
        self._retries: dict[Callable[[], None], bool] = {}  # each gives back what is to be tried again
        self._on_lost: list[Callable[[str], None]] = []
        self._jump = jump
        #: The connections that it goes through, as far as they are this program's, and itself.
        self.hops: tuple[Connection, ...] = (*(jump.hops if isinstance(jump, Connection) else ()), self)
        self._closing = threading.Event()
        self._lock = threading.RLock()  # a signal handler may close meanwhile
        self._keepalive: _Keepalive | None = None
        #: The address that is connected to from this machine: the first jump host's, if there is one.
        self.peers = jump.peers if jump else _peers(transport)
        #: The machine's own address, where it is connected to from this machine.
        self.address = "" if jump else next(iter(self.peers), "")
        transport.on_end(self._on_end)
        self._start_keepalive()

    def __repr__(self) -> str:
        state = "closed" if self._closing.is_set() else "lost" if self.lost.is_set() else "open"
        return f"<Connection {self.hop.account}@{self.name} {state}>"

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # Life and death.

    @property
    def alive(self) -> bool:
        """Whether the connection works, as far as is known."""
        return self.transport.alive and not self._closing.is_set()

    @property
    def first(self) -> Connection:
        """The one of them that leaves this machine."""
        return self.hops[0]

    def on_lost(self, call: Callable[[str], None]) -> None:
        """Call ``call`` with the reason when the connection is lost, but not when it is closed."""
        with self._lock:
            if not self.lost.is_set():
                self._on_lost.append(call)
                return
        call(self.reason)

    def _on_end(self) -> None:
        if self._closing.is_set():
            return
        with self._lock:
            if self.lost.is_set():
                return
            if not self.reason:
                said = self.transport.disconnect_message
                fault = self.transport.fault or "the line went down"
                early = not self.transport.rtt  # it was asked at once whether it is there
                self.unused = self.transport.ended_unused and not (said or early)
                if self.unused:
                    fault = _UNUSED
                elif early and not self.transport.fault:
                    fault = _EARLY
                self.reason = f"the server ended it: {said}" if said else fault
            self.lost.set()
            calls = list(self._on_lost)
        for call in calls:
            call(self.reason)

    def _start_keepalive(self) -> None:
        """Start to ask regularly whether the server is still there (``ServerAliveInterval``)."""
        config = self.hop.config
        self.send_keepalive()  # its answer tells the round trip, for the windows
        interval = _ALIVE_INTERVAL if config.server_alive_interval is None else config.server_alive_interval
        count = config.server_alive_count or _ALIVE_COUNT
        if interval > 0:
            self._keepalive = _Keepalive(self, interval, count)

    def give_up(self, reason: str) -> None:
        """End it as lost, at once; never blocks. The first reason counts."""
        with self._lock:
            self.reason = self.reason or reason
        self.transport.shut(0)

    def ping(self, timeout: float) -> bool:
        """Ask the server for any answer; False if none comes within ``timeout`` seconds."""
        reply = self.send_keepalive()
        return reply.wait(timeout) and not reply.lost

    def send_keepalive(self) -> Reply:
        """Ask the server for any answer; never blocks."""
        return self.transport.send_question()

    def close(self) -> None:
        """End the connection and those of its hops; idempotent, within two seconds on a dead line."""
        if self._closing.is_set() or self.transport.abandoned:
            return
        self._closing.set()
        if self.transport.alive:
            # Let what was queued (closes, cancelled listeners) go out, then say goodbye (RFC 4253, 11.1).
            self.transport.send_later(struct.pack(">BI", 1, 11) + string(b"closed by user") + string(b""))
            self.io_loop.drain(0.5)
        self.transport.shut(0.5)
        self.io_loop.close(0.5)
        self._give_back_retries()
        if self._keepalive:
            self._keepalive.stop(0.5)
        if self._jump:
            self._jump.close()

    # What it carries.

    def run(
        self,
        command: str,
        *,
        on_stdout: Callable[[bytes], None],
        on_stderr: Callable[[bytes], None],
        on_exit: Callable[[int | None], None],
        timeout: float,
        agent: bool = False,
    ) -> Session:
        """Run a command through the user's login shell, without a terminal (``ssh -T host command``).

        :param on_exit: gets the exit status (negative for a signal), or None where none came
        :param agent: have the server offer it an SSH agent (``ssh -A``), which
            :func:`_ssh.agent_forwarding.lend_agent` answers
        :raises SessionError: if the server refuses
        :raises ConnectionLostError: if the line goes down, or nothing answers within ``timeout`` seconds
        """
        session = Session(self.io_loop, on_stdout, on_stderr, on_exit)
        if not self._start(session, b"exec", command, timeout, agent):
            msg = "the server refuses to run a command"
            hint = "the account may be limited to forwarding, or have no more processes (ulimit -u)"
            raise SessionError(msg, host=self.name, hint=hint)
        return session

    def subsystem(
        self,
        name: str,
        *,
        on_stdout: Callable[[bytes], None],
        on_stderr: Callable[[bytes], None],
        on_exit: Callable[[int | None], None],
        timeout: float,
        first: bytes = b"",
    ) -> Session:
        """Start a subsystem, such as ``"sftp"`` (``ssh -s``); as :meth:`run` otherwise.

        :param first: what it is to read first: sent with the request, before the server has answered
        """
        session = Session(self.io_loop, on_stdout, on_stderr, on_exit)
        if not self._start(session, b"subsystem", name, timeout, False, first):
            hint = "ask the administrator for Subsystem in sshd_config"
            raise SessionError(f"the server has no {name}", host=self.name, hint=hint)
        return session

    def _start(
        self, session: Session, kind: bytes, what: str, timeout: float, agent: bool, first: bytes = b""
    ) -> bool:
        """Open a session's channel and start something in it; whether the server does."""
        deadline = time.monotonic() + timeout
        opened = self._open_channel(b"session", b"", timeout, session)
        if isinstance(opened, tuple):
            code, text = opened
            msg = f"the server refuses to open a session ({text or f'reason {code}'})"
            hint = (
                "the account may be limited to forwarding; ask the administrator (MaxSessions, ForceCommand)"
            )
            raise SessionError(msg, host=self.name, hint=hint)
        if agent:
            opened.request(AGENT_REQUEST, b"", want_reply=False)
        opened.request(kind, string(what.encode()))
        if first:
            session.write(first)
        if not wait(session.replied, deadline - time.monotonic()) and not session.ended.is_set():
            session.close()
            raise self._silence("running a command", timeout)
        if not session.accepted:
            session.close()
            if self.lost.is_set():
                raise self.lost_error()
        return session.accepted

    def open_socket(self, target: Endpoint, *, timeout: float) -> socket.socket:
        """Connect to ``target`` as seen from the server (``ssh -W``); return a local socket.

        :raises ForwardingRefusedError: the server forbids it
        :raises TargetUnreachableError: the server cannot connect there
        :raises ConnectionLostError: the line went down, or nothing answered within ``timeout`` seconds
        """
        ours, theirs = socket.socketpair()
        handler = _RelayOnOpen(self.io_loop, theirs)
        try:
            try:
                opened = self._open_channel(*opening(target, HERE), timeout, handler)
            except ConnectionLostError as exc:
                if not self.alive or not self.ping(_PING):
                    raise
                # The server itself answers: it still waits for the target.
                msg = f"{format_endpoint(target)} there did not answer within {timeout:.3g} s"
                hint = "check that the server can reach it: a firewall may stand between"
                raise TargetUnreachableError(msg, host=self.name, hint=hint) from exc
            if isinstance(opened, tuple):
                raise self.refusal(*opened, target)
        except BaseException:
            ours.close()
            handler.give_up()
            raise
        return ours

    def check_ports(self) -> None:
        """Check that the server may connect to some port, once it does not to a socket.

        :raises ForwardingRefusedError: if it forwards nothing
        """
        try:
            self.open_socket(("127.0.0.1", _NO_PORT), timeout=self.hop.timeout).close()
        except ForwardingRefusedError as exc:
            msg = "the SSH server forbids forwarding, to sockets and to ports"
            raise ForwardingRefusedError(
                msg, host=self.name, hint=f"ask the administrator for AllowTcpForwarding{_OF_KEY}"
            ) from exc
        except ForwardError:
            pass

    def forward(
        self,
        sock: socket.socket,
        target: Endpoint,
        origin: Origin,
        check: Callable[[Callable[[bool], None], float], None] | None = None,
        make: MakeRelay = SocketRelay,
        again: Callable[[], None] | None = None,
        ahead: EarlyChannel | None = None,
    ) -> None:
        """Join an accepted local connection to ``target`` as seen from the server; returns at once.

        Where the server refuses, the local connection is reset.

        :param check: tells, once the server has connected and has said so at that time, whether anything may
            go there; on the transport thread
        :param make: makes what joins them
        :param again: takes the local connection back, where the line was lost before anything of it was sent
        :param ahead: a channel to ``target`` that is open and checked already; None asks for one
        """
        began = time.monotonic()

        def refused(code: int, text: str) -> None:
            if code == CONNECT_FAILED and self._is_crowded(target, began):
                self._retries[give_back] = True
                self.io_loop.post(lambda: self.io_loop.later(_RETRY, retry))
                if not self.alive:
                    self._give_back_retries()
                return
            log.info("%s: %s: %s", self.name, format_endpoint(target), text or f"refused, reason {code}")
            give_back()

        def give_back() -> None:
            if again and not self.alive:
                again()
            else:
                reset(sock)

        def opened(channel: Channel) -> None:
            if check:
                early = EarlyChannel(channel)
                check(lambda fine: go_on(early) if fine else give_up(early), channel.opened_at)
            else:
                channel.attach(self.io_loop.relay(sock, channel, make=make))

        def go_on(early: EarlyChannel) -> None:
            early.hand_over(self.io_loop.relay(sock, early.channel, make=make))

        def give_up(early: EarlyChannel) -> None:
            self.io_loop.post(early.channel.close)
            give_back()

        def retry() -> None:
            if self._retries.pop(give_back, False):
                try_open()

        def try_open() -> None:
            self.open_channel(target, origin, opened, refused)

        if ahead:
            go_on(ahead)
        else:
            try_open()

    def _give_back_retries(self) -> None:
        """Return the local connections that were to be tried again, which an ended loop does not."""
        for give_back in list(self._retries):
            if self._retries.pop(give_back, False):
                give_back()

    def _is_crowded(self, target: Endpoint, began: float) -> bool:
        """Return whether a target that refuses may only have more connections than it accepts at a time.

        A port lets them wait; a Unix socket does not, and sshd does not wait for it. One that has taken
        nobody of late has ended.
        """
        now = time.monotonic()
        taken = self._reached.get(target)
        return (
            isinstance(target, str)
            and taken is not None
            and now < began + _CROWDED
            and now < taken + _TAKES_NONE
        )

    def close_unclaimed(self, after: float) -> None:
        """Close in some seconds what was asked for ahead and is not wanted by then; never blocks."""
        self.io_loop.post(lambda: self.io_loop.later(after, self.transport.close_unclaimed))

    def open_channel(
        self,
        target: Endpoint,
        origin: Origin,
        opened: Callable[[Channel], None],
        refused: Callable[[int, str], None],
    ) -> None:
        """Ask for a channel to ``target``; the callbacks tell."""

        def reached(channel: Channel) -> None:
            self._reached[target] = time.monotonic()
            opened(channel)

        self.transport.request_channel(*opening(target, origin), reached, refused)

    def listen(self, where: Endpoint, handler: IncomingHandler) -> Endpoint:
        """Ask the server to listen (``ssh -R``); return where it does, with the real port for ``port=0``.

        :raises PortInUseError: the port is taken there
        :raises ForwardingRefusedError: the server forbids it; with a socket, it may also be in the way of a
            file, or in a folder that is not there
        """
        timeout = self.hop.timeout

        def granted(payload: bytes) -> None:
            # Here, since who connects there at once may be the next that the server tells of.
            if isinstance(where, str):
                self.transport.listen(where, handler)
            elif bound := where[1] or bound_port(payload):
                self.transport.listen((where[0], bound), handler)

        try:
            ok, payload = self._global_request(*listening(where), timeout, granted)
        except ConnectionLostError as exc:
            if not self.alive or not self.ping(_PING):
                raise
            raise self._cannot_listen("does not answer") from exc
        if isinstance(where, str):
            if ok:
                return where
            msg = f"the server refuses to listen on {format_endpoint(where)}"
            hint = "ask the administrator for AllowStreamLocalForwarding"
            raise ForwardingRefusedError(msg, host=self.name, hint=hint)
        address, port = where
        bound = port or bound_port(payload)
        if ok and not bound:
            msg = "the server listens on a free port, but does not say which port"
            raise ForwardError(msg, host=self.name, hint=f"choose a {setting('remote_port')}")
        if ok and bound:
            return address, bound
        hint = f"ask the administrator for AllowTcpForwarding and PermitListen{_OF_KEY}"
        if port:
            # The refusal has no reason in it; whether another port is available tells which it was.
            free, payload = self._global_request(*listening((address, 0)), timeout)
            other = bound_port(payload)
            if free and other:
                self._global_request(*cancelling((address, other)), timeout)
                msg = f"port {port} is taken, or not permitted"
                hint = f"choose another {setting('remote_port')}, or 0 for any free one"
                raise PortInUseError(msg, host=self.name, hint=hint, port=port, side="remote")
            if self._is_taken(address, port):  # no other one may be permitted
                msg = f"port {port} is taken: something listens there, as another publication does"
                hint = f"end that, or choose another {setting('remote_port')}"
                raise PortInUseError(msg, host=self.name, hint=hint, port=port, side="remote")
        msg = f"the server refuses to listen on {address} port {port}"
        raise ForwardingRefusedError(msg, host=self.name, hint=hint)

    def _is_taken(self, address: str, port: int) -> bool:
        """Return whether something listens there; where we may not connect, nothing is learnt."""
        everywhere = ("", "*", "0.0.0.0", "localhost")  # noqa: S104 - where the server was to listen
        here = "127.0.0.1" if address in everywhere else address
        try:
            self.open_socket((here, port), timeout=self.hop.timeout).close()
        except ForwardError:
            return False
        return True

    def _cannot_listen(self, what: str) -> ForwardingRefusedError:
        msg = f"the server {what} the request to listen"
        hint = "its SSH program has no remote forwards: have another machine listen"
        return ForwardingRefusedError(msg, host=self.name, hint=hint)

    def unlisten(self, where: Endpoint, *, timeout: float = 2) -> None:
        """Ask the server to stop listening; quietly, since a dead connection has stopped by itself."""
        self.transport.unlisten(where)
        with contextlib.suppress(ConnectionLostError, ForwardingRefusedError):
            self._global_request(*cancelling(where), timeout)

    # Waiting for the server's answers.

    def _global_request(
        self,
        kind: bytes,
        payload: bytes,
        timeout: float,
        granted: Callable[[bytes], object] | None = None,
    ) -> tuple[bool, bytes]:
        reply = self.transport.send_global_request(kind, payload, granted)
        if not reply.wait(timeout):
            raise self._silence("a request", timeout)
        if reply.lost:
            raise self.lost_error()
        if reply.unknown:
            raise self._cannot_listen("does not know")
        return reply.ok, reply.payload

    def _open_channel(
        self, kind: bytes, payload: bytes, timeout: float, handler: Session | _RelayOnOpen
    ) -> Channel | tuple[int, str]:
        """Open a channel; return it, or the code and text of the refusal."""
        answered = threading.Event()
        answers: list[Channel | tuple[int, str]] = []

        def opened(channel: Channel) -> None:
            handler.opened(channel)
            answers.append(channel)
            answered.set()

        def refused(code: int, text: str) -> None:
            answers.append((code, text))
            answered.set()

        channel = self.transport.request_channel(kind, payload, opened, refused)
        try:
            if not wait(answered, timeout):
                raise self._silence("opening a channel", timeout)
        except BaseException:
            channel.close()
            raise
        answer = answers[0]
        if isinstance(answer, tuple) and answer[0] == LOST:
            raise self.lost_error()
        return answer

    def refusal(self, code: int, text: str, target: Endpoint) -> ForwardError:
        """Make the error for a channel to ``target`` that was refused with this reason."""
        where = format_endpoint(target)
        is_path = isinstance(target, str)
        reaches_none = code in (UNKNOWN_TYPE, SHORTAGE)
        if code == PROHIBITED or (not reaches_none and _FORBIDS.search(text)):
            said = "" if code == PROHIBITED else f" ({text})"
            msg = f"the server forbids forwarding to {where}{said}"
            names = "AllowStreamLocalForwarding" if is_path else "AllowTcpForwarding and PermitOpen"
            return ForwardingRefusedError(
                msg, host=self.name, hint=f"ask the administrator for {names}{_OF_KEY}"
            )
        if code == UNKNOWN_TYPE:
            msg = f"the server cannot forward to {where}, or to any other {'socket' if is_path else 'port'}"
            hint = "use a port in place of the socket" if is_path else "its SSH program has no forwards"
            return ForwardingRefusedError(msg, host=self.name, hint=hint)
        if not reaches_none:  # MINA has 0 for a name that does not resolve
            why = text or ("connect failed" if code == CONNECT_FAILED else f"reason {code}")
            msg = f"nothing answers on {where} there ({why})"
            hint = "check that the server runs and the port"
            if is_path:  # OpenSSH gives this reason for all, a prohibition too
                hint = (
                    "check that the server runs and the path, and that AllowStreamLocalForwarding is not off"
                )
            return TargetUnreachableError(msg, host=self.name, hint=hint)
        return ForwardError(f"no channel to {where} ({text or f'reason {code}'})", host=self.name)

    def lost_error(self) -> ConnectionLostError:
        """Make the error for a connection that ended."""
        reason = self.reason or self.transport.disconnect_message or "the line went down"
        hint = "open it again" if reason != _EARLY else _EARLY_HINT
        return ConnectionLostError(f"the SSH connection was lost ({reason})", host=self.name, hint=hint)

    def _silence(self, what: str, timeout: float) -> ConnectionLostError:
        msg = f"{what} got no answer within {timeout:g} s"
        return ConnectionLostError(msg, host=self.name, hint="the connection may be down; try again")


def _peers(transport: Transport) -> tuple[str, ...]:
    try:
        address = transport.getpeername()
    except (OSError, AttributeError):  # gone already, or the pipe of a ProxyCommand
        return ()
    return (str(address[0]),) if isinstance(address, tuple) and len(address) > 1 else ()


class _Keepalive:
    """Asks a server regularly whether it is still there (``ServerAliveInterval``, ``ServerAliveCountMax``).

    A connection whose server has not answered for ``interval * count`` seconds is given up.

    After this machine slept there is no point in patience: the network is another one, or the server has
    given us up. Then one question is asked, and its answer must come within one interval.

    :param interval: seconds between two questions
    :param count: how many may go unanswered
    """

    def __init__(self, connection: Connection, interval: float, count: int) -> None:
        self._connection = connection
        self._interval = interval
        self._count = count
        self._stopped = threading.Event()
        self._asked: deque[tuple[float, Reply]] = deque()  # when the answer must be there, and the answer
        self._thread = Thread(self._run, name=f"bokeh-ssh keepalive {connection.name}")
        _bound_retransmission(connection.transport, interval * count)
        self._thread.start()

    def stop(self, timeout: float) -> None:
        """Ask no more; waits up to ``timeout`` seconds for the thread."""
        self._stopped.set()
        self._thread.join(timeout)

    def _run(self) -> None:
        before = clocks()
        due = before[0] + self._interval / 2  # when to ask next; whoever starts this has asked just now
        while self._connection.transport.alive:
            pause = min([due, *(until for until, _ in list(self._asked)[:1])]) - before[0]
            if self._stopped.wait(max(0.0, pause)):
                return
            after = clocks()
            slept = max(b - a for a, b in zip(before, after, strict=True)) > pause + self._interval + 1
            before = after
            if slept:
                self._asked.clear()
            while any(reply.wait(0) for _, reply in self._asked):  # a later answer tells as much
                self._asked.popleft()
            if self._asked and after[0] >= self._asked[0][0]:
                self._connection.give_up(f"the server did not answer for {self._interval * self._count:g} s")
                return
            if slept or after[0] >= due:
                due = after[0] + self._interval
                patience = self._interval * (1 if slept else max(0.5, self._count - 1))
                self._asked.append((after[0] + patience, self._connection.send_keepalive()))


def _bound_retransmission(transport: Transport, seconds: float) -> None:
    """Let the system give up on data that nobody acknowledges when we would: its own is 15 minutes."""
    option = getattr(socket, "TCP_USER_TIMEOUT", None)  # Linux
    if option is None or seconds <= 0:
        return
    try:
        sock = transport.sock
        assert isinstance(sock, socket.socket)
        sock.setsockopt(socket.IPPROTO_TCP, option, int(seconds * 1000))
    except OSError:  # through a jump host it is one end of a socket pair
        pass


# What SSH writes of endpoints: TCP is RFC 4254, section 7; sockets are OpenSSH's extension (its PROTOCOL
# file, section 2.4).


def _address(host: str, port: int) -> bytes:
    raw = host.encode("utf-8", "surrogateescape")
    return struct.pack(f">I{len(raw)}sI", len(raw), raw, port)


def opening(target: Endpoint, origin: Origin) -> tuple[bytes, bytes]:
    """Return the type of a channel that leads to ``target``, and what follows it in the request."""
    if isinstance(target, str):
        return b"direct-streamlocal@openssh.com", string(target) + bytes(8)  # two that are reserved
    return b"direct-tcpip", _address(*target) + _address(*origin)


def listening(where: Endpoint) -> tuple[bytes, bytes]:
    """Return the name of the global request that has the server listen, and what follows it."""
    if isinstance(where, str):
        return b"streamlocal-forward@openssh.com", string(where)
    return b"tcpip-forward", _address(*where)


def cancelling(where: Endpoint) -> tuple[bytes, bytes]:
    """Return the name of the global request that ends that, and what follows it."""
    kind, rest = listening(where)
    return b"cancel-" + kind, rest


def bound_port(answer: bytes) -> int | None:
    """Read the port that a server chose (RFC 4254, section 7.1); None where it does not say, or nonsense."""
    port = int.from_bytes(answer[:4], "big") if len(answer) >= 4 else 0
    return port if 0 < port < 65536 else None


class _RelayOnOpen:
    """Joins a socket to a channel at the moment that it opens."""

    def __init__(self, io_loop: IOLoop, sock: socket.socket) -> None:
        self._io_loop = io_loop
        self._sock = sock
        self._relay: SocketRelay | None = None
        self._given_up = False
        self._lock = threading.Lock()

    def opened(self, channel: Channel) -> None:
        with self._lock:
            if not self._given_up:
                self._relay = self._io_loop.relay(self._sock, channel)
                channel.attach(self._relay)

    def give_up(self) -> None:
        """Close the socket; a relay that has it by now does that: whoever opens was interrupted."""
        with self._lock:
            self._given_up = True
            if self._relay:
                self._relay.break_off()
            else:
                self._sock.close()
