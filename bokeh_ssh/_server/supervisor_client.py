"""The conversation with a supervisor, over one session: what is said, and what it is told to do."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bokeh_ssh._core.errors import BokehSSHError, ConnectionLostError, SessionError, UploadError
from bokeh_ssh._core.events import OnEvent, ServerExited
from bokeh_ssh._core.framing import Reader, Tail
from bokeh_ssh._core.waiting import wait_for
from bokeh_ssh._server.bootstrap import control_client_script, supervisor_input
from bokeh_ssh._server.diagnosis import StartFailure
from bokeh_ssh._server.launch_spec import Launch, encode_message
from bokeh_ssh._server.local_runner import ShellRunner
from bokeh_ssh._server.payload import payload
from bokeh_ssh._server.server_ref import ServerRef
from bokeh_ssh._server.server_state import Secrets, ServerState, Stage
from bokeh_ssh._server.session_ids import new_key
from bokeh_ssh._ssh.remote_shell import exec_line
from bokeh_ssh._ssh.runner import Runner, Session, Signals, Subsystems
from bokeh_ssh._ssh.sftp_writer import Sftp

#: Seconds that a login shell may take to say hello before it is looked why it does not.
HESITATION = 4.0


class SupervisorClient:
    """A session with a supervisor.

    :param adopts: the server to take over; None starts one
    :ivar state: what the supervisor has said
    :ivar uploads: sends it files
    :ivar parted: whether we left the server on purpose
    """

    def __init__(
        self, runner: Runner, launch: Launch, on_event: OnEvent, adopts: ServerRef | None = None
    ) -> None:
        self.host = runner.name
        self.launch = launch
        self.parted = False
        self.state = ServerState(self.host, launch, on_event)
        if adopts:
            self.state.secrets = Secrets(token=adopts.token)
        else:
            key = launch.env.get("BOKEH_SECRET_KEY", "") or new_key() if launch.sign else ""
            self.state.secrets = Secrets(secrets.token_hex(16), key)
        self.uploads = UploadChannel(self, runner)
        self._runner = runner
        self._adopts = adopts
        self._nonce = secrets.token_hex(16)
        self._reader = Reader(self._nonce)
        self._stderr = Tail()  # of what runs before the server: start files, setup
        self._session: Session | None = None
        self._over = False  # the session is
        self._session_status: int | None = None
        self._closing = threading.Event()
        name = f"bokeh-ssh lease {self.host}"
        self._lease_thread = threading.Thread(target=self._keep_lease, name=name, daemon=True)

    # --- beginning

    def begin(self, timeout: float) -> None:
        """Start a shell there that says hello, and answer it."""
        self._session = self._runner.run(
            exec_line(self._nonce),
            on_stdout=self._on_stdout,
            on_stderr=self._stderr.feed,
            on_exit=self._on_exit,
            timeout=max(0.1, timeout),
        )
        if self.launch.brings and not self._adopts:
            self.uploads.open_ahead()  # it opens while the supervisor starts
        self._answer_hello()

    def _answer_hello(self) -> None:
        """Send everything once the hello has come and the session is known, whichever comes last."""
        state = self.state
        with state.changed:
            session = self._session
            if session is None or state.stage is not Stage.SHELL or self._closing.is_set():
                return
            state.stage = Stage.PYTHON
        if self._adopts:
            session.write(self._adopt_order(self._adopts))
        else:
            known = state.secrets
            session.write(
                supervisor_input(
                    self.launch,
                    self._nonce,
                    payload("supervisor"),
                    known.token,
                    known.key,
                    directory=str(Path.cwd()) if isinstance(self._runner, ShellRunner) else "",
                )
            )

    def _adopt_order(self, server_ref: ServerRef) -> bytes:
        pythons = dict.fromkeys(filter(None, (server_ref.python, self.launch.python, "python3", "python")))
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
        return control_client_script(
            list(pythons), env, self._nonce, text, encode_message(order), server_ref.libraries
        )

    def wait_for_stage(self, stage: Stage, deadline: float) -> bool:
        """Wait until it has come so far; False if it never will, or has not by then.

        :param deadline: by ``time.monotonic()``
        """
        state = self.state
        with state.changed:
            wait_for(
                state.changed,
                lambda: state.stage >= stage or self._failed_or_ended(),
                deadline - time.monotonic(),
            )
            return state.stage >= stage

    def find_blocked_login(self, deadline: float) -> str:
        """Find out why the login shell does not say hello; empty where it does by now, or nothing is learnt.

        Another one has nothing to read. What ends, or gets past a start file, has been held up by reading;
        what is only slow does not.

        :param deadline: by ``time.monotonic()``
        """
        state, nonce = self.state, secrets.token_hex(16)
        reader, seen = Reader(nonce), ""

        def note(what: str) -> None:
            nonlocal seen
            with state.changing():
                seen = seen or what

        try:
            session = self._runner.run(
                exec_line(nonce),
                on_stdout=lambda data: note("waits for input") if list(reader.feed(data)) else None,
                on_stderr=lambda data: None,
                on_exit=lambda status: note("runs another shell or program in place of our command"),
                timeout=max(0.1, deadline - time.monotonic()),
            )
        except SessionError:  # one at a time
            return ""
        session.write_eof()
        try:
            for condition, seconds in (
                (lambda: seen, deadline - time.monotonic()),
                (lambda: False, HESITATION),
            ):
                with state.changed:
                    wait_for(
                        state.changed,
                        lambda: condition() or state.stage > Stage.LOGIN or self._failed_or_ended(),  # noqa: B023
                        seconds,
                    )
        finally:
            _kill(session)
            session.close()
        return seen if state.stage is Stage.LOGIN and not self._failed_or_ended() else ""

    def _failed_or_ended(self) -> bool:
        return bool(self.state.evidence.failed) or self.state.exited or self._over

    def failure(self, timeout: float | None = None) -> BokehSSHError:
        """Return why it has not come further.

        :param timeout: the seconds that it was given; None: the launch's own
        """
        state = self.state
        if self._failed_or_ended() and not self._adopts:  # what else it wrote is on its way
            with state.changed:
                wait_for(state.changed, lambda: self._over, 2)
        return StartFailure(
            host=self.host,
            launch=self.launch,
            stage=state.stage,
            evidence=state.evidence,
            over=self._over,
            status=self._session_status,
            exit_status=state.exit_status,
            memory_limit=state.memory_limit,
            log=state.log.lines,
            before=self._reader.noise.lines + self._stderr.lines,
            timeout=timeout,
        ).error()

    # --- while it runs

    @property
    def connected(self) -> bool:
        """Whether there is a session that has not ended."""
        return self._session is not None and not self._over and not self._closing.is_set()

    @property
    def lost(self) -> bool:
        """Whether the session went down before the server was seen to end."""
        return (self._over or self.state.taken) and not self.state.exited and not self.parted

    def send(self, **message: Any) -> None:
        """Send the supervisor a message; nothing where there is no session. Never blocks."""
        if self._session:
            self._session.write(encode_message(message))

    def wait_until(self, condition: Callable[[], object], timeout: float) -> None:
        """Wait for a change that makes the condition true, or for the end of the session.

        :param timeout: seconds
        """
        with self.state.changed:
            wait_for(self.state.changed, lambda: condition() or self._over, timeout)

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
        """Tell the supervisor that we are there, from now on."""
        self._lease_thread.start()

    def heartbeat(self) -> None:
        """Send the supervisor a sign that we are there. :meth:`hold_lease` does it often enough."""
        if self.state.stage >= Stage.UPLOAD:
            self.send(do="lease")

    def _keep_lease(self) -> None:
        while not self._closing.wait(max(0.1, self.launch.lease / 3)) and not self._over:
            self.heartbeat()

    # --- ending

    def kill(self) -> None:
        """End what runs before the supervisor: a start file or setup that blocks knows no other end."""
        if self._session:
            _kill(self._session)

    def close(self) -> None:
        """Close the session; a server that still runs lives on for ``grace`` seconds. Idempotent."""
        self._closing.set()
        self.uploads.close()
        if self._session:
            self._session.write_eof()
            self._session.close()
        if self._lease_thread.is_alive() and self._lease_thread is not threading.current_thread():
            self._lease_thread.join(2)

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
        told = state.stage is Stage.READY and not state.exited and not state.stopping and status is not None
        told = told and not state.taken and not self.parted and not self._closing.is_set()
        # From 128 on it is a signal, as some SSH servers tell it: what was executed was killed, and that need
        # not be the supervisor.
        told = told and (status or 0) < 128
        with state.changing():
            self._over, self._session_status = True, status
        state.gone.set()
        state.ended.set()
        if told:  # the supervisor was killed, and its guardian ends the server
            state.emit(ServerExited(host=self.host, exit_status=None))


def _kill(session: Session) -> None:
    if isinstance(session, Signals):
        session.signal("KILL")


class UploadChannel:
    """Sends files to the folder that a supervisor has made for them.

    :ivar host: the machine
    """

    def __init__(self, client: SupervisorClient, runner: Runner) -> None:
        self.host = client.host
        self._client = client
        self._runner = runner
        self._opened: Sftp | None = None  # ahead
        self._syncs = 0

    @property
    def directory(self) -> str:
        """The path there of the folder; empty where there is none."""
        return self._client.state.upload.directory

    def open_ahead(self) -> None:
        """Open the session that :meth:`open_sftp` will return, while there is no folder yet."""
        self._opened = self._open()

    def open_sftp(self) -> Sftp | None:
        """Open a session to write files below :attr:`directory`; None without one. The caller closes it."""
        opened, self._opened = self._opened, None
        return opened or (self._open() if self.directory else None)

    def _open(self) -> Sftp | None:
        return Sftp(self._runner) if isinstance(self._runner, Subsystems) else None

    def send_order(self, **message: Any) -> None:
        """Send the supervisor what to do with a file (its ``do_put`` and the like); never blocks."""
        self._client.send(**message)

    def request_sync(self) -> int:
        """Ask to be told when all orders so far are done; return a number for :meth:`wait_for_sync`."""
        self._syncs += 1
        self._client.send(do="sync", number=self._syncs)
        return self._syncs

    def wait_for_sync(self, number: int, timeout: float) -> None:
        """Wait until what was ordered before that number is done.

        :param timeout: seconds
        :raises UploadError: if something could not be stored
        :raises ConnectionLostError: if the connection ends, or the supervisor is silent for that long
        """
        state = self._client.state
        upload, evidence = state.upload, state.evidence
        self._client.wait_until(lambda: upload.synced >= number or upload.fault or evidence.failed, timeout)
        with state.changed:
            fault, upload.fault = upload.fault, ""
        if fault:
            msg = f"a file could not be stored in {self.directory} there ({fault})"
            raise UploadError(msg, host=self.host, hint="see whether the disk there is full")
        if upload.synced >= number:
            return
        if evidence.failed or state.exited:
            raise self._client.failure()
        why = f"nothing was heard for {timeout:g} s" if self._client.connected else "the connection ended"
        msg = f"{why} while files were uploaded"
        raise ConnectionLostError(msg, host=self.host, hint="try again")

    def close(self) -> None:
        """Close the session that was opened ahead, if nobody has taken it."""
        if self._opened:
            self._opened.close()
