"""Listening on this machine: which ports, and how what connects is handed on (``ssh -L``).

The one module that knows sshtunnel.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import selectors
import socket
import socketserver
import sys
import threading
import warnings
from collections.abc import Callable
from typing import Any

from bokeh_ssh._core.endpoint import HERE, Origin, nearby
from bokeh_ssh._core.errors import PortInUseError
from bokeh_ssh._core.fork import in_child
from bokeh_ssh._core.settings import setting
from bokeh_ssh._ssh.relay import reset, reset_if_killed

# Where its source is compiled, Python 3.14 warns of a "return" in a "finally" (PEP 765). That is to be on
# nobody's screen, and to end nobody's program under -W error.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import sshtunnel

log = logging.getLogger("bokeh_ssh.forward")

#: Connections that may wait to be accepted, as far as the system lets them (``somaxconn``): a page with many
#: resources opens dozens at once, and where many wait for something they wait here.
_BACKLOG = 4096
_TAKEN = {errno.EADDRINUSE, errno.EACCES, getattr(errno, "WSAEADDRINUSE", 10048), 10013}
_TRIES = 20

#: Takes sshtunnel's own log lines, which tell of a login that does not take place.
_SILENT = logging.Logger("sshtunnel", logging.CRITICAL + 1)

Accept = Callable[[socket.socket, Origin], None]


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
    msg = f"local port {port or prefer} on {address} cannot be used ({last.strerror if last else ''})"
    hint = f"choose another {setting('local_port')}, 0 for any free one, or end what listens there"
    raise PortInUseError(msg, hint=hint, port=port or 0, side="local") from last


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
      are full and dies above descriptor 1024; ours gives the socket to the loop.
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
            local_bind_addresses=[address_of(s) for s in sockets],
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


def make_forwarder(sockets: list[socket.socket], accept: Accept) -> Forwarder:
    """Make a :class:`Forwarder` that logs in nowhere: the connections are none of its business."""
    return Forwarder(sockets, _Standing(), accept)


def pause(forwarder: Forwarder, paused: bool) -> None:
    """Let new connections wait in the system's queue, or take them again; idempotent, from any thread."""
    for server in forwarder._server_list:
        server.pause(paused)


class _Standing:
    """What sshtunnel takes for a transport that is logged in: the connections are none of its business."""

    def is_active(self) -> bool:
        return True


def address_of(sock: socket.socket) -> Origin:
    """Return what sshtunnel takes for a listener's address; a Unix socket has none."""
    name = sock.getsockname()
    return ("127.0.0.1", name[1]) if isinstance(name, tuple) else HERE


def _name(sock: socket.socket) -> str:
    name = sock.getsockname()
    return str(name[1] if isinstance(name, tuple) else name)


class _Server(socketserver.BaseServer):
    """Accepts on a socket that listens already, and hands each connection to the handler class."""

    daemon_threads = True

    def __init__(self, sock: socket.socket, handler: type[_Handler]) -> None:
        super().__init__(address_of(sock), handler)
        self.socket = sock
        sock.setblocking(False)  # a connection may be gone again by the time it is accepted
        self._gone = threading.Event()
        self._paused = False
        self._wake_recv, self._wake_send = socket.socketpair()
        for end in (self._wake_recv, self._wake_send):
            end.setblocking(False)
        in_child(self, _Server._abandon)

    def _abandon(self) -> None:
        for sock in (self.socket, self._wake_recv, self._wake_send):
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
        reset_if_killed(sock)
        return sock, (str(address[0]), int(address[1])) if isinstance(address, tuple) else HERE

    def process_request(self, request: Any, client_address: Any) -> None:
        self.finish_request(request, client_address)

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.exception("a connection from %s port %d failed", *client_address)
        reset(request)

    def shutdown_request(self, request: Any) -> None:
        pass  # after an error: handle_error has closed it

    def serve_forever(self, poll_interval: float = 0.5) -> None:
        with selectors.DefaultSelector() as selector, self._wake_recv:
            selector.register(self._wake_recv, selectors.EVENT_READ)
            listens = False
            while not self._gone.is_set():
                if listens is self._paused:
                    listens = not listens
                    if listens:
                        selector.register(self.socket, selectors.EVENT_READ)
                    else:
                        selector.unregister(self.socket)
                for key, _ in selector.select():
                    if key.fileobj is not self.socket:
                        with contextlib.suppress(OSError):
                            self._wake_recv.recv(64)
                    elif not self._paused:
                        self._handle_request_noblock()  # type: ignore[attr-defined]  # not in the stubs

    def pause(self, paused: bool) -> None:
        """Take no connection, or take them again."""
        if paused is not self._paused:
            self._paused = paused
            self._wake()

    def stop(self) -> None:
        # socketserver's shutdown() waits for ever where serve_forever() has not begun.
        self._gone.set()
        self._wake()

    def _wake(self) -> None:
        with contextlib.suppress(OSError):  # full means that a wake-up is on its way
            self._wake_send.send(b"!")

    def server_close(self) -> None:
        self.socket.close()
        self._wake_send.close()


class _Handler(socketserver.BaseRequestHandler):
    """Gives the accepted socket away, so that no thread is needed for it."""

    accept: Accept

    def handle(self) -> None:
        self.accept(self.request, self.client_address)
