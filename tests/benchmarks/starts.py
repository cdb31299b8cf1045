"""How long starts take: an import, and a Bokeh server on another machine."""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.process import PeerError, environment

_DEADLINE = 60.0
#: A slider whose every step a Python callback answers.
APP = """
from bokeh.io import curdoc
from bokeh.models import Div, Slider
from bokeh.plotting import figure

slider = Slider(start=0, end=1000, value=0, name="slider")
text = Div(text="0", name="text")
plot = figure(height=200)
plot.line(list(range(1000)), [x * x % 97 for x in range(1000)])


def moved(attr, old, new):
    text.text = str(new)


slider.on_change("value", moved)
for root in (slider, text, plot):
    curdoc().add_root(root)
"""
#: The same with 20 MB of data.
FLOATS = f"""{APP}
from bokeh.models import ColumnDataSource

import numpy as np

turns = np.linspace(0, 100, 1_250_000)
text.tags = [ColumnDataSource({{"x": np.cos(turns), "y": np.sin(turns)}})]
"""
_IMPORTS = {
    "raw": "import paramiko",
    "asyncssh": "import asyncssh",
    "sshtunnel": "import sshtunnel",
    "fabric": "import fabric",
    "ours": "import bokeh_ssh",
}
#: Ours is loaded name by name: here is what that puts off.
_FIRST_USES = _IMPORTS | {"ours": "from bokeh_ssh import LocalForward"}
_LAUNCH = """
import json, sys, time
from bokeh_ssh import DirectTunnel
words = json.loads(sys.argv[1])
tunnel = DirectTunnel(words["host"], words["user"], words["app"], python=sys.executable, local_port=0,
                      isolate=words["isolate"], **words["login"])
began = time.perf_counter()
with tunnel:
    print((time.perf_counter() - began) * 1e3)
"""


def imports(*, used: bool) -> dict[str, dict[str, Any]]:
    """Time each import in a process of its own; ``raw`` is paramiko's, which all but asyncssh need.

    :param used: with the first class that makes a connection
    """
    found: dict[str, dict[str, Any]] = {}
    for peer, code in (_FIRST_USES if used else _IMPORTS).items():
        timed = f"from time import perf_counter as t; b = t(); {code}; print((t() - b) * 1e3)"
        try:
            found[peer] = {"time": _number([sys.executable, "-c", timed])}
        except PeerError as exc:
            found[peer] = {"failed": str(exc)}
    return found


def _number(words: list[str]) -> float:
    try:
        done = subprocess.run(
            words, capture_output=True, text=True, env=environment(), timeout=_DEADLINE, check=False,
            cwd=tempfile.gettempdir(),
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        msg = f"not within {_DEADLINE:g} s"
        raise PeerError(msg) from None
    if done.returncode:
        raise PeerError((done.stderr.strip() or "it failed").splitlines()[-1][:200])
    return float(done.stdout)


@contextmanager
def bokeh_server(app: Path, *options: str) -> Iterator[tuple[int, float]]:
    """Run a Bokeh server on loopback; gives its port, and the seconds until it said so and answered."""
    began = time.perf_counter()
    words = [sys.executable, "-m", "bokeh", "serve", str(app), "--port", "0", "--address", "127.0.0.1"]
    process = subprocess.Popen(
        [*words, *options],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        env=environment(),
        text=True,
    )
    assert process.stderr
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()

    def drain() -> None:
        for line in process.stderr or ():
            lines.put(line)
        lines.put("")

    reader = threading.Thread(target=drain, daemon=True)
    reader.start()
    try:
        port = _port(lines)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/{app.stem}/metadata", timeout=_DEADLINE):
            yield port, time.perf_counter() - began
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        reader.join(5)
        process.stderr.close()


def _port(lines: queue.SimpleQueue[str]) -> int:
    last = ""
    while True:
        try:
            line = lines.get(timeout=_DEADLINE)
        except queue.Empty:
            line = ""
        if not line:
            msg = f"the Bokeh server does not start: {last.strip()[:150]}"
            raise PeerError(msg)
        last = line
        if "Bokeh app running at:" in line:
            return int(line.rpartition(":")[2].partition("/")[0])


def launches(machine: Any, app: Path) -> dict[str, dict[str, Any]]:
    """Time from ``with DirectTunnel`` to ready; ``raw`` is the same server's own start, line and probe."""
    found: dict[str, dict[str, Any]] = {}
    with bokeh_server(app) as (_, seconds):
        found["raw"] = {"time": seconds * 1e3}
    for peer, isolate in (("ours", False), ("ours-isolated", True)):
        words = {
            "host": machine.host,
            "user": machine.user,
            "app": str(app),
            "login": machine.login,
            "isolate": isolate,
        }
        try:
            found[peer] = {"time": _number([sys.executable, "-c", _LAUNCH, json.dumps(words)])}
        except PeerError as exc:
            found[peer] = {"failed": str(exc)}
    return found
