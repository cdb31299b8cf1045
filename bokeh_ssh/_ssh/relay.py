"""One local socket and one SSH channel, joined: bytes both ways, half-closes, and no more of them than fit.

Two threads touch a relay, each for one direction::

    local socket ──read──▶ loop thread ──send──▶ SSH channel
    local socket ◀──write── transport thread ◀── SSH channel     while the socket takes it
    local socket ◀──write── loop thread ◀──── backlog            when it is slow

Memory is bounded by the channel's window: credit goes back to the sender only for bytes that the
local socket has taken (RFC 4254, section 5.2).

How it ends, as in OpenSSH's ``nchan.c``:

- The far side's EOF, or its CLOSE where it sends no EOF (RFC 4254, section 5.3 only recommends one), is
  passed on as a half-close once all that came before is delivered, at the pace of who reads it.
- After its CLOSE the far side takes nothing more: what the local program still sends is read and dropped. A
  close over bytes that were not read makes the system reset the connection, which can destroy what the
  program has yet to read, or keep it from reading.
- A local program that takes nothing more may have sent something before: that is read to its end and
  delivered. What comes for the program meanwhile is credited and dropped.
- Only what broke off (the SSH connection was lost, the far side ignores its window) is a reset.
"""

from __future__ import annotations

import collections
import logging
import selectors
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from typing import Protocol

from bokeh_ssh._core.fork import in_child
from bokeh_ssh._ssh.tcp import no_delay

log = logging.getLogger("bokeh_ssh.pump")

#: Parts for one system call; POSIX lets a kernel refuse more than 16 (IOV_MAX), none here has less than 1024.
_MOST_PARTS = 512
#: Seconds for a program to notice that the far side has closed, once it has all that was sent to it: what it
#: sends until then is dropped; after that, its system answers with a reset.
_LINGER = 2.0
#: Seconds after which a program that sends to a far side which has closed, and reads nothing, is reset.
_STALLED = 30.0
#: Seconds between two looks at what it has taken: nothing reports it.
_TICK = 0.5


def _send(sock: socket.socket, parts: list[memoryview]) -> int:
    """Send as much as fits; return how much that was."""
    if len(parts) == 1 or not hasattr(sock, "sendmsg"):  # Windows has none
        return sock.send(parts[0])
    return sock.sendmsg(parts[:_MOST_PARTS])


class Loop(Protocol):
    """What a relay needs of the loop that serves it."""

    chunk: memoryview

    def post(self, call: Callable[[], None]) -> None: ...
    def later(self, delay: float, call: Callable[[], None]) -> None: ...
    def watch(self, sock: socket.socket, old: int, new: int, call: Callable[[int], None]) -> None: ...
    def forget(self, relay: SocketRelay) -> None: ...


class RelayChannel(Protocol):
    """What a relay needs of an SSH channel; sends happen on the loop's thread only."""

    def writable(self) -> int: ...
    def send(self, data: memoryview) -> None: ...
    def send_eof(self) -> None: ...
    def credit(self, count: int) -> None: ...
    def close(self) -> None: ...


def reset_on_close(sock: socket.socket, on: bool) -> None:
    """Choose what a close does: a reset at once (SO_LINGER of 0 s), or what it usually does.

    A Unix socket has no reset, and is not changed by this: all that its peer can see is an end.
    """
    for layout in ("ii", "hh"):  # Windows has the second
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack(layout, on, 0))
        except OSError:
            continue
        return


def reset_if_killed(sock: socket.socket) -> None:
    """Let the system reset a connection when this process ends without closing it (``kill -9``).

    Its peer would take an end of file for success. Such a socket is closed by :func:`finish` or
    :func:`reset`. What counts is the last copy, so a forked child closes its own at once.
    """
    reset_on_close(sock, on=True)
    in_child(sock, socket.socket.close)


def finish(sock: socket.socket) -> None:
    """Close a socket in such a way that what was sent arrives, and then the end."""
    reset_on_close(sock, on=False)
    sock.close()


def reset(sock: socket.socket) -> None:
    """Close a socket so that its peer sees a reset, not an end of file that looks like success."""
    reset_on_close(sock, on=True)
    sock.close()


def _count_unread(sock: socket.socket) -> int:
    """Count the bytes sent that the peer's system has not taken; of a Unix socket, the peer itself.

    0 where this system does not say.
    """
    if not sys.platform.startswith("linux"):
        return 0
    import fcntl
    import termios

    try:
        (count,) = struct.unpack("i", fcntl.ioctl(sock, termios.TIOCOUTQ, bytes(4)))
    except (OSError, ValueError):  # the latter where whoever made it was interrupted, and closed it
        return 0
    return int(count)


class SocketRelay:
    """One local socket and one SSH stream, joined. Made by :meth:`IOLoop.relay`."""

    __slots__ = (
        "_backlog",
        "_broken",
        "_channel",
        "_channel_eof",
        "_closed",
        "_deaf",
        "_done",
        "_dropped",
        "_interest",
        "_io_loop",
        "_lock",
        "_on_end",
        "_sock",
        "_sock_eof",
        "_started",
    )

    def __init__(
        self, io_loop: Loop, sock: socket.socket, channel: RelayChannel, on_end: Callable[[bool], None] | None
    ) -> None:
        sock.setblocking(False)
        no_delay(sock)
        self._io_loop = io_loop
        self._sock = sock
        self._channel = channel
        self._on_end = on_end
        self._backlog: collections.deque[memoryview] = collections.deque()
        self._lock = threading.Lock()
        self._interest = 0
        self._sock_eof = False
        self._channel_eof = False
        self._closed = False  # the far side takes nothing more
        self._deaf = False  # the local program takes nothing more
        self._broken = False  # an end of the local socket means that it broke off
        self._done = False
        self._started = False
        self._dropped = False  # something that the local program sent after that, since this was last asked

    def abandon(self) -> None:
        """Close a forked child's copy of the socket; the parent's stays as it is."""
        self._sock.close()

    # The loop's thread's half.

    def start(self) -> None:
        """Begin to read from the socket."""
        self._started = True
        self._update()

    def _room(self) -> int:
        """Count the bytes that may be read from the socket now."""
        return self._channel.writable()

    def _update(self) -> None:
        """Ask the selector for just what can be made use of now."""
        while not self._done and self._started:
            want = 0
            if not self._sock_eof and (self._closed or self._room() > 0):
                want |= selectors.EVENT_READ
            if self._backlog:
                want |= selectors.EVENT_WRITE
            self._io_loop.watch(self._sock, self._interest, want, self._on_ready)
            self._interest = want
            # A window that opened since we looked saw the old interest and woke nobody (on_window).
            if want & selectors.EVENT_READ or self._sock_eof or self._room() <= 0:
                return

    def _on_ready(self, mask: int) -> None:
        try:
            if mask & selectors.EVENT_WRITE:
                self._write_backlog()
            if mask & selectors.EVENT_READ and not self._done:
                self._read()
        except OSError as exc:
            log.debug("a connection broke: %s", exc)
            self.abort()
        except Exception:
            self.abort()
            raise
        self._update()

    def _read(self) -> None:
        room = self._room()
        if room <= 0 and not self._closed:
            return
        chunk = self._io_loop.chunk
        try:
            count = self._sock.recv_into(chunk, len(chunk) if self._closed else min(room, len(chunk)))
        except (BlockingIOError, InterruptedError):
            return
        except OSError as exc:
            # It closed without reading what came for it, most often; what it had sent was read before this.
            log.debug("a local connection went away: %s", exc)
            count = 0
            with self._lock:
                self._stop_reading()
        if not count:
            self._on_sock_eof()
        elif self._closed:
            self._dropped = True
        else:
            self._send_on(chunk[:count])

    def _send_on(self, data: memoryview) -> None:
        self._channel.send(data)  # encrypted when that returns

    def _on_sock_eof(self) -> None:
        """Take it that the local program has sent all that it sends."""
        if self._broken:
            self.abort()
            return
        self._sock_eof = True
        self._channel.send_eof()
        self._finish_if_done()

    def _write_backlog(self) -> None:
        taken = 0
        with self._lock:
            while self._backlog:
                try:
                    count = self._sock.send(self._backlog[0])
                except (BlockingIOError, InterruptedError):
                    break
                except OSError as exc:
                    log.debug("a local connection takes nothing more: %s", exc)
                    self._stop_reading()
                    self._io_loop.post(self._look_for_end)
                    break
                taken += count
                if count == len(self._backlog[0]):
                    self._backlog.popleft()
                else:
                    self._backlog[0] = self._backlog[0][count:]
            if taken:
                self._credit(taken)
            if not self._backlog and self._channel_eof:
                self._shut_down_writing()
        self._finish_if_done()

    def _stop_reading(self) -> None:
        """Take it that the local program takes nothing more; under the lock."""
        self._deaf = True
        dropped = sum(map(len, self._backlog))
        self._backlog.clear()
        if dropped:
            self._credit(dropped)

    def _credit(self, count: int) -> None:
        """Let the far side send as much again as was taken out of the backlog; under the lock."""
        if not self._closed:
            self._channel.credit(count)

    def _look_for_end(self) -> None:
        """See whether a program that takes nothing more has ended: that need not wait for the window."""
        if self._done or self._sock_eof:
            self._finish_if_done()
            return
        try:
            gone = not self._sock.recv(1, socket.MSG_PEEK)
        except (BlockingIOError, InterruptedError):
            gone = False
        except OSError:
            gone = True
        if gone:
            try:
                self._on_sock_eof()
            except OSError as exc:
                log.debug("a connection broke: %s", exc)
                self.abort()
        self._update()

    def _finish_if_done(self) -> None:
        if self._sock_eof and self._is_delivered():
            self._end(finish, clean=True)

    def _is_delivered(self) -> bool:
        """Return whether nothing more is to be written to the local program."""
        return self._deaf or (self._channel_eof and not self._backlog)

    def _after_close(self) -> None:
        """Read what the local program still sends, and drop it, until it ends or has had the time to."""
        self._update()
        self._finish_if_done()
        self._wait_for_end(0, time.monotonic())

    def _wait_for_end(self, unread_before: int, since: float) -> None:
        if self._done or self._sock_eof:
            return
        now = time.monotonic()
        unread = 0 if self._deaf else _count_unread(self._sock) + sum(map(len, self._backlog))
        if unread != unread_before or (unread and not self._dropped):
            since = now  # it reads, at its own pace; or it is silent, and may take its time
        self._dropped = False
        if now - since < (_STALLED if unread else _LINGER):
            self._io_loop.later(_TICK, lambda: self._wait_for_end(unread, since))
        elif unread:
            self.abort()
        else:
            self._end(finish, clean=True)  # what it sends from here on, the system answers with a reset

    def _end(self, close_socket: Callable[[socket.socket], None], *, clean: bool = False) -> None:
        with self._lock:
            if self._done:
                return
            self._done = self._deaf = True
            self._backlog.clear()
        if self._interest:
            self._io_loop.watch(self._sock, self._interest, 0, self._on_ready)
        if self._on_end:
            self._on_end(clean)  # first: who reads at the other end of a socket pair sees no reset
        close_socket(self._sock)
        self._io_loop.forget(self)
        self._channel.close()

    def abort(self) -> None:
        """Reset the local socket and close the channel. Loop thread only.

        Where the far side had closed and all was delivered, there is nothing left to break off.
        """
        self._end(finish if self._closed and self._is_delivered() else reset)

    def break_off(self) -> None:
        """Take it that the other end of the local socket broke, which that may not show; from any thread."""
        self._broken = True
        self._io_loop.post(self.abort)

    # The transport thread's half: what the channel reports.

    def on_data(self, parts: list[memoryview]) -> None:
        """Take what arrived: to the socket while it fits, else into the backlog."""
        with self._lock:
            if self._deaf:
                if not self._done:
                    self._channel.credit(sum(map(len, parts)))
                return
            count = 0
            waiting = bool(self._backlog)
            if not waiting:
                try:
                    count = _send(self._sock, parts)
                except (BlockingIOError, InterruptedError):
                    pass
                except OSError as exc:
                    log.debug("a local connection takes nothing more: %s", exc)
                    self._stop_reading()
                    self._channel.credit(sum(map(len, parts)))
                    self._io_loop.post(self._look_for_end)
                    return
            sent = count
            for part in parts:
                if sent < len(part):
                    self._backlog.append(part[sent:])
                sent = max(0, sent - len(part))
            if self._backlog and not waiting:
                self._io_loop.post(self._update)
            if count:
                self._channel.credit(count)

    def on_eof(self) -> None:
        """Pass the end of the channel on as a half-close, after what is still in the backlog."""
        self._on_channel_end(closed=False)
        self._io_loop.post(self._finish_if_done)

    def on_close(self) -> None:
        """Take the far side's close as its end, with or without an EOF before it."""
        self._on_channel_end(closed=True)
        self._io_loop.post(self._after_close)

    def _on_channel_end(self, *, closed: bool) -> None:
        with self._lock:
            self._closed = closed  # no credit from then on: the far side may know the channel no more
            if not self._channel_eof:
                self._channel_eof = True
                if not self._done and not self._backlog:
                    self._shut_down_writing()

    def on_lost(self) -> None:
        """Take the end of the whole connection: the local program must not mistake it for success."""
        self._io_loop.post(self.abort)

    def on_window(self) -> None:
        """Read from the socket again: the far side takes more."""
        if not self._interest & selectors.EVENT_READ:
            self._io_loop.post(self._update)

    def _shut_down_writing(self) -> None:
        try:
            self._sock.shutdown(socket.SHUT_WR)
        except OSError as exc:  # it is gone already, which reading from it will show
            log.debug("a local connection cannot be half-closed: %s", exc)


#: Makes a relay of a loop, a socket, a channel and what is called at the end.
MakeRelay = Callable[[Loop, socket.socket, RelayChannel, "Callable[[bool], None] | None"], SocketRelay]
