"""What the Bokeh host does where only it can reach the gateway: run the server, and publish it there."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bokeh_ssh._errors import ServerExitedError, ServerNotFoundError, UsageError
from bokeh_ssh._events import Attached, Event, OnEvent, ServerExited
from bokeh_ssh._launch import Launch
from bokeh_ssh._local import nearby
from bokeh_ssh._remote import LOOPBACK, RemoteForward
from bokeh_ssh._server import Server
from bokeh_ssh._shell import Shell
from bokeh_ssh._target import Host

BOKEH_PORT = 5006
_CONNECT_TIMEOUT = 5.0


class Publication(RemoteForward):
    """Start a Bokeh server on this machine, or take one that runs, and have a gateway serve it.

    >>> publication = Publication("gateway.example.org", "me", "dashboard.py")
    >>> publication.state
    'new'

    :param gateway: the machine to log in to, see :class:`RemoteForward`
    :param user: the login name
    :param app: an app or several, paths here; none publishes what listens on ``local_port``
    :param args: and ``command``, ``python``, ``setup``, ``cwd``, ``env``: as for :class:`DirectTunnel`, here
    :param grace: seconds that the server outlives this program, should that vanish
    :param launch_timeout: seconds for the server to become ready
    :param extra_origins: more ``host:port`` whose pages may embed the app
    :param remote_port: the port on the gateway; 0 takes any free one
    :param local_port: None is 5006 without an app, and any free one with it
    :param local_host: where the server already listens
    :param others: as for :class:`RemoteForward`
    :raises UsageError: if an argument cannot work
    """

    def __init__(
        self,
        gateway: str | Host,
        user: str | None = None,
        app: Sequence[str] = (),
        *,
        args: Sequence[str] = (),
        command: str = "bokeh serve",
        python: str | None = None,
        setup: Sequence[str] = (),
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
        grace: float = 60.0,
        launch_timeout: float = 60.0,
        extra_origins: Sequence[str] = (),
        remote_port: int = BOKEH_PORT,
        local_port: int | None = None,
        local_host: str | None = None,
        on_event: OnEvent | None = None,
        **others: Any,
    ) -> None:
        super().__init__(
            gateway,
            user,
            remote_port=remote_port,
            local_port=local_port or BOKEH_PORT,
            local_host=local_host or "localhost",
            on_event=on_event,
            **others,
        )
        self._launch: Launch | None = None
        self._server: Server | None = None
        if app:
            if local_host is not None:
                msg = "local_host says where a server already listens, but an app was given"
                raise UsageError(msg, hint="leave out app, or local_host")
            # The other half takes the same number on the person's machine, or one nearby.
            pages = nearby(remote_port or BOKEH_PORT)
            origins = [f"{name}:{page}" for page in pages for name in ("localhost", "127.0.0.1")]
            self._launch = Launch(
                app=tuple(app),
                args=tuple(args),
                command=command,
                python=python or _own_python(command, setup),
                setup=tuple(setup),
                cwd=cwd,
                env=dict(env or {}),
                port=local_port or None,
                origins=(*origins, *extra_origins),
                grace=grace,
                timeout=launch_timeout,
            )
        elif args or setup or python or cwd or env or command != "bokeh serve":
            msg = "there is no app to start"
            raise UsageError(msg, hint="name one, or leave out what is for starting it")

    def __repr__(self) -> str:
        what = ", ".join(self._launch.app) if self._launch else f"port {self.local_port}"
        return f"<Publication of {what} on {self._label}:{self._remote_port}, {self._state}>"

    @property
    def routes(self) -> tuple[str, ...]:
        """The paths of its apps; ``"/"`` where the server was not started here."""
        return (self._server.routes if self._server else ()) or ("/",)

    def _start(self, stack: contextlib.ExitStack) -> None:
        if self._launch:
            self._server = server = Server.start(Shell(), self._launch, on_event=self._told)
            stack.callback(server.stop)
            self._target = (LOOPBACK, server.port)
        else:
            self._check_answer()
        super()._start(stack)

    def _check_answer(self) -> None:
        host, port = self._target
        try:
            socket.create_connection(self._target, _CONNECT_TIMEOUT).close()
        except OSError as exc:
            msg = f"nothing answers on port {port} ({exc.strerror or exc})"
            hint = "name an app to start, start the server first, or give its local_port"
            raise ServerNotFoundError(msg, host=host, hint=hint) from exc
        self._emit(Attached(host=host, port=port))

    def _told(self, event: Event) -> None:
        self._emit(event)
        if isinstance(event, ServerExited):
            log = self._server.log if self._server else ()
            self._lose(ServerExitedError._of(event.host, event.exit_status, tuple(log)))


def _own_python(command: str, setup: Sequence[str]) -> str | None:
    """Choose the Python that runs this, if it is the one the person works with and can run the server."""
    active = os.environ.get("VIRTUAL_ENV") or os.environ.get("CONDA_PREFIX")
    if setup or (active and Path(active).resolve() != Path(sys.prefix).resolve()):
        return None
    package = command.split(maxsplit=1)[0] if command.split() else ""
    try:
        found = importlib.util.find_spec(package) if package.isidentifier() else None
    except (ImportError, ValueError):
        found = None
    return sys.executable if found else None
