"""The remote Bokeh server: started through a session, held by the supervisor there, ended with it."""

from __future__ import annotations

import contextlib
import importlib.resources
import logging
import re
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable
from urllib.parse import quote

from bokeh_ssh._command import exec_line, opening
from bokeh_ssh._diagnosis import Findings
from bokeh_ssh._events import (
    AppFailed,
    Event,
    Launched,
    Launching,
    OnEvent,
    ServerExited,
    ServerResponsive,
    ServerUnresponsive,
    Warned,
    ignore,
)
from bokeh_ssh._launch import Launch, line
from bokeh_ssh._report import LINES, AppErrors, Reader, Tail, plain
from bokeh_ssh._wait import wait, wait_for

__all__ = ["Launch", "Runner", "Server", "Session"]

_log = logging.getLogger("bokeh_ssh")

#: Left as they are in a URL's path (RFC 3986, pchar), since browsers leave them too.
_UNQUOTED = "/!$&'()*+,;=:@~"

#: Interpreters that are remembered as tried: a bound on what the far side can make us keep.
_TRIED = 10

#: Seconds that a failed or interrupted start may spend on ending what it started.
_ABORT = 1.5


class Session(Protocol):
    """One command that runs on the remote machine. No method blocks; each works from any thread."""

    def write(self, data: bytes) -> None: ...
    def write_eof(self) -> None: ...
    def close(self) -> None: ...


@runtime_checkable
class Signals(Protocol):
    """A session whose command can be sent a signal (RFC 4254, section 6.9)."""

    def signal(self, name: str) -> None: ...


class Runner(Protocol):
    """What runs commands: a connection."""

    @property
    def name(self) -> str: ...
    def run(
        self,
        command: str,
        *,
        on_stdout: Callable[[bytes], None],
        on_stderr: Callable[[bytes], None],
        on_exit: Callable[[int | None], None],
        timeout: float,
    ) -> Session: ...


class Server:
    """A Bokeh server on the remote machine, started by us. Made by :meth:`start`.

    It ends with :meth:`stop`; or, once the session has been down or silent for ``grace`` seconds, by itself.

    :ivar port: the port of that machine's loopback that it listens on
    :ivar pid: its process id there
    :ivar routes: the paths of its apps, ready for a URL; ``"/"`` where it serves none
    :ivar versions: such as ``"Bokeh 3.10.2, Tornado 6.6.1"``
    :ivar exit_status: negative for a signal; None while it runs, and where nobody could tell
    :ivar ended: set once the server has ended or the session is down; :attr:`lost` tells which
    """

    def __init__(self, host: str, launch: Launch, on_event: OnEvent) -> None:
        self.host = host
        self.launch = launch
        self.port = 0
        self.pid = 0
        self.routes: tuple[str, ...] = ()
        self.versions = ""
        self.exit_status: int | None = None
        self.ended = threading.Event()
        self._on_event = on_event
        self._mark = secrets.token_hex(16)
        self._reader = Reader(self._mark)
        self._stderr = Tail()  # of what runs before the server: start files, setup
        self._lines: deque[str] = deque(maxlen=LINES)
        self._failures = AppErrors()
        self._app_errors: deque[str] = deque(maxlen=20)
        self._argv = launch.shown()
        self._tried: list[dict[str, str]] = []
        self._session: Session | None = None
        self._changed = threading.Condition()
        self._stage = "login"  # then shell, python, server, ready
        self._failed: dict[str, Any] | None = None
        self._exited = False  # the server has
        self._over = False  # the session is
        self._session_status: int | None = None
        self._gone = threading.Event()  # the whole remote process group is, or the session
        self._stopping = False
        self._closing = threading.Event()
        self._pulse = threading.Thread(target=self._keep_lease, name=f"bokeh-ssh lease {host}", daemon=True)

    def __repr__(self) -> str:
        state = "ended" if self.ended.is_set() else self._stage
        return f"<{type(self).__name__} of {self.host}, port {self.port}, {state}>"

    # --- starting

    @classmethod
    def start(
        cls,
        runner: Runner,
        launch: Launch,
        *,
        on_event: OnEvent = ignore,
        on_begin: Callable[[Server], object] = lambda server: None,
    ) -> Server:
        """Start a server and wait until it listens.

        Whatever ends this early, Ctrl-C included, also ends what was started; that takes 2 seconds at most.

        :param on_event: gets Launching, Launched, Warned, AppFailed, ServerUnresponsive, ServerResponsive
            and ServerExited; on the connection's thread, so it must not wait for this server
        :param on_begin: gets it before anything is started; :meth:`cancel` then works from another thread
        :raises SessionError: if the account may not run commands
        :raises PythonNotFoundError: if there is no Python that can be used
        :raises BokehNotFoundError: if no Python there has the package, or only one too old
        :raises PortInUseError: if ``port`` was given and is taken there
        :raises LaunchTimeoutError: if it is not ready in time
        :raises LaunchError: if it does not start for another reason, or the machine is none we can run on
        :raises ConnectionLostError: if the connection goes down meanwhile
        """
        server = cls(runner.name, launch, on_event)
        on_begin(server)
        try:
            server._start(runner)
        except BaseException:
            server.cancel()
            raise
        return server

    def _start(self, runner: Runner) -> None:
        deadline = time.monotonic() + self.launch.timeout
        self._tell(Launching(host=self.host, command=self._argv))
        self._session = runner.run(
            exec_line(self._mark),
            on_stdout=self._on_stdout,
            on_stderr=self._on_stderr,
            on_exit=self._on_exit,
            timeout=max(0.1, self.launch.timeout),
        )
        self._answer_hello()
        self._pulse.start()
        with self._changed:
            done = wait_for(
                self._changed,
                lambda: self._stage == "ready" or self._failed or self._exited or self._over,
                deadline - time.monotonic(),
            )
        if self._stage != "ready":
            if done:  # what else it wrote is on its way
                with self._changed:
                    wait_for(self._changed, lambda: self._over, 2)
            raise self._findings().error()
        self._tell(Launched(host=self.host, port=self.port, pid=self.pid, versions=self.versions))
        for route in self.routes:
            if not re.fullmatch(r"[\w./~-]+", route, re.ASCII):
                # Bokeh 3.10 takes the route for a regular expression, and matches it with the quoted path.
                text = f"Bokeh cannot serve {route}: rename the app, with plain letters, digits, - and _ only"
                self._tell(Warned(host=self.host, text=text))

    def _findings(self) -> Findings:
        return Findings(
            host=self.host,
            launch=self.launch,
            stage=self._stage,
            argv=self._argv,
            failed=self._failed,
            tried=self._tried,
            over=self._over,
            status=self._session_status,
            exited=self._exited,
            exit_status=self.exit_status,
            log=self.log,
            before=self._reader.noise.lines + self._stderr.lines,
        )

    def _answer_hello(self) -> None:
        """Send everything once the hello has come and the session is known, whichever comes last."""
        with self._changed:
            session = self._session
            if session is None or self._stage != "shell" or self._closing.is_set():
                return
            self._stage = "python"
        file = importlib.resources.files("bokeh_ssh") / "_supervisor.py"
        session.write(opening(self.launch, self._mark, file.read_bytes()))

    def cancel(self) -> None:
        """End what a start has started so far, as well as can be done within a moment; idempotent."""
        self._stopping = True
        session = self._session
        try:
            if session and not self._over and not self._closing.is_set():
                if self._stage in ("server", "ready"):
                    session.write(line({"do": "stop", "patience": _ABORT / 3}))
                    wait(self._gone, _ABORT)
                elif isinstance(session, Signals):  # a start file or setup that blocks knows no other end
                    session.signal("KILL")
        finally:
            self.close()

    # --- while it runs

    @property
    def log(self) -> tuple[str, ...]:
        """Its last lines, standard output and error together, without escape sequences."""
        return tuple(self._lines)

    @property
    def app_errors(self) -> tuple[str, ...]:
        """What apps raised, as Bokeh wrote it: such an app's page is blank."""
        return tuple(self._app_errors)

    @property
    def lost(self) -> bool:
        """Whether the session went down before the server was seen to end."""
        return self._over and not self._exited

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it has ended or the session is down; False if neither within ``timeout`` seconds."""
        return self.ended.wait(timeout)

    def heartbeat(self) -> None:
        """Tell the supervisor that we are there. A thread of ours does it often enough."""
        if self._session and self._stage in ("server", "ready"):
            self._session.write(line({"do": "lease"}))

    def _keep_lease(self) -> None:
        while not self._closing.wait(max(0.1, self.launch.lease / 3)) and not self._over:
            self.heartbeat()

    # --- ending

    def stop(self, timeout: float = 10) -> bool:
        """End the server and all that it started: TERM, wait, KILL. Idempotent.

        Must not be called on the connection's thread, which brings the answer.

        :param timeout: seconds; KILL comes after six tenths of them
        :returns: whether the remote side has confirmed that nothing is left
        """
        self._stopping = True
        try:
            if self._session and not self._gone.is_set():
                self._session.write(line({"do": "stop", "patience": timeout * 0.6}))
                wait(self._gone, timeout)
            return self._gone.is_set() and not self.lost
        finally:
            self.close()

    def close(self) -> None:
        """Let go of the session; a server that still runs lives on for ``grace`` seconds. Idempotent."""
        self._closing.set()
        session = self._session
        if session:
            session.write_eof()
            session.close()
        if self._pulse.is_alive() and self._pulse is not threading.current_thread():
            self._pulse.join(2)

    # --- what the connection brings, on its own thread

    def _on_stdout(self, data: bytes) -> None:
        for message in self._reader.feed(data):
            handle = getattr(self, "_heard_" + message["event"], None)
            if handle:
                # A message of another shape is another version's, or an attack; neither may end the line.
                with contextlib.suppress(KeyError, TypeError, ValueError, AttributeError):
                    handle(message)

    def _on_stderr(self, data: bytes) -> None:
        self._stderr.feed(data)

    def _on_exit(self, status: int | None) -> None:
        told = self._stage == "ready" and not self._exited and not self._stopping and status is not None
        self._set(_over=True, _session_status=status)
        self._gone.set()
        self.ended.set()
        if told:  # the supervisor was killed, and its keeper ends the server
            self._tell(ServerExited(host=self.host, exit_status=None))

    def _heard_hello(self, _: dict[str, Any]) -> None:
        if self._stage == "login":
            self._set(_stage="shell")
            self._answer_hello()

    def _heard_tried(self, message: dict[str, Any]) -> None:
        if len(self._tried) < _TRIED:
            self._tried.append({key: plain(str(message[key])) for key in ("path", "kind", "text")})

    def _heard_failed(self, message: dict[str, Any]) -> None:
        self._argv = tuple(map(plain, message.get("argv", self._argv)))
        self._set(_failed=message)

    def _heard_crashed(self, message: dict[str, Any]) -> None:
        self._lines.extend(map(plain, str(message["text"]).splitlines()))

    def _heard_started(self, message: dict[str, Any]) -> None:
        self._argv = tuple(map(plain, message["argv"]))
        self._set(_stage="server")

    def _heard_log(self, message: dict[str, Any]) -> None:
        lines = [plain(text) for text in message["lines"]]
        self._lines.extend(lines)
        for text in self._failures.feed(lines):
            self._app_errors.append(text)
            self._tell(AppFailed(host=self.host, traceback=text))

    def _heard_dropped(self, message: dict[str, Any]) -> None:
        self._lines.append(f"[{int(message['lines'])} lines were lost here: the connection was too slow]")

    def _heard_ready(self, message: dict[str, Any]) -> None:
        port, pid = int(message["port"]), int(message["pid"])
        if not 0 < port < 65536:
            return
        routes = [plain(route) for route in message["routes"]]
        self.routes = tuple(quote(route, safe=_UNQUOTED) for route in routes) or ("/",)
        self.versions = plain(message["versions"])
        self._set(port=port, pid=pid, _stage="ready")

    def _heard_stopped(self, _: dict[str, Any]) -> None:
        self._tell(ServerUnresponsive(host=self.host))

    def _heard_continued(self, _: dict[str, Any]) -> None:
        self._tell(ServerResponsive(host=self.host))

    def _heard_exit(self, message: dict[str, Any]) -> None:
        self._set(exit_status=int(message["status"]), _exited=True)
        self.ended.set()
        if self._stage == "ready" and not self._stopping:
            self._tell(ServerExited(host=self.host, exit_status=self.exit_status))

    def _heard_gone(self, _: dict[str, Any]) -> None:
        self._gone.set()
        self.ended.set()

    def _set(self, **values: Any) -> None:
        with self._changed:
            for name, value in values.items():
                setattr(self, name, value)
            self._changed.notify_all()

    def _tell(self, event: Event) -> None:
        try:
            self._on_event(event)
        except Exception:  # noqa: BLE001 - whatever it is, it is the caller's, and must not end the connection
            _log.exception("on_event failed")
