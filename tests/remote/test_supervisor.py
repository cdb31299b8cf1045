"""A server that runs: what is told of it, and how it ends, whatever ends first."""

from __future__ import annotations

import ast
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from importlib import resources
from pathlib import Path

import pytest

from beds import until
from bokeh_ssh._core.errors import ConnectionLostError, LaunchError
from bokeh_ssh._core.events import ServerExited, ServerResponsive, ServerUnresponsive
from bokeh_ssh._remote.readiness import Watch
from bokeh_ssh._server.payload import _PARTS, payload

if os.name != "posix":
    pytest.skip("the remote side is a POSIX system", allow_module_level=True)

from local_runner import FAKE, Bench, Held, kinds, processes, pythons

# --- what is told


@pytest.mark.every_python
@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGKILL, -9), (signal.SIGSEGV, -11), (signal.SIGTERM, -15)]
)
def test_server_that_is_killed_is_told_with_its_signal(
    bench: Bench, mark: str, number: int, status: int
) -> None:
    """However a server dies, it is told at once, and what it leaves behind is ended."""
    held = Held(bench, mark)
    os.kill(held.server.pid, number)
    assert held.server.wait(20)
    assert held.server.exit_status == status
    assert not held.server.lost
    until(lambda: kinds(bench, ServerExited), what="it is told")
    assert [event.exit_status for event in bench.events if isinstance(event, ServerExited)] == [status]
    held.check_gone()
    assert held.server.stop() is True


@pytest.mark.every_python
def test_server_that_exits_is_told_with_its_status(bench: Bench, mark: str) -> None:
    """A server that ends by itself gives its exit status, and its last words are in the log before that."""
    held = Held(bench, mark, "child exit")
    held.go.touch()
    assert held.server.wait(20)
    assert held.server.exit_status == 3
    assert held.server.log[-1] == "last words"
    held.check_gone()


@pytest.mark.every_python
def test_stopped_server_is_unresponsive_not_dead(bench: Bench, mark: str) -> None:
    """A server that does not run is told apart from one that has ended, and so is that it runs again."""
    held = Held(bench, mark)
    os.kill(held.server.pid, signal.SIGSTOP)
    until(lambda: kinds(bench, ServerUnresponsive), what="it is told")
    assert not held.server.ended.is_set()
    os.kill(held.server.pid, signal.SIGCONT)
    until(lambda: kinds(bench, ServerResponsive), what="it is told")
    assert kinds(bench, ServerUnresponsive, ServerResponsive, ServerExited) == [
        ServerUnresponsive,
        ServerResponsive,
    ]


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_stopped_server_behind_a_wrapper_is_noticed(bench: Bench) -> None:
    """Where a wrapper was started, it is still the server itself that is watched."""
    wrapper = bench.script("wrapper", '#!/bin/sh\n"$@" &\nwait\n')
    server = bench.start(command=(wrapper, *FAKE))
    os.kill(server.pid, signal.SIGSTOP)
    until(lambda: kinds(bench, ServerUnresponsive), what="it is told")
    os.kill(server.pid, signal.SIGCONT)
    until(lambda: kinds(bench, ServerResponsive), what="it is told")


def test_stopped_server_can_be_ended(bench: Bench, mark: str) -> None:
    """Ending a server that does not run works, and needs no KILL."""
    held = Held(bench, mark)
    os.kill(held.server.pid, signal.SIGSTOP)
    until(lambda: kinds(bench, ServerUnresponsive), what="it is stopped")
    assert held.server.stop() is True
    assert held.server.exit_status == -signal.SIGTERM
    held.check_gone()


# --- stop


@pytest.mark.every_python
def test_stop_ends_the_group(bench: Bench, mark: str) -> None:
    """stop() returns when server and grandchildren are gone, and says so; it can be called again."""
    held = Held(bench, mark)
    assert held.server.stop() is True
    assert not held.grandchildren()
    assert not held.alive()
    assert held.server.stop() is True
    assert held.server.ended.is_set()
    assert kinds(bench, ServerExited) == []  # we ended it
    assert held.session.process.wait(20) == 0
    assert not held.server._lease_thread.is_alive()


@pytest.mark.every_python
def test_stop_kills_what_ignores_term(bench: Bench, mark: str) -> None:
    """A server and a grandchild that ignore TERM are killed in time."""
    held = Held(bench, mark, "child deaf")
    began = time.monotonic()
    assert held.server.stop(timeout=10) is True
    assert 2 < time.monotonic() - began < 11
    assert held.server.exit_status == -signal.SIGKILL
    held.check_gone()


def test_stop_returns_when_the_supervisor_cannot_answer(bench: Bench, mark: str) -> None:
    """A far side that hangs holds stop() no longer than its timeout."""
    held = Held(bench, mark)
    os.kill(held.supervisor, signal.SIGSTOP)
    began = time.monotonic()
    assert held.server.stop(timeout=0.5) is False
    assert time.monotonic() - began < 8
    os.kill(held.supervisor, signal.SIGCONT)
    held.check_gone()  # the order was waiting for it


# --- the client goes


@pytest.mark.every_python
def test_client_killed_ends_all_after_the_grace_time(bench: Bench, mark: str) -> None:
    """When the client is just gone, the server lives on for the grace time, and no longer."""
    held = Held(bench, mark, grace=3)
    began = time.monotonic()
    held.session.vanish()
    assert held.server.lost
    assert held.alive()
    held.check_gone()
    assert 2.5 < time.monotonic() - began < 20


def test_client_killed_ends_what_ignores_term_too(bench: Bench, mark: str) -> None:
    """The same for a server and a grandchild that ignore TERM."""
    held = Held(bench, mark, "child deaf", grace=0)
    held.session.vanish()
    held.check_gone()


@pytest.mark.every_python
def test_client_killed_during_the_launch_ends_all_at_once(bench: Bench, mark: str) -> None:
    """A server that is not ready yet has nobody to come back for it: it does not get the grace time."""
    runner = bench.runner()

    def cut() -> None:
        until(lambda: runner.sessions and b'"started"' in runner.sessions[0].received, what="it was started")
        until(lambda: processes(mark), what="the grandchild runs")
        runner.sessions[0].vanish()

    cutter = threading.Thread(target=cut)
    cutter.start()
    env = {"FAKE": "silent child", "FAKE_MARK": mark}
    with pytest.raises((ConnectionLostError, LaunchError)):
        bench.start(runner, command=FAKE, env=env, grace=600)
    cutter.join()
    until(lambda: not processes(mark), what="the group is gone")
    assert runner.sessions[0].process.wait(20) == 0


def test_silent_client_loses_its_lease(bench: Bench, mark: str) -> None:
    """A client that vanished without closing the line is noticed by its silence."""
    held = Held(bench, mark, lease=2, grace=2)
    held.server._closing.set()  # no heartbeat any more, and the line stays up
    held.server._lease_thread.join(30)
    assert held.alive()
    held.check_gone()
    assert held.server.wait(20)
    assert held.server.exit_status is not None


def test_heartbeats_keep_the_lease(bench: Bench, mark: str) -> None:
    """A client that is there is never taken for silent, though it has nothing to say."""
    held = Held(bench, mark, lease=2.4, grace=0)
    began = time.monotonic()
    until(lambda: len(held.heard("beat")) >= 8, what="heartbeats are answered")
    assert time.monotonic() - began > 2 * 2.4
    assert held.alive()


def test_client_that_is_heard_again_keeps_its_server(bench: Bench, mark: str) -> None:
    """Silence that ends within the grace time costs nothing."""
    held = Held(bench, mark, lease=0.3, grace=600)
    os.kill(held.supervisor, signal.SIGSTOP)  # nothing arrives for longer than the lease
    stopped = time.monotonic()
    until(lambda: time.monotonic() - stopped > 0.6, what="the lease is over")
    os.kill(held.supervisor, signal.SIGCONT)
    seen = len(held.heard("beat"))
    until(lambda: len(held.heard("beat")) > seen + 1, what="it answers again")
    assert held.alive()


@pytest.mark.every_python
def test_flood_is_drained_while_the_client_does_not_read(bench: Bench, mark: str) -> None:
    """The server writes 8 MiB while nobody reads the line, and is not held up."""
    report = bench.path / "report.json"
    runner = bench.runner()

    def stall() -> None:
        until(lambda: runner.sessions and b'"started"' in runner.sessions[0].received, what="it was started")
        runner.sessions[0].stalled.set()
        try:
            until(report.exists, what="it to come past the flood")
        finally:
            runner.sessions[0].vanish()

    staller = threading.Thread(target=stall)
    staller.start()
    env = {"FAKE": "flood", "FAKE_REPORT": str(report)}
    with pytest.raises((ConnectionLostError, LaunchError)):  # ready is never read
        bench.start(runner, command=FAKE, env=env, grace=0)
    staller.join()
    assert report.exists()
    assert len(runner.sessions[0].received) < 4 << 20
    assert runner.sessions[0].process.wait(20) is not None


def test_log_is_bounded(bench: Bench) -> None:
    """Of many lines the last ones are kept, whether a fast line brings them all or a slow one lost some."""
    server = bench.start(command=FAKE, env={"FAKE": "flood", "FAKE_REPORT": str(bench.path / "r")})
    assert len(server.log) <= 2000
    for number in range(3):
        server.state.receive({"event": "log", "lines": [f"{number} {line}" for line in range(1000)]})
    assert len(server.log) == 2000
    assert (server.log[0], server.log[-1]) == ("1 0", "2 999")


# --- the supervisor goes


@pytest.mark.every_python
def test_supervisor_killed_takes_the_server_with_it(bench: Bench, mark: str) -> None:
    """With the supervisor killed, its guardian ends the whole group; the client is told."""
    held = Held(bench, mark, "child deaf", grace=600)
    os.kill(held.supervisor, signal.SIGKILL)
    assert held.server.wait(20)
    held.check_gone()
    assert held.session.process.returncode == -signal.SIGKILL
    assert held.server.exit_status is None
    assert held.server.lost
    assert [event.exit_status for event in bench.events if isinstance(event, ServerExited)] == [None]


@pytest.mark.every_python
def test_supervisor_told_to_end_ends_all(bench: Bench, mark: str) -> None:
    """TERM, as from a machine that shuts down, ends the server in order; the exit is told."""
    held = Held(bench, mark)
    os.kill(held.supervisor, signal.SIGTERM)
    assert held.server.wait(20)
    assert held.server.exit_status == -signal.SIGTERM
    held.check_gone()
    assert held.session.process.returncode == 0


@pytest.mark.every_python
def test_supervisor_survives_hangup_and_interrupt(bench: Bench, mark: str) -> None:
    """Signals that a closing session may send do not take the server away before its grace time."""
    held = Held(bench, mark, lease=0.6, grace=600)
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGPIPE):
        os.kill(held.supervisor, number)
    seen = len(held.heard("beat"))
    until(lambda: len(held.heard("beat")) > seen + 1, what="it answers")
    assert held.alive()


@pytest.mark.every_python
def test_server_gets_signals_as_usual(bench: Bench) -> None:
    """What the supervisor ignores is not ignored by the server: a pipe of the app's breaks as it should."""
    text = '#!/bin/sh\nsh -c \'kill -PIPE $$\'\necho "pipe $?"\nexec "$@"\n'
    check = bench.script("check", text)
    server = bench.start(command=(check, *FAKE))
    assert f"pipe {128 + signal.SIGPIPE}" in server.log


# --- the protocol


def test_first_message_tells_the_protocol(bench: Bench, mark: str) -> None:
    """The supervisor says which version of the protocol it speaks, and who is who."""
    held = Held(bench, mark)
    (started,) = held.heard("started")
    assert started["protocol"] == 1
    assert started["supervisor"] == held.supervisor
    assert started["pid"] == held.server.pid


@pytest.mark.parametrize(
    "junk", [b"\n", b"{}\n", b"nonsense\n", b'{"do": "dance"}\n', b'{"do": 5}\n', b"[]\n", b'"x"\n']
)
def test_orders_that_are_not_known_are_skipped(bench: Bench, mark: str, junk: bytes) -> None:
    """A newer client may say things that this supervisor does not know; they change nothing."""
    held = Held(bench, mark, lease=100)
    held.session.write(junk + b"\n")
    held.server.heartbeat()
    until(lambda: held.heard("beat"), what="it answers")
    assert held.alive()


def test_lease_and_grace_can_be_changed(bench: Bench, mark: str) -> None:
    """A later message can give the server more or less time."""
    held = Held(bench, mark, grace=600)
    held.session.write(b'{"do": "lease", "grace": 0}\n')
    until(lambda: held.heard("beat"), what="it has taken it")
    held.session.vanish()
    held.check_gone()


def test_supervisor_runs_on_the_oldest_python(bench: Bench, mark: str) -> None:
    """Python 3.8 can hold a server: start, log, stop and exit."""
    found = pythons("3.8")
    if not found:
        pytest.skip("there is no Python 3.8 here")
    held = Held(bench, mark, "child deaf", python=found[0])
    os.kill(held.server.pid, signal.SIGSTOP)
    until(lambda: kinds(bench, ServerUnresponsive), what="it is told")
    assert held.server.stop(timeout=10) is True
    held.check_gone()


def test_supervisor_needs_the_standard_library_only() -> None:
    """What is sent brings all of ours that it imports, and imports nothing that has to be installed."""
    for name in ("supervisor", "control_client"):
        code = f"import sys; exec(sys.stdin.buffer.read({len(payload(name))}))"
        words = [sys.executable, "-I", "-S", "-c", code]
        done = subprocess.run(words, input=payload(name), capture_output=True, cwd="/")
        assert done.returncode == 3, done.stderr  # it ran, and found its input closed


@pytest.mark.every_python
@pytest.mark.parametrize("name", sorted(_PARTS))
def test_what_is_sent_is_the_code_without_its_docstrings(name: str) -> None:
    """Docstrings are not sent with each launch; all else is, and on its line, for a traceback's sake."""
    modules = {}
    for node in ast.walk(ast.parse(payload(name))):
        if isinstance(node, ast.Call) and len(node.args) == 2 and isinstance(node.args[1], ast.Constant):
            module, text = (argument.value for argument in node.args if isinstance(argument, ast.Constant))
            modules[str(module).removeprefix("bokeh_ssh._remote.")] = text
    assert name in modules
    for module, text in modules.items():
        if text is None:  # a package
            continue
        path = resources.files("bokeh_ssh") / "_remote" / f"{module.replace('.', '/')}.py"
        tree = ast.parse(path.read_text("utf-8"))
        sent = ast.parse(str(text))
        for node in ast.walk(tree):
            is_documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
            if is_documented and ast.get_docstring(node) is not None:
                node.body[0] = ast.Expr(ast.Constant(""))
        assert ast.dump(sent) == ast.dump(tree)
        assert sent.body[-1].lineno == tree.body[-1].lineno
        assert len(str(text).splitlines()) == max(node.end_lineno or 0 for node in tree.body)


# --- a server that does not answer

BLOCKS = """
import time
from pathlib import Path
from bokeh.plotting import curdoc
go = Path({go!r})
Path({began!r}).touch()
while not go.exists():
    time.sleep(0.05)
"""


@pytest.mark.parametrize("on_socket", [False, True], ids=["port", "socket"])
def test_server_that_computes_for_long_is_told_as_busy(bench: Bench, on_socket: bool) -> None:
    """One that runs and answers nothing is told apart from a stopped one; so is that it answers again."""
    go, began = bench.path / "go", bench.path / "began"
    app = bench.script("app.py", BLOCKS.format(go=str(go), began=str(began)))
    server = bench.start(app=(app,), watch=2, socket=on_socket)  # a busy machine is not a busy server

    def told() -> list[type]:
        return kinds(bench, ServerUnresponsive, ServerResponsive)

    seen = time.monotonic()
    # Which lines a server begins with differs between versions; all are there before the first look.
    until(lambda: time.monotonic() - seen > 2, what="it has written all it has to say")
    silent = len(server.log)
    until(lambda: time.monotonic() - seen > 8.4, what="it was looked at some times")
    assert told() == []  # the control: one that answers is left in peace
    assert len(server.log) == silent  # and its log too
    sock = socket.socket(socket.AF_UNIX if on_socket else socket.AF_INET)
    with sock:
        sock.connect(server.socket if on_socket else ("127.0.0.1", server.port))
        sock.sendall(b"GET /app HTTP/1.1\r\nHost: x\r\n\r\n")
        until(began.exists, what="its event loop is held up")
        # It was held up, too, where a busy machine had it load for long what the app imports, or has it make
        # the page for long: then it is told more than once.
        until(lambda: told()[-1:] == [ServerUnresponsive], what="it is told")
        go.touch()
        until(lambda: told()[-1:] == [ServerResponsive], what="it is told that it answers")
    kinds_told = told()
    assert kinds_told == ([ServerUnresponsive, ServerResponsive] * len(kinds_told))[: len(kinds_told)]
    reasons = {event.reason for event in bench.events if isinstance(event, ServerUnresponsive)}
    assert reasons == {"busy"}


@pytest.mark.parametrize("on_socket", [False, True], ids=["port", "socket"])
def test_answer_that_is_seen_late_is_one(account: Path, on_socket: bool) -> None:
    """A supervisor that is held up past the time for an answer does not lay that on the server."""
    place = Path(os.environ["BOKEH_SSH_DIR"])  # a short path
    place.mkdir()
    path = str(place / "s") if on_socket else ""
    family = socket.AF_UNIX if on_socket else socket.AF_INET
    with socket.socket(family) as listener:
        listener.bind(path or ("127.0.0.1", 0))
        listener.listen()
        port = 0 if on_socket else listener.getsockname()[1]
        watch = Watch(10)
        watch.check(0, port, path)
        listener.accept()[0].close()
        [fd] = watch.fds()
        assert select.select([fd], [], [], 30)[0]
        watch.check(100, port, path)
        assert not watch.busy
        watch.check(200, port, path)  # the control: nobody has taken that one
        assert watch.busy
        watch.drop()


def test_stopped_server_is_not_told_as_busy_too(bench: Bench) -> None:
    """A process that is halted has one reason not to answer, not two."""
    server = bench.start(watch=0.3)
    os.kill(server.pid, signal.SIGSTOP)

    def reasons() -> list[str]:
        return [event.reason for event in bench.events if isinstance(event, ServerUnresponsive)]

    until(lambda: "stopped" in reasons(), what="it is told")
    before = len(bench.events)  # a busy machine may have had it told as busy, before
    stopped = time.monotonic()
    until(lambda: time.monotonic() - stopped > 1, what="it would have been looked at")
    assert len(bench.events) == before
    os.kill(server.pid, signal.SIGCONT)
    until(lambda: ServerResponsive in map(type, bench.events[before:]), what="it is told")
    assert reasons().count("stopped") == 1
