"""Reads the beginning of each local connection before it is led on; ``_inspector`` tells whether it may be.

None of them needs a thread: the pump's selector waits for all of them.
"""

from __future__ import annotations

import functools
import logging
import selectors
import socket
import threading
from collections.abc import Callable

from bokeh_ssh._guardedpipe import turn_away
from bokeh_ssh._inspector import Inspector, Opened, RequestRefusedError
from bokeh_ssh._pipe import finish, reset
from bokeh_ssh._pump import Pump

log = logging.getLogger("bokeh_ssh.forward")

Accept = Callable[[socket.socket, "tuple[str, int]", Opened], None]

#: Connections that may wait to say something: browsers open some ahead of need, and leave them idle.
_MOST_WAITING = 256
#: Seconds for the rest of a head that has begun.
_PATIENCE = 10.0


class Gate:
    """Stands before one line.

    :param pump: of the connection that leads on
    :param inspect: makes what reads a connection; what another line's gate has read of it, it knows already
    :param accept: takes what may go on
    :param late: takes what comes after :meth:`release`, when nobody looks at it here any more
    """

    def __init__(
        self,
        pump: Pump,
        inspect: Callable[[socket.socket], Inspector],
        accept: Accept,
        late: Callable[[socket.socket, tuple[str, int]], None],
    ) -> None:
        self._pump = pump
        self._inspect = inspect
        self._accept = accept
        self._late = late
        self._released = False
        self._waiting: dict[socket.socket, _Waiting] = {}
        self._lock = threading.Lock()

    def admit(self, sock: socket.socket, origin: tuple[str, int]) -> None:
        """Lead a connection on, or refuse it, once it has said enough; returns at once."""
        sock.setblocking(False)
        oldest = waiting = None
        with self._lock:
            if not self._released:
                waiting = self._waiting[sock] = _Waiting(origin, self._inspect(sock))
            if len(self._waiting) > _MOST_WAITING:
                first = next(iter(self._waiting))
                oldest = first, self._waiting.pop(first)
        if oldest:
            self._pump.post(functools.partial(self._drop, *oldest))
        if waiting:
            self._pump.post(functools.partial(self._look, sock, waiting))
        else:
            self._late(sock, origin)

    def release(self) -> list[tuple[socket.socket, tuple[str, int], Inspector]]:
        """Let go of what still waits, for another line, with what was read of it."""
        with self._lock:
            self._released = True
            released, self._waiting = self._waiting, {}
        for sock, waiting in released.items():
            self._pump.post(functools.partial(self._unwatch, sock, waiting))
        return [(sock, waiting.origin, waiting.inspector) for sock, waiting in released.items()]

    # On the pump thread.

    def _look(self, sock: socket.socket, waiting: _Waiting) -> None:
        """Read what is there; wait for more where that is not enough."""
        reason, count, passed = "", 0, b""
        with self._lock:  # what is let go of meanwhile is read by another
            if self._waiting.get(sock) is not waiting:
                return
            try:
                if waiting.inspector.held:  # that may be enough, where another line's gate has read it
                    passed = bytes(waiting.inspector.feed(b""))
                if not passed:
                    count = sock.recv_into(self._pump.chunk)
                    passed = bytes(waiting.inspector.feed(self._pump.chunk[:count])) if count else b""
            except (BlockingIOError, InterruptedError):
                count = -1
            except RequestRefusedError as exc:
                reason = str(exc)
            except OSError as exc:
                log.debug("a local connection went away: %s", exc)
            over = bool(passed or reason or not count)
            if not over:
                self._wait(sock, waiting)
                return
            del self._waiting[sock]
        self._unwatch(sock, waiting)
        if passed:
            self._accept(sock, waiting.origin, Opened(waiting.inspector, passed))
        elif reason:
            log.warning("refused a local connection: %s", reason)
            turn_away(sock, reason)
        else:
            finish(sock)

    def _wait(self, sock: socket.socket, waiting: _Waiting) -> None:
        if not waiting.watched:
            waiting.watched = True
            self._pump.watch(sock, 0, selectors.EVENT_READ, lambda _: self._look(sock, waiting))
        if waiting.inspector.held and not waiting.begun:
            waiting.begun = True
            self._pump.later(_PATIENCE, lambda: self._expire(sock, waiting))

    def _unwatch(self, sock: socket.socket, waiting: _Waiting) -> None:
        if waiting.watched:
            waiting.watched = False
            self._pump.watch(sock, selectors.EVENT_READ, 0, lambda _: None)

    def _expire(self, sock: socket.socket, waiting: _Waiting) -> None:
        with self._lock:
            if self._waiting.get(sock) is not waiting:
                return
            del self._waiting[sock]
        self._unwatch(sock, waiting)
        finish(sock)

    def _drop(self, sock: socket.socket, waiting: _Waiting) -> None:
        self._unwatch(sock, waiting)
        reset(sock)


class _Waiting:
    """A connection that has yet to say enough."""

    __slots__ = ("begun", "inspector", "origin", "watched")

    def __init__(self, origin: tuple[str, int], inspector: Inspector) -> None:
        self.origin = origin
        self.inspector = inspector
        self.begun = False
        self.watched = False
