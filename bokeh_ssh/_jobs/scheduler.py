"""What is the same for all schedulers: each is a module of commands and answers as text, with these names."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Protocol

from bokeh_ssh._core.errors import SubmitError
from bokeh_ssh._core.settings import setting
from bokeh_ssh._jobs import grid_engine, lsf, pbs, slurm
from bokeh_ssh._jobs.batch import Batch
from bokeh_ssh._jobs.job import Job, JobState
from bokeh_ssh._jobs.warden import Answer, Warden


class Scheduler(Protocol):
    """A scheduler, as :mod:`bokeh_ssh._jobs.slurm` and the modules beside it have it."""

    #: What ``Batch.scheduler`` calls it.
    NAME: str
    #: What people call it.
    TITLE: str
    #: The program by which it is known that a login node has it, and no other scheduler.
    SUBMIT: str
    #: The variable that holds the job's number in a job.
    JOB_VARIABLE: str
    #: How the bytes get to a job, the best way first; see :class:`Batch`.
    WAYS: tuple[str, ...]
    #: Seconds that it may take to say how a job ended.
    VERDICT: float
    #: Whether what a job writes is brought at its end only: its script has to write a file itself.
    SPOOLS: bool
    #: The command that says which release it is.
    VERSION: list[str]
    #: The command that lists the queues; it fails where the scheduler does not answer.
    QUEUES: list[str]
    #: The command that asks what jobs do, whose numbers stand for ``{jobs}`` with commas between.
    ASK: list[str]
    #: The command that lists the account's jobs.
    LIST: list[str]
    #: More words for that which submits, with which nothing is submitted, and it says whether it would be.
    TRIAL: list[str]
    #: What in a line of its answer says why it refused the job.
    REFUSED: re.Pattern[str]
    #: What it says of a job that it does not know, or has forgotten.
    UNKNOWN: tuple[str, ...]
    #: Its words for the states in which a job waits.
    WAITING: tuple[str, ...]
    #: What a comment begins with that marks a job as looked after by one client's warden.
    CLAIM: str
    #: How a job ended, in words, and the next step.
    ENDS: dict[JobState, tuple[str, str]]
    #: What a person types to see them.
    QUEUE_COMMAND: str
    #: What to do instead of entering an array of jobs.
    OF_ARRAY: str

    def submit_words(self, batch: Batch, nonce: str, output: str) -> list[str]:
        """Return the command that submits a script on its standard input; ``%j`` in ``output`` is the job."""

    def check_words(self, job: str) -> list[str]:
        """Return the command that says a job's state and comment, for its warden; see ``_remote.warden``."""

    def claim_words(self, job: str, nonce: str) -> list[str]:
        """Return the command that makes another warden look after a job."""

    def read_answer(self, job: str, status: int, out: str, err: str) -> Job | None:
        """Read that command's answer; None if the scheduler could not be asked, whatever the job does."""

    def why_never(self, reason: str) -> str:
        """Say why a job that waits for this reason can never start; empty if waiting may help."""

    def owner_words(self, job: str) -> list[str]:
        """Return the command that lists the jobs of a number, several of an array, and whose they are."""

    def read_owners(self, out: str) -> list[tuple[str, str, bool]]:
        """Read each job's number, its user's number, and whether bokeh_ssh submitted it."""

    def cancel_words(self, job: str) -> list[str]:
        """Return the command that cancels a job."""

    def canceller_words(self, job: str) -> list[str]:
        """Return the command that asks who cancelled a job."""

    def read_canceller(self, out: str) -> str:
        """Read the name or number of the account that cancelled it; empty if that is not known."""

    def read_version(self, out: str) -> str:
        """Read which release it is."""

    def read_queues(self, out: str) -> dict[str, str]:
        """Read the names of the queues, each with why it starts no jobs now; empty where it does."""

    def read_list(self, out: str) -> list[dict[str, str]]:
        """Read bokeh_ssh's jobs: number, name, state, reason, node, and the time that is left."""


#: In the order in which a login node is asked for them.
KNOWN: tuple[Scheduler, ...] = (slurm, grid_engine, lsf, pbs)
#: A job's number, alone in a line; with a cluster's name behind it, as ``sbatch --parsable`` says it.
_SUBMITTED = re.compile(r"^(\d+)(?:;[\w.-]+)?$", re.M)


def programs(name: str = "auto") -> list[str]:
    """List the programs to look for, for :func:`choose`."""
    return [each.SUBMIT for each in KNOWN if name in ("auto", each.NAME)]


def choose(warden: Warden, host: str) -> Scheduler:
    """Return the scheduler that a login node has; of several with programs there, the first that answers.

    :raises SubmitError: if there is none
    """
    there = [each for each in KNOWN if each.SUBMIT in warden.found]
    if not there:
        raise no_scheduler(host)
    if len(there) == 1:
        return there[0]
    return next((each for each in there if not warden.run(each.QUEUES).status), there[0])


def read_submitted(out: str) -> str:
    """Read the number in what a submit command says; empty if there is none. Start files may say more."""
    found = _SUBMITTED.search(out)
    return found[1] if found else ""


def refusal(which: Scheduler, lines: Sequence[str]) -> str:
    """Choose the lines of a submit command's answer that say why the job was refused."""
    ours = [line for line in lines if set(line) - set("-*= ")]
    errors = [found[1].strip() for line in ours if (found := which.REFUSED.search(line))]
    return "; ".join(errors) or " / ".join(ours) or "it said nothing"


def guard(which: Scheduler, nonce: str, job: str = "{job}") -> dict[str, object]:
    """Say how a warden sees that a job still waits and is its own to cancel; see ``_remote.warden``.

    :param job: its number; left out for one that the warden submits, and whose number it fills in
    """
    return {
        "check": which.check_words(job),
        "waits": list(which.WAITING),
        "mine": which.CLAIM + nonce,
        "claim": which.CLAIM,
        "cancel": which.cancel_words(job),
        "renew": which.claim_words(job, f"{nonce}t{{until}}"),
    }


def no_scheduler(host: str) -> SubmitError:
    """Make the error for a machine where no scheduler is found."""
    wanted = ", ".join(f"{each.TITLE}'s {each.SUBMIT}" for each in KNOWN)
    msg = f"there is no scheduler that is known here ({wanted})"
    hint = f"give the cluster's login node; without {setting('batch')} the server runs on that machine itself"
    return SubmitError(msg, host=host, hint=hint)


def list_jobs(warden: Warden, which: Scheduler, *, but: str = "") -> tuple[list[dict[str, str]], Answer]:
    """List the account's jobs, and have the warden cancel those that wait and have lost their own warden.

    :param but: the number of a job that has one
    :returns: what ``read_list`` makes of them, and the answer, which may be an error
    """
    answer = warden.run(which.LIST)
    jobs = [] if answer.status else which.read_list(answer.out)
    warden.inherit([guard(which, "", job["id"]) for job in jobs if not job["node"] and job["id"] != but])
    return jobs, answer
