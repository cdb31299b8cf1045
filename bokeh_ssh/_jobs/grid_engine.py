"""Grid Engine's commands and what they say. Text only.

What it really does was tried with 8.1.9; the comments name what is unlike its manual.
"""

from __future__ import annotations

import re
import shlex

from bokeh_ssh._core.errors import UsageError
from bokeh_ssh._core.framing import plain
from bokeh_ssh._core.settings import setting
from bokeh_ssh._jobs.batch import Batch, check_extra, count_gpus
from bokeh_ssh._jobs.job import CLOCK, Job, JobState, describe_ends, list_fields, read_clock, run_script

NAME = "sge"
TITLE = "Grid Engine"
#: PBS has a qsub too.
SUBMIT = "qconf"
JOB_VARIABLE = "JOB_ID"
WAYS: tuple[str, ...] = ("tcp", "back")
#: The default of a queue's ``notify``: USR2 comes that much before KILL, and nothing before that.
_WARNING = 60.0
#: The accounting is written every 15 s.
VERDICT = 25.0
QUEUE_COMMAND = "qstat"
OF_ARRAY = "start one that is no array: Grid Engine gives the jobs of one no numbers of their own"
SPOOLS = False
REFUSED = re.compile(r"Unable to run job:(.*)")
TRIAL = ["-w", "v"]

#: It says so on its output, with status 0.
UNKNOWN: tuple[str, ...] = ("do not exist",)
WAITING: tuple[str, ...] = ("qw", "hqw", "Eqw", "hRwq", "Rq", "Ehqw")
#: Marks a job as looked after, in its context, by one client's warden.
CLAIM = "bokeh-ssh="
_MINE = '-u "$(id -un)"'

#: A job in what ``qstat -xml`` lists.
_LISTED = re.compile(
    r"<JB_job_number>(?P<job>\d+)</JB_job_number>(?:(?!</?job_list).)*?<state>(?P<state>\w+)</state>"
    r"(?:(?!</?job_list).)*?<queue_name>(?P<queue>[^<]*)</queue_name>",
    re.S,
)
_START = re.compile(r"<JAT_start_time>(\d+)</JAT_start_time>")
_LIMIT = re.compile(r"<CE_doubleval>(\d+)")
_WHY = re.compile(r"<QIM_message>([^<]*)</QIM_message>")
_UID = re.compile(r"<JB_uid>(\d+)</JB_uid>")
_NUMBER = re.compile(r"<JB_job_number>(\d+)</JB_job_number>")
_NAME = re.compile(r"<JB_job_name>([^<]*)</JB_job_name>")
_TASKS = re.compile(r"<RN_min>(\d+)</RN_min>\s*<RN_max>(\d+)</RN_max>\s*<RN_step>(\d+)</RN_step>")
_CONTEXT = re.compile(rf"<VA_variable>{CLAIM[:-1]}</VA_variable>\s*<VA_value>\w+</VA_value>")
#: What ``qacct`` says of a job that is over.
_FAILED = re.compile(r"^failed\s+(\d+)", re.M)
_STATUS = re.compile(r"^exit_status\s+(\d+)", re.M)
_TOOK = re.compile(r"^ru_wallclock\s+([\d.]+)", re.M)
_HELD_TO = re.compile(r"^category\s.*\bh_rt=(\d+)", re.M)
_ORDERED = 128 + 12  # USR2: what a holder ends with that was ordered to
_BY_LIMIT = "37"

ENDS = describe_ends("see what the accounting (qacct -j) says of it")

_REFUSED = {
    "-t": "a server runs in one job, not in an array of them",
    "-sync": "the job's end would be waited for before its start",
    "-verify": "nothing would be submitted",
}


def submit_words(batch: Batch, nonce: str, output: str) -> list[str]:
    """Return the command that submits a script on its standard input."""
    check_extra(batch.extra, _REFUSED)
    if batch.cpus and batch.cpus > 1 and not any(word.startswith("-pe ") for word in batch.extra):
        msg = "Grid Engine has no option for CPUs: a job takes several by a parallel environment of your site"
        pe = f'"-pe smp {batch.cpus}" in {setting("extra")}'
        raise UsageError(msg, hint=f"see qconf -spl, and give {pe}, without {setting('cpus')}")
    # Its error for a name that it does not take is of something else.
    name = re.sub(r"[^\w.-]|^(?=\d)", "_", batch.name, flags=re.A) if batch.name else None
    words = ["qsub", "-terse"]
    for option, value in (("-N", name), ("-q", batch.queue), ("-P", batch.account)):
        words += [option, value] if value is not None else []
    for resource, amount in (("h_rt", batch.time), ("h_vmem", batch.memory), ("gpu", count_gpus(batch))):
        words += ["-l", f"{resource}={amount}"] if amount is not None else []
    words += ["-w", "e"]  # a request that no machine meets is refused, and does not wait for ever
    for word in batch.extra:
        words += shlex.split(word)
    return [
        *words,
        *("-S", "/bin/sh", "-r", "n", "-notify", "-j", "y", "-o", output.replace("%j", "$JOB_ID")),
        *("-ac", CLAIM + nonce),
    ]


#: The commands that say which release it is, and which queues there are.
VERSION = ["qstat", "-help"]
QUEUES = ["qconf", "-sql"]


def read_version(out: str) -> str:
    """Read which release it is."""
    return plain(out.strip().partition("\n")[0]) or TITLE


def read_queues(out: str) -> dict[str, str]:
    """Read the names of the queues; whether they start jobs is not in it."""
    return dict.fromkeys(map(plain, out.split()), "")


#: The command that asks what jobs do; the accounting is asked of one that is not there.
ASK = run_script(
    f"""\
q=$(qstat -xml {_MINE}) || exit 1
printf '%s\\n' "$q"
{CLOCK}
IFS=,
there=
for job in $1; do
    case $q in
        *"<JB_job_number>$job</JB_job_number>"*) there=$there,$job ;;
        *) echo "<gone $job>"; LC_ALL=C qacct -j "$job" 2>/dev/null; echo "</gone $job>" ;;
    esac
done
[ -z "$there" ] || qstat -xml -j "${{there#,}}\"""",
    "{jobs}",
)


def read_answer(job: str, status: int, out: str, err: str) -> Job | None:
    """Read that command's answer; None if the scheduler could not be asked, whatever the job does."""
    if status:
        return None
    found = next((each for each in _LISTED.finditer(out) if each["job"] == job), None)
    if not found:
        account, end, _ = out.partition(f"<gone {job}>")[2].partition(f"</gone {job}>")
        return Job(id=job, state=_read_end(account)) if end else None
    _, _, details = out.partition("<detailed_job_info")
    _, _, detail = details.partition(f"<JB_job_number>{job}</JB_job_number>")
    state, detail = read_state(found["state"]), detail.partition("<JB_job_number>")[0]
    if state is JobState.PENDING:
        return Job(id=job, reason=_read_reason(found["state"], detail))
    asked = detail.partition("<CE_name>h_rt</CE_name>")[2].partition("</qstat_l_requests>")[0]
    start, limit = _START.search(detail), _LIMIT.search(asked)
    ends = float(start[1]) + float(limit[1]) if start and limit and start[1] != "0" else None
    return Job(id=job, state=state, node=plain(found["queue"].rpartition("@")[2]), ends_at=ends)


def read_state(word: str) -> JobState:
    """Read a state, whose letters say one thing each."""
    if "d" in word:
        return JobState.COMPLETING
    if "w" in word:  # qw, hqw, Eqw, hRwq
        return JobState.PENDING
    if set(word) & set("sST"):  # by its user, with its queue, for the load of its machine
        return JobState.SUSPENDED
    return JobState.RUNNING


def _read_reason(state: str, detail: str) -> str:
    if "E" in state:
        why = _WHY.search(detail)
        text = why[1] if why else ""
        for name, char in (("&apos;", "'"), ("&quot;", '"'), ("&lt;", "<"), ("&gt;", ">"), ("&amp;", "&")):
            text = text.replace(name, char)
        return f"Eqw: {plain(text)}" if text else "Eqw"
    return "held" if "h" in state else ""


def _read_end(out: str) -> JobState:
    failed, status = _FAILED.search(out), _STATUS.search(out)
    if not failed or not status:
        return JobState.COMPLETING  # nothing is said yet, or never: of one that was cancelled while it waited
    took, limit = _TOOK.search(out), _HELD_TO.search(out)
    late = bool(took and limit and float(took[1]) > float(limit[1]) - _WARNING - 10)
    if failed[1] == _BY_LIMIT:
        return JobState.TIMEOUT
    if status[1] == str(_ORDERED) or failed[1] == "100":
        return JobState.TIMEOUT if late else JobState.CANCELLED
    return JobState.FAILED if failed[1] != "0" or status[1] != "0" else JobState.COMPLETED


def why_never(reason: str) -> str:
    """Say why a job that waits for this reason can never start; empty if waiting may help."""
    return "Grid Engine could not start it, and does not try again" if reason.startswith("Eqw") else ""


def owner_words(job: str) -> list[str]:
    """Return the command that says whose a job is."""
    return ["qstat", "-xml", "-j", job]


def read_owners(out: str) -> list[tuple[str, str, bool]]:
    """Read the number of each job, once for each task of an array, its user's, and whether it is ours."""
    number, user, tasks = _NUMBER.search(out), _UID.search(out), _TASKS.search(out)
    if not number or not user:
        return []
    count = len(range(int(tasks[1]), int(tasks[2]) + 1, max(1, int(tasks[3])))[:10_000]) if tasks else 1
    return [(number[1], user[1], bool(_CONTEXT.search(out)))] * max(1, count)


def cancel_words(job: str) -> list[str]:
    """Return the command that cancels a job; one that is not known counts as cancelled."""
    text = 'said=$(qdel "$1" 2>&1) && exit; printf "%s\n" "$said"; case $said in *exist*) ;; *) false ;; esac'
    return run_script(text, job)


def claim_words(job: str, nonce: str) -> list[str]:
    """Return the command that makes another warden look after a job."""
    return ["qalter", "-ac", CLAIM + nonce, job]


def check_words(job: str) -> list[str]:
    """Return the command that says a job's state and comment, for its warden; see ``_remote.warden``."""
    text = f"""\
q=$(qstat {_MINE}) || exit 1
state=$(printf '%s\\n' "$q" | awk -v j="$1" '$1 == j {{ print $5 }}')
context=$(qstat -j "$1" 2>/dev/null | sed -n 's/^context:.*\\({CLAIM}[0-9a-z]*\\).*/\\1/p')
printf '%s %s\\n' "$state" "$context\""""
    return run_script(text, job)


def canceller_words(job: str) -> list[str]:
    """Return the command that asks who deleted a job; some releases know."""
    return ["qacct", "-j", job]


def read_canceller(out: str) -> str:
    """Read the name of the account that has deleted a job; empty if that is not known."""
    found = re.search(r"^deleted_by\s+([\w.-]+)\s*$", out, re.M)
    return found[1] if found and found[1] not in ("NONE", "undefined") else ""


LIST = run_script(
    f"""\
q=$(qstat -xml {_MINE}) || exit 1
printf '%s\\n' "$q"
{CLOCK}
jobs=$(printf '%s\\n' "$q" | sed -n 's:.*<JB_job_number>\\([0-9]*\\)<.*:\\1:p' | paste -s -d, -)
[ -z "$jobs" ] || qstat -xml -j "$jobs\""""
)


def read_list(out: str) -> list[dict[str, str]]:
    """Read bokeh_ssh's jobs: number, name, state, reason, node, and the time that is left."""
    lists, _, details = out.partition("<detailed_job_info")
    jobs = []
    for detail in re.split(r"(?=<JB_job_number>)", details)[1:]:
        number = _NUMBER.match(detail)
        listed = next((each for each in _LISTED.finditer(lists) if number and each["job"] == number[1]), None)
        if not listed or not _CONTEXT.search(detail):
            continue
        job = read_answer(listed["job"], 0, f"{listed[0]}<detailed_job_info>{detail}", "")
        if job:
            name = _NAME.search(detail)
            jobs.append(list_fields(job, plain(name[1]) if name else "", read_clock(out)))
    return jobs
