"""Follows what a server answers over one connection, as far as to see where each answer ends. Pure text.

Nothing of it is changed, and nothing is kept but what a request was said to be for (:class:`Due`). Where an
answer ends only with the connection, or is not understood, that is the last that is known of it.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable
from typing import Literal, NamedTuple, Protocol

from bokeh_ssh._forwarding.static_requests import StaticRequest

#: Bytes of an answer's head, or of a line between chunks.
_MOST = 64 * 1024
#: Bytes looked at together for the end of one.
_PIECE = 4096
#: What a TLS server begins with: a handshake, or an alert.
_TLS = (0x16, 0x15)
_STATUS = re.compile(rb"HTTP/1\.[01] ([0-9]{3})")
_LENGTH = re.compile(rb"^content-length:[ \t]*([0-9]{1,18})[ \t]*\r?$", re.IGNORECASE | re.MULTILINE)
_CHUNKED = re.compile(rb"^transfer-encoding:[^\n]*chunked", re.IGNORECASE | re.MULTILINE)
#: Says that the connection ends after it.
_CLOSES = re.compile(rb"^connection:[^\n]*close|\AHTTP/1\.0", re.IGNORECASE | re.MULTILINE)
_SIZE = re.compile(rb"[0-9a-f]{1,16}", re.IGNORECASE)
#: Clients take a line end without CR, and so may servers.
_HEAD_END = re.compile(rb"\n\r?\n")
_LINE_END = re.compile(rb"\n")


class Due(NamedTuple):
    """A request that a server has yet to answer.

    :ivar method: empty for the beginning of TLS
    :ivar asks: for a WebSocket, or TLS
    :ivar static: for a file that may be kept, see :class:`StaticRequest`
    """

    method: str
    asks: bool
    static: StaticRequest | None = None


class Sink(Protocol):
    """Takes the content of one file as it passes; see :class:`_forwarding.static_cache.Recording`."""

    def write(self, data: memoryview) -> None: ...
    def finish(self) -> None: ...
    def discard(self) -> None: ...


Record = Callable[["StaticRequest | None", bytes], "Sink | None"]


class Answers:
    """Reads what a server says.

    :param due: what it was asked, in order; an answer takes its request out
    :param record: gets the head of each answer, and begins to keep what follows if that is a file to keep
    :ivar last: whether the server says that it answers nothing more
    :ivar free: whether it has said yes, and what follows is no HTTP
    :ivar lost: whether nothing more is known: that, or an answer that ends with the connection, or none
    """

    def __init__(self, due: deque[Due], record: Record | None = None) -> None:
        self._due = due
        self._record = record
        self._sink: Sink | None = None
        self._stage: Literal["head", "chunk", "trailer"] = "head"
        self._piece = bytearray()
        self._left = 0  # of a body, or of a chunk with its line end
        self.last = False
        self.free = False
        self.lost = False

    @property
    def over(self) -> bool:
        """Whether all that was asked is answered, to the end."""
        return not (self._due or self._piece or self._left or self._stage != "head" or self.lost)

    def read(self, data: memoryview) -> bool | None:
        """Take what comes; return whether it says yes to a WebSocket or TLS, once it says so."""
        said, start = None, 0
        while start < len(data) and not self.lost:
            if self._left:
                count = min(self._left, len(data) - start)
                self._left -= count
                sink = self._sink
                if sink:
                    sink.write(data[start : start + count])
                    if not self._left:
                        sink.finish()
                        self._sink = None
                start += count
                continue
            if self._due and not self._due[0].method and not self._piece:
                self.lost = True
                self.free = data[start] in _TLS
                return self.free
            before = len(self._piece)
            self._piece += data[start : start + _PIECE]
            end = _HEAD_END if self._stage == "head" else _LINE_END
            found = end.search(self._piece, max(0, before - 2))
            if found is None:
                self.lost = len(self._piece) > _MOST
                start += _PIECE
                continue
            start += found.end() - before
            piece = bytes(self._piece[: found.end()])
            self._piece.clear()
            if self._stage == "head":
                verdict = self._take(piece)
                said = said if verdict is None else verdict
            else:
                self._go_on(piece)
        return said

    def stop(self) -> None:
        """Take it that nothing more comes, from any thread; idempotent."""
        self._record = None
        sink, self._sink = self._sink, None
        if sink:
            sink.discard()

    def _take(self, head: bytes) -> bool | None:
        """See what an answer is, and how its body is framed (RFC 9112, section 6.3)."""
        found = _STATUS.match(head)
        if found is None or not self._due:
            self.lost = True
            return None
        status = found[1]
        if status.startswith(b"1") and status != b"101":
            return None  # another comes
        method, asks, static = self._due.popleft()
        self.last = self.last or bool(_CLOSES.search(head))
        length = _LENGTH.search(head)
        record = self._record
        sink = record(static, head) if record else None
        if status == b"101":
            self.lost = True
            self.free = asks
            return asks or None
        if method == "HEAD" or status in (b"204", b"304"):
            pass
        elif _CHUNKED.search(head):
            self._stage = "chunk"
        elif length:
            self._left, self._sink = int(length[1]), sink
            if self._record is None:  # it was stopped meanwhile
                self.stop()
        else:
            self.lost = True
        return False if asks else None

    def _go_on(self, line: bytes) -> None:
        """Take a line between chunks, or behind the last."""
        if self._stage == "trailer":
            if not line.strip():
                self._stage = "head"
            return
        size = _SIZE.match(line)
        if size is None:
            self.lost = True
        elif int(size[0], 16):
            self._left = int(size[0], 16) + 2
        else:
            self._stage = "trailer"
