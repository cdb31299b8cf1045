"""A server on a Unix socket in the account's private directory, and when it is a port after all."""

from __future__ import annotations

import http.client
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from beds import until
from bokeh_ssh._core.errors import LaunchError, UsageError
from bokeh_ssh._core.events import Launched
from bokeh_ssh._server.launch_spec import Launch
from bokeh_ssh._server.server import Server

if os.name != "posix":
    pytest.skip("the remote side is a POSIX system", allow_module_level=True)

from local_runner import FAKE, Bench, processes

APP = "from bokeh.plotting import curdoc, figure\ncurdoc().add_root(figure())\n"


class Line(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=20)
        self.path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(20)
        self.sock.connect(self.path)


def get(path: str, route: str) -> int:
    line = Line(path)
    try:
        line.request("GET", route)
        return line.getresponse().status
    finally:
        line.close()


def private(server: Server) -> None:
    """It listens on its socket alone, which nobody else can reach, and every route is there."""
    assert server.port == 0
    assert server.no_socket == ""
    path = Path(server.socket)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert {get(server.socket, route.rstrip("/") + "/metadata") for route in server.routes} == {200}
    assert get(server.socket, "/nothing/metadata") == 404  # the control


@pytest.mark.parametrize("command", ["bokeh serve", "panel serve"])
def test_app_is_served_on_a_private_socket(bench: Bench, command: str) -> None:
    """Ready comes with the socket's path and the app's route; afterwards the socket is gone."""
    pytest.importorskip(command.split()[0])
    app = bench.script("app.py", APP)
    server = bench.start(app=(app,), socket=True, command=command)
    private(server)
    assert server.routes == ("/app",)
    assert server.versions.startswith("Bokeh ")
    assert get(server.socket, "/app") == 200
    (launched,) = [event for event in bench.events if isinstance(event, Launched)]
    assert (launched.port, launched.socket, launched.pid) == (0, server.socket, server.pid)
    ticket = server.server_ref
    assert ticket is not None
    assert (ticket.port, ticket.socket) == (0, server.socket)
    bench.runners[-1].sessions[-1].vanish()
    again = Server.adopt(bench.runner(), ticket, launch=server.launch)
    assert (again.port, again.socket, again.pid, again.routes) == (0, server.socket, server.pid, ("/app",))
    assert again.stop() is True
    assert not Path(server.socket).exists()


def test_routes_are_those_that_bokeh_gives(bench: Bench) -> None:
    """A directory, a prefix, a pattern and no app at all: on a socket Bokeh does not say where they are."""
    folder = bench.path / "dir.v2"
    folder.mkdir()
    (folder / "main.py").write_text(APP)
    one, two = bench.script("one.py", APP), bench.script("two.py", APP)
    cases: list[tuple[dict[str, Any], set[str]]] = [
        ({"app": (one, f"{folder}/")}, {"/one", "/dir.v2"}),
        ({"app": (one, two), "args": ("--prefix", "/deep/er/")}, {"/deep/er/one", "/deep/er/two"}),
        ({"app": (f"{bench.path}/*.py",), "args": ("--glob", "--prefix=x")}, {"/x/one", "/x/two"}),
        ({}, {"/"}),
    ]
    for launch, routes in cases:
        server = bench.start(socket=True, **launch)
        assert set(server.routes) == routes
        private(server)
        assert server.stop() is True


def test_several_processes_share_the_socket(bench: Bench) -> None:
    """--num-procs works on a socket too, and the one that started the others is the one that is told."""
    server = bench.start(socket=True, args=("--num-procs", "2"))
    private(server)
    assert server.pid == os.getpgid(server.pid) or server.pid > 0
    assert server.stop() is True


@pytest.mark.parametrize("name", ["TERM", "KILL"])
def test_workers_end_with_their_parent(bench: Bench, mark: str, name: str) -> None:
    """Where somebody ends the parent of ``--num-procs`` alone, no worker of Bokeh's serves on."""
    server = bench.start(socket=True, args=("--num-procs", "2", "--args", mark))
    until(lambda: len(processes(mark)) >= 3, what="the workers")
    workers = processes(mark) - {server.pid}
    os.kill(server.pid, signal.Signals[f"SIG{name}"])
    assert server.wait(30)
    until(lambda: not workers & processes(mark), what="the workers to be gone")


def test_wrapped_server_is_found_on_its_socket(bench: Bench) -> None:
    """Behind a wrapper it is the server itself whose process is told."""
    wrapper = bench.script("wrapper", f'#!/bin/sh\n{sys.executable} -m bokeh serve "$@" &\nwait\n')
    server = bench.start(socket=True, command=(wrapper,))
    private(server)
    listing = subprocess.run(
        ["ps", "-ww", "-o", "args=", "-p", str(server.pid)], capture_output=True, text=True
    )
    if sys.platform == "linux":  # elsewhere the socket does not tell its process
        assert "bokeh serve" in listing.stdout


def test_server_that_dies_before_its_socket_is_an_error(bench: Bench) -> None:
    """A failed start is not taken for one that knows no sockets."""
    error = bench.fails(LaunchError, socket=True, app=("missing.py",))
    assert "does not exist" in str(error)


# --- a port after all


def test_server_that_knows_no_sockets_gets_a_port(bench: Bench) -> None:
    """An old Bokeh refuses the option: it is started again with a port, and why is told."""
    refuses = (
        'case " $* " in *" --unix-socket "*)\n'
        '  echo "usage: x"; echo "bokeh: error: unrecognized arguments: --unix-socket /x" >&2; exit 2;;\n'
        "esac\n"
    )
    old = bench.script("old", f'#!/bin/sh\n{refuses}exec {sys.executable} -m bokeh serve "$@"\n')
    server = bench.start(socket=True, command=(old,))
    assert server.socket == ""
    assert "unrecognized arguments: --unix-socket" in server.no_socket
    with socket.create_connection(("127.0.0.1", server.port), 5):
        pass
    assert server.state.evidence.argv[1:5] == ("--address", "127.0.0.1", "--port", "0")
    assert server.stop() is True


def test_server_that_takes_a_port_anyway_is_found_there(bench: Bench) -> None:
    """A command that heeds no --unix-socket is not waited for in vain."""
    server = bench.start(socket=True, command=FAKE)
    assert (server.port > 0, server.socket) == (True, "")
    assert "does not listen" in server.no_socket


def test_no_place_for_sockets_means_a_port(bench: Bench) -> None:
    """Where the account has no private directory, it is a port, and why is told."""
    place = Path(os.environ["BOKEH_SSH_DIR"])
    place.mkdir(mode=0o755)
    place.chmod(0o755)
    server = bench.start(socket=True)
    assert server.port > 0
    assert "has mode 755" in server.no_socket
    shutil.rmtree(place)


def test_tls_means_a_port(bench: Bench) -> None:
    """Bokeh takes no certificate on a socket: then it is a port without trying."""
    server = bench.start(socket=True, command=FAKE, args=("--ssl-certfile", "x.pem"))
    assert server.port > 0
    assert "TLS" in server.no_socket


def test_socket_that_is_open_is_closed_to_others(bench: Bench) -> None:
    """Whatever mode a server gives its socket, it is 0600 before it counts as ready."""
    code = (
        "import os, socket, sys, time; s = socket.socket(socket.AF_UNIX)\n"
        "s.bind(sys.argv[sys.argv.index('--unix-socket') + 1]); os.chmod(s.getsockname(), 0o777)\n"
        "print(oct(os.stat(s.getsockname()).st_mode), flush=True); s.listen(); time.sleep(600)\n"
    )
    server = bench.start(socket=True, command=(sys.executable, "-c", code))
    until(lambda: any(line.endswith("777") for line in server.log), what="it was open")
    assert stat.S_IMODE(Path(server.socket).stat().st_mode) == 0o600


def test_both_a_port_and_a_socket_are_refused() -> None:
    """What says twice where it listens is refused before anything starts, and so is what says it verbatim."""
    for wrong in ({"socket": True, "port": 5006}, {"verbatim": True, "socket": True, "command": "x"}):
        with pytest.raises(UsageError):
            Launch(**wrong)  # type: ignore[arg-type]
    for name in ("app", "args", "origins"):
        with pytest.raises(UsageError):
            Launch(verbatim=True, command="x", **{name: ("y",)})  # type: ignore[arg-type]
