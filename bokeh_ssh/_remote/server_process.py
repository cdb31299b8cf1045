"""A server's processes: how they are started, what becomes of them, and how they are ended."""

from __future__ import annotations

import contextlib
import json
import os
import time
from enum import Enum

from bokeh_ssh._remote import process_tree
from bokeh_ssh._remote.guardian import Guardian
from bokeh_ssh._remote.process_group import PATIENCE, piped, start

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any


class Stage(Enum):
    """How far a server is; :data:`NEXT` has what may follow."""

    PREPARING = 0  # the client brings what it needs
    STARTING = 1  # it does not listen yet
    READY = 2
    ENDING = 3  # it has ended, or is asked to: what is left of it was sent TERM
    KILLING = 4


NEXT = {
    Stage.PREPARING: (Stage.STARTING, Stage.ENDING, Stage.KILLING),
    Stage.STARTING: (Stage.STARTING, Stage.READY, Stage.ENDING, Stage.KILLING),  # one may be tried twice
    Stage.READY: (Stage.ENDING, Stage.KILLING),
    Stage.ENDING: (Stage.KILLING,),
    Stage.KILLING: (),
}


class ServerProcess:
    """A server, which leads a process group, its guardian, and all that they have started.

    :param leave: removes what a supervisor that was killed cannot
    :ivar mark: stands in the environment of all of them; empty where nothing does
    :ivar pid: the server's; 0 before it is started
    :ivar status: its exit status, below 0 for a signal; None while it runs
    :ivar halted: whether it is stopped
    :ivar others: children of ours that are not the server's
    :ivar stop_requested: whether it ends because somebody wants it to, or its time is up
    """

    def __init__(self, leave: Callable[[], object]) -> None:
        self.mark = b""
        self.pid = self.group = 0
        self.status: int | None = None
        self.halted = False
        self.guardian: Guardian | None = None
        self.others: set[int] = set()
        self.stage = Stage.PREPARING
        self.stop_requested = False
        self._leave = leave
        self._deadline = 0.0  # of its end: when KILL is sent, and then when nothing more is waited for
        self._adopts = False  # what leaves the group, and its parents, becomes a child of ours
        self._untold = False  # the guardian was killed where nobody adopts: its end is not reported
        self._asked: set[tuple[int, int]] = set()  # who was sent TERM

    def advance(self, stage: Stage) -> bool:
        """Go on to a stage, if that may follow; return whether it does."""
        may = stage in NEXT[self.stage]
        if may:
            self.stage = stage
        return may

    @property
    def ending(self) -> bool:
        """Whether it is being ended."""
        return self.stage in (Stage.ENDING, Stage.KILLING)

    # --- start

    def start(self, argv: list[bytes], env: dict[bytes, bytes]) -> list[int]:
        """Start the server in a group of its own; return what its output and error are read from."""
        if self.group:  # an attempt before: its number is pinned only as long as its guardian lives
            process_tree.end(lambda rows: process_tree.members(self.group, rows), 1.0, self.group)
        streams = piped(lambda outputs: self.guard(lambda: start(argv, env, 0, outputs)))
        self.pid = self.group
        self.status = None
        return streams

    def guard(self, begin: Callable[[], int]) -> None:
        """Start the server's guardian, by another than before if there was one.

        :param begin: starts it, or returns the one that runs; 0 as long as there is none
        """
        former = self.guardian
        if not former:
            self.others = process_tree.below(os.getpid(), process_tree.table())  # what "setup" has left
            self._adopts = process_tree.adopt()
        self.guardian = Guardian(begin, self._leave, self.mark, self._adopts)
        self.group = self.guardian.child
        if former:
            former.dismiss()

    def replace_guardian(self) -> None:
        """Do without a guardian that was killed: the server is our child now, or nobody's."""
        if self.pid and not self._adopts:
            self._untold = True
            self.end(PATIENCE, requested=True)
        else:
            with contextlib.suppress(OSError):
                self.guard(lambda: self.group)

    # --- the end

    def end(self, patience: float, requested: bool = False) -> None:
        """Ask all of it to end, and see to it after ``patience`` seconds; the shortest counts."""
        deadline = time.monotonic() + patience
        if self.advance(Stage.ENDING):
            self.stop_requested = requested
            self._deadline = deadline
            self._press()
        elif self.stage is Stage.ENDING:
            self._deadline = min(self._deadline, deadline)

    def kill(self) -> None:
        """Kill all of it; what then still runs nobody can end."""
        if self.advance(Stage.KILLING):
            self._deadline = time.monotonic() + PATIENCE
        self._press()

    def check(self, now: float) -> None:
        """Keep its guardian running, and go on ending it, if it is to end."""
        if self.guardian:
            self.guardian.resume()
        if self.stage is Stage.ENDING and now < self._deadline:
            self._press()
        elif self.ending:
            self.kill()

    def is_over(self) -> bool:
        """Return whether nothing of it is left, or what is left cannot be ended by anyone."""
        if not self.ending:
            return False
        if not self.pid or (self.stage is Stage.KILLING and time.monotonic() > self._deadline):
            return True
        return (self._untold or self.status is not None) and not self._remaining(process_tree.table())

    def running(self) -> set[int]:
        """List the processes that still run, as far as they can be found; the server's is among them."""
        return self._remaining(process_tree.table()) | {self.pid}

    def _remaining(self, rows: process_tree.Table) -> set[int]:
        """List what still runs of the server's group and, where it can be known, of all that was started."""
        found = process_tree.members(self.group, rows)
        if self._adopts:
            found |= process_tree.below(os.getpid(), rows, self.others)
        return found - {self.guardian.pid if self.guardian else 0}

    def _press(self) -> None:
        """End what remains: TERM once, and KILL when it is time for that."""
        rows = process_tree.table()
        killing = self.stage is Stage.KILLING
        process_tree.press(self._remaining(rows), rows, self._asked, self.group, killing)


class Sidecar:
    """A program beside the server, in its process group: ended with it. A publication on a gateway is one.

    :ivar pid: its process; 0 where none runs
    :ivar status: the last that it said of itself: a JSON object, on a line of its standard output
    """

    def __init__(self) -> None:
        self.pid = 0
        self.status: dict[str, Any] = {}

    def start(self, argv: list[bytes], env: dict[bytes, bytes], group: int) -> list[int]:
        """Start it; return our ends of its standard output and error.

        :raises OSError: if it cannot be started
        """
        self.status = {}

        def begin(outputs: list[int]) -> None:
            self.pid = start(argv, env, group, outputs)

        return piped(begin)

    def read_status(self, lines: Sequence[str]) -> bool:
        """Take lines of its standard output; return whether it has said something."""
        heard = False
        for line in lines:
            try:
                word = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(word, dict):
                self.status, heard = word, True
        return heard

    def note_ended(self) -> None:
        """Take note that it has."""
        self.pid, self.status = 0, {}
