"""Forwards through a server with one handler bent, and whether they live."""

from __future__ import annotations

import socket
from typing import Any

from bokeh_ssh import LocalForward
from fakes import FakeSSH


def local_forward(fake: FakeSSH, **keywords: Any) -> LocalForward:
    """Make a forward through the fake; every target echoes there."""
    machine = fake.machine
    return LocalForward(
        machine.host, machine.user, **{"remote_port": 7, "reconnect": False, **machine.login, **keywords}
    )


def check_alive(forward: LocalForward) -> None:
    """See that a new connection through the forward works."""
    with socket.create_connection(("127.0.0.1", forward.local_port), timeout=30) as sock:
        sock.sendall(b"still there?")
        assert sock.recv(100) == b"still there?"
    assert forward.state == "ready"
