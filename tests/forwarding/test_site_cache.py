"""What a server calls immutable is kept for it alone; what has its hash as ETag, with its leave each time."""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from beds import Machine, until
from bokeh_ssh import DirectTunnel, LocalForward, UsageError
from bokeh_ssh._core.this_machine.private_folder import find_folder
from bokeh_ssh._forwarding import site_cache
from bokeh_ssh._forwarding.spare_channels import SPARE_OF_PAGE
from bokeh_ssh._forwarding.static_requests import Address, Lasting
from bokeh_ssh._forwarding.static_store import StaticStore
from static_bed import Reader, led, request

FILE = bytes(range(256)) * 2000
TAG = f'"{hashlib.sha512(FILE).hexdigest()}"'
LASTING = "/static/lab/main.efd36b46f3b45eb8.js?v=efd36b46f3b45eb8"
EXTENSION = "/some/static/extensions/panel/bundled/a@^1.0/dist/a.min.js"
IMMUTABLE = "public, max-age=31536000, immutable"


@dataclass
class Site:
    """A server with one file at every address that has "static" in it.

    :ivar headers: in the answers with the file
    :ivar asked: what it was asked: method, target, and the status of its answer
    :ivar hangs: at ``HEAD``
    :ivar connections: how many it has taken
    """

    content: bytes = FILE
    headers: dict[str, str] = field(default_factory=lambda: {"Content-Type": "text/javascript"})
    asked: list[tuple[str, str, int]] = field(default_factory=list)
    hangs: bool = False
    closes: bool = False
    software: str = "TornadoServer/6"
    connections: int = 0
    go_on: threading.Event = field(default_factory=threading.Event)

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        """Answer one request."""
        if handler.command == "HEAD" and self.hangs:
            self.go_on.wait(20)
        tags = handler.headers.get("If-None-Match", "")
        tag = self.headers.get("ETag", "")
        status = 304 if tag and tag in tags else 200
        content = self.content if "static" in handler.path else handler.path.encode()
        self.asked.append((handler.command, handler.path, status))
        handler.send_response(status)
        for name, value in self.headers.items() if "static" in handler.path else ():
            if status == 200 or name != "Content-Type":
                handler.send_header(name, value)
        if status == 200:
            handler.send_header("Content-Length", str(len(content)))
        if self.closes:
            handler.send_header("Connection", "close")
        handler.end_headers()
        if status == 200 and handler.command == "GET":
            handler.wfile.write(content)

    @property
    def brief(self) -> list[tuple[str, int]]:
        """What it was asked, without the targets."""
        return [(method, status) for method, _, status in self.asked]


@dataclass
class Bed:
    """A site, and a port here that leads to it over SSH, with a cache."""

    site: Site
    port: int
    machine: Machine
    store: StaticStore

    def open(self, name: str = "here") -> contextlib.AbstractContextManager[int]:
        """Lead there; gives the port here."""
        told: list[str] = []
        return led(self.machine, self.port, self.store, told.append, name)

    def kept(self, count: int = 1) -> None:
        """Wait until as many files are kept."""
        until(lambda: self.store.usage().files == count, what=f"{count} files to be kept")


@pytest.fixture
def bed(embedded: Any) -> Iterator[Bed]:
    """Give a server and what leads to it."""
    site = Site()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        do_GET = do_HEAD = lambda self: site.answer(self)  # noqa: N815
        log_message = lambda *_: None  # noqa: E731
        version_string = lambda _: site.software  # noqa: E731

        def setup(self) -> None:
            site.connections += 1
            super().setup()

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        server.block_on_close = False
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield Bed(site, server.server_port, embedded(), StaticStore(find_folder("static")))
        site.go_on.set()
        server.shutdown()


def ask_twice(bed: Bed, target: str, *lines: str) -> None:
    """Ask twice, and see to it that what is to be kept of the first is kept; each has to have the content."""
    for _ in range(2):
        with bed.open() as port, Reader(port) as reader:
            assert reader.ask(request(target, *lines))[::2] == (200, bed.site.content)


def test_immutable_file_comes_from_here_the_next_time(bed: Bed) -> None:
    """Its server is not asked for it again, whichever tunnel it is; its head is as it was, with an age."""
    bed.site.headers |= {"Cache-Control": IMMUTABLE, "X-Other": "a", "Connection": "x-hop", "X-Hop": "1"}
    with bed.open() as port, Reader(port) as reader:
        _, before, _ = reader.ask(request(LASTING))
        bed.kept()
    bed.site.asked.clear()
    with bed.open() as port, Reader(port) as reader:
        assert reader.ask(request("/page"))[2] == b"/page"
        for _ in range(2):
            status, headers, body = reader.ask(request(LASTING, "Cookie: a=b"))
            assert (status, body) == (200, FILE)
            assert int(headers.pop("age")) >= 0
            assert headers == {name: before[name] for name in before if name not in ("connection", "x-hop")}
    assert bed.site.brief == [("GET", 200)]


@pytest.mark.parametrize("name", ["other", ""])
def test_immutable_file_counts_for_its_server_alone(bed: Bed, name: str) -> None:
    """Another server, machine or account has its own; nothing is kept where that is not known."""
    bed.site.headers["Cache-Control"] = IMMUTABLE
    with bed.open() as port, Reader(port) as reader:
        reader.ask(request(LASTING))
        bed.kept()
    with bed.open(name) as port, Reader(port) as reader:
        assert reader.ask(request(LASTING))[2] == FILE
    assert bed.site.brief == [("GET", 200)] * 2


UNFIT = {
    "private": {"Cache-Control": f"{IMMUTABLE}, private"},
    "no-store": {"Cache-Control": f"{IMMUTABLE}, no-store"},
    "no-cache": {"Cache-Control": f"no-cache, {IMMUTABLE}"},
    "not immutable": {"Cache-Control": "public, max-age=31536000"},
    "no time": {"Cache-Control": "immutable"},
    "over": {"Cache-Control": "immutable, max-age=0"},
    "old": {"Cache-Control": "immutable, max-age=10", "Age": "11"},
    "cookie": {"Cache-Control": IMMUTABLE, "Set-Cookie": "a=b"},
    "varies by cookie": {"Cache-Control": IMMUTABLE, "Vary": "Accept-Encoding, Cookie"},
    "varies": {"Cache-Control": IMMUTABLE, "Vary": "*"},
    "a page": {"Cache-Control": IMMUTABLE, "Content-Type": "text/html"},
    "data": {"Cache-Control": IMMUTABLE, "Content-Type": "application/json"},
    "encoded": {"Cache-Control": IMMUTABLE, "Content-Encoding": "gzip"},
    "folded": {"Cache-Control": IMMUTABLE, "X-Other": "a\r\n private"},
}


@pytest.mark.parametrize("kind", UNFIT)
def test_what_is_not_called_immutable_for_all_is_not_kept(bed: Bed, kind: str) -> None:
    """Nothing that may be one person's, a page's or an app's, and nothing whose time is over."""
    bed.site.headers |= UNFIT[kind]
    ask_twice(bed, LASTING)
    assert bed.site.brief == [("GET", 200)] * 2
    assert not bed.store.folder.exists()


@pytest.mark.parametrize(
    "target",
    [
        "/static/lab/bootstrap.js",  # JupyterLab calls that immutable as well
        "/static/lab/main.js?v=main",
        "/static/efd36b46f3b45eb8/index.html",
        "/static/lab/main.efd36b46f3b45eb8.json",
        "/static/lab/efd36b46f3b45eb8",
    ],
)
def test_address_has_to_name_a_version_of_a_file(bed: Bed, target: str) -> None:
    """New content under an old address would not be seen."""
    bed.site.headers["Cache-Control"] = IMMUTABLE
    ask_twice(bed, target)
    assert bed.site.brief == [("GET", 200)] * 2


@pytest.mark.parametrize("target", [LASTING, EXTENSION])
def test_who_asks_otherwise_asks_the_server(bed: Bed, target: str) -> None:
    """Neither is the answer kept, nor one used that is."""
    lines = ["Authorization: Basic YTpi", "Range: bytes=0-", "Cache-Control: max-age=0", "Pragma: no-cache"]
    lines += ["Service-Worker: script", "Connection: close", "If-Modified-Since: x", 'If-None-Match: "a"']
    bed.site.headers |= {"Cache-Control": IMMUTABLE, "ETag": TAG}
    for kept in (0, 1):
        asked = len(bed.site.asked)
        with bed.open() as port:
            for line in lines:
                with Reader(port) as reader:
                    assert reader.ask(request(target, line))[2] == FILE
        assert bed.site.brief[asked:] == [("GET", 200)] * len(lines)
        assert bed.store.usage().files == kept
        ask_twice(bed, target)


def test_answer_that_varies_is_for_the_same_request(bed: Bed) -> None:
    """Who takes another encoding gets another answer."""
    bed.site.headers |= {
        "Cache-Control": IMMUTABLE,
        "Vary": "accept-encoding",
        "Content-Encoding": "gzip",
    }
    with bed.open() as port, Reader(port) as reader:
        reader.ask(request(LASTING, "Accept-Encoding: gzip"))
        bed.kept()
        for lines, asked in ((["accept-encoding:gzip "], 1), ([], 2)):
            assert reader.ask(request(LASTING, *lines))[2] == FILE
            assert len(bed.site.asked) == asked


def test_file_with_a_hash_comes_with_the_leave_of_its_server(bed: Bed) -> None:
    """The server says that it is the same, and sends no byte of it; one that has a new one sends that."""
    bed.site.headers["ETag"] = TAG
    with bed.open() as port, Reader(port) as reader:
        _, before, _ = reader.ask(request(EXTENSION))
        bed.kept()
    with bed.open("other") as port, Reader(port) as reader:
        bed.site.asked.clear()
        for _ in range(2):
            status, headers, body = reader.ask(request(EXTENSION))
            assert (status, body) == (200, FILE)
            assert {name: headers[name] for name in headers if name != "date"} == {
                name: before[name] for name in before if name != "date"
            }
        assert bed.site.brief == [("HEAD", 304)] * 2
        bed.site.asked.clear()
        bed.site.content = FILE[:1000]
        bed.site.headers["ETag"] = f'"{hashlib.sha512(FILE[:1000]).hexdigest()}"'
        assert reader.ask(request(EXTENSION))[2] == FILE[:1000]
        bed.kept(2)
        assert bed.site.brief == [("HEAD", 200), ("GET", 200)]
        for content in (FILE, FILE[:1000]):  # both versions are at hand
            bed.site.content = content
            bed.site.headers["ETag"] = f'"{hashlib.sha512(content).hexdigest()}"'
            assert reader.ask(request(EXTENSION))[2] == content
        assert bed.site.brief[2:] == [("HEAD", 304)] * 2


@pytest.mark.parametrize("tag", ['"1c5b-637"', f"W/{TAG}", f'"{"0" * 128}"'])
def test_tag_that_is_no_hash_is_not_kept(bed: Bed, tag: str) -> None:
    """Of time and size, say: another file may have the same."""
    bed.site.headers["ETag"] = tag
    ask_twice(bed, EXTENSION)
    assert bed.site.brief == [("GET", 200)] * 2


@pytest.mark.parametrize("fault", ["hangs", "closes"])
def test_server_that_does_not_say_is_asked_for_the_file(
    bed: Bed, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that hangs at the question, or hangs up behind it, costs a little time and no page."""
    if fault == "hangs":
        monkeypatch.setattr(site_cache, "_PATIENCE", 0.3)
    bed.site.headers["ETag"] = TAG
    with bed.open() as port, Reader(port) as reader:
        reader.ask(request(EXTENSION))
        bed.kept()
        setattr(bed.site, fault, True)
        for _ in range(2):
            with Reader(port) as other:
                assert other.ask(request(EXTENSION))[::2] == (200, FILE)
    questions = [status for method, status in bed.site.brief if method == "HEAD"]
    assert questions == ([] if fault == "hangs" else [304, 304])


PAGE = request("/some/app?x=1", "Accept: text/html,*/*", "Cookie: a=1")
FILE_OF_PAGE = request(EXTENSION, "Referer: http://localhost:5006/some/app?x=1", "Cookie: a=1")


def ask_page(bed: Bed, reader: Reader, *, asks: bool = True) -> list[tuple[str, int]]:
    """Ask for a page, and for its file once the server was asked about that, or at once; gives what it was
    asked for the file."""
    bed.site.asked.clear()
    assert reader.ask(PAGE)[2] == b"/some/app?x=1"
    if asks:
        until(lambda: ("HEAD", 304) in bed.site.brief, what="the server to be asked")
    assert reader.ask(FILE_OF_PAGE)[::2] == (200, FILE)
    return sorted(bed.site.brief)[1:]


@pytest.mark.parametrize("again", ["in the same tunnel", "in another"])
def test_server_is_asked_before_the_browser_asks(bed: Bed, again: str) -> None:
    """Once it is known what a page needs, the server is asked about that together with the page."""
    bed.site.headers["ETag"] = TAG
    with contextlib.ExitStack() as stack:
        reader = stack.enter_context(Reader(stack.enter_context(bed.open())))
        ask_page(bed, reader, asks=False)
        bed.kept()
        if again == "in another":
            stack.close()
            bed.kept(2)
            reader = stack.enter_context(Reader(stack.enter_context(bed.open())))
        assert ask_page(bed, reader) == [("HEAD", 304)]
        bed.site.asked.clear()
        assert reader.ask(FILE_OF_PAGE)[2] == FILE
        assert bed.site.brief == [("HEAD", 304)], "what was said before counts once"


@pytest.mark.parametrize("kind", ["cookies", "old", "changed", "silent"])
def test_early_answer_counts_for_what_it_was_asked(
    bed: Bed, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not for another visitor, not for long, and not for a file that has changed; without one, the server is
    asked again."""
    bed.site.headers["ETag"] = TAG
    expected, asked = [("HEAD", 304), ("HEAD", 304)], FILE_OF_PAGE
    with bed.open() as port, Reader(port) as reader:
        ask_page(bed, reader, asks=False)
        bed.kept()
        if kind == "cookies":
            asked = asked.replace(b"a=1", b"a=2")
        elif kind == "old":
            monkeypatch.setattr(site_cache, "_FRESH", 0.0)
        elif kind == "changed":
            bed.site.content = b"new"
            bed.site.headers["ETag"] = f'"{hashlib.sha512(b"new").hexdigest()}"'
            expected = [("GET", 200), ("HEAD", 200)]
        else:
            monkeypatch.setattr(site_cache, "_PATIENCE", 0.2)
            bed.site.hangs = True
            expected = [("GET", 200)]
        bed.site.asked.clear()
        assert reader.ask(PAGE)[0] == 200
        until(lambda: kind == "silent" or len(bed.site.asked) == 2, what="the server to be asked")
        assert reader.ask(asked)[2] == bed.site.content
        assert sorted(bed.site.brief) == [("GET", 200), *expected]
        bed.site.go_on.set()


def test_server_is_not_asked_for_what_a_page_needs_no_more(bed: Bed) -> None:
    """A browser that keeps a file itself does not ask for it; the next time, the server is not asked."""
    bed.site.headers["ETag"] = TAG
    with bed.open() as port, Reader(port) as reader:
        ask_page(bed, reader, asks=False)
        bed.kept()
        for expected in ([("GET", 200), ("HEAD", 304)], [("GET", 200)]):
            bed.site.asked.clear()
            assert reader.ask(PAGE)[0] == 200
            until(lambda expected=expected: sorted(bed.site.brief) == expected, what="what is expected")  # type: ignore[misc]
        with Reader(port) as other:
            assert other.ask(FILE_OF_PAGE)[2] == FILE
        assert sorted(bed.site.brief) == [("GET", 200), ("HEAD", 304)]


@pytest.mark.parametrize("software", ["TornadoServer/6", "gunicorn"])
def test_channels_are_opened_ahead_where_that_is_known_to_be_fine(bed: Bed, software: str) -> None:
    """A browser's connections, and a page's WebSocket, find channels that are open, where the server says
    that it is Tornado; others may serve nobody else while a connection is idle."""
    bed.site.software = software
    with bed.open() as port, Reader(port) as reader:
        assert reader.ask(PAGE)[0] == 200
        if software == "gunicorn":
            assert reader.ask(PAGE)[0] == 200
            assert bed.site.connections == 1
        else:
            until(lambda: bed.site.connections == 1 + SPARE_OF_PAGE, what="spare channels")
            with Reader(port) as other:
                assert other.ask(PAGE)[0] == 200
            until(lambda: bed.site.connections == 2 + SPARE_OF_PAGE, what="another one in its place")


def test_many_questions_are_asked_at_once(bed: Bed) -> None:
    """Each of them gets its own answer, over one channel for all, in whichever order they are asked."""
    bed.site.headers["ETag"] = TAG
    with bed.open() as port, contextlib.ExitStack() as stack:
        readers = [stack.enter_context(Reader(port)) for _ in range(20)]
        readers[0].ask(request(EXTENSION))
        bed.kept()
        for reader in readers:
            reader.sock.sendall(request(EXTENSION) * 3)
        for reader in readers:
            for _ in range(3):
                assert reader.read()[::2] == (200, FILE)
    assert ("HEAD", 304) in bed.site.brief


ADDRESS = Address("here", LASTING)


def keep(store: StaticStore, **changes: Any) -> None:
    """Keep an answer for the address."""
    answer = Lasting(("Content-Type: text/css",), (("origin", "a"),), 1e9, 2**31)._replace(**changes)
    writer = store.begin(ADDRESS, answer)
    writer.write(b"content")
    assert writer.finish()


def test_broken_answer_is_not_used(account: object) -> None:
    """Cut at any place, changed in any byte, or another address's: it is removed, and counts as not there."""
    store = StaticStore(find_folder("static"))
    keep(store)
    (path,) = store.folder.iterdir()
    whole = path.read_bytes()
    found = store.load_answer(ADDRESS)
    assert found
    assert found[0].varies == (("origin", "a"),)
    assert found[1] == b"content"
    broken = [whole[:at] for at in range(0, len(whole), 7)]
    broken += [whole[:at] + b"~" + whole[at + 1 :] for at in range(0, len(whole), 7)]
    for data in broken:
        path.write_bytes(data)
        assert store.load_answer(ADDRESS) is None
        assert not path.exists()
    other = Address("elsewhere", LASTING)
    path.with_name(f"{other.key}.answer").write_bytes(whole)
    assert store.load_answer(other) is None


@pytest.mark.parametrize("changes", [{"since": 1e9, "lasts": 10}, {"since": 1e11}])
def test_answer_whose_time_is_over_is_not_used(account: object, changes: dict[str, Any]) -> None:
    """Nor is one from the future: a clock that was set back keeps nothing for ever."""
    store = StaticStore(find_folder("static"))
    keep(store, **changes)
    assert store.usage().files == 1
    assert store.load_answer(ADDRESS) is None
    assert store.usage().files == 0


def fetch(port: int, target: str = LASTING) -> bytes:
    """Ask for a file; gives its content."""
    with Reader(port) as reader:
        return reader.ask(request(target))[2]


@pytest.mark.parametrize("words", [{}, {"cache": False}, {"allow_others": True}, {"http": False}])
def test_forward_to_a_web_server_keeps_its_files(bed: Bed, words: dict[str, Any]) -> None:
    """Only one that is said to be HTTP does, for this account, unless it is told not to."""
    bed.site.headers["Cache-Control"] = IMMUTABLE
    for _ in range(2):
        keywords = {"http": True, "remote_port": bed.port, **words, **bed.machine.login}
        with LocalForward(bed.machine.host, bed.machine.user, **keywords) as forward:
            assert fetch(forward.local_port) == FILE
            foreign = request(LASTING).replace(b"localhost", b"evil.example")
            with Reader(forward.local_port) as reader:
                assert reader.ask(foreign)[0] == (200 if "http" in words else 403)
        if not words:
            bed.kept()
    expected = 1 if not words else 2 if "http" not in words else 4
    assert len(bed.site.asked) == expected
    assert words == {} or not bed.store.folder.exists()


def test_port_beside_a_tunnel_keeps_files_too(bed: Bed) -> None:
    """It is said with /http behind it."""
    bed.site.headers["Cache-Control"] = IMMUTABLE
    keywords = {"launch": False, "remote_port": bed.port, "isolate": False, **bed.machine.login}
    for way in ("/http", ""):
        spec = f"0:localhost:{bed.port}{way}"
        with DirectTunnel(bed.machine.host, bed.machine.user, forwards=spec, **keywords) as tunnel:
            port = int(tunnel.forwards[0].rpartition(":")[2])
            bed.site.asked.clear()
            for _ in range(2):
                assert fetch(port) == FILE
                if way:
                    bed.kept()
            assert len(bed.site.asked) == (1 if way else 2)


@pytest.mark.parametrize("words", [{"bind_address": "0.0.0.0"}, {"local_socket": "/tmp/a.sock"}])
def test_forward_to_a_web_server_is_on_loopback(words: dict[str, Any]) -> None:
    """Elsewhere a request does not name this machine, which nobody finds out before it is refused."""
    with pytest.raises(UsageError, match="loopback"):
        LocalForward("host", remote_port=80, http=True, **words)
    with pytest.raises(UsageError, match="loopback"):
        DirectTunnel("host", forwards="*:80:localhost:80/http")
