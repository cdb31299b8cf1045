"""A server's log lines: what is kept, an app's errors, why a start failed. Parsing only; all is bounded."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable

#: Lines kept of what a server, or what ran before it, wrote.
LINES = 2000
#: Characters kept of them together, and of what one app's error wrote.
_CHARACTERS = 1 << 20
_ERROR = 1 << 16

_RECORD = re.compile(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d+ ")
_FAILED = "Error running application handler"
#: In the first line of what is written of an app that was changed and cannot run (``dev``).
RELOAD = "after a change:"
#: What Bokeh with TLS says where it is started on a socket; it is then started on a port.
_MADE_AGAIN = "args are not supported with a unix socket"
_PORT = re.compile(r"https?://[\w.\[\]*-]{0,255}:(\d{1,5})(?!\d)")
_WINDOWS = re.compile(r"""CommandNotFoundException|["'«]\s?exec\s?["'»]|\bMicrosoft Windows\b|\bcmd\.exe\b""")


class Kept:
    """The last of many lines: no more than :data:`LINES`, and so many characters together."""

    def __init__(self, characters: int = _CHARACTERS) -> None:
        self._lines: deque[str] = deque()
        self._most = characters
        self._size = 0

    def extend(self, lines: Iterable[str]) -> None:
        """Add lines; the oldest make room."""
        for line in lines:
            self._lines.append(line)
            self._size += len(line)
            while len(self._lines) > LINES or (self._size > self._most and len(self._lines) > 1):
                self._size -= len(self._lines.popleft())

    @property
    def lines(self) -> tuple[str, ...]:
        """What is kept."""
        return tuple(self._lines)


class AppErrors:
    """Finds "Error running application handler" and its traceback in the server's log lines.

    The record has many lines and nothing marks its end: it ends before the next record, or where the server
    paused after a line that is not indented, since a record is written at once.
    """

    def __init__(self) -> None:
        self._open: list[str] | None = None
        self._size = 0  # characters of it
        self._traced = 0  # lines since its traceback began
        self._last = ""

    def feed(self, lines: Iterable[str]) -> list[str]:
        """Take the lines that came at once; give the errors that are whole now."""
        found = []
        for line in lines:
            if self._open is not None and _RECORD.match(line):
                found.append(self._close())
            if _FAILED in line:
                self._open, self._size, self._traced = [], 0, 0
            if self._open is None:
                continue
            if len(self._open) < LINES and self._size < _ERROR:
                self._open.append(line)
                self._size += len(line)
            if self._traced or "Traceback (most recent call last)" in line:
                self._traced += 1
            self._last = line
        if self._open is not None and self._traced > 1 and self._last[:2] != "  ":
            found.append(self._close())
        return found

    def _close(self) -> str:
        lines, self._open = self._open or [], None
        return "\n".join(lines).rstrip()


def reason(log: Iterable[str]) -> str:
    """Find the one line of a failed start that says why; empty where there is none."""
    lines = [line.strip() for line in log if line.strip() and _MADE_AGAIN not in line]
    for i, line in enumerate(lines):
        found = re.search(r"(Cannot start Bokeh server\b.*)", line) or re.search(r"^(?:ERROR: )+(.*)", line)
        if found:
            more = lines[i + 1 : i + 2] if found.group(1).endswith(":") else []
            return " ".join([found.group(1), *more]).rstrip(":")
    for line in reversed(lines):
        found = re.search(r"(?:^|\s)error: (.*)", line)
        if found:
            return found.group(1)
    return lines[-1] if lines else ""


def port_in_use(log: Iterable[str]) -> bool:
    """Return whether the server said that its port is taken."""
    return any(re.search(r"port \d+ is already in use", line, re.IGNORECASE) for line in log)


def port_told(log: Iterable[str]) -> int | None:
    """Find the port of the first address in what a server has written."""
    return next((int(found[1]) for found in map(_PORT.search, log) if found), None)


def is_windows(text: Iterable[str]) -> bool:
    """Return whether cmd.exe or PowerShell answered in place of a POSIX shell, in whatever language."""
    return any(_WINDOWS.search(line) for line in text)
