"""``bokeh-ssh --background``, ``ls``, ``stop`` and ``status``: the tunnels that this machine holds."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import bokeh_ssh
import light_bokeh
from beds import Knobs, Machine, until
from bokeh_ssh._cli.tunnels import background, control
from bokeh_ssh._cli.tunnels.registry import find_tunnels
from cable import Cable
from processes import proc
from programs import OnTerminal, Program, login, run_here, unkeyed

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals and terminals of POSIX")


@pytest.fixture
def machine(light: Callable[..., Machine]) -> Machine:
    """A machine that takes a key and a password, with a stand-in for Bokeh."""
    return light(Knobs(password=True), password="sesame")


def run(*words: str, code: int = 0) -> Program:
    """Run a command to its end, in a process of its own."""
    with Program(*words) as program:
        assert program.end() == code, program
    return program


def forward(machine: Machine, *words: str) -> list[str]:
    """Give the words of a forward to a machine's own SSH port."""
    return ["forward", machine.host, "--remote-port", str(machine.port), *words, *login(machine)]


def told(*words: str) -> list[dict[str, Any]]:
    """Give the tunnels that a command tells of."""
    lines = map(json.loads, run_here(*words, "--json").stdout.splitlines())
    return [line for line in lines if line["event"] == "tunnel"]


def live() -> bokeh_ssh.TunnelStatus:
    """Give what the only tunnel does."""
    [tunnel] = find_tunnels()
    assert tunnel.status
    return tunnel.status


def is_alive(pid: int) -> bool:
    """Tell whether a process runs; one that has ended, and that nobody waited for, does not."""
    try:
        return proc(f"{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except OSError:
        return False


def greeting(address: str) -> bytes:
    """Read what the SSH server behind a forward says first."""
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=10) as sock:
        return sock.recv(4)


def test_background_is_left_when_it_is_open(machine: Machine) -> None:
    """``-f`` prints the address and ends with 0; then it carries, is listed, logs to a file of mode 0600 and
    has no terminal; ``stop`` by its port ends that process, and leaves neither its socket nor a listener."""
    done = run(*forward(machine, "-f"))
    address = done.stdout.strip()
    assert greeting(address) == b"SSH-"
    [tunnel] = told("ls")
    assert tunnel["addresses"] == [address]
    assert (tunnel["host"], tunnel["state"], tunnel["background"]) == (machine.host, "ready", True)
    pid = tunnel["pid"]
    assert os.getsid(pid) == pid
    assert stat.S_IMODE(Path(tunnel["log"]).stat().st_mode) == 0o600
    assert f"bokeh-ssh stop {pid}" in done.stderr
    assert f"(process {pid})" in run_here("stop", address.rpartition(":")[2]).stderr
    until(lambda: not is_alive(pid))
    assert find_tunnels() == []
    with pytest.raises(OSError, match="refused"):
        greeting(address)
    assert "Ended by bokeh-ssh stop" in Path(tunnel["log"]).read_text()


def test_background_asks_before_it_leaves(machine: Machine) -> None:
    """With ``-f`` the password is asked for on the terminal first; a wrong one fails there, with code 1."""
    words = [word for word in forward(machine, "-f") if word not in ("-i", str(machine.key_path))]
    with OnTerminal(*words) as program:
        program.answer("password", "sesame")
        assert program.end() == 0, program
    [tunnel] = find_tunnels()
    assert is_alive(tunnel.pid)
    run_here("stop")
    assert find_tunnels() == []


def test_background_that_fails_says_so(machine: Machine) -> None:
    """With ``-f`` a failure is told where it was typed, with its exit code, and nothing is left."""
    done = run("forward", machine.host, "-f", "--remote-port", "1", *unkeyed(machine), code=1)
    assert "bokeh-ssh: " in done.stderr
    assert find_tunnels() == []
    assert not list(Path("~/.local/state/bokeh-ssh").expanduser().iterdir())


def test_background_without_a_place_for_its_log_says_so(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With ``-f`` a log that cannot be made is an error as any other, also with ``--json``."""
    monkeypatch.setenv("XDG_STATE_HOME", os.devnull)
    words = forward(machine, "-f")
    assert run(*words, code=2).stderr.endswith("set XDG_STATE_HOME to a folder of yours\n")
    [told] = map(json.loads, run(*words, "--json", code=2).stdout.splitlines())
    assert (told["type"], told["exit_code"]) == ("UsageError", 2)
    assert find_tunnels() == []


def test_interrupt_before_it_is_open_ends_it(machine: Machine) -> None:
    """Ctrl-C while ``-f`` still asks ends the command with 130, and its child."""
    words = [word for word in forward(machine, "-f") if word not in ("-i", str(machine.key_path))]
    with OnTerminal(*words) as program:
        program.expect("password")
        os.write(program._master, b"\x03")
        assert program.end() == 130, program
    assert find_tunnels() == []


def test_stop_ends_no_other(machine: Machine) -> None:
    """With two tunnels ``stop`` wants to know which (2), a name that none has is a failure (1); the other one
    and a process whose id a stale socket has stay untouched."""
    with Program(*forward(machine)) as one, Program(*forward(machine)) as two:
        first, second = one.address(), two.address()
        assert "more than one" in run_here("stop", code=2).stderr
        assert "no tunnel" in run_here("stop", "1", code=1).stderr
        run_here("stop", second)
        assert two.end() == 0, two
        assert greeting(first) == b"SSH-"
        folder = control.folders()[0]
        left = folder / f"{os.getpid()}.sock"
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(str(left))
        os.utime(left, (1, 1))
        assert [tunnel.pid for tunnel in find_tunnels()] == [one.process.pid]
        assert not left.exists()
        one.interrupt()
        assert one.end() == 0


def test_killed_tunnel_is_not_listed(machine: Machine) -> None:
    """A command that was killed leaves a socket, which is removed by whoever lists next."""
    with Program(*forward(machine)) as program:
        program.address()
        [path] = control.folders()[0].iterdir()
        program.interrupt(signal.SIGKILL)
        program.end()
        assert path.exists()
        assert find_tunnels() == []
        assert not path.exists()


def test_silent_tunnel_is_listed_as_that(machine: Machine) -> None:
    """A command that was stopped answers nothing: it is listed as silent, and holds nobody up for long."""
    with Program(*forward(machine)) as program:
        program.address()
        program.interrupt(signal.SIGSTOP)
        until(lambda: [tunnel.state for tunnel in find_tunnels()] == ["silent"], what="it to have stopped")
        [tunnel] = find_tunnels()
        program.interrupt(signal.SIGCONT)
        assert tunnel.pid == program.process.pid


@pytest.mark.parametrize(
    "changed",
    [
        {"began": "today"},
        {"apps": 1},
        {"status": {"state": "ready", "hops": [], "uptime": "long"}},
        {"status": {"state": "ready", "hops": [{"host": "box", "round_trip": "short"}]}},
        {"status": None},
    ],
    ids=lambda changed: str(changed)[2:40],
)
def test_tunnel_of_another_version_is_listed_as_silent(changed: dict[str, Any]) -> None:
    """What it tells in a way that is not understood keeps nobody from seeing the others."""
    told = {"pid": 1, "apps": ["app.py"], "addresses": [], "status": {"state": "ready", "hops": []}}
    folder = control.folders()[0]
    folder.mkdir(mode=0o700)
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(folder / f"{os.getpid()}.sock"))
        other.listen()

        def answer() -> None:
            for text in (told, {**told, **changed}):
                client = other.accept()[0]
                with client:
                    client.recv(100)
                    client.sendall(json.dumps(text).encode() + b"\n")

        thread = threading.Thread(target=answer)
        thread.start()
        assert [tunnel.state for tunnel in find_tunnels()] == ["ready"]  # the control
        assert [(tunnel.pid, tunnel.state) for tunnel in find_tunnels()] == [(os.getpid(), "silent")]
        thread.join()


@pytest.mark.skipif(sys.platform != "linux", reason="the clock of another thread")
def test_who_asks_while_there_are_no_descriptors_is_answered_later() -> None:
    """Where no more files may be opened, who asks is not dropped, and the thread does not spin meanwhile."""
    import resource

    asked = threading.Event()

    def tell() -> dict[str, Any]:
        asked.set()
        return {}

    with control.answering(tell, asked.clear), socket.socket(socket.AF_UNIX) as asking:
        [path] = control.folders()[0].iterdir()
        [thread] = [each for each in threading.enumerate() if each.name == "bokeh-ssh control"]
        assert thread.ident
        clock = time.pthread_getcpuclockid(thread.ident)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        lowest = os.dup(0)
        os.close(lowest)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
        try:
            asking.connect(str(path))
            asking.sendall(b'{"request": "status"}\n')
            assert not asked.wait(1)
            spent = time.clock_gettime(clock)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert asked.wait(30)
    assert spent < 0.1


def test_folder_of_others_is_not_used(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where others may enter the folder of sockets there is none, and the tunnel works all the same."""
    folder = control.folders()[0]
    folder.mkdir(mode=0o755)
    with Program(*forward(machine)) as program:
        assert greeting(program.address()) == b"SSH-"
        assert list(folder.iterdir()) == []
    folder.rmdir()


def test_status_is_the_live_one(machine: Machine, tmp_path: Path) -> None:
    """``status`` has each hop with its round trip, what was carried, and connections that are open; after a
    loss also that; in words for people, and in columns elsewhere. A tunnel is named by its machine too."""
    with Cable(machine.host, machine.port) as cable:
        with Program(*forward(cable.machine(machine, tmp_path))) as program:
            address = program.address()
            with socket.create_connection(("localhost", int(address.rpartition(":")[2]))) as sock:
                sock.recv(4)
                [tunnel] = told("status", address)
                assert [each["pid"] for each in told("status", machine.host)] == [tunnel["pid"]]
                status = tunnel["status"]
                [hop] = status["hops"]
                assert (hop["host"], hop["state"]) == (machine.host, "open")
                assert 0 < hop["round_trip"] < 5
                assert status["sessions"] == 1
                assert status["received"] > 500
                assert status["rate"] > 0
            cable.refuse()
            until(lambda: find_tunnels()[0].state != "ready")
            assert [hop.state for hop in live().hops] == ["lost"]
            cable.mend()
            until(lambda: find_tunnels()[0].state == "ready")
            assert live().losses == 1
            assert live().received > status["received"]
            columns = run_here("status").stdout.rstrip("\n").split("\t")
            assert columns[:3] == [str(program.process.pid), "ready", address]
            with OnTerminal("status", "--watch") as shown:
                shown.expect("1 loss survived")
                os.write(shown._master, b"\x03")
                assert shown.end() == 0, shown
            assert f"here -- {machine.host} (open" in shown.screen
            with Program("status", "--watch", "--json") as watching:
                watching.expect('"losses": 1')
                watching.interrupt()
                assert watching.end() == 0, watching


@pytest.mark.parametrize("isolate", [True, False])
def test_status_in_a_program(machine: Machine, tmp_path: Path, isolate: bool) -> None:
    """``tunnel.status()`` tells the same in a program, with the connection here or in a child process; once
    it is closed, its time stands still."""
    app = tmp_path / "app.py"
    app.write_text(light_bokeh.APP)
    with bokeh_ssh.DirectTunnel(
        machine.host, machine.user, app=app, upload=True, local_port=0, isolate=isolate, **machine.login
    ) as tunnel:
        status = tunnel.status()
        assert (status.state, len(status.hops)) == ("ready", 1)
        assert status.hops[0].state == "open"
        assert status.received > 0
        assert status.uptime > 0
        assert "round trip" in tunnel._repr_html_()
    closed = tunnel.status()
    assert closed.state == "closed"
    assert closed == tunnel.status()


def test_log_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The log of a tunnel in the background has the time of each line, and is begun again when it is long."""
    monkeypatch.setattr(background, "_LONGEST", 1000)
    file = background.LogFile(tmp_path / "1.log")
    for number in range(100):
        file.write(f"line {number}\n")
    assert file.path.stat().st_size < 1100
    assert sorted(path.name for path in tmp_path.glob("*.log*")) == ["1.log", "1.log.1"]
    assert file.path.read_text().splitlines()[-1].endswith(" line 99")
    assert file.path.read_text()[:2] == "20"
