"""The remote end of a forward: the gateway listens, we connect (``ssh -R``)."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import socket
import threading
from collections.abc import Callable, Iterator

from bokeh_ssh._core.endpoint import (
    Endpoint,
    Origin,
    check_instead,
    check_name,
    check_path,
    format_endpoint,
    format_short,
)
from bokeh_ssh._core.errors import (
    BokehSSHError,
    ConnectionLostError,
    ForwardingRefusedError,
    GatewayExposedError,
    PortInUseError,
    UsageError,
)
from bokeh_ssh._core.events import Ready
from bokeh_ssh._core.host import Host, check_host, check_port
from bokeh_ssh._core.settings import setting
from bokeh_ssh._forwarding.listener_probe import ListenerProbe
from bokeh_ssh._forwarding.local_sockets import check_here
from bokeh_ssh._forwarding.published_sockets import named_socket
from bokeh_ssh._forwarding.remote_sockets import listening_at
from bokeh_ssh._server.options import LOOPBACK
from bokeh_ssh._ssh.connection import Connection
from bokeh_ssh._ssh.messages import CONNECT_FAILED
from bokeh_ssh._ssh.relay import SocketRelay
from bokeh_ssh._ssh.tcp import Address, resolve
from bokeh_ssh._ssh.transport import Channel, IncomingHandler
from bokeh_ssh._tunnels.lifecycle import TunnelInfo
from bokeh_ssh._tunnels.local_session import LocalSession
from bokeh_ssh._tunnels.openable import Openable
from bokeh_ssh._tunnels.options import RemoteForwardOptions, arguments_of

log = logging.getLogger("bokeh_ssh.forward")

_DIAL_TIMEOUT = 10.0
#: On Linux all of 127.0.0.0/8 is this machine, so that a listener on 127.0.0.1 alone does not answer here
#: while one on every address does. Elsewhere nothing answers, and nothing is learnt.
OTHER_LOOPBACK = "127.0.0.2"


def to_local(connection: Connection, target: Endpoint) -> IncomingHandler:
    """Make a handler that joins what arrives to ``target`` as seen from this machine.

    The connection is confirmed to the gateway only once the local one stands, so a server that is down
    looks like one.
    """
    addresses = _addresses(target)
    io_loop = connection.io_loop

    def handle(channel: Channel, origin: Origin) -> None:
        def dialled(sock: socket.socket | None, error: OSError | None) -> None:
            if sock is None:
                log.info("%s: %s", format_endpoint(target), error)
                channel.reject(CONNECT_FAILED)
                return
            channel.accept()
            channel.attach(io_loop.relay(sock, channel))

        io_loop.dial(addresses, _DIAL_TIMEOUT, dialled)

    return handle


class _Watched:
    """A handler that notices what this very process has connected.

    :param handler: takes everything else that arrives
    :ivar own: where from; None looks for nothing
    :ivar has_come: whether it has arrived
    """

    def __init__(self, handler: IncomingHandler) -> None:
        self._handler = handler
        self.own: Origin | None = None
        self.has_come = False

    def __call__(self, channel: Channel, origin: Origin) -> None:
        if self.own == origin:
            self.has_come = True
            channel.reject(CONNECT_FAILED)
        else:
            self._handler(channel, origin)


def _refuse_circle(connection: Connection, target: tuple[str, int], port: int, handler: _Watched) -> None:
    """Refuse a gateway that is this machine, and listens where its connections are to be led.

    :raises UsageError: if it does: each connection would make another one, without end
    """
    with contextlib.suppress(OSError), socket.socket() as sock:  # nothing listens there
        line = connection.transport.sock
        here = line.getsockname()[:1] if isinstance(line, socket.socket) else ()
        if port != target[1] or here != (connection.address,):
            return
        sock.settimeout(_DIAL_TIMEOUT)
        sock.bind((LOOPBACK, 0))
        handler.own = sock.getsockname()
        sock.connect(target)
        for _ in range(2):  # it comes before that is answered
            connection.ping(_DIAL_TIMEOUT)
    handler.own = None
    if handler.has_come:
        msg = f"port {port} there is what it is to lead to: the gateway is this machine"
        hint = f"choose another {setting('remote_port')}, or 0 for any free one"
        raise UsageError(msg, host=connection.name, hint=hint)


def _addresses(target: Endpoint) -> list[Address]:
    if isinstance(target, str):
        return [(socket.AF_UNIX, target)]
    return resolve(*target, name=target[0], timeout=_DIAL_TIMEOUT)


def to_peer(gateway: Connection, peer: Connection, target: Endpoint) -> IncomingHandler:
    """Make a handler that joins what arrives to ``target`` as seen from ``peer``: the relay."""

    def handle(channel: Channel, origin: Origin) -> None:
        def opened(onward: Channel) -> None:
            _join_channels(gateway, channel, peer, onward)

        def refused(code: int, text: str) -> None:
            log.info("%s: %s: %s", peer.name, format_endpoint(target), text or f"refused, reason {code}")
            channel.reject(CONNECT_FAILED)

        peer.open_channel(target, origin, opened, refused)

    return handle


def _join_channels(gateway: Connection, channel: Channel, peer: Connection, onward: Channel) -> None:
    """Join two channels, each on its own connection's loop, through a pair of sockets.

    The pair bounds what is on its way between the two; an end that breaks is reported to the other, since a
    socket pair cannot be reset.

    Called where ``onward`` was confirmed: so it has its sink before a target that speaks first can.
    """
    here, there = socket.socketpair()
    relays: list[SocketRelay] = []
    broken = threading.Event()

    def ended(clean: bool) -> None:
        if not clean:
            broken.set()
            for relay in relays:
                relay.break_off()

    def accept() -> None:
        channel.accept()  # sent by this thread, so nothing arrives before there is a sink
        relays.append(gateway.io_loop.relay(here, channel, ended))
        channel.attach(relays[-1])
        if broken.is_set():  # it may not have been called
            relays[-1].break_off()

    relays.append(peer.io_loop.relay(there, onward, ended))
    onward.attach(relays[0])
    gateway.io_loop.adopt(here, lambda: ended(clean=False))  # it may be over, and call nothing more
    gateway.io_loop.post(accept)


@contextlib.contextmanager
def listening(
    connection: Connection,
    where: Endpoint,
    handler: IncomingHandler,
    *,
    allow_exposed: bool,
    again: bool = False,
    on_lost: Callable[[BokehSSHError], object] | None = None,
    on_stranger: Callable[[int], object] | None = None,
) -> Iterator[Endpoint]:
    """Ask the connection's server to listen while the context lasts; yield where, with the real port.

    :param again: it listened there for us before the line was lost. An SSH server may hold on to that until
        it notices: it has to give up a socket; a port may be free a little later
    :param on_lost: called where a socket was removed there, and cannot be made again
    :param on_stranger: gets the port where somebody else has it on ::1, which many programs try first
    :raises ConnectionLostError: that port is still taken
    :raises PortInUseError: the port is taken there; also where the server says that it listens, but what
        connects there does not come here
    :raises SocketInUseError: the same for a socket
    :raises ForwardingRefusedError: the server forbids it
    :raises GatewayExposedError: a loopback port was asked for, and the server opened it to its network; or a
        socket, and others there may use it
    """
    if isinstance(where, str):
        words = {"allow_exposed": allow_exposed, "replace": again}
        with listening_at(connection, where, handler, on_lost=on_lost, **words) as path:
            yield path
        return
    proof = ListenerProbe(connection)
    try:
        bound = _listen(connection, where, proof.handle)
    except PortInUseError as exc:
        if not again:
            raise
        msg = f"port {where[1]} is not free yet: the lost connection still holds it, or somebody took it"
        raise ConnectionLostError(msg, host=connection.name, hint=exc.sentences[1]) from exc
    try:
        try:
            with _looking_aside(proof, int(bound[1]), on_stranger):
                _check_reach(connection, proof, str(bound[0]), int(bound[1]), again=again)
            if not allow_exposed and bound[0] in (LOOPBACK, "localhost"):
                _check_exposed(connection, proof, int(bound[1]))
        finally:
            proof.close()
        connection.transport.listen(bound, handler)
        yield where[0], int(bound[1])
    finally:
        connection.unlisten(bound)


def _listen(connection: Connection, where: tuple[str, int], handler: IncomingHandler) -> Endpoint:
    """Ask the server to listen; where it does not on 127.0.0.1, under the name that ``ssh -R`` asks for.

    OpenSSH compares PermitListen with that as text, and an administrator writes there what ``ssh`` says.
    """
    try:
        return connection.listen(where, handler)
    except ForwardingRefusedError:
        if where[0] == LOOPBACK:
            with contextlib.suppress(ForwardingRefusedError):
                return connection.listen(("localhost", where[1]), handler)
        raise


@contextlib.contextmanager
def _looking_aside(
    proof: ListenerProbe, port: int, on_stranger: Callable[[int], object] | None
) -> Iterator[None]:
    """Look meanwhile who has the port on ::1."""
    found: list[bool | None] = []

    def look() -> None:
        with contextlib.suppress(BokehSSHError, OSError):  # the line goes down: others meet that too
            found.append(proof.reaches(("::1", port)))

    thread = threading.Thread(target=look, name="bokeh-ssh ::1", daemon=True)
    if on_stranger is None:
        yield
        return
    thread.start()
    try:
        yield
    finally:
        thread.join()
    if found == [False]:
        on_stranger(port)


def _check_reach(
    connection: Connection, proof: ListenerProbe, address: str, port: int, *, again: bool
) -> None:
    """Refuse a port that the server says is ours, and that leads somewhere else.

    Where we may not connect there, nothing is learnt.
    """
    here = LOOPBACK if address in ("", "*", "localhost", "0.0.0.0") else address  # noqa: S104 - asked for
    if proof.reaches((here, port)) is not False:
        return
    msg = f"port {port} is taken there: what connects to it does not come here, though the server says so"
    hint = f"choose another {setting('remote_port')}, or 0 for any free one"
    if again:
        raise ConnectionLostError(msg, host=connection.name, hint=hint)
    raise PortInUseError(msg, host=connection.name, hint=hint, port=port, side="remote")


#: Addresses of which "localhost" is a name there.
_BOTH = (LOOPBACK, "localhost")


def _check_exposed(connection: Connection, proof: ListenerProbe, port: int) -> None:
    if is_exposed(proof, port):
        msg = f"it would open port {port} to its whole network (GatewayPorts yes)"
        hint = (
            "ask the administrator for GatewayPorts clientspecified, "
            f"or allow it with {setting('allow_exposed=True')}"
        )
        raise GatewayExposedError(msg, host=connection.name, hint=hint)


def is_exposed(proof: ListenerProbe, port: int) -> bool:
    """Return whether the server's port is bound to more than its loopback address, as far as can be seen."""
    return proof.reaches((OTHER_LOOPBACK, port)) is True


class RemoteForward(Openable):
    """Open a port on a gateway that leads to a target as seen from here (``ssh -N -R``).

    The Bokeh host runs this for a gateway that cannot reach it.

    >>> forward = RemoteForward("gateway.example.org", "me")
    >>> forward.remote_port
    5006

    :param gateway: the machine to log in to, see :class:`LocalForward`
    :param user: the login name
    :param remote_port: the port on the gateway; 0 takes any free one
    :param remote_socket: the absolute path of a Unix socket on the gateway instead of a port. Only the
        account there can connect to it. It is removed at the end; one at which nobody listens any more is
        replaced, if commands can be run there
    :param name: publish it under this name: on a socket in your private directory there, where
        only ``GatewayTunnel(gateway, name=...)`` of the same account finds it
    :param local_port: the port to connect to, as seen from here
    :param local_host: the host to connect to, as seen from here
    :param local_socket: the path of a Unix socket here to connect to, instead of a port
    :param bind_address: where the gateway listens; anything but loopback opens the port to its network,
        if its GatewayPorts allows it
    :param allow_exposed: accept a gateway that opens a loopback port to its network (``GatewayPorts yes``),
        or whose other users can use the socket
    :param reconnect: reconnect when the connection is lost, and have the gateway listen on the same port
    :param isolate: run it in a child process, so that a program that computes cannot slow it down
    :param on_event: is called with each event
    :param port: this and the other keywords of a login, up to ``compression``, are those of :class:`Host`
    :raises UsageError: if an argument cannot work
    """

    @arguments_of(RemoteForwardOptions)
    def __init__(self, options: RemoteForwardOptions, gateway: Host) -> None:
        check_port(options.remote_port, "remote_port")
        check_port(options.local_port, "local_port", zero=False)
        check_host(options.local_host)
        self._target: Endpoint = (options.local_host, options.local_port)
        if options.local_socket is not None:
            check_instead(
                options.local_socket,
                "local_socket",
                local_port=(options.local_port, RemoteForwardOptions.local_port),
                local_host=(options.local_host, RemoteForwardOptions.local_host),
            )
            self._target = check_here(options.local_socket, "local_socket")
        others: dict[str, tuple[object, object]] = {
            "remote_port": (options.remote_port, RemoteForwardOptions.remote_port),
            "bind_address": (options.bind_address, RemoteForwardOptions.bind_address),
        }
        socket_there = None if options.remote_socket is None else str(options.remote_socket)
        if socket_there is not None:
            check_instead(socket_there, "remote_socket", **others)
            check_path(socket_there, "remote_socket")
        if options.name is not None:
            check_name(options.name)
            check_instead(options.name, "name", **others, remote_socket=(options.remote_socket, None))
        port = 0 if options.remote_socket or options.name else options.remote_port
        info = TunnelInfo(remote_port=port, remote_socket=socket_there, name=options.name)
        super().__init__(
            options, gateway, RemoteForwardParts, options, gateway, self._target, info, info=info
        )

    def __repr__(self) -> str:
        where = self.remote_socket or self.name or self.remote_port
        return f"<RemoteForward {self._label}:{where} -> {format_short(self._target)}, {self.state}>"

    @property
    def remote_port(self) -> int:
        """The port on the gateway; once open, the real one for any free one; 0 where it is a socket."""
        return self._info.remote_port

    @property
    def local_port(self) -> int:
        """The port that is connected to; 0 where it is a socket."""
        return 0 if isinstance(self._target, str) else self._target[1]

    @property
    def name(self) -> str | None:
        """The name that it is published under; None where it has none."""
        return self._info.name

    @property
    def remote_socket(self) -> str | None:
        """The path of the gateway's socket; None where it is a port."""
        return self._info.remote_socket

    @property
    def local_socket(self) -> str | None:
        """The path of the socket that is connected to; None where it is a port."""
        return self._target if isinstance(self._target, str) else None


class RemoteForwardParts:
    """What an open :class:`RemoteForward` consists of.

    :param target: where it leads, as seen from here
    :param info: where the gateway is to listen
    :ivar info: what is known by now
    """

    def __init__(
        self,
        session: LocalSession,
        options: RemoteForwardOptions,
        gateway: Host,
        target: Endpoint,
        info: TunnelInfo,
    ) -> None:
        self.info = info
        self._session = session
        self._options = options
        self._gateway = gateway
        self._target = target
        self._again = False  # whether the gateway has listened for us before

    def open_local(self) -> None:
        """Open nothing here."""

    def _warn(self, port: int) -> None:
        text = (
            f"somebody else listens on [::1]:{port} there, which is tried first for localhost by many "
            f"programs: connect to 127.0.0.1:{port}, or choose another {setting('remote_port')}"
        )
        self._session.life.warn(text)

    def connect_all(self) -> tuple[Ready, bool]:
        """Connect, and have the gateway listen."""
        connection = self._session.connect(self._gateway)
        handler = _Watched(to_local(connection, self._target))
        if self.info.name is not None:
            path = named_socket(connection, self.info.name)
            self.info = dataclasses.replace(self.info, remote_socket=path)
        # Once the port is known it stays: others know it.
        where: Endpoint = self.info.remote_socket or (self._options.bind_address, self.info.remote_port)
        bound = self._session.connection_stack.enter_context(
            listening(
                connection,
                where,
                handler,
                allow_exposed=self._options.allow_exposed,
                again=self._again,
                on_lost=self._session.lose,
                on_stranger=None if self._again or self._options.bind_address not in _BOTH else self._warn,
            )
        )
        if not self._again and isinstance(bound, tuple) and isinstance(self._target, tuple):
            _refuse_circle(connection, self._target, bound[1], handler)
        self._again = True
        self.info = dataclasses.replace(self.info, remote_port=0 if isinstance(bound, str) else bound[1])
        where = f"{connection.name}:{self.info.remote_socket or self.info.remote_port}"
        return Ready(host=connection.name, url=where), True
