"""Pictures in the documentation, made by the build from the real programs: a terminal, a page in a browser.

``terminal:: WORDS`` runs ``bokeh-ssh WORDS`` on a terminal, and shows that; ``doctor`` looks at one like the
demo's. ``page:: demo`` shows the demo in headless Chromium; without one it is left out. ``shape:: a`` is a
part of ``shapes.svg``, and ``drawing:: NAME`` another picture that has colours for a dark page.
"""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.parsers.rst import Directive, directives
from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text
from sphinx.application import Sphinx
from sphinx.util import logging

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = 112
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
_DEADLINE = 90.0


def screen(words: list[str], until: str) -> str:
    """Run a program of ours on a terminal until it has said something, or has ended; gives what it wrote."""
    ours, theirs = pty.openpty()
    env = {"COLUMNS": str(COLUMNS), "LINES": "40", "TERM": "xterm-256color", "LANG": "C.UTF-8"}
    program = subprocess.Popen(
        [sys.executable, "-m", "bokeh_ssh", *words],
        cwd=ROOT,
        env=os.environ | env,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    said, deadline, interrupted = b"", time.monotonic() + _DEADLINE, False
    while time.monotonic() < deadline:
        if not select.select([ours], [], [], 0.2)[0]:
            continue
        try:
            data = os.read(ours, 65536)
        except OSError:  # it has ended
            break
        if not data:
            break
        said += data
        if until and until.encode() in said and not interrupted:
            program.terminate()
            interrupted = True
    else:
        program.kill()
    os.close(ours)
    text = said.decode(errors="replace")
    if program.wait():
        msg = f"bokeh-ssh {' '.join(words)} failed:\n{text}"
        raise RuntimeError(msg)
    return text


def settle(text: str) -> str:
    """Give the lines as they are left standing: what was drawn over or erased is gone."""
    lines: list[str] = []
    for line in text.replace("\r\n", "\n").split("\n"):
        shown = line.rpartition("\x1b[2K")[2] if "\x1b[2K" in line else line
        for away in ("\x1b[?25l", "\x1b[?25h", "\x1b[1A", "\r"):
            shown = shown.replace(away, "")
        if shown.strip() and not any(mark in shown for mark in "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"):
            lines.append(shown)
    return "\n".join(lines)


@contextmanager
def machine() -> Any:
    """Run a machine like the demo's; gives the words that log in to it."""
    import logging as standard

    from bokeh_ssh.testing import machine

    standard.getLogger("asyncssh").setLevel(standard.WARNING)
    with machine() as made:
        host = made.host
        yield [
            "me@remote.host", "-p", str(host.port), "-i", str(host.key_filename), "-F", "none",
            "--known-hosts", str(host.known_hosts), "--python", sys.executable,
        ], made  # fmt: skip


class Shape(Directive):
    """One of the pictures of who connects to whom, cut out of the one that has them all (``all``)."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        name = self.arguments[0]
        svg = (ROOT / "docs" / "_static" / "shapes.svg").read_text(encoding="utf-8")
        if name == "all":
            return drawing(self, "shapes", svg, "Who connects to whom: directly, and three ways by a gateway")
        rules = [int(y) for y in re.findall(r'class="rule" d="M20 (\d+) H740"', svg)]
        tops = [0, *rules]
        number = ("direct", "a", "b", "c").index(name)
        top = tops[number]
        height = ([*rules, 700][number]) - top
        svg = re.sub(
            r'viewBox="[^"]*" width="\d+" height="\d+"',
            f'viewBox="0 {top} 760 {height}" width="760" height="{height}"',
            svg,
            count=1,
        )
        alt = f"Who connects to whom: {'directly' if name == 'direct' else f'shape {name.upper()}'}"
        return drawing(self, f"shape-{name}", svg, alt)


class Drawing(Directive):
    """A picture of ``_static`` that has colours for a dark page too."""

    required_arguments = 1
    option_spec = {"alt": directives.unchanged_required}  # noqa: RUF012 - docutils' own shape

    def run(self) -> list[nodes.Node]:
        name = self.arguments[0]
        svg = (ROOT / "docs" / "_static" / f"{name}.svg").read_text(encoding="utf-8")
        return drawing(self, name, svg, self.options["alt"])


def drawing(directive: Directive, name: str, svg: str, alt: str) -> list[nodes.Node]:
    """Show a picture in the page's colours: a reader's choice there is not known inside of the picture."""
    dark = re.search(r"@media \(prefers-color-scheme: dark\) \{(.*?\})\s*\}", svg, re.DOTALL)
    assert dark
    shown = []
    for mode, rules in (("light", ""), ("dark", dark[1])):
        data = svg[: dark.start()] + rules + svg[dark.end() :]
        image = place(directive, f"{name}-{mode}.svg", data.encode(), alt)
        image["classes"] = [f"only-{mode}"]
        shown.append(image)
    return shown


class Terminal(Directive):
    """See above."""

    required_arguments = 1
    final_argument_whitespace = True
    option_spec = {"until": directives.unchanged}  # noqa: RUF012 - docutils' own shape

    def run(self) -> list[nodes.Node]:
        words = self.arguments[0].split()
        if words == ["doctor"]:
            with machine() as (login, made):
                said = screen(["doctor", made.host.name, *login[1:]], "")
                said = said.replace(made.host.name, "remote.host").replace(str(made.host.port), "22")
                said = said.replace(str(made.home.parent), "/tmp/bokeh-ssh-1000").replace("/servers", "")
            shown = ["doctor", "me@remote.host"]
        else:
            said, shown = screen(words, self.options.get("until", "")), words
        return [picture(settle(said), f"$ bokeh-ssh {' '.join(shown)}")]


def picture(text: str, command: str) -> nodes.Node:
    """Show a terminal, as text: it can be read on a telephone, searched and copied."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True)
    console.print(Text(command, style="bold"))
    console.print(Text.from_ansi(text))
    shown = console.export_html(theme=MONOKAI, inline_styles=True, code_format="{code}")
    shown = "\n".join(line.rstrip() for line in shown.splitlines())
    return nodes.raw("", f'<pre class="terminal">{shown}</pre>', format="html")


def place(directive: Directive, name: str, data: bytes, alt: str) -> nodes.Node:
    """Put a picture where Sphinx finds it."""
    folder = Path(directive.state.document.settings.env.srcdir, "_screens")
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(data)
    return nodes.image(uri=f"_screens/{name}", alt=alt, width="100%")


class Page(Directive):
    """See above."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        found = next(filter(None, map(shutil.which, BROWSERS)), None)
        if found is None:
            logging.getLogger(__name__).info("no Chromium is installed: the page is left out")
            return []
        words = [sys.executable, "-m", "bokeh_ssh", self.arguments[0], "--no-show", "--json"]
        with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True) as program:
            try:
                assert program.stdout
                told = map(json.loads, program.stdout)
                url = next(event["addresses"][0] for event in told if event["event"] == "opened")
                data = self._shot(found, url)
            finally:
                program.terminate()
        image = place(self, f"{self.arguments[0]}.png", data, alt="The app in the browser")
        image["classes"] = ["page-shot"]
        return [image]

    def _shot(self, browser: str, url: str) -> bytes:
        from playwright.sync_api import sync_playwright

        with sync_playwright() as playwright:
            chromium = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"])
            page = chromium.new_page(viewport={"width": 960, "height": 600}, device_scale_factor=2)
            page.goto(url, timeout=_DEADLINE * 1000)
            page.locator(".bk-Figure").first.wait_for(timeout=_DEADLINE * 1000)
            page.wait_for_timeout(1000)  # until it is drawn, which nothing tells
            data: bytes = page.screenshot()
            chromium.close()
        return data


def setup(app: Sphinx) -> dict[str, bool]:
    """Add the directives."""
    app.add_directive("terminal", Terminal)
    app.add_directive("page", Page)
    app.add_directive("shape", Shape)
    app.add_directive("drawing", Drawing)
    return {"parallel_read_safe": False}
