"""Whatever is asked of Bokeh, Panel or JupyterLab, the answer is the same with files from this machine.

``STATIC_REQUESTS=10000 python -m pytest tests/forwarding/test_static_bokeh.py`` asks as often as that, and
``STATIC_SEED`` asks for something else.
"""

from __future__ import annotations

import contextlib
import hashlib
import html
import os
import random
import re
import socket
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

import apps
from beds import Machine, free_port, until
from bokeh_ssh._core.this_machine.private_folder import find_folder
from bokeh_ssh._forwarding.static_store import StaticStore
from direct_tunnels import port_of, serve_on
from static_bed import Reader, led, request

_PREFIX = "/some/where"
_COUNT = int(os.environ.get("STATIC_REQUESTS", "200"))
_SEED = int(os.environ.get("STATIC_SEED", "1"))
#: What a browser goes by.
_HEADERS = (
    "accept-ranges",
    "access-control-allow-origin",
    "cache-control",
    "content-encoding",
    "content-length",
    "content-range",
    "content-type",
    "etag",
    "location",
    "set-cookie",
)
Answer = tuple[int, str, dict[str, str]]


def talk(port: int, requests: list[tuple[bytes, bool]], *, at_once: bool) -> list[Answer]:
    """Ask over one connection, one after the other or all at once; gives what is answered until it ends."""
    answers: list[Answer] = []
    with Reader(port) as reader, contextlib.suppress(IndexError, OSError):  # an empty line: it has ended
        if at_once:
            reader.sock.sendall(b"".join(data for data, _ in requests))
        for data, head in requests:
            status, headers, body = reader.read(head=head) if at_once else reader.ask(data, head=head)
            found = {name: headers[name] for name in _HEADERS if name in headers}
            if "set-cookie" in found:  # another one for each who asks
                found["set-cookie"] = "yes"
            if found.get("content-type") == "application/javascript":  # Python 3.11 and before; now obsolete
                found["content-type"] = "text/javascript"
            answers.append((status, hashlib.sha256(body).hexdigest(), found))
    return answers


class Asker:
    """Makes up requests.

    :param files: targets of the files of a page
    :param more: other targets
    """

    def __init__(self, files: list[str], seed: int, more: list[str]) -> None:
        self._files = files
        self._more = more
        self._random = random.Random(seed)
        self._hashes = [file[-128:] for file in files]

    def make(self) -> tuple[bytes, bool]:
        """Make one; gives whether its answer has no body."""
        choice = self._random.choice
        if self._random.random() < 0.5:
            return request(choice(self._files)), False
        lines = [line for line in (self._condition(), self._manner()) if line]
        self._random.shuffle(lines)
        method = choice(["GET"] * 8 + ["HEAD", "HEAD", "POST", "PUT", "OPTIONS", "get"])
        if method in ("POST", "PUT"):
            return request(self._target(), *lines, "Content-Length: 3", method=method) + b"abc", False
        version = choice(["1.1"] * 5 + ["1.0"])
        return request(self._target(), *lines, method=method, version=version), method == "HEAD"

    def _target(self) -> str:
        choice = self._random.choice
        file = choice(self._files)
        name, _, sha512 = file.partition("?v=")
        other = [
            file,
            file,
            file,
            name,
            name + "?v=",
            f"{name}?v={choice(self._hashes)}",
            f"{name}?v={sha512[:-1]}",
            f"{name}?v={sha512.upper()}",
            f"{name}?v={'0' * 128}",
            f"{file}&v={sha512}",
            f"{file}#x",
            f"{name}?a=b&v={sha512}",
            f"http://localhost{file}",
            file.replace("/js/", "/js/../js/"),
            file.replace("/js/", "/js//"),
            file.replace("/js/", "/j%73/"),
            file.replace(".js", ".js.map"),
            file.replace("bokeh", "nothing"),
            f"/{file}",
            *self._more,
        ]
        return choice(other)

    def _condition(self) -> str:
        choice = self._random.choice
        tag, other = f'"{choice(self._hashes)}"', '"other"'
        return choice(
            [
                "",
                "",
                f"If-None-Match: {tag}",
                f"if-none-match:W/{tag}",
                f"If-None-Match: {other}, {tag}",
                f"If-None-Match: {other} {tag}",
                f"If-None-Match: {other},W/{tag} ",
                f"If-None-Match: {tag[1:-1]}",
                f"If-None-Match: {other}\r\nIf-None-Match: {tag}",
                f"If-None-Match: {other}\r\nIf-Modified-Since: Sat, 28 Nov 2037 20:33:24 GMT",
                "If-None-Match: *",
                "If-None-Match:",
                "If-Modified-Since: Sat, 28 Nov 2037 20:33:24 GMT",
                "If-Modified-Since: nonsense",
                f"If-Match: {other}",
                f"Range: bytes={self._random.randrange(100_000)}-",
                f"Range: bytes=-{self._random.randrange(100_000)}",
                "Range: bytes=10-19",
                "RANGE:bytes=19-10",
                "Range: bytes=0-",
                "Range: bytes=0-1,5-6",
                f"Range: bytes=1-2\r\nIf-Range: {tag}",
            ]
        )

    def _manner(self) -> str:
        return self._random.choice(
            [
                "",
                "",
                "Accept-Encoding: gzip, deflate, br",
                "Connection: keep-alive",
                "Connection: Keep-Alive",
                "CONNECTION: close",
                "Connection: keep-alive, x",
                "Cache-Control: no-cache",
                "Cache-Control: max-age=0",
                "Pragma: no-cache",
                "Origin: http://other.example",
                "Cookie: a=b",
                "Expect: 100-continue",
                "EXPECT:100-Continue",
                "Authorization: Basic YTpi",
            ]
        )


@contextlib.contextmanager
def bokeh(machine: Machine) -> Iterator[tuple[int, list[str], list[str]]]:
    """Run Bokeh; gives the port, the targets of the files that its page names, and others."""
    app = apps.put(machine, "app.py", apps.SLIDER)
    with serve_on(machine, app, "--prefix", _PREFIX) as running:
        port = port_of(running)
        yield port, name_files(port, f"{_PREFIX}/app"), [f"{_PREFIX}/app/metadata", f"{_PREFIX}/nothing", "/"]


@contextlib.contextmanager
def panel(machine: Machine) -> Iterator[tuple[int, list[str], list[str]]]:
    """Run Panel, likewise."""
    app = apps.put(
        machine, "app.py", "import panel\npanel.extension('tabulator')\npanel.Row('a').servable()\n"
    )
    with machine.spawn([machine.python, "-m", "panel", "serve", app, "--port", "0"]) as running:
        port = port_of(running)
        yield port, name_files(port, "/app"), ["/app/metadata"]


@contextlib.contextmanager
def jupyterlab(machine: Machine) -> Iterator[tuple[int, list[str], list[str]]]:
    """Run JupyterLab, likewise; what it says to other targets is another thing each time."""
    words = ["--no-browser", "--allow-root", "--ip=127.0.0.1", "--IdentityProvider.token=abc"]
    port = free_port()
    with machine.spawn([machine.python, "-m", "jupyterlab", *words, "--port", str(port)]) as running:
        # It says so shortly before it does.
        until(
            lambda: "is running at" in running.log and is_taken(port), timeout=60, what="JupyterLab to listen"
        )
        names = name_files(port, "/lab?token=abc")
        assert any("/static/lab/main." in name for name in names)
        yield port, [*names, "/static/lab/bootstrap.js", "/static/lab/index.html"], []


def is_taken(port: int) -> bool:
    """Tell whether somebody listens on a port."""
    with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port), 20):
        return True
    return False


def name_files(port: int, page: str) -> list[str]:
    """Give the targets of the static files that a page names."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{page}", timeout=20) as answer:
        found = re.findall(r'(?:src|href)="([^"]*static/[^"]*)"', answer.read().decode())
    assert len(found) > 2
    return [file if file.startswith("/") else f"/{file}" for file in map(html.unescape, found)]


@pytest.mark.timeout(max(300, _COUNT // 5))
@pytest.mark.parametrize(
    ("server", "least"),
    [
        (bokeh, 3),
        pytest.param(panel, 5, marks=pytest.mark.once),
        pytest.param(jupyterlab, 1, marks=[pytest.mark.once, pytest.mark.slow]),
    ],
)
def test_answers_are_those_of_the_server(embedded: Any, server: Any, least: int) -> None:
    """Valid and odd requests, kept or not, one by one or at once: the same status, headers and body.

    The control is in the numbers: most of the files did not come from the server.
    """
    machine, told = embedded(), list[str]()
    store = StaticStore(find_folder("static"))
    with server(machine) as (port, files, more):
        asker, chance = Asker(files, _SEED, more), random.Random(_SEED)
        with led(machine, port, store, told.append, "here") as ours:
            asked = 0
            while asked < _COUNT:
                requests = [asker.make() for _ in range(chance.choice([1, 1, 2, 3, 5]))]
                at_once = chance.random() < 0.3
                if chance.random() < 0.02:
                    store.clear()
                expected = talk(port, requests, at_once=at_once)
                answers = talk(ours, requests, at_once=at_once)
                shown = b"".join(data for data, _ in requests).decode()
                assert answers == expected, f"{shown}\n{at_once=} {len(answers)} of {len(expected)}"
                asked += len(requests)
    assert store.usage().files >= least
    assert len(told) <= 1  # addresses with the hash of another file


@pytest.mark.parametrize("words", [("--auth-module",), ()])
def test_server_behind_a_login_gives_files_to_anybody(embedded: Any, words: tuple[str, ...]) -> None:
    """What is answered without asking a server that wants a login, that server answers without one too."""
    machine = embedded()
    app = apps.put(machine, "app.py", apps.SLIDER)
    auth = apps.put(machine, "auth.py", "login_url = '/login'\ndef get_user(handler):\n    return None\n")
    with serve_on(machine, app, *(word for each in words for word in (each, auth))) as running:
        port = port_of(running)
        with Reader(port) as reader:
            assert reader.ask(request("/app"))[0] == (302 if words else 200)
            status, headers, body = reader.ask(request("/static/js/bokeh-gl.min.js"))
        assert status == 200
        assert headers["etag"] == f'"{hashlib.sha512(body).hexdigest()}"'
