"""Listening on this machine: which ports, and where what connects is led (``ssh -L``).

The one module that knows sshtunnel.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import re
import selectors
import socket
import socketserver
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

from bokeh_ssh._core.backoff import Attempts
from bokeh_ssh._core.endpoint import HERE, Endpoint, Origin, nearby
from bokeh_ssh._core.errors import PortInUseError
from bokeh_ssh._core.fork import in_child
from bokeh_ssh._core.settings import setting, shown
from bokeh_ssh._core.this_machine.scarcity import scarcity_of
from bokeh_ssh._core.threads import Thread
from bokeh_ssh._forwarding.filtered_relay import FilteredRelay
from bokeh_ssh._forwarding.http_gate import HttpGate
from bokeh_ssh._forwarding.http_requests import MOST, Inspector, Opened
from bokeh_ssh._forwarding.peer_uid import GONE, UNKNOWN, PeerUidCheck
from bokeh_ssh._forwarding.request_filter import RequestFilter
from bokeh_ssh._forwarding.site_cache import SiteCache
from bokeh_ssh._forwarding.spare_channels import Check, SpareChannels
from bokeh_ssh._forwarding.static_cache import StaticCache
from bokeh_ssh._forwarding.unpacker import UnpackingRelay
from bokeh_ssh._ssh.connection import Connection
from bokeh_ssh._ssh.relay import MakeRelay, SocketRelay, reset, reset_on_close
from bokeh_ssh._ssh.transport import EarlyChannel

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
#: Seconds for the end of a connection to come here by way of the machine that it was made through.
_ENDS = 0.5

#: Takes sshtunnel's own log lines, which speak of a login that does not take place.
_SILENT = logging.Logger("sshtunnel", logging.CRITICAL + 1)

Accept = Callable[[socket.socket, Origin], None]
Warn = Callable[[str], None]

_REFUSED = {
    GONE: (
        "refused a local connection of a program that had closed it already, with what it had sent: it could "
        f"be another user's ({setting('allow_others=True')} lets them in)"
    ),
    UNKNOWN: (
        "refused a local connection: the system did not say whose it is "
        f"({setting('allow_others=True')} lets all in)"
    ),
}

#: Seconds that a new connection waits while there is no line, and a WebSocket; and the most that either does
#: while an attempt is under way, which may wait for a person. A browser waits some 240.
PATIENCE = 20.0
PAGE_PATIENCE = 180.0
_LONGEST = 240.0
#: Connections that are held; those that come then wait in the kernel's queue.
_MOST_HELD = 256
_ASKS = re.compile(rb"\nupgrade:[ \t]{0,99}websocket", re.IGNORECASE)
#: Kinds of losses that are distinguished: the users of a container can be as many as there are numbers.
_MOST_KINDS = 16


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


def open_acceptor(
    stack: contextlib.ExitStack,
    sockets: list[socket.socket],
    warn: Warn,
    others: bool | None,
    attempts: Attempts,
) -> LocalAcceptor:
    """Make an :class:`LocalAcceptor` of bound sockets that lasts as long as ``stack``."""
    with contextlib.ExitStack() as first:
        for sock in sockets:
            first.callback(sock.close)
        acceptor = LocalAcceptor(sockets, warn, others, attempts)
        first.pop_all()
    stack.callback(acceptor.close)
    return acceptor


@dataclass(frozen=True, eq=False)
class _Destination:
    """Where local connections are led while one SSH connection lasts; see :meth:`LocalAcceptor.forwarding`.

    :param take_back: takes a connection of which nothing came, and what was read of it
    """

    connection: Connection
    target: Endpoint
    check: Check | None
    kept: SiteCache | None
    spare: SpareChannels | None
    packed: str
    take_back: Callable[[socket.socket, Origin, Opened | None], None]

    def accept(self, sock: socket.socket, origin: Origin, begun: Opened | None = None) -> None:
        """Lead a connection there, on a channel that is open already if there is one."""
        lead = functools.partial(self._lead, sock, origin, begun)
        if self.spare:
            self.spare.take(lead)
            self.spare.fill()
        else:
            lead(None)

    def _lead(
        self,
        sock: socket.socket,
        origin: Origin,
        begun: Opened | None,
        unused: EarlyChannel | None,
        *,
        unpacks: bool = True,
    ) -> None:
        connection = self.connection
        if unused is None and self.packed and unpacks:
            lead = functools.partial(self._lead, sock, origin, begun)
            connection.open_channel(
                self.packed,
                HERE,
                lambda channel: lead(EarlyChannel(channel)),
                lambda *_: lead(None, unpacks=False),
            )
            return
        again = functools.partial(self.take_back, sock, origin, begun)
        make: MakeRelay = SocketRelay
        if begun:
            # On a channel that is open already it goes out at once, onto a line that may be dead.
            repeat = (lambda: reset(sock) if connection.alive else again()) if unused else None
            kind = UnpackingRelay if self.packed and unpacks else FilteredRelay
            make = functools.partial(kind, opened=begun, cache=self.kept, again=repeat)
        connection.forward(sock, self.target, origin, self.check, make, again, unused)


class LocalAcceptor:
    """Where local connections come in: stays open while the lines that it leads to come and go.

    Without a line, new connections are held, and the line is tried at once; so are those of which nothing had
    been sent when it was lost. They are led on when it is there again. One that has waited for
    :data:`PATIENCE` seconds, a WebSocket for :data:`PAGE_PATIENCE` (the page that wants it back gives up
    after few attempts, so that each should last), is reset once an attempt that began then has failed.

    :param sockets: bound and listening, see :func:`bind`; closed by :meth:`close`
    :param warn: gets what is refused or lost here: nobody else would notice, where a program has sent
        something and gone
    :param others: whether the other users of this machine are let in; None: only where a program has closed
        its end already, so that nobody can know whose it was, and it reads no answer. Where the system does
        not say who connects, all are
    :param attempts: to have a line again
    :ivar port: the one that they share; 0 for a Unix socket
    """

    def __init__(
        self, sockets: list[socket.socket], warn: Warn, others: bool | None, attempts: Attempts
    ) -> None:
        self.port = address_of(sockets[0])[1]
        self._peer_uid_check = PeerUidCheck() if self.port and not others else None
        self._others = others
        self._refusals = _RefusalReporter(warn)
        self._route: Accept | None = None
        self._route_alive: Callable[[], bool] = lambda: False
        self._started = False
        self._held: list[_Held] = []
        #: What lines that were lost meanwhile have read of connections that wait for the next.
        self._begun: weakref.WeakKeyDictionary[socket.socket, Inspector] = weakref.WeakKeyDictionary()
        self._change = threading.Condition()
        self._closed = False
        self._hold_thread: threading.Thread | None = None
        self._sockets = list(sockets)
        self._accepted: weakref.WeakSet[socket.socket] = weakref.WeakSet()
        self._attempts = attempts
        attempts.listeners.append(self._wake_waiting)
        self._forwarder = Forwarder(sockets, self._accept)
        in_child(self, LocalAcceptor._abandon)

    def _abandon(self) -> None:
        for sock in (*self._sockets, *self._accepted):
            sock.close()
        self._closed = True

    def _accept(self, sock: socket.socket, origin: Origin) -> None:
        self._accepted.add(sock)
        foreign_uid = self._peer_uid_check.foreign_uid(sock) if self._peer_uid_check else None
        if foreign_uid is None or (foreign_uid == GONE and self._others is None):
            self._route_or_hold(sock, origin, patient=True)
            return
        reset(sock)
        if foreign_uid in _REFUSED:
            self._refusals.count(shown(_REFUSED[foreign_uid]))
        else:
            allow = shown(setting("allow_others=True"))
            self._refusals.report_once(
                f"refused a local connection of user {foreign_uid} ({allow} lets other users in)"
            )

    def _route_or_hold(self, sock: socket.socket, origin: Origin, *, patient: bool = False) -> None:
        """Lead a connection on, or hold it.

        :param patient: whether this thread may wait while no more can be held: then they wait in the kernel
        """
        with self._change:
            while patient and self._is_full():
                self._change.wait()
            route = self._route if self._route_alive() else None
            hold = route is None and len(self._held) < _MOST_HELD and not self._closed
            if hold and not self._attempts.over:
                self._held.append(_Held(sock, origin, time.monotonic()))
                if self._hold_thread is None:
                    self._hold_thread = Thread(self._reset_expired, name="bokeh-ssh hold")
                    self._hold_thread.start()
                self._change.notify_all()
                self._attempts.want()
                return
        if route is None:
            reset(sock)
        else:
            route(sock, origin)

    def _is_full(self) -> bool:
        over = self._closed or self._attempts.over or (self._route and self._route_alive())
        return len(self._held) >= _MOST_HELD and not over

    def _wake_waiting(self) -> None:
        with self._change:
            self._change.notify_all()

    def _reset_expired(self) -> None:
        """Reset what has waited long enough, until nothing is held."""
        with self._change:
            while self._held:
                now = time.monotonic()
                for held in list(self._held):
                    begun = self._begun.get(held.sock)
                    may_wait = not held.is_due(now) or held.may_wait(now, self._attempts, begun)
                    if self._attempts.over or not may_wait:
                        self._held.remove(held)
                        self._change.notify_all()
                        reset(held.sock)
                first = min((held.until for held in self._held), default=now)
                self._change.wait(max(0.0, first - now))
            self._hold_thread = None

    def route_to(self, accept: Accept, *, alive: Callable[[], bool]) -> None:
        """Hand connections to ``accept``, those that are held first, as long as ``alive``.

        Before it is called for the first time, connections wait in the kernel, however long.
        """
        while True:
            with self._change:
                if not self._held or not alive():  # those that came back since wait for the next line
                    self._route, self._route_alive = accept, alive
                    self._change.notify_all()
                    break
                waiting, self._held = self._held, []
                self._change.notify_all()
            for held in waiting:
                accept(held.sock, held.origin)
        if not self._started:
            self._started = True
            self._forwarder.start()

    def hold_connections(self) -> None:
        """Hold new connections from now on."""
        with self._change:
            self._route = None

    @contextlib.contextmanager
    def forwarding(
        self,
        connection: Connection,
        target: Endpoint,
        request_filter: RequestFilter | None = None,
        check: Check | None = None,
        cache: StaticCache | None = None,
        *,
        site: str = "",
        spare: SpareChannels | None = None,
        packed: str = "",
    ) -> Iterator[None]:
        """Lead to ``target`` as seen from the connection's server, while the context lasts.

        :param request_filter: judges each request; None lets all through, HTTP or not
        :param check: has the last word on each, see :meth:`Connection.forward`
        :param cache: answers requests for static files, and keeps those of the server
        :param site: names the server on its machine, the same each time, where what it says may be kept for
            it alone; empty keeps nothing that counts for one server only
        :param spare: channels to ``packed`` or else to ``target`` for the next connections, if there may be
            some; closed at the end
        :param packed: a socket there that leads to ``target`` too, and packs what that sends; for connections
            whose requests are judged, as long as it is served
        """
        kept = None
        if cache:
            given, spare = spare, spare or SpareChannels(connection, target, check, 0)
            questions = SpareChannels(connection, target, check, 1)
            kept = SiteCache(cache, connection, site, questions, None if given else spare)

        destination = _Destination(connection, target, check, kept, spare, packed, self._hold_again)
        accept = destination.accept
        gate: HttpGate | None = None
        if request_filter:
            full = functools.partial(pause, self._forwarder)
            inspect = functools.partial(self._inspect, request_filter, kept)
            gate = HttpGate(connection.io_loop, inspect, accept, self._route_or_hold, full, kept)
        self.route_to(gate.check if gate else accept, alive=lambda: connection.alive)
        try:
            yield
        finally:
            self.hold_connections()
            for each in (spare, kept):
                if each:
                    each.close()
            for sock, origin, inspector in gate.release() if gate else ():
                if inspector.held or inspector.unsent:
                    self._begun[sock] = inspector
                self._route_or_hold(sock, origin)

    def _inspect(
        self, request_filter: RequestFilter, kept: SiteCache | None, sock: socket.socket
    ) -> Inspector:
        """Return what reads the requests of a connection, on the next line too where it has begun to."""
        on_page = kept.open_page if kept else None
        return self._begun.pop(sock, None) or Inspector(request_filter, on_page=on_page)

    def _hold_again(self, sock: socket.socket, origin: Origin, begun: Opened | None) -> None:
        """Take back a connection of which nothing came, with what was read of it."""
        if begun:
            self._begun[sock] = begun.undone()
        self._route_or_hold(sock, origin)

    def is_reached_by(self, dial: Callable[[], socket.socket]) -> bool:
        """Return whether what ``dial`` connects comes in here: each would make another one, without end.

        Nothing is sent for that: what comes in here also ends here, and does so again. Once connections are
        led on, it is only dialled.

        :param dial: may take a connection that was made before
        """
        came: list[tuple[socket.socket, Any]] = []
        ended: set[socket.socket] = set()
        for _ in range(1 if self._started else 2):
            before = len(ended)
            with contextlib.closing(dial()):
                for sock in () if self._started else self._sockets:
                    with contextlib.suppress(OSError):  # no more have come, or it is being closed
                        sock.setblocking(False)
                        while True:
                            came.append(sock.accept())
            ended |= _find_ended([sock for sock, _ in came if sock not in ended])
            if len(ended) == before:
                break
        for sock, address in came:
            if sock in ended:
                sock.close()
            else:  # somebody else's
                reset_on_close(sock, True)
                self._accept(sock, _origin(address))
        return len(ended) > 1

    def close(self) -> None:
        """Stop listening, and reset what is held; idempotent."""
        with self._change:
            self._closed = True
            self._change.notify_all()
        self._forwarder.stop()
        if self._peer_uid_check:
            self._peer_uid_check.close()
        for sock in self._sockets:  # where it was never started, nobody else has closed them
            sock.close()
        with self._change:
            self._route = None
            for held in self._held:
                reset(held.sock)
            self._held = []
            hold_thread = self._hold_thread
            self._change.notify_all()
        if hold_thread:
            hold_thread.join(2)
        self._refusals.close()


def _origin(address: Any) -> Origin:
    """Return who connected, as ``accept()`` says it; of a Unix socket nothing is known."""
    return (str(address[0]), int(address[1])) if isinstance(address, tuple) else HERE


def _find_ended(sockets: list[socket.socket]) -> set[socket.socket]:
    """Return which of these ends now; the first is waited for a little."""
    with selectors.DefaultSelector() as selector:
        for sock in sockets:
            selector.register(sock, selectors.EVENT_READ)
        ended: set[socket.socket] = set()
        deadline = time.monotonic() + _ENDS
        while selector.get_map() and not ended and (left := deadline - time.monotonic()) > 0:
            for key, _ in selector.select(left):
                sock = cast("socket.socket", key.fileobj)
                selector.unregister(sock)
                try:
                    over = not sock.recv(1, socket.MSG_PEEK)
                except OSError:
                    over = True
                ended |= {sock} if over else set()
    return ended


class _RefusalReporter:
    """Reports what is refused or lost, in a number of events that whoever connects has no influence on."""

    def __init__(self, warn: Warn) -> None:
        self._report = warn
        self._counts: dict[str, int] = {}
        self._told: dict[str, int] = {}
        self._lock = threading.RLock()  # a signal handler may close meanwhile

    def report_once(self, text: str) -> None:
        """Report a kind, the first time."""
        log.info("%s", text)
        with self._lock:
            if text in self._told or len(self._told) >= _MOST_KINDS:
                return
            self._told[text] = 1
        self._report(text)

    def count(self, text: str) -> None:
        """Count one: the 1st, the 10th, the 100th and so on are reported at once, the rest at the end."""
        log.info("%s", text)
        with self._lock:
            count = self._counts[text] = self._counts.get(text, 0) + 1
            if str(count).strip("0") != "1":
                return
            self._told[text] = count
        self._report(text if count == 1 else f"{text}: {count} by now")

    def close(self) -> None:
        """Report what was counted and not reported; idempotent."""
        with self._lock:
            counts, self._counts = self._counts, {}
        for text, count in counts.items():
            if count > self._told[text]:
                self._report(f"{text}: {count} in all")


class _Held:
    """A local connection that waits for a line."""

    __slots__ = ("_asked", "_came", "_over", "origin", "sock", "until")

    def __init__(self, sock: socket.socket, origin: Origin, now: float) -> None:
        self.sock = sock
        self.origin = origin
        self.until = now + PATIENCE  # when to look again
        self._came = now
        self._over = 0.0  # when its time was over
        self._asked = False

    def is_due(self, now: float) -> bool:
        """Return whether its time is over, so that it waits for an attempt at most."""
        return bool(self._over) or now >= self.until

    def may_wait(self, now: float, attempts: Attempts, begun: Inspector | None) -> bool:
        """Look whether it may wait on: as a page's WebSocket, or while an attempt may serve it.

        :param begun: has what was read of it already
        """
        if not self._asked:
            self._asked = True
            if _is_page(self.sock, begun.held if begun else b""):
                self.until = self._came + PAGE_PATIENCE
                if now < self.until:
                    return True
        if not self._over:
            self._over = now
            attempts.want()
        self.until = self._came + _LONGEST  # or earlier, when an attempt has failed
        return now < self.until and attempts.may_serve(self._over)


def _is_page(sock: socket.socket, begun: bytes) -> bool:
    """Check whether a connection begins with a request for a WebSocket.

    :param begun: what has been read of it already
    """
    more = b""
    with contextlib.suppress(OSError):  # it has sent nothing more, or is gone
        sock.setblocking(False)
        more = sock.recv(MOST, socket.MSG_PEEK)  # it may stand behind all cookies
    return bool(_ASKS.search(begun + more))


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
    :param accept: takes each connection and its origin; must return soon
    """

    skip_tunnel_checkup = True
    daemon_forward_servers = True

    def __init__(self, sockets: list[socket.socket], accept: Accept) -> None:
        self._sockets = list(sockets)
        self._accept = accept
        self._transport = _Standing()
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

        def make(address: object, handler: type[_Handler], logger: object = None) -> _Server:
            try:
                return _Server(listening, handler)
            except OSError as exc:  # sshtunnel would give no reason
                if scarce := scarcity_of(exc):
                    raise scarce from exc
                raise

        return make

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

    def __init__(self, sock: socket.socket, handler: type[_Handler]) -> None:
        super().__init__(address_of(sock), handler)
        self.socket = sock
        sock.setblocking(False)  # a connection may be gone again by the time it is accepted
        reset_on_close(sock, True)  # what it accepts is made alike; also where this process is killed
        self._gone = threading.Event()
        self._paused = False
        self._selector = selectors.DefaultSelector()
        self._wake_recv, self._wake_send = socket.socketpair()
        for end in (self._wake_recv, self._wake_send):
            end.setblocking(False)
        in_child(self, _Server._abandon)

    def _abandon(self) -> None:
        for part in (self.socket, self._wake_recv, self._wake_send, self._selector):
            part.close()

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
        return sock, _origin(address)

    def process_request(self, request: Any, client_address: Any) -> None:
        self.finish_request(request, client_address)

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.exception("a connection from %s port %d failed", *client_address)
        reset(request)

    def shutdown_request(self, request: Any) -> None:
        pass  # after an error: handle_error has closed it

    def serve_forever(self, poll_interval: float = 0.5) -> None:
        with self._selector as selector, self._wake_recv:
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
