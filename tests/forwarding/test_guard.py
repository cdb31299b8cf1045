"""What a local request says at its beginning decides whether it gets to the server."""

from __future__ import annotations

import socket
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

import apps
import conformance
from beds import Machine, until
from bokeh_ssh import LocalForward
from bokeh_ssh._cli.options.words import as_flag
from bokeh_ssh._core.settings import surface
from bokeh_ssh._forwarding import http_gate
from bokeh_ssh._forwarding.filtered_relay import FilteredRelay
from bokeh_ssh._forwarding.http_gate import HttpGate
from bokeh_ssh._forwarding.http_requests import MOST, Inspector, Opened, RequestRefusedError
from bokeh_ssh._forwarding.http_responses import Answers, Due
from bokeh_ssh._forwarding.request_filter import RequestFilter
from bokeh_ssh._ssh.io_loop import IOLoop
from direct_tunnels import port_of, serve_on, tunnel_to
from http_text import head


def judge(guard: RequestFilter, *pieces: bytes) -> str:
    """Have an inspector read what a client sends."""
    inspector, passed = Inspector(guard), b""
    try:
        for piece in pieces:
            passed += inspector.feed(piece)
    except RequestRefusedError:
        return "refuse"
    assert b"".join(pieces) == passed + inspector.held
    return "pass" if passed and not inspector.held else "more"


@pytest.mark.parametrize(
    "host",
    [
        "localhost:5006",
        "LOCALHOST",
        "localhost.:5006",
        "127.0.0.1:5006",
        "[::1]:5006",
        "[::1]",
        "[0:0:0:0:0:0:0:1]:5006",
        "app.localhost:5006",
    ],
)
def test_names_of_this_machine_pass(host: str) -> None:
    """Every way to write this machine's loopback is taken, with a port and without."""
    assert judge(RequestFilter(5006), head(f"Host: {host}")) == "pass"


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:5006",
        "localhost.evil.example",
        "evillocalhost",
        "127.0.0.1.evil.example",
        "10.0.0.1",
        "",
        "[::1]evil",
        "[::1].evil.example:5006",
        "[::1]:5006:80",
        "[::1",
        "::1",
        "[::2]",
        "localhost@evil.example",
        "evil.example@localhost",
        "localhost/evil",
        "localhost:evil",
        "localhost:5006 evil",
        "localhost,evil.example",
        "http://localhost",
        "localhost\u00b2",
    ],
)
def test_other_names_are_refused(host: str) -> None:
    """A name that somebody had lead to this machine is not taken, nor what two programs may read as two."""
    assert judge(RequestFilter(5006), head(f"Host: {host}")) == "refuse"


def test_names_that_were_added_pass() -> None:
    """What is given as an extra origin may also be the name that requests come under, as behind a proxy."""
    guard = RequestFilter(5006, ("hub.example:8000",))
    assert judge(guard, head("Host: hub.example:8000")) == "pass"
    assert judge(RequestFilter(5006), head("Host: hub.example:8000")) == "refuse"  # the control
    assert (
        judge(RequestFilter(5006, ("*",)), head("Host: hub.example:8000")) == "refuse"
    )  # all pages, not all names


@pytest.mark.parametrize(
    ("origin", "verdict"),
    [
        ("http://localhost:5006", "pass"),
        ("http://127.0.0.1:5006", "pass"),
        ("http://[::1]:5006", "pass"),
        ("http://page.example:8000", "pass"),
        ("http://localhost:5007", "refuse"),
        ("http://evil.example", "refuse"),
        ("http://page.example", "refuse"),
        ("null", "refuse"),
        ("", "refuse"),
        ("http://[", "refuse"),
        ("http://evil.example\\@localhost:5006", "refuse"),
        ("http://localhost:5006/", "refuse"),
        ("http://localhost:5006, http://evil.example", "refuse"),
    ],
)
def test_origins_of_websockets(origin: str, verdict: str) -> None:
    """A WebSocket comes from the tunnel's own pages, or from those that were added."""
    lines = ("Host: localhost:5006", "Upgrade: WebSocket", f"Origin: {origin}")
    assert judge(RequestFilter(5006, ("page.example:8000",)), head(*lines)) == verdict
    assert judge(RequestFilter(5006, ("*",)), head(*lines)) == "pass"
    assert judge(RequestFilter(5006), head(lines[0], lines[2])) == "pass"  # any page may ask; it cannot read


def test_refused_origin_names_the_setting_as_this_surface_does() -> None:
    """The 403 page names a keyword in a program, a flag on the command line, and nothing where none helps."""
    upgrade = [("host", "localhost:5006"), ("upgrade", "websocket"), ("origin", "http://evil.example")]
    guard = RequestFilter(5006, origins_setting="extra_origins")
    assert guard.find_fault("GET", "/ws", upgrade).endswith("here (extra_origins lets them)")
    with surface(as_flag):
        assert guard.find_fault("GET", "/ws", upgrade).endswith("here (--extra-origins lets them)")
    assert RequestFilter(5006).find_fault("GET", "/ws", upgrade).endswith("may not open WebSockets here")


def test_scripts_pass() -> None:
    """A WebSocket without an origin is a program's, not a page's."""
    assert judge(RequestFilter(5006), head("Host: localhost:5006", "Upgrade: websocket")) == "pass"


def test_every_way_to_ask_for_a_websocket_has_its_origin_looked_at() -> None:
    """Servers differ in what they take for one: whatever looks like it is treated as one."""
    lines = ("Host: localhost:5006", "Origin: http://evil.example")
    for more in (
        "Upgrade: websocket, x",
        "Upgrade: h2c",
        "Sec-WebSocket-Key: x",
        "sec-websocket-version: 13",
    ):
        assert judge(RequestFilter(5006), head(*lines, more)) == "refuse"
    twice = ("Host: localhost:5006", "Upgrade: websocket", "Origin: http://localhost:5006", lines[1])
    assert judge(RequestFilter(5006), head(*twice)) == "refuse"


#: A TLS record of 512 bytes, as a client's hello is.
HELLO = b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03" + b"GET / HTTP/1.1\r\nHost: evil.example\r\n\r\n".ljust(
    506
)


def test_tls_passes_unread() -> None:
    """TLS has a check of names of its own; what follows a hello passes once the server says its own."""
    for cut in range(1, len(HELLO)):
        assert judge(RequestFilter(5006), HELLO[:cut], HELLO[cut:]) == "pass"
    assert judge(RequestFilter(5006), head("Host: localhost"), HELLO) == "refuse"  # in the middle it is none
    inspector = Inspector(RequestFilter(5006))
    answers = Answers(inspector.due)
    assert inspector.feed(HELLO + b"more") == HELLO
    assert inspector.asking
    assert answers.read(memoryview(b"\x16\x03")) is True
    assert inspector.answer(switched=True) == b"more"
    assert inspector.feed(head("Host: evil.example")) == head("Host: evil.example")


@pytest.mark.parametrize(
    "data",
    [
        b"\x16 / HTTP/1.1\r\nHost: evil.example\r\n\r\n",
        b"\x16\x03GET / HTTP/1.1\r\n",
        HELLO[:5] + b"\x02" + HELLO[6:],
    ],
)
def test_what_only_begins_like_tls_is_refused(data: bytes) -> None:
    """A byte alone makes no TLS: a server that speaks HTTP may find a request behind it."""
    assert judge(RequestFilter(5006), data) == "refuse"


def test_nothing_follows_a_hello_that_is_not_answered_with_tls() -> None:
    """A server that answers a hello with anything else gets nothing more of that connection."""
    for more in (b"\x17\x03\x03", head("Host: evil.example"), head("Host: localhost")):
        inspector = Inspector(RequestFilter(5006))
        answers = Answers(inspector.due)
        assert inspector.feed(HELLO) == HELLO
        assert answers.read(memoryview(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")) is False
        inspector.answer(switched=False)
        with pytest.raises(RequestRefusedError):
            inspector.feed(more)


LOCAL = "Host: localhost:5006"


@pytest.mark.parametrize(
    "data",
    [
        b"\0",
        b"\r\n" + head(LOCAL),
        b"\n",
        b" " + head(LOCAL),
        b"\x80\x2e\x01",
        b"SSH-2.0-x\n",
        b"GET /\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\n",
        head(LOCAL).replace(b"1.1", b"2.0"),
        head(LOCAL).replace(b"1.1", b"1.2"),
        head(LOCAL).replace(b"HTTP", b"http"),
        head(LOCAL).replace(b"\r\n", b"\n"),
        head(LOCAL).replace(b"\r\n", b"\r"),
        head(LOCAL, "A: b\nHost: evil.example"),
        head(LOCAL, "A: b\rHost: evil.example"),
        head(LOCAL, " Host: evil.example"),
        head("A: b", "\t" + LOCAL),
        head("Host : localhost"),
        head("Host\0: localhost"),
        head(LOCAL, "A: \0"),
        head(LOCAL, "A"),
        head(LOCAL, ": b"),
        head(),
        head().replace(b"1.1", b"1.0"),
        head("Host: localhost", "Host: evil.example"),
        head("Host: localhost", "host: localhost"),
        head("host:evil.example"),
        head(LOCAL, path="http://evil.example/"),
        head("Host: evil.example", path="http://localhost/"),
        head(LOCAL, path="http://localhost@evil.example/"),
        head(LOCAL, path="HTTP://evil.example"),
        head(LOCAL, path="file:///etc"),
        head(LOCAL, path="localhost:5006"),
        head(LOCAL, path="/a b"),
        head(LOCAL, path="/\u00e4"),
        b"CONNECT localhost:5006 HTTP/1.1\r\nHost: localhost:5006\r\n\r\n",
        b"CONNECT / HTTP/1.1\r\nHost: localhost:5006\r\n\r\n",
        b"connect / HTTP/1.1\r\nHost: localhost:5006\r\n\r\n",
        head(LOCAL, "Content-Length: 5", "Content-Length: 6"),
        head(LOCAL, "Content-Length: 5, 6"),
        head(LOCAL, "Content-Length: 5", "Content-Length: 5"),
        head(LOCAL, "Content-Length: 5, 5"),
        head(LOCAL, "Content-Length: 99999999999999999999"),
        head(LOCAL, "Content-Length: +5"),
        head(LOCAL, "Content-Length: -5"),
        head(LOCAL, "Content-Length: 0x5"),
        head(LOCAL, "Content-Length: 5", "Transfer-Encoding: chunked"),
        head(LOCAL, "Transfer-Encoding: identity"),
        head(LOCAL, "Transfer-Encoding: gzip, chunked"),
        head(LOCAL, "Transfer-Encoding: chunked", "Transfer-Encoding: chunked"),
        head(LOCAL, "Transfer-Encoding: chunked").replace(b"1.1", b"1.0"),
        head(LOCAL, "Upgrade: websocket", "Content-Length: 5"),
        head(LOCAL, "Transfer-Encoding: chunked") + b"5;\na\r\nhello\r\n",
        head(LOCAL, "Transfer-Encoding: chunked") + b"5;a\rb\r\nhello\r\n",
        head(LOCAL, "Transfer-Encoding: chunked") + b"5\r\nhelloXX0\r\n\r\n",
        head(LOCAL, "Transfer-Encoding: chunked") + b"-5\r\nhello\r\n",
        head(LOCAL, "Transfer-Encoding: chunked") + b"5 \r\nhello\r\n",
        head(LOCAL, "Transfer-Encoding: chunked") + b"10000000000000005\r\nhello\r\n",
        head(LOCAL, "Transfer-Encoding: chunked") + b"5\r\nhello\r\n0 \r\n\r\n",
        head(LOCAL, "Transfer-Encoding: chunked") + b"0\r\n\n",
        head(LOCAL, "Transfer-Encoding: chunked") + b"0\r\nA: b\n\n",
        b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * (MOST // 6),
        b"a" * (MOST + 1),
    ],
)
def test_what_does_not_parse_is_refused(data: bytes) -> None:
    """What is HTTP to some servers only goes to none, in whatever pieces it comes."""
    assert judge(RequestFilter(5006), data) == "refuse"
    if len(data) < 300:
        assert judge(RequestFilter(5006), *(bytes((byte,)) for byte in data)) == "refuse"
        good = head(LOCAL, "Content-Length: 2") + b"ab"  # and later on a connection as at its beginning
        assert judge(RequestFilter(5006), good, data) == "refuse"
        assert judge(RequestFilter(5006), good + data) == "refuse"


@pytest.mark.parametrize("method", ["GET", "get", "foo", "M-SEARCH", "a" * 40, "BREW"])
@pytest.mark.parametrize("before", [b"", head(LOCAL)])
def test_any_method_is_judged_by_its_host(method: str, before: bytes) -> None:
    """A method that no server knows makes a request no less of one."""
    whole = f"{method} / HTTP/1.1\r\nHost: %s\r\n\r\n"
    assert judge(RequestFilter(5006), before + (whole % "evil.example").encode()) == "refuse"
    assert judge(RequestFilter(5006), before + (whole % "localhost").encode()) == "pass"  # the control


INSIDE = head("Host: evil.example", path="/in/a/body")
REQUESTS = [
    head(LOCAL, f"Content-Length: {len(INSIDE)}") + INSIDE,
    head(LOCAL, "Transfer-Encoding: Chunked") + b"%x\r\n%b\r\n0\r\n\r\n" % (len(INSIDE), INSIDE),
    head(LOCAL, "Transfer-Encoding: chunked") + b"1;a=b\r\nx\r\n0\r\nTrailer: y\r\n\r\n",
    head(LOCAL, "Content-Length: 0"),
    head(LOCAL).replace(b"1.1", b"1.0"),
    head(LOCAL, path="*"),
    head(LOCAL, path="http://127.0.0.1:5006/app?x"),
    head(LOCAL, "Cookie: \x01\xff", "A:", "B:  c \t"),
]


@pytest.mark.parametrize("request_", REQUESTS)
def test_requests_follow_each_other(request_: bytes) -> None:
    """Bodies are passed on as they come, and what is in them is no request; what is behind them is."""
    good, bad = head(LOCAL), head("Host: evil.example")
    for cut in range(1, len(request_ + good)):
        whole = request_ + good
        assert judge(RequestFilter(5006), whole[:cut], whole[cut:]) == "pass"
        assert judge(RequestFilter(5006), request_[:cut], request_[cut:] + bad) == "refuse"
    assert judge(RequestFilter(5006), *(bytes((byte,)) for byte in request_ * 3)) == "pass"


def test_long_body_is_passed_on_as_it_is() -> None:
    """A body is neither copied nor held."""
    inspector = Inspector(RequestFilter(5006))
    inspector.feed(head(LOCAL, "Content-Length: 1000000"))
    part = memoryview(bytes(100_000))
    for _ in range(10):
        assert inspector.feed(part) is part
    with pytest.raises(RequestRefusedError):
        inspector.feed(part)


@pytest.mark.parametrize("switched", [True, False])
def test_nothing_follows_a_websocket_unread_before_the_answer(switched: bool) -> None:
    """What follows a request for a WebSocket waits for the answer; if that is no, it is more requests."""
    inspector = Inspector(RequestFilter(5006))
    asked = head(LOCAL, "Upgrade: websocket", "Connection: Upgrade")
    assert inspector.feed(asked + head("Host: evil.example")) == asked
    assert inspector.asking
    assert inspector.feed(b"more") == b""
    if switched:
        assert inspector.answer(switched=True) == head("Host: evil.example") + b"more"
        assert inspector.feed(b"\x81\x00") == b"\x81\x00"
    else:
        with pytest.raises(RequestRefusedError):
            inspector.answer(switched=False)


def answered(data: bytes, *due: Due, size: int = 1) -> tuple[bool | None, bool]:
    """Read answers in pieces; gives what they say to a WebSocket, and whether all is answered."""
    answers, said = Answers(deque(due)), None
    for start in range(0, len(data), size):
        now = answers.read(memoryview(data)[start : start + size])
        said = said if now is None else now
    return said, answers.over


PAGE = Due("GET", asks=False)
ASKS = Due("GET", asks=True)
YES = b"HTTP/1.1 101 Switching Protocols\r\n\r\n"
LENGTH = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b"
CHUNKS = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n"
HINTS = b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n"


@pytest.mark.parametrize("size", [1, 7, 10_000])
@pytest.mark.parametrize(
    ("data", "due", "said", "over"),
    [
        (YES + b"\x81", [ASKS], True, False),
        (HINTS + YES, [ASKS], True, False),
        (b"HTTP/1.1 403 No\r\nContent-Length: 0\r\n\r\n", [ASKS], False, True),
        (b"HTTP/1.0 403 No\r\n\r\nno", [ASKS], False, False),
        (YES, [PAGE], None, False),
        (LENGTH % (len(YES), YES), [PAGE, ASKS], None, False),
        (LENGTH % (len(YES), YES) + YES, [PAGE, ASKS], True, False),
        (CHUNKS % (len(YES), YES), [PAGE, ASKS], None, False),
        (CHUNKS % (len(YES), YES) + YES, [PAGE, ASKS], True, False),
        (b"HTTP/1.1 200 OK\r\n\r\n" + YES, [PAGE, ASKS], None, False),
        (LENGTH % (5, b"hello") * 2, [PAGE, PAGE], None, True),
        (LENGTH % (5, b"hell"), [PAGE], None, False),
        (CHUNKS % (5, b"hello") + HINTS + LENGTH % (0, b""), [PAGE, PAGE], None, True),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n", [Due("HEAD", asks=False)], None, True),
        (b"HTTP/1.1 304 Same\r\nContent-Length: 9\r\n\r\n", [PAGE], None, True),
        (b"HTTP/1.1 204 None\n\n", [PAGE], None, True),
        (CHUNKS.replace(b"0\r\n", b"0\r\nA: b\r\n") % (1, b"x"), [PAGE], None, True),
        (b"HTTP/1.1 408 Late\r\nContent-Length: 0\r\n\r\n", [], None, False),
        (b"<html>" + YES, [ASKS], None, False),
        (b"", [], None, True),
    ],
)  # fmt: skip
def test_answers_are_followed(data: bytes, due: list[Due], said: bool | None, over: bool, size: int) -> None:
    """What is in an answer is none, and a 101 counts only for the request that asked for it."""
    assert answered(data, *due, size=size) == (said, over)


class Still:
    """A pump that does nothing until it is told to, and a stream that takes all."""

    def __init__(self) -> None:
        self.chunk = memoryview(bytearray(1000))
        self.calls: list[Any] = []
        self.post = self.calls.append
        self.sent = b""

    def send(self, data: memoryview) -> None:
        """Keep what is sent."""
        self.sent += data

    def writable(self) -> int:
        """Take any number of bytes."""
        return 1000

    def credit(self, count: int) -> None:
        """Heed no window."""


def test_server_that_speaks_at_once_after_its_yes_is_believed() -> None:
    """What follows a yes, before the loop has got to that, takes nothing back."""
    still, inspector = Still(), Inspector(RequestFilter(5006))
    asked = inspector.feed(head(LOCAL, "Upgrade: websocket"))
    ours, theirs = socket.socketpair()
    with ours, theirs:
        pipe: Any = FilteredRelay(still, ours, still, None, Opened(inspector, bytes(asked)))  # type: ignore[arg-type]
        for part in (YES, b"\x81\x05hello", b"\x81\x05hello"):
            pipe.on_data([memoryview(part)])
        pipe._send_on(memoryview(b"\x81\x80abcd"))
        assert inspector.free
        assert still.sent == b"\x81\x80abcd"


def test_refusals_have_no_secrets_in_them() -> None:
    """What is told of a request that does not parse is not the line itself, which may hold a cookie."""
    for data in (head("Cookie : secret"), b"GET /?bokeh-session-id=secret\r\n\r\n"):
        with pytest.raises(RequestRefusedError) as caught:
            Inspector(RequestFilter(5006)).feed(data)
        assert "secret" not in str(caught.value)


@given(st.lists(st.binary(max_size=300), max_size=3))
def test_anything_is_judged(pieces: list[bytes]) -> None:
    """Whatever comes, there is a verdict."""
    assert judge(RequestFilter(5006), *pieces) in ("more", "pass", "refuse")


@given(st.integers(1, 60))
def test_beginnings_are_waited_for(count: int) -> None:
    """A head that is cut anywhere is never judged early."""
    whole = head("Host: evil.example:5006", "Accept: */*")
    assert judge(RequestFilter(5006), whole[: min(count, len(whole) - 1)]) == "more"


def ask(port: int, *lines: str, path: str) -> str:
    """Send a request as it is written; gives the whole answer."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as sock:
        sock.sendall(head(*lines, "Connection: close", path=path))
        return conformance.read_all(sock).decode(errors="replace")


def test_rebound_name_gets_no_page(machine: Machine) -> None:
    """A page whose name leads here by DNS rebinding gets a 403, and nothing reaches the server."""
    app = apps.put(machine, "sliders.py", apps.SLIDER)
    with tunnel_to(machine, app) as tunnel:
        port = tunnel.local_port
        assert "Bokeh" in ask(port, f"Host: localhost:{port}", path="/sliders")  # the control
        before = len(tunnel.log)
        answer = ask(port, f"Host: evil.example:{port}", path="/sliders")
        assert answer.startswith("HTTP/1.1 403")
        assert "evil.example" in answer
        assert "Bokeh" not in answer.replace("bokeh_ssh", "")
        url = f"ws://127.0.0.1:{port}/sliders/ws"
        for origin in ("http://evil.example", f"http://evil.example:{port}"):
            with pytest.raises(InvalidStatus, match="403"):
                connect(url, origin=origin, open_timeout=20)  # type: ignore[arg-type]
        assert len(tunnel.log) == before  # the server has not heard of it
        apps.drive(tunnel.url)


def test_control_rebinding_works_without_the_guard(machine: Machine) -> None:
    """Through a plain forward to a plain server, the rebound name gets the page: what ``ssh -L`` lets in."""
    app = apps.put(machine, "sliders.py", apps.SLIDER)
    with serve_on(machine, app) as running:
        remote = port_of(running)
        with LocalForward(
            machine.host, machine.user, remote_port=remote, remote_host="127.0.0.1", **machine.login
        ) as forward:
            answer = ask(forward.local_port, "Host: evil.example:5006", path="/sliders")
            assert answer.startswith("HTTP/1.1 200")
            assert "Bokeh" in answer


def test_slow_and_idle_connections(machine: Machine) -> None:
    """A head that comes byte by byte is waited for, and a connection that says nothing disturbs nobody."""
    app = apps.put(machine, "sliders.py", apps.SLIDER)
    with tunnel_to(machine, app, isolate=False) as tunnel:
        port = tunnel.local_port
        idle = [socket.create_connection(("127.0.0.1", port), timeout=20) for _ in range(20)]
        with socket.create_connection(("127.0.0.1", port), timeout=20) as sock:
            for byte in head(f"Host: localhost:{port}", "Connection: close", path="/sliders"):
                sock.sendall(bytes((byte,)))
            assert "Bokeh" in conformance.read_all(sock).decode(errors="replace")
        idle[0].sendall(head(f"Host: localhost:{port}", "Connection: close", path="/sliders"))
        assert "Bokeh" in conformance.read_all(idle[0]).decode(errors="replace")
        threads = {thread.name for thread in threading.enumerate()}
        assert len([name for name in threads if "io loop" in name]) == 1
        for sock in idle:
            sock.close()


def test_connection_that_comes_as_its_line_goes_is_not_forgotten() -> None:
    """One that was accepted for a line that is given up in the same moment waits for the next."""
    pump, led, late = IOLoop("test"), list[Any](), list[Any]()

    def inspect(_: socket.socket) -> Inspector:
        return Inspector(RequestFilter(5006))

    gate = HttpGate(pump, inspect, lambda sock, *_: led.append(sock), lambda sock, _: late.append(sock))
    pairs = [socket.socketpair() for _ in range(3)]
    try:
        pairs[0][0].sendall(head(LOCAL))
        gate.check(pairs[0][1], ("", 0))  # the control
        gate.check(pairs[1][1], ("", 0))
        until(lambda: led == [pairs[0][1]], what="the first to be led on")
        assert [sock for sock, *_ in gate.release()] == [pairs[1][1]]
        pump.close()
        gate.check(pairs[2][1], ("", 0))
        assert late == [pairs[2][1]]
    finally:
        pump.close()
        for sock in (sock for pair in pairs for sock in pair):
            sock.close()


def test_idle_connections_give_way(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of more connections that say nothing for long than a browser ever has, the oldest are ended, and a page
    that waits for its turn meanwhile is served; one that has begun is not taken for idle."""
    monkeypatch.setattr(http_gate, "_IDLE", 1.0)
    monkeypatch.setattr(http_gate, "_PATIENCE", 60.0)  # what follows takes as long as a busy machine likes
    app = apps.put(machine, "sliders.py", apps.SLIDER)
    with tunnel_to(machine, app, isolate=False) as tunnel:
        address = ("127.0.0.1", tunnel.local_port)
        with socket.create_connection(address, timeout=20) as begun:
            begun.sendall(b"GET /sliders HTTP/1.1\r\n")
            idle = [socket.create_connection(address, timeout=20) for _ in range(300)]
            apps.drive(tunnel.url)
            assert idle[0].recv(1) == b""
            rest = head(f"Host: localhost:{address[1]}", "Connection: close", path="/sliders")
            begun.sendall(rest.partition(b"\r\n")[2])
            assert "Bokeh" in conformance.read_all(begun).decode(errors="replace")
        for sock in idle:
            sock.close()


@pytest.mark.parametrize("count", [200, 600])
def test_many_that_speak_late_are_served(sshd: Callable[..., Machine], count: int) -> None:
    """Connections that all stand before the first of them says a word are served, none is reset: those that
    are more than may wait here wait in the system's queue. The control: fewer than that."""
    machine = sshd()
    app = apps.put(machine, "sliders.py", apps.SLIDER)
    with tunnel_to(machine, app, isolate=False) as tunnel:
        port = tunnel.local_port
        late = [socket.create_connection(("127.0.0.1", port), timeout=30) for _ in range(count)]
        request = head(f"Host: localhost:{port}", "Connection: close", path="/sliders/metadata")
        for sock in late:
            sock.sendall(request)
        for sock in late:
            with sock:
                assert conformance.read_all(sock).startswith(b"HTTP/1.1 200")
