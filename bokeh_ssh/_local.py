"""The local end of a forward: listen here, connect there (``ssh -L``)."""

from __future__ import annotations

import contextlib
import errno
import logging
import selectors
import socket
import socketserver
import sys
import threading
from collections.abc import Callable
from typing import Any

import sshtunnel

from bokeh_ssh._connection import Connection, connect
from bokeh_ssh._errors import PortInUseError, TargetUnreachableError
from bokeh_ssh._events import OnEvent, Ready, Warned
from bokeh_ssh._fork import in_child
from bokeh_ssh._lifecycle import Lifecycle
from bokeh_ssh._pump import reset
from bokeh_ssh._target import Host, as_host, check_host, check_port

log = logging.getLogger("bokeh_ssh.forward")

#: Connections that may wait to be accepted; a page with many resources opens dozens at once.
_BACKLOG = 128
_TAKEN = {errno.EADDRINUSE, errno.EACCES, getattr(errno, "WSAEADDRINUSE", 10048), 10013}
_TRIES = 20

#: Takes sshtunnel's own log lines, which tell of a login that does not take place.
_SILENT = logging.Logger("sshtunnel", logging.CRITICAL + 1)

Accept = Callable[[socket.socket, "tuple[str, int]"], None]


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
            local_bind_addresses=[("127.0.0.1", s.getsockname()[1]) for s in sockets],
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
        ports = sorted({sock.getsockname()[1] for sock in self._sockets if sock.fileno() >= 0})
        return f"<Forwarder on {', '.join(map(str, ports)) or 'nothing'}>"

    __repr__ = __str__

    def __del__(self) -> None:
        pass


class _Server(socketserver.BaseServer):
    """Accepts on a socket that listens already, and hands each connection to the handler class."""

    daemon_threads = True

    def __init__(self, sock: socket.socket, handler: type[_Handler]) -> None:
        super().__init__(sock.getsockname()[:2], handler)
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

    def get_request(self) -> tuple[socket.socket, tuple[str, int]]:
        try:
            sock, address = self.socket.accept()
        except OSError as exc:
            if exc.errno in (errno.EMFILE, errno.ENFILE):
                log.warning("out of file descriptors; a connection has to wait")
                self._gone.wait(0.1)  # the connection stays in the backlog: do not spin on it
            raise
        return sock, (str(address[0]), int(address[1]))

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


@contextlib.contextmanager
def forwarding(sockets: list[socket.socket], connection: Connection, host: str, port: int) -> Any:
    """Forward what connects to ``sockets`` to ``host:port`` as seen from the connection's server."""

    def accept(sock: socket.socket, origin: tuple[str, int]) -> None:
        connection.forward(sock, host, port, origin)

    forwarder = Forwarder(sockets, connection.transport, accept)
    forwarder.start()
    try:
        yield forwarder
    finally:
        forwarder.stop()


class LocalForward(Lifecycle):
    """Forward a local port to a TCP target as seen from ``host`` (``ssh -N -L``).

    >>> forward = LocalForward("example.org", "me", remote_port=8888)
    >>> forward.state
    'new'

    :param host: the machine to log in to: a name, an address, ``user@host:port``, an ssh config alias, or
        a :class:`Host`
    :param user: the login name
    :param remote_port: the target's port
    :param local_port: 0 takes any free one; a number takes exactly that one; None prefers 5006
    :param remote_host: the target, as seen from ``host``
    :param bind_address: where to listen on this machine; anything but loopback opens the port to others
    :param isolate: run it in a child process, so that a program that computes cannot slow it
    :param on_event: takes the progress events
    :param login: the login keywords, see :class:`Host`
    :raises UsageError: if an argument cannot work
    """

    _shared = ("_local_port",)

    def __init__(
        self,
        host: str | Host,
        user: str | None = None,
        *,
        remote_port: int,
        local_port: int | None = 0,
        remote_host: str = "localhost",
        bind_address: str = "localhost",
        isolate: bool = False,
        on_event: OnEvent | None = None,
        **login: Any,
    ) -> None:
        super().__init__(on_event, isolate)
        self._host = as_host(host, user, **login)
        self._label = self._host.target.host
        check_port(remote_port, "remote_port", zero=False)
        if local_port is not None:
            check_port(local_port, "local_port")
        check_host(remote_host)
        self._remote = (remote_host, remote_port)
        self._wanted = local_port
        self._bind_address = bind_address
        self._local_port: int | None = None

    def __repr__(self) -> str:
        target = f"{self._remote[0]}:{self._remote[1]}"
        return f"<LocalForward {self._local_port or 'any'} -> {target} via {self._label}, {self._state}>"

    @property
    def local_port(self) -> int:
        """The port on this machine.

        :raises TunnelClosedError: if it is not open
        """
        self._check_open()
        assert self._local_port is not None
        return self._local_port

    @property
    def remote_port(self) -> int:
        """The target's port."""
        return self._remote[1]

    def _start(self, stack: contextlib.ExitStack) -> None:
        sockets = bind(self._wanted, address=self._bind_address)
        for sock in sockets:
            stack.callback(sock.close)
        self._local_port = sockets[0].getsockname()[1]
        connection = stack.enter_context(connect(self._host, on_event=self._emit))
        connection.on_lost(lambda _: self._lose(connection.lost_error()))
        try:
            connection.open_socket(*self._remote, timeout=connection.hop.timeout).close()
        except TargetUnreachableError as exc:
            # As with ssh -L: the target may be started later. A prohibition will not change.
            self._emit(Warned(host=self._label, text=exc.message))
        stack.enter_context(forwarding(sockets, connection, *self._remote))
        host = "localhost" if self._bind_address == "localhost" else self._bind_address
        self._emit(Ready(host=self._label, url=f"{host}:{self._local_port}"))
