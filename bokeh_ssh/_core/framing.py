"""What a program on the other machine says: our messages in a stream, and lines made fit to be shown."""

from __future__ import annotations

import json
import re
from collections import deque
from typing import Any

from bokeh_ssh._core.text import clean

_LONGEST = 4 << 20  # bytes of one message; what is longer is not ours
_SHOWN = 8000  # characters kept of a line
_NOISE = 1 << 14  # bytes after which noise without a line end is cut
_SHORT = 1000  # bytes kept of a line of noise

# What colours a terminal, sets its title, or moves about on it (ECMA-48: CSI and OSC sequences).
_ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?)")
_SESSION_ID = re.compile(r"(?<=session-id)=[^\s&'\"]+")


def plain(line: str) -> str:
    """Make a line of a remote program fit to be shown: no escape sequences, control characters, session ids.

    >>> plain("404 GET /favicon.ico?bokeh-session-id=Xy3.z-_ (0.0.0.0)")
    '404 GET /favicon.ico?bokeh-session-id=… (0.0.0.0)'
    """
    if "session-id=" in line:  # whoever has one gets into the session; tornado logs whole addresses
        line = _SESSION_ID.sub("=…", line)
    if line.isascii() and line.isprintable():  # nearly all are, and they are many
        return line[:_SHOWN].rstrip()
    return clean(_ESCAPES.sub("", line).rstrip(), _SHOWN, lines=True)


class Tail:
    """The last lines of a stream of bytes."""

    def __init__(self, limit: int = 200) -> None:
        self._lines: deque[str] = deque(maxlen=limit)
        self._rest = b""

    def feed(self, data: bytes) -> None:
        """Take some more bytes."""
        most = self._lines.maxlen or 0
        *lines, rest = (self._rest + data).rsplit(b"\n", most + 1)  # of a flood, only the end is looked at
        if len(rest) > _NOISE:
            lines.append(rest)
            rest = b""
        self._rest = rest
        self._lines.extend(plain(line[-_SHORT:].decode("utf-8", "replace")) for line in lines[-most:])

    @property
    def lines(self) -> tuple[str, ...]:
        """What is kept, without empty lines."""
        rest = plain(self._rest[-_SHORT:].decode("utf-8", "replace"))
        return tuple(line for line in (*self._lines, rest) if line.strip())


class Reader:
    """Finds our messages in a stream where start files may have written anything.

    A message is the mark, then JSON, then a line end; ``hello`` is the one without JSON, since a shell
    wrote it. A line with the mark that does not parse is noise like any other.

    :ivar noise: the last of what was not ours
    """

    def __init__(self, mark: str) -> None:
        self._mark = mark.encode("ascii")
        self._rest = bytearray()  # a line that has no end yet
        self._marked = False  # the mark is in it
        self.noise = Tail()

    def feed(self, data: bytes) -> list[dict[str, Any]]:
        """Take some more bytes; return the messages that are whole now."""
        whole, end, rest = data.rpartition(b"\n")
        if end:
            whole = bytes(self._rest) + whole
            self._rest.clear()
            self._marked = False
        messages = []
        if whole and self._mark not in whole:
            self.noise.feed(whole + b"\n")
            whole = b""
        for line in whole.split(b"\n") if whole else ():
            noise, mark, text = line.partition(self._mark)
            message = _parse(text) if mark else None
            if message is None:
                self.noise.feed(line + b"\n")
                continue
            if noise:
                self.noise.feed(noise + b"\n")
            messages.append(message)
        self._keep(rest)
        return messages

    def last_words(self, errors: Tail) -> str:
        """Return the last lines that were not ours, here and in the stream of errors, for a message."""
        return " / ".join((*self.noise.lines, *errors.lines)[-3:])

    def _keep(self, more: bytes) -> None:
        """Add to the line that has no end yet; each byte is looked at once, however few come at a time."""
        rest = self._rest
        start = max(0, len(rest) - len(self._mark) + 1)
        rest += more
        self._marked = self._marked or rest.find(self._mark, start) >= 0
        if len(rest) <= (_LONGEST if self._marked else _NOISE):
            return
        keep = 0 if self._marked else len(self._mark)
        self.noise.feed(bytes(rest[: len(rest) - keep]))
        del rest[: len(rest) - keep]
        self._marked = False


def _parse(text: bytes) -> dict[str, Any] | None:
    if text.strip() == b"hello":
        return {"event": "hello"}
    try:
        message = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return message if isinstance(message, dict) and isinstance(message.get("event"), str) else None
