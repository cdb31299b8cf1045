"""The conversation with a supervisor, over one session: what is said, and what it is told to do."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from bokeh_ssh._core.errors import ConnectionLostError, UploadError
from bokeh_ssh._core.events import OnEvent, ServerExited
from bokeh_ssh._core.framing import Reader, Tail
from bokeh_ssh._core.waiting import wait_for
from bokeh_ssh._server.bootstrap import control_client_script, supervisor_input
from bokeh_ssh._server.diagnosis import StartFailure
from bokeh_ssh._server.launch_spec import Launch, encode_message
from bokeh_ssh._server.payload import payload
from bokeh_ssh._server.server_ref import ServerRef
from bokeh_ssh._server.server_state import ServerState
from bokeh_ssh._server.session_ids import new_key
from bokeh_ssh._ssh.remote_shell import exec_line
from bokeh_ssh._ssh.runner import Runner, Session, Subsystems
from bokeh_ssh._ssh.sftp_writer import Sftp


class SupervisorClient(ServerState):
    """What is said to a supervisor, and the session that it is said over."""

    def __init__(self, host: str, launch: Launch, on_event: OnEvent) -> None:
        super().__init__(host, launch, on_event)
        self.key = launch.env.get("BOKEH_SECRET_KEY", "") or new_key() if launch.sign else ""
        self._token = secrets.token_hex(16)
        self._nonce = secrets.token_hex(16)
        self._syncs = 0
        self._adopts: ServerRef | None = None  # what is to be adopted
        self._reader = Reader(self._nonce)
        self._stderr = Tail()  # of what runs before the server: start files, setup
        self._runner: Runner | None = None
        self._session: Session | None = None
        self._files: Sftp | None = None  # opened ahead
        self._over = False  # the session is
        self._session_status: int | None = None
        self._closing = threading.Event()
        self._lease_thread = threading.Thread(
            target=self._keep_lease, name=f"bokeh-ssh lease {host}", daemon=True
        )

    # --- beginning

    def _begin(self, runner: Runner, timeout: float) -> None:
        """Start a shell there that says hello, and answer it."""
        self._runner = runner
        self._session = runner.run(
            exec_line(self._nonce),
            on_stdout=self._on_stdout,
            on_stderr=self._on_stderr,
            on_exit=self._on_exit,
            timeout=max(0.1, timeout),
        )
        if self.launch.brings and not self._adopts:
            self._files = _sftp(runner)  # it opens while the supervisor starts
        self._answer_hello()

    def _start_failure(self, **other: Any) -> StartFailure:
        return StartFailure(
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
        if self._adopts:
            session.write(self._adopt_order(self._adopts))
        else:
            session.write(
                supervisor_input(self.launch, self._nonce, payload("supervisor"), self._token, self.key)
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

    def _wait_for_stage(self, stage: str, deadline: float) -> bool:
        """Wait until it has come so far; False if it never will, or has not by then."""
        with self._changed:
            wait_for(
                self._changed,
                lambda: self._stage == stage or self._failed_or_ended(),
                deadline - time.monotonic(),
            )
            return self._stage == stage

    def _failed_or_ended(self) -> bool:
        return bool(self._failed) or self._exited or self._over

    # --- what it is brought

    def send_order(self, **message: Any) -> None:
        """Send the supervisor what to do with a file (its ``do_put`` and the like); never blocks."""
        self._send(**message)

    def open_sftp(self) -> Sftp | None:
        """Open a session to write files below :attr:`upload_dir`; None without one. The caller closes it."""
        files, self._files = self._files, None
        if files is None and self.upload_dir:
            files = _sftp(self._runner)
        return files

    def request_sync(self) -> int:
        """Ask to be told when all orders so far are done; return a number for :meth:`wait_for_sync`."""
        self._syncs += 1
        self._send(do="sync", number=self._syncs)
        return self._syncs

    def wait_for_sync(self, number: int, timeout: float) -> None:
        """Wait until what was ordered before that mark is done.

        :param timeout: seconds
        :raises UploadError: if something could not be stored
        :raises ConnectionLostError: if the line goes down, or the supervisor is silent for that long
        """
        with self._changed:
            wait_for(
                self._changed,
                lambda: self._synced >= number or self._fault or self._over or self._failed,
                timeout,
            )
            fault, self._fault = self._fault, ""
        if fault:
            msg = f"a file could not be stored there ({fault})"
            raise UploadError(msg, host=self.host, hint="see whether the disk there is full")
        if self._synced >= number:
            return
        if self._failed or self._exited:
            raise self._start_failure().error()
        why = "the connection ended" if self._over else f"nothing was heard for {timeout:g} s"
        msg = f"{why} while files were brought there"
        raise ConnectionLostError(msg, host=self.host, hint="try again")

    # --- what goes along with it

    @property
    def sidecar_status(self) -> dict[str, Any]:
        """What the program that goes along with it has said of itself; empty where there is none."""
        return {} if self._sidecar_ended else self._sidecar_status

    def start_sidecar(self, argv: Sequence[str], env: Mapping[str, str], timeout: float) -> dict[str, Any]:
        """Run a program beside the server, in its environment; it ends with the server.

        Where one runs already, nothing is started.

        :param env: more variables for it
        :param timeout: seconds until it must have said something of itself: a JSON object, on a line of its
            standard output
        :returns: that; empty where it has said nothing
        """
        self._update(_sidecar_status={}, _sidecar_ended=False)
        self._send(do="accompany", argv=list(argv), env=dict(env))
        with self._changed:
            wait_for(
                self._changed, lambda: self._sidecar_status or self._sidecar_ended or self._over, timeout
            )
            return self._sidecar_status

    # --- while it runs

    @property
    def lost(self) -> bool:
        """Whether the session went down before the server was seen to end."""
        return (self._over or self.taken) and not self._exited and not self._parted

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it has ended or the session is down; False if neither within ``timeout`` seconds."""
        return self.ended.wait(timeout)

    def heartbeat(self) -> None:
        """Send the supervisor a sign that we are there. A thread of ours does it often enough."""
        if self._stage in ("depot", "server", "ready"):
            self._send(do="lease")

    def _keep_lease(self) -> None:
        while not self._closing.wait(max(0.1, self.launch.lease / 3)) and not self._over:
            self.heartbeat()

    def close(self) -> None:
        """Let go of the session; a server that still runs lives on for ``grace`` seconds. Idempotent."""
        self._closing.set()
        session, files = self._session, self._files
        if files:
            files.close()
        if session:
            session.write_eof()
            session.close()
        if self._lease_thread.is_alive() and self._lease_thread is not threading.current_thread():
            self._lease_thread.join(2)

    # --- what the connection brings, on its own thread

    def _on_stdout(self, data: bytes) -> None:
        for message in self._reader.feed(data):
            self._receive(message)

    def _on_stderr(self, data: bytes) -> None:
        self._stderr.feed(data)

    def _on_exit(self, status: int | None) -> None:
        told = self._stage == "ready" and not self._exited and not self._stopping and status is not None
        told = told and not self.taken and not self._parted and not self._closing.is_set()
        # From 128 on it is a signal, as some SSH servers tell it: what was executed was killed, and that need
        # not be the supervisor.
        told = told and (status or 0) < 128
        self._update(_over=True, _session_status=status)
        self._gone.set()
        self.ended.set()
        if told:  # the supervisor was killed, and its guardian ends the server
            self._emit(ServerExited(host=self.host, exit_status=None))

    def _handle_hello(self, _: dict[str, Any]) -> None:
        if self._stage == "login":
            self._update(_stage="shell")
            self._answer_hello()

    def _send(self, **message: Any) -> None:
        if self._session:
            self._session.write(encode_message(message))


def _sftp(runner: Runner | None) -> Sftp | None:
    return Sftp(runner) if isinstance(runner, Subsystems) else None
