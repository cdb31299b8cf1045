"""A connection that ``ssh`` keeps open (ControlMaster) is the way to a machine behind it; with real ones."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import shutil
import signal
import socket
import struct
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from beds import Machine, until
from bokeh_ssh import DirectTunnel, LocalForward
from bokeh_ssh._cli.doctor import examine
from bokeh_ssh._core.errors import AuthenticationError, RefusedError
from bokeh_ssh._core.events import Authenticated, Connecting, Event, Reconnected, Warned
from bokeh_ssh._core.host import Host
from bokeh_ssh._server.options import ServerOptions
from bokeh_ssh._ssh import control_master
from bokeh_ssh._ssh.auth import own_server
from bokeh_ssh._ssh.connect import connect
from bokeh_ssh._ssh.sftp_writer import Sftp
from events import kinds
from skips import missing

if os.name != "posix":
    pytest.skip("control sockets are POSIX's", allow_module_level=True)

#: More programs to try, by hand: BOKEH_SSH_PROGRAMS=/path/of/another/ssh.
PROGRAMS = ["ssh", *os.environ.get("BOKEH_SSH_PROGRAMS", "").split()]


class Masters:
    """A gate and a machine behind it, with an ssh config, and ssh as the gate's master.

    :ivar gate: its sshd
    :ivar socket: the control socket
    """

    def __init__(self, gate: Machine, inner: Machine, folder: Path, program: str) -> None:
        self.gate = gate
        self.inner = inner
        self.program = program
        self.socket = folder / "gate.sock"
        self._config = folder / "config"
        self._processes: list[subprocess.Popen[bytes]] = []
        self.write(f"ControlPath {self.socket}")

    def write(self, *lines: str, way: str = "ProxyJump gate", key: str | None = None) -> None:
        """Write the config, with these lines for the gate; ``ssh`` has a key for it, and we have ``key``."""
        gate = self.gate.ssh_config("gate").replace(str(self.gate.key_path), key or "/nonexistent")
        inner = self.inner.ssh_config("inner")
        self._config.write_text(
            f"{gate}" + "".join(f"  {line}\n" for line in lines) + f"{inner}  {way}\n", encoding="utf-8"
        )
        self._config.chmod(0o600)

    def start(self) -> subprocess.Popen[bytes]:
        """Log in to the gate, as a person does in a terminal, and stay."""
        words = self.gate.ssh("-N", "-M", "-S", str(self.socket), "gate")
        process = subprocess.Popen(
            [self.program, *words[1:-1]], stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        self._processes.append(process)
        until(lambda: self.control("check") == 0, what="the master to listen")
        return process

    def control(self, word: str) -> int:
        """Say something to the master (``ssh -O``)."""
        command = [self.program, "-F", "none", "-S", str(self.socket), "-O", word, "x"]
        return subprocess.run(command, capture_output=True, check=False).returncode

    def host(self, **keywords: Any) -> Host:
        return Host("inner", ssh_config=self._config, allow_agent=False, look_for_keys=False, **keywords)

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait(30)


@pytest.fixture(params=PROGRAMS)
def masters(
    request: pytest.FixtureRequest, sshd: Callable[..., Machine], tmp_path: Path, account: Path
) -> Iterator[Masters]:
    """A gate that we cannot log in to, since we have no key for it, and a machine behind it."""
    if shutil.which(request.param) is None:
        missing("OpenSSH's ssh is not installed")
    folder = Path(os.environ["BOKEH_SSH_DIR"])  # a short path
    folder.mkdir()
    made = Masters(sshd(), sshd(), folder, request.param)
    yield made
    made.close()


def enter(masters: Masters, **keywords: Any) -> tuple[list[Event], str]:
    """Log in, run a command; return the events, and who asked the inner machine."""
    events: list[Event] = []
    with connect(masters.host(**keywords), on_event=events.append) as connection:
        assert connection.ping(10)
        with connection.open_socket(("127.0.0.1", masters.inner.port), timeout=10) as sock:
            sock.settimeout(30)
            assert sock.recv(4) == b"SSH-"
    return events, " ".join(event.via for event in events if isinstance(event, Connecting))


@pytest.mark.parametrize("way", ["ProxyJump gate", "ProxyCommand ssh -W %h:%p gate"])
def test_master_is_the_way(way: str, masters: Masters, no_leaks: Callable[[], Any]) -> None:
    """Who has logged in to a jump host with ssh is not asked again: the gate sees no login of ours."""
    masters.write(f"ControlPath {masters.socket}", way=way)
    masters.start()
    with no_leaks():
        events, via = enter(masters)
    assert via == "the ControlMaster of gate"
    assert [event.host for event in events if isinstance(event, Authenticated)] == ["inner"]
    assert masters.control("check") == 0, "the master was ended"


def test_channels_are_asked_for_behind_it(masters: Masters, asked: list[int]) -> None:
    """The login to the machine behind the master takes along what is wanted next, as any other does."""
    masters.start()
    where = "127.0.0.1", masters.inner.port
    for count in (0, 1):
        with (
            connect(masters.host(), ahead=[where]) as connection,
            connection.open_socket(where, timeout=10) as sock,
        ):
            sock.settimeout(30)
            assert sock.recv(4) == b"SSH-"
        assert asked.pop() == count


@pytest.mark.parametrize(
    ("line", "used"),
    [
        ("ControlPath {}", True),
        ("ControlPath {}\n  ControlMaster auto\n  ControlPersist 5m", True),
        ("ControlPath {}\n  ControlMaster autoask", True),
        ("ControlPath {}\n  ControlMaster yes", False),
        ("ControlPath {}\n  ControlMaster ask", False),
        ("ControlPath none", False),
        ("ControlPath {}.other", False),
        ("ControlPath ~/%n-%h-%p-%r-%L-%i", True),
        ("ControlPath ~/%C", True),
        ("ControlPath ${{HOME}}/s", True),
    ],
)
def test_lines(
    line: str, used: bool, masters: Masters, account: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lines of the config count as with ``ssh``, tokens and all: which is asked for the path."""
    line = line.format(masters.socket)
    masters.write(line)
    if "~" in line or "$" in line:
        short = masters.socket.with_name("home")
        short.symlink_to(account)
        monkeypatch.setenv("HOME", str(short))
        said = subprocess.run(
            ["ssh", "-G", "-F", str(masters._config), "gate"], capture_output=True, check=True, text=True
        ).stdout
        path = next(each.split()[1] for each in said.splitlines() if each.startswith("controlpath "))
        # ssh takes the home of the account database; a test has another.
        real = Path(f"~{masters.gate.user}").expanduser()
        masters.socket = Path(path.replace(f"{real}/", f"{short}/", 1) if "~" in line else path)
    masters.start()
    if used:
        assert enter(masters)[1] == "the ControlMaster of gate"
    else:
        with pytest.raises(AuthenticationError, match=r"^gate: "):
            enter(masters)


def test_key_of_the_gate(masters: Masters) -> None:
    """Without a live master the jump host is logged in to as ever, and nothing is said."""
    masters.write(f"ControlPath {masters.socket}", key=str(masters.gate.key_path))
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(masters.socket))
    events, via = enter(masters)
    assert via.split() == ["gate"]
    assert not any(isinstance(event, Warned) for event in events)


def hang(masters: Masters) -> None:
    masters.start().send_signal(signal.SIGSTOP)


def of_another(masters: Masters) -> None:
    if os.geteuid():
        pytest.skip("needs root")
    masters.start()
    os.chown(masters.socket, 12345, 12345)


def newer(masters: Masters) -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(masters.socket))
    listener.listen()

    def serve() -> None:
        with listener, listener.accept()[0] as sock:
            sock.sendall(struct.pack(">III", 8, 1, 5))
            sock.recv(100)

    threading.Thread(target=serve, daemon=True).start()


@pytest.mark.parametrize(
    ("arrange", "why"),
    [
        (hang, "it did not answer in time"),
        (of_another, "its control socket belongs to another user (uid 12345)"),
        (newer, "it speaks version 5 of the protocol, not 4"),
    ],
)
def test_master_that_is_not_used(
    arrange: Callable[[Masters], None], why: str, masters: Masters, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that hangs, is another user's or of another kind is told, and the jump host is logged in to."""
    monkeypatch.setattr(control_master, "_PATIENCE", 1.0)
    masters.write(f"ControlPath {masters.socket}", key=str(masters.gate.key_path))
    arrange(masters)
    began = time.monotonic()
    events, via = enter(masters)
    assert time.monotonic() - began < 20
    assert via == " gate"
    told = [event.text for event in events if isinstance(event, Warned)]
    assert told == [f"the ControlMaster of gate is not used ({why}); logging in"]


def test_what_the_gate_refuses(masters: Masters) -> None:
    """A machine that the gate cannot reach is an error that says so, with no second login."""
    masters.inner.port = 1
    masters.write(f"ControlPath {masters.socket}")
    masters.start()
    with pytest.raises(RefusedError, match=r"ControlMaster of gate: its server forbids .* port 1, or cannot"):
        enter(masters)


def test_machine_that_does_not_answer(masters: Masters, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that lets the gate wait is an error after the timeout, with no second login at the gate."""
    with socket.socket() as full, ExitStack() as stack:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        for _ in range(3):
            caller = stack.enter_context(socket.socket())
            caller.setblocking(False)
            caller.connect_ex(full.getsockname())
        masters.inner.port = full.getsockname()[1]
        masters.write(f"ControlPath {masters.socket}", key=str(masters.gate.key_path))
        masters.start()
        with pytest.raises(RefusedError, match=r"the ControlMaster of gate cannot connect to 127.0.0.1 port"):
            enter(masters, timeout=3)


def test_master_on_a_dead_line(masters: Masters, monkeypatch: pytest.MonkeyPatch) -> None:
    """A master whose own connection is dead, as after a journey, delays a login by the timeout at most."""
    monkeypatch.setattr(control_master, "_PATIENCE", 1.0)
    masters.write(f"ControlPath {masters.socket}", key=str(masters.gate.key_path))
    masters.start()
    subprocess.run(["pkill", "-STOP", "-P", str(masters.gate.server.pid)], check=True)
    events, via = enter(masters, timeout=5)
    assert via.split() == ["the", "ControlMaster", "of", "gate", "gate"]
    assert ["did not answer in time" in event.text for event in events if isinstance(event, Warned)] == [True]
    subprocess.run(["pkill", "-CONT", "-P", str(masters.gate.server.pid)], check=True)


def to_the_gate(masters: Masters, **keywords: Any) -> Host:
    """The gate itself, to which the master is connected."""
    return dataclasses.replace(masters.host(**keywords), name="gate")


def test_machine_of_the_master(
    masters: Masters, sshd: Callable[..., Machine], no_leaks: Callable[[], Any]
) -> None:
    """The master's own machine is entered without a login; all that a connection carries goes there."""
    place = masters.socket.with_name("tmp")  # other runs have files of their own in /tmp
    place.mkdir()
    masters.gate = sshd(SetEnv=f'MARK=as-after-a-login OTHER="two words" TMPDIR={place}')
    masters.write(f"ControlPath {masters.socket}")
    masters.start()
    events: list[Event] = []
    said: list[bytes] = []
    with no_leaks(), connect(to_the_gate(masters), on_event=events.append) as connection:
        assert connection.methods == ("ControlMaster",)
        to = {"on_stdout": said.append, "on_stderr": said.append, "on_exit": lambda _: None}
        assert connection.run("id -un; umask; echo $MARK", **to, timeout=30).ended.wait(30)
        mask = masters.gate.execute("umask")
        assert b"".join(said).decode().split() == [masters.gate.user, str(mask), "as-after-a-login"]
        with connection.open_socket(("127.0.0.1", masters.inner.port), timeout=10) as sock:
            assert sock.recv(4) == b"SSH-"
        with contextlib.closing(Sftp(connection)) as sftp:
            sftp.wait()
        assert list(place.glob("bokeh-ssh-sshd-*"))
    assert [event.via for event in events if isinstance(event, Connecting)] == ["the ControlMaster of gate"]
    until(lambda: not list(place.iterdir()), what="its files to be removed")


def test_doctor(masters: Masters) -> None:
    """``bokeh-ssh doctor`` says that the master was the way."""
    masters.start()
    found = itertools.islice(examine(to_the_gate(masters), ServerOptions(), lambda _: None), 4)
    said = {each.check: each.text for each in found}
    assert said["port"] == "gate is reached through the ControlMaster of gate, which your ssh keeps open"
    assert " by ControlMaster (" in said["login"]


def test_tunnel_to_the_machine_of_the_master(masters: Masters, container: Callable[..., Machine]) -> None:
    """A whole tunnel works there, as an account that is not root, and survives the end of the master."""
    masters.gate = container()
    masters.write(f"ControlPath {masters.socket}", key=str(masters.gate.key_path))
    master = masters.start()
    events: list[Event] = []
    host = to_the_gate(masters)
    with DirectTunnel(host, python=masters.gate.python, on_event=events.append) as tunnel:
        metadata = f"http://localhost:{tunnel.local_port}/metadata"
        urllib.request.urlopen(metadata, timeout=30).close()
        master.kill()
        until(lambda: Reconnected in kinds(events))
        urllib.request.urlopen(metadata, timeout=30).close()
        until(lambda: masters.gate.execute("ls -d /tmp/bokeh-ssh-sshd-*").status, what="its files to be gone")
    methods = [event.methods for event in events if isinstance(event, Authenticated)]
    assert methods == [("ControlMaster",), ("publickey",)]
    assert [event.same_server for event in events if isinstance(event, Reconnected)] == [True]


@pytest.mark.parametrize("why", ["ForceCommand", "no sshd"])
def test_machine_without_an_own_server(
    why: str, masters: Masters, sshd: Callable[..., Machine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no SSH server of the account's own can be had, that is told, and the login is as ever."""
    if why == "ForceCommand":
        masters.gate = sshd(ForceCommand="/bin/true")
        text = "no command can be run there"
    else:
        monkeypatch.setattr(own_server, "_SCRIPT", own_server._SCRIPT.replace("-v sshd", "-v no-such-sshd"))
        text = "there is no sshd"
    masters.write(f"ControlPath {masters.socket}", key=str(masters.gate.key_path))
    masters.start()
    events: list[Event] = []
    with connect(to_the_gate(masters), on_event=events.append) as connection:
        assert connection.methods == ("publickey",)
    told = [event.text for event in events if isinstance(event, Warned)]
    assert told == [f"the ControlMaster of gate is not used ({text}); logging in"]


@pytest.mark.parametrize("end", ["kill", "exit", "inner"])
def test_end_is_noticed(end: str, masters: Masters) -> None:
    """The end of the master or of the machine behind it is noticed at once, and not by a silence."""
    master = masters.start()
    with connect(masters.host()) as connection:
        if end == "kill":
            master.kill()
        elif end == "exit":
            assert masters.control("exit") == 0
        else:
            subprocess.run(["pkill", "-KILL", "-P", str(masters.inner.server.pid)], check=True)
        assert connection.lost.wait(10), "not noticed before the keepalive's time"


@pytest.mark.parametrize("again", ["login", "master"])
def test_reconnect(again: str, masters: Masters) -> None:
    """When the master ends in the middle, the forward comes back: by a new master, else by a login."""
    masters.write(f"ControlPath {masters.socket}", key=str(masters.gate.key_path))
    master = masters.start()
    events: list[Event] = []
    host = masters.host()
    with LocalForward(host, remote_port=masters.inner.port, on_event=events.append) as forward:
        if again == "master":
            masters.socket.unlink()
            masters.start()
        master.kill()
        until(lambda: Reconnected in kinds(events))
        with socket.create_connection(("127.0.0.1", forward.local_port), timeout=30) as sock:
            assert sock.recv(4) == b"SSH-"
    way = ["the ControlMaster of gate"] + (
        ["", "gate"] if again == "login" else ["the ControlMaster of gate"]
    )
    assert [event.via for event in events if isinstance(event, Connecting)] == way


def test_much_both_ways(masters: Masters) -> None:
    """Megabytes go through both ways at once, and arrive."""
    masters.start()
    received: list[bytes] = []
    with connect(masters.host()) as connection:
        session = connection.run(
            "head -c 20000000 /dev/zero; cat",
            on_stdout=lambda data: received.append(bytes(data)),
            on_stderr=lambda _: None,
            on_exit=lambda _: None,
            timeout=30,
        )
        for _ in range(100):
            session.write(bytes(100_000))
        session.write_eof()
        assert session.ended.wait(60)
    assert sum(map(len, received)) == 30_000_000
