"""The parts of an open tunnel, and how it gets its server: attached to, taken over or started."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

from bokeh_ssh._core.endpoint import Endpoint
from bokeh_ssh._core.errors import (
    BokehSSHError,
    ForwardError,
    ForwardingRefusedError,
    LaunchTimeoutError,
    PortInUseError,
    ServerExitedError,
    ServerGoneError,
    ServerNotFoundError,
)
from bokeh_ssh._core.events import Attached, Ready, ignore
from bokeh_ssh._core.host import Host
from bokeh_ssh._core.settings import setting, shown
from bokeh_ssh._core.this_machine.jupyter_hub import HubProxy
from bokeh_ssh._forwarding.listener import LocalAcceptor, bind
from bokeh_ssh._forwarding.port_ownership import PortOwnershipMonitor, monitor_port
from bokeh_ssh._forwarding.request_filter import RequestFilter
from bokeh_ssh._forwarding.spare_channels import SPARE, SpareChannels, open_spare
from bokeh_ssh._forwarding.static_cache import StaticCache, open_cache
from bokeh_ssh._server.file_sync import FileSync
from bokeh_ssh._server.launch_spec import is_servable
from bokeh_ssh._server.options import ANY, BOKEH_PORT, LOOPBACK, ServerOptions
from bokeh_ssh._server.probe import (
    HttpProbe,
    UnreadyError,
    ask_at_once,
    find_route,
    http_get,
    probe_port,
    probe_server,
    wait_until_ready,
)
from bokeh_ssh._server.registry import choose, list_servers
from bokeh_ssh._server.server import Server
from bokeh_ssh._server.server_state import OnPackage
from bokeh_ssh._server.session_ids import new_session_id
from bokeh_ssh._server.static_source import StaticSource
from bokeh_ssh._ssh.connection import Connection
from bokeh_ssh._tunnels.lifecycle import UNREACHED, TunnelInfo
from bokeh_ssh._tunnels.local_forward import LocalPortForward, refuse_circle
from bokeh_ssh._tunnels.local_session import LocalSession

#: Seconds of a round trip from which on a line is taken to be slow: on a nearer one a page is there at once.
_FAR = 0.01
#: Seconds for a look whether a server that was left is there, and for the end of a session.
_GLANCE = 1.0
#: Seconds for a first answer; a server that listens may have to get ready yet, and is asked again.
_ANSWER = 10.0
#: Seconds for an answer of what was found, after which it has no idle connection any more: it may serve one
#: after the other.
_UNCLAIMED = 1.5
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
    :ivar packed: the socket there that leads to it over a slow line; empty where none does
    """

    endpoint: Endpoint
    port: int = 0
    routes: tuple[str, ...] = field(default=("/",), repr=False)
    key: str = field(default="", repr=False)
    tls: bool = False
    id: str = ""
    held: Server | None = None
    packed: str = ""


@dataclass(frozen=True)
class Attachment:
    """Where a server listens, as just seen over a connection.

    :ivar endpoint: a path, or a port of that machine
    :ivar probe: what answered; None where nothing did
    :ivar monitor: what watches over a port that was attached to; None where it may be another user's
    :ivar spare: channels for the first page
    """

    connection: Connection
    endpoint: str | int
    probe: HttpProbe | None
    monitor: PortOwnershipMonitor | None
    spare: SpareChannels | None = None


class ServerAcquisition:
    """Finds or starts a server as the keywords say, follows it, and ends it at the end if it should.

    :param bind: has the tunnel listen on this machine, unless it does; gets the port to prefer, returns which
    :param check_route: refuses a port there that leads back here
    :param fetch_static: begins to fetch static files over a connection; returns what :class:`Server` calls
        with where they are
    :ivar found: the server, once there is one
    :ivar outcome: what became of it, see :class:`Closed`
    :ivar reports: whether it reports a server that could not be told to end
    :ivar wanted: what channels will be wanted to once we are logged in, and None for a session
    """

    def __init__(
        self,
        session: LocalSession,
        options: ServerOptions,
        bind: Callable[[int], int],
        check_route: Callable[[Connection, int], None],
        fetch_static: Callable[[Connection], OnPackage | None],
    ) -> None:
        self.found: FoundServer | None = None
        self.outcome = ""
        self._session = session
        self._options = options
        self._must_launch = options.must_launch
        self._bind = bind
        self._check_route = check_route
        self._fetch_static = fetch_static
        self._file_sync: FileSync | None = None
        self._no_sockets = False  # whether the SSH server connects nobody to sockets
        self._left_behind = False
        self.reports = True
        self.wanted: list[Endpoint | None] = []
        self._attached: Attachment | None = None

    def open_local(self) -> None:
        """Start to watch the files to upload."""
        self.wanted = self._list_wanted()
        # Said once all is closed: the thread that connects again may be leaving the server behind just now.
        self._session.life.stack.callback(self._report_if_left_behind)
        if self._options.bundle:
            self._file_sync = FileSync(self._options.bundle, self._session.life.emit)
            if self._options.dev:
                self._session.life.stack.enter_context(self._file_sync.watching())

    def acquire(
        self, connection: Connection, *, must_sign: bool = False, packs: bool = False
    ) -> tuple[FoundServer, bool]:
        """Return the server from before the loss, or find or start one.

        :param must_sign: whether others can get to the server, wherever it listens itself
        :param packs: whether what it sends is unpacked here, should the line be slow
        :returns: the server, and whether it is the one from before
        """
        found, same = None, True
        if self.found and self.found.held:
            found = self._readopt(connection, self.found.held)
        elif self._options.server is not None:
            found, same = self._take_over(connection, self._options.server), False
        elif not self._must_launch:
            found = self._attach(connection)
        if found is None:
            found, same = self._launch(connection, must_sign, packs), False
        self.wanted = self._list_wanted()
        return found, same

    def _list_wanted(self) -> list[Endpoint | None]:
        options, found = self._options, self.found
        again = 1 if options.plain else 1 + SPARE
        if found and found.held:
            return [None, found.endpoint, *[found.packed or found.endpoint] * (again - 1)]
        if options.server is not None:
            return [None]
        if self._must_launch:
            return [None, None] if options.bundle else [None]  # for the supervisor, and for SFTP
        looks = again if found else 1 + again  # at first, its app's path is asked for too
        watch = [] if options.allow_foreign else [None]
        return [*[("localhost", options.attach_port)] * looks, *watch]

    def forget_server(self) -> None:
        """Start a new server next time, without looking for one: its machine is gone."""
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
        :raises ForwardError: if what does speaks only TLS that is too old, or cannot be asked
        """
        options, timeout = self._options, connection.hop.timeout
        self._check_route(connection, port)
        monitor = None
        if not options.allow_foreign:  # it looks while the server is asked
            before = self._attached.monitor if self._attached else None
            watch = monitor_port(connection, port, self._session.lose, before)
            monitor = self._session.connection_stack.enter_context(watch)
        connection.close_unclaimed(_UNCLAIMED)
        if self.found:
            probe, route = probe_port(connection, port, timeout=timeout), ""
        else:
            probe, route = probe_server(connection, port, timeout=timeout)
        if probe is None or not probe.is_bokeh:
            if monitor:
                monitor.close()
            if probe is None or (options.launch is None and not options.remote_port):
                return None
            if probe.error and not self.found:  # one that is expected back is tried again
                raise probe.error
            msg = f"port {port} is taken by something that is not a Bokeh server"
            hint = f"choose another {setting('remote_port')}, or leave it out for any free one"
            if probe.tls:  # it may be one that wants a certificate of its visitors
                msg = f"port {port} speaks TLS, and does not answer as a Bokeh server ({probe.certificate})"
                hint = f"forward it as it is: bokeh-ssh forward {connection.name} --remote-port {port}"
            raise PortInUseError(msg, host=connection.name, hint=hint, port=port, side="remote")
        endpoint = ("localhost", port)  # it may listen on ::1 alone
        # Not before: what is no Bokeh server may serve one connection after the other.
        spare = self._open_spare(connection, endpoint, monitor)
        if monitor:
            monitor.check_owner()
        self._attached = Attachment(connection, port, probe, monitor, spare)
        # Only now: were that machine this one, our own listener would have answered. The server's own port,
        # since without more options its pages may come from no other.
        local_port = self._bind(port)
        self._expect_left()
        if self.found:
            return self.found
        self.found = FoundServer(endpoint, port, (route or "/",), options.attach_key, tls=probe.tls)
        self._session.life.emit(Attached(host=connection.name, port=port))
        if route:
            self._check_name(route, connection.name)
        else:
            text = (
                f"the server on port {port} has no page at / (--prefix, --disable-index): "
                "add the path of its app to the address"
            )
            self._session.life.warn(text, connection.name)
        if port != local_port:
            text = (
                f"the server on port {port} may take pages from localhost:{port} only; if the page stays "
                f"blank, start it with --allow-websocket-origin localhost:{local_port}"
            )
            self._session.life.warn(text, connection.name)
        return self.found

    def _open_spare(
        self, connection: Connection, endpoint: Endpoint, monitor: PortOwnershipMonitor | None = None
    ) -> SpareChannels | None:
        """Ask for the channels of the first page, while the tunnel is not open yet."""
        if self._options.plain:  # it may serve nobody else while a connection is idle
            return None
        spare = open_spare(connection, endpoint, monitor.verify if monitor else None)
        self._session.connection_stack.callback(spare.close)
        return spare

    def _expect_left(self) -> None:
        """Say that the server that was found keeps running, for as long as the connection to it works."""
        self.outcome = "left"
        self._session.connection_stack.callback(self._lose_sight)

    def _lose_sight(self) -> None:
        life = self._session.life
        if life.error or not life.leaving:
            self.outcome = ""

    def find_attachment(self, connection: Connection, endpoint: Endpoint) -> Attachment | None:
        """Return what is known of an endpoint that was asked over that very connection."""
        attached = self._attached
        where = endpoint[1] if isinstance(endpoint, tuple) else endpoint
        fits = attached and attached.connection is connection and attached.endpoint == where
        return attached if fits else None

    def attach_published(self, gateway: Connection, where: Endpoint, name: str) -> FoundServer:
        """Attach to a server that is published on a gateway by name."""
        self._bind(BOKEH_PORT)
        self._expect_left()
        if self.found is None:
            route = find_route(gateway, where, timeout=gateway.hop.timeout) or "/"
            self.found = FoundServer(where, routes=(route,), key=self._options.attach_key)
            self._session.life.emit(Attached(host=gateway.name, name=name))
            self._check_name(route, gateway.name)
        return self.found

    def _check_name(self, route: str, host: str) -> None:
        """Warn if the only app of a server that was found has a name that Bokeh lists and does not serve."""
        if not is_servable(route, route.rpartition("/")[0]):
            text = f"Bokeh cannot serve an app under the name {unquote(route)!r}; rename it"
            self._session.life.warn(text, host)

    # Starting, and taking over.

    @property
    def _takers(self) -> dict[str, Any]:
        """What of the session takes the server's events and lines, and closes it."""
        session = self._session
        return {
            "on_event": session.on_server_event,
            "on_log": session.life.on_log,
            "stack": session.connection_stack,
        }

    def _launch(self, connection: Connection, must_sign: bool, packs: bool) -> FoundServer:
        local_port = self._bind(BOKEH_PORT)  # first: the server must know which origin its pages have

        while True:
            launch = self._options.launch_spec(
                local_port,
                compresses=lambda: is_far(connection),
                packs=packs,
                sockets=not self._no_sockets,
                must_sign=must_sign,
            )
            if "%" in launch.prefix:
                text = (
                    f"jupyter-server-proxy 4.6 quotes the % of {launch.prefix} once more, so the hub "
                    "does not lead to the pages: use ssh -L to this port instead"
                )
                self._session.life.warn(text, connection.name)
            server = Server.start(
                connection,
                launch,
                on_package=self._fetch_static(connection),
                **self._takers,
                bring=self._file_sync.upload_all if self._file_sync else ignore,
            )
            found = self._hold(connection, server)
            if found.routes[0].endswith("/") and self._options.names_app_in_command:
                found = self._find_route(connection, found)
                launch.check_routes(found.routes, connection.name)
            if not isinstance(found.endpoint, str):
                return found
            try:
                sock = connection.open_socket(found.endpoint, timeout=connection.hop.timeout)
            except ForwardError:
                # It listens, as its supervisor has seen, so what is missing is the permission
                # (AllowStreamLocalForwarding); OpenSSH says the same of a socket that nobody serves.
                self._no_sockets = True
                connection.check_ports()  # or another one would be started to no end
                server.stop()
                server.await_close(_GLANCE)
            else:
                path = "" if found.tls else self.ready_path(found)  # a server with TLS would log it
                spare = self._open_spare(connection, found.packed or found.endpoint)
                probe = ask_at_once(sock, path, timeout=_ANSWER)
                self._attached = Attachment(connection, found.endpoint, probe, None, spare)
                return found

    def _find_route(self, connection: Connection, found: FoundServer) -> FoundServer:
        """Ask the server where its app is, which only its command knows."""
        with contextlib.suppress(ForwardError):  # no sockets here, which is looked at next
            where, root, timeout = found.endpoint, found.routes[0], connection.hop.timeout
            route = find_route(connection, where, timeout=timeout, root=root, tls=found.tls) or root
            self.found = found = dataclasses.replace(found, routes=(route,))
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
        address = held.state.log.address if held else ""
        if held and wants_login and self._options.plain:
            address = held.await_address(_ADDRESS)
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
            timeout=self._options.launch_timeout,
            **self._takers,
        )
        found = self._hold(connection, server)
        self._session.life.emit(
            Attached(host=connection.name, port=server.port, id=listed.id, pid=server.pid)
        )
        if listed.pages and local_port not in listed.pages:
            text = f"the server takes pages from localhost:{listed.pages[0]}, so this one may stay blank"
            text += "; open it again at that port, when it is free here"
            self._session.life.warn(text, connection.name)
        return found

    def _readopt(self, connection: Connection, before: Server) -> FoundServer | None:
        """Take back the server from before the loss; None if it has ended, and a new one is needed."""
        server_ref = before.adoptable_ref
        if server_ref is None:  # it was lost while it started, and ends by itself: nobody had seen it
            return None
        try:
            server = Server.adopt(connection, server_ref, launch=before.launch, **self._takers)
        except (ServerGoneError, ServerExitedError) as exc:
            if self._options.server is not None:
                raise
            text = f"{exc.message}, so a new one is started; open pages have to be reloaded"
            self._session.life.warn(text, connection.name)
            return None
        return self._hold(connection, server)

    def _hold(self, connection: Connection, server: Server) -> FoundServer:
        self._session.connection_stack.callback(self._release, connection, server)
        if self._file_sync:
            self._session.connection_stack.callback(self._file_sync.sync_to, None)
            self._file_sync.sync_to(server.uploads)
        self._left_behind = False
        self._session.server = server
        listening, key = server.state.listening, server.state.secrets.key
        self.found = FoundServer(
            listening.socket or (LOOPBACK, listening.port),
            listening.port,
            listening.routes or ("/",),
            key,
            listening.tls,
            server.state.started.id,
            server,
            listening.packed if listening.packed and is_far(connection) else "",
        )
        if not listening.socket:  # not before: a server that is not noted is not ended
            endpoint = self._find_permitted(connection, listening.port)
            self.found = dataclasses.replace(self.found, endpoint=endpoint)
        why = listening.no_socket
        if self._options.plain and listening.port:
            command = shown(setting("command"))
            why = f"write {{socket}} into {command} in place of {{port}}, if it can listen on one"
        if why and not key and self._options.signed is None:
            text = f"other users of that machine can open the server ({why})"
            self._session.life.warn(text, server.host)
        return self.found

    def _find_permitted(self, connection: Connection, port: int) -> Endpoint:
        """Return by which name the SSH server connects to a port: ``permitopen`` may have one and no other.

        As "localhost" it may be another user's, on ::1; so the port is watched over.
        """
        for name in (LOOPBACK, "localhost"):
            try:
                connection.open_socket((name, port), timeout=connection.hop.timeout).close()
            except ForwardingRefusedError:
                continue
            except ForwardError:  # as is said when it is asked
                pass
            return name, port
        return LOOPBACK, port

    # Letting go.

    def keep_if_detached(self) -> None:
        """Keep the server running at the end if that is wanted."""
        held = self.found.held if self.found else None
        if self._options.detach and held and not held.detached:
            held.keep()

    def _release(self, connection: Connection, server: Server) -> None:
        """End the server; or leave it for its grace time if the connection will be made again."""
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
                text = "the server was detached, but has ended with its session: see bokeh-ssh doctor"
                self._session.life.warn(text)
        elif not server.stop() and server.state.exit_status is None:
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
    """Return whether the line is slow, as far as is known."""
    return connection.transport.rtt > _FAR


def _has_ended(connection: Connection, server: Server) -> bool:
    """Return whether a server that was left is gone; False if that cannot be seen quickly."""
    server_ref = server.server_ref
    try:
        if server_ref is None or not connection.alive or not connection.ping(_GLANCE):
            return False
        every = list_servers(connection, python=server_ref.python or None, timeout=_GLANCE * 2)
    except BokehSSHError:
        return False
    return not any(each.id == server_ref.id and each.state != "ended" for each in every)


class TunnelParts:
    """The parts of a tunnel while it is open; this one leads to the machine itself.

    :param host: the machine that is logged in to first
    """

    def __init__(self, session: LocalSession, options: ServerOptions, host: Host) -> None:
        self._session = session
        self._options = options
        self._host = host
        self._acceptor: LocalAcceptor | None = None
        self._cache: StaticCache | None = None
        self._may_wait = False  # whether the server takes connections that say nothing yet
        self._tls = False  # whether the server speaks it
        self._port_forwards: list[LocalPortForward] = []
        self._acquisition = ServerAcquisition(
            session, options, self._bind, self._check_route, self._fetch_static
        )

    @property
    def info(self) -> TunnelInfo:
        """What is known so far."""
        found = self._acquisition.found or FoundServer("")
        return TunnelInfo(
            local_port=self._acceptor.port if self._acceptor else 0,
            remote_port=found.port,
            forwards=tuple((each.name, each.target) for each in self._port_forwards),
            routes=found.routes,
            key=found.key,
            server=found.id,
            tls=self._tls,
            detached=found.held.detached if found.held else bool(found.endpoint),
            grace=self._options.grace,
            outcome=self._acquisition.outcome,
        )

    def open_local(self) -> None:
        """Listen on this machine for the extra forwards, and on a port that was asked for."""
        self._acquisition.open_local()
        if self._options.cache:
            self._cache = open_cache(self._session.life.stack, self._session.life.warn)
        others = self._options.allow_others
        for listen, target, http in self._options.parsed_forwards:
            forward = LocalPortForward(
                self._session, listen, target, others=others, http=http, cache=self._cache
            )
            self._port_forwards.append(forward)
        if self._options.local_port:
            self._bind(BOKEH_PORT)  # a port that is taken here is reported before anything is dialled

    def _bind(self, prefer: int) -> int:
        """Listen on this machine, unless it does already, until the tunnel is closed."""
        if self._acceptor is None:
            sockets = bind(self._options.local_port, prefer=prefer)
            self._acceptor = self._session.open_acceptor(sockets, self._options.allow_others)
        return self._acceptor.port

    def _check_route(self, connection: Connection, port: int) -> None:
        """Refuse to attach to a port of this machine on which the tunnel itself listens."""
        if self._acceptor and self._acceptor.port == port:
            with contextlib.suppress(ForwardError):  # nothing is there
                refuse_circle(connection, ("localhost", port), self._acceptor)

    def _fetch_static(self, connection: Connection) -> OnPackage | None:
        """Fetch files of BokehJS while the server starts, if the line is slow enough for that to help."""
        if self._cache is None:
            return None
        connection.send_keepalive()  # the shortest of several round trips is the line's
        source = StaticSource(connection, self._cache.hashes, self._cache.expect)
        self._session.connection_stack.callback(source.close)

        def start(python: str, folder: str) -> None:
            if is_far(connection):  # as is known by then
                source.start(python, folder)

        return start

    def connect_all(self) -> tuple[Ready, bool]:
        """Connect, find or start a server, and forward to it."""
        connection = self._reach()
        found, same = self._acquisition.acquire(connection, packs=True)
        return self._start_forwarding(connection, found.endpoint, found, found.packed), same

    def _reach(self) -> Connection:
        return self._connect_host(self._host, ahead=self._acquisition.wanted)

    def _connect_host(
        self, host: Host, via: Connection | None = None, ahead: Sequence[Endpoint | None] = ()
    ) -> Connection:
        """Connect to the machine that the extra forwards go through, and route them over it."""
        ahead = (*(forward.target for forward in self._port_forwards), *ahead)
        connection = self._session.connect(host, via, ahead=ahead)
        self._start_extra_forwards(connection)
        return connection

    def _start_extra_forwards(self, connection: Connection) -> None:
        for forward in self._port_forwards:
            forward.route_to(connection)

    def _start_forwarding(
        self, connection: Connection, endpoint: Endpoint, found: FoundServer, packed: str = ""
    ) -> Ready:
        """Forward local connections to the server, once it has answered that way; this runs no app.

        :param endpoint: where it is found, as seen from the connection's server
        :param packed: where what it sends is packed
        :raises LaunchTimeoutError: if a server that we started does not answer in time
        :raises ServerNotFoundError: if one that we attached to does not
        :raises ForeignServerError: if what listens on the port there is another user's
        """
        probe = self._await_answer(connection, endpoint, found)
        found = self._acquisition.note_address(wants_login=probe.wants_login)
        assert self._acceptor  # a server is found for the port that its pages have here
        session, port = self._session, self._acceptor.port
        request_filter = RequestFilter(
            port, self._options.page_origins, "extra_origins", proxied=bool(self._options.hub)
        )
        # Sockets are in folders that nobody else may enter; a port can become another user's at any time.
        verify = None
        attached = self._acquisition.find_attachment(connection, endpoint)
        if isinstance(endpoint, tuple) and not self._options.allow_foreign:
            monitor = (attached and attached.monitor) or session.connection_stack.enter_context(
                monitor_port(connection, endpoint[1], session.lose)
            )
            monitor.check_owner()
            verify = monitor.verify if monitor.wait() else None
        spare = attached.spare if attached else None
        if self._may_wait:
            spare = spare or open_spare(connection, packed or endpoint, verify)
        elif spare:
            spare.close()
            spare = None
        leads = self._acceptor.forwarding(
            connection,
            endpoint,
            request_filter,
            verify,
            self._cache,
            site=self._name_site(endpoint, found),
            spare=spare,
            packed=packed,
        )
        session.connection_stack.enter_context(leads)
        self._acquisition.keep_if_detached()
        url = page_address(port, found.routes[0], found.key, self._options.hub, tls=self._tls)
        return Ready(host=connection.name, url=url)

    def _name_site(self, endpoint: Endpoint, found: FoundServer) -> str:
        """Name, on its machine, the server that files are kept for; empty if none are for a single one."""
        options = self._options
        if options.allow_others:  # what a server shows one person it may not show another
            return ""
        if found.held is None:
            return str(endpoint)
        # It listens elsewhere each time.
        return repr((options.words, options.apps, options.python_path, options.cwd))

    def _await_answer(self, connection: Connection, endpoint: Endpoint, found: FoundServer) -> HttpProbe:
        options, launched = self._options, found.held is not None
        path = self._acquisition.ready_path(found)

        def accept(probe: HttpProbe) -> bool:
            if options.ready:
                return 200 <= probe.status < 400
            # Whatever a server says, it answers: a login of its own, or a page that it does not have.
            return (probe.status > 0 or probe.tls) and not (launched and probe.is_unavailable)

        attached = self._acquisition.find_attachment(connection, endpoint)
        probe = attached.probe if attached and (launched or not options.ready) else None
        try:
            if probe is None or not accept(probe):
                probe = wait_until_ready(
                    lambda timeout: http_get(connection, endpoint, path, timeout=timeout, tls=found.tls),
                    timeout=options.launch_timeout if launched else 15.0,
                    accept=accept,
                    broken=self._session.life.check_unbroken,
                )
        except UnreadyError as exc:
            msg = f"the server did not answer through the tunnel ({exc})"
            host = self._session.life.label
            error: BokehSSHError
            if launched:
                hint = f"give a longer {setting('launch_timeout')}, or see the log"
                if 400 <= exc.status < 500:  # of a page that is not there, or needs a login
                    hint = f"give {setting('ready=')} a page that opens without a login, or leave it out"
                error = LaunchTimeoutError(msg, host=host, hint=hint, log=self._session.log)
            else:
                hint = "check that it runs and that it is a web server"
                error = ServerNotFoundError(msg, host=host, hint=hint)
            raise error from exc
        # Known of Tornado alone: one of gunicorn's workers serves nobody else while a connection is idle.
        self._may_wait = probe.is_bokeh
        # Several apps of a command's own have an index in their place, and nothing else there.
        own = found.routes[0].endswith("/") and options.names_app_in_command
        self._note_answer(probe, path, known=launched and not options.plain and not own)
        return probe

    def _note_answer(self, probe: HttpProbe, path: str, *, known: bool) -> None:
        """Note how the server is opened, and warn once of what its pages will meet.

        :param known: whether it is to have what was asked for
        """
        first, self._tls = not self._tls, probe.tls
        if probe.tls and first:
            text = f"the server speaks TLS, so its address is an https one; {probe.certificate}"
            self._session.life.warn(f"{text} (SSH has checked the machine, and encrypts, in any case)")
        if known and probe.status >= 400 and not probe.wants_login:
            self._session.life.warn(f"the server answers {path} with status {probe.status}: see its log")


def page_address(
    port: int, route: str, key: str = "", hub: HubProxy | None = None, *, tls: bool, name: str = "localhost"
) -> str:
    """Return the address that a browser opens, where the tunnel listens on a port here.

    :param route: the path
    :param key: signs the id of a new session; empty where there need be none
    :param hub: by way of which the page is opened, if this program runs on one
    :param name: what this machine is called
    """
    route += session_query(key)
    if hub and not tls:  # its proxy speaks plain HTTP to this machine
        return hub.address(port, route)
    return f"{'https' if tls else 'http'}://{name}:{port}{route}"


def session_query(key: str) -> str:
    """Return the query of an address with the id of a new session, where ``key`` has to sign it."""
    return f"?bokeh-session-id={new_session_id(key)}" if key else ""
