"""Lines that wait to be shown, so that a terminal or a pipe that takes none holds nobody up."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Sequence

_MOST = 2000  # lines that wait; of more, the last ones
_MOST_SIZE = 1 << 22  # characters of them
_TOGETHER = 100  # lines that are shown at once


class OutputQueue:
    """Hands lines on, on a thread of its own, in order; where they come too fast, the oldest are left out.

    :param show: gets some lines; may block for as long as it likes
    """

    def __init__(self, show: Callable[[Sequence[str]], object]) -> None:
        self._show = show
        self._lines: deque[str] = deque()
        self._size = 0
        self._lost = 0
        self._closed = False
        self._change = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="bokeh-ssh backlog", daemon=True)

    def put(self, lines: Sequence[str]) -> None:
        """Add lines; never blocks, from any thread."""
        with self._change:
            self._lines.extend(lines)
            self._size += sum(map(len, lines))
            while len(self._lines) > _MOST or self._size > _MOST_SIZE:
                self._size -= len(self._lines.popleft())
                self._lost += 1
            self._change.notify_all()

    def start(self) -> None:
        """Begin to hand on what waits, and what comes."""
        self._thread.start()

    def close(self, timeout: float | None = 1.0) -> None:
        """Hand on what waits, and end; idempotent.

        :param timeout: seconds for that; None for as long as it takes
        """
        with self._change:
            self._closed = True
            self._change.notify_all()
        if self._thread.is_alive():
            self._thread.join(timeout)

    def _run(self) -> None:
        with contextlib.suppress(OSError, ValueError):  # nobody reads any more
            while lines := self._take():
                self._show(lines)

    def _take(self) -> list[str]:
        with self._change:
            while not self._lines and not self._closed:
                self._change.wait()
            lost, self._lost = self._lost, 0
            lines = [self._lines.popleft() for _ in range(min(_TOGETHER, len(self._lines)))]
            self._size -= sum(map(len, lines))
        return [f"[{lost} lines were left out here]", *lines] if lost else lines
