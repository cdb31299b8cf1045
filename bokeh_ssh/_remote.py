"""The remote end of a forward: the gateway listens, we connect (``ssh -R``)."""

from __future__ import annotations

import contextlib
import logging
import socket
from collections.abc import Iterator
from typing import Any

from bokeh_ssh._connection import Connection, connect
from bokeh_ssh._dial import resolve
from bokeh_ssh._errors import ForwardError, GatewayExposedError
from bokeh_ssh._events import OnEvent, Ready
from bokeh_ssh._lifecycle import Lifecycle
from bokeh_ssh._pump import Pipe
from bokeh_ssh._stream import Stream
from bokeh_ssh._target import Host, as_host, check_host, check_port
from bokeh_ssh._transport import IncomingHandler

log = logging.getLogger("bokeh_ssh.forward")

_CONNECT_FAILED = 2
_DIAL_TIMEOUT = 10.0
#: On Linux all of 127.0.0.0/8 is this machine, so that a listener on 127.0.0.1 alone does not answer here
#: while one on every address does. Elsewhere nothing answers, and nothing is learnt.
_OTHER_LOOPBACK = "127.0.0.2"
LOOPBACK = "127.0.0.1"


def to_local(connection: Connection, host: str, port: int) -> IncomingHandler:
    """Make a handler that joins what arrives to ``host:port`` as seen from this machine.

    The connection is confirmed to the gateway only once the local one stands, so a server that is down
    looks like one.
    """
    addresses = resolve(host, port, name=host, timeout=_DIAL_TIMEOUT)
    pump = connection.pump

    def handle(stream: Stream, origin: tuple[str, int]) -> None:
        def dialled(sock: socket.socket | None, error: OSError | None) -> None:
            if sock is None:
                log.info("%s port %d: %s", host, port, error)
                stream.reject(_CONNECT_FAILED)
                return
            stream.accept()
            stream.attach(pump.splice(sock, stream))

        pump.dial(addresses, _DIAL_TIMEOUT, dialled)

    return handle


def to_peer(gateway: Connection, peer: Connection, host: str, port: int) -> IncomingHandler:
    """Make a handler that joins what arrives to ``host:port`` as seen from ``peer``: the relay."""

    def handle(stream: Stream, origin: tuple[str, int]) -> None:
        def opened(onward: Stream) -> None:
            gateway.pump.post(lambda: _join(gateway, stream, peer, onward))

        def refused(code: int, text: str) -> None:
            log.info("%s: %s port %d: %s", peer.name, host, port, text or f"refused, reason {code}")
            stream.reject(_CONNECT_FAILED)

        peer.open_tcp(host, port, origin, opened, refused)

    return handle


def _join(gateway: Connection, stream: Stream, peer: Connection, onward: Stream) -> None:
    """Splice two streams, each on its own connection's pump, through a pair of sockets.

    The pair bounds what is on its way between the two; an end that breaks is told to the other, since a
    socket pair cannot be reset.
    """
    here, there = socket.socketpair()
    pipes: list[Pipe] = []

    def ended(clean: bool) -> None:
        if not clean:
            for connection, pipe in zip((gateway, peer), pipes, strict=False):  # the second may not exist yet
                connection.pump.post(pipe.abort)

    stream.accept()
    pipes.append(gateway.pump.splice(here, stream, ended))
    pipes.append(peer.pump.splice(there, onward, ended))
    stream.attach(pipes[0])
    onward.attach(pipes[1])


@contextlib.contextmanager
def listening(
    connection: Connection,
    address: str,
    port: int,
    handler: IncomingHandler,
    *,
    allow_exposed: bool,
) -> Iterator[int]:
    """Have the connection's server listen while the context lasts; gives the real port.

    :raises PortInUseError: the port is taken there
    :raises ForwardingRefusedError: the server forbids it
    :raises GatewayExposedError: a loopback port was asked for, and the server opened it to its network
    """
    bound = connection.listen(address, port, _refuse)
    try:
        if not allow_exposed and address in (LOOPBACK, "localhost") and is_exposed(connection, bound):
            msg = f"it would open port {bound} to its whole network (GatewayPorts yes)"
            hint = (
                "ask the administrator for GatewayPorts clientspecified, or allow it with allow_exposed=True"
            )
            raise GatewayExposedError(msg, host=connection.name, hint=hint)
        connection.transport.listen(address, bound, handler)
        yield bound
    finally:
        connection.unlisten(address, bound)


def _refuse(stream: Stream, origin: tuple[str, int]) -> None:
    stream.reject(_CONNECT_FAILED)


def is_exposed(connection: Connection, port: int) -> bool:
    """Tell whether the server's port is bound to more than its loopback address, as far as can be seen."""
    try:
        connection.open_socket(_OTHER_LOOPBACK, port, timeout=5).close()
    except ForwardError:
        return False
    return True


class RemoteForward(Lifecycle):
    """Have a gateway listen and forward what arrives to a port as seen from here (``ssh -N -R``).

    This is what the Bokeh host runs so that a gateway which cannot reach it can serve it.

    >>> forward = RemoteForward("gateway.example.org", "me")
    >>> forward.remote_port
    5006

    :param gateway: the machine to log in to, see :class:`LocalForward`
    :param user: the login name
    :param remote_port: the port on the gateway; 0 takes any free one
    :param local_port: the port to connect to, as seen from here
    :param local_host: the host to connect to, as seen from here
    :param bind_address: where the gateway listens; anything but loopback opens the port to its network,
        if its GatewayPorts allows it
    :param allow_exposed: go on where a gateway with ``GatewayPorts yes`` opens a loopback port to its network
    :param isolate: run it in a child process, so that a program that computes cannot slow it
    :param on_event: takes the progress events
    :param login: the login keywords, see :class:`Host`
    :raises UsageError: if an argument cannot work
    """

    _shared = ("_remote_port",)

    def __init__(
        self,
        gateway: str | Host,
        user: str | None = None,
        *,
        remote_port: int = 5006,
        local_port: int = 5006,
        local_host: str = "localhost",
        bind_address: str = LOOPBACK,
        allow_exposed: bool = False,
        isolate: bool = False,
        on_event: OnEvent | None = None,
        **login: Any,
    ) -> None:
        super().__init__(on_event, isolate)
        self._host = as_host(gateway, user, **login)
        self._label = self._host.target.host
        check_port(remote_port, "remote_port")
        check_port(local_port, "local_port", zero=False)
        check_host(local_host)
        self._target = (local_host, local_port)
        self._bind_address = bind_address
        self._allow_exposed = allow_exposed
        self._wanted = remote_port
        self._remote_port = remote_port

    def __repr__(self) -> str:
        target = f"{self._target[0]}:{self._target[1]}"
        return f"<RemoteForward {self._label}:{self._remote_port} -> {target}, {self._state}>"

    @property
    def remote_port(self) -> int:
        """The port on the gateway; once open, the real one where any free one was asked for."""
        return self._remote_port

    @property
    def local_port(self) -> int:
        """The port that is connected to."""
        return self._target[1]

    def _start(self, stack: contextlib.ExitStack) -> None:
        connection = stack.enter_context(connect(self._host, on_event=self._emit))
        connection.on_lost(lambda _: self._lose(connection.lost_error()))
        handler = to_local(connection, *self._target)
        self._remote_port = stack.enter_context(
            listening(
                connection, self._bind_address, self._wanted, handler, allow_exposed=self._allow_exposed
            )
        )
        self._emit(Ready(host=self._label, url=f"{self._label}:{self._remote_port}"))
