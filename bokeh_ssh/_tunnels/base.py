"""What the two tunnels do alike: find a server or start one, and lead local connections to it."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from urllib.parse import unquote

from bokeh_ssh._core.endpoint import Endpoint
from bokeh_ssh._core.errors import (
    BokehSSHError,
    ForwardError,
    LaunchError,
    LaunchTimeoutError,
    PortInUseError,
    ServerExitedError,
    ServerGoneError,
    ServerNotFoundError,
    ServerTakenError,
)
from bokeh_ssh._core.events import Attached, Event, ServerExited, ServerTaken, Warned
from bokeh_ssh._core.host import Host
from bokeh_ssh._forwarding.listener import bind
from bokeh_ssh._forwarding.local_acceptor import LocalAcceptor, open_acceptor
from bokeh_ssh._forwarding.port_ownership import monitor_port
from bokeh_ssh._forwarding.request_filter import RequestFilter
from bokeh_ssh._forwarding.static_cache import StaticCache, open_cache
from bokeh_ssh._server.file_sync import FileSync
from bokeh_ssh._server.options import ANY, BOKEH_PORT, LOOPBACK, ServerOptions
from bokeh_ssh._server.probe import HttpProbe, check_owner, find_route, http_get, probe_port, wait_until_ready
from bokeh_ssh._server.registry import RemoteServer, choose, list_servers
from bokeh_ssh._server.server import Server
from bokeh_ssh._ssh.connection import Connection
from bokeh_ssh._tunnels.local_forward import LocalPortForward
from bokeh_ssh._tunnels.tunnel_info import Offer

#: Seconds for a look whether a server that was left is there.
_GLANCE = 1.0
_LEFT = "the server could not be told to end; it does so by itself"


class Tunnel(Offer):
    """What both tunnels do: find a server or start one, and lead local connections to it."""

    def __init__(self, options: ServerOptions, host: Host) -> None:
        super().__init__(options.on_event, options.isolate, options.reconnect)
        self._serve = options
        self._label = host.target.host
        self._acceptor: LocalAcceptor | None = None
        self._cache: StaticCache | None = None
        self._port_forwards: list[LocalPortForward] = []
        self._file_sync: FileSync | None = None
        self._no_sockets = False
        self._must_sign = False  # whether others can get to the server, wherever it listens itself
        self._left_behind = False
        self._attached = False
        #: For the command line: gets the server's lines as they come. Must not block.
        self._on_log: Callable[[list[str]], object] = _nothing

    # Parts that both are made of.

    def _open_local(self, stack: contextlib.ExitStack) -> None:
        self._acceptor = None
        self._cache = open_cache(stack, self._warn) if self._serve.cache else None
        self._server = None
        self._no_sockets = False
        self._key = ""
        self._id = ""
        self._stays = False
        self._left_behind = False
        self._attached = False
        self._server_outcome = ""
        self._routes = ("/",)
        if self._serve.bundle:
            self._file_sync = FileSync(self._serve.bundle, self._emit)
            if self._serve.dev:
                stack.enter_context(self._file_sync.watching())
        self._port_forwards = [
            LocalPortForward(
                stack,
                listen,
                target,
                self._label,
                self._emit,
                others=self._serve.allow_others,
                attempts=self._attempts,
            )
            for listen, target in self._serve.passages
        ]
        self._forwards = tuple(port_forward.name for port_forward in self._port_forwards)
        if self._serve.local_port:
            self._bind(BOKEH_PORT)  # a port that is taken here is told before anything is dialled

    def _bind(self, prefer: int) -> LocalAcceptor:
        """Listen on this machine, unless that is done; stays until the tunnel is closed."""
        if self._acceptor is None:
            sockets = bind(self._serve.local_port, prefer=prefer)
            self._acceptor = open_acceptor(
                self._stack, sockets, self._warn, self._serve.allow_others, self._attempts
            )
            self._local_port = self._acceptor.port
        return self._acceptor

    def _start_extra_forwards(self, connection_stack: contextlib.ExitStack, connection: Connection) -> None:
        for port_forward in self._port_forwards:
            port_forward.route_to(connection_stack, connection)

    def _warn(self, text: str) -> None:
        self._emit(Warned(host=self._label, text=text))

    def _find_or_launch(
        self, connection_stack: contextlib.ExitStack, connection: Connection
    ) -> tuple[Endpoint, bool]:
        """Return the server from before, or find or start one as the keywords say.

        :returns: where it listens on the host, and whether it is the one from before
        """
        if self._server:
            return self._readopt(connection_stack, connection, self._server)
        if self._serve.server is not None:
            return self._take_over(connection_stack, connection, self._serve.server), False
        if not self._serve.must_launch:
            port = self._attach(connection)
            if port:
                return ("localhost", port), True  # it may listen on ::1 alone
        return self._launch(connection_stack, connection), False

    def _launch(self, connection_stack: contextlib.ExitStack, connection: Connection) -> Endpoint:
        self._bind(BOKEH_PORT)  # before the launch: the server must know which origin its pages have
        launch = self._serve.launch_spec(self._local_port)
        if self._no_sockets:
            launch = dataclasses.replace(launch, socket=False)
        if self._must_sign and launch.sign:
            launch = dataclasses.replace(launch, sign=True)
        server = Server.start(
            connection,
            launch,
            on_event=self._on_server_event,
            on_begin=lambda begun: self._register_server(connection_stack, begun, begun.cancel),
            bring=self._file_sync.upload_all if self._file_sync else _nothing,
        )
        self._use_server(connection_stack, connection, server)
        for route in self._routes:
            if "%" in route:
                # Bokeh compares the address as the browser encodes it with the name as it is: always 404.
                msg = f"Bokeh cannot serve an app under the name {unquote(route)!r}"
                hint = "rename the file so that its name has letters, digits, - and _ only"
                raise LaunchError(msg, host=connection.name, hint=hint, log=self.log)
        if server.socket and not _can_connect(connection, server.socket):
            # It listens, as its supervisor has seen, so what is missing is the permission
            # (AllowStreamLocalForwarding), which OpenSSH does not tell from a socket that nobody serves.
            self._no_sockets = True
            server.stop()
            return self._launch(connection_stack, connection)
        return self._endpoint_of(server)

    def _take_over(
        self, connection_stack: contextlib.ExitStack, connection: Connection, name: str
    ) -> Endpoint:
        """Take over a server of the account that runs, as if it had been started here.

        :raises ServerNotFoundError: if there is none of that name
        :raises UsageError: if there are several
        :raises ServerTakenError: if somebody uses it
        """
        every = [each for each in list_servers(connection, python=self._serve.python) if not each.elsewhere]
        found = choose(every, None if name == ANY else name, host=connection.name)
        self._bind(next(iter(found.pages), BOKEH_PORT))
        server = Server.adopt(
            connection,
            found.server_ref,
            launch=self._serve.launch_spec(self._local_port),
            on_event=self._on_server_event,
            on_begin=lambda begun: self._register_server(connection_stack, begun, begun.close),
            timeout=self._serve.launch_timeout,
        )
        self._use_server(connection_stack, connection, server)
        self._emit(Attached(host=connection.name, port=server.port, id=found.id, pid=server.pid))
        self._check_pages(connection, found)
        return self._endpoint_of(server)

    def _check_pages(self, connection: Connection, found: RemoteServer) -> None:
        if found.pages and self._local_port not in found.pages:
            text = (
                f"the server takes pages from localhost:{found.pages[0]}, so this one may stay blank; free "
                "that port here and open it again"
            )
            self._emit(Warned(host=connection.name, text=text))

    def _register_server(
        self, connection_stack: contextlib.ExitStack, server: Server, end: Callable[[], object]
    ) -> None:
        server.on_log(self._on_log)
        connection_stack.callback(end)  # closing while it opens ends the start too

    def _endpoint_of(self, server: Server) -> Endpoint:
        return server.socket or (LOOPBACK, server.port)

    def _readopt(
        self, connection_stack: contextlib.ExitStack, connection: Connection, before: Server
    ) -> tuple[Endpoint, bool]:
        """Take over the server of the line before; start it anew where it has ended."""
        server_ref = before.adoptable_ref
        if server_ref is None:  # it was lost while it started, and ends by itself: nobody had seen it
            return self._launch(connection_stack, connection), False
        try:
            server = Server.adopt(
                connection,
                server_ref,
                launch=before.launch,
                on_event=self._on_server_event,
                on_begin=lambda begun: self._register_server(connection_stack, begun, begun.close),
            )
        except (ServerGoneError, ServerExitedError) as exc:
            if self._serve.server is not None:
                raise
            text = f"{exc.message}, so it is started anew; pages that were open have to be loaded again"
            self._emit(Warned(host=connection.name, text=text))
            return self._launch(connection_stack, connection), False
        self._use_server(connection_stack, connection, server)
        return self._endpoint_of(server), True

    def _use_server(
        self, connection_stack: contextlib.ExitStack, connection: Connection, server: Server
    ) -> None:
        connection_stack.callback(self._release_server, connection, server)
        if self._file_sync:
            connection_stack.callback(self._file_sync.sync_to, None)
            self._file_sync.sync_to(server.uploads)
        self._server = server
        self._left_behind = False
        self._remote_port = server.port
        self._key = server.key
        self._id = server.server_ref.id if server.server_ref else ""
        self._routes = server.routes or ("/",)
        why = server.no_socket
        if self._serve.plain and server.port:
            why = "write {socket} into command in place of {port}, if it can listen on one"
        if why and not server.key and self._serve.signed is None:
            text = f"other users of that machine can open the server ({why})"
            self._emit(Warned(host=server.host, text=text))

    def _release_server(self, connection: Connection, server: Server) -> None:
        """End the server; or leave it for its grace where the line is to be made again."""
        if server is not self._server:  # another one was started in its place
            server.close()
        elif not self._leaving:
            server.close()
            self._left_behind = True
        elif server.detached:
            server.close()
            self._server_outcome = "left"
            if _has_ended(connection, server):
                self._server_outcome = "ended"
                self._warn("the server was to run on, and has ended with its session: see bokeh-ssh doctor")
        elif not server.stop() and server.lost:
            self._report_left_behind()
        else:
            self._server_outcome = "ended"

    def _report_outcome(self) -> None:
        # Not before all is closed: the thread that makes the line again may be leaving it behind just now.
        if self._left_behind:
            self._report_left_behind()

    def _report_child_outcome(self) -> None:
        self._server_outcome = "left" if self._stays else "unreached"
        if not self._stays:
            self._warn(f"{_LEFT} within {self._serve.grace:g} s")

    def _report_left_behind(self) -> None:
        """Say what becomes of a server that could not be told to end."""
        self._server_outcome = "left" if self._server and self._server.detached else "unreached"
        if self._server and not self._server.detached:
            text = f"{_LEFT} within {self._serve.grace:g} s"
            self._emit(Warned(host=self._server.host, text=text))

    def _attach(self, connection: Connection) -> int | None:
        port = self._serve.attach_port
        found = self._attach_to(connection, port)
        if found is None and self._serve.launch is False:
            msg = f"nothing answers on port {port}"
            hint = "start a Bokeh server there, give its remote_port, or let launch=True start one"
            raise ServerNotFoundError(msg, host=connection.name, hint=hint)
        if found:
            self._remote_port = port
        elif self._attached:  # it will be back, and another one would not be it
            msg = f"nothing answers on port {port} any more"
            raise ServerNotFoundError(msg, host=connection.name, hint="start it again")
        self._attached = self._attached or bool(found)
        return port if found else None

    def _attach_to(self, connection: Connection, port: int) -> bool | None:
        """Check that a Bokeh server answers on ``port``, and that it is ours.

        :returns: None where nothing listens; False where something else does, and another port will do
        :raises ForeignServerError: if it belongs to another user there
        :raises PortInUseError: if something else answers on the port that was asked for
        """
        serve = self._serve
        found = probe_port(connection, port, timeout=connection.hop.timeout)
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
        again = self._acceptor is not None and self._attached
        self._bind(port)
        self._server_outcome = "left"
        if again:
            return True
        self._routes = (find_route(connection, ("localhost", port), timeout=connection.hop.timeout),)
        self._emit(Attached(host=connection.name, port=port))
        if port != self._local_port:
            text = (
                f"the server on port {port} may take pages from localhost:{port} only; if the page stays "
                f"blank, start it with --allow-websocket-origin localhost:{self._local_port}"
            )
            self._emit(Warned(host=connection.name, text=text))
        return True

    def _on_server_event(self, event: Event) -> None:
        self._emit(event)
        if isinstance(event, ServerExited):
            self._on_connection_lost(ServerExitedError.of(event.host, event.exit_status, self.log))
        elif isinstance(event, ServerTaken):
            msg = "another client has taken the server over"
            self._on_connection_lost(
                ServerTakenError(msg, host=event.host, hint="start one of your own with launch=True")
            )

    def _start_forwarding(
        self, connection_stack: contextlib.ExitStack, connection: Connection, target: Endpoint, label: str
    ) -> None:
        """Lead local connections to the server, once it has answered that way; no app is run for that.

        :raises LaunchTimeoutError: if a server that we started does not answer in time
        :raises ServerNotFoundError: if one that we attached to does not
        """
        launched, plain = self._server is not None, self._serve.plain
        path = self._serve.ready or (self._routes[0] if plain else self._routes[0].rstrip("/") + "/metadata")

        def broken() -> None:
            if self._error:
                raise self._error
            self._check_wanted()

        def accept(found: HttpProbe) -> bool:
            # A launched route answers 200; of other servers it is not known what they answer.
            if self._serve.ready:
                return 200 <= found.status < 400
            return (
                found.status == 200 if launched and not plain and not self._serve.server else found.status > 0
            )

        try:
            wait_until_ready(
                lambda timeout: http_get(connection, target, path, timeout=timeout),
                timeout=self._serve.launch_timeout if launched else 15.0,
                accept=accept,
                broken=broken,
            )
        except TimeoutError as exc:
            msg = f"the server did not answer through the tunnel ({exc})"
            error: BokehSSHError
            if launched:
                hint = "give a longer launch_timeout, or see the log"
                error = LaunchTimeoutError(msg, host=label, hint=hint, log=self.log)
            else:
                hint = "check that it runs and that it is a web server"
                error = ServerNotFoundError(msg, host=label, hint=hint)
            raise error from exc
        acceptor = self._bind(BOKEH_PORT)
        request_filter = RequestFilter(self._local_port, self._serve.page_origins)
        # Sockets are in folders that nobody else may enter; a port can become another user's at any time.
        monitor = None
        if isinstance(target, tuple) and not self._serve.allow_foreign:
            monitor = connection_stack.enter_context(
                monitor_port(connection, target[1], self._on_connection_lost)
            )
        connection_stack.enter_context(
            acceptor.forwarding(
                connection, target, request_filter, monitor.verify if monitor else None, self._cache
            )
        )
        if self._serve.detach and self._server and not self._server.detached:
            self._server.keep()
        self._stays = self._server is None or self._server.detached
        self._emit_ready(label, f"http://localhost:{self._local_port}{self._routes[0]}{self._query()}")


def _nothing(_: object) -> None:
    pass


def _has_ended(connection: Connection, server: Server) -> bool:
    """Return whether a server that was left is gone; False where that cannot be seen within a moment."""
    server_ref = server.server_ref
    try:
        if server_ref is None or not connection.alive or not connection.ping(_GLANCE):
            return False
        every = list_servers(connection, python=server_ref.python or None, timeout=_GLANCE * 2)
    except BokehSSHError:
        return False
    return not any(each.id == server_ref.id and each.state != "ended" for each in every)


def _can_connect(connection: Connection, path: str) -> bool:
    """Return whether the SSH server connects us to a socket."""
    try:
        connection.open_socket(path, timeout=connection.hop.timeout).close()
    except ForwardError:
        return False
    return True
