"""Requests of any kind, judged by the guard and read by Tornado: none gets there that was not looked at.

Run as a program, it does as many as it is told: ``python tests/forwarding/test_guard_fuzz.py 200000 [SEED]``.
"""

from __future__ import annotations

import asyncio
import logging
import random
import re
import socket
import sys
import time
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass, field

from tornado.http1connection import HTTP1Connection, HTTP1ConnectionParameters, HTTP1ServerConnection
from tornado.httputil import (
    HTTPHeaders,
    HTTPMessageDelegate,
    HTTPServerConnectionDelegate,
    RequestStartLine,
    ResponseStartLine,
)
from tornado.iostream import IOStream

from bokeh_ssh._forwarding.http_requests import Inspector, RequestRefusedError
from bokeh_ssh._forwarding.http_responses import Answers
from bokeh_ssh._forwarding.request_filter import RequestFilter

#: What was dispatched, or let in: method, target, Host.
Seen = tuple[str, str, str]

OURS = ("localhost:5006", "127.0.0.1:5006", "[::1]:5006", "LocalHost", "a.localhost:1")
FOREIGN = (
    "evil.example",
    "evil.example:5006",
    "localhost.evil.example",
    "[::1]evil",
    "localhost@evil",
    "10.0.0.1",
)
_NAMES = r"(localhost\.?|127\.0\.0\.1\.?|\[[0:]*:0*1\]|[a-z0-9._-]*\.localhost\.?)(:[0-9]{1,5})?"
#: A request that must not be taken for one where it is a body, or behind something that hides it.
HIDDEN = b"GET /hidden HTTP/1.1\r\nHost: evil.example\r\n\r\n"
VERSIONS = (b"HTTP/1.0", b"HTTP/2.0", b"HTTP/1.2", b"http/1.1", b"")
#: Ends of a body, right and wrong.
LAST_CHUNKS = (
    b"\r\n0\r\nX: y\r\n\r\n",
    b"\r\n0;a=b\r\n\r\n",
    b"\r\n00\r\n\r\n",
    b"\r\n0\n\n",
    b"\r\n0\r\n\n",
    b"\r\n-0\r\n\r\n",
    b"\r\n0 \r\n\r\n",
    b"\r\n0\r\nxx" + HIDDEN,
    b"\r\n0_0\r\n\r\n",
    b"XX0\r\n\r\n",
)


def write(chance: random.Random) -> tuple[bytes, list[Seen]]:
    """Write one valid request, of any of the forms that there are; gives what it is, too."""
    method = chance.choice(("GET", "GET", "POST", "PUT", "foo", "M-SEARCH", "get", "OPTIONS"))
    host, path = (
        chance.choice(OURS),
        chance.choice(("/", "/app", "/a?b=c&d=%20", "//x", "/static/js/bokeh.min.js")),
    )
    target = f"http://{chance.choice(OURS)}{path}" if chance.random() < 0.1 else path
    lines = [
        f"Host: {host}",
        "Accept: */*",
        "X-Odd: a:b\tc",
        "Cookie: a=b; c=d",
        "Empty:",
        "Connection: keep-alive",
    ]
    lines = [lines[0], *chance.sample(lines[1:], chance.randrange(len(lines)))]
    body = chance.choice((b"", b"x", b"a=b&c=d\r\n", HIDDEN, b"0\r\n\r\n", bytes(range(256)), b"y" * 3000))
    form = chance.choice(("none", "none", "length", "chunks"))
    if form == "none":
        body = b""
    elif form == "length":
        lines.append(f"Content-Length: {len(body)}")
    else:
        lines.append(f"Transfer-Encoding: {chance.choice(('chunked', 'Chunked'))}")
        size = chance.choice((1, 7, 100, 4096)) if len(body) < 300 else 1000
        parts = [body[start : start + size] for start in range(0, len(body), size)]
        body = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"
    chance.shuffle(lines)
    head = "\r\n".join((f"{method} {target} HTTP/1.1", *lines, "", "")).encode()
    return head + body, [(method, target, host)]


def ask_to_switch(chance: random.Random) -> bytes:
    """Write a request for a WebSocket, good or not."""
    words = chance.choice(("websocket", "WebSocket", "h2c", "websocket, h2c", "Xwebsocket"))
    origin = chance.choice(
        (None, "http://localhost:5006", "http://evil.example", "null", "http://localhost:5006@x")
    )
    lines = [
        f"Host: {chance.choice(OURS)}",
        f"Upgrade: {words}",
        "Connection: Upgrade",
        "Sec-WebSocket-Key: x",
    ]
    lines += [f"Origin: {origin}"] * (origin is not None)
    chance.shuffle(lines)
    return "\r\n".join((f"GET /{chance.choice(('ws', 'no'))} HTTP/1.1", *lines, "", "")).encode()


def change(chance: random.Random, data: bytes) -> bytes:
    """Break something, or write it as servers differ about it."""
    ends = [index for index in range(len(data)) if data.startswith(b"\r\n", index)] or [0]
    end, spot = chance.choice(ends), chance.randrange(len(data) + 1)
    line = chance.choice(
        (
            b"Host: evil.example", b"Host : evil.example", b" Host: evil.example", b"\tx",
            b"Host\0: evil.example",
            b"host:evil.example", b"Content-Length: 5", b"Content-Length: 0", b"Content-Length: 5, 5",
            b"Content-Length: +5", b"Content-Length: 0x10", b"Content-Length: 1_0", b"Content-Length: 5,6",
            b"Transfer-Encoding: chunked", b"Transfer-Encoding: identity",
            b"Transfer-Encoding: chunked, chunked",
            b"Transfer-Encoding: xchunked", b"Transfer-Encoding:\tchunked", b"Transfer-Encoding: chunked;x",
            b"Transfer-Encoding : chunked", b"Transfer-Encoding: \x0bchunked", b"Transfer_Encoding: chunked",
            b"X: a\x0bb", b"X: \x85", b"\xff: x", b": x", b"Upgrade: websocket", b"Expect: 100-continue",
            b"Connection: close", b"Connection: Transfer-Encoding, close", b"no colon",
            b"X: a\r\x20b", b"X: a\rHost: b",
        )
    )  # fmt: skip
    return chance.choice(
        (
            lambda: data[:end] + b"\r\n" + line + data[end:],
            lambda: data[:end] + b"\r\n" + line + data[end:],
            lambda: data[:end] + b"\r\n" + line + data[end:],
            lambda: data[:end] + chance.choice((b"\n", b"\r", b"\r\r\n", b"\n\r", b"")) + data[end + 2 :],
            lambda: data.replace(b"\r\n", b"\n"),
            lambda: chance.choice((b"\r\n", b"\n", b" ", b"\0", b"\r\n\r\n")) + data,
            lambda: data.replace(b"localhost", chance.choice(FOREIGN).encode(), 1),
            lambda: data.replace(b"Host: ", chance.choice((b"Host:", b"Hos: ", b"X: ", b"Host: a ")), 1),
            lambda: data.replace(b" /", b" http://%b/" % chance.choice(FOREIGN).encode(), 1),
            lambda: data.replace(b"HTTP/1.1", chance.choice(VERSIONS), 1),
            lambda: data.replace(b" ", chance.choice((b"  ", b"\t", b"\x0b", b"")), 1),
            lambda: data.replace(b"\r\n0\r\n\r\n", chance.choice(LAST_CHUNKS)),
            lambda: data[:spot] + bytes((chance.randrange(256),)) + data[spot + 1 :],
            lambda: data[:spot] + bytes((chance.randrange(256),)) + data[spot:],
            lambda: data[:spot] + data[spot + chance.randrange(1, 9) :],
            lambda: data[:spot],
            lambda: data[:spot] + HIDDEN + data[spot:],
            lambda: data[spot:] + data[:spot],
            lambda: b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + data,
            lambda: b"CONNECT localhost:5006 HTTP/1.1\r\nHost: localhost:5006\r\n\r\n" + data,
        )
    )()  # fmt: skip


def make(chance: random.Random) -> tuple[bytes, list[Seen] | None]:
    """Make what one client sends; and what that is, where it is valid."""
    parts, seen = [], []
    for _ in range(chance.choice((1, 1, 2, 3))):
        data, what = write(chance)
        parts.append(data)
        seen += what
    kind = chance.random()
    if kind < 0.25:
        return b"".join(parts), seen
    if kind < 0.45:
        parts.insert(chance.randrange(len(parts) + 1), ask_to_switch(chance))
        parts.append(chance.choice((b"", HIDDEN, b"\x81\x85abcdhello")))
    if kind > 0.4:
        for _ in range(chance.choice((1, 1, 2))):
            spot = chance.randrange(len(parts))
            parts[spot] = change(chance, parts[spot])
    return b"".join(parts), None


@dataclass
class Server(HTTPServerConnectionDelegate):
    """Notes what Tornado reads, and answers; says yes to WebSockets as Tornado does, at /ws."""

    seen: list[Seen] = field(default_factory=list)
    raw: bytes = b""
    streams: list[IOStream] = field(default_factory=list)

    def start_request(self, server_conn: object, request_conn: HTTP1Connection) -> HTTPMessageDelegate:  # type: ignore[override]
        return _Request(self, request_conn)


class _Request(HTTPMessageDelegate):
    def __init__(self, server: Server, connection: HTTP1Connection) -> None:
        self.server = server
        self.connection = connection

    def headers_received(self, start_line: RequestStartLine, headers: HTTPHeaders) -> Awaitable[None] | None:  # type: ignore[override]
        self.server.seen.append((start_line.method, start_line.path, ",".join(headers.get_list("Host"))))
        if start_line.path == "/ws" and headers.get("Upgrade", "").lower() == "websocket":
            stream = self.connection.detach()
            self.server.streams.append(stream)
            stream.write(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n\r\n")
        return None

    def finish(self) -> None:
        start = ResponseStartLine("HTTP/1.1", 200, "OK")
        self.connection.write_headers(start, HTTPHeaders({"Content-Length": "0"}), b"")
        self.connection.finish()


class Peer:
    """Tornado's half of one connection, in this process."""

    def __init__(self) -> None:
        self.server = Server()
        self._near, far = socket.socketpair()
        self._near.setblocking(False)
        self._stream = IOStream(far)
        self._connection = HTTP1ServerConnection(self._stream, HTTP1ConnectionParameters())
        self._connection.start_serving(self.server)

    async def send(self, data: bytes | memoryview) -> bytes:
        """Send something, and wait until nothing comes of it any more; gives the answers."""
        try:
            self._near.sendall(data)
        except OSError:  # it has closed, which it may
            pass
        answer, quiet, before = b"", 0, -1
        while quiet < 6:
            await asyncio.sleep(0)
            try:
                answer += self._near.recv(65536)
            except OSError:
                pass
            now = len(answer) + len(self.server.seen)
            quiet, before = (quiet + 1, now) if now == before else (0, now)
        return answer

    async def close(self) -> None:
        """Close both ends."""
        self._near.close()
        for stream in self.server.streams:
            stream.close()
        self._stream.close()
        await self._connection.close()


@dataclass(frozen=True)
class Recorder(RequestFilter):
    """A guard that notes what it lets in."""

    let_in: list[Seen] = field(default_factory=list)

    def find_fault(self, method: str, target: str, headers: Sequence[tuple[str, str]]) -> str:
        fault = super().find_fault(method, target, headers)
        if not fault:
            self.let_in.append((method, target, dict(headers)["host"]))
        return fault


async def guarded(data: bytes, sizes: list[int]) -> tuple[list[Seen], Server, bool, bytes]:
    """Send ``data`` through an inspector, in pieces.

    :returns: what it let in, what came of it, whether all was fine, and the bytes that the server got
    """
    guard, peer = Recorder(5006), Peer()
    inspector, passed, refused, start = Inspector(guard), b"", False, 0
    answers = Answers(inspector.due)
    try:
        for size in (*sizes, len(data)):
            out = bytes(inspector.feed(data[start : start + size]))
            start += size
            while out or inspector.asking:
                passed += out
                switched = answers.read(memoryview(await peer.send(out)))
                if not inspector.asking:
                    break
                out = bytes(inspector.answer(switched=bool(switched)))
            if start >= len(data):
                break
    except RequestRefusedError:
        refused = True
    await peer.close()
    return guard.let_in, peer.server, not refused and not inspector.held, passed


async def unguarded(data: bytes) -> list[Seen]:
    """Send ``data`` straight to Tornado; gives what it reads."""
    peer = Peer()
    await peer.send(data)
    await peer.close()
    return peer.server.seen


def is_ours(target: str, host: str) -> bool:
    """Read the names of a request as simply as can be."""
    names = [host]
    if not target.startswith("/") and target != "*":
        names.append(re.split("[/?#]", target.partition("://")[2])[0])
    return all(re.fullmatch(_NAMES, name.lower()) for name in names)


@dataclass
class Count:
    """What a run came to."""

    requests: int = 0
    valid: int = 0
    passed: int = 0
    foreign: int = 0


async def run(count: int, seed: int, control: bool = True) -> Count:
    """Try ``count`` connections; raises where one is judged otherwise than Tornado reads it."""
    total = Count()
    for number in range(count):
        chance = random.Random(f"{seed}-{number}")
        data, expected = make(chance)
        sizes = [chance.choice((1, 2, 3, 10, 100, 1000)) for _ in range(chance.choice((0, 0, 1, 2, 8)))]
        if chance.random() < 0.01:
            sizes = [1] * len(data)
        let_in, server, fine, passed = await guarded(data, sizes)
        where = f"case {seed}-{number}: {data!r} in {sizes[:20]}: let in {let_in}, read {server.seen}"
        # Tornado may stop early; what it reads is what was let in, in that order.
        assert server.seen == let_in[: len(server.seen)], where
        # As Tornado reads the Host, with no parser of ours in between.
        assert all(is_ours(target, host) for _, target, host in server.seen), where
        assert data.startswith(passed), where
        total.requests += max(1, len(let_in) + (not fine))
        total.passed += fine
        if expected is not None:
            total.valid += 1
            assert fine, where
            assert passed == data, where
            assert let_in == expected, where
            assert server.seen == expected, where
        elif control:
            total.foreign += any(not is_ours(target, host) for _, target, host in await unguarded(data))
    return total


def test_tornado_reads_no_request_that_was_not_judged() -> None:
    """Whatever is sent, in whatever pieces, Tornado answers only requests that the guard has read as it does.

    The control: of the same bytes, without a guard, it answers many for names that are not ours.
    """
    logging.getLogger("tornado").setLevel(logging.CRITICAL)
    try:
        total = asyncio.run(run(1200, seed=1))
    finally:
        logging.getLogger("tornado").setLevel(logging.NOTSET)
    assert total.valid > 200
    assert total.foreign > 50


if __name__ == "__main__":
    logging.getLogger("tornado").setLevel(logging.CRITICAL)
    began = time.monotonic()
    result = asyncio.run(run(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1))
    sys.stdout.write(f"{result} in {time.monotonic() - began:.0f} s\n")
