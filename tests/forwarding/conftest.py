"""What all tests of the folder are run with."""

from __future__ import annotations

import pytest

from bokeh_ssh._forwarding import static_cache


@pytest.fixture(autouse=True)
def _slow_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait for what is kept here, however busy this machine is: the server would be asked otherwise."""
    monkeypatch.setattr(static_cache, "_PATIENCE", 30.0)
