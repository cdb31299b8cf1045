"""The guard of a tunnel's local port in front of real servers, and of a real browser."""

from __future__ import annotations

import contextlib
import http.client
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

import apps
import browser
import conformance
from beds import Machine, until
from bokeh_ssh import DirectTunnel, Event, LocalForward, Reconnected
from bokeh_ssh._forwarding import http_gate
from direct_tunnels import port_of, serve_on, tunnel_to
from http_text import head
from skips import missing

#: Does not look at any origin, answers any method, and says what it was asked.
SERVER = """
import asyncio, sys
from tornado.web import Application, RequestHandler
from tornado.websocket import WebSocketHandler

class Echo(WebSocketHandler):
    def check_origin(self, origin):
        return True

    def on_message(self, message):
        self.write_message(message)

class Page(RequestHandler):
    SUPPORTED_METHODS = ("GET", "POST", "foo")

    def get(self):
        self.write(f"it is {len(self.request.body)}")

    post = foo = get

async def serve():
    def log(handler):
        print("asked", handler.request.method, handler.request.uri, handler.request.host, flush=True)

    Application([("/ws", Echo), ("/.*", Page)], log_function=log).listen(int(sys.argv[1]), "127.0.0.1")
    await asyncio.Event().wait()

asyncio.run(serve())
"""


@contextlib.contextmanager
def any_server(machine: Machine, **keywords: Any) -> Iterator[DirectTunnel]:
    """Open a tunnel to a server of another kind than Bokeh's."""
    path = apps.put(machine, "server.py", SERVER)
    with tunnel_to(machine, command=(machine.python, "-u", path, "{port}"), **keywords) as tunnel:
        yield tunnel


@contextlib.contextmanager
def attached(machine: Machine, **keywords: Any) -> Iterator[DirectTunnel]:
    """Open a tunnel to a Bokeh server that runs already, and takes pages from anywhere."""
    app = apps.put(machine, "sliders.py", apps.SLIDER)
    with serve_on(machine, app, "--allow-websocket-origin=*") as running:
        with tunnel_to(machine, remote_port=port_of(running), launch=False, **keywords) as tunnel:
            yield tunnel


@contextlib.contextmanager
def launched(machine: Machine, **keywords: Any) -> Iterator[DirectTunnel]:
    """Open a tunnel to a Bokeh server that is started for it."""
    with tunnel_to(machine, apps.put(machine, "sliders.py", apps.SLIDER), **keywords) as tunnel:
        yield tunnel


def shake_hands(tunnel: DirectTunnel, origin: str | None) -> int:
    """Ask for the server's WebSocket in the name of a page; gives the status of the answer."""
    page = apps.get(tunnel.url)
    _, _, token = page.partition('"token":"')
    protocols: Any = ["bokeh", token.partition('"')[0]] if token else None
    address = tunnel.url.replace("http", "ws", 1).rstrip("/") + "/ws"
    try:
        with connect(address, origin=origin, subprotocols=protocols, open_timeout=20):  # type: ignore[arg-type]
            return 101
    except InvalidStatus as exc:
        return exc.response.status_code


@pytest.mark.parametrize("server", [launched, attached, any_server])
def test_pages_of_others_open_no_websocket(embedded: Callable[..., Machine], server: Any) -> None:
    """Whatever the server behind it lets in, a page of another origin opens no WebSocket through a tunnel;
    with ``allow_any_origin`` it does, which is the control."""
    machine = embedded()
    with server(machine) as tunnel:
        for foreign in (
            "http://evil.example",
            f"http://evil.example:{tunnel.local_port}",
            "http://localhost:1",
            "null",
        ):
            assert shake_hands(tunnel, foreign) == 403
        assert shake_hands(tunnel, f"http://localhost:{tunnel.local_port}") == 101
        assert shake_hands(tunnel, None) == 101  # a script
    with server(machine, allow_any_origin=True) as tunnel:
        assert shake_hands(tunnel, "http://evil.example") == 101


@pytest.fixture
def client_of() -> Iterator[Callable[[DirectTunnel], Client]]:
    """Give what makes clients, which are closed at the end."""
    with contextlib.ExitStack() as stack:
        yield lambda tunnel: stack.enter_context(Client(tunnel))


class Client:
    """A connection whose bytes are chosen."""

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exc: object) -> None:
        self.sock.close()

    def __init__(self, tunnel: DirectTunnel) -> None:
        self.sock = socket.create_connection(("127.0.0.1", tunnel.local_port), timeout=20)

    def ask(self, data: bytes) -> tuple[int, bytes]:
        """Send a request; gives the answer's status and body."""
        self.sock.sendall(data)
        answer = http.client.HTTPResponse(self.sock)
        answer.begin()
        return answer.status, answer.read()

    def is_over(self) -> bool:
        """Wait for the end of the connection."""
        try:
            return self.sock.recv(1) == b""
        except ConnectionResetError:
            return True


OTHERS = [
    head("Host: evil.example"),
    head("Host: evil.example").replace(b"GET", b"foo"),
    head("Host: evil.example").replace(b"GET", b"get"),
    b"\r\n" + head("Host: localhost"),
    head("Host: localhost").replace(b"\r\n", b"\n"),
    head("Host: localhost", "A: b\nC: d"),
    head("Host: [::1]evil"),
    head("Host: localhost", "Host: evil.example"),
    head(
        "Host: localhost",
        "Upgrade: websocket",
        "Connection: Upgrade",
        "Origin: http://evil.example",
        path="/ws",
    ),
    b"\x16\x03\x01\x00\x05hello",
    b"\x16 / HTTP/1.1\r\nHost: localhost\r\n\r\n",
]


def test_every_request_of_a_connection_is_looked_at(
    embedded: Callable[..., Machine], client_of: Callable[[DirectTunnel], Client]
) -> None:
    """The first and those that follow: what may not go on gets 403 and the connection's end, and the server
    hears nothing of it; in between, bodies of both kinds pass."""
    with any_server(embedded()) as tunnel:
        ours = f"Host: localhost:{tunnel.local_port}"
        big = b"GET /inside HTTP/1.1\r\nHost: evil.example\r\n\r\n" * 30_000
        requests = {
            b"it is 0": head(ours),
            b"it is 5": head(ours, "Content-Length: 5").replace(b"GET", b"foo") + b"hello",
            b"it is %d" % len(big): head(ours, f"Content-Length: {len(big)}").replace(b"GET", b"POST") + big,
            b"it is %d" % (2 * len(big)): head(ours, "Transfer-Encoding: chunked").replace(b"GET", b"POST")
            + (b"%x\r\n%b\r\n" % (len(big), big)) * 2
            + b"0\r\n\r\n",
        }
        for other in OTHERS:
            first = client_of(tunnel)
            assert first.ask(other)[0] == 403
            assert first.is_over()
            client = client_of(tunnel)
            assert client.ask(head(ours)) == (200, b"it is 0")
            status, body = client.ask(other)
            assert status == 403
            assert b"bokeh_ssh does not let" in body
            assert client.is_over()
        client = client_of(tunnel)  # the control: one after the other, and all at once
        for answer, request in requests.items():
            assert client.ask(request) == (200, answer)
        client.sock.sendall(head(ours, path="/one") + head(ours, "Connection: close", path="/two"))
        assert conformance.read_all(client.sock).count(b"it is 0") == 2
        until(lambda: any("/two" in line for line in tunnel.log), what="the server to say what it was asked")
        assert not [line for line in tunnel.log if "evil" in line or "inside" in line]


def test_websocket_after_other_requests_and_a_refused_one(
    embedded: Callable[..., Machine], client_of: Callable[[DirectTunnel], Client]
) -> None:
    """What may follow a request for a WebSocket is decided by its answer: frames after a yes, even those sent
    ahead of it; after a no, requests that are looked at."""
    frame = b"\x81\x85\0\0\0\0hello"
    with any_server(embedded()) as tunnel:
        ours = f"Host: localhost:{tunnel.local_port}"
        more = (
            "Upgrade: websocket",
            "Connection: Upgrade",
            "Sec-WebSocket-Version: 13",
            "Sec-WebSocket-Key: " + "A" * 22 + "==",
        )
        client = client_of(tunnel)
        assert client.ask(head(ours)) == (200, b"it is 0")
        assert client.ask(head(ours, *more)) == (200, b"it is 0")  # a page that is none of WebSockets
        assert client.ask(head(ours)) == (200, b"it is 0")
        client.sock.sendall(head(ours, *more, path="/ws") + frame)
        answer = conformance.read_exactly(client.sock, 12)
        assert answer == b"HTTP/1.1 101"
        while not answer.endswith(b"\r\n\r\n"):
            answer += conformance.read_exactly(client.sock, 1)
        assert conformance.read_exactly(client.sock, 7) == b"\x81\x05hello"
        client.sock.sendall(frame)
        assert conformance.read_exactly(client.sock, 7) == b"\x81\x05hello"
        client = client_of(tunnel)
        assert client.ask(head(ours, *more)) == (200, b"it is 0")
        assert client.ask(head("Host: evil.example"))[0] == 403
        assert client.is_over()
        client = client_of(tunnel)
        client.sock.sendall(head(ours, *more) + head("Host: evil.example", path="/evil"))  # without waiting
        assert conformance.read_exactly(client.sock, 12) == b"HTTP/1.1 200"  # and nothing in front of it
        while not client.is_over():
            pass
        assert client_of(tunnel).ask(head(ours, path="/last"))[0] == 200
        until(lambda: any("/last" in line for line in tunnel.log), what="the server to say what it was asked")
        assert not [line for line in tunnel.log if "evil" in line]


#: Answers in two halves; the second of /fake is what a WebSocket is answered with.
HALVES = """
import pathlib, socket, sys, threading, time
YES = b"HTTP/1.1 101 Switching Protocols\\r\\n\\r\\n"

def serve(sock):
    data = b""
    while True:
        while b"\\r\\n\\r\\n" not in data:
            more = sock.recv(65536)
            if not more:
                return
            data += more
        head, _, data = data.partition(b"\\r\\n\\r\\n")
        path = head.split()[1].decode()
        print("asked", path, flush=True)
        if path != "/ws":
            body = b"x" * 100 + (YES if path == "/fake" else b"x" * len(YES))
            sock.sendall(b"HTTP/1.1 200 OK\\r\\nContent-Length: %d\\r\\n\\r\\n" % len(body) + body[:100])
            while path in ("/fake", "/half") and not pathlib.Path(sys.argv[2]).exists():
                time.sleep(0.01)
            sock.sendall(body[100:])
        else:
            sock.sendall(b"HTTP/1.1 103 Early Hints\\r\\n\\r\\n")
            time.sleep(0.1)
            sock.sendall(YES)
            sock.sendall(sock.recv(5))

server = socket.create_server(("127.0.0.1", int(sys.argv[1])))
while True:
    threading.Thread(target=serve, args=server.accept()[:1], daemon=True).start()
"""


def test_answers_are_kept_apart(
    embedded: Callable[..., Machine], client_of: Callable[[DirectTunnel], Client], tmp_path: Path
) -> None:
    """A refusal comes into the middle of no answer, and what stands in an answer is no yes to a WebSocket."""
    machine, go_on = embedded(), tmp_path / "go on"
    path = apps.put(machine, "server.py", HALVES)
    with tunnel_to(machine, command=(machine.python, "-u", path, "{port}", str(go_on))) as tunnel:
        ours = f"Host: localhost:{tunnel.local_port}"
        asks = head(ours, "Upgrade: websocket", "Connection: Upgrade", path="/plain")
        half, fake = client_of(tunnel), client_of(tunnel)
        half.sock.sendall(head(ours, path="/half"))
        fake.sock.sendall(head(ours, path="/fake"))
        for client in (half, fake):
            until(lambda client=client: b"x" in client.sock.recv(1), what="the answer to begin")  # type: ignore[misc]
        half.sock.sendall(head("Host: evil.example", path="/evil"))
        fake.sock.sendall(asks + head("Host: evil.example", path="/evil"))
        assert client_of(tunnel).ask(head(ours, path="/plain"))[0] == 200  # those before are read
        go_on.touch()
        rest = conformance.read_all(half.sock)
        assert rest.endswith(b"x")
        assert b"403" not in rest
        assert conformance.read_all(fake.sock).count(b"HTTP/1.1 200 OK") == 1  # the one to what asks
        late = client_of(tunnel)  # the control: a real yes
        late.sock.sendall(asks.replace(b"/plain", b"/ws") + b"\x81\x85abc")
        answer = b""
        while not answer.endswith(b"\x81\x85abc"):
            answer += conformance.read_exactly(late.sock, 1)
        assert b" 101 " in answer
        assert not [line for line in tunnel.log if "evil" in line]


def test_many_half_heads_cost_nothing(
    embedded: Callable[..., Machine],
    client_of: Callable[[DirectTunnel], Client],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Heads that have begun and do not go on are waited for, not asked for."""
    monkeypatch.setattr(http_gate, "_PATIENCE", 60.0)  # what follows takes as long as a busy machine likes
    if not hasattr(time, "pthread_getcpuclockid"):
        pytest.skip("the system does not tell what a thread costs")
    with launched(embedded(), isolate=False) as tunnel:
        (pump,) = [thread for thread in threading.enumerate() if "bokeh-ssh io loop" in thread.name]
        clients = [client_of(tunnel) for _ in range(250)]
        for client in clients:
            client.sock.sendall(b"GET / HTTP/1.1\r\nCookie: " + b"x" * 16_000 + b"\r\nHost: loc")
        apps.drive(tunnel.url)  # those before are read
        clock = time.pthread_getcpuclockid(pump.ident or 0)
        before, began = time.clock_gettime(clock), time.monotonic()
        until(lambda: time.monotonic() - began > 1, what="a second to pass")
        assert time.clock_gettime(clock) - before < 0.1
        clients[0].sock.sendall(b"alhost\r\n\r\n")
        assert clients[0].sock.recv(8) == b"HTTP/1.1"


def test_half_a_head_outlives_the_line(
    embedded: Callable[..., Machine], client_of: Callable[[DirectTunnel], Client]
) -> None:
    """What was read of a connection's first request when the line went down goes on over the next one, and is
    judged there."""
    machine, events = embedded(), list[Event]()
    with launched(machine, isolate=False, on_event=events.append) as tunnel:
        good, bad = client_of(tunnel), client_of(tunnel)
        path = tunnel.url.rpartition("/")[2]
        good.sock.sendall(f"GET /{path} HTTP/1.1\r\nHost: local".encode())
        bad.sock.sendall(f"GET /{path} HTTP/1.1\r\nHost: evil.example\r\n".encode())
        assert (
            client_of(tunnel).ask(head("Host: localhost", path=f"/{path}"))[0] == 200
        )  # those before are read
        machine.server.drop_connections()
        until(lambda: any(isinstance(event, Reconnected) for event in events), timeout=30)
        status, page = good.ask(b"host\r\n\r\n")
        assert status == 200
        assert b"Bokeh" in page
        assert bad.ask(b"\r\n")[0] == 403


#: What a page of a name that leads here does: a method of its own, then the page.
ATTACK = """async path => {
    const odd = await fetch(path, {method: "foo"}).then(answer => answer.status, () => 0);
    const page = await fetch(path);
    return [odd, page.status, await page.text()];
}"""


@pytest.mark.once
def test_page_of_a_rebound_name_gets_nothing_in_chromium(embedded: Callable[..., Machine]) -> None:
    """In a real browser, a page whose name leads here gets 403 whatever it asks, with any method, and the app
    only through a forward that looks at nothing (the control)."""
    pytest.importorskip("playwright.sync_api", reason="it drives the browser")
    if browser.find() is None:
        missing("no Chromium is installed")
    machine = embedded()
    app = apps.put(machine, "sliders.py", apps.SLIDER)
    with (
        serve_on(machine, app) as running,
        tunnel_to(machine, remote_port=port_of(running), launch=False) as tunnel,
        LocalForward(
            machine.host, machine.user, remote_port=port_of(running), remote_host="127.0.0.1", **machine.login
        ) as forward,
        browser.chromium("--host-resolver-rules=MAP evil.example 127.0.0.1") as open_page,
    ):
        page = open_page().page
        answer = page.goto(f"http://evil.example:{tunnel.local_port}/sliders", timeout=30_000)
        assert answer.status == 403
        odd, status, text = page.evaluate(ATTACK, "/sliders")
        assert (odd, status) == (403, 403)
        assert "evil.example" in text
        assert "token" not in text
        assert page.goto(f"http://localhost:{tunnel.local_port}/sliders", timeout=30_000).status == 200
        assert page.evaluate(ATTACK, "/sliders")[:2] == [405, 200]
        page.goto(f"http://evil.example:{forward.local_port}/sliders", timeout=30_000)
        odd, status, text = page.evaluate(ATTACK, "/sliders")
        assert (odd, status) == (405, 200)
        assert "token" in text
