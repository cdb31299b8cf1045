"""What a person sets for all commands: variables and their own file, and which of all sources counts."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

import bokeh_ssh
from bokeh_ssh._cli.app import main
from bokeh_ssh._cli.options.flag import KINDS
from bokeh_ssh._cli.user_config import path_of_config, read_environment
from programs import run_here

pytestmark = pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What a tunnel gets, which is not opened."""
    found: dict[str, Any] = {}

    class Tunnel:
        def __init__(self, *args: Any, **keywords: Any) -> None:
            found.update(keywords, positional=args)
            raise bokeh_ssh.UsageError("enough")

    monkeypatch.setattr("bokeh_ssh._cli.run.DirectTunnel", Tunnel)
    monkeypatch.setattr("bokeh_ssh._cli.foreground.find_prompt", lambda: None)
    return found


def run(*words: str) -> None:
    """Run a command that makes a tunnel, or is refused."""
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2


def write(text: str, mode: int = 0o600) -> Path:
    """Write the person's file."""
    path = path_of_config()
    assert path
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(mode)
    return path


def test_flag_then_environment_then_project_then_own_file(
    given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each source counts where none before it says something: five settings, each from another one."""
    folder = tmp_path / "project"
    folder.mkdir()
    monkeypatch.chdir(folder)
    every = ("grace", "launch_timeout", "local_port", "cwd")
    own = {"grace": 4.0, "launch_timeout": 4.0, "local_port": 4004, "cwd": "/4"}
    write("\n".join(f"{name} = {json.dumps(value)}" for name, value in own.items()))
    (folder / "bokeh-ssh.toml").write_text(
        'host = "h"\ngrace = 3.0\nlaunch_timeout = 3.0\nlocal_port = 3003\n'
    )
    monkeypatch.setenv("BOKEH_SSH_GRACE", "2")
    monkeypatch.setenv("BOKEH_SSH_LAUNCH_TIMEOUT", "2")
    run("up", "--grace", "1")
    assert {name: given[name] for name in every} == {
        "grace": 1.0,
        "launch_timeout": 2.0,
        "local_port": 3003,
        "cwd": "/4",
    }
    assert "remote_port" not in given
    assert given["host_keys"] == "ask"
    run("direct", "h", "app.py")
    assert (given["grace"], given["local_port"]) == (2.0, 4004)


def test_every_kind_of_setting(given: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Truth, numbers, texts, lists and tables arrive as the keyword takes them, from both sources."""
    write(
        'jump = ["a", "b,c"]\nallow-agent = false\nenv = { A = "1" }\nsetup = "one"\nhost_keys = "strict"\n'
        '[forward]\ncwd = "/no"\n[direct]\ncwd = "/d"\ngpus = 2\n'
    )
    monkeypatch.setenv("BOKEH_SSH_LOOK_FOR_KEYS", "no")
    monkeypatch.setenv("BOKEH_SSH_ARGS", "--args 'x y'")
    monkeypatch.setenv("BOKEH_SSH_KEY_FILENAME", "k1\nk2")
    monkeypatch.setenv("BOKEH_SSH_UPLOAD", "")
    run("direct", "h", "--batch")
    assert given["batch"].gpus == 2
    assert given["jump"] == ("a", "b", "c")
    assert given["allow_agent"] is False
    assert given["look_for_keys"] is False
    assert given["env"] == {"A": "1"}
    assert given["setup"] == ("one",)
    assert given["args"] == ("--args", "x y")
    assert given["key_filename"] == ("k1", "k2")
    assert (given["host_keys"], given["cwd"]) == ("strict", "/d")
    assert "upload" not in given


def test_project_gets_nothing_that_weakens_a_check(
    given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For ``up`` the person's file opens nothing to others, as a flag does; what is stricter stays. Nor
    can a project use an ``upload`` of that file to have what is outside of its folder."""
    folder = tmp_path / "project"
    folder.mkdir()
    monkeypatch.chdir(folder)
    settings = folder / "bokeh-ssh.toml"
    settings.write_text('host = "theirs"\n')
    write("allow_others = true\nallow_any_origin = true\nsigned = true\n")
    run("up")
    assert not {"allow_others", "allow_any_origin"} & given.keys()
    assert given["signed"] is True  # stricter, so it stays
    run("up", "--allow-others")
    assert given["allow_others"] is True
    run("direct", "mine")
    assert given["allow_others"] is True
    given.clear()
    write("upload = true\n")
    settings.write_text('host = "theirs"\napp = "../../secret.py"\n')
    run("up")
    assert given == {}


@pytest.mark.parametrize(
    ("text", "mode", "said"),
    [
        ("local_prt = 1", 0o600, "did you mean local_port?"),
        ("local_port = 'x'", 0o600, "local_port is not a number"),
        ("password = 'x'", 0o600, "there is no setting 'password'"),
        ("local_port = ", 0o600, "is no TOML"),
        ("[dircet]\nupload = true", 0o600, "did you mean [direct]?"),
        ("local_port = 1", 0o622, "chmod go-w"),
    ],
)
def test_file_that_cannot_be(text: str, mode: int, said: str) -> None:
    """A file with a mistake, or that others may write, ends the command with 2, and names what to do."""
    write(text, mode)
    shown = run_here("direct", "h", code=2).stderr
    assert said in " ".join(shown.replace("│", " ").split()), shown


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("BOKEH_SSH_LOCAL_PORT", "x", "not a number"),
        ("BOKEH_SSH_UPLOAD", "maybe", "neither yes nor no"),
        ("BOKEH_SSH_LOCAL_PRT", "1", "BOKEH_SSH_LOCAL_PORT"),
        ("BOKEH_SSH_ARGS", "'", "split"),
    ],
)
def test_variable_that_cannot_be(name: str, text: str, said: str) -> None:
    """A variable with a mistake in its name or value is an error that names it; our own are no settings."""
    kinds = {key: KINDS[key] for key in ("local_port", "upload", "args")}
    with pytest.raises(bokeh_ssh.UsageError, match=said):
        read_environment(kinds, kinds, {name: text})
    assert read_environment(kinds, kinds, {"BOKEH_SSH_DIR": "/x", "OTHER": "1", name: ""}) == {}


def test_error_says_where_its_setting_comes_from(monkeypatch: pytest.MonkeyPatch) -> None:
    """What nobody typed is named with its source: the variable, else the file; what was typed has none."""
    path = write('host_keys = "accpet"\n')
    for source in (str(path), "BOKEH_SSH_HOST_KEYS"):
        shown = run_here("direct", "h", "app.py", code=2).stderr
        assert f"--host-keys comes from {source}" in " ".join(shown.split())
        monkeypatch.setenv("BOKEH_SSH_HOST_KEYS", "accpet")
    assert "comes from" not in run_here("direct", "h", "app.py", "--host-keys", "acept", code=2).stderr


def test_project_without_a_gateway_takes_nothing_for_one(
    given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is for a gateway is refused where it is typed, and left out where it is a default."""
    folder = tmp_path / "project"
    folder.mkdir()
    monkeypatch.chdir(folder)
    (folder / "bokeh-ssh.toml").write_text('host = "h"\n')
    write('reverse = "relay"\n')
    monkeypatch.setenv("BOKEH_SSH_NAME", "n")
    run("up")
    assert not {"reverse", "name"} & given.keys()
    assert "--name is for a way through a gateway" in run_here("up", "--name", "x", code=2).stderr


@pytest.mark.parametrize("command", ["ls", "stop", "doctor"])
def test_every_command_has_its_table(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What stands in a command's own table counts for it, and for no other."""
    write(f"[{command}]\nport = 70000\n")
    assert "port 70000" in run_here(command, "h", code=2).stderr.replace("--port", "port")
    monkeypatch.setenv("BOKEH_SSH_PORT", "70001")
    assert "70001" in run_here(command, "h", code=2).stderr


def test_batch_settings_wait_for_batch(given: dict[str, Any]) -> None:
    """What a job is to have may stand in the file for all; without ``--batch`` it means nothing."""
    write('account = "p1"\nqueue = "gpu"\n')
    run("direct", "h")
    assert "batch" not in given
    run("direct", "h", "--batch")
    assert given["batch"] == bokeh_ssh.Batch(account="p1", queue="gpu")


def test_settings_for_apps_wait_for_an_app(given: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """What is uploaded, or starts a server, may stand in the file for all; where none is started, it means
    nothing: ``bokeh-ssh h`` attaches, and ``publish -g h`` takes a server that runs."""
    write('upload = true\nbring = ["data"]\ndev = true\ndetach = true\ngrace = 5\n')
    monkeypatch.setenv("BOKEH_SSH_PYTHON", "/env/bin/python")
    monkeypatch.setenv("BOKEH_SSH_SETUP", "conda activate viz")
    run("direct", "h", "app.py")
    assert (given["upload"], given["dev"], given["detach"]) == (True, True, True)
    given.clear()
    run("direct", "h", "--attach")
    assert not {"upload", "bring", "dev", "detach"} & given.keys()
    assert given["python"] == "/env/bin/python"
    shown = run_here("publish", "-g", "h", "--dry-run")
    assert "Would open Publication of localhost port 5006" in shown.stderr
