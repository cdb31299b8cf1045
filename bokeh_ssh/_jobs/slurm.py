"""Slurm's commands and what they say. Text only.

What it really does was tried with 22.05; the comments name what is unlike its manual.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import NamedTuple

from bokeh_ssh._core.framing import plain
from bokeh_ssh._core.settings import setting
from bokeh_ssh._jobs.batch import Batch, check_extra
from bokeh_ssh._jobs.job import CLOCK, Job, JobState, describe_ends, run_script

NAME = "slurm"
TITLE = "Slurm"
SUBMIT = "sbatch"
JOB_VARIABLE = "SLURM_JOB_ID"
WAYS: tuple[str, ...] = ("srun",)
VERDICT = 60.0
QUEUE_COMMAND = "squeue --me"
OF_ARRAY = "once it runs, name a job of it by the number of its own: squeue --me -o '%i %A'"
SPOOLS = False
VERSION = [SUBMIT, "--version"]
REFUSED = re.compile(r"error:(.*)")
TRIAL = ["--test-only"]

#: Seconds before the time limit at which the holder is sent a signal; Slurm looks every 30 s only.
_WARNING = 120
#: Marks a job as looked after, in its comment, by one client's warden.
CLAIM = "bokeh-ssh:"

#: Fields of ``squeue`` that hold no separator: number, state, reason, (expected) start, end, nodes, queues.
#: Names and comments are left out, since they may hold anything; the batch host (%B), since of salloc's job
#: that is the login node.
_FORMAT = "%A|%T|%r|%S|%e|%N|%P"
_ANSWER = re.compile(
    r"^(?P<job>\d+)\|(?P<state>[A-Z_]+)\|(?P<reason>[^|]*)\|(?P<start>[^|]*)\|(?P<end>[^|]*)\|(?P<node>[^|]*)"
    r"\|(?P<queues>[^|\n]*)$",
    re.M,
)
#: Numbers of nodes in a list, of which the first one is kept.
_NUMBERS = re.compile(r"\[([^][,-]*)(?:[,-][^][]*)?\]")
#: What squeue says, with exit status 1, of a job that it does not know, or knows no more (MinJobAge), or of
#: a number that no job has.
UNKNOWN: tuple[str, ...] = ("Invalid job id",)

_RUNNING = ("RUNNING", "SIGNALING", "RESIZING")
_SUSPENDED = ("SUSPENDED", "STOPPED")
WAITING: tuple[str, ...] = (
    "PENDING",
    "CONFIGURING",
    "REQUEUED",
    "REQUEUE_HOLD",
    "REQUEUE_FED",
    "RESV_DEL_HOLD",
)
_OVER = {"BOOT_FAIL": JobState.NODE_FAIL, "REVOKED": JobState.CANCELLED}

#: Reasons that no waiting ends. Slurm accepts such jobs, and lets them wait for ever.
_NEVER = {
    "PartitionTimeLimit": "its time limit is over the queue's",
    "PartitionNodeLimit": "it wants more nodes than the queue has, or than it gives to one job",
    "PartitionConfig": "no machine of the queue has what it wants",
    "PartitionDown": "the queue is down",
    "PartitionInactive": "the queue is closed",
    "BadConstraints": "no machine has what it wants",
    "InvalidAccount": "its account is not known",
    "InvalidQOS": "its quality of service (QOS) is not known",
    "AccountNotAllowed": "its account may not use the queue",
    "QOSNotAllowed": "its quality of service (QOS) may not use the queue",
    "MaxMemPerLimit": "it wants more memory than the queue gives to one job",
    "ReservationDeleted": "its reservation was deleted",
    "ReservationInvalid": "its reservation is not valid",
    "DependencyNeverSatisfied": "what it depends on has failed",
}
#: A limit on what one job may have, which stays whatever other jobs do.
_PER_JOB = re.compile(r"(Assoc|QOS)(Grp)?Max\w*Per(Job|Node)\w*|QOSMin\w+")
#: In place of a word, a sentence that names the queue and whom it allows.
_NOT_ALLOWED = re.compile(r"Job's (account|QOS) not (known|permitted)\b.*\)")

ENDS = describe_ends("see what your cluster's accounting (sacct -j) says of it")

_ARRAY = "a server runs in one job, not in an array of them"
_CLUSTER = "the job has to be on the cluster that the login node belongs to"
_WAIT = "the job's end would be waited for before its start"
_QUIET = "the job would be submitted without its number being printed"
_REFUSED = {
    "--array": _ARRAY,
    "-a": _ARRAY,
    "--clusters": _CLUSTER,
    "-M": _CLUSTER,
    "--requeue": "a job that starts again by itself has nobody who waits for it; "
    f"{setting('resubmit=True')} submits a new one",
    "--quiet": _QUIET,
    "-Q": _QUIET,
    "--wait": _WAIT,
    "-W": _WAIT,
    **dict.fromkeys(
        ("--test-only", "--help", "-h", "--usage", "--version", "-V"), "nothing would be submitted"
    ),
}


def submit_words(batch: Batch, nonce: str, output: str) -> list[str]:
    """Return the command that submits a script on its standard input; its output goes to that file."""
    check_extra(batch.extra, _REFUSED)
    words = [SUBMIT, "--parsable", "--nodes=1", "--ntasks=1", "--open-mode=append"]
    for option, value in (
        ("job-name", batch.name),
        ("time", batch.time),
        ("partition", batch.queue),
        ("account", batch.account),
        ("cpus-per-task", batch.cpus),
        ("mem", batch.memory),
        ("gpus", batch.gpus),
    ):
        if value is not None:
            words.append(f"--{option}={value}")
    # Those last, since the last one counts: nothing works without them.
    return [
        *words,
        *batch.extra,
        "--no-requeue",  # a job that starts again by itself has nobody who waits for it
        f"--signal=B:USR1@{_WARNING}",
        f"--comment={CLAIM}{nonce}",
        f"--output={output}",
    ]


#: The command that asks what jobs do; times come in seconds since the epoch, by the controller's clock, which
#: is asked too where there are any. With the user, Slurm has to look through no others' jobs for several
#: numbers.
ASK = run_script(
    f"""\
SLURM_TIME_FORMAT=%s; export SLURM_TIME_FORMAT
said=$(squeue -h -t all -u "$(id -u)" -j "$1" -o "{_FORMAT}") || exit
printf '%s\\n' "$said"
case $said in *'|'[0-9][0-9][0-9][0-9][0-9][0-9][0-9][0-9]*)
    now=$(scontrol show config 2>/dev/null | sed -n 's/^Configuration data as of \\([0-9]*\\)$/\\1/p')
    if [ -n "$now" ]; then echo "clock=$now"; else {CLOCK}; fi ;;
esac""",
    "{jobs}",
)
#: How it lists the account's jobs; names may hold anything.
LIST = ["sh", "-c", 'squeue -h -u "$(id -un)" -o "%A|%T|%r|%N|%L|%k|%j"']
_LISTED = re.compile(rf"^(\d+)\|([A-Z_]+)\|([^|\n]*)\|([^|\n]*)\|([^|\n]*)\|{CLAIM}\w+\|(.*)$", re.M)


def read_list(out: str) -> list[dict[str, str]]:
    """Read bokeh_ssh's jobs: number, name, state, reason, node, and the time that is left."""
    jobs = []
    for number, state, reason, node, left, name in _LISTED.findall(out):
        waits = read_state(state) is JobState.PENDING
        jobs.append(
            {
                "id": number,
                "name": plain(name),
                "state": state,
                "reason": plain(reason) if waits and reason != "None" else "",
                "node": "" if waits else read_first_node(node),
                "left": plain(left),
            }
        )
    return jobs


def owner_words(job: str) -> list[str]:
    """Return the command that lists the jobs of a number, more than one of an array, and whose they are."""
    return ["squeue", "-h", "-t", "all", "-j", job, "-o", "%A|%U|%i|%k"]


def read_owners(out: str) -> list[tuple[str, str, bool]]:
    """Read each job's number, its user's number, and whether bokeh_ssh submitted it.

    The number is as in ``12+1`` for a part of a heterogeneous job: ``srun`` joins no part by its own number.
    """
    found = re.findall(r"^(\d+)\|(\d+)\|([\w+]+)\|(.*)$", out, re.M)
    return [
        (name if "+" in name else number, user, comment.startswith(CLAIM))
        for number, user, name, comment in found
    ]


def cancel_words(job: str) -> list[str]:
    """Return the command that cancels a job; Slurm says nothing against one that it does not know."""
    return ["scancel", job]


def claim_words(job: str, nonce: str) -> list[str]:
    """Return the command that makes another warden look after a job."""
    return ["scontrol", "update", f"JobId={job}", f"Comment={CLAIM}{nonce}"]


def check_words(job: str) -> list[str]:
    """Return the command that says a job's state and comment, for its warden; see ``_remote.warden``."""
    text = f"""\
said=$(squeue -h -j "$1" -o "%T %k" 2>&1) || case $said in *"{UNKNOWN[0]}"*) exit 0 ;; *) exit 1 ;; esac
printf '%s\\n' "$said\""""
    return run_script(text, job)


def stream_words(job: str, node: str) -> list[str]:
    """Return the command that runs another one beside the job's script, joined to it by its streams.

    Without ``-u`` what it says is held back until a newline.
    """
    where = [f"--nodelist={node}"] if node else []
    return ["srun", "--overlap", f"--jobid={job}", *where, "--nodes=1", "--ntasks=1", "-u", "-Q", "--"]


def holder_words(job: str, node: str, script: str) -> list[str]:
    """Return the command that lets a script run as a step of a job.

    It has no standard input or output: with them, the step would end with the session that starts it.
    """
    words = ["srun", "--overlap", f"--jobid={job}", *([f"--nodelist={node}"] if node else [])]
    words += ["--nodes=1", "--ntasks=1", "-Q", "--input=none", "-o", "/dev/null", "-e", "/dev/null"]
    leave = 'setsid "$@" </dev/null >/dev/null 2>&1 &'
    return ["/bin/sh", "-c", leave, "sh", *words, "--", "/bin/sh", "-c", script]


def end_holder_words(job: str, step: str) -> list[str]:
    """Return the command that ends that step, and nothing else of the job."""
    return ["scancel", "--signal=TERM", f"{job}.{step}"]


def read_answer(job: str, status: int, out: str, err: str) -> Job | None:
    """Read ``squeue``'s answer; None if it could not be asked, whatever the job does."""
    lines = list(_ANSWER.finditer(out))  # start files may say something before
    found = next((line for line in reversed(lines) if line["job"] == job), None)
    if status == 0 and found:
        state = read_state(found["state"])
        over_or_runs = state is not JobState.PENDING
        reason = "" if over_or_runs or found["reason"] == "None" else plain(found["reason"])
        if "," in found["queues"] and why_never(reason):  # another one of them may start it
            reason += f" (in one of {plain(found['queues'])})"
        return Job(
            id=job,
            state=state,
            node=read_first_node(found["node"]) if over_or_runs else "",
            reason=reason,
            estimated_start=None if over_or_runs else _seconds(found["start"]),
            ends_at=_seconds(found["end"]) if over_or_runs else None,
        )
    if (status == 0 and (lines or not out.strip())) or UNKNOWN[0] in err:
        return Job(id=job, state=JobState.UNKNOWN)
    return None


def read_first_node(nodes: str) -> str:
    """Read the first of a list of nodes, as Slurm writes it; empty if there is none.

    >>> read_first_node("rack[2-3,7]n[08-16],login1")
    'rack2n08'
    """
    first = _NUMBERS.sub(r"\1", nodes).partition(",")[0]
    return "" if first in ("n/a", "(null)") else plain(first)


def read_state(word: str) -> JobState:
    """Read a state, also one that is a special case of another."""
    if word in _RUNNING:
        return JobState.RUNNING
    if word in _SUSPENDED:
        return JobState.SUSPENDED
    if word in WAITING:
        return JobState.PENDING
    if word in _OVER:
        return _OVER[word]
    try:
        return JobState(word)
    except ValueError:  # COMPLETING, STAGE_OUT, and what later versions may have
        return JobState.COMPLETING


def _seconds(word: str) -> float | None:
    return float(word) if word.isascii() and word.isdigit() and len(word) < 12 else None


def why_never(reason: str) -> str:
    """Say why a job that waits for this reason can never start; empty if waiting may help."""
    if _PER_JOB.fullmatch(reason):
        return "it wants more than one job may have, or less than it must"
    sentence = _NOT_ALLOWED.fullmatch(reason)
    return _NEVER.get(f"{'QOS' if sentence[1] == 'QOS' else 'Account'}NotAllowed" if sentence else reason, "")


#: The command that says whether the controller answers.
CONTROLLER = ["scontrol", "ping"]

#: The command that lists the queues.
QUEUES = ["sinfo", "-h", "-o", "%P|%a|%l"]
#: A queue: its name, with * for the default one; its state; and its longest time.
_QUEUE = re.compile(r"^(?P<name>[^|\n]+)\|(?P<state>[a-z]+)\|(?P<limit>[^|\n]+)$", re.M)
#: The oldest release whose srun joins a job beside what runs in it.
_OVERLAP = (20, 11)


class Queue(NamedTuple):
    """A queue (Slurm: partition); ``limit`` is empty where it takes jobs of any length."""

    name: str
    state: str
    limit: str

    @property
    def up(self) -> bool:
        """Whether it starts jobs."""
        return self.state == "up"


def overlaps(version: str) -> bool:
    """Return whether srun of this version (``slurm-wlm 22.05.8``) joins jobs; True where nobody knows."""
    found = re.search(r"(\d{1,9})\.(\d{1,9})", version)
    return found is None or (int(found[1]), int(found[2])) >= _OVERLAP


def read_version(out: str) -> str:
    """Read which release it is."""
    return plain(" ".join(out.split()))


def read_queues(out: str) -> dict[str, str]:
    """Read the names of the queues, each with why it starts no jobs now; empty where it does."""
    return {
        plain(found["name"].rstrip("*")): "" if found["state"] == "up" else f"is {found['state']}"
        for found in _QUEUE.finditer(out)
    }


def read_queue(out: str, name: str | None) -> Queue | None:
    """Read a queue, the default one without a name; None if there is none."""
    for found in _QUEUE.finditer(out):
        if found["name"].rstrip("*") == name if name else found["name"].endswith("*"):
            limit = "" if found["limit"] in ("infinite", "n/a") else found["limit"]
            return Queue(plain(found["name"].rstrip("*")), found["state"], plain(limit))
    return None


def is_longer(time: str | None, limit: str) -> bool:
    """Return whether a time is longer than a limit; False where one of them cannot be read."""
    ours, theirs = read_time(time or ""), read_time(limit)
    return ours is not None and theirs is not None and ours > theirs


def read_time(text: str) -> int | None:
    """Read a time as Slurm writes it, in seconds: ``M``, ``M:S``, ``H:M:S``, ``D-H``, ``D-H:M``, ``D-H:M:S``.

    >>> read_time("1-12:30")
    131400
    """
    days, dash, rest = text.rpartition("-")
    parts = rest.split(":")
    if not all(part.isascii() and part.isdigit() for part in (*parts, *([days] if dash else ()))):
        return None
    units = [3600, 60, 1] if dash or len(parts) == 3 else [60, 1]
    if len(parts) > len(units):
        return None
    return int(days or 0) * 86400 + sum(int(part) * unit for part, unit in zip(parts, units, strict=False))


def read_test(lines: Sequence[str]) -> str:
    """Read when and where a job would start in what ``sbatch --test-only`` said; empty if it does not say."""
    for line in lines:
        _, _, rest = line.partition(" to start at ")
        when, *words = rest.split() or [""]
        nodes = [after for word, after in itertools.pairwise(words) if word in ("node", "nodes")]
        if nodes:
            return f"; it might start at {when.replace('T', ' ')} on {nodes[-1]}"
    return ""


def canceller_words(job: str) -> list[str]:
    """Return the command that asks who cancelled a job: the accounting knows, if there is one."""
    return ["sacct", "-n", "-X", "-P", "-j", job, "-o", "State"]


def read_canceller(out: str) -> str:
    """Read the number of the account that has cancelled a job; empty if that is not known."""
    found = re.search(r"^CANCELLED by (\d+)$", out, re.M)
    return found[1] if found else ""
