"""New keys in the middle of everything: whoever asks for them, no byte is lost, nothing stalls (row 54)."""

from __future__ import annotations

import hashlib
import inspect
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import conformance
from beds import Machine, until
from bokeh_ssh import ConnectionLostError, LocalForward, RemoteForward
from bokeh_ssh._ssh.packetizer import Packetizer
from bokeh_ssh._ssh.transport import Transport
from conformance import DEADLINE, MIB, ask, pattern, read_all, read_exactly

SOURCE = Path(conformance.__file__).read_text(encoding="utf-8")
LIMIT = MIB  # what OpenSSH takes in its config, and asyncssh too


def storm(address: tuple[str, int]) -> None:
    """Move bytes both ways, byte-exact, while connections open and close all the time."""

    def down() -> None:
        with ask(address, f"send {6 * MIB}") as sock:
            assert read_all(sock) == pattern(6 * MIB)

    def up() -> None:
        with ask(address, "hash") as sock:
            sock.sendall(pattern(6 * MIB))
            sock.shutdown(socket.SHUT_WR)
            assert read_all(sock) == hashlib.sha256(pattern(6 * MIB)).digest()

    def short() -> None:
        for size in (1, 70_000, 300) * 10:
            with ask(address, "echo") as sock:
                sock.sendall(pattern(size))
                assert read_exactly(sock, size) == pattern(size)

    with ThreadPoolExecutor(8) as pool:
        for job in [pool.submit(work) for work in (down, up, short, short, down, up)]:
            job.result(DEADLINE)


#: The same as a program, for the other machine.
STORM = "\n".join(
    (
        SOURCE.partition('if __name__ == "__main__"')[0],
        inspect.getsource(storm),
        "storm(('127.0.0.1', int(sys.argv[1])))",
    )
)


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch) -> dict[Transport, int]:
    """Count the NEWKEYS messages of each connection: the proof that keys were changed."""
    seen: dict[Transport, int] = {}
    original = Transport._parse_newkeys

    def count(self: Transport, message: Any) -> None:
        seen[self] = seen.get(self, 0) + 1
        original(self, message)

    monkeypatch.setattr(Transport, "_parse_newkeys", count)
    return seen


@contextmanager
def local_way(machine: Machine) -> Iterator[Callable[[], None]]:
    """Open a local forward to the conformance target on the machine; gives the storm through it."""
    with (
        machine.spawn([machine.python, "-u", "-c", SOURCE, "serve"]) as running,
        LocalForward(
            machine.host,
            machine.user,
            remote_port=int(until(lambda: running.log.strip(), what="the target to listen")),
            remote_host="127.0.0.1",
            **machine.login,
        ) as forward,
    ):
        yield lambda: storm(("127.0.0.1", forward.local_port))
        assert forward.state == "ready"


@contextmanager
def remote_way(machine: Machine) -> Iterator[Callable[[], None]]:
    """Open a remote forward to the conformance target here; gives the storm through it, from the machine."""
    with conformance.listen() as listener:
        threading.Thread(target=conformance.serve, args=(listener,), daemon=True).start()
        port = listener.getsockname()[1]
        with RemoteForward(
            machine.host,
            machine.user,
            remote_port=0,
            local_port=port,
            local_host="127.0.0.1",
            **machine.login,
        ) as forward:

            def work() -> None:
                done = machine.execute([machine.python, "-c", STORM, str(forward.remote_port)], timeout=90)
                assert done.status == 0, done.stderr

            yield work
            assert forward.state == "ready"
        listener.shutdown(socket.SHUT_RDWR)


WAYS = pytest.mark.parametrize("way", [local_way, remote_way], ids=["local", "remote"])


@WAYS
def test_without_rekeying_there_is_one_key_exchange(
    way: Any, embedded: Callable[..., Machine], keys: dict[Transport, int]
) -> None:
    """The control of the others: the same storm, and keys are exchanged once."""
    with way(embedded()) as work:
        work()
    assert list(keys.values()) == [1]


@WAYS
def test_server_asks_for_new_keys(
    way: Any, machine_with: Callable[..., Machine], keys: dict[Transport, int]
) -> None:
    """With a tiny RekeyLimit at the server every byte arrives, while channels open and close (row 54)."""
    with way(machine_with(rekey=LIMIT)) as work:
        work()
    [count] = keys.values()
    assert count > 5


@WAYS
def test_client_asks_for_new_keys(
    way: Any, machine: Machine, keys: dict[Transport, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a tiny limit of our own every byte arrives, while channels open and close (row 54)."""
    monkeypatch.setattr(Packetizer, "REKEY_BYTES", LIMIT)
    with way(machine) as work:
        work()
    [count] = keys.values()
    assert count > 5


@WAYS
def test_both_ask_for_new_keys(
    way: Any,
    machine_with: Callable[..., Machine],
    keys: dict[Transport, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With tiny limits on both sides the two never wait for each other (row 54)."""
    monkeypatch.setattr(Packetizer, "REKEY_BYTES", LIMIT)
    monkeypatch.setattr(Packetizer, "REKEY_PACKETS", 200)
    with way(machine_with(rekey=LIMIT)) as work:
        work()
    [count] = keys.values()
    assert count > 5


def test_many_small_packets_ask_for_new_keys(
    embedded: Callable[..., Machine], keys: dict[Transport, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys change after so many packets too, with opens and closes as all there is (row 54, P1)."""
    monkeypatch.setattr(Packetizer, "REKEY_PACKETS", 50)
    with conformance.listen() as listener:
        threading.Thread(target=conformance.serve, args=(listener,), daemon=True).start()
        machine = embedded()
        with LocalForward(
            machine.host, machine.user, remote_port=listener.getsockname()[1], **machine.login
        ) as forward:
            address = ("127.0.0.1", forward.local_port)
            for _ in range(100):
                with ask(address, "echo") as sock:
                    sock.sendall(b"x")
                    assert read_exactly(sock, 1) == b"x"
            [count] = keys.values()
            assert count > 5
        listener.shutdown(socket.SHUT_RDWR)


def test_new_keys_on_demand_while_idle_and_while_asking(
    machine: Machine, keys: dict[Transport, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Global requests during a key exchange are answered by what the server says, never by its end (P4)."""
    with remote_way(machine):
        [transport] = keys
        for number in range(5):
            renewer = threading.Thread(target=transport.renegotiate_keys)
            renewer.start()
            replies = [transport.ask(b"no-such-request@example.org") for _ in range(20)]
            assert all(reply.wait(30) for reply in replies)
            assert not any(reply.lost for reply in replies)
            assert not any(reply.ok for reply in replies)
            renewer.join(30)
            assert keys[transport] == number + 2


def test_connection_that_dies_in_a_key_exchange_is_told(
    embedded: Callable[..., Machine],
    keys: dict[Transport, int],
    monkeypatch: pytest.MonkeyPatch,
    no_leaks: Any,
) -> None:
    """A line that is cut while keys are exchanged is a loss like any other, and closing is quick (row 54)."""
    machine = embedded()
    with no_leaks(), remote_way_of(machine) as forward:
        [transport] = keys
        begun = threading.Event()
        negotiate = transport._negotiate_keys

        def cut(message: Any) -> None:
            begun.set()
            transport.sock.shutdown(socket.SHUT_RDWR)
            negotiate(message)

        transport._handler_table[20] = cut  # KEXINIT
        with pytest.raises(Exception):  # noqa: B017, PT011 - paramiko's own; what counts is what follows
            transport.renegotiate_keys()
        assert begun.wait(30)
        with pytest.raises(ConnectionLostError):
            forward.wait(30)


@contextmanager
def remote_way_of(machine: Machine) -> Iterator[RemoteForward]:
    """Open a remote forward to nowhere."""
    with RemoteForward(
        machine.host, machine.user, remote_port=0, reconnect=False, **machine.login
    ) as forward:
        yield forward
