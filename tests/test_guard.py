"""What a local request says at its beginning decides whether it gets to the server."""

from __future__ import annotations

import socket
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

import apps
import conformance
from beds import Machine
from bokeh_ssh import LocalForward
from bokeh_ssh._guard import MOST, Guard
from test_direct import port_of, serve_on, tunnel_to


def head(*lines: str, path: str = "/") -> bytes:
    """Write the head of a request."""
    return "\r\n".join([f"GET {path} HTTP/1.1", *lines, "", ""]).encode()


@pytest.mark.parametrize(
    "host",
    [
        "localhost:5006",
        "LOCALHOST",
        "localhost.:5006",
        "127.0.0.1:5006",
        "[::1]:5006",
        "[::1]",
        "app.localhost:5006",
    ],
)
def test_names_of_this_machine_pass(host: str) -> None:
    """Every way to write this machine's loopback is taken, with a port and without."""
    assert Guard(5006).judge(head(f"Host: {host}"))[0] == "pass"


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
    ],
)
def test_other_names_are_refused(host: str) -> None:
    """A name that somebody had lead to this machine is not taken (row 60)."""
    assert Guard(5006).judge(head(f"Host: {host}"))[0] == "refuse"


def test_names_that_were_added_pass() -> None:
    """What is given as an extra origin may also be the name that requests come under, as behind a proxy."""
    guard = Guard(5006, ("hub.example:8000",))
    assert guard.judge(head("Host: hub.example:8000"))[0] == "pass"
    assert Guard(5006).judge(head("Host: hub.example:8000"))[0] == "refuse"  # the control


@pytest.mark.parametrize(
    ("origin", "verdict"),
    [
        ("http://localhost:5006", "pass"),
        ("http://127.0.0.1:5006", "pass"),
        ("http://page.example:8000", "pass"),
        ("http://localhost:5007", "refuse"),
        ("http://evil.example", "refuse"),
        ("null", "refuse"),
        ("http://[", "refuse"),
    ],
)
def test_origins_of_websockets(origin: str, verdict: str) -> None:
    """A WebSocket comes from the tunnel's own pages, or from those that were added."""
    lines = ("Host: localhost:5006", "Upgrade: WebSocket", f"Origin: {origin}")
    assert Guard(5006, ("page.example:8000",)).judge(head(*lines))[0] == verdict
    assert Guard(5006, check_origin=False).judge(head(*lines))[0] == "pass"


def test_scripts_pass() -> None:
    """A WebSocket without an origin is a program's, not a page's."""
    assert Guard(5006).judge(head("Host: localhost:5006", "Upgrade: websocket"))[0] == "pass"


@pytest.mark.parametrize("first", [b"\x16\x03\x01\x02", b"\0", b"SSH-2.0", b"get / http", b"\r\n"])
def test_what_is_not_http_passes(first: bytes) -> None:
    """TLS has a check of names of its own, and nothing else is what browsers can be made to send."""
    assert Guard(5006).judge(first)[0] == "pass"


def test_tricks_are_refused() -> None:
    """Two hosts, and a head without an end, are not what browsers send."""
    guard = Guard(5006)
    assert guard.judge(head("Host: localhost", "Host: evil.example"))[0] == "refuse"
    assert guard.judge(b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * (MOST // 6))[0] == "refuse"
    assert guard.judge(head("host:evil.example"))[0] == "refuse"
    assert guard.judge(head("Host : evil.example"))[0] == "refuse"


@given(st.binary(max_size=300))
def test_anything_is_judged(data: bytes) -> None:
    """Whatever comes, there is a verdict."""
    assert Guard(5006).judge(data)[0] in ("more", "pass", "refuse")


@given(st.integers(0, 60))
def test_beginnings_are_waited_for(count: int) -> None:
    """A head that is cut anywhere is never judged early."""
    whole = head("Host: evil.example:5006", "Accept: */*")
    assert Guard(5006).judge(whole[: min(count, len(whole) - 1)])[0] == "more"


def ask(port: int, *lines: str, path: str) -> str:
    """Send a request as it is written; gives the whole answer."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as sock:
        sock.sendall(head(*lines, "Connection: close", path=path))
        return conformance.read_all(sock).decode(errors="replace")


def test_rebound_name_gets_no_page(machine: Machine) -> None:
    """A page whose name leads here by DNS rebinding gets a 403, and nothing reaches the server (row 60)."""
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
        assert len([name for name in threads if "pump" in name]) == 1
        for sock in idle:
            sock.close()


def test_idle_connections_are_bounded(machine: Machine) -> None:
    """More connections that say nothing than a browser ever has: the oldest go."""
    app = apps.put(machine, "sliders.py", apps.SLIDER)
    with tunnel_to(machine, app) as tunnel:
        idle = [socket.create_connection(("127.0.0.1", tunnel.local_port), timeout=20) for _ in range(300)]
        with pytest.raises(ConnectionResetError):
            idle[0].recv(1)
        apps.drive(tunnel.url)
        for sock in idle:
            sock.close()
