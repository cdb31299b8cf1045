"""DirectTunnel, for real: Bokeh on another machine, driven by clients that are not ours."""

from __future__ import annotations

import http.server
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partialmethod
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import bokeh
import pytest

import apps
import light_bokeh
from beds import Machine, free_port, until
from bokeh_ssh import (
    AppAccessError,
    AppFailed,
    Attached,
    BokehNotFoundError,
    BokehSSHError,
    Closed,
    DirectTunnel,
    Event,
    ForeignServerError,
    Host,
    Launched,
    LaunchError,
    PortInUseError,
    Ready,
    ServerExitedError,
    ServerNotFoundError,
    TunnelClosedError,
    UsageError,
    Warned,
)
from bokeh_ssh._server import options
from bokeh_ssh._server.server import Server
from direct_tunnels import port_of, serve_on, tunnel_to


def test_launched_app_answers_a_browser_and_a_script(machine: Machine, no_leaks: Any) -> None:
    """An app that runs there opens here as if it ran here, and nothing is left of it afterwards."""
    app = apps.put(machine, "sliders.py", apps.SLIDER)
    events: list[Event] = []
    # Looking into a container leaves a connection to Docker's engine open.
    with no_leaks() if machine.kind == "embedded" else nullcontext():
        with tunnel_to(machine, app, isolate=True, on_event=events.append) as tunnel:
            assert tunnel.state == "ready"
            assert tunnel.url == f"http://localhost:{tunnel.local_port}/sliders"
            apps.drive(tunnel.url)
            until(lambda: any("Starting Bokeh server" in line for line in tunnel.log), what="its lines")
            assert machine.pids(app)
            assert tunnel.remote_port == 0  # it listens on a socket of its account's alone
        assert tunnel.state == "closed"
        until(lambda: not machine.pids(app), what="the server to be gone")
    assert events[-1] == Closed(host=machine.host, server="ended")
    names = [type(event).__name__ for event in events]
    assert names == [
        "Connecting", "HostKeyVerified", "Authenticated", "Launching", "Launched", "Ready", "Closed",
    ]  # fmt: skip


def test_open_server_is_on_loopback_alone(machine: Machine) -> None:
    """A server that is left open to other users is still closed to the network (Bokeh's default is not)."""
    app = apps.put(machine, "sliders.py", apps.SLIDER)
    with tunnel_to(machine, app, signed=False) as tunnel:
        assert {a for a, p in machine.listening() if p == tunnel.remote_port} == {"127.0.0.1"}
        apps.drive(tunnel.url)


class NothingAtTheRoot(http.server.BaseHTTPRequestHandler):
    """What a Bokeh server with ``--prefix`` answers outside it."""

    server_version, sys_version = "TornadoServer/6.5", ""

    def do_GET(self) -> None:
        self.send_error(404)

    def log_message(self, *args: object) -> None:
        """Say nothing."""


def test_server_without_a_page_at_its_root_is_told(embedded: Callable[..., Machine]) -> None:
    """One with a prefix, or without an index, opens at a 404: what to add to the address is said."""
    events: list[Event] = []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), NothingAtTheRoot) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with tunnel_to(
            embedded(), remote_port=server.server_port, launch=False, on_event=events.append
        ) as tunnel:
            assert tunnel.url.endswith("/")
        server.shutdown()
    assert [event for event in events if isinstance(event, Warned) and "--prefix" in event.text]


@pytest.mark.filterwarnings("ignore:There is no current event loop")  # Bokeh's own client
def test_tunnel_has_the_session_here(machine: Machine) -> None:
    """``pull_session`` and ``server_document`` work on the tunnel itself, with any local port. A document
    that is too large is an error with what to do, and is not waited for."""
    app = apps.put(machine, "sliders.py", apps.SLIDER)
    with tunnel_to(machine, app, local_port=0) as tunnel:
        session = tunnel.pull_session()
        try:
            assert session.document.select_one({"name": "slider"}).value == 1
        finally:
            session.close()
        with pytest.raises(AppAccessError, match="max_message_size="):
            tunnel.pull_session(max_message_size=100)
        assert f"localhost:{tunnel.local_port}/sliders" in tunnel.server_document()


@pytest.mark.filterwarnings("ignore:There is no current event loop")  # Bokeh's own client
@pytest.mark.parametrize("version", ["3.7.3", bokeh.__version__])
def test_version_that_is_too_far_apart_is_told(embedded: Callable[..., Machine], version: str) -> None:
    """Where Bokeh here cannot read the server's document, the error has both versions, and the one to install
    (a document of 3.7 has no ``config``). With the same version on both sides, Bokeh's own error is left."""
    machine = embedded()
    other = f"""
import sys
import bokeh.protocol
from bokeh.document import Document
plain = Document.to_json
def to_json(self, *args, **keywords):
    written = plain(self, *args, **keywords)
    written.content.pop("config")
    return written
Document.to_json = to_json
messages = sys.modules["bokeh.protocol.messages.server_info_reply"]
messages._VERSION_INFO = {{"bokeh": "{version}", "server": "{version}"}}
"""
    app = apps.put(machine, "sliders.py", apps.SLIDER + other)
    same = version == bokeh.__version__
    with tunnel_to(machine, app, local_port=0) as tunnel:
        with pytest.raises(KeyError if same else UsageError, match="config" if same else "3.7.3") as caught:
            tunnel.pull_session()
    if not same:
        assert bokeh.__version__ in str(caught.value)
        assert "pip install 'bokeh==3.7.*'" in str(caught.value)


def test_several_apps_have_an_address_each(machine: Machine) -> None:
    """Each app has its own route, in the order given."""
    one, two = (apps.put(machine, name, apps.SLIDER) for name in ("one.py", "two.py"))
    with tunnel_to(machine, [one, two]) as tunnel:
        assert [url.rpartition("/")[2] for url in tunnel.urls] == ["one", "two"]
        for url in tunnel.urls:
            apps.drive(url)


def test_two_tunnels_to_one_app_are_separate(machine: Machine) -> None:
    """Two tunnels to the same host and app have their own servers and ports."""
    app = apps.put(machine, "sliders.py", apps.SLIDER)
    with tunnel_to(machine, app, isolate=True) as one, tunnel_to(machine, app, isolate=True) as two:
        assert one.local_port != two.local_port
        apps.drive(one.url)
        apps.drive(two.url)


def test_panel_serve_works_the_same(embedded: Callable[..., Machine]) -> None:
    """``command="panel serve"`` serves a Panel app."""
    pytest.importorskip("panel")
    machine = embedded()
    app = apps.put(machine, "pane.py", "import panel as pn\npn.panel('hello from panel').servable()\n")
    with tunnel_to(machine, app, command="panel serve", launch_timeout=90) as tunnel:
        assert "hello" in apps.get(tunnel.url) or "Panel" in apps.get(tunnel.url)
        assert apps.open_websocket(tunnel.url, apps.get(tunnel.url))["msgtype"] == "ACK"


def test_attaches_to_a_server_that_is_there(machine: Machine) -> None:
    """``launch=None`` attaches where a Bokeh server answers, and leaves it alone when it is closed."""
    app = apps.put(machine, "sliders.py", apps.SLIDER)
    events: list[Event] = []
    with serve_on(machine, app, "--allow-websocket-origin", "localhost:0") as running:
        port = port_of(running)
        with tunnel_to(machine, remote_port=port, isolate=True, on_event=events.append) as tunnel:
            assert tunnel.remote_port == port
            assert tunnel.url == f"http://localhost:{tunnel.local_port}/sliders"  # its only app
            assert "sliders" in apps.get(tunnel.url) or "Bokeh" in apps.get(tunnel.url)
        assert any(isinstance(event, Attached) for event in events)
        assert not any(isinstance(event, Launched) for event in events)
        assert running.running


#: Calls itself Bokeh's, and serves one connection after the other, the one that came last first.
ONE_BY_ONE = """
import select, socket
with socket.create_server(("127.0.0.1", 0)) as listener:
    print(f"running at: http://localhost:{listener.getsockname()[1]}/", flush=True)
    while True:
        waiting = [listener.accept()[0]]
        while select.select([listener], [], [], 0.3)[0]:
            waiting.append(listener.accept()[0])
        while waiting:
            with waiting.pop() as sock:
                if sock.recv(1000):
                    sock.sendall(b"HTTP/1.0 200 OK\\r\\nServer: TornadoServer/6\\r\\n\\r\\n{}")
"""


def test_server_that_serves_one_after_the_other_is_found(embedded: Callable[..., Machine]) -> None:
    """No connection that is open ahead keeps it from answering."""
    machine = embedded()
    for _ in range(2):  # channels are asked for together with the second login
        with machine.spawn([machine.python, "-c", ONE_BY_ONE]) as running:
            with tunnel_to(machine, remote_port=port_of(running), launch=False) as tunnel:
                assert tunnel.state == "ready"


def test_attaching_keeps_the_servers_own_port_here(embedded: Callable[..., Machine]) -> None:
    """The local port follows the server's, since that is the only origin it takes by default.

    An app's name that Bokeh does not serve is no reason to refuse the server, but is warned of.
    """
    machine = embedded()
    app = apps.put(machine, "my sliders.py", apps.SLIDER)
    events: list[Event] = []
    with machine.spawn([machine.python, "-m", "bokeh", "serve", "--port", "0", app]) as running:
        port = port_of(running)
        # The machine is this one, so its port is taken here; elsewhere it is free and would be chosen.
        with tunnel_to(machine, remote_port=port, isolate=True, on_event=events.append) as tunnel:
            assert tunnel.local_port != port
    assert [event for event in events if isinstance(event, Warned) and "'/my sliders'" in event.text]


@pytest.mark.filterwarnings("ignore:There is no current event loop")  # Bokeh's own client
def test_starts_one_where_none_answers(machine: Machine) -> None:
    """``launch=None`` without an app starts an empty server where nothing answers."""
    port = free_port() if machine.kind == "embedded" else None  # 5006 may be anybody's on this machine
    with tunnel_to(machine, local_port=0, remote_port=port) as tunnel:
        assert tunnel.url.partition("?")[0].endswith("/")
        session = tunnel.pull_session()
        session.close()


def test_command_with_an_app_in_it_is_started(
    embedded: Callable[..., Machine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is no question for whoever's server answers on Bokeh's port there; without the app it is one."""
    machine = embedded()
    app = apps.put(machine, "sliders.py", apps.SLIDER)
    with serve_on(machine) as running:
        monkeypatch.setattr(options, "BOKEH_PORT", port_of(running))
        command = ["bokeh", "serve", app]
        with tunnel_to(machine, command=command, local_port=0) as tunnel:
            assert tunnel.remote_port == 0, "a server of its own, on a socket"
            apps.drive(tunnel.url)
        with tunnel_to(machine, command="bokeh serve", local_port=0) as tunnel:
            assert tunnel.remote_port == port_of(running)


def test_command_says_where_its_apps_are(embedded: Callable[..., Machine]) -> None:
    """However the app is named in it, the address is the app's, and nothing is warned of; of several it is
    their index."""
    machine = embedded()
    app, other = (apps.put(machine, name, apps.SLIDER) for name in ("one.py", "two.py"))
    events: list[Event] = []
    words = ["env", "X=1", machine.python, "-m", "bokeh", "serve", app]
    with tunnel_to(machine, command=words, on_event=events.append) as tunnel:
        assert urlsplit(tunnel.url).path == "/one"
    command = f"bokeh serve {app} {other} --prefix /my"
    with tunnel_to(machine, command=command, on_event=events.append) as tunnel:
        assert urlsplit(tunnel.url).path == "/my/"
        assert "two" in apps.get(tunnel.url)
    assert not [event for event in events if isinstance(event, Warned)]
    spaced = apps.put(machine, "my app.py", apps.SLIDER)
    with pytest.raises(LaunchError, match="my app"):
        tunnel_to(machine, command=["bokeh", "serve", spaced]).open()


def test_nothing_to_attach_to_is_told(machine: Machine, no_leaks: Any) -> None:
    """``launch=False`` where nothing answers is a typed error that names the port."""
    with no_leaks(), pytest.raises(ServerNotFoundError, match="port 1"):
        tunnel_to(machine, launch=False, remote_port=1, isolate=True).open()


def test_port_of_another_program_is_not_attached_to(machine: Machine) -> None:
    """Something that is no Bokeh server on the port that was asked for is a typed error."""
    with machine.spawn([machine.python, "-u", "-m", "http.server", "0", "--bind", "127.0.0.1"]) as running:
        line = until(lambda: running.log, what="the other server to listen")
        port = int(line.partition("port ")[2].split()[0])
        with pytest.raises(PortInUseError) as caught:
            tunnel_to(machine, remote_port=port).open()
    assert (caught.value.side, caught.value.port) == ("remote", port)


def test_another_users_server_is_not_attached_to_unasked(container: Callable[..., Any]) -> None:
    """A server of another user is refused, and taken when allowed in words."""
    machine = container()
    with serve_on(machine, user="mallory") as running:
        port = port_of(running)
        with pytest.raises(ForeignServerError) as caught:
            tunnel_to(machine, remote_port=port).open()
        assert caught.value.owner == int(str(machine.execute(["id", "-u", "mallory"])))
        with tunnel_to(machine, remote_port=port, allow_foreign=True) as tunnel:
            assert tunnel.state == "ready"


def test_blank_app_is_surfaced(machine: Machine) -> None:
    """An app whose code raises still answers 200; its traceback comes as an event."""
    app = apps.put(machine, "broken.py", apps.BROKEN)
    events: list[Event] = []
    with tunnel_to(machine, app, on_event=events.append) as tunnel:
        assert not any(isinstance(event, AppFailed) for event in events)
        apps.get(tunnel.url)  # the control: a browser sees a page, and no error
        failed = until(lambda: [e for e in events if isinstance(e, AppFailed)], what="the event")
    assert "the app is broken" in failed[0].traceback


def test_server_that_dies_is_noticed(machine: Machine) -> None:
    """When the remote server is killed, the state, ``wait`` and the exit status tell."""
    app = apps.put(machine, "sliders.py", apps.SLIDER)
    events: list[Event] = []
    with tunnel_to(machine, app, on_event=events.append) as tunnel:
        [launched] = [event for event in events if isinstance(event, Launched)]
        assert launched.pid in machine.pids(app)
        machine.execute(["kill", "-KILL", str(launched.pid)])
        with pytest.raises(ServerExitedError) as caught:
            tunnel.wait(20)
        assert caught.value.exit_status == -9
        assert tunnel.state == "failed"
    assert tunnel.state == "closed"


@pytest.mark.parametrize(
    ("keywords", "error", "text"),
    [
        ({"app": "/nowhere/at_all.py"}, LaunchError, "at_all.py"),
        ({"python": "/usr/bin/env-no-such"}, BokehSSHError, "env-no-such"),
        ({"python": "/usr/bin/python3", "env": {"PYTHONPATH": ""}}, BokehNotFoundError, "bokeh"),
        ({"setup": "exit 3"}, LaunchError, "setup"),
        ({"args": ["--no-such-flag"]}, LaunchError, "no-such-flag"),
        ({"cwd": "/nowhere/at/all"}, LaunchError, "/nowhere/at/all"),
    ],
)
def test_failed_launches_are_typed(
    machine: Machine, keywords: dict[str, Any], error: type[BokehSSHError], text: str, no_leaks: Any
) -> None:
    """What keeps a server from starting is told with the reason, and nothing is left behind."""
    if error is BokehNotFoundError and machine.kind == "embedded":
        has = machine.execute(["/usr/bin/python3", "-c", "import bokeh"]).status == 0
        if has:
            pytest.skip("the system's own Python has Bokeh here")
    with no_leaks(), pytest.raises(error) as caught:
        tunnel_to(machine, **{"app": "app.py", **keywords}).open()
    assert text in str(caught.value)
    assert "paramiko" not in str(caught.value)


def test_remote_port_taken_is_told(machine: Machine) -> None:
    """A port that was asked for by number and is taken there is a typed error."""
    app = apps.put(machine, "sliders.py", apps.SLIDER)
    with serve_on(machine) as running:
        port = port_of(running)
        with pytest.raises(PortInUseError) as caught:
            tunnel_to(machine, app, remote_port=port).open()
        assert (caught.value.side, caught.value.port) == ("remote", port)


def test_one_session_channel_is_enough(machine_with: Callable[..., Machine]) -> None:
    """MaxSessions 1 is enough for a launch; 0 is a typed error."""
    machine = machine_with(max_sessions=1)
    app = apps.put(machine, "sliders.py", apps.SLIDER)
    with tunnel_to(machine, app) as tunnel:
        apps.get(tunnel.url)


def test_no_session_channel_is_told(machine_with: Callable[..., Machine], no_leaks: Any) -> None:
    """MaxSessions 0 is a typed error that says what to ask for."""
    machine = machine_with(max_sessions=0)
    with no_leaks(), pytest.raises(BokehSSHError, match="MaxSessions") as caught:
        tunnel_to(machine, "app.py").open()
    assert caught.value.stage == "session"


def test_jump_goes_through_a_gateway(shape_c: Any) -> None:
    """``jump=`` reaches a host that only the gateway can reach, with one login each."""
    host = shape_c.bokehhost
    app = apps.put(host, "sliders.py", apps.SLIDER)
    gateway = Host(shape_c.gateway.host, shape_c.gateway.user, **shape_c.gateway.login)
    events: list[Event] = []
    with DirectTunnel(
        host.inside,
        host.user,
        app,
        python=host.python,
        jump=gateway,
        on_event=events.append,
        **{**host.login, "port": 22},
    ) as tunnel:
        apps.drive(tunnel.url)
    assert [e.host for e in events if type(e).__name__ == "Authenticated"] == [gateway.name, host.inside]


def test_slow_app_does_not_stop_the_opening_short(machine: Machine) -> None:
    """A server that takes its time is waited for; a deadline that is too short is told."""
    app = apps.put(machine, "sliders.py", apps.SLIDER)
    with pytest.raises(BokehSSHError) as caught:
        tunnel_to(machine, app, setup="sleep 20", launch_timeout=1.0).open()
    assert caught.value.stage == "launch"
    until(lambda: not machine.pids(app), what="nothing to be left of it")


def test_closing_from_another_thread_while_it_opens(machine: Machine, no_leaks: Any) -> None:
    """Closing while it opens ends the opening soon, and leaves nothing."""
    connected = threading.Event()

    def told(event: Event) -> None:
        if type(event).__name__ == "Launching":
            connected.set()

    with no_leaks():
        tunnel = tunnel_to(machine, "app.py", setup="sleep 30", isolate=True, on_event=told)
        errors: list[BaseException] = []

        def run() -> None:
            try:
                tunnel.open()
            except BokehSSHError as exc:
                errors.append(exc)

        opener = threading.Thread(target=run)
        opener.start()
        assert connected.wait(20)
        began = time.monotonic()
        tunnel.close()
        opener.join(20)
        assert not opener.is_alive()
        assert time.monotonic() - began < 10
        assert isinstance(errors[0], TunnelClosedError)
        assert tunnel.state == "closed"


@pytest.mark.parametrize(
    "keywords",
    [
        {"args": "--show"},
        {"app": "app.py", "launch": False},
        {"remote_port": 99999},
        {"app": "a\0b"},
        {"local_port": "5006"},
        {"grace": -1},
        {"args": ["--port", "5006"]},
    ],
)
def test_bad_keywords_are_told_before_anything_is_dialled(keywords: dict[str, Any]) -> None:
    """What cannot work is a UsageError from the constructor."""
    with pytest.raises(UsageError) as caught:
        DirectTunnel("host.invalid", "me", **keywords)
    assert caught.value.hint


def test_ready_event_has_the_address(machine: Machine) -> None:
    """The last event before use is Ready, with the address that opens."""
    app = apps.put(machine, "sliders.py", apps.SLIDER)
    events: list[Event] = []
    with tunnel_to(machine, app, on_event=events.append) as tunnel:
        assert isinstance(events[-1], Ready)
        assert events[-1].url == tunnel.url
        with socket.create_connection(("127.0.0.1", tunnel.local_port), timeout=30):
            pass


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_end_that_nobody_confirms_is_not_told_as_one(
    light: Callable[..., Machine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server whose supervisor is stopped, as by a debugger or a batch system, is said to end by itself."""
    machine, events = light(), list[Event]()
    app = apps.put(machine, "page.py", light_bokeh.APP)
    monkeypatch.setattr(Server, "stop", partialmethod(Server.stop, timeout=0.5))
    with tunnel_to(machine, app, isolate=False, on_event=events.append):
        [record] = Path(os.environ["BOKEH_SSH_DIR"]).glob("*/record")
        supervisor = json.loads(record.read_text())["supervisor"]
        os.kill(supervisor, signal.SIGSTOP)
    os.kill(supervisor, signal.SIGCONT)
    assert isinstance(events[-2], Warned)
    assert events[-1] == Closed(host=machine.host, server="unreached")
    until(lambda: not machine.pids(app), what="the server to be gone")
