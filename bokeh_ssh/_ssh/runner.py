"""What runs commands on a machine, as far as those who have one run there know it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Protocol, runtime_checkable


class Session(Protocol):
    """One command that runs on the remote machine. No method blocks; each works from any thread.

    :ivar ended: set when it is over, and nothing more comes of it
    """

    ended: threading.Event

    def write(self, data: bytes) -> None: ...
    def write_eof(self) -> None: ...
    def close(self) -> None: ...


@runtime_checkable
class Signals(Protocol):
    """A session whose command can be sent a signal (RFC 4254, section 6.9)."""

    def signal(self, name: str) -> None: ...


class Runner(Protocol):
    """What runs commands: a connection, or this machine's shell."""

    @property
    def name(self) -> str: ...
    def run(
        self,
        command: str,
        *,
        on_stdout: Callable[[bytes], None],
        on_stderr: Callable[[bytes], None],
        on_exit: Callable[[int | None], None],
        timeout: float,
    ) -> Session: ...


@runtime_checkable
class Subsystems(Protocol):
    """A runner that has subsystems besides commands (RFC 4254, section 6.5)."""

    def subsystem(
        self,
        name: str,
        *,
        on_stdout: Callable[[bytes], None],
        on_stderr: Callable[[bytes], None],
        on_exit: Callable[[int | None], None],
        timeout: float,
        first: bytes = b"",
    ) -> Session: ...
