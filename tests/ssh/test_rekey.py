"""New keys in the middle of everything: whoever asks for them, no byte is lost, nothing stalls."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import conformance
from beds import Machine
from bokeh_ssh import ConnectionLostError, LocalForward, RemoteForward
from bokeh_ssh._ssh.packetizer import Packetizer
from bokeh_ssh._ssh.transport import Transport
from conformance import ask, read_exactly
from rekeying import LIMIT, WAYS, remote_way

SOURCE = Path(conformance.__file__).read_text(encoding="utf-8")


@WAYS
def test_without_rekeying_there_is_one_key_exchange(
    way: Any, embedded: Callable[..., Machine], key_changes: dict[Transport, int]
) -> None:
    """The control of the others: the same storm, and keys are exchanged once."""
    with way(embedded()) as work:
        work()
    assert list(key_changes.values()) == [1]


@WAYS
def test_server_asks_for_new_keys(
    way: Any, machine_with: Callable[..., Machine], key_changes: dict[Transport, int]
) -> None:
    """With a tiny RekeyLimit at the server every byte arrives, while channels open and close."""
    with way(machine_with(rekey=LIMIT)) as work:
        work()
    [count] = key_changes.values()
    assert count > 5


@WAYS
def test_client_asks_for_new_keys(
    way: Any, machine: Machine, key_changes: dict[Transport, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a tiny limit of our own every byte arrives, while channels open and close."""
    monkeypatch.setattr(Packetizer, "REKEY_BYTES", LIMIT)
    with way(machine) as work:
        work()
    [count] = key_changes.values()
    assert count > 5


@WAYS
def test_both_ask_for_new_keys(
    way: Any,
    machine_with: Callable[..., Machine],
    key_changes: dict[Transport, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With tiny limits on both sides the two never wait for each other."""
    monkeypatch.setattr(Packetizer, "REKEY_BYTES", LIMIT)
    monkeypatch.setattr(Packetizer, "REKEY_PACKETS", 200)
    with way(machine_with(rekey=LIMIT)) as work:
        work()
    [count] = key_changes.values()
    assert count > 5


def test_many_small_packets_ask_for_new_keys(
    embedded: Callable[..., Machine], key_changes: dict[Transport, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys change after so many packets too, with opens and closes as all there is."""
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
            [count] = key_changes.values()
            assert count > 5
        listener.shutdown(socket.SHUT_RDWR)


def test_new_keys_on_demand_while_idle_and_while_asking(
    machine: Machine, key_changes: dict[Transport, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Global requests during a key exchange are answered by what the server says, never by its end."""
    with remote_way(machine):
        [transport] = key_changes
        for number in range(5):
            renewer = threading.Thread(target=transport.renegotiate_keys)
            renewer.start()
            replies = [transport.send_global_request(b"no-such-request@example.org") for _ in range(20)]
            assert all(reply.wait(30) for reply in replies)
            assert not any(reply.lost for reply in replies)
            assert not any(reply.ok for reply in replies)
            renewer.join(30)
            assert key_changes[transport] == number + 2


def test_connection_that_dies_in_a_key_exchange_is_told(
    embedded: Callable[..., Machine],
    key_changes: dict[Transport, int],
    monkeypatch: pytest.MonkeyPatch,
    no_leaks: Any,
) -> None:
    """A line that is cut while keys are exchanged is a loss like any other, and closing is quick."""
    machine = embedded()
    with no_leaks(), remote_way_of(machine) as forward:
        [transport] = key_changes
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
