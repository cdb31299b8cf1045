"""Bringing an app along: what goes, where it is, what becomes of it, and that changes follow."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

import apps
from beds import Knobs, Machine, until
from bokeh_ssh import (
    DirectTunnel,
    Event,
    GatewayTunnel,
    Host,
    LaunchError,
    Reconnected,
    Updated,
    UploadError,
    Uploading,
    UsageError,
    Warned,
)
from bokeh_ssh._remote.upload_dir import UploadDir
from bokeh_ssh._server.file_sync import FileSync
from bokeh_ssh._server.server import UploadChannel
from bokeh_ssh._server.upload_set import Bundle

if os.name != "posix":
    pytest.skip("the remote side is a POSIX system", allow_module_level=True)

from local_runner import FAKE, Bench

#: Says what its helper and its data say, where it was brought together with them.
MAIN = """
from pathlib import Path
from bokeh.io import curdoc
from bokeh.models import Div, Slider
from helper import WORD
here = Path(__file__).parent
slider = Slider(start=0, end=10, value=1, name="slider")
text = Div(text=WORD + here.joinpath("data", "it.txt").read_text(), name="text")
slider.on_change("value", lambda attr, old, new: setattr(text, "text", f"answer {new * 2}"))
curdoc().add_root(slider)
curdoc().add_root(text)
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with an app in it, and with what is not to be brought."""
    project = tmp_path / "work" / "my app"
    (project / "data").mkdir(parents=True)
    (project / "main.py").write_text(MAIN)
    (project / "helper.py").write_text("WORD = 'first '\n")
    (project / "data" / "it.txt").write_text("data")
    (project / ".gitignore").write_text("*.bin\n")
    (project / "secret.bin").write_bytes(b"x")
    (project / "inner").symlink_to("data/it.txt")
    (project / "outer").symlink_to("/etc/passwd")
    os.mkfifo(project / "pipe")
    return project


def tunnel_to(machine: Machine, app: Path | str, **keywords: Any) -> DirectTunnel:
    keywords = {"python": machine.python, "isolate": False, "upload": True, **machine.login, **keywords}
    return DirectTunnel(machine.host, machine.user, str(app), **keywords)


def text_of(tunnel: DirectTunnel | GatewayTunnel) -> str:
    with tunnel.pull_session() as session:
        return str(session.document.select_one({"name": "text"}).text)


def listing(machine: Machine, name: str) -> dict[str, str]:
    """Find the folders of that name on the machine, and list what is in them: path and kind or mode."""
    code = (
        "import os, stat, sys\n"
        "for top in [os.environ.get('BOKEH_SSH_DIR') or '/tmp/bokeh-ssh-%d' % os.getuid()]:\n"
        "    for folder, folders, files in os.walk(top):\n"
        "        if folder.endswith('/apps') and sys.argv[1] in os.listdir(folder):\n"
        "            print('.', oct(os.stat(folder).st_mode), sep='\\t')\n"
        "        if os.sep + sys.argv[1] in folder and not folder.endswith('__pycache__'):\n"
        "            for file in files:\n"
        "                path = os.path.join(folder, file)\n"
        "                kind = os.readlink(path) if os.path.islink(path) else oct(os.stat(path).st_mode)\n"
        "                print(path.partition('/apps/')[2], kind, sep='\\t')\n"
    )
    done = machine.execute(
        [machine.python, "-c", code, name], user=machine.user if machine.kind == "docker" else None
    )
    assert done.status == 0, done.stderr
    return dict(line.split("\t") for line in str(done).splitlines())


def test_folder_is_brought_and_served_and_removed(
    machine: Machine, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder of this machine is served there: with its modules and data, without what git ignores, what
    leads out of it and what is no file; nobody else may read it, and nothing is left of it afterwards."""
    monkeypatch.chdir(project.parent)
    project.rename("my_app")
    events: list[Event] = []
    with tunnel_to(machine, "my_app", on_event=events.append) as tunnel:
        assert tunnel.url.endswith("/my_app")
        assert text_of(tunnel) == "first data"
        apps.drive(tunnel.url)
        there = listing(machine, "my_app")
        assert there.pop(".") == "0o40700"
        assert there == {
            "my_app/.gitignore": "0o100600",
            "my_app/data/it.txt": "0o100600",
            "my_app/helper.py": "0o100600",
            "my_app/inner": "data/it.txt",
            "my_app/main.py": "0o100600",
        }
    assert listing(machine, "my_app") == {}
    told = [event for event in events if isinstance(event, Uploading)]
    assert (told[0].sent, told[-1].sent, told[0].files) == (0, told[0].size, 5)
    assert [event.sent == event.size for event in told].count(True) == 1
    assert told[0].size == sum(path.stat().st_size for path in Path("my_app").rglob("*[!n]") if _sent(path))
    [left] = [event.text for event in events if isinstance(event, Warned)]
    assert "my_app/outer (a link that leads elsewhere)" in left
    assert "my_app/pipe (no file)" in left


def _sent(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


def test_script_is_brought_with_what_it_needs(embedded: Callable[..., Machine], project: Path) -> None:
    """A script comes alone, or with what is named: beside it, where it finds it."""
    machine = embedded()
    script = project.parent / "script.py"
    script.write_text(MAIN)
    with tunnel_to(machine, script, bring=[str(project / "helper.py"), str(project / "data")]) as tunnel:
        assert tunnel.url.endswith("/script")
        assert text_of(tunnel) == "first data"
    with tunnel_to(machine, script) as tunnel:  # the control: alone it lacks them
        until(lambda: any("No module named 'helper'" in line for line in tunnel.log) or not get(tunnel.url))


def get(url: str) -> bytes:
    import urllib.request

    with urllib.request.urlopen(url, timeout=20) as answer:
        return bytes(answer.read(0))


def test_gateway_host_is_brought_the_app(shape_c: Any, project: Path) -> None:
    """Through a gateway too the app is brought to the machine that serves it."""
    gateway = Host(shape_c.gateway.host, shape_c.gateway.user, **shape_c.gateway.login)
    there = shape_c.bokehhost
    host = Host(there.inside, there.user, **{**there.login, "port": 22})
    script = project.rename(project.with_name("brought"))
    with GatewayTunnel(gateway, host=host, app=str(script), upload=True, python=there.python) as tunnel:
        assert text_of(tunnel) == "first data"
        assert "brought/main.py" in listing(there, "brought")
        assert listing(shape_c.gateway, "brought") == {}


# --- how it goes there


class Orders(list[dict[str, Any]]):
    """What supervisors were told to do with files, by tunnels of this process."""

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [order for order in self if order["do"] == kind]


@pytest.fixture
def orders(monkeypatch: pytest.MonkeyPatch) -> Orders:
    """Note them."""
    found, plain = Orders(), UploadChannel.send_order

    def order(channel: UploadChannel, **message: Any) -> None:
        found.append(message)
        plain(channel, **message)

    monkeypatch.setattr(UploadChannel, "send_order", order)
    return found


def test_contents_go_over_sftp(machine: Machine, project: Path, orders: Orders, tmp_path: Path) -> None:
    """What is in files goes over SFTP, and none of it through the supervisor, which only gives it its place;
    executable files stay so, and no part of a file is left beside the app."""
    app = project.rename(project.with_name("oversftp"))
    (app / "tool").write_text("#!/bin/sh\n")
    (app / "tool").chmod(0o755)
    (app / "large").write_bytes(os.urandom(1_200_000))
    with tunnel_to(machine, app) as tunnel:
        assert text_of(tunnel) == "first data"
        there = listing(machine, "oversftp")
        assert there["oversftp/tool"] == "0o100700"
        assert there["oversftp/data/it.txt"] == "0o100600"
        # All of a container; of this machine, whose disk may be large, what a login here has to write to.
        places = "/" if machine.kind == "docker" else f"{os.environ['BOKEH_SSH_DIR']} {tmp_path}"
        search = f"find {places} -xdev -name '{orders.of('place')[0]['part']}'"
        assert machine.execute(f"{search} 2> /dev/null", timeout=200).stdout == ""
    names = (".gitignore", "data/it.txt", "helper.py", "large", "main.py", "tool")
    assert {order["name"] for order in orders.of("place")} == {f"oversftp/{name}" for name in names}
    assert not orders.of("put")


def test_little_waits_for_nothing(
    bench: Bench, project: Path, orders: Orders, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A small app is sent right behind the supervisor, and the server starts when the last of it has come:
    no answer is awaited before."""
    known: list[str] = []
    sync = UploadChannel.request_sync

    def request_sync(channel: UploadChannel, **words: bool) -> int:
        assert words == {"go": True}
        known.append(channel.directory)
        return sync(channel, **words)

    monkeypatch.setattr(UploadChannel, "request_sync", request_sync)
    bring = FileSync(Bundle([str(project)]), bench.events.append).upload_all
    server = bench.start(command=FAKE, app=("my app",), brings=True, bring=bring)
    assert known == [""]
    assert len(orders.of("put")) == 4
    assert (Path(server.uploads.directory) / "my app" / "data" / "it.txt").read_text() == "data"


SERVER = "/usr/lib/openssh/sftp-server"


@pytest.mark.parametrize(
    ("subsystem", "placed"),
    [
        (None, 0),
        (f"{SERVER} -R", 0),
        (f"echo Welcome; exec {SERVER}", 0),
        ("chroot /opt /bin/true", 0),
        (f"stdbuf -o0 head -c 200000 | {SERVER}", 4),
        (f"ulimit -f 100; exec {SERVER}", 4),
    ],
    ids=["none", "read-only", "start file that prints", "ends at once", "ends midway", "full"],
)
def test_without_sftp_it_arrives_all_the_same(
    container: Callable[..., Machine], project: Path, orders: Orders, subsystem: str | None, placed: int
) -> None:
    """Where SFTP is not to be had, is of no use or breaks off, the rest goes by the server's own session."""
    directives = {"Subsystem": f"sftp {subsystem}"} if subsystem else None
    machine = container(Knobs(sftp=False), directives=directives)
    app = project.rename(project.with_name("anyway"))
    (app / "z-large").write_bytes(os.urandom(1_200_000))
    events: list[Event] = []
    with tunnel_to(machine, app, on_event=events.append) as tunnel:
        assert text_of(tunnel) == "first data"
        there = machine.execute("sha256sum $(find /tmp -path '*/anyway/z-large')").stdout.split()[0]
        assert there == sha256((app / "z-large").read_bytes()).hexdigest()
        assert machine.execute("find /tmp -name '.bokeh-ssh-*'").stdout == ""
    names = {order["name"] for order in orders.of("put")}
    assert len(orders.of("place")) == placed
    assert "anyway/z-large" in names
    assert len(names) == 5 - placed
    told = [event for event in events if isinstance(event, Uploading)]
    assert [event.sent for event in told] == sorted(event.sent for event in told)
    assert told[-1].sent == told[-1].size


def test_one_session_is_enough(machine_with: Callable[..., Machine], project: Path, orders: Orders) -> None:
    """A server that allows one session on a connection is given none for SFTP."""
    app = project.rename(project.with_name("single"))
    (app / "large").write_bytes(os.urandom(1_200_000))
    with tunnel_to(machine_with(max_sessions=1), app) as tunnel:
        assert text_of(tunnel) == "first data"
    assert len({order["name"] for order in orders.of("put")}) == 5
    assert not orders.of("place")


def test_full_disk_is_told_with_its_reason(container: Callable[..., Machine], project: Path) -> None:
    """What neither way can store is an error with the file's name and the system's reason."""
    machine = container(Knobs(sftp=False), directives={"Subsystem": f"sftp ulimit -f 100; exec {SERVER}"})
    (project / "z-large").write_bytes(os.urandom(1_200_000))
    with (
        pytest.raises(UploadError, match=r"my app/z-large: File too large"),
        tunnel_to(machine, project, setup="ulimit -f 100"),
    ):
        pass
    until(lambda: listing(machine, "my app") == {}, what="nothing to be left")


# --- what becomes of it


def brought(bench: Bench, **launch: Any) -> tuple[Any, Path]:
    """Start a fake server that was brought a file; gives the folder too."""
    found: list[Path] = []

    def bring(uploads: Any) -> None:
        uploads.send_order(do="put", name="app/main.py", data="eA==", last=True, runs=False)
        uploads.wait_for_sync(uploads.request_sync(), 10)
        found.extend(Path(os.environ["BOKEH_SSH_DIR"]).glob("*/apps"))

    server = bench.start(command=FAKE, app=("app",), brings=True, bring=bring, **launch)
    assert (found[0] / "app" / "main.py").read_text() == "x"
    return server, found[0]


def test_client_that_is_killed_leaves_nothing(bench: Bench) -> None:
    """A client that vanishes, as with kill -9, leaves no folder once its server's grace time is over."""
    _, folder = brought(bench, grace=0.2)
    bench.runners[-1].sessions[-1].vanish()
    until(lambda: not folder.exists(), what="the folder to be gone")


def test_supervisor_that_is_killed_leaves_nothing(bench: Bench) -> None:
    """The supervisor's end, as with kill -9, takes the server and the folder along."""
    _, folder = brought(bench)
    os.kill(json.loads((folder.parent / "record").read_text())["supervisor"], signal.SIGKILL)
    until(lambda: not folder.parent.exists(), what="the folder to be gone")


def test_server_that_ends_by_itself_leaves_no_app(bench: Bench) -> None:
    """The folder ends with its server also where that ends by itself while nobody is there to see it."""
    go = bench.path / "go"
    server, folder = brought(bench, env={"FAKE": "exit", "FAKE_GO": str(go)})
    bench.runners[-1].sessions[-1].vanish()
    go.touch()
    until(lambda: not folder.exists(), what="the folder to be gone")
    assert folder.parent.exists()  # with the record of how it ended, for the client that returns
    assert server.lost


@pytest.mark.parametrize("how", ["vanish", "cancel"])
def test_broken_off_upload_leaves_nothing(bench: Bench, how: str) -> None:
    """What had arrived is removed when the client goes away, or gives up, before all was there."""
    runner = bench.runner()
    place = Path(os.environ["BOKEH_SSH_DIR"])

    def bring(uploads: Any) -> None:
        uploads.send_order(do="put", name="app/main.py", data="eA==", last=False, runs=False)
        uploads.wait_for_sync(uploads.request_sync(), 10)
        assert list(place.glob("*/apps/.bokeh-ssh-*"))
        if how == "vanish":
            runner.sessions[-1].vanish()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bench.start(runner, command=FAKE, brings=True, bring=bring)
    until(lambda: not place.exists(), what="all to be gone")
    assert runner.sessions[-1].process.wait(20) is not None


def test_what_cannot_be_stored_is_told(bench: Bench) -> None:
    """What cannot be stored, as on a full disk, ends the launch with its name and the reason."""

    def bring(uploads: Any) -> None:
        uploads.send_order(do="put", name="a", data="eA==", last=True, runs=False)
        uploads.send_order(do="put", name=f"a/{'b' * 300}", data="eA==", last=True, runs=False)
        uploads.wait_for_sync(uploads.request_sync(), 10)

    with pytest.raises(UploadError, match=r"a/b+: .*too long") as caught:
        bench.start(command=FAKE, brings=True, bring=bring)
    assert isinstance(caught.value, LaunchError)
    assert not Path(os.environ["BOKEH_SSH_DIR"]).exists()


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "/x", "a/../../x", "a//b", "a\0b"])
def test_nothing_is_stored_outside(tmp_path: Path, name: str) -> None:
    """No name leads out of the folder."""
    depot = UploadDir(str(tmp_path / "depot"))
    with pytest.raises(ValueError):  # noqa: PT011 - the name is all it says
        depot.put(name, b"x", True, False)
    assert {path.name for path in tmp_path.rglob("*")} == {"home", ".ssh", "depot"}


# --- changes


def test_changes_follow_and_the_server_takes_them(
    embedded: Callable[..., Machine], project: Path, orders: Orders
) -> None:
    """With ``dev`` what is saved, added and removed here is so there too, the server is started again with it
    at the same address, and what is saved while the line is down comes with the line. A folder that is gone
    is told once, and followed again when it is back."""
    machine = embedded()
    app = project.rename(project.with_name("devapp"))
    events: list[Event] = []
    with tunnel_to(machine, app, dev=True, on_event=events.append) as tunnel:
        assert text_of(tunnel) == "first data"

        def updated(name: str, *, removed: bool = False) -> bool:
            told = [event for event in events if isinstance(event, Updated)]
            return any(name in (event.removed if removed else event.changed) for event in told)

        def served(word: str) -> bool:
            new = app / "helper.py.new"  # as editors save
            new.write_text(f"WORD = {word.split()[0] + ' '!r}\n")
            new.replace(app / "helper.py")
            pause = time.monotonic() + 2
            while time.monotonic() < pause:
                if _quietly(tunnel) == word:
                    return True
            return False

        (app / "data" / "more.txt").write_text("more")
        until(lambda: served("second data"), timeout=30, what="the server to have it")
        until(lambda: updated("devapp/helper.py") and updated("devapp/data/more.txt"), what="it is told")
        (app / "data" / "more.txt").unlink()
        until(lambda: updated("devapp/data/more.txt", removed=True), what="the removal is told")
        assert "devapp/data/more.txt" not in listing(machine, "devapp")
        assert not orders.of("place")  # little goes where it can go at once
        (app / "data" / "big").write_bytes(b"x" * 2_000_000)
        until(lambda: updated("devapp/data/big"), what="the big one is told")
        assert orders.of("place")[0]["name"] == "devapp/data/big"
        server: Any = machine.server
        server.drop_connections()
        (app / "data" / "it.txt").write_text("later")
        (app / "data" / "big").write_bytes(b"y" * 2_000_000)
        until(lambda: any(isinstance(event, Reconnected) for event in events), timeout=30, what="the line")
        until(lambda: updated("devapp/data/it.txt"), timeout=30, what="the change to arrive")
        assert text_of(tunnel) == "second later"
        until(lambda: len(orders.of("place")) > 1, what="the big one to follow")
        away = app.rename(app.with_name("away"))

        def failed() -> list[str]:
            texts = [event.text for event in events if isinstance(event, Warned)]
            return [text for text in texts if text.startswith("a change was not uploaded")]

        until(failed, what="the loss of the folder is told")
        shutil.copytree(away, app, ignore=shutil.ignore_patterns("pipe"))
        (app / "data" / "after.txt").write_text("after")
        until(lambda: updated("devapp/data/after.txt"), what="the new folder to be watched")
        assert len(failed()) == 1
    assert not [
        thread for thread in threading.enumerate() if "mirror" in thread.name or thread.name == "watch"
    ]


_PULL = """
import sys
from bokeh.client import pull_session
with pull_session(url=sys.argv[1]) as session:
    print(session.document.select_one({"name": "text"}).text)
"""


def _quietly(tunnel: DirectTunnel) -> str:
    """Ask a server that may be starting itself again: in another process, since a refused client of Bokeh's
    leaves things behind."""
    done = subprocess.run(
        [sys.executable, "-c", _PULL, tunnel.url], capture_output=True, text=True, timeout=60
    )
    return done.stdout.strip()


# --- what goes


def test_the_same_files_as_git(tmp_path: Path) -> None:
    """What is left out is what git leaves out, with nested and negated patterns, and rules from above."""
    top = tmp_path / "repository"
    files = {
        ".gitignore": "*.log\n/build/\n!keep.log\ndoc/*.txt\n# a comment\n\\#hash\nspace\\ \n**/deep/x\n",
        "app/.gitignore": "!*.log\nsub/local\n/rooted\n*.tmp\n!sub/*.tmp\n!\n\\\n[z-a]\n*-*-*.c\n",
        "app/p/.gitignore": "/**/q/**/r\n",
        "app/a-b-c-.c": "", "app/a-b.c": "", "app/p/q/r": "", "app/p/1/q/2/q/3/r": "", "app/p/q/1/s": "",
        "app/main.py": "", "app/a.log": "", "app/keep.log": "", "app/#hash": "", "app/space ": "",
        "app/sub/local": "", "app/rooted": "", "app/sub/rooted": "", "app/x.tmp": "", "app/sub/y.tmp": "",
        "app/build/made": "", "app/sub/deep/x": "", "app/sub/deep/y": "", "app/doc/a.txt": "",
        "app/sub/.gitignore": "*\n!.gitignore\n!y.tmp\n", "app/__pycache__/x.pyc": "", "app/ünï": "",
    }  # fmt: skip
    for name, text in files.items():
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        (top / name).write_text(text)
    git = ["git", "-C", str(top), "-c", "core.excludesFile="]
    subprocess.run([*git, "init", "-q"], check=True)
    (top / ".git" / "info" / "exclude").write_text("/app/doc/\n")
    listed = subprocess.run(
        [*git, "ls-files", "-z", "--others", "--exclude-standard", "app"], check=True, capture_output=True
    )
    wanted = {name for name in listed.stdout.decode().split("\0") if name and "__pycache__" not in name}
    assert {"app/a.log", "app/sub/y.tmp", "app/build/made"} & wanted  # the control: some of each kind
    assert set(Bundle([str(top / "app")]).scan().items) == wanted


def test_ignored_folder_that_is_named_is_brought(tmp_path: Path) -> None:
    """Whoever names a folder wants it, also one that git ignores; its own rules count all the same."""
    app = tmp_path / "build" / "app"
    app.mkdir(parents=True)
    (tmp_path / ".git").mkdir()
    (tmp_path / ".gitignore").write_text("build/\n")
    (app / ".gitignore").write_text("no\n")
    for name in ("yes", "no"):
        (app / name).touch()
    assert set(Bundle([str(app)]).scan().items) == {"app/.gitignore", "app/yes"}


def test_what_is_not_there_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not here, two of one name, and words without an app are errors before anything starts."""
    monkeypatch.chdir(tmp_path)
    for name in ("a/x.py", "b/x.py"):
        Path(name).parent.mkdir()
        Path(name).touch()
    for keywords, words in (
        ({"app": "none.py", "upload": True}, "there is no 'none.py' on this machine"),
        ({"app": ["a/x.py", "b/x.py"], "upload": True}, "both be 'x.py' there"),
        ({"app": "a/x.py", "bring": "none"}, "there is no 'none' on this machine"),
        ({"upload": True}, "no app to upload"),
        ({"dev": True}, "no app"),
        ({"app": os.devnull, "upload": True}, "neither a file nor a folder"),
        ({"app": "a/x.py", "dev": True, "args": ["--dev"]}, "given twice"),
    ):
        with pytest.raises(UsageError, match=words):
            DirectTunnel("example.org", **keywords)  # type: ignore[arg-type]


@pytest.mark.parametrize("sftp", [True, False])
def test_big_file_comes_whole(embedded: Callable[..., Machine], tmp_path: Path, sftp: bool) -> None:
    """Files of all sizes arrive byte for byte, those at the edges of a message too, with SFTP and without."""
    machine = embedded(Knobs(sftp=sftp))
    data = tmp_path / "data"
    data.mkdir()
    for size in (0, 1, (96 << 10) - 1, 96 << 10, (96 << 10) + 1, 3_000_000):
        (data / str(size)).write_bytes(os.urandom(size))
    script = tmp_path / "sums.py"
    script.write_text(
        textwrap.dedent(
            """
            from pathlib import Path
            from hashlib import sha256
            from bokeh.io import curdoc
            from bokeh.models import Div
            sums = [sha256(path.read_bytes()).hexdigest() for path in sorted(Path("data").iterdir())]
            curdoc().add_root(Div(name="text", text=" ".join(sums)))
            """
        )
    )
    sums = " ".join(sha256(path.read_bytes()).hexdigest() for path in sorted(data.iterdir()))
    with tunnel_to(machine, script, bring=str(data)) as tunnel:
        assert text_of(tunnel) == sums


@pytest.mark.skipif(os.name != "posix", reason="elsewhere a directory in use stays")
def test_current_directory_that_is_gone_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A path that starts where nothing is any more is an error that says so; a whole one needs none."""
    (tmp_path / "app.py").write_text("")
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(UsageError, match="current directory"):
        Bundle(("app.py",), ())
    assert Bundle((str(tmp_path / "app.py"),), ()).roots == [tmp_path / "app.py"]
