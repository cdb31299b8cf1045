"""The remote Bokeh server: started through a session, held by the supervisor there, ended with it."""

from __future__ import annotations

import contextlib
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bokeh_ssh._core.errors import (
    BokehSSHError,
    ConnectionLostError,
    LaunchError,
    UploadError,
)
from bokeh_ssh._core.events import Launched, Launching, OnEvent, ServerExited, ignore
from bokeh_ssh._core.framing import Reader, Tail
from bokeh_ssh._core.threads import Thread
from bokeh_ssh._core.waiting import wait, wait_for
from bokeh_ssh._server.bootstrap import (
    control_client_script,
    list_pythons,
    login_shell_line,
    supervisor_input,
)
from bokeh_ssh._server.diagnosis import StartFailure, blocked_login, refused
from bokeh_ssh._server.launch_spec import Launch, encode_message
from bokeh_ssh._server.local_runner import ShellRunner
from bokeh_ssh._server.login_probe import HESITATION, find_fault, find_place, send_signal
from bokeh_ssh._server.payload import payload
from bokeh_ssh._server.server_ref import ServerRef
from bokeh_ssh._server.server_state import OnLog, OnPackage, Secrets, ServerState, Stage
from bokeh_ssh._ssh.remote_shell import exec_line
from bokeh_ssh._ssh.runner import Runner, Session, Subsystems
from bokeh_ssh._ssh.sftp_writer import Sftp

#: Seconds that a failed or interrupted start may spend on ending what it started.
_ABORT = 1.5


class Server:
    """A Bokeh server on the remote machine, started by us. Made by :meth:`start`, or by :meth:`adopt`.

    It ends with :meth:`stop`; or, once the session has been down or silent for ``grace`` seconds, by itself,
    unless it was adopted again meanwhile, or is one that was left running by :meth:`detach`.

    :param adopts: the server to take over; None starts one
    :param on_log: gets its lines as they come, on the connection's thread: it must not block
    :param on_package: gets, likewise, the interpreter there and the folder of its Bokeh, while it starts
    :ivar host: the machine, as the user named it
    :ivar launch: what was asked for
    :ivar state: what the supervisor has said
    :ivar uploads: sends files to the folder that it was given for them
    :ivar parted: whether we left the server on purpose
    """

    def __init__(
        self,
        runner: Runner,
        launch: Launch,
        on_event: OnEvent,
        adopts: ServerRef | None = None,
        on_log: OnLog = ignore,
        on_package: OnPackage | None = None,
    ) -> None:
        self.host = runner.name
        self.launch = launch
        self.parted = False
        self.state = ServerState(self.host, launch, on_event, on_log, on_package)
        if adopts:
            self.state.secrets = Secrets(token=adopts.token)
        else:
            key = launch.env.get("BOKEH_SECRET_KEY", "") or secrets.token_hex(32) if launch.sign else ""
            self.state.secrets = Secrets(secrets.token_hex(16), key)
        self.uploads = UploadChannel(self, runner)
        self._on_event = on_event
        self._runner = runner
        self._adopts = adopts
        self._nonce = secrets.token_hex(16)
        self._reader = Reader(self._nonce)
        self._stderr = Tail()  # of what runs before the server: start files, setup
        self._session: Session | None = None
        self._over = False  # the session is
        self._session_status: int | None = None
        self._closing = threading.Event()
        self._lease_thread = Thread(self._keep_lease, name=f"bokeh-ssh lease {self.host}")

    def __repr__(self) -> str:
        state = "ended" if self.ended.is_set() else self.state.stage.name.lower()
        where = self.socket or f"port {self.port}"
        return f"<{type(self).__name__} of {self.host}, {where}, {state}>"

    # --- what is known of it

    @property
    def port(self) -> int:
        """The port of that machine's loopback that it listens on; 0 where it is a socket."""
        return self.state.listening.port

    @property
    def socket(self) -> str:
        """The path of the socket that it listens on; empty where it is a port."""
        return self.state.listening.socket

    @property
    def no_socket(self) -> str:
        """Why it is a port though the launch wanted a socket; empty otherwise."""
        return self.state.listening.no_socket

    @property
    def pid(self) -> int:
        """Its process id there."""
        return self.state.listening.pid

    @property
    def routes(self) -> tuple[str, ...]:
        """The paths of its apps, ready for a URL; ``"/"`` where it serves none."""
        return self.state.listening.routes

    def await_address(self, timeout: float) -> str:
        """Return the path and query that it has written as its address, once that has come; a secret.

        :param timeout: seconds
        :returns: empty where nothing has come, and for one of Bokeh's, which has :attr:`routes`
        """
        self.wait_until(lambda: self.state.log.address, timeout)
        return self.state.log.address

    @property
    def versions(self) -> str:
        """Such as ``"Bokeh 3.10.2, Tornado 6.6.1"``."""
        return self.state.listening.versions

    @property
    def key(self) -> str:
        """What the ids of its sessions must be signed with, a secret; empty where they need not be."""
        return self.state.secrets.key

    @property
    def doomed(self) -> str:
        """What ends it with the session, where the machine ends all that a login has started."""
        return self.state.started.doomed

    @property
    def log(self) -> tuple[str, ...]:
        """Its last lines, standard output and error together, without escape sequences."""
        return self.state.log.lines

    @property
    def exit_status(self) -> int | None:
        """How it ended, negative for a signal; None while it runs, and where nobody knows."""
        return self.state.exit_status

    @property
    def ended(self) -> threading.Event:
        """Set once it has ended or the session is down; :attr:`lost` says which."""
        return self.state.ended

    @property
    def detached(self) -> bool:
        """Whether it runs on without a client, for as long as nobody stops it."""
        return self.state.detached

    @property
    def connected(self) -> bool:
        """Whether there is a session that has not ended."""
        return self._session is not None and not self._over and not self._closing.is_set()

    @property
    def lost(self) -> bool:
        """Whether the session went down before the server was seen to end."""
        return (self._over or self.state.taken) and self.state.exit_status is None and not self.parted

    @property
    def sidecar_status(self) -> dict[str, Any]:
        """What the program that runs beside it has said of itself; empty where there is none."""
        sidecar = self.state.sidecar
        return {} if sidecar.ended else sidecar.status

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it has ended or the session is down; False if neither within ``timeout`` seconds."""
        return self.ended.wait(timeout)

    # --- what is said to its supervisor

    def send(self, **message: Any) -> None:
        """Send the supervisor a message; nothing where there is no session. Never blocks."""
        if self._session:
            self._session.write(encode_message(message))

    def wait_until(self, condition: Callable[[], object], timeout: float) -> bool:
        """Wait until the condition is true, or the session ends; return whether it is true.

        :param timeout: seconds
        """
        with self.state.changed:
            wait_for(self.state.changed, lambda: condition() or self._over, timeout)
            return bool(condition())

    def start_sidecar(self, argv: Sequence[str], env: Mapping[str, str], timeout: float) -> dict[str, Any]:
        """Run a program beside the server, in its environment; it ends with the server.

        Where one runs already, nothing is started.

        :param env: more variables for it
        :param timeout: seconds until it must have said something of itself: a JSON object, on a line of its
            standard output
        :returns: that; empty where it has said nothing
        """
        sidecar = self.state.sidecar
        with self.state.changing():
            sidecar.status, sidecar.ended = {}, False
        self.send(do="accompany", argv=list(argv), env=dict(env))
        self.wait_until(lambda: sidecar.status or sidecar.ended, timeout)
        return sidecar.status

    def hold_lease(self) -> None:
        """Begin to send the supervisor signs that we are there."""
        self._lease_thread.start()

    def heartbeat(self) -> None:
        """Send the supervisor a sign that we are there. :meth:`hold_lease` does it often enough."""
        if self.state.stage >= Stage.UPLOAD:
            self.send(do="lease")

    def _keep_lease(self) -> None:
        while not self._closing.wait(max(0.1, self.launch.lease / 3)) and not self._over:
            self.heartbeat()

    # --- starting

    @classmethod
    def start(
        cls,
        runner: Runner,
        launch: Launch,
        *,
        on_event: OnEvent = ignore,
        on_log: OnLog = ignore,
        on_package: OnPackage | None = None,
        stack: contextlib.ExitStack | None = None,
        bring: Callable[[UploadChannel], object] = ignore,
    ) -> Server:
        """Start a server and wait until it listens.

        Whatever ends this early, Ctrl-C included, also ends what was started; that takes 2 seconds at most.

        :param on_event: gets Launching, Launched, Warned, AppFailed, ServerUnresponsive, ServerResponsive
            and ServerExited; on the connection's thread, so it must not wait for this server
        :param on_log: this and ``on_package`` are as for the class
        :param stack: closing it ends the start too, from another thread
        :param bring: where the launch ``brings`` something, fills the folder that is made for it, which need
            not be there yet; the time for that does not count as the launch's
        :raises SessionError: if the account may not run commands
        :raises PythonNotFoundError: if there is no Python that can be used
        :raises BokehNotFoundError: if no Python there has the package, or only one too old
        :raises PortInUseError: if ``port`` was given and is taken there
        :raises LaunchTimeoutError: if it is not ready in time
        :raises LaunchError: if it does not start for another reason, or the machine is none we can run on
        :raises ConnectionLostError: if the connection goes down meanwhile
        """
        server = cls(runner, launch, on_event, None, on_log, on_package)
        if stack:
            stack.callback(server.cancel)
        try:
            server._start(bring)
        except BaseException:
            server.cancel()
            raise
        return server

    def _start(self, bring: Callable[[UploadChannel], object]) -> None:
        state = self.state
        deadline = time.monotonic() + self.launch.timeout
        self._on_event(Launching(host=self.host, command=state.evidence.argv))
        self.begin(self.launch.timeout)
        self.hold_lease()
        self._await_shell(deadline)
        if self.launch.brings:
            if not self.wait_for_stage(Stage.PYTHON, deadline):
                raise self.failure()
            self.uploads.deadline = deadline
            bring(self.uploads)
            self.send(do="go")
            deadline = time.monotonic() + self.launch.timeout
        if not self.wait_for_stage(Stage.READY, deadline):
            raise self.failure()
        found = {"port": self.port, "socket": self.socket, "pid": self.pid, "versions": self.versions}
        compressed = bool(state.listening.packed) or state.evidence.compresses
        self._on_event(Launched(host=self.host, compressed=compressed, **found))  # type: ignore[arg-type]
        if self.doomed:
            state.warn(f"the server ends when the connection does ({self.doomed}), so a loss ends it")
        self.launch.check_routes(self.routes, self.host)

    def begin(self, timeout: float) -> None:
        """Start a shell there that says hello, and answer it."""
        self._session = self._runner.run(
            exec_line(self._nonce),
            on_stdout=self._on_stdout,
            on_stderr=self._stderr.feed,
            on_exit=self._on_exit,
            timeout=max(0.1, timeout),
        )
        self._answer_hello()

    def _answer_hello(self) -> None:
        """Send everything once the hello has come and the session is known, whichever comes last."""
        state = self.state
        with state.changed:
            session = self._session
            if session is None or state.stage is not Stage.SHELL or self._closing.is_set():
                return
            session.write(self._adopt_order(self._adopts) if self._adopts else self._start_order())
            with state.changing(Stage.PYTHON):  # what others write comes after that
                pass

    def _start_order(self) -> bytes:
        known = self.state.secrets
        return supervisor_input(
            self.launch,
            self._nonce,
            payload("supervisor"),
            known.token,
            known.key,
            directory=str(Path.cwd()) if isinstance(self._runner, ShellRunner) else "",
        )

    def _adopt_order(self, server_ref: ServerRef) -> bytes:
        order = {
            "do": "adopt",
            "mark": self._nonce,
            "id": server_ref.id,
            "token": server_ref.token,
            "node": server_ref.node,
            "supervisor": server_ref.supervisor,
            "grace": self.launch.grace,
            "lease": self.launch.lease,
            "timeout": 10,
        }
        env, text = self.launch.env, payload("control_client")
        pythons = list_pythons(server_ref.python, self.launch.python)
        return control_client_script(
            pythons, env, self._nonce, text, encode_message(order), server_ref.libraries
        )

    def wait_for_stage(self, stage: Stage, deadline: float) -> bool:
        """Wait until it has come so far; False if it never will, or has not by then.

        :param deadline: by ``time.monotonic()``
        """
        state = self.state
        self.wait_until(lambda: state.stage >= stage or self._failed_or_ended(), deadline - time.monotonic())
        return state.stage >= stage

    def _await_shell(self, deadline: float) -> None:
        """Wait until start files are over, those of ``setup`` included; if that takes long, see why.

        :param deadline: by ``time.monotonic()``
        :raises LaunchError: if our command is never run
        """
        state, evidence = self.state, self.state.evidence

        def is_past() -> bool:
            return state.stage > Stage.LOGIN or self._failed_or_ended()

        def has_begun() -> bool:
            return bool(evidence.begun) or self._failed_or_ended()

        def note(place: str) -> None:
            evidence.place = place
            seconds = time.monotonic() - began
            why = f"it is in {place}" if place else "a start file, or what the login itself runs, may be slow"
            state.warn(f"the login has not come as far as our command after {seconds:.0f} s: {why}")

        began = time.monotonic()
        if not self.wait_until(is_past, min(HESITATION, deadline - began)):
            fault = find_fault(self._runner, state.changed, is_past, deadline, note)
            if fault:
                raise blocked_login(self.host, fault, self._reader.last_words(self._stderr), evidence.argv)
            self.wait_until(is_past, deadline - time.monotonic())
        began = time.monotonic()
        if not self.launch.setup or began + 2 * HESITATION > deadline:
            return
        if not self.wait_until(has_begun, 2 * HESITATION):
            place = find_place(self._runner, state.changed, has_begun, login_shell_line)
            if place:
                note(place)

    def _failed_or_ended(self) -> bool:
        return bool(self.state.evidence.failed) or self.state.exit_status is not None or self._over

    def failure(self, timeout: float | None = None) -> BokehSSHError:
        """Return why it has not come further.

        :param timeout: the seconds that it was given; None: the launch's own
        """
        state = self.state
        if self._failed_or_ended() and not self._adopts:  # what else it wrote is on its way
            self.wait_until(lambda: self._over, 2)
        return StartFailure(
            host=self.host,
            launch=self.launch,
            stage=state.stage,
            evidence=state.evidence,
            over=self._over,
            status=self._session_status,
            exit_status=state.exit_status,
            log=state.log.lines,
            before=self._reader.noise.lines + self._stderr.lines,
            timeout=timeout,
        ).error()

    # --- coming back

    @property
    def server_ref(self) -> ServerRef | None:
        """What :meth:`adopt` needs to have this server back; None before it is ready.

        None as well where the machine has no private directory to find a server by; then a server whose
        client is gone cannot be taken over again, and ends after ``grace`` seconds.
        """
        return self.adoptable_ref if self.state.started.id else None

    @property
    def adoptable_ref(self) -> ServerRef | None:
        """What :meth:`adopt` needs, as :attr:`server_ref`; where nobody finds it, what ends it."""
        started, listening, known = self.state.started, self.state.listening, self.state.secrets
        if self.state.stage is not Stage.READY or not (started.id or started.identity):
            return None
        more = {"host": self.host, "supervisor": started.identity}
        return ServerRef.of({**vars(started), **vars(listening), **vars(known), **more})

    @classmethod
    def adopt(
        cls,
        runner: Runner,
        server_ref: ServerRef,
        *,
        launch: Launch,
        on_event: OnEvent = ignore,
        on_log: OnLog = ignore,
        stack: contextlib.ExitStack | None = None,
        timeout: float = 30,
    ) -> Server:
        """Take a server over that runs: after a loss, or one that was left running.

        It is as if it had been started through this session: same process, port and routes, its log so far,
        and from now on its messages, and :meth:`stop`. Nothing is started, and an attempt that fails costs
        the server nothing: its grace time begins again where the attempt had come that far. Only one that
        runs and cannot be found any more, since its private directory is gone, is ended: there are never two.

        :param server_ref: its token takes the server over from any session that still seems to be there;
            without a token, only a server that nobody is attached to is taken over
        :param launch: its ``lease`` and ``grace`` hold from now on; ``env`` counts as far as it decides
            whether Python runs
        :param on_event: as for :meth:`start`; what the log holds already is not reported again
        :param on_log: as for the class
        :param stack: closing it ends the attempt too, from another thread
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
        server = cls(runner, launch, on_event, server_ref, on_log)
        if stack:
            stack.callback(server.close)
        try:
            server._adopt(timeout)
        except BaseException:
            server.close()
            raise
        return server

    def _adopt(self, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        self.begin(timeout)
        if not self.wait_for_stage(Stage.READY, deadline):
            failed = self.state.evidence.failed
            raise refused(self.host, failed) if failed else self.failure(timeout)
        self.hold_lease()

    def keep(self, timeout: float = 10) -> ServerRef:
        """Keep the server running until somebody stops it, whoever comes and goes; we stay with it meanwhile.

        There is no grace time any more, also not after later clients have come and gone.

        :returns: what :meth:`adopt` needs
        :raises LaunchError: if the machine has no private directory to find it by again, or ends all that its
            users leave behind (``KillUserProcesses=yes`` of systemd-logind): nothing was changed
        :raises ConnectionLostError: if the remote side does not confirm it; most likely the grace time holds,
            but where only the answer was lost the server is kept
        """
        server_ref = self.server_ref
        if server_ref is None:
            why = self.state.started.nowhere or "it is not ready"
            msg = f"the server cannot be left running, since nobody could find it again ({why})"
            hint = "have one of them be private, with room in it, or name another one in BOKEH_SSH_DIR"
            raise LaunchError(msg, host=self.host, hint=hint)
        if self.doomed:
            msg = f"the server cannot be left running, since it ends when the connection does ({self.doomed})"
            hint = "ask the administrator to spare your account, or run it by other means than a login"
            raise LaunchError(msg, host=self.host, hint=hint)
        if self.connected:
            self.send(do="detach")
            wait(self.state.kept, timeout)
        if not self.state.kept.is_set():
            self.send(do="detach", keep=False)
            msg = "the remote side did not confirm that it lets the server run on"
            raise ConnectionLostError(msg, host=self.host, hint="connect again, and see whether it is there")
        self.state.detached = True
        return server_ref

    def detach(self, timeout: float = 10) -> ServerRef:
        """Keep the server running, as :meth:`keep` does, and let go of it.

        :returns: what :meth:`adopt` needs
        :raises LaunchError: as :meth:`keep`
        :raises ConnectionLostError: as :meth:`keep`; the session is closed then too
        """
        try:
            server_ref = self.keep(timeout)
        except ConnectionLostError:
            self.close()
            raise
        self.parted = True
        self.close()
        return server_ref

    def cancel(self) -> None:
        """End what a start has started so far, as well as can be done within a moment; idempotent."""
        self.state.stopping = True
        try:
            if self.connected:
                if self.state.stage >= Stage.UPLOAD:
                    self.send(do="stop", patience=_ABORT / 3)
                    wait(self.state.gone, _ABORT)
                elif self._session:  # a start file or setup that blocks knows no other end
                    send_signal(self._session, "KILL")
        finally:
            self.close()

    # --- ending

    def stop(self, timeout: float = 10) -> bool:
        """End the server and all that it started: TERM, wait, KILL. Idempotent.

        Must not be called on the connection's thread, which brings the answer.

        :param timeout: seconds; KILL comes after six tenths of them
        :returns: whether the remote side has confirmed that nothing is left
        """
        self.state.stopping = True
        gone = self.state.gone
        try:
            if not gone.is_set():
                self.send(do="stop", patience=timeout * 0.6)
                wait(gone, timeout)
            return gone.is_set() and not self.lost
        finally:
            self.close()

    def close(self) -> None:
        """Let go of the session; a server that still runs lives on for ``grace`` seconds. Idempotent."""
        self._closing.set()
        if self._session:
            self._session.write_eof()
            self._session.close()
        self._lease_thread.join(2)

    def await_close(self, timeout: float) -> None:
        """Wait until the other side has closed the session as well.

        Dropbear (2022.83) closes a session whose program is asked for while that of another ends.
        """
        self.wait_until(lambda: not self._session, timeout)

    # --- what the connection brings, on its own thread

    def _on_stdout(self, data: bytes) -> None:
        for message in self._reader.feed(data):
            self._receive(message)

    def _receive(self, message: dict[str, Any]) -> None:
        state, event = self.state, message["event"]
        if event == "hello":
            if state.stage is Stage.LOGIN:
                with state.changing(Stage.SHELL):
                    pass
                self._answer_hello()
            return
        if event == "exit" or (event == "refused" and message.get("why") == "exited"):
            self.send(do="seen")
        state.receive(message)

    def _on_exit(self, status: int | None) -> None:
        state = self.state
        killed = (
            state.stage is Stage.READY
            and state.exit_status is None
            and not state.stopping
            and status is not None
        )
        killed = killed and not state.taken and not self.parted and not self._closing.is_set()
        # From 128 on it is a signal, as some SSH servers report it: what was executed was killed, and that
        # need not be the supervisor.
        killed = killed and (status or 0) < 128
        with state.changing():
            self._over, self._session_status = True, status
        state.gone.set()
        state.ended.set()
        if killed:  # the supervisor was killed, and its guardian ends the server
            state.emit(ServerExited(host=self.host, exit_status=None))


class UploadChannel:
    """Sends files to the folder that a supervisor makes for them.

    Orders can be sent as soon as the supervisor is under way: it does them once it has made the folder.

    :ivar host: the machine
    :ivar deadline: when the folder has to be there, by ``time.monotonic()``
    """

    def __init__(self, server: Server, runner: Runner) -> None:
        self.host = server.host
        self.deadline = 0.0
        self._server = server
        self._runner = runner
        self._syncs = 0

    @property
    def directory(self) -> str:
        """The path there of the folder; empty where there is none."""
        return self._server.state.upload.directory

    def wait_for_directory(self) -> None:
        """Wait until the folder is there.

        :raises BokehSSHError: if the launch fails before, or takes too long
        """
        if not self._server.wait_for_stage(Stage.UPLOAD, self.deadline):
            raise self._server.failure()

    def open_sftp(self) -> Sftp | None:
        """Open a session to write files below :attr:`directory`; None without one. The caller closes it."""
        return Sftp(self._runner) if isinstance(self._runner, Subsystems) else None

    def send_order(self, **message: Any) -> None:
        """Send the supervisor what to do with a file (its ``do_put`` and the like); never blocks."""
        self._server.send(**message)

    def request_sync(self, *, go: bool = False) -> int:
        """Ask for an answer once all orders so far are done; return a number for :meth:`wait_for_sync`.

        :param go: whether the server is to be started then, if all could be stored
        """
        self._syncs += 1
        self._server.send(do="sync", number=self._syncs, go=go)
        return self._syncs

    def wait_for_sync(self, number: int, timeout: float) -> None:
        """Wait until what was ordered before that number is done.

        :param timeout: seconds
        :raises UploadError: if something could not be stored
        :raises ConnectionLostError: if the connection ends, or the supervisor is silent for that long
        :raises BokehSSHError: if the launch fails before
        """
        self.wait_for_directory()
        state = self._server.state
        upload, evidence = state.upload, state.evidence
        self._server.wait_until(lambda: upload.synced >= number or upload.fault or evidence.failed, timeout)
        with state.changed:
            fault, upload.fault = upload.fault, ""
        if fault:
            msg = f"a file could not be stored in {self.directory} there ({fault})"
            raise UploadError(msg, host=self.host, hint="see whether the disk there is full")
        if upload.synced >= number:
            return
        if evidence.failed or state.exit_status is not None:
            raise self._server.failure()
        why = f"nothing was heard for {timeout:g} s" if self._server.connected else "the connection ended"
        msg = f"{why} while files were uploaded"
        raise ConnectionLostError(msg, host=self.host, hint="try again")
