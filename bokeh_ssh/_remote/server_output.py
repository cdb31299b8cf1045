"""What a server writes: read at once, by lines, the last of which are kept."""

from __future__ import annotations

import collections
import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

CHUNK = 1 << 16  # bytes read at once, and the longest line before it is cut
LINES = 1000  # lines kept of the log
TAIL = 1 << 18  # characters kept of the log, which is what one who comes later is told; 1 MiB at most


class ServerOutput:
    """The streams that a server, and what runs beside it, write to; and its log.

    :param on_lines: is called with the name of a stream and the lines that have come
    :ivar streams: by descriptor: name and unfinished line
    """

    def __init__(self, on_lines: Callable[[str, list[str]], object]) -> None:
        self.streams: dict[int, tuple[str, bytes]] = {}
        self.log: collections.deque[str] = collections.deque()
        self._kept = 0  # characters of it, with line ends
        self._on_lines = on_lines

    def add(self, **streams: int) -> None:
        """Read these too: descriptors by name."""
        self.streams.update((fd, (name, b"")) for name, fd in streams.items())

    def drain(self, fd: int) -> bool:
        """Read what a stream has; return whether there may be more."""
        try:
            data = os.read(fd, CHUNK)
        except BlockingIOError:
            return False
        name, rest = self.streams[fd]
        *lines, rest = (rest + data).split(b"\n")
        if rest and (not data or len(rest) > CHUNK):
            lines.append(rest)
            rest = b""
        self.streams[fd] = (name, rest)
        if not data:
            del self.streams[fd]
            os.close(fd)
        if lines:
            self._on_lines(name, [line.rstrip(b"\r").decode("utf-8", "replace") for line in lines])
        return bool(data)

    def drain_all(self) -> None:
        """Read what the server wrote before it ended; a grandchild that writes on does not hold us."""
        for fd in list(self.streams):
            for _ in range(64):
                if not self.drain(fd):
                    break

    def keep(self, lines: list[str]) -> None:
        """Keep the last lines, and no more than is ever told of them."""
        last = lines[-LINES:]
        self.log.extend(last)
        self._kept += sum(len(line) + 1 for line in last)
        while len(self.log) > LINES or self._kept > TAIL:
            self._kept -= len(self.log.popleft()) + 1

    def tail(self, most: int = TAIL) -> list[str]:
        """Return the last lines of the log, with no more than ``most`` characters."""
        lines: list[str] = []
        for line in reversed(self.log):
            most -= len(line) + 1
            if most < 0:
                break
            lines.append(line)
        return lines[::-1]
