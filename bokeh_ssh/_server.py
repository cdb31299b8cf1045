"""The remote Bokeh server: started through a session, held by the supervisor there, ended with it."""

from __future__ import annotations

import re
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bokeh_ssh._cargo import program
from bokeh_ssh._command import errand, exec_line, opening
from bokeh_ssh._diagnosis import Findings, refused
from bokeh_ssh._errors import BokehSSHError, ConnectionLostError, LaunchError, UploadError
from bokeh_ssh._events import (
    Launched,
    Launching,
    OnEvent,
    ServerExited,
    Warned,
    ignore,
)
from bokeh_ssh._hearing import Hearing
from bokeh_ssh._launch import Launch, line
from bokeh_ssh._report import Reader, Tail
from bokeh_ssh._runner import Runner, Session, Signals, Subsystems
from bokeh_ssh._sftp import Sftp
from bokeh_ssh._signing import new_key
from bokeh_ssh._ticket import Ticket
from bokeh_ssh._wait import wait, wait_for

__all__ = ["Launch", "Runner", "Server", "Session", "Ticket"]

#: Seconds that a failed or interrupted start may spend on ending what it started.
_ABORT = 1.5


class Server(Hearing):
    """A Bokeh server on the remote machine, started by us. Made by :meth:`start`, or by :meth:`adopt`.

    It ends with :meth:`stop`; or, once the session has been down or silent for ``grace`` seconds, by itself,
    unless it was adopted again meanwhile, or is one that was left running by :meth:`detach`.
    """

    def __init__(self, host: str, launch: Launch, on_event: OnEvent) -> None:
        super().__init__(host, launch, on_event)
        self.key = launch.env.get("BOKEH_SECRET_KEY", "") or new_key() if launch.sign else ""
        self._token = secrets.token_hex(16)
        self._mark = secrets.token_hex(16)
        self._marks = 0
        self._asks: Ticket | None = None  # what is to be adopted
        self._reader = Reader(self._mark)
        self._stderr = Tail()  # of what runs before the server: start files, setup
        self._runner: Runner | None = None
        self._session: Session | None = None
        self._files: Sftp | None = None  # opened ahead
        self._over = False  # the session is
        self._session_status: int | None = None
        self._closing = threading.Event()
        self._pulse = threading.Thread(target=self._keep_lease, name=f"bokeh-ssh lease {host}", daemon=True)

    def __repr__(self) -> str:
        state = "ended" if self.ended.is_set() else self._stage
        where = self.socket or f"port {self.port}"
        return f"<{type(self).__name__} of {self.host}, {where}, {state}>"

    # --- starting

    @classmethod
    def start(
        cls,
        runner: Runner,
        launch: Launch,
        *,
        on_event: OnEvent = ignore,
        on_begin: Callable[[Server], object] = lambda server: None,
        bring: Callable[[Server], object] = lambda server: None,
    ) -> Server:
        """Start a server and wait until it listens.

        Whatever ends this early, Ctrl-C included, also ends what was started; that takes 2 seconds at most.

        :param on_event: gets Launching, Launched, Warned, AppFailed, ServerUnresponsive, ServerResponsive
            and ServerExited; on the connection's thread, so it must not wait for this server
        :param on_begin: gets it before anything is started; :meth:`cancel` then works from another thread
        :param bring: where the launch ``brings`` something, fills the folder that was made for it, by
            :meth:`order`; the time for that does not count as the launch's
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
            server._start(runner, bring)
        except BaseException:
            server.cancel()
            raise
        return server

    def _start(self, runner: Runner, bring: Callable[[Server], object]) -> None:
        deadline = time.monotonic() + self.launch.timeout
        self._tell(Launching(host=self.host, command=self._argv))
        self._runner = runner
        self._session = runner.run(
            exec_line(self._mark),
            on_stdout=self._on_stdout,
            on_stderr=self._on_stderr,
            on_exit=self._on_exit,
            timeout=max(0.1, self.launch.timeout),
        )
        if self.launch.brings:
            self._files = _sftp(runner)  # it opens while the supervisor starts
        self._answer_hello()
        self._pulse.start()
        if self.launch.brings:
            if not self._wait_for_stage("depot", deadline):
                raise self._findings().error()
            bring(self)
            self._say(do="go")
            deadline = time.monotonic() + self.launch.timeout
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
        found = {"port": self.port, "socket": self.socket, "pid": self.pid, "versions": self.versions}
        self._tell(Launched(host=self.host, **found))  # type: ignore[arg-type]  # each its own
        for route in self.routes:
            if not re.fullmatch(r"[\w./~-]+", route, re.ASCII):
                # Bokeh 3.10 takes the route for a regular expression, and matches it with the quoted path.
                text = f"Bokeh cannot serve {route}: rename the app, with plain letters, digits, - and _ only"
                self._tell(Warned(host=self.host, text=text))

    def _wait_for_stage(self, stage: str, deadline: float) -> bool:
        with self._changed:
            wait_for(
                self._changed,
                lambda: self._stage == stage or self._failed or self._over,
                deadline - time.monotonic(),
            )
            return self._stage == stage and not self._failed and not self._over

    # --- what it is brought

    def order(self, **message: Any) -> None:
        """Tell the supervisor what to do with a file (its ``do_put`` and the like); never blocks."""
        self._say(**message)

    def files(self) -> Sftp | None:
        """Open a session to write files below :attr:`depot`, where there are such; whoever asks closes it."""
        files, self._files = self._files, None
        if files is None and self.depot:
            files = _sftp(self._runner)
        return files

    def mark(self) -> int:
        """Have the supervisor say when it has done what was ordered; gives a number for :meth:`arrived`."""
        self._marks += 1
        self._say(do="sync", number=self._marks)
        return self._marks

    def arrived(self, mark: int, timeout: float) -> None:
        """Wait until what was ordered before that mark is done.

        :param timeout: seconds
        :raises UploadError: if something could not be stored
        :raises ConnectionLostError: if the line goes down, or the supervisor is silent for that long
        """
        with self._changed:
            wait_for(
                self._changed,
                lambda: self._synced >= mark or self._fault or self._over or self._failed,
                timeout,
            )
            fault, self._fault = self._fault, ""
        if fault:
            msg = f"a file could not be stored there ({fault})"
            raise UploadError(msg, host=self.host, hint="see whether the disk there is full")
        if self._synced >= mark:
            return
        if self._failed or self._exited:
            raise self._findings().error()
        why = "the connection ended" if self._over else f"nothing was heard for {timeout:g} s"
        msg = f"{why} while files were brought there"
        raise ConnectionLostError(msg, host=self.host, hint="try again")

    # --- coming back

    @property
    def ticket(self) -> Ticket | None:
        """What :meth:`adopt` needs to have this server back; None before it is ready.

        None as well where the machine has no private directory to find a server by; then a server whose
        client is gone cannot be had back, and ends after ``grace`` seconds.
        """
        if self._stage != "ready" or not self._started.get("id"):
            return None
        known = {name: self._started[name] for name in ("id", "node", "python", "libraries", "place")}
        found = {"pid": self.pid, "port": self.port, "socket": self.socket, "routes": self.routes}
        return Ticket(host=self.host, token=self._token, key=self.key, **known, **found)  # type: ignore[arg-type]  # str all

    @classmethod
    def adopt(
        cls,
        runner: Runner,
        ticket: Ticket,
        *,
        launch: Launch,
        on_event: OnEvent = ignore,
        on_begin: Callable[[Server], object] = lambda server: None,
        timeout: float = 30,
    ) -> Server:
        """Take a server over that runs: after a loss, or one that was left running.

        It is as if it had been started through this session: same process, port and routes, its log so far,
        and from now on its messages, and :meth:`stop`. Nothing is started, and an attempt that fails costs
        the server nothing: its grace time begins anew where the attempt had come that far.

        :param ticket: its token takes the server over from any session that still seems to be there; without
            a token, only a server that nobody is attached to is taken over
        :param launch: its ``lease`` and ``grace`` hold from now on; ``env`` counts as far as it decides
            whether Python runs
        :param on_event: as for :meth:`start`; what the log holds already is not told again
        :param on_begin: gets it before anything is run; :meth:`cancel` then works from another thread
        :param timeout: seconds
        :raises ServerExitedError: if the server ended by itself meanwhile; has its status and last lines
        :raises ServerGoneError: if it is no longer there: stopped, out of its grace time, machine restarted
        :raises ServerNotFoundError: if this is another machine than the one it runs on; another attempt may
            reach the right one
        :raises ServerTakenError: if another client is attached
        :raises LaunchTimeoutError: if the supervisor or the shell does not answer in time
        :raises ConnectionLostError: if the connection goes down meanwhile
        :raises SessionError: if the account may not run commands
        :raises PythonNotFoundError: if no Python there runs any more
        """
        server = cls(runner.name, launch, on_event)
        server._asks = ticket
        server._token = ticket.token
        on_begin(server)
        try:
            server._adopt(runner, timeout)
        except BaseException:
            server.close()
            raise
        return server

    def _adopt(self, runner: Runner, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        self._runner = runner
        self._session = runner.run(
            exec_line(self._mark),
            on_stdout=self._on_stdout,
            on_stderr=self._on_stderr,
            on_exit=self._on_exit,
            timeout=max(0.1, timeout),
        )
        self._answer_hello()
        with self._changed:
            wait_for(
                self._changed,
                lambda: self._stage == "ready" or self._failed or self._over,
                deadline - time.monotonic(),
            )
        if self._stage != "ready":
            raise self._refusal(timeout)
        self._pulse.start()

    def _refusal(self, timeout: float) -> BokehSSHError:
        if self._failed:
            return refused(self.host, self._failed)
        return self._findings(timeout=timeout).error()

    def keep(self, timeout: float = 10) -> Ticket:
        """Have the server run on until somebody stops it, whoever comes and goes; we stay with it meanwhile.

        There is no grace time any more, also not after later clients have come and gone. A machine that ends
        all that its users leave behind (``KillUserProcesses=yes`` of systemd-logind) ends it too.

        :returns: what :meth:`adopt` needs
        :raises LaunchError: if the machine has no private directory to find it by again: nothing was changed
        :raises ConnectionLostError: if the remote side does not confirm it; most likely the grace time holds,
            but where only the answer was lost the server is kept
        """
        ticket = self.ticket
        if ticket is None:
            why = self._started.get("nowhere") or "it is not ready"
            msg = f"the server cannot be left running, since nobody could find it again ({why})"
            hint = "make the directory private, or name another one there in BOKEH_SSH_DIR"
            raise LaunchError(msg, host=self.host, hint=hint)
        if self._session:
            self._say(do="detach")
            wait(self._kept, timeout)
        if not self._kept.is_set():
            self._say(do="detach", keep=False)
            msg = "the remote side did not confirm that it lets the server run on"
            raise ConnectionLostError(msg, host=self.host, hint="connect again, and see whether it is there")
        self.detached = True
        return ticket

    def detach(self, timeout: float = 10) -> Ticket:
        """Have the server run on, as :meth:`keep` does, and let go of it.

        :returns: what :meth:`adopt` needs
        :raises LaunchError: as :meth:`keep`
        :raises ConnectionLostError: as :meth:`keep`; the session is closed then too
        """
        try:
            ticket = self.keep(timeout)
        except ConnectionLostError:
            self.close()
            raise
        self._parted = True
        self.close()
        return ticket

    # --- what goes along with it

    @property
    def along(self) -> dict[str, Any]:
        """What the program that goes along with it has said of itself; empty where there is none."""
        return {} if self._along_ended else self._along

    def accompany(self, argv: Sequence[str], env: Mapping[str, str], timeout: float) -> dict[str, Any]:
        """Have the supervisor run a program beside the server, in its environment; it ends with the server.

        Where one runs already, nothing is started.

        :param env: more variables for it
        :param timeout: seconds until it must have said something of itself: a JSON object, on a line of its
            standard output
        :returns: that; empty where it has said nothing
        """
        self._set(_along={}, _along_ended=False)
        self._say(do="accompany", argv=list(argv), env=dict(env))
        with self._changed:
            wait_for(self._changed, lambda: self._along or self._along_ended or self._over, timeout)
            return self._along

    def _findings(self, **other: Any) -> Findings:
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
            **other,
        )

    def _answer_hello(self) -> None:
        """Send everything once the hello has come and the session is known, whichever comes last."""
        with self._changed:
            session = self._session
            if session is None or self._stage != "shell" or self._closing.is_set():
                return
            self._stage = "python"
        if self._asks:
            session.write(self._errand(self._asks))
        else:
            session.write(opening(self.launch, self._mark, program("supervisor"), self._token, self.key))

    def _errand(self, ticket: Ticket) -> bytes:
        pythons = dict.fromkeys(filter(None, (ticket.python, self.launch.python, "python3", "python")))
        order = {
            "do": "adopt",
            "mark": self._mark,
            "id": ticket.id,
            "token": ticket.token,
            "node": ticket.node,
            "grace": self.launch.grace,
            "lease": self.launch.lease,
            "timeout": 10,
        }
        env, text = self.launch.env, program("errand")
        return errand(list(pythons), env, self._mark, text, line(order), ticket.libraries)

    def cancel(self) -> None:
        """End what a start has started so far, as well as can be done within a moment; idempotent."""
        self._stopping = True
        session = self._session
        try:
            if session and not self._over and not self._closing.is_set():
                if self._stage in ("depot", "server", "ready"):
                    self._say(do="stop", patience=_ABORT / 3)
                    wait(self._gone, _ABORT)
                elif isinstance(session, Signals):  # a start file or setup that blocks knows no other end
                    session.signal("KILL")
        finally:
            self.close()

    # --- while it runs

    @property
    def lost(self) -> bool:
        """Whether the session went down before the server was seen to end."""
        return (self._over or self.taken) and not self._exited and not self._parted

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it has ended or the session is down; False if neither within ``timeout`` seconds."""
        return self.ended.wait(timeout)

    def heartbeat(self) -> None:
        """Tell the supervisor that we are there. A thread of ours does it often enough."""
        if self._stage in ("depot", "server", "ready"):
            self._say(do="lease")

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
                self._say(do="stop", patience=timeout * 0.6)
                wait(self._gone, timeout)
            return self._gone.is_set() and not self.lost
        finally:
            self.close()

    def close(self) -> None:
        """Let go of the session; a server that still runs lives on for ``grace`` seconds. Idempotent."""
        self._closing.set()
        session, files = self._session, self._files
        if files:
            files.close()
        if session:
            session.write_eof()
            session.close()
        if self._pulse.is_alive() and self._pulse is not threading.current_thread():
            self._pulse.join(2)

    # --- what the connection brings, on its own thread

    def _on_stdout(self, data: bytes) -> None:
        for message in self._reader.feed(data):
            self._hear(message)

    def _on_stderr(self, data: bytes) -> None:
        self._stderr.feed(data)

    def _on_exit(self, status: int | None) -> None:
        told = self._stage == "ready" and not self._exited and not self._stopping and status is not None
        told = told and not self.taken and not self._parted and not self._closing.is_set()
        self._set(_over=True, _session_status=status)
        self._gone.set()
        self.ended.set()
        if told:  # the supervisor was killed, and its keeper ends the server
            self._tell(ServerExited(host=self.host, exit_status=None))

    def _heard_hello(self, _: dict[str, Any]) -> None:
        if self._stage == "login":
            self._set(_stage="shell")
            self._answer_hello()

    def _say(self, **message: Any) -> None:
        if self._session:
            self._session.write(line(message))


def _sftp(runner: Runner | None) -> Sftp | None:
    return Sftp(runner) if isinstance(runner, Subsystems) else None
