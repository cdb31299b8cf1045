"""Forwards through SSH servers that end a channel in another way than OpenSSH does."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

import conformance
import other_servers
from beds import Key, Machine
from bokeh_ssh import LocalForward, RemoteForward
from skips import missing
from targets import target_here

pytestmark = pytest.mark.once

#: More than a socket's own buffers hold, and less than a channel's window: all of it has arrived, and most of
#: it waits for the reader, when the channel is closed.
SIZE = 1_500_000


@pytest.fixture(scope="module", params=["conch", "gliderlabs", "mina"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return the command of each server in turn."""
    try:
        return other_servers.command(request.param, tmp_path_factory.mktemp("server"))
    except other_servers.MissingError as exc:
        if request.param == "mina":  # not in every distribution
            pytest.skip(str(exc))
        missing(str(exc))
        raise AssertionError from exc


@pytest.fixture
def other(server: list[str], key: Key, tmp_path: Path) -> Iterator[Machine]:
    """Run each server in turn."""
    with other_servers.running(server, key, tmp_path) as machine:
        yield machine


@contextmanager
def sending_target(count: int) -> Iterator[int]:
    """Listen for connections that get ``count`` bytes and an end; gives the port."""

    def serve(listener: socket.socket) -> None:
        while True:
            try:
                sock, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=send, args=(sock,), daemon=True).start()

    def send(sock: socket.socket) -> None:
        with sock:
            sock.settimeout(conformance.DEADLINE)
            sock.sendall(conformance.pattern(count))

    with socket.create_server(("127.0.0.1", 0), backlog=512) as listener:
        threading.Thread(target=serve, args=(listener,), daemon=True).start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)


def through(machine: Machine, port: int) -> LocalForward:
    """Forward a local port to one of the machine's loopback."""
    return LocalForward(
        machine.host, machine.user, remote_port=port, remote_host="127.0.0.1", **machine.login
    )


def test_end_without_eof_loses_nothing(other: Machine) -> None:
    """What the target sent before its end arrives whole, and ends cleanly, also at a reader that is late."""
    with target_here() as port, through(other, port) as forward:
        address = ("127.0.0.1", forward.local_port)
        with conformance.ask(address, f"send {SIZE}") as late:
            for _ in range(3):  # by then the download and its end are here: it is the same connection
                conformance.check_echo(address)
            assert conformance.read_all(late) == conformance.pattern(SIZE)
        with conformance.ask(address, f"send {SIZE}") as prompt:
            assert conformance.read_all(prompt) == conformance.pattern(SIZE)


def test_many_ends_without_eof(other: Machine) -> None:
    """A hundred connections one after the other, and a hundred at once, each get all, and a clean end."""

    def fetch(port: int) -> bytes:
        with socket.create_connection(("127.0.0.1", port), timeout=conformance.DEADLINE) as sock:
            return conformance.read_all(sock)

    with sending_target(20_000) as port, through(other, port) as forward:
        for _ in range(100):
            assert fetch(forward.local_port) == conformance.pattern(20_000)
        with ThreadPoolExecutor(100) as pool:
            got = list(pool.map(fetch, [forward.local_port] * 100))
        assert got == [conformance.pattern(20_000)] * 100


def test_uploads_arrive(other: Machine) -> None:
    """What a program here sends arrives whole, though the answer's end closes the channel."""
    with target_here() as port, through(other, port) as forward:
        with conformance.ask(("127.0.0.1", forward.local_port), "echo") as sock:
            for size in (1, 4096, 100_001, 1_000_003):
                sock.sendall(conformance.pattern(size))
                assert conformance.read_exactly(sock, size) == conformance.pattern(size)


def test_lost_line_is_a_reset(other: Machine) -> None:
    """The control: where the connection is lost, the reader gets a reset, and no end."""
    with target_here() as port, through(other, port) as forward:
        with conformance.ask(("127.0.0.1", forward.local_port), "echo") as sock:
            sock.sendall(b"x")
            assert conformance.read_exactly(sock, 1) == b"x"
            other.server.kill()
            with pytest.raises(ConnectionResetError):
                sock.recv(1)


@pytest.mark.parametrize("server", ["gliderlabs"], indirect=True)  # Conch's tcpip-forward cannot be used
def test_remote_forward_ends_whole(other: Machine) -> None:
    """What a program here sends through a remote forward before it ends arrives whole at the gateway."""
    with sending_target(SIZE) as port:
        with RemoteForward(
            other.host, other.user, remote_port=0, local_port=port, local_host="127.0.0.1", **other.login
        ) as forward:
            with socket.create_connection(("127.0.0.1", forward.remote_port)) as sock:
                sock.settimeout(conformance.DEADLINE)
                assert conformance.read_all(sock) == conformance.pattern(SIZE)
