"""Calls a function for one thing after the other, on a thread of its own: whoever has one does not wait.

The function may take as long as it likes: it is a handler of the program's, or writes to a pipe whose other
end may have stopped reading. It may use what hands the things in, which waits for it with a deadline at most.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, TypeVar

from bokeh_ssh._core.threads import Thread
from bokeh_ssh._core.waiting import wait_for

log = logging.getLogger("bokeh_ssh")

_T = TypeVar("_T")

#: Things that wait; beyond that the oldest go.
_MOST = 10_000
#: Characters and bytes of what waits.
_MOST_SIZE = 32 << 20
#: Seconds after which a handler that waits for others is taken to do so for long.
_PARKED = 0.2


def _is_anything(_: object) -> bool:
    return True


def _size(thing: object) -> int:
    """Count the characters and bytes in a thing, as far as there may be many."""
    if isinstance(thing, (str, bytes)):
        return len(thing)
    if isinstance(thing, dict):
        return sum(map(_size, thing.values()))
    if isinstance(thing, (tuple, list)):
        return sum(map(_size, thing))
    if dataclasses.is_dataclass(thing):
        return sum(map(_size, vars(thing).values())) if hasattr(thing, "__dict__") else 0
    return 0


class _Here(threading.local):
    dispatcher: Dispatcher[Any] | None = None


_here = _Here()


class Dispatcher(Generic[_T]):
    """A thread that calls ``handle`` for each thing that is put, in order, one at a time.

    The thread begins with the first thing, and ends after :meth:`finish` once nothing waits. What is put
    later is handled all the same, by another one.

    :ivar stays: whether the thread stays when nothing waits; until :meth:`finish`, and if set, from then on

    :param handle: takes a thing; what it raises is logged
    :param name: the thread's name
    :param what: what ``handle`` is, for the log
    :param spare: each tells what may go where more waits than ``most``, or more than 32 MiB of text: the
        oldest for which the first one says so, or else the next
    """

    def __init__(
        self,
        handle: Callable[[_T], object],
        name: str,
        what: str,
        *,
        spare: Sequence[Callable[[_T], bool]] = (_is_anything,),
        most: int = _MOST,
    ) -> None:
        self._handle = handle
        self._name = name
        self._what = what
        self._spare = spare
        self._most = most
        self._change = threading.Condition()
        self._waiting: deque[tuple[_T, int]] = deque()  # with its size
        self._size = 0  # of all of them
        self._put = 0
        self._done = 0
        self._dropped = 0
        self.stays = True
        self._thread: Thread | None = None
        self._parked: list[Callable[[], bool]] = []

    @property
    def is_here(self) -> bool:
        """Whether this is its thread: the caller is the handler, or what that calls."""
        return _here.dispatcher is self

    def put(self, thing: _T) -> None:
        """Queue a thing to be handled; never blocks, from any thread."""
        with self._change:
            size = _size(thing)
            while len(self._waiting) >= self._most or (self._waiting and self._size + size > _MOST_SIZE):
                if not self._drop():
                    break
            self._waiting.append((thing, size))
            self._size += size
            self._put += 1
            self._change.notify_all()
            if self._thread is not None:
                return
            self._thread = Thread(self._run, name=self._name)
            try:
                self._thread.start()
                return
            except RuntimeError:  # Python is ending, and starts none any more
                self._thread = None
                self._done += len(self._waiting)
                late = [each for each, _ in self._waiting]
                self._waiting.clear()
                self._size = 0
        for each in late:
            self._call(each)

    def finish(self) -> None:
        """Let the thread end once nothing waits; does not wait for that."""
        with self._change:
            self.stays = False
            self._change.notify_all()

    def drain(self, timeout: float) -> bool:
        """Wait until all that was put so far is handled, and after :meth:`finish` for the thread to end.

        Does not wait on its own thread, nor while the handler waits in turn, see :func:`parked`; nor in a
        signal handler that has interrupted the thread's start.

        :param timeout: seconds
        :returns: whether all of it is handled
        """
        if self.is_here:
            return False
        deadline = time.monotonic() + timeout
        with self._change:
            thread, last = self._thread, self._put
            if thread and thread.is_starting_here:
                return False
            while self._done < last and wait_for(
                self._change, lambda: self._done >= last or self._is_parked(), deadline - time.monotonic()
            ):
                left = min(_PARKED, deadline - time.monotonic())
                if not wait_for(self._change, lambda: self._done >= last or not self._is_parked(), left):
                    break
            done = self._done >= last
            over = not (self.stays or self._waiting)
        if thread and done and over:
            thread.join(deadline - time.monotonic())
        return done

    def _is_parked(self) -> bool:
        return any(not until() for until in self._parked)

    def _drop(self) -> bool:
        for is_spare in self._spare:
            for index, (thing, size) in enumerate(self._waiting):
                if is_spare(thing):
                    del self._waiting[index]
                    self._size -= size
                    self._done += 1
                    self._dropped += 1
                    return True
        return False

    def _run(self) -> None:
        _here.dispatcher = self
        while True:
            with self._change:
                while not self._waiting:
                    if not self.stays:
                        self._thread = None
                        return
                    self._change.wait()
                thing, size = self._waiting.popleft()
                self._size -= size
                dropped, self._dropped = self._dropped, 0
            if dropped:
                log.warning("%s is too slow: it has missed %d", self._what, dropped)
            self._call(thing)
            with self._change:
                self._done += 1
                self._change.notify_all()

    def _call(self, thing: _T) -> None:
        try:
            self._handle(thing)
        except BaseException:  # whatever it is, it is the handler's, and the next thing waits
            log.exception("%s failed", self._what)


@contextlib.contextmanager
def parked(until: Callable[[], bool]) -> Iterator[None]:
    """Let nobody wait for the handler that runs on this thread, if one does, while the context lasts.

    For methods that a handler may call and that wait for what others do.

    :param until: tells that the wait is over, though the handler has not noticed yet
    """
    mine = _here.dispatcher
    if mine is None:
        yield
        return
    with mine._change:
        mine._parked.append(until)
        mine._change.notify_all()
    try:
        yield
    finally:
        with mine._change:
            mine._parked.remove(until)
            mine._change.notify_all()
