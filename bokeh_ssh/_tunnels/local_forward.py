"""The local end of a forward: listen here, connect there (``ssh -L``)."""

from __future__ import annotations

from bokeh_ssh._core.endpoint import Endpoint, check_instead, check_path, format_endpoint, format_short
from bokeh_ssh._core.errors import TargetUnreachableError, UsageError
from bokeh_ssh._core.events import Ready
from bokeh_ssh._core.forward_spec import Listen, check_http, is_loopback
from bokeh_ssh._core.host import Host, check_host, check_port
from bokeh_ssh._core.keywords import StrPath
from bokeh_ssh._core.settings import setting
from bokeh_ssh._forwarding.listener import LocalAcceptor, bind
from bokeh_ssh._forwarding.local_sockets import bind as bind_socket
from bokeh_ssh._forwarding.local_sockets import check_here
from bokeh_ssh._forwarding.remote_sockets import check_forbidden
from bokeh_ssh._forwarding.request_filter import RequestFilter
from bokeh_ssh._forwarding.static_cache import StaticCache, open_cache
from bokeh_ssh._ssh.connection import Connection
from bokeh_ssh._tunnels.lifecycle import TunnelInfo
from bokeh_ssh._tunnels.local_session import LocalSession, check_password
from bokeh_ssh._tunnels.openable import Openable
from bokeh_ssh._tunnels.options import LocalForwardOptions, arguments_of


def _target(port: int | None, host: str, socket: StrPath | None) -> Endpoint:
    if socket is not None:
        check_instead(socket, "remote_socket", remote_port=(port, None), remote_host=(host, "localhost"))
        check_path(str(socket), "remote_socket")
        return str(socket)
    if port is None:
        msg = "it is not said what to forward to"
        raise UsageError(msg, hint=f"give {setting('remote_port=')} or {setting('remote_socket=')}")
    check_port(port, "remote_port", zero=False)
    check_host(host)
    return host, port


class LocalPortForward:
    """Where one forward comes in here, and where it leads; stays while lines come and go.

    :param listen: where to listen, as :func:`parse_forward` gives it
    :param others: whether the other users of this machine are let in, see :class:`LocalAcceptor`; where it is
        not on loopback, everybody is
    :param http: whether it leads to a web server, so that each request is judged
    :param cache: answers requests for static files, and keeps those of the server, if it leads to one
    :ivar name: what it is called here: ``host:port``, or the path of a socket
    :ivar port: the port here; 0 where it is a socket
    :ivar target: where it leads
    :raises PortInUseError: if the port is taken
    """

    def __init__(
        self,
        session: LocalSession,
        listen: Listen | tuple[str, int | None],
        target: Endpoint,
        *,
        others: bool | None,
        http: bool = False,
        cache: StaticCache | None = None,
    ) -> None:
        self.target = target
        self._http = http
        self._cache = cache if http else None
        self._private = not others
        self._warn = session.life.warn
        self._connection_stack = session.connection_stack
        if isinstance(listen, str):
            made = bind_socket(check_here(listen, "local_socket"))
            session.life.stack.callback(made.close)
            sockets, address = [made.sock], ""
        else:
            host = "localhost" if listen[0] is None else listen[0]
            address = "0.0.0.0" if host in ("", "*") else host  # noqa: S104 - asked for
            sockets = bind(listen[1], address=address)
        others = others if is_loopback(address or "-") else True
        self._acceptor = session.open_acceptor(sockets, others)
        self.port = self._acceptor.port
        self.name = listen if isinstance(listen, str) else format_short((address, self.port))

    def route_to(self, connection: Connection) -> None:
        """Lead to the target as seen from the machine, as long as the connection lasts.

        :raises ForwardingRefusedError: the server forbids it
        :raises UsageError: if it leads back here
        """
        try:
            refuse_circle(connection, self.target, self._acceptor)
        except TargetUnreachableError as exc:
            if isinstance(self.target, str):
                check_forbidden(connection, self.target)
                check_password(connection)
            # As with ssh -L: the target may be started later. A prohibition will not change.
            self._warn(exc.message)
        leads = self._acceptor.forwarding(
            connection,
            self.target,
            RequestFilter(self.port) if self._http else None,
            cache=self._cache,
            site=str(self.target) if self._private else "",
        )
        self._connection_stack.enter_context(leads)


def refuse_circle(connection: Connection, target: Endpoint, acceptor: LocalAcceptor) -> None:
    """Connect to what local connections are to be led to, and refuse it where that is this very listener.

    :raises UsageError: if it is
    :raises TargetUnreachableError: if it cannot be connected to
    """
    if acceptor.is_reached_by(lambda: connection.open_socket(target, timeout=connection.hop.timeout)):
        msg = f"{format_endpoint(target)} is where this itself listens, so that it leads back to itself"
        raise UsageError(msg, host=connection.name, hint="choose another port or socket, here or there")


class LocalForward(Openable):
    """Forward a local port to a target as seen from ``host`` (``ssh -N -L``); either may be a Unix socket.

    >>> forward = LocalForward("example.org", "me", remote_port=8888)
    >>> forward.state
    'new'
    >>> LocalForward("example.org", "me", remote_socket="/tmp/app.sock", local_port=5006)
    <LocalForward 5006 -> /tmp/app.sock via example.org, new>

    :param host: the machine to log in to: a name, an address, ``user@host:port``, an ssh config alias, or
        a :class:`Host`
    :param user: the login name
    :param remote_port: the target's port; this or ``remote_socket`` must be given
    :param remote_socket: the absolute path of a Unix socket on ``host``, instead of a port
    :param local_port: 0 uses any free one; a number uses exactly that one; None prefers 5006
    :param remote_host: the target, as seen from ``host``
    :param bind_address: where to listen on this machine; anything but loopback opens the port to others
    :param allow_others: whether other users of this machine can connect. None refuses them, as far as the
        system knows them: a program that sends something and closes at once may belong to anybody, and is
        accepted, since it reads no answer. False refuses such programs too, with a warning. True accepts
        everybody, as ``ssh -L`` does. On systems other than Linux, which do not say who connects, everybody
        is accepted
    :param local_socket: the path of a Unix socket to listen on, instead of a port. Only this account can
        connect to it. It is removed at the end; one that another program has left behind is replaced
    :param http: the target is a web server: requests are checked as in a tunnel, so that pages of other sites
        cannot use it, and static files are kept (see ``cache``)
    :param cache: with ``http``: keep static files that the server calls immutable, or whose hash it sends, in
        this account's cache folder, and use them the next time; see ``bokeh-ssh cache``
    :param reconnect: reconnect when the connection is lost; the local port stays open meanwhile
    :param isolate: run it in a child process, so that a program that computes cannot slow it down
    :param on_event: is called with each event
    :param port: this and the other keywords of a login, up to ``compression``, are those of :class:`Host`
    :raises UsageError: if an argument cannot work
    """

    @arguments_of(LocalForwardOptions)
    def __init__(self, options: LocalForwardOptions, host: Host) -> None:
        self._options = options
        self._target = _target(options.remote_port, options.remote_host, options.remote_socket)
        check_instead(
            options.local_socket,
            "local_socket",
            local_port=(options.local_port, 0),
            bind_address=(options.bind_address, "localhost"),
            allow_others=(options.allow_others or None, None),
        )
        socket = options.local_socket
        self._socket = None if socket is None else check_here(socket, "local_socket")
        if options.local_port is not None:
            check_port(options.local_port, "local_port")
        if options.http:
            check_http(self._socket or (options.bind_address, 0))
        super().__init__(options, host, LocalForwardParts, options, host, self._target, self._socket)

    def __repr__(self) -> str:
        here = self._socket or self._info.local_port or self._options.local_port or "any"
        there = format_short(self._target)
        return f"<LocalForward {here} -> {there} via {self._label}, {self.state}>"

    @property
    def local_port(self) -> int:
        """The port on this machine; 0 where it is a socket.

        :raises TunnelClosedError: if it is not open
        """
        return self._open_info.local_port

    @property
    def remote_port(self) -> int:
        """The target's port; 0 where it is a socket."""
        return 0 if isinstance(self._target, str) else self._target[1]

    @property
    def local_socket(self) -> str | None:
        """The path of the socket on this machine; None where it is a port."""
        return self._socket

    @property
    def remote_socket(self) -> str | None:
        """The path of the target's socket; None where it is a port."""
        return self._target if isinstance(self._target, str) else None


class LocalForwardParts:
    """What an open :class:`LocalForward` consists of.

    :param socket: the path to listen on here; None where it is a port
    """

    def __init__(
        self,
        session: LocalSession,
        options: LocalForwardOptions,
        host: Host,
        target: Endpoint,
        socket: str | None,
    ) -> None:
        self._session = session
        self._options = options
        self._host = host
        self._target = target
        self._socket = socket
        self._forward: LocalPortForward | None = None

    @property
    def info(self) -> TunnelInfo:
        """What is known by now."""
        return TunnelInfo(local_port=self._forward.port if self._forward else 0)

    def open_local(self) -> None:
        """Listen here."""
        listen = self._socket or (self._options.bind_address, self._options.local_port)
        options, life = self._options, self._session.life
        cache = open_cache(life.stack, life.warn) if options.http and options.cache else None
        self._forward = LocalPortForward(
            self._session,
            listen,
            self._target,
            others=options.allow_others,
            http=options.http,
            cache=cache,
        )

    def connect_all(self) -> tuple[Ready, bool]:
        """Connect, and lead there."""
        assert self._forward
        connection = self._session.connect(self._host, ahead=(self._target,))
        self._forward.route_to(connection)
        here = self._socket or f"{self._options.bind_address}:{self._forward.port}"
        return Ready(host=connection.name, url=here), True
