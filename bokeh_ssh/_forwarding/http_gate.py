"""Reads the beginning of each local connection before it goes on; ``http_requests`` decides whether it may.

What asks for static files is answered here, as long as the cache has them: that needs no channel.
None of them needs a thread: the loop's selector waits for all of them.
"""

from __future__ import annotations

import functools
import logging
import selectors
import socket
import threading
import time
from collections.abc import Callable

from bokeh_ssh._forwarding.filtered_relay import turn_away
from bokeh_ssh._forwarding.http_requests import Inspector, Opened, RequestRefusedError
from bokeh_ssh._forwarding.site_cache import SiteCache
from bokeh_ssh._ssh.io_loop import IOLoop
from bokeh_ssh._ssh.relay import finish, reset
from bokeh_ssh._ssh.tcp import no_delay

log = logging.getLogger("bokeh_ssh.forward")

Accept = Callable[[socket.socket, "tuple[str, int]", Opened], None]

#: Connections that may wait to say something: browsers open some ahead of need, and leave them idle. More
#: wait in the system's queue.
_MOST_WAITING = 256
#: Seconds after which the oldest of as many gives way, if it has said nothing at all: a program that leaves
#: them idle for good must not keep others out. Browsers close theirs earlier.
_IDLE = 60.0
#: Seconds for the rest of a head that has begun.
_PATIENCE = 10.0
#: Seconds after which a client that takes nothing of its answer is reset.
_STALLED = 60.0


class HttpGate:
    """Stands before one line.

    :param io_loop: of the connection that leads on
    :param inspect: makes what reads a connection; what another line's gate has read of it, it knows already
    :param accept: takes what may go on
    :param late: takes what comes after :meth:`release`, when nobody looks at it here any more
    :param cache: answers requests for static files, where the inspectors stop at them
    :param full: gets whether as many wait as may: then no more should be admitted
    """

    def __init__(
        self,
        io_loop: IOLoop,
        inspect: Callable[[socket.socket], Inspector],
        accept: Accept,
        late: Callable[[socket.socket, tuple[str, int]], None],
        full: Callable[[bool], object] = lambda full: None,
        cache: SiteCache | None = None,
    ) -> None:
        self._io_loop = io_loop
        self._inspect = inspect
        self._accept = accept
        self._late = late
        self._full = full
        self._cache = cache
        self._crowded = False  # whether somebody looks for what may give way
        self._released = False
        self._waiting: dict[socket.socket, _Waiting] = {}
        self._lock = threading.RLock()  # a signal handler may close meanwhile

    def check(self, sock: socket.socket, origin: tuple[str, int]) -> None:
        """Lead a connection on, or refuse it, once it has said enough; returns at once."""
        sock.setblocking(False)
        waiting = None
        with self._lock:
            if not self._released:
                waiting = self._waiting[sock] = _Waiting(origin, self._inspect(sock))
            if len(self._waiting) == _MOST_WAITING:
                self._full(True)
                if not self._crowded:
                    self._crowded = True
                    self._io_loop.post(self._give_way)
        if waiting:
            self._io_loop.post(functools.partial(self._read_head, sock, waiting))
        else:
            self._late(sock, origin)

    def _remove(self, sock: socket.socket) -> None:
        """Remove one that waits no longer; with the lock."""
        del self._waiting[sock]
        if len(self._waiting) == _MOST_WAITING - 1:
            self._full(False)

    def release(self) -> list[tuple[socket.socket, tuple[str, int], Inspector]]:
        """Let go of what still waits, for another line, with what was read of it."""
        with self._lock:
            self._released = True
            released, self._waiting = self._waiting, {}
            self._full(False)
        for sock, waiting in released.items():
            self._io_loop.post(functools.partial(self._watch, sock, waiting, 0))
        return [(sock, waiting.origin, waiting.inspector) for sock, waiting in released.items()]

    # On the loop's thread.

    def _read_head(self, sock: socket.socket, waiting: _Waiting) -> None:
        """Read what is there; wait for more where that is not enough."""
        reason, count, passed = "", 0, b""
        inspector = waiting.inspector
        with self._lock:  # what is let go of meanwhile is read by another
            if self._waiting.get(sock) is not waiting or waiting.looking:
                return
            if inspector.unsent:
                self._send(sock, waiting)
                return
            try:
                if inspector.held:  # that may be enough, where another line's gate has read it
                    passed = bytes(inspector.feed(b""))
                if not passed and not inspector.static:
                    count = sock.recv_into(self._io_loop.chunk)
                    passed = bytes(inspector.feed(self._io_loop.chunk[:count])) if count else b""
                # Answers have to come in the order of the requests.
                if passed or not self._cache:
                    passed += inspector.pass_static()
            except (BlockingIOError, InterruptedError):
                count = -1
            except RequestRefusedError as exc:
                reason = str(exc)
            except OSError as exc:
                log.debug("a local connection went away: %s", exc)
            if inspector.static and not reason:
                self._look_up(sock, waiting)
                return
            if not (passed or reason or not count):
                self._wait_for_more(sock, waiting)
                return
            self._remove(sock)
        self._watch(sock, waiting, 0)
        if passed:
            self._accept(sock, waiting.origin, Opened(inspector, passed))
        elif reason:
            log.warning("refused a local connection: %s", reason)
            turn_away(sock, reason)
        else:
            finish(sock)

    def _look_up(self, sock: socket.socket, waiting: _Waiting) -> None:
        """Ask the cache for what is asked for next."""
        request = waiting.inspector.static
        assert self._cache
        assert request
        self._watch(sock, waiting, 0)
        waiting.begun = waiting.looking = True

        def found(answer: list[memoryview] | None) -> None:
            with self._lock:
                if self._waiting.get(sock) is not waiting:
                    return
                waiting.looking = False
                if answer is not None:
                    waiting.inspector.drop_static()
                    waiting.inspector.unsent = answer
                    no_delay(sock)
                    self._send(sock, waiting)
                    return
                self._remove(sock)
            try:
                passed = waiting.inspector.pass_static()
            except RequestRefusedError as exc:
                log.warning("refused a local connection: %s", exc)
                turn_away(sock, str(exc))
            else:
                self._accept(sock, waiting.origin, Opened(waiting.inspector, passed))

        self._cache.look_up(request, found)

    def _send(self, sock: socket.socket, waiting: _Waiting) -> None:
        """Send what is left of an answer from here; with the lock."""
        unsent = waiting.inspector.unsent
        waiting.begun = True
        try:
            while unsent:
                count = sock.send(unsent[0])
                waiting.since = time.monotonic()
                unsent[0] = unsent[0][count:]
                if not unsent[0]:
                    del unsent[0]
        except (BlockingIOError, InterruptedError):
            if waiting.watched != selectors.EVENT_WRITE:
                self._watch(sock, waiting, selectors.EVENT_WRITE)
                self._watch_stall(sock, waiting)
            return
        except OSError as exc:
            log.debug("a local connection went away: %s", exc)
            self._remove(sock)
            self._watch(sock, waiting, 0)
            reset(sock)
            return
        self._watch(sock, waiting, 0)
        # It begins again, behind those that wait already; what was to end the former finds another one.
        del self._waiting[sock]
        self._waiting[sock] = fresh = _Waiting(waiting.origin, waiting.inspector)
        self._io_loop.post(functools.partial(self._read_head, sock, fresh))

    def _watch_stall(self, sock: socket.socket, waiting: _Waiting) -> None:
        with self._lock:
            if self._waiting.get(sock) is not waiting:
                return
            left = waiting.since + _STALLED - time.monotonic()
        if left <= 0:
            self._expire(sock, waiting)
        else:
            self._io_loop.later(left, lambda: self._watch_stall(sock, waiting))

    def _wait_for_more(self, sock: socket.socket, waiting: _Waiting) -> None:
        self._watch(sock, waiting, selectors.EVENT_READ)
        if not waiting.begun and waiting.inspector.held:
            waiting.begun = True
            self._io_loop.later(_PATIENCE, lambda: self._expire_head(sock, waiting))

    def _expire_head(self, sock: socket.socket, waiting: _Waiting) -> None:
        if waiting.watched == selectors.EVENT_READ:  # else it is complete
            self._expire(sock, waiting)

    def _watch(self, sock: socket.socket, waiting: _Waiting, wanted: int) -> None:
        """Look by the selector for what is wanted, 0 for nothing."""
        if waiting.watched != wanted:
            self._io_loop.watch(sock, waiting.watched, wanted, lambda _: self._read_head(sock, waiting))
            waiting.watched = wanted

    def _expire(self, sock: socket.socket, waiting: _Waiting) -> None:
        with self._lock:
            if self._waiting.get(sock) is not waiting:
                return
            self._remove(sock)
        self._watch(sock, waiting, 0)
        (reset if waiting.inspector.unsent else finish)(sock)

    def _give_way(self) -> None:
        """Close the oldest that has been idle for long, as long as others have to wait for a place."""
        with self._lock:
            self._crowded = len(self._waiting) >= _MOST_WAITING
            if not self._crowded:
                return
            idle = ((sock, each) for sock, each in self._waiting.items() if not each.begun)
            sock, oldest = next(idle, (None, None))
            # One that has begun has its own time, and ends by that.
            left = _PATIENCE if oldest is None else oldest.since + _IDLE - time.monotonic()
        if sock and oldest and left <= 0:
            self._expire(sock, oldest)
            left = 0.0
        self._io_loop.later(max(left, 0.01), self._give_way)


class _Waiting:
    """A connection that has yet to say enough."""

    __slots__ = ("begun", "inspector", "looking", "origin", "since", "watched")

    def __init__(self, origin: tuple[str, int], inspector: Inspector) -> None:
        self.origin = origin
        self.inspector = inspector
        self.since = time.monotonic()
        self.begun = False
        self.looking = False  # whether the cache is asked
        self.watched = 0
