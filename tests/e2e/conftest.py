"""Fixtures: a real browser."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

import browser
from skips import missing


@pytest.fixture
def open_page() -> Iterator[Callable[[], browser.Page]]:
    """Return what makes a page in a real browser."""
    try:
        import playwright.sync_api  # noqa: F401 - whether it is there
    except ImportError as exc:
        missing(f"playwright is not installed ({exc})")
    if browser.find() is None:
        missing("no Chromium is installed")
    with browser.chromium() as make:
        yield make
