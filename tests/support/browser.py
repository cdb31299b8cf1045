"""A real browser: headless Chromium with one page of Bokeh's in it, used as a person would use it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

#: A slider, a text that a Python callback sets, and a count that lives in the session on the server.
APP = """
from bokeh.io import curdoc
from bokeh.models import Div, Slider

slider = Slider(start=0, end=100, value=1, name="slider")
text = Div(text="waiting", name="text")
calls = 0


def moved(attr, old, new):
    global calls
    calls += 1
    text.text = f"answer {new * 2}, call {calls}"


slider.on_change("value", moved)
curdoc().add_root(slider)
curdoc().add_root(text)
"""

#: BokehJS makes it again when it takes over the state of the server's session.
_ROOT = "Bokeh.documents[0].roots()[0]"

_FLAGS = [
    "--no-sandbox",  # containers and root have none
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def find() -> str | None:
    """Find Chromium on this machine."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Page:
    """One open app. Made by :func:`chromium`."""

    def __init__(self, page: Any) -> None:
        self.page = page
        self.value = 1
        self.calls = 0

    def open(self, url: str) -> Page:
        """Open the app, and wait until it is there; from now on a reload would be noticed."""
        self.page.goto(url, timeout=30_000)
        self.page.locator(".noUi-handle").wait_for(timeout=30_000)
        self.page.get_by_text("waiting").wait_for(timeout=10_000)
        self.page.evaluate("window.neverReloaded = true")
        self.page.evaluate(f"void (window.firstRoot = {_ROOT})")
        return self

    def wait_until_back(self, timeout: float = 60) -> None:
        """Wait until the page, after a loss, has the session's state again, which BokehJS asks for.

        A move between its new connection and that answer reaches Python, but the page forgets it.
        """
        self.page.wait_for_function(f"window.firstRoot !== {_ROOT}", timeout=timeout * 1000)

    def move(self, timeout: float = 10) -> None:
        """Move the slider one step, and see the answer of the same session's Python callback."""
        self.page.locator(".noUi-handle").press("ArrowRight")
        self.value += 1
        self.calls += 1
        answer = f"answer {self.value * 2}, call {self.calls}"
        self.page.get_by_text(answer).wait_for(timeout=timeout * 1000)
        assert self.page.evaluate("window.neverReloaded === true"), "the page was reloaded"


@contextmanager
def chromium(*flags: str) -> Iterator[Any]:
    """Run Chromium, with more ``flags``, while the context lasts; gives what makes pages."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find(), args=[*_FLAGS, *flags])
        try:
            yield lambda: Page(browser.new_context().new_page())
        finally:
            browser.close()
