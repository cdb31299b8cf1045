"""Files of BokehJS come from this machine once a server has sent them; all else goes to the server."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from beds import until
from bokeh_ssh._core.backoff import Attempts
from bokeh_ssh._core.this_machine.private_folder import find_folder
from bokeh_ssh._forwarding import static_cache, static_store
from bokeh_ssh._forwarding.filtered_relay import FilteredRelay
from bokeh_ssh._forwarding.http_requests import Inspector, Opened
from bokeh_ssh._forwarding.listener import bind, open_acceptor
from bokeh_ssh._forwarding.request_filter import RequestFilter
from bokeh_ssh._forwarding.static_cache import StaticCache
from bokeh_ssh._forwarding.static_requests import StaticFile, StaticRequest, write_static_head
from bokeh_ssh._forwarding.static_store import StaticStore, Usage
from connections import connected
from static_bed import LOOPBACK, Reader, led, request

_PATIENCE = 20.0
FILE = bytes(range(256)) * 4000  # a megabyte: more than a socket takes at once
SHA512 = hashlib.sha512(FILE).hexdigest()
PATH = f"/static/js/bokeh.min.js?v={SHA512}"


@dataclass
class Server:
    """A server whose answers are as a test wants them; it notes what it was asked.

    :ivar answer: of every request for a static file; others are answered with their target
    :ivar more: a header of theirs
    :ivar go_on: what ``/slow`` waits for
    """

    answer: bytes = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(FILE), FILE)
    more: str = ""
    go_on: threading.Event = field(default_factory=threading.Event)
    asked: list[str] = field(default_factory=list)
    connections: int = 0
    port: int = 0

    def serve(self, listener: socket.socket) -> None:
        """Serve until the listener is closed."""
        while True:
            try:
                sock, _ = listener.accept()
            except OSError:
                return
            self.connections += 1
            threading.Thread(target=self._talk, args=(sock,), daemon=True).start()

    def _talk(self, sock: socket.socket) -> None:
        held = b""
        with sock, contextlib.suppress(OSError):
            while True:
                while b"\r\n\r\n" in held:
                    head, _, held = held.partition(b"\r\n\r\n")
                    target = head.split()[1].decode()
                    self.asked.append(target)
                    assert target != "/slow" or self.go_on.wait(_PATIENCE)
                    said = f"HTTP/1.1 200 OK\r\n{self.more}Content-Length: {len(target)}\r\n\r\n{target}"
                    sock.sendall(self.answer if "static" in target else said.encode())
                data = sock.recv(65536)
                if not data:
                    return
                held += data


@dataclass
class Bed:
    """A server, and a port here that leads to it over SSH, with a cache."""

    server: Server
    open: Callable[[], contextlib.AbstractContextManager[int]]
    store: StaticStore
    told: list[str]

    def kept(self, count: int) -> None:
        """Wait until as many files are kept."""
        until(lambda: self.store.usage().files == count, what=f"{count} files to be kept")


@pytest.fixture
def bed(embedded: Any) -> Iterator[Bed]:
    """Give a server and what leads to it."""
    told: list[str] = []
    with contextlib.ExitStack() as stack:
        server = Server()
        listener = stack.enter_context(socket.create_server((LOOPBACK, 0)))
        server.port = listener.getsockname()[1]
        threading.Thread(target=server.serve, args=(listener,), daemon=True).start()
        stack.callback(listener.shutdown, socket.SHUT_RDWR)
        machine, store = embedded(), StaticStore(find_folder("static"))

        def lead() -> contextlib.AbstractContextManager[int]:
            return led(machine, server.port, store, told.append)

        yield Bed(server, lead, store, told)


def test_second_request_is_answered_here(bed: Bed) -> None:
    """What one tunnel has brought, another sends without its server, and without a channel to it."""
    with bed.open() as port, Reader(port) as reader:
        assert reader.ask(request(PATH))[::2] == (200, FILE)
        bed.kept(1)
        assert reader.ask(request(PATH))[::2] == (200, FILE)
        assert reader.ask(request("/page"))[2] == b"/page"
    assert bed.server.asked == [PATH, "/page"]
    before = bed.server.connections
    with bed.open() as port, Reader(port) as reader:
        for prefix in ("", "/some/where"):
            status, headers, body = reader.ask(request(prefix + PATH, "Connection: keep-alive"))
            assert (status, body) == (200, FILE)
            assert headers["content-type"] == "text/javascript"
            assert headers["etag"] == f'"{SHA512}"'
            assert headers["cache-control"] == "max-age=315360000"
        assert bed.server.connections == before
        assert reader.ask(request("/page"))[2] == b"/page"
        assert reader.ask(request(PATH))[::2] == (200, FILE)  # also where there is a channel
        assert reader.ask(request("/page"))[2] == b"/page"
    assert bed.server.asked == [PATH, "/page", "/page", "/page"]
    assert bed.told == []


def test_file_with_other_content_is_passed_and_told_once(bed: Bed) -> None:
    """A file that is not what its address says reaches the browser as it is, and is not kept."""
    wrong = FILE[:-1] + b"!"
    bed.server.answer = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(wrong), wrong)
    with bed.open() as port:
        for _ in range(3):
            with Reader(port) as reader:
                assert reader.ask(request(PATH))[::2] == (200, wrong)
        until(lambda: bed.told, what="it to be told")
    assert bed.server.asked == [PATH] * 3
    assert len(bed.told) == 1
    assert "bokeh.min.js" in bed.told[0]
    assert bed.store.usage() == Usage(0, 0)
    assert list(bed.store.folder.iterdir()) == []


@pytest.mark.parametrize(
    "head",
    [
        "404 Not Found\r\nContent-Length: {}",
        "500 Oh\r\nContent-Length: {}",
        "302 Found\r\nLocation: /elsewhere\r\nContent-Length: {}",
        "206 Partial Content\r\nContent-Range: bytes 0-1/2\r\nContent-Length: {}",
        "203 Other\r\nContent-Length: {}",
        "200 OK\r\nContent-Encoding: gzip\r\nContent-Length: {}",
        "200 OK\r\nCache-Control: no-store\r\nContent-Length: {}",
        "200 OK\r\nSet-Cookie: a=b\r\nContent-Length: {}",
    ],
)
def test_other_answers_are_passed_as_they_are(bed: Bed, head: str) -> None:
    """What is not the file, or must not be kept, is not kept, although its content has that hash."""
    bed.server.answer = f"HTTP/1.1 {head.format(len(FILE))}\r\n\r\n".encode() + FILE
    with bed.open() as port, Reader(port) as reader:
        for _ in range(2):
            assert reader.ask(request(PATH))[::2] == (int(head[:3]), FILE)
        assert reader.ask(request("/page"))[2] == b"/page"
    assert bed.server.asked == [PATH, PATH, "/page"]
    assert bed.store.usage() == Usage(0, 0)


def test_answer_that_breaks_off_is_not_kept(bed: Bed) -> None:
    """Of a file whose connection ends too early nothing stays."""
    bed.server.answer = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(FILE), FILE[:-1])
    with bed.open() as port:
        with Reader(port) as reader:
            reader.sock.sendall(request(PATH))
            assert len(reader._file.read(len(FILE))) == len(FILE)
        with Reader(port) as reader:  # what began to be kept has ended before this is
            bed.server.answer = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(FILE), FILE)
            assert reader.ask(request(PATH))[2] == FILE
            bed.kept(1)
        until(lambda: len(list(bed.store.folder.iterdir())) == 1, what="nothing else to be there")
    assert bed.told == []


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no pipes with names")
@pytest.mark.parametrize("harm", ["shorter", "longer", "changed", "empty", "a folder", "a link", "a pipe"])
def test_broken_file_is_made_anew(bed: Bed, harm: str) -> None:
    """A file that is not what it should be is not sent: the server is asked, and it is kept again."""
    with bed.open() as port, Reader(port) as reader:
        reader.ask(request(PATH))
        bed.kept(1)
        path = next(bed.store.folder.iterdir())
        if harm in ("a folder", "a link", "a pipe"):
            kept = path.rename(path.with_name("other"))
            if harm == "a link":
                path.symlink_to(kept)
            elif harm == "a pipe":
                os.mkfifo(path)
            else:
                path.mkdir()
        else:
            harmed = {"shorter": FILE[:-1], "longer": FILE + b"!", "changed": b"!" + FILE[1:], "empty": b""}
            path.write_bytes(harmed[harm])
        assert reader.ask(request(PATH))[::2] == (200, FILE)
        assert bed.server.asked == [PATH] * 2
        if harm != "a folder":
            until(lambda: path.is_file() and not path.is_symlink(), what="it to be kept again")
            until(lambda: path.read_bytes() == FILE, what="all of it to be kept again")
            assert reader.ask(request(PATH))[::2] == (200, FILE)
            assert bed.server.asked == [PATH] * 2


ODD = {
    "HEAD": request(PATH, method="HEAD"),
    "POST": request(PATH, "Content-Length: 0", method="POST"),
    "range": request(PATH, "Range: bytes=0-9"),
    "if-range": request(PATH, 'If-Range: "x"'),
    "date": request(PATH, "If-Modified-Since: Sat, 28 Nov 2037 20:33:24 GMT"),
    "two tags": request(PATH, 'If-None-Match: "a"', 'If-None-Match: "b"'),
    "any": request(PATH, "If-None-Match: *"),
    "no tag": request(PATH, f"If-None-Match: {SHA512}"),
    "1.0": request(PATH, version="1.0"),
    "close": request(PATH, "Connection: close"),
    "reload": request(PATH, "Cache-Control: no-cache"),
    "old reload": request(PATH, "Pragma: no-cache"),
    "absolute": request(f"http://localhost{PATH}"),
    "upper case": request(PATH.replace(SHA512, SHA512.upper())),
    "other name": request(PATH.replace("bokeh.min", "app")),
    "not below js": request(PATH.replace("/js/", "/")),
    "dots": request(f"/static/../{PATH}"),
    "escaped": request(f"/a%2fb{PATH}"),
    "two slashes": request(f"/{PATH}"),
    "more": request(f"{PATH}&a=b"),
    "other hash": request(PATH.replace(SHA512, hashlib.sha512(b"").hexdigest())),
    "other file": request(PATH.replace("bokeh.min", "bokeh-gl.min")),
    "none": request(PATH.partition("?")[0]),
    "expects": request(PATH, "Expect: 100-continue"),
}


@pytest.mark.parametrize("kind", ODD)
def test_whatever_else_is_asked_goes_to_the_server(bed: Bed, kind: str) -> None:
    """Only the plain request of a browser is answered here, by itself and behind an answer from here."""
    with bed.open() as port:
        with Reader(port) as reader:
            reader.ask(request(PATH))
            bed.kept(1)
        bed.server.answer = b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"
        for before in (0, 1):
            asked = len(bed.server.asked)
            with Reader(port) as reader:
                for _ in range(before):
                    assert reader.ask(request(PATH))[2] == FILE
                reader.sock.sendall(ODD[kind])
                until(lambda: len(bed.server.asked) == asked + 1, what="the server to be asked")  # noqa: B023


@pytest.mark.parametrize(
    ("value", "status"),
    [
        (f'"{SHA512}"', 304),
        (f'W/"{SHA512}"', 304),
        (f'"a", W/"{SHA512}"', 304),
        ('"a"', 200),
        ('W/"a","b"', 200),
    ],
)
def test_browser_that_has_it_is_told_so(bed: Bed, value: str, status: int) -> None:
    """A request with the file's tag is answered as Bokeh does, also with a date beside it."""
    with bed.open() as port, Reader(port) as reader:
        reader.ask(request(PATH))
        bed.kept(1)
        lines = [f"If-None-Match: {value}", "If-Modified-Since: Sat, 28 Nov 2037 20:33:24 GMT"]
        for _ in range(2):
            assert reader.ask(request(PATH, *lines))[0] == status
            lines.reverse()
        assert reader.ask(request("/page"))[2] == b"/page"
    assert bed.server.asked == [PATH, "/page"]


@pytest.mark.parametrize("pieces", ["one", "bytes"])
def test_requests_in_one_packet_are_answered_in_order(bed: Bed, pieces: str) -> None:
    """Whether answers come from here or from the server, each stands where its request did."""
    targets = [
        PATH,
        PATH,
        "/one",
        PATH,
        PATH,
        "/two",
        "/three",
        PATH,
        PATH.replace("bokeh.min", "bokeh-gl.min"),
    ]
    with bed.open() as port:
        with Reader(port) as reader:
            reader.ask(request(PATH))
            bed.kept(1)
        for start in range(len(targets)):
            with Reader(port) as reader:
                data = b"".join(map(request, targets[start:]))
                for at in range(0, len(data), len(data) if pieces == "one" else 1):
                    reader.sock.sendall(data[at : at + (len(data) if pieces == "one" else 1)])
                for target in targets[start:]:
                    assert reader.read()[2] == (FILE if "static" in target else target.encode())


def test_request_waits_for_the_answer_before_it(bed: Bed) -> None:
    """What is asked while the server works on something else is answered behind that."""
    with bed.open() as port, Reader(port) as reader:
        reader.ask(request(PATH))
        bed.kept(1)
        reader.sock.sendall(request("/slow"))
        until(lambda: "/slow" in bed.server.asked, what="the server to be asked")
        reader.sock.sendall(request(PATH))
        reader.sock.settimeout(0.2)
        with pytest.raises(TimeoutError):
            reader.sock.recv(1)
        reader.sock.settimeout(_PATIENCE)
        bed.server.go_on.set()
        assert reader.read()[2] == b"/slow"
        assert reader.read()[2] == FILE


def test_refused_request_is_not_answered_from_here(bed: Bed) -> None:
    """A page of another site gets no file, whether it is kept or not, also behind a request that does."""
    foreign = request(PATH).replace(b"localhost", b"evil.example")
    with bed.open() as port:
        with Reader(port) as reader:
            reader.ask(request(PATH))
            bed.kept(1)
        for before in (b"", request(PATH)):
            with Reader(port) as reader:
                reader.sock.sendall(before + foreign)
                if before:
                    assert reader.read()[2] == FILE
                assert reader.read()[0] == 403
                assert reader.sock.recv(1) == b""
    assert bed.server.asked == [PATH]


def test_client_may_be_slow_or_gone(bed: Bed) -> None:
    """Who takes nothing of an answer from here keeps nobody waiting, gets all of it in the end, or leaves."""
    with bed.open() as port, contextlib.ExitStack() as stack:
        first = stack.enter_context(Reader(port))
        first.ask(request(PATH))
        bed.kept(1)
        slow = [stack.enter_context(Reader(port)) for _ in range(5)]
        for reader in slow:
            reader.sock.sendall(request(PATH) * 20)
        gone = Reader(port)
        with gone:
            gone.sock.sendall(request(PATH) * 20)
        for reader in (first, Reader(port)):
            with reader:
                assert reader.ask(request(PATH))[2] == FILE
                assert reader.ask(request("/page"))[2] == b"/page"
        for reader in slow:
            for _ in range(20):
                assert reader.read()[2] == FILE
            assert reader.ask(request("/page"))[2] == b"/page"


def test_disk_that_does_not_answer_delays_one_request(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the store does not say in time, the server does; those that follow do not wait for it."""
    monkeypatch.setattr(static_cache, "_PATIENCE", 0.3)
    load, go_on = StaticStore.load, threading.Event()
    with bed.open() as port, Reader(port) as reader:
        reader.ask(request(PATH))
        bed.kept(1)

        def hang(store: StaticStore, file: Any) -> bytes | None:
            assert go_on.wait(_PATIENCE)
            return load(store, file)

        monkeypatch.setattr(StaticStore, "load", hang)
        for _ in range(3):
            assert reader.ask(request(PATH))[::2] == (200, FILE)
        with Reader(port) as other:
            assert other.ask(request(PATH))[::2] == (200, FILE)
        assert bed.server.asked == [PATH] * 5
        go_on.set()
        until(lambda: _is_answered_here(bed, reader), what="the store to be asked again")


def _is_answered_here(bed: Bed, reader: Reader) -> bool:
    before = len(bed.server.asked)
    assert reader.ask(request(PATH))[2] == FILE
    return len(bed.server.asked) == before


@pytest.mark.parametrize("fault", ["begin", "write", "keep"])
def test_full_disk_harms_nobody(bed: Bed, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    """Where nothing can be written, files pass as ever, and nothing is left of what was begun."""
    failed = threading.Event()

    def fail(*_: object) -> None:
        failed.set()
        raise OSError(errno.ENOSPC, "No space left on device")

    owner = static_store.StaticWriter if fault == "write" else StaticStore
    monkeypatch.setattr(owner, fault, fail)
    with bed.open() as port, Reader(port) as reader:
        for _ in range(2):
            assert reader.ask(request(PATH))[::2] == (200, FILE)
        assert failed.wait(_PATIENCE)
    assert bed.server.asked == [PATH] * 2
    assert bed.told == []
    assert not bed.store.folder.exists() or list(bed.store.folder.iterdir()) == []


def test_disk_that_fills_up_midway_harms_nobody(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the system takes a part of a file and no more, it passes as ever; what was begun is removed, and
    the next one is kept once there is room."""
    resource = pytest.importorskip("resource")  # Windows has none
    failed, write = threading.Event(), static_store.StaticWriter.write

    def note(writer: static_store.StaticWriter, data: bytes) -> None:
        try:
            write(writer, data)
        except OSError:
            failed.set()
            raise

    monkeypatch.setattr(static_store.StaticWriter, "write", note)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with bed.open() as port, Reader(port) as reader:
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, before[1]))
        try:
            assert reader.ask(request(PATH))[::2] == (200, FILE)
            assert failed.wait(_PATIENCE)
            until(lambda: list(bed.store.folder.iterdir()) == [], what="what was begun to be gone")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert reader.ask(request(PATH))[::2] == (200, FILE)
        bed.kept(1)
        assert _is_answered_here(bed, reader)
    assert bed.told == []


def test_store_that_is_cleared_meanwhile(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    """`bokeh-ssh cache --clear` of another process, also while a file is received, costs what it removes: the
    files come from the server, whole, and are kept again."""
    begun, cleared = threading.Event(), threading.Event()
    write = static_store.StaticWriter.write

    def wait(writer: static_store.StaticWriter, data: bytes) -> None:
        write(writer, data)
        begun.set()
        assert cleared.wait(_PATIENCE)

    def clear() -> str:
        words = [sys.executable, "-m", "bokeh_ssh", "cache", "--clear", "--json"]
        return subprocess.run(words, check=True, capture_output=True, text=True, timeout=60).stdout

    monkeypatch.setattr(static_store.StaticWriter, "write", wait)
    with bed.open() as port, Reader(port) as reader:
        assert reader.ask(request(PATH))[::2] == (200, FILE)
        assert begun.wait(_PATIENCE)
        clear()
        assert list(bed.store.folder.iterdir()) == []
        cleared.set()
        assert reader.ask(request(PATH))[::2] == (200, FILE)
        bed.kept(1)
        assert _is_answered_here(bed, reader)
        assert str(len(FILE)) in clear()
        assert not _is_answered_here(bed, reader)
        bed.kept(1)
    assert bed.told == []


def test_flood_is_not_held_in_memory(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that comes faster than it can be written is given up for the store, and reaches the browser."""
    monkeypatch.setattr(static_cache, "_MOST_WAITING", 100_000)
    begin, go_on = StaticStore.begin, threading.Event()

    def hang(store: StaticStore, file: Any) -> Any:
        assert go_on.wait(_PATIENCE)
        return begin(store, file)

    monkeypatch.setattr(StaticStore, "begin", hang)
    with bed.open() as port, Reader(port) as reader:
        assert reader.ask(request(PATH))[::2] == (200, FILE)
        go_on.set()
        assert reader.ask(request("/page"))[2] == b"/page"
    assert not bed.store.folder.exists() or list(bed.store.folder.iterdir()) == []


def test_large_file_is_not_kept(bed: Bed) -> None:
    """A file of 50 MB passes, and is not kept."""
    large = bytes(50_000_000)
    path = PATH.replace(SHA512, hashlib.sha512(large).hexdigest())
    bed.server.answer = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(large), large)
    with bed.open() as port, Reader(port) as reader:
        assert reader.ask(request(path))[2] == large
        assert reader.ask(request(path))[2] == large
    assert bed.server.asked == [path] * 2
    assert not bed.store.folder.exists()


def test_answer_goes_on_over_the_next_line(embedded: Any) -> None:
    """A client that has a part of an answer from here gets the rest, although the line was lost meanwhile."""
    store, machine = StaticStore(find_folder("static")), embedded()
    large = FILE * 12  # more than the system holds for a client
    sha512 = hashlib.sha512(large).hexdigest()
    writer = store.begin(StaticFile("bokeh.min.js", sha512))
    writer.write(large)
    assert writer.finish()
    with contextlib.ExitStack() as stack:
        attempts = Attempts()
        acceptor = open_acceptor(stack, bind(0), lambda _: None, True, attempts)
        stack.callback(attempts.stop)
        cache = StaticCache(store, lambda _: None)
        stack.callback(cache.close)
        reader = None
        for turn in range(2):
            with connected(machine) as connection:
                checks = RequestFilter(acceptor.port)
                with acceptor.forwarding(connection, (LOOPBACK, 1), checks, None, cache):
                    if reader is None:
                        reader = stack.enter_context(Reader(acceptor.port))
                        reader.sock.sendall(request(PATH.replace(SHA512, sha512)))
                        assert reader.sock.recv(1, socket.MSG_PEEK) == b"H"
                    if turn:
                        assert reader.read()[::2] == (200, large)


@pytest.mark.parametrize("who", ["server", "client", "old client"])
def test_nothing_is_answered_behind_the_last_answer(bed: Bed, who: str) -> None:
    """Where the server, or the client, has said that the connection ends, nothing from here follows."""
    lines = ["Connection: x, close"] if who == "client" else []
    bed.server.more = "Connection: close\r\n" if who == "server" else ""
    with bed.open() as port:
        with Reader(port) as reader:
            reader.ask(request(PATH))
            bed.kept(1)
        with Reader(port) as reader:
            version = "1.0" if who == "old client" else "1.1"
            assert reader.ask(request("/page", *lines, version=version))[2] == b"/page"
            reader.sock.sendall(request(PATH))
            until(lambda: bed.server.asked == [PATH, "/page", PATH], what="the server to be asked")


class Still:
    """A loop that does at once what it is asked to, and a stream that takes all and counts its credit."""

    def __init__(self) -> None:
        self.chunk = memoryview(bytearray(1000))
        self.sent = b""
        self.credited = 0

    def post(self, call: Callable[[], None]) -> None:
        """Do it."""
        call()

    def later(self, delay: float, call: Callable[[], None]) -> None:
        """Forget it."""

    def watch(self, sock: socket.socket, old: int, new: int, call: Callable[[int], None]) -> None:
        """Watch nothing."""

    def writable(self) -> int:
        """Take any number of bytes."""
        return 1000

    def send(self, data: memoryview) -> None:
        """Keep what is sent."""
        self.sent += data

    def credit(self, count: int) -> None:
        """Count it."""
        self.credited += count


def test_far_side_gets_credit_for_its_own_bytes_alone() -> None:
    """What is sent from here does not let the server send more than the client has taken of what it sent."""
    still: Any = Still()

    class Cache:
        record = None

        def look_up(self, request: StaticRequest, done: Callable[[Any], None]) -> None:
            done([memoryview(write_static_head(request, len(FILE))), memoryview(FILE)])

    inspector = Inspector(RequestFilter(5006), on_page=lambda _: None)
    page = b"HTTP/1.1 200 OK\r\nContent-Length: 300000\r\n\r\n" + bytes(300_000)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        cache: Any = Cache()
        relay: Any = FilteredRelay(still, ours, still, None, Opened(inspector, b""), cache)
        relay.start()
        relay._send_on(memoryview(request(PATH)))
        assert relay._files.due > 0  # it does not fit
        relay._send_on(memoryview(request("/page")))
        assert still.sent == request("/page")
        relay.on_data([memoryview(page)])
        while relay._backlog:
            theirs.recv(1 << 20)
            relay._write_backlog()
        assert still.credited == len(page)


def test_those_that_ask_at_once_share_what_was_read(bed: Bed) -> None:
    """A file that many clients take slowly is in memory once."""
    with bed.open() as port, Reader(port) as reader:
        reader.ask(request(PATH))
        bed.kept(1)
    cache = StaticCache(bed.store, bed.told.append)
    try:
        found: list[Any] = []
        still: Any = Still()
        for _ in range(2):
            cache.look_up(still, StaticFile("bokeh.min.js", SHA512), found.append)
        until(lambda: len(found) == 2, what="both")
        assert found[0] == FILE
        assert found[0] is found[1]
    finally:
        cache.close()
