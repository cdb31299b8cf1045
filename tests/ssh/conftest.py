"""Fixtures of the tests of one SSH connection."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from auth_servers import Bed, Rules
from bokeh_ssh._ssh.connection import Connection
from bokeh_ssh._ssh.transport import Transport


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    """A folder for key files."""
    folder = tmp_path / "keys"
    folder.mkdir()
    return folder


@pytest.fixture
def make_bed() -> Iterator[Callable[..., Bed]]:
    """Start asyncssh servers: the arguments are those of Rules."""
    with contextlib.ExitStack() as stack:
        yield lambda *args, **kw: stack.enter_context(contextlib.closing(Bed(lambda: Rules(*args, **kw))))


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


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """List how many channels each login has asked for that was successful in the end."""
    counts: list[int] = []
    open_ahead: weakref.WeakKeyDictionary[Transport, int] = weakref.WeakKeyDictionary()
    ask, start = Transport.ask_ahead, Connection._start_keepalive

    def count(self: Transport, wanted: Any) -> None:
        ask(self, wanted)
        open_ahead[self] = len(self._channels)

    def note(self: Connection) -> None:
        counts.append(open_ahead.pop(self.transport, 0))
        start(self)

    monkeypatch.setattr(Transport, "ask_ahead", count)
    monkeypatch.setattr(Connection, "_start_keepalive", note)
    return counts
