"""What a machine has after us that it had not before: nothing, however far it came, and however it ended."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import apps
from beds import Machine, until
from bokeh_ssh import (
    BokehSSHError,
    DirectTunnel,
    ForwardError,
    GatewayTunnel,
    Host,
    LaunchError,
    RemoteForward,
    ServerNotFoundError,
)
from bokeh_ssh._cli.doctor import examine
from bokeh_ssh._forwarding.published_sockets import private_directory, published
from bokeh_ssh._remote import run_dir
from bokeh_ssh._server.options import ServerOptions
from bokeh_ssh._ssh.connect import connect
from cable import Cable
from local_runner import FAKE, Bench
from processes import running
from programs import Program, login

pytestmark = pytest.mark.skipif(os.name != "posix", reason="the remote side is a POSIX system")

STRANGER = 65534
#: A web server that is ready at once.
PAGES = f"{sys.executable} -m http.server {{port}} --bind 127.0.0.1"


@pytest.fixture
def top() -> Iterator[Path]:
    """A folder with a short name, in /tmp."""
    path = Path("/tmp", f"bs-{uuid.uuid4().hex[:6]}")
    path.mkdir(mode=0o755)
    yield path
    shutil.rmtree(path)


def everything(folder: Path) -> list[str]:
    """List all that is in a folder; some of it may be removed meanwhile."""
    return sorted(
        str(Path(above, name).relative_to(folder))
        for above, folders, files in os.walk(folder)
        for name in (*folders, *files)
    )


# --- which directory will do


def _make(top: Path, *steps: str) -> None:
    """Make folders and links: ``a/b 755 USER`` or ``a/b -> target``, in this order."""
    for step in steps:
        name, *words = step.split()
        path = top / name
        if words[0] == "->":
            path.symlink_to(words[1])
        else:
            path.mkdir(exist_ok=True)
            path.chmod(int(words[0], 8))
            if words[1:]:
                os.chown(path, int(words[1]), -1)


@pytest.mark.parametrize(
    ("steps", "name", "why"),
    [
        (["a 755", "a/d 700"], "a/d", ""),
        (["a 755"], "a/d", ""),  # it is made
        (["a 755", "a/d 700"], "a/d/", ""),
        (["a 755"], "a/d//", ""),
        (["a 755", "a/d 700", "a/l -> d"], "a/l//", "no directory"),
        (["a 1777", "a/d 700"], "a/d", ""),
        (["a 755", "a/b 755", "a/b/d 700", "l -> a/b"], "l/d", ""),
        (["a 755", "a/d 755"], "a/d", "mode 755"),
        (["a 755", "a/d 700", "a/l -> d"], "a/l", "no directory"),
        ([f"a 755 {STRANGER}", "a/d 700"], "a/d", f"replaced by user {STRANGER}"),
        ([f"a 755 {STRANGER}", "a/b 755", "a/b/d 700"], "a/b/d", f"replaced by user {STRANGER}"),
        ([f"a 1777 {STRANGER}", "a/b 755", "a/b/d 700"], "a/b/d", f"replaced by user {STRANGER}"),
        (["a 777", "a/b 755", "a/b/d 700"], "a/b/d", "replaced by other users"),
        (["a 775", "a/b 755", "a/b/d 700"], "a/b/d", "replaced by other users"),
        ([f"a 755 {STRANGER}", "a/b 755", "a/b/d 700", "l -> a/b"], "l/d", f"replaced by user {STRANGER}"),
        (["a 755", f"a/d 700 {STRANGER}"], "a/d", "another user"),
        ([], "none/d", "No such file"),
    ],
)
def test_directory_that_others_could_replace(
    top: Path, embedded: Callable[..., Machine], steps: list[str], name: str, why: str
) -> None:
    """Each folder above counts, by the way that links lead; the far side and a gateway say the same.

    One that was made to try, and will not do, is gone again.
    """
    if os.geteuid() != 0:
        pytest.skip("needs folders of other users")
    _make(top, *steps)
    before = everything(top)
    given = f"{top}/{name}"
    os.environ["BOKEH_SSH_DIR"] = given
    [path] = run_dir.candidates()
    fault = run_dir.found(path)
    assert (why in fault) if why else not fault, fault
    if not why and name.rstrip("/") not in before and not name.startswith("l/"):
        Path(path).rmdir()
    machine = embedded(env={"BOKEH_SSH_DIR": given})
    with connect(Host(machine.host, machine.user, **machine.login)) as connection:
        folder = private_directory(connection)
    assert folder == (None if why else path)
    if why:
        assert everything(top) == before
    else:
        assert Path(path).stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("given", ["relative/d", "/", "blank d"])
def test_odd_names_of_a_directory(top: Path, embedded: Callable[..., Machine], given: str) -> None:
    """A relative one means nothing where nobody knows the directory; a blank in one is no end of it."""
    given = f"{top}/{given}" if "blank" in given else given
    os.environ["BOKEH_SSH_DIR"] = given
    fault = run_dir.found(run_dir.candidates()[0])
    assert bool(fault) == ("blank" not in given)
    machine = embedded(env={"BOKEH_SSH_DIR": given})
    with connect(Host(machine.host, machine.user, **machine.login)) as connection:
        assert private_directory(connection) == (None if fault else given)


@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="needs a place where nobody may make a folder"
)
def test_reason_is_why_it_cannot_be_made() -> None:
    """And not that it is not there."""
    fault = run_dir.found("/sys/d")
    assert fault
    assert "No such file" not in fault


def test_place_that_will_not_do_is_not_left(bench: Bench, top: Path) -> None:
    """A directory that was made and cannot be used is gone before the server runs, which it does anyway."""
    for bad in (top / ("x" * 90), top / "shared" / "d"):
        bad.parent.mkdir(exist_ok=True)
        bad.parent.chmod(0o777 if bad.parent != top else 0o755)
        server = bench.start(bench.runner(BOKEH_SSH_DIR=str(bad)), command=FAKE, socket=True)
        assert server.server_ref is None
        assert not bad.exists()
        assert server.stop()
    assert everything(top) == ["shared"]


@pytest.mark.parametrize(
    "words",
    [
        {"command": ("/no/such/program",)},
        {"command": FAKE, "env": {"FAKE": "silent"}, "timeout": 1.0},
        {"command": ("/bin/sh", "-c", "exit 3"), "socket": True},
        {"command": FAKE, "python": "/no/such/python"},
        {"command": FAKE, "setup": "false"},
    ],
    ids=["program", "silent", "exit", "python", "setup"],
)
def test_start_that_fails_leaves_nothing(bench: Bench, top: Path, words: dict[str, Any]) -> None:
    """Whatever a start fails at, directory and processes are gone with it."""
    place = top / "d"
    with pytest.raises(BokehSSHError):
        bench.start(bench.runner(BOKEH_SSH_DIR=str(place)), **words)
    until(lambda: not place.exists() and not running(top), what="nothing to be left")


def test_control_server_that_runs_is_there(bench: Bench, top: Path) -> None:
    """The control: while it runs there is a directory, and there are processes; at the end none."""
    server = bench.start(bench.runner(BOKEH_SSH_DIR=f"{top}/d"), command=FAKE)
    assert everything(top)
    assert len(running(top)) >= 4
    assert server.stop()
    until(lambda: not everything(top) and not running(top), what="nothing to be left")


# --- the umask


def test_umask_of_the_account_does_not_count(container: Callable[..., Any], tmp_path: Path) -> None:
    """Under umask 0777 all of it works, on a private socket, with what is brought; and nothing stays."""
    machine = container()
    for home in ("/home/alice",):
        machine.execute(f"echo 'umask 0777' > {home}/.bashrc", user="alice")
    seen = str(machine.execute("ls -A /tmp /home/alice"))
    app = tmp_path / "app.py"
    app.write_text("import os\nos.makedirs('made/deeper')\n" + apps.SLIDER)
    with DirectTunnel(
        machine.host, machine.user, str(app), upload=True, python=machine.python, **machine.login
    ) as tunnel:
        assert tunnel.remote_port == 0, tunnel.log
        assert "Bokeh" in apps.get(tunnel.url)
        assert str(machine.execute("stat -c %a /tmp/bokeh-ssh-*")) == "700"
    until(lambda: str(machine.execute("ls -A /tmp /home/alice")) == seen, what="nothing to be left")


# --- on a gateway


@pytest.fixture
def gateway(top: Path, sshd: Callable[..., Machine]) -> Machine:
    """A real sshd whose account keeps its sockets in a folder of this test's own."""
    return sshd(SetEnv=f"BOKEH_SSH_DIR={top}/d")


@pytest.fixture
def host(embedded: Callable[..., Machine]) -> Machine:
    """A Bokeh host that has no bokeh_ssh, and places of its own."""
    return embedded(env={"BOKEH_SSH_DIR": os.environ["BOKEH_SSH_DIR"], "PATH": "/usr/bin:/bin"})


def through(gateway: Machine, host: Machine, **words: Any) -> GatewayTunnel:
    """Make a tunnel through one to the other."""
    way = Host(gateway.host, gateway.user, **gateway.login)
    end = Host(host.host, host.user, jump=(), **host.login)
    return GatewayTunnel(way, host=end, **{"isolate": False, "python": "/usr/bin/python3", **words})


@pytest.mark.parametrize("why", ["host", "attach", "launch"])
def test_start_through_a_gateway_that_fails_leaves_nothing(
    gateway: Machine, host: Machine, top: Path, why: str
) -> None:
    """The host cannot publish, nothing listens, nothing starts: neither socket nor directory is left."""
    words: dict[str, Any] = {
        "host": {"reverse": "host", "command": PAGES},
        "attach": {"launch": False, "remote_port": 1},
        "launch": {"command": "false {port}"},
    }[why]
    kind = {"host": ForwardError, "attach": ServerNotFoundError, "launch": LaunchError}[why]
    with pytest.raises(kind):
        through(gateway, host, **words).open()
    assert everything(top) == []


def test_relay_leaves_nothing(gateway: Machine, host: Machine, top: Path) -> None:
    """At the end neither the socket nor its directory is left; while it is open, both are there."""
    with through(gateway, host, command=PAGES) as tunnel:
        assert tunnel.reverse == "relay"
        assert len(everything(top)) == 2
    assert everything(top) == []


def test_forbidden_sockets_leave_nothing(top: Path, sshd: Callable[..., Machine], host: Machine) -> None:
    """A directory that was made for sockets that are forbidden is gone; so it is after doctor."""
    gateway = sshd(SetEnv=f"BOKEH_SSH_DIR={top}/d", AllowStreamLocalForwarding="no")
    with through(gateway, host, command=PAGES):
        assert everything(top) == []
    with connect(Host(gateway.host, gateway.user, **gateway.login)) as connection:
        assert private_directory(connection) == f"{top}/d"  # the control: it could be made
    (top / "d").rmdir()
    with pytest.raises(BokehSSHError):
        RemoteForward(gateway.host, gateway.user, name="app", **gateway.login).open()
    assert everything(top) == []


def test_doctor_leaves_nothing(gateway: Machine, top: Path) -> None:
    """What it makes to try is gone, sockets and directories too."""
    host = Host(gateway.host, gateway.user, **gateway.login)
    found = {each.check: each for each in examine(host, ServerOptions(python=sys.executable), print)}
    assert found["sockets"].verdict == "good"
    assert found["after a loss"].verdict == "good"
    assert everything(top) == []


@pytest.mark.parametrize("how", ["close", "kill", "cut"])
def test_socket_of_a_publication_goes_with_it(gateway: Machine, top: Path, tmp_path: Path, how: str) -> None:
    """Closed, killed, or with its line gone for good: its socket and the directory are not there any more."""
    with Cable(gateway.host, gateway.port) as cable:
        there = cable.machine(gateway, tmp_path)
        words = ["forward", "-R", f"{top}/d/pub-app:localhost:1", there.host, *login(there)]
        (top / "d").mkdir(mode=0o700)
        with Program(*words) as program:
            until(lambda: (top / "d/pub-app").is_socket(), what="it to be published")
            if how == "close":
                program.interrupt()
                program.end()
            elif how == "kill":
                program.interrupt(signal.SIGKILL)
            else:
                cable.refuse()
            until(lambda: not (top / "d").exists(), what="nothing to be left")


def test_publisher_that_is_killed_leaves_nothing(tmp_path: Path) -> None:
    """What the host runs to publish keeps the gateway's key in no file that would outlive it."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        spec = {
            "gateway": "127.0.0.1",
            "port": silent.getsockname()[1],
            "user": "me",
            "known_hosts": "127.0.0.1 ssh-ed25519 AAAA\n",
            "timeout": 30,
            "mark": "",
            "forward": {"local_port": 1},
            "places": [{"name": "app"}],
        }
        with subprocess.Popen(
            [sys.executable, "-c", "import bokeh_ssh._tunnels.publisher_main as it; it.main()"],
            stdin=subprocess.PIPE,
            env={**os.environ, "TMPDIR": str(temporary), "PYTHONPATH": str(Path(__file__).parents[2])},
        ) as process:
            assert process.stdin
            process.stdin.write(json.dumps(spec).encode() + b"\n")
            process.stdin.flush()
            silent.settimeout(20)
            with silent.accept()[0]:
                process.kill()
    assert everything(temporary) == []


def test_demo_that_is_killed_leaves_nothing() -> None:
    """Its directory, with keys and a home in it, goes when its server has."""
    temporary = Path("/tmp", f"bs-{uuid.uuid4().hex[:6]}")
    temporary.mkdir()
    try:
        with Program("demo", "--no-show", "--local-port", "0", env={"TMPDIR": str(temporary)}) as program:
            program.address()
            assert everything(temporary)
            program.interrupt(signal.SIGKILL)
            program.end()
        until(lambda: not everything(temporary), what="nothing to be left")
    finally:
        shutil.rmtree(temporary)


def test_dead_socket_beside_one_that_begins_like_it(gateway: Machine, top: Path) -> None:
    """Nobody listens on the one, whoever listens on the other: it is not listed, and does not stay."""
    folder = top / "d"
    folder.mkdir(mode=0o700)
    with socket.socket(socket.AF_UNIX) as alive, socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(folder / "pub-app"))
        alive.bind(str(folder / "pub-app2"))
        alive.listen()
        dead.close()
        with connect(Host(gateway.host, gateway.user, **gateway.login)) as connection:
            assert list(published(connection)) == ["app2"]
            assert private_directory(connection) == str(folder)
        assert everything(folder) == ["pub-app2"]


def test_socket_that_was_taken_back_stays(gateway: Machine, top: Path, tmp_path: Path) -> None:
    """After a loss the new line listens in the same place; what waited for the old one's end lets it be."""
    with Cable(gateway.host, gateway.port) as cable:
        there = cable.machine(gateway, tmp_path)
        with RemoteForward(
            there.host, there.user, name="app", local_port=1, isolate=False, **there.login
        ) as forward:
            before = running(top)
            assert before  # what waits there for the end
            cable.pull()
            until(lambda: forward.state != "ready", what="the loss")
            until(lambda: forward.state == "ready", what="the line to be back")
            until(lambda: not before & running(top), what="the old one to have seen its end")
            assert (top / "d/pub-app").is_socket()
            assert _listens(top / "d/pub-app")
    assert everything(top) == []


def _listens(path: Path) -> bool:
    rows = [row.split() for row in Path("/proc/net/unix").read_text().splitlines()]
    return any(row[3] == "00010000" and row[7:] == [str(path)] for row in rows)
