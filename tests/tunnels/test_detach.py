"""Servers that are left running on purpose: found, opened and ended later, whoever goes away meanwhile."""

from __future__ import annotations

import os
import signal
import time
import urllib.error
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import apps
import light_bokeh
from beds import Machine, until
from bokeh_ssh import (
    Attached,
    BokehSSHError,
    Closed,
    DirectTunnel,
    Event,
    GatewayTunnel,
    Host,
    Reconnected,
    ServerExitedError,
    ServerGoneError,
    ServerNotFoundError,
    ServerTakenError,
    UsageError,
    Warned,
)
from bokeh_ssh._server.registry import list_servers, stop_server
from bokeh_ssh._ssh.connect import connect
from cable import Cable
from connections import end, there
from counting import COUNTER, ask, servers, tunnel_with_events
from gateways import gateway_of, host_of
from programs import Program, login, run_here


@pytest.fixture
def machine(kind: str, request: pytest.FixtureRequest) -> Machine:
    """Each kind of machine, with servers of this test's own: Bokeh's in a container, quick ones here."""
    made: Machine = request.getfixturevalue("container" if kind == "docker" else "light")()
    return made


@pytest.mark.parametrize("isolate", [False, True])
def test_server_that_was_left_is_taken_over_with_its_sessions(machine: Machine, isolate: bool) -> None:
    """It is the same process at the same local port, by id or app; the control ends with its tunnel."""
    app = apps.put(machine, "counter.py", COUNTER)
    events: list[Event] = []
    with tunnel_with_events(machine, app, events, isolate=isolate, detach=True, local_port=0) as tunnel:
        seen, port, name = ask(tunnel), tunnel.local_port, tunnel.server
        assert seen.startswith("seen 1 by ")
        assert tunnel.detached
    assert name
    assert events[-1] == Closed(host=machine.host, server="left")
    [left] = there(machine)
    assert (left.id, left.detached, left.attached) == (name, True, False)
    for number, wanted in enumerate((name, "counter", "*"), start=2):
        events.clear()
        with tunnel_with_events(machine, None, events, isolate=isolate, server=wanted) as again:
            assert ask(again) == seen.replace("seen 1", f"seen {number}")
            assert (again.local_port, again.server, again.detached) == (port, name, True)
            assert again.url.startswith(f"http://localhost:{port}/counter")
            assert len(servers(machine, app)) == 1
        assert [event.id for event in events if isinstance(event, Attached)] == [name]
    end(machine, name)
    until(lambda: not servers(machine, app), what="it to end")
    with tunnel_with_events(machine, app, events) as control:
        assert not control.detached
    until(lambda: not servers(machine, app), what="the control to end with its tunnel")
    assert there(machine) == []


def test_server_that_is_signed_opens_again(here: Machine) -> None:
    """One that answers to signed sessions only is opened again with its own key, which only it has kept."""
    app = apps.put(here, "sliders.py", apps.SLIDER)
    with tunnel_with_events(here, app, [], signed=True, detach=True) as tunnel:
        name = tunnel.server
    assert name
    with tunnel_with_events(here, None, [], server=name) as again:
        assert "bokeh-session-id=" in again.url
        assert "Bokeh" in apps.get(again.url)
        with pytest.raises(urllib.error.HTTPError, match="403") as refused:
            apps.get(again.url.partition("?")[0])
        refused.value.close()
    end(here, name)


def test_server_waiting_for_its_client_is_had_from_elsewhere(machine: Machine, tmp_path: Path) -> None:
    """One whose client has vanished within its grace is taken over, and ends with the new tunnel."""
    app = apps.put(machine, "counter.py", COUNTER)
    with Cable(machine.host, machine.port) as cable:
        with tunnel_with_events(cable.machine(machine, tmp_path), app, []) as tunnel:
            seen, name = ask(tunnel), tunnel.server
            assert name
            with pytest.raises(ServerTakenError):
                tunnel_with_events(machine, None, [], server=name).open()
            cable.refuse()
            until(lambda: not there(machine)[0].attached, what="the loss to be seen there")
            with tunnel_with_events(machine, None, [], server="counter.py") as other:
                assert ask(other) == seen.replace("seen 1", "seen 2")
                assert not other.detached
    until(lambda: not servers(machine, app), what="it to end with its new tunnel")


def test_server_that_was_left_comes_back_after_a_loss(machine: Machine, tmp_path: Path) -> None:
    """A tunnel to it lives through a loss; where it has ended meanwhile, none is started in its place."""
    app = apps.put(machine, "counter.py", COUNTER)
    with tunnel_with_events(machine, app, [], detach=True) as tunnel:
        seen, name = ask(tunnel), tunnel.server
    assert name
    with Cable(machine.host, machine.port) as cable:
        with tunnel_with_events(
            cable.machine(machine, tmp_path), None, [], isolate=False, server=name
        ) as again:
            cable.pull()
            until(lambda: again.state != "ready", what="the loss")
            until(lambda: again.state == "ready", timeout=30, what="the line to be back")
            assert ask(again) == seen.replace("seen 1", "seen 2")
            cable.refuse()
            until(lambda: again.state != "ready", what="the second loss")
            end(machine, name)
            cable.mend()
            until(lambda: again.state == "failed", timeout=40, what="it to give up")
            with pytest.raises(ServerGoneError):
                again.wait()
    assert servers(machine, app) == []


def test_gateway_tunnel_leaves_its_server_too(shape_c: Any) -> None:
    """Where this program relays, only the server is left, and a later tunnel makes the way to it again."""
    room = shape_c.bokehhost
    app = apps.put(room, "counter.py", COUNTER)

    def through(**keywords: Any) -> GatewayTunnel:
        return GatewayTunnel(
            Host(shape_c.gateway.host, shape_c.gateway.user, **shape_c.gateway.login),
            host=Host(room.inside, room.user, **{**room.login, "port": 22}),
            python=light_bokeh.PYTHON,
            reverse="relay",
            **keywords,
        )

    events: list[Event] = []
    with through(app=app, detach=True, on_event=events.append) as tunnel:
        seen, name = ask(tunnel), tunnel.server
    assert name
    assert "a relay is this program's own" in warnings_of(events)[0]
    assert len(servers(room, app)) == 1
    with through(server=name) as again:
        assert ask(again) == seen.replace("seen 1", "seen 2")
    room.execute(["kill", *map(str, servers(room, app))])
    until(lambda: not servers(room, app), what="it to end")


@contextmanager
def cleaned(host: Machine, app: str) -> Iterator[None]:
    """End what a test has left on the host, however it went: the next one finds it as it was."""
    try:
        yield
    finally:
        host.execute(["pkill", "-f", app])
        until(
            lambda: not servers(host, app) and not host.pids("bokeh_ssh._tunnels.publisher_main"),
            what="nothing to be left",
        )


def leave_through(bed: Any, events: list[Event], **keywords: Any) -> GatewayTunnel:
    """Make a tunnel that leaves its server and the way through the gateway."""
    words = {"python": light_bokeh.PYTHON, "gateway_address": "gateway:22", "on_event": events.append}
    return GatewayTunnel(gateway_of(bed), host=host_of(bed), **{**words, **keywords})


def warnings_of(events: list[Event]) -> list[str]:
    """List what was warned of, about what is left."""
    return [event.text for event in events if isinstance(event, Warned) and "left running" in event.text]


@pytest.mark.usefixtures("docker_engine")
@pytest.mark.parametrize("shape", ["B", "C"])
def test_gateway_tunnel_leaves_its_way_too(shape: str, request: pytest.FixtureRequest) -> None:
    """The server stays open by name on the gateway, without this program; ``stop`` ends all of it."""
    bed = request.getfixturevalue(f"shape_{shape.lower()}")
    app = apps.put(bed.bokehhost, "counter.py", COUNTER)
    events: list[Event] = []
    with cleaned(bed.bokehhost, app):
        with leave_through(bed, events, app=app, detach=True) as tunnel:
            seen, server = ask(tunnel), tunnel.server
            assert (tunnel.name, tunnel.reverse, tunnel.detached) == ("counter", "host", True), events
        assert seen.startswith("seen 1 by ")
        assert warnings_of(events) == []
        with GatewayTunnel(gateway_of(bed), name="counter") as again:  # the host is not logged in to
            assert ask(again) == seen.replace("seen 1", "seen 2")
        with leave_through(bed, events, server=server) as taken:  # nor is it published twice
            assert (taken.name, taken.server) == ("counter", server)
            assert ask(taken) == seen.replace("seen 1", "seen 3")
        assert len(bed.bokehhost.pids("bokeh_ssh._tunnels.publisher_main")) == 1
        jump = {"jump": gateway_of(bed)} if shape == "C" else {}
        with connect(host_of(bed, **jump)) as connection:
            every = list_servers(connection, python=bed.bokehhost.python)
            [left] = [each for each in every if each.id == server]
            assert left.published == "counter on gateway:22"
            stop_server(connection, left)
        until(
            lambda: not bed.bokehhost.pids("bokeh_ssh._tunnels.publisher_main"), what="the publisher to end"
        )
        until(
            lambda: str(bed.gateway.execute("ls /tmp/bokeh-ssh-*/pub-*")) == "", what="the socket to be gone"
        )


def test_way_that_was_left_comes_back_after_a_loss(shape_c: Any) -> None:
    """The host's line to the gateway breaks while nobody is there: it publishes again under its name."""
    app = apps.put(shape_c.bokehhost, "counter.py", COUNTER)
    with cleaned(shape_c.bokehhost, app):
        with leave_through(shape_c, [], app=app, detach=True) as tunnel:
            assert ask(tunnel).startswith("seen 1 ")
        sessions = shape_c.gateway.pids("sshd: alice@notty") or shape_c.gateway.pids("sshd: alice")
        assert sessions
        shape_c.gateway.execute(["kill", "-KILL", *map(str, sessions)])

        def opened() -> bool:
            try:
                with GatewayTunnel(gateway_of(shape_c), name="counter", isolate=False) as again:
                    return not ask(again).startswith("seen 1 ")
            except (BokehSSHError, OSError):
                return False

        until(opened, timeout=40, what="it to be published again")


def test_way_that_ends_is_made_again(shape_c: Any) -> None:
    """What publishes the server is killed while a tunnel uses it: that is noticed, and made good."""
    app = apps.put(shape_c.bokehhost, "counter.py", COUNTER)
    events: list[Event] = []
    with cleaned(shape_c.bokehhost, app):
        with leave_through(shape_c, events, app=app, detach=True) as tunnel:
            seen, url = ask(tunnel), tunnel.url
            [before] = shape_c.bokehhost.pids("bokeh_ssh._tunnels.publisher_main")
            shape_c.bokehhost.execute(["kill", "-KILL", str(before)])
            until(lambda: Reconnected in map(type, events), what="the way to be back")
            assert ask(tunnel) == seen.replace("seen 1", "seen 2")
            assert tunnel.url == url
            assert before not in shape_c.bokehhost.pids("bokeh_ssh._tunnels.publisher_main")
        with GatewayTunnel(gateway_of(shape_c), name=tunnel.name) as again:
            assert ask(again) == seen.replace("seen 1", "seen 3")


def test_server_that_is_stopped_is_not_started_again(shape_c: Any) -> None:
    """Stopped from elsewhere, server and way end together: the tunnel says so, and starts nothing."""
    app = apps.put(shape_c.bokehhost, "counter.py", COUNTER)
    with cleaned(shape_c.bokehhost, app):
        with leave_through(shape_c, [], app=app, detach=True) as tunnel:
            with connect(host_of(shape_c, jump=gateway_of(shape_c))) as connection:
                stop_server(connection, str(tunnel.server), python=shape_c.bokehhost.python)
            with pytest.raises(ServerExitedError):
                tunnel.wait(20)
        assert servers(shape_c.bokehhost, app) == []


def test_way_on_a_port_is_left_too(shape_c: Any) -> None:
    """Where a port was asked for, that is what stays, for signed sessions; the next tunnel uses it."""
    app = apps.put(shape_c.bokehhost, "counter.py", COUNTER)
    with cleaned(shape_c.bokehhost, app):
        with leave_through(shape_c, [], app=app, detach=True, gateway_port=5999) as tunnel:
            seen, server = ask(tunnel), tunnel.server
            assert (tunnel.name, tunnel.reverse) == (None, "host")
        assert ("127.0.0.1", 5999) in shape_c.gateway.listening()
        with leave_through(shape_c, [], server=server, gateway_port=5999) as again:
            assert ask(again) == seen.replace("seen 1", "seen 2")
        assert len(shape_c.bokehhost.pids("bokeh_ssh._tunnels.publisher_main")) == 1


def test_second_of_a_name_gets_another(shape_c: Any) -> None:
    """An app of the same name that is left as well is published under a name of its own."""
    app = apps.put(shape_c.bokehhost, "counter.py", COUNTER)
    with cleaned(shape_c.bokehhost, app):
        names = []
        for _ in range(2):
            with leave_through(shape_c, [], app=app, detach=True) as tunnel:
                names.append((tunnel.name, tunnel.server))
        (first, _), (second, server) = names
        assert (first, second) == ("counter", f"counter-{server}")
        with GatewayTunnel(gateway_of(shape_c), name=second) as again:
            assert ask(again).startswith("seen 1 ")


def test_way_that_cannot_be_left_is_told(bed: Any) -> None:
    """Without bokeh_ssh on the host, only the server is left; that is said, and it can be had again."""
    made = bed("C", package=False)
    app = apps.put(made.bokehhost, "counter.py", COUNTER)
    events: list[Event] = []
    with cleaned(made.bokehhost, app):
        with leave_through(made, events, app=app, detach=True) as tunnel:
            assert (tunnel.name, tunnel.reverse) == (None, "relay")
            seen, name = ask(tunnel), tunnel.server
        [warned] = warnings_of(events)
        assert "no Python there has bokeh_ssh" in warned
        with leave_through(made, [], server=name) as again:
            assert ask(again) == seen.replace("seen 1", "seen 2")


@pytest.mark.parametrize(
    "words",
    [
        {"app": "x.py", "server": "y"},
        {"launch": True, "server": "y"},
        {"remote_port": 5006, "server": "y"},
        {"server": ""},
        {"launch": False, "detach": True},
    ],
)
def test_what_cannot_be_meant_is_refused(words: dict[str, Any]) -> None:
    """A server to take over beside how to start one, and nothing to leave, are usage errors."""
    with pytest.raises(UsageError):
        DirectTunnel("host.example", **words)
    with pytest.raises(UsageError, match="no host"):
        GatewayTunnel("gateway.example", detach=True)


# --- on the command line


pytestmark_posix = pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")


@pytestmark_posix
def test_commands_leave_and_find_again(light: Callable[..., Machine]) -> None:
    """``--detach`` leaves the server at Ctrl-C, ``attach`` opens it again, ``stop`` ends it."""
    here = light()
    app = apps.put(here, "counter.py", COUNTER)
    with Program("direct", here.host, app, "--detach", "--local-port", "0", *login(here)) as first:
        address = first.address()
        first.expect("bokeh-ssh attach")
        first.interrupt()
        assert first.end() == 0, first
    assert "the server keeps running" in first.stderr
    assert servers(here, app)
    with Program("attach", here.host, *login(here)) as second:
        assert second.address() == address
        second.interrupt()
        assert second.end() == 0, second
    assert servers(here, app)
    run_here("stop", here.host, "counter", *login(here))
    until(lambda: not servers(here, app), what="it to end")
    shown = run_here("attach", here.host, *login(here), code=1).stderr
    assert f"there is no server of yours\n  start one: bokeh-ssh {here.host} app.py" in shown


@pytestmark_posix
@pytest.mark.parametrize("detach", [True, False])
def test_killed_client_ends_only_what_was_not_left(light: Callable[..., Machine], detach: bool) -> None:
    """After ``kill -9`` what was to be left runs on beyond its grace; the control does not."""
    here = light()
    app = apps.put(here, "counter.py", COUNTER)
    words = ["direct", here.host, app, "--grace", "1", *["--detach"] * detach, *login(here)]
    with Program(*words) as program:
        program.address()
        program.interrupt(signal.SIGKILL)
        program.end()
    if not detach:
        until(lambda: not servers(here, app), what="the control to end")
        return

    def alone() -> bool:
        [left] = there(here)
        return not left.attached and time.time() - left.since > 3

    until(alone, what="it to outlive its grace")
    assert len(servers(here, app)) == 1
    [left] = there(here)
    end(here, left.id)


@pytestmark_posix
def test_publication_in_the_background(light: Callable[..., Machine]) -> None:
    """``publish --background`` comes back at once; the app is open by name until ``stop`` ends all of it."""
    here = light()
    app = apps.put(here, "counter.py", COUNTER)
    with Program("publish", app, "-g", here.host, "--background", *login(here)) as program:
        assert program.end() == 0, program
    assert f"bokeh-ssh gateway {here.host} --name counter" in program.stderr
    gateway = Host(here.host, here.user, **here.login)
    with GatewayTunnel(gateway, name="counter") as tunnel:
        assert ask(tunnel).startswith("seen 1 by ")
    with GatewayTunnel(gateway) as tunnel:
        assert ask(tunnel).startswith("seen 2 by ")
    assert "counter" in run_here("ls").stdout
    run_here("stop", "counter")
    until(lambda: not servers(here, app), what="the server to end too")
    with pytest.raises(ServerNotFoundError, match="counter"):
        GatewayTunnel(gateway, name="counter", launch_timeout=1).open()
