"""What PBS says, as it was recorded from OpenPBS 23.06 (Torque: from its users), and what we make of it."""

from __future__ import annotations

import pytest

from bokeh_ssh import Batch, Job, JobState, UsageError
from bokeh_ssh._jobs import pbs, scheduler
from bokeh_ssh._jobs.job import explain_end
from bokeh_ssh._remote.warden import still_waits
from replayed_schedulers import PBS, PBS_HEAD

RUNNING = PBS["running"].replace("@DATE@", "Sun Nov 29 12:39:07 2026").replace("@MARK@", "bokeh-ssh-abc")
TORQUE = """\
Job Id: 66908.xena
    Job_Name = sim
    Job_Owner = alice@xena
    job_state = {}
    queue = dualGPU
    exec_host = xena21/0-1
    Resource_List.nodes = 1:ppn=2
    Resource_List.walltime = 03:00:00
    euser = alice
    comment = Job started on Tue Feb 19 at 12:47
    start_time = Tue Feb 19 12:47:56 2019
    Walltime.Remaining = 8598
{}"""


def test_running_job_is_read() -> None:
    """The node is the first, and the end start and limit together; dates are asked for in UTC."""
    job = Job(id="1234", state=JobState.RUNNING, node="localhost", ends_at=1795955947.0 + 1200)
    assert pbs.read_answer("1234", 0, "Welcome\n" + RUNNING, "") == job
    assert "TZ=UTC0" in " ".join(pbs.ASK)


def test_torques_jobs_are_read() -> None:
    """Torque's attributes have other names, and its states one more."""
    job = pbs.read_answer("66908", 0, TORQUE.format("R", ""), "")
    assert job == Job(id="66908", state=JobState.RUNNING, node="xena21", ends_at=1550591276.0)
    for status, state in (
        (0, "COMPLETED"),
        (271, "CANCELLED"),
        (-11, "TIMEOUT"),
        (-10, "OUT_OF_MEMORY"),
        (1, "FAILED"),
    ):
        job = pbs.read_answer("66908", 0, TORQUE.format("C", f"    exit_status = {status}\n"), "")
        assert job
        assert job.state.value == state


#: What OpenPBS says of a job that it has put on hold by itself.
HELD = "job held, too many failed attempts to run"


@pytest.mark.parametrize(
    ("letter", "more", "reason", "never"),
    [
        (
            "Q",
            "comment = Can Never Run: Insufficient amount of resource: ncpus (R: 100 A: \n\t4 T: 4)",
            "Can Never Run: Insufficient amount of resource: ncpus (R: 100 A: 4 T: 4)",
            True,
        ),
        (
            "Q",
            "comment = Not Running: Queue not started.",
            "Not Running: Queue not started.",
            False,
        ),
        ("H", "Hold_Types = u", "held", False),
        ("H", f"comment = {HELD}", HELD, True),
        ("W", "Hold_Types = n", "its time to start has not come", False),
    ],
)
def test_waiting_job_says_why(letter: str, more: str, reason: str, never: bool) -> None:
    """The comment is the reason; one that no waiting ends is known."""
    job = pbs.read_answer("1234", 0, f"{PBS_HEAD}    job_state = {letter}\n    {more}\n", "")
    assert job == Job(id="1234", reason=reason)
    assert bool(pbs.why_never(reason)) is never


def test_estimate_is_read() -> None:
    """An expected start is passed on."""
    job = pbs.read_answer(
        "1", 0, "Job Id: 1.pbs1\n    job_state = Q\n    estimated.start_time = Sun Nov 29 12:39:07 2026\n", ""
    )
    assert job == Job(id="1", estimated_start=1795955947.0)


@pytest.mark.parametrize(
    ("attributes", "state"),
    [
        ("substate = 93\n    Exit_status = -29", JobState.TIMEOUT),
        ("substate = 93\n    Exit_status = -27", JobState.OUT_OF_MEMORY),
        ("substate = 93\n    stime = Sun Nov 29 12:41:58 2026\n    Exit_status = -20", JobState.NODE_FAIL),
        ("substate = 93\n    stime = Sun Nov 29 12:41:58 2026", JobState.NODE_FAIL),
        ("substate = 91\n    Exit_status = 271", JobState.CANCELLED),
        ("substate = 91\n    Exit_status = 143", JobState.CANCELLED),
        ("substate = 91", JobState.CANCELLED),  # while it waited
        ("substate = 93\n    Exit_status = 3", JobState.FAILED),
        ("substate = 92\n    Exit_status = 0", JobState.COMPLETED),
        # Releases before 20 tell the limit by the times alone.
        (
            "Resource_List.walltime = 00:40\n    resources_used.walltime = 00:00:58\n    Exit_status = 271",
            JobState.TIMEOUT,
        ),
    ],
)
def test_end_is_read_from_the_history(attributes: str, state: JobState) -> None:
    """How a job ended is what the history says."""
    out = f"{PBS_HEAD}    job_state = F\n    {attributes}\n"
    assert pbs.read_answer("1234", 0, out, "") == Job(id="1234", state=state)
    leaving = pbs.read_answer("1234", 0, out.replace("= F", "= E"), "")
    assert leaving == Job(id="1234", state=JobState.COMPLETING)


def test_suspended_job_is_read() -> None:
    """One that the server or a busy workstation has stopped still has its node."""
    for letter in "SU":
        job = pbs.read_answer("1234", 0, RUNNING.replace("job_state = R", f"job_state = {letter}"), "")
        assert job == Job(id="1234", state=JobState.SUSPENDED, node="localhost")


def test_canceller_is_read() -> None:
    """The history has who it was."""
    said = (
        "    comment = Job run at Sun Nov 29 at 12:39 on (pbs1:ncpus=1) and terminated by root@pbs1    etime"
    )
    assert pbs.read_canceller(said) == "root"
    cancelled = Job(id="1", state=JobState.CANCELLED)
    assert explain_end(pbs.ENDS, cancelled, None, "root")[0].endswith("by root")
    assert pbs.read_canceller("    comment = Can Never Run") == ""


def test_silence_is_no_end() -> None:
    """A server that does not answer says nothing of a job; that it does not know one is an answer."""
    said = "Connection refused\nqstat: cannot connect to server pbs1 (errno=15010)\n"
    assert pbs.read_answer("2", 255, said, "") is None
    assert pbs.read_answer("2", 0, "", "") is None
    unknown = Job(id="2", state=JobState.UNKNOWN)
    assert pbs.read_answer("2", 153, "qstat: Unknown Job Id 2.pbs1\n", "") == unknown
    assert pbs.read_answer("2", 153, "qstat: Unknown Job Id Error 2.xena\n", "") == unknown
    assert pbs.read_answer("2", 153, RUNNING + "qstat: Unknown Job Id 22.pbs1\n", "") is None
    running = pbs.read_answer("1234", 153, RUNNING + "qstat: Unknown Job Id 2.pbs1\n", "")
    assert running, "that another job is not known says nothing of this one"
    assert running.state is JobState.RUNNING


def test_own_jobs_are_listed() -> None:
    """Those with our mark are."""
    assert [
        (job["id"], job["name"], job["node"]) for job in pbs.read_list(RUNNING + TORQUE.format("R", ""))
    ] == [("1234", "bokeh-ssh", "localhost")]
    assert pbs.read_owners("1234 22001 bokeh-ssh-abc\n") == [("1234", "22001", True)]
    assert len(pbs.read_owners("16 0 -\n16 0 -\n16 0 -\n")) == 3


def test_fields_are_options() -> None:
    """Each field is an option of qsub; what would make another job of it is refused."""
    batch = Batch(
        time="1:00:00", queue="q", account="a", cpus=2, memory="1G", gpus=3, name="1 dash", extra=["-l x=1"]
    )
    text = " ".join(pbs.submit_words(batch, "f00", "/home/me/%j.log"))
    for part in (
        "select=1:ncpus=2:ngpus=3:mem=1G nodes=1:ppn=2:gpus=3,mem=1G qsub -N _1_dash -q q -A a",
        "-l walltime=1:00:00 -l x=1 -S /bin/sh -r n -j oe -o /dev/null -e /bokeh-ssh-f00",
    ):
        assert part in text
    for extra in ("-J 1-3", "-t 1-3", "-I", "-W block=true"):
        with pytest.raises(UsageError, match="cannot work"):
            pbs.submit_words(Batch(extra=[extra]), "f00", "/dev/null")


def test_answers_are_for_people() -> None:
    """The release, the queues and a refusal are told in a few words."""
    assert pbs.read_version("pbs_version = 23.06.06") == "OpenPBS 23.06.06"
    assert (
        pbs.read_version("Version: 6.1.2\nCommit: 661e092552de43a785c15d39a3634a541d86898e") == "Torque 6.1.2"
    )
    queues = pbs.read_queues(
        PBS["queues"] + "\nQueue: closed\n    enabled = False\n\nQueue: off\n    started = False\n"
    )
    assert queues == {"workq": "", "closed": "takes no jobs", "off": "is stopped: jobs would wait"}
    assert scheduler.refusal(pbs, ["qsub: Unknown resource: ngpus"]) == "Unknown resource: ngpus"


def test_guard_knows_its_own_job() -> None:
    """A warden cancels a job that waits and is its own."""
    guard = scheduler.guard(pbs, "f00")
    assert still_waits(guard, "Q bokeh-ssh-f00\n")
    for said in ("Q bokeh-ssh-abc\n", "R bokeh-ssh-f00\n", " \n", ""):
        assert not still_waits(guard, said), said
