"""What it is all for: a page in a real browser whose slider moves, whatever happens to the network."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import apps
import browser
from beds import Machine, until
from bokeh_ssh import DirectTunnel, Event, GatewayTunnel, Host, Lost, Reconnected, Reconnecting, Warned
from bokeh_ssh._forwarding import static_cache
from bokeh_ssh._tunnels import tunnel_parts
from cable import Cable
from certificates import make_certificate
from direct_tunnels import tunnel_to
from events import kinds
from skips import missing

if TYPE_CHECKING:
    from docker_bed import Container

#: Seconds: two watchdog bounds, and longer than all but the last of BokehJS's attempts.
_CUT = 30.0


def near(machine: Container, tmp_path: Path) -> Container:
    """Give the container at its own address where that can be reached: so no proxy stands in between."""
    if sys.platform != "linux":
        return machine
    networks = machine.server.attrs["NetworkSettings"]["Networks"]
    address = next(network["IPAddress"] for network in networks.values() if network["IPAddress"])
    key = machine.known_hosts.read_text(encoding="ascii").split(maxsplit=1)[1]
    known = tmp_path / f"known_hosts-{address}"
    known.write_text(f"{address} {key}", encoding="ascii")
    return replace(machine, host=address, port=22, known_hosts=known)


def direct(machine: Container, app: str, events: list[Event]) -> DirectTunnel:
    """Make a tunnel straight to the machine."""
    words: dict[str, Any] = {"python": machine.python, "on_event": events.append, **machine.login}
    return DirectTunnel(machine.host, machine.user, app, **words)


@contextmanager
def published(bed: Any, app: str) -> Iterator[int]:
    """Publish the app from the Bokeh host, which alone can reach the gateway (shape A); gives the port."""
    words = [
        "/opt/bokeh/bin/bokeh-ssh",
        "publish",
        app,
        "--gateway",
        "alice@gateway",
        "--remote-port",
        "5006",
    ]
    with bed.bokehhost.spawn(words, user="alice") as publisher:
        until(lambda: "Ready" in publisher.log, timeout=90, what=f"it to publish: {publisher.log}")
        yield 5006


def test_slider_answers_through_a_direct_tunnel(
    container: Callable[..., Container], open_page: Callable[[], browser.Page]
) -> None:
    """A page opens by itself at the tunnel's address, and its slider is answered by Python on the machine."""
    machine = container()
    app = apps.put(machine, "app.py", browser.APP)
    with direct(machine, app, []) as tunnel:
        page = open_page().open(tunnel.url)
        page.move()
        page.move()


def test_second_page_takes_no_files_over_the_line(
    embedded: Callable[..., Machine],
    open_page: Callable[[], browser.Page],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A page of a known Bokeh version, on another host and port, works without its files crossing the line
    again; without the cache they do, which is the control."""
    monkeypatch.setattr(tunnel_parts, "_FAR", 60.0)  # nothing is sent ahead, however busy this machine is
    monkeypatch.setattr(static_cache, "_PATIENCE", 30.0)  # nor does a request go there, for a slow disk
    sent = []
    for keywords in ({}, {}, {"cache": False}):
        machine = embedded()
        app = apps.put(machine, "app.py", browser.APP)
        with Cable(machine.host, machine.port) as cable:
            with tunnel_to(
                cable.machine(machine, tmp_path), app, local_port=0, isolate=False, **keywords
            ) as tunnel:
                before = cable.carried
                page = open_page().open(tunnel.url)
                sent.append(cable.carried - before)
                page.move()
                page.move()
    assert min(sent[0], sent[2]) > 2_000_000
    assert sent[1] < 50_000


def test_pages_live_through_a_silent_cut(
    docker_engine: Any,
    container: Callable[..., Container],
    bed: Callable[..., Any],
    open_page: Callable[[], browser.Page],
    tmp_path: Path,
) -> None:
    """Packets are dropped for 30 s; then, without a reload, each slider moves again in the same session.

    Three pages at once: through a DirectTunnel, and through GatewayTunnels of shapes A and C.
    """
    machine, shape_a, shape_c = near(container(), tmp_path), bed("A"), bed("C")
    events: dict[str, list[Event]] = {"direct": [], "A": [], "C": []}
    with ExitStack() as stack:
        tunnels: dict[str, DirectTunnel | GatewayTunnel] = {}
        app = apps.put(machine, "app.py", browser.APP)
        tunnels["direct"] = direct(machine, app, events["direct"])
        door = near(shape_a.gateway, tmp_path)
        port = stack.enter_context(published(shape_a, apps.put(shape_a.bokehhost, "app.py", browser.APP)))
        tunnels["A"] = GatewayTunnel(
            Host(door.host, door.user, **door.login), gateway_port=port, on_event=events["A"].append
        )
        gate, room = near(shape_c.gateway, tmp_path), shape_c.bokehhost
        tunnels["C"] = GatewayTunnel(
            Host(gate.host, gate.user, **gate.login),
            host=Host(room.inside, room.user, **{**room.login, "port": 22}),
            app=apps.put(room, "app.py", browser.APP),
            python=room.python,
            gateway_address="gateway",
            on_event=events["C"].append,
        )
        pages = {}
        for name, tunnel in tunnels.items():
            stack.enter_context(tunnel)
            pages[name] = open_page().open(tunnel.url)
            pages[name].move()  # the control: without a cut it answers, and goes on answering
            pages[name].move()
        addresses = {name: tunnel.url for name, tunnel in tunnels.items()}
        with machine.silent() as first, door.silent() as second, gate.silent() as third:
            began = time.monotonic()
            for name in tunnels:
                until(lambda: Lost in kinds(events[name]), timeout=25, what=f"{name} to notice")  # noqa: B023
            assert time.monotonic() - began < 20  # 15 are promised
            until(lambda: time.monotonic() - began > _CUT, timeout=_CUT + 5, what="the cut to last")
        assert min(first.dropped, second.dropped, third.dropped) > 0
        for name in tunnels:
            until(lambda: Reconnected in kinds(events[name]), timeout=60, what=f"{name} to be back")  # noqa: B023
        for name, page in pages.items():
            page.wait_until_back()
            page.move()
            page.move()
            assert tunnels[name].url == addresses[name]
            assert all(event.same_server for event in events[name] if isinstance(event, Reconnected))
            assert Reconnecting in kinds(events[name])


def test_page_opens_over_tls(embedded: Callable[..., Machine]) -> None:
    """A server with a certificate of its own is opened at its https address, and its page's WebSocket goes by
    TLS too; where nobody trusts the certificate, a browser stops there, as was told."""
    if browser.find() is None:
        missing("no Chromium is installed")
    machine = embedded()
    app = apps.put(machine, "app.py", browser.APP)
    pem = apps.put(machine, "server.pem", make_certificate("node17.example.org")[0])
    events: list[Event] = []
    with tunnel_to(machine, app, args=["--ssl-certfile", pem], on_event=events.append) as tunnel:
        assert tunnel.url.startswith(f"https://localhost:{tunnel.local_port}/")
        assert any(isinstance(event, Warned) and "certificate" in event.text for event in events)
        with browser.chromium("--ignore-certificate-errors") as make:
            page = make().open(tunnel.url)
            page.move()
            page.move()
        with browser.chromium() as make, pytest.raises(Exception, match="ERR_CERT"):
            make().open(tunnel.url)
