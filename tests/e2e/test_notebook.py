"""In a notebook: what is shown is escaped, nothing hangs, and a real JupyterLab shows it all."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import apps
import browser
from beds import PASSWORD, Knobs, Machine, until
from bokeh_ssh import (
    AuthenticationError,
    DirectTunnel,
    Event,
    LocalForward,
    PromptRequiredError,
    Question,
    Reconnecting,
    UsageError,
    notebook_prompt,
)
from bokeh_ssh._tunnels.notebook import frame, summary
from cable import Cable
from direct_tunnels import tunnel_to
from skips import missing

#: What a person types, cell by cell; the last expression of each is what is looked for.
CELLS = [
    """
import bokeh_ssh
tunnel = bokeh_ssh.DirectTunnel(
    {host!r}, {user!r}, app={app!r}, upload=True, prompt=bokeh_ssh.notebook_prompt, python={python!r},
    port={port}, known_hosts={known_hosts!r}, ssh_config=None, allow_agent=False, look_for_keys=False,
).open()
""",
    "tunnel",
    "bokeh_ssh.show(tunnel, height=300)",
    """
session = tunnel.pull_session()
session.document.select_one({{"name": "slider"}}).value = 21
session.force_roundtrip()
session.pull()
print("pulled:", session.document.select_one({{"name": "text"}}).text)
session.close()
""",
    """
from bokeh.document import Document
from bokeh.models import Div
document = Document()
document.add_root(Div(text="ours", name="ours"))
with tunnel.push_session(document) as mine:
    with tunnel.pull_session(session_id=mine.id) as theirs:
        print("pushed:", theirs.document.select_one({{"name": "ours"}}).text)
""",
    "tunnel.wait(30); print('state:', tunnel.state)",
]


@contextmanager
def jupyterlab(folder: Path) -> Iterator[str]:
    """Run JupyterLab on a folder while the context lasts; gives its address."""
    log = folder.parent / "jupyter.log"
    words = ["--no-browser", "--ServerApp.port=0", "--ServerApp.token=", "--ServerApp.password="]
    words += ["--allow-root", "--ServerApp.open_browser=False", f"--ServerApp.root_dir={folder}"]
    words += ["--LabApp.news_url=", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", *words],
            cwd=folder, stdout=file, stderr=file, env={**os.environ, "JUPYTER_PLATFORM_DIRS": "1"},
        )  # fmt: skip
        try:
            found = until(
                lambda: (
                    re.search(r"http://(?:localhost|127\.0\.0\.1):\d+/lab", log.read_text())
                    or process.poll() is not None
                ),
                timeout=120,
                what="JupyterLab to listen",
            )
            assert found is not True, log.read_text()
            yield found[0]
        finally:
            process.terminate()
            process.wait(20)


def test_jupyterlab_shows_and_drives_an_app(
    embedded: Callable[..., Machine], tmp_path: Path, no_leaks: Any
) -> None:
    """In a real JupyterLab: the password is asked for in the cell, the tunnel is a status, link and buttons,
    its app answers in the cell; sessions are pulled and pushed from cells, whose kernel has a loop."""
    for module in ("jupyterlab", "ipykernel", "ipywidgets", "playwright"):
        if not importlib.util.find_spec(module):
            missing(f"{module} is not installed")
    if browser.find() is None:
        missing("no Chromium is installed")
    machine = embedded(Knobs(password=True))
    folder = tmp_path / "notebooks"
    folder.mkdir()
    app = folder / "app.py"
    app.write_text(browser.APP)
    values = {
        "host": machine.host, "user": machine.user, "port": machine.port, "python": machine.python,
        "known_hosts": str(machine.known_hosts), "app": str(app),
    }  # fmt: skip
    cells = [
        {"cell_type": "code", "id": f"c{i}", "metadata": {}, "outputs": [], "execution_count": None,
         "source": cell.format(**values).strip()}
        for i, cell in enumerate(CELLS)
    ]  # fmt: skip
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook = {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}
    (folder / "it.ipynb").write_text(json.dumps(notebook))
    with no_leaks(), jupyterlab(folder) as address, browser.chromium() as make:
        page = make().page
        page.goto(f"{address}/tree/it.ipynb", timeout=120_000)
        page.locator(".jp-Notebook .jp-Cell").nth(len(CELLS) - 1).wait_for(timeout=120_000)
        every = page.locator(".jp-Notebook .jp-Cell")
        outputs = [every.nth(i).locator(".jp-Cell-outputArea") for i in range(len(CELLS))]

        page.locator(".jp-Notebook-ExecutionIndicator[data-status=idle]").wait_for(timeout=120_000)

        def run(number: int) -> None:
            # A click may come while the page still moves, and then what is typed goes elsewhere: look at it.
            begun = every.nth(number).locator(".jp-InputPrompt", has_text=re.compile(r"\[[*0-9]+\]"))

            def attempt() -> bool:
                every.nth(number).locator(".cm-content").click()
                page.keyboard.press("Shift+Enter")
                try:
                    until(begun.count, timeout=5)
                except AssertionError:
                    return False
                return True

            until(attempt, timeout=30, what=f"cell {number} to run")

        run(0)
        password = page.locator("input.jp-Stdin-input[type=password]")
        password.wait_for(timeout=120_000)
        password.fill(PASSWORD)
        password.press("Enter")
        run(1)
        link = outputs[1].locator("a")
        link.wait_for(timeout=120_000)
        assert re.fullmatch(r"http://localhost:\d+/app", link.get_attribute("href"))
        assert "DirectTunnel to app.py on 127.0.0.1: ready" in outputs[1].inner_text()
        run(2)
        inside = outputs[2].frame_locator("iframe")
        inside.locator(".noUi-handle").wait_for(timeout=30_000)
        inside.locator(".noUi-handle").press("ArrowRight")
        inside.get_by_text("answer 4, call 1").wait_for(timeout=30_000)
        assert not outputs[2].inner_text().strip()  # no warning of IPython's, and no value
        run(3)
        outputs[3].get_by_text("pulled: answer 42, call 1").wait_for(timeout=30_000)
        run(4)
        outputs[4].get_by_text("pushed: ours").wait_for(timeout=30_000)
        outputs[1].get_by_text("Stop").click()
        outputs[1].get_by_text("on 127.0.0.1: closed").wait_for(timeout=30_000)
        run(5)
        outputs[5].get_by_text("state: closed").wait_for(timeout=30_000)
        assert PASSWORD not in page.content()


def test_widget_follows_the_tunnel(
    embedded: Callable[..., Machine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It shows each new state and its figures by itself; its buttons stop the tunnel, have a lost one tried
    at once, and open it again, with the error where that fails."""
    if not importlib.util.find_spec("ipywidgets"):
        missing("ipywidgets is not installed")
    machine = embedded()
    app = apps.put(machine, "app.py", browser.APP)
    events: list[Event] = []
    with Cable(machine.host, machine.port) as cable:
        tunnel = tunnel_to(cable.machine(machine, tmp_path), app, isolate=True, on_event=events.append)
        assert tunnel._repr_mimebundle_() == {}, "no notebook"
        monkeypatch.setattr("bokeh_ssh._tunnels.notebook.is_here", lambda: True)
        monkeypatch.setattr("bokeh_ssh._tunnels.notebook._PERIOD", 0.1)
        assert "new" in tunnel._repr_mimebundle_()["text/html"]
        widget = tunnel._widget
        assert widget

        def shows(state: str) -> None:
            until(lambda: f": {state}" in widget.html, what=f"{state} in {widget.html}")

        assert (widget.reconnect.disabled, widget.stop.disabled) == (False, True)
        widget.reconnect.click()
        shows("ready")
        until(lambda: (widget.reconnect.disabled, widget.stop.disabled) == (True, False))
        before = widget.html
        with urllib.request.urlopen(tunnel.url) as answer:
            answer.read()
        until(lambda: widget.html != before, what="the figures to follow")
        cable.refuse()
        shows("lost")
        until(lambda: any(isinstance(event, Reconnecting) and event.delay > 2.9 for event in events))
        cable.mend()
        mended = len(events)
        until(lambda: not widget.reconnect.disabled)
        widget.reconnect.click()
        shows("ready")
        until(lambda: any(isinstance(event, Reconnecting) and not event.delay for event in events[mended:]))
        widget.stop.click()
        shows("closed")
        cable.refuse()
        widget.reconnect.click()
        shows("failed")
        until(lambda: widget.html.count("<div>") == 2, what="the error")
        assert "127.0.0.1" in widget.html.rpartition("<div>")[2]
        assert not widget.reconnect.disabled
        cable.mend()
        with tunnel:  # from a cell
            shows("ready")
            assert widget.html.count("<div>") == 1, "an error that is over"
        importlib.import_module("ipywidgets").Widget.close_all()
        assert "closed" in tunnel._repr_mimebundle_()["text/html"]
        assert tunnel._widget is not widget
    until(lambda: not [thread for thread in threading.enumerate() if "bokeh-ssh widget" in thread.name])


def test_error_in_a_notebook_is_a_sentence(tmp_path: Path) -> None:
    """A cell that fails shows what the error says and the line it came from, and no frame of ours; all of it,
    with where the child process was, is one ``%tb`` away."""
    if not importlib.util.find_spec("nbclient"):
        missing("nbclient is not installed")
    import nbclient
    import nbformat

    sources = (
        'import bokeh_ssh\nbokeh_ssh.DirectTunnel("nowhere.invalid", ssh_config=None).open()',
        "%xmode Plain",
        "%tb",
    )
    made = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
    nbclient.NotebookClient(made, timeout=60, allow_errors=True, kernel_name="python3").execute()
    short, _, whole = ("\n".join(cell.outputs[0].get("traceback", ())) for cell in made.cells)
    assert short.startswith("ResolveError: nowhere.invalid")
    assert "line 2: bokeh_ssh.DirectTunnel" in short
    assert len(short.splitlines()) == 3
    assert "RemoteTraceback" in whole
    assert "tcp.py" in whole


def test_log_has_each_record_once(embedded: Callable[..., Machine], caplog: pytest.LogCaptureFixture) -> None:
    """With a child process too, what happens is one record in the program's log."""
    machine = embedded()
    caplog.set_level("DEBUG", "bokeh_ssh")
    with LocalForward(machine.host, machine.user, remote_port=1, isolate=True, **machine.login):
        pass
    until(lambda: "Closed" in caplog.text)
    said = [record.getMessage() for record in caplog.records]
    assert sorted(set(said)) == sorted(said)
    assert len(said) > 4


def test_what_is_shown_is_escaped() -> None:
    """No name of a host or an app becomes markup, in the status or in the frame; an id is not shown."""
    nasty = "<script>alert('x')</script>\"&"
    tunnel = DirectTunnel("example.org", app=nasty)
    for html in (
        tunnel._repr_html_(),
        summary(nasty, nasty, f"http://localhost/{nasty}"),
        frame(nasty, nasty),
    ):
        assert "<script" not in html
        assert html.count("<") == html.count(">")
    assert "new" in tunnel._repr_html_()
    assert "href" not in tunnel._repr_html_()
    shown = summary("it", "ready", "http://localhost:1/x?bokeh-session-id=secret")
    assert 'href="http://localhost:1/x?bokeh-session-id=secret"' in shown
    assert shown.count("secret") == 1


def test_questions_in_a_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    """Secrets are asked for hidden and host keys openly; away from the cell nobody is asked."""
    asked: list[tuple[str, str]] = []

    def asking(kind: str) -> Callable[[str], str]:
        return lambda text: asked.append((kind, text)) or kind  # type: ignore[func-returns-value]

    monkeypatch.setattr("getpass.getpass", asking("hidden"))
    monkeypatch.setattr("builtins.input", asking("open"))
    assert notebook_prompt(Question(kind="password", host="h", text="Password:")) == "hidden"
    assert notebook_prompt(Question(kind="host_key", host="h", text="Trust it?")) == "open"
    code = Question(kind="interactive", host="h", text="Code:", echo=True, instructions="A code was sent.")
    assert notebook_prompt(code) == "open"
    assert asked == [
        ("hidden", "h: Password: "),
        ("open", "h: Trust it? "),
        ("open", "h: A code was sent.\nCode: "),
    ]
    answers: list[object] = [""]
    thread = threading.Thread(target=lambda: answers.append(notebook_prompt(code)))
    thread.start()
    thread.join(30)
    assert answers == ["", None]
    assert len(asked) == 3


def test_question_where_nobody_can_type_is_an_error(
    embedded: Callable[..., Machine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a notebook that a program runs, what would be asked is a typed error, not the kernel's own."""
    error = pytest.importorskip("IPython.core.error").StdinNotImplementedError

    def refuse(*_: object) -> str:
        raise error("this frontend takes no input")

    monkeypatch.setattr("getpass.getpass", refuse)
    monkeypatch.setattr("builtins.input", refuse)
    machine = embedded(Knobs(password=True))
    keywords = {**machine.login, "key_filename": None, "look_for_keys": False, "isolate": False}
    with pytest.raises(AuthenticationError, match="was not answered"):
        DirectTunnel(machine.host, machine.user, prompt=notebook_prompt, **keywords).open()


def test_nothing_is_asked_unasked(embedded: Callable[..., Machine]) -> None:
    """Without a prompt a question is an error at once, and no kernel waits for an answer that cannot come."""
    machine = embedded(Knobs(password=True))
    keywords = {**machine.login, "key_filename": None, "look_for_keys": False}
    with pytest.raises(PromptRequiredError):
        DirectTunnel(machine.host, machine.user, **keywords).open()


def test_cell_is_needed_to_show_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outside of a notebook the browser is opened; a cell that is asked for all the same is an error."""
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", lambda url: opened.append(url) or True)  # type: ignore[func-returns-value]
    for name in ("IPython", "IPython.display"):  # whatever test came before
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(DirectTunnel, "url", "http://localhost:1/x")
    tunnel = DirectTunnel("example.org")
    assert tunnel.show()
    assert opened == ["http://localhost:1/x"]
    with pytest.raises(UsageError, match="no notebook"):
        tunnel.show(inline=True)
