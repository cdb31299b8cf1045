"""The near end of the warden: commands of a scheduler, run on the login node, and what they say."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bokeh_ssh._core.framing import plain
from bokeh_ssh._jobs.remote_program import RemoteProgram
from bokeh_ssh._ssh.connection import Connection

#: Seconds that the warden gives a command, and that we give the warden besides.
COMMAND_TIMEOUT = 30.0
_MARGIN = 10.0
#: Seconds without a question after which a client that waits for its job is gone; it asks every 30 s.
_SILENCE = 90.0
#: Seconds after which the comment of a job that waits says again that it has a warden.
_RENEWAL = 120.0
#: Seconds for the word that a job was cancelled, when all is closed.
_GOODBYE = 5.0


@dataclass(frozen=True)
class Answer:
    """What a command said, and its exit status; 127 where there is no such command."""

    status: int
    out: str
    err: str

    @property
    def lines(self) -> tuple[str, ...]:
        """What it said, errors first, fit to be shown."""
        text = f"{self.err}\n{self.out}"
        return tuple(line for line in map(plain, text.splitlines()) if line)

    @property
    def said(self) -> str:
        """The first of these lines, for a sentence."""
        return next(iter(self.lines), "it says nothing")


class Warden:
    """A warden on a login node, which looks after a job as long as this is open, and after it.

    :param grace: seconds that a job which waits outlives its client
    :param programs: those to look for
    :param setup: steps that may bring a Python
    :ivar found: those of them that are there
    :ivar path: the PATH that has them
    """

    def __init__(
        self,
        connection: Connection,
        pythons: Sequence[str],
        grace: float,
        programs: Sequence[str],
        *,
        setup: str | Sequence[str] = (),
    ) -> None:
        self.connection = connection
        self._program = RemoteProgram("warden", pythons=pythons, setup=setup)
        self._numbers = itertools.count(1)
        order = {"grace": grace, "programs": list(programs), "silence": _SILENCE, "renewal": _RENEWAL}
        self._program.start(connection, order, connection.hop.timeout)
        found = self._program.expect(("found",), COMMAND_TIMEOUT + _MARGIN)
        self.found = [str(each) for each in found["programs"]]
        self.path = str(found["path"])

    @property
    def alive(self) -> bool:
        """Whether it can be asked."""
        return self.connection.alive and not self._program.over

    def run(
        self,
        words: Sequence[str],
        text: str = "",
        *,
        guard: Mapping[str, object] | None = None,
        timeout: float = COMMAND_TIMEOUT,
    ) -> Answer:
        """Run a command there.

        :param text: its standard input
        :param guard: for one that submits: how to look after the job, from the moment that it is there
        :raises ConnectionLostError: if the line goes down
        """
        order = {"do": "run", "argv": list(words), "input": text, "timeout": timeout}
        return self._order({**order, "guard": guard} if guard else order)[0]

    def ask(self, job: str, words: Sequence[str], fresh: float, *, waits: bool) -> tuple[Answer, float]:
        """Ask what a job does, or take the answer that another tunnel of the account had; return its age too.

        :param words: the command; ``{jobs}`` stands for the numbers of all that is waited for
        :param fresh: seconds that an answer may be old
        :param waits: whether the job is to be cancelled when this is asked no more
        :raises ConnectionLostError: if the line goes down
        """
        order = {"do": "ask", "job": job, "argv": list(words), "fresh": fresh, "waits": waits}
        return self._order({**order, "timeout": COMMAND_TIMEOUT})

    def _order(self, order: dict[str, Any]) -> tuple[Answer, float]:
        number = next(self._numbers)
        self._program.send({**order, "id": number})
        said = self._program.expect(
            ("ran",), order["timeout"] + _MARGIN, lambda each: each.get("id") == number
        )
        answer = Answer(int(said["status"]), str(said["out"]), str(said["err"]))
        return answer, float(said.get("age", 0.0))

    def look_after(self, guard: Mapping[str, object]) -> None:
        """Let it look after a job that is there."""
        self._program.send({"do": "guard", "guard": guard})

    def inherit(self, guards: Sequence[Mapping[str, object]]) -> None:
        """Let it cancel those of these jobs that wait with nobody to look after them any more."""
        if guards:
            self._program.send({"do": "inherit", "guards": list(guards)})

    def end_job(self) -> bool:
        """Cancel the job; return whether the scheduler has heard it. It is passed on where it has not."""
        self._program.send({"do": "end"})
        return not self._program.expect(("ended",), _GOODBYE)["status"]

    def release(self) -> None:
        """Let it look after nothing any more."""
        self._program.send({"do": "release"})

    def close(self) -> None:
        """End its session; what is to be looked after still is."""
        self._program.close()
