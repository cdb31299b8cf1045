"""What would lead back to its own listener, where each connection makes another one: refused at once."""

from __future__ import annotations

import dataclasses
import errno
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from beds import Machine, free_port, until
from bokeh_ssh import DirectTunnel, Host, LocalForward, RemoteForward, TunnelClosedError, UsageError
from bokeh_ssh._forwarding.listener import LocalAcceptor


@pytest.fixture
def gateway(sshd: Callable[..., Machine]) -> Host:
    """A real SSH server on this machine."""
    machine = sshd()
    return Host(machine.host, machine.user, **machine.login)


def refused(what: LocalForward | RemoteForward | DirectTunnel, told: str) -> None:
    """Check that it is not opened, and that this is said long before anything times out."""
    began = time.monotonic()
    with pytest.raises(UsageError, match=told):
        what.open()
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("isolate", [False, True])
def test_login_at_its_own_port_is_refused(gateway: Host, isolate: bool) -> None:
    """A local port that is taken for the SSH server's is named, and not waited for until that times out."""
    port = free_port()
    here = dataclasses.replace(gateway, port=port)
    told = f"port {port} of this machine"
    refused(LocalForward(here, remote_port=1, local_port=port, isolate=isolate), told)
    refused(DirectTunnel(here, app="app.py", local_port=port, isolate=isolate), told)


def test_login_at_a_port_that_listens_everywhere_is_refused(gateway: Host) -> None:
    """So is one that is bound to every address of this machine."""
    port = free_port()
    here = dataclasses.replace(gateway, port=port)
    refused(LocalForward(here, remote_port=1, local_port=port, bind_address="0.0.0.0"), "itself listens")


def test_login_through_another_forward_is_no_circle(gateway: Host) -> None:
    """An SSH server that is reached by another forward of the same program is one like any other."""
    ssh_port = gateway.target.port
    with LocalForward(gateway, remote_port=ssh_port) as outer:
        inner = dataclasses.replace(gateway, port=outer.local_port, host_keys="accept-new")
        with LocalForward(inner, remote_port=ssh_port) as forward:
            with socket.create_connection(("127.0.0.1", forward.local_port), 20) as sock:
                assert sock.recv(4) == b"SSH-"


def test_local_forward_to_itself_is_refused(gateway: Host, tmp_path: Path) -> None:
    """Where the machine is this one, a port or a socket that is forwarded to itself is refused."""
    port = free_port()
    refused(LocalForward(gateway, remote_port=port, local_port=port), f"port {port} is where this itself")
    path = tmp_path / "app.sock"
    refused(LocalForward(gateway, remote_socket=path, local_socket=path), "is where this itself")


def test_attaching_to_its_own_port_is_refused(gateway: Host) -> None:
    """A tunnel to this machine does not take its own listener for the server."""
    port = free_port()
    tunnel = DirectTunnel(gateway, launch=False, remote_port=port, local_port=port, isolate=False)
    refused(tunnel, f"port {port} is where this itself")


def test_remote_forward_to_itself_is_refused(gateway: Host) -> None:
    """Where the gateway is this machine, it does not listen where it is to lead to."""
    port = free_port()
    refused(RemoteForward(gateway, remote_port=port, local_port=port), "the gateway is this machine")


def test_what_is_closed_while_that_is_looked_at_says_so(
    gateway: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever an opening meets because it is being closed, it raises that it was closed."""
    forward = LocalForward(gateway, remote_port=gateway.target.port)

    def close_and_fail(*_: object) -> bool:
        closing = threading.Thread(target=forward.close)
        closing.start()
        closing.join(20)
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))

    monkeypatch.setattr(LocalAcceptor, "is_reached_by", close_and_fail)
    with pytest.raises(TunnelClosedError):
        forward.open()
    assert forward.state == "closed"


def test_whoever_connects_meanwhile_is_served(gateway: Host) -> None:
    """Connections that wait while a forward is opened, or come and go, are taken for what they are."""
    port = free_port()
    answers: list[bytes] = []

    def ask() -> None:
        while not answers:
            try:
                with socket.create_connection(("127.0.0.1", port), 20) as sock:
                    answers.append(sock.recv(4))
            except OSError:  # it does not listen yet
                pass

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        with LocalForward(gateway, remote_port=gateway.target.port, local_port=port):
            until(lambda: answers, what="an answer")
    finally:
        answers.append(b"")  # ends it
        asking.join(20)
    assert answers[0] == b"SSH-"
