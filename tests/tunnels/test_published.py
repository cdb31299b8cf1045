"""What a Bokeh host publishes on a gateway: by name for its account alone, or on a port that is watched."""

from __future__ import annotations

import contextlib
import http.client
import threading
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import apps
import light_bokeh
from attacks import attack
from beds import Knobs, Machine, Running, free_port, until
from bokeh_ssh import (
    ConnectionLostError,
    Event,
    ForeignServerError,
    GatewayTunnel,
    Host,
    LocalForward,
    Lost,
    Reconnected,
    RemoteForward,
    ServerNotFoundError,
    SocketInUseError,
    UsageError,
    Warned,
)
from bokeh_ssh._tunnels.publication import Publication
from cable import Cable
from counting import tunnel_with_events
from direct_tunnels import port_of, serve_on
from events import kinds
from gateways import gateway_of, publish

if TYPE_CHECKING:
    from docker_bed import Container


def host_of(machine: Machine) -> Host:
    """Name a machine as its user would."""
    return Host(machine.host, machine.user, **machine.login)


def test_other_users_of_the_gateway_cannot_open_what_is_published(shape_a: Any) -> None:
    """By name only the account itself gets in, by that name, or by none where there is no other."""
    app = apps.put(shape_a.bokehhost, "sliders.py", apps.SLIDER)
    with publish(shape_a, app) as running:
        until(lambda: "Ready" in running.log or not running.running, timeout=60, what="it to be published")
        assert attack(shape_a.gateway, "/sliders") == []
        for name in (None, "sliders"):
            with GatewayTunnel(gateway_of(shape_a), name=name, isolate=False) as tunnel:
                assert tunnel.url == f"http://localhost:{tunnel.local_port}/sliders"
                assert "Bokeh" in apps.get(tunnel.url)
        with pytest.raises(ServerNotFoundError, match="there are: sliders"):
            GatewayTunnel(gateway_of(shape_a), name="other", launch_timeout=0.1, isolate=False).open()


def test_control_port_of_the_gateway(shape_a: Any) -> None:
    """On a port, as with ``ssh -R``, the gateway's other users open it; that is said."""
    app = apps.put(shape_a.bokehhost, "sliders.py", apps.SLIDER)
    with publish(shape_a, app, "--remote-port", "5006") as running:
        until(lambda: "Ready" in running.log or not running.running, timeout=60, what="it to be published")
        assert attack(shape_a.gateway, "/sliders") == ["GOT IN port 5006"]
        assert "open to the other users" in running.log
        with GatewayTunnel(gateway_of(shape_a), isolate=False) as tunnel:
            assert tunnel.remote_port == 5006


def test_gateway_without_sockets_takes_a_port(container: Callable[..., Container]) -> None:
    """Where the gateway forbids sockets it is on port 5006, unless a name was asked for; that is said."""
    gateway = container(Knobs(streamlocal=False))
    with serve_on(gateway) as running:
        port = port_of(running)
        with LocalForward(host_of(gateway), remote_port=port) as here:
            events: list[Event] = []
            words: dict[str, Any] = {"local_port": here.local_port, "on_event": events.append}
            with Publication(host_of(gateway), **words) as publication:
                assert publication.remote_port == 5006
                assert [event for event in events if isinstance(event, Warned)]
                with GatewayTunnel(host_of(gateway), isolate=False) as tunnel:
                    assert tunnel.remote_port == 5006
            with pytest.raises(Exception, match="AllowStreamLocalForwarding"):
                Publication(host_of(gateway), name="mine", **words).open()


def test_two_names_are_two_things(machine: Machine) -> None:
    """Each name leads to its own; none is taken where there are several, nor is a name twice."""
    with serve_on(machine) as one, serve_on(machine) as two:
        ports = port_of(one), port_of(two)
        gateway = host_of(machine)
        with (
            LocalForward(gateway, remote_port=ports[0]) as first,
            LocalForward(gateway, remote_port=ports[1]) as second,
        ):
            with (
                RemoteForward(gateway, name="one", local_port=first.local_port) as forward,
                RemoteForward(gateway, name="two", local_port=second.local_port),
            ):
                assert (forward.name, forward.remote_port) == ("one", 0)
                with pytest.raises(UsageError, match="one, two"):
                    GatewayTunnel(gateway, isolate=False).open()
                with GatewayTunnel(gateway, name="two", isolate=False) as tunnel:
                    assert urllib.request.urlopen(f"{tunnel.url}metadata", timeout=20).status == 200
                    assert tunnel.detached
                with pytest.raises(SocketInUseError):
                    RemoteForward(gateway, name="one", local_port=first.local_port).open()
            with pytest.raises(ServerNotFoundError, match="nothing is published under the name 'two'"):
                GatewayTunnel(gateway, name="two", launch_timeout=0.1, isolate=False).open()
            with (
                RemoteForward(gateway, name="early", local_port=free_port()),
                pytest.raises(ServerNotFoundError, match="'early' does not answer"),
            ):
                GatewayTunnel(gateway, name="early", launch_timeout=0.1, isolate=False).open()


def test_publication_is_waited_for_and_its_end_is_noticed(embedded: Callable[..., Machine]) -> None:
    """What is not published yet is waited for; its end is told within seconds, and it is opened again."""
    machine = embedded()
    gateway, events = host_of(machine), list[Event]()
    tunnel = GatewayTunnel(gateway, name="late", on_event=events.append, isolate=False)
    with serve_on(machine) as served, LocalForward(gateway, remote_port=port_of(served)) as here:
        opening = threading.Thread(target=tunnel.open)
        opening.start()
        try:
            until(lambda: [each for each in events if isinstance(each, Warned)], what="told that it waits")
            assert tunnel.state == "connecting"
            with RemoteForward(gateway, name="late", local_port=here.local_port):
                opening.join(20)
                assert tunnel.state == "ready"
            until(lambda: [each for each in events if isinstance(each, Lost)], what="told")
            assert "'late' is gone" in str(events)
            with RemoteForward(gateway, name="late", local_port=here.local_port):
                until(lambda: [each for each in events if isinstance(each, Reconnected)], what="it is back")
                assert "Bokeh" in urllib.request.urlopen(f"{tunnel.url}", timeout=20).read().decode()
        finally:
            tunnel.close()
            opening.join(20)


def test_wait_for_a_publication_outlasts_the_connection(embedded: Callable[..., Machine]) -> None:
    """A connection to the gateway that is lost meanwhile is made again, and what is published then is opened;
    without ``reconnect`` it is the end."""
    machine = embedded()
    gateway, events = host_of(machine), list[Event]()

    def told() -> list[str]:
        return [each.text for each in events if isinstance(each, Warned)]

    tunnel = GatewayTunnel(gateway, name="late", on_event=events.append)
    with serve_on(machine) as served, LocalForward(gateway, remote_port=port_of(served)) as here:
        opening = threading.Thread(target=tunnel.open)
        opening.start()
        try:
            until(lambda: len(told()) == 1, what="told that it waits")
            machine.server.drop_connections()
            until(lambda: len(told()) == 2, what="told that it is tried again")
            assert "the gateway is tried again" in told()[1]
            until(lambda: here.state == "ready", what="the other one to be back")
            with RemoteForward(gateway, name="late", local_port=here.local_port):
                opening.join(20)
                assert tunnel.state == "ready"
        finally:
            tunnel.close()
            opening.join(20)

    def drop(event: Event) -> None:
        if isinstance(event, Warned):
            machine.server.drop_connections()

    with pytest.raises(ConnectionLostError):
        GatewayTunnel(gateway, name="late", reconnect=False, on_event=drop).open()


@pytest.mark.parametrize(
    ("place", "told"),
    [
        ({}, "other users of the gateway"),
        ({"bind_address": "0.0.0.0"}, "network; pages that are opened there stay blank without"),
        ({"bind_address": "0.0.0.0", "extra_origins": ["gw.example:80"]}, "network"),
    ],
)
def test_readers_without_ssh_are_told_of(
    place: dict[str, Any],
    told: str,
    embedded: Callable[..., Machine],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Who can open a published port is told, and what pages need at the gateway's own address."""
    monkeypatch.setenv("PYTHONPATH", light_bokeh.path_with_it(tmp_path))
    (tmp_path / "dash.py").write_text(light_bokeh.APP)
    machine, events = embedded(Knobs(gateway_ports="clientspecified")), list[Event]()
    words: dict[str, Any] = {"app": [str(tmp_path / "dash.py")], "remote_port": 0, "on_event": events.append}
    with Publication(machine.host, machine.user, **words, **place, **machine.login) as publication:
        port = publication.remote_port
    [text] = [each.text for each in events if isinstance(each, Warned) and f"port {port}" in each.text]
    assert text.startswith(f"port {port} is open to the")
    assert told in text
    assert ("extra_origins" in text) == ("blank" in told)


@pytest.mark.parametrize("name", ["", "a/b", "..", "-x", "a b", "ä", "x" * 41, "a\n"])
def test_names_that_cannot_be(name: str) -> None:
    """What could lead elsewhere, or be taken for something else, is refused before anything is dialled."""
    with pytest.raises(UsageError):
        RemoteForward("gateway.example", name=name)
    with pytest.raises(UsageError):
        GatewayTunnel("gateway.example", name=name)


@pytest.mark.parametrize("by_name", [True, False])
def test_publication_takes_its_own_place_back(machine: Machine, tmp_path: Any, by_name: bool) -> None:
    """After a silent cut the old session still holds the place on the gateway; the new one gets it."""
    config = tmp_path / "quick_config"
    config.write_text("ServerAliveInterval 1\nServerAliveCountMax 2\n", encoding="ascii")
    events: list[Event] = []
    with serve_on(machine) as running, Cable(machine.host, machine.port) as cable:
        port = port_of(running)
        with LocalForward(host_of(machine), remote_port=port) as here:
            quick = host_of(cable.machine(machine, tmp_path))
            place: dict[str, Any] = {"name": "mine"} if by_name else {"remote_port": 0}
            with RemoteForward(
                quick.name,
                quick.user,
                **{**cable.machine(machine, tmp_path).login, "ssh_config": str(config)},
                **place,
                local_port=here.local_port,
                on_event=events.append,
            ) as forward:
                before = forward.remote_port
                cable.cut()
                until(lambda: Lost in kinds(events), what="the silence to be noticed")
                if not by_name:
                    cable.refuse()  # the old session hears of its end, a little later
                cable.mend()
                until(lambda: Reconnected in kinds(events), timeout=40, what="it to be published again")
                assert forward.remote_port == before
                words: dict[str, Any] = {"name": "mine"} if by_name else {"gateway_port": before}
                with GatewayTunnel(host_of(machine), **words) as tunnel:
                    assert tunnel.state == "ready"


#: Listens where the server was, and writes down what comes.
_THIEF = """
import socket, sys
listener = socket.socket()
listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
listener.bind(("127.0.0.1", int(sys.argv[1])))
listener.listen()
print("listening", flush=True)
while True:
    sock, _ = listener.accept()
    print("connected", flush=True)
    data = sock.recv(65536)
    print("GOT", data.split(b"\\r\\n")[0], flush=True)
    sock.sendall(b"HTTP/1.1 200 OK\\r\\nServer: TornadoServer/6\\r\\nContent-Length: 5\\r\\n\\r\\nthief")
    sock.close()
"""


def rob(machine: Container, running: Running, port: int) -> Any:
    """End a server, and have the machine's other user take its port."""
    machine.execute(["kill", "-KILL", *map(str, machine.pids(f"--port {port}") or [running.pid])])
    until(lambda: port not in {p for _, p in machine.listening()}, what="the port to be free")
    return machine.spawn([machine.python, "-u", "-c", _THIEF, str(port)], user="mallory")


def fetch(port: int) -> str:
    """Ask the local port for a page, with something secret in it."""
    with contextlib.closing(http.client.HTTPConnection("localhost", port, timeout=10)) as client:
        client.request("GET", "/?bokeh-session-id=secret")
        return client.getresponse().read().decode()


def test_port_that_another_user_takes_over_gets_nothing(container: Callable[..., Container]) -> None:
    """The server behind a port ends, and another user's program has it: not one byte goes there."""
    machine = container()
    events: list[Event] = []
    with serve_on(machine) as running:
        port = port_of(running)
        with tunnel_with_events(machine, None, events, isolate=False, remote_port=port) as tunnel:
            with rob(machine, running, port) as thief:
                until(lambda: "listening" in thief.log, what="the thief to listen")
                with pytest.raises((OSError, http.client.HTTPException)):
                    fetch(tunnel.local_port)
                until(lambda: tunnel.state == "failed", what="the tunnel to say so")
                with pytest.raises(ForeignServerError, match="another user now"):
                    tunnel.wait()
                assert "connected" in thief.log  # the proof: that is how far it got
                assert "GOT b'GET" not in thief.log


def test_control_port_that_is_not_watched_over(container: Callable[..., Container]) -> None:
    """Allowed in words, as with ``ssh -L``, the other user's program gets the request, and answers it."""
    machine = container()
    with serve_on(machine) as running:
        port = port_of(running)
        with tunnel_with_events(
            machine, None, [], isolate=False, remote_port=port, allow_foreign=True
        ) as tunnel:
            with rob(machine, running, port) as thief:
                until(lambda: "listening" in thief.log, what="the thief to listen")
                assert fetch(tunnel.local_port) == "thief"
                assert "GOT b'GET /?bokeh-session-id=secret" in thief.log


def test_server_of_ones_own_that_was_started_anew_is_fine(machine: Machine) -> None:
    """Whose server it is counts, not which: after one refused connection a new one of one's own is used."""
    with serve_on(machine) as running:
        port = port_of(running)
        with tunnel_with_events(machine, None, [], isolate=False, remote_port=port) as tunnel:
            url = f"http://127.0.0.1:{tunnel.local_port}/metadata"
            assert urllib.request.urlopen(url, timeout=20).status == 200
            running.signal()
            until(lambda: port not in {p for _, p in machine.listening()}, what="the port to be free")
            with serve_on(machine, "--port", str(port)) as again:
                port_of(again)

                def answers() -> bool:
                    try:
                        return bool(urllib.request.urlopen(url, timeout=20).status == 200)
                    except OSError:
                        return False

                until(answers, what="the new server to answer")
                assert tunnel.state == "ready"
