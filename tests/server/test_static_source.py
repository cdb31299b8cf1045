"""Files of BokehJS come compressed while a server starts, before a browser asks for them."""

from __future__ import annotations

import base64
import hashlib
import re
import socket
import threading
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

import apps
from beds import Machine, until
from bokeh_ssh import Event, Launched
from bokeh_ssh._core.backoff import Attempts
from bokeh_ssh._core.this_machine.private_folder import find_folder
from bokeh_ssh._forwarding.listener import bind, open_acceptor
from bokeh_ssh._forwarding.request_filter import RequestFilter
from bokeh_ssh._forwarding.static_cache import StaticCache
from bokeh_ssh._forwarding.static_store import StaticStore
from bokeh_ssh._server.static_source import StaticSource
from bokeh_ssh._ssh.connection import Connection
from bokeh_ssh._tunnels import tunnel_parts
from connections import connected
from direct_tunnels import tunnel_to
from fakes import Listener
from static_bed import Reader, request

LOOPBACK = "127.0.0.1"
CONTENT = b"bokeh = 1\n" * 1000
SHA512 = hashlib.sha512(CONTENT).hexdigest()
NAME = "bokeh.min.js"


@pytest.fixture
def far(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Take every line for a slow one, with nothing kept yet."""
    monkeypatch.setattr(tunnel_parts, "_FAR", -1.0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def kept() -> set[str]:
    """Return what is in the store."""
    return StaticStore(find_folder("static")).hashes()


@pytest.mark.usefixtures("far")
def test_files_are_here_before_the_page(sshd: Callable[..., Machine]) -> None:
    """All that a page loads comes while the server starts, as the server would send it; where all of it
    is here already, nothing is sent."""
    machine = sshd()
    app = apps.put(machine, "sliders.py", apps.SLIDER)
    with tunnel_to(machine, app, isolate=False) as tunnel:
        page = apps.get(tunnel.url)
        wanted = set(re.findall(r"bokeh[a-z-]*\.min\.js\?v=([0-9a-f]{128})", page))
        assert len(wanted) >= 4
        until(lambda: kept() >= wanted, what="the files")
        sources = re.findall(r'src="(static/js/bokeh[^"]*)"', page)
        for source in sources:
            with urllib.request.urlopen(f"http://localhost:{tunnel.local_port}/{source}") as answer:
                assert hashlib.sha512(answer.read()).hexdigest() == source[-128:]
    before = {path: path.stat().st_mtime_ns for path in find_folder("static").iterdir()}
    with tunnel_to(machine, app, isolate=False):
        pass
    assert {path: path.stat().st_mtime_ns for path in find_folder("static").iterdir()} == before


def test_near_line_is_left_alone(
    sshd: Callable[..., Machine], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """On a near line a page is there at once, and nothing is sent ahead."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tunnel_parts, "_FAR", 60.0)  # this machine may be busy
    machine = sshd()
    with tunnel_to(machine, apps.put(machine, "sliders.py", apps.SLIDER), isolate=False):
        names = {thread.name for thread in threading.enumerate()}
    assert "bokeh-ssh static source" not in names
    assert kept() == set()


@pytest.mark.parametrize(
    ("far", "words", "agreed", "compressed"),
    [
        (-1.0, {"signed": False}, True, True),
        (-1.0, {}, False, True),  # it listens on a socket, and is packed
        (60.0, {}, False, False),
    ],
    ids=["port", "socket", "near"],
)
def test_websockets_are_compressed_where_the_line_is_slow(
    sshd: Callable[..., Machine],
    monkeypatch: pytest.MonkeyPatch,
    far: float,
    words: dict[str, Any],
    agreed: bool,
    compressed: bool,
) -> None:
    """Bokeh is told to, and says so to a page, unless all that it sends is packed; neither is so on a near
    line, and the event says which."""
    monkeypatch.setattr(tunnel_parts, "_FAR", far)
    machine, events = sshd(), list[Event]()
    app = apps.put(machine, "sliders.py", apps.SLIDER)
    with tunnel_to(machine, app, isolate=False, cache=False, on_event=events.append, **words) as tunnel:
        message, extensions = apps.exchange(tunnel.url, apps.get(tunnel.url))
    assert message["msgtype"] == "ACK"
    assert extensions.startswith("permessage-deflate") == agreed
    assert [event.compressed for event in events if isinstance(event, Launched)] == [compressed]


@contextmanager
def cached(machine: Machine, tmp_path: Path) -> Iterator[tuple[int, StaticCache, list[bytes]]]:
    """Lead a port to a server that says "theirs" to all, with a cache; gives also what that was asked."""
    asked: list[bytes] = []

    def answer(sock: socket.socket, number: int) -> None:
        while head := sock.recv(65536):
            asked.append(head)
            sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\ntheirs")

    with ExitStack() as stack:
        port = stack.enter_context(Listener(answer)).port
        connection = stack.enter_context(connected(machine))
        cache = StaticCache(StaticStore(tmp_path / "kept" / "static"), lambda text: None)
        stack.callback(cache.close)
        acceptor = open_acceptor(stack, bind(0), lambda text: None, True, Attempts())
        checks = RequestFilter(acceptor.port)
        stack.enter_context(acceptor.forwarding(connection, (LOOPBACK, port), checks, None, cache))
        yield acceptor.port, cache, asked


def test_page_waits_for_a_file_that_is_on_its_way(embedded: Callable[..., Machine], tmp_path: Path) -> None:
    """It is not asked for a second time: the line has enough to do."""
    with cached(embedded(), tmp_path) as (port, cache, asked), Reader(port) as early, Reader(port) as other:
        expected = cache.expect(NAME, SHA512)
        assert expected
        early.sock.sendall(request(f"/static/js/{NAME}?v={SHA512}"))
        until(lambda: list(cache._expected.values()) != [[]], what="somebody to wait")
        assert other.ask(request("/app"))[2] == b"theirs"  # the control: others are not held up
        expected.write(memoryview(CONTENT))
        expected.finish()
        assert early.read()[2] == CONTENT
        assert len(asked) == 1


@pytest.mark.parametrize("how", ["broken off", "another content", "stalled"])
def test_file_that_does_not_come(
    embedded: Callable[..., Machine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """Who waits for it is answered by the server, whatever has become of it."""
    if how == "stalled":
        monkeypatch.setattr("bokeh_ssh._forwarding.static_cache._EXPECTED_PATIENCE", 0.1)
    with cached(embedded(), tmp_path) as (port, cache, asked), Reader(port) as reader:
        expected = cache.expect(NAME, SHA512)
        assert expected
        reader.sock.sendall(request(f"/static/js/{NAME}?v={SHA512}"))
        if how != "stalled":
            until(lambda: list(cache._expected.values()) != [[]], what="somebody to wait")
        if how == "broken off":
            expected.write(memoryview(CONTENT[:10]))
            expected.discard()
        elif how == "another content":
            expected.write(memoryview(b"x" * len(CONTENT)))
            expected.finish()
        assert reader.read()[2] == b"theirs"
        assert len(asked) == 1
        assert cache.hashes() == set()


@pytest.mark.parametrize(
    "name", ["../../bokeh.js", "/etc/bokeh.js", "bokeh/../x.js", "app.js", "bokeh.min.js\n", ""]
)
def test_other_names_are_not_kept(tmp_path: Path, name: str) -> None:
    """A machine cannot choose where its files go."""
    cache = StaticCache(StaticStore(tmp_path / "kept" / "static"), lambda text: None)
    assert cache.expect(name, SHA512) is None
    assert cache.expect(NAME, SHA512[:-1]) is None
    cache.close()


def _data(content: bytes) -> str:
    return base64.b64encode(zlib.compress(content)).decode("ascii")


@pytest.mark.parametrize(
    "message",
    [
        {"event": "files"},
        {"event": "files", "files": 7},
        {"event": "files", "files": [[NAME]]},
        {"event": "files", "files": [[7, None]]},
        {"event": "file", "sha512": [], "data": _data(CONTENT)},
        {"event": "file", "sha512": SHA512},
        {"event": "file", "sha512": SHA512, "data": "no base64"},
        {"event": "file", "sha512": SHA512, "data": base64.b64encode(b"no zlib").decode("ascii")},
        {"event": "file", "sha512": SHA512, "data": _data(CONTENT[:-1])},
        {"event": "file", "sha512": SHA512, "data": _data(bytes(20 << 20))},
        {"event": "file", "sha512": "0" * 128, "data": _data(CONTENT)},
    ],
    ids=str,
)
def test_messages_of_another_shape(message: dict[str, Any], tmp_path: Path) -> None:
    """Nothing that the far side says ends more than the file that it is about, or is kept unchecked."""
    cache = StaticCache(StaticStore(tmp_path / "kept" / "static"), lambda text: None)
    connection: Connection = None  # type: ignore[assignment]  # nothing is asked here
    source = StaticSource(connection, cache.hashes, cache.expect)
    source._receive({"event": "files", "files": [[NAME, SHA512]]})
    source._receive(message)
    cache.close()
    assert cache.hashes() == set()


def test_closing_ends_it_at_once(sshd: Callable[..., Machine], tmp_path: Path) -> None:
    """A tunnel that is closed does not wait for files that nobody will ask for."""
    taken = threading.Event()
    with connected(sshd()) as connection:
        source = StaticSource(connection, set, lambda name, sha512: taken.set())
        source.start("/bin/sh", "/")  # which is no Python, so that nothing comes
        source.close()
        assert source._thread
        assert not source._thread.is_alive()
    assert not taken.is_set()
