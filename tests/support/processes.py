"""Processes of this machine: those that hold a tunnel, and those whose place is somewhere."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterable
from pathlib import Path

import pytest


def proc(place: str = "") -> Path:
    """Return a place in /proc; where a system has none, as macOS, the test is skipped."""
    if not Path("/proc/self").exists():
        pytest.skip("this system has no /proc")
    return Path("/proc", place)


def kill(pids: Iterable[int]) -> None:
    """Kill processes; one that has ended meanwhile, perhaps with another of them, is skipped."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def children() -> list[int]:
    """List the child processes of this one that hold a tunnel."""
    found = []
    for path in proc().glob("[0-9]*"):
        try:
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == os.getpid() and b"bokeh_ssh._tunnels.child_main" in (path / "cmdline").read_bytes():
                found.append(int(path.name))
        except (OSError, IndexError):
            continue
    return found


def running(top: Path | str) -> set[int]:
    """List the processes whose environment says that their place is there, or in there."""
    found = set()
    for path in proc().glob("[0-9]*/environ"):
        if path.parent.name == str(os.getpid()):
            continue
        try:
            words = path.read_bytes().split(b"\0")
            if any(word.split(b"/d")[0] == f"BOKEH_SSH_DIR={top}".encode() for word in words):
                found.add(int(path.parent.name))
        except OSError:
            continue
    return found
