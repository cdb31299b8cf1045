"""What people type out of habit, and the help that they read."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from urllib.request import urlopen

import pytest

import apps
import fakes
from beds import Machine, free_port
from bokeh_ssh._cli.app import app
from bokeh_ssh._version import DOCUMENTATION
from fakes import Listener
from programs import Program, login, run_here, unkeyed

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals and terminals of POSIX")

COMMANDS = [each.name or each.callback.__name__ for each in app.registered_commands if each.callback]


@pytest.fixture
def machine(embedded: Callable[..., Machine]) -> Machine:
    """A machine on which the tests' own Python is the first."""
    return embedded(env={"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"})


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_a_screen(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """``--help`` is a screen with examples; ``--help-all`` has the rest, where there is a rest."""
    monkeypatch.setenv("COLUMNS", "80")
    short = run_here(command, "--help").stdout
    code, whole, _ = run_here(command, "--help-all", code=None)
    more = code == 0
    assert len(short.splitlines()) <= 48
    assert "<str>" not in short + whole
    assert "<bool>" not in short + whole
    assert ("--help-all" in short) == more
    if more:
        assert len(whole) > len(short)
        assert "--json" in whole
        assert "--json" not in short
        assert ("Examples" in short) == (command != "demo")
        assert (f"more at {DOCUMENTATION}" in short) == (command != "demo")
    if command == "up":
        assert "[tool.bokeh-ssh]" in short


@pytest.mark.parametrize("columns", [60, 80, None])
def test_help_begins_with_the_shortest_way(columns: int | None) -> None:
    """The help of all commands fits a terminal or a pipe; its first example is a machine and an app."""
    with Program("--help", env={"COLUMNS": str(columns)} if columns else {}) as program:
        assert program.end() == 0
    lines = program.stdout.splitlines()
    examples = program.stdout.partition("Examples")[2].splitlines()
    assert examples[1].strip() == "bokeh-ssh HOST app.py"
    assert f"more at {DOCUMENTATION}" in program.stdout
    assert max(map(len, lines)) <= (columns or 80)
    assert "<bool>" not in program.stdout
    assert "--install-completion " in program.stdout, "no option is cut"


def test_no_flag_where_it_means_nothing() -> None:
    """What ``doctor`` starts is ended at once, so there is no grace to give."""
    shown = run_here("doctor", "--help-all").stdout
    assert "--setup" in shown
    assert "--grace" not in shown


@pytest.mark.parametrize("first", ["127.0.0.1", "somebody@127.0.0.1", "-v"])
def test_machine_in_place_of_a_command_is_direct(first: str) -> None:
    """``bokeh-ssh me@host app.py`` is the shortest way; a flag may come first."""
    words = ["app.py", "-p", str(free_port()), "-F", "none"]
    with Program(first, *(["127.0.0.1"] if first == "-v" else []), *words) as program:
        assert program.end() == 1, program
    assert "cannot connect to 127.0.0.1" in program.stderr


def test_slip_of_the_hand_is_no_machine() -> None:
    """A command that is nearly one is told, and nothing is connected to."""
    shown = run_here("diretc", "me@127.0.0.1", code=2).stderr
    assert "No such command 'diretc'" in shown
    assert "Connecting" not in shown


def test_alias_alone_is_a_machine(account: Path) -> None:
    """An alias of the ssh config is a machine with nothing behind it too, as for ``ssh``; and one that is
    nearly a command."""
    config = f"Host box stpo\n  HostName 127.0.0.1\n  Port {free_port()}\n"
    (account / ".ssh" / "config").write_text(config)
    for words in (["box"], ["stpo", "--quiet"]):
        with Program(*words) as program:
            assert program.end() == 1, program
        assert "cannot connect to 127.0.0.1" in program.stderr


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["app.py", "me@127.0.0.1"], "name the machine first"),
        (["serve", "127.0.0.1", "app.py"], "Name the machine first"),
        (["127.0.0.1:app.py"], "a path is given apart from the host"),
        (["5006:localhost:5006", "me@127.0.0.1"], "bokeh-ssh forward me@127.0.0.1 -L 5006:localhost:5006"),
        (["http://127.0.0.1:5006/app"], "--remote-port"),
        (["127.0.0.1", "-N"], "Leave it out"),
        (["127.0.0.1", "--", "app.py"], "name an app before it"),
        (["--quiet", "doctor", "app.py"], "name the machine first"),
        (["127.0.0.1", "app.py", "--autoreload"], "It is --dev here"),
        (["127.0.0.1", "app.py", "-tt"], "Leave it out"),
        (["127.0.0.1", "app.py", "-w", "4"], "one of ssh into ~/.ssh/config"),
        (
            ["127.0.0.1", "app.py", "--num-threads=4"],
            "No such option: --num-threads. An option of the server",
        ),
        (["https://127.0.0.1/user/me/app"], "is not a host name"),
        (["me@127.0.0.1:22:~/app.py"], "a path is given apart from the host"),
        (["lab", "me@127.0.0.1"], "Name the machine first"),
        (["kill", "127.0.0.1"], "No such command 'kill'. It is stop here"),
        (["ps"], "It is ls here"),
        (["--json", "kill", "127.0.0.1"], "It is stop here"),
        (["-M", "0", "-NL", "5006:localhost:5006", "127.0.0.1"], "a lost connection is made again"),
        (["doctor", "app.py"], "name the machine first"),
        (["forward", "127.0.0.1", "8888"], "--remote-port"),
        (["127.0.0.1", "app.py", "--local-port", "50x"], "'50x' is not a whole number"),
        (["127.0.0.1", "app.py", "--timeout", "soon"], "'soon' is not a number"),
        (["127.0.0.1", "app.py", "--host-keys", "no"], "'--host-keys': 'no' is not one of"),
        (["stop", "nowhere.invalid"], "no tunnel of this machine is named nowhere.invalid either"),
        (["127.0.0.1", "app.py", "--upload", "--args", "--year", "2024"], "written last, after --"),
        (["127.0.0.1", "app.py", "--allow-websocket-origin=*"], "--extra-origins"),
    ],
)
def test_habits_of_other_programs_are_answered(
    words: list[str],
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What ``scp``, ``ssh``, ``bokeh serve`` and browsers take is told how it is said here."""
    monkeypatch.chdir(tmp_path)
    Path("app.py").touch()
    monkeypatch.setenv("COLUMNS", "200")
    if words[0] == "stop":
        with Program(*words) as program:
            assert program.end() != 0, program
        shown = program.stderr
        assert "Connecting" in shown
    else:
        code, out, shown = run_here(*words, code=None)
        shown += out
        assert code != 0
        assert "Connecting" not in shown
    assert told in shown


@pytest.mark.parametrize("app", ["5006", "localhost:5006", "http://localhost:5006/app"])
def test_address_in_place_of_an_app_is_told(machine: Machine, app: str) -> None:
    """An address that runs already is opened by its port."""
    with Program("direct", machine.host, app, *login(machine)) as program:
        assert program.end() == 1, program
    assert "is no app" in program.stderr
    assert "--remote-port 5006" in program.stderr


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["panel", "serve", "app.py"], "leave out panel"),
        (["jupyter", "lab"], "--command 'jupyter lab --no-browser --port {port}'"),
        (["streamlit", "run", "app.py"], "--command 'streamlit run app.py"),
        (["app.py", "--args", "--year", "2024"], "-- --args --year 2024"),
        (["app"], "app.py is on this machine: upload it with --upload"),
        (["other.py", "app.py"], "a path of that machine"),
    ],
)
def test_app_that_is_not_there_is_told_by_what_is_missing(
    machine: Machine, words: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next step is about the word that is no app there: a command's, a module's, or a path of nowhere."""
    monkeypatch.chdir(tmp_path)
    Path("app.py").touch()
    with Program("direct", machine.host, *words, *login(machine)) as program:
        assert program.end() == 1, program
    assert told in program.stderr
    assert ("app.py is on this machine" in program.stderr) == (words == ["app"])


def test_usage_names_a_machine_plainly() -> None:
    """What must be typed stands in the usage as it is: braces would be a set of words to choose from."""
    assert "Usage: bokeh-ssh attach [OPTIONS] HOST [NAME]" in run_here("attach", code=2).stderr


def test_other_half_names_the_port(machine: Machine) -> None:
    """Who asks for a port of the gateway, on which there is nothing, is told to publish on that one."""
    port = str(free_port())
    shown = run_here("gateway", machine.host, "--gateway-port", port, *login(machine), code=1).stderr
    assert f"publish app.py --gateway {machine.host} --remote-port {port}" in " ".join(shown.split())


def test_warning_names_flags(machine: Machine) -> None:
    """A warning of the library is worded for who types, as errors are."""
    words = ("--command", "python3 -m http.server --bind 127.0.0.1 {port}", "--local-port", "0")
    with Program("direct", machine.host, *words, *login(machine)) as program:
        program.address()
        program.expect("write {socket} into --command in place of {port}")


def test_forward_of_the_apps_own_port_is_told(machine: Machine) -> None:
    """Who names the app's port as for ``ssh -L`` meets the tunnel's own port; that is no other program's."""
    port = free_port()
    words = ("--local-port", str(port), "-L", f"{port}:localhost:5006")
    with Program("direct", machine.host, *words, *login(machine)) as program:
        assert program.end() == 1, program
    assert "leave out -L, which is for other ports" in program.stderr


@pytest.mark.parametrize("word", ["help", "version", "-V", "-help", "-version"])
def test_help_and_version_have_other_names(word: str) -> None:
    """Words of other programs for both."""
    shown = run_here(word, *(["stop"] if word == "help" else [])).stdout
    assert {"help": "bokeh-ssh stop", "-help": "bokeh-ssh HOST app.py"}.get(word, "bokeh-ssh 0") in shown


@pytest.mark.parametrize(("command", "server"), [("direct", True), ("publish", True), ("ls", False)])
def test_option_of_the_server_is_told_where_it_goes(command: str, server: bool) -> None:
    """An option that is none of ours may be the server's; it goes after ``--``."""
    shown = run_here(command, "me@127.0.0.1", "--num-procs", "2", code=2).stderr
    assert "No such option: --num-procs" in shown
    assert ("after --" in shown) == server


def test_option_of_other_commands_is_no_servers() -> None:
    """One of ours that the command has no use for is not told to go after ``--``."""
    shown = run_here("doctor", "me@127.0.0.1", "--grace", "3", code=2).stderr
    assert "option of other commands" in shown
    assert "after --" not in shown


def test_timeout_is_told_by_its_flag() -> None:
    """A server that does not answer in time has its own next step, also where a port was typed."""
    with Listener(fakes.stay) as silent:
        words = ("-p", str(silent.port), "-F", "none", "--timeout", "1")
        shown = run_here("direct", "127.0.0.1", "app.py", *words, code=1).stderr
    assert "give a longer --timeout; and --port is" in " ".join(shown.split())


@pytest.mark.parametrize("words", [["app.py"], []])
def test_port_that_is_not_the_apps_is_told(words: list[str]) -> None:
    """``--port`` is the SSH server's; whoever names an app beside it may have meant another."""
    with Program("direct", "127.0.0.1", *words, "-p", str(free_port()), "-F", "none") as program:
        assert program.end() == 1
    assert ("--remote-port" in program.stderr) == bool(words)


def test_hints_are_for_projects_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a project's file says counts as if it were typed."""
    monkeypatch.chdir(tmp_path)
    Path("bokeh-ssh.toml").write_text(f'host = "127.0.0.1"\nport = {free_port()}\napp = "app.py"\n')
    with Program("up", "-F", "none") as program:
        assert program.end() == 1, program
    assert "port is the SSH server's; for the app's port, use --remote-port" in program.stderr


def test_app_that_is_only_here_is_told(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A path that is on this machine and not on the other is to be uploaded; the control is on neither."""
    monkeypatch.chdir(tmp_path)
    Path("local.py").write_text(apps.SLIDER)
    with Program("direct", machine.host, "local.py", *login(machine)) as program:
        assert program.end() == 1, program
    assert "upload it with --upload" in program.stderr
    with Program("direct", machine.host, "nowhere.py", *login(machine)) as program:
        assert program.end() == 1, program
    assert "--upload" not in program.stderr


@pytest.mark.parametrize("what", ["beside", "deeper", "module", "nowhere"])
def test_what_was_not_uploaded_with_the_app_is_told(machine: Machine, tmp_path: Path, what: str) -> None:
    """An app that misses a file or a module which is beside it on this machine is told to bring it; the
    control misses what is nowhere."""
    folder = tmp_path / "my work"
    (folder / "data").mkdir(parents=True)
    for name in ("table.csv", "data/deep.csv", "helper.py"):
        (folder / name).touch()
    text, wanted = {
        "beside": ("open('table.csv')", "table.csv"),
        "deeper": ("import pathlib\nopen(pathlib.Path(__file__).with_name('data') / 'deep.csv')", "data"),
        "module": ("import helper", "helper.py"),
        "nowhere": ("open('other.csv')", ""),
    }[what]
    (folder / "app.py").write_text(text)
    with Program("direct", machine.host, str(folder / "app.py"), "--upload", *login(machine)) as program:
        program.expect("http://localhost")
        with contextlib.suppress(OSError):
            urlopen(
                next(word for word in program.stdout.split() if word.startswith("http")), timeout=30
            ).close()
        program.expect("Error")
        if wanted:
            program.expect(f"--bring '{folder / wanted}'")  # as a shell takes it
        program.interrupt()  # else its server would be left for the grace time
        assert program.end(60) == 0, program
    assert ("--bring" in program.stderr) == bool(wanted)


def test_slips_in_a_host_are_told(machine: Machine, tmp_path: Path) -> None:
    """A name that is nearly one of the ssh config, and a password typed into the host, are told."""
    config = tmp_path / "config"
    config.write_text("Host gpubox\n")
    with Program("gpubxo", "app.py", "-F", str(config)) as program:
        assert program.end() == 1, program
    assert "did you mean gpubox" in program.stderr
    for command in ("ls", "doctor"):
        shown = run_here(command, "gpubxo", "-F", str(config), code=1)
        assert "did you mean gpubox" in shown.stderr + shown.stdout
    flags = [word for word in unkeyed(machine) if word not in ("-l", machine.user)]
    with Program("direct", f"me:pw@{machine.host}", "app.py", *flags) as program:
        assert program.end() == 1, program
    assert "write no password into the host" in program.stderr


@pytest.mark.parametrize(("name", "meant"), [("uplaod", "upload"), ("hots", "host"), ("zzz", "")])
def test_nearest_setting_is_told(
    name: str,
    meant: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A setting that there is not is told with the nearest one, and with all where none is near."""
    monkeypatch.chdir(tmp_path)
    Path("bokeh-ssh.toml").write_text(f'{name} = "x"\n')
    shown = run_here("up", code=2).stderr
    assert f"there is no setting '{name}'" in shown
    assert (f"did you mean {meant}?" if meant else "there are") in shown
