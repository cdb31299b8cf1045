"""What we start imports no file of the home or of the directory that it runs in; the app has its own path."""

from __future__ import annotations

import html
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import types
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import paramiko
import pytest

import apps
import bokeh_ssh
from beds import Machine, until
from bokeh_ssh import DirectTunnel, Reconnected
from bokeh_ssh._cli.servers import find
from bokeh_ssh._core import python_path
from bokeh_ssh._core.events import Event
from bokeh_ssh._server.registry import list_servers
from bokeh_ssh._ssh.remote_shell import encode
from bokeh_ssh._tunnels.child_process import ChildSession
from bokeh_ssh._tunnels.host_publisher import _script
from local_runner import FAKE, Bench, LocalRunner, pythons
from programs import CLI, Program

pytestmark = pytest.mark.skipif(os.name != "posix", reason="it runs servers")

#: Names that people give their files, and that we, Bokeh or others need.
NAMES = ["array", "calendar", "copy", "email", "html", "json", "logging", "numpy", "queue", "random", "uuid"]
NAMES += ["select", "signal", "socket", "statistics", "struct", "tempfile", "token", "tornado"]
#: And some that Python itself has to find before it gets to a word of ours.
DEEP = ["bokeh_ssh", "codecs", "collections", "contextlib", "encodings", "enum", "importlib", "re", "runpy"]


def plant(folder: Path, names: Sequence[str] = (*NAMES, *DEEP)) -> Path:
    """Have a file of each name there, which says that it was run and then fails; gives where that is said."""
    said = folder / "said"
    code = f"open({str(said)!r}, 'a').write(__name__ + chr(10))\nraise ImportError('of the person')\n"
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / f"{name}.py").write_text(code)
    return said


def said_in(said: Path) -> list[str]:
    return said.read_text().split() if said.exists() else []


@pytest.fixture
def home(sshd: Callable[..., Machine], tmp_path: Path) -> tuple[Machine, Path, Path]:
    """A real sshd, the home of who logs in there, and where the files in it say that they were run."""
    folder = tmp_path / "theirs"
    said = plant(folder)
    entry = tmp_path / "entry"
    entry.write_text(
        f"#!/bin/sh\nHOME={folder}; export HOME; cd\nPATH={Path(sys.executable).parent}:$PATH\n"
        f'exec /bin/sh -c "$SSH_ORIGINAL_COMMAND"\n'
    )
    entry.chmod(0o755)
    variables = f"BOKEH_SSH_DIR={os.environ['BOKEH_SSH_DIR']}"
    return sshd(ForceCommand=str(entry), SetEnv=variables), folder, said


def test_server_beside_such_files_is_started_found_again_and_listed(
    home: tuple[Machine, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the home of the Bokeh host and in the directory here: the page opens, comes back, is listed."""
    machine, folder, said = home
    (folder / "sliders.py").write_text(apps.SLIDER)
    here = plant(tmp_path / "here")
    events: list[Event] = []
    login = {"user": machine.user, **machine.login}
    tunnel = DirectTunnel(machine.host, app="sliders.py", local_port=0, on_event=events.append, **login)
    with monkeypatch.context() as patch:
        patch.chdir(here.parent)
        patch.syspath_prepend("")
        tunnel.open()
    with tunnel:
        assert isinstance(tunnel._lifecycle.session, ChildSession), "it is held by a child process"
        assert said_in(said) == []
        apps.drive(tunnel.url)
        listed, _ = find(machine.host, None, events.append, login)
        assert [server.id for server in listed] == [tunnel.server]
        assert machine.server
        for path in Path("/proc").glob("[0-9]*/status"):
            if f"PPid:\t{machine.server.pid}\n" in path.read_text():
                os.kill(int(path.parent.name), signal.SIGKILL)
        until(lambda: any(isinstance(event, Reconnected) for event in events), what="the line to be back")
        assert [event.same_server for event in events if isinstance(event, Reconnected)] == [True]
        apps.drive(tunnel.url)
    assert said_in(said) == []
    assert said_in(here) == []
    assert find(machine.host, None, events.append, login) == ([], [])


def test_control_such_files_are_imported_where_they_may(tmp_path: Path) -> None:
    """``python -m`` in that directory, as it was run, does not get to Bokeh."""
    said = plant(tmp_path / "home")
    done = subprocess.run([sys.executable, "-m", "bokeh", "info"], cwd=said.parent, capture_output=True)
    assert done.returncode != 0
    assert said_in(said)


_PATH_APP = """
import json, os, sys
from bokeh.io import curdoc
curdoc().title = json.dumps({"path": sys.path, "variable": os.environ.get("PYTHONPATH"), "argv": sys.argv[1:],
                             "ours": [name for name in os.environ if name.startswith("BOKEH_SSH_P")]})
"""


def _title(url: str) -> Any:
    page = urllib.request.urlopen(url, timeout=20).read().decode()
    found = re.search(r"<title>(.*?)</title>", page, re.DOTALL)
    assert found
    return json.loads(html.unescape(found[1]))


@pytest.mark.parametrize("given", [None, ":lib:/somewhere:", ""])
def test_app_has_the_path_that_bokeh_gives_it(
    given: str | None, home: tuple[Machine, Path, Path], tmp_path: Path
) -> None:
    """What an app can import is what ``bokeh serve`` there lets it, with a PYTHONPATH of its own too."""
    machine, folder, said = home
    for path in folder.glob("*.py"):  # a PYTHONPATH with an empty word has Bokeh itself import them
        path.unlink()
    (folder / "app.py").write_text(_PATH_APP)
    env = {} if given is None else {"PYTHONPATH": given}
    with DirectTunnel(
        machine.host, machine.user, "app.py", env=env, args=["--args", "a"], local_port=0, **machine.login
    ) as tunnel:
        ours = _title(tunnel.url)
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | env
    script = Path(sys.executable).with_name("bokeh")
    with subprocess.Popen(
        [script, "serve", "--port", "0", "app.py", "--args", "a"],
        cwd=folder, env=variables, stderr=subprocess.PIPE, text=True,
    ) as server:  # fmt: skip
        try:
            assert server.stderr
            line = next(line for line in server.stderr if "running at" in line)
            theirs = _title(line.split()[-1])
        finally:
            server.kill()
    assert theirs["path"][:2] == [str(folder), str(script.parent)]  # the script's own directory, as always
    del theirs["path"][1]
    assert ours == theirs
    assert said_in(said) == []


def test_server_that_starts_itself_anew_does_so_without_them(home: tuple[Machine, Path, Path]) -> None:
    """With ``dev=True`` too, once the app has changed: it has the same path as before."""
    machine, folder, said = home
    app = folder / "app.py"
    app.write_text(_PATH_APP)
    login = {"user": machine.user, **machine.login}
    with DirectTunnel(machine.host, app="app.py", dev=True, local_port=0, **login) as tunnel:
        before = _title(tunnel.url)
        app.write_text(_PATH_APP.replace("sys.argv[1:]", "'new'"))

        def after() -> Any:
            try:
                found = _title(tunnel.url)
            except urllib.error.HTTPError as exc:
                exc.close()
            except OSError:
                pass  # it is not there just now
            else:
                return found if found["argv"] == "new" else None
            return None

        assert until(after, what="the new app")["path"] == before["path"]
    assert said_in(said) == []


@pytest.mark.parametrize(
    ("version", "given"),
    [
        *((version, ":") for version in ("3.8", "3.10", "3.13", "")),
        *(("", given) for given in (None, "{home}", "{home}/", ".:/nowhere", "/nowhere:")),
        ("3.8", "{home}"),
    ],
)
def test_no_path_leads_our_own_parts_there(version: str, given: str | None, bench: Bench) -> None:
    """Whatever PYTHONPATH is, supervisor and errand find their own modules; the server gets it as it was."""
    python = (pythons(version) or [""])[0] if version else sys.executable
    if not python:
        pytest.skip(f"there is no Python {version} here")
    said = plant(bench.path / "home")
    env = {**os.environ, "HOME": str(said.parent)}
    env.pop("PYTHONPATH", None)
    if given is not None:
        env["PYTHONPATH"] = given.format(home=said.parent)
    runner = LocalRunner(env=env, cwd=said.parent)
    bench.runners.append(runner)
    server = bench.start(runner, command=(FAKE[0], "-I", *FAKE[1:]), python=python)
    [found] = list_servers(runner, python=python)
    assert server.server_ref
    assert found.id == server.server_ref.id
    assert said_in(said) == []
    pairs = Path(f"/proc/{server.pid}/environ").read_text().split("\0")
    wanted = [f"PYTHONPATH={env['PYTHONPATH']}"] if given else []
    assert [pair for pair in pairs if "PYTHONPATH" in pair] == wanted


def test_publisher_takes_no_file_of_the_home(tmp_path: Path) -> None:
    """What dials the gateway from the Bokeh host runs, and says why it cannot; nothing beside it is run."""
    said = plant(tmp_path / "home")
    spec = {
        "mark": "MARK", "gateway": "127.0.0.1", "port": 1, "user": "me", "known_hosts": None, "timeout": 5,
        "forward": {"local_port": 1, "reconnect": False}, "places": [{"remote_port": 0}],
    }  # fmt: skip
    root = str(Path(apps.__file__).parents[2])
    path = os.environ.get("PYTHONPATH", root).split(os.pathsep)[0]
    for more in ("", f":{said.parent}", ":", ":."):
        done = subprocess.run(
            ["/bin/sh", "-c", 'IFS= read -r s; eval "$(printf %b "$s")"'],
            input=encode(_script([sys.executable], {"PYTHONPATH": path + more}, "MARK"))
            + json.dumps(spec).encode()
            + b"\n",
            cwd=said.parent,
            env={**os.environ, "HOME": str(said.parent)},
            capture_output=True,
            timeout=30,
        )
        assert b'MARK{"event": "error"' in done.stdout, done
        assert b"missing" not in done.stdout
        assert said_in(said) == []


@pytest.mark.parametrize("way", ["script", "-m"])
def test_command_line_beside_such_files(way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``bokeh-ssh demo`` opens its app, from a directory that is full of them.

    With ``python -m`` Python looks there for some of its own modules, before it gets to ours.
    """
    pytest.importorskip("asyncssh")
    said = plant(tmp_path / "here", NAMES + DEEP if way == "script" else NAMES)
    monkeypatch.chdir(said.parent)
    script = tmp_path / "bokeh-ssh"
    script.write_text("import sys\nfrom bokeh_ssh.__main__ import main\nsys.exit(main())\n")
    argv = CLI if way == "-m" else (sys.executable, str(script))
    with Program("demo", "--no-show", "--local-port", "0", argv=argv) as program:
        assert "bokeh_ssh demo" in apps.get(program.address())
        program.interrupt()
        assert program.end() == 0, program
    assert said_in(said) == []


def test_command_line_that_lies_with_all_it_needs_in_the_directory(tmp_path: Path) -> None:
    """``pip install --target .``, ``python -m`` there: it finds that, and the library's modules elsewhere."""
    said = plant(tmp_path / "here", [name for name in NAMES if name not in ("numpy", "tornado")])
    package = Path(bokeh_ssh.__file__).parent
    shutil.copytree(package, said.parent / package.name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in Path(paramiko.__file__).parents[1].iterdir():
        if package.name not in path.name:
            (said.parent / path.name).symlink_to(path)
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    program = [sys.executable, "-S", "-m", "bokeh_ssh", "up"]
    done = subprocess.run(program, cwd=said.parent, env=env, capture_output=True, text=True, timeout=30)
    assert "bokeh-ssh.toml" in done.stderr
    assert said_in(said) == []


def test_paths_that_lead_elsewhere_than_they_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A script that is a link runs beside the file it leads to; what is no text in the path is no place."""
    monkeypatch.chdir(tmp_path)
    real = tmp_path / "real"
    real.mkdir()
    (real / "tool.py").touch()
    (tmp_path / "tool").symlink_to(real / "tool.py")
    monkeypatch.setattr(sys.modules["__main__"], "__file__", str(tmp_path / "tool"), raising=False)
    monkeypatch.setattr(sys, "path", [str(real), real, None, *sys.path])
    assert str(real) not in json.loads(python_path.environment()["BOKEH_SSH_SEARCH"])[0]


@pytest.mark.parametrize("given", [None, "", ":/somewhere"])
def test_what_our_own_programs_start_has_the_path_of_the_person(
    given: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A ProxyCommand finds ``PYTHONPATH`` as it is; the program is this very package, wherever it lies."""
    said = plant(tmp_path / "here")
    monkeypatch.chdir(said.parent)
    monkeypatch.setattr(sys, "path", ["", "relative", str(said.parent), *sys.path])
    monkeypatch.delenv("PYTHONPATH", raising=False)
    if given is not None:
        monkeypatch.setenv("PYTHONPATH", given)
    run = "import bokeh_ssh; print(json.dumps([os.environ.get('PYTHONPATH'), sys.path, bokeh_ssh.__file__]))"
    env = os.environ | python_path.environment()
    done = subprocess.run(python_path.command(run), env=env, stdout=subprocess.PIPE, timeout=30)
    variable, path, package = json.loads(done.stdout)
    assert variable == given
    assert package == bokeh_ssh.__file__
    assert not {"", "relative", str(said.parent)} & set(path)
    assert set(sys.path) - set(path) >= {"", "relative", str(said.parent)}
    assert said_in(said) == []


#: What a script may have beside it: a kind of everything that a tunnel takes.
KINDS = """
import collections, enum, os, types

class Text(str):
    pass

class Policy(str, enum.Enum):
    ask = "ask"

class Number(int):
    pass

class Seconds(float):
    pass

class Place:
    def __init__(self, path):
        self.path = path

    def __fspath__(self):
        return Text(self.path)

class Table(collections.UserDict):
    pass

Pair = collections.namedtuple("Pair", "one other")
"""


def test_arguments_may_be_of_kinds_from_beside_the_script(
    embedded: Callable[..., Machine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The child process, which finds no file there, gets what they are otherwise; so it does with answers."""
    here = tmp_path / "here"
    here.mkdir()
    (here / "kinds_of_mine.py").write_text(KINDS)
    monkeypatch.chdir(here)
    monkeypatch.syspath_prepend(str(here))
    kinds: Any = importlib.import_module("kinds_of_mine")
    machine = embedded()
    known = tmp_path / "none yet"
    keywords = {
        "user": kinds.Text(machine.user),
        **machine.login,
        "port": kinds.Number(machine.port),
        "key_filename": kinds.Pair(kinds.Place(str(machine.key_path)), kinds.Place(str(machine.key_path))),
        "known_hosts": kinds.Place(str(known)),
        "host_keys": kinds.Policy.ask,
        "prompt": lambda question: kinds.Text("yes"),
        "timeout": kinds.Seconds(15),
        "env": kinds.Table({kinds.Text("OF_MINE"): kinds.Text("set")}),
        "setup": types.MappingProxyType({'[ "$OF_MINE" = "" ]': 1}).keys(),
        "python": kinds.Text(machine.python),
    }
    with DirectTunnel(
        kinds.Text(machine.host), launch=True, local_port=kinds.Number(0), **keywords
    ) as tunnel:
        assert isinstance(tunnel._lifecycle.session, ChildSession), "it is held by a child process"
        assert "Bokeh" in apps.get(tunnel.url)
    assert known.read_text()
