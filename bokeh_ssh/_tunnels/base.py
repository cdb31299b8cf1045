"""What the two tunnels do alike: what their users read and call, and what an open one consists of."""

from __future__ import annotations

import logging
import webbrowser
from typing import Any

from bokeh_ssh._core.endpoint import Endpoint
from bokeh_ssh._core.errors import BokehSSHError, LaunchTimeoutError, ServerNotFoundError
from bokeh_ssh._core.events import Ready
from bokeh_ssh._core.host import Host
from bokeh_ssh._core.settings import setting
from bokeh_ssh._core.this_machine.jupyter_hub import find_hub
from bokeh_ssh._forwarding.listener import LocalAcceptor, bind, open_acceptor
from bokeh_ssh._forwarding.port_ownership import monitor_port
from bokeh_ssh._forwarding.request_filter import RequestFilter
from bokeh_ssh._forwarding.site_cache import name_site
from bokeh_ssh._forwarding.static_cache import StaticCache, open_cache
from bokeh_ssh._server.options import BOKEH_PORT, ServerOptions
from bokeh_ssh._server.probe import HttpProbe, http_get, wait_until_ready
from bokeh_ssh._server.server import Server
from bokeh_ssh._server.session_ids import new_session_id
from bokeh_ssh._server.static_source import StaticSource
from bokeh_ssh._ssh.connection import Connection
from bokeh_ssh._tunnels import bokeh_client, notebook
from bokeh_ssh._tunnels.lifecycle import TunnelInfo
from bokeh_ssh._tunnels.local_forward import LocalPortForward
from bokeh_ssh._tunnels.local_session import LocalSession
from bokeh_ssh._tunnels.openable import Openable
from bokeh_ssh._tunnels.redirect_page import open_in_browser
from bokeh_ssh._tunnels.server_acquisition import FoundServer, ServerAcquisition, is_far

log = logging.getLogger("bokeh_ssh")


class Tunnel(Openable):
    """What users read and call of both tunnels."""

    _widget: notebook.StatusWidget | None = None

    @property
    def local_port(self) -> int:
        """The port on this machine.

        :raises TunnelClosedError: if the tunnel is not open
        """
        self._lifecycle.check_open()
        return self._info.local_port

    @property
    def remote_port(self) -> int:
        """The port of the Bokeh server (of the gateway, where only the gateway is known).

        0 where it listens on a Unix socket that only your account there may use: the default for a server
        that is started.

        :raises TunnelClosedError: if the tunnel is not open
        """
        self._lifecycle.check_open()
        return self._info.remote_port

    @property
    def server(self) -> str | None:
        """What names the server among those of your account there, for ``server=`` of a later tunnel.

        None where it was only found, or where the machine has no private directory to find it by.
        """
        return self._info.server or None

    @property
    def detached(self) -> bool:
        """Whether the server runs on when the tunnel is closed: left on purpose, or not started here."""
        return self._info.detached

    @property
    def urls(self) -> tuple[str, ...]:
        """The addresses to open, one for each app.

        Where this program runs on a JupyterHub, they lead by way of its jupyter-server-proxy, and are only
        paths where the hub's name is not known. Programs there use ``http://localhost:{local_port}``.

        Where the server answers only to signed sessions, each address carries the id of a new one: it opens
        one page, for whoever has it.

        :raises TunnelClosedError: if the tunnel is not open
        """
        port, info = self.local_port, self._info
        return tuple(page_address(port, f"{route}{self._query()}", tls=info.tls) for route in info.routes)

    @property
    def forwards(self) -> tuple[str, ...]:
        """What ``forwards=`` has opened here: an address such as ``localhost:6006`` each, in their order.

        :raises TunnelClosedError: if the tunnel is not open
        """
        self._lifecycle.check_open()
        return tuple(name for name, _ in self._info.forwards)

    @property
    def url(self) -> str:
        """The address to open: that of the first app.

        :raises TunnelClosedError: if the tunnel is not open
        """
        return self.urls[0]

    @property
    def log(self) -> tuple[str, ...]:
        """The last lines of the server that this tunnel started; empty where it attached to one."""
        return self._lifecycle.session.log

    def show(self, *, inline: bool | None = None, height: int | str = 600) -> bool | None:
        """Show the first app: in the cell of a notebook, elsewhere in the browser.

        :param inline: False opens the browser from a notebook too
        :param height: of the frame in the cell: pixels, or what CSS takes
        :returns: None in a cell; else whether a browser was found, and can be led there without telling
            others the address
        """
        if notebook.is_here() if inline is None else inline:
            notebook.display(notebook.frame(self.url, height))
            return None  # or the cell would show it
        return self._browse()

    def _browse(self) -> bool:
        """Open the first app in the browser, whose command line every account of this machine can read."""
        url = self.url
        if "?" not in url:  # it has no session's id in it
            return webbrowser.open(url)
        try:
            page = open_in_browser(url)
        except OSError as exc:
            log.warning(
                "no browser was opened: the page that leads it to the app cannot be written (%s)", exc
            )
            return False
        if page is None:
            return False
        self._lifecycle.stack.callback(page.remove)
        return True

    def _repr_html_(self) -> str:
        """Be a link in a notebook, with the machines on the way and what went over it."""
        text, _, state = repr(self).strip("<>").rpartition(", ")
        return notebook.summary(text, state, self.url if state == "ready" else "", self.status())

    def _repr_mimebundle_(self, **_: object) -> dict[str, Any]:
        """Be that with buttons beside it, and kept up to date, where the kernel has ipywidgets."""
        self._widget = self._widget or notebook.make_widget(self)
        return self._widget.mimebundle() if self._widget else {}

    def pull_session(self, **kwargs: Any) -> Any:
        """Open a session of the first app from this program (``bokeh.client.pull_session``).

        It works in a notebook too, where Bokeh's own does not.

        :param kwargs: passed on, such as ``session_id`` or ``arguments``
        :raises UsageError: if Bokeh is not installed here, or its version is too far from the server's
        """
        return bokeh_client.pull(self._client_url, self._info.key, **kwargs)

    def push_session(self, document: Any = None, **kwargs: Any) -> Any:
        """Open a session with a document of this program's (``bokeh.client.push_session``), likewise.

        :param document: None takes the current one (``curdoc()``)
        :param kwargs: passed on, such as ``session_id``
        :raises UsageError: as :meth:`pull_session`
        """
        return bokeh_client.push(self._client_url, self._info.key, document, **kwargs)

    @property
    def _client_url(self) -> str:
        return self._origin("127.0.0.1") + self._info.routes[0]

    def _origin(self, name: str) -> str:
        return f"{'https' if self._info.tls else 'http'}://{name}:{self.local_port}"

    def server_document(self, **kwargs: Any) -> str:
        """Return the ``<script>`` that embeds the first app in a page (``bokeh.embed.server_document``).

        The page's own origin must be allowed with ``extra_origins=``.

        :raises UsageError: if Bokeh is not installed here
        """
        url = self._origin("localhost") + self._info.routes[0]
        return bokeh_client.embed(url, self._query(), **kwargs)

    def _query(self) -> str:
        return session_query(self._info.key)


def page_address(port: int, route: str, *, tls: bool) -> str:
    """Return the address that a browser opens, where the tunnel listens on a port here.

    :param route: the path, with its query
    """
    hub = None if tls else find_hub()  # its proxy speaks plain HTTP to this machine
    return hub.address(port, route) if hub else f"{'https' if tls else 'http'}://localhost:{port}{route}"


def session_query(key: str) -> str:
    """Return the query of an address with the id of a new session, where ``key`` has to sign it."""
    return f"?bokeh-session-id={new_session_id(key)}" if key else ""


class TunnelParts:
    """What both tunnels consist of while they are open.

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
        self._acquisition = ServerAcquisition(session, options, self._bind, self._fetch_static)

    @property
    def info(self) -> TunnelInfo:
        """What is known by now."""
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
        """Listen here for the extra forwards, and on a port that was asked for."""
        self._acquisition.open_local()
        if self._options.cache:
            self._cache = open_cache(self._session.life.stack, self._session.life.warn)
        others = self._options.allow_others
        for listen, target, http in self._options.passages:
            forward = LocalPortForward(
                self._session, listen, target, others=others, http=http, cache=self._cache
            )
            self._port_forwards.append(forward)
        if self._options.local_port:
            self._bind(BOKEH_PORT)  # a port that is taken here is told before anything is dialled

    def _bind(self, prefer: int) -> int:
        """Listen on this machine, unless that is done; stays until the tunnel is closed."""
        if self._acceptor is None:
            life, others = self._session.life, self._options.allow_others
            sockets = bind(self._options.local_port, prefer=prefer)
            self._acceptor = open_acceptor(life.stack, sockets, life.warn, others, self._session.attempts)
        return self._acceptor.port

    def _fetch_static(self, connection: Connection, server: Server) -> None:
        """Have files of BokehJS sent while the server starts, where the line is slow enough for that."""
        if self._cache is None:
            return
        connection.send_keepalive()  # the shortest of several round trips is the line's
        source = StaticSource(connection, self._cache.hashes, self._cache.expect)
        self._session.connection_stack.callback(source.close)

        def start(python: str, folder: str) -> None:
            if is_far(connection):  # as is known by then
                source.start(python, folder)

        server.on_package(start)

    def _connect_host(self, host: Host, via: Connection | None = None) -> Connection:
        """Connect to the machine that the extra forwards are led by, and lead them there."""
        connection = self._session.connect(host, via)
        self._lead_forwards(connection)
        return connection

    def _lead_forwards(self, connection: Connection) -> None:
        for forward in self._port_forwards:
            forward.route_to(connection)

    def _start_forwarding(self, connection: Connection, endpoint: Endpoint, found: FoundServer) -> Ready:
        """Lead local connections to the server, once it has answered that way; no app is run for that.

        :param endpoint: where it is found, as seen from the connection's server
        :raises LaunchTimeoutError: if a server that we started does not answer in time
        :raises ServerNotFoundError: if one that we attached to does not
        :raises ForeignServerError: if what listens on the port there is another user's
        """
        probe = self._await_answer(connection, endpoint, found)
        found = self._acquisition.note_address(wants_login=probe.wants_login)
        assert self._acceptor  # a server is found for the port that its pages have here
        session, port = self._session, self._acceptor.port
        request_filter = RequestFilter(port, self._options.page_origins, proxied=bool(find_hub()))
        # Sockets are in folders that nobody else may enter; a port can become another user's at any time.
        verify = None
        if isinstance(endpoint, tuple) and not self._options.allow_foreign:
            attached = self._acquisition.find_attachment(connection, endpoint)
            monitor = (attached and attached.monitor) or session.connection_stack.enter_context(
                monitor_port(connection, endpoint[1], session.lose)
            )
            monitor.check_owner()
            verify = monitor.verify if monitor.wait() else None
        leads = self._acceptor.forwarding(
            connection,
            endpoint,
            request_filter,
            verify,
            self._cache,
            site=self._name_site(connection, endpoint, found),
            ahead=self._may_wait,
        )
        session.connection_stack.enter_context(leads)
        self._acquisition.keep_if_detached()
        route = f"{found.routes[0]}{session_query(found.key)}"
        return Ready(host=connection.name, url=page_address(port, route, tls=self._tls))

    def _name_site(self, connection: Connection, endpoint: Endpoint, found: FoundServer) -> str:
        """Name the server for whom alone files are kept; empty where they are kept for none."""
        options = self._options
        if options.allow_others:  # what a server shows one person it may not show another
            return ""
        if found.held is None:
            return name_site(connection, str(endpoint))
        # It listens elsewhere each time.
        return name_site(connection, repr((options.words, options.apps, options.python_path, options.cwd)))

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
        except TimeoutError as exc:
            msg = f"the server did not answer through the tunnel ({exc})"
            host = self._session.life.label
            error: BokehSSHError
            if launched:
                hint = f"give a longer {setting('launch_timeout')}, or see the log"
                error = LaunchTimeoutError(msg, host=host, hint=hint, log=self._session.log)
            else:
                hint = "check that it runs and that it is a web server"
                error = ServerNotFoundError(msg, host=host, hint=hint)
            raise error from exc
        # Known of Tornado alone: one of gunicorn's workers serves nobody else while a connection is idle.
        self._may_wait = probe.is_bokeh
        self._note_answer(probe, path, known=launched and not options.plain)
        return probe

    def _note_answer(self, probe: HttpProbe, path: str, *, known: bool) -> None:
        """Take note of how the server is to be opened, and warn of what its pages will meet; once.

        :param known: whether it is to have what was asked for
        """
        first, self._tls = not self._tls, probe.tls
        if probe.tls and first:
            text = f"the server speaks TLS, so its address is an https one; {probe.certificate}"
            self._session.life.warn(f"{text} (SSH has checked the machine, and encrypts, in any case)")
        if known and probe.status >= 400 and not probe.wants_login:
            self._session.life.warn(f"the server answers {path} with status {probe.status}: see its log")
