"""Servers that speak TLS: opened at an https address, with what a browser will say of their certificate."""

from __future__ import annotations

import json
import ssl
import urllib.request
from collections.abc import Callable
from contextlib import closing
from typing import Any

import pytest

import apps
from beds import Machine, free_port, until
from bokeh_ssh import Attached, Event, ForwardError, PortInUseError, Ready, Warned
from bokeh_ssh._server.certificate import describe_certificate
from certificates import make_certificate
from direct_tunnels import serve_on, tunnel_to
from programs import Program, login

#: A server that gives no plain HTTP answer but 400, as nginx, Apache and Go's do for TLS ports.
SERVER = """
import http.server, ssl, sys

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"by TLS")

class Server(http.server.ThreadingHTTPServer):
    def get_request(self):
        sock, address = super().get_request()
        if sock.recv(1, 2) != bytes([22]):  # MSG_PEEK; a hello
            sock.recv(1000)
            sock.sendall(b"HTTP/1.0 400 Bad Request\\r\\nContent-Length: 0\\r\\n\\r\\n")
            sock.close()
            raise OSError("plain HTTP")
        return context.wrap_socket(sock, server_side=True), address

context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain(sys.argv[2])
if "old" in sys.argv:
    context.set_ciphers("ALL:@SECLEVEL=0")
    context.minimum_version, context.maximum_version = ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1
if "mutual" in sys.argv:
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(sys.argv[2])
Server(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def get(url: str) -> str:
    """Open a page by TLS, whatever the certificate."""
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    with urllib.request.urlopen(url, timeout=20, context=context) as answer:
        return str(answer.read().decode())


def warnings_of(events: list[Event]) -> list[str]:
    """List what was warned of a certificate."""
    return [event.text for event in events if isinstance(event, Warned) and "certificate" in event.text]


@pytest.mark.filterwarnings("ignore:There is no current event loop")  # Bokeh's own client
@pytest.mark.parametrize("said", ["argument", "environment", "config"])
def test_bokeh_with_a_certificate_opens_by_https(embedded: Callable[..., Machine], said: str) -> None:
    """Whoever names the certificate: it is opened, by a browser and a script, and its fate is told."""
    text, _ = make_certificate("node17.example.org")
    machine = embedded()
    app = apps.put(machine, "sliders.py", apps.SLIDER)
    pem = apps.put(machine, "server.pem", text)
    words: dict[str, Any] = {"args": ["--ssl-certfile", pem]}
    if said == "environment":
        words = {"env": {"BOKEH_SSL_CERTFILE": pem}}
    if said == "config":
        words = {"args": ["--use-config", apps.put(machine, "bokeh.yaml", f"ssl_certfile: {pem}\n")]}
    events: list[Event] = []
    with tunnel_to(machine, app, launch_timeout=60, on_event=events.append, **words) as tunnel:
        assert tunnel.url.startswith(f"https://localhost:{tunnel.local_port}/sliders?bokeh-session-id=")
        assert "Bokeh" in get(tunnel.url)
        with closing(tunnel.pull_session()) as session:
            assert session.document.select_one({"name": "slider"}).value == 1
        assert f"https://localhost:{tunnel.local_port}/sliders" in tunnel.server_document()
        log = [line for line in tunnel.log if "SSL Error" in line]
        assert len(log) <= (said == "config"), log
    assert [event.url[:8] for event in events if isinstance(event, Ready)] == ["https://"]
    (warned,) = warnings_of(events)
    assert "self-signed" in warned
    assert "node17.example.org" in warned


def test_attaching_to_a_server_with_a_certificate(machine: Machine) -> None:
    """One that was there is found, and is Bokeh's, by TLS too; its app is known."""
    text, _ = make_certificate("localhost")
    app = apps.put(machine, "sliders.py", apps.SLIDER)
    pem = apps.put(machine, "server.pem", text)
    events: list[Event] = []
    with serve_on(machine, app, "--ssl-certfile", pem) as running:
        port = int(until(lambda: running.log.partition("https://")[2].partition(":")[2].partition("/")[0]))
        with tunnel_to(machine, remote_port=port, launch=False, on_event=events.append) as tunnel:
            assert tunnel.url == f"https://localhost:{tunnel.local_port}/sliders"
            assert "Bokeh" in get(tunnel.url)
    assert any(isinstance(event, Attached) for event in events)
    assert "self-signed" in warnings_of(events)[0]


def test_any_server_with_a_certificate(embedded: Callable[..., Machine]) -> None:
    """A server of another kind, which answers plain HTTP with a status, is led to by https too; it is back
    after a loss, and nothing is told twice."""
    text, _ = make_certificate("localhost", issuer="Example authority")
    machine = embedded()
    pem = apps.put(machine, "server.pem", text)
    path = apps.put(machine, "server.py", SERVER)
    events: list[Event] = []
    command = (machine.python, "-u", path, "{port}", pem)
    with tunnel_to(machine, command=command, launch_timeout=60, on_event=events.append) as tunnel:
        assert tunnel.url == f"https://localhost:{tunnel.local_port}/"
        assert get(tunnel.url) == "by TLS"
        machine.server.drop_connections()
        until(lambda: any(type(event).__name__ == "Reconnected" for event in events))
        assert get(tunnel.url) == "by TLS"
    (warned,) = warnings_of(events)
    assert "Example authority" in warned


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion")
def test_server_of_another_time_and_one_that_wants_a_certificate(embedded: Callable[..., Machine]) -> None:
    """What browsers cannot open is an error at once, not after launch_timeout; what they can is opened."""
    text, _ = make_certificate("localhost")
    machine = embedded()
    path = apps.put(machine, "server.py", SERVER)
    command = (machine.python, "-u", path, "{port}", apps.put(machine, "server.pem", text))
    with pytest.raises(ForwardError, match=r"TLS older than 1\.2 only"):
        tunnel_to(machine, command=(*command, "old"), launch_timeout=60).open()
    port = free_port()
    old = [word.replace("{port}", str(port)) for word in (*command, "old")]
    with machine.spawn(old):
        until(lambda: ("127.0.0.1", port) in machine.listening())
        with pytest.raises(ForwardError, match=r"TLS older than 1\.2 only"):
            tunnel_to(machine, remote_port=port, launch=False).open()
    port = free_port()
    mutual = [word.replace("{port}", str(port)) for word in (*command, "mutual")]
    with machine.spawn(mutual):
        until(lambda: ("127.0.0.1", port) in machine.listening())
        with pytest.raises(PortInUseError, match=r"speaks TLS.*nobody in without a certificate") as caught:
            tunnel_to(machine, remote_port=port, launch=False).open()
        assert f"--remote-port {port}" in str(caught.value)
    events: list[Event] = []
    command = (*command, "mutual")
    with tunnel_to(machine, command=command, launch_timeout=60, on_event=events.append) as tunnel:
        assert tunnel.url.startswith("https://")
    assert "nobody in without a certificate" in warnings_of(events)[0]


def test_command_line_says_so(embedded: Callable[..., Machine]) -> None:
    """``--json`` has the address, and what is said of the certificate."""
    text, _ = make_certificate("localhost")
    machine = embedded()
    app = apps.put(machine, "sliders.py", apps.SLIDER)
    pem = apps.put(machine, "server.pem", text)
    words = ["direct", machine.host, app, "--json", "--python", machine.python, "--local-port", "0"]
    with Program(*words, *login(machine), "--", "--ssl-certfile", pem) as program:
        program.expect('"ready"')
        program.interrupt()
        assert program.end() == 0, program
        lines = [json.loads(line) for line in program.stdout.splitlines() if line.startswith("{")]
    assert any("https://localhost:" in str(line.get("url")) for line in lines)
    assert any("self-signed" in str(line.get("text")) for line in lines)


@pytest.mark.parametrize(
    ("keywords", "says"),
    [
        ({"issuer": "Example authority"}, "trust who has issued its certificate, CN=Example authority"),
        ({}, "warn: its certificate is self-signed"),
        ({"issuer": "A", "days": (-3, -1)}, "has expired on "),
        ({"issuer": "A", "days": (1, 3)}, "is not valid before "),
    ],
)
def test_what_is_said_of_a_certificate(keywords: dict[str, Any], says: str) -> None:
    """What browsers look at: who has signed it, its names, its days."""
    assert says in describe_certificate(make_certificate("localhost", **keywords)[1])
    assert "not for localhost" in describe_certificate(make_certificate(**keywords)[1])
    assert describe_certificate(b"\x30\x03abc").endswith("cannot be read")
