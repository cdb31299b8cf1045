"""Standard output and error of the command line, where they are closed or full, or nobody reads them.

What cannot be written to standard output is an error, reported once, with its exit status; what cannot be
written to standard error is lost. And where a pipe takes nothing, whoever writes waits; but not for long once
the program is to end.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import select
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from bokeh_ssh._core.events import ignore

#: Seconds for what is left to be said, once the program is to end.
_LAST_WORDS = 1.0
#: Bytes that a pipe takes at once which is said to take any (PIPE_BUF is 512 at least).
_PIECE = getattr(select, "PIPE_BUF", 512)
#: Seconds between two tries where the system is of two minds.
_PAUSE = 0.01


_current: Streams | None = None


class OutputError(Exception):
    """Standard output takes nothing any more; ``__cause__`` says why."""


class Streams:
    """The two, while the command line runs; made by :func:`standing`.

    :ivar fault: why standard output could not be written to; None where it could
    :ivar on_fault: called when that happens, by whoever wrote
    """

    def __init__(self) -> None:
        self.fault: OSError | None = None
        self.on_fault: Callable[[], object] = ignore
        self._ending = 0.0  # when the last words are over
        self.over = False  # nobody waits any more, neither for a reader nor for another thread
        self._wake_recv = self._wake_send = -1
        self._lock = threading.RLock()  # a signal handler may write while its thread does
        self._apart: dict[int, int] = {}  # see _open_apart

    def open(self) -> None:
        """Be ready to be woken at the end."""
        self._wake_recv, self._wake_send = os.pipe()
        os.set_blocking(self._wake_send, False)
        for descriptor in (1, 2):
            apart = _open_apart(descriptor)
            if apart is not None:
                self._apart[descriptor] = apart

    def end_soon(self) -> None:
        """Let nobody wait for a reader for long any more. Safe in a signal handler."""
        if not self._ending:
            self._ending = time.monotonic() + _LAST_WORDS
            with contextlib.suppress(OSError):
                os.write(self._wake_send, b"!")

    def check(self) -> None:
        """Refuse to go on where nobody can read what comes of it.

        :raises OutputError: if standard output could not be written to
        """
        with contextlib.suppress(ValueError):  # closed by somebody
            sys.stdout.flush()
        if self.fault:
            raise OutputError from self.fault

    def fail(self, fault: OSError) -> None:
        """Take note that standard output cannot be written to."""
        if self.fault is None:
            self.fault = fault
            self.on_fault()

    def wait(self, descriptor: int) -> bool:
        """Wait until something can be written; False if that is not worth waiting for any longer."""
        while True:
            left = None
            if self._ending:
                left = max(0.0, self._ending - time.monotonic())
            ears = [] if self._ending else [self._wake_recv]
            _, ready, _ = select.select(ears, [descriptor], [], left)
            if ready:
                return True
            if left == 0.0:
                return False

    def write(self, descriptor: int, data: memoryview) -> int:
        """Write some of it; 0 if nobody takes it."""
        while self.wait(descriptor):
            written = self._try(descriptor, data)
            if written:
                return written
            select.select([], [], [], _PAUSE)  # it says that it takes some, and does not
        return 0

    def mark(self, data: bytes) -> None:
        """Write a few bytes to standard error, unless that would have to wait. Safe in a signal handler."""
        with contextlib.suppress(OSError):
            if self._wake_recv < 0:  # no POSIX system
                os.write(2, data)
            else:
                self._try(2, memoryview(data))

    def _try(self, descriptor: int, data: memoryview) -> int:
        """Write some of it without waiting; 0 where it is not taken."""
        with self._lock:  # the two may lead to one pipe
            if not select.select([], [descriptor], [], 0)[1]:
                return 0
            try:
                return os.write(self._apart.get(descriptor, descriptor), data[:_PIECE])
            except BlockingIOError:
                return 0

    def write_at_once(self, descriptor: int, data: memoryview) -> None:
        """Write as much of it as is taken without waiting, for a reader or for another thread."""
        if self._lock.acquire(blocking=False):
            try:
                with contextlib.suppress(OSError):
                    while data and (written := self._try(descriptor, data)):
                        data = data[written:]
            finally:
                self._lock.release()

    def leave_terminal(self) -> None:
        """Write to no terminal any more that was opened here."""
        with self._lock:
            apart, self._apart = self._apart, {}
        for end in apart.values():
            os.close(end)

    def close(self) -> None:
        """Let go of what it has; what is written from here on waits for nobody. Idempotent."""
        self.over = True
        for end in (self._wake_recv, self._wake_send, *self._apart.values()):
            with contextlib.suppress(OSError):
                os.close(end)
        self._wake_recv = self._wake_send = -1
        self._apart.clear()


class _Raw(io.RawIOBase):
    """One of the two. What could not be written is forgotten: nobody may come back to it at the exit.

    Each write is whole, so no :class:`io.BufferedWriter` is needed: who waits for the lock of one sees no
    signal, and who has it may wait for a reader.

    :param on_fault: gets the reason; None where nobody is to hear of it
    :param fault: where it was closed from the beginning
    """

    def __init__(
        self, streams: Streams, descriptor: int, on_fault: Callable[[OSError], object], fault: OSError | None
    ) -> None:
        self._streams = streams
        self.name = "<stdout>" if descriptor == 1 else "<stderr>"
        self._descriptor = descriptor
        self._on_fault = on_fault
        self._fault = fault
        self._dead = False
        self._order = threading.RLock()  # a signal handler may write while its thread does

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return self._fault is None and os.isatty(self._descriptor)

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        count = len(view)
        if self._streams.over:  # who has the lock may be a thread that Python has halted at its end
            self._streams.write_at_once(self._descriptor, view)
            return count
        with self._order:
            while view and not self._dead and not self._streams.over:
                try:
                    if self._fault:
                        raise self._fault
                    written = self._streams.write(self._descriptor, view)
                except OSError as exc:
                    self._dead = True
                    self._on_fault(exc)
                else:
                    self._dead = not written
                    view = view[written:]
        return count


@contextlib.contextmanager
def standing() -> Iterator[Streams]:
    """Let the program write through this while the context lasts; the program ends after it.

    The streams stay in their place then: a thread that is left, with lines to show, would wait for a reader
    in Python's own, and at its end Python would wait for the thread, or for the reader.

    A descriptor of the three that is closed leads nowhere then: the next file that is opened would get its
    number, and what is said to a person would go there.
    """
    global _current
    closed = [number for number in range(3) if not _is_open(number)]
    for _ in closed:
        os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
    streams = _current = Streams()
    if os.name == "posix":
        streams.open()
        missing = OSError(errno.EBADF, os.strerror(errno.EBADF))
        if sys.stdout is sys.__stdout__:  # else somebody has put something in its place
            sys.stdout = _text(streams, 1, sys.stdout, streams.fail, missing if 1 in closed else None)
        if sys.stderr is sys.__stderr__:
            sys.stderr = _text(streams, 2, sys.stderr, ignore, None)
    try:
        yield streams
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError, AttributeError):
                stream.flush()
        streams.close()
        _current = None


def current() -> Streams:
    """Return those of the command line that runs; where none does, some that nothing is written through."""
    return _current or Streams()


def _open_apart(descriptor: int) -> int | None:
    """Open a terminal once more, so that writing there never waits.

    One that says that it takes something may take less than is written. And whoever shares the descriptor
    would share the flag for that.

    :returns: None for what is no terminal, or cannot be opened
    """
    try:
        return os.open(os.ttyname(descriptor), os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError:
        return None


def _is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


def _text(
    streams: Streams, descriptor: int, old: Any, on_fault: Callable[..., object], fault: OSError | None
) -> io.TextIOWrapper:
    raw = _Raw(streams, descriptor, on_fault, fault)
    return io.TextIOWrapper(
        raw,
        encoding=getattr(old, "encoding", None) or "utf-8",
        errors=getattr(old, "errors", None) or "backslashreplace",
        line_buffering=descriptor == 2 or raw.isatty(),
    )
