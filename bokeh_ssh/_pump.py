"""Move bytes between local sockets and SSH streams: one selector thread, whatever their number.

Two threads touch a pipe, each for one direction::

    local socket ──read──▶ pump thread ──send──▶ SSH stream
    local socket ◀──write── transport thread ◀── SSH stream      while the socket takes it
    local socket ◀──write── pump thread ◀──── backlog            when it is slow

The pump thread is also the only one that sends on the SSH connection once it is up (see
``_transport``), so nothing the transport thread wants said can wait for the transport thread.

Memory is bounded by the stream's window: credit goes back to the sender only for bytes that the
local socket has taken (RFC 4254, section 5.2).
"""

from __future__ import annotations

import collections
import errno
import heapq
import itertools
import logging
import selectors
import socket
import struct
import threading
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from bokeh_ssh._dial import Address, no_delay
from bokeh_ssh._fork import in_child

log = logging.getLogger("bokeh_ssh.pump")

#: Bytes read from a local socket at a time: large enough that Python's cost per read does not matter,
#: small enough that sixteen busy sockets take fair turns.
_CHUNK = 128 * 1024
#: Parts for one system call; POSIX lets a kernel refuse more than 16 (IOV_MAX), none here has less than 1024.
_MOST_PARTS = 512
#: Seconds between two tries of a Unix socket that has more connections than it accepts.
_RETRY = 0.02
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: on, 0 s
_WINDOWS_RESET = struct.pack("hh", 1, 0)


def _send(sock: socket.socket, parts: list[memoryview]) -> int:
    """Send as much as fits; gives how much that was."""
    if len(parts) == 1 or not hasattr(sock, "sendmsg"):  # Windows has none
        return sock.send(parts[0])
    return sock.sendmsg(parts[:_MOST_PARTS])


class Stream(Protocol):
    """What a pipe needs of an SSH channel; sends happen on the pump thread only."""

    def writable(self) -> int: ...
    def send(self, data: memoryview) -> None: ...
    def send_eof(self) -> None: ...
    def credit(self, count: int) -> None: ...
    def close(self) -> None: ...


def reset(sock: socket.socket) -> None:
    """Close a socket so that its peer sees a reset, not an end of file that looks like success."""
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    except OSError:
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _WINDOWS_RESET)
        except OSError:  # a Unix socket has no reset: a close is all it can be told
            pass
    sock.close()


class Pump:
    """One thread that serves all local sockets of one SSH connection.

    :param name: for the thread's name
    """

    def __init__(self, name: str) -> None:
        self._selector = selectors.DefaultSelector()
        self._calls: collections.deque[Callable[[], None]] = collections.deque()
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._pipes: set[Pipe] = set()
        self._chunk = memoryview(bytearray(_CHUNK))
        self._closing = False
        self._wake_lock = threading.RLock()  # a signal handler may close what its thread was about to use
        self._woken = False
        self._ear, self._mouth = socket.socketpair()
        self._ear.setblocking(False)
        self._mouth.setblocking(False)
        self._selector.register(self._ear, selectors.EVENT_READ, self._heard)
        self._thread = threading.Thread(target=self._run, name=f"bokeh-ssh pump {name}", daemon=True)
        self._thread.start()
        in_child(self, Pump._abandon)

    def _abandon(self) -> None:
        """Close a forked child's copies of all sockets; the parent's stay as they are."""
        self._closing = True
        self._selector.close()
        for sock in (self._ear, self._mouth, *(pipe._sock for pipe in self._pipes)):
            sock.close()

    def post(self, call: Callable[[], None]) -> None:
        """Run ``call`` on the pump thread, after all that was posted before; never blocks."""
        self._calls.append(call)
        if threading.get_ident() == self._thread.ident:
            return  # it looks before it sleeps
        with self._wake_lock:
            if self._woken or self._closing:
                return
            self._woken = True
            try:
                self._mouth.send(b"!")
            except OSError:  # full means a wake-up is on its way already; closed means nobody listens
                pass

    def later(self, delay: float, call: Callable[[], None]) -> None:
        """Run ``call`` on the pump thread after ``delay`` seconds. Pump thread only."""
        heapq.heappush(self._timers, (time.monotonic() + delay, next(self._order), call))

    def splice(
        self, sock: socket.socket, stream: Stream, on_end: Callable[[bool], None] | None = None
    ) -> Pipe:
        """Join a connected socket and an open stream; the pipe owns both from here on.

        :param on_end: called once at the end, with True if both directions ended cleanly
        """
        pipe = Pipe(self, sock, stream, on_end)
        self.post(pipe.start)
        if self._closing:
            reset(sock)
        return pipe

    def dial(
        self,
        addresses: Sequence[Address],
        timeout: float,
        done: Callable[[socket.socket | None, OSError | None], None],
    ) -> None:
        """Connect to the first address that answers, without blocking; ``done`` runs on the pump thread."""
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
                    self._mouth.send(b"!")
                except OSError:
                    pass
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout)

    @property
    def open_pipes(self) -> int:
        """How many sockets are being served."""
        return len(self._pipes)

    def watch(self, sock: socket.socket, old: int, new: int, call: Callable[[int], None]) -> None:
        """Change the interest in a socket from ``old`` to ``new`` (0 is none). Pump thread only."""
        if new == old:
            return
        if not old:
            self._selector.register(sock, new, call)
        elif not new:
            self._selector.unregister(sock)
        else:
            self._selector.modify(sock, new, call)

    def _heard(self, mask: int) -> None:
        with self._wake_lock:
            self._woken = False
            try:
                self._ear.recv(64)
            except OSError:
                pass

    def _run(self) -> None:
        try:
            while not self._closing:
                self._turn()
        finally:
            for pipe in list(self._pipes):
                pipe.abort()
            self._selector.close()
            self._ear.close()
            self._mouth.close()

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


class Pipe:
    """One local socket and one SSH stream, joined. Made by :meth:`Pump.splice`."""

    __slots__ = (
        "_backlog",
        "_clean",
        "_done",
        "_interest",
        "_lock",
        "_on_end",
        "_pump",
        "_sock",
        "_sock_eof",
        "_started",
        "_stream",
        "_stream_eof",
    )

    def __init__(
        self, pump: Pump, sock: socket.socket, stream: Stream, on_end: Callable[[bool], None] | None
    ) -> None:
        sock.setblocking(False)
        no_delay(sock)
        self._pump = pump
        self._sock = sock
        self._stream = stream
        self._on_end = on_end
        self._backlog: collections.deque[memoryview] = collections.deque()
        self._lock = threading.Lock()
        self._interest = 0
        self._sock_eof = False
        self._stream_eof = False
        self._done = False
        self._started = False
        self._clean = False
        pump._pipes.add(self)

    # The pump thread's half.

    def start(self) -> None:
        """Begin to read from the socket."""
        self._started = True
        self._update()

    def _update(self) -> None:
        """Ask the selector for just what can be made use of now."""
        while not self._done and self._started:
            want = 0
            if not self._sock_eof and self._stream.writable() > 0:
                want |= selectors.EVENT_READ
            if self._backlog:
                want |= selectors.EVENT_WRITE
            self._pump.watch(self._sock, self._interest, want, self._ready)
            self._interest = want
            # A window that opened since we looked saw the old interest and woke nobody (on_window).
            if want & selectors.EVENT_READ or self._sock_eof or self._stream.writable() <= 0:
                return

    def _ready(self, mask: int) -> None:
        try:
            if mask & selectors.EVENT_WRITE:
                self._write_backlog()
            if mask & selectors.EVENT_READ and not self._done:
                self._read()
        except OSError as exc:
            log.debug("a local connection broke: %s", exc)
            self.abort()
        except Exception:
            self.abort()
            raise
        self._update()

    def _read(self) -> None:
        room = self._stream.writable()
        if room <= 0:
            return
        chunk = self._pump._chunk
        try:
            count = self._sock.recv_into(chunk, min(room, _CHUNK))
        except (BlockingIOError, InterruptedError):
            return
        if count:
            self._stream.send(chunk[:count])  # encrypted when that returns
            return
        self._sock_eof = True
        self._stream.send_eof()
        self._finish_if_done()

    def _write_backlog(self) -> None:
        taken = 0
        with self._lock:
            while self._backlog:
                try:
                    count = self._sock.send(self._backlog[0])
                except (BlockingIOError, InterruptedError):
                    break
                taken += count
                if count == len(self._backlog[0]):
                    self._backlog.popleft()
                else:
                    self._backlog[0] = self._backlog[0][count:]
            if taken:
                self._stream.credit(taken)
            if not self._backlog and self._stream_eof:
                self._shut_down_writing()
        self._finish_if_done()

    def _finish_if_done(self) -> None:
        if self._sock_eof and self._stream_eof and not self._backlog:
            self._clean = True
            self._end(self._sock.close)

    def _end(self, close_socket: Callable[[], None]) -> None:
        with self._lock:
            if self._done:
                return
            self._done = True
            self._backlog.clear()
        if self._interest:
            self._pump.watch(self._sock, self._interest, 0, self._ready)
        close_socket()
        self._pump._pipes.discard(self)
        self._stream.close()
        if self._on_end:
            self._on_end(self._clean)

    def abort(self) -> None:
        """Reset the local socket and close the stream. Pump thread only."""
        self._end(lambda: reset(self._sock))

    # The transport thread's half: what the stream tells.

    def on_data(self, parts: list[memoryview]) -> None:
        """Take what arrived: to the socket while it fits, else into the backlog."""
        with self._lock:
            if self._done:
                return
            count = 0
            waiting = bool(self._backlog)
            if not waiting:
                try:
                    count = _send(self._sock, parts)
                except (BlockingIOError, InterruptedError):
                    pass
                except OSError as exc:
                    log.debug("a local connection went away: %s", exc)
                    self._pump.post(self.abort)
                    return
            sent = count
            for part in parts:
                if sent < len(part):
                    self._backlog.append(part[sent:])
                sent = max(0, sent - len(part))
            if self._backlog and not waiting:
                self._pump.post(self._update)
            if count:
                self._stream.credit(count)

    def on_eof(self) -> None:
        """Pass the end of the stream on as a half-close, after what is still in the backlog."""
        with self._lock:
            self._stream_eof = True
            if not self._done and not self._backlog:
                self._shut_down_writing()
        self._pump.post(self._finish_if_done)

    def on_close(self) -> None:
        """Take the far side's close: clean after its EOF, otherwise it broke off."""
        if self._stream_eof:
            self._sock_eof = True  # nothing more can be sent that way
            self._pump.post(self._finish_if_done)
        else:
            self._pump.post(self.abort)

    def on_lost(self) -> None:
        """Take the end of the whole connection: the local program must not mistake it for success."""
        self._pump.post(self.abort)

    def on_window(self) -> None:
        """Read from the socket again: the far side takes more."""
        if not self._interest & selectors.EVENT_READ:
            self._pump.post(self._update)

    def _shut_down_writing(self) -> None:
        try:
            self._sock.shutdown(socket.SHUT_WR)
        except OSError as exc:  # it is gone already, which reading from it will tell
            log.debug("a local connection cannot be half-closed: %s", exc)


class _Dial:
    """A connect that does not block, one address after the other."""

    def __init__(
        self,
        pump: Pump,
        addresses: list[Address],
        timeout: float,
        done: Callable[[socket.socket | None, OSError | None], None],
    ) -> None:
        self._pump = pump
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
            # Its queue is full; it is not connecting, and nothing tells when there is room.
            sock.close()
            self._timeout -= _RETRY
            if self._timeout > 0:
                self._left.insert(0, (family, address))
                self._pump.later(_RETRY, self.next)
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
        self._pump.watch(sock, 0, selectors.EVENT_WRITE, self._ready)
        self._pump.later(self._timeout, lambda: self._give_up(sock))

    def _take(self) -> socket.socket:
        sock, self._sock = self._sock, None
        assert sock is not None
        self._pump.watch(sock, selectors.EVENT_WRITE, 0, self._ready)
        return sock

    def _ready(self, mask: int) -> None:
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
