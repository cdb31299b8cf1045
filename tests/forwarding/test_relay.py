"""The relay of a gateway tunnel: a channel of one server joined to one of another, through this machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import conformance
from beds import Machine, until
from bokeh_ssh import Host
from bokeh_ssh._ssh.connect import connect
from bokeh_ssh._ssh.connection import Connection
from bokeh_ssh._tunnels.remote_forward import listening, to_peer
from conformance import ask, read_exactly
from targets import target_here

_LOOPBACK = "127.0.0.1"


@contextmanager
def relayed(
    make: Callable[..., Machine], directory: Path, target: int
) -> Iterator[tuple[int, Connection, Connection]]:
    """Join a gateway and a host, each a real sshd here; gives the gateway's port, and both connections."""
    gateway, peer = make(), make()
    with (
        connect(Host(gateway.host, gateway.user, **gateway.login)) as there,
        connect(Host(peer.host, peer.user, **peer.login)) as beyond,
        listening(
            there,
            (_LOOPBACK, 0),
            to_peer(there, beyond, (_LOOPBACK, target)),
            allow_exposed=False,
        ) as (_, port),
    ):
        yield port, there, beyond


@pytest.mark.parametrize("name", sorted(conformance.CHECKS))
def test_relay_conforms(sshd: Callable[..., Machine], tmp_path: Path, name: str) -> None:
    """The relay keeps each promise of a forward, and nothing of it stays."""
    with target_here() as target, relayed(sshd, tmp_path, target) as (port, gateway, peer):
        conformance.CHECKS[name]((_LOOPBACK, port))
        until(
            lambda: not gateway.io_loop.open_relays and not peer.io_loop.open_relays,
            what="both halves of each connection to end",
        )
        assert gateway.alive
        assert peer.alive


def test_loss_of_one_side_ends_the_other(sshd: Callable[..., Machine], tmp_path: Path) -> None:
    """Where the connection to the host breaks, what was relayed ends at the gateway; that lives on."""
    with target_here() as target, relayed(sshd, tmp_path, target) as (port, gateway, peer):
        with ask((_LOOPBACK, port), "echo") as sock:
            sock.sendall(b"x")
            assert read_exactly(sock, 1) == b"x"
            peer.transport.packetizer.close()
            try:
                assert sock.recv(1) == b""
            except ConnectionResetError:
                pass
        until(lambda: not gateway.io_loop.open_relays, what="the other half to end")
        assert gateway.alive
        with ask((_LOOPBACK, port), "echo") as sock:  # refused, not left to hang
            try:
                assert sock.recv(1) == b""
            except ConnectionResetError:
                pass
