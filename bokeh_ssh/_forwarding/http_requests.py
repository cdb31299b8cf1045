"""Reads what comes over one local connection, and lets on what has been judged. Pure text.

A program that looks at requests and one that answers them must read the same requests out of the same bytes.
So h11 reads them, and what two programs may take for two things is refused. The server gets the bytes as they
came.
"""

from __future__ import annotations

import functools
import re
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import h11

from bokeh_ssh._forwarding.http_responses import Due
from bokeh_ssh._forwarding.request_filter import RequestFilter
from bokeh_ssh._forwarding.static_requests import StaticRequest, read_static_request

#: Bytes of a request's head; servers take 64 KiB, cookies of a whole campus included.
MOST = 64 * 1024

#: Bytes that h11 gets of a body at a time: it copies what it has for each chunk that is in there.
_PIECE = 4096
#: Bytes of a head that is remembered as read.
_MOST_KEPT = 4096
#: Begins a TLS connection: a record with the client's hello (RFC 8446, sections 5.1 and 4). It has a check of
#: names of its own, and nothing to be read here.
_TLS = 0x16
_HELLO = re.compile(rb"\x16\x03[\x00-\x04](..)\x01\0", re.DOTALL)
_HELLO_SIZE = 7
_TOKEN = frozenset(b"!#$%&'*+-.^_`|~0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
_LENGTHS = re.compile(rb"^content-length:(.*)", re.IGNORECASE | re.MULTILINE)
#: A length that every server reads alike; h11 takes "5, 5" too, and servers differ.
_LENGTH = re.compile(rb"\A[ \t]*[0-9]{1,18}[ \t]*\r")
#: The line in front of a chunk, with the end of the one before; h11 takes blanks in it.
_CHUNK = re.compile(rb"\A(?:\r\n)?[0-9a-f]{1,15}(?:;[^\r\n]*)?\r\n", re.IGNORECASE)
#: A line end that is not CRLF, a folded line, NUL: h11 is lenient, and servers differ (RFC 9112, 2.2, 5.2).
_AMBIGUOUS = re.compile(rb"(?<!\r)\n|\r[^\n]|\n[ \t]|\0")


class _Head(NamedTuple):
    """What a request's head says.

    :ivar headers: names in lower case, and values
    :ivar length: of the body, in bytes, unless it is chunked
    :ivar lasts: whether the connection goes on after the answer, as far as the client says
    :ivar static: whether it is for a file that may be kept here
    """

    due: Due
    target: str
    headers: tuple[tuple[str, str], ...]
    length: int
    chunked: bool
    lasts: bool
    static: StaticRequest | None


class RequestRefusedError(Exception):
    """A request that may not go on; its text says why."""


class Opened(NamedTuple):
    """A connection whose beginning was let in.

    :ivar inspector: reads what follows
    :ivar passed: what has been read of it, and goes to the server first
    """

    inspector: Inspector
    passed: bytes

    def undone(self) -> Inspector:
        """Return an inspector that has read the same, and has let nothing of it on."""
        before = self.inspector
        on_page = before.on_page if before.stops else None
        return Inspector(before.request_filter, self.passed + before.held, on_page)


class Inspector:
    """Reads what a client sends.

    :param request_filter: judges each request
    :param held: what has been read already
    :param on_page: gets the head of each request for something else than a file, once it is let in. None does
        not stop at requests for static files, which may be answered on this side
    :ivar stops: whether it stops at them
    :ivar free: what follows passes unread: TLS, or a WebSocket
    :ivar asking: one of them was asked for, and nothing more passes before :meth:`answer`
    :ivar static: such a request, which was let in; nothing passes before :meth:`pass_static` or
        :meth:`drop_static`
    :ivar unsent: the rest of the answer from this side to the request before; in the hands of whoever has
        the connection
    :ivar due: the requests that passed, for who reads the answers
    """

    def __init__(
        self,
        request_filter: RequestFilter,
        held: bytes = b"",
        on_page: Callable[[bytes], None] | None = None,
    ) -> None:
        self.request_filter = request_filter
        self.on_page = on_page
        self.stops = on_page is not None
        self.static: StaticRequest | None = None
        self.unsent: list[memoryview] = []
        self._head_size = 0  # of that request
        self._held = bytearray(held)
        self._seen = 0  # of what is held: bytes of an unfinished head that were looked at, or that h11 has
        self._begun = False
        self._tls = False
        self._barred = False  # it began as TLS, which the server does not speak
        self._left = 0  # of a body whose length is known, or of a TLS hello
        self._chunks: h11.Connection | None = None  # reads a body that comes in chunks
        self.free = False
        self.asking = False
        self.due: deque[Due] = deque()
        self._passing: list[Due] = []  # and those that pass now, unless one behind them is refused

    @property
    def held(self) -> bytes:
        """What has been read, and may not go on yet."""
        return bytes(self._held)

    def feed(self, data: bytes | memoryview) -> bytes | memoryview:
        """Take what the client sent, and return what may go on to the server now.

        :raises RequestRefusedError: if a request in it may not; nothing of the connection may from there on
        """
        if not self._held and (self.free or len(data) <= self._left):
            if not self.free:
                self._left -= len(data)
            return data
        self._held += data
        return self._release()

    def answer(self, *, switched: bool) -> bytes | memoryview:
        """Take what the server says to a WebSocket or TLS; returns and raises as :meth:`feed`."""
        self.asking = False
        self.free = switched
        self._barred = self._tls and not switched
        return self._release()

    def pass_static(self) -> bytes:
        """Let the request for a static file on to the server, and those that are there behind it.

        Returns and raises as :meth:`feed`.
        """
        passed = b""
        while self.static:
            self._passing.append(Due("GET", asks=False, static=self.static))
            passed += self._take_static()
            passed += self._release()
        return passed

    def drop_static(self) -> None:
        """Take the request for a static file for answered; :meth:`feed` goes on behind it."""
        self._take_static()

    def _take_static(self) -> bytes:
        head = bytes(self._held[: self._head_size])
        del self._held[: self._head_size]
        self.static, self._head_size = None, 0
        return head

    def _release(self) -> bytes:
        passed = bytearray()
        while self._held and not self.asking and not self.static:
            count = self._step()
            if not count:
                break
            passed += self._held[:count]
            del self._held[:count]
        self.due.extend(self._passing)
        self._passing.clear()
        return bytes(passed)

    def _step(self) -> int:
        """Count the bytes that may go on next; 0 while that is not known."""
        if not self._begun:
            if self._held[0] == _TLS and not self._begin_tls():
                return 0
            self._begun = True
        if self.free:
            return len(self._held)
        if self._left:
            count = min(self._left, len(self._held))
            self._left -= count
            return count
        if self._barred:
            raise RequestRefusedError("the server does not speak TLS")
        if self._tls:
            self.asking = True
            return 0
        return self._step_chunk(self._chunks) if self._chunks else self._step_head()

    def _begin_tls(self) -> bool:
        """Let the first record through, unless it is none; False while too little of it is there.

        The rest has to wait for the server to speak TLS as well: others may find a request in anything.
        """
        if len(self._held) < _HELLO_SIZE:
            return False
        found = _HELLO.match(self._held)
        if found is None:
            raise RequestRefusedError("it is neither HTTP/1 nor TLS")
        self._tls = True
        self._left = 5 + int.from_bytes(found[1], "big")
        self._passing.append(Due("", asks=True))
        return True

    def _step_head(self) -> int:
        held = self._held
        # An empty line in front, which servers may skip, is none that a browser sends.
        if held[0] not in _TOKEN:
            raise RequestRefusedError("it is neither HTTP/1 nor TLS")
        # Not before the last bytes that were seen: what is looked for may have begun with them.
        start = max(0, self._seen - 3)
        end = held.find(b"\r\n\r\n", start) + 4
        if end > MOST or (end < 4 and len(held) > MOST):
            raise RequestRefusedError("the head of the request does not end")
        if end < 4:
            _check_lines(held, start)
            self._seen = len(held)
            return 0
        self._seen = 0
        self._check_head(bytes(held[:end]))
        if self.static:
            self._head_size = end
            return 0
        return end

    def _check_head(self, head: bytes) -> None:
        """Check one request, and see how its body is framed (RFC 9112, section 6.3)."""
        read = _read_again(head) if len(head) <= _MOST_KEPT else _read(head)
        reason = self.request_filter.find_fault(read.due.method, read.target, read.headers)
        if reason:
            raise RequestRefusedError(reason)
        if self.stops and read.static:
            self.static = read.static
            return
        if self.stops and self.on_page and read.due.method == "GET":
            self.on_page(head)
        self.stops = self.stops and read.lasts  # nobody answers what follows the last
        self._left = read.length
        self._passing.append(read.due)
        if read.chunked:
            self._chunks, _ = _parse(head)
        self.asking = read.due.asks

    def _step_chunk(self, parser: h11.Connection) -> int:
        while True:
            try:
                event = parser.next_event()
            except h11.RemoteProtocolError as exc:
                raise RequestRefusedError(f"its body is not as HTTP/1 has it ({_reason_of(exc)})") from None
            if event is not h11.NEED_DATA:
                break
            more = bytes(self._held[self._seen : self._seen + _PIECE])
            if not more:
                return 0
            parser.receive_data(more)
            self._seen += len(more)
        left = len(parser.trailing_data[0])
        count, self._seen = self._seen - left, left
        body = len(event.data) if isinstance(event, h11.Data) else 0
        _check_lines(self._held, 0, count - body)
        if count > body and not _CHUNK.match(self._held):
            raise RequestRefusedError("the length of its body is not clear")
        if isinstance(event, h11.EndOfMessage):
            self._chunks, self._seen = None, 0
        return count


def _parse(head: bytes) -> tuple[h11.Connection, h11.Request]:
    # A new one each time: to go on with the next request, h11 would have to be told of the answers.
    parser = h11.Connection(h11.SERVER, MOST)
    parser.receive_data(head)
    try:
        request = parser.next_event()
    except h11.RemoteProtocolError as exc:
        raise RequestRefusedError(f"it is not as HTTP/1 has it ({_reason_of(exc)})") from None
    assert isinstance(request, h11.Request)
    return parser, request


def _read(head: bytes) -> _Head:
    _check_lines(head)
    _, request = _parse(head)
    if request.http_version not in (b"1.1", b"1.0"):
        raise RequestRefusedError("it is not a request of HTTP/1.1 or 1.0")
    headers = tuple((name.decode("ascii"), value.decode("latin-1")) for name, value in request.headers)
    values = dict(headers)
    lengths = _LENGTHS.findall(head)
    if len(lengths) > 1 or not all(map(_LENGTH.fullmatch, lengths)):
        raise RequestRefusedError("the length of its body is not clear")
    length, chunked = int(values.get("content-length", "0")), "transfer-encoding" in values
    # Old servers do not know it in 1.0, and take what follows for requests.
    if chunked and ("content-length" in values or request.http_version != b"1.1"):
        raise RequestRefusedError("the length of its body is not clear")
    asks = any(name == "upgrade" and "websocket" in value.lower() for name, value in headers)
    if asks and (length or chunked):
        raise RequestRefusedError("it asks for a WebSocket, and has a body")
    method, target = request.method.decode("ascii"), request.target.decode("ascii")
    version = request.http_version.decode("ascii")
    lasts = version == "1.1" and values.get("connection", "keep-alive").strip().lower() == "keep-alive"
    static = read_static_request(method, target, headers, head) if lasts else None
    return _Head(Due(method, asks), target, headers, length, chunked, lasts, static)


#: A page asks for the same files each time, in the same words.
_read_again = functools.lru_cache(maxsize=128)(_read)


def _check_lines(data: bytes | bytearray, start: int = 0, end: int = MOST) -> None:
    if _AMBIGUOUS.search(data, start, end):
        raise RequestRefusedError("its lines do not end as those of HTTP/1 do")


def _reason_of(error: h11.RemoteProtocolError) -> str:
    """Say what h11 found, without the line itself behind it: a cookie or a session's id may be in that."""
    return str(error).partition(":")[0]
