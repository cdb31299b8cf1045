"""What opens a session stands in no process list: the browser is led there by a page of its own."""

from __future__ import annotations

import html
import json
import logging
import os
import re
import signal
import stat
import subprocess
import sys
import webbrowser
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

import apps
import browser
from beds import Machine, until
from bokeh_ssh import DirectTunnel
from bokeh_ssh._tunnels import redirect_page
from programs import Program, login

pytestmark = pytest.mark.skipif(os.name != "posix", reason="modes, and what ps shows")

SECRET = "http://localhost:1/x?bokeh-session-id=canary-1a2b"
#: A browser: says what it was started with, waits until it may go on, and then goes where the page leads.
BROWSER = """\
import html, json, os, pathlib, re, sys, urllib.parse, urllib.request
folder = pathlib.Path(__file__).parent
path = pathlib.Path(urllib.parse.unquote(urllib.parse.urlsplit(sys.argv[1]).path))
(folder / "new").write_text(json.dumps(sys.argv[1:]))
(folder / "new").rename(folder / "started")
open(folder / "go").read()
url = html.unescape(re.search('http-equiv="refresh" content="0; url=(.*?)"', path.read_text())[1])
status = urllib.request.urlopen(url, timeout=20).status
(folder / "new").write_text(json.dumps([url, status]))
(folder / "new").rename(folder / "opened")
"""
#: Reads all command lines, as an account that has nothing to do with it.
LOOK = """
import pathlib, sys
for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
    try:
        sys.stdout.buffer.write(path.read_bytes().replace(b"\\0", b" ") + b"\\n")
    except OSError:
        pass
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The directory of such a browser, which is the only one here."""
    folder = tmp_path / "browser"
    folder.mkdir()
    os.mkfifo(folder / "go")
    (folder / "browser.py").write_text(BROWSER)
    program = folder / "run"  # comes back at once, as those do that have a window
    program.write_text(f'#!/bin/sh\n{sys.executable} {folder}/browser.py "$@" >/dev/null 2>&1 &\n')
    program.chmod(0o755)
    monkeypatch.setenv("BROWSER", f"{program} %s")
    monkeypatch.setattr(webbrowser, "_tryorder", None)  # what another test has found
    monkeypatch.setattr(webbrowser, "_browsers", {})
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "runtime"))
    (tmp_path / "runtime").mkdir(mode=0o700)
    yield folder
    with os.fdopen(os.open(folder / "go", os.O_RDWR | os.O_NONBLOCK), "w") as go:  # one may wait
        go.write("on")


def tunnel_to(machine: Machine, text: str, **keywords: Any) -> DirectTunnel:
    """Make a tunnel to a new app."""
    app, login = apps.put(machine, "sliders.py", text), {"user": machine.user, **machine.login}
    return DirectTunnel(machine.host, app=app, python=machine.python, local_port=0, **login, **keywords)


def told(file: Path) -> Any:
    """Wait for what the browser says."""
    until(file.exists, what=file.name)
    return json.loads(file.read_text())


def seen_by_others() -> str:
    """Give the command lines that another account of this machine sees."""
    nobody: dict[str, Any] = {"user": "nobody"} if os.geteuid() == 0 else {}
    words = ["/usr/bin/python3" if nobody else sys.executable, "-I", "-c", LOOK]
    return subprocess.run(words, capture_output=True, text=True, check=True, timeout=20, **nobody).stdout


def target(text: str) -> str:
    """Read where a page leads."""
    found = re.search(r'<meta http-equiv="refresh" content="0; url=([^"]*)">', text)
    assert found
    return html.unescape(found[1])


def pages(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "runtime").iterdir())


@pytest.mark.parametrize("isolate", [True, False])
def test_signed_address_is_in_no_process_list(
    isolate: bool, embedded: Callable[..., Machine], fake: Path, tmp_path: Path
) -> None:
    """Another account sees a browser with the path of a page that it cannot read; this opens the app."""
    machine = embedded()
    with tunnel_to(machine, apps.SLIDER, isolate=isolate, signed=True) as tunnel:
        assert tunnel.show()
        [address] = told(fake / "started")
        path = Path(unquote(urlsplit(address).path))
        assert address.startswith("file:///")
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        url = target(path.read_text())
        session = url.partition("bokeh-session-id=")[2]
        assert len(session) > 40
        seen = seen_by_others()
        assert address in seen  # the control: others do see how it was started
        assert session not in seen
        assert session not in address
        (fake / "go").write_text("on")
        assert told(fake / "opened") == [url, 200]
        assert pages(tmp_path)
    assert pages(tmp_path) == []


def test_control_open_address_is_given_as_it_is(
    embedded: Callable[..., Machine], fake: Path, tmp_path: Path
) -> None:
    """One without a secret in it needs no page."""
    machine = embedded()
    with tunnel_to(machine, apps.SLIDER) as tunnel:
        assert tunnel.show()
        assert told(fake / "started") == [tunnel.url]
        assert pages(tmp_path) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_command_line_shows_it_in_the_same_way(
    number: int, embedded: Callable[..., Machine], fake: Path, tmp_path: Path
) -> None:
    """``--show`` tells no other account the session; when it ends, the page is gone."""
    machine = embedded()
    app = apps.put(machine, "sliders.py", apps.SLIDER)
    python = ("--python", machine.python, "--local-port", "0")
    with Program("direct", machine.host, app, "--signed", "--show", *python, *login(machine)) as program:
        [address] = told(fake / "started")
        path = Path(unquote(urlsplit(address).path))
        assert path.parents[1] == tmp_path / "runtime"
        assert target(path.read_text()).partition("bokeh-session-id=")[2] not in seen_by_others()
        (fake / "go").write_text("on")
        assert told(fake / "opened")[1] == 200
        program.interrupt(number)
        assert program.end() == 0, program
    assert pages(tmp_path) == []


@pytest.mark.timeout(90)
@pytest.mark.skipif(browser.find() is None, reason="Chromium is not installed")
def test_chromium_follows_it(
    embedded: Callable[..., Machine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a real browser, from a file, it ends up at the app, which works and is not told where it was."""
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", lambda url: opened.append(url) or True)  # type: ignore[func-returns-value]
    machine = embedded()
    with tunnel_to(machine, browser.APP, signed=True) as tunnel:
        assert tunnel.show()
        with browser.chromium() as new_page:
            page = new_page()
            page.page.goto(opened[0])
            page.page.wait_for_url(f"http://localhost:{tunnel.local_port}/**")
            page.page.locator(".noUi-handle").wait_for(timeout=30_000)
            page.page.evaluate("window.neverReloaded = true")
            page.move()
            assert page.page.evaluate("document.referrer") == ""
    assert not Path(urlsplit(opened[0]).path).exists()


def test_page_says_nothing_but_where_it_leads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a hostile server has its app called: it stays one address; umask and names change nothing."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", "")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    url = "http://localhost:1/\"><script>alert(1)</script>&quot;'é?bokeh-session-id=canary&x"
    before = os.umask(0o777)
    try:
        page = redirect_page.Page(url)
    finally:
        os.umask(before)
    try:
        text = page.path.read_text()
        assert target(text) == url
        assert text.isascii()
        assert "<script" not in text
        assert "canary" not in str(page.path)
        assert stat.S_IMODE(page.path.stat().st_mode) == 0o600
    finally:
        page.remove()
    page.remove()
    assert not page.path.parent.exists()


@pytest.mark.parametrize("kind", ["relative", "open", "link", "file", "another's", "gone"])
def test_page_lies_in_no_directory_that_is_not_private(
    kind: str, fake: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What ``XDG_RUNTIME_DIR`` names must be that; else the page goes where temporary files go."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    runtime = tmp_path / "runtime"
    if kind == "relative":
        monkeypatch.setenv("XDG_RUNTIME_DIR", "runtime")
    elif kind == "open":
        runtime.chmod(0o750)
    elif kind == "another's":
        if os.geteuid() != 0:
            pytest.skip("only root gives files to others")
        os.chown(runtime, 12345, 12345)
    else:
        runtime.rmdir()
        if kind == "link":
            runtime.symlink_to(tmp_path / "browser")
        elif kind == "file":
            runtime.touch()
    page = redirect_page.Page(SECRET)
    monkeypatch.chdir("/")
    assert page.path.parents[1] == tmp_path
    page.remove()
    assert not page.path.exists()


def test_page_is_not_shown_where_there_is_no_browser(fake: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Then it is gone at once; nor is it left for a browser that cannot be started."""
    monkeypatch.setattr("webbrowser.open", lambda url: False)
    assert redirect_page.open_in_browser(SECRET) is None

    def fail(url: str) -> bool:
        raise webbrowser.Error("none")

    monkeypatch.setattr("webbrowser.open", fail)
    with pytest.raises(webbrowser.Error):
        redirect_page.open_in_browser(SECRET)
    assert pages(tmp_path) == []


def test_page_that_cannot_be_written_shows_nothing(
    fake: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Rather than telling the address to everybody; why is logged, and that has no secret in it either."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", "")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))
    monkeypatch.setattr(DirectTunnel, "url", SECRET)
    with caplog.at_level(logging.WARNING):
        assert not DirectTunnel("example.org").show(inline=False)
    assert "cannot be written" in caplog.text
    assert "canary" not in caplog.text
    assert not (fake / "started").exists()


def test_page_of_a_program_that_was_killed_is_removed_by_the_next(fake: Path, tmp_path: Path) -> None:
    """What is left is what nobody can remove; a page of a program that runs stays, and what is not ours."""
    code = (
        "import sys\nfrom bokeh_ssh._tunnels.redirect_page import Page\n"
        "print(Page(sys.argv[1]).path, flush=True)\ninput()"
    )
    words = [sys.executable, "-c", code, SECRET]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as program:
        assert program.stdout
        left = Path(program.stdout.readline().strip())
        program.kill()
    other = tmp_path / "runtime" / "bokeh-ssh-page-link"
    other.symlink_to(tmp_path)
    redirect_page.Page(SECRET).remove()
    assert left.exists()  # the control: it could be that of one that runs
    os.utime(left.parent, (1, 1))
    page = redirect_page.Page(SECRET)
    assert not left.parent.exists()
    assert other.is_symlink()
    page.remove()
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as program:
        assert program.stdout
        left = Path(program.stdout.readline().strip())
        assert left.exists()
        program.communicate("\n")
    assert not left.parent.exists()  # it ended by itself, without a word about the page


def test_page_is_where_the_browser_sees_it(
    fake: Path, account: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A browser in a snap sees the home alone; one of Windows has another name for the file."""
    (tmp_path / "snap").mkdir()
    (tmp_path / "snap" / "firefox").touch()
    monkeypatch.setattr(redirect_page, "_SNAPS", (str(tmp_path / "snap"),))
    page = redirect_page.Page(SECRET)
    page.remove()
    assert page.path.parents[1] == account
    assert not page.path.parent.name.startswith(".")
    tool = tmp_path / "wslpath"
    tool.write_text('#!/bin/sh\necho "//wsl.localhost/Debian 13$2"\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert redirect_page._as_seen(Path("/a b")) == "file:///a%20b"
    monkeypatch.setenv("BROWSER", "/mnt/c/Program Files/Mozilla Firefox/firefox.exe")
    assert redirect_page._as_seen(Path("/a b")) == "file://wsl.localhost/Debian%2013/a%20b"
    tool.write_text("#!/bin/sh\necho C:/Temp/x\n")
    assert redirect_page._as_seen(Path("/mnt/c/Temp/x")) == "file:///C:/Temp/x"


def test_page_does_not_stay(fake: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once the browser has had its time it goes, though the tunnel stands."""
    monkeypatch.setattr("webbrowser.open", lambda url: True)
    monkeypatch.setattr(redirect_page, "_STAYS", 0.05)
    assert redirect_page.open_in_browser(SECRET)
    until(lambda: not pages(tmp_path), what="the page to go")
