"""``dev=True``: what is saved is what runs, whatever was saved before; and pages show it by themselves."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

import apps
import browser
from beds import Machine, until
from bokeh_ssh import AppFailed, DirectTunnel, Event, ServerExited
from bokeh_ssh._remote import dev_server

if os.name != "posix":
    pytest.skip("the remote side is a POSIX system", allow_module_level=True)

#: Its page says WORD; saved as editors do.
_APP = """
from bokeh.io import curdoc
from bokeh.models import Div
curdoc().title = {word!r}
curdoc().add_root(Div(text={word!r}))
"""


def save(path: Path, text: str) -> None:
    new = path.with_name(path.name + "~")
    new.write_text(text)
    new.replace(path)


@contextmanager
def developed(machine: Machine, app: Path, **more: Any) -> Iterator[tuple[DirectTunnel, list[Event]]]:
    """Open a tunnel to an app that is brought, and developed."""
    events: list[Event] = []
    keywords = {
        "upload": True,
        "dev": True,
        "isolate": False,
        "python": machine.python,
        **machine.login,
        **more,
    }
    with DirectTunnel(machine.host, machine.user, str(app), on_event=events.append, **keywords) as tunnel:
        yield tunnel, events


def failures(events: list[Event]) -> list[str]:
    """Return what was told of changes that cannot run."""
    return [event.traceback for event in events if isinstance(event, AppFailed) and event.reload]


def test_pages_show_what_is_saved_whatever_was_saved_before(
    embedded: Callable[..., Machine], tmp_path: Path
) -> None:
    """A save before the first page counts. One with a syntax error is told with its place, and one that keeps
    the server from starting with its traceback; the page is as it was. After each, the next good save is on
    the page by itself."""
    if not browser.find():
        pytest.skip("Chromium is not installed")
    folder = tmp_path / "app"
    folder.mkdir()
    main = folder / "main.py"
    save(main, _APP.format(word="first"))
    with developed(embedded(), folder) as (tunnel, events), browser.chromium() as make:
        save(main, _APP.format(word="second"))
        page = make().page
        page.goto(tunnel.url, wait_until="commit")  # at whatever time: there is always one that answers
        page.get_by_text("second").wait_for(timeout=30_000)

        save(main, "x = = 1\n")
        until(lambda: len(failures(events)) == 1, what="the syntax error to be told")
        assert "main.py" in failures(events)[0]
        assert "    x = = 1\n" in failures(events)[0]
        page = page.context.new_page()  # the other one may be loading again by itself
        page.goto(tunnel.url, wait_until="commit")
        page.get_by_text("second").wait_for(timeout=30_000)

        save(main, _APP.format(word="third"))
        page.get_by_text("third").wait_for(timeout=30_000)

        save(folder / "server_lifecycle.py", "raise RuntimeError('not like this')\n")
        until(lambda: len(failures(events)) == 2, what="the failed start to be told")
        assert "RuntimeError: not like this" in failures(events)[1]
        page = page.context.new_page()  # the other one may be loading again by itself
        page.goto(tunnel.url, wait_until="commit")
        page.get_by_text("third").wait_for(timeout=30_000)
        (folder / "server_lifecycle.py").unlink()
        save(main, _APP.format(word="fourth"))
        page.get_by_text("fourth").wait_for(timeout=30_000)
        assert len(failures(events)) == 2
    assert not [event for event in events if isinstance(event, ServerExited)]


def test_server_that_ends_before_it_was_changed_ends_the_tunnel(
    embedded: Callable[..., Machine], tmp_path: Path
) -> None:
    """A server that ends by itself is told as ever: only a change is given another chance."""
    app = tmp_path / "app.py"
    app.write_text("import os\nos._exit(7)\n")
    with developed(embedded(), app) as (tunnel, events):
        threading.Thread(target=_open_quietly, args=(tunnel.url,), daemon=True).start()
        until(lambda: any(isinstance(event, ServerExited) for event in events), what="its end to be told")
    assert [event.exit_status for event in events if isinstance(event, ServerExited)] == [7]


@pytest.mark.parametrize("more", [{}, {"signed": False}], ids=["socket", "port"])
def test_workers_end_with_the_server_that_they_served(
    embedded: Callable[..., Machine], tmp_path: Path, mark: str, more: dict[str, Any]
) -> None:
    """With ``--num-procs``, no worker of the server before a change is left, though a TERM to their parent
    spares them: none serves the old text, or holds the port."""
    app = tmp_path / "app.py"
    save(app, _APP.format(word="first"))
    machine = embedded()
    args = ["--num-procs", "2", "--args", mark]
    with developed(machine, app, args=args, **more) as (tunnel, events):
        assert "first" in apps.get(tunnel.url)
        before = set(machine.pids(mark))
        save(app, _APP.format(word="second"))
        until(lambda: len(before & set(machine.pids(mark))) <= len(before) - 3, what="the former to be gone")
        until(lambda: "second" in _page(tunnel.url), what="the new text")
        assert len(machine.pids(mark)) <= len(before)
        assert not failures(events)
    until(lambda: not machine.pids(mark), what="all of them to be gone")


def _page(url: str) -> str:
    with suppress(OSError):
        return apps.get(url)
    return ""


def _open_quietly(url: str) -> None:
    from urllib.request import urlopen

    with suppress(OSError):
        urlopen(url, timeout=30).read()


def test_what_is_watched(tmp_path: Path) -> None:
    """Of a folder, all text of an app that is not hidden; of a script, what lies beside it and in packages
    there; what an app writes, never."""
    for name in (
        "app.py",
        "helper.py",
        "a/__init__.py",
        "a/b.py",
        "data/c.py",
        ".git/d.py",
        "style.css",
        "out.csv",
    ):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()

    def watched(*tops: Path) -> set[str]:
        return {str(Path(each).relative_to(tmp_path)) for each in dev_server.look([str(top) for top in tops])}

    script = {"app.py", "helper.py", "a/__init__.py", "a/b.py", "style.css"}
    assert watched(tmp_path / "app.py") == script
    assert watched(tmp_path) == {*script, "data/c.py"}
