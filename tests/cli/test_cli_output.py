"""What the command line shows: to a person at a terminal, in a pipe, and to other programs."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import light_bokeh
from beds import Machine, free_port, until
from bokeh_ssh import (
    Closed,
    Connecting,
    JobEnded,
    JobEnding,
    JobReached,
    JobStarted,
    JobWaiting,
    LaunchError,
    Lost,
    Reconnecting,
    TouchRequested,
)
from bokeh_ssh._cli.display import Display
from bokeh_ssh._cli.messages import describe, next_step
from bokeh_ssh._cli.output_queue import OutputQueue
from cable import Cable
from programs import OnTerminal, Program, login

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals and terminals of POSIX")


@pytest.fixture
def machine(light: Callable[..., Machine]) -> Machine:
    """A machine with a stand-in for Bokeh."""
    return light()


@pytest.fixture
def app(tmp_path: Path) -> str:
    """An app."""
    path = tmp_path / "sliders.py"
    path.write_text(light_bokeh.APP)
    return str(path)


def objects(text: str) -> list[dict[str, Any]]:
    """Read JSON lines."""
    return [json.loads(line) for line in text.splitlines()]


# For other programs.


def test_json_has_one_object_for_each_event(machine: Machine, app: str) -> None:
    """With --json standard output is JSON lines alone, and standard error is empty; each has its name and
    time, and what was there when it ended."""
    with Program("direct", machine.host, app, "--local-port", "0", "--json", *login(machine)) as program:
        program.expect('"opened"')
        program.interrupt()
        assert program.end() == 0, program
    told = objects(program.stdout)
    assert [each["event"] for each in told] == [
        "connecting",
        "host_key_verified",
        "authenticated",
        "launching",
        "launched",
        "ready",
        "opened",
        "closed",
    ]
    assert all(each["time"].endswith("Z") for each in told)
    by_name = {each["event"]: each for each in told}
    assert by_name["authenticated"]["methods"] == ["publickey"]
    assert by_name["opened"]["addresses"] == [by_name["ready"]["url"]]
    assert by_name["closed"]["server"] == "ended"
    assert program.stderr == ""


@pytest.mark.parametrize(
    ("words", "type_", "stage", "code"),
    [
        (["direct", "127.0.0.1", "app.py", "-p", "PORT", "-F", "none"], "RefusedError", "connect", 1),
        (["direct", "ho`st"], "UsageError", "use", 2),
        (["direct", "host", "--nonsense"], "UsageError", "use", 2),
        (["direct", "host", "--quiet"], "UsageError", "use", 2),
        (["nonsense"], "UsageError", "use", 2),
    ],
)
def test_json_has_errors_too(words: list[str], type_: str, stage: str, code: int) -> None:
    """With --json an error is an object like any other, of usage too, and the exit code is the same."""
    words = [word.replace("PORT", str(free_port())) for word in words]
    with Program(*words, "--json") as program:
        assert program.end() == code, program
    error = objects(program.stdout)[-1]
    assert error["event"] == "error"
    assert (error["type"], error["stage"], error["exit_code"]) == (type_, stage, code)
    fields = {"type", "stage", "host", "setting", "message", "hint", "log", "exit_code"}
    assert set(error) == {"event", "time"} | fields
    assert program.stderr == ""


def test_json_tells_a_loss(machine: Machine, app: str, tmp_path: Path) -> None:
    """Loss and return are objects as well, in order."""
    with Cable(machine.host, machine.port) as cable:
        there = cable.machine(machine, tmp_path)
        with Program("direct", there.host, app, "--json", *login(there)) as program:
            program.expect('"opened"')
            cable.pull()
            program.expect('"reconnected"')
            program.interrupt()
            assert program.end() == 0, program
    names = [each["event"] for each in objects(program.stdout)]
    assert names.index("lost") < names.index("reconnecting") < names.index("reconnected")


# The server's log.


def test_log_is_shown_on_request(machine: Machine, app: str) -> None:
    """With --log the server's lines come below the address, its last ones too; without it they do not."""
    for flags in ([], ["--log"]):
        words = ["direct", machine.host, app, "--local-port", "0", *flags, *login(machine)]
        with Program(*words) as program:
            program.address()
            if flags:
                program.expect("  | ")
            program.interrupt()
            assert program.end() == 0, program
        assert ("Starting Bokeh server version" in program.stderr) == bool(flags)
        assert ("Received signal SIGTERM" in program.stderr) == bool(flags)
        assert program.stderr.find("  | ") > program.stderr.find("Ready") or not flags


def test_backlog_never_blocks_who_writes() -> None:
    """Where nobody takes the lines, who brings them is not held up; memory is bounded, and what was left out
    is told."""
    shown: list[str] = []
    go = threading.Event()

    def show(lines: Any) -> None:
        go.wait(30)
        shown.extend(lines)

    backlog = OutputQueue(show)
    backlog.start()
    for number in range(5000):
        backlog.put([str(number)])
    go.set()
    backlog.close()
    assert shown[-1] == "4999"
    lost = [line for line in shown if line.startswith("[")]
    numbers = [int(line) for line in shown if not line.startswith("[")]
    assert numbers == sorted(numbers)
    assert sum(int(line[1:].split()[0]) for line in lost) + len(numbers) == 5000
    assert len(numbers) <= 2200


# For people.


def test_quiet_shows_the_address_alone(machine: Machine, app: str) -> None:
    """With --quiet there is the address, and nothing else when all goes well; an error is still told."""
    with Program("direct", machine.host, app, "--local-port", "0", "-q", *login(machine)) as program:
        url = program.address()
        program.interrupt()
        assert program.end() == 0, program
    assert (program.stdout, program.stderr) == (f"{url}\n", "")
    with Program("direct", "127.0.0.1", "app.py", "-q", "-p", str(free_port()), "-F", "none") as program:
        assert program.end() == 1, program
    assert "cannot connect" in program.stderr


def test_quiet_tells_a_loss_and_its_end(machine: Machine, app: str, tmp_path: Path) -> None:
    """Who is told that the line was lost is told that it is back, with --quiet too."""
    with Cable(machine.host, machine.port) as cable:
        there = cable.machine(machine, tmp_path)
        with Program("direct", there.host, app, "-q", *login(there)) as program:
            program.address()
            cable.pull()
            program.expect("Reconnected")
            program.interrupt()
            assert program.end() == 0, program
    assert [line.split()[0] for line in program.stderr.splitlines()] == ["Lost", "Reconnected"]


def test_reconnecting_counts_down(machine: Machine, app: str, tmp_path: Path) -> None:
    """A line that stays down is told with the seconds until the next attempt: counting down on a terminal,
    and once for each attempt elsewhere."""
    for kind in (OnTerminal, Program):
        with Cable(machine.host, machine.port) as cable:
            there = cable.machine(machine, tmp_path)
            with kind(
                "direct", there.host, app, "--local-port", "0", "--grace", "1", *login(there)
            ) as program:
                program.expect("Ctrl-C ends it.")
                cable.refuse()
                program.expect("Lost 127.0.0.1: the SSH connection was lost")
                program.expect("Reconnecting to 127.0.0.1 in 2 s", timeout=20)
                if kind is OnTerminal:
                    until(lambda: "in 1 s" in program.screen.rpartition("127.0.0.1 in 2 s")[2])
                program.interrupt()
                assert program.end() == 0, program


def test_farewell_of_what_was_there_before(machine: Machine, app: str) -> None:
    """A server that was attached to runs on, and the farewell says so."""
    with Program("direct", machine.host, app, "--remote-port", "0", "--unsigned", *login(machine)) as first:
        first.address()
        port = first.stderr.partition(", port ")[2].partition("port ")[2].split(",")[0]
        words = ["direct", machine.host, "--remote-port", port, "--local-port", "0", *login(machine)]
        with Program(*words) as program:
            program.address()
            program.interrupt()
            assert program.end() == 0, program
        assert "the server keeps running" in program.stderr
        first.interrupt()
        assert first.end() == 0
    assert "the server has ended" in first.stderr


@pytest.mark.parametrize(
    ("env", "has", "has_not"),
    [
        ({}, ["✓ ", "╭─", "\x1b[36m"], []),
        ({"NO_COLOR": "1"}, ["✓ ", "╭─"], ["\x1b[36m", "\x1b[32m", "\x1b[1;32m"]),
        ({"TERM": "dumb"}, ["Connecting to", "+--"], ["\x1b", "✓", "╭"]),
        ({"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, ["+ ", "+--"], ["✓", "╭", "…"]),
    ],
)
def test_terminals_of_all_kinds(
    machine: Machine, app: str, env: dict[str, str], has: list[str], has_not: list[str]
) -> None:
    """Colours only where they are wanted, nothing moves where it cannot, and no character that the locale
    does not have; the address is in a box everywhere."""
    words = ["direct", machine.host, app, "--local-port", "0", *login(machine)]
    with OnTerminal(*words, env=env) as program:
        program.expect("Ctrl-C ends it.")
        program.interrupt()
        assert program.end() == 0, program
    assert [text for text in has if text not in program.stdout] == []
    assert [text for text in has_not if text in program.stdout] == []
    assert "http://localhost:" in program.screen


def test_narrow_terminal_keeps_the_address_whole(machine: Machine, tmp_path: Path) -> None:
    """An address that does not fit into a box stands alone on its line, so that it can be copied."""
    name = "a-name-that-is-long-enough-for-two-lines-of-forty"
    app = tmp_path / f"{name}.py"
    app.write_text(light_bokeh.APP)
    words = ["direct", machine.host, str(app), "--local-port", "0", *login(machine)]
    with OnTerminal(*words, env={"COLUMNS": "40"}) as program:
        program.expect("Ctrl-C ends it.")
        program.interrupt()
        assert program.end() == 0, program
    [line] = [line for line in program.screen.splitlines() if "http" in line]
    assert line.strip().startswith("http://localhost:")
    assert line.strip().endswith(name)
    assert "╭" not in program.screen


def test_error_has_at_most_five_lines(capsys: pytest.CaptureFixture[str]) -> None:
    """An error with its next step takes five lines of 80 columns at most, however long its reason is; the
    server's own last lines come besides, twelve at most."""
    hint = "look at the log, which says more than that about what went wrong there"
    error = LaunchError("it failed " * 200, host="h", hint=hint, log=tuple(map(str, range(50))))
    Display().error(error, 1)
    lines = capsys.readouterr().err.splitlines()
    log = [line for line in lines if line.startswith("  | ")]
    assert log == [f"  | {number}" for number in range(38, 50)]
    assert sum(-(-len(line) // 80) for line in lines if line not in log) == 5
    assert lines[-1].strip() == next_step(error)


def test_touch_is_announced_also_with_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    """Whoever has to touch a security key is told so, which key and for which machine."""
    Display(quiet=True).on_event(TouchRequested(host="box", key="id_ed25519_sk"))
    assert "Touch the security key, to log in to box with id_ed25519_sk" in capsys.readouterr().err


def test_end_of_a_job_is_told_in_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    """The connection that ends with its job is no news: the error says why the job is over, and only that."""
    display = Display()
    display.on_event(JobReached(host="h", job="123", node="c17", way="srun"))
    capsys.readouterr()
    loss = Lost(host="h", reason="the line went down")
    again = Reconnecting(host="h", attempt=1, delay=0.0, reason="the line went down")
    for event in (loss, again, JobEnded(host="h", job="123", state="TIMEOUT", why="it reached its limit")):
        display.on_event(event)
    display.on_event(Closed(host="h", server="ended"))
    assert not capsys.readouterr().err
    # The control: a loss that is not the job's end.
    for each in (loss, again, Connecting(host="h", address="h", port=22)):
        display.on_event(each)
    told = capsys.readouterr().err.splitlines()
    assert told == ["Lost h: the line went down", "Connecting to h, port 22"]


def test_batch_job_in_words() -> None:
    """A line says why a job waits and when it may start, where it runs and until when, and how it ended."""
    today = time.mktime((*time.localtime()[:3], 14, 5, 0, 0, 0, -1))
    lines = [
        describe(event)
        for event in (
            JobWaiting(host="h", job="123"),
            JobWaiting(host="h", job="123", reason="Resources", estimated_start=today),
            JobWaiting(host="h", job="123", reason="suspended", stays=True),
            JobStarted(host="h", job="123", node="c17", ends_at=today),
            JobEnding(host="h", job="123", seconds=598.0),
            JobEnding(host="h", job="123", seconds=34.2, warned=True),
            JobEnding(host="h", job="123", seconds=None, warned=True),
            JobEnded(host="h", job="123", state="TIMEOUT", why="the job reached its time limit"),
        )
    ]
    assert [line.text for line in lines if line] == [
        "Job 123 waits (Ctrl-C cancels it)",
        "Job 123 waits: Resources, may start 14:05 (Ctrl-C cancels it)",
        "Job 123 waits: suspended (Ctrl-C leaves it)",
        "Job 123 runs on c17, ends 14:05",
        "Job 123 ends in 10 min, at its time limit",
        "Job 123 ends in 34 s, at its time limit",
        "Job 123 was warned by the scheduler: it may be ended soon",
        "Job 123 is over: the job reached its time limit",
    ]
    later = describe(JobWaiting(host="h", job="123", estimated_start=today + 3 * 86400))
    assert later
    assert "14:05" not in later.text.partition("start ")[2][:5], "another day is named before the time"


def test_traceback_of_a_server_keeps_its_indentation(capsys: pytest.CaptureFixture[str]) -> None:
    """The lines of a server under an error are indented as they were, so that a traceback can be read."""
    log = ("Traceback (most recent call last):", '  File "app.py", line 1', "    x = 1 + 2\x1b[2J")
    Display().error(LaunchError("it ended", log=log), 1)
    shown = capsys.readouterr().err.splitlines()
    assert shown[1:] == [
        "  | Traceback (most recent call last):",
        '  |   File "app.py", line 1',
        "  |     x = 1 + 2[2J",
    ]


def test_hints_break_between_words() -> None:
    """On a terminal of 40 columns no word of a hint is cut in two."""
    with OnTerminal("attach", "nosuch.invalid", "--timeout", "1", env={"COLUMNS": "40"}) as program:
        assert program.end() == 1, program
    lines = [line.rstrip() for line in program.screen.splitlines()]
    hint = [line for line in lines if line.startswith("  ") and line.strip()]
    assert len(hint) > 1
    assert (
        " ".join(line.strip() for line in hint)
        == "check the spelling and the HostName line of your ssh config"
    )
    assert all(len(line) <= 40 for line in hint)


def test_verbose_logs_what_happens(machine: Machine) -> None:
    """With ``-v`` each event is logged with its time, without any it is not."""
    for flags, logged in ((("-v",), True), ((), False)):
        words = ("forward", machine.host, "--remote-port", str(machine.port), *login(machine), *flags)
        with Program(*words) as program:
            program.address()
            program.interrupt()
            assert program.end() == 0, program
        assert ("bokeh_ssh: Authenticated(" in program.stderr) is logged
        assert ("bokeh_ssh: Ready(" in program.stderr) is logged
