"""Ctrl-C, signals, kill -9 and fork: whatever ends the program, nothing of it stays, here or there."""

from __future__ import annotations

import gc
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import apps
import fakes
from beds import PASSWORD, Knobs, Machine, until
from bokeh_ssh import BokehSSHError, Event, LocalForward, RemoteForward, TunnelClosedError
from bokeh_ssh._tunnels import lifecycle
from fakes import FakeSSH, Listener
from processes import kill, proc

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="signals and fork as POSIX has them")

#: Seconds from Ctrl-C to the end: 2, and what a busy machine may need.
_PROMPTLY = 20.0

#: What a person would write, with each event on standard output.
_PROGRAM = """
import json, os, signal, socket, sys, threading, time
import bokeh_ssh

signal.signal(signal.SIGINT, signal.default_int_handler)  # as in a shell, however this was started
kind, args, keywords = json.loads(sys.argv[1])


def say(*words):
    # At once: a signal handler that says something may be in the middle of another who does.
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())


def prompt(question):
    say("asked")
    threading.Event().wait()


if keywords.pop("prompt", False):
    keywords["prompt"] = prompt
tunnel = getattr(bokeh_ssh, kind)(*args, on_event=lambda event: say(type(event).__name__), **keywords)
"""

_WITH = """
try:
    with tunnel:
        say("open", tunnel.local_port, tunnel.remote_port)
        threading.Event().wait()
except KeyboardInterrupt:
    say("interrupted")
    sys.exit(130)
"""

#: A server that answers, has a grandchild, and does not go when it is asked to.
_DEAF = """
import http.server, os, signal, subprocess, sys, threading

mark, folder = os.environ["MARK"], os.environ["FOLDER"]
signal.signal(signal.SIGTERM, lambda *_: open(os.path.join(folder, "asked-to-go"), "w").close())
subprocess.Popen(["/bin/sh", "-c", "trap '' TERM; while :; do sleep 1; done # " + mark])
server = http.server.HTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler)
os.chdir(folder)
os.makedirs("deaf", exist_ok=True)
open("deaf/metadata", "w").close()
for line in ("Starting Bokeh server version 3.9.9 (running on Tornado 6.5)",
             "Bokeh app running at: http://localhost:%d/deaf" % server.server_port,
             "Starting Bokeh server with process id: %d" % os.getpid()):
    sys.stderr.write("2026-01-01 00:00:00,000 %s\\n" % line)
sys.stderr.flush()
server.serve_forever()
"""

FAKE_SERVER = Path(apps.__file__).with_name("fake_server.py").read_text(encoding="utf-8")


class Program:
    """A program that runs by itself, and what it says."""

    def __init__(self, code: str, kind: str, *args: Any, **keywords: Any) -> None:
        self.mark = uuid.uuid4().hex
        self._process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM + textwrap.dedent(code), json.dumps([kind, args, keywords])],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OUR_MARK": self.mark},
        )
        self.pid = self._process.pid
        self.said: list[str] = []
        self.errors = ""
        self._readers = [
            threading.Thread(target=work, daemon=True) for work in (self._listen, self._complain)
        ]
        for reader in self._readers:
            reader.start()

    def _listen(self) -> None:
        assert self._process.stdout
        for line in self._process.stdout:
            self.said.append(line.strip())

    def _complain(self) -> None:
        assert self._process.stderr
        self.errors = self._process.stderr.read()

    def wait_for(self, word: str, timeout: float = 30) -> str:
        """Wait until it says the word; gives the whole line."""

        def heard() -> str:
            found = [line for line in self.said if line.split()[:1] == [word]]
            assert found or self._process.poll() is None, (self.said, self.errors)
            return found[0] if found else ""

        return until(heard, timeout=timeout, what=f"the program to say {word}")

    def signal(self, number: int) -> None:
        """Send it a signal."""
        self._process.send_signal(number)

    def end(self, timeout: float = _PROMPTLY) -> int:
        """Wait for its end; gives its exit status."""
        try:
            status = self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it goes on for more than {timeout} s; it said {self.said}") from None
        for reader in self._readers:
            reader.join(30)
        return status

    def interrupt(self) -> None:
        """Press Ctrl-C, and see that it ends with KeyboardInterrupt, promptly and without a complaint."""
        self.signal(signal.SIGINT)
        status = self.end()
        assert (status, self.errors) == (130, ""), (self.said, self.errors)
        assert self.said[-1] == "interrupted"
        self.check_gone()

    def check_gone(self, timeout: float = 30) -> None:
        """See that no process that it started is left on this machine."""
        until(lambda: not self.family(), timeout=timeout, what="its processes to be gone")

    def family(self) -> list[int]:
        """List the processes that have its environment."""
        found = []
        for place in Path("/proc").glob("[0-9]*"):
            try:
                if self.mark.encode() in (place / "environ").read_bytes():
                    found.append(int(place.name))
            except OSError:
                continue
        return found

    def kill(self) -> None:
        """Leave nothing behind, whatever the test has found."""
        kill(self.family())
        self._process.kill()
        self._process.wait(30)
        for stream in (self._process.stdout, self._process.stderr):
            assert stream
            stream.close()


@pytest.fixture
def program() -> Iterator[Callable[..., Program]]:
    """Start programs: ``program(code, kind, *args, **keywords)``."""
    with ExitStack() as stack:

        def start(*args: Any, **keywords: Any) -> Program:
            made = Program(*args, **keywords)
            stack.callback(made.kill)
            return made

        yield start


def at(machine: Machine) -> tuple[str, str]:
    """Give host and user."""
    return machine.host, machine.user


def launching(machine: Machine, mode: str, mark: str) -> dict[str, Any]:
    """Give the keywords for a stand-in of a server on the machine that misbehaves as ``mode`` says."""
    path = apps.put(machine, "fake_server.py", FAKE_SERVER)
    env = {"FAKE": mode, "FAKE_MARK": mark}
    return {
        "command": [machine.python, path],
        "python": machine.python,
        "env": env,
        "launch": True,
        "local_port": 0,
        **machine.login,
    }


def check_nothing_there(machine: Machine, mark: str, timeout: float = 30) -> None:
    """See that nothing with the mark runs on the machine."""
    until(lambda: not machine.pids(mark), timeout=timeout, what="the remote processes to be gone")


ISOLATE = pytest.mark.parametrize("isolate", [False, True], ids=["in process", "isolated"])


# Ctrl-C.


def dialling(port: int) -> int:
    """Tell how many SYNs to the port wait for an answer."""
    return proc("net/tcp").read_text().count(f"0100007F:{port:04X} 02 ")


@pytest.mark.every_python
def test_interrupt_while_dialling(program: Callable[..., Program]) -> None:
    """Ctrl-C while nothing answers ends it with KeyboardInterrupt."""
    with fakes.black_hole() as port:
        before = dialling(port)
        running = program(
            _WITH,
            "LocalForward",
            "127.0.0.1",
            "me",
            port=port,
            remote_port=1,
            ssh_config=None,
        )
        running.wait_for("Connecting")
        until(lambda: dialling(port) > before, what="it to dial")
        running.interrupt()


@pytest.mark.every_python
@ISOLATE
def test_interrupt_in_the_key_exchange(program: Callable[..., Program], isolate: bool) -> None:
    """Ctrl-C while the server owes us its version or its keys ends it with KeyboardInterrupt."""
    heard = threading.Event()

    def listen(sock: socket.socket, number: int) -> None:
        sock.sendall(b"SSH-2.0-slow\r\n")
        if b"SSH-2.0" in sock.recv(100):
            heard.set()
        fakes.stay(sock)

    with Listener(listen) as silent:
        running = program(
            _WITH,
            "LocalForward",
            "127.0.0.1",
            "me",
            port=silent.port,
            remote_port=1,
            ssh_config=None,
            isolate=isolate,
        )
        assert heard.wait(20)
        running.interrupt()


def test_interrupt_while_the_server_thinks_about_the_login(
    program: Callable[..., Program], tmp_path: Path
) -> None:
    """Ctrl-C while the server owes us its answer to the login ends it with KeyboardInterrupt."""
    with FakeSSH(tmp_path, login=threading.Event()) as fake:
        machine = fake.machine
        running = program(_WITH, "LocalForward", *at(machine), remote_port=1, **machine.login)
        assert fake.asked.wait(20)
        running.interrupt()
        assert fake.login
        fake.login.set()


@pytest.mark.every_python
@ISOLATE
def test_interrupt_at_the_prompt(
    program: Callable[..., Program], embedded: Callable[..., Machine], isolate: bool
) -> None:
    """Ctrl-C while a person is asked for a password ends it with KeyboardInterrupt."""
    machine = embedded(Knobs(password=True))
    login = {**machine.login, "key_filename": None}
    running = program(
        _WITH, "LocalForward", *at(machine), remote_port=1, prompt=True, isolate=isolate, **login
    )
    running.wait_for("asked")
    running.interrupt()
    until(lambda: not machine.server._clients, what="the server to see it go")
    assert PASSWORD not in "".join(running.said)


@ISOLATE
def test_interrupt_while_a_start_file_blocks(
    program: Callable[..., Program], machine: Machine, isolate: bool
) -> None:
    """Ctrl-C while the remote shell is not through its setup ends it, and that too."""
    mark = uuid.uuid4().hex
    keywords = launching(machine, "silent", mark) | {
        "setup": f"sh -c 'sleep 600; : {mark}'",
        "isolate": isolate,
    }
    running = program(_WITH, "DirectTunnel", *at(machine), **keywords)
    running.wait_for("Launching")
    until(lambda: machine.pids(mark), what="the setup to run")
    running.interrupt()
    check_nothing_there(machine, mark)


@pytest.mark.every_python
@ISOLATE
def test_interrupt_while_the_server_starts(
    program: Callable[..., Program], machine: Machine, isolate: bool
) -> None:
    """Ctrl-C while the server does not bind its port ends it and its children, there and here."""
    mark = uuid.uuid4().hex
    running = program(
        _WITH, "DirectTunnel", *at(machine), **launching(machine, "silent child", mark), isolate=isolate
    )
    running.wait_for("Launching")
    until(lambda: machine.pids(mark), what="the grandchild to run")
    running.interrupt()
    check_nothing_there(machine, mark)


@ISOLATE
def test_interrupt_while_the_way_is_proved(
    program: Callable[..., Program], embedded: Callable[..., Machine], isolate: bool
) -> None:
    """Ctrl-C while nothing answers through the tunnel ends it, and the server there."""
    machine = embedded()
    mark = uuid.uuid4().hex
    running = program(
        _WITH, "DirectTunnel", *at(machine), **launching(machine, "child", mark), isolate=isolate
    )
    running.wait_for("Launched")
    until(lambda: machine.pids(mark), what="the grandchild to run")
    running.interrupt()
    check_nothing_there(machine, mark)


@ISOLATE
def test_interrupt_while_the_gateway_does_not_listen(
    program: Callable[..., Program], tmp_path: Path, isolate: bool
) -> None:
    """Ctrl-C while the gateway owes us its answer to ``tcpip-forward`` ends it."""
    asked = threading.Event()

    def silent(server: Any, message: Any) -> bool:
        if b"\rtcpip-forward" in server.seen[-1][1]:
            asked.set()
        return asked.is_set()

    with FakeSSH(tmp_path, on_request=silent) as fake:
        machine = fake.machine
        running = program(_WITH, "RemoteForward", *at(machine), isolate=isolate, **machine.login)
        assert asked.wait(20)
        running.interrupt()


def test_interrupt_in_the_body(program: Callable[..., Program], embedded: Callable[..., Machine]) -> None:
    """Ctrl-C in the body comes out as KeyboardInterrupt, and the gateway's port is free again."""
    machine = embedded()
    running = program(_WITH, "RemoteForward", *at(machine), remote_port=0, **machine.login)
    port = int(running.wait_for("open").split()[2])
    assert port in {p for _, p in machine.listening()}  # the control
    running.interrupt()
    until(lambda: port not in {p for _, p in machine.listening()}, what="the port to be free")


@pytest.mark.every_python
@ISOLATE
def test_interrupt_in_wait_ends_it_cleanly(
    program: Callable[..., Program], embedded: Callable[..., Machine], isolate: bool
) -> None:
    """Ctrl-C in ``wait`` closes everything, and the program goes on after it."""
    machine = embedded()
    code = """
    def tell(main):
        # Not before it waits: Ctrl-C would come out of whatever it did instead.
        while "wait" not in names(sys._current_frames()[main]):
            time.sleep(0.01)
        say("open")
    def names(frame):
        here = frame.f_code.co_filename.endswith("threading.py")
        while here and frame:
            if frame.f_code.co_filename.endswith("lifecycle.py"):
                yield frame.f_code.co_name
            frame = frame.f_back
    with tunnel:
        threading.Thread(target=tell, args=(threading.get_ident(),)).start()
        say("waited", tunnel.wait(), tunnel.state)
    say("after")
    """
    running = program(code, "RemoteForward", *at(machine), remote_port=0, isolate=isolate, **machine.login)
    running.wait_for("open")
    running.signal(signal.SIGINT)
    assert (running.end(), running.errors) == (0, "")
    assert running.said[-3:] == ["Closed", "waited True closed", "after"]
    running.check_gone()


# Ctrl-C once more.


@pytest.mark.every_python
@ISOLATE
def test_second_interrupt_while_cleaning_up(
    program: Callable[..., Program], embedded: Callable[..., Machine], isolate: bool
) -> None:
    """A second Ctrl-C, while a server that will not go is being ended, ends the wait, and the server too."""
    machine = embedded()
    mark = uuid.uuid4().hex
    path = apps.put(machine, "deaf.py", _DEAF)
    folder = str(Path(path).parent)
    running = program(
        _WITH,
        "DirectTunnel",
        *at(machine),
        command=[machine.python, path],
        python=machine.python,
        env={"MARK": mark, "FOLDER": folder},
        launch=True,
        local_port=0,
        isolate=isolate,
        **machine.login,
    )
    running.wait_for("open")
    assert len(machine.pids(mark)) >= 1
    running.signal(signal.SIGINT)
    until(lambda: machine.execute(["test", "-e", f"{folder}/asked-to-go"]).status == 0, what="TERM to arrive")
    assert machine.pids(mark)  # it is deaf to that
    if running.family() and running.pid in running.family():
        running.signal(signal.SIGINT)
    running.end()
    assert running.said.count("interrupted") <= 1
    check_nothing_there(machine, mark)
    running.check_gone()


# Other signals.


@pytest.mark.every_python
@pytest.mark.parametrize("where", ["tunnel.wait()", "threading.Event().wait()", "spin()"])
def test_close_in_a_signal_handler(
    program: Callable[..., Program], embedded: Callable[..., Machine], where: str
) -> None:
    """``close`` from a signal handler works, wherever the main thread is."""
    machine = embedded()
    code = f"""
    class Done(Exception):
        pass

    def close(number, frame):
        tunnel.close()
        say("closed", tunnel.state)
        if {where!r} != "tunnel.wait()":
            raise Done

    def spin():
        while True:
            tunnel.state, tunnel.local_port

    signal.signal(signal.SIGUSR1, close)
    try:
        with tunnel:
            say("open")
            {where}
    except Done:
        pass
    say("after", tunnel.state)
    """
    running = program(code, "RemoteForward", *at(machine), remote_port=0, **machine.login)
    running.wait_for("open")
    running.signal(signal.SIGUSR1)
    assert (running.end(), running.errors) == (0, "")
    assert running.said[-2:] == ["closed closed", "after closed"]


class _Nobody:
    """An address where no connection is ever made: its queue is full (Linux drops what comes then)."""

    def __enter__(self) -> int:
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=0)
        address = self._listener.getsockname()
        self._inside = [socket.socket() for _ in range(4)]
        for sock in self._inside:
            sock.setblocking(False)
            sock.connect_ex(address)
        return int(address[1])

    def __exit__(self, *exc: object) -> None:
        for sock in (self._listener, *self._inside):
            sock.close()


@contextmanager
def stuck(stage: str, directory: Path) -> Iterator[tuple[dict[str, Any], Callable[[], object]]]:
    """Give a login to a server that lets its client wait at that stage for ever, and whether one does."""
    plain = {"host_keys": "accept-new", "known_hosts": str(directory / "known"), "ssh_config": None}
    if stage == "login":
        with FakeSSH(directory, login=threading.Event()) as fake:
            machine = fake.machine
            yield {"host": machine.host, "user": machine.user, **machine.login}, fake.asked.is_set
    elif stage == "dial":
        with _Nobody() as port:
            login = {"host": "127.0.0.1", "user": "me", "port": port, "password": "x", **plain}
            yield login, lambda: True
    else:
        with Listener(fakes.stay) as silent:
            login = {"host": "127.0.0.1", "user": "me", "port": silent.port, "password": "x", **plain}
            yield login, lambda: silent.count


@pytest.mark.parametrize("stage", ["dial", "banner", "login"])
@ISOLATE
def test_close_from_another_thread_while_a_server_is_silent(
    tmp_path: Path, no_leaks: Any, stage: str, isolate: bool
) -> None:
    """Whoever waits for a server that says nothing is free soon after ``close``, not at its deadline."""
    errors: list[BaseException] = []
    with no_leaks(), stuck(stage, tmp_path) as (login, waits):
        connecting = threading.Event()
        forward = LocalForward(
            **{**login, "timeout": 90},
            remote_port=7,
            isolate=isolate,
            on_event=lambda event: connecting.set(),
        )

        def run() -> None:
            try:
                forward.open()
            except BokehSSHError as exc:
                errors.append(exc)

        opener = threading.Thread(target=run)
        opener.start()
        assert connecting.wait(30)
        until(waits, what="the wait")
        forward.close()
        opener.join(30)  # far less than the 90 s that the server has
        assert not opener.is_alive()
    assert isinstance(errors[0], TunnelClosedError)
    assert forward.state == "closed"


@pytest.mark.parametrize("stage", ["dial", "banner", "login"])
def test_close_in_a_signal_handler_while_a_server_is_silent(
    program: Callable[..., Program], tmp_path: Path, stage: str
) -> None:
    """The same from a signal handler, on the very thread that waits."""
    code = """
    signal.signal(signal.SIGUSR1, lambda number, frame: tunnel.close())
    try:
        with tunnel:
            say("open")
    except bokeh_ssh.TunnelClosedError:
        say("given up", tunnel.state)
    """
    with stuck(stage, tmp_path) as (login, waits):
        running = program(code, "LocalForward", remote_port=7, **{**login, "timeout": 90})
        running.wait_for("Connecting")
        until(waits, what="the wait")
        running.signal(signal.SIGUSR1)
        assert (running.end(30), running.errors) == (0, "")
        assert "given up closed" in running.said


# asyncio leaves to the garbage collector what a listener has accepted that closes just then.
@pytest.mark.every_python
@pytest.mark.filterwarnings("ignore:unclosed (transport|<socket):ResourceWarning")
def test_close_in_a_signal_handler_at_any_moment(
    program: Callable[..., Program], embedded: Callable[..., Machine]
) -> None:
    """Wherever it falls into opening and closing, ``close`` from a signal handler blocks nothing."""
    machine = embedded()
    code = """
    import random

    with tunnel:
        pass  # what is imported late is, from here on
    signal.signal(signal.SIGALRM, lambda number, frame: tunnel.close())
    random.seed(5)
    cut = rounds = 0
    opening = 0.1
    while rounds < 40 or (cut < 4 and rounds < 400):  # how often it hits is the machine's affair
        rounds += 1
        signal.setitimer(signal.ITIMER_REAL, random.uniform(0.001, 1.3 * opening))
        began = time.monotonic()
        try:
            with tunnel:
                opening = time.monotonic() - began
                tunnel.wait(0.02)
        except bokeh_ssh.TunnelClosedError:
            cut += 1
        signal.setitimer(signal.ITIMER_REAL, 0)
        assert tunnel.state == "closed", tunnel.state
    say("done", cut)
    pause, deadline = threading.Event(), time.monotonic() + 30
    while threading.active_count() > 1 and time.monotonic() < deadline:
        pause.wait(0.02)
    say("threads", threading.active_count())
    """
    running = program(code, "RemoteForward", *at(machine), remote_port=0, **machine.login)
    assert (running.end(200), running.errors) == (0, ""), running.errors
    assert int(running.wait_for("done").split()[1]) > 3  # the proof that it fell into the opening
    assert running.said[-1] == "threads 1"
    until(lambda: not machine.server._clients, what="the server to see all of them go")
    gc.collect()


def test_close_amid_the_start_of_a_thread(
    embedded: Callable[..., Machine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What Python locks to start a thread, others need to end: a handler that awaits them is free soon."""
    machine = embedded()
    taken: list[Event] = []
    tunnel = RemoteForward(*at(machine), local_port=1, remote_port=0, on_event=taken.append, **machine.login)
    with tunnel:
        pass  # what is imported late is, from here on
    lines = stop = 0

    start = threading.Thread.start

    def trace(frame: FrameType, event: str, arg: object) -> Any:
        nonlocal lines
        lines += event == "line"
        if lines == stop:
            lines += 1
            tunnel.close()  # as a signal handler would
        return trace

    def start_traced(thread: threading.Thread) -> None:
        sys.settrace(trace)
        try:
            start(thread)
        finally:
            sys.settrace(None)

    slow = []
    monkeypatch.setattr(lifecycle, "_HANDLERS", 60.0)
    monkeypatch.setattr(threading.Thread, "start", start_traced)
    while lines >= stop:
        lines, stop = 0, stop + 7
        began = time.monotonic()
        with suppress(TunnelClosedError), tunnel:
            pass
        if time.monotonic() - began > 30:  # its events would be waited for twice as long
            slow.append(stop)
        assert tunnel.state == "closed"
    assert (slow, stop > 100) == ([], True)


# Exceptions.


def test_exception_in_the_body_is_kept_when_the_line_is_down_too(
    embedded: Callable[..., Machine], no_leaks: Any
) -> None:
    """An exception in the body comes out as it was, even where closing finds the line down."""
    machine = embedded()
    with no_leaks():
        forward = LocalForward(machine.host, machine.user, remote_port=1, reconnect=False, **machine.login)
        with pytest.raises(ZeroDivisionError), forward:  # noqa: PT012 - what the body does is the point
            assert machine.server.drop_connections() == 1
            until(lambda: forward.state == "failed", what="the loss")
            raise ZeroDivisionError
        assert forward.state == "closed"


# Fork.

_FORK = """
import multiprocessing, warnings
warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 and newer: fork with threads


def echo():
    with socket.create_connection(("127.0.0.1", tunnel.local_port), timeout=30) as sock:
        sock.sendall(b"x")
        assert sock.recv(1) == b"x"


def use():
    assert tunnel.state == "closed", tunnel.state
    try:
        tunnel.local_port
    except bokeh_ssh.TunnelClosedError:
        pass
    else:
        raise AssertionError("a child has the parent's port")
    tunnel.close()


def child(leave):
    began = time.monotonic()
    pid = os.fork()
    if not pid:
        use()
        leave()
    assert os.waitpid(pid, 0)[1] == 0
    assert time.monotonic() - began < 15, "the child waited for something"
    echo()


def raise_exit():
    raise SystemExit(0)


with tunnel:
    idle = socket.create_connection(("127.0.0.1", tunnel.local_port), timeout=30)
    echo()
    child(lambda: os._exit(0))
    child(raise_exit)  # unwinds the with statement, and runs what is registered for the end
    worker = multiprocessing.get_context("fork").Process(target=use)
    worker.start()
    worker.join()
    assert worker.exitcode == 0
    echo()
    idle.sendall(b"y")
    assert idle.recv(1) == b"y"
    used = time.process_time()
    threading.Event().wait(0.3)
    assert time.process_time() - used < 0.2, "a thread was left spinning"
    assert tunnel.state == "ready"
    say("done")
"""


@pytest.mark.every_python
@ISOLATE
def test_forked_child_leaves_the_connection_alone(
    program: Callable[..., Program], tmp_path: Path, isolate: bool
) -> None:
    """A forked child, however it ends, neither closes nor uses the parent's connection."""
    with FakeSSH(tmp_path) as fake:
        machine = fake.machine
        running = program(
            _FORK, "LocalForward", *at(machine), remote_port=7, isolate=isolate, **machine.login
        )
        status = running.end(100)
        assert (status, running.errors) == (0, ""), running.errors
        assert running.said[-2:] == ["done", "Closed"]
        assert fake.session.count("disconnect") <= 1
        assert fake.count == 1


@pytest.mark.every_python
@ISOLATE
def test_forked_child_does_not_keep_the_connection_open(
    program: Callable[..., Program], embedded: Callable[..., Machine], isolate: bool
) -> None:
    """When the parent dies, the far side sees it at once, though a forked child lives on."""
    machine = embedded()
    code = """
    with tunnel:
        if not os.fork():
            signal.pause()
        say("open", tunnel.local_port, tunnel.remote_port)
        signal.pause()
    """
    running = program(code, "RemoteForward", *at(machine), remote_port=0, isolate=isolate, **machine.login)
    port = int(running.wait_for("open").split()[2])
    assert port in {p for _, p in machine.listening()}  # the control
    running.signal(signal.SIGKILL)
    until(lambda: port not in {p for _, p in machine.listening()}, what="the port to be free")
    assert running.family()  # the child is still there


@pytest.mark.every_python
def test_forked_child_can_open_its_own(program: Callable[..., Program], tmp_path: Path) -> None:
    """In a forked child the same object can be opened again: a connection of its own."""
    code = """
    with tunnel:
        pid = os.fork()
        if not pid:
            with tunnel:
                with socket.create_connection(("127.0.0.1", tunnel.local_port), timeout=30) as sock:
                    sock.sendall(b"x")
                    assert sock.recv(1) == b"x"
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        assert tunnel.state == "ready"
        say("done")
    """
    with FakeSSH(tmp_path) as fake:
        machine = fake.machine
        running = program(code, "LocalForward", *at(machine), remote_port=7, **machine.login)
        running.wait_for("done")
        assert running.end() == 0
        assert fake.count == 2


# kill -9.


@ISOLATE
def test_killed_client_takes_its_server_along(
    program: Callable[..., Program], machine: Machine, isolate: bool
) -> None:
    """After kill -9 of the client the server and its grandchild are gone within the grace time."""
    mark = uuid.uuid4().hex
    keywords = launching(machine, "child", mark) | {"isolate": isolate, "grace": 1}
    running = program(_WITH, "DirectTunnel", *at(machine), **keywords)
    running.wait_for("Launched")
    until(lambda: machine.pids(mark), what="the grandchild to run")
    running.signal(signal.SIGKILL)
    assert running.end() == -signal.SIGKILL
    check_nothing_there(machine, mark)
    running.check_gone()


@ISOLATE
def test_killed_client_frees_the_remote_port(
    program: Callable[..., Program], machine: Machine, isolate: bool
) -> None:
    """After kill -9 of the client the gateway stops listening."""
    running = program(_WITH, "RemoteForward", *at(machine), remote_port=0, isolate=isolate, **machine.login)
    port = int(running.wait_for("open").split()[2])
    assert port in {p for _, p in machine.listening()}  # the control
    running.signal(signal.SIGKILL)
    assert running.end() == -signal.SIGKILL
    until(lambda: port not in {p for _, p in machine.listening()}, what="the port to be free")
    running.check_gone()
