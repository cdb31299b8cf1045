"""Serve the local sockets of one SSH connection: one selector thread, whatever their number.

The loop's thread is also the only one that sends on the SSH connection once it is up (see
``_ssh.transport``), so nothing the transport thread wants said can wait for the transport thread.
"""

from __future__ import annotations

import collections
import errno
import heapq
import itertools
import logging
import selectors
import socket
import threading
import time
from collections.abc import Callable, Sequence

from bokeh_ssh._core.threads import Thread
from bokeh_ssh._ssh.relay import MakeRelay, RelayChannel, SocketRelay, reset, reset_if_killed
from bokeh_ssh._ssh.tcp import Address

log = logging.getLogger("bokeh_ssh.pump")

#: Bytes read from a local socket at a time: large enough that Python's cost per read does not matter,
#: small enough that sixteen busy sockets take fair turns.
_CHUNK = 128 * 1024
#: Seconds between two tries of a Unix socket that has more connections than it accepts.
_RETRY = 0.02


class IOLoop:
    """One thread that serves all local sockets of one SSH connection.

    :param name: for the thread's name
    :ivar chunk: what its relays read into, one after the other
    """

    def __init__(self, name: str) -> None:
        self._selector = selectors.DefaultSelector()
        self._calls: collections.deque[Callable[[], None]] = collections.deque()
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._relays: set[SocketRelay] = set()
        self._loose: dict[socket.socket, Callable[[], object]] = {}
        self.chunk = memoryview(bytearray(_CHUNK))
        self._closing = False
        self._wake_lock = threading.RLock()  # a signal handler may close what its thread was about to use
        self._woken = False
        self._wake_recv, self._wake_send = socket.socketpair()
        self._wake_recv.setblocking(False)
        self._wake_send.setblocking(False)
        self._selector.register(self._wake_recv, selectors.EVENT_READ, self._on_wake)
        self._thread = Thread(self._run, name=f"bokeh-ssh io loop {name}")
        self._thread.start()

    def abandon(self) -> None:
        """Close a forked child's copies of all sockets; the parent's stay as they are."""
        self._closing = True
        self._selector.close()
        for sock in (self._wake_recv, self._wake_send):
            sock.close()
        for sock in self._loose:
            sock.close()
        for relay in self._relays:
            relay.abandon()

    def post(self, call: Callable[[], None]) -> None:
        """Run ``call`` on the loop's thread, after all that was posted before; never blocks."""
        self._calls.append(call)
        if threading.get_ident() == self._thread.ident:
            return  # it looks before it sleeps
        with self._wake_lock:
            if self._woken or self._closing:
                return
            self._woken = True
            try:
                self._wake_send.send(b"!")
            except OSError:  # full means a wake-up is on its way already; closed means nobody listens
                pass

    def later(self, delay: float, call: Callable[[], None]) -> None:
        """Run ``call`` on the loop's thread after ``delay`` seconds. Loop thread only."""
        heapq.heappush(self._timers, (time.monotonic() + delay, next(self._order), call))

    def adopt(self, sock: socket.socket, on_end: Callable[[], object] = lambda: None) -> None:
        """Close a socket at the end, unless it has become a relay's, or was released; from any thread.

        :param on_end: called where it is
        """
        self._loose[sock] = on_end
        if self._closing and threading.get_ident() != self._thread.ident:  # which does so as it ends
            self._close_loose()

    def release(self, sock: socket.socket) -> None:
        """Leave a socket to somebody else."""
        self._loose.pop(sock, None)

    def _close_loose(self) -> None:
        for sock in list(self._loose):
            on_end = self._loose.pop(sock, None)
            if on_end:
                sock.close()
                on_end()

    def relay(
        self,
        sock: socket.socket,
        channel: RelayChannel,
        on_end: Callable[[bool], None] | None = None,
        make: MakeRelay = SocketRelay,
    ) -> SocketRelay:
        """Join a connected socket and an open channel; the relay owns both from here on.

        :param on_end: called once at the end, with True if both directions ended cleanly
        :param make: makes the relay
        """
        relay = make(self, sock, channel, on_end)
        self._relays.add(relay)
        self.release(sock)
        self.post(relay.start)
        if self._closing:
            reset(sock)
        return relay

    def dial(
        self,
        addresses: Sequence[Address],
        timeout: float,
        done: Callable[[socket.socket | None, OSError | None], None],
    ) -> None:
        """Connect to the first address that answers, without blocking; ``done`` runs on the loop's thread."""
        self.post(_Dial(self, list(addresses), timeout, done).next)

    def drain(self, timeout: float) -> bool:
        """Wait until everything posted so far has run; False if that took more than ``timeout`` seconds."""
        done = threading.Event()
        self.post(done.set)
        return not self._thread.is_alive() or done.wait(timeout)

    def close(self, timeout: float = 1.0) -> None:
        """Reset every socket that is left and end the thread; idempotent."""
        with self._wake_lock:
            if not self._closing:
                self._closing = True
                try:
                    self._wake_send.send(b"!")
                except OSError:
                    pass
        self._thread.join(timeout)

    def forget(self, relay: SocketRelay) -> None:
        """Serve a relay no longer. Loop thread only."""
        self._relays.discard(relay)

    @property
    def open_relays(self) -> int:
        """How many sockets are being served."""
        return len(self._relays)

    def watch(self, sock: socket.socket, old: int, new: int, call: Callable[[int], None]) -> None:
        """Change the interest in a socket from ``old`` to ``new`` (0 is none). Loop thread only."""
        if new == old:
            return
        if not old:
            self._selector.register(sock, new, call)
        elif not new:
            self._selector.unregister(sock)
        else:
            self._selector.modify(sock, new, call)

    def _on_wake(self, mask: int) -> None:
        with self._wake_lock:
            self._woken = False
            try:
                self._wake_recv.recv(64)
            except OSError:
                pass

    def _run(self) -> None:
        try:
            while not self._closing:
                self._turn()
        finally:
            for relay in list(self._relays):
                relay.abort()
            self._close_loose()
            self._selector.close()
            self._wake_recv.close()
            self._wake_send.close()

    def _turn(self) -> None:
        pause = None
        if self._calls:
            pause = 0.0
        elif self._timers:
            pause = max(0.0, self._timers[0][0] - time.monotonic())
        for key, mask in self._selector.select(pause):
            self._call(key.data, mask)
        while self._timers and self._timers[0][0] <= time.monotonic():
            self._call(heapq.heappop(self._timers)[2])
        for _ in range(len(self._calls)):  # those posted meanwhile wait for the next turn: sockets first
            self._call(self._calls.popleft())

    def _call(self, call: Callable[..., None], *args: object) -> None:
        try:
            call(*args)
        except Exception:  # one connection's failure must not end the others (and the thread is theirs too)
            log.exception("a connection failed")


class _Dial:
    """A connect that does not block, one address after the other."""

    def __init__(
        self,
        io_loop: IOLoop,
        addresses: list[Address],
        timeout: float,
        done: Callable[[socket.socket | None, OSError | None], None],
    ) -> None:
        self._io_loop = io_loop
        self._left = addresses
        self._timeout = timeout
        self._done = done
        self._sock: socket.socket | None = None
        self._error = OSError(errno.EADDRNOTAVAIL, "no address")

    def next(self) -> None:
        """Try the next address."""
        if not self._left:
            self._done(None, self._error)
            return
        family, address = self._left.pop(0)
        try:
            sock = socket.socket(family, socket.SOCK_STREAM)
            reset_if_killed(sock)
            sock.setblocking(False)
            code = sock.connect_ex(address)
        except OSError as exc:
            self._error = exc
            self.next()
            return
        if code == 0:
            self._done(sock, None)
            return
        if code == errno.EAGAIN and family == getattr(socket, "AF_UNIX", None):
            # Its queue is full; it is not connecting, and nothing reports when there is room.
            sock.close()
            self._timeout -= _RETRY
            if self._timeout > 0:
                self._left.insert(0, (family, address))
                self._io_loop.later(_RETRY, self.next)
            else:
                self._error = OSError(code, "its queue is full")
                self.next()
            return
        if code not in (errno.EINPROGRESS, errno.EWOULDBLOCK, errno.EAGAIN, 10035):
            sock.close()
            self._error = OSError(code, errno.errorcode.get(code, str(code)))
            self.next()
            return
        self._sock = sock
        self._io_loop.adopt(sock)
        self._io_loop.watch(sock, 0, selectors.EVENT_WRITE, self._on_writable)
        self._io_loop.later(self._timeout, lambda: self._give_up(sock))

    def _take(self) -> socket.socket:
        sock, self._sock = self._sock, None
        assert sock is not None
        self._io_loop.release(sock)
        self._io_loop.watch(sock, selectors.EVENT_WRITE, 0, self._on_writable)
        return sock

    def _on_writable(self, mask: int) -> None:
        sock = self._take()
        code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code == 0:
            self._done(sock, None)
            return
        sock.close()
        self._error = OSError(code, errno.errorcode.get(code, str(code)))
        self.next()

    def _give_up(self, sock: socket.socket) -> None:
        if self._sock is sock:
            self._take().close()
            self._error = OSError(errno.ETIMEDOUT, "timed out")
            self.next()
