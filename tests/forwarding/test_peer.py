"""Other users of this machine do not get in, beside ``allow_others``, which is what ``ssh -L`` does."""

from __future__ import annotations

import os
import shlex
import socket
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import apps
import conformance
from beds import Key, Machine, until
from bokeh_ssh import DirectTunnel, Event, LocalForward, UsageError, Warned
from bokeh_ssh._forwarding import peer_uid
from cable import Cable

if TYPE_CHECKING:
    from docker_bed import Container

linux = pytest.mark.skipif(sys.platform != "linux", reason="no other system tells who connects")

#: What an attacker runs: asks a port for a page, at both loopback addresses; then sends and hangs up.
_ATTACK = """
import http.client, socket, sys
port, path = int(sys.argv[1]), sys.argv[2]
for host in ("127.0.0.1", "::1"):
    try:
        client = http.client.HTTPConnection(host, port, timeout=5)
        client.request("GET", path, headers={"Host": f"localhost:{port}"})
        answer = client.getresponse()
        print("status", answer.status, "bokeh" in answer.read().decode(errors="replace").lower())
    except OSError as error:
        print("tried", type(error).__name__)
"""


@contextmanager
def on_one_machine(
    container: Callable[..., Container], key: Key, *words: str
) -> Iterator[tuple[Container, int, Any]]:
    """Run ``bokeh-ssh direct`` in a container with two accounts, to the container itself; gives the port."""
    machine = container(env={"USER_KEY": key.private})
    app = apps.put(machine, "sliders.py", apps.SLIDER)
    command = [machine.python, "-u", "-m", "bokeh_ssh", "direct", "alice@localhost", app, *words]
    command += ["--host-keys", "accept-new", "--python", machine.python]
    with machine.spawn(["sh", "-c", f"cd && exec {shlex.join(command)}"], user="alice") as running:
        until(lambda: "http://localhost:" in running.log or not running.running, timeout=60)
        port = running.log.partition("http://localhost:")[2].partition("/")[0]
        assert port.isdigit(), f"running: {running.running}; it says {running.log!r}"
        yield machine, int(port), running


def attack(machine: Container, port: int, user: str) -> str:
    """Have a user of the machine ask for the page; gives what came of it."""
    done = machine.execute([machine.python, "-c", _ATTACK, str(port), "/sliders"], user=user)
    assert done.stdout.count("\n") == 2, done.stderr
    return done.stdout


def test_other_user_of_this_machine_gets_nowhere(container: Callable[..., Container], key: Key) -> None:
    """The tunnel's local port lets its own account in, by its plain address, and nobody else."""
    with on_one_machine(container, key) as (machine, port, running):
        assert "200" not in attack(machine, port, "mallory")
        assert "status 200 True" in attack(machine, port, "alice")
        assert "status 200 True" in attack(machine, port, "root")  # who may do all of it anyway
        mallory = str(machine.execute(["id", "-u", "mallory"]))
        assert f"user {mallory}" in running.log


def test_control_allow_others(container: Callable[..., Container], key: Key) -> None:
    """With ``allow_others``, as with ``ssh -L``, the other user opens the app."""
    with on_one_machine(container, key, "--allow-others") as (machine, port, _):
        assert "status 200 True" in attack(machine, port, "mallory")


def as_nobody(call: Callable[[], object]) -> int:
    """Run a function in a child process of another user; gives its exit status."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.setgid(65534)
            os.setuid(65534)
            call()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@contextmanager
def connected(family: int) -> Iterator[tuple[socket.socket, socket.socket]]:
    """Make a connection on loopback: both ends."""
    host = "::1" if family == socket.AF_INET6 else "127.0.0.1"
    with socket.socket(family) as listener:
        listener.bind((host, 0))
        listener.listen()
        with socket.create_connection(listener.getsockname()[:2]) as here:
            there, _ = listener.accept()
            with there:
                yield here, there


@linux
@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_both_ways_tell_the_same(family: int) -> None:
    """The kernel's answer and its table name the socket at the other end, and no longer once it is closed."""
    with closing(peer_uid.SockDiag()) as diagnosis, connected(family) as (here, there):
        me = os.geteuid(), os.fstat(here.fileno()).st_ino
        assert diagnosis(there) == peer_uid.find_in_table(there) == me
        here.close()
        for owner in (diagnosis(there), peer_uid.find_in_table(there)):
            assert owner is None or owner[1] == 0


@linux
def test_strangers_and_those_who_left_are_told() -> None:
    """A connection of this account passes; one that was closed at once has nobody that could be asked for."""
    with closing(peer_uid.PeerUidCheck()) as strangers, connected(socket.AF_INET) as (here, there):
        assert strangers.foreign_uid(there) is None
        here.sendall(b"DELETE")
        here.close()
        assert strangers.foreign_uid(there) == -1


@linux
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_forward_refuses_other_users(embedded: Callable[..., Machine]) -> None:
    """A forward of any kind refuses them too, with one word for many tries; the control lets them
    in, and so does an address that is open to all."""
    machine = embedded()
    events: list[Event] = []
    with conformance.listen() as target:
        threading.Thread(target=conformance.serve, args=(target,), daemon=True).start()
        common: dict[str, Any] = {"remote_port": target.getsockname()[1], **machine.login}
        for private, keywords in ((True, {}), (False, {"allow_others": True})):
            with LocalForward(
                machine.host, machine.user, on_event=events.append, **common, **keywords
            ) as forward:
                port = forward.local_port

                def ask(port: int = port) -> None:
                    conformance.check_echo(("127.0.0.1", port))

                ask()
                assert [as_nobody(ask) for _ in range(3)] == [int(private)] * 3
                ask()
        told = [event for event in events if isinstance(event, Warned) and "user 65534" in event.text]
        assert len(told) == 1


def test_system_that_does_not_tell_lets_all_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Elsewhere, and where neither way tells the truth, a forward works as ``ssh -L`` does."""
    with connected(socket.AF_INET) as (_, there):
        monkeypatch.setattr(peer_uid.SockDiag, "__call__", lambda self, sock: (os.geteuid(), 1))
        monkeypatch.setattr(peer_uid, "find_in_table", lambda sock: None)
        assert peer_uid.PeerUidCheck().foreign_uid(there) is None
        monkeypatch.setattr(sys, "platform", "darwin")
        assert peer_uid.PeerUidCheck().foreign_uid(there) is None


@linux
def test_answers_to_others_are_passed_over() -> None:
    """A late answer to an earlier question is not taken for that to this one."""
    with closing(peer_uid.SockDiag()) as ask, connected(socket.AF_INET) as (here, there):
        ask(there)
        stale = struct.pack("=IHHII", 16, 20, 0, 7, 0)
        real = ask._socket
        answers = [stale]

        class Line:
            def send(self, data: bytes) -> None:
                real.send(data)

            def recv(self, size: int) -> bytes:
                return answers.pop() if answers else real.recv(size)

        ask._socket = Line()  # type: ignore[assignment]
        assert ask(there) == (os.geteuid(), os.fstat(here.fileno()).st_ino)
        assert answers == []
        ask._socket = real


def test_socket_needs_no_leave(tmp_path: Path) -> None:
    """A Unix socket is its owner's alone, so that there is nothing to allow."""
    with pytest.raises(UsageError, match="allow_others"):
        LocalForward("host", remote_port=1, local_socket=tmp_path / "it", allow_others=True)


def burst(port: int, count: int = 200) -> None:
    """Connect, send 100 bytes and close at once, many times; a refusal may come before that is done."""
    for _ in range(count):
        with suppress(ConnectionError), socket.create_connection(("127.0.0.1", port), timeout=20) as sock:
            sock.sendall(b"x" * 100)


@contextmanager
def counting() -> Iterator[tuple[int, list[int]]]:
    """Listen for connections and count what each brings until it ends; gives the port, and the counts."""
    counts: list[int] = []

    def take(sock: socket.socket) -> None:
        with sock:
            sock.settimeout(30)
            counts.append(len(conformance.read_all(sock)))

    def serve() -> None:
        with suppress(OSError):
            while True:
                sock, _ = listener.accept()
                threading.Thread(target=take, args=(sock,), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0), backlog=512) as listener:
        threading.Thread(target=serve, daemon=True).start()
        yield listener.getsockname()[1], counts
        listener.shutdown(socket.SHUT_RDWR)


@linux
@pytest.mark.parametrize("allow", [None, True], ids=["by default", "allow_others"])
def test_who_sends_and_closes_at_once_is_delivered(sshd: Callable[..., Machine], allow: bool | None) -> None:
    """Of 200 programs that send 100 bytes and close at once, all 20,000 arrive, as through ``ssh -L``."""
    machine = sshd()
    with counting() as (port, counts):
        with LocalForward(
            machine.host,
            machine.user,
            remote_port=port,
            remote_host="127.0.0.1",
            allow_others=allow,
            **machine.login,
        ) as forward:
            burst(forward.local_port)
            until(lambda: sum(counts) >= 20_000, what="all that was sent")
    assert sum(counts) == 20_000


@linux
def test_what_is_refused_is_told(embedded: Callable[..., Machine]) -> None:
    """With ``allow_others=False`` each that closed too soon is refused, and none of them without a word."""
    machine = embedded()
    events: list[Event] = []
    with counting() as (port, counts):
        with LocalForward(
            machine.host,
            machine.user,
            remote_port=port,
            remote_host="127.0.0.1",
            allow_others=False,
            on_event=events.append,
            **machine.login,
        ) as forward:
            burst(forward.local_port)
            with socket.create_connection(("127.0.0.1", forward.local_port), timeout=20) as last:
                last.sendall(b"y" * 7)  # one that stays is let in, after all that came before it
                last.shutdown(socket.SHUT_WR)
                until(lambda: 7 in counts, what="what it sent")
    told = [event.text for event in events if isinstance(event, Warned) and "closed it already" in event.text]
    assert told
    assert len(told) < 10
    refused = int(told[-1].rpartition(": ")[2].split()[0]) if len(told) > 1 else 1
    until(lambda: refused + sum(count == 100 for count in counts) == 200, what="those that were let in")


@linux
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_tunnel_takes_nothing_from_who_closes_at_once(embedded: Callable[..., Machine]) -> None:
    """Not a byte of another user gets through a tunnel's ports, however soon it closes."""
    machine = embedded()
    with counting() as (port, counts):
        with DirectTunnel(
            machine.host,
            machine.user,
            command=f"{machine.python} -m http.server --bind 127.0.0.1 {{port}}",
            forwards=[f"0:127.0.0.1:{port}"],
            isolate=False,
            **machine.login,
        ) as tunnel:
            beside = int(tunnel.forwards[0].rpartition(":")[2])
            assert as_nobody(lambda: burst(beside, 50)) == 0  # it was there
            with socket.create_connection(("127.0.0.1", beside), timeout=20) as mine:
                mine.sendall(b"z" * 5)
                mine.shutdown(socket.SHUT_WR)
                until(lambda: 5 in counts, what="what this account sent")
    assert 100 not in counts


@linux
def test_who_gives_up_while_the_line_is_away_is_delivered(
    embedded: Callable[..., Machine], tmp_path: Path
) -> None:
    """What a program sent before it closed, while there was no line, is delivered when the line is back."""
    machine = embedded()
    with counting() as (port, counts), Cable(machine.host, machine.port) as cable:
        there = cable.machine(machine, tmp_path)
        with LocalForward(
            there.host, there.user, remote_port=port, remote_host="127.0.0.1", **there.login
        ) as forward:
            cable.refuse()
            until(lambda: forward.state in ("lost", "reconnecting"), what="the loss")
            burst(forward.local_port, 20)
            cable.mend()
            until(lambda: sum(counts) >= 2000, what="all that was sent")
