"""``bokeh-ssh ls`` and ``stop``: the servers of an account, seen and ended from elsewhere."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

import light_bokeh
from beds import Machine, until
from bokeh_ssh import ServerNotFoundError, UsageError
from bokeh_ssh._cli.servers import choose_job
from bokeh_ssh._jobs.job import ListedJob
from bokeh_ssh._server.registry import RemoteServer
from programs import OnTerminal, Program, login, run_here

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals and terminals of POSIX")


@pytest.fixture
def machine(light: Callable[..., Machine]) -> Machine:
    """A machine with servers of this test's own, and a stand-in for Bokeh."""
    return light()


@pytest.fixture
def app(tmp_path: Path) -> str:
    """An app."""
    path = tmp_path / "sliders.py"
    path.write_text(light_bokeh.APP)
    return str(path)


def test_servers_are_listed_and_ended(machine: Machine, app: str) -> None:
    """A server is listed as in use while its tunnel stands, as waiting once that was killed, and no more
    after ``stop``, which ends its process; nothing else is on standard output."""
    assert run_here("ls", machine.host, *login(machine)).stdout == ""
    with Program("direct", machine.host, app, "--local-port", "0", *login(machine)) as program:
        program.address()
        [line] = run_here("ls", machine.host, *login(machine)).stdout.splitlines()
        number, state, age, where, what = line.split("\t")
        assert (state, where, what) == ("in use", "private socket", app)
        assert re.fullmatch(r"\d+ s", age)
        assert machine.pids(app)
        program.interrupt(signal.SIGKILL)
        program.end()
    until(lambda: "waiting" in run_here("ls", machine.host, *login(machine)).stdout)
    ended = run_here("stop", machine.host, "sliders", *login(machine))
    assert f"Ended {app} on {machine.host} ({number})" in ended.stderr
    until(lambda: not machine.pids(app))
    assert run_here("ls", machine.host, *login(machine)).stdout == ""


def test_stop_needs_to_know_which(machine: Machine, app: str, tmp_path: Path) -> None:
    """With several servers none is ended without a name (exit code 2); one that is not there is a failure."""
    other = tmp_path / "other.py"
    other.write_text(light_bokeh.APP)
    with Program("direct", machine.host, app, "--local-port", "0", *login(machine)) as one:
        one.address()
        with Program("direct", machine.host, str(other), "--local-port", "0", *login(machine)) as two:
            two.address()
            assert "more than one" in run_here("stop", machine.host, *login(machine), code=2).stderr
            assert (
                "no server named" in run_here("stop", machine.host, "third", *login(machine), code=1).stderr
            )
            run_here("stop", machine.host, "other.py", *login(machine))
            assert two.end() == 1, two  # its tunnel hears of it
            assert one.process.poll() is None
            one.interrupt()
            assert one.end() == 0


def test_job_is_chosen_by_name_or_number() -> None:
    """A number is a job's first; a name that more than one thing has ends none of them."""

    def job(number: str, name: str) -> ListedJob:
        return ListedJob(host="h", id=number, name=name, state="RUNNING", reason="", node="c1", left="1:00")

    seven, eight, nine = jobs = [job("7", "dash"), job("8", "dash"), job("9", "8")]
    server = RemoteServer(host="h", node="n", id="0a1b", state="running", apps=("dash.py",))
    assert choose_job(jobs, [], "7", host="h") is seven
    assert choose_job(jobs, [], "8", host="h") is eight
    assert choose_job(jobs, [], "8.pbs1", host="h") is eight, "as PBS has it"
    assert choose_job([nine], [], None, host="h") is nine
    assert choose_job(jobs, [server], "0a1b", host="h") is None, "a server is meant"
    assert choose_job([nine], [server], "dash", host="h") is None, "a server is meant"
    assert choose_job([], [], "dash", host="h") is None, "there are no jobs to be named"
    with pytest.raises(UsageError, match="named 'dash' on h: job 7 dash, job 8 dash"):
        choose_job(jobs, [], "dash", host="h")
    for name in ("dash", None):
        with pytest.raises(UsageError, match="job 7 dash, server 0a1b"):
            choose_job([seven], [server], name, host="h")
    with pytest.raises(
        ServerNotFoundError, match=r"named 'das' of yours \(there are: job 7 dash, job 8 dash"
    ):
        choose_job(jobs, [], "das", host="h")


def test_list_for_other_programs_and_for_people(machine: Machine, app: str) -> None:
    """With --json each server is an object, without what is our own way to it; a person gets a table."""
    with Program("direct", machine.host, app, "--local-port", "0", *login(machine)) as program:
        program.address()
        told = [
            json.loads(line)
            for line in run_here("ls", machine.host, "--json", *login(machine)).stdout.splitlines()
        ]
        [server] = [each for each in told if each["event"] == "server"]
        assert server["apps"] == [app]
        assert server["state"] == "running"
        assert server["attached"] is True
        assert not {"token", "key", "python", "libraries", "place"} & set(server)
        with OnTerminal("ls", machine.host, *login(machine)) as shown:
            assert shown.end() == 0, shown
        assert "LISTENS ON" in shown.screen
        assert "in use" in shown.screen
        ended = run_here("stop", machine.host, "--json", *login(machine))
        assert json.loads(ended.stdout.splitlines()[-1])["id"] == server["id"]
        program.end()
