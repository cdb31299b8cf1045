"""What runs on a cluster for a batch job, on this machine: the warden with a stand-in for a scheduler."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from beds import until
from bokeh_ssh._jobs import scheduler, slurm
from bokeh_ssh._server.payload import payload
from local_runner import pythons

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the other machine is POSIX")

#: Says a job's state and comment as ``squeue`` does, from a file, which is there as long as the job is.
QUEUE = """#!/bin/sh
case $0 in
    *squeue) cat {queue} 2>/dev/null; [ ! -e {queue}.down ] ;;
    *sbatch) cat >{queue}.script; echo "PENDING bokeh-ssh:f00" >{queue}; echo 17 ;;
    *scontrol) echo "PENDING ${{3#Comment=}}" >{queue} ;;
    *scancel) [ ! -e {queue}.down ] && rm {queue} ;;
esac
"""


class Running:
    """A warden that runs here.

    :ivar shared: the folder where the account's wardens share their answers
    """

    def __init__(
        self,
        folder: Path,
        python: str,
        grace: float,
        silence: float = 60,
        renewal: float = 60,
        again: float = 15.0,
    ) -> None:
        self.shared = folder / "shared"
        self.queue = folder / "queue"
        for name in ("squeue", "sbatch", "scontrol", "scancel"):
            (folder / name).write_text(QUEUE.format(queue=self.queue))
            (folder / name).chmod(0o755)
        program = folder / "warden.py"
        program.write_bytes(payload("warden").replace(b"_AGAIN = 15.0", b"_AGAIN = %r" % again))
        self.process = subprocess.Popen(
            [python, str(program)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={"PATH": f"{folder}:/usr/bin:/bin", "BOKEH_SSH_DIR": str(self.shared)},
        )
        programs = ["nosuchprogram", "sbatch"]
        self.say(mark="M", grace=grace, programs=programs, silence=silence, renewal=renewal)

    def say(self, **order: Any) -> None:
        assert self.process.stdin
        self.process.stdin.write(json.dumps(order).encode() + b"\n")
        self.process.stdin.flush()

    def hear(self) -> dict[str, Any]:
        assert self.process.stdout
        line = self.process.stdout.readline()
        assert line.startswith(b"M{")
        message: dict[str, Any] = json.loads(line[1:])
        return message

    def ask(self, job: str, fresh: float = 60) -> tuple[int, str]:
        """Ask for a job; the words say of which ones the scheduler was asked."""
        words = ["sh", "-c", 'squeue; echo "$1"', "sh", "{jobs}"]
        self.say(do="ask", id=2, job=job, argv=words, fresh=fresh, timeout=30, waits=True)
        answer = self.hear()
        assert answer["age"] >= 0
        return answer["status"], answer["out"]

    def submit(self) -> None:
        assert self.hear()["programs"] == ["sbatch"]
        self.say(do="run", id=1, argv=["sbatch"], input="the script", guard=scheduler.guard(slurm, "f00"))
        answer = self.hear()
        assert (answer["event"], answer["status"], answer["out"]) == ("ran", 0, "17\n")
        assert Path(f"{self.queue}.script").read_text() == "the script"

    def vanish(self) -> None:
        """End the client without a word."""
        for stream in (self.process.stdin, self.process.stdout):
            assert stream
            stream.close()
        self.process.wait(10)


@pytest.fixture(params=["this", "3.8"])
def python(request: pytest.FixtureRequest) -> str:
    """Offer this Python, and the oldest that the other machine may have."""
    if request.param == "this":
        return sys.executable
    found = pythons(request.param)
    if not found:
        pytest.skip(f"there is no Python {request.param} here")
    return str(found[0])


@pytest.fixture
def warden(tmp_path: Path, python: str) -> Iterator[Running]:
    """Start a warden whose client may be away for half a second."""
    running = Running(tmp_path, python, 0.5)
    yield running
    running.process.kill()
    running.vanish()


@pytest.mark.parametrize("name", ["job_holder", "job_stream", "warden"])
def test_what_is_sent_runs_on_the_oldest_python(name: str, python: str) -> None:
    """Each program loads its parts, and finds no input."""
    words = [python, "-S", "-c", "import sys; exec(sys.stdin.buffer.read())"]
    done = subprocess.run(words, input=payload(name), capture_output=True, cwd="/", check=False)
    assert done.returncode
    assert b"SyntaxError" not in done.stderr
    assert b"ImportError" not in done.stderr


def test_waiting_job_is_cancelled_when_its_client_is_gone(warden: Running) -> None:
    """A job that waits goes, some time after its client has."""
    warden.submit()
    assert warden.queue.exists(), "the control: it is there as long as the client is"
    warden.vanish()
    until(lambda: not warden.queue.exists(), what="it is cancelled")


@pytest.mark.parametrize("said", ["RUNNING bokeh-ssh:f00", "PENDING bokeh-ssh:another"])
def test_job_of_others_is_left_alone(warden: Running, said: str, tmp_path: Path) -> None:
    """A job that runs ends by itself, and one that another warden has taken over is that one's."""
    warden.submit()
    warden.queue.write_text(said + "\n")
    (tmp_path / "squeue").write_text(f"#!/bin/sh\ncat {warden.queue}\ntouch {warden.queue}.asked\n")
    warden.vanish()
    until(lambda: Path(f"{warden.queue}.asked").exists(), what="it has looked")
    assert warden.queue.exists()


def test_nobody_stays_for_a_job_that_runs(tmp_path: Path, python: str) -> None:
    """A job that runs ends by itself: the warden of a client that is gone does not wait for ``grace``."""
    warden = Running(tmp_path, python, 600, again=0.2)
    stays = ["pgrep", "-f", str(tmp_path / "warden.py")]
    try:
        warden.submit()
        warden.queue.write_text("RUNNING bokeh-ssh:f00\n")
        assert not subprocess.run(stays, stdout=subprocess.DEVNULL, check=False).returncode, "the control"
        warden.vanish()
        until(
            lambda: subprocess.run(stays, stdout=subprocess.DEVNULL, check=False).returncode, what="it ends"
        )
    finally:
        warden.process.kill()
        subprocess.run(["pkill", *stays[1:]], check=False)


def test_waiting_job_is_cancelled_when_its_client_is_silent(tmp_path: Path, python: str) -> None:
    """A client that asks no more has vanished, also where the login node still takes it for connected."""
    warden = Running(tmp_path, python, 0.1, silence=1.0)
    try:
        warden.submit()
        until(lambda: not warden.queue.exists(), what="its job is cancelled")
        warden.say(do="run", id=2, argv=["true"])
        assert warden.hear()["id"] == 2, "one that was asleep is answered"
    finally:
        warden.process.kill()
        warden.vanish()


def test_waiting_job_is_renewed(tmp_path: Path, python: str) -> None:
    """The job's comment says until when it has a warden: for longer than clocks may differ."""
    warden = Running(tmp_path, python, 0.5, renewal=0.0)
    try:
        warden.submit()
        warden.ask("17")
        until(lambda: "t" in warden.queue.read_text(), what="it is renewed")
        found = re.fullmatch(r"PENDING bokeh-ssh:f00t(\d+)\n", warden.queue.read_text())
        assert found
        assert 500 < int(found[1]) - time.time() < 700
        warden.vanish()
        until(lambda: not warden.queue.exists(), what="it is still its own to cancel")
    finally:
        warden.process.kill()


@pytest.mark.parametrize("client", ["stays", "leaves"])
def test_waiting_job_that_nobody_renews_is_cancelled(tmp_path: Path, python: str, client: str) -> None:
    """A job whose warden was killed goes after another one has looked, whether that one's client stays."""
    warden = Running(tmp_path, python, 0.5, renewal=0.2)
    warden.queue.write_text(f"PENDING bokeh-ssh:f00t{int(time.time()) - 5}\n")
    try:
        warden.say(do="inherit", guards=[scheduler.guard(slurm, "", "17")])
        if client == "leaves":
            warden.vanish()
        until(lambda: not warden.queue.exists(), what="it is cancelled")
    finally:
        warden.process.kill()
        warden.vanish()


@pytest.mark.parametrize(
    "said", ["PENDING bokeh-ssh:f00", "PENDING bokeh-ssh:f00t9999999999", "RUNNING bokeh-ssh:f00t1700000000"]
)
def test_job_that_may_have_a_warden_is_left_alone(tmp_path: Path, python: str, said: str) -> None:
    """Another one's job that runs, that was renewed, or that never was, is left alone."""
    warden = Running(tmp_path, python, 0.5, renewal=0.0)
    warden.queue.write_text(said + "\n")
    warden.say(do="inherit", guards=[scheduler.guard(slurm, "", "17")])
    warden.vanish()  # it ends when it has looked
    assert warden.queue.exists()


def test_job_that_is_renewed_late_is_left_alone(tmp_path: Path, python: str) -> None:
    """After the scheduler was down, a job's own warden has time to renew it before another one cancels it."""
    warden = Running(tmp_path, python, 0.5, renewal=0.2)
    late = f'echo >>"$0.asked"; cat {warden.queue}; echo PENDING bokeh-ssh:f00t9999999999 >{warden.queue}'
    (tmp_path / "squeue").write_text(f"#!/bin/sh\n{late}\n")
    warden.queue.write_text("PENDING bokeh-ssh:f00t1700000000\n")
    asked = tmp_path / "squeue.asked"
    asked.touch()
    warden.say(do="inherit", guards=[scheduler.guard(slurm, "", "17")])
    warden.vanish()
    until(lambda: asked.read_text() == "\n\n", what="it has looked twice")
    assert warden.queue.exists()


def test_released_job_is_left_alone(warden: Running) -> None:
    """What is over needs nobody to look after it: the warden ends with its client."""
    warden.submit()
    warden.say(do="release")
    warden.say(do="run", id=2, argv=["true"])
    assert warden.hear()["id"] == 2
    warden.vanish()
    assert warden.queue.exists()


def test_end_cancels_at_once(warden: Running) -> None:
    """A client that ends the job hears that the scheduler has heard it."""
    warden.submit()
    warden.say(do="end")
    assert warden.hear() == {"event": "ended", "status": 0, "err": ""}
    assert not warden.queue.exists()


def test_command_that_hangs_holds_up_no_other(warden: Running) -> None:
    """While one command hangs, others are run; the one is given up in time, and a missing one is told."""
    assert warden.hear()["event"] == "found"
    warden.say(do="run", id=1, argv=["sleep", "30"], timeout=1.0)
    warden.say(do="run", id=2, argv=["nosuchprogram"])
    answers = [warden.hear(), warden.hear()]
    assert [(answer["id"], answer["status"]) for answer in answers] == [(2, 127), (1, 124)]


def test_one_question_is_for_the_jobs_of_all(tmp_path: Path, python: str) -> None:
    """A warden takes an answer that another one had on its job, and asks for the jobs of both.

    The last one leaves no file, and one that is killed while it asks holds up nobody.
    """
    first, second = Running(tmp_path, python, 0.5), Running(tmp_path, python, 0.5)
    try:
        assert first.hear()["event"] == second.hear()["event"] == "found"
        assert first.ask("0") == (0, "0\n")
        assert first.ask("1") == (0, "1\n"), "what it waits for no more is in no question"
        assert second.ask("2") == (0, "1,2\n"), "nobody was told of that one"
        first.queue.write_text("new\n")
        assert second.ask("2") == (0, "1,2\n"), "it is fresh"
        assert first.ask("1") == (0, "1,2\n"), "it has the other's"
        assert first.ask("1", fresh=0) == (0, "new\n2,1\n"), "the control: a new one differs"
        asked = tmp_path / "asked"
        words = ["sh", "-c", f"echo >{asked}; exec sleep 60"]
        first.say(do="ask", id=3, job="1", argv=words, fresh=0, timeout=60, waits=True)
        until(asked.exists, what="it is asked")
        first.process.kill()
        second.queue.unlink()
        first.process.wait(10)
        assert second.ask("2", fresh=0) == (0, "2\n")
        assert (second.shared / "queue").exists()
    finally:
        for each in (first, second):
            each.vanish()
    assert not first.shared.exists()
