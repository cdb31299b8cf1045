"""How a tunnel gets its server: attached to, taken over, started; and taken back after a loss."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from urllib.parse import unquote

from bokeh_ssh._core.endpoint import Endpoint
from bokeh_ssh._core.errors import (
    BokehSSHError,
    ForwardError,
    LaunchError,
    PortInUseError,
    ServerExitedError,
    ServerGoneError,
    ServerNotFoundError,
)
from bokeh_ssh._core.events import Attached
from bokeh_ssh._core.settings import setting
from bokeh_ssh._forwarding.port_ownership import PortOwnershipMonitor, monitor_port
from bokeh_ssh._server.file_sync import FileSync
from bokeh_ssh._server.options import ANY, BOKEH_PORT, LOOPBACK, ServerOptions
from bokeh_ssh._server.probe import HttpProbe, ask_at_once, find_route, probe_server
from bokeh_ssh._server.registry import choose, list_servers
from bokeh_ssh._server.server import Server
from bokeh_ssh._ssh.connection import Connection
from bokeh_ssh._tunnels.lifecycle import UNREACHED
from bokeh_ssh._tunnels.local_session import LocalSession

#: Seconds of a round trip from which on a line is taken to be slow: on a nearer one a page is there at once.
_FAR = 0.01
#: Seconds for a look whether a server that was left is there.
_GLANCE = 1.0
#: Seconds for a first answer; a server that listens may have to get ready yet, and is asked again.
_ANSWER = 10.0
#: Seconds for a server that wants a login to write its address: some begin to answer first.
_ADDRESS = 3.0


@dataclass(frozen=True)
class FoundServer:
    """A server that a tunnel leads to.

    :ivar endpoint: where it listens, as seen from its machine
    :ivar port: the port there; 0 where it is a socket
    :ivar routes: the paths of its apps; that of another kind of server may have a query, with a secret
    :ivar key: what session ids must be signed with
    :ivar tls: whether it is known to speak TLS
    :ivar id: what names it on its machine
    :ivar held: what holds it; None where it is only attached to
    """

    endpoint: Endpoint
    port: int = 0
    routes: tuple[str, ...] = field(default=("/",), repr=False)
    key: str = field(default="", repr=False)
    tls: bool = False
    id: str = ""
    held: Server | None = None


@dataclass(frozen=True)
class Attachment:
    """Where a server listens, as it has just been seen over a connection.

    :ivar endpoint: a path, or a port of that machine
    :ivar probe: what answered; None where nothing did
    :ivar monitor: what watches over a port that was attached to; None where it may be another user's
    """

    connection: Connection
    endpoint: str | int
    probe: HttpProbe | None
    monitor: PortOwnershipMonitor | None


class ServerAcquisition:
    """Finds a server or starts one as the keywords say, follows it, and ends it if it is to end.

    :param bind: has the tunnel listen on this machine, unless it does; gets the port to prefer, returns which
    :param follow: gets a server that is about to start
    :ivar found: the server, once there is one
    :ivar outcome: what became of it, see :class:`Closed`
    :ivar reports: whether it reports a server that could not be told to end
    """

    def __init__(
        self,
        session: LocalSession,
        options: ServerOptions,
        bind: Callable[[int], int],
        follow: Callable[[Connection, Server], None],
    ) -> None:
        self.found: FoundServer | None = None
        self.outcome = ""
        self._session = session
        self._options = options
        self._bind = bind
        self._follow = follow
        self._file_sync: FileSync | None = None
        self._no_sockets = False  # whether the SSH server connects nobody to sockets
        self._left_behind = False
        self.reports = True
        self._attached: Attachment | None = None

    def open_local(self) -> None:
        """Begin to watch the files that the server is to have."""
        # Said once all is closed: the thread that connects again may be leaving the server behind just now.
        self._session.life.stack.callback(self._report_if_left_behind)
        if self._options.bundle:
            self._file_sync = FileSync(self._options.bundle, self._session.life.emit)
            if self._options.dev:
                self._session.life.stack.enter_context(self._file_sync.watching())

    def acquire(self, connection: Connection, *, must_sign: bool = False) -> tuple[FoundServer, bool]:
        """Return the server from before, or find or start one.

        :param must_sign: whether others can get to the server, wherever it listens itself
        :returns: the server, and whether it is the one from before
        """
        if self.found and self.found.held:
            found = self._readopt(connection, self.found.held)
            return (found, True) if found else (self._launch(connection, must_sign), False)
        if self._options.server is not None:
            return self._take_over(connection, self._options.server), False
        if not self._options.must_launch:
            found = self._attach(connection)
            if found:
                return found, True
        return self._launch(connection, must_sign), False

    def forget_server(self) -> None:
        """Have the next one started, and none looked for: the machine that it was on is gone."""
        self.found = None
        self._left_behind = False

    # Attaching.

    def _attach(self, connection: Connection) -> FoundServer | None:
        port = self._options.attach_port
        before = self.found
        found = self.attach_to(connection, port)
        if found is None and self._options.launch is False:
            msg = f"nothing answers on port {port}"
            hint = (
                f"start a Bokeh server there, give its {setting('remote_port')}, "
                f"or let {setting('launch=True')} start one"
            )
            raise ServerNotFoundError(msg, host=connection.name, hint=hint)
        if found is None and before:  # it will be back, and another one would not be it
            msg = f"nothing answers on port {port} any more"
            raise ServerNotFoundError(msg, host=connection.name, hint="start it again")
        return found

    def attach_to(self, connection: Connection, port: int) -> FoundServer | None:
        """Check that a Bokeh server answers on ``port``, and that it is ours.

        :returns: None where nothing listens; or something else does, and another port will do
        :raises ForeignServerError: if it belongs to another user there
        :raises PortInUseError: if something else answers on the port that was asked for
        """
        options, timeout = self._options, connection.hop.timeout
        monitor = None
        if not options.allow_foreign:  # it looks while the server is asked
            watch = monitor_port(connection, port, self._session.lose)
            monitor = self._session.connection_stack.enter_context(watch)
        probe, route = probe_server(connection, port, timeout=timeout)
        if probe is None or not probe.is_bokeh:
            if monitor:
                monitor.close()
            if probe is None or (options.launch is None and not options.remote_port):
                return None
            msg = f"port {port} is taken by something that is not a Bokeh server"
            hint = f"choose another {setting('remote_port')}, or leave it out for any free one"
            raise PortInUseError(msg, host=connection.name, hint=hint, port=port, side="remote")
        endpoint = ("localhost", port)  # it may listen on ::1 alone
        if monitor:
            monitor.check_owner()
        self._attached = Attachment(connection, port, probe, monitor)
        # Only now: were that machine this one, our own listener would have answered. The server's own port,
        # since without more options its pages may come from no other.
        local_port = self._bind(port)
        self.outcome = "left"
        if self.found:
            return self.found
        self.found = FoundServer(endpoint, port, (route,), tls=probe.tls)
        self._session.life.emit(Attached(host=connection.name, port=port))
        if port != local_port:
            text = (
                f"the server on port {port} may take pages from localhost:{port} only; if the page stays "
                f"blank, start it with --allow-websocket-origin localhost:{local_port}"
            )
            self._session.life.warn(text, connection.name)
        return self.found

    def find_attachment(self, connection: Connection, endpoint: Endpoint) -> Attachment | None:
        """Return what is known of an endpoint that was asked over that very connection."""
        attached = self._attached
        where = endpoint[1] if isinstance(endpoint, tuple) else endpoint
        fits = attached and attached.connection is connection and attached.endpoint == where
        return attached if fits else None

    def attach_published(self, gateway: Connection, where: Endpoint, name: str) -> FoundServer:
        """Attach to a server that is published on a gateway by name."""
        self._bind(BOKEH_PORT)
        self.outcome = "left"
        if self.found is None:
            route = find_route(gateway, where, timeout=gateway.hop.timeout)
            self.found = FoundServer(where, routes=(route,))
            self._session.life.emit(Attached(host=gateway.name, name=name))
        return self.found

    # Starting, and taking over.

    def _launch(self, connection: Connection, must_sign: bool) -> FoundServer:
        local_port = self._bind(BOKEH_PORT)  # first: the server must know which origin its pages have

        def begin(server: Server) -> None:
            self._register(server, server.cancel)
            self._follow(connection, server)

        while True:
            launch = dataclasses.replace(
                self._options.launch_spec(local_port), compresses=lambda: is_far(connection)
            )
            if self._no_sockets:
                launch = dataclasses.replace(launch, socket=False)
            if must_sign and launch.sign:
                launch = dataclasses.replace(launch, sign=True)
            server = Server.start(
                connection,
                launch,
                on_event=self._session.on_server_event,
                on_begin=begin,
                bring=self._file_sync.upload_all if self._file_sync else _nothing,
            )
            found = self._hold(connection, server)
            for route in found.routes:
                if "%" in route:
                    # Bokeh compares the address as the browser encodes it with the name as it is: always 404.
                    msg = f"Bokeh cannot serve an app under the name {unquote(route)!r}"
                    hint = "rename the file so that its name has letters, digits, - and _ only"
                    raise LaunchError(msg, host=connection.name, hint=hint, log=server.log)
            if not server.socket:
                return found
            try:
                sock = connection.open_socket(server.socket, timeout=connection.hop.timeout)
            except ForwardError:
                # It listens, as its supervisor has seen, so what is missing is the permission
                # (AllowStreamLocalForwarding), which OpenSSH does not tell from a socket that nobody serves.
                self._no_sockets = True
                connection.check_ports()  # or another one would be started to no end
                server.stop()
            else:
                path = "" if found.tls else self.ready_path(found)  # a server with TLS would log it
                probe = ask_at_once(sock, path, timeout=_ANSWER)
                self._attached = Attachment(connection, server.socket, probe, None)
                return found

    def ready_path(self, found: FoundServer) -> str:
        """Return the path of what is asked for to see whether a server answers; no app is run for that."""
        options, route = self._options, found.routes[0]
        return options.ready or ("/" if options.plain else route.rstrip("/") + "/metadata")

    def note_address(self, *, wants_login: bool) -> FoundServer:
        """Take note of the address that a server of another kind has written, such as Jupyter with its token.

        :param wants_login: whether its pages cannot be seen without one, and so it is worth waiting for
        """
        assert self.found
        held = self.found.held
        address = held.await_address(_ADDRESS if wants_login and self._options.plain else 0.0) if held else ""
        if address:
            self.found = dataclasses.replace(self.found, routes=(address,))
        return self.found

    def _take_over(self, connection: Connection, name: str) -> FoundServer:
        """Take over a server of the account that runs, as if it had been started here.

        :raises ServerNotFoundError: if there is none of that name
        :raises UsageError: if there are several
        :raises ServerTakenError: if somebody uses it
        """
        every = [
            each for each in list_servers(connection, python=self._options.python_path) if not each.elsewhere
        ]
        listed = choose(every, None if name == ANY else name, host=connection.name)
        local_port = self._bind(next(iter(listed.pages), BOKEH_PORT))
        server = Server.adopt(
            connection,
            listed.server_ref,
            launch=self._options.launch_spec(local_port),
            on_event=self._session.on_server_event,
            on_begin=lambda begun: self._register(begun, begun.close),
            timeout=self._options.launch_timeout,
        )
        found = self._hold(connection, server)
        self._session.life.emit(
            Attached(host=connection.name, port=server.port, id=listed.id, pid=server.pid)
        )
        if listed.pages and local_port not in listed.pages:
            text = (
                f"the server takes pages from localhost:{listed.pages[0]}, so this one may stay blank; free "
                "that port here and open it again"
            )
            self._session.life.warn(text, connection.name)
        return found

    def _readopt(self, connection: Connection, before: Server) -> FoundServer | None:
        """Take back the server from before the loss; None where it has ended, and is to be started again."""
        server_ref = before.adoptable_ref
        if server_ref is None:  # it was lost while it started, and ends by itself: nobody had seen it
            return None
        try:
            server = Server.adopt(
                connection,
                server_ref,
                launch=before.launch,
                on_event=self._session.on_server_event,
                on_begin=lambda begun: self._register(begun, begun.close),
            )
        except (ServerGoneError, ServerExitedError) as exc:
            if self._options.server is not None:
                raise
            text = f"{exc.message}, so it is started anew; pages that were open have to be loaded again"
            self._session.life.warn(text, connection.name)
            return None
        return self._hold(connection, server)

    def _register(self, server: Server, end: Callable[[], object]) -> None:
        self._session.register(server)
        self._session.connection_stack.callback(end)  # closing while it opens ends the start too

    def _hold(self, connection: Connection, server: Server) -> FoundServer:
        self._session.connection_stack.callback(self._release, connection, server)
        if self._file_sync:
            self._session.connection_stack.callback(self._file_sync.sync_to, None)
            self._file_sync.sync_to(server.uploads)
        self._left_behind = False
        self._session.server = server
        self.found = FoundServer(
            server.socket or (LOOPBACK, server.port),
            server.port,
            server.routes or ("/",),
            server.key,
            server.tls,
            server.server_ref.id if server.server_ref else "",
            server,
        )
        why = server.no_socket
        if self._options.plain and server.port:
            why = "write {socket} into command in place of {port}, if it can listen on one"
        if why and not server.key and self._options.signed is None:
            text = f"other users of that machine can open the server ({why})"
            self._session.life.warn(text, server.host)
        return self.found

    # Letting go.

    def keep_if_detached(self) -> None:
        """Have the server run on at the end, where that is wanted."""
        held = self.found.held if self.found else None
        if self._options.detach and held and not held.detached:
            held.keep()

    def _release(self, connection: Connection, server: Server) -> None:
        """End the server; or leave it for its grace where the connection is to be made again."""
        if not self.found or server is not self.found.held:  # another one was started in its place
            server.close()
        elif not self._session.life.leaving:
            server.close()
            self._left_behind = True
        elif server.detached:
            server.close()
            self.outcome = "left"
            if _has_ended(connection, server):
                self.outcome = "ended"
                text = "the server was to run on, and has ended with its session: see bokeh-ssh doctor"
                self._session.life.warn(text)
        elif not server.stop() and server.lost:
            self._report_left_behind(server)
        else:
            self.outcome = "ended"

    def _report_if_left_behind(self) -> None:
        if self._left_behind and self.found and self.found.held:
            self._report_left_behind(self.found.held)

    def _report_left_behind(self, server: Server) -> None:
        if not self.reports:
            return
        self.outcome = "left" if server.detached else "unreached"
        if not server.detached:
            self._session.life.warn(UNREACHED.format(self._options.grace), server.host)


def is_far(connection: Connection) -> bool:
    """Return whether the line is slow, as far as is known by now."""
    return connection.transport.rtt > _FAR


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
