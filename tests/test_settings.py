"""``bokeh-ssh up``: what a project's file says, what it may not say, and that it is enough."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import apps
from beds import Machine
from bokeh_ssh import UsageError
from bokeh_ssh._settings import load
from programs import Program, login


def write(folder: Path, text: str, name: str = "bokeh-ssh.toml") -> Path:
    """Write a file of settings."""
    path = folder / name
    path.write_text(text)
    return path


def test_closest_file_counts(tmp_path: Path) -> None:
    """It is looked for from here upwards; a project without a table of ours is passed over."""
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


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("host = ", "is no TOML"),
        ('app = "x.py"', "does not say where"),
        ('host = "h"\npassword = "x"', "password has no place"),
        ('host = "h"\nhost_keys = "accept-new"', "host_keys has no place"),
        ('host = "h"\nknown-hosts = "/dev/null"', "known_hosts has no place"),
        ('host = "h"\nappp = "x"', "no setting 'appp'"),
        ('host = "h"\nupload = "yes"', "upload is not true or false"),
        ('host = "h"\nremote_port = true', "remote_port is not a number"),
        ('host = "h"\ngrace = "long"', "grace is not a number"),
        ('host = "h"\nsetup = [1]', "setup is not a list"),
        ('host = "h"\nenv = ["A"]', "env is not a table"),
        ("host = 5", "host is not a text"),
        ('host = "h"\napps = "x"', "no table of tables"),
        ('host = "h"\nforward_agent = true', "forward_agent has no place"),
        ('host = "h"\nallow-others = true', "allow_others has no place"),
        ('host = "h"\nallow-any-origin = true', "allow_any_origin has no place"),
        ('host = "h"\nextra_origins = ["a:1", "*"]', 'extra_origins = "*" has no place'),
        ('host = "h"\nextra_origins = "*"', 'extra_origins = "*" has no place'),
        ('host = "h"\nsigned = false', "signed has no place"),
        ('host = "h"\nforwards = "*:80:localhost:80"', "loopback alone"),
        ('host = "h"\nforwards = ["80:localhost:80", "10.0.0.1:80:localhost:80"]', "loopback alone"),
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


@pytest.mark.parametrize("path", ["/etc/passwd", "../other", "a/../../other", "link"])
def test_nothing_from_outside_is_brought(tmp_path: Path, path: str) -> None:
    """A project of somebody else's takes no file of the person's along, by no path and no link."""
    project = tmp_path / "project"
    project.mkdir()
    (tmp_path / "other").write_text("mine")
    (project / "link").symlink_to(tmp_path / "other")
    for text in (
        f'host = "h"\napp = "x.py"\nbring = "{path}"\n',
        f'host = "h"\nupload = true\napp = "{path}"\n',
    ):
        write(project, text)
        with pytest.raises(UsageError, match="leads out of"):
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
