"""PBS's commands and what they say: OpenPBS, PBS Professional, and Torque where it differs. Text only.

What it really does was tried with OpenPBS 23.06; Torque's part follows its manual. Which of them it is,
``qsub --version`` says.
"""

from __future__ import annotations

import calendar
import re
import shlex

from bokeh_ssh._core.errors import UsageError
from bokeh_ssh._core.framing import plain
from bokeh_ssh._jobs.batch import Batch, check_extra, count_gpus
from bokeh_ssh._jobs.job import CLOCK, Job, JobState, describe_ends, list_fields, read_clock, run_script

NAME = "pbs"
TITLE = "PBS"
#: Grid Engine, and Slurm's wrappers for people who are used to PBS, have a qsub too.
SUBMIT = "qmgr"
JOB_VARIABLE = "PBS_JOBID"
WAYS: tuple[str, ...] = ("tcp", "back")
VERDICT = 25.0
QUEUE_COMMAND = "qstat"
OF_ARRAY = "start one that is no array: PBS gives the jobs of one no numbers of their own"
#: What a job writes is brought at its end, when nobody is there to remove it.
SPOOLS = True
VERSION = ["qstat", "--version"]
REFUSED = re.compile(r"qsub:(.*)")
TRIAL: list[str] = []
QUEUES = ["qstat", "-Q", "-f"]

#: Marks a job as looked after by one client's warden, in the one attribute that has no use for a job whose
#: errors go where its output goes, and that can be altered: the path for them.
CLAIM = "bokeh-ssh-"
#: The client's dates, which it prints in the time zone that it runs in.
_UTC = "TZ=UTC0 LC_ALL=C; export TZ LC_ALL; "
UNKNOWN: tuple[str, ...] = ("Unknown Job", "has finished")
_GONE = '*"Unknown Job"* | *"has finished"*'

_MARK = re.compile(rf"/{CLAIM}[0-9a-z]+$")
_DATE = re.compile(r"[A-Z][a-z]{2} ([A-Z][a-z]{2}) +(\d{1,2}) (\d{2}):(\d{2}):(\d{2}) (\d{4})")
_TIME = re.compile(r"\d{1,9}(:\d{1,9}){0,3}")
_UNKNOWN = re.compile(r"Unknown Job Id (?:Error )?(\d+)")
_ATTRIBUTE = re.compile(r"^    (\S+) = (.*)$", re.M)

WAITING: tuple[str, ...] = ("Q", "H", "W", "T")
_RUNNING = ("R", "B")
_SUSPENDED = ("S", "U")
_OVER = ("F", "X", "C")  # C: Torque
#: What MOM says of a job that it has ended: OpenPBS from 20 on, Torque (``exit_status`` in small letters).
_KILLED = {
    "Exit_status": {
        -29: JobState.TIMEOUT,
        -27: JobState.OUT_OF_MEMORY,
        -26: JobState.OUT_OF_MEMORY,
        -20: JobState.NODE_FAIL,
    },
    "exit_status": {-11: JobState.TIMEOUT, -10: JobState.OUT_OF_MEMORY},
}
#: What the comment of a job begins with that no waiting starts; the second one was put on hold by PBS.
_NEVER = {
    "Can Never Run": "no machine has what it wants",
    "job held, too many failed attempts to run": "its start has failed too often",
}
_BY_SIGNAL = (265, 271)  # 256 + KILL, 256 + TERM
_DELETED, _FAILED = "91", "93"

ENDS = describe_ends("see what your cluster's PBS says of it (qstat -x -f, tracejob)")

_ARRAY = "a server runs in one job, not in an array of them"
_TERMINAL = "the job has a program of its own, and no terminal"
_REFUSED = {
    "-J": _ARRAY,
    "-t": _ARRAY,
    "-I": _TERMINAL,
    "-X": _TERMINAL,
    "-z": "the job would be submitted without its number being printed",
    "-C": "nothing in the script is for PBS",
}

#: Which PBS it is decides how the resources are asked for. Without ``-f``, OpenPBS's qsub leaves a process
#: for a minute, through which the next one submits, and fails if the server was started again in between.
_SUBMIT = """\
pro=$1 torque=$2
shift 2
case $(qsub --version 2>&1) in
    *pbs_version* | *PBSPro*) set -- "$@" -f ;;
    *ersion:*) pro=$torque ;;
    *) echo "qsub: this qsub is not that of PBS" >&2; exit 1 ;;
esac
[ -z "$pro" ] || set -- "$@" -l "$pro"
said=$("$@") || { status=$?; printf '%s\\n' "$said"; exit $status; }
printf '%s\\n' "$said" | sed -n 's/^\\([0-9]\\{1,\\}\\)\\..*/\\1/p'"""


def submit_words(batch: Batch, nonce: str, output: str) -> list[str]:
    """Return the command that submits a script on its standard input."""
    check_extra(batch.extra, _REFUSED)
    for word in batch.extra:
        if word.startswith("-W") and "block" in word:
            msg = f"{word!r} in extra cannot work: the job's end would be waited for before its start"
            raise UsageError(msg, hint="leave it out; submit such a job by yourself")
    name = re.sub(r"[^\w.-]|^(?=[\d.-])", "_", batch.name, flags=re.A) if batch.name else None
    words = ["qsub"]
    for option, value in (("-N", name), ("-q", batch.queue), ("-A", batch.account)):
        words += [option, value] if value is not None else []
    words += ["-l", f"walltime={batch.time}"] if batch.time is not None else []
    for word in batch.extra:
        words += shlex.split(word)
    # A job that starts again by itself has nobody who waits for it.
    words += ["-S", "/bin/sh", "-r", "n", "-j", "oe", "-o", "/dev/null", "-e", f"/{CLAIM}{nonce}"]
    return run_script(_SUBMIT, *_resources(batch), *words)


def _resources(batch: Batch) -> tuple[str, str]:
    """Say what the job wants of its machine, as OpenPBS and as Torque have it."""
    if batch.cpus is None and batch.memory is None and batch.gpus is None:
        return "", ""
    pro, torque, rest = "select=1", "nodes=1", ""
    if batch.cpus is not None:
        pro, torque = f"{pro}:ncpus={batch.cpus}", f"{torque}:ppn={batch.cpus}"
    if (gpus := count_gpus(batch)) is not None:
        pro, torque = f"{pro}:ngpus={gpus}", f"{torque}:gpus={gpus}"
    if batch.memory is not None:
        pro, rest = f"{pro}:mem={batch.memory}", f",mem={batch.memory}"
    return pro, torque + rest


#: The command that asks what jobs do; where one is over, in the history, if it is kept.
ASK = run_script(
    f"""\
{_UTC}IFS=,
said=$(qstat -f $1 2>&1)
status=$?
case $said in *"has finished"*) said=$(qstat -x -f $1 2>&1); status=$? ;; esac
printf '%s\\n' "$said"
{CLOCK}
exit $status""",
    "{jobs}",
)


def _blocks(out: str) -> dict[str, str]:
    """Find what is said of each job, by its number."""
    texts = re.split(r"^Job Id: ", out, flags=re.M)[1:]
    return {number[0]: text for text in texts if (number := re.match(r"\d+", text))}


def _attributes(out: str) -> dict[str, str]:
    """Read the attributes of a job; a long line goes on in the next, after a tab. The first one counts."""
    found: dict[str, str] = {}
    for name, value in _ATTRIBUTE.findall(out.replace("\n\t", "")):
        found.setdefault(name, value)
    return found


def read_answer(job: str, status: int, out: str, err: str) -> Job | None:
    """Read that command's answer; None if the scheduler could not be asked, whatever the job does."""
    known = _attributes(_blocks(out).get(job, ""))
    letter = known.get("job_state", "")
    if not letter:
        return Job(id=job, state=JobState.UNKNOWN) if job in _UNKNOWN.findall(out) else None
    state = read_state(letter)
    if state is JobState.PENDING:
        return Job(id=job, reason=_read_reason(letter, known), estimated_start=_estimate(known))
    node = plain(known.get("exec_host", "").partition("/")[0])
    if state is not JobState.RUNNING:
        return Job(id=job, state=_read_end(known) if letter in _OVER else state, node=node)
    start = read_date(known.get("stime") or known.get("start_time", ""))
    limit = read_time(known.get("Resource_List.walltime", ""))
    ends = start + limit if start is not None and limit is not None else None
    return Job(id=job, state=state, node=node, ends_at=ends)


def read_state(letter: str) -> JobState:
    """Read a state; how a job ended is not in it."""
    if letter in WAITING or letter == "M":  # M: went to another server, which is not asked
        return JobState.PENDING
    if letter in _SUSPENDED:
        return JobState.SUSPENDED
    return JobState.RUNNING if letter in _RUNNING else JobState.COMPLETING


def _read_reason(letter: str, known: dict[str, str]) -> str:
    said = plain(known.get("comment", ""))
    return said or {"H": "held", "W": "its time to start has not come", "M": "moved"}.get(letter, "")


def _estimate(known: dict[str, str]) -> float | None:
    return read_date(known.get("estimated.start_time", ""))


def _read_end(known: dict[str, str]) -> JobState:
    name = "exit_status" if "exit_status" in known else "Exit_status"
    try:
        status = int(known.get(name, ""))
    except ValueError:  # its machine has not reported one; or it has never run
        lost = known.get("substate") == _FAILED and "stime" in known
        return JobState.NODE_FAIL if lost else JobState.CANCELLED
    if status in _KILLED[name]:
        return _KILLED[name][status]
    used = read_time(known.get("resources_used.walltime", ""))
    limit = read_time(known.get("Resource_List.walltime", ""))
    if used is not None and limit is not None and used >= limit and status:
        return JobState.TIMEOUT
    if known.get("substate") == _DELETED or status in _BY_SIGNAL:
        return JobState.CANCELLED
    return JobState.FAILED if status else JobState.COMPLETED


def read_date(text: str) -> float | None:
    """Read a date as the client prints it in UTC, in seconds since the epoch; None if it is not one.

    >>> read_date("Sun Nov 29 12:34:56 2026")
    1795955696.0
    """
    found = _DATE.fullmatch(text)
    if not found:
        return None
    try:
        month = list(calendar.month_abbr).index(found[1])
    except ValueError:
        return None
    return float(calendar.timegm((int(found[6]), month, *map(int, found.groups()[1:5]))))


def read_time(text: str) -> int | None:
    """Read a time as PBS writes it, ``[[H:]M:]S``, in seconds; None if it is not one.

    >>> read_time("2:00:00")
    7200
    """
    if not _TIME.fullmatch(text):
        return None
    parts = [int(part) for part in reversed(text.split(":"))]
    return sum(part * unit for part, unit in zip(parts, (1, 60, 3600, 86400), strict=False))


def why_never(reason: str) -> str:
    """Say why a job that waits for this reason can never start; empty if waiting may help."""
    return next((why for known, why in _NEVER.items() if reason.startswith(known)), "")


def owner_words(job: str) -> list[str]:
    """Return the command that says whose a job is; of an array, once for each of its jobs."""
    text = f"""\
said=$(LC_ALL=C qstat -f "$1" 2>&1) || {{
    array=$(qstat -t "$1[]" 2>/dev/null) || {{ printf '%s\\n' "$said" >&2; exit 1; }}
    printf '%s\\n' "$array" | sed -n "s/^$1\\\\[[0-9].*/$1 0 -/p"
    exit 0
}}
said=$(printf '%s\\n' "$said" | tr -d '\\n\\t')
owner=$(printf '%s\\n' "$said" | sed -n 's/.*    Job_Owner = \\([^@ ]*\\)@.*/\\1/p')
mark=$(printf '%s\\n' "$said" | sed -n 's:.*    Error_Path = [^ ]*/\\({CLAIM}[0-9a-z]*\\).*:\\1:p')
printf '%s %s %s\\n' "$1" "$(id -u "$owner")" "${{mark:--}}\""""
    return run_script(text, job)


def read_owners(out: str) -> list[tuple[str, str, bool]]:
    """Read each job's number, its user's number, and whether bokeh_ssh submitted it."""
    found = re.findall(r"^(\d+) (\d+) (\S+)$", out, re.M)
    return [(number, user, mark.startswith(CLAIM)) for number, user, mark in found]


def cancel_words(job: str) -> list[str]:
    """Return the command that cancels a job; one that is over, or not known, counts as cancelled."""
    text = f"""\
said=$(LC_ALL=C qdel "$1" 2>&1) && exit
status=$?
printf '%s\\n' "$said"
case $said in {_GONE} | *COMPLETE*) exit 0 ;; *) exit $status ;; esac"""
    return run_script(text, job)


def claim_words(job: str, nonce: str) -> list[str]:
    """Return the command that makes another warden look after a job."""
    return ["qalter", "-e", f"/{CLAIM}{nonce}", job]


def check_words(job: str) -> list[str]:
    """Return the command that says a job's state and comment, for its warden; see ``_remote.warden``."""
    text = f"""\
said=$(LC_ALL=C qstat -f "$1" 2>&1) || case $said in {_GONE}) exit 0 ;; *) exit 1 ;; esac
said=$(printf '%s\\n' "$said" | tr -d '\\n\\t')
state=$(printf '%s\\n' "$said" | sed -n 's/.*    job_state = \\([A-Z]\\).*/\\1/p')
mark=$(printf '%s\\n' "$said" | sed -n 's:.*    Error_Path = [^ ]*/\\({CLAIM}[0-9a-z]*\\).*:\\1:p')
printf '%s %s\\n' "$state" "$mark\""""
    return run_script(text, job)


def canceller_words(job: str) -> list[str]:
    """Return the command that asks who deleted a job; OpenPBS knows if it keeps a history."""
    return run_script('qstat -x -f "$1" | tr -d "\\n\\t"', job)


def read_canceller(out: str) -> str:
    """Read the name of the account that cancelled it; empty if that is not known."""
    found = re.search(r" and terminated by ([\w.-]+)@", out)
    return found[1] if found else ""


LIST = run_script(
    f"""\
{_UTC}jobs=$(qselect -u "$(id -un)") || exit 1
{CLOCK}
[ -z "$jobs" ] || qstat -f $jobs 2>/dev/null || :"""  # one of them may have gone in between
)


def read_list(out: str) -> list[dict[str, str]]:
    """Read bokeh_ssh's jobs: number, name, state, reason, node, and the time that is left."""
    jobs = []
    for number, text in _blocks(out).items():
        job = read_answer(number, 0, f"Job Id: {text}", "")
        known = _attributes(text)
        if job and _MARK.search(known.get("Error_Path", "")):
            jobs.append(list_fields(job, plain(known.get("Job_Name", "")), read_clock(out)))
    return jobs


def read_version(out: str) -> str:
    """Read which release it is."""
    found = re.search(r"pbs_version = (\S+)", out) or re.search(r"ersion: (\S+)", out)
    return f"{'OpenPBS' if 'pbs_version' in out else 'Torque'} {plain(found[1])}" if found else TITLE


def read_queues(out: str) -> dict[str, str]:
    """Read the names of the queues, each with why it starts no jobs now; empty where it does."""
    queues = {}
    for text in re.split(r"^Queue: ", out, flags=re.M)[1:]:
        known = _attributes(text)
        name = plain(text.partition("\n")[0])
        refused = "takes no jobs" if known.get("enabled") == "False" else ""
        queues[name] = refused or ("is stopped: jobs would wait" if known.get("started") == "False" else "")
    return queues
