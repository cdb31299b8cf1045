"""Where local connections come in: bound, listening, and open while lines come and go (``ssh -L``)."""

from __future__ import annotations

import contextlib
import errno
import logging
import selectors
import socket
import socketserver
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import sshtunnel

from bokeh_ssh._connection import Connection
from bokeh_ssh._endpoint import HERE, Endpoint, Origin
from bokeh_ssh._errors import PortInUseError
from bokeh_ssh._fork import in_child
from bokeh_ssh._gate import Gate
from bokeh_ssh._guard import Guard
from bokeh_ssh._peer import Strangers
from bokeh_ssh._pump import reset

log = logging.getLogger("bokeh_ssh.forward")

#: Connections that may wait to be accepted; a page with many resources opens dozens at once.
_BACKLOG = 128
_TAKEN = {errno.EADDRINUSE, errno.EACCES, getattr(errno, "WSAEADDRINUSE", 10048), 10013}
_TRIES = 20

#: Takes sshtunnel's own log lines, which tell of a login that does not take place.
_SILENT = logging.Logger("sshtunnel", logging.CRITICAL + 1)

Accept = Callable[[socket.socket, Origin], None]
Tell = Callable[[str], None]

#: Seconds that a new connection waits while there is no line, and a WebSocket, whose browser waits 240.
PATIENCE = 20.0
PAGE_PATIENCE = 180.0
_MOST_HELD = 256


def bind(port: int | None, *, prefer: int = 5006, address: str = "localhost") -> list[socket.socket]:
    """Bind and listen on this machine; for ``localhost`` on both loopback addresses where there are two.

    Both, since a browser tries ``::1`` first: another user's listener there would get its requests.

    :param port: None prefers ``prefer`` and takes a free one nearby where that is taken; 0 takes any free one
    :param address: an address of this machine; everything but loopback opens the port to the network
    :raises PortInUseError: the port that was asked for by number is taken
    """
    addresses = ["127.0.0.1", "::1"] if address == "localhost" else [address]
    any_free = [0] * _TRIES
    wanted = [*nearby(prefer), *any_free] if port is None else any_free if port == 0 else [port]
    last: OSError | None = None
    for candidate in wanted:
        try:
            return _bind_all(candidate, addresses)
        except OSError as exc:
            last = exc
    msg = f"local port {port or prefer} on {address} cannot be had ({last.strerror if last else ''})"
    hint = "choose another local_port, 0 for any free one, or end what listens there"
    raise PortInUseError(msg, hint=hint, port=port or 0, side="local") from last


def nearby(port: int) -> list[int]:
    """List the ports that are tried in turn where ``port`` is only preferred.

    A server that is published for others lets pages from all of these in (``--allow-websocket-origin``), so
    that one of them serves as well as the first.
    """
    return list(range(port, min(port + 10, 65536)))


def _bind_all(port: int, addresses: list[str]) -> list[socket.socket]:
    with contextlib.ExitStack() as stack:
        bound: list[socket.socket] = []
        for address in addresses:
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            try:
                sock = stack.enter_context(socket.socket(family, socket.SOCK_STREAM))
                _be_exclusive(sock)
                sock.bind((address, port))
            except OSError as exc:
                if bound and exc.errno not in _TAKEN:  # no IPv6 here: IPv4 alone is all there is
                    continue
                raise
            sock.listen(_BACKLOG)
            port = sock.getsockname()[1]
            bound.append(sock)
        stack.pop_all()
        return bound


def _be_exclusive(sock: socket.socket) -> None:
    if sys.platform == "win32":
        # There SO_REUSEADDR lets anybody share, and so steal, the port.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
    else:
        # Here it only lets a port be had again while old connections linger in TIME_WAIT.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if sock.family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)


class Forwarder(sshtunnel.SSHTunnelForwarder):  # type: ignore[misc]  # sshtunnel has no types
    """sshtunnel's forwarder on a connection of ours: its listening, none of its logging in or copying.

    Everything that we know of sshtunnel's inside is in this class. What is overridden, and why:

    - ``_read_ssh_config``, ``_consolidate_auth``: it would log in again by itself, without checking the
      host key, once per key found. It is handed our transport instead, and finds ``is_active`` true.
    - ``_make_ssh_forward_server_class``: its server listens with a backlog of 5 and a thread for each
      connection; ours takes our bound sockets, and hands each connection on at once.
    - ``_make_ssh_forward_handler_class``: its handler loses half-closes, deadlocks when both directions
      are full and dies above descriptor 1024; ours gives the socket to the pump.
    - ``_serve_forever_wrapper``: its threads are not joined; ours are.
    - ``_stop_transport``: it would close the transport, which is not its own.
    - ``__str__``, ``__del__``: they would show secrets, and stop from the garbage collector.

    :param sockets: bound and listening, see :func:`bind`; closed by :meth:`stop`
    :param transport: anything with a true ``is_active()``
    :param accept: takes each connection and its origin; must return soon
    """

    skip_tunnel_checkup = True
    daemon_forward_servers = True

    def __init__(self, sockets: list[socket.socket], transport: Any, accept: Accept) -> None:
        self._sockets = list(sockets)
        self._accept = accept
        self._transport = transport
        self._threads: list[threading.Thread] = []
        super().__init__(
            ssh_address_or_host=("localhost", 22),
            ssh_config_file=None,
            ssh_username="",
            logger=_SILENT,  # without one it installs handlers of its own
            set_keepalive=0,
            allow_agent=False,
            host_pkey_directories=[],
            local_bind_addresses=[_address(s) for s in sockets],
            remote_bind_addresses=[("localhost", 1)] * len(sockets),
        )

    @staticmethod
    def _read_ssh_config(ssh_host: str, *args: object, **kwargs: object) -> tuple[object, ...]:
        return ssh_host, "", None, 22, None, False

    @staticmethod
    def _consolidate_auth(*args: object, **kwargs: object) -> tuple[None, list[object]]:
        return None, []

    def _make_ssh_forward_server_class(self, remote_address_: object) -> Callable[..., _Server]:
        listening = self._sockets[len(self._server_list)]
        return lambda address, handler, logger=None: _Server(listening, handler)

    def _make_ssh_forward_handler_class(self, remote_address_: object) -> type[_Handler]:
        return type("Handler", (_Handler,), {"accept": staticmethod(self._accept)})

    def _serve_forever_wrapper(self, _srv: _Server, poll_interval: float = 0.5) -> None:
        self._threads.append(threading.current_thread())
        _srv.serve_forever()

    def _stop_transport(self, force: bool = False) -> None:
        for server in self._server_list:
            server.stop()
        for thread in self._threads:
            thread.join(2)
        self._threads.clear()
        for server in self._server_list:
            server.server_close()
        self.is_alive = False

    def __str__(self) -> str:
        where = sorted({_name(sock) for sock in self._sockets if sock.fileno() >= 0})
        return f"<Forwarder on {', '.join(where) or 'nothing'}>"

    __repr__ = __str__

    def __del__(self) -> None:
        pass


def _address(sock: socket.socket) -> Origin:
    """Give what sshtunnel takes for a listener's address; a Unix socket has none."""
    name = sock.getsockname()
    return ("127.0.0.1", name[1]) if isinstance(name, tuple) else HERE


def _name(sock: socket.socket) -> str:
    name = sock.getsockname()
    return str(name[1] if isinstance(name, tuple) else name)


class _Server(socketserver.BaseServer):
    """Accepts on a socket that listens already, and hands each connection to the handler class."""

    daemon_threads = True

    def __init__(self, sock: socket.socket, handler: type[_Handler]) -> None:
        super().__init__(_address(sock), handler)
        self.socket = sock
        sock.setblocking(False)  # a connection may be gone again by the time it is accepted
        self._gone = threading.Event()
        self._ear, self._mouth = socket.socketpair()
        in_child(self, _Server._abandon)

    def _abandon(self) -> None:
        for sock in (self.socket, self._ear, self._mouth):
            sock.close()

    @property
    def local_address(self) -> tuple[str, int]:
        return self.server_address  # type: ignore[return-value]  # always (host, port) here

    @property
    def local_port(self) -> int:
        return self.local_address[1]

    def fileno(self) -> int:
        return self.socket.fileno()

    def get_request(self) -> tuple[socket.socket, Origin]:
        try:
            sock, address = self.socket.accept()
        except OSError as exc:
            if exc.errno in (errno.EMFILE, errno.ENFILE):
                log.warning("out of file descriptors; a connection has to wait")
                self._gone.wait(0.1)  # the connection stays in the backlog: do not spin on it
            raise
        return sock, (str(address[0]), int(address[1])) if isinstance(address, tuple) else HERE

    def process_request(self, request: Any, client_address: Any) -> None:
        self.finish_request(request, client_address)

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.exception("a connection from %s port %d failed", *client_address)
        reset(request)

    def shutdown_request(self, request: Any) -> None:
        pass  # after an error: handle_error has closed it

    def serve_forever(self, poll_interval: float = 0.5) -> None:
        with selectors.DefaultSelector() as selector, self._ear:
            selector.register(self.socket, selectors.EVENT_READ)
            selector.register(self._ear, selectors.EVENT_READ)
            while not self._gone.is_set():
                for key, _ in selector.select():
                    if key.fileobj is self.socket:
                        self._handle_request_noblock()  # type: ignore[attr-defined]  # not in the stubs

    def stop(self) -> None:
        # socketserver's shutdown() waits for ever where serve_forever() has not begun.
        self._gone.set()
        with contextlib.suppress(OSError):
            self._mouth.send(b"!")

    def server_close(self) -> None:
        self.socket.close()
        self._mouth.close()


class _Handler(socketserver.BaseRequestHandler):
    """Gives the accepted socket away, so that no thread is needed for it."""

    accept: Accept

    def handle(self) -> None:
        self.accept(self.request, self.client_address)


def enter(stack: contextlib.ExitStack, sockets: list[socket.socket], tell: Tell | None) -> Entrance:
    """Make an :class:`Entrance` of bound sockets that lasts as long as ``stack``."""
    with contextlib.ExitStack() as first:
        for sock in sockets:
            first.callback(sock.close)
        entrance = Entrance(sockets, tell)
        first.pop_all()
    stack.callback(entrance.close)
    return entrance


class Entrance:
    """Where local connections come in: stays open while the lines that it leads to come and go.

    Without a line, new connections are held. They are led on when a line is there again; one that has waited
    for :data:`PATIENCE` seconds is reset, a WebSocket for :data:`PAGE_PATIENCE`: the page that wants it back
    gives up after few attempts, so that each should last.

    :param sockets: bound and listening, see :func:`bind`; closed by :meth:`close`
    :param tell: told when another user of this machine is refused (where the system says who connects); None
        lets all of them in
    :ivar port: the one that they share; 0 for a Unix socket
    """

    def __init__(self, sockets: list[socket.socket], tell: Tell | None) -> None:
        self.port = _address(sockets[0])[1]
        self._strangers = Strangers() if tell and self.port else None
        self._tell = tell
        self._refused: set[int] = set()
        self._lead: Accept | None = None
        self._leads = _never
        self._started = False
        self._held: list[_Held] = []
        self._change = threading.Condition()
        self._closed = False
        self._keeper: threading.Thread | None = None
        self._sockets = list(sockets)
        self._forwarder = Forwarder(sockets, _Standing(), self._accept)
        in_child(self, Entrance._abandon)

    def _abandon(self) -> None:
        for sock in (*self._sockets, *(held.sock for held in self._held)):
            sock.close()
        self._closed = True

    def _accept(self, sock: socket.socket, origin: Origin) -> None:
        stranger = self._strangers.find(sock) if self._strangers else None
        if stranger is not None:
            if stranger not in self._refused:  # once each: who is refused can try as often as they like
                self._refused.add(stranger)
                who = f"user {stranger}" if stranger >= 0 else "a program that has gone"
                if self._tell:
                    self._tell(f"refused a local connection of {who} (allow_others lets other users in)")
            reset(sock)
            return
        self._admit(sock, origin)

    def _admit(self, sock: socket.socket, origin: Origin) -> None:
        with self._change:
            lead = self._lead if self._leads() else None
            if lead is None and len(self._held) < _MOST_HELD and not self._closed:
                self._held.append(_Held(sock, origin, time.monotonic() + PATIENCE))
                if self._keeper is None:
                    self._keeper = threading.Thread(target=self._keep, name="bokeh-ssh hold", daemon=True)
                    self._keeper.start()
                self._change.notify_all()
                return
        if lead is None:
            reset(sock)
        else:
            lead(sock, origin)

    def _keep(self) -> None:
        """Reset what has waited long enough, until nothing is held."""
        with self._change:
            while self._held:
                now = time.monotonic()
                for held in [held for held in self._held if held.until <= now]:
                    if not held.ask_more():
                        self._held.remove(held)
                        reset(held.sock)
                first = min((held.until for held in self._held), default=now)
                self._change.wait(max(0.0, first - now))
            self._keeper = None

    def lead(self, accept: Accept, *, alive: Callable[[], bool]) -> None:
        """Hand connections to ``accept``, those that are held first, as long as ``alive``.

        Before it is called for the first time, connections wait in the kernel, however long.
        """
        while True:
            with self._change:
                waiting, self._held = self._held, []
                if not waiting:
                    self._lead, self._leads = accept, alive
                    self._change.notify_all()
                    break
            for held in waiting:
                accept(held.sock, held.origin)
        if not self._started:
            self._started = True
            self._forwarder.start()

    def hold(self) -> None:
        """Hold new connections from now on."""
        with self._change:
            self._lead = None

    @contextlib.contextmanager
    def leading(
        self,
        connection: Connection,
        target: Endpoint,
        guard: Guard | None = None,
        check: Callable[[Callable[[bool], None]], None] | None = None,
    ) -> Iterator[None]:
        """Lead to ``target`` as seen from the connection's server, while the context lasts.

        :param guard: looks at the beginning of each connection; None lets all through, HTTP or not
        :param check: has the last word on each, see :meth:`Connection.forward`
        """

        def accept(sock: socket.socket, origin: tuple[str, int]) -> None:
            connection.forward(sock, target, origin, check)

        gate = Gate(connection.pump, guard, accept) if guard else None
        self.lead(gate.admit if gate else accept, alive=lambda: connection.alive)
        try:
            yield
        finally:
            self.hold()
            for sock, origin in gate.release() if gate else ():
                self._admit(sock, origin)

    def close(self) -> None:
        """Stop listening, and reset what is held; idempotent."""
        self._forwarder.stop()
        if self._strangers:
            self._strangers.close()
        for sock in self._sockets:  # where it was never started, nobody else has closed them
            sock.close()
        with self._change:
            self._closed = True
            self._lead = None
            for held in self._held:
                reset(held.sock)
            self._held = []
            keeper = self._keeper
            self._change.notify_all()
        if keeper and keeper is not threading.current_thread():
            keeper.join(2)


def _never() -> bool:
    return False


class _Standing:
    """What sshtunnel takes for a transport that is logged in: the connections are none of its business."""

    def is_active(self) -> bool:
        return True


class _Held:
    """A local connection that waits for a line."""

    __slots__ = ("_asked", "origin", "sock", "until")

    def __init__(self, sock: socket.socket, origin: Origin, until: float) -> None:
        self.sock = sock
        self.origin = origin
        self.until = until
        self._asked = False

    def ask_more(self) -> bool:
        """Wait longer, once, if it is a page that wants its WebSocket back; tells whether it is."""
        if self._asked:
            return False
        self._asked = True
        try:
            self.sock.setblocking(False)
            head = self.sock.recv(4096, socket.MSG_PEEK)
        except OSError:  # it has sent nothing, or is gone
            return False
        if b"upgrade: websocket" not in head.lower():
            return False
        self.until += PAGE_PATIENCE - PATIENCE
        return True
