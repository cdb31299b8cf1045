"""Nobody else gets in: another account on the Bokeh host and the gateway, beside what plain ssh gives it."""

from __future__ import annotations

import re
import urllib.error
from collections.abc import Callable
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

import apps
import light_bokeh
from attacks import attack
from beds import Knobs, Machine, until
from bokeh_ssh import DirectTunnel, Event, GatewayTunnel, Host, ReverseForwarded, Warned

if TYPE_CHECKING:
    from docker_bed import Container


def tunnel_to(machine: Machine, app: str, **keywords: Any) -> DirectTunnel:
    """Make a tunnel that uses the machine's own interpreter."""
    return DirectTunnel(
        machine.host,
        machine.user,
        app,
        **{"python": machine.python, "isolate": False, **machine.login, **keywords},
    )


def through(bed: Any, app: str, **keywords: Any) -> GatewayTunnel:
    """Make a gateway tunnel of shape C."""
    room = bed.bokehhost
    return GatewayTunnel(
        Host(bed.gateway.host, bed.gateway.user, **bed.gateway.login),
        host=Host(room.inside, room.user, **{**room.login, "port": 22}),
        app=app,
        gateway_address="gateway",
        **{"python": room.python, "isolate": False, **keywords},
    )


@contextmanager
def watched(events: list[Event], text: str) -> Any:
    """See that a warning with this text comes in the block."""
    yield
    assert [event for event in events if isinstance(event, Warned) and text in event.text], events


def test_other_user_of_the_bokeh_host_gets_nowhere(container: Callable[..., Container]) -> None:
    """The default listens where only its account gets to, and the plain address opens by itself."""
    machine = container()
    app = apps.put(machine, "sliders.py", apps.SLIDER)
    with tunnel_to(machine, app) as tunnel:
        assert tunnel.url == f"http://localhost:{tunnel.local_port}/sliders"
        assert tunnel.remote_port == 0
        assert attack(machine, "/sliders") == []
        apps.drive(tunnel.url)


def test_control_open_port(container: Callable[..., Container]) -> None:
    """With ``signed=False``, as with ``bokeh serve`` and ``ssh -L``, the other user opens the app."""
    machine = container()
    app = apps.put(machine, "sliders.py", light_bokeh.APP)
    with tunnel_to(machine, app, signed=False, python=light_bokeh.PYTHON) as tunnel:
        assert attack(machine, "/sliders") == [f"GOT IN port {tunnel.remote_port}"]


@pytest.mark.parametrize("why", ["port", "forbidden", "asked"])
def test_signed_sessions_where_there_is_no_socket(container: Callable[..., Container], why: str) -> None:
    """On a port the server answers to signed sessions only; all that the tunnel offers works with them."""
    machine = container(Knobs(streamlocal=why != "forbidden"))
    app = apps.put(machine, "sliders.py", apps.SLIDER)
    words: dict[str, Any] = {"port": {"remote_port": 5123}, "forbidden": {}, "asked": {"signed": True}}[why]
    with tunnel_to(machine, app, **words) as tunnel:
        url = tunnel.url
        assert "bokeh-session-id=" in url
        assert attack(machine, "/sliders") == []
        page = apps.get(url)
        assert apps.open_websocket(url.partition("?")[0], page)["msgtype"] == "ACK"
        with tunnel.pull_session() as session:
            session.document.select_one({"name": "slider"}).value = 4
            session.force_roundtrip()
            session.pull()
            assert session.document.select_one({"name": "text"}).text == "answer 8"
        script = tunnel.server_document()
        found = re.search(r'"(http[^"]*/autoload\.js[^"]*)"', script)
        assert found
        assert "Bokeh" in apps.get(found.group(1))
        assert tunnel.url != url  # each opens a session of its own


def test_other_users_of_a_gateway_get_nowhere(shape_c: Any) -> None:
    """What the gateway listens on is a socket of the person's own account there."""
    app = apps.put(shape_c.bokehhost, "sliders.py", light_bokeh.APP)
    for reverse in ("host", "relay"):
        events: list[Event] = []
        with through(
            shape_c, app, reverse=reverse, python=light_bokeh.PYTHON, on_event=events.append
        ) as tunnel:
            [reversed_] = [event for event in events if isinstance(event, ReverseForwarded)]
            assert reversed_.socket
            assert not reversed_.port
            assert attack(shape_c.gateway, "/sliders") == []
            assert attack(shape_c.bokehhost, "/sliders") == []
            assert "session-id" not in tunnel.url
            assert "Bokeh" in apps.get(tunnel.url)
        until(lambda: str(shape_c.gateway.execute("ls /tmp/bokeh-ssh-*")) == "", what="the socket to be gone")


def test_control_open_port_of_a_gateway(shape_c: Any) -> None:
    """With ``signed=False``, as with ``ssh -R``, the gateway's other users open the app."""
    app = apps.put(shape_c.bokehhost, "sliders.py", light_bokeh.APP)
    with through(shape_c, app, signed=False, reverse="relay", python=light_bokeh.PYTHON):
        assert len(attack(shape_c.gateway, "/sliders")) == 1


def test_gateway_port_by_number_is_signed(shape_c: Any) -> None:
    """A port that was asked for by number is open to all there, so sessions are signed."""
    app = apps.put(shape_c.bokehhost, "sliders.py", apps.SLIDER)
    with through(shape_c, app, gateway_port=5077, reverse="relay") as tunnel:
        assert "bokeh-session-id=" in tunnel.url
        assert attack(shape_c.gateway, "/sliders") == []
        assert "Bokeh" in apps.get(tunnel.url)


def test_gateway_without_sockets(bed: Any) -> None:
    """Where the gateway forbids sockets, a port and signed sessions do the same."""
    made = bed("C", gateway=Knobs(streamlocal=False))
    app = apps.put(made.bokehhost, "sliders.py", apps.SLIDER)
    events: list[Event] = []
    with through(made, app, on_event=events.append) as tunnel:
        [reversed_] = [event for event in events if isinstance(event, ReverseForwarded)]
        assert reversed_.port
        assert attack(made.gateway, "/sliders") == []
        assert "Bokeh" in apps.get(tunnel.url)


def test_two_tunnels_share_nothing(container: Callable[..., Container]) -> None:
    """Two tunnels to one app have sockets and secrets of their own."""
    machine = container()
    app = apps.put(machine, "sliders.py", apps.SLIDER)
    with tunnel_to(machine, app, signed=True) as one, tunnel_to(machine, app, signed=True) as other:
        assert one.local_port != other.local_port
        query = one.url.partition("?")[2]
        address = f"{other.url.partition('?')[0]}?{query}"
        with pytest.raises(urllib.error.HTTPError, match="403") as refused:
            apps.get(address)
        refused.value.close()
        assert "Bokeh" in apps.get(one.url)
        assert "Bokeh" in apps.get(other.url)
    with tunnel_to(machine, app, signed=False) as shared:  # the control: one id is as good as another
        assert "Bokeh" in apps.get(f"{shared.url}?{query}")


def test_key_is_nowhere_to_be_seen(container: Callable[..., Container]) -> None:
    """The signing key is in no repr, no event, and no command line there."""
    machine = container()
    app = apps.put(machine, "sliders.py", apps.SLIDER)
    events: list[Event] = []
    with tunnel_to(machine, app, signed=True, isolate=False, on_event=events.append) as tunnel:
        key = tunnel._info.key
        assert len(key) > 20
        assert key not in repr(tunnel) + repr(events) + "".join(tunnel.log)
        assert key not in machine.execute(["ps", "-ww", "-eo", "args="]).stdout
        assert machine.execute("cat /proc/*/environ 2>/dev/null", user="mallory").stdout.count(key) == 0
        found = machine.execute(["grep", "-rl", key, "/tmp", "/home", "/var"], timeout=60)
        assert found.stdout == ""
