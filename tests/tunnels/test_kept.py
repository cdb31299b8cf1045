"""A gateway that is lost alone: what goes to the Bokeh host another way stays, with its server."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import apps
import light_bokeh
from beds import Machine, until
from bokeh_ssh import Closed, Event, GatewayTunnel, Host, Launched, Lost, Reconnected, Warned
from cable import Cable
from events import kinds


@pytest.fixture
def events() -> list[Event]:
    """Take what is told."""
    return []


@contextmanager
def through(
    gateway: Machine, host: Machine, events: list[Event], place: Path, *, isolate: bool = False
) -> Iterator[tuple[GatewayTunnel, Cable]]:
    """Open a tunnel through a gateway on a cable, to a host that is reached another way."""
    app = apps.put(host, "page.py", light_bokeh.APP)
    with Cable(gateway.host, gateway.port) as cable:
        there = cable.machine(gateway, place)
        with GatewayTunnel(
            Host(there.host, there.user, **there.login),
            host=Host(host.host, host.user, **{**host.login, "jump": ()}),
            app=app,
            python=sys.executable,
            reverse="relay",
            isolate=isolate,
            grace=1000,
            on_event=events.append,
        ) as tunnel:
            yield tunnel, cable


@pytest.mark.parametrize("isolate", [False, True])
def test_server_is_ended_though_the_gateway_is_lost(
    light: Callable[..., Machine], events: list[Event], tmp_path: Path, isolate: bool
) -> None:
    """Closed while only the gateway is lost, a tunnel ends its server, which it still holds."""
    machine = light()
    with through(machine, machine, events, tmp_path, isolate=isolate) as (tunnel, cable):
        [launched] = [event for event in events if isinstance(event, Launched)]
        cable.refuse()
        until(lambda: tunnel.state == "lost", what="the loss")
        os.kill(launched.pid, 0)
    assert events[-1] == Closed(host=machine.host, server="ended")
    assert Warned not in kinds(events)
    with pytest.raises(ProcessLookupError):
        os.kill(launched.pid, 0)


def test_server_is_held_while_the_gateway_is_away(
    light: Callable[..., Machine], events: list[Event], tmp_path: Path
) -> None:
    """It is connected to again through the gateway alone; the host is logged in to once."""
    machine = light()
    with through(machine, machine, events, tmp_path) as (tunnel, cable):
        hops = [hop.host for hop in tunnel.status().hops]
        before = apps.get(tunnel.url)
        cable.pull()
        until(lambda: Reconnected in kinds(events), what="the gateway to be back")
        [back] = [event for event in events if isinstance(event, Reconnected)]
        assert back.same_server
        assert apps.get(tunnel.url) == before
        assert [type(event).__name__ for event in events].count("Authenticated") == 3
        assert [hop.host for hop in tunnel.status().hops] == hops
    assert events[-1] == Closed(host=machine.host, server="ended")


def test_server_that_ends_meanwhile_is_started_again(
    light: Callable[..., Machine], events: list[Event], tmp_path: Path
) -> None:
    """Where the server dies while the gateway is away, there is another one when that is back."""
    machine = light()
    with through(machine, machine, events, tmp_path) as (tunnel, cable):
        [launched] = [event for event in events if isinstance(event, Launched)]
        cable.refuse()
        until(lambda: Lost in kinds(events), what="the loss")
        os.kill(launched.pid, 9)
        until(lambda: "ServerExited" in str(events), what="its end to be told")
        cable.mend()
        until(lambda: Reconnected in kinds(events), timeout=60, what="the gateway to be back")
        [back] = [event for event in events if isinstance(event, Reconnected)]
        assert not back.same_server
        assert apps.get(tunnel.url)
    assert events[-1] == Closed(host=machine.host, server="ended")
