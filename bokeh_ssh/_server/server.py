"""The remote Bokeh server: started through a session, held by the supervisor there, ended with it."""

from __future__ import annotations

import re
import time
from collections.abc import Callable

from bokeh_ssh._core.errors import BokehSSHError, ConnectionLostError, LaunchError
from bokeh_ssh._core.events import Launched, Launching, OnEvent, Warned, ignore
from bokeh_ssh._core.waiting import wait, wait_for
from bokeh_ssh._server.diagnosis import refused
from bokeh_ssh._server.launch_spec import Launch
from bokeh_ssh._server.server_ref import ServerRef
from bokeh_ssh._server.supervisor_client import SupervisorClient
from bokeh_ssh._ssh.runner import Runner, Session, Signals

__all__ = ["Launch", "Runner", "Server", "ServerRef", "Session"]

#: Seconds that a failed or interrupted start may spend on ending what it started.
_ABORT = 1.5


class Server(SupervisorClient):
    """A Bokeh server on the remote machine, started by us. Made by :meth:`start`, or by :meth:`adopt`.

    It ends with :meth:`stop`; or, once the session has been down or silent for ``grace`` seconds, by itself,
    unless it was adopted again meanwhile, or is one that was left running by :meth:`detach`.
    """

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
        self._emit(Launching(host=self.host, command=self._argv))
        self._begin(runner, self.launch.timeout)
        self._lease_thread.start()
        if self.launch.brings:
            if not self._wait_for_stage("depot", deadline):
                raise self._start_failure().error()
            bring(self)
            self._send(do="go")
            deadline = time.monotonic() + self.launch.timeout
        if not self._wait_for_stage("ready", deadline):
            if self._failed_or_ended():  # what else it wrote is on its way
                with self._changed:
                    wait_for(self._changed, lambda: self._over, 2)
            raise self._start_failure().error()
        found = {"port": self.port, "socket": self.socket, "pid": self.pid, "versions": self.versions}
        self._emit(Launched(host=self.host, **found))  # type: ignore[arg-type]  # each its own
        if self.doomed:
            text = f"the server ends when the connection does ({self.doomed}), so a loss ends it"
            self._emit(Warned(host=self.host, text=text))
        for route in self.routes:
            if not re.fullmatch(r"[\w./~-]+", route, re.ASCII):
                # Bokeh 3.10 takes the route for a regular expression, and matches it with the quoted path.
                text = f"Bokeh cannot serve {route}: rename the app, with plain letters, digits, - and _ only"
                self._emit(Warned(host=self.host, text=text))

    # --- coming back

    @property
    def server_ref(self) -> ServerRef | None:
        """What :meth:`adopt` needs to have this server back; None before it is ready.

        None as well where the machine has no private directory to find a server by; then a server whose
        client is gone cannot be had back, and ends after ``grace`` seconds.
        """
        return self.adoptable_ref if self._started.get("id") else None

    @property
    def adoptable_ref(self) -> ServerRef | None:
        """What :meth:`adopt` needs, as :attr:`server_ref`; where nobody finds it, what ends it."""
        if self._stage != "ready" or not (self._started.get("id") or self._started.get("identity")):
            return None
        known = {name: self._started[name] for name in ("id", "node", "python", "libraries", "place")}
        found = {"pid": self.pid, "port": self.port, "socket": self.socket, "routes": self.routes}
        holder = self._started["identity"]
        return ServerRef(host=self.host, token=self._token, key=self.key, supervisor=holder, **known, **found)  # type: ignore[arg-type]  # str all

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
        server._adopts = server_ref
        server._token = server_ref.token
        on_begin(server)
        try:
            server._adopt(runner, timeout)
        except BaseException:
            server.close()
            raise
        return server

    def _adopt(self, runner: Runner, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        self._begin(runner, timeout)
        if not self._wait_for_stage("ready", deadline):
            raise self._refusal(timeout)
        self._lease_thread.start()

    def _refusal(self, timeout: float) -> BokehSSHError:
        if self._failed:
            return refused(self.host, self._failed)
        return self._start_failure(timeout=timeout).error()

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
            why = self._started.get("nowhere") or "it is not ready"
            msg = f"the server cannot be left running, since nobody could find it again ({why})"
            hint = "make the directory private, or name another one there in BOKEH_SSH_DIR"
            raise LaunchError(msg, host=self.host, hint=hint)
        if self.doomed:
            msg = f"the server cannot be left running, since it ends when the connection does ({self.doomed})"
            hint = "ask the administrator to spare your account, or run it by other means than a login"
            raise LaunchError(msg, host=self.host, hint=hint)
        if self._session:
            self._send(do="detach")
            wait(self._kept, timeout)
        if not self._kept.is_set():
            self._send(do="detach", keep=False)
            msg = "the remote side did not confirm that it lets the server run on"
            raise ConnectionLostError(msg, host=self.host, hint="connect again, and see whether it is there")
        self.detached = True
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
        self._parted = True
        self.close()
        return server_ref

    def cancel(self) -> None:
        """End what a start has started so far, as well as can be done within a moment; idempotent."""
        self._stopping = True
        session = self._session
        try:
            if session and not self._over and not self._closing.is_set():
                if self._stage in ("depot", "server", "ready"):
                    self._send(do="stop", patience=_ABORT / 3)
                    wait(self._gone, _ABORT)
                elif isinstance(session, Signals):  # a start file or setup that blocks knows no other end
                    session.signal("KILL")
        finally:
            self.close()

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
                self._send(do="stop", patience=timeout * 0.6)
                wait(self._gone, timeout)
            return self._gone.is_set() and not self.lost
        finally:
            self.close()
