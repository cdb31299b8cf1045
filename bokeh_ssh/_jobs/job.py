"""What is known here about a batch job: its state, as a record; and how its time and its end are worded."""

from __future__ import annotations

import enum
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass

from bokeh_ssh._core.settings import setting


class JobState(str, enum.Enum):
    """The state of a job, in Slurm's words; states of other schedulers are translated into them."""

    PENDING = "PENDING"  #: It waits in the queue.
    RUNNING = "RUNNING"
    SUSPENDED = "SUSPENDED"  #: It has started, and is stopped for a while: its server does not answer.
    COMPLETING = "COMPLETING"  #: It has ended; how is not known yet.
    COMPLETED = "COMPLETED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"
    TIMEOUT = "TIMEOUT"
    DEADLINE = "DEADLINE"  #: It could not be over by the time that its submitter had set (``--deadline``).
    OUT_OF_MEMORY = "OUT_OF_MEMORY"
    NODE_FAIL = "NODE_FAIL"
    PREEMPTED = "PREEMPTED"
    UNKNOWN = "UNKNOWN"  #: The scheduler does not know the job any more.

    @property
    def over(self) -> bool:
        """Whether the job has ended, and it is known how."""
        return not (self.waits or self in (JobState.RUNNING, JobState.COMPLETING))

    @property
    def waits(self) -> bool:
        """Whether it is up to the scheduler when the job goes on."""
        return self in (JobState.PENDING, JobState.SUSPENDED)


@dataclass(frozen=True, kw_only=True)
class Job:
    """The batch job of a tunnel.

    :ivar id: the scheduler's number for it
    :ivar state: see :class:`JobState`
    :ivar node: the machine it runs on; empty while it waits
    :ivar reason: why it waits, in the scheduler's word; empty if the scheduler gives no reason
    :ivar estimated_start: when the scheduler expects it to start, in seconds since the epoch; None if it does
        not say, or has said a time that has passed
    :ivar ends_at: when its time limit ends it, in seconds since the epoch; None while it waits
    """

    id: str
    state: JobState = JobState.PENDING
    node: str = ""
    reason: str = ""
    estimated_start: float | None = None
    ends_at: float | None = None


@dataclass(frozen=True, kw_only=True)
class ListedJob:
    """A job that waits or runs.

    :ivar host: the login node, as the user named it
    :ivar id: the scheduler's number for it
    :ivar name: that of its first app, or the one that it was submitted with
    :ivar state: in the scheduler's word
    :ivar reason: why it waits; empty where it runs, and where nobody knows
    :ivar node: the machine that it runs on; empty while it waits
    :ivar left: until its time limit, as the scheduler writes it
    """

    host: str
    id: str
    name: str = ""
    state: str
    reason: str
    node: str
    left: str


#: Says what time it is, for an answer whose times are of that clock: clocks of machines may differ by hours.
CLOCK = "date +clock=%s"
_CLOCK = re.compile(r"^clock=(\d{1,11})$", re.M)


def read_clock(out: str) -> float:
    """Read when an answer was given, by the clock that its times are of; now, if it does not say."""
    found = _CLOCK.search(out)
    return float(found[1]) if found else time.time()


def list_fields(job: Job, name: str, now: float) -> dict[str, str]:
    """Return what a :class:`ListedJob` has besides its host, with the time that is left as ``H:M:S``."""
    left = ""
    if job.ends_at is not None:
        minutes, second = divmod(max(0, int(job.ends_at - now)), 60)
        left = f"{minutes // 60}:{minutes % 60:02}:{second:02}"
    known = {"state": job.state.value, "reason": job.reason, "node": job.node}
    return {"id": job.id, "name": name, **known, "left": left}


def run_script(text: str, *words: str) -> list[str]:
    """Return the command that runs lines of ``sh`` with these arguments."""
    return ["sh", "-c", text, "sh", *words]


def describe_ends(look: str) -> dict[JobState, tuple[str, str]]:
    """Return for each state that is an end what happened and the next step.

    :param look: the next step where a job failed: what the scheduler says of it
    """
    again = f"start it again, or give {setting('resubmit=True')}, which does so"
    return {
        JobState.COMPLETED: ("the job ended by itself", "start it again"),
        JobState.FAILED: ("the job failed", look),
        JobState.CANCELLED: ("the job was cancelled", "start it again, unless that was you"),
        JobState.TIMEOUT: ("the job reached its time limit", f"give a longer {setting('time')}; {again}"),
        JobState.DEADLINE: ("the job could not be over by its deadline", "give a later one, or less time"),
        JobState.OUT_OF_MEMORY: (
            "the job used more memory than it has",
            f"start it again with more {setting('memory')}",
        ),
        JobState.NODE_FAIL: ("the job's machine failed", again),
        JobState.PREEMPTED: ("the job had to make room for one of a higher priority", again),
        JobState.UNKNOWN: ("the job is over, and the scheduler does not know how it ended", "start it again"),
    }


def explain_end(
    ends: Mapping[JobState, tuple[str, str]], job: Job, memory: str | None, canceller: str
) -> tuple[str, str]:
    """Say how a job ended, with the account, the memory or the node, and the next step.

    :param ends: both for each state, and for one that is not known
    :param memory: what the job had asked for
    :param canceller: the account that has cancelled it; empty where that is not known
    """
    why, hint = ends.get(job.state, ends[JobState.UNKNOWN])
    details = {
        JobState.CANCELLED: f" by {canceller}" if canceller else "",
        JobState.OUT_OF_MEMORY: f" ({memory})" if memory else "",
        JobState.NODE_FAIL: f" ({job.node})" if job.node else "",
    }
    return why + details.get(job.state, ""), hint
