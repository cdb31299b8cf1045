"""Many connections, large messages, slow readers, bad links, impatient servers."""

from __future__ import annotations

import hashlib
import json
import selectors
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from websockets.sync.client import connect
from websockets.sync.server import ServerConnection, serve

import beds
import conformance
from beds import Machine, until
from bokeh_ssh import ConnectionLostError, LocalForward, RemoteForward
from conformance import DEADLINE, ask, pattern, read_all, read_exactly
from rough import Rough
from soak.churn import KINDS
from soak.run import Holding, SoakError, growth, look, soak, watched
from targets import target_here

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/fd").is_dir(), reason="what a process holds is read from /proc"
)
_LOOPBACK = "127.0.0.1"


@pytest.fixture
def files() -> Iterator[None]:
    """Allow this process, and what it starts, as many open files as these tests need."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 6000
    if hard != resource.RLIM_INFINITY and hard < wanted:
        pytest.skip(f"no more than {hard} open files are allowed here (ulimit -Hn), {wanted} are needed")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@contextmanager
def forwards_of(machine: Machine, port: int, directory: Path) -> Iterator[tuple[int, list[int]]]:
    """Open a local and a remote forward in a process of their own; gives its pid and both ports."""
    login = {name: str(value) if isinstance(value, Path) else value for name, value in machine.login.items()}
    order = {"host": machine.host, "user": machine.user, "target": port, "rekey": 0, "login": login}
    with watched(["-m", "soak.forwards"], directory) as process:
        yield process.pid, process.ask(json.dumps(order))["ports"]
        assert process.ask("state")["states"] == ["ready", "ready"]


# Two thousand at once.


@pytest.mark.parametrize("which", [0, 1], ids=["local", "remote"])
def test_two_thousand_connections_are_served_at_once(
    sshd: Callable[..., Machine], files: None, tmp_path: Path, which: int
) -> None:
    """2,000 open connections all answer, with not one thread more and 8 KB each."""
    count = 2000
    with target_in_a_process(tmp_path) as port, forwards_of(sshd(), port, tmp_path) as (pid, ports):
        with ask((_LOOPBACK, ports[which]), "echo") as sock:
            sock.sendall(b"warm")
            assert read_exactly(sock, 4) == b"warm"
        before = look(pid)
        with ExitStack() as stack:
            with ThreadPoolExecutor(16) as pool:
                socks = list(pool.map(lambda _: ask((_LOOPBACK, ports[which]), "echo"), range(count)))
            for number, sock in enumerate(socks):
                stack.enter_context(sock)
                sock.sendall(b"%06d" % number)
            assert [read_exactly(sock, 6) for sock in socks] == [b"%06d" % n for n in range(count)]
            held = look(pid)
            assert held.files >= count, "the proof: they are all open"
            assert held.threads == before.threads
            assert held.memory - before.memory < 8 * count
        until(lambda: look(pid).files <= before.files, what="the connections to end")


@contextmanager
def target_in_a_process(directory: Path) -> Iterator[int]:
    """Run the target in a process of its own, since this one has descriptors enough to hold."""
    import subprocess

    with (directory / "target.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, conformance.__file__, "serve"], stdout=subprocess.PIPE, stderr=log, text=True
        )
        assert process.stdout
        try:
            yield int(process.stdout.readline())
        finally:
            process.kill()
            process.wait()
            process.stdout.close()


def _answered(socks: list[socket.socket]) -> list[socket.socket]:
    """Tell which have been answered by now."""
    with selectors.DefaultSelector() as selector:
        for sock in socks:
            selector.register(sock, selectors.EVENT_READ)
        return [key.fileobj for key, _ in selector.select(0)]  # type: ignore[misc]  # they are all sockets


@pytest.mark.parametrize("room", [30, 0], ids=["short", "control"])
def test_connections_beyond_the_limit_of_files_wait_for_their_turn(
    sshd: Callable[..., Machine], tmp_path: Path, room: int
) -> None:
    """Out of descriptors, what is open goes on, what is new waits, and is served as others end."""
    import resource

    count = 80
    with target_here() as port, forwards_of(sshd(), port, tmp_path) as (pid, ports):
        if room:
            top = max(int(entry.name) for entry in Path("/proc", str(pid), "fd").iterdir())
            _, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (top + 1 + room, hard))
        with ExitStack() as stack:
            socks = [stack.enter_context(ask((_LOOPBACK, ports[0]), "echo")) for _ in range(count)]
            for sock in socks:
                sock.sendall(b"!")
            first = room or count
            until(lambda: len(_answered(socks)) >= first, what="as many answers as there is room for")
            if room:
                until(lambda: "out of file descriptors" in _log(tmp_path), what="the limit to be felt")
                assert len(_answered(socks)) < count
            while socks:
                done = until(lambda: _answered(socks), what="those that waited")  # noqa: B023  # called at once
                for sock in done:
                    assert sock.recv(1) == b"!"
                    sock.close()
                socks = [sock for sock in socks if sock not in done]
        assert ("out of file descriptors" in _log(tmp_path)) == bool(room)


def _log(directory: Path) -> str:
    return (directory / "soak.log").read_text(encoding="utf-8", errors="replace")


# Opening and closing, on and on.


def test_churn_leaves_nothing(sshd: Callable[..., Machine], tmp_path: Path) -> None:
    """``nox -s soak``, shortened: connections end in all ways, keys change, nothing grows."""
    told: list[str] = []
    done = soak(sshd(RekeyLimit="1M"), 8, tmp_path, told.append)
    assert {name for name, _ in done} == {work.__name__ for work in KINDS}, told
    assert len({port for _, port in done}) == 2


def test_growth_is_told() -> None:
    """The control of the above: one thread, one descriptor or a few megabytes more are told."""
    flat = Holding(threads=9, files=20, memory=50_000)
    assert not growth(flat, Holding(threads=9, files=20, memory=51_000))
    assert not growth(flat, Holding(threads=8, files=19, memory=40_000))
    assert growth(flat, Holding(threads=10, files=21, memory=60_000)) == [
        "1 threads more",
        "1 descriptors more",
        "10000 kB more",
    ]


def test_a_wrong_byte_ends_the_churn(
    sshd: Callable[..., Machine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another control: bytes that are not those that were sent make the run fail."""
    monkeypatch.setattr("soak.churn._DOWN", b"?" * len(pattern(3 << 20)))
    with pytest.raises(SoakError):
        soak(sshd(RekeyLimit="1M"), 8, tmp_path, lambda line: None)


# Slow readers.


def test_memory_of_slow_readers_is_bounded(sshd: Callable[..., Machine], tmp_path: Path) -> None:
    """Twelve downloads that nobody reads cost 2 MiB each at most, of their 64 MiB."""
    count, size = 12, 64 << 20
    with target_in_a_process(tmp_path) as port, forwards_of(sshd(), port, tmp_path) as (pid, ports):
        address = (_LOOPBACK, ports[0])
        conformance.check_echo(address)
        before = look(pid)
        with ExitStack() as stack:
            slow = [stack.enter_context(ask(address, f"send {size}")) for _ in range(count)]
            for sock in slow:
                assert sock.recv(1)
            conformance.check_download(address)  # the others go on
            grown = look(pid).memory - before.memory
            assert grown < count * 2048 + 32 * 1024  # the one that is read may have so much under way
            assert grown > 2048, "the control: some of it does wait here"
            digest = hashlib.sha256(b"\x00")
            for part in iter(lambda: slow[0].recv(1 << 18), b""):
                digest.update(part)
            assert digest.digest() == hashlib.sha256(pattern(size)).digest()


# Large messages.


@pytest.mark.parametrize("size", [1000, 20 << 20, 50 << 20], ids=["control", "20 MiB", "50 MiB"])
def test_websocket_messages_of_any_size(sshd: Callable[..., Machine], size: int) -> None:
    """One message of 20 MiB and more arrives whole, there and back."""

    def echo(ws: ServerConnection) -> None:
        for message in ws:
            ws.send(message)

    machine = sshd()
    with serve(echo, _LOOPBACK, 0, max_size=None, compression=None) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        port = server.socket.getsockname()[1]
        with LocalForward(
            machine.host, machine.user, remote_port=port, remote_host=_LOOPBACK, **machine.login
        ) as forward:
            url = f"ws://{_LOOPBACK}:{forward.local_port}/"
            with connect(url, max_size=None, compression=None, ping_interval=None) as ws:
                ws.send(pattern(size))
                assert ws.recv(timeout=DEADLINE) == pattern(size)
        server.shutdown()


# Servers that lose patience.


@pytest.fixture
def patient(sshd: Callable[..., Machine]) -> Callable[..., Machine]:
    """Make real sshds; skips where they do not know ChannelTimeout and UnusedConnectionTimeout yet."""
    if beds._version("ssh") < (9, 2):
        pytest.skip("this sshd is older than 9.2, which brought these timeouts")
    return sshd


def test_channel_timeout_ends_one_connection(patient: Callable[..., Machine]) -> None:
    """A connection that sshd ends for being idle ends here, at once; the others go on.

    It ends with an end of file: that is what sshd sends, and nothing in it tells the two apart.
    """
    machine = patient(ChannelTimeout="direct-tcpip=3")
    with target_here() as port:
        with LocalForward(
            machine.host, machine.user, remote_port=port, remote_host=_LOOPBACK, **machine.login
        ) as forward:
            with ask((_LOOPBACK, forward.local_port), "echo") as idle:
                idle.sendall(b"x")
                assert read_exactly(idle, 1) == b"x"
                assert idle.recv(1) == b""
            conformance.check_echo((_LOOPBACK, forward.local_port))
            assert forward.state == "ready"


def test_without_channel_timeout_idle_connections_last(sshd: Callable[..., Machine]) -> None:
    """The control: the same connection, without that setting, is there after longer than that."""
    machine = sshd()
    with target_here() as port:
        with LocalForward(
            machine.host, machine.user, remote_port=port, remote_host=_LOOPBACK, **machine.login
        ) as forward:
            with ask((_LOOPBACK, forward.local_port), "echo") as idle:
                idle.settimeout(6)
                with pytest.raises(TimeoutError):
                    idle.recv(1)
                idle.sendall(b"x")
                assert read_exactly(idle, 1) == b"x"


def test_unused_connection_timeout_is_a_loss(patient: Callable[..., Machine], no_leaks: Any) -> None:
    """A connection that sshd ends because nobody uses it is told as lost."""
    machine = patient(UnusedConnectionTimeout="3")
    with no_leaks():
        with LocalForward(
            machine.host, machine.user, remote_port=1, reconnect=False, **machine.login
        ) as forward:
            with pytest.raises(ConnectionLostError) as caught:
                forward.wait(20)
            assert caught.value.host == machine.host
            assert forward.state == "failed"


def test_used_connection_has_no_unused_timeout(patient: Callable[..., Machine]) -> None:
    """The control: with a connection open through it, the same sshd leaves it alone."""
    machine = patient(UnusedConnectionTimeout="3")
    with target_here() as port:
        with LocalForward(
            machine.host,
            machine.user,
            remote_port=port,
            remote_host=_LOOPBACK,
            reconnect=False,
            **machine.login,
        ) as forward:
            with ask((_LOOPBACK, forward.local_port), "echo") as used:
                used.settimeout(7)
                with pytest.raises(TimeoutError):
                    used.recv(1)
                assert forward.state == "ready"
                used.sendall(b"x")
                assert read_exactly(used, 1) == b"x"


# Bad links.


def _carry(address: tuple[str, int]) -> None:
    """Move bytes both ways at once, byte-exact, with half-closes."""

    def down() -> None:
        with ask(address, "send 200001") as sock:
            assert read_all(sock) == pattern(200_001)

    def up() -> None:
        with ask(address, "hash") as sock:
            sock.sendall(pattern(200_001))
            sock.shutdown(socket.SHUT_WR)
            assert read_all(sock) == hashlib.sha256(pattern(200_001)).digest()

    def small() -> None:
        with ask(address, "echo") as sock:
            for size in (1, 2, 255, 4096, 40_000):
                sock.sendall(pattern(size))
                assert read_exactly(sock, size) == pattern(size)

    with ThreadPoolExecutor(4) as pool:
        for job in [pool.submit(work) for work in (down, up, small, small)]:
            job.result(DEADLINE)


@pytest.mark.parametrize("smooth", [False, True], ids=["rough", "control"])
@pytest.mark.parametrize("remote", [False, True], ids=["local", "remote"])
def test_rough_links_lose_nothing(
    sshd: Callable[..., Machine], tmp_path: Path, remote: bool, smooth: bool
) -> None:
    """Single-byte segments, jitter and stalls change no byte, from the first greeting to the end."""
    there = sshd()
    with Rough(there.host, there.port, smooth=smooth) as link, target_here() as port:
        machine = link.machine(there, tmp_path)
        if remote:
            with RemoteForward(
                machine.host,
                machine.user,
                remote_port=0,
                local_port=port,
                local_host=_LOOPBACK,
                reconnect=False,
                **machine.login,
            ) as back:
                _carry((_LOOPBACK, back.remote_port))
        else:
            with LocalForward(
                machine.host,
                machine.user,
                remote_port=port,
                remote_host=_LOOPBACK,
                reconnect=False,
                **machine.login,
            ) as forward:
                _carry((_LOOPBACK, forward.local_port))
        if smooth:
            assert not link.single
        else:
            assert link.single > 100
            assert link.late > 5
            assert link.stalls > 0
