"""LSF's commands and what they say: IBM Spectrum LSF from 10.1 on. Text only.

Nobody has tried it with a real LSF: it follows the manual, and what others have recorded.
"""

from __future__ import annotations

import re
import shlex

from bokeh_ssh._core.errors import UsageError
from bokeh_ssh._core.framing import plain
from bokeh_ssh._jobs.batch import Batch, check_extra
from bokeh_ssh._jobs.job import CLOCK, Job, JobState, describe_ends, list_fields, read_clock, run_script

NAME = "lsf"
TITLE = "LSF"
#: Slurm's wrappers for people who are used to LSF have a bsub and a bjobs too.
SUBMIT = "bqueues"
JOB_VARIABLE = "LSB_JOBID"
WAYS: tuple[str, ...] = ("tcp", "back")
#: It is given in whole minutes.
_WARNING = 120.0
VERDICT = 25.0
QUEUE_COMMAND = "bjobs"
OF_ARRAY = "start one that is no array: LSF gives the jobs of one no numbers of their own"
#: What a job writes is brought at its end, when nobody is there to remove it.
SPOOLS = True
VERSION = ["lsid"]
#: A site's own check says it before.
REFUSED = re.compile(r"^((?!.*esub).*Job not submitted.*)")
TRIAL: list[str] = []
QUEUES = ["bqueues", "-w"]

#: Marks a job as looked after, in its description, by one client's warden.
CLAIM = "bokeh-ssh:"
#: Fields that hold no separator, but for the reasons, in which it is no harm: those are cut off.
_FORMAT = "jobid stat exec_host runtimelimit run_time exit_code user job_name job_description"
_FORMAT += " pend_reason exit_reason"
_FIELDS = _FORMAT.split()
_BJOBS = f"LC_ALL=C bjobs -noheader -o \"{_FORMAT} delimiter='|'\""
_LINE = re.compile(r"^\d+(\|[^|\n]*){10}", re.M)
UNKNOWN: tuple[str, ...] = ("is not found",)
_NONE = '*"No unfinished job found"* | *"No job found"*'

_SIZE = re.compile(r"(\d{1,15})\s?([KMGT]?)(?:i?B)?", re.I)
_NUMBER = re.compile(r"(\d{1,12})(?:\.\d{0,6})?")
_CLOCK = re.compile(r"(\d{1,9}):(\d{2}):(\d{2})")

WAITING: tuple[str, ...] = ("PEND", "PSUSP", "PROV", "WAIT")
#: UNKWN: the machine does not answer, and the job may run on it.
_RUNNING = ("RUN", "UNKWN")
_SUSPENDED = ("USUSP", "SSUSP")
#: Why LSF has ended a job; all others failed.
_TERMS = {
    "TERM_RUNLIMIT": JobState.TIMEOUT,
    "TERM_DEADLINE": JobState.DEADLINE,
    "TERM_MEMLIMIT": JobState.OUT_OF_MEMORY,
    "TERM_SWAP": JobState.OUT_OF_MEMORY,
    "TERM_OWNER": JobState.CANCELLED,
    "TERM_FORCE_OWNER": JobState.CANCELLED,
    "TERM_ADMIN": JobState.CANCELLED,
    "TERM_FORCE_ADMIN": JobState.CANCELLED,
    "TERM_BUCKET_KILL": JobState.CANCELLED,
    "TERM_PREEMPT": JobState.PREEMPTED,
    "TERM_RC": JobState.PREEMPTED,  # its machine, a cloud's, was reclaimed
    "TERM_ZOMBIE": JobState.NODE_FAIL,
    "TERM_REMOVE_HUNG_JOB": JobState.NODE_FAIL,
}
_NEVER = {
    "Dependency condition invalid or never satisfied": "what it depends on has failed",
}

ENDS = describe_ends("see what LSF says of it (bhist -l)")

_TERMINAL = "the job has a program of its own, and no terminal"
_REFUSED = {
    "-K": "the job's end would be waited for before its start",
    "-I": _TERMINAL,
    "-XF": _TERMINAL,
    "-J": "the name is a setting of its own, and a server runs in one job, not in an array of them",
    "-r": "a job that starts again by itself has nobody who waits for it; resubmit submits a new one",
    "-pack": "a server runs in one job",
}

#: A size without a unit is in what the cluster's lsf.conf says, or in KB.
_SUBMIT = """\
size=$1
shift
if [ -n "$size" ]; then
    unit=$(sed -n 's/^ *LSF_UNIT_FOR_LIMITS *= *"\\{0,1\\}\\([A-Za-z]*\\).*/\\1/p' "$LSF_ENVDIR/lsf.conf" \\
        2>/dev/null | tail -n 1)
    case $unit in
        [Mm]*) by=1024 ;;
        [Gg]*) by=1048576 ;;
        [Tt]*) by=1073741824 ;;
        *) by=1 ;;
    esac
    set -- "$@" -M "$(((size + by - 1) / by))"
fi
said=$("$@") || { status=$?; printf '%s\\n' "$said"; exit $status; }
printf '%s\\n' "$said" | sed -n 's/^Job <\\([0-9]\\{1,\\}\\)> is submitted.*/\\1/p'"""


def submit_words(batch: Batch, nonce: str, output: str) -> list[str]:
    """Return the command that submits a script on its standard input."""
    check_extra(batch.extra, _REFUSED)
    # An array would be one by its name.
    name = re.sub(r"[^\w.-]", "_", batch.name, flags=re.A) if batch.name else None
    words = ["bsub"]
    for option, value in (("-J", name), ("-q", batch.queue), ("-P", batch.account), ("-W", batch.time)):
        words += [option, value] if value is not None else []
    if batch.cpus is not None:
        words += ["-n", str(batch.cpus), "-R", "span[hosts=1]"]
    if batch.gpus is not None:
        kind, _, number = str(batch.gpus).rpartition(":")
        words += ["-gpu", f"num={number}:gmodel={kind}" if kind else f"num={number}"]
    for word in batch.extra:
        words += shlex.split(word)
    words += ["-rn", "-wa", "USR1", "-wt", str(int(_WARNING // 60)), "-o", "/dev/null"]
    return run_script(_SUBMIT, _kilobytes(batch.memory), *words, "-Jd", CLAIM + nonce)


def _kilobytes(memory: str | None) -> str:
    """Return a size in KB; one without a unit is in bytes, as those of other schedulers are not.

    :raises UsageError: if it has no unit, or is none
    """
    if memory is None:
        return ""
    found = _SIZE.fullmatch(memory)
    if not found or not found[2]:
        msg = f"memory={memory!r} is not a size with its unit"
        raise UsageError(msg, hint='give one such as "32G", from which LSF\'s own unit is made')
    return str(int(found[1]) * 1024 ** "KMGT".index(found[2].upper()))


#: The command that asks what jobs do; LSF knows one for an hour after its end.
ASK = run_script(f"IFS=,; {_BJOBS} $1; status=$?; {CLOCK}; exit $status", "{jobs}")


def _rows(out: str) -> list[dict[str, str]]:
    found = []
    for line in _LINE.finditer(out):
        values = [plain(value) for value in line[0].split("|")]
        found.append(
            {name: "" if value == "-" else value for name, value in zip(_FIELDS, values, strict=True)}
        )
    return found


def read_answer(job: str, status: int, out: str, err: str) -> Job | None:
    """Read that command's answer; None if the scheduler could not be asked, whatever the job does."""
    row = next((each for each in _rows(out) if each["jobid"] == job), None)
    if row is None:
        return Job(id=job, state=JobState.UNKNOWN) if f"<{job}> {UNKNOWN[0]}" in f"{out}{err}" else None
    state = _read_state(row)
    if state is JobState.PENDING:
        reason = row["pend_reason"].rstrip("; ")
        return Job(id=job, reason=reason or ("suspended" if row["stat"] == "PSUSP" else ""))
    node = row["exec_host"].partition(":")[0].rpartition("*")[2]
    limit, used = read_time(row["runtimelimit"], 60), read_time(row["run_time"], 1)
    ends = None if state is not JobState.RUNNING or limit is None else read_clock(out) + limit - (used or 0)
    return Job(id=job, state=state, node=node, ends_at=ends)


def _read_state(row: dict[str, str]) -> JobState:
    word = row["stat"]
    if word in WAITING:
        return JobState.PENDING
    if word in _RUNNING:
        return JobState.RUNNING
    if word in _SUSPENDED:
        return JobState.SUSPENDED
    if word == "DONE":
        return JobState.COMPLETED
    if word == "ZOMBI":  # it was to be ended, and its machine does not answer
        return JobState.NODE_FAIL
    if word != "EXIT":
        return JobState.COMPLETING
    term = row["exit_reason"].partition(":")[0].strip()
    if term in _TERMS:
        return _TERMS[term]
    # 140: USR2, which comes at the run limit alone.
    return JobState.TIMEOUT if row["exit_code"] == "140" else JobState.FAILED


def read_time(text: str, unit: int) -> float | None:
    """Read a time in seconds; a number has a unit, unless the site has LSF write ``H:M:S``.

    >>> read_time("1440.0", 60), read_time("16038 second(s)", 1), read_time("00:10:00", 60)
    (86400.0, 16038.0, 600.0)
    """
    clock = _CLOCK.match(text)
    if clock:
        return float(int(clock[1]) * 3600 + int(clock[2]) * 60 + int(clock[3]))
    number = _NUMBER.match(text)
    return float(number[0]) * unit if number else None


def why_never(reason: str) -> str:
    """Say why a job that waits for this reason can never start; empty if waiting may help."""
    return next((why for known, why in _NEVER.items() if reason.startswith(known)), "")


def owner_words(job: str) -> list[str]:
    """Return the command that lists the jobs of a number, several of an array, and whose they are."""
    text = f"""\
said=$({_BJOBS} -u all "$1") || exit
printf '%s\\n' "$said" | while IFS='|' read -r job stat host limit time code user mark rest; do
    printf '%s %s %s\\n' "$job" "$(id -u "$user")" "${{mark:--}}"
done"""
    return run_script(text, job)


def read_owners(out: str) -> list[tuple[str, str, bool]]:
    """Read each job's number, its user's number, and whether bokeh_ssh submitted it."""
    found = re.findall(r"^(\d+) (\d+) (.*)$", out, re.M)
    return [(number, user, mark.startswith(CLAIM)) for number, user, mark in found]


def cancel_words(job: str) -> list[str]:
    """Return the command that cancels a job; one that is over, or not known, counts as cancelled."""
    text = """\
said=$(LC_ALL=C bkill "$1" 2>&1) && exit
status=$?
printf '%s\\n' "$said"
case $said in *"No matching job found"* | *"already finished"*) exit 0 ;; *) exit $status ;; esac"""
    return run_script(text, job)


def claim_words(job: str, nonce: str) -> list[str]:
    """Return the command that makes another warden look after a job."""
    return ["bmod", "-Jd", CLAIM + nonce, job]


def check_words(job: str) -> list[str]:
    """Return the command that says a job's state and comment, for its warden; see ``_remote.warden``."""
    text = f"""\
said=$({_BJOBS} "$1" 2>&1) || case $said in *"{UNKNOWN[0]}"*) exit 0 ;; *) exit 1 ;; esac
printf '%s\\n' "$said" | while IFS='|' read -r job stat host limit time code user mark rest; do
    printf '%s %s\\n' "$stat" "$mark"
done"""
    return run_script(text, job)


def canceller_words(job: str) -> list[str]:
    """Return the command that asks who cancelled a job."""
    return run_script('LC_ALL=C bhist -l "$1" | tr -d "\\n" | tr -s " "', job)


def read_canceller(out: str) -> str:
    """Read the name of the account that cancelled it; empty if that is not known."""
    found = re.search(r"requested by user or administrator <([\w.-]+)>", out)
    return found[1] if found else ""


LIST = run_script(
    f"""\
said=$({_BJOBS} 2>&1) || case $said in {_NONE}) exit 0 ;; *) printf '%s\\n' "$said"; exit 1 ;; esac
printf '%s\\n' "$said"
{CLOCK}"""
)


def read_list(out: str) -> list[dict[str, str]]:
    """Read bokeh_ssh's jobs: number, name, state, reason, node, and the time that is left."""
    jobs = []
    for row in _rows(out):
        job = read_answer(row["jobid"], 0, out, "")
        if job and row["job_description"].startswith(CLAIM):
            jobs.append(list_fields(job, row["job_name"], read_clock(out)))
    return jobs


def read_version(out: str) -> str:
    """Read which release it is."""
    found = re.search(r"LSF[^\n,\d]{0,40}(\d[\w.]*)", out)
    return f"LSF {plain(found[1])}" if found else TITLE


def read_queues(out: str) -> dict[str, str]:
    """Read the names of the queues, each with why it starts no jobs now; empty where it does."""
    queues = {}
    for line in out.splitlines():
        name, _, status, *_ = (*line.split(), "", "", "")
        is_open, _, active = status.partition(":")
        if is_open in ("Open", "Closed"):
            stopped = "" if active == "Active" else "is not active: jobs would wait"
            queues[plain(name)] = "takes no jobs" if is_open == "Closed" else stopped
    return queues
