"""A server that ends what nothing uses (UnusedConnectionTimeout, ChannelTimeout)."""

from __future__ import annotations

import socket
from collections.abc import Callable
from contextlib import closing

import pytest

from beds import Machine, until
from bokeh_ssh import ConnectionLostError, LocalForward
from bokeh_ssh._core.backoff import pause_before
from bokeh_ssh._core.events import Event, Lost, Reconnecting
from direct_tunnels import tunnel_to


def test_forward_that_nobody_uses_is_not_made_again_for_ever(sshd: Callable[..., Machine]) -> None:
    """The reason is named, the pauses grow, and who connects meanwhile is served at once."""
    machine = sshd(UnusedConnectionTimeout="1s")
    events: list[Event] = []
    forward = LocalForward(
        machine.host, machine.user, remote_port=machine.port, **machine.login, on_event=events.append
    )
    with forward:
        pauses = until(
            lambda: [e.delay for e in events if isinstance(e, Reconnecting)][2:], what="three losses"
        )
        assert pauses[0] > 1.4
        assert "UnusedConnectionTimeout" in next(e.reason for e in events if isinstance(e, Lost))
        with socket.create_connection(("127.0.0.1", forward.local_port), timeout=30) as through:
            assert through.recv(4) == b"SSH-"


def test_used_connection_is_not_ended(sshd: Callable[..., Machine]) -> None:
    """A connection that is open through it keeps it; a server that is gone is not taken for such a one."""
    machine = sshd(UnusedConnectionTimeout="3s")
    events: list[Event] = []
    forward = LocalForward(
        machine.host, machine.user, remote_port=machine.port, **machine.login, on_event=events.append
    )
    with forward, closing(socket.create_connection(("127.0.0.1", forward.local_port))) as through:
        through.settimeout(30)
        assert through.recv(4) == b"SSH-"
        with pytest.raises(AssertionError):
            until(lambda: any(isinstance(event, Lost) for event in events), timeout=7)


def test_start_that_is_ended_for_its_silence_is_told(sshd: Callable[..., Machine]) -> None:
    """A server that takes longer to start than sshd waits for a word is no lost line alone: that is named."""
    machine = sshd(ChannelTimeout="*=1s")
    with pytest.raises(ConnectionLostError, match="ChannelTimeout"):
        tunnel_to(machine, "app.py", setup="sleep 10").open()


def test_pauses() -> None:
    """They grow to half a minute; to an hour where nobody needs it meanwhile."""
    assert pause_before(1, needed=False) < 0.3
    assert 22 <= pause_before(40) <= 30
    assert 2700 <= pause_before(40, needed=False) <= 3600
