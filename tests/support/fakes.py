"""Peers that misbehave: plain sockets, a relay that can fail, and SSH servers with one handler bent."""

from __future__ import annotations

import socket
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import paramiko
from paramiko.message import Message

from beds import Key, Machine, free_port

#: What a handler gets: the connection, and how many came before it.
Handler = Callable[[socket.socket, int], None]

#: Seconds after which a fake gives up on its client, so that no thread outlives its test by much.
PATIENCE = 30.0


class Listener:
    """A TCP server on loopback, on a port that stays free afterwards: a thread for each connection; a context
    manager.

    :param handler: gets each connection, which is closed when it returns
    :ivar count: how many connections were accepted
    """

    def __init__(self, handler: Handler) -> None:
        self._handler = handler
        self._socket = socket.create_server(("127.0.0.1", free_port()), backlog=64)
        self._threads: list[threading.Thread] = []
        self._open: set[socket.socket] = set()
        self.port: int = self._socket.getsockname()[1]
        self.count = 0

    def __enter__(self) -> Listener:
        self._acceptor = threading.Thread(target=self._accept, name="fake listener", daemon=True)
        self._acceptor.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._acceptor.join(PATIENCE)
        self._socket.close()
        for sock in list(self._open):
            with ignored():
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(PATIENCE)

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._socket.accept()
            except OSError:
                return
            sock.settimeout(PATIENCE)
            number, self.count = self.count, self.count + 1
            self._open.add(sock)
            thread = threading.Thread(target=self._run, args=(sock, number), name="fake peer", daemon=True)
            self._threads.append(thread)
            thread.start()

    def _run(self, sock: socket.socket, number: int) -> None:
        with sock, ignored():
            self._handler(sock, number)
        self._open.discard(sock)


@contextmanager
def ignored() -> Iterator[None]:
    """Pass over what a peer that goes away causes."""
    try:
        yield
    except (OSError, EOFError, paramiko.SSHException):
        pass


def stay(sock: socket.socket, number: int = 0) -> None:
    """Read until the client goes, and say nothing."""
    while sock.recv(65536):
        pass


def hang_up(sock: socket.socket, number: int = 0) -> None:
    """Say nothing and hang up, as a full sshd does (MaxStartups)."""


def saying(text: bytes, *, then: Handler = hang_up) -> Handler:
    """Make a handler that speaks first."""

    def say(sock: socket.socket, number: int) -> None:
        sock.sendall(text)
        then(sock, number)

    return say


def endless(text: bytes, sent: list[int]) -> Handler:
    """Make a handler that says ``text`` over and over; ``sent`` gets how many bytes the client took."""

    def say(sock: socket.socket, number: int) -> None:
        block = text * (65536 // len(text))
        while True:
            sent[0] += sock.send(block)

    return say


def relay(target: Callable[[int], tuple[str, int] | None]) -> Handler:
    """Make a handler that joins the client to ``target(number)``, or hangs up where that is None."""

    def join(sock: socket.socket, number: int) -> None:
        address = target(number)
        if address is None:
            return
        with socket.create_connection(address, timeout=PATIENCE) as onward:
            back = threading.Thread(target=_copy, args=(onward, sock), daemon=True)
            back.start()
            _copy(sock, onward)
            back.join(PATIENCE)

    return join


def _copy(source: socket.socket, sink: socket.socket) -> None:
    with ignored():
        while data := source.recv(65536):
            sink.sendall(data)
    with ignored():
        sink.shutdown(socket.SHUT_WR)


@contextmanager
def black_hole(host: str = "127.0.0.1") -> Iterator[int]:
    """Have a port that answers no SYN, since its queue is full: what a firewall with DROP looks like."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with ExitStack() as stack:
        listener = stack.enter_context(socket.socket(family))
        listener.bind((host, 0))
        listener.listen(0)
        port = listener.getsockname()[1]
        for _ in range(20):  # how many fit is the system's affair
            filler = stack.enter_context(socket.socket(family))
            filler.settimeout(0.25)
            try:
                filler.connect((host, port))
            except TimeoutError:
                break
        else:
            raise AssertionError("the queue never fills: this system has no black hole to offer")
        yield port


class Server(paramiko.Transport):
    """One client's SSH connection, as paramiko's server side sees it; a test bends what it needs.

    It lets everybody in, confirms every ``direct-tcpip`` channel and every listener, and echoes.

    :ivar seen: the messages of the client that are of interest here, in order, as (kind, rest)
    """

    def __init__(self, sock: socket.socket, fake: FakeSSH) -> None:
        super().__init__(sock)
        self.fake = fake
        self.seen: list[tuple[str, bytes]] = []
        self.ports: list[int] = []
        self.raws: list[Raw] = []
        self.inner: dict[int, tuple[str, int]] = {}  # channels to listeners of the client's, and to which
        self.logger = _Quiet()  # type: ignore[assignment]  # what it complains about is what we do

    def send(self, *parts: int | bytes | str) -> None:
        """Send a message: its number, then ints as uint32, strings as SSH strings, bytes as they are."""
        message = bytes((parts[0],)) if isinstance(parts[0], int) else b""
        for part in parts[1:]:
            if isinstance(part, int):
                message += struct.pack(">I", part)
            elif isinstance(part, str):
                raw = part.encode()
                message += struct.pack(">I", len(raw)) + raw
            else:
                message += part
        self._send_user_message(Message(message))

    def note(self, kind: str, m: Message) -> None:
        """Keep a message without reading it."""
        at = m.packet.tell()
        self.seen.append((kind, m.get_remainder()))
        m.packet.seek(at)

    def count(self, kind: str) -> int:
        """How many messages of this kind came."""
        return sum(name == kind for name, _ in self.seen)

    def raw(self, theirs: int) -> Raw:
        """Confirm the client's channel with one that paramiko knows nothing of."""
        made = Raw(self._next_channel())
        self.raws.append(made)
        self._channels.put(made.number, made)
        self.send(91, theirs, made.number, 1 << 21, 32768)
        return made

    def _parse_channel_open(self, m: Message) -> None:
        self.note("open", m)
        if self.fake.on_open is None or not self.fake.on_open(self, m):
            super()._parse_channel_open(m)

    def _parse_channel_open_failure(self, m: Message) -> None:
        if not self._is_inner(m):
            self.note("open failure", m)  # of a channel that we asked for behind paramiko's back
        else:
            super()._parse_channel_open_failure(m)

    def _parse_channel_open_success(self, m: Message) -> None:
        if not self._is_inner(m):
            self.note("open success", m)
        else:
            super()._parse_channel_open_success(m)

    def _is_inner(self, m: Message) -> bool:
        """Tell whether paramiko opened a channel: to a listener that this server connected to itself."""
        at = m.packet.tell()
        number = m.get_int()
        m.packet.seek(at)
        return number in self.channel_events

    def _parse_global_request(self, m: Message) -> None:
        self.note("global request", m)
        if self.fake.on_request is None or not self.fake.on_request(self, m):
            super()._parse_global_request(m)

    def _parse_disconnect(self, m: Message) -> None:
        self.note("disconnect", m)


class Raw:
    """A channel whose messages are only kept, as numbers."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.seen: list[int] = []

    def count(self, kind: int) -> int:
        """How many messages of this number came."""
        return self.seen.count(kind)

    def _unlink(self) -> None:
        pass


def _route(kind: int, usual: Callable[[Any, Message], None]) -> Callable[[Any, Message], None]:
    return lambda channel, m: channel.seen.append(kind) if isinstance(channel, Raw) else usual(channel, m)


Server._channel_handler_table = {
    kind: _route(kind, usual) for kind, usual in paramiko.Transport._channel_handler_table.items()
}


class _Quiet:
    """A logger that is not: paramiko tells its troubles at level ERROR, and here they are meant."""

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **keywords: None


class _Rules(paramiko.ServerInterface):
    def __init__(self, server: Server) -> None:
        self._server = server

    def get_allowed_auths(self, username: str) -> str:
        return "none"

    def check_auth_none(self, username: str) -> int:
        self._server.fake.asked.set()
        wait = self._server.fake.login
        if wait:
            wait.wait(PATIENCE)
        return paramiko.AUTH_SUCCESSFUL

    def check_channel_direct_tcpip_request(self, chanid: int, origin: Any, destination: Any) -> int:
        if destination[0] == "127.0.0.1" and destination[1] in self._server.ports:
            self._server.inner[chanid] = destination
        return paramiko.OPEN_SUCCEEDED

    def check_port_forward_request(self, address: str, port: int) -> int:
        self._server.ports.append(port or 40000)
        return port or 40000

    def cancel_port_forward_request(self, address: str, port: int) -> None:
        return None


class FakeSSH:
    """An SSH server that can be bent; a context manager.

    :param on_open: gets each channel that the client asks for; True: it has seen to it
    :param on_request: gets each global request; True: it has seen to it
    :param login: an event without which no login is answered
    :ivar sessions: the connections, each a :class:`Server`
    :ivar asked: set once somebody wants to log in
    """

    def __init__(
        self,
        directory: Path,
        *,
        on_open: Callable[[Server, Message], bool] | None = None,
        on_request: Callable[[Server, Message], bool] | None = None,
        login: threading.Event | None = None,
    ) -> None:
        self.on_open = on_open
        self.on_request = on_request
        self.login = login
        self.asked = threading.Event()
        self.sessions: list[Server] = []
        self._directory = directory
        self._host_key = paramiko.ECDSAKey.generate()
        self._listener = Listener(self._serve)

    def __enter__(self) -> FakeSSH:
        self._listener.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        if self.login:
            self.login.set()
        for session in self.sessions:
            session.close()
        self._listener.__exit__()
        for session in self.sessions:
            session.join(PATIENCE)

    @property
    def count(self) -> int:
        """How many connections were accepted."""
        return self._listener.count

    @property
    def session(self) -> Server:
        """The last connection."""
        return self.sessions[-1]

    @property
    def machine(self) -> Machine:
        """How to log in to it."""
        port = self._listener.port
        known_hosts = self._directory / f"known_hosts-{port}"
        name, base = self._host_key.get_name(), self._host_key.get_base64()
        known_hosts.write_text(f"[127.0.0.1]:{port} {name} {base}\n", encoding="ascii")
        return Machine(
            kind="fake",
            host="127.0.0.1",
            port=port,
            user="me",
            key_path=Key.generate().write(self._directory / f"key-{port}"),
            known_hosts=known_hosts,
            python=sys.executable,
        )

    def _serve(self, sock: socket.socket, number: int) -> None:
        server = Server(sock, self)
        server.add_server_key(self._host_key)
        self.sessions.append(server)
        try:
            server.start_server(server=_Rules(server))
        except (paramiko.SSHException, EOFError):
            server.close()
            return
        while server.is_active():
            channel = server.accept(0.1)
            if channel is not None:
                inner = server.inner.pop(channel.get_id(), None)
                work, args = (_loop, (server, channel, inner)) if inner else (_echo, (channel,))
                threading.Thread(target=work, args=args, name="fake echo", daemon=True).start()


def _loop(server: Server, channel: paramiko.Channel, where: tuple[str, int]) -> None:
    """Lead what the client sends to a listener of its own back to it, as sshd does."""
    with ignored(), channel:
        back = server.open_channel("forwarded-tcpip", where, ("127.0.0.1", 1), timeout=PATIENCE)
        with back:
            copy = threading.Thread(target=_pass_on, args=(back, channel), name="fake echo", daemon=True)
            copy.start()
            _pass_on(channel, back)
            copy.join(PATIENCE)


def _pass_on(source: paramiko.Channel, sink: paramiko.Channel) -> None:
    with ignored():
        while data := source.recv(65536):
            sink.sendall(data)
    with ignored():
        sink.close()


def _echo(channel: paramiko.Channel) -> None:
    with ignored():
        while data := channel.recv(32768):
            channel.sendall(data)
        channel.close()
