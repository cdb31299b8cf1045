"""``ProxyCommand``: programs that make the connection, what becomes of them, and those that need not run."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from beds import Machine, until
from bokeh_ssh import (
    ConfigError,
    ConnectError,
    Connecting,
    ConnectTimeoutError,
    DirectTunnel,
    Event,
    Host,
    LocalForward,
    Reconnected,
    UnknownHostKeyError,
)
from bokeh_ssh._ssh.config.syntax import as_jump
from bokeh_ssh._ssh.proxy_command import ProxySocket
from bokeh_ssh._ssh.route import find_route, goes_its_own_way

if os.name != "posix":
    pytest.skip("programs of POSIX", allow_module_level=True)

from local_runner import alive, processes

#: Joins its streams to host and port; more words are for those who look for it. As nc does, without being nc.
RELAY = """
import os, signal, socket, sys, threading
if "stubborn" in sys.argv:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
with open(sys.argv[3], "a") as file:
    print(os.getpid(), *sys.argv[1:3], *sys.argv[4:], file=file)
sock = socket.create_connection((sys.argv[1], int(sys.argv[2])))
def up():
    while data := os.read(0, 65536):
        sock.sendall(data)
    if "stubborn" not in sys.argv:
        sock.shutdown(socket.SHUT_WR)
threading.Thread(target=up, daemon=True).start()
while data := sock.recv(65536):
    os.write(1, data)
if "stubborn" in sys.argv:
    threading.Event().wait()
"""


class Relay:
    """A program that relays, and what it has noted of its runs: process id, host, port, its other words."""

    def __init__(self, place: Path) -> None:
        self._program = place / "relay.py"
        self._program.write_text(RELAY)
        self._notes = place / "runs"

    def command(self, *words: str) -> str:
        return f"{shlex.quote(sys.executable)} {self._program} %h %p {self._notes} {' '.join(words)}"

    @property
    def runs(self) -> list[list[str]]:
        text = self._notes.read_text() if self._notes.exists() else ""
        return [line.split() for line in text.splitlines()]

    @property
    def pid(self) -> int:
        """That of the newest."""
        return int(self.runs[-1][0])


@pytest.fixture
def relay(tmp_path: Path) -> Relay:
    return Relay(tmp_path)


def configure(account: Path, machine: Machine, *lines: str) -> None:
    text = machine.ssh_config("far") + "".join(f"  {line}\n" for line in lines)
    (account / ".ssh" / "config").write_text(text)


def test_program_makes_the_connection(
    account: Path, machine: Machine, relay: Relay, no_leaks: Callable[..., AbstractContextManager[None]]
) -> None:
    """What the config names is run with its tokens put in and is the line, host key and all; it has ended
    when the tunnel has, and nothing of it is left open."""
    configure(account, machine, f"ProxyCommand {relay.command('%n', '%r', '100%%')}")
    events: list[Event] = []
    with (
        no_leaks(),
        DirectTunnel("far", python=machine.python, isolate=False, on_event=events.append) as tunnel,
    ):
        assert tunnel.state == "ready"
        assert [event.via for event in events if isinstance(event, Connecting)] == ["its ProxyCommand"]
        [[pid, *words]] = relay.runs
        assert words == [machine.host, str(machine.port), "far", machine.user, "100%"]
        assert alive(int(pid))
    until(lambda: not alive(int(pid)), what="the program to end")
    (account / "other").touch()
    with pytest.raises(UnknownHostKeyError):
        LocalForward("far", remote_port=9, known_hosts=str(account / "other")).open()


def test_in_a_child_process_too(account: Path, embedded: Callable[..., Machine], relay: Relay) -> None:
    """An isolated tunnel's program ends with it as well."""
    machine = embedded()
    configure(account, machine, f"ProxyCommand {relay.command()}")
    with LocalForward("far", remote_port=9, isolate=True):
        pid = relay.pid
        assert alive(pid)
    until(lambda: not alive(pid), what="the program to end")


def test_program_that_is_killed_is_run_again(
    account: Path, embedded: Callable[..., Machine], relay: Relay
) -> None:
    """A program that ends is a line that went down: it is run again, and the forward goes on."""
    machine = embedded()
    configure(account, machine, f"ProxyCommand {relay.command()}")
    events: list[Event] = []
    with LocalForward("far", remote_port=machine.port, on_event=events.append) as forward:
        os.kill(relay.pid, signal.SIGKILL)
        until(lambda: any(isinstance(event, Reconnected) for event in events), what="the line to be back")
        assert len(relay.runs) == 2
        with socket.create_connection(("127.0.0.1", forward.local_port), timeout=20) as sock:
            assert sock.recv(4) == b"SSH-"


def test_program_that_does_not_want_to_end_is_ended(
    account: Path, embedded: Callable[..., Machine], relay: Relay
) -> None:
    """One that heeds neither the end of its input nor SIGHUP is killed, with what it has started."""
    machine = embedded()
    configure(account, machine, f"ProxyCommand /bin/sh -c '{relay.command('stubborn')}; true'")
    with LocalForward("far", remote_port=9):
        pid = relay.pid
    until(lambda: not alive(pid), what="the program to be killed")


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("/bin/sh -c 'echo no route to it >&2; exit 3'", r"status 3: no route to it\)"),
        ("/no/such/program %h", r"status 127: .*/no/such/program"),
        ("kill -9 $$", r"status -9|status 137|status 1"),
        ("[ -n a ] && nc %h %p", r"its ProxyCommand ended .*status 0\); run that line .*MaxStartups"),
    ],
)
def test_program_that_fails_is_told(
    account: Path, embedded: Callable[..., Machine], command: str, words: str
) -> None:
    """A program that ends at once is one error, with its status and its own last words."""
    configure(account, embedded(), f"ProxyCommand {command}")
    with pytest.raises(ConnectError, match=words) as caught:
        LocalForward("far", remote_port=9).open()
    assert caught.value.host == "far"
    assert caught.value.hint


def test_shell_that_is_not_there_is_told(
    account: Path, embedded: Callable[..., Machine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the shell that is to run it, no program is run, and that is said."""
    configure(account, embedded(), "ProxyCommand true")
    monkeypatch.setenv("SHELL", "/no/such/shell")
    with pytest.raises(ConnectError, match="cannot be run"):
        LocalForward("far", remote_port=9).open()


def test_program_that_says_nothing_is_given_up(
    account: Path, embedded: Callable[..., Machine], mark: str
) -> None:
    """One that takes all and says nothing is given up in time, and ended."""
    configure(account, embedded(), f"ProxyCommand {shlex.quote(sys.executable)} -c 'input(); input()' {mark}")
    with pytest.raises(ConnectTimeoutError):
        LocalForward("far", remote_port=9, timeout=1.5).open()
    until(lambda: not processes(mark), what="the program to end")


def test_forked_child_leaves_the_program_alone(
    account: Path, embedded: Callable[..., Machine], relay: Relay
) -> None:
    """A fork of this program closes its copy of the line; the program, which is the parent's, goes on."""
    machine = embedded()
    configure(account, machine, f"ProxyCommand {relay.command()}")
    with LocalForward("far", remote_port=machine.port) as forward:
        child = os.fork()
        if child == 0:
            os._exit(0 if forward.state == "closed" else 1)
        assert os.waitpid(child, 0)[1] == 0
        with socket.create_connection(("127.0.0.1", forward.local_port), timeout=20) as sock:
            assert sock.recv(4) == b"SSH-"
        assert alive(relay.pid)


def test_over_pipes(relay: Relay) -> None:
    """Where a program cannot have a socket for its streams (Windows), it is the same over pipes."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        host, port = server.getsockname()
        command = relay.command().replace("%h", host).replace("%p", str(port))
        line = ProxySocket.start(command, name="far", direct=False)
        far, _ = server.accept()
        data = os.urandom(3_000_000)
        with far:
            sender = threading.Thread(target=line.sendall, args=(data,))
            sender.start()
            got = b""
            while len(got) < len(data):
                got += far.recv(65536)
            sender.join(30)
            assert got == data
            far.sendall(b"there")
            assert line.recv(5) == b"there"
            far.shutdown(socket.SHUT_RDWR)
            assert line.recv(5) == b""
            assert line.ended()[0] in (0, None)
        line.close()
    until(lambda: not alive(relay.pid), what="the program to end")


# --- what needs no program


@pytest.mark.parametrize(
    ("command", "target"),
    [
        ("ssh -W %h:%p gate", "gate"),
        ("ssh gate -W %h:%p", "gate"),
        ("exec /usr/bin/ssh -q -W [%h]:%p me@gate", "me@gate"),
        ("ssh -xaqTW%h:%p -p 2222 gate", "gate:2222"),
        ("ssh -l me -l other -W %h:%p ::1 -p 7", "me@[::1]:7"),
        ("ssh -W %h:%p -l me you@gate", "you@gate"),
        ("ssh -W %h:%p %r@gate", "%r@gate"),
        ("ssh -W %h:22 gate", None),
        ("ssh gate nc %h %p", None),
        ("ssh -W %h:%p gate more", None),
        ("ssh -W %h:%p -o User=x gate", None),
        ("ssh -W %h:%p -F other gate", None),
        ("ssh -W %h:%p", None),
        ("ssh -W %h:%p ssh://gate", None),
        ("ssh -W %h:%p gate 2> /dev/null", None),
        ("ssh -W %h:%p $GATE", None),
        ("ssh -W %h:%p 'gate", None),
        ("cloudflared access ssh --hostname %h", None),
        ("", None),
    ],
)
def test_ssh_that_only_leads_on_is_a_jump(command: str, target: str | None) -> None:
    """``ssh -W %h:%p`` with what a jump can follow is one; all else is a command, and left to it."""
    assert as_jump(command) == target


def test_jump_that_was_a_command_needs_no_ssh(
    account: Path, embedded: Callable[..., Machine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such a command leads through the other machine by our own means: with its login, and its questions."""
    gate, far = embedded(), embedded()
    monkeypatch.setenv("PATH", "/nowhere")
    configure(account, far, f"ProxyCommand ssh -q -W %h:%p -p {gate.port} %r@gate")
    with (account / ".ssh" / "config").open("a") as file:
        file.write(gate.ssh_config("gate"))
    events: list[Event] = []
    with LocalForward("far", remote_port=9, on_event=events.append):
        pass
    assert [event.via for event in events if isinstance(event, Connecting)] == ["", "gate"]
    assert [machine.server.logins for machine in (gate, far)] == [1, 1]
    configure(account, far, "ProxyCommand ssh -W %h:%p 'a b'")
    with pytest.raises(ConfigError, match="ProxyCommand"):
        LocalForward("far", remote_port=9).open()


def test_way_counts_as_the_hosts_own(account: Path, embedded: Callable[..., Machine], relay: Relay) -> None:
    """A host with such a line is not also led through a gateway; ``jump`` counts before it, and a host in
    the middle of a list is reached through the one before."""
    machine = embedded()
    configure(account, machine, f"ProxyCommand {relay.command()}")
    assert goes_its_own_way(Host("far"))
    assert find_route(Host("far"))[-1].proxy_command
    assert not find_route(Host("far", jump=()))[-1].proxy_command
    assert [bool(hop.proxy_command) for hop in find_route(Host("x", jump="far,far2"))] == [True, False, False]
    assert [bool(hop.proxy_command) for hop in find_route(Host("x", jump="far2,far"))] == [False] * 3
