"""Pages of other web servers than Bokeh's own: where they are, and when a browser has them."""

from __future__ import annotations

import socket
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from beds import until
from benchmarks import browser
from benchmarks.process import PeerError

_APP = """import panel as pn
pn.extension("tabulator")
pn.Column(pn.widgets.FloatSlider(name="slider")).servable()
"""
_START = 60.0
#: Resolves when JupyterLab has its launcher; the time since the navigation began, in milliseconds.
_LAB = """new Promise((done) => {
  const look = () => {
    if (document.querySelector(".jp-LauncherCard")) done(performance.now());
    else setTimeout(look, 1);
  };
  look();
})"""


@dataclass(frozen=True)
class Site:
    """A server and its page.

    :ivar module: what it needs installed, and is started as
    :ivar words: of its command line; "{port}" is its port
    :ivar shown: resolves in the page when it is there
    """

    key: str
    title: str
    module: str
    words: tuple[str, ...]
    page: str
    shown: str


SITES = (
    Site(
        "far-panel-100-10",
        "Panel page at 100 ms, 10 Mbit/s, seen before",
        "panel",
        ("serve", "app.py", "--port", "{port}", "--allow-websocket-origin", "*"),
        "/app",
        browser.IDLE,
    ),
    Site(
        "far-lab-100-10",
        "JupyterLab at 100 ms, 10 Mbit/s, seen before",
        "jupyterlab",
        ("--no-browser", "--allow-root", "--ip=127.0.0.1", "--port={port}", "--IdentityProvider.token=abc"),
        "/lab?token=abc",
        _LAB,
    ),
)


@contextmanager
def running(site: Site) -> Iterator[int]:
    """Run the server on loopback; gives its port.

    :raises PeerError: if it is not installed, or does not start
    """
    if find_spec(site.module) is None:
        msg = f"skipped: {site.title}, since {site.module} is not installed"
        raise PeerError(msg)
    with socket.create_server(("127.0.0.1", 0)) as found:
        port = found.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="site-") as folder:
        Path(folder, "app.py").write_text(_APP, encoding="utf-8")
        words = [word.format(port=port) for word in site.words]
        with subprocess.Popen(
            [sys.executable, "-m", site.module, *words],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        ) as process:
            try:
                until(lambda: _answers(port, site.page), timeout=_START, what=site.title)
                yield port
            except AssertionError as exc:
                raise PeerError(str(exc)) from exc
            finally:
                process.terminate()


def _answers(port: int, page: str) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{page}", timeout=_START) as answer:
            return bool(answer.status == 200)
    except (OSError, urllib.error.URLError):
        return False
