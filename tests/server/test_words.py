"""What an app writes steers nothing: not where its tunnel leads, nor what it is taken for."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import apps
from beds import Machine, free_port, until
from bokeh_ssh import Event, Lost, Reconnected, ServerExited
from bokeh_ssh._core.framing import plain
from bokeh_ssh._remote.readiness import Facts, holds, listeners
from bokeh_ssh._remote.server import LINES, TAIL, Server, ServerOutput
from bokeh_ssh._remote.server_process import Stage
from bokeh_ssh._server.log_parsing import port_in_use, reason
from cable import Cable
from direct_tunnels import tunnel_to

if os.name != "posix":
    pytest.skip("the remote side is a POSIX system", allow_module_level=True)

#: What Bokeh itself writes when it listens, with a port and a process of somebody else.
#: Then the same with its own port, where it was given one, and a route that it does not have.
LIES = """
import sys
words = sys.orig_argv  # Bokeh gives an app an argv of its own
own = [words[at + 1] for at, word in enumerate(words[:-1]) if word == "--port"]
for number in ["{port}", *own]:
    for line in ("Starting Bokeh server version 9.9 (running on Tornado 9.9)",
                 "Bokeh app running at: http://localhost:" + number + "/lie",
                 "Starting Bokeh server with process id: 1"):
        print("2026-01-01 00:00:00,000", line, file=sys.stderr, flush=True)
        print(line, flush=True)
"""


def lying(machine: Machine, port: int) -> str:
    """Put an app that lies before its server listens, once it does, and in each session; gives its folder."""
    lies = LIES.format(port=port)
    folder = Path(apps.put(machine, "main.py", apps.SLIDER + lies)).parent
    hook = "def on_server_loaded(context):\n" + "".join(f"    {line}\n" for line in lies.strip().splitlines())
    (folder / "server_lifecycle.py").write_text(lies + hook)  # Bokeh imports it before it listens
    return str(folder)


@pytest.mark.parametrize("where", ["socket", "any port", "port", "dev"])
def test_lies_of_an_app_lead_nowhere(embedded: Callable[..., Machine], tmp_path: Path, where: str) -> None:
    """The tunnel leads to the app, before and after a loss, whatever lines the app writes."""
    machine = embedded()
    keywords: dict[str, Any] = {
        "socket": {},
        "any port": {"signed": False, "args": ("--num-procs", "1")},
        "port": {"remote_port": free_port(), "signed": False},
        "dev": {"args": ("--dev",)},
    }[where]
    events: list[Event] = []
    with socket.create_server(("127.0.0.1", 0)) as other, Cable(machine.host, machine.port) as cable:
        there = cable.machine(machine, tmp_path)
        app = lying(machine, other.getsockname()[1])
        with tunnel_to(there, app, on_event=events.append, isolate=False, **keywords) as tunnel:
            assert [url.partition("?")[0].rpartition("/")[2] for url in tunnel.urls] == [Path(app).name]
            assert "/lie" in next(line for line in tunnel.log if " running at: " in line)  # the control
            before = tunnel.remote_port
            apps.drive(tunnel.url)
            until(lambda: sum("/lie" in line for line in tunnel.log) >= 6, what="the app to lie in a session")
            cable.pull()
            until(lambda: any(isinstance(e, Reconnected) for e in events), what="the line to be back")
            apps.drive(tunnel.url)
            assert tunnel.remote_port == before
            assert tunnel.remote_port != other.getsockname()[1]
            assert next(e for e in events if isinstance(e, Reconnected)).same_server
        other.setblocking(False)
        with pytest.raises(BlockingIOError):
            other.accept()  # nobody came
    assert not [e for e in events if isinstance(e, ServerExited)]
    assert [e for e in events if isinstance(e, Lost)]  # the control: it was lost


def test_who_holds_a_port_is_seen() -> None:
    """Only a process that listens on a port is taken for the one that does."""
    if not Path("/proc/self/net/tcp").exists():
        pytest.skip("only Linux tells")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        assert holds([os.getpid()], port) is True
        assert holds([os.getppid()], port) is False
    assert holds([os.getpid()], port) is False


def test_lines_about_another_port_change_nothing() -> None:
    """What was read of the port that was asked for stays, whatever comes between."""
    lines = ["Bokeh app running at: http://h:5006/a", "Bokeh app running at: http://h:22/lie"]
    for asked, port, routes in ((5006, 5006, ["/a"]), (0, 22, ["/lie"])):  # with none: the control
        facts = Facts(asked)
        assert [facts.read(line) for line in lines] == [None, None]
        ready = facts.read("Starting Bokeh server with process id: 7")
        assert ready
        assert (ready["port"], ready["routes"]) == (port, routes)
    facts = Facts(5006)
    assert facts.read(lines[1]) is None
    assert facts.read("Starting Bokeh server with process id: 7") is None


@pytest.mark.parametrize(
    "keywords",
    [
        {"args": ("--args", "--port", "9999")},
        {"command": ("timeout", "100", sys.executable, "-m", "bokeh", "serve")},
    ],
    ids=["a port of the app's own", "a group of its own"],
)
def test_what_says_where_it_listens_is_understood(
    embedded: Callable[..., Machine], keywords: dict[str, Any]
) -> None:
    """Bokeh's own lines count, whatever options the app has, and behind a wrapper that makes a group of its
    own."""
    machine, port = embedded(), free_port()
    app = apps.put(machine, "sliders.py", apps.SLIDER)
    try:
        with tunnel_to(machine, app, remote_port=port, signed=False, launch_timeout=20, **keywords) as tunnel:
            assert tunnel.remote_port == port
            apps.drive(tunnel.url)
    finally:  # what is in a group of its own outlives its tunnel
        for pid in machine.pids(app):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


class Said(list[dict[str, Any]]):
    """What is sent to the client, but for log lines."""

    since = 0.0

    def send(self, event: str, **more: Any) -> None:
        """Keep a message."""
        if event != "log":
            self.append(dict(more, event=event))


class Held(Server):
    """A server that is this process, and whose client is the test."""

    def __init__(self, **spec: Any) -> None:
        self.said = Said()
        super().__init__(spec, self.said)  # type: ignore[arg-type]  # a client that cannot but listen
        self.process.pid, self.process.group, self.process.stage = os.getpid(), os.getpgrp(), Stage.STARTING


@pytest.mark.parametrize(
    ("command", "routes"),
    [(["python", "python3"], ["/real"]), ("mine", ["/lie"])],  # of a command of one's own, nothing is known
)
def test_route_that_no_app_has_is_not_believed(command: Any, routes: list[str]) -> None:
    """A lie about the very port that was asked for, told before Bokeh's lines are, adds no route."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        held = Held(argv=[command], apps=["real.py"])
        held.probe.facts = Facts(port)
        held.take_lines(
            "out",
            [f"Bokeh app running at: http://h:{port}/lie", "Starting Bokeh server with process id: 1"],
        )
        (ready,) = held.said
        assert (ready["port"], ready["pid"], ready["routes"]) == (port, os.getpid(), routes)


@pytest.mark.parametrize("command", [["python", "python3"], "mine"], ids=["Bokeh", "command"])
@pytest.mark.parametrize("before", [True, False], ids=["before", "new"])
def test_port_of_another_process_is_that_of_a_command_only_if_it_is_new(command: Any, before: bool) -> None:
    """``srun`` and its like have others start what listens; what listened before they ran is not theirs."""
    held = Held(argv=[command], apps=["real.py"])
    program = (
        "import socket; s = socket.create_server(('127.0.0.1', 0)); print(s.getsockname()[1], flush=True); "
    )
    program += "input()"
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", program], **pipes) as other:
        assert other.stdout
        port = int(other.stdout.readline())
        if before:
            held.probe.before = set(listeners() or ())
        held.probe._running = lambda: {os.getpid()}  # it is a child of this one's
        held.probe.facts = Facts(0)
        held.take_lines(
            "out", [f"Bokeh app running at: http://h:{port}/x", "Starting Bokeh server with process id: 1"]
        )
        assert bool(held.said) is (command == "mine" and not before)
        other.communicate(b"\n")


#: Starts what it is asked to, for whoever asks: as a scheduler's daemon does.
DAEMON = """
import json, socket, subprocess, sys
listener = socket.create_server(("127.0.0.1", 0))
print(listener.getsockname()[1], flush=True)
sock, _ = listener.accept()
words = json.loads(sock.makefile().readline())
with subprocess.Popen(words, stdout=sock, stderr=sock) as server:
    sys.stdin.read()
    server.kill()  # Bokeh does not end on SIGTERM once nobody reads what it prints
"""

#: Has the daemon start it, and passes on what it prints: as srun does.
RUNNER = """
import json, socket, sys
sock = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
sock.sendall(json.dumps(sys.argv[2:]).encode() + b"\\n")
for line in sock.makefile():
    print(line, end="", flush=True)
"""


def test_server_that_a_daemon_starts_is_found(embedded: Callable[..., Machine]) -> None:
    """A command that has another process start the server, on a port that Bokeh itself tells, is ready."""
    machine = embedded()
    app = apps.put(machine, "sliders.py", apps.SLIDER)
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", DAEMON], **pipes) as daemon:
        try:
            assert daemon.stdout
            runner = (sys.executable, "-u", "-c", RUNNER, daemon.stdout.readline().decode().strip())
            command = (*runner, sys.executable, "-m", "bokeh", "serve")
            keywords: dict[str, Any] = {"remote_port": free_port(), "signed": False, "launch_timeout": 30}
            with tunnel_to(machine, app, command=command, **keywords) as tunnel:
                apps.drive(tunnel.url)
        finally:
            assert daemon.stdin
            daemon.stdin.close()


def test_lines_of_a_server_of_another_kind_are_not_read() -> None:
    """One that is told its port is looked for there, though it listens on another that a line names."""
    lies = ["Starting Bokeh server with process id: 1"]
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        lies.insert(0, f"Bokeh app running at: http://h:{port}/lie")
        for plain in (True, False):  # the second is the control
            held = Held(argv=["mine"], plain=plain)
            held.take_lines("out", lies)
            assert bool(held.said) is not plain


@pytest.mark.parametrize("socket_asked", [True, False])
def test_bokeh_on_a_socket_is_not_led_to_a_port(socket_asked: bool) -> None:
    """Where Bokeh was told a socket, no line leads to a port, be it one that the server holds."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        held = Held(argv=[["python", "python3"]], apps=["real.py"], socket=socket_asked)
        held.probe.socket = "/nowhere/socket" if socket_asked else ""
        held.take_lines(
            "out",
            [f"Bokeh app running at: http://h:{port}/real", "Starting Bokeh server with process id: 1"],
        )
        assert bool(held.said) is not socket_asked  # without one: the control


@pytest.mark.parametrize("stream", ["ready", "along"])
def test_word_that_is_nested_too_deep_is_none(stream: str) -> None:
    """A program that is to say where it listens in JSON may write any; its supervisor goes on."""
    held = Held(argv=["mine"], notify=True)
    held.take_lines(stream, ["[" * 60_000, '{"a":' * 10_000])
    assert not held.said
    held.take_lines(stream, ['{"port": 5006}'])  # the control
    assert [said["event"] for said in held.said] == [stream]


COMPLAINT = "bokeh: error: unrecognized arguments: --unix-socket /x"


@pytest.mark.parametrize(
    ("status", "lines", "again"),
    [
        (2, ["usage: bokeh", COMPLAINT], True),  # the controls: argparse, click, optparse
        (2, ["Usage: x", "Error: No such option: --unix-socket"], True),
        (2, ["x: error: no such option: --unix-socket"], True),
        (1, [COMPLAINT], False),
        (-11, [COMPLAINT], False),
        (2, ["cannot open the unix socket of the database"], False),
        (1, ["psycopg.OperationalError: connection to server on socket /run/unix failed"], False),
        (2, ["usage: bokeh", "bokeh: error: unrecognized arguments: --zzz"], False),
        (2, ["Starting Bokeh server version 3.9 (running on Tornado 6.5)", COMPLAINT], False),
    ],
)
def test_only_a_parser_of_options_is_asked_again(status: int, lines: list[str], again: bool) -> None:
    """A server is started again with a port where its options were refused, not for what an app says."""
    held = Held(argv=[["python", "python3"]], socket=True)
    started: list[str] = []
    held.spawn = lambda: started.append(held.probe.socket)  # type: ignore[method-assign]
    held.probe.socket, held.process.status = "/nowhere/socket", status
    held.take_lines("err", lines)
    assert held.retry() is again
    assert started == [""] * again
    assert held.probe.socket == ("" if again else "/nowhere/socket")


@pytest.mark.parametrize("letter", ["x", "\N{SNAKE}", ""])
def test_kept_log_is_bounded(letter: str) -> None:
    """What is kept of a log is bounded in characters and lines, and is the newest; a short one is whole."""
    output = ServerOutput(lambda *_: None)
    output.keep(["first", "second"])
    assert list(output.log) == ["first", "second"]  # the control
    for number in range(2000):
        output.keep([letter * 60_000 + str(number)])
    assert sum(len(line) for line in output.log) <= TAIL
    assert len(output.log) <= LINES
    assert output.log[-1].endswith("1999")


def test_long_lines_cost_little() -> None:
    """A line is read in time that does not grow with what an app puts into it."""
    facts = Facts()
    for text in (
        "Bokeh app running at: http://" + ":1" * 100_000,
        "Bokeh app running at: http://h:1/" + " " * 10**6,
    ):
        facts.read(text)
    for _ in range(1000):
        facts.read("Bokeh app running at: http://h:5006/" + " " * 60_000)
    assert facts.port == 5006  # the control: Bokeh's own line, with blanks after it


@pytest.mark.parametrize(
    "part", [" ", "\t", "\x1b[0", "\x1b]", "port 1", "ERROR: ", " error:", "session-id="]
)
def test_flood_without_a_line_end_costs_little(part: str) -> None:
    """A line of 200,000 characters takes a moment of the supervisor's and of this side's, not minutes."""
    text = (part * 200_000)[:200_000] + "x"  # blanks are slow to match only where a line does not end in them
    held = Held(argv=["mine"])
    start = time.process_time()
    for line in (text, "Bokeh app running at: http://h:5006/" + text, "unrecognized arguments " + text):
        held.take_lines("out", [line])
        held.process.status, held.probe.socket = 2, "/nowhere/socket"
        assert not held.retry()
        plain(line)
        reason([line])
        port_in_use([line])
    assert time.process_time() - start < 2  # a quadratic expression takes minutes
    assert held.probe.facts.port == 5006  # the control: the lines were read
