"""PBS and LSF by what was recorded of them: real tunnel, holder, way and server, stand-in commands."""

from __future__ import annotations

import re
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from beds import Machine, until
from bokeh_ssh import (
    Batch,
    DirectTunnel,
    Event,
    JobEndedError,
    JobReached,
    JobState,
    JobWaiting,
    SubmitError,
    TunnelClosedError,
)
from programs import Program
from replayed_schedulers import Replayed

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="schedulers run on Linux")

_APP = """\
import os
from bokeh.models import Div
from bokeh.plotting import curdoc
curdoc().add_root(Div(text=f"{os.environ.get('PBS_JOBID')} {os.environ.get('LSB_JOBID')}"))
"""


@pytest.fixture(params=["pbs", "lsf"])
def replayed(
    request: pytest.FixtureRequest, embedded: Callable[..., Machine]
) -> Iterator[tuple[str, Replayed]]:
    """Make a machine with the commands of one of them."""
    with tempfile.TemporaryDirectory(prefix="bs-") as folder:
        yield request.param, Replayed(request.param, embedded, Path(folder))


def opened(there: Replayed, **more: Any) -> DirectTunnel:
    """Make a tunnel into a job there."""
    common: dict[str, Any] = {"batch": "auto", "python": sys.executable, "isolate": False, "local_port": 0}
    machine = there.machine
    return DirectTunnel(machine.host, machine.user, **machine.login, **(common | more))


def test_app_runs_in_a_job_until_its_time_limit(replayed: tuple[str, Replayed], tmp_path: Path) -> None:
    """The job waits with its reason, starts, serves the app, is listed, and its end is told with why."""
    name, there = replayed
    app = tmp_path / "dash.py"
    app.write_text(_APP)
    events: list[Event] = []
    with opened(there, app=app, on_event=events.append) as tunnel:
        job = tunnel.job
        assert job
        assert (job.id, job.state, job.node) == ("1234", JobState.RUNNING, "localhost")
        assert job.ends_at
        assert abs(job.ends_at - time.time() - 1200) < 60
        reasons = [event.reason for event in events if isinstance(event, JobWaiting)]
        assert reasons == [
            "Not Running: Insufficient amount of resource: ncpus (R: 4 A: 1 T: 4)"
            if name == "pbs"
            else "New job is waiting for scheduling"
        ]
        assert [event.way for event in events if isinstance(event, JobReached)] == ["tcp"]
        session = tunnel.pull_session()
        text = session.document.roots[0].text  # type: ignore[attr-defined]
        session.close()
        assert text == "1234.pbs1 1234"
        assert "PRIVATE KEY" not in there.script
        login = there.machine.login
        words = [f"{there.machine.user}@{there.machine.host}", "-p", str(login["port"])]
        words += ["-i", str(login["key_filename"]), "--known-hosts", str(login["known_hosts"]), "-F", "none"]
        with Program("ls", *words, "--python", sys.executable) as program:
            assert program.end() == 0, program
        assert re.search(r"^job\t1234\t[\w-]+\tRUNNING\tlocalhost\t0:", program.stdout, re.M), program
        there.reach_limit()
        with pytest.raises(JobEndedError, match="the job reached its time limit"):
            tunnel.wait(30)
    there.wait_for_end()
    assert not list(there.home.glob(".bokeh-ssh-job*"))


def test_refused_job_is_told_in_the_schedulers_words(replayed: tuple[str, Replayed]) -> None:
    """The scheduler's own line is in the error at once, and nothing is queued."""
    name, there = replayed
    said = {
        "pbs": "qsub: Unknown queue\n",
        "lsf": "nosuch: No such queue. Job not submitted.\n",
    }[name]
    there.say("refused", said)
    start = time.monotonic()
    with pytest.raises(SubmitError, match=f"{re.escape(said.strip().removeprefix('qsub: '))}; check queue"):
        opened(there, app="dash.py", batch=Batch(scheduler=name, queue="nosuch")).open()
    assert time.monotonic() - start < 10, "a busy machine takes longer than the 2 s that it is about"
    assert "qstat -f" not in there.calls


def test_waiting_job_is_cancelled_with_its_tunnel(replayed: tuple[str, Replayed]) -> None:
    """Closing the tunnel while the job waits cancels it."""
    name, there = replayed
    there.say("held", "")
    events: list[Event] = []
    tunnel = opened(there, app="dash.py", on_event=events.append)
    raised: list[BaseException] = []

    def work() -> None:
        try:
            tunnel.open()
        except TunnelClosedError as exc:
            raised.append(exc)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        until(lambda: [event for event in events if isinstance(event, JobWaiting)], what="the job waits")
    finally:
        tunnel.close()
        thread.join(30)
    assert raised
    assert {"pbs": "qdel 1234\n", "lsf": "bkill 1234\n"}[name] in there.calls
