"""Starting a server through real login shells, and each way in which that fails."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import light_bokeh
from beds import until
from bokeh_ssh._core.errors import (
    BokehNotFoundError,
    LaunchError,
    LaunchTimeoutError,
    PortInUseError,
    PythonNotFoundError,
    SessionError,
)
from bokeh_ssh._core.events import AppFailed, Launched, Launching, Warned
from bokeh_ssh._server.launch_spec import Launch
from bokeh_ssh._server.server import Server
from skips import missing

if os.name != "posix":
    pytest.skip("the remote side is a POSIX system", allow_module_level=True)

from local_runner import FAKE, Bench, LocalRunner, processes, pythons

SHELLS = ["sh", "dash", "bash", "csh", "tcsh", "fish", "zsh", "busybox sh"]
TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=30)
NASTY = [
    "a b",
    "'",
    '"',
    'it\'s "it"',
    ";",
    "$(touch x)",
    "`id`",
    "a\nb\n",
    "-x",
    "--",
    "ä€😀",
    "!!",
    "\\",
    "*",
    "~",
    "",
]


def endless(mark: str) -> str:
    """Give a shell command that never ends and can be found by its mark."""
    return f"/bin/sh -c 'while :; do sleep 1; done # {mark}'"


def words_of(shell: str) -> list[str]:
    words = shell.split()
    if not shutil.which(words[0]):
        missing(f"{words[0]} is not installed")
    return words


@pytest.fixture(params=SHELLS)
def shell(request: pytest.FixtureRequest) -> list[str]:
    """Each shell that people have as their login shell."""
    return words_of(request.param)


def get(server: Server, path: str) -> int:
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}{path}", timeout=20) as answer:
        return int(answer.status)


# --- what arrives


def test_every_shell_passes_everything_verbatim(shell: list[str], bench: Bench) -> None:
    """App paths, arguments, variables and the directory arrive byte for byte, whatever the login shell is."""
    runner = bench.runner(*shell)
    report = bench.path / "report.json"
    where = bench.path / "a 'dir' $(x) ü\n"
    where.mkdir()

    @settings(max_examples=2, deadline=None, suppress_health_check=list(HealthCheck))
    @given(
        st.lists(TEXT, min_size=10, max_size=20),
        TEXT.filter(lambda text: text and not text.startswith(("~", "-"))),
        TEXT,
    )
    @example(NASTY, "my 'app' $(id).py", "a\nb'\"")
    @example(["--args", "--port", "1"], "ünï/`app`", "")
    def check(args: list[str], app: str, value: str) -> None:
        report.unlink(missing_ok=True)
        env = {"FAKE_REPORT": str(report), "OTHER": value, "ünï code": "x"}
        if "--args" not in args:  # our own options cannot be given before it
            args = ["--args", *args]
        server = bench.start(runner, command=FAKE, app=(app,), args=tuple(args), env=env, cwd=str(where))
        server.stop()
        seen = json.loads(report.read_text())
        argv = [bytes.fromhex(word).decode() for word in seen["argv"]]
        assert argv[argv.index("--session-token-expiration") + 2 :] == [app, *args]
        environ = {bytes.fromhex(k).decode(): bytes.fromhex(v) for k, v in seen["environ"].items()}
        assert environ["OTHER"] == value.encode()
        assert environ["ünï code"] == b"x"
        assert seen["cwd"] == str(where)
        assert seen["stdin"] == ""

    check()
    assert {session.process.wait(20) for session in runner.sessions} == {0}


def test_app_that_begins_with_a_dash_is_an_app(bench: Bench) -> None:
    """Such a path is not taken for an option."""
    report = bench.path / "report.json"
    bench.start(command=FAKE, app=("-x.py",), env={"FAKE_REPORT": str(report)})
    argv = [bytes.fromhex(word).decode() for word in json.loads(report.read_text())["argv"]]
    assert argv[-1] == "./-x.py"


def test_home_is_the_remote_one(bench: Bench, account: Path) -> None:
    """``~/`` in app, cwd and python is expanded there."""
    (account / "my dir").mkdir()
    report = bench.path / "report.json"
    python = account / "my python"
    python.write_text(f'#!/bin/sh\nexport VIA=mine\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    env = {"FAKE_REPORT": str(report)}
    bench.start(
        command=FAKE, app=("~/a b.py", "~nobody-here/x"), cwd="~/my dir", python="~/my python", env=env
    )
    seen = json.loads(report.read_text())
    argv = [bytes.fromhex(word).decode() for word in seen["argv"]]
    assert argv[-2:] == [str(account / "a b.py"), "~nobody-here/x"]
    assert seen["cwd"] == str(account / "my dir")
    assert b"VIA".hex() in seen["environ"]


def test_remote_settings_do_not_override_ours(bench: Bench) -> None:
    """Variables of the remote account that would undo our options are gone, unless the caller gave them."""
    report = bench.path / "report.json"
    runner = bench.runner(
        BOKEH_ALLOW_WS_ORIGIN="x", BOKEH_LOG_LEVEL="error", BOKEH_PY_LOG_LEVEL="error", KEPT="1"
    )
    bench.start(runner, command=FAKE, env={"FAKE_REPORT": str(report), "BOKEH_LOG_LEVEL": "warn"})
    environ = {
        bytes.fromhex(k): bytes.fromhex(v) for k, v in json.loads(report.read_text())["environ"].items()
    }
    assert b"BOKEH_ALLOW_WS_ORIGIN" not in environ
    assert b"BOKEH_PY_LOG_LEVEL" not in environ
    assert environ[b"BOKEH_LOG_LEVEL"] == b"warn"
    assert environ[b"KEPT"] == b"1"


def test_no_secret_is_in_any_command_line(bench: Bench, mark: str) -> None:
    """While it runs, no process shows what came in env or setup; only standard input carried it."""
    runner = bench.runner()
    report = bench.path / "report.json"
    env = {"FAKE_REPORT": str(report), "TOKEN": mark}
    server = bench.start(runner, command=FAKE, setup=(f"export OTHER={mark}",), env=env)
    assert mark.encode().hex() in report.read_text()  # it did arrive
    assert mark.encode() in runner.sessions[0].written
    assert not processes(mark)
    assert mark not in runner.commands[0] + repr(server) + repr(server.launch)


# --- real servers


def test_bokeh_starts_through_every_shell(shell: list[str], bench: Bench) -> None:
    """A server comes up, tells where it listens, answers and ends, through any login shell: Bokeh itself
    through the first of them, the quick stand-in through the others."""
    path = {} if shell == SHELLS[0].split() else {"PYTHONPATH": light_bokeh.path_with_it(bench.path)}
    app = bench.path / "my 'dir' ü" / "an_app-1.py"
    app.parent.mkdir()
    app.write_text("from bokeh.io import curdoc\nprint('from the app')\n")
    server = bench.start(bench.runner(*shell, **path), app=(str(app),))
    assert server.routes == ("/an_app-1",)
    assert server.versions.startswith("Bokeh ")
    assert get(server, "/an_app-1/metadata") == 200
    assert "from the app" not in server.log
    assert get(server, "/an_app-1") == 200
    until(lambda: "from the app" in server.log, what="what the app prints arrives at once")
    assert [type(event) for event in bench.events] == [Launching, Launched]
    assert server.stop() is True
    assert server.exit_status == 0
    assert any(line.startswith("Received signal") for line in server.log)
    with pytest.raises(OSError):  # noqa: PT011 - whichever way it refuses
        get(server, "/")


@pytest.mark.parametrize(("name", "route"), [("my app", "/my%20app"), ("a+b", "/a+b")])
def test_app_name_that_bokeh_cannot_serve_is_told(
    bench: Bench, name: str, route: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An app whose own name is no plain word is answered 404 by Bokeh itself: an error, told once."""
    app = bench.path / f"{name}.py"
    app.write_text("")
    with pytest.raises(LaunchError, match=re.escape(f"under the name '/{name}'")):
        bench.start(app=(str(app),))
    assert not [event for event in bench.events if isinstance(event, Warned)]
    monkeypatch.setattr(Launch, "check_routes", lambda *_: None)
    server = bench.start(app=(str(app),))
    with pytest.raises(urllib.error.HTTPError) as caught:  # once this fails, the error can go
        get(server, f"{route}/metadata")
    caught.value.close()
    assert caught.value.code == 404


def test_bokeh_without_app_serves_the_root(bench: Bench) -> None:
    """Without an app there is one route, the root."""
    server = bench.start()
    assert server.routes == ("/",)
    assert get(server, "/metadata") == 200


def test_panel_starts_the_same(bench: Bench) -> None:
    """``panel serve`` is started, found and ended like ``bokeh serve``."""
    pytest.importorskip("panel")
    app = bench.path / "app.py"
    app.write_text("import panel as pn\npn.pane.Markdown('x').servable()\n")
    server = bench.start(app=(str(app),), command="panel serve", timeout=90)
    assert server.routes == ("/app",)
    assert get(server, "/app/metadata") == 200
    assert server.stop() is True


def test_app_that_fails_is_told_with_its_traceback(bench: Bench) -> None:
    """The blank page of a broken app is an AppFailed event."""
    app = bench.path / "bad.py"
    app.write_text("import no_such_module_here\n")
    server = bench.start(app=(str(app),))

    def failures() -> list[AppFailed]:
        return [event for event in bench.events if isinstance(event, AppFailed)]

    assert not failures()
    assert get(server, "/bad") == 200
    until(failures, what="the error is told")
    (event,) = failures()
    assert "No module named 'no_such_module_here'" in event.traceback.splitlines()[-1]


def test_port_asked_for_is_taken(bench: Bench) -> None:
    """A port given by number is the one that it listens on."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    assert bench.start(port=port).port == port


def test_port_in_use_is_its_own_error(bench: Bench) -> None:
    """If that port is taken there, the error has its number and says that it is the remote one."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
        error = bench.fails(PortInUseError, port=port)
    assert (error.port, error.side) == (port, "remote")


@pytest.mark.parametrize(
    ("launch", "status", "words"),
    [
        ({"app": ("nowhere.py",)}, 1, ["does not exist", "nowhere.py", "cwd"]),
        ({"args": ("--zzz",)}, 2, ["unrecognized arguments: --zzz", "check args"]),
        ({"args": ("--ssl-certfile", "gone.pem")}, 1, ["the certificate's file is there", "--ssl-keyfile"]),
        ({"app": ("broken.py",)}, 1, ["Invalid syntax in 'broken.py'", "SyntaxError"]),
    ],
    ids=["missing app", "bad flag", "no certificate", "syntax error"],
)
def test_bokeh_that_refuses_says_why(
    bench: Bench, launch: dict[str, Any], status: int, words: list[str]
) -> None:
    """A failed start gives Bokeh's own reason, its log, its exit status and the command."""
    (bench.path / "broken.py").write_text("def (\n")
    error = bench.fails(LaunchError, cwd=str(bench.path), **launch)
    for word in words:
        assert word in str(error)
    assert error.exit_status == status
    assert error.log
    assert error.command[1:4] == ("-m", "bokeh", "serve")


# --- interpreters


def wrapper(bench: Bench, name: str, flags: str = "") -> str:
    return bench.script(name, f'#!/bin/sh\nexec "{sys.executable}" {flags} "$@"\n')


def only(bench: Bench, *names: str) -> str:
    """Make a PATH of system tools without any Python."""
    directory = bench.path / "bin"
    directory.mkdir()
    for name in ("sh", "env", "sleep", *names):
        (directory / name).symlink_to(shutil.which(name) or pytest.skip(f"no {name}"))
    return str(directory)


def test_first_python_that_has_bokeh_is_taken(bench: Bench) -> None:
    """python3 without Bokeh is skipped for a python that has it."""
    path = only(bench)
    wrapper(bench, "bin/python3", "-S")  # no site-packages, so no Bokeh
    wrapper(bench, "bin/python")
    runner = bench.runner(PATH=path)
    server = bench.start(runner, python=None)
    assert server.versions.startswith("Bokeh")
    assert b"has no bokeh" in runner.sessions[0].received


def test_no_python_has_bokeh(bench: Bench) -> None:
    """Where no Python has the package, the error names each that was tried, and how to install it."""
    path = only(bench)
    wrapper(bench, "bin/python3", "-S")
    wrapper(bench, "bin/python", "-S")
    error = bench.fails(BokehNotFoundError, bench.runner(PATH=path), python=None)
    for name in ("python3", "python"):
        assert f"{path}/{name} has no bokeh" in str(error)
    assert f"{path}/python3 -m pip install 'bokeh'" in str(error)


def test_panel_missing_is_named(bench: Bench) -> None:
    """For ``panel serve`` the package that is missing may be Panel alone."""
    packages = bench.path / "packages" / "bokeh"
    packages.mkdir(parents=True)
    (packages / "__init__.py").touch()
    python = wrapper(bench, "python", "-S")
    env = {"PYTHONPATH": str(packages.parent)}
    error = bench.fails(BokehNotFoundError, python=python, command="panel serve", env=env)
    assert "has no panel" in str(error)


def test_bokeh_too_old(bench: Bench) -> None:
    """A Bokeh without the options that we need is told, with its version, before it is started."""
    packages = bench.path / "packages"
    (packages / "bokeh").mkdir(parents=True)
    (packages / "bokeh" / "__init__.py").touch()
    (packages / "bokeh-2.3.1.dist-info").mkdir()
    error = bench.fails(BokehNotFoundError, env={"PYTHONPATH": str(packages)})
    assert "has Bokeh 2.3" in str(error)
    assert "2.4 or newer" in str(error)


def test_app_directory_does_not_shadow_what_starts_it(bench: Bench) -> None:
    """A json.py beside the app is the app's own business: the supervisor never imports it."""
    for name in ("json", "signal", "select", "re", "collections", "importlib"):
        (bench.path / f"{name}.py").write_text("raise SystemExit('shadowed')\n")
    bench.start(command=FAKE, cwd=str(bench.path))


@pytest.mark.parametrize("python", ["/no/such/python", "no-such-python", "~/no such python"])
def test_python_missing(bench: Bench, python: str) -> None:
    """An interpreter that is not there is told by its name."""
    error = bench.fails(PythonNotFoundError, python=python)
    assert python in str(error)


@pytest.mark.parametrize(
    ("launch", "says"),
    [
        ({"cwd": "$SCRATCH/app"}, "is not replaced"),
        ({"python": "$HOME/bin/python"}, "is not replaced"),
        ({"python": "conda run -n it python"}, "setup"),
        ({"app": ("$HOME/app.py",)}, "is not replaced"),
    ],
)
def test_path_that_is_written_for_a_shell(bench: Bench, launch: dict[str, Any], says: str) -> None:
    """A variable or a command in the place of a path is answered by what can be written there."""
    with pytest.raises(LaunchError) as caught:
        bench.start(**launch)
    assert says in str(caught.value.hint)


def test_python_that_may_not_be_run(bench: Bench) -> None:
    """An interpreter that is there, and is not for this account to run, is not told as missing."""
    python = bench.script("python", "#!/bin/sh\n")
    Path(python).chmod(0o644)
    error = bench.fails(PythonNotFoundError, python=python)
    assert f"{python!r} is there, but is no program that your account may run" in str(error)
    assert "there is no" not in str(error)


@pytest.mark.parametrize("setup", ["", "true"])
def test_python_whose_own_interpreter_is_gone(bench: Bench, setup: str) -> None:
    """A script of a removed environment, or with the lines of Windows, is not told as missing."""
    for line in ("#!/no/such/python\n", "#!/bin/sh\r\n"):
        python = bench.script("python", line)
        error = bench.fails(PythonNotFoundError, python=python, setup=setup)
        assert f"{python!r} is there, but its first line names a program that is not" in str(error)


def test_no_python_at_all(bench: Bench) -> None:
    """A machine without Python is told as such, with the PATH that was looked at."""
    path = only(bench)
    error = bench.fails(PythonNotFoundError, bench.runner(PATH=path), python=None)
    assert "python3 or python" in str(error)
    assert f"PATH={path}" in str(error)


def test_python_that_does_not_start(bench: Bench) -> None:
    """An interpreter that ends at once, such as the shim of a version manager, gives its own words."""
    python = bench.script("python", "#!/bin/sh\necho 'shim: no version is set' >&2\nexit 126\n")
    error = bench.fails(PythonNotFoundError, python=python)
    assert "shim: no version is set" in str(error)
    assert error.exit_status == 126


def test_python_too_old(bench: Bench) -> None:
    """A Python that the supervisor cannot run on is told with its version, Python 2 included."""
    old = [path for version in ("2.7", "3.6", "3.7") for path in pythons(version)]
    if not old:
        pytest.skip("there is no Python older than 3.8 here")
    for python in old:
        error = bench.fails(PythonNotFoundError, python=python)
        assert f"{python} is Python " in str(error)
        assert "3.8 or newer" in str(error)


def test_command_missing(bench: Bench) -> None:
    """A command of the caller's own that is not there is told by its name."""
    error = bench.fails(LaunchError, command="no-such-serve --x")
    assert "'no-such-serve' could not be started (No such file or directory)" in str(error)
    assert error.command[:2] == ("no-such-serve", "--x")


def test_command_that_cannot_be_started(bench: Bench) -> None:
    """A script from Windows, and an account that may open no more files, are told as that, and a server that
    goes into the background as one that ended."""
    script = bench.script("serve", "#!/bin/sh\r\nexec true\r\n")
    error = bench.fails(LaunchError, command=script)
    assert "carriage return" in str(error)
    error = bench.fails(LaunchError, command="sleep 60", setup="ulimit -n 13")
    assert "Too many open files" in str(error)
    assert "ulimit" in str(error.hint)
    error = bench.fails(LaunchError, command="sh -c 'exit 0'")
    assert "wrote nothing" in str(error)
    assert "below" not in str(error)


def test_directory_missing(bench: Bench) -> None:
    """A directory that is not there is told by its name."""
    error = bench.fails(LaunchError, cwd="/no/such/dir")
    assert "'/no/such/dir'" in str(error)


# --- setup


@pytest.mark.parametrize("with_bash", [True, False], ids=["bash", "sh"])
def test_setup_runs_in_a_login_shell_first(bench: Bench, account: Path, with_bash: bool) -> None:
    """Setup sees what login files set, its output disturbs nothing, and what it sets reaches the server."""
    (account / ".profile").write_text("echo from the profile; export FROM_PROFILE=1; cat >/dev/null\n")
    report = bench.path / "report.json"
    path = only(bench, "cat", *(["bash"] if with_bash else []))
    runner = bench.runner(PATH=path)
    steps = (
        '[ "$FROM_PROFILE" = 1 ] || exit 9',
        "echo noise; echo more >&2; cat",  # its standard input is empty
        "if true; then\n  export FROM_SETUP='a b'\nfi",
    )
    bench.start(runner, command=FAKE, setup=steps, env={"FAKE_REPORT": str(report), "OVER": "env"})
    environ = json.loads(report.read_text())["environ"]
    assert environ[b"FROM_SETUP".hex()] == b"a b".hex()
    assert (b"BASH".hex() in environ) is False
    assert b"noise" not in runner.sessions[0].received


@pytest.mark.parametrize(
    ("setup", "status", "words"),
    [
        (("true", "echo no such module >&2; (exit 7)"), 7, ["step 2", "exit status 7", "no such module"]),
        ("no_such_command_here", 127, ["step 1", "no_such_command_here"]),
        ("if then", None, ["step 1"]),
        ("echo leaving; exit 5", 5, ["step 1", "leaving"]),
        ("set -e; false; true", 1, ["step 1"]),
        ("exit 0", 0, ["step 1", "ended the shell"]),
    ],
)
def test_setup_that_fails_is_told(bench: Bench, setup: Any, status: int | None, words: list[str]) -> None:
    """A step that fails ends the launch with its number, its exit status and what it wrote."""
    error = bench.fails(LaunchError, setup=setup)
    for word in words:
        assert word in str(error)
    if status is not None:
        assert error.exit_status == status


def fake_conda(root: Path, env: Path) -> None:
    (root / "etc" / "profile.d").mkdir(parents=True)
    (root / "etc" / "profile.d" / "conda.sh").write_text(
        f'conda() {{\n[ "$2" = viz ] || {{ echo "no env $2" >&2; return 1; }}\n'
        f'export PATH="{env}:$PATH" IN_ENV="$2"\n}}\n'
    )
    env.mkdir()
    python = env / "python3"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)


@pytest.mark.parametrize("with_bash", [True, False], ids=["bash", "sh"])
def test_conda_activate_works(bench: Bench, account: Path, with_bash: bool) -> None:
    """``conda activate`` works though conda is only set up for interactive shells; a wrong name is told."""
    fake_conda(account / "miniforge3", account / "envs")
    runner = bench.runner(PATH=only(bench, "cat", *(["bash"] if with_bash else [])))
    report = bench.path / "report.json"
    bench.start(
        runner, python=None, command=FAKE, setup="conda activate viz", env={"FAKE_REPORT": str(report)}
    )
    assert json.loads(report.read_text())["environ"][b"IN_ENV".hex()] == b"viz".hex()
    error = bench.fails(LaunchError, runner, python=None, setup="conda activate other")
    assert "no env other" in str(error)


def test_module_load_works(bench: Bench) -> None:
    """``module load`` works though no start file has defined ``module``."""
    init = bench.path / "modules" / "init"
    init.mkdir(parents=True)
    for name in ("sh", "bash"):
        (init / name).write_text('module() { export LOADED="$2"; }\n')
    report = bench.path / "report.json"
    runner = bench.runner(MODULESHOME=str(init.parent))
    bench.start(runner, command=FAKE, setup=("module load viz",), env={"FAKE_REPORT": str(report)})
    assert json.loads(report.read_text())["environ"][b"LOADED".hex()] == b"viz".hex()


# --- start files

START_FILES = {
    "bash": ("BASH_ENV", "start"),
    "zsh": ("ZDOTDIR", ".zshenv"),
    "csh": ("HOME", ".cshrc"),
    "tcsh": ("HOME", ".tcshrc"),
    "fish": ("XDG_CONFIG_HOME", "fish/config.fish"),
}


def start_file(bench: Bench, shell: str, text: str) -> LocalRunner:
    """Give an account whose login shell reads ``text`` before it runs anything."""
    words = words_of(shell)
    variable, name = START_FILES[shell]
    path = bench.path / "files" / name
    path.parent.mkdir(parents=True)
    path.write_text(text)
    value = path if variable == "BASH_ENV" else bench.path / "files"
    return bench.runner(*words, **{variable: str(value)})


@pytest.mark.parametrize("shell", START_FILES)
def test_start_file_noise_is_harmless(bench: Bench, shell: str) -> None:
    """A start file may print a megabyte, escape sequences, even our own words: nothing is taken for ours."""
    lines = [
        "head -c 1000000 /dev/zero | tr '\\000' x",
        "printf '\\033[31m\\033]0;title\\007'",
        """echo '{"event": "ready", "port": 1, "pid": 1, "routes": ["/evil"], "versions": ""}'""",
        "echo hello",
        "echo 'hello' 'exec /bin/sh -c'",
        "printf 'no line end'",
    ]
    if shell == "bash":
        lines += ["echo", 'echo "$BASH_EXECUTION_STRING"', "printf x >&2"]
    runner = start_file(bench, shell, "\n".join(lines) + "\n")
    server = bench.start(runner, command=FAKE)
    assert len(runner.sessions[0].received) > 1_000_000
    assert b"/evil" in runner.sessions[0].received
    assert server.routes == ("/fake",)
    assert sum(map(len, server._reader.noise.lines)) < 100_000
    assert server.stop() is True


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_start_file_that_reads_gets_nothing(bench: Bench, shell: str) -> None:
    """A start file that reads standard input for a moment takes none of what is meant for us."""
    runner = start_file(bench, shell, "read -t 0.2 x; echo got=$x.\n")
    bench.start(runner, command=FAKE)
    assert b"got=.\n" in runner.sessions[0].received


@pytest.mark.parametrize("shell", START_FILES)
def test_start_file_that_blocks_ends_at_the_deadline(bench: Bench, shell: str, mark: str) -> None:
    """A start file that never ends is a LaunchTimeoutError that shows what it wrote, and is ended."""
    runner = start_file(bench, shell, f"echo waiting for nothing\n{endless(mark)}\n")
    began = time.monotonic()
    error = bench.fails(LaunchTimeoutError, runner, timeout=4)
    assert 3.9 < time.monotonic() - began < 30
    assert "the login shell did not run our command within 4 s" in str(error)
    assert "waiting for nothing" in str(error)
    assert runner.sessions[0].signals == ["KILL"]  # it did come that far
    until(lambda: not processes(mark), what="the start file is gone")


def test_setup_that_blocks_ends_at_the_deadline(bench: Bench, mark: str) -> None:
    """Setup that never ends is a LaunchTimeoutError, and is ended."""
    steps = ("echo sets up >&2", endless(mark))
    seen = threading.Event()
    runner = bench.runner()

    def watch() -> None:
        until(lambda: processes(mark), what="setup runs")
        seen.set()

    watcher = threading.Thread(target=watch)
    watcher.start()
    error = bench.fails(LaunchTimeoutError, runner, setup=steps, timeout=6)
    watcher.join()
    assert seen.is_set()
    assert "sets up" in str(error)
    until(lambda: not processes(mark), what="setup is gone")


# --- accounts that run no commands, and machines that are no POSIX systems


def cmd_exe(bench: Bench) -> str:
    text = "'exec' is not recognized as an internal or external command,\\r\\noperable program\\r\\n"
    return bench.script("cmd", f'#!/bin/sh\nprintf "{text}" >&2\nexit 1\n')


def powershell(bench: Bench) -> str:
    text = 'exec : Die Benennung \\"exec\\" wurde nicht als Name eines Cmdlet erkannt.\\r\\n'
    return bench.script("pwsh", f'#!/bin/sh\nprintf "{text}" >&2\nexit 1\n')


@pytest.mark.parametrize("make", [cmd_exe, powershell])
def test_windows_is_told_at_once(bench: Bench, make: Callable[[Bench], str]) -> None:
    """A Windows machine is told as such, and that it is not supported, without waiting for the deadline."""
    error = bench.fails(LaunchError, bench.runner(make(bench)), timeout=60)
    assert "Windows" in str(error)
    assert "not supported" in str(error)


def test_account_that_runs_no_commands(bench: Bench) -> None:
    """nologin and forced commands are a SessionError with their own words, long before the deadline; so is a
    menu told, which waits for its user."""
    shell = bench.script("nologin", "#!/bin/sh\necho This account is currently not available.\nexit 1\n")
    error = bench.fails(SessionError, bench.runner(shell), timeout=60)
    assert "This account is currently not available." in str(error)
    menu = bench.script("menu", "#!/bin/sh\necho 1: mail, 2: quit\nread choice\n")
    error = bench.fails(LaunchError, bench.runner(menu), timeout=60)
    assert "what the login itself runs, runs another" in str(error)
    assert "1: mail, 2: quit" in str(error)


# --- deadlines and interruption


def test_server_that_never_gets_ready_ends_at_the_deadline(bench: Bench, mark: str) -> None:
    """A server that never says that it listens is a LaunchTimeoutError, and is ended with its children."""
    runner = bench.runner()
    env = {"FAKE": "silent child deaf", "FAKE_MARK": mark}
    error = bench.fails(LaunchTimeoutError, runner, command=FAKE, env=env, timeout=6)
    assert b'"started"' in runner.sessions[0].received
    assert "did not say within 6 s that it listens" in str(error)
    until(lambda: not processes(mark), what="the grandchild is gone")


def is_waiting(thread: threading.Thread) -> bool:
    """Tell whether a thread is in a wait of the package's."""
    frame = sys._current_frames().get(thread.ident or 0)
    while frame is not None and not frame.f_code.co_filename.endswith("_core/waiting.py"):
        frame = frame.f_back
    return frame is not None


@pytest.mark.parametrize("stage", ["started", "setup", "login"])
def test_ctrl_c_during_the_launch_leaves_nothing(bench: Bench, mark: str, stage: str) -> None:
    """Ctrl-C while it starts raises KeyboardInterrupt within 2 seconds, and everything started is gone."""
    block = endless(mark)
    launch: dict[str, Any] = {"command": FAKE, "env": {"FAKE": "silent child", "FAKE_MARK": mark}}
    runner = bench.runner()
    if stage == "setup":
        launch["setup"] = block
    elif stage == "login":
        runner = start_file(bench, "bash", block + "\n")
    pressed: list[float] = []

    main = threading.current_thread()

    def press() -> None:
        until(lambda: processes(mark), what="it is being started")
        # Not while subprocess starts the shell: Python cannot undo that for whom it interrupts there.
        until(lambda: is_waiting(main), what="the launch waits for it")
        if stage == "started":
            until(lambda: b'"started"' in runner.sessions[0].received)
        pressed.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)

    presser = threading.Thread(target=press)
    presser.start()
    with pytest.raises(KeyboardInterrupt):
        bench.start(runner, **launch)
    took = time.monotonic() - pressed[0]
    presser.join()
    assert took < 15
    until(lambda: not processes(mark), what="everything is gone")
    names = {thread.name for thread in threading.enumerate()}
    assert not any(name.startswith("bokeh_ssh lease") for name in names)
