"""Handlers of events may use all of a tunnel, and nothing waits for ever for a child process."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import webbrowser
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import pytest

import apps
import light_bokeh
from beds import PASSWORD, Knobs, Machine, free_port, until
from bokeh_ssh import (
    BokehSSHError,
    Closed,
    ConnectionLostError,
    DirectTunnel,
    Event,
    GatewayTunnel,
    Host,
    LocalForward,
    Question,
    RemoteForward,
    ServerExitedError,
    TunnelClosedError,
    Warned,
)
from bokeh_ssh._core.dispatcher import Dispatcher
from bokeh_ssh._tunnels import child_process, lifecycle
from conformance import ask
from processes import children, proc
from targets import target_here

ISOLATE = pytest.mark.parametrize("isolate", [False, True], ids=["in process", "isolated"])
CLASSES: list[Any] = [DirectTunnel, GatewayTunnel, LocalForward, RemoteForward]

#: What all of this must be done in; what hangs takes longer.
DEADLINE = 40.0


@pytest.fixture
def machine(embedded: Callable[..., Machine]) -> Machine:
    """A machine to log in to."""
    return embedded()


@pytest.fixture
def quick_machine(light: Callable[..., Machine]) -> Machine:
    """One whose servers start at once."""
    return light()


def in_time(work: Callable[[], Any], timeout: float = DEADLINE) -> Any:
    """Call it on a thread, and fail where it hangs; raises what it raises."""
    came: list[Any] = []

    def run() -> None:
        try:
            came.append((work(), None))
        except BaseException as exc:  # noqa: BLE001 - raised where it is waited for
            came.append((None, exc))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(timeout)
    assert came, f"it hangs for more than {timeout} s"
    [(result, error)] = came
    if error:
        raise error
    return result


def make(kind: Any, machine: Machine, **keywords: Any) -> Any:
    """Make a tunnel or forward of any class to the machine."""
    more: dict[str, Any] = {}
    if kind in (DirectTunnel, GatewayTunnel):
        more = {"python": machine.python}
    if kind is GatewayTunnel:
        more |= {"host": Host(machine.host, machine.user, **machine.login), "reverse": "relay"}
    elif kind is LocalForward:
        more = {"remote_port": machine.port}
    elif kind is RemoteForward:
        more = {"remote_port": 0, "local_port": machine.port}
    return kind(machine.host, machine.user, **{**more, **machine.login, **keywords})


def _await_end(tunnel: Any) -> None:
    async def main() -> None:
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(tunnel.ended(), 0.01)

    asyncio.run(main())


#: How each public method is called; a property is read. ``close`` has tests of its own.
CALLS: dict[str, Callable[[Any], Any]] = {
    "open": lambda tunnel: tunnel.open(),
    "wait": lambda tunnel: tunnel.wait(0.01),
    "ended": _await_end,
    "show": lambda tunnel: tunnel.show(inline=False),
    "status": lambda tunnel: tunnel.status(),
    "pull_session": lambda tunnel: tunnel.pull_session().close(),
    "push_session": lambda tunnel: tunnel.push_session(_document()).close(),
    "server_document": lambda tunnel: tunnel.server_document(),
    "_repr_html_": lambda tunnel: tunnel._repr_html_(),
    "__repr__": repr,
}


def _document() -> Any:
    from bokeh.document import Document

    return Document()


def calls_of(kind: Any) -> dict[str, Callable[[Any], Any]]:
    """Give a call for each public property and method of a class, with what Python and notebooks call."""
    found: dict[str, Callable[[Any], Any]] = {"__repr__": repr}
    for name in dir(kind):
        if name.startswith("_") and name != "_repr_html_":
            continue
        if isinstance(getattr(kind, name), property):
            found[name] = lambda tunnel, name=name: getattr(tunnel, name)  # type: ignore[misc]
        elif name != "close":
            found[name] = CALLS[name]  # a new method needs its line there
    return found


@pytest.mark.filterwarnings("ignore:There is no current event loop")  # Bokeh's own client
@ISOLATE
@pytest.mark.parametrize("kind", CLASSES)
def test_everything_can_be_used_in_a_handler_of_each_event(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, no_leaks: Any, kind: Any, isolate: bool
) -> None:
    """Whatever a handler reads or calls answers, or says why not: at each event of a whole life."""
    monkeypatch.setattr(webbrowser, "open", lambda url: True)
    monkeypatch.setattr(child_process, "_TELLS", 20.0)  # else what is known is read, where the child is late
    monkeypatch.setattr(lifecycle, "_HANDLERS", 60.0)  # which all that is called here takes on a busy machine
    serves = kind in (DirectTunnel, GatewayTunnel)
    calls = calls_of(kind)
    seen: dict[str, dict[str, Any]] = {}
    before: list[Any] = []

    def told(event: Event) -> None:
        kind = type(event).__name__
        if kind not in seen:
            results = seen[kind] = {}
            for name, call in calls.items():
                try:
                    results[name] = call(tunnel)
                except (BokehSSHError, OSError) as exc:
                    results[name] = exc
        before.append(kind)

    keywords: dict[str, Any] = {"on_event": told, "isolate": isolate}
    if serves:
        keywords["app"] = [
            apps.put(machine, "sliders.py", apps.SLIDER),
            apps.put(machine, "broken.py", apps.BROKEN),
        ]
    tunnel = make(kind, machine, **keywords)

    def live() -> None:
        with tunnel:
            assert before[-1] == "Ready"  # the handlers of all that was told have run
            if serves:
                try:
                    apps.get(tunnel.urls[1])
                except urllib.error.HTTPError as exc:
                    exc.close()
                until(lambda: "AppFailed" in before, what="the app to fail")
            machine.server.drop_connections()  # type: ignore[attr-defined]
            until(lambda: "Reconnected" in before, what="it to be back")
        assert before[-1] == "Closed"
        assert tunnel.state == "closed"

    with nullcontext() if serves else no_leaks():  # Bokeh does not close the loops of its sessions
        in_time(live)
    wanted = {"Connecting", "HostKeyVerified", "Authenticated", "Ready"}
    wanted |= {"Lost", "Reconnecting", "Reconnected", "Closed"}
    if serves:
        wanted |= {"Launching", "Launched", "AppFailed"}
    assert wanted <= seen.keys()
    for results in seen.values():
        assert results.keys() == calls.keys()
    ready = seen["Ready"]
    assert not [result for result in ready.values() if isinstance(result, Exception)], ready
    assert ready["state"] == "ready"
    if serves:
        assert any("Starting Bokeh server" in line for line in ready["log"])
        assert ready["urls"] == seen["Reconnected"]["urls"] or tunnel._info.key
        assert any("the app is broken" in line for line in seen["AppFailed"]["log"])
    assert isinstance(seen["Closed"]["open"], TunnelClosedError)


@ISOLATE
@pytest.mark.parametrize(
    "moment",
    [
        "Connecting",
        "HostKeyVerified",
        "Authenticated",
        "Ready",
        "Lost",
        "Reconnecting",
        "Reconnected",
        "Closed",
    ],
)
def test_close_in_a_handler_ends_all_of_it(
    request: pytest.FixtureRequest, no_leaks: Any, moment: str, isolate: bool
) -> None:
    """``close`` at any event ends it; an opening that is under way raises, and nothing is left."""
    opens = moment in ("Connecting", "HostKeyVerified", "Authenticated", "Ready")
    # asyncssh complains of a client that goes while it opens a channel.
    machine = request.getfixturevalue("sshd" if opens else "embedded")()
    closed: list[str] = []
    events: list[str] = []

    def told(event: Event) -> None:
        events.append(type(event).__name__)
        if events[-1] == moment:
            forward.close()
            closed.append(forward.state)

    forward = make(LocalForward, machine, on_event=told, isolate=isolate)

    def live() -> None:
        with forward:
            if moment != "Closed":  # the control: it stands, and only what comes later ends it
                machine.server.drop_connections()  # type: ignore[attr-defined]
                forward.wait(20)

    with no_leaks():
        if opens:
            with pytest.raises(TunnelClosedError, match="closed while it opened"):
                in_time(live)
        else:
            in_time(live)
    assert forward.state == "closed"
    assert len(closed) == 1
    # Only of what stood it is told that it has closed; it may stand before the handler comes to run.
    assert events.count("Closed") == ("Ready" in events)
    assert in_time(lambda: forward.close() or forward.state) == "closed"


@ISOLATE
@pytest.mark.parametrize("moment", ["Launching", "Launched", "AppFailed", "ServerExited"])
def test_close_in_a_handler_ends_the_server_too(
    sshd: Callable[..., Machine], no_leaks: Any, tmp_path: Path, moment: str, isolate: bool
) -> None:
    """The same for what only a tunnel with a server tells; the server has ended afterwards."""
    machine = sshd()
    mark = os.urandom(8).hex()
    go = tmp_path / "go"
    lines = "raise RuntimeError" if moment == "AppFailed" else ""
    path = apps.put(machine, "server.py", _SERVER)
    closed: list[str] = []

    def told(event: Event) -> None:
        if type(event).__name__ == moment:
            assert tunnel.log is not None
            tunnel.close()
            closed.append(tunnel.state)

    tunnel = make(
        DirectTunnel,
        machine,
        command=[machine.python, path, mark, str(go), lines],
        launch=True,
        on_event=told,
        isolate=isolate,
    )

    def live() -> None:
        with tunnel:
            go.touch()
            tunnel.wait(20)

    with no_leaks():
        if moment in ("Launching", "Launched"):
            with pytest.raises(TunnelClosedError):
                in_time(live)
        elif moment == "ServerExited":
            with pytest.raises(ServerExitedError):  # that came first
                in_time(live)
        else:
            in_time(live)
    assert closed == ["closed"]
    until(lambda: not machine.pids(mark), what="the server to be gone")


#: Answers as a Bokeh server; once the file is there, writes a traceback as Bokeh does, or ends.
_SERVER = """
import http.server, os, sys, threading
mark, go, fails = sys.argv[1:4]
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
threading.Thread(target=server.serve_forever, daemon=True).start()
for line in ("Starting Bokeh server version 3.9.9 (running on Tornado 6.5)",
             "Bokeh app running at: http://localhost:%d/app" % server.server_port,
             "Starting Bokeh server with process id: %d" % os.getpid()):
    print("2026-01-01 00:00:00,000 " + line, file=sys.stderr, flush=True)
pause = threading.Event()
while not os.path.exists(go):
    pause.wait(0.02)
if not fails:
    sys.exit(3)
for line in ("2026-01-01 00:00:00,000 Error running application handler <app>: no", fails,
             "Traceback (most recent call last):", '  File "app.py", line 1', "RuntimeError: no",
             "2026-01-01 00:00:00,001 next"):
    print(line, file=sys.stderr, flush=True)
while True:
    pause.wait(1)
"""


@ISOLATE
def test_wait_in_a_handler_holds_nobody_up(
    machine: Machine, no_leaks: Any, monkeypatch: pytest.MonkeyPatch, isolate: bool
) -> None:
    """A handler that waits for the end at Ready does so; opening and closing do not wait for it."""
    monkeypatch.setattr(lifecycle, "_HANDLERS", 60.0)
    ended: list[Any] = []

    def told(event: Event) -> None:
        if type(event).__name__ == "Ready":
            ended.append(forward.wait())
            asyncio.run(forward.ended())

    forward = make(LocalForward, machine, on_event=told, isolate=isolate)

    def live() -> None:
        began = time.monotonic()
        with forward:
            assert time.monotonic() - began < lifecycle._HANDLERS
            assert forward.state == "ready"
            assert not ended
        assert ended == [True]

    with no_leaks():
        in_time(live)


@ISOLATE
def test_slow_handler_delays_and_no_more(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, no_leaks: Any, isolate: bool
) -> None:
    """One that takes longer than it is waited for gets all events in order; opening and closing return."""
    monkeypatch.setattr(lifecycle, "_HANDLERS", 0.1)
    go_on = threading.Event()
    events: list[str] = []

    def told(event: Event) -> None:
        events.append(type(event).__name__)
        assert go_on.wait(DEADLINE)

    def live() -> None:
        with make(LocalForward, machine, on_event=told, isolate=isolate) as forward:
            assert forward.state == "ready"
            with socket.create_connection(("127.0.0.1", forward.local_port), timeout=30) as sock:
                assert sock.recv(4) == b"SSH-"

    with no_leaks():
        in_time(live)
        assert events == ["Connecting"]
        go_on.set()
        until(lambda: events[-1] == "Closed", what="the rest of the events")
    assert events == ["Connecting", "HostKeyVerified", "Authenticated", "Ready", "Closed"]


def test_what_is_not_taken_is_bounded_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    """What a handler does not get to is kept up to a bound, what matters of it; what is left out is told."""
    go_on = threading.Event()
    taken: list[int] = []

    def is_low(number: int) -> bool:
        return 50 < number < 60

    def is_not_two(number: int) -> bool:
        return number != 2

    def take(number: int) -> None:
        assert go_on.wait(30)
        taken.append(number)

    dispatcher = Dispatcher(take, "test", "the test", most=10, spare=(is_low, is_not_two))
    dispatcher.put(0)
    until(lambda: not dispatcher._waiting, what="the first to be taken")
    for number in range(1, 101):
        dispatcher.put(number)
    assert not dispatcher.drain(0.01)
    go_on.set()
    dispatcher.finish()
    assert dispatcher.drain(10)
    assert taken == [0, 2, *range(92, 101)]
    assert "the test is too slow: it has missed 90" in caplog.text


# The child process.


def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the patience with a child short."""
    short = {"_STARTS": 60.0, "_OPENS": 5.0, "_STANDS": 5.0, "_LAST_WORD": 1.0, "_TELLS": 2.0}
    for name, value in short.items():
        monkeypatch.setattr(child_process, name, value)


@contextmanager
def continuing(child: int) -> Iterator[None]:
    """Let a child go on at the end, so that a failing test leaves none behind."""
    try:
        yield
    finally:
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGCONT)


@pytest.mark.parametrize("goes_on", [True, False], ids=["control", "stopped"])
def test_child_that_is_stopped_while_it_opens(
    embedded: Callable[..., Machine], monkeypatch: pytest.MonkeyPatch, no_leaks: Any, goes_on: bool
) -> None:
    """A child that does not run any more is ended, and ``open`` says so; a pause changes nothing."""
    quick(monkeypatch)
    machine = embedded(Knobs(password=True, require=("password",)))
    with ExitStack() as stack:

        def prompt(question: Question) -> str:
            # It waits for the answer, so that it is stopped in mid-opening, however slow this machine is.
            [child] = children()
            stack.enter_context(continuing(child))
            os.kill(child, signal.SIGSTOP)
            if goes_on:
                os.kill(child, signal.SIGCONT)
            return PASSWORD

        forward = make(LocalForward, machine, prompt=prompt, isolate=True)
        stack.callback(forward.close)
        with no_leaks():
            if goes_on:
                in_time(lambda: forward.open().close())
                return
            with pytest.raises(ConnectionLostError, match="does not respond"):
                in_time(forward.open)
        assert forward.state == "failed"
        assert not children()


@pytest.mark.parametrize("stopped", [False, True], ids=["control", "stopped"])
def test_child_that_is_stopped_while_it_stands(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, no_leaks: Any, stopped: bool
) -> None:
    """It is told as a lost connection, after a while; a child that runs is left alone."""
    quick(monkeypatch)
    events: list[Event] = []
    with no_leaks():
        with make(LocalForward, machine, isolate=True, on_event=events.append) as forward:
            [child] = children()
            if not stopped:
                assert not forward.wait(7)
                assert children() == [child]
                return
            with continuing(child):
                os.kill(child, signal.SIGSTOP)
                with pytest.raises(ConnectionLostError, match="does not respond"):
                    in_time(lambda: forward.wait(30))
            assert forward.state == "failed"
            assert "does not respond" in getattr(events[-1], "reason", "")


def test_closing_with_a_stopped_child(
    quick_machine: Machine, monkeypatch: pytest.MonkeyPatch, no_leaks: Any
) -> None:
    """Reading answers with what is known, ``close`` ends the child, and says what becomes of the server."""
    quick(monkeypatch)
    monkeypatch.setattr(child_process, "_STANDS", 60.0)
    app = apps.put(quick_machine, "app.py", light_bokeh.APP)
    events: list[Event] = []
    with no_leaks():
        with make(DirectTunnel, quick_machine, app=app, grace=1, on_event=events.append) as tunnel:
            log = until(lambda: tunnel.log, what="its lines")  # the control
            [child] = children()
            with continuing(child):
                os.kill(child, signal.SIGSTOP)
                assert in_time(lambda: tunnel.log) == log
                in_time(tunnel.close)
    assert events[-1] == Closed(host=quick_machine.host, server="unreached")
    assert isinstance(events[-2], Warned)
    assert "by itself within 1 s" in events[-2].text
    until(lambda: not quick_machine.pids(app), what="the server to end by its grace")


def test_child_that_is_killed_while_it_is_asked(
    quick_machine: Machine, no_leaks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever reads at that moment gets what is known, at once."""
    monkeypatch.setattr(child_process, "_TELLS", 60.0)
    app = apps.put(quick_machine, "app.py", light_bokeh.APP)
    with no_leaks():
        with make(DirectTunnel, quick_machine, app=app, grace=1) as tunnel:
            log = tunnel.log
            [child] = children()
            os.kill(child, signal.SIGSTOP)
            read: list[Any] = []
            reader = threading.Thread(target=lambda: read.append(tunnel.log))
            began = time.monotonic()
            reader.start()
            session = tunnel._lifecycle.session
            until(lambda: session._asked > session._told, what="it to be asked")
            os.kill(child, signal.SIGKILL)
            reader.join(30)
            assert read == [log]
            assert time.monotonic() - began < child_process._TELLS
    until(lambda: not quick_machine.pids(app), what="the server to end by its grace")


_PROGRAM = """
import json, logging, sys
from bokeh_ssh._tunnels import child_process
from bokeh_ssh import LocalForward
logging.basicConfig(level=logging.INFO, filename="/dev/null")
words = json.loads(sys.argv[1])
for name, value in words.get("patience", {}).items():
    setattr(child_process, name, value)
with LocalForward(words["host"], words["user"], remote_port=words["port"], remote_host="127.0.0.1",
                  isolate=True, **words["login"]) as forward:
    print(forward.local_port, flush=True)
    print(sys.stdin.readline().strip(), forward.state, flush=True)
"""


@contextmanager
def program(machine: Machine, **words: Any) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Run a program with an isolated forward; gives it and its local port."""
    login = {name: str(value) if name != "port" else value for name, value in machine.login.items() if value}
    words = {"host": machine.host, "user": machine.user, "login": login | {"ssh_config": None}, **words}
    with subprocess.Popen(
        [sys.executable, "-c", _PROGRAM, json.dumps(words)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    ) as running:
        assert running.stdout
        try:
            yield running, int(running.stdout.readline())
        finally:
            running.send_signal(signal.SIGCONT)
            running.kill()


def _child_of(pid: int) -> int:
    [child] = proc(f"{pid}/task/{pid}/children").read_text().split()
    return int(child)


def test_program_that_is_stopped_does_not_stop_its_forward(machine: Machine) -> None:
    """The child says more than the pipe holds to one that does not listen, and forwards all the same."""
    with program(machine, port=free_port()) as (running, port):

        def refused() -> None:
            with suppress(ConnectionError), socket.create_connection(("127.0.0.1", port), timeout=30) as sock:
                assert sock.recv(1) == b""

        refused()  # the control
        running.send_signal(signal.SIGSTOP)
        for _ in range(200):  # each is logged
            refused()
        running.send_signal(signal.SIGCONT)
        answer, _ = running.communicate("done\n", timeout=20)
        assert answer == "done ready\n"


def test_both_stopped_together_go_on_together(machine: Machine) -> None:
    """Where the program was stopped too, or the machine slept, nobody is taken for hung."""
    patience = {"_STANDS": 4.0, "_LATE": 0.5}
    with target_here() as target, program(machine, port=target, patience=patience) as (running, port):
        child = _child_of(running.pid)
        with continuing(child):
            for pid in (child, running.pid):
                os.kill(pid, signal.SIGSTOP)
            asleep = time.monotonic()
            until(lambda: time.monotonic() > asleep + 6, what="it to have slept")
            running.send_signal(signal.SIGCONT)
        with ask(("127.0.0.1", port), "echo") as sock:
            sock.sendall(b"x")
            assert sock.recv(1) == b"x"
        answer, _ = running.communicate("done\n", timeout=20)
        assert answer == "done ready\n"


def test_a_prompt_may_use_the_tunnel(light: Callable[..., Machine], no_leaks: Any) -> None:
    """A prompt that reads what the child has gets that, and its own answer reaches who asked."""
    machine = light(Knobs(password=True, require=("publickey", "password")))
    app = apps.put(machine, "app.py", light_bokeh.APP)
    events: list[str] = []
    read: list[Any] = []

    def prompt(question: Question) -> str:
        read.append((tunnel.log, tunnel.state, list(events)))
        return PASSWORD

    tunnel = DirectTunnel(
        machine.host,
        machine.user,
        app,
        python=machine.python,
        on_event=lambda event: events.append(type(event).__name__),
        **{**machine.login, "prompt": prompt},
    )
    with no_leaks():
        in_time(lambda: tunnel.open().close())
    assert read == [((), "connecting", ["Connecting", "HostKeyVerified"])]  # what came before it was told


def test_a_logging_handler_may_use_the_tunnel(
    quick_machine: Machine, no_leaks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A handler of the program's log that reads what the child has holds up neither opening nor closing."""
    monkeypatch.setattr(child_process, "_TELLS", 20.0)  # who holds up takes all of it, for each record
    app = apps.put(quick_machine, "app.py", light_bokeh.APP)
    read: list[Any] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.process != os.getpid():
                read.append(tunnel.log)

    tunnel = make(DirectTunnel, quick_machine, app=app)
    logger, handler = logging.getLogger("bokeh_ssh"), Handler()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    try:
        with no_leaks():
            in_time(lambda: tunnel.open().close())
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    assert any(read)
