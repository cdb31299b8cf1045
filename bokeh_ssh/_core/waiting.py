"""Waits that let Ctrl-C through, and end when nobody wants any more what is waited for.

Nothing interrupts a wait for a lock on Windows; elsewhere a signal that comes in the moment before the wait
begins is not noticed by it. So waits of any length are cut into slices, and between two slices the thread
looks whether it should go on at all: see :func:`wanted`.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from bokeh_ssh._core.threads import Flag

_T = TypeVar("_T")

#: Seconds; Ctrl-C, and a close from another thread, are heard within one.
SLICE = 0.5


class _Here(threading.local):
    check: Callable[[], None] | None = None


_here = _Here()


@contextlib.contextmanager
def wanted(check: Callable[[], None] | None) -> Iterator[None]:
    """Let every wait of this thread call ``check`` between its slices, while the context lasts.

    :param check: raises to end the wait; None looks at nothing
    """
    before, _here.check = _here.check, check
    try:
        yield
    finally:
        _here.check = before


def heed() -> None:
    """Raise what :func:`wanted` says, if this thread's work is no longer wanted; cleaning up always is."""
    if _here.check and not sys.exc_info()[0]:
        _here.check()


def wait(event: threading.Event | Flag, timeout: float) -> bool:
    """Wait until the event is set; False if that takes more than ``timeout`` seconds."""
    deadline = time.monotonic() + timeout
    while not event.wait(max(0.0, min(SLICE, deadline - time.monotonic()))):
        heed()
        if time.monotonic() >= deadline:
            return False
    return True


def in_time(work: Callable[[], _T], timeout: float, name: str) -> _T:
    """Do what nothing can interrupt on a thread of that name, which is left behind where it takes too long.

    :raises TimeoutError: if that takes more than ``timeout`` seconds
    """
    done = threading.Event()
    results: list[_T] = []
    errors: list[Exception] = []

    def run() -> None:
        try:
            results.append(work())
        except Exception as exc:  # noqa: BLE001  # whatever it is, it is raised where it is waited for
            errors.append(exc)
        finally:
            done.set()

    threading.Thread(target=run, name=name, daemon=True).start()
    if not wait(done, timeout):
        raise TimeoutError
    if errors:
        raise errors[0]
    return results[0]


def wait_for(condition: threading.Condition, met: Callable[[], object], timeout: float) -> bool:
    """Wait, holding ``condition``, until ``met``; False if that takes more than ``timeout`` seconds."""
    deadline = time.monotonic() + timeout
    while not met():
        heed()
        left = deadline - time.monotonic()
        if left <= 0:
            return False
        condition.wait(min(SLICE, left))
    return True


def clocks() -> tuple[float, float]:
    """Read both clocks: one stands still while the machine sleeps; which one, depends on the system."""
    return time.monotonic(), time.time()
