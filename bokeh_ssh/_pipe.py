"""One local socket and one SSH stream, joined: bytes both ways, half-closes, and no more of them than fit.

Two threads touch a pipe, each for one direction::

    local socket ──read──▶ pump thread ──send──▶ SSH stream
    local socket ◀──write── transport thread ◀── SSH stream      while the socket takes it
    local socket ◀──write── pump thread ◀──── backlog            when it is slow

Memory is bounded by the stream's window: credit goes back to the sender only for bytes that the
local socket has taken (RFC 4254, section 5.2).
"""

from __future__ import annotations

import collections
import logging
import selectors
import socket
import struct
import threading
from collections.abc import Callable
from typing import Protocol

from bokeh_ssh._dial import no_delay

log = logging.getLogger("bokeh_ssh.pump")

#: Parts for one system call; POSIX lets a kernel refuse more than 16 (IOV_MAX), none here has less than 1024.
_MOST_PARTS = 512
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: on, 0 s
_WINDOWS_RESET = struct.pack("hh", 1, 0)


def _send(sock: socket.socket, parts: list[memoryview]) -> int:
    """Send as much as fits; gives how much that was."""
    if len(parts) == 1 or not hasattr(sock, "sendmsg"):  # Windows has none
        return sock.send(parts[0])
    return sock.sendmsg(parts[:_MOST_PARTS])


class Loop(Protocol):
    """What a pipe needs of the pump that serves it."""

    chunk: memoryview

    def post(self, call: Callable[[], None]) -> None: ...
    def watch(self, sock: socket.socket, old: int, new: int, call: Callable[[int], None]) -> None: ...
    def forget(self, pipe: Pipe) -> None: ...


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
        self, pump: Loop, sock: socket.socket, stream: Stream, on_end: Callable[[bool], None] | None
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

    def abandon(self) -> None:
        """Close a forked child's copy of the socket; the parent's stays as it is."""
        self._sock.close()

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
        chunk = self._pump.chunk
        try:
            count = self._sock.recv_into(chunk, min(room, len(chunk)))
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
        self._pump.forget(self)
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
