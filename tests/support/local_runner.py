"""A connection that is none: runs commands through a shell of this machine, as ``Connection.run`` would.

:class:`Bench` starts servers on it. Callbacks come on one thread of the runner's own, in order, and the exit
last. Needs POSIX.
"""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import selectors
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from beds import until
from bokeh_ssh._core.errors import BokehSSHError
from bokeh_ssh._core.events import Event
from bokeh_ssh._remote import process_tree
from bokeh_ssh._server.launch_spec import Launch
from bokeh_ssh._server.server import Server, UploadChannel

#: A command that starts at once in place of Bokeh.
FAKE = (sys.executable, "-S", str(Path(__file__).with_name("fake_server.py")))


def processes(marker: str) -> set[int]:
    """List the processes that have ``marker`` in their command line and are no zombies."""
    listing = subprocess.run(["ps", "-A", "-ww", "-o", "pid=,stat=,args="], capture_output=True, check=True)
    rows = [line.split(None, 2) for line in listing.stdout.decode("utf-8", "replace").splitlines()]
    return {int(row[0]) for row in rows if len(row) == 3 and marker in row[2] and "Z" not in row[1]}


def pythons(version: str) -> list[str]:
    """List the interpreters of one version, such as "3.8", that this machine has on PATH or in pyenv."""
    home = Path(pwd.getpwuid(os.getuid()).pw_dir)  # HOME is the test's own
    versions = Path(os.environ.get("PYENV_ROOT", home / ".pyenv")) / "versions"
    found = [shutil.which(f"python{version}"), *map(str, sorted(versions.glob(f"{version}*/bin/python")))]
    return [
        path
        for path in found
        if path and subprocess.run([path, "-c", ""], capture_output=True).returncode == 0
    ]


class LocalSession:
    """One command. Leads a process group and session of its own, as under sshd."""

    def __init__(
        self,
        argv: list[str],
        env: Mapping[str, str] | None,
        cwd: str | Path | None,
        on_stdout: Callable[[bytes], None],
        on_stderr: Callable[[bytes], None],
        on_exit: Callable[[int | None], None],
    ) -> None:
        self.process = subprocess.Popen(
            argv,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=env,
            cwd=cwd,
            start_new_session=True,
            bufsize=0,
        )
        assert self.process.stdin
        assert self.process.stdout
        assert self.process.stderr
        self._stdin, self._stdout, self._stderr = self.process.stdin, self.process.stdout, self.process.stderr
        self.written = bytearray()  # all that went to standard input
        self.received = bytearray()  # all that came from standard output
        self.signals: list[str] = []
        self.ended = threading.Event()
        self._callbacks = {1: on_stdout, 2: on_stderr}
        self._on_exit = on_exit
        self._out = bytearray()
        self._eof = False
        self._closed = False
        self.stalled = threading.Event()  # a test sets it: nothing is read any more
        self._wake, self._wakes = os.pipe()
        self._reap = threading.Thread(target=self._wait, name="local session wait", daemon=True)
        self._loop = threading.Thread(target=self._run, name="local session", daemon=True)
        self._reap.start()
        self._loop.start()

    # what Session promises

    def write(self, data: bytes) -> None:
        self.written += data
        self._out += data
        self._poke()

    def write_eof(self) -> None:
        self._eof = True
        self._poke()

    def close(self) -> None:
        self._closed = True
        self._poke()

    def signal(self, name: str) -> None:
        self.signals.append(name)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, getattr(signal, f"SIG{name}"))

    # the rest

    def vanish(self) -> None:
        """End as if the client was killed: both ends of the line just close."""
        self._out.clear()
        self.close()
        self._loop.join(30)

    def end(self) -> None:
        """Close it, and see to it that the command ends: one that does not is killed, and the test fails."""
        self.close()
        self._loop.join(30)
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.signal("KILL")
            raise

    def _poke(self) -> None:
        with contextlib.suppress(OSError):
            os.write(self._wakes, b".")

    def _wait(self) -> None:
        self.process.wait()
        self._poke()

    def _run(self) -> None:
        status: int | None = None
        try:
            status = self._pump()
        finally:
            self._stdout.close()
            self._stderr.close()
            with contextlib.suppress(OSError):
                self._stdin.close()
            self.ended.set()
            self._on_exit(status)

    def _pump(self) -> int | None:
        selector = selectors.DefaultSelector()
        with selector:
            selector.register(self._wake, selectors.EVENT_READ, 0)
            streams = {1: self._stdout, 2: self._stderr}
            for number, stream in streams.items():
                os.set_blocking(stream.fileno(), False)
                selector.register(stream, selectors.EVENT_READ, number)
            os.set_blocking(self._stdin.fileno(), False)
            open_streams = 2
            while True:
                for key, _ in selector.select(0.5):
                    if key.data == 0:
                        os.read(self._wake, 4096)
                        continue
                    if self.stalled.is_set():
                        selector.unregister(key.fileobj)
                        continue
                    data = os.read(key.fd, 65536)
                    if key.data == 1:
                        self.received += data
                    if data:
                        self._callbacks[key.data](data)
                    else:
                        selector.unregister(key.fileobj)
                        open_streams -= 1
                self._feed()
                status = self.process.poll()
                if self._closed:
                    return None if status is None else status
                if status is not None and (not open_streams or not self._more(selector)):
                    return status

    def _more(self, selector: selectors.BaseSelector) -> bool:
        # A daemon of a start file may hold the streams open: what is there counts, not their end.
        return any(key.data for key, _ in selector.select(0))

    def _feed(self) -> None:
        stdin = self._stdin
        if stdin.closed:
            return
        try:
            while self._out:
                sent = os.write(stdin.fileno(), self._out[:65536])
                del self._out[:sent]
        except BlockingIOError:
            self._poke()  # a busy wait, but nothing here fills a pipe for long
            return
        except BrokenPipeError:
            self._out.clear()
            return
        if self._eof or self._closed:
            stdin.close()


class LocalRunner:
    """Runs commands through ``[*shell, "-c", command]``.

    :ivar sessions: those made, the newest last
    """

    name = "local.test"

    def __init__(
        self,
        *shell: str,
        env: Mapping[str, str] | None = None,
        cwd: str | Path | None = None,
    ) -> None:
        self.shell = list(shell or ("/bin/sh",))
        self.env = env
        self.cwd = cwd
        self.commands: list[str] = []
        self.sessions: list[LocalSession] = []

    def run(
        self,
        command: str,
        *,
        on_stdout: Callable[[bytes], None],
        on_stderr: Callable[[bytes], None],
        on_exit: Callable[[int | None], None],
        timeout: float,
    ) -> LocalSession:
        self.commands.append(command)
        argv = [*self.shell, "-c", command]
        session = LocalSession(argv, self.env, self.cwd, on_stdout, on_stderr, on_exit)
        self.sessions.append(session)
        return session


class Bench:
    """Starts servers, and ends them with the test."""

    def __init__(self, tmp_path: Path) -> None:
        self.path = tmp_path
        self.events: list[Event] = []
        self.servers: list[Server] = []
        self.runners: list[LocalRunner] = []

    def runner(self, *shell: str, **env: str) -> LocalRunner:
        env = {**os.environ, **env}
        env.pop("PYTHONUNBUFFERED", None)  # a remote account rarely has it
        runner = LocalRunner(*shell, env=env)
        self.runners.append(runner)
        return runner

    def start(
        self,
        runner: LocalRunner | None = None,
        bring: Callable[[UploadChannel], object] = lambda uploads: None,
        **launch: Any,
    ) -> Server:
        launch.setdefault("python", sys.executable)
        runner = runner or self.runner()
        server = Server.start(runner, Launch(**launch), on_event=self.events.append, bring=bring)
        self.servers.append(server)
        return server

    def fails(self, kind: type[BokehSSHError], runner: LocalRunner | None = None, **launch: Any) -> Any:
        """Start what must fail with exactly ``kind``; all processes of the session must be gone."""
        runner = runner or self.runner()
        with pytest.raises(kind) as caught:
            self.start(runner, **launch)
        assert type(caught.value) is kind
        assert caught.value.host == runner.name
        assert runner.sessions[-1].process.wait(20) is not None
        return caught.value

    def script(self, name: str, text: str) -> str:
        path = self.path / name
        path.write_text(text)
        path.chmod(0o755)
        return str(path)

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            for server in self.servers:
                server.stop()
        finally:
            for runner in self.runners:
                for session in runner.sessions:
                    session.end()


class Held:
    """A fake server with a grandchild, and all that is known of it."""

    def __init__(self, bench: Bench, mark: str, fake: str = "child", **launch: Any) -> None:
        self.mark = mark
        self.bench = bench
        self.go = bench.path / "go"
        env = {"FAKE": fake, "FAKE_MARK": mark, "FAKE_GO": str(self.go), **launch.pop("env", {})}
        self.server: Server = bench.start(command=FAKE, env=env, **launch)
        self.session: LocalSession = bench.runners[-1].sessions[-1]
        self.anchor = self.session.process.pid  # each step of the way has replaced the one before
        self.supervisor: int = self.heard("started")[-1]["supervisor"]
        if "child" in fake:
            until(self.grandchildren, what="the grandchild runs")

    def grandchildren(self) -> set[int]:
        return processes(self.mark)

    @property
    def guardian(self) -> int:
        """The parent of what was started, which leads the server's group."""
        return process_tree.table()[os.getpgid(self.server.pid)][0]

    def kill_holders(self) -> None:
        """Kill guardian and supervisor at once: neither sees the other go."""
        guardian = self.guardian
        os.kill(self.supervisor, signal.SIGSTOP)
        for pid in (guardian, self.supervisor):
            os.kill(pid, signal.SIGKILL)
        self.session.process.wait(20)

    def alive(self) -> bool:
        return alive(self.server.pid)

    def check_gone(self) -> None:
        """Nothing of the remote side is left."""
        until(lambda: not self.grandchildren() and not self.alive(), what="the group is gone")
        assert self.session.process.wait(20) is not None

    def heard(self, event: str) -> list[dict[str, Any]]:
        """List the messages of one kind that came."""
        return heard(self.server, self.session, event)


def heard(server: Server, session: LocalSession, event: str) -> list[dict[str, Any]]:
    """List the messages of one kind that came from a server's supervisor."""
    whole = bytes(session.received).rpartition(b"\n")[0]  # of what comes after it, some is on its way
    lines = whole.decode("utf-8", "replace").splitlines()
    found = (line.partition(server._nonce)[2] for line in lines)
    messages = [json.loads(text) for text in found if text.startswith("{")]
    return [message for message in messages if message["event"] == event]


def alive(pid: int) -> bool:
    done = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True)
    return done.stdout.strip()[:1] not in ("", "Z")


def kinds(bench: Bench, *wanted: type[Event]) -> list[type[Event]]:
    return [type(event) for event in bench.events if type(event) in wanted]
