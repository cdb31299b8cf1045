"""Fixtures of the tests of one SSH connection."""

from __future__ import annotations

from typing import Any

import pytest

from bokeh_ssh._ssh.transport import Transport


@pytest.fixture
def key_changes(monkeypatch: pytest.MonkeyPatch) -> dict[Transport, int]:
    """Count the NEWKEYS messages of each connection: the proof that keys were changed."""
    seen: dict[Transport, int] = {}
    original = Transport._parse_newkeys

    def count(self: Transport, message: Any) -> None:
        seen[self] = seen.get(self, 0) + 1
        original(self, message)

    monkeypatch.setattr(Transport, "_parse_newkeys", count)
    return seen
