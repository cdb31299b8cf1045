"""What the two tunnels share: finding or starting the server, proving the way, and what is offered then."""

from __future__ import annotations

import contextlib
import socket
import webbrowser
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

from bokeh_ssh._attach import check_owner, look, wait_until_ready
from bokeh_ssh._connection import Connection, connect
from bokeh_ssh._errors import (
    BokehSSHError,
    LaunchError,
    LaunchTimeoutError,
    PortInUseError,
    ServerExitedError,
    ServerNotFoundError,
    UsageError,
)
from bokeh_ssh._events import Attached, Event, OnEvent, Ready, ServerExited, Warned
from bokeh_ssh._lifecycle import Lifecycle
from bokeh_ssh._local import bind
from bokeh_ssh._server import Launch, Server
from bokeh_ssh._target import Host, check_port

BOKEH_PORT = 5006
LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Serve:
    """What is to run on the Bokeh host, and how it is found: the keywords that both tunnels share."""

    app: tuple[str, ...] = ()
    args: tuple[str, ...] = ()
    command: str | tuple[str, ...] = "bokeh serve"
    python: str | None = None
    setup: str | tuple[str, ...] = ()
    cwd: str | None = None
    env: Mapping[str, str] | None = None
    remote_port: int | None = None
    launch: bool | None = None
    grace: float = 600.0
    launch_timeout: float = 60.0
    extra_origins: tuple[str, ...] = ()
    allow_foreign: bool = False

    @classmethod
    def check(cls, app: str | Sequence[str] | None, args: Sequence[str], **others: Any) -> Serve:
        """Make it of what the caller gave.

        :raises UsageError: if something cannot work
        """
        for name in ("args", "extra_origins"):
            if isinstance(others.get(name, args), str):
                msg = f"{name} is one string"
                raise UsageError(msg, hint=f'give a list: {name}=["--option", "value"]')
        if others.get("remote_port") is not None:
            check_port(others["remote_port"], "remote_port")
        others["extra_origins"] = tuple(others["extra_origins"])
        for name in ("command", "setup"):
            if not isinstance(others[name], str):
                others[name] = tuple(others[name])
        apps = (app,) if isinstance(app, str) else tuple(app or ())
        if apps and others.get("launch") is False:
            msg = "launch=False attaches to a server that is there, but an app was given"
            raise UsageError(msg, hint="leave out app, or launch")
        made = cls(app=apps, args=tuple(args), **others)
        made.launch_spec(BOKEH_PORT)  # refuses now what it would refuse later
        return made

    @property
    def must_launch(self) -> bool:
        """Whether to start a server without looking for one."""
        return bool(self.app or self.launch)

    @property
    def attach_port(self) -> int:
        """The port to look for a server on."""
        return self.remote_port or BOKEH_PORT

    def launch_spec(self, local_port: int) -> Launch:
        """Say what to start for a page that will be opened at ``local_port`` here."""
        origins = (f"localhost:{local_port}", f"127.0.0.1:{local_port}", *self.extra_origins)
        return Launch(
            app=self.app,
            args=self.args,
            command=self.command,
            python=self.python,
            setup=self.setup,
            cwd=self.cwd,
            env=dict(self.env or {}),
            port=self.remote_port or None,
            origins=origins,
            grace=self.grace,
            timeout=self.launch_timeout,
        )


class Tunnel(Lifecycle):
    """What both tunnels offer once they are open."""

    _shared: tuple[str, ...] = ("_local_port", "_remote_port", "_routes")

    def __init__(self, serve: Serve, local_port: int | None, on_event: OnEvent | None, isolate: bool) -> None:
        super().__init__(on_event, isolate)
        if local_port is not None:
            check_port(local_port, "local_port")
        self._serve = serve
        self._wanted = local_port
        self._sockets: list[socket.socket] = []
        self._local_port = 0
        self._remote_port = 0
        self._routes: tuple[str, ...] = ("/",)
        self._server: Server | None = None
        self._last_log: tuple[str, ...] = ()

    @property
    def local_port(self) -> int:
        """The port on this machine.

        :raises TunnelClosedError: if the tunnel is not open
        """
        self._check_open()
        return self._local_port

    @property
    def remote_port(self) -> int:
        """The port of the Bokeh server (of the gateway, where only the gateway is known).

        :raises TunnelClosedError: if the tunnel is not open
        """
        self._check_open()
        return self._remote_port

    @property
    def urls(self) -> tuple[str, ...]:
        """The addresses to open, one for each app.

        :raises TunnelClosedError: if the tunnel is not open
        """
        return tuple(f"http://localhost:{self.local_port}{route}" for route in self._routes)

    @property
    def url(self) -> str:
        """The address to open: that of the first app.

        :raises TunnelClosedError: if the tunnel is not open
        """
        return self.urls[0]

    @property
    def log(self) -> tuple[str, ...]:
        """The last lines of the server that this tunnel started; empty where it attached to one."""
        if self._child:
            self._last_log = self._child.get("log") or self._last_log
            return self._last_log
        return tuple(self._server.log) if self._server else ()

    def show(self) -> bool:
        """Open the first app in the browser; False if no browser was found."""
        return webbrowser.open(self.url)

    def pull_session(self, **kwargs: Any) -> Any:
        """Open a session of the first app from this program (``bokeh.client.pull_session``).

        :param kwargs: passed on, such as ``session_id`` or ``arguments``
        :raises UsageError: if Bokeh is not installed here
        """
        client = _import_bokeh("bokeh.client")
        return client.pull_session(url=f"http://127.0.0.1:{self.local_port}{self._routes[0]}", **kwargs)

    def server_document(self, **kwargs: Any) -> str:
        """Give the ``<script>`` that embeds the first app in a page (``bokeh.embed.server_document``).

        The page's own origin must be allowed with ``extra_origins=``.

        :raises UsageError: if Bokeh is not installed here
        """
        embed = _import_bokeh("bokeh.embed")
        return str(embed.server_document(url=self.url, **kwargs))

    # Parts that both are made of.

    def _bind(self, stack: contextlib.ExitStack, prefer: int) -> None:
        """Listen on this machine, unless that was done."""
        if not self._sockets:
            self._sockets = bind(self._wanted, prefer=prefer)
            stack.callback(self._sockets.clear)
            for sock in self._sockets:
                stack.callback(sock.close)
            self._local_port = self._sockets[0].getsockname()[1]

    def _connect(self, stack: contextlib.ExitStack, host: Host, via: Connection | None = None) -> Connection:
        connection = stack.enter_context(connect(host, via=via, on_event=self._emit))
        connection.on_lost(lambda _: self._lose(connection.lost_error()))
        return connection

    def _find_or_launch(self, stack: contextlib.ExitStack, connection: Connection) -> tuple[str, int]:
        """Attach to a server or start one, as the keywords say; gives its address on the host's loopback."""
        serve = self._serve
        self._server = None
        self._routes = ("/",)
        if not serve.must_launch:
            port = self._attach(stack, connection)
            if port:
                return "localhost", port  # it may listen on ::1 alone
        self._bind(stack, BOKEH_PORT)  # before the launch: the server must know which origin its pages have
        server = Server.start(
            connection,
            serve.launch_spec(self._local_port),
            on_event=self._told,
            on_begin=lambda begun: stack.callback(begun.cancel),  # closing while it opens ends the start too
        )
        stack.callback(server.stop)
        self._server = server
        self._routes = server.routes or ("/",)
        for route in self._routes:
            if "%" in route:
                # Bokeh compares the address as the browser encodes it with the name as it is: always 404.
                msg = f"Bokeh cannot serve an app under the name {unquote(route)!r}"
                hint = "rename the file so that its name has letters, digits, - and _ only"
                raise LaunchError(msg, host=connection.name, hint=hint, log=self.log)
        return LOOPBACK, server.port

    def _attach(self, stack: contextlib.ExitStack, connection: Connection) -> int | None:
        port = self._serve.attach_port
        found = self._attach_to(stack, connection, port)
        if found is None and self._serve.launch is False:
            msg = f"nothing answers on port {port}"
            hint = "start a Bokeh server there, give its remote_port, or let launch=True start one"
            raise ServerNotFoundError(msg, host=connection.name, hint=hint)
        return port if found else None

    def _attach_to(self, stack: contextlib.ExitStack, connection: Connection, port: int) -> bool | None:
        """Check that a Bokeh server answers on ``port``, and that it is ours.

        :returns: None where nothing listens; False where something else does, and another port will do
        :raises ForeignServerError: if it belongs to another user there
        :raises PortInUseError: if something else answers on the port that was asked for
        """
        serve = self._serve
        found = look(connection, port, timeout=connection.hop.timeout)
        if found is None:
            return None
        if not found.is_bokeh:
            if serve.launch is None and not serve.remote_port:
                return False
            msg = f"port {port} is taken by something that is not a Bokeh server"
            hint = "choose another remote_port, or leave it out for any free one"
            raise PortInUseError(msg, host=connection.name, hint=hint, port=port, side="remote")
        if not serve.allow_foreign:
            check_owner(connection, port)
        # Only now: were that machine this one, our own listener would have answered. The server's own port,
        # since without more options its pages may come from no other.
        self._bind(stack, port)
        self._emit(Attached(host=connection.name, port=port))
        if port != self._local_port:
            text = (
                f"the server on port {port} may take pages from localhost:{port} only; if the page stays "
                f"blank, start it with --allow-websocket-origin localhost:{self._local_port}"
            )
            self._emit(Warned(host=connection.name, text=text))
        return True

    def _told(self, event: Event) -> None:
        self._emit(event)
        if isinstance(event, ServerExited):
            self._lose(ServerExitedError._of(event.host, event.exit_status, self.log))

    def _prove(self, label: str) -> None:
        """Ask through the local port until the server answers: the whole way, without running the app.

        :raises LaunchTimeoutError: if a server that we started does not answer in time
        :raises ServerNotFoundError: if one that we attached to does not
        """
        launched = self._server is not None
        path = self._routes[0].rstrip("/") + "/metadata"

        def broken() -> None:
            if self._error:
                raise self._error
            self._check_wanted()

        try:
            wait_until_ready(
                self._local_port,
                path,
                timeout=self._serve.launch_timeout if launched else 15.0,
                # A launched route answers 200; of an attached server the routes are not known.
                accept=lambda found: found.status == 200 if launched else found.status > 0,
                broken=broken,
            )
        except TimeoutError as exc:
            msg = f"the server did not answer through the tunnel ({exc})"
            error: BokehSSHError
            if launched:
                hint = "give a longer launch_timeout, or see the log"
                error = LaunchTimeoutError(msg, host=label, hint=hint, log=self.log)
            else:
                error = ServerNotFoundError(
                    msg, host=label, hint="check that it runs and that it is a web server"
                )
            raise error from exc
        self._emit(Ready(host=label, url=f"http://localhost:{self._local_port}{self._routes[0]}"))


def _import_bokeh(name: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as exc:
        msg = "Bokeh is not installed here"
        raise UsageError(msg, hint="install it with: pip install 'bokeh-ssh[bokeh]'") from exc
