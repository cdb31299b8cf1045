"""When a connection that was lost is tried again: after a pause that grows, or at once for a reason.

A reason is a local connection that begins to wait for it, one whose time is about to run out, and a change of
this machine's network. Early attempts are bounded, so that a program that connects all the time does not have
the server bothered all the time (OpenSSH's MaxStartups and PerSourcePenalties).
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable

#: Seconds until the second attempt after a loss, and the most that two attempts are apart. The first is made
#: at once, give or take: many clients may have lost the same server.
_FIRST_PAUSE = 1.0
_LONGEST_PAUSE = 30.0
#: The most where the server ends what nobody uses, and whoever comes is waited for.
_LONGEST_UNUSED = 3600.0
#: Early attempts that may follow each other, seconds until one more may, and between two attempts.
_EARLY = 5
_EARLY_EVERY = 10.0
_GAP = 1.0
#: Seconds in which changes of the network belong together: an interface comes up in several steps.
_BURST = 10.0


class Attempts:
    """The attempts to make one connection again, and who waits for them; from any thread.

    :ivar listeners: of those who hold connections meanwhile and ask for early attempts; called, without
        arguments, whenever :meth:`may_serve` may say something else
    :ivar over: whether there will be no attempt any more
    """

    def __init__(self) -> None:
        self.listeners: list[Callable[[], None]] = []
        self._change = threading.Condition()
        self._active = False
        self._wanted = False
        self.over = False
        self._began = 0.0  # when the last one began, and ended
        self._ended = 0.0
        self._under_way = False
        self._allowed = float(_EARLY)
        self._counted = 0.0
        self._changed = self._last_change = float("-inf")  # when the network did: first of a burst, and last

    def begin(self) -> None:
        """Note that the connection was lost, and will be tried again."""
        with self._change:
            self._active, self.over, self._wanted, self._under_way = True, False, False, False
            self._began = self._ended = 0.0
            self._allowed, self._counted = float(_EARLY), time.monotonic()
        self._notify()

    def want(self) -> None:
        """Ask for an attempt as soon as there may be one; never blocks."""
        with self._change:
            self._wanted = True
            self._change.notify_all()

    def note_change(self) -> None:
        """Note that this machine's network has changed, and ask for an attempt; never blocks."""
        now = time.monotonic()
        with self._change:
            if now - self._last_change > _BURST:
                self._changed = now
            self._last_change = now
        self.want()

    @property
    def stale(self) -> bool:
        """Whether the network has changed since the attempt under way began: it may wait for nothing."""
        return self._under_way and self._began < self._changed

    def stop(self) -> None:
        """Make no more: it is closed, or has failed."""
        with self._change:
            self._active, self.over, self._under_way = False, True, False
            self._change.notify_all()
        self._notify()

    def succeed(self) -> None:
        """Note that the connection stands."""
        with self._change:
            self._active = self.over = self._under_way = False
        self._notify()

    def fail(self) -> None:
        """Note that the attempt under way has failed, and another will follow."""
        with self._change:
            self._under_way = False
            self._ended = time.monotonic()
        self._notify()

    def wait(self, pause: float, on_early: Callable[[], None]) -> bool:
        """Wait until the next attempt is due, which is then under way; False if there will be none.

        :param pause: seconds, where nobody asks for an early one
        :param on_early: called when it begins before its time
        """
        due = time.monotonic() + pause
        early = False
        with self._change:
            while self._active:
                now = time.monotonic()
                when = min(due, self._earliest(now)) if self._wanted else due
                if now >= when:
                    early = now < due
                    break
                self._change.wait(when - now)
            if not self._active:
                return False
            if early:
                self._allowed -= 1
            self._wanted = False
            self._under_way = True
            self._began = time.monotonic()
        if early:
            on_early()
        return True

    def may_serve(self, since: float) -> bool:
        """Return whether an attempt is under way or due that may serve a connection which has waited.

        One that began after that moment and failed has had its chance.

        :param since: a moment on the monotonic clock
        """
        with self._change:
            if self.over:
                return False
            return self._under_way or not self._active or self._began < since

    def _earliest(self, now: float) -> float:
        """Return when an early attempt may begin."""
        self._allowed = min(float(_EARLY), self._allowed + (now - self._counted) / _EARLY_EVERY)
        self._counted = now
        missing = max(0.0, 1.0 - self._allowed) * _EARLY_EVERY
        return max(self._ended + _GAP if self._ended else now, now + missing)

    def _notify(self) -> None:
        for call in list(self.listeners):
            call()


def pause_before(attempt: int, *, needed: bool = True) -> float:
    """Return the seconds before an attempt: none to speak of, then twice as long each time; with jitter.

    :param needed: whether it is to be made soon though nobody asks for an early one
    """
    if attempt == 1:
        return random.uniform(0, 0.2)  # noqa: S311  # jitter, not a secret
    most = _LONGEST_PAUSE if needed else _LONGEST_UNUSED
    longest = min(most, _FIRST_PAUSE * 2.0 ** min(attempt - 2, 20))
    return longest * random.uniform(0.75, 1.0)  # noqa: S311
