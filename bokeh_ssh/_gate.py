"""Looks once at the beginning of each local connection before it is led on; ``_guard`` judges what it says.

What is looked at stays in the kernel (``MSG_PEEK``), so a connection that passes is forwarded as if nobody
had looked, and none needs a thread: the pump's selector waits for all of them.
"""

from __future__ import annotations

import logging
import selectors
import socket
import threading
import time
from collections.abc import Callable

from bokeh_ssh._guard import MOST, Guard, refusal
from bokeh_ssh._pipe import finish, reset
from bokeh_ssh._pump import Pump

log = logging.getLogger("bokeh_ssh.forward")

Accept = Callable[[socket.socket, "tuple[str, int]"], None]

#: Connections that may wait to say something: browsers open some ahead of need, and leave them idle.
_MOST_WAITING = 256
#: Seconds for the rest of a head that has begun, and until it is looked at again.
_PATIENCE = 10.0
_PAUSE = 0.01


class Gate:
    """Stands before one line.

    :param pump: of the connection that leads on
    :param guard: decides
    :param accept: takes what passes
    """

    def __init__(self, pump: Pump, guard: Guard, accept: Accept) -> None:
        self._pump = pump
        self._guard = guard
        self._accept = accept
        self._waiting: dict[socket.socket, tuple[str, int]] = {}
        self._lock = threading.Lock()

    def admit(self, sock: socket.socket, origin: tuple[str, int]) -> None:
        """Lead a connection on, or refuse it, once it has said enough; returns at once."""
        sock.setblocking(False)
        oldest = None
        with self._lock:
            self._waiting[sock] = origin
            if len(self._waiting) > _MOST_WAITING:
                oldest = next(iter(self._waiting))
                del self._waiting[oldest]
        if oldest:
            self._pump.post(lambda: self._drop(oldest))
        self._pump.post(lambda: self._look(sock, 0.0))

    def release(self) -> list[tuple[socket.socket, tuple[str, int]]]:
        """Let go of what still waits, for another line."""
        with self._lock:
            waiting, self._waiting = list(self._waiting.items()), {}
        return waiting

    # On the pump thread.

    def _look(self, sock: socket.socket, began: float) -> None:
        if sock not in self._waiting:
            return
        try:
            head = sock.recv(MOST, socket.MSG_PEEK)
        except (BlockingIOError, InterruptedError):
            self._pump.watch(sock, 0, selectors.EVENT_READ, lambda _: self._heard(sock))
            return
        except OSError as exc:
            log.debug("a local connection went away: %s", exc)
            head = b""
        verdict, reason = self._guard.judge(head) if head else ("refuse", "")
        now = time.monotonic()
        if verdict == "more" and now - (began or now) < _PATIENCE:
            self._pump.later(_PAUSE, lambda: self._look(sock, began or now))
            return
        origin = self._take(sock)
        if origin is None:
            return
        if verdict == "pass":
            self._accept(sock, origin)
        elif head and verdict == "refuse":
            log.warning("refused a local connection: %s", reason)
            _refuse(sock, reason)
        else:
            finish(sock)

    def _heard(self, sock: socket.socket) -> None:
        self._pump.watch(sock, selectors.EVENT_READ, 0, lambda _: None)
        self._look(sock, 0.0)

    def _drop(self, sock: socket.socket) -> None:
        try:
            self._pump.watch(sock, selectors.EVENT_READ, 0, lambda _: None)
        except (KeyError, ValueError):  # it was not waited for
            pass
        reset(sock)

    def _take(self, sock: socket.socket) -> tuple[str, int] | None:
        with self._lock:
            return self._waiting.pop(sock, None)


def _refuse(sock: socket.socket, reason: str) -> None:
    """Answer, in such a way that the answer arrives: a close over unread bytes would reset the connection."""
    try:
        sock.recv(MOST)
        sock.send(refusal(reason))
        sock.shutdown(socket.SHUT_WR)
        sock.recv(MOST)
    except OSError:  # it has gone, or has no more to say
        pass
    finish(sock)
