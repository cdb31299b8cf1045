"""Waits that let Ctrl-C through.

Nothing interrupts a wait for a lock on Windows; elsewhere a signal that comes in the moment before the wait
begins is not noticed by it. So waits of any length are cut into slices.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

#: Seconds; Ctrl-C is heard within one.
SLICE = 0.5


def wait(event: threading.Event, timeout: float) -> bool:
    """Wait until the event is set; False if that takes more than ``timeout`` seconds."""
    deadline = time.monotonic() + timeout
    while not event.wait(max(0.0, min(SLICE, deadline - time.monotonic()))):
        if time.monotonic() >= deadline:
            return False
    return True


def wait_for(condition: threading.Condition, met: Callable[[], object], timeout: float) -> bool:
    """Wait, holding ``condition``, until ``met``; False if that takes more than ``timeout`` seconds."""
    deadline = time.monotonic() + timeout
    while not met():
        left = deadline - time.monotonic()
        if left <= 0:
            return False
        condition.wait(min(SLICE, left))
    return True
