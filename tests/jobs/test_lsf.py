"""What LSF says, as others have recorded it (its manual, tests of other projects), and what we make of it.

Nobody has run any of it with a real LSF. The values are recorded; the columns are those that we ask for.
"""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import pytest

from bokeh_ssh import Batch, Job, JobState, UsageError
from bokeh_ssh._jobs import lsf, scheduler
from bokeh_ssh._jobs.job import explain_end
from bokeh_ssh._remote.warden import still_waits
from replayed_schedulers import LSF


def line(stat: str, *, host: str = "-", code: str = "-", pend: str = "-", why: str = "-") -> str:
    """Write a line of ``bjobs``."""
    return f"861487|{stat}|{host}|1440.0|16038 second(s)|{code}|alice|dash|bokeh-ssh:abc|{pend}|{why}\n"


def test_running_job_is_read() -> None:
    """The node is the first, without its slots, and the end is in as much time as is left of the limit."""
    job = lsf.read_answer(
        "861487", 0, "Cannot connect to LSF. Please wait ...\n" + line("RUN", host="4*n7"), ""
    )
    assert job
    assert (job.state, job.node) == (JobState.RUNNING, "n7")
    assert job.ends_at
    assert abs(job.ends_at - time.time() - (86400 - 16038)) < 5
    hms = line("RUN", host="n1:n1:n2").replace("1440.0|16038 second(s)", "00:10:00|00:00:01")
    job = lsf.read_answer("861487", 0, hms, "")
    assert job
    assert job.node == "n1"
    assert job.ends_at
    assert abs(job.ends_at - time.time() - 599) < 5


@pytest.mark.parametrize(
    ("stat", "pend", "reason", "never"),
    [
        ("PEND", "New job is waiting for scheduling;", "New job is waiting for scheduling", False),
        ("PEND", "Job dependency condition not satisfied;", "Job dependency condition not satisfied", False),
        (
            "PEND",
            "Dependency condition invalid or never satisfied;",
            "Dependency condition invalid or never satisfied",
            True,
        ),
        ("PSUSP", "-", "suspended", False),
        ("PEND", "a | in it", "a", False),
    ],
)
def test_waiting_job_says_why(stat: str, pend: str, reason: str, never: bool) -> None:
    """The reason is LSF's; one that no waiting ends is known."""
    assert lsf.read_answer("861487", 0, line(stat, pend=pend), "") == Job(id="861487", reason=reason)
    assert bool(lsf.why_never(reason)) is never


@pytest.mark.parametrize(
    ("stat", "code", "why", "state"),
    [
        ("DONE", "-", "-", JobState.COMPLETED),
        ("EXIT", "127", "-", JobState.FAILED),
        ("EXIT", "140", "-", JobState.TIMEOUT),
        (
            "EXIT",
            "12",
            "TERM_RUNLIMIT: job killed after reaching LSF run time limit",
            JobState.TIMEOUT,
        ),
        (
            "EXIT",
            "137",
            "TERM_MEMLIMIT: job killed after reaching LSF memory usage limit",
            JobState.OUT_OF_MEMORY,
        ),
        ("EXIT", "130", "TERM_OWNER: job killed by owner", JobState.CANCELLED),
        ("EXIT", "137", "TERM_ADMIN: job killed by root or LSF administrator", JobState.CANCELLED),
        ("EXIT", "137", "TERM_PREEMPT: job killed after preemption", JobState.PREEMPTED),
        ("EXIT", "137", "TERM_RC: job killed by LSF when a host is reclaimed", JobState.PREEMPTED),
        ("EXIT", "-", "TERM_ZOMBIE: zombie job killed", JobState.NODE_FAIL),
        ("ZOMBI", "-", "-", JobState.NODE_FAIL),
        ("UNKWN", "-", "-", JobState.RUNNING),
        ("USUSP", "-", "-", JobState.SUSPENDED),
        ("SSUSP", "-", "-", JobState.SUSPENDED),
    ],
)
def test_state_and_end_are_read(stat: str, code: str, why: str, state: JobState) -> None:
    """Why LSF has ended a job decides; a machine that does not answer is no end."""
    job = lsf.read_answer("861487", 0, line(stat, host="n7", code=code, why=why), "")
    assert job
    assert (job.state, job.node) == (state, "n7")


def test_canceller_is_read() -> None:
    """The history has who it was, over two lines."""
    said = "Fri Sep 19 11:11:00: Signal <KILL> requested by user or administrator <bob>;"
    assert lsf.read_canceller(said) == "bob"
    cancelled = Job(id="1", state=JobState.CANCELLED)
    assert explain_end(lsf.ENDS, cancelled, None, "bob")[0].endswith("by bob")


def test_silence_is_no_end() -> None:
    """A master that does not answer says nothing of a job; that it does not know one is an answer."""
    assert lsf.read_answer("2", 124, "LSF is down. Please wait ...\n", "") is None
    assert lsf.read_answer("2", 0, "", "") is None
    unknown = Job(id="2", state=JobState.UNKNOWN)
    assert lsf.read_answer("2", 255, "", "Job <2> is not found\n") == unknown
    assert lsf.read_answer("2", 255, "", "Job <22> is not found\n") is None


def test_own_jobs_are_listed() -> None:
    """Those with our mark in their description are."""
    (job,) = lsf.read_list(line("RUN", host="n7") + line("RUN").replace("bokeh-ssh:abc", "mine"))
    assert [*job.values()][:2] == ["861487", "dash"]
    assert (job["state"], job["node"], job["left"][:3]) == ("RUNNING", "n7", "19:")
    assert lsf.read_owners("1234 22001 bokeh-ssh:abc\n9 1 -\n") == [
        ("1234", "22001", True),
        ("9", "1", False),
    ]


def test_fields_are_options() -> None:
    """Each field is an option of bsub; what would make another job of it is refused."""
    batch = Batch(
        time="2:00", queue="q", account="p", cpus=2, memory="1G", gpus=3, name="a[1-3]", extra=["-x"]
    )
    text = " ".join(lsf.submit_words(batch, "f00", "/home/me/%j.log"))
    for part in (
        "sh 1048576 bsub -J a_1-3_ -q q -P p -W 2:00 -n 2 -R span[hosts=1] -gpu num=3 -x",
        "-rn -wa USR1 -wt 2 -o /dev/null -Jd bokeh-ssh:f00",
    ):
        assert part in text
    for extra in ("-K", "-Is", "-J x[1-3]", "-r"):
        with pytest.raises(UsageError, match="cannot work"):
            lsf.submit_words(Batch(extra=[extra]), "f00", "/dev/null")
    for memory in ("1000", "lots"):
        with pytest.raises(UsageError, match="size with its unit"):
            lsf.submit_words(Batch(memory=memory), "f00", "/dev/null")


@pytest.mark.parametrize(
    ("conf", "limit"),
    [
        ("LSF_UNIT_FOR_LIMITS=MB", "1025"),
        ("LSF_UNIT_FOR_LIMITS=G  # And a comment", "2"),
        ("#LSF_UNIT_FOR_LIMITS=NotDetected", "1048577"),
    ],
)
def test_memory_is_in_the_clusters_unit(conf: str, limit: str, tmp_path: Path) -> None:
    """The limit is in the unit that lsf.conf says, or in KB, and rounded up; the number is read."""
    (tmp_path / "lsf.conf").write_text(f"LSF_CONFDIR=/lsf\n{conf}\n")
    bsub = tmp_path / "bsub"
    bsub.write_text('#!/bin/sh\necho "$@" >&2\necho "Job <4711> is submitted to queue <regress>."\n')
    bsub.chmod(0o755)
    words = lsf.submit_words(Batch(memory="1048577K"), "f00", "")
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "LSF_ENVDIR": str(tmp_path)}
    done = subprocess.run(words, capture_output=True, env=env, text=True, check=True)
    assert f"-M {limit}\n" in done.stderr
    assert scheduler.read_submitted(done.stdout) == "4711"


def test_answers_are_for_people() -> None:
    """The release, the queues and a refusal are told in a few words."""
    said = (
        "IBM Spectrum LSF Standard 10.1.0.12, Jun 10 2021\nCopyright International Business Machines Corp.\n"
    )
    assert lsf.read_version(said) == "LSF 10.1.0.12"
    more = "old 30 Closed:Active - -\noff 30 Open:Inact_Adm - -\n"
    assert lsf.read_queues(LSF["queues"] + more) == {
        "normal": "",
        "old": "takes no jobs",
        "off": "is not active: jobs would wait",
    }
    site = ["*" * 60, "Project not specified.  Please specify a project using the -P flag."]
    assert scheduler.refusal(lsf, [*site, "Request aborted by esub. Job not submitted."]) == (
        "Project not specified.  Please specify a project using the -P flag. / "
        "Request aborted by esub. Job not submitted."
    )
    limit = "RUNLIMIT: Cannot exceed queue's hard limit(s). Job not submitted."
    assert scheduler.refusal(lsf, ["Warning: something", limit]) == limit


def test_guard_knows_its_own_job() -> None:
    """A warden cancels a job that waits and is its own."""
    guard = scheduler.guard(lsf, "f00")
    assert still_waits(guard, "PEND bokeh-ssh:f00\n")
    for said in ("PEND bokeh-ssh:abc\n", "RUN bokeh-ssh:f00\n", " \n", ""):
        assert not still_waits(guard, said), said
