"""What Slurm says, as it was recorded from 22.05, and what we make of it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bokeh_ssh import Batch, Job, JobState, UsageError
from bokeh_ssh._jobs import grid_engine, lsf, pbs, scheduler, slurm
from bokeh_ssh._jobs.job import explain_end
from bokeh_ssh._jobs.script import job_script
from bokeh_ssh._remote.warden import still_waits


@pytest.mark.parametrize(
    ("out", "job"),
    [
        (
            "7|RUNNING|None|1795899223|1795901023|c1|main\n",
            Job(id="7", state=JobState.RUNNING, node="c1", ends_at=1795901023.0),
        ),
        (
            "7|PENDING|Resources|1795900305|1795902105|n/a|main\n",
            Job(id="7", reason="Resources", estimated_start=1795900305.0),
        ),
        ("7|PENDING|None|N/A|N/A|n/a|main\n", Job(id="7")),
        (
            "7|SUSPENDED|None|1795899223|1795901023|c1|main\n",
            Job(id="7", state=JobState.SUSPENDED, node="c1", ends_at=1795901023.0),
        ),
        (
            "7|COMPLETING|None|1795899223|1795899223|c1|main\n",
            Job(id="7", state=JobState.COMPLETING, node="c1", ends_at=1795899223.0),
        ),
        (
            "Welcome to the cluster\n7|TIMEOUT|TimeLimit|1795899223|1795899283|c1|main\n",
            Job(id="7", state=JobState.TIMEOUT, node="c1", ends_at=1795899283.0),
        ),
        (
            "17|RUNNING|None|1795899223|1795901023|c2|main\n7|PENDING|Priority|N/A|N/A||main\n",
            Job(id="7", reason="Priority"),
        ),
        ("17|RUNNING|None|1795899223|1795901023|c2|main\n", Job(id="7", state=JobState.UNKNOWN)),
        ("", Job(id="7", state=JobState.UNKNOWN)),
    ],
)
def test_answer_is_read(out: str, job: Job) -> None:
    """State, reason, node and times are what squeue says; a job that it lists no more is one it forgot."""
    assert slurm.read_answer("7", 0, out, "") == job


@pytest.mark.skipif(sys.platform == "win32", reason="login nodes are POSIX")
@pytest.mark.parametrize(
    ("said", "status"),
    [
        ("echo PENDING bokeh-ssh:f00", 0),
        ("echo slurm_load_jobs error: Invalid job id specified >&2; exit 1", 0),
        ("echo slurm_load_jobs error: Unable to contact slurm controller >&2; exit 1", 1),
    ],
)
def test_warden_asks_no_more_for_a_job_that_is_forgotten(tmp_path: Path, said: str, status: int) -> None:
    """That squeue knows a job no more is an answer; that it reaches no controller is none."""
    (tmp_path / "squeue").write_text(f"#!/bin/sh\n{said}\n")
    (tmp_path / "squeue").chmod(0o755)
    words: Any = scheduler.guard(slurm, "f00", "7")["check"]
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    done = subprocess.run(words, capture_output=True, env=env, text=True, check=False)
    assert done.returncode == status
    assert still_waits(scheduler.guard(slurm, "f00", "7"), done.stdout) == ("PENDING" in said)


def test_unknown_job_is_over() -> None:
    """A job that Slurm has forgotten is over; exit status and text are squeue's."""
    said = "slurm_load_jobs error: Invalid job id specified\n"
    assert slurm.read_answer("7", 1, "", said) == Job(id="7", state=JobState.UNKNOWN)
    assert JobState.UNKNOWN.over
    assert slurm.UNKNOWN[0] in "squeue: error: Invalid job id: 0\n", "a number that no job has"


@pytest.mark.parametrize(
    ("status", "out", "err"),
    [
        (1, "", "slurm_load_jobs error: Unable to contact slurm controller (connect failure)\n"),
        (1, "", "slurm_load_jobs error: Socket timed out on send/recv operation\n"),
        (124, "", "env did not end within 30 s"),
        (0, "Welcome to the cluster\n", ""),
    ],
)
def test_no_answer_is_no_end(status: int, out: str, err: str) -> None:
    """Where Slurm cannot be asked, nothing is said of the job."""
    assert slurm.read_answer("7", status, out, err) is None


@pytest.mark.parametrize(
    ("out", "job"),
    [("123\n", "123"), ("123;cluster\n", "123"), ("Checking quota\n77\n", "77"), ("quota 12 of 50\n", "")],
)
def test_number_of_a_submitted_job(out: str, job: str) -> None:
    """The number is found among what a site's plugin says."""
    assert scheduler.read_submitted(out) == job


def test_refusal_is_slurms_line() -> None:
    """The lines that name the fault are told, without the program's name."""
    said = (
        "sbatch: error: invalid partition specified: nosuch",
        "sbatch: error: Batch job submission failed: Invalid partition name specified",
    )
    assert scheduler.refusal(slurm, said).startswith("invalid partition specified: nosuch; Batch job")
    assert scheduler.refusal(slurm, ("No.",)) == "No."
    assert scheduler.refusal(slurm, ()) == "it said nothing"


def test_reasons_that_never_pass() -> None:
    """Waiting helps with other users' jobs, and not with limits on one job."""
    for reason in ("PartitionTimeLimit", "MaxMemPerLimit", "QOSMaxWallDurationPerJobLimit", "QOSMinGRES"):
        assert slurm.why_never(reason), reason
    for reason in ("Resources", "Priority", "QOSMaxJobsPerUserLimit", "BeginTime", "", "ReqNodeNotAvail"):
        assert not slurm.why_never(reason), reason
    account = "Job's account not permitted to use this partition (gpu allows proj1 not proj2)"
    assert slurm.why_never(account) == "its account may not use the queue"
    qos = "Job's QOS not permitted to use this partition (gpu denies slow including slow)"
    assert slurm.why_never(qos) == "its quality of service (QOS) may not use the queue"


def test_reason_of_one_queue_of_several_may_pass() -> None:
    """A job that asks for several queues may be started by another one than that of the reason."""
    told = slurm.read_answer("7", 0, "7|PENDING|PartitionTimeLimit|N/A|N/A|n/a|main,short\n", "")
    assert told == Job(id="7", reason="PartitionTimeLimit (in one of main,short)")
    assert not slurm.why_never(told.reason)
    told = slurm.read_answer("7", 0, "7|PENDING|Resources|N/A|N/A|n/a|main,short\n", "")
    assert told == Job(id="7", reason="Resources")


def test_every_end_has_a_sentence() -> None:
    """Each way to end is told with a next step."""
    for state in JobState:
        if state.over:
            assert all(explain_end(slurm.ENDS, Job(id="7", state=state), None, ""))


def test_end_names_what_is_known_of_it() -> None:
    """Who has cancelled a job, which machine failed, and which memory was asked for, are in the sentence."""
    memory = explain_end(slurm.ENDS, Job(id="7", state=JobState.OUT_OF_MEMORY), "32G", "")[0]
    assert memory == "the job used more memory than it has (32G)"
    failed = explain_end(slurm.ENDS, Job(id="7", state=JobState.NODE_FAIL, node="c17"), "32G", "")[0]
    assert failed == "the job's machine failed (c17)"
    cancelled = explain_end(slurm.ENDS, Job(id="7", state=JobState.CANCELLED), "32G", "root")[0]
    assert cancelled == "the job was cancelled by root"


@pytest.mark.parametrize(
    ("time", "limit", "longer"),
    [
        ("2:00:00", "1:00:00", True),
        ("1:00:00", "1:00:00", False),
        ("61", "1:00:00", True),
        ("59:59", "1:00:00", False),
        ("1-0", "23:59:59", True),
        ("1-00:30", "1-00:29:59", True),
        ("2:00:00", "", False),  # there is none
        (None, "1:00:00", False),
        ("soon", "1:00:00", False),  # which is not for us to refuse
        ("1:2:3:4", "1:00:00", False),
    ],
)
def test_times_are_compared(time: str | None, limit: str, longer: bool) -> None:
    """All ways to write a time that sbatch(1) names; what cannot be read is no reason."""
    assert slurm.is_longer(time, limit) is longer


def test_queues_are_read() -> None:
    """The default queue has a star in what sinfo says; a queue is listed once for each state of its nodes."""
    out = "main*|up|1:00:00\nmain*|up|1:00:00\ndown|down|1:00:00\nlong|up|infinite\n"
    assert slurm.read_queues(out) == {"main": "", "down": "is down", "long": ""}
    assert slurm.read_queue(out, None) == ("main", "up", "1:00:00")
    assert slurm.read_queue(out, "long") == ("long", "up", "")
    down = slurm.read_queue(out, "down")
    assert down
    assert not down.up
    assert slurm.read_queue(out, "mai") is None


@pytest.mark.parametrize(
    ("version", "fits"),
    [("slurm-wlm 22.05.8\n", True), ("slurm 20.11.0", True), ("slurm 20.02.6", False), ("nightly", True)],
)
def test_old_release_cannot_join_jobs(version: str, fits: bool) -> None:
    """Slurm before 20.11 has no --overlap."""
    assert slurm.overlaps(version) is fits


@pytest.mark.parametrize(
    ("out", "number"),
    [("CANCELLED by 22002\n", "22002"), ("CANCELLED\n", ""), ("", ""), ("TIMEOUT\n", "")],
)
def test_canceller_is_read(out: str, number: str) -> None:
    """The accounting knows who has cancelled a job; as sacct(1) writes it, for no bed here has a database."""
    assert slurm.read_canceller(out) == number


def test_fields_are_options() -> None:
    """Each field is an option; what nothing works without comes last, where it counts."""
    batch = Batch(time="1:00", queue="q", account="a", cpus=2, memory="1G", gpus=3, name="n", extra=["--x=1"])
    words = slurm.submit_words(batch, "f00", "/home/me/.log")
    for word in (
        *("--time=1:00", "--partition=q", "--account=a", "--cpus-per-task=2", "--mem=1G", "--gpus=3"),
        *("--job-name=n", "--x=1"),
    ):
        assert word in words
    own = ["--no-requeue", "--signal=B:USR1@120", "--comment=bokeh-ssh:f00", "--output=/home/me/.log"]
    assert words[-4:] == own
    assert not [word for word in slurm.submit_words(Batch(), "f00", "/dev/null") if word.startswith("--time")]


def test_gpus_of_a_kind_are_asked_for() -> None:
    """A kind and a number are what each cluster's pages say; where it is no common option, that is told."""
    assert Batch(gpus="2") == Batch(gpus=2)
    batch = Batch(gpus="a100:2")
    assert "--gpus=a100:2" in slurm.submit_words(batch, "f00", "/dev/null")
    assert "num=2:gmodel=a100" in lsf.submit_words(batch, "f00", "/dev/null")
    for which in (grid_engine, pbs):
        with pytest.raises(UsageError, match="each site has an option of its own"):
            which.submit_words(batch, "f00", "/dev/null")


def test_end_by_a_deadline_is_not_the_time_limit() -> None:
    """What was to be over by a time of the submitter's own needs another one, and not a longer limit."""
    job = slurm.read_answer("7", 0, "7|DEADLINE|None|1795899223|1795899283|c1|main\n", "")
    assert job
    assert job.state is JobState.DEADLINE
    why, hint = explain_end(slurm.ENDS, job, None, "")
    assert (why, hint) == ("the job could not be over by its deadline", "give a later one, or less time")


@pytest.mark.parametrize(
    "word",
    [
        "--array=1",
        "--arr=1",
        "-a1",
        "--clusters=b",
        "-M b",
        "--requeue",
        "--wait",
        "-W",
        "--test-only",
        "-Q",
        "-h",
        "-V",
    ],
)
def test_job_that_is_not_one_is_refused(word: str) -> None:
    """What would make an array of it, put it elsewhere, or have it start again, is refused."""
    with pytest.raises(UsageError, match=re.escape(f"{word!r} in extra cannot work: ")):
        slurm.submit_words(Batch(extra=[word]), "f00", "/dev/null")
    slurm.submit_words(Batch(extra=["--wait-all-nodes=1", "--account=a", "-A a"]), "f00", "/dev/null")


def test_guard_knows_its_own_job() -> None:
    """A warden cancels a job that waits and is its own, or nobody's; not one that another looks after."""
    guard = scheduler.guard(slurm, "f00")
    for said in ("PENDING bokeh-ssh:f00\n", "PENDING mine\n", "PENDING (null)\n"):
        assert still_waits(guard, said), said
    for said in ("PENDING bokeh-ssh:f001\n", "PENDING bokeh-ssh:abc\n", "RUNNING bokeh-ssh:f00\n", ""):
        assert not still_waits(guard, said), said


def test_script_is_for_any_shell() -> None:
    """The script has the public key, and no line that would end its texts early."""
    script = job_script(
        ["~/my env/python", "python3"],
        "key AAAA",
        600.0,
        "/home/me/.log",
        variable="SLURM_JOB_ID",
        ways=["srun"],
    )
    assert "for p in ~/'my env/python' python3; do" in script
    assert '"client_key": "key AAAA"' in script
    end = re.findall(r"<<'(\w+)'", script)
    assert [script.splitlines().count(word) for word in end] == [1, 1]


@pytest.mark.parametrize(
    "keywords",
    [
        {"scheduler": "condor"},
        {"way": "pigeon"},
        {"time": ""},
        {"queue": "a\nb"},
        {"cpus": 0},
        {"gpus": True},
        {"gpus": "a100"},
        {"gpus": "a100:0"},
        {"gpus": "9" * 5000},
        {"extra": "--x"},
        {"extra": ["script.sh"]},
    ],
)
def test_batch_refuses_what_cannot_be(keywords: dict[str, object]) -> None:
    """What is no value for a scheduler is a UsageError at once."""
    with pytest.raises(UsageError):
        Batch(**keywords)  # type: ignore[arg-type]


def test_own_jobs_are_listed() -> None:
    """Those with our comment are; what somebody else's comment says is none of them."""
    out = (
        "7|RUNNING|None|c1|19:57|bokeh-ssh:0123456789abcdef|dash\n"
        "8|PENDING|Resources|n/a|20:00|bokeh-ssh:fedcba9876543210|a|b\n"
        "9|RUNNING|None|c2|19:57|(null)|dash\n"
        "10|RUNNING|None|c2|19:57|see bokeh-ssh:0123|dash\n"
    )
    assert slurm.read_list(out) == [
        {"id": "7", "name": "dash", "state": "RUNNING", "reason": "", "node": "c1", "left": "19:57"},
        {"id": "8", "name": "a|b", "state": "PENDING", "reason": "Resources", "node": "", "left": "20:00"},
    ]
