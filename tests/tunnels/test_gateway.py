"""GatewayTunnel in its three shapes, on containers that really cannot reach each other otherwise."""

from __future__ import annotations

import json
import socket
from typing import Any

import pytest

import apps
import light_bokeh
from beds import until
from bokeh_ssh import (
    BokehSSHError,
    Event,
    GatewayExposedError,
    GatewayTunnel,
    PortInUseError,
    ReverseForwarded,
    ServerNotFoundError,
    UsageError,
)
from gateways import gateway_of, host_of, publish


def test_the_beds_are_what_they_say(shape_a: Any, shape_c: Any) -> None:
    """In shape A nobody reaches the Bokeh host; the control is that it reaches the gateway."""
    probe = "import socket, sys; sock = socket.create_connection((sys.argv[1], 22), timeout=2); "
    probe += "sock.settimeout(20); sock.recv(4)"
    assert shape_a.gateway.execute(["python3", "-c", probe, "bokehhost"]).status != 0
    assert shape_a.bokehhost.execute(["python3", "-c", probe, "gateway"]).status == 0
    assert shape_c.gateway.execute(["python3", "-c", probe, "bokehhost"]).status == 0
    shape_a.bokehhost.server.reload()
    networks = shape_a.bokehhost.server.attrs["NetworkSettings"]["Networks"].values()
    for network in networks:
        with pytest.raises((TimeoutError, ConnectionError)):
            socket.create_connection((network["IPAddress"], 22), timeout=2).recv(4)


def test_shape_a_publish_there_and_open_here(shape_a: Any) -> None:
    """The Bokeh host publishes an app on the gateway; here the gateway is all that is named."""
    app = apps.put(shape_a.bokehhost, "sliders.py", apps.SLIDER)
    with publish(shape_a, app) as running:
        until(lambda: "Ready" in running.log or not running.running, timeout=60, what="it to be published")
        assert running.running, running.log
        with GatewayTunnel(gateway_of(shape_a)) as tunnel:
            assert tunnel.reverse is None
            assert tunnel.remote_port == 0
            apps.drive(tunnel.url)
        assert running.running
    until(lambda: not shape_a.bokehhost.pids(app), what="the published server to end")
    until(
        lambda: str(shape_a.gateway.execute("ls /tmp/bokeh-ssh-*/pub-*")) == "", what="the socket to be gone"
    )


def test_nothing_published_is_told(shape_a: Any, no_leaks: Any) -> None:
    """A gateway where nothing is published gives an error that says what to run on the Bokeh host."""
    with no_leaks(), pytest.raises(ServerNotFoundError, match="bokeh-ssh publish"):
        GatewayTunnel(gateway_of(shape_a)).open()


@pytest.mark.usefixtures("docker_engine")
@pytest.mark.parametrize("shape", ["B", "C"])
@pytest.mark.parametrize("reverse", ["host", "relay"])
def test_driven_from_here(shape: str, reverse: Any, request: pytest.FixtureRequest) -> None:
    """Shapes B and C, dialled by the host and relayed by us: all work, and nothing is left there."""
    bed = request.getfixturevalue(f"shape_{shape.lower()}")
    app = apps.put(bed.bokehhost, "sliders.py", apps.SLIDER)
    before = bed.gateway.listening()
    with GatewayTunnel(
        gateway_of(bed),
        host=host_of(bed),
        app=app,
        python=bed.bokehhost.python,
        reverse=reverse,
        gateway_address="gateway:22",
    ) as tunnel:
        assert tunnel.reverse == reverse
        apps.drive(tunnel.url)
        opened = bed.gateway.listening() - before
        assert {address for address, _ in opened} <= {"127.0.0.1"}
    until(lambda: not bed.bokehhost.pids(app), what="the server to be gone")
    until(lambda: bed.gateway.listening() <= before, what="the gateway's port to be free")
    until(lambda: not bed.bokehhost.pids("publisher_main"), what="the publisher to be gone")


@pytest.mark.parametrize("isolate", [True, False])
def test_nothing_is_left_here(shape_c: Any, isolate: bool, no_leaks: Any) -> None:
    """A relay has two connections, two pumps and many sockets in this process; none of them stays."""
    app = apps.put(shape_c.bokehhost, "sliders.py", apps.SLIDER)
    with (
        no_leaks(),
        GatewayTunnel(
            gateway_of(shape_c),
            host=host_of(shape_c),
            app=app,
            python=shape_c.bokehhost.python,
            reverse="relay",
            isolate=isolate,
        ) as tunnel,
    ):
        apps.drive(tunnel.url)


def test_auto_takes_the_host_where_it_can(shape_c: Any) -> None:
    """``auto`` has the host dial where bokeh_ssh is installed there and it can log in."""
    app = apps.put(shape_c.bokehhost, "sliders.py", light_bokeh.APP)
    with GatewayTunnel(
        gateway_of(shape_c), host=host_of(shape_c), app=app, python=light_bokeh.PYTHON,
        gateway_address="gateway:22",
    ) as tunnel:  # fmt: skip
        assert tunnel.reverse == "host"
        assert "Bokeh" in apps.get(tunnel.url)


def test_auto_relays_where_the_host_cannot(bed: Any) -> None:
    """Without bokeh_ssh on the host, ``auto`` relays and says why; ``host`` is a typed error."""
    made = bed("C", package=False)
    app = apps.put(made.bokehhost, "sliders.py", light_bokeh.APP)
    keywords = {
        "host": host_of(made), "app": app, "python": light_bokeh.PYTHON, "signed": False,
        "gateway_address": "gateway:22",
    }  # fmt: skip
    events: list[Event] = []
    with GatewayTunnel(gateway_of(made), on_event=events.append, **keywords) as tunnel:
        assert tunnel.reverse == "relay"
        assert "Bokeh" in apps.get(tunnel.url)
    [told] = [event for event in events if isinstance(event, ReverseForwarded)]
    assert "bokeh_ssh" in told.reason
    with pytest.raises(BokehSSHError, match="relay"):
        GatewayTunnel(gateway_of(made), reverse="host", **keywords).open()


def test_name_of_the_host_takes_the_gateways_login(shape_c: Any, account: Any) -> None:
    """A host given as a name has the gateway's user, key and ssh config."""
    app = apps.put(shape_c.bokehhost, "sliders.py", light_bokeh.APP)
    config = account / ".ssh" / "config"
    config.write_text(
        shape_c.gateway.ssh_config("gate")
        + "Host node\n  HostName bokehhost\n  HostKeyAlias bokehhost\n  Port 22\n"
        + f"  UserKnownHostsFile {shape_c.bokehhost.known_hosts}\n",
        encoding="utf-8",
    )
    with GatewayTunnel(
        "gate",
        shape_c.gateway.user,
        key_filename=str(shape_c.gateway.key_path),
        host="node",
        app=app,
        python=light_bokeh.PYTHON,
        reverse="relay",
    ) as tunnel:
        assert "Bokeh" in apps.get(tunnel.url)


def test_gateway_port_taken_is_told(shape_c: Any) -> None:
    """A gateway port that was asked for by number and is taken is a typed error; nothing is left."""
    app = apps.put(shape_c.bokehhost, "sliders.py", light_bokeh.APP)
    with pytest.raises(PortInUseError) as caught:
        GatewayTunnel(
            gateway_of(shape_c), host=host_of(shape_c), app=app, python=light_bokeh.PYTHON,
            gateway_port=22, reverse="relay",
        ).open()  # fmt: skip
    assert caught.value.side == "remote"
    until(lambda: not shape_c.bokehhost.pids(app), what="the server to be gone")


def test_gateway_that_exposes_the_port_is_refused(bed: Any) -> None:
    """``GatewayPorts yes`` on the gateway: refused for both ways, allowed in words."""
    made = bed("C", directives={"GatewayPorts": "yes"})
    app = apps.put(made.bokehhost, "sliders.py", light_bokeh.APP)
    keywords = {
        "host": host_of(made), "app": app, "python": light_bokeh.PYTHON, "signed": False,
        "gateway_address": "gateway:22",
    }  # fmt: skip
    with pytest.raises(GatewayExposedError):
        GatewayTunnel(gateway_of(made), reverse="relay", **keywords).open()
    with pytest.raises(BokehSSHError, match="GatewayPorts"):
        GatewayTunnel(gateway_of(made), reverse="host", **keywords).open()
    before = made.gateway.listening()
    with GatewayTunnel(gateway_of(made), reverse="relay", allow_exposed=True, **keywords) as tunnel:
        assert "Bokeh" in apps.get(tunnel.url)
        opened = {address for address, _ in made.gateway.listening() - before}
        assert opened & {"0.0.0.0", "::"}  # the control: this is what the network would get


def test_password_of_the_gateway_is_not_told_to_the_host() -> None:
    """A host given as a name does not get the gateway's password."""
    tunnel = GatewayTunnel("gateway.invalid", "me", password="canary", host="node17", app="a.py")
    assert tunnel._bokeh_host is not None
    assert tunnel._bokeh_host.password is None
    assert tunnel._bokeh_host.user == "me"
    assert "canary" not in json.dumps([repr(tunnel), repr(tunnel._what.args), str(vars(tunnel._bokeh_host))])


@pytest.mark.parametrize(
    "keywords",
    [
        {"app": "a.py"},
        {"reverse": "sideways"},
        {"launch": True},
        {"gateway_port": -1},
        {"gateway_address": "a b"},
        {"host": "login", "app": "a.py", "batch": "auto"},
        {"host": "login", "job": "7"},
    ],
)
def test_bad_keywords_are_told(keywords: dict[str, Any]) -> None:
    """What cannot work is a UsageError from the constructor."""
    with pytest.raises(UsageError):
        GatewayTunnel("gateway.invalid", "me", **keywords)
