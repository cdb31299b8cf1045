"""Threads and flags that a signal handler may use, wherever it has interrupted the program.

Python runs a handler between any two instructions of the main thread, which may hold a lock by then. Those of
:class:`threading.Event` and of a thread's start and end are held for a few instructions only; a handler that
closes a tunnel, and so waits for another thread that needs the same lock, waits for itself.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable

#: Seconds for the last steps of a thread that has done its work.
_LAST_STEPS = 0.1


class Flag:
    """A :class:`threading.Event` that is set once, without a lock of its own."""

    def __init__(self) -> None:
        self._is_set = False
        self._unset = threading.Lock()
        self._unset.acquire()

    def is_set(self) -> bool:
        return self._is_set

    def set(self) -> None:
        """Set it, and wake whoever waits."""
        self._is_set = True
        with contextlib.suppress(RuntimeError):  # it was set already
            self._unset.release()

    def wait(self, timeout: float) -> bool:
        """Wait until it is set; False if that takes more than ``timeout`` seconds."""
        if not self._is_set and self._unset.acquire(timeout=max(0.0, timeout)):
            self.set()  # for whoever else waits
        return self._is_set


class Thread(threading.Thread):
    """A daemon thread whose end can be waited for from anywhere.

    :param work: what runs on it
    :param args: for ``work``
    :param name: the thread's name
    """

    def __init__(self, work: Callable[..., object], *args: object, name: str) -> None:
        super().__init__(target=work, args=args, name=name, daemon=True)
        self._worked = Flag()
        self._starter = 0

    def start(self) -> None:
        """Start it.

        :raises RuntimeError: if the system has no thread left, or Python is ending
        """
        self._starter = threading.get_ident()
        try:
            super().start()
        finally:
            self._starter = 0

    def run(self) -> None:
        try:
            super().run()
        finally:
            self._worked.set()

    @property
    def is_starting_here(self) -> bool:
        """Whether the caller has interrupted its start: it does nothing until the caller returns."""
        return self._starter == threading.get_ident()

    def join(self, timeout: float | None = None) -> None:
        """Wait until its work is done, up to ``timeout`` seconds; not on itself, nor if it is not running."""
        if self.is_starting_here or not self.is_alive() or self is threading.current_thread():
            return
        deadline = time.monotonic() + (threading.TIMEOUT_MAX if timeout is None else timeout)
        if self._worked.wait(deadline - time.monotonic()):
            super().join(min(_LAST_STEPS, max(0.0, deadline - time.monotonic())))
