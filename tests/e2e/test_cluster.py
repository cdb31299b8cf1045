"""A server in a batch job, on a real Slurm: one command submits, waits, opens, and leaves nothing behind."""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import itertools
import json
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import bokeh_ssh._jobs.warden
import browser
from beds import until
from bokeh_ssh import (
    AuthenticationError,
    Batch,
    BokehSSHError,
    Closed,
    Connecting,
    DirectTunnel,
    Event,
    Host,
    JobEnded,
    JobEndedError,
    JobEnding,
    JobNeverStartsError,
    JobReached,
    JobStarted,
    JobState,
    JobSubmitted,
    JobWaiting,
    LaunchError,
    QueueTimeoutError,
    Ready,
    Reconnected,
    ServerExitedError,
    SessionError,
    SubmitError,
    TunnelClosedError,
    UsageError,
    Warned,
)
from bokeh_ssh._jobs.job_list import JobList
from bokeh_ssh._ssh.connect import connect
from programs import Program
from slurm_bed import JUMP_PORT, SlurmBed, cluster

pytestmark = [
    pytest.mark.once,  # our part of it is tried with recorded answers on every Python
    pytest.mark.skipif(sys.platform != "linux", reason="Slurm runs on Linux"),
]

APP = """\
import os
from bokeh.models import Div
from bokeh.plotting import curdoc
curdoc().add_root(Div(text=f"{os.environ.get('SLURM_JOB_ID')} {os.uname().nodename}"))
"""


@pytest.fixture(scope="module")
def whole() -> Iterator[SlurmBed]:
    """Make one cluster for all tests of this file."""
    with cluster() as bed:
        bed.run("login1", f"cat >dash.py <<'END'\n{APP}END")
        yield bed


@pytest.fixture
def bed(whole: SlurmBed) -> Iterator[SlurmBed]:
    """Offer the cluster with nothing in its queue; afterwards nothing may be left on any machine."""
    whole.settle()
    whole.clear()
    yield whole
    whole.settle()


def options(bed: SlurmBed, events: list[Event], **more: Any) -> dict[str, Any]:
    """Say how to open the app in a job."""
    common = {
        "app": "dash.py",
        "python": sys.executable,
        "batch": Batch(time="20:00"),
        "key_filename": bed.key_file,
        "known_hosts": bed.known_hosts,
        "ssh_config": None,
        "isolate": False,
        "local_port": 0,
        "on_event": events.append,
    }
    return common | more


def find(events: list[Event], kind: type[Event]) -> list[Any]:
    """List the events of a kind."""
    return [event for event in events if isinstance(event, kind)]


@contextlib.contextmanager
def blocked(bed: SlurmBed) -> Iterator[str]:
    """Let another user's job have both nodes; its number."""
    job = bed.run("login2", 'sbatch --parsable -N2 --exclusive -o /dev/null --wrap "sleep 600"', "mallory")
    number = job.strip()
    until(lambda: f"{number} RUNNING" in bed.queue(), what="the other job runs")
    yield number
    bed.run("ctl", f"scancel {number}", "root")


@contextlib.contextmanager
def opening(tunnel: DirectTunnel) -> Iterator[list[BaseException]]:
    """Open a tunnel on another thread; the list gets what that raises."""
    raised: list[BaseException] = []

    def work() -> None:
        try:
            tunnel.open()
        except BokehSSHError as exc:
            raised.append(exc)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield raised
    finally:
        tunnel.close()
        thread.join(30)
        assert not thread.is_alive()


def check_secrets(bed: SlurmBed, job: str, node: str) -> None:
    """Check that neither the script that Slurm keeps nor a process shows others a key that gets in."""
    script = bed.run("login1", f"scontrol write batch_script {job} -; scontrol show job {job}")
    assert "ecdsa-sha2-nistp256 AAAA" in script, "the control: the public half is there"
    assert "PRIVATE KEY" not in script
    told = "for p in /proc/[0-9]*; do tr '\\0' ' ' <$p/cmdline; tr '\\0' ' ' <$p/environ; done 2>/dev/null"
    for machine in ("login1", node):
        text = bed.run(machine, told, "root")
        assert "sshd: alice" in text, "the control: the processes that carry it are among them"
        assert "PRIVATE KEY" not in text


@pytest.mark.parametrize(("queue", "isolate"), [("one", False), ("two", True)])
def test_app_opens_in_a_job(bed: SlurmBed, queue: str, isolate: bool) -> None:
    """The job is submitted, the app runs in it and sees it, and the end leaves neither a job nor a file.

    No machine has an SSH service but the login nodes, and those forbid forwarding. The second time, the
    login node is behind a jump host.
    """
    node = {"one": "c1", "two": "c2"}[queue]
    keys = {"key_filename": bed.key_file, "known_hosts": bed.known_hosts, "ssh_config": None}
    jump = Host(bed.login2, "alice", port=JUMP_PORT, jump=(), **keys) if queue == "two" else ()
    events: list[Event] = []
    batch = Batch(queue=queue, time="20:00", name="my dash", cpus=1, memory="600M")
    # The control: the same login without batch serves the app outside of any job, or not at all.
    tunnel = DirectTunnel(
        bed.login1, "alice", **options(bed, events, batch=batch, isolate=isolate, jump=jump)
    )
    ports = bed.run(node, "cat /proc/net/tcp /proc/net/tcp6 | grep -c ' 0A '", "root")
    with tunnel:
        job = tunnel.job
        assert job
        assert (job.state, job.node) == (JobState.RUNNING, node)
        assert job.ends_at
        assert abs(job.ends_at - time.time() - 1200) < 60
        assert tunnel.state == "ready"
        session = tunnel.pull_session()
        number, machine = session.document.roots[0].text.split()  # type: ignore[attr-defined]
        session.close()
        assert (number, machine) == (job.id, node)
        assert bed.run("login1", f"squeue -h -j {job.id} -o '%j %C %m %T'") == "my dash 1 600M RUNNING\n"
        # Nobody else gets in: there is no new port, and no folder that another user may enter.
        assert bed.run(node, "cat /proc/net/tcp /proc/net/tcp6 | grep -c ' 0A '", "root") == ports
        looked = bed.run(node, "ls /tmp/bokeh-ssh-job-*/ /tmp/bokeh-ssh-2*/", "mallory")
        assert looked.count("Permission denied") == 2
        assert bed.files(node)
        check_secrets(bed, job.id, node)
    ways = [(event.host, event.port, event.via) for event in find(events, Connecting)]
    assert ways[-1] == (node, 0, bed.login1), "no port of it is connected to"
    kinds = [type(event) for event in events]
    assert kinds.index(JobSubmitted) < kinds.index(JobStarted) < kinds.index(Ready) < kinds.index(JobEnded)
    assert tunnel.job
    assert tunnel.job.state is JobState.CANCELLED
    assert find(events, Closed)[0].server == "ended"
    until(lambda: not bed.queue(), what="the job is gone")
    for each in (node, "login1"):
        until(lambda each=each: not bed.files(each), what=f"nothing is left on {each}")  # type: ignore[misc]


@pytest.mark.parametrize(
    ("batch", "said"),
    [
        (Batch(queue="nosuch"), "invalid partition specified: nosuch"),
        (Batch(time="soon"), "Invalid --time specification"),
        (Batch(gpus=1), "Invalid generic resource"),
        (Batch(extra=["--constraint=none"]), "Invalid feature specification"),
        (Batch(memory="64G"), "Memory specification can not be satisfied"),
        (Batch(queue="closed"), "User's group not permitted to use this partition"),
    ],
    ids=["queue", "time", "gpus", "feature", "memory", "group"],
)
def test_refused_job_is_told_in_slurms_words(bed: SlurmBed, batch: Batch, said: str) -> None:
    """What sbatch refuses is told within 2 s, in its own words, and nothing is queued."""
    events: list[Event] = []
    began = time.monotonic()
    with pytest.raises(SubmitError, match=re.escape(said)) as caught:
        DirectTunnel(bed.login1, "alice", **options(bed, events, batch=batch)).open()
    assert time.monotonic() - began < 10  # the promise is 2; a loaded machine may be late
    assert any(said in line for line in caught.value.said)
    assert not bed.queue()
    assert not find(events, JobSubmitted)


@pytest.mark.parametrize(
    ("batch", "reason"),
    [
        (Batch(time="2:00:00"), "PartitionTimeLimit"),
        (Batch(cpus=64), "PartitionConfig"),
        (Batch(queue="down"), "PartitionDown"),
        (Batch(queue="members"), "Job's account not known, so it can't use this partition"),
    ],
    ids=["time", "cpus", "down", "account"],
)
def test_job_that_can_never_start_is_cancelled(bed: SlurmBed, batch: Batch, reason: str) -> None:
    """Slurm accepts these, and lets them wait for ever; the reason is told, and the job is gone."""
    events: list[Event] = []
    with pytest.raises(JobNeverStartsError, match=reason) as caught:
        DirectTunnel(bed.login1, "alice", **options(bed, events, batch=batch)).open()
    assert caught.value.reason.startswith(reason)
    assert find(events, JobSubmitted)[0].job == caught.value.job
    assert not bed.queue()


def test_waiting_job_is_told_and_started(bed: SlurmBed) -> None:
    """While the job waits, the tunnel is "queued" and tells why; the launch timeout counts from its start."""
    events: list[Event] = []
    tunnel = DirectTunnel(bed.login1, "alice", **options(bed, events, launch_timeout=12.0))
    submitted = time.time()
    with blocked(bed) as other, opening(tunnel) as raised:
        began = time.monotonic()
        until(lambda: any(event.reason == "Resources" for event in find(events, JobWaiting)), what="told why")
        assert tunnel.state == "queued"
        assert tunnel.job
        assert (tunnel.job.state, tunnel.job.reason) == (JobState.PENDING, "Resources")
        until(lambda: time.monotonic() - began > 13, what="more than the launch timeout")
        assert not raised
        bed.run("ctl", f"scancel {other}", "root")
        until(lambda: tunnel.state == "ready" or raised, timeout=90, what="it opens")
        assert not raised
    estimates = [event.estimated_start for event in find(events, JobWaiting) if event.estimated_start]
    assert all(when > submitted for when in estimates)


def test_tunnels_share_their_questions(bed: SlurmBed) -> None:
    """Three tunnels whose jobs wait ask Slurm as often as one would: each question is for all jobs."""
    script = '#!/bin/sh\necho "$(date +%s.%N) $*" >>/tmp/asked\nexec /run/squeue "$@"'
    bed.run("login1", f"cp /usr/bin/squeue /run/squeue; echo {shlex.quote(script)} >/run/asking", "root")
    bed.run("login1", "chmod 755 /run/asking; mount --bind /run/asking /usr/bin/squeue", "root")

    def asked() -> list[float]:
        lines = [line.split() for line in bed.run("login1", "cat /tmp/asked").splitlines()]
        return [float(when) for when, *words in lines if any(word.count(",") == 2 for word in words)]

    try:
        with blocked(bed), contextlib.ExitStack() as stack:
            for _ in range(3):
                more = {"batch": Batch(cpus=4, queue="one")}
                stack.enter_context(opening(DirectTunnel(bed.login1, "alice", **options(bed, [], **more))))
            until(lambda: len(asked()) > 3, timeout=60, what="they were asked for together, some times")
        times = asked()
        # A tunnel that waits for a while asks less and less often.
        assert all(later - earlier > 1.9 for earlier, later in itertools.pairwise(times)), times
    finally:
        bed.run("login1", "umount /usr/bin/squeue; rm /tmp/asked", "root")
    until(lambda: not bed.files("login1"), what="nothing is left on login1")


def test_closing_cancels_a_waiting_job(bed: SlurmBed) -> None:
    """Whoever gives up waiting leaves no job in the queue."""
    events: list[Event] = []
    tunnel = DirectTunnel(bed.login1, "alice", **options(bed, events))
    with blocked(bed) as other:
        with opening(tunnel) as raised:
            until(lambda: find(events, JobWaiting), what="it waits")
            assert len(bed.queue()) == 2
        assert [type(error) for error in raised] == [TunnelClosedError]
        assert bed.queue() == [f"{other} RUNNING"]


def test_cancelled_waiting_job_is_an_error(bed: SlurmBed) -> None:
    """A job that somebody cancels while it waits is told as cancelled, within 10 s."""
    events: list[Event] = []
    tunnel = DirectTunnel(bed.login1, "alice", **options(bed, events))
    with blocked(bed), opening(tunnel) as raised:
        until(lambda: find(events, JobWaiting), what="it waits")
        bed.run("login2", f"scancel {find(events, JobWaiting)[0].job}")
        until(lambda: raised, timeout=10, what="told")
    assert isinstance(raised[0], JobEndedError)
    assert raised[0].state == "CANCELLED"


def test_cancelled_running_job_ends_the_tunnel(bed: SlurmBed) -> None:
    """A job that somebody cancels ends the tunnel with that reason within 10 s, and with no new job."""
    events: list[Event] = []
    with DirectTunnel(bed.login1, "alice", **options(bed, events)) as tunnel:
        assert tunnel.job
        node = tunnel.job.node
        bed.run("login2", f"scancel {tunnel.job.id}")
        with pytest.raises(JobEndedError, match="the job was cancelled") as caught:
            tunnel.wait(10)
        assert caught.value.state == "CANCELLED"
        assert tunnel.state == "failed"
        assert "the job was cancelled" in tunnel._repr_html_()
        with pytest.raises(TunnelClosedError, match="the tunnel is failed: the job was cancelled"):
            tunnel.show()
    assert find(events, Closed)[0].server == "ended"
    assert not find(events, Warned)
    assert [event.state for event in find(events, JobEnded)] == ["CANCELLED"]
    assert not find(events, Reconnected)
    assert len(find(events, JobSubmitted)) == 1
    until(lambda: not bed.files(node), what="nothing is left on the node")


def test_preempted_job_is_told(bed: SlurmBed) -> None:
    """A job that has to make room for another one ends the tunnel with that reason, and the next step."""
    events: list[Event] = []
    with DirectTunnel(bed.login1, "alice", **options(bed, events)) as tunnel:
        submit = 'sbatch --parsable -p urgent -N2 --exclusive -o /dev/null --wrap "sleep 600"'
        other = bed.run("login2", submit, "mallory").strip()
        with pytest.raises(JobEndedError, match="make room for one of a higher priority") as caught:
            tunnel.wait(30)
        assert caught.value.state == "PREEMPTED"
        assert "resubmit" in str(caught.value)
    assert [event.state for event in find(events, JobEnded)] == ["PREEMPTED"]
    assert not find(events, Reconnected)
    until(lambda: bed.queue() == [f"{other} RUNNING"], what="the other job has its place")


def test_job_that_fails_is_told_with_what_it_wrote(bed: SlurmBed) -> None:
    """A job that ends before its machine can be reached is an error with the job's own words."""
    events: list[Event] = []
    batch = Batch(time="20:00", extra=["--wrap=echo no such luck; exit 3"])  # in place of our script
    with pytest.raises(JobEndedError, match="the job failed") as caught:
        DirectTunnel(bed.login1, "alice", **options(bed, events, batch=batch)).open()
    assert caught.value.log == ("no such luck",)
    assert [event.state for event in find(events, JobEnded)] == ["FAILED"]
    until(lambda: not bed.files("login1"), what="nothing is left on login1")


def test_end_is_told_before_it_comes(bed: SlurmBed) -> None:
    """The time limit is told of 10 and 2 minutes before, as it is by then; so are a warning and the end."""
    events: list[Event] = []
    batch = Batch(time="20:00")
    with DirectTunnel(bed.login1, "alice", **options(bed, events, batch=batch)) as tunnel:
        job = tunnel.job
        assert job
        bed.run("ctl", f"scontrol update JobId={job.id} TimeLimit=30:00", "root")
        bed.run("login1", f"scancel --signal=USR1 --batch {job.id}")  # as Slurm does by itself, and admins do
        until(lambda: find(events, JobEnding), what="the warning is told")
        assert find(events, JobEnding) == [
            JobEnding(host=bed.login1, job=job.id, seconds=None, warned=True)
        ], "it is not the time limit's"
        assert tunnel.job
        assert tunnel.job.ends_at
        assert tunnel.job.ends_at - job.ends_at == 600, "the limit that was raised is known"
        bed.run("ctl", f"scontrol update JobId={job.id} TimeLimit=2", "root")
        bed.run("login1", f"scancel --signal=USR1 --batch {job.id}")
        until(lambda: len(find(events, JobEnding)) > 1, what="the warning of the limit is told")
        last = find(events, JobEnding)[1]
        assert last.warned
        assert 30 < last.seconds < 120
        assert tunnel.state == "ready"
        # Slurm looks every 30 s only.
        bed.run("ctl", f"scontrol update JobId={job.id} EndTime=now+1", "root")
        with pytest.raises(
            JobEndedError, match=r"reached its time limit .*TIMEOUT.*; give a longer time"
        ) as caught:
            tunnel.wait(60)
        assert caught.value.state == "TIMEOUT"
    assert not find(events, Reconnected)


def test_clock_that_is_off_here_is_no_matter(bed: SlurmBed, monkeypatch: pytest.MonkeyPatch) -> None:
    """The job's end is right by the clock of this machine, also where that is hours behind or ahead."""
    real = time.time
    for off in (-7200.0, 3600.0):
        events: list[Event] = []
        monkeypatch.setattr(time, "time", lambda off=off: real() + off)
        with DirectTunnel(bed.login1, "alice", **options(bed, events)) as tunnel:
            assert tunnel.job
            assert tunnel.job.ends_at
            assert abs(tunnel.job.ends_at - time.time() - 1200) < 60
            assert find(events, JobStarted)[0].ends_at == tunnel.job.ends_at
            bed.run("login1", f"scancel --signal=USR1 --batch {tunnel.job.id}")
            until(lambda events=events: find(events, JobEnding), what="the warning is told")  # type: ignore[misc]
            assert find(events, JobEnding)[0].seconds is None, "it is not the time limit's"


def test_killed_holder_leaves_nothing(bed: SlurmBed) -> None:
    """Where what holds a job is killed, the job is over; what is left is removed then, or by the next job.

    Slurm kills what could remove it too, a moment later.
    """
    more = {"batch": Batch(queue="one")}
    with DirectTunnel(bed.login1, "alice", **options(bed, [], **more)) as tunnel:
        assert tunnel.job
        place = f"/tmp/bokeh-ssh-job-22001-{tunnel.job.id}\n"
        assert bed.run("c1", "ls -d /tmp/bokeh-ssh-job-*", "root") == place, "the control: it is there"
        bed.run("c1", "kill -9 $(pgrep -o -u alice -f 'bokeh_ssh job')", "root")
        with pytest.raises(JobEndedError, match="the job failed"):
            tunnel.wait(20)
        killed = time.monotonic()
    assert f".bokeh-ssh-job-{tunnel.job.id}.log" not in bed.files("login1")
    until(lambda: time.monotonic() > killed + 10, what="no holder could be about to listen there")
    with DirectTunnel(bed.login1, "alice", **options(bed, [], **more)) as tunnel:
        assert tunnel.job
        place = f"/tmp/bokeh-ssh-job-22001-{tunnel.job.id}\n"
        assert bed.run("c1", "ls -d /tmp/bokeh-ssh-job-*", "root") == place


def test_job_that_misses_its_deadline_is_told(bed: SlurmBed) -> None:
    """A job that cannot be over by its ``--deadline`` is told as that, and not as one that was too long."""
    batch = Batch(time="20:00", extra=["--deadline=now+5"])
    with pytest.raises(JobEndedError, match="could not be over by its deadline") as caught:
        DirectTunnel(bed.login1, "alice", **options(bed, [], batch=batch)).open()
    assert caught.value.state == "DEADLINE"


def test_python_of_a_module_is_enough(bed: SlurmBed) -> None:
    """Where the only Python comes with the set-up, on login node and node, the job is submitted and held."""
    module = f"module() {{ PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH; }}"
    each = "for f in /usr/bin/python3* /usr/local/bin/python3*; do"
    bed.run("login1", f"mkdir -p lib; echo {shlex.quote(module)} >lib/modules.sh")
    for node in ("login1", "c1"):
        bed.run(node, f"{each} [ -e $f ] && mount --bind /bin/false $f; done", "root")
    try:
        more = {"python": None, "batch": Batch(queue="one")}
        with pytest.raises(BokehSSHError, match="there is no Python"):
            DirectTunnel(bed.login1, "alice", **options(bed, [], **more)).open()
        more["setup"] = [". lib/modules.sh", "module load python/3.12"]
        with DirectTunnel(bed.login1, "alice", **options(bed, [], **more)) as tunnel:
            tunnel.pull_session().close()
    finally:
        for node in ("login1", "c1"):
            bed.run(node, f"{each} umount $f; done", "root")
        bed.run("login1", "rm -r lib")


def test_new_job_takes_the_place_of_one_that_is_over(bed: SlurmBed) -> None:
    """With ``resubmit``, a job whose machine fails is followed by a new one at the same local address."""
    events: list[Event] = []
    batch = Batch(time="20:00")
    more = {"batch": batch, "resubmit": True, "queue_timeout": 300.0}
    with DirectTunnel(bed.login1, "alice", **options(bed, events, **more)) as tunnel:
        first, url = tunnel.job, tunnel.url
        assert first
        bed.script("kill", first.node)
        try:
            until(lambda: find(events, Reconnected), timeout=60, what="it is back")
            assert [event.state for event in find(events, JobEnded)] == ["NODE_FAIL"]
            assert not find(events, Reconnected)[0].same_server
            second = tunnel.job
            assert second
            assert second.id != first.id
            assert second.node != first.node
            assert f".bokeh-ssh-job-{first.id}.log" not in bed.files("login1"), "what a dead holder leaves"
            assert tunnel.url == url
            session = tunnel.pull_session()
            assert session.document.roots[0].text.split()[0] == second.id  # type: ignore[attr-defined]
            session.close()
            assert bed.queue() == [f"{second.id} RUNNING"]
        finally:
            bed.script("boot", first.node)
        # The control: one that somebody has cancelled is not what the person wants again.
        bed.run("login2", f"scancel {second.id}")
        with pytest.raises(JobEndedError, match="cancelled"):
            tunnel.wait(10)
    assert len(find(events, JobSubmitted)) == 2


def test_queue_timeout_cancels_a_job_that_waits(bed: SlurmBed) -> None:
    """A job that still waits after ``queue_timeout`` is cancelled, and that is the error, with its reason."""
    events: list[Event] = []
    tunnel = DirectTunnel(bed.login1, "alice", **options(bed, events, queue_timeout=3.0))
    with blocked(bed) as other:
        with pytest.raises(QueueTimeoutError, match="still waited after 3 s"):
            tunnel.open()
        assert bed.queue() == [f"{other} RUNNING"]


def test_server_that_is_killed_for_memory_is_told(bed: SlurmBed) -> None:
    """A server that wants more memory than its job has is told as that, with the limit."""
    if not bed.by_cgroup:
        pytest.skip("memory limits need control groups that can be written")
    bed.run(
        "login1", "cat >hungry.py <<'END'\nkept = bytearray(1 << 30)\nkept[::4096] = b'x' * (1 << 18)\nEND"
    )
    events: list[Event] = []
    batch = Batch(time="20:00", memory="300M")
    more = {"batch": batch, "app": ["dash.py", "hungry.py"]}
    with DirectTunnel(bed.login1, "alice", **options(bed, events, **more)) as tunnel:
        connection = http.client.HTTPConnection("localhost", tunnel.local_port, timeout=10)
        with contextlib.closing(connection), contextlib.suppress(OSError, http.client.HTTPException):
            connection.request("GET", "/hungry")
            connection.getresponse()
        with pytest.raises(ServerExitedError, match="more memory than the 300 MiB") as caught:
            tunnel.wait(20)
        assert caught.value.memory_limit == 300 << 20
        assert caught.value.exit_status == -signal.SIGKILL
    until(lambda: not bed.queue(), what="the job is gone")


def test_job_that_is_over_before_its_app_is_told(bed: SlurmBed) -> None:
    """What ends the job while the server starts, such as too little memory for it, is the error."""
    if not bed.by_cgroup:
        pytest.skip("memory limits need control groups that can be written")
    batch = Batch(time="20:00", memory="10M")
    with pytest.raises(JobEndedError, match="more memory than it has \\(10M\\)") as caught:
        DirectTunnel(bed.login1, "alice", **options(bed, [], batch=batch)).open()
    assert caught.value.state == "OUT_OF_MEMORY"
    assert not bed.queue()


@pytest.mark.parametrize("way", ["srun", "tcp", "back"])
def test_way_that_breaks_costs_no_server(bed: SlurmBed, way: str) -> None:
    """A way that ends amid an answer resets it, which nobody takes for the whole; then the server is back.

    In the end, none of its processes is left on either machine.
    """
    events: list[Event] = []
    size = 16 << 20
    bed.run("login1", f"head -c {size} /dev/zero >large.bin")
    command = f"{sys.executable} -m http.server --bind 127.0.0.1 {{port}}"
    more = {"app": None, "command": command, "batch": Batch(queue="one", way=way)}
    carries = r"ss -Htnp dst 10.77.0.11 | grep -o 'pid=[0-9]*' | cut -c 5- | sort -u"
    carries = "pgrep -u alice -x srun" if way == "srun" else carries

    def running(node: str) -> set[str]:
        return set(bed.run(node, "pgrep -u alice", "root").split())

    before = {node: running(node) for node in ("login1", "c1")}  # what others have left waits for its grace
    with DirectTunnel(bed.login1, "alice", **options(bed, events, **more)) as tunnel:
        assert tunnel.local_port

        def ask() -> http.client.HTTPResponse:
            connection = http.client.HTTPConnection("localhost", tunnel.local_port or 0, timeout=30)
            connection.request("GET", "/large.bin")
            return connection.getresponse()

        with contextlib.closing(ask()) as answer:
            assert len(answer.read(1 << 20)) == 1 << 20
            assert not bed.run("login1", f"kill -9 $({carries})", "root"), "the control: there is one to kill"
            with pytest.raises(ConnectionResetError):
                answer.read()
        until(lambda: find(events, Reconnected), timeout=30, what="it is back")
        assert find(events, Reconnected)[0].same_server
        with contextlib.closing(ask()) as answer:
            assert len(answer.read()) == size, "the control: nothing breaks it"
    assert [event.way for event in find(events, JobReached)] == [way]
    for node, others in before.items():
        until(lambda node=node, others=others: running(node) <= others, what=f"nothing runs on {node}")  # type: ignore[misc]
    bed.run("login1", "rm large.bin")


def login(bed: SlurmBed) -> list[str]:
    """Give the flags that log in."""
    return ["-i", str(bed.key_file), "--known-hosts", str(bed.known_hosts), "-F", "none"]


def look(bed: SlurmBed, host: str, *words: str) -> dict[str, tuple[str, str]]:
    """Run ``doctor --batch``; give verdict and text by check."""
    python = ["--python", sys.executable]
    with Program("doctor", f"alice@{host}", "--batch", *python, *login(bed), *words) as program:
        program.end(timeout=60)
    rows = [line.split("\t") for line in program.stdout.splitlines()]
    return {row[1]: (row[0], row[2]) for row in rows}


def test_doctor_looks_at_the_scheduler(bed: SlurmBed) -> None:
    """Version, way and queue are told, and whether the job would be taken; nothing is queued."""
    found = look(bed, bed.login1, "--time", "20:00")
    assert [found[name][0] for name in ("scheduler", "way", "queue", "job")] == ["good"] * 4
    assert "slurm" in found["scheduler"][1]
    assert "srun" in found["way"][1]
    assert "main takes jobs, for 1:00:00 at most" in found["queue"][1]
    assert "might start at" in found["job"][1]
    assert "forwarding" not in found, "the login node forbids it, and no job needs it"
    # What sbatch --test-only would accept, and Slurm never starts.
    assert "down is down" in look(bed, bed.login1, "--queue", "down")["queue"][1]
    wrong = look(bed, bed.login1, "--queue", "nosuch", "--gpus", "1")
    assert "there is no queue 'nosuch' (there are main, short, one" in wrong["queue"][1]
    assert wrong["job"][0] == "bad"
    assert not bed.queue()


def test_second_session_is_asked_for_first(bed: SlurmBed) -> None:
    """Where a login node takes no second session, no job is submitted, and doctor says so too."""
    events: list[Event] = []
    with pytest.raises(SessionError, match="a job needs two sessions") as caught:
        DirectTunnel(bed.login1, "alice", **options(bed, events, port=JUMP_PORT)).open()
    assert "MaxSessions" in str(caught.value)
    assert not find(events, JobSubmitted)
    verdict, text = look(bed, bed.login1, "-p", str(JUMP_PORT))["way"]
    assert verdict == "bad"
    assert "a job needs two sessions" in text


def test_detached_job_is_found_again(bed: SlurmBed) -> None:
    """A job that is left stays with its server, longer than ``grace``; another gets in by number or name.

    With a ``grace`` that is shorter than the way from the job's start to its first client.
    """
    events: list[Event] = []
    batch = Batch(time="20:00")
    more = {"batch": batch, "detach": True, "grace": 0.1}
    with DirectTunnel(bed.login1, "alice", **options(bed, events, **more)) as tunnel:
        job, server = tunnel.job, tunnel.server
        assert job
    assert find(events, Closed)[0].server == "left"
    assert not find(events, JobEnded)
    left = time.monotonic()
    # From another login node, with another key: as from another machine.
    with DirectTunnel(
        bed.login2, "alice", **options(bed, events, batch=None, app=None, job=job.id, server="*")
    ) as again:
        assert again.server == server
        assert again.job
        assert again.job.id == job.id
        session = again.pull_session()
        assert session.document.roots[0].text.split()[0] == job.id  # type: ignore[attr-defined]
        session.close()
        until(lambda: time.monotonic() - left > 3, what="more than the grace time")
        # A second app in the same job; its end is not the job's.
        with DirectTunnel(bed.login1, "alice", **options(bed, events, batch=None, job="dash")) as second:
            assert second.job
            assert second.job.id == job.id
            assert second.server not in (None, server)
        assert bed.queue() == [f"{job.id} RUNNING"]
        assert again.state == "ready"
    assert bed.queue() == [f"{job.id} RUNNING"], "the one who came back does not end it either"
    other = bed.run("login1", 'sbatch --parsable --mem 100M -o /dev/null --wrap "sleep 600"').strip()
    flags = ["--python", sys.executable, *login(bed)]
    with Program("ls", f"alice@{bed.login2}", *flags) as program:
        assert program.end() == 0, program
    row = program.stdout.rstrip("\n").split("\t")
    assert row[:5] == ["job", job.id, "dash", "RUNNING", job.node], "those alone that were started with batch"
    assert row[5].startswith("19:")
    for name, said in ((other, f"there are: job {job.id} dash"), ("das", "no server or job named 'das'")):
        with Program("stop", f"alice@{bed.login2}", name, *flags) as program:
            assert program.end() == 1, "it is not one of those"
        assert said in program.stderr
    with Program("stop", f"alice@{bed.login2}", "dash", *flags) as program:
        assert program.end() == 0, program
    assert f"Cancelled job {job.id} (dash)" in program.stderr
    until(lambda: bed.queue() == [f"{other} RUNNING"], what="the job is gone")


def test_first_of_two_tunnels_does_not_end_the_others_job(bed: SlurmBed) -> None:
    """Whoever has submitted a job leaves it to another tunnel that uses it; it ends ``grace`` after that."""
    events: list[Event] = []
    first = DirectTunnel(bed.login1, "alice", **options(bed, events, grace=3.0))
    with first:
        assert first.job
        with DirectTunnel(
            bed.login1, "alice", **options(bed, events, batch=None, job=first.job.id)
        ) as second:
            first.close()
            assert find(events, Warned)
            assert "another tunnel" in find(events, Warned)[-1].text
            assert bed.queue() == [f"{first.job.id} RUNNING"]
            second.pull_session().close()
    until(lambda: not bed.queue(), timeout=25, what="the job is gone")


def test_job_that_cannot_be_entered_is_told(bed: SlurmBed) -> None:
    """One that never was, another user's, an array, one of several parts, and one that is over."""

    def refusal(job: str) -> str:
        with pytest.raises(BokehSSHError) as caught:
            DirectTunnel(bed.login1, "alice", **options(bed, [], batch=None, job=job)).open()
        return str(caught.value)

    submit = "sbatch --parsable -t 10 --mem 100M -o /dev/null"
    other = bed.run("login1", f'{submit} --wrap "sleep 600"', "mallory").strip()
    array = bed.run("login1", f'{submit} --array=1-2 --wrap "sleep 600"').strip()
    own = bed.run("login1", f'{submit} --wrap "sleep 600"').strip()
    parts = int(bed.run("login1", f'{submit} -n1 : -n1 --mem 100M --wrap "sleep 600"'))
    assert "there is no job 99999" in refusal("99999")
    assert "there is no job named 'wrap' that was started with batch (there are: none)" in refusal("wrap")
    assert f"job {other} is another user's" in refusal(other)
    until(lambda: len(bed.queue()) == 6, what="all of them run")
    assert re.search(f"job {array} is an array of 2 jobs; .* name a job of it .*squeue", refusal(array))
    assert "there is no job 0" in refusal("0")
    for name in (f"{array}_1", f"{array}_[1-2]"):
        assert f"job {name} is of an array; once it runs" in refusal(name)
    assert f"job {other} is another user's" in refusal(f"{other}.batch"), "the job of a step is entered"
    for part in (str(parts), str(parts + 1), f"{parts}+1"):
        assert f"job {part} is of several parts (a heterogeneous job)" in refusal(part)
    bed.run("login1", f"scancel {own}")
    until(lambda: f"{own} RUNNING" not in bed.queue(), what="it is over")
    assert "the job was cancelled" in refusal(own)


def steps(bed: SlurmBed, job: str) -> list[str]:
    """List the steps of a job that somebody has started in it."""
    listed = bed.run("login2", f"squeue -h -s -j {job} -o %i").split()
    return [step for step in listed if step.rpartition(".")[2].isdigit()]


def test_own_job_is_entered_and_left_alone(bed: SlurmBed) -> None:
    """A job of the user's own, which still waits, gets the app as steps beside its script, and goes on."""
    events: list[Event] = []
    # What is set for people's own srun garbles none of ours.
    bed.run("login1", "echo 'export SLURM_LABELIO=1 SLURM_STDINMODE=none' >.bashrc")
    with blocked(bed) as other:
        submit = "sbatch --parsable -t 10 --mem 600M -o /dev/null --signal=USR2@60"
        job = bed.run("login1", f'{submit} --wrap "srun --overlap sleep 600"').strip()
        entering = {"batch": None, "job": job, "launch_timeout": 30.0}
        tunnel = DirectTunnel(bed.login1, "alice", **options(bed, events, **entering))
        with opening(tunnel) as raised:
            until(lambda: tunnel.state == "queued", what="it is waited for")
            bed.run("ctl", f"scancel {other}", "root")
            until(lambda: tunnel.state == "ready" or raised, what="it opens")
            assert not raised
            session = tunnel.pull_session()
            assert session.document.roots[0].text.split()[0] == job  # type: ignore[attr-defined]
            session.close()
            # A second client takes the first one's holder, and leaves it to it.
            with DirectTunnel(bed.login2, "alice", **options(bed, events, **entering)) as second:
                assert second.server != tunnel.server
            assert tunnel.state == "ready"
            # A signal that the user has Slurm send to all steps is a warning.
            for step in set(steps(bed, job)) - {f"{job}.0"}:
                bed.run("login1", f"scancel --signal=USR2 {step}")
            until(lambda: find(events, JobEnding), what="it is told")
            node = tunnel.job.node if tunnel.job else ""
            bed.run("login1", "rm .bashrc")
        until(lambda: len(steps(bed, job)) == 1, what="the job's own step is left")
        assert bed.queue() == [f"{job} RUNNING"]
        assert not bed.files(node)
    assert not find(events, JobEnded)


def test_allocation_of_several_nodes_is_entered(bed: SlurmBed) -> None:
    """A job that salloc has made on a login node runs the app on its first node, and goes on."""
    events: list[Event] = []
    bed.run("login2", "salloc -Q --no-shell -N2 -t 10 --mem 300M")
    job = bed.queue()[0].split()[0]
    with DirectTunnel(bed.login1, "alice", **options(bed, events, batch=None, job=job)) as tunnel:
        session = tunnel.pull_session()
        assert session.document.roots[0].text.split() == [job, "c1"]  # type: ignore[attr-defined]
        session.close()
    assert [event.node for event in find(events, JobStarted)] == ["c1"]
    until(lambda: not steps(bed, job), what="no step is left")
    assert bed.queue() == [f"{job} RUNNING"]


def test_suspended_job_is_waited_for(bed: SlurmBed) -> None:
    """A job that Slurm has stopped for a while is said to be suspended, and is entered when it goes on."""
    events: list[Event] = []
    job = bed.run("login1", 'sbatch --parsable -t 10 -o /dev/null --wrap "sleep 600"').strip()
    until(lambda: bed.queue() == [f"{job} RUNNING"], what="it runs")
    bed.run("ctl", f"scontrol suspend {job}", "root")
    tunnel = DirectTunnel(bed.login1, "alice", **options(bed, events, batch=None, job=job))
    with opening(tunnel) as raised:
        until(lambda: find(events, JobWaiting) or raised, what="it is told")
        assert (find(events, JobWaiting)[0].reason, find(events, JobWaiting)[0].stays) == ("suspended", True)
        assert tunnel.state == "queued"
        assert tunnel.job
        assert tunnel.job.state is JobState.SUSPENDED
        bed.run("ctl", f"scontrol resume {job}", "root")
        until(lambda: tunnel.state == "ready" or raised, what="it opens")
        assert not raised
    assert bed.queue() == [f"{job} RUNNING"]


#: An SSH server that asks PAM.
PAM_PORT = 2223
PAM_SSHD = f"-p {PAM_PORT} -o UsePAM=yes -o PidFile=/run/pam-sshd.pid"
CLIENT = """
import sys
from bokeh_ssh import Batch, DirectTunnel
tunnel = DirectTunnel("{host}", "alice", app="dash.py", python=sys.executable, batch={batch},
    key_filename="{key}", known_hosts="{known}", ssh_config=None, isolate={isolate}, local_port=0,
    grace={grace}, on_event=lambda event: print(type(event).__name__, flush=True))
with tunnel:
    tunnel.wait()
"""


@contextlib.contextmanager
def client(
    bed: SlurmBed, grace: float, isolate: bool = False, batch: str = '"slurm"'
) -> Iterator[subprocess.Popen[str]]:
    """Open a tunnel in a program of its own, which says the names of events."""
    code = CLIENT.format(
        host=bed.login1, key=bed.key_file, known=bed.known_hosts, grace=grace, isolate=isolate, batch=batch
    )
    program = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        yield program
    finally:
        program.kill()
        program.wait()
        assert program.stdout
        program.stdout.close()


def read_until(program: subprocess.Popen[str], word: str) -> None:
    """Read what it says until it says that."""
    assert program.stdout
    for line in program.stdout:
        if line.strip() == word:
            return
    pytest.fail(f"it ended before it said {word}")


@pytest.mark.parametrize("waits", [True, False], ids=["waits", "runs"])
def test_killed_client_leaves_no_job(bed: SlurmBed, waits: bool) -> None:
    """A client that is killed leaves its job for ``grace`` seconds, whether it waits or runs, and no more."""
    with contextlib.ExitStack() as stack:
        others = [f"{stack.enter_context(blocked(bed))} RUNNING"] if waits else []
        program = stack.enter_context(client(bed, grace=4))
        read_until(program, "JobWaiting" if waits else "Ready")
        program.kill()
        killed = time.monotonic()
        assert len(bed.queue()) == len(others) + 1, "the control: it is not the client's end that ends it"
        until(lambda: bed.queue() == others, timeout=25, what="the job is gone")
        assert time.monotonic() - killed > 3
    for node in ("c1", "c2"):
        until(lambda node=node: not bed.files(node), what=f"nothing is left on {node}")  # type: ignore[misc]


def test_waiting_job_that_has_lost_its_login_node_too_is_cancelled(
    bed: SlurmBed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nobody is left to cancel a job, whoever looks at the account's jobs later does, from any node."""
    monkeypatch.setattr(bokeh_ssh._jobs.warden, "_RENEWAL", 0.5)
    keys = {"key_filename": bed.key_file, "known_hosts": bed.known_hosts, "ssh_config": None}
    with blocked(bed) as other, client(bed, grace=600) as program:
        read_until(program, "JobWaiting")
        program.kill()
        bed.script("kill", "login1")
        assert bed.script("boot", "login1").returncode == 0
        job = next(each.split()[0] for each in bed.queue() if each.endswith("PENDING"))
        with connect(Host(bed.login2, "alice", jump=(), **keys)) as connection:
            for until_then, goes in ((time.time() + 60, False), (time.time() - 60, True)):
                comment = f"Comment=bokeh-ssh:f00t{until_then:.0f}"  # as its warden has renewed it
                bed.run("login2", f"scontrol update JobId={job} {comment}")
                with contextlib.closing(JobList(connection, sys.executable)) as jobs:
                    assert [each.id for each in jobs.jobs()] == [job]
                    if goes:
                        until(lambda: bed.queue() == [f"{other} RUNNING"], what="the job is gone")
                assert len(bed.queue()) == (1 if goes else 2)


def test_ctrl_c_cancels_a_waiting_job(bed: SlurmBed) -> None:
    """Ctrl-C while the job waits cancels it at once."""
    with blocked(bed) as other, client(bed, grace=600) as program:
        read_until(program, "JobWaiting")
        program.send_signal(signal.SIGINT)
        program.wait(15)
        assert bed.queue() == [f"{other} RUNNING"]


@pytest.fixture
def either(bed: SlurmBed, monkeypatch: pytest.MonkeyPatch) -> str:
    """A name of both login nodes, the first one first."""
    real = socket.getaddrinfo

    def getaddrinfo(host: str, port: int, *args: Any, **keywords: Any) -> list[Any]:
        if host != "login":
            return real(host, port, *args, **keywords)
        ends = ((bed.login1, port), (bed.login2, port))
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", end) for end in ends]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    key = bed.known_hosts.read_text().split(None, 1)[1].splitlines()[0]
    with bed.known_hosts.open("a") as file:
        file.write(f"login {key}\n")
    return "login"


def test_lost_login_node_costs_no_server(
    bed: SlurmBed, either: str, open_page: Callable[[], browser.Page]
) -> None:
    """Where the login node goes away, the tunnel comes back through another one, to the same server: an open
    page in Chromium goes on in its session, without a reload."""
    bed.run("login1", f"cat >page.py <<'END'\n{browser.APP}END")
    events: list[Event] = []
    with DirectTunnel(either, "alice", **options(bed, events, app="page.py")) as tunnel:
        job = tunnel.job
        assert job
        page = open_page().open(tunnel.url)
        page.move()
        bed.script("kill", "login1")
        try:
            until(lambda: find(events, Reconnected), timeout=60, what="it is back")
        finally:
            assert bed.script("boot", "login1").returncode == 0
        assert find(events, Reconnected)[0].same_server
        page.wait_until_back()
        page.move()  # its count goes on
        assert tunnel.job == job
        assert bed.queue() == [f"{job.id} RUNNING"]
    until(lambda: not bed.queue(), what="the job is gone")


def test_lost_login_node_costs_no_waiting_job(bed: SlurmBed, either: str) -> None:
    """Where the login node goes away while the job waits, it is waited for through another one."""
    events: list[Event] = []
    tunnel = DirectTunnel(either, "alice", **options(bed, events))
    with blocked(bed) as other, opening(tunnel) as raised:
        until(lambda: find(events, JobWaiting), what="it waits")
        bed.script("kill", "login1")
        try:
            bed.run("ctl", f"scancel {other}", "root")
            until(lambda: tunnel.state == "ready" or raised, timeout=60, what="it opens")
        finally:
            assert bed.script("boot", "login1").returncode == 0
        assert not raised
        assert any("waits on" in event.text for event in find(events, Warned))
        assert len(find(events, JobSubmitted)) == 1
        assert bed.queue() == [f"{find(events, JobSubmitted)[0].job} RUNNING"]
    until(lambda: not bed.queue(), what="the job is gone")


def test_login_node_that_runs_nothing_is_passed_over(bed: SlurmBed, either: str) -> None:
    """Where a login node takes the login and runs nothing, as with /etc/nologin, the job goes to another."""
    events: list[Event] = []
    for node in ("login1", "login2"):
        bed.run(node, "mount --bind /usr/sbin/nologin /bin/bash", "root")
    try:
        said = "This account is currently not available"
        with pytest.raises(SessionError, match=said):
            DirectTunnel(either, "alice", **options(bed, events)).open()
        assert len(find(events, Connecting)) == 2, "the control: none of them runs anything"
        bed.run("login2", "umount /bin/bash", "root")
        with DirectTunnel(either, "alice", **options(bed, events)):
            assert len(find(events, JobSubmitted)) == 1
        assert said in find(events, Warned)[-1].text
    finally:
        for node in ("login1", "login2"):
            bed.run(node, "umount /bin/bash", "root")


def test_login_node_that_lets_nobody_in_is_passed_over(bed: SlurmBed, either: str) -> None:
    """Where PAM ends the login, as with /etc/nologin, the next machine of that name is logged in to."""
    key = bed.known_hosts.read_text().split(None, 1)[1].splitlines()[0]
    with bed.known_hosts.open("a") as file:
        file.write(f"[login]:{PAM_PORT} {key}\n")
    host = Host(either, "alice", port=PAM_PORT, jump=(), key_filename=bed.key_file, ssh_config=None)
    host = dataclasses.replace(host, known_hosts=bed.known_hosts, look_for_keys=False, allow_agent=False)
    for node in ("login1", "login2"):
        bed.run(node, f"/usr/sbin/sshd -f {bed.base}/etc/sshd_config {PAM_SSHD}", "root")
    try:
        bed.run("login1", "echo Maintenance until 18:00 >/run/nologin", "root")
        events: list[Event] = []
        with contextlib.closing(connect(host, on_event=events.append)) as connection:
            assert connection.address == bed.login2
        assert re.search("said: Maintenance until 18:00; another machine", find(events, Warned)[0].text)
        bed.run("login2", "echo Maintenance here too >/run/nologin", "root")
        with pytest.raises(AuthenticationError, match="Maintenance here too; it may let nobody in") as caught:
            connect(host)
        assert caught.value.ended_by == bed.login2
    finally:
        for node in ("login1", "login2"):
            bed.run(node, "rm -f /run/nologin; kill $(cat /run/pam-sshd.pid)", "root")


def test_silent_scheduler_ends_nothing(bed: SlurmBed) -> None:
    """While the scheduler does not answer, a job that waits counts as waiting, and opens when it is back."""
    events: list[Event] = []
    tunnel = DirectTunnel(bed.login1, "alice", **options(bed, events))
    with blocked(bed) as other, opening(tunnel) as raised:
        until(lambda: find(events, JobWaiting), what="it waits")
        bed.run("ctl", "kill $(cat /run/slurmctld.pid); sleep 1", "root")
        until(lambda: find(events, Warned), timeout=60, what="told that it does not answer")
        assert tunnel.state == "queued"
        bed.run("ctl", "/usr/sbin/slurmctld", "root")
        until(lambda: f"{other} RUNNING" in bed.queue(), timeout=60, what="the controller is back")
        bed.run("ctl", f"scancel {other}", "root")
        until(lambda: tunnel.state == "ready", timeout=60, what="it opens")
        assert not raised
        # The app does without it.
        bed.run("ctl", "kill $(cat /run/slurmctld.pid); sleep 1", "root")
        tunnel.pull_session().close()
        bed.run("ctl", "/usr/sbin/slurmctld", "root")
        until(bed.queue, what="the controller is back")
        assert tunnel.state == "ready"


def test_node_without_sshd_is_told(bed: SlurmBed) -> None:
    """A job whose machine has no program that its way needs is cancelled, with that reason."""
    bed.run("c1", "mount --bind /dev/null /usr/sbin/sshd", "root")
    try:
        with pytest.raises(LaunchError, match="c1 cannot be used: there is no sshd on it"):
            DirectTunnel(bed.login1, "alice", **options(bed, [], batch=Batch(queue="one"))).open()
    finally:
        bed.run("c1", "umount /usr/sbin/sshd", "root")
    until(lambda: not bed.queue(), what="the job is gone")


def test_node_that_opens_no_session_is_told(bed: SlurmBed) -> None:
    """A job whose machine lets nobody in for now (/etc/nologin) is cancelled, and its words are told."""
    nobody = "mkdir /run/etc; cp -a /etc/. /run/etc; mount --bind /run/etc /etc"
    bed.run("c1", f"{nobody}; echo Serviced until 18:00 >/etc/nologin", "root")
    try:
        with pytest.raises(SessionError, match="Serviced until 18:00") as caught:
            DirectTunnel(bed.login1, "alice", **options(bed, [], batch=Batch(queue="one"))).open()
        assert caught.value.host == "c1"
    finally:
        bed.run("c1", "umount /etc; rm -r /run/etc", "root")
    until(lambda: not bed.queue(), what="the job is gone")


def test_nodes_need_no_shared_home(bed: SlurmBed) -> None:
    """On Slurm, what is uploaded runs on a node whose home is its own, and nothing is left in either home."""
    own = "mount -t tmpfs none /home; mkdir /home/alice; chown alice: /home/alice"
    bed.run("c1", own, "root")
    try:
        more = {"app": str(bed.base / "own/dash.py"), "upload": True, "batch": Batch(queue="one")}
        (bed.base / "own").mkdir()
        (bed.base / "own/dash.py").write_text(APP)
        with DirectTunnel(bed.login1, "alice", **options(bed, [], **more)) as tunnel:
            session = tunnel.pull_session()
            assert session.document.roots[0].text.split()[1] == "c1"  # type: ignore[attr-defined]
            session.close()
        for each in ("c1", "login1"):
            until(lambda each=each: not bed.files(each), what=f"nothing is left on {each}")  # type: ignore[misc]
    finally:
        bed.run("c1", "umount /home", "root")


def test_home_that_cannot_be_written_costs_no_job(bed: SlurmBed) -> None:
    """Where the home takes no file, the app opens all the same, with a warning; a node's home is an error."""
    events: list[Event] = []
    bed.run("login1", "chmod 555 /home/alice", "root")
    try:
        with DirectTunnel(bed.login1, "alice", **options(bed, events)):
            assert "nothing can be written to the home" in find(events, Warned)[0].text
    finally:
        bed.run("login1", "chmod 750 /home/alice", "root")
    bed.run("c1", "mount -t tmpfs none /home; mkdir /home/alice", "root")  # not alice's
    try:
        with pytest.raises(JobEndedError, match="whether its machine can write to the home"):
            DirectTunnel(bed.login1, "alice", **options(bed, events, batch=Batch(queue="one"))).open()
    finally:
        bed.run("c1", "umount /home", "root")


@pytest.mark.parametrize(
    ("keywords", "said"),
    [
        ({"batch": "condor"}, "scheduler='condor' is not known"),
        ({"batch": 5}, "batch=5 is not a text"),
        ({"batch": "auto", "launch": False, "app": None}, "but launch was given"),
        ({"batch": "auto", "job": "7"}, "but job was given"),
        ({"job": "7\n3"}, "not the number or the name of a job"),
        ({"job": "7", "resubmit": True}, "resubmit is for a batch job"),
        ({"queue_timeout": 5.0}, "queue_timeout is for a batch job"),
        ({"resubmit": True}, "resubmit is for a batch job"),
        ({"batch": "auto", "queue_timeout": 0}, "no time to wait"),
    ],
)
def test_batch_that_cannot_work_is_refused(keywords: dict[str, Any], said: str) -> None:
    """What does not go with a job is a UsageError before anything is dialled."""
    with pytest.raises(UsageError, match=re.escape(said)):
        DirectTunnel("nowhere.invalid", **{"app": "dash.py", **keywords})


# Grid Engine, on the same machines.


@pytest.fixture(scope="module")
def grid(whole: SlurmBed) -> SlurmBed:
    """Start Grid Engine beside Slurm."""
    whole.start_grid_engine()
    return whole


def grid_jobs(bed: SlurmBed) -> list[str]:
    """List the numbers of Grid Engine's jobs."""
    return re.findall(r"^ *(\d+)", bed.run("login2", "qstat -u '*'"), re.M)


def check_port(bed: SlurmBed, job: str, node: str) -> None:
    """Check that nobody who does not know the job's word gets an answer from its port."""
    record = json.loads(bed.run("login1", f"cat .bokeh-ssh-job-{job}/record"))
    code = "import socket, sys; s = socket.create_connection((sys.argv[1], int(sys.argv[2])), 5)\n"
    code += "s.sendall(sys.argv[3].encode() + b'\\n'); s.settimeout(5); print(s.recv(100))"
    ask = f"{sys.executable} -c {shlex.quote(code)} {node} {record['port']}"
    assert "SSH-2.0" in bed.run("login1", f"{ask} {record['word']}"), "the control: the owner gets one"
    assert bed.run("login1", f"{ask} {'0' * 32}", "mallory") == "b''\n"
    assert "Permission denied" in bed.run("login1", f"ls ~alice/.bokeh-ssh-job-{job}", "mallory")
    assert record["word"] not in bed.run("login1", f"qstat -j {job}; ps axe")


@pytest.mark.parametrize("way", ["tcp", "back"])
def test_app_opens_on_grid_engine(bed: SlurmBed, grid: SlurmBed, way: str) -> None:
    """Without srun, the login node connects to the node, or the node back where that is refused."""
    events: list[Event] = []
    refuse = "iptables -{} INPUT -s 10.77.0.1 -p tcp --syn -j REJECT --reject-with tcp-reset"
    app = APP.replace("SLURM_JOB_ID", "JOB_ID")
    bed.run("login1", f"cat >grid.py <<'END'\n{app}END")
    if way == "back":
        bed.run("c1", refuse.format("A"), "root")
    try:
        batch = Batch(scheduler="sge", time="0:20:00", name="my dash")
        with DirectTunnel(bed.login1, "alice", **options(bed, events, batch=batch, app="grid.py")) as tunnel:
            job = tunnel.job
            assert job
            assert (job.state, job.node) == (JobState.RUNNING, "c1")
            assert job.ends_at
            assert abs(job.ends_at - time.time() - 1200) < 60
            assert [event.way for event in find(events, JobReached)] == [way]
            session = tunnel.pull_session()
            assert session.document.roots[0].text.split() == [job.id, "c1"]  # type: ignore[attr-defined]
            session.close()
            if way == "tcp":
                check_port(bed, job.id, "c1")
            assert grid_jobs(bed) == [job.id]
    finally:
        if way == "back":
            bed.run("c1", refuse.format("D"), "root")
    until(lambda: not grid_jobs(bed), what="the job is gone")
    for each in ("c1", "login1"):
        until(lambda each=each: not bed.files(each), what=f"nothing is left on {each}")  # type: ignore[misc]


@pytest.mark.parametrize(
    ("batch", "said"),
    [
        (Batch(scheduler="sge", queue="nosuch"), 'unknown queue "nosuch"'),
        (Batch(scheduler="sge", extra=["-l arch=none"]), "no suitable queues"),
    ],
    ids=["queue", "never"],
)
def test_refused_job_is_told_in_grid_engines_words(
    bed: SlurmBed, grid: SlurmBed, batch: Batch, said: str
) -> None:
    """What qsub refuses is told in its own words; a request that no machine meets is refused too."""
    with pytest.raises(SubmitError, match=re.escape(said)):
        DirectTunnel(bed.login1, "alice", **options(bed, [], batch=batch)).open()
    assert not grid_jobs(bed)


def test_waiting_job_of_a_killed_client_goes_on_grid_engine(bed: SlurmBed, grid: SlurmBed) -> None:
    """A client that is killed while its job waits leaves it for ``grace`` seconds, and no more."""
    batch = 'Batch(scheduler="sge", extra=["-h"])'
    with client(bed, grace=3, batch=batch) as program:
        read_until(program, "JobWaiting")
        program.kill()
        assert grid_jobs(bed), "the control: it is not the client's end that ends it"
        until(lambda: not grid_jobs(bed), timeout=25, what="the job is gone")


def test_left_job_is_listed_and_stopped_on_grid_engine(bed: SlurmBed, grid: SlurmBed) -> None:
    """A detached job is found again by its number, listed, and stopped; its tunnel hears of that."""
    events: list[Event] = []
    bed.run("login2", "mount --bind /dev/null /usr/bin/sbatch", "root")  # a machine without Slurm
    try:
        more = {"batch": Batch(time="0:20:00"), "detach": True}
        with DirectTunnel(bed.login2, "alice", **options(bed, events, **more)) as tunnel:
            job = tunnel.job
            assert job
        flags = ["--python", sys.executable, *login(bed)]
        entered = {"batch": None, "app": None, "job": job.id, "server": "*"}
        with DirectTunnel(bed.login2, "alice", **options(bed, events, **entered)) as again:
            assert again.server == tunnel.server
            with Program("ls", f"alice@{bed.login2}", *flags) as program:
                assert program.end() == 0, program
            assert program.stdout.split("\t")[:5] == ["job", job.id, "dash", "RUNNING", "c1"]
            looked = look(bed, bed.login2, "--queue", "nosuch")
            assert looked["scheduler"] == ("good", "SGE 8.1.9; its master answers")
            assert "there is no queue 'nosuch' (there are main.q)" in looked["queue"][1]
            assert 'unknown queue "nosuch"' in looked["job"][1]
            with Program("stop", f"alice@{bed.login2}", job.id, *flags) as program:
                assert program.end() == 0, program
            with pytest.raises(JobEndedError, match="the job was cancelled"):
                again.wait(20)
    finally:
        bed.run("login2", "umount /usr/bin/sbatch", "root")
