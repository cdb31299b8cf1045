"""A Bokeh page in headless Chromium, driven over its own debugging protocol."""

from __future__ import annotations

import itertools
import json
import os
import queue
import re
import shutil
import statistics
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from benchmarks.process import PeerError

_DEADLINE = 60.0
_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
_FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-default-apps",
    "--disable-extensions",
    "--remote-debugging-port=0",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",  # it talks to nobody else
)
#: Resolves when Bokeh has drawn everything; the time since the navigation began, in milliseconds.
IDLE = """new Promise((done) => {
  const look = () => {
    const docs = (window.Bokeh && Bokeh.documents) || [];
    if (docs.length && docs[0].is_idle) done(performance.now());
    else setTimeout(look, 1);
  };
  look();
})"""
#: Moves the slider step by step, each once the callback has answered the one before; milliseconds of each.
_DRAG = """(async (steps) => {
  const model = (name) => Bokeh.documents[0].get_model_by_name(name);
  const slider = model("slider"), text = model("text"), times = [];
  for (let step = 1; step <= steps; step++) {
    const value = step % 1000 + 1, began = performance.now();
    await new Promise((done) => {
      const answered = () => {
        if (text.text !== String(value)) return;
        text.properties.text.change.disconnect(answered);
        done();
      };
      text.properties.text.change.connect(answered);
      slider.value = value;
    });
    times.push(performance.now() - began);
  }
  return times;
})"""


def find() -> str | None:
    """Find a Chromium on this machine; ``CHROMIUM`` names another."""
    named = os.environ.get("CHROMIUM")
    return named or next((path for name in _NAMES if (path := shutil.which(name))), None)


class Browser:
    """A Chromium that runs.

    :param socket: its debugging socket
    """

    def __init__(self, socket: Any) -> None:
        self._socket = socket
        self._numbers = itertools.count(1)

    def _do(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        number = next(self._numbers)
        words: dict[str, Any] = {"id": number, "method": method, "params": params}
        if session:
            words["sessionId"] = session
        self._socket.send(json.dumps(words))
        while True:
            try:
                answer = json.loads(self._socket.recv(timeout=_DEADLINE))
            except TimeoutError:
                msg = f"the page did not do it in {_DEADLINE:g} s"
                raise PeerError(msg) from None
            if answer.get("id") == number:
                if "error" in answer:
                    raise PeerError(answer["error"]["message"])
                found: dict[str, Any] = answer["result"]
                return found

    def measure(self, url: str, steps: int) -> tuple[float, list[float]]:
        """Load the page with an empty cache, and drag its slider; milliseconds of the load, of each step."""
        with self._loaded(url, IDLE) as (session, loaded):
            return loaded, self._ask(session, f"{_DRAG}({steps})")

    def load(self, url: str, shown: str) -> float:
        """Load a page with an empty cache; milliseconds.

        :param shown: resolves when it is there
        """
        with self._loaded(url, shown) as (_, loaded):
            return loaded

    @contextmanager
    def _loaded(self, url: str, shown: str) -> Iterator[tuple[str, float]]:
        context = self._do("Target.createBrowserContext")["browserContextId"]
        try:
            page = self._do("Target.createTarget", url="about:blank", browserContextId=context)["targetId"]
            session = self._do("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
            self._do("Page.enable", session)
            self._do("Page.navigate", session, url=url)
            yield session, self._ask(session, shown)
        finally:
            self._do("Target.disposeBrowserContext", browserContextId=context)

    def _ask(self, session: str, code: str) -> Any:
        words = {"expression": code, "awaitPromise": True, "returnByValue": True}
        answer = self._do("Runtime.evaluate", session, **words)
        if "exceptionDetails" in answer:
            raise PeerError(str(answer["exceptionDetails"].get("exception", {}).get("description"))[:200])
        return answer["result"]["value"]


@contextmanager
def browser(program: str) -> Iterator[Browser]:
    """Run Chromium with an empty profile."""
    from websockets.sync.client import connect

    with tempfile.TemporaryDirectory(prefix="browser-", ignore_cleanup_errors=True) as profile:
        process = subprocess.Popen(
            [program, *_FLAGS, f"--user-data-dir={profile}"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            with connect(_address(process), open_timeout=20, max_size=None, compression=None) as socket:
                yield Browser(socket)
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _address(process: subprocess.Popen[str]) -> str:
    found: queue.SimpleQueue[str] = queue.SimpleQueue()

    def read() -> None:
        with process.stderr or () as lines:  # type: ignore[attr-defined]
            for line in lines:
                if match := re.search(r"DevTools listening on (ws://\S+)", line):
                    found.put(match[1])
        found.put("")

    threading.Thread(target=read, daemon=True).start()
    try:
        address = found.get(timeout=_DEADLINE)
    except queue.Empty:
        address = ""
    if not address:
        msg = "the browser does not start"
        raise PeerError(msg)
    return address


def summary(times: list[float]) -> dict[str, float]:
    """Give the median and the 99th percentile."""
    return {"median": statistics.median(times), "p99": statistics.quantiles(times, n=100)[98]}
