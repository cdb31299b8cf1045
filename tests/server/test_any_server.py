"""Any web server with a place for its port, and more ports beside an app."""

from __future__ import annotations

import os
import socket
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

import pytest

import apps
import conformance
import direct_tunnels
from beds import Machine, free_port, until
from bokeh_ssh import (
    DirectTunnel,
    Event,
    ForwardingRefusedError,
    GatewayTunnel,
    LaunchError,
    LaunchTimeoutError,
    PortInUseError,
    Reconnected,
    UsageError,
    Warned,
)
from bokeh_ssh._remote.readiness import OwnAddress
from bokeh_ssh._server.probe import HttpProbe, UnreadyError, wait_until_ready
from connections import end
from gateways import gateway_of, host_of
from programs import Program, login
from targets import target_on

#: Serves on a port or a socket, after a while; /healthz answers 404 at first.
SERVER = """
import http.server, os, socket, sys, time
count = 0

class Handler(http.server.BaseHTTPRequestHandler):
    def address_string(self):
        return "somebody"

    def do_GET(self):
        global count
        count += self.path == "/healthz"
        bad = self.path == "/never" or (self.path == "/healthz" and count < 3)
        self.send_response(404 if bad else 200)
        self.end_headers()
        self.wfile.write(("it is " + " ".join(sys.argv[1:])).encode())

class OnSocket(http.server.HTTPServer):
    address_family = socket.AF_UNIX

    def server_bind(self):
        self.socket.bind(self.server_address)

where = sys.argv[1]
if where.isdigit():
    server = http.server.HTTPServer(("127.0.0.1", int(where)), Handler)
else:
    server = OnSocket(where, Handler)
server.serve_forever()
"""


def tunnel_to(machine: Machine, command: tuple[str, ...], **keywords: Any) -> DirectTunnel:
    """Make a tunnel to a server of any kind."""
    keywords = {"command": command, "python": machine.python, "isolate": False, **machine.login, **keywords}
    return DirectTunnel(machine.host, machine.user, **keywords)


def get(url: str) -> str:
    """Open a page."""
    with urllib.request.urlopen(url, timeout=20) as answer:
        return str(answer.read().decode())


@pytest.mark.parametrize("place", ["{port}", "{socket}"])
def test_where_it_listens_may_be_a_variable(embedded: Callable[..., Machine], place: str) -> None:
    """A server that reads where to listen from its environment gets it there, and its command has none."""
    machine = embedded()
    text = "import os, sys; sys.argv[1:] = [os.environ['WHERE']]\n" + SERVER
    command = (machine.python, "-c", text)
    with tunnel_to(machine, command, env={"WHERE": place, "OTHER": "x"}) as tunnel:
        assert get(tunnel.url).startswith("it is ")


def test_forgotten_place_is_told(embedded: Callable[..., Machine]) -> None:
    """A command of one's own that does not start may have needed a place for its port; Bokeh's never does."""
    machine = embedded()
    with pytest.raises(LaunchError) as caught:
        tunnel_to(machine, (machine.python, "-c", "raise SystemExit(2)"), launch=True).open()
    assert "{port}" in str(caught.value.hint)
    with pytest.raises(LaunchError) as caught:
        tunnel_to(machine, ("bokeh", "serve"), args=["--no-such-option"], launch=True).open()
    assert "{port}" not in str(caught.value.hint)


def test_program_that_is_not_on_the_path_is_told(embedded: Callable[..., Machine]) -> None:
    """Who names a program that is not found there is pointed at what puts it on the PATH."""
    with pytest.raises(LaunchError, match="setup="):
        tunnel_to(embedded(), ("no-such-program", "{port}")).open()


@pytest.mark.parametrize("place", ["{port}", "{socket}"])
def test_any_web_server_is_held_like_bokeh(machine: Machine, place: str) -> None:
    """A command with a place for its port, or its socket, is started, waited for, opened and ended; what is
    on a port is told to be open to others."""
    path = apps.put(machine, "server.py", SERVER)
    events: list[Event] = []
    command = (machine.python, "-u", path, place)
    with tunnel_to(
        machine, command, args=("more words",), ready="/healthz", on_event=events.append
    ) as tunnel:
        assert tunnel.url == f"http://localhost:{tunnel.local_port}/"
        said = get(tunnel.url)
        assert said.startswith("it is ")
        assert said.endswith(" more words")
        assert bool(tunnel.remote_port) == (place == "{port}")
        until(lambda: any("GET /healthz" in line for line in tunnel.log), what="its lines to come")
        request = urllib.request.Request(tunnel.url, headers={"Host": "evil.example"})
        with pytest.raises(urllib.error.HTTPError, match="403") as caught:
            urllib.request.urlopen(request, timeout=20)
        caught.value.close()
        assert machine.pids(path)
    told = [event.text for event in events if isinstance(event, Warned)]
    assert [("{socket}" in text) for text in told] == [True] * (place == "{port}")
    until(lambda: not machine.pids(path), what="the server to be gone")


def test_answer_counts_where_the_last_question_had_no_time() -> None:
    """At the end of the time a question has too little of it: what was answered before is what is wrong."""

    def ask(timeout: float) -> HttpProbe:
        if timeout < 0.2:
            raise TimeoutError
        return HttpProbe(404, "")

    words = {"accept": lambda _: False, "broken": lambda: None}
    with pytest.raises(UnreadyError) as caught:
        wait_until_ready(ask, timeout=0.5, **words)
    assert caught.value.status == 404


def test_server_that_is_never_ready_is_told(machine: Machine) -> None:
    """The page that is asked for has to answer well; one that ends early has its last words in the error."""
    path = apps.put(machine, "server.py", SERVER)
    command = (machine.python, "-u", path, "{port}")
    with pytest.raises(LaunchTimeoutError, match="404") as slow:
        tunnel_to(machine, command, ready="/never", launch_timeout=8).open()
    assert "ready=" in str(slow.value.hint)
    # Every 50 ms it would be asked 160 times; it is asked less often the longer it takes.
    assert 2 < sum("GET /never" in line for line in slow.value.log) < 80
    with pytest.raises(LaunchError) as caught:
        tunnel_to(machine, (machine.python, "-c", "raise SystemExit('no such thing')", "{port}")).open()
    assert "no such thing" in str(caught.value)
    until(lambda: not machine.pids(path), what="the server to be gone")


def test_port_of_another_server_is_not_taken_for_its_own(machine: Machine) -> None:
    """A server that does not get its port, and does not end, is not ready because another one is there. The
    error names the port that its log tells."""
    path = apps.put(machine, "server.py", SERVER)
    with tunnel_to(machine, (machine.python, "-u", path, "{port}")) as other:
        taken = other.remote_port
        code = "import time; print('it is at http://0.0.0.0:8050/', flush=True); time.sleep(60)"
        waits = (machine.python, "-c", code, "{port}")
        with pytest.raises(LaunchTimeoutError, match="its log speaks of port 8050"):
            tunnel_to(machine, waits, remote_port=taken, launch_timeout=8).open()
        assert get(other.url).startswith("it is ")  # the control


def test_any_server_comes_back_after_a_loss(embedded: Callable[..., Machine]) -> None:
    """A line that breaks is made again, to the same server; so are the ports beside it."""
    machine = embedded()
    path = apps.put(machine, "server.py", SERVER)
    events: list[Event] = []
    with (
        target_on(machine) as port,
        tunnel_to(
            machine,
            (machine.python, "-u", path, "{port}"),
            forwards=[f"0:127.0.0.1:{port}"],
            on_event=events.append,
        ) as tunnel,
    ):
        before = machine.pids(path)
        machine.server.drop_connections()
        until(lambda: any(isinstance(event, Reconnected) for event in events), timeout=30)
        assert get(tunnel.url).startswith("it is ")
        assert machine.pids(path) == before
        address, _, number = tunnel.forwards[0].rpartition(":")
        conformance.check_echo((address, int(number)))


def test_any_server_is_left_and_taken_over(embedded: Callable[..., Machine]) -> None:
    """One that was left running is found by its id, opened by another tunnel, and ended with ``stop``."""
    machine = embedded(env={"BOKEH_SSH_DIR": os.environ["BOKEH_SSH_DIR"]})
    path = apps.put(machine, "server.py", SERVER)
    with tunnel_to(machine, (machine.python, "-u", path, "{port}"), detach=True) as tunnel:
        name = tunnel.server
    assert machine.pids(path)
    with DirectTunnel(
        machine.host, machine.user, server=name, python=machine.python, **machine.login
    ) as again:
        assert get(again.url).startswith("it is ")
    with Program("stop", machine.host, str(name), "--python", machine.python, *login(machine)) as program:
        assert program.end() == 0, program
    until(lambda: not machine.pids(path), what="the server to be gone")


def test_app_is_brought_to_any_server(embedded: Callable[..., Machine], tmp_path: Any) -> None:
    """What is uploaded is a word of the command, behind the others."""
    machine = embedded()
    app = tmp_path / "server.py"
    app.write_text(SERVER)
    (tmp_path / "run.py").write_text(
        "import runpy, sys\nsys.argv = [sys.argv[2], sys.argv[1]]\nrunpy.run_path(sys.argv[0])"
    )
    command = (machine.python, "-u", "run.py", "{port}")
    with tunnel_to(machine, command, app=str(app), bring=str(tmp_path / "run.py")) as tunnel:
        assert get(tunnel.url).startswith("it is ")


def test_ports_beside_an_app(machine: Machine) -> None:
    """One login, one app, and as many ports besides as are asked for, which say where they are."""
    app = apps.put(machine, "sliders.py", apps.SLIDER)
    here = free_port()
    with (
        target_on(machine) as first,
        target_on(machine) as second,
        DirectTunnel(
            machine.host,
            machine.user,
            app,
            python=machine.python,
            forwards=[f"{here}:127.0.0.1:{first}", f"0:127.0.0.1:{second}"],
            **machine.login,
        ) as tunnel,
    ):
        apps.drive(tunnel.url)
        assert tunnel.forwards[0] == f"localhost:{here}"
        for name in tunnel.forwards:
            conformance.check_echo(("localhost", int(name.rpartition(":")[2])))
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", here), timeout=5)


def test_port_beside_that_is_taken_or_forbidden(embedded: Callable[..., Machine]) -> None:
    """A port that is taken here is told before anything is dialled; one forbidden there, on entering."""
    machine = embedded(permit_open=("localhost:5006", "127.0.0.1:5006"))
    keywords: dict[str, Any] = {"launch": False, **machine.login}
    with socket.create_server(("127.0.0.1", 0)) as listener:
        taken = listener.getsockname()[1]
        with pytest.raises(PortInUseError):
            DirectTunnel("nowhere.invalid", forwards=f"{taken}:localhost:80", **keywords).open()
    with pytest.raises(ForwardingRefusedError):
        DirectTunnel(machine.host, machine.user, forwards="0:localhost:80", **keywords).open()


@pytest.mark.parametrize("name", ["localhost", "127.0.0.1"])
def test_port_is_reached_by_the_name_that_is_permitted(
    machine_with: Callable[..., Machine], name: str
) -> None:
    """A server that is started on a port is opened where ``permitopen="localhost:PORT"`` is all there is."""
    port = free_port()
    machine = machine_with(permit_open=(f"{name}:{port}",))
    app = apps.put(machine, "sliders.py", apps.SLIDER)
    with direct_tunnels.tunnel_to(machine, app, remote_port=port, signed=False) as tunnel:
        apps.drive(tunnel.url)
    command = f"{machine.python} -m http.server --bind 127.0.0.1 {{port}}"
    with direct_tunnels.tunnel_to(machine, command=command, remote_port=port) as tunnel:
        assert "Directory listing" in apps.get(tunnel.url)


def test_ports_beside_lead_to_the_bokeh_host(shape_c: Any) -> None:
    """In a gateway tunnel they are the Bokeh host's, not the gateway's."""
    app = apps.put(shape_c.bokehhost, "sliders.py", apps.SLIDER)
    with (
        target_on(shape_c.bokehhost) as port,
        GatewayTunnel(
            gateway_of(shape_c),
            host=host_of(shape_c),
            app=app,
            python=shape_c.bokehhost.python,
            reverse="relay",
            forwards=f"0:127.0.0.1:{port}",
        ) as tunnel,
    ):
        conformance.check_echo(("localhost", int(tunnel.forwards[0].rpartition(":")[2])))
        apps.drive(tunnel.url)


@pytest.mark.parametrize(
    "words",
    [
        {"command": "serve {port}", "signed": True},
        {"command": "serve {port} {socket}"},
        {"command": "serve {socket}", "remote_port": 5},
        {"command": "serve {port}", "dev": True, "app": "x"},
        {"command": "serve {port}", "ready": "healthz"},
        {"ready": "/healthz"},
        {"forwards": "5006"},
    ],
)
def test_what_cannot_be_meant_is_refused(words: dict[str, Any]) -> None:
    """Before anything is dialled."""
    with pytest.raises(UsageError):
        DirectTunnel("host", **words)


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_command_line_opens_any_server(embedded: Callable[..., Machine]) -> None:
    """As on the command line: a command, a page that tells that it is ready, and a port besides."""
    machine = embedded()
    path = apps.put(machine, "server.py", SERVER)
    with target_on(machine) as port:
        words = ["--command", f"{machine.python} -u {path} {{port}}", "--ready", "/healthz"]
        words += ["--local-port", "0", "-L", f"0:127.0.0.1:{port}"]
        with Program("direct", machine.host, *words, *login(machine)) as program:
            assert get(program.address()).startswith("it is ")
            program.expect(f"127.0.0.1 port {port}")
            program.interrupt()
            assert program.end() == 0, program


#: Writes its address as Jupyter does, once it is asked for a page the first time, and wants the token in it.
WITH_TOKEN = """
import http.server, sys
port, token = int(sys.argv[1]), "canary" + "0123456789"

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/":
            say("[I] http://elsewhere:1/no?token=another0123456789")
            say(f"[I] \\x1b[32mhttp://127.0.0.1:{port}/lab?token={token}\\x1b[0m")
            say(f"    http://localhost:{port}/lab?token={token}")
            say(f'"GET / HTTP/1.1" 200 "http://localhost:{port}/other?token=0123456789"')
        self.send_response(200 if token in self.path else 403)
        self.end_headers()

def say(line):
    print(line, file=sys.stderr, flush=True)

http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


def test_address_of_a_server_with_a_token_is_its_own_words(embedded: Callable[..., Machine]) -> None:
    """What Jupyter and its like write of their address, path and token, is in the tunnel's address, with the
    port here, also where somebody comes back to it; the token is in no line of the log, and in no event."""
    machine = embedded()
    events: list[Event] = []
    command = (machine.python, "-c", WITH_TOKEN, "{port}")
    with tunnel_to(machine, command, detach=True, on_event=events.append) as tunnel:
        assert tunnel.url == f"http://localhost:{tunnel.local_port}/lab?token=canary0123456789"
        get(tunnel.url)
        until(lambda: any("other?" in line for line in tunnel.log), what="its lines to come")
        assert f"http://localhost:{tunnel.remote_port}/lab?token=***" in "\n".join(tunnel.log)
        assert "canary0123456789" not in repr([tunnel, tunnel.log, events])
        name = str(tunnel.server)
    with tunnel_to(machine, ("bokeh", "serve"), server=name) as again:
        assert again.url == f"http://localhost:{again.local_port}/lab?token=canary0123456789"
        assert "canary0123456789" not in repr(again.log)
    end(machine, name)


@pytest.mark.parametrize(
    ("line", "path"),
    [
        ("  You can now view it: http://localhost:1234", "/"),
        ("URL: http://0.0.0.0:1234?access_token=abcdefgh", "/?access_token=abcdefgh"),
        ("Go to http://[::1]:1234/?secret=abcdefgh.", "/?secret=abcdefgh"),
        ("http+unix://%2Frun%2Fme%2Fs/lab?token=abcdefgh", "/lab?token=abcdefgh"),
        ("http://node17:1234/tree?token=...", "/tree"),
        ("http://localhost:12345/no", ""),
        ("file:///home/me/jpserver-1-open.html 1234", ""),
    ],
)
def test_addresses_are_read_as_they_are_written(line: str, path: str) -> None:
    """Addresses of marimo, Pluto, Jupyter on a socket and others are read; those of other ports are not."""
    own = OwnAddress()
    where = "/run/me/s" if "unix" in line else ""
    assert own.read([line], 1234, where) == [line.replace("abcdefgh", "***")]
    assert own.path == path
