"""``bokeh-ssh up``: what a project's file says, what it may not say, and that it is enough."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import apps
from beds import Machine
from bokeh_ssh import Batch, UsageError
from bokeh_ssh._cli.project_config import load
from programs import Program, login


def write(folder: Path, text: str, name: str = "bokeh-ssh.toml") -> Path:
    """Write a file of settings."""
    path = folder / name
    path.write_text(text)
    return path


def test_closest_file_counts(tmp_path: Path) -> None:
    """It is looked for from here upwards; a project without a table of ours is skipped."""
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    write(tmp_path, '[tool.bokeh-ssh]\nhost = "far"\napp = "x.py"\n', "pyproject.toml")
    write(inner, '[project]\nname = "it"\n', "pyproject.toml")
    found = load(None, inner)
    assert found.path == tmp_path / "pyproject.toml"
    assert found.keywords == {"host": "far", "app": ("x.py",)}
    write(tmp_path / "a", 'host = "near"\n')
    assert load(None, inner).keywords == {"host": "near"}


def test_paths_begin_at_the_file_where_they_are_of_this_machine(tmp_path: Path) -> None:
    """What is brought along is found wherever the command is run; a path of the other machine stays."""
    (tmp_path / "deep").mkdir()
    write(tmp_path, 'host = "h"\napp = "x.py"\nbring = "data"\n')
    assert load(None, tmp_path / "deep").keywords["app"] == (str(tmp_path / "x.py"),)
    assert load(None, tmp_path / "deep").keywords["bring"] == (str(tmp_path / "data"),)
    write(tmp_path, 'host = "h"\napp = "x.py"\n')
    assert load(None, tmp_path / "deep").keywords["app"] == ("x.py",)


def test_batch_job_of_a_project(tmp_path: Path) -> None:
    """A project says what its job needs: nothing more than true, a scheduler, or a table."""
    for text, batch in (
        ("true", Batch()),
        ('"slurm"', Batch(scheduler="slurm")),
        (
            '{ time = "2:00:00", queue = "gpu", gpus = 1, extra = ["--constraint=a100"] }',
            Batch(time="2:00:00", queue="gpu", gpus=1, extra=["--constraint=a100"]),
        ),
        ("false", None),
    ):
        write(tmp_path, f'host = "h"\napp = "x.py"\nbatch = {text}\nresubmit = true\nqueue-timeout = 60\n')
        found = load(None, tmp_path).keywords
        assert found["batch"] == batch
        assert (found["resubmit"], found["queue_timeout"]) == (True, 60)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("batch = 3", "neither true, nor a scheduler's name, nor a table"),
        ('batch = "nqs"', "'nqs' is not known"),
        ('batch = { tiem = "1:00" }', "batch has no 'tiem'"),
        ("batch = { gpus = 0 }", "gpus = 0 is not a number of them"),
        ('batch = { extra = "--mem=0" }', "extra is one string"),
        ("batch = { extra = 3 }", "batch: "),
        ('batch = true\ngateway = "g"', "batch is for a host that is logged in to directly"),
        ("batch = true\nqueue-timeout = 1e9", "queue_timeout"),
    ],
)
def test_batch_job_that_cannot_be_is_refused(tmp_path: Path, line: str, said: str) -> None:
    """What is no job is refused before anything is dialled, with the file's name."""
    write(tmp_path, f'host = "h"\napp = "x.py"\n{line}\n')
    with pytest.raises(UsageError, match=re.escape(said)) as caught:
        load(None, tmp_path)
    assert "bokeh-ssh.toml" in caught.value.message


def test_several_apps_share_what_is_common(tmp_path: Path) -> None:
    """Each has a name; what stands outside counts for all, and what an app says before that."""
    text = """
host = "h"
setup = ["module load python"]
launch-timeout = 90

[apps.small]
app = "small.py"

[apps.big]
app = ["big.py", "other.py"]
host = "node17"
jump = "gate"
env = { THREADS = "4" }
"""
    write(tmp_path, text)
    common = {"setup": ("module load python",), "launch_timeout": 90}
    assert load("small", tmp_path).keywords == {"host": "h", "app": ("small.py",), **common}
    assert load("big", tmp_path).keywords == {
        "host": "node17", "app": ("big.py", "other.py"), "jump": ("gate",), "env": {"THREADS": "4"}, **common,
    }  # fmt: skip
    assert load(None, tmp_path).keywords == {"host": "h", **common}
    write(tmp_path, 'host = "h"\napp = "a.py"\nargs = ["--num-procs", 2]')
    assert load(None, tmp_path).keywords["args"] == ("--num-procs", "2")
    (tmp_path / "bokeh-ssh.toml").unlink()
    write(tmp_path, '[tool.bokeh_ssh]\nhost = "h"', "pyproject.toml")
    with pytest.raises(UsageError, match=r"write \[tool.bokeh-ssh\]"):
        load(None, tmp_path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("host = ", "is no TOML"),
        ('app = "x.py"', "does not say where"),
        ('host = "h"\npassword = "x"', "password has no place"),
        ('host = "h"\nhost_keys = "accept-new"', "host_keys has no place"),
        ('host = "h"\nknown-hosts = "/dev/null"', "known_hosts has no place"),
        ('host = "h"\nappp = "x"', "no setting 'appp'"),
        ("host = h", 'texts are in quotes, as in app = "dashboard.py"'),
        ('host = "h"\ntimeout = 5', "timeout is no setting of a project; say it on the command line"),
        ('host = "h"\ngpus = "1"', "write it into a table called batch"),
        ('host = "h"\nupload = "yes"', "upload is not true or false"),
        ('host = "h"\nremote_port = true', "remote_port is not a number"),
        ('host = "h"\ngrace = "long"', "grace is not a number"),
        ('host = "h"\nsetup = [1]', "setup is not a list"),
        ('host = "h"\nenv = ["A"]', "env is not a table"),
        ("host = 5", "host is not a text"),
        ('host = "h"\nargs = ["--x", true]', "args is not a list of texts"),
        ('host = "h"\napps = "x"', "no table of tables"),
        ('host = "h"\nforward_agent = true', "forward_agent has no place"),
        ('host = "h"\nallow-others = true', "allow_others has no place"),
        ('host = "h"\nallow-any-origin = true', "allow_any_origin has no place"),
        ('host = "h"\nextra_origins = ["a:1", "*"]', 'extra_origins = "*" has no place'),
        ('host = "h"\nextra_origins = "*"', 'extra_origins = "*" has no place'),
        ('host = "h"\nsigned = false', "signed has no place"),
        ('host = "h"\nforwards = "*:80:localhost:80"', "loopback alone"),
        ('host = "h"\nforwards = ["80:localhost:80", "10.0.0.1:80:localhost:80"]', "loopback alone"),
        ('host = "h"\nextra_origins = ["evil.example:80"]', 'extra_origins = "evil.example:80" has no place'),
        ('host = "h"\nextra_origins = "*.localhost:80"', "extra_origins"),
        ('host = "h"\nextra_origins = "localhost:*"', "extra_origins"),
        ('host = "h"\nextra_origins = "localhost.evil.example:80"', "extra_origins"),
        ('host = "h"\nextra_origins = "localhost:80@evil.example"', "extra_origins"),
        ('host = "h"\nextra_origins = "http://evil.example"', "extra_origins"),
        ('host = "h"\nextra_origins = "localhost:80\\n"', "extra_origins"),
        ('host = "h"\nextra_origins = "localhost:70000"', "extra_origins"),
        ('host = "h"\nextra_origins = ""', "extra_origins"),
        ('host = "h"\nforwards = "/home/me/.ssh/agent:localhost:80"', "not on the socket"),
        ('host = "h"\nforwards = "x/y:/run/other"', "not on the socket"),
        ('host = "h"\nforwards = ":80:localhost:80"', "loopback alone"),
        ('host = "h"\nforwards = "70000:localhost:80"', "no valid port"),
        ('host = "h"\nforwards = "nonsense"', "forwards: 'nonsense' is not a forward"),
        ('host = "h"\nargs = ["--allow-websocket-origin=*"]', "args may not have '--allow-websocket-origin"),
        ('host = "h"\nargs = ["--allow-websocket-origin", "*"]', "args may not have"),
        ('host = "h"\nargs = ["--allow-w=*"]', "args may not have"),
        ('host = "h"\nargs = "--allow-websocket-origin=*"', "args may not have"),
        ('host = "h"\nargs = ["--args=x", "--allow-websocket-origin=*"]', "args may not have"),
        ('host = "h"\nargs = ["--session-ids", "unsigned"]', "args may not have"),
        ('host = "h"\nargs = ["--session-i=unsigned"]', "args may not have"),
        ('host = "h"\nargs = ["--addr", "0.0.0.0"]', "--address cannot be given"),
        ('host = "h"\ncommand = "bokeh serve --allow-websocket-origin=*"', "command may not have"),
        ('host = "h"\ncommand = "bokeh serve --args"', "--args cannot be given in command"),
        ('host = "h"\ncommand = "bokeh \\"serve"', "command = "),
        ('host = "h"\nenv = { BOKEH_ALLOW_WS_ORIGIN = "*" }', "env may not set BOKEH_ALLOW_WS_ORIGIN"),
        ('host = "h"\nenv = { BOKEH_SECRET_KEY = "known" }', "env may not set BOKEH_SECRET_KEY"),
        ('host = "h"\nenv = { BOKEH_SSH_DIR = "/tmp/x" }', "env may not set BOKEH_SSH_DIR"),
        ('host = "h"\n[env]\nBOKEH_SIGN_SESSIONS = "no"', "env may not set BOKEH_SIGN_SESSIONS"),
        ('host = "h"\nenv = { "A=B" = "c" }', "env: 'A=B' is not the name"),
        ('host = "h"\ngrace = inf', "grace is not from 0 to 604800 seconds"),
        ('host = "h"\ngrace = -inf', "grace is not from 0"),
        ('host = "h"\ngrace = nan', "grace is not from 0"),
        ('host = "h"\ngrace = -1', "grace is not from 0"),
        ('host = "h"\ngrace = 604801', "grace is not from 0"),
        (f'host = "h"\ngrace = 1{"0" * 400}', "grace is not from 0"),
        (f'host = "h"\ngrace = 1{"0" * 5000}', "is no TOML"),
        ('host = "h"\ngrace = true', "grace is not a number"),
        ('host = "h"\nlaunch-timeout = inf', "launch_timeout is not from 0"),
        ('host = "h"\nlocal_port = 65536', "local_port = 65536 is not a port"),
        ('host = "h"\nlocal_port = -1', "local_port = -1 is not a port"),
        ('host = "h"\nremote_port = 70000', "remote_port = 70000 is not a port"),
        ('host = "h"\nremote_port = 5006.0', "remote_port is not a number"),
        ('host = "h"\nport = 0', "port = 0 is not a port"),
        ('gateway = "g"\ngateway_port = 99999', "gateway_port = 99999 is not a port"),
        ('gateway = "g"\nhost = "h"\ngateway_port = 7000', "gateway_port opens a port"),
        (
            'gateway = "g"\nhost = "h"\ngateway_port = 0\napp = "a"\ncommand = "x {port}"',
            "gateway_port opens",
        ),
        ('host = "h"\nname = "x"', "name is for a way through a gateway"),
        ('host = "h"\ngateway_port = 7000\napp = "x.py"', "gateway_port is for a way through a gateway"),
        ('gateway = "g"\nreverse = "me"', "reverse = 'me' is not known"),
        ('gateway = "g"\nname = "../x"', "name: "),
        ('host = "-oProxyCommand=x"', "host: "),
        ('host = "h"\njump = ["a", "b c"]', "jump: "),
        ('host = "h"\nuser = "a;b"', "user: "),
        (
            'host = "h"\ndetach = true',
            "detach has no place in a project, which may not leave anything running",
        ),
        (
            'host = "h"\ncommand = "env BOKEH_ALLOW_WS_ORIGIN=* bokeh serve"',
            "may not set BOKEH_ALLOW_WS_ORIGIN",
        ),
        ('host = "h"\ncommand = "env BOKEH_SSH_DIR=/tmp/x bokeh serve"', "may not set BOKEH_SSH_DIR"),
        ('host = "h"\nenv = { PANEL_COOKIE_SECRET = "known" }', "may not set PANEL_COOKIE_SECRET"),
        ('host = "h"\ncommand = "panel serve --cookie-secret=known"', "command may not have"),
        ('host = "h"\nargs = ["--cookie-s", "known"]', "args may not have"),
        ('host = "h"\nisolate = false', "no setting 'isolate'"),
        ('host = "h"\nallow_agent = true', "allow_agent is no setting"),
        ('host = "h"\nforward-agent = false', "forward_agent has no place"),
        ('[apps.a]\nhost = "h"\nallow-others = true', "allow_others has no place"),
        ('extra-origins = "*"\n[apps.a]\nhost = "h"', "extra_origins"),
        ('[apps.a]\nhost = "h"\n[apps.b]\nhost = "h"', "several apps: a, b"),
    ],
)
def test_what_it_may_not_say_is_told(tmp_path: Path, text: str, said: str) -> None:
    """An error names the file and what is wrong. What logs a person in is not a project's business."""
    path = write(tmp_path, text)
    with pytest.raises(UsageError) as caught:
        load(None, tmp_path)
    assert said in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("typed", [{}, {"command": "x {port}"}, {"signed": False}, {"host": "other"}])
def test_what_is_typed_lowers_no_guard_with_what_the_file_says(tmp_path: Path, typed: dict[str, Any]) -> None:
    """A port of the gateway that the file opens asks for signed sessions, whatever else is given."""
    write(tmp_path, 'gateway = "g"\nhost = "h"\ngateway_port = 7000\napp = "x.py"\n')
    if typed.keys() <= {"host"}:
        assert load(None, tmp_path, typed).keywords["gateway_port"] == 7000
    else:
        with pytest.raises(UsageError, match="gateway_port opens a port"):
            load(None, tmp_path, typed)
    assert load(None, tmp_path, typed | {"gateway_port": 7001})  # the control: the person's own affair


@pytest.mark.skipif(os.name != "posix", reason="files that are none")
@pytest.mark.parametrize("name", ["bokeh-ssh.toml", "pyproject.toml"])
@pytest.mark.parametrize("kind", ["fifo", "endless", "long", "folder"])
def test_what_is_no_file_of_settings_is_neither_waited_for_nor_read(
    name: str, kind: str, tmp_path: Path
) -> None:
    """Others may have put it above where a person works: it is named, and ``up`` does not hang or grow."""
    path, inner = tmp_path / name, tmp_path / "inner"
    inner.mkdir()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "endless":
        path.symlink_to("/dev/zero")
    elif kind == "long":
        path.touch()
        os.truncate(path, 1 << 40)
    else:
        path.mkdir()
    with pytest.raises(UsageError, match=rf"{path} is (a folder, and )?no file of settings"):
        load(None, inner)
    write(inner, 'host = "h"\n')
    assert load(None, inner).path.parent == inner


def test_directory_that_is_gone_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no project then, and no traceback either."""

    def gone() -> Path:
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr(Path, "cwd", gone)
    with pytest.raises(UsageError, match="current directory cannot be looked at"):
        load(None)


@pytest.mark.parametrize(
    "line",
    [
        'extra_origins = ["localhost:8000", "127.0.0.1:1", "[::1]:65535", "a.localhost", "localhost"]',
        'forwards = ["8787:localhost:8787", "[::1]:0:db:5432", "127.0.0.1:1:[::1]:2", "9000:/run/a"]',
        'args = ["--prefix", "x", "--num-procs=2", "--args", "--allow-websocket-origin=*", "--session-ids"]',
        'command = "panel serve --warm"',
        'command = "streamlit run --server.port={port}"',
        'env = { DATA = "/scratch", BOKEH_RESOURCES = "cdn", http_proxy = "p" }',
        "grace = 604800",
        "grace = 0.5\nlaunch_timeout = 300",
        "local_port = 0\nremote_port = 65535",
        'gateway = "g"\ngateway_port = 7000\napp = "x.py"',
        'setup = ["module load python", "export A=b"]\ncwd = "~/x"\npython = "~/venv/bin/python"',
        'jump = ["a", "me@b:22"]\nuser = "me"\nport = 2222',
    ],
)
def test_what_lowers_nothing_may_stand_there(tmp_path: Path, line: str) -> None:
    """The control: what an app needs is taken, and what concerns this machine alone."""
    write(tmp_path, f'host = "h"\n{line}\n')
    assert set(load(None, tmp_path).keywords) >= {line.partition(" ")[0], "host"}


def test_app_of_the_file_is_not_brought_from_outside_by_a_flag(tmp_path: Path) -> None:
    """``--upload`` of the person's own brings the project's app, and nothing else that its file names."""
    write(tmp_path, 'host = "h"\napp = "../other"\n')
    assert load(None, tmp_path).keywords["app"] == ("../other",)  # the control: a path of the other machine
    for flag in ("upload", "bring"):
        with pytest.raises(UsageError, match="leads out of"):
            load(None, tmp_path, {flag: True})
    write(tmp_path, 'host = "h"\napp = "x.py"\n')
    assert load(None, tmp_path, {"upload": True}).keywords["app"] == (str(tmp_path / "x.py"),)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="gives files to other users")
def test_file_of_another_user_is_not_met_by_chance(tmp_path: Path) -> None:
    """What others have put above where a person works is refused; their project is not, in its own folder."""
    inner = tmp_path / "shared" / "mine"
    inner.mkdir(parents=True)
    path = write(tmp_path / "shared", 'host = "h"\n')
    assert load(None, inner).path == path  # the control: one's own
    os.chown(path, 12345, 12345)
    with pytest.raises(UsageError, match=f"{path} belongs to another user"):
        load(None, inner)
    assert load(None, inner.parent).path == path
    inner.parent.chmod(0o1777)  # as /tmp is
    with pytest.raises(UsageError, match=f"{path} belongs to another user"):
        load(None, inner.parent)
    os.chown(path, 0, 0)
    path.chmod(0o666)
    with pytest.raises(UsageError, match=f"{path} can be written by every user"):
        load(None, inner.parent)


@pytest.mark.parametrize("path", ["/etc/passwd", "../other", "a/../../other", "link", "loop", "a\\u0000b"])
def test_nothing_from_outside_is_brought(tmp_path: Path, path: str) -> None:
    """A project of somebody else's takes no file of the person's along, by no path and no link."""
    project = tmp_path / "project"
    project.mkdir()
    (tmp_path / "other").write_text("mine")
    (project / "link").symlink_to(tmp_path / "other")
    (project / "loop").symlink_to(project / "loop")
    for text in (
        f'host = "h"\napp = "x.py"\nbring = "{path}"\n',
        f'host = "h"\nupload = true\napp = "{path}"\n',
    ):
        write(project, text)
        with pytest.raises(UsageError, match=r"bokeh-ssh\.toml: (app|bring).*(leads out of|NUL)"):
            load(None, project)
    write(project, 'host = "h"\napp = "x.py"\nbring = "."\nsigned = true\nforwards = "80:localhost:80"\n')
    assert (
        load(None, project).keywords["signed"] is True
    )  # the control: what is inside, and what adds a guard


def test_nothing_to_open_is_told(tmp_path: Path) -> None:
    """Without a file, and with a name that is not in it, there is a next step."""
    with pytest.raises(UsageError, match=r"no bokeh-ssh\.toml here"):
        load(None, tmp_path)
    write(tmp_path, 'host = "h"\n[apps.a]\napp = "a.py"\n')
    with pytest.raises(UsageError, match=r"no app 'b' \(there are a\)"):
        load("b", tmp_path)


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_up_is_enough(
    embedded: Callable[..., Machine], tmp_path: Path, account: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the login in the ssh config and the rest in the project, one word opens the app; flags first."""
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    machine = embedded(env={"PATH": path, "BOKEH_SSH_DIR": os.environ["BOKEH_SSH_DIR"]})
    config = f"""
Host cluster
  HostName {machine.host}
  Port {machine.port}
  User {machine.user}
  IdentityFile {machine.key_path}
  UserKnownHostsFile {machine.known_hosts}
"""
    (account / ".ssh" / "config").write_text(config)
    (account / ".ssh" / "config").chmod(0o600)
    project = tmp_path / "project"
    (project / "notes").mkdir(parents=True)
    (project / "sliders.py").write_text(apps.SLIDER)
    write(
        project,
        '[tool.bokeh-ssh]\nhost = "cluster"\napp = "sliders.py"\nupload = true\nlocal_port = 1\n',
        "pyproject.toml",
    )
    monkeypatch.chdir(project / "notes")
    with Program("up", "--local-port", "0") as program:
        address = program.address()
        assert address.endswith("/sliders")
        apps.drive(address)
        program.expect("pyproject.toml says")
        program.interrupt()
        assert program.end() == 0, program
    with Program("up", "nothing", *login(machine)) as program:
        assert program.end() == 2, program
    assert "no app 'nothing'" in program.stderr
