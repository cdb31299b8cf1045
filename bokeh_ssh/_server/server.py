"""The remote Bokeh server: started through a session, held by the supervisor there, ended with it."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bokeh_ssh._core.errors import ConnectionLostError, LaunchError
from bokeh_ssh._core.events import Launched, Launching, OnEvent, ignore
from bokeh_ssh._core.waiting import wait
from bokeh_ssh._server.diagnosis import refused
from bokeh_ssh._server.launch_spec import COMPRESSION, Launch
from bokeh_ssh._server.server_ref import ServerRef
from bokeh_ssh._server.server_state import Stage
from bokeh_ssh._server.supervisor_client import HESITATION, SupervisorClient, UploadChannel
from bokeh_ssh._ssh.runner import Runner, Session

__all__ = ["Launch", "Runner", "Server", "ServerRef", "Session"]

#: Seconds that a failed or interrupted start may spend on ending what it started.
_ABORT = 1.5


class Server:
    """A Bokeh server on the remote machine, started by us. Made by :meth:`start`, or by :meth:`adopt`.

    It ends with :meth:`stop`; or, once the session has been down or silent for ``grace`` seconds, by itself,
    unless it was adopted again meanwhile, or is one that was left running by :meth:`detach`.
    """

    def __init__(self, client: SupervisorClient) -> None:
        self.client = client
        self._state = client.state

    def __repr__(self) -> str:
        state = "ended" if self.ended.is_set() else self._state.stage.name.lower()
        where = self.socket or f"port {self.port}"
        return f"<{type(self).__name__} of {self.host}, {where}, {state}>"

    # --- what is known of it

    @property
    def host(self) -> str:
        """The machine, as the user named it."""
        return self.client.host

    @property
    def launch(self) -> Launch:
        """What was asked for."""
        return self.client.launch

    @property
    def uploads(self) -> UploadChannel:
        """Sends files to the folder that it was given for them."""
        return self.client.uploads

    @property
    def port(self) -> int:
        """The port of that machine's loopback that it listens on; 0 where it is a socket."""
        return self._state.listening.port

    @property
    def socket(self) -> str:
        """The path of the socket that it listens on; empty where it is a port."""
        return self._state.listening.socket

    @property
    def no_socket(self) -> str:
        """Why it is a port though the launch wanted a socket; empty otherwise."""
        return self._state.listening.no_socket

    @property
    def pid(self) -> int:
        """Its process id there."""
        return self._state.listening.pid

    @property
    def routes(self) -> tuple[str, ...]:
        """The paths of its apps, ready for a URL; ``"/"`` where it serves none."""
        return self._state.listening.routes

    def await_address(self, timeout: float) -> str:
        """Return the path and query that it has written as its address, once that has come; a secret.

        :param timeout: seconds
        :returns: empty where nothing has come, and for one of Bokeh's, which has :attr:`routes`
        """
        if timeout > 0:
            self.client.wait_until(lambda: self._state.address, timeout)
        return self._state.address

    @property
    def versions(self) -> str:
        """Such as ``"Bokeh 3.10.2, Tornado 6.6.1"``."""
        return self._state.listening.versions

    @property
    def tls(self) -> bool:
        """Whether it says that it speaks TLS."""
        return self._state.listening.tls

    @property
    def key(self) -> str:
        """What the ids of its sessions must be signed with, a secret; empty where they need not be."""
        return self._state.secrets.key

    @property
    def doomed(self) -> str:
        """What ends it with the session, where the machine ends all that a login has started."""
        return self._state.started.doomed

    @property
    def log(self) -> tuple[str, ...]:
        """Its last lines, standard output and error together, without escape sequences."""
        return self._state.log.lines

    @property
    def app_errors(self) -> tuple[str, ...]:
        """What apps raised, as Bokeh wrote it: such an app's page is blank."""
        return self._state.log.app_errors

    @property
    def exit_status(self) -> int | None:
        """How it ended, negative for a signal; None while it runs, and where nobody could tell."""
        return self._state.exit_status

    @property
    def ended(self) -> threading.Event:
        """Set once it has ended or the session is down; :attr:`lost` tells which."""
        return self._state.ended

    @property
    def detached(self) -> bool:
        """Whether it runs on without a client, for as long as nobody stops it."""
        return self._state.detached

    @property
    def taken(self) -> bool:
        """Whether another client has taken it over, which is one way of being lost."""
        return self._state.taken

    @property
    def lost(self) -> bool:
        """Whether the session went down before the server was seen to end."""
        return self.client.lost

    @property
    def sidecar_status(self) -> dict[str, Any]:
        """What the program that runs beside it has said of itself; empty where there is none."""
        sidecar = self._state.sidecar
        return {} if sidecar.ended else sidecar.status

    def on_log(self, call: Callable[[list[str]], object]) -> None:
        """Call with its lines as they come, on the connection's thread: it must not block."""
        self._state.log.on_lines = call

    def on_package(self, call: Callable[[str, str], object]) -> None:
        """Call, likewise, with the interpreter there and the folder of its Bokeh, while the server starts."""
        self._state.on_package = call

    def on_sidecar_ended(self, call: Callable[[], object]) -> None:
        """Call, likewise, when what runs beside it ends by itself."""
        self._state.sidecar.on_end = call

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it has ended or the session is down; False if neither within ``timeout`` seconds."""
        return self.ended.wait(timeout)

    def start_sidecar(self, argv: Sequence[str], env: Mapping[str, str], timeout: float) -> dict[str, Any]:
        """Run a program beside it, see :meth:`SupervisorClient.start_sidecar`."""
        return self.client.start_sidecar(argv, env, timeout)

    # --- starting

    @classmethod
    def start(
        cls,
        runner: Runner,
        launch: Launch,
        *,
        on_event: OnEvent = ignore,
        on_begin: Callable[[Server], object] = lambda server: None,
        bring: Callable[[UploadChannel], object] = lambda uploads: None,
    ) -> Server:
        """Start a server and wait until it listens.

        Whatever ends this early, Ctrl-C included, also ends what was started; that takes 2 seconds at most.

        :param on_event: gets Launching, Launched, Warned, AppFailed, ServerUnresponsive, ServerResponsive
            and ServerExited; on the connection's thread, so it must not wait for this server
        :param on_begin: gets it before anything is started; :meth:`cancel` then works from another thread
        :param bring: where the launch ``brings`` something, fills the folder that was made for it; the time
            for that does not count as the launch's
        :raises SessionError: if the account may not run commands
        :raises PythonNotFoundError: if there is no Python that can be used
        :raises BokehNotFoundError: if no Python there has the package, or only one too old
        :raises PortInUseError: if ``port`` was given and is taken there
        :raises LaunchTimeoutError: if it is not ready in time
        :raises LaunchError: if it does not start for another reason, or the machine is none we can run on
        :raises ConnectionLostError: if the connection goes down meanwhile
        """
        server = cls(SupervisorClient(runner, launch, on_event))
        on_begin(server)
        try:
            server._start(bring)
        except BaseException:
            server.cancel()
            raise
        return server

    def _start(self, bring: Callable[[UploadChannel], object]) -> None:
        client, state = self.client, self._state
        deadline = time.monotonic() + self.launch.timeout
        state.emit(Launching(host=self.host, command=state.evidence.argv))
        client.begin(self.launch.timeout)
        client.hold_lease()
        hello = client.wait_for_stage(Stage.SHELL, min(deadline, time.monotonic() + HESITATION))
        if not hello and not self.ended.is_set() and time.monotonic() < deadline:
            blocked = client.find_blocked_login(deadline)
            if blocked:
                msg = f"a start file of the login shell (such as ~/.bashrc) {blocked}"
                hint = "have it do that on a terminal only: [ -t 0 ] || return"
                raise LaunchError(msg, host=self.host, hint=hint, command=state.evidence.argv)
        if self.launch.brings:
            if not client.wait_for_stage(Stage.UPLOAD, deadline):
                raise client.failure()
            bring(client.uploads)
            client.send(do="go")
            deadline = time.monotonic() + self.launch.timeout
        if not client.wait_for_stage(Stage.READY, deadline):
            raise client.failure()
        found = {"port": self.port, "socket": self.socket, "pid": self.pid, "versions": self.versions}
        compressed = any(word.partition("=")[0] == COMPRESSION for word in state.evidence.argv)
        state.emit(Launched(host=self.host, compressed=compressed, **found))  # type: ignore[arg-type]
        if self.doomed:
            state.warn(f"the server ends when the connection does ({self.doomed}), so a loss ends it")
        for route in self.routes:
            if not re.fullmatch(r"[\w./~-]+", route, re.ASCII):
                # Bokeh 3.10 takes the route for a regular expression, and matches it with the quoted path.
                state.warn(
                    f"Bokeh cannot serve {route}: rename the app, with plain letters, digits, - and _ only"
                )

    # --- coming back

    @property
    def server_ref(self) -> ServerRef | None:
        """What :meth:`adopt` needs to have this server back; None before it is ready.

        None as well where the machine has no private directory to find a server by; then a server whose
        client is gone cannot be had back, and ends after ``grace`` seconds.
        """
        return self.adoptable_ref if self._state.started.id else None

    @property
    def adoptable_ref(self) -> ServerRef | None:
        """What :meth:`adopt` needs, as :attr:`server_ref`; where nobody finds it, what ends it."""
        started, listening, known = self._state.started, self._state.listening, self._state.secrets
        if self._state.stage is not Stage.READY or not (started.id or started.identity):
            return None
        return ServerRef(
            host=self.host,
            id=started.id,
            token=known.token,
            node=started.node,
            python=started.python,
            libraries=started.libraries,
            place=started.place,
            supervisor=started.identity,
            pid=listening.pid,
            port=listening.port,
            socket=listening.socket,
            routes=listening.routes,
            key=known.key,
        )

    @classmethod
    def adopt(
        cls,
        runner: Runner,
        server_ref: ServerRef,
        *,
        launch: Launch,
        on_event: OnEvent = ignore,
        on_begin: Callable[[Server], object] = lambda server: None,
        timeout: float = 30,
    ) -> Server:
        """Take a server over that runs: after a loss, or one that was left running.

        It is as if it had been started through this session: same process, port and routes, its log so far,
        and from now on its messages, and :meth:`stop`. Nothing is started, and an attempt that fails costs
        the server nothing: its grace time begins anew where the attempt had come that far. Only one that
        runs and cannot be found any more, since its private directory is gone, is ended: there are never two.

        :param server_ref: its token takes the server over from any session that still seems to be there;
            without a token, only a server that nobody is attached to is taken over
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
        server = cls(SupervisorClient(runner, launch, on_event, server_ref))
        on_begin(server)
        try:
            server._adopt(timeout)
        except BaseException:
            server.close()
            raise
        return server

    def _adopt(self, timeout: float) -> None:
        client = self.client
        deadline = time.monotonic() + timeout
        client.begin(timeout)
        if not client.wait_for_stage(Stage.READY, deadline):
            failed = self._state.evidence.failed
            raise refused(self.host, failed) if failed else client.failure(timeout)
        client.hold_lease()

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
            why = self._state.started.nowhere or "it is not ready"
            msg = f"the server cannot be left running, since nobody could find it again ({why})"
            hint = "have one of them be private, with room in it, or name another one in BOKEH_SSH_DIR"
            raise LaunchError(msg, host=self.host, hint=hint)
        if self.doomed:
            msg = f"the server cannot be left running, since it ends when the connection does ({self.doomed})"
            hint = "ask the administrator to spare your account, or run it by other means than a login"
            raise LaunchError(msg, host=self.host, hint=hint)
        if self.client.connected:
            self.client.send(do="detach")
            wait(self._state.kept, timeout)
        if not self._state.kept.is_set():
            self.client.send(do="detach", keep=False)
            msg = "the remote side did not confirm that it lets the server run on"
            raise ConnectionLostError(msg, host=self.host, hint="connect again, and see whether it is there")
        self._state.detached = True
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
        self.client.parted = True
        self.close()
        return server_ref

    def cancel(self) -> None:
        """End what a start has started so far, as well as can be done within a moment; idempotent."""
        self._state.stopping = True
        try:
            if self.client.connected:
                if self._state.stage >= Stage.UPLOAD:
                    self.client.send(do="stop", patience=_ABORT / 3)
                    wait(self._state.gone, _ABORT)
                else:
                    self.client.kill()
        finally:
            self.close()

    # --- ending

    def stop(self, timeout: float = 10) -> bool:
        """End the server and all that it started: TERM, wait, KILL. Idempotent.

        Must not be called on the connection's thread, which brings the answer.

        :param timeout: seconds; KILL comes after six tenths of them
        :returns: whether the remote side has confirmed that nothing is left
        """
        self._state.stopping = True
        gone = self._state.gone
        try:
            if not gone.is_set():
                self.client.send(do="stop", patience=timeout * 0.6)
                wait(gone, timeout)
            return gone.is_set() and not self.lost
        finally:
            self.close()

    def close(self) -> None:
        """Let go of the session; a server that still runs lives on for ``grace`` seconds. Idempotent."""
        self.client.close()
