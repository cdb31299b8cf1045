"""A tunnel whose line goes down finds its server again, with everything that the server knows."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

import apps
import light_bokeh
from beds import Machine, until
from bokeh_ssh import (
    Closed,
    Event,
    GatewayTunnel,
    Host,
    Launched,
    Lost,
    Reconnected,
    ServerExitedError,
    Warned,
)
from bokeh_ssh._server.server import Server
from counting import COUNTER, ask, cabled, servers, tunnel_with_events
from direct_tunnels import port_of, serve_on
from events import kinds
from processes import children

#: To what opens its sessions, it is two days later.
LATER = """
import datetime
import types
from bokeh.server.views import ws


class Later(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return datetime.datetime.now(tz) + datetime.timedelta(days=2)


ws.dt = types.SimpleNamespace(datetime=Later, UTC=datetime.timezone.utc, timezone=datetime.timezone)
"""


@pytest.mark.parametrize("isolate", [False, True])
def test_server_is_found_again(machine: Machine, tmp_path: Path, isolate: bool) -> None:
    """After a loss the same server answers at the same address, and there is only one."""
    app = apps.put(machine, "counter.py", COUNTER)
    events: list[Event] = []
    with cabled(machine, tmp_path) as (cable, there):
        with tunnel_with_events(there, app, events, isolate=isolate) as tunnel:
            url, before = tunnel.url, ask(tunnel)
            assert before.startswith("seen 1 by ")
            [launched] = [event for event in events if isinstance(event, Launched)]
            cable.pull()
            until(lambda: Reconnected in kinds(events), timeout=30, what="the line to be back")
            [back] = [event for event in events if isinstance(event, Reconnected)]
            assert back.same_server
            assert tunnel.url == url
            assert ask(tunnel) == before.replace("seen 1", "seen 2")
            assert servers(machine, app) == [launched.pid]
            assert any("Starting Bokeh server" in line for line in tunnel.log)  # the log is whole
        until(lambda: not servers(machine, app), what="the server to end")  # the tunnel's own again
    assert not [event for event in events if isinstance(event, Warned)]


def test_page_that_was_loaded_hours_ago_reconnects(here: Machine, tmp_path: Path) -> None:
    """BokehJS comes back with the token of its page, which Bokeh refuses after a time."""
    app = apps.put(here, "later.py", LATER)
    events: list[Event] = []
    with cabled(here, tmp_path) as (cable, there):
        with tunnel_with_events(there, app, events) as tunnel:
            page = apps.get(tunnel.url)
            cable.pull()
            until(lambda: Reconnected in kinds(events), timeout=30, what="the line to be back")
            assert apps.open_websocket(tunnel.url, page)["msgtype"] == "ACK"


def test_client_that_is_only_half_gone_gives_way(machine: Machine, tmp_path: Path) -> None:
    """Where packets were only dropped, the old session still holds the server; the new one takes it over."""
    config = tmp_path / "quick_config"
    config.write_text("ServerAliveInterval 1\nServerAliveCountMax 2\n", encoding="ascii")
    app = apps.put(machine, "counter.py", COUNTER)
    events: list[Event] = []
    with cabled(machine, tmp_path) as (cable, there):
        with tunnel_with_events(there, app, events, isolate=False, ssh_config=str(config)) as tunnel:
            before = ask(tunnel)
            cable.cut()
            until(lambda: Lost in kinds(events), what="the silence to be noticed")
            cable.mend()
            until(lambda: Reconnected in kinds(events), timeout=30, what="the line to be back")
            assert ask(tunnel) == before.replace("seen 1", "seen 2")
            assert len(servers(machine, app)) == 1


def test_server_that_has_ended_is_started_anew(machine: Machine, tmp_path: Path) -> None:
    """Where the server died meanwhile, a new one is started at the same address, and that is told."""
    app = apps.put(machine, "counter.py", COUNTER)
    events: list[Event] = []
    with cabled(machine, tmp_path) as (cable, there):
        with tunnel_with_events(there, app, events) as tunnel:
            url = tunnel.url
            [launched] = [event for event in events if isinstance(event, Launched)]
            cable.refuse()
            until(lambda: Lost in kinds(events), what="the loss")
            machine.execute(["kill", "-KILL", str(launched.pid)])
            until(lambda: not servers(machine, app), what="the server to be gone")
            cable.mend()
            until(lambda: Reconnected in kinds(events), timeout=40, what="the line to be back")
            [back] = [event for event in events if isinstance(event, Reconnected)]
            assert not back.same_server
            [warned] = [event for event in events if isinstance(event, Warned)]
            assert "a new one is started" in warned.text
            assert tunnel.url == url
            assert ask(tunnel).startswith("seen 1 by ")
            assert len(servers(machine, app)) == 1


def test_server_waits_for_its_grace_and_no_longer(machine: Machine, tmp_path: Path) -> None:
    """Closed while the line is down, the server ends by itself when its grace is over."""
    app = apps.put(machine, "counter.py", COUNTER)
    events: list[Event] = []
    with cabled(machine, tmp_path) as (cable, there):
        with tunnel_with_events(there, app, events, isolate=False, grace=3):
            cable.refuse()
            until(lambda: Lost in kinds(events), what="the loss")
        assert kinds(events)[-1] is Closed
        assert [event for event in events if isinstance(event, Warned) and "3 s" in event.text]
        assert servers(machine, app)  # the control: it was there, and nobody has told it
        until(lambda: not servers(machine, app), what="the grace to be over")


def test_server_is_told_of_whenever_the_loss_was(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Closed while the lost line is just being put away, a tunnel still says what becomes of its server."""
    app = apps.put(machine, "counter.py", COUNTER)
    events: list[Event] = []
    leaving = threading.Event()
    let_go = Server.close

    def close_late(server: Server) -> None:
        leaving.set()
        until(lambda: tunnel.state == "closed", what="the tunnel to be closed meanwhile")
        let_go(server)

    with cabled(machine, tmp_path) as (cable, there):
        with tunnel_with_events(there, app, events, isolate=False, grace=3) as tunnel:
            monkeypatch.setattr(Server, "close", close_late)
            cable.refuse()
            assert leaving.wait(20)
        assert [type(event) for event in events[-3:]] == [Lost, Warned, Closed]
        [warned] = [event for event in events if isinstance(event, Warned)]
        assert "3 s" in warned.text
        assert [event.server for event in events if isinstance(event, Closed)] == ["unreached"]
        until(lambda: not servers(machine, app), what="the grace to be over")


def test_server_that_dies_before_our_eyes_is_not_started_again(machine: Machine, tmp_path: Path) -> None:
    """A server that ends while the line stands ends the tunnel: what broke it may break the next."""
    app = apps.put(machine, "counter.py", COUNTER)
    events: list[Event] = []
    with tunnel_with_events(machine, app, events) as tunnel:
        [launched] = [event for event in events if isinstance(event, Launched)]
        machine.execute(["kill", "-KILL", str(launched.pid)])
        with pytest.raises(ServerExitedError):
            tunnel.wait(20)
        assert tunnel.state == "failed"


def test_attached_server_is_attached_to_again(machine: Machine, tmp_path: Path) -> None:
    """A server that nobody of us started is found again where it was."""
    app = apps.put(machine, "counter.py", COUNTER)
    events: list[Event] = []
    with (
        serve_on(machine, "--allow-websocket-origin", "*", app) as running,
        cabled(machine, tmp_path) as (cable, there),
    ):
        port = port_of(running)
        with tunnel_with_events(there, None, events, remote_port=port, launch=False) as tunnel:
            cable.pull()
            until(lambda: Reconnected in kinds(events), timeout=30, what="the line to be back")
            assert tunnel.remote_port == port
            assert ask(tunnel).startswith("seen 1 by ")
        assert running.running


@pytest.mark.parametrize("reverse", ["host", "relay"])
def test_gateway_tunnel_comes_back(shape_c: Any, tmp_path: Path, reverse: Any) -> None:
    """Both halves of a gateway tunnel are made again: the login, the server, the gateway's port."""
    bed = shape_c
    app = apps.put(bed.bokehhost, "counter.py", COUNTER)
    host = Host(bed.bokehhost.inside, bed.bokehhost.user, **{**bed.bokehhost.login, "port": 22})
    events: list[Event] = []
    with cabled(bed.gateway, tmp_path) as (cable, there):
        with GatewayTunnel(
            Host(there.host, there.user, **there.login),
            host=host,
            app=app,
            python=light_bokeh.PYTHON,
            gateway_address="gateway",
            reverse=reverse,
            on_event=events.append,
            isolate=False,
        ) as tunnel:
            assert tunnel.reverse == reverse
            url, before = tunnel.url, ask(tunnel)
            cable.pull()
            until(lambda: Reconnected in kinds(events), timeout=60, what="the line to be back")
            assert tunnel.url == url
            assert ask(tunnel) == before.replace("seen 1", "seen 2")
            assert len(servers(bed.bokehhost, app)) == 1
        until(lambda: not servers(bed.bokehhost, app), what="the server to end")


def test_local_half_comes_back_when_what_is_published_does(shape_a: Any, tmp_path: Path) -> None:
    """Shape A: while the Bokeh host has yet to publish again, the local half tries on."""
    bed = shape_a
    app = apps.put(bed.bokehhost, "counter.py", COUNTER)
    events: list[Event] = []
    words = [
        "/opt/bokeh/bin/bokeh-ssh",
        "publish",
        app,
        "--gateway",
        "alice@gateway",
        "--host-keys",
        "accept-new",
    ]
    words += ["--remote-port", "5017"]
    with cabled(bed.gateway, tmp_path) as (_, there):
        with bed.bokehhost.spawn(words, user="alice") as publisher:
            until(lambda: "Ready" in publisher.log, timeout=90, what=f"it to publish: {publisher.log}")
            tunnel = GatewayTunnel(
                Host(there.host, there.user, **there.login),
                gateway_port=5017,
                on_event=events.append,
                isolate=False,
            ).open()
            before = ask(tunnel)
            # The gateway loses everybody, as when it restarts.
            bed.gateway.execute("pkill -KILL -u alice sshd")
            until(lambda: Lost in kinds(events), what="the loss")
            until(lambda: Reconnected in kinds(events), timeout=60, what=f"both to be back: {publisher.log}")
            assert ask(tunnel) == before.replace("seen 1", "seen 2")
            tunnel.close()


def test_killed_client_leaves_a_server_to_come_back_to(machine: Machine, tmp_path: Path) -> None:
    """When the child process that holds the line is killed, that is told, and the server ends by itself."""
    app = apps.put(machine, "counter.py", COUNTER)
    events: list[Event] = []

    with tunnel_with_events(machine, app, events, isolate=True, grace=2) as tunnel:
        [child] = children()
        os.kill(child, signal.SIGKILL)
        until(lambda: tunnel.state == "failed", what="its end to be noticed")
    until(lambda: not servers(machine, app), timeout=60, what="the server to end")
