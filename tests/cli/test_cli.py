"""The command line, run as people run it: words in, lines and exit codes out."""

from __future__ import annotations

import contextlib
import dataclasses
import http.server
import inspect
import os
import pickle
import secrets
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import apps
import bokeh_ssh
from beds import Knobs, Machine, free_port, until
from bokeh_ssh._cli.app import main
from bokeh_ssh._cli.options import table
from bokeh_ssh._cli.options.command import take_batch
from bokeh_ssh._cli.options.flag import Flag
from bokeh_ssh._cli.options.words import as_flag
from bokeh_ssh._core.settings import as_toml, setting
from bokeh_ssh._tunnels.publication import START, Publication
from cable import Cable
from programs import CLI, ESCAPES, OnTerminal, Program, login, run_here, unkeyed

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals and terminals of POSIX")


@pytest.fixture
def machine(embedded: Callable[..., Machine]) -> Machine:
    """A machine on which the tests' own Python is the first."""
    return embedded(env={"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"})


@pytest.fixture
def marker() -> str:
    """A word that no other process has in its command line."""
    return f"marker-{secrets.token_hex(8)}"


@pytest.fixture
def app(tmp_path: Path, marker: str) -> str:
    """An app whose path has the marker."""
    path = tmp_path / f"{marker}.py"
    path.write_text(apps.SLIDER)
    return str(path)


def get(url: str) -> tuple[int, str]:
    """Fetch a page with a client other than ours."""
    with urllib.request.urlopen(url, timeout=30) as answer:
        return answer.status, answer.read().decode()


def is_open(port: int) -> bool:
    """Tell whether something listens on a port of loopback."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=2):
        return True
    return False


def gone(machine: Machine, marker: str, *, but: int = 0) -> None:
    """Wait until no process has the marker in its command line."""
    until(lambda: not [pid for pid in machine.pids(marker) if pid != but], what="all processes to end")


# Its grammar.


@pytest.mark.parametrize("words", [["--help"], ["direct", "--help"], ["demo", "-h"], ["--version"], []])
def test_help_does_not_load_ssh(words: list[str]) -> None:
    """Help and usage come without the time that paramiko, sshtunnel and Bokeh take to load."""
    code = (
        "import sys\nfrom bokeh_ssh.__main__ import main\n"
        "try: main(sys.argv[1:])\nexcept SystemExit: pass\n"
        "print([m for m in ('paramiko', 'sshtunnel', 'asyncssh', 'bokeh') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "bokeh-ssh" in done.stdout


#: What is no flag: it is written without one, is asked for, or has no words (an object, a callable).
NO_FLAGS = {"self", "app", "password", "passphrase", "pkey", "prompt", "on_event", "isolate"}
#: What stands in tables of its own: see test_flags_of_a_batch_job.
NO_FLAGS |= {"batch", "queue_timeout", "resubmit", "job"}


@pytest.mark.parametrize(
    ("cls", "flags", "positional"),
    [
        (bokeh_ssh.DirectTunnel, (*table.TUNNEL, *table.LOGIN), "host"),
        (bokeh_ssh.GatewayTunnel, (*table.GATEWAY, *table.TUNNEL, *table.LOGIN), "gateway"),
        (Publication, (*table.REMOTE, *table.START, *table.LOGIN), "gateway"),
        (bokeh_ssh.RemoteForward, (*table.REMOTE, *table.LOGIN), "gateway"),
        (bokeh_ssh.LocalForward, (*table.FORWARD, *table.LOGIN), "host"),
    ],
)
def test_flags_are_keywords(cls: type, flags: tuple[Flag, ...], positional: str) -> None:
    """Every keyword of a class is a flag of its command and the other way round, under the same name."""

    def keywords(cls: type) -> set[str]:
        found = inspect.signature(cls).parameters
        named = {name for name, p in found.items() if p.kind is not p.VAR_KEYWORD}
        if cls is Publication:
            named |= {*keywords(bokeh_ssh.RemoteForward), *START}
        if len(named) < len(found):
            named |= set(bokeh_ssh.Host.__dataclass_fields__) - {"name"}
        return named

    assert {flag.keyword for flag in flags} == keywords(cls) - NO_FLAGS - {positional}
    assert len({flag.keyword for flag in flags}) == len(flags)
    for flag in flags:
        assert flag.keyword.replace("_", "-") in flag.names[0] or flag.names[0] in (
            "--launch/--attach",
            "--signed/--unsigned",
        )


def test_flags_of_a_batch_job() -> None:
    """Every field of a Batch is a flag of ``direct``."""
    fields = {field.name for field in dataclasses.fields(bokeh_ssh.Batch)}
    done = subprocess.run(
        [sys.executable, "-c", "import bokeh_ssh; bokeh_ssh.Batch; import bokeh_ssh._cli.options.command"],
        check=False,
    )
    assert done.returncode == 0, "the flags do not find the types of a class that says it is the package's"
    assert {flag.keyword for flag in table.BATCH} == fields | {"batch"}
    assert {flag.keyword for flag in (*table.QUEUE, *table.JOB)} == {
        "queue_timeout",
        "resubmit",
        "job",
    }


def test_batch_flags_make_a_record() -> None:
    """What is typed of a batch job arrives as one record; without ``--batch`` nothing does."""
    typed = {"batch": True, "time": "2:00:00", "gpus": 1, "extra": ("--constraint=a100",), "setup": "x"}
    take_batch(typed)
    assert typed == {
        "batch": bokeh_ssh.Batch(time="2:00:00", gpus=1, extra=["--constraint=a100"]),
        "setup": "x",
    }
    plain = {"setup": "x"}
    take_batch(plain)
    assert plain == {"setup": "x"}


def test_job_flags_need_batch() -> None:
    """A flag of a batch job without ``--batch`` is an error, and not ignored."""
    with pytest.raises(bokeh_ssh.UsageError, match="--job-name is for a batch job; add --batch"):
        take_batch({"name": "dash"})


def test_every_flag_reaches_the_class(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is typed arrives as the keyword's own type; what is not typed is left to the class."""
    given: dict[str, Any] = {}

    class Tunnel:
        def __init__(self, *args: Any, **keywords: Any) -> None:
            given.update(keywords, positional=args)
            raise bokeh_ssh.UsageError("enough")

    monkeypatch.setattr("bokeh_ssh._cli.run.GatewayTunnel", Tunnel)
    monkeypatch.setattr("bokeh_ssh._cli.foreground.find_prompt", lambda: None)
    monkeypatch.setenv("TOKEN", "secret")
    words = """gateway me@gw a.py b.py --host inner --reverse relay --gateway-port 1 --gateway-address g:2
        --allow-exposed --local-port 0 --remote-port 3 --attach --arg=--dev --command bokeh --python py
        --setup one --setup two --cwd /w --env A=1=2 --env TOKEN --grace 4 --launch-timeout 5
        --extra-origins x:1 --origin y:2 --allow-foreign --allow-any-origin --no-cache
        -l you -p 6 -i k1 -i k2 -J j1,j2 -J j3
        --known-hosts kh --host-keys strict -F none --no-allow-agent --no-look-for-keys --timeout 7 -C"""
    with pytest.raises(SystemExit) as exit_:
        main([*words.split(), "--", "--args", "x y", "--"])
    assert exit_.value.code == 2
    given.pop("on_event")
    assert given.pop("isolate") is False
    assert given == {
        "positional": ("me@gw",),
        "app": ["a.py", "b.py"],
        "prompt": None,
        "host": "inner",
        "reverse": "relay",
        "gateway_port": 1,
        "gateway_address": "g:2",
        "allow_exposed": True,
        "local_port": 0,
        "remote_port": 3,
        "launch": False,
        "args": ("--dev", "--args", "x y", "--"),
        "command": "bokeh",
        "python": "py",
        "setup": ("one", "two"),
        "cwd": "/w",
        "env": {"A": "1=2", "TOKEN": "secret"},
        "grace": 4.0,
        "launch_timeout": 5.0,
        "extra_origins": ("x:1", "y:2"),
        "allow_foreign": True,
        "allow_any_origin": True,
        "cache": False,
        "user": "you",
        "port": 6,
        "key_filename": ("k1", "k2"),
        "jump": ("j1", "j2", "j3"),
        "known_hosts": "kh",
        "host_keys": "strict",
        "ssh_config": None,
        "allow_agent": False,
        "look_for_keys": False,
        "timeout": 7.0,
        "compression": True,
    }
    given.clear()
    with pytest.raises(SystemExit):
        main(["gateway", "gw", "-J", "none"])
    given.pop("on_event")
    assert given.pop("isolate") is False
    assert given == {
        "positional": ("gw",),
        "app": None,
        "prompt": None,
        "host_keys": "ask",
        "jump": (),
    }


@pytest.mark.parametrize(
    "words",
    [
        "nonsense",
        "direct",
        "direct host --port nonsense",
        "direct host --password secret",
        "direct -oProxyCommand=x app.py",
        "direct ho`st",
        "direct host app.py --attach",
        "direct host app.py --env NOT_SET_ANYWHERE",
        "direct host app.py -- --port 5",
        "gateway host app.py",
        "publish app.py",
        "publish -g host app.py --local-host other",
        "publish -g host --setup x",
        "forward host",
        "forward host -L 1:2",
        "forward host -L 0:x:99999",
        "forward host -L 1:/x:2",
        "forward host -L 1:rel/ative",
        "forward host -L [1:x:2",
        "forward host -R /x:/y:/z",
        "forward host --remote-socket x",
        "forward host --remote-socket /x --remote-port 1",
        "forward host --local-socket /x",
        "publish -g host app.py --local-socket /x",
        "forward host -L 1:x:2 -R 1:x:2",
        "forward host -L 1:x:2 -L 2:x:2",
        "forward host -R 1:x:2 -R 2:x:2",
        "forward host -R 1:x:2 --http",
        "forward host --http",
        "forward host -L *:1:x:2/http",
        "forward host -L 1:x:2 --remote-port 2",
        "forward host --remote-port 2 -- x",
        "demo -- x",
    ],
)
def test_misuse_exits_with_2(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    """What cannot work is told in a few lines before anything is started, with exit code 2."""
    with pytest.raises(SystemExit) as exit_:
        main(words.split())
    assert exit_.value.code == 2
    shown = capsys.readouterr()
    assert shown.err
    assert "Traceback" not in shown.err
    assert len(shown.err.splitlines()) <= 6
    assert "secret" not in shown.err


@pytest.mark.parametrize(
    ("spec", "parts"),
    [
        ("6006:localhost:5006", ((None, 6006), ("localhost", 5006))),
        ("0:db:5432", ((None, 0), ("db", 5432))),
        ("127.0.0.1:1:a.b:2", (("127.0.0.1", 1), ("a.b", 2))),
        ("*:1:x:2", (("*", 1), ("x", 2))),
        (":1:x:2", (("", 1), ("x", 2))),
        ("[::1]:1:[fe80::2]:3", (("::1", 1), ("fe80::2", 3))),
        ("5006:/run/a.sock", ((None, 5006), "/run/a.sock")),
        ("lo:5:/x/y", (("lo", 5), "/x/y")),
        ("/run/a.sock:db:5432", ("/run/a.sock", ("db", 5432))),
        ("/a:/b", ("/a", "/b")),
        ("/a\\:b:x:1", ("/a:b", ("x", 1))),
        ("[/a:b]:x:1", ("/a:b", ("x", 1))),
    ],
)
def test_forward_is_written_as_in_ssh(spec: str, parts: tuple[object, ...]) -> None:
    """``-L`` and ``-R`` are read as ssh reads them, IPv6 in brackets included."""
    from bokeh_ssh._cli.forward import parse_forward

    assert parse_forward(spec) == parts


def test_settings_are_worded_for_who_reads_them() -> None:
    """One error, in three words: Python's keywords, flags, and a project's file; the setting is data."""
    error = bokeh_ssh.UsageError(
        f"{setting('launch=False')} finds nothing",
        hint=f"use {setting('host_keys=ask')}, {setting('jump=()')} or a longer {setting('timeout')}; launch",
    )
    assert error.setting == "launch"
    assert str(error) == (
        'launch=False finds nothing; use host_keys="ask", jump=() or a longer timeout; launch'
    )
    assert error.in_words(as_flag) == (
        "--attach finds nothing",
        "use --host-keys ask, --jump none or a longer --timeout; launch",
    )
    assert error.in_words(as_toml)[0] == "launch = false finds nothing"
    copied = pickle.loads(pickle.dumps(error))
    assert (copied.setting, str(copied)) == (error.setting, str(error))
    assert copied.in_words(as_flag) == error.in_words(as_flag)
    assert bokeh_ssh.UsageError("launch=True was said by another machine").setting is None


@pytest.mark.parametrize(
    ("keywords", "python", "flag", "toml"),
    [
        ({"local_port": 99999}, "local_port=99999 is", "--local-port 99999 is", "local_port = 99999 is"),
        ({"command": "a 'b"}, 'command="a \'b" has', '--command "a \'b" has', 'command = "a \'b" has'),
        ({"command": ""}, "command is empty", "--command is empty", "command is empty"),
        ({"launch_timeout": -1}, "launch_timeout=-1 is", "--launch-timeout -1 is", "launch_timeout = -1 is"),
        ({"ready": "up"}, "ready='up' is", "--ready 'up' is", "ready = 'up' is"),
        ({"detach": True, "launch": False}, "detach leaves", "--detach leaves", "detach leaves"),
        ({"args": ["--port", "1"], "app": "a.py"}, "given in args", "options after --", "given in args"),
        ({"queue_timeout": 0}, "queue_timeout=0 is", "--queue-timeout 0 is", "queue_timeout = 0 is"),
        ({"host_keys": "no"}, "host_keys='no' is", "--host-keys 'no' is", "host_keys = 'no' is"),
        ({"job": " "}, "job=' ' is", "--job ' ' is", "job = ' ' is"),
        ({"upload": "yes"}, "upload='yes' is", "--upload 'yes' is", "upload = 'yes' is"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_setting_that_was_given_is_worded_too(
    keywords: dict[str, Any], python: str, flag: str, toml: str
) -> None:
    """An error that shows what was given for a setting names that as a flag, or as a project's file does."""
    with pytest.raises(bokeh_ssh.UsageError) as caught:
        bokeh_ssh.DirectTunnel("remote.host", **keywords)
    error = caught.value
    assert python in error.message
    assert flag in error.in_words(as_flag)[0]
    assert toml in error.in_words(as_toml)[0]
    assert error.setting == next(iter(keywords))


def test_project_is_told_in_its_own_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot work is worded as the project's file has it, and as a flag where it was typed."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bokeh-ssh.toml").write_text('host = "h"\nlaunch = false\napp = "app.py"\n')
    assert "launch = false attaches" in run_here("up", code=2).stderr
    assert "--attach attaches" in run_here("direct", "h", "app.py", "--attach", code=2).stderr


# What it does.


def test_direct_from_start_to_end(machine: Machine, app: str, marker: str) -> None:
    """The address is the one line on standard output; the stages are plain lines on standard error; Ctrl-C
    ends the server there and the port here, with exit code 0."""
    with Program("direct", machine.host, app, "--local-port", "0", *login(machine)) as program:
        url = program.address()
        apps.drive(url)
        assert machine.pids(marker)
        foreign = urllib.request.Request(url, headers={"Upgrade": "websocket", "Origin": "http://a.example"})
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(foreign, timeout=10)
        with refused.value as answer:
            assert b"(--extra-origins lets them)" in answer.read()
        program.interrupt()
        assert program.end() == 0, program
    assert program.stdout == f"{url}\n"
    assert url.startswith("http://localhost:")
    assert url.endswith(f"/{marker}")
    stages = [
        "Connecting to 127.0.0.1",
        "its host key is known",
        "Logged in",
        "Launching the server",
        "Started Bokeh",
        "Ready",
        "Closed the connection to 127.0.0.1; the server has ended",
    ]
    places = [program.stderr.find(stage) for stage in stages]
    assert -1 not in places, program
    assert places == sorted(places)
    assert "\x1b" not in program.stderr
    gone(machine, marker)
    assert not is_open(int(url.split(":")[2].split("/")[0]))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_signals_end_it_like_ctrl_c(
    light: Callable[..., Machine], app: str, marker: str, number: int
) -> None:
    """A service manager's SIGTERM and a closing terminal's SIGHUP end everything cleanly too."""
    machine = light()
    with Program("direct", machine.host, app, "--local-port", "0", *login(machine)) as program:
        program.address()
        program.interrupt(number)
        assert program.end() == 0, program
    gone(machine, marker)


def test_second_ctrl_c_does_not_wait(machine: Machine, tmp_path: Path, marker: str) -> None:
    """Who presses Ctrl-C again while a stubborn server is being ended gets the prompt back at once; the
    server is ended all the same."""
    app = tmp_path / f"{marker}.py"
    app.write_text(f"{apps.SLIDER}\nimport signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n")
    with Program("direct", machine.host, str(app), "--local-port", "0", *login(machine)) as program:
        assert get(program.address())[0] == 200
        program.interrupt()
        pause = threading.Event()
        until(lambda: pause.wait(0.6) or True)  # sooner it would count as the same Ctrl-C
        assert program.process.poll() is None, program
        program.interrupt()
        assert program.end(3) == 130, program
    gone(machine, marker)


def test_ctrl_c_while_connecting() -> None:
    """Before anything stands, Ctrl-C is an interruption: exit code 130, no traceback."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        words = ["direct", "127.0.0.1", "app.py", "-p", str(silent.getsockname()[1]), "-F", "none"]
        with Program(*words) as program:
            program.expect("Connecting")
            with silent.accept()[0]:  # it is connected, and waits for a greeting
                program.interrupt()
                assert program.end(5) == 130, program
    assert "Traceback" not in program.stderr
    assert program.stdout == ""


def test_failure_is_told_in_a_few_lines() -> None:
    """What fails is told with host, cause and next step, with exit code 1; only -vv has the traceback."""
    words = ["direct", "127.0.0.1", "app.py", "-p", str(free_port()), "-F", "none"]
    with Program(*words) as program:
        assert program.end() == 1, program
    assert "bokeh-ssh: 127.0.0.1: cannot connect" in program.stderr
    assert "Traceback" not in program.stderr
    assert len(program.stderr.splitlines()) <= 4
    with Program(*words, "-vv") as program:
        assert program.end() == 1
    assert "Traceback" in program.stderr


def test_launch_failure_shows_the_log(machine: Machine, marker: str) -> None:
    """A server that does not start is told with what it wrote."""
    with Program("direct", machine.host, f"/nowhere/{marker}.py", *login(machine)) as program:
        assert program.end() == 1, program
    assert "ended before it listened" in program.stderr
    assert "  | " in program.stderr
    assert program.stdout == ""


def test_failing_app_is_shown(machine: Machine, tmp_path: Path) -> None:
    """An app that raises has a blank page; its traceback is shown instead."""
    app = tmp_path / "app.py"
    app.write_text("def broken():\n    return 1 / 0\nbroken()\n")
    with Program("direct", machine.host, str(app), "--local-port", "0", *login(machine)) as program:
        get(program.address())
        program.expect("The app on 127.0.0.1 failed")
        program.expect("ZeroDivisionError")
        program.interrupt()
        assert program.end() == 0, program


def test_server_that_ends_ends_it(light: Callable[..., Machine], app: str, marker: str) -> None:
    """A server that dies is told, with exit code 1."""
    machine = light()
    with Program("direct", machine.host, app, "--local-port", "0", *login(machine)) as program:
        port = program.address().split(":")[2].split("/")[0]
        (pid,) = [int(line) for line in _after(program.stderr, "process ")]
        os.kill(pid, signal.SIGKILL)
        assert program.end() == 1, program
    assert "the server ended by itself (signal 9)" in program.stderr
    assert not is_open(int(port))
    gone(machine, marker)


def _after(text: str, word: str) -> Iterator[str]:
    for line in text.splitlines():
        if word in line:
            yield line.rpartition(word)[2].split()[0]


def test_show_opens_the_browser(light: Callable[..., Machine], app: str, tmp_path: Path) -> None:
    """--show gives the address to the browser."""
    machine = light()
    note = tmp_path / "shown"
    browser = tmp_path / "browser"
    browser.write_text(f'#!/bin/sh\necho "$1" > {note}.part\nmv {note}.part {note}\n')
    browser.chmod(0o755)
    words = ["direct", machine.host, app, "--local-port", "0", "--show", *login(machine)]
    with Program(*words, env={"BROWSER": f"{browser} %s"}) as program:
        url = program.address()
        until(note.exists)
        assert note.read_text() == f"{url}\n"
        program.interrupt()
        assert program.end() == 0


# Questions.


def test_questions_on_the_terminal(embedded: Callable[..., Machine], app: str, tmp_path: Path) -> None:
    """Host key, password and code are asked for on the terminal; what must be hidden is, what may be shown
    is; what the server says cannot act on the terminal."""
    from bokeh_ssh._demo.ssh_server import Challenge

    challenges = (
        Challenge({"Password: ": "sesame"}),
        Challenge({"Code: ": "424242"}, echo=True, instruction="\x1b[2Jlook at your\x07 phone"),
    )
    machine = embedded(challenges=challenges, env={"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"})
    known = tmp_path / "fresh"
    words = ["direct", machine.host, app, "--local-port", "0", *unkeyed(machine), "--known-hosts", str(known)]
    with OnTerminal(*words) as program:
        program.expect("SHA256:")
        program.answer("yes/no/[fingerprint])? ", "yes")
        program.answer("Password: ", "sesame")
        program.answer("Code: ", "424242")
        program.expect("Ctrl-C ends it.")
        screen, raw = program.screen, program.stdout
        program.type("\x03")
        assert program.end() == 0, program
    assert machine.server.host_key.get_fingerprint().encode()
    assert known.read_text().split()[1:] == machine.server.known_hosts_line("x").split()[1:3]
    assert "sesame" not in screen
    assert "424242" in screen
    assert "http://localhost:" in screen
    assert "\x1b[2J" not in raw
    assert "\x07" not in raw


def test_hidden_answer_is_never_shown(embedded: Callable[..., Machine]) -> None:
    """A password is not shown while it is typed, a wrong one may be given again, and Ctrl-C at the question
    leaves a terminal that shows what is typed."""
    machine = embedded(Knobs(password=True), password="sesame")
    words = [*CLI, "direct", machine.host, "app.py", *unkeyed(machine)]
    shell = ["/bin/sh", "-c", 'trap : INT; "$@"; echo "code $?"; stty -a', "sh", *words]
    with OnTerminal(argv=shell) as program:
        program.answer("'s password: ", "hunter2")
        program.expect("'s password: ")
        program.type("\x03")
        program.expect("code 130")
        program.end()
    assert "hunter2" not in program.stdout
    assert " echo " in program.stdout.replace("\n", " ").replace(";", " ")


def test_no_is_no(machine: Machine, tmp_path: Path) -> None:
    """Who declines an unknown host key has not connected, and no file has it."""
    known = tmp_path / "fresh"
    words = ["direct", machine.host, "app.py", *login(machine), "--known-hosts", str(known)]
    with OnTerminal(*words) as program:
        program.answer("yes/no/[fingerprint])? ", "no")
        assert program.end() == 1, program
    assert not known.exists()
    assert machine.server.logins == 0


@pytest.mark.parametrize("unknown", [False, True])
def test_without_a_terminal_nothing_is_asked(
    embedded: Callable[..., Machine], tmp_path: Path, unknown: bool
) -> None:
    """Without a terminal a question is an error with a next step; standard input belongs to somebody else."""
    machine = embedded(Knobs(password=True))
    words = [*CLI, "direct", machine.host, "app.py", *unkeyed(machine)]
    if unknown:
        words += ["--known-hosts", str(tmp_path / "fresh")]
    shell = ["/bin/sh", "-c", '"$@"; echo "code $?"; cat', "sh", *words]
    with Program(argv=shell, stdin=b"for the next program\n") as program:
        assert program.end() == 0
    assert program.stdout == "code 1\nfor the next program\n"
    assert "run it on a terminal" in program.stderr
    assert "prompt" not in program.stderr


# The gateway's two halves, and plain forwards.


def test_loss_and_return_are_told(machine: Machine, app: str, tmp_path: Path) -> None:
    """A line that goes down is told with its reason, and so is its return; the address stays as it is."""
    with Cable(machine.host, machine.port) as cable:
        there = cable.machine(machine, tmp_path)
        with Program("direct", there.host, app, *login(there)) as program:
            url = program.address()
            cable.pull()
            program.expect("127.0.0.1: the SSH connection was lost (the line went down)")
            program.expect("Reconnected")
            apps.drive(url)
            program.interrupt()
            assert program.end() == 0, program
    assert program.stdout == f"{url}\n"


def test_line_that_is_not_made_again_ends_it(light: Callable[..., Machine], app: str, tmp_path: Path) -> None:
    """With ``--no-reconnect`` a line that goes down is an error, and the exit code says so."""
    machine = light()
    with Cable(machine.host, machine.port) as cable:
        there = cable.machine(machine, tmp_path)
        with Program("direct", there.host, app, "--no-reconnect", "--grace", "1", *login(there)) as program:
            program.address()
            cable.pull()
            assert program.end() == 1, program
    assert program.stderr.count("the SSH connection was lost") == 1
    assert "Closed the connection" not in program.stderr, "the error has said so"


def test_publish_and_gateway(machine: Machine, app: str, marker: str) -> None:
    """The Bokeh host serves and publishes with one command, the person opens it with another; each ends what
    it started."""
    # Before Tornado 6.6 a page may come only from where the publication says: here, an unusual port.
    local = str(free_port())
    origin = f"localhost:{local}"
    words = ["publish", app, "-g", machine.host, "--remote-port", "0", "--origin", origin, *login(machine)]
    with Program(*words) as published:
        host, _, port = published.address().partition(":")
        assert host == machine.host
        published.expect(f"bokeh-ssh gateway {machine.host} --gateway-port {port}")
        assert [address for address, number in machine.listening() if number == int(port)] == ["127.0.0.1"]
        words = ["gateway", machine.host, "--gateway-port", port, "--local-port", local, *login(machine)]
        with Program(*words) as opened:
            url = opened.address()
            apps.drive(url)
            opened.interrupt()
            assert opened.end() == 0, opened
        assert get(f"http://127.0.0.1:{port}/{marker}")[0] == 200
        published.interrupt()
        assert published.end() == 0, published
    assert published.stdout == f"{host}:{port}\n"
    gone(machine, marker)
    until(lambda: not is_open(int(port)))


def test_end_of_what_was_published_is_told_once(
    light: Callable[..., Machine], app: str, marker: str, tmp_path: Path
) -> None:
    """A gateway's tunnel whose publication has ended says so once, and does not say at its own end that the
    server keeps running; a publication that loses the gateway says what failed, and what of its server."""
    machine = light()
    with Cable(machine.host, machine.port) as cable:
        there = cable.machine(machine, tmp_path)
        with Program("publish", app, "-g", there.host, "--no-reconnect", *login(there)) as published:
            published.address()
            words = ["gateway", machine.host, "--name", marker, "--local-port", "0", *login(machine)]
            with Program(*words) as opened:
                opened.address()
                cable.pull()
                assert published.end() == 1, published
                opened.expect("it is waited for")
                opened.interrupt()
                assert opened.end() == 0, opened
    last = [line for line in published.stderr.splitlines() if line]
    assert last[-3] == "The server has ended"
    assert "the SSH connection was lost" in last[-2]
    assert published.stderr.count("connection was lost") == 1
    assert "Closed" not in published.stderr + opened.stderr
    assert opened.stderr.count("is gone") == 1
    assert "keeps running" not in opened.stderr.partition("is gone")[2]


def test_publish_killed_takes_its_server_along(light: Callable[..., Machine], app: str, marker: str) -> None:
    """A server that was published does not outlive a killed publisher for longer than the grace."""
    machine = light()
    words = ["publish", app, "-g", machine.host, "--remote-port", "0", "--grace", "0", *login(machine)]
    with Program(*words) as published:
        published.address()
        assert machine.pids(marker)
        published.interrupt(signal.SIGKILL)
        published.end()
    gone(machine, marker)


def test_publish_needs_a_server(machine: Machine) -> None:
    """Without an app something must answer already; if nothing does, the next step is told."""
    words = ["publish", "-g", machine.host, "--local-port", str(free_port()), *login(machine)]
    with Program(*words) as program:
        assert program.end() == 1
    assert "nothing answers on port" in program.stderr
    assert machine.server.logins == 0


def test_publish_tells_a_broken_app(machine: Machine, tmp_path: Path) -> None:
    """An app that cannot be served is told before the gateway is bothered."""
    words = ["publish", str(tmp_path / "missing.py"), "-g", machine.host, *login(machine)]
    with Program(*words) as program:
        assert program.end() == 1
    assert "ended before it listened" in program.stderr
    assert machine.server.logins == 0


@pytest.fixture
def web() -> Iterator[int]:
    """A web server of another kind; gives its port."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"web")

        def log_message(self, *args: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    "way", ["--remote-port {} --http", "-L 0:localhost:{}", "-L 0:localhost:{}/http", "-R 0:localhost:{}"]
)
def test_forward(machine: Machine, web: int, way: str) -> None:
    """Any TCP port is forwarded, by flags or as ssh writes it; the address is the line on standard output."""
    with Program("forward", machine.host, *way.format(web).split(), *login(machine)) as program:
        address = program.address()
        assert get(f"http://{address}/") == (200, "web")
        program.interrupt()
        assert program.end() == 0, program
    until(lambda: not is_open(int(address.rpartition(":")[2])))


def test_publish_of_a_running_server(machine: Machine, web: int) -> None:
    """A server that runs is published as it is, and lives on."""
    words = ["publish", "-g", machine.host, "--local-port", str(web), "--remote-port", "0", *login(machine)]
    with Program(*words) as program:
        assert get(f"http://{program.address()}/") == (200, "web")
        program.interrupt()
        assert program.end() == 0, program
    assert get(f"http://127.0.0.1:{web}/") == (200, "web")


def test_log_lines_on_request(machine: Machine, web: int) -> None:
    """-v logs to standard error, without secrets and without escape sequences."""
    with Program("forward", machine.host, "--remote-port", str(web), "-vv", *login(machine)) as program:
        program.address()
        program.interrupt()
        assert program.end() == 0
    assert "bokeh_ssh: " in program.stderr
    assert not ESCAPES.search(program.stderr)
