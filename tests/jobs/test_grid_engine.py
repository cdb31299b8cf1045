"""What Grid Engine says, as it was recorded from 8.1.9, and what we make of it."""

from __future__ import annotations

import pytest

from bokeh_ssh import Batch, Job, JobState, UsageError
from bokeh_ssh._jobs import grid_engine, scheduler
from bokeh_ssh._remote.warden import still_waits

RUNNING = """\
<?xml version='1.0'?>
<job_info  xmlns:xsd="http://arc.liv.ac.uk/repos/darcs/sge/source/dist/util/resources/schemas/qstat/qstat.xsd">
  <queue_info>
    <job_list state="running">
      <JB_job_number>2</JB_job_number>
      <JAT_prio>0.75000</JAT_prio>
      <JB_name>dash</JB_name>
      <JB_owner>alice</JB_owner>
      <state>r</state>
      <JAT_start_time>2026-11-29T04:14:19</JAT_start_time>
      <queue_name>main.q@c1</queue_name>
      <slots>1</slots>
    </job_list>
  </queue_info>
  <job_info>
    <job_list state="pending">
      <JB_job_number>15</JB_job_number>
      <JB_name>other</JB_name>
      <state>Eqw</state>
      <JB_submission_time>2026-11-29T04:14:12</JB_submission_time>
      <queue_name></queue_name>
      <slots>1</slots>
    </job_list>
  </job_info>
</job_info>
"""
DETAIL = """\
<detailed_job_info>
  <djob_info>
    <element>
      <JB_job_number>2</JB_job_number>
      <JB_uid>2001</JB_uid>
      <JB_hard_resource_list>
        <qstat_l_requests>
          <CE_name>gpu</CE_name>
          <CE_doubleval>1.000000</CE_doubleval>
        </qstat_l_requests>
        <qstat_l_requests>
          <CE_name>h_rt</CE_name>
          <CE_stringval>1200</CE_stringval>
          <CE_doubleval>1200.000000</CE_doubleval>
        </qstat_l_requests>
      </JB_hard_resource_list>
      <JB_ja_tasks>
        <ulong_sublist>
          <JAT_status>128</JAT_status>
          <JAT_start_time>1795925659</JAT_start_time>
        </ulong_sublist>
      </JB_ja_tasks>
      <JB_context>
        <context_list>
          <VA_variable>bokeh-ssh</VA_variable>
          <VA_value>abc</VA_value>
        </context_list>
      </JB_context>
      <JB_ja_structure>
        <task_id_range>
          <RN_min>1</RN_min>
          <RN_max>1</RN_max>
          <RN_step>1</RN_step>
        </task_id_range>
      </JB_ja_structure>
    </element>
  </djob_info>
</detailed_job_info>
"""
ERROR = """\
<detailed_job_info><JB_job_number>15</JB_job_number>
<QIM_message>error: can&apos;t open output file &quot;/x&quot;</QIM_message>
<JAT_start_time>0</JAT_start_time></detailed_job_info>
"""


def test_running_job_is_read() -> None:
    """The state is its letters', the node its queue's, and the end start and limit together."""
    job = Job(id="2", state=JobState.RUNNING, node="c1", ends_at=1795926859.0)
    assert grid_engine.read_answer("2", 0, "Welcome\n" + RUNNING + DETAIL, "") == job


@pytest.mark.parametrize(
    ("letters", "state"),
    [("s", "SUSPENDED"), ("S", "SUSPENDED"), ("T", "SUSPENDED"), ("t", "RUNNING"), ("ds", "COMPLETING")],
)
def test_suspended_job_is_read(letters: str, state: str) -> None:
    """Its user, its queue or the load of its machine may have stopped a job."""
    assert grid_engine.read_state(letters) == state


def test_job_in_error_never_starts() -> None:
    """The state of error is one that no waiting ends, and says why."""
    job = grid_engine.read_answer("15", 0, RUNNING + ERROR, "")
    assert job == Job(id="15", reason='Eqw: error: can\'t open output file "/x"')
    assert grid_engine.why_never(job.reason)
    assert not grid_engine.why_never("held")


@pytest.mark.parametrize(
    ("account", "state"),
    [
        ("", JobState.COMPLETING),  # not written yet
        ("failed       0\nexit_status  0\nru_wallclock 10s\n", JobState.COMPLETED),
        ("failed       0\nexit_status  3\nru_wallclock 10s\n", JobState.FAILED),
        (
            "failed       0    \nexit_status  140   (User defined signal 2)\nru_wallclock 10s\n",
            JobState.CANCELLED,
        ),
        ("failed       100 : assumedly after job\nexit_status  137\nru_wallclock 16s\n", JobState.CANCELLED),
        (
            "failed       37  : qmaster enforced h_rt, h_cpu, or h_vmem limit\nexit_status  140\n",
            JobState.TIMEOUT,
        ),
        ("failed 0\nexit_status 140\nru_wallclock 1190s\ncategory     -l h_rt=1200\n", JobState.TIMEOUT),
    ],
)
def test_end_is_read_from_the_accounting(account: str, state: JobState) -> None:
    """How a job ended is what the accounting says; what it does not say yet is no end."""
    out = RUNNING + "<gone 9>\n" + account + "</gone 9>\n"
    assert grid_engine.read_answer("9", 0, out, "") == Job(id="9", state=state)


def test_silence_is_no_end() -> None:
    """A master that does not answer, and an answer that is cut off, say nothing of a job."""
    assert grid_engine.read_answer("2", 1, "error: commlib error: got select error\n", "") is None
    assert grid_engine.read_answer("9", 0, RUNNING, "") is None


def test_owner_and_tasks_are_read() -> None:
    """A job is one, and an array several."""
    assert grid_engine.read_owners(DETAIL) == [("2", "2001", True)]
    array = DETAIL.replace("<RN_max>1<", "<RN_max>5<").replace("<RN_step>1<", "<RN_step>2<")
    assert len(grid_engine.read_owners(array)) == 3
    assert grid_engine.read_owners("<unknown_jobs >\n<ST_name>999</ST_name>\n</unknown_jobs>") == []


def test_own_jobs_are_listed() -> None:
    """Those with our mark in their context are."""
    assert [job["id"] for job in grid_engine.read_list(RUNNING + DETAIL)] == ["2"]
    assert grid_engine.read_list(RUNNING + DETAIL.replace("bokeh-ssh", "other")) == []


def test_fields_are_options() -> None:
    """Each field is an option of qsub; a name that it does not take is made one that it does."""
    batch = Batch(
        time="1:00:00", queue="q", account="a", memory="1G", gpus=3, name="1 dash", extra=["-l x=1"]
    )
    text = " ".join(grid_engine.submit_words(batch, "f00", "/home/me/%j.log"))
    for part in (
        "-N _1_dash -q q -P a",
        "-l h_rt=1:00:00 -l h_vmem=1G -l gpu=3",
        "-l x=1",
        "-o /home/me/$JOB_ID.log",
    ):
        assert part in text
    with pytest.raises(UsageError, match="parallel environment"):
        grid_engine.submit_words(Batch(cpus=4), "f00", "/dev/null")
    with pytest.raises(UsageError, match="array"):
        grid_engine.submit_words(Batch(extra=["-t 1-3"]), "f00", "/dev/null")
    assert "-pe smp 4" in " ".join(
        grid_engine.submit_words(Batch(cpus=4, extra=["-pe smp 4"]), "f00", "/dev/null")
    )


def test_guard_knows_its_own_job() -> None:
    """A warden cancels a job that waits and is its own."""
    guard = scheduler.guard(grid_engine, "f00")
    assert still_waits(guard, "qw bokeh-ssh=f00\n")
    for said in ("qw bokeh-ssh=abc\n", "r bokeh-ssh=f00\n", " \n"):
        assert not still_waits(guard, said), said
