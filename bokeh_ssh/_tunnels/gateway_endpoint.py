"""Where a gateway listens for a server: the ways to have it do so, and to find what listens already."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from bokeh_ssh._core.endpoint import Endpoint, as_name
from bokeh_ssh._core.errors import (
    BokehSSHError,
    ConnectionLostError,
    ForwardError,
    ServerNotFoundError,
    TargetUnreachableError,
    UsageError,
)
from bokeh_ssh._core.settings import setting
from bokeh_ssh._core.threads import Thread
from bokeh_ssh._core.waiting import wait, wanted
from bokeh_ssh._forwarding.published_sockets import published
from bokeh_ssh._server.probe import http_get
from bokeh_ssh._server.server import Server
from bokeh_ssh._ssh.auth.agent import Agent, agent_address
from bokeh_ssh._ssh.connection import Connection
from bokeh_ssh._tunnels.host_publisher import (
    PublicationRequest,
    UnavailableError,
    sidecar_endpoint,
    start_publisher_sidecar,
)
from bokeh_ssh._tunnels.options import GatewayOptions
from bokeh_ssh._tunnels.remote_forward import listening, to_peer

#: Seconds between two looks for what is not published yet: the first, and at most.
_PAUSE = 1.0
_LONGEST_PAUSE = 10.0
_GROWTH = 1.3
#: Seconds for the watch to end with its connection.
_GIVING_UP = 2.0


class NotPublishedError(ServerNotFoundError):
    """Nothing is published under that name, or what is does not answer."""


@dataclass(frozen=True)
class GatewayEndpoint:
    """Where a gateway listens.

    :ivar where: a socket's path there, or a loopback port
    :ivar by: who had it listen; None where that was somebody else
    :ivar name: what it is published under
    :ivar reason: why it was not the Bokeh host, though that was tried
    """

    where: Endpoint
    by: Literal["host", "relay"] | None = None
    name: str | None = None
    reason: str = ""


def find_published(gateway: Connection, name: str | None) -> GatewayEndpoint | None:
    """Find what is published there by name; None where no name is given, and nothing is.

    :param name: None takes the only one
    :raises ServerNotFoundError: if nothing of that name is published, or it is no Bokeh server
    :raises UsageError: if several are
    """
    names = published(gateway)
    if name is None and len(names) > 1:
        msg = f"several are published there: {', '.join(sorted(names))}"
        raise UsageError(msg, host=gateway.name, hint=f"say which, with {setting('name=')}")
    name = name or next(iter(names), None)
    if name is None:
        return None
    path, is_bokeh, silent = names.get(name, ""), False, False
    try:
        is_bokeh = bool(path) and http_get(gateway, path, "/metadata", timeout=gateway.hop.timeout).is_bokeh
    except (TargetUnreachableError, OSError):
        silent = True
    if not path:
        there = f" (there are: {', '.join(sorted(names))})" if names.keys() - {name} else ""
        msg = f"nothing is published under the name {name!r}{there}"
        hint = f"on the Bokeh host, run: bokeh-ssh publish app.py --gateway {gateway.name} --name {name}"
        raise NotPublishedError(msg, host=gateway.name, hint=hint)
    if silent:
        msg = f"what is published under the name {name!r} does not answer"
        raise NotPublishedError(msg, host=gateway.name, hint="see whether its server runs on the Bokeh host")
    if not is_bokeh:
        msg = f"what is published under the name {name!r} is not a Bokeh server"
        raise ServerNotFoundError(
            msg, host=gateway.name, hint=(f"use LocalForward with its {setting('remote_socket')}")
        )
    return GatewayEndpoint(path, name=name)


def await_published(
    gateway: Connection, name: str | None, seconds: float, on_wait: Callable[[str], None]
) -> GatewayEndpoint | None:
    """Find what is published there by name, as :func:`find_published`; wait for it where it is not yet.

    :param seconds: for how long; where no name is given, and nothing was found before, not at all
    :param on_wait: called once, with what is missing
    """
    deadline, pause, reported = time.monotonic() + seconds, _PAUSE, False
    while True:
        try:
            return find_published(gateway, name)
        except NotPublishedError as exc:
            if time.monotonic() + pause > deadline:
                raise
            if not reported:
                reported = True
                on_wait(f"{exc.message} yet; it is waited for")
        if not gateway.alive:
            raise gateway.lost_error()
        wait(threading.Event(), pause)
        pause = min(_LONGEST_PAUSE, pause * _GROWTH)


@contextlib.contextmanager
def watching(
    gateway: Connection, end: GatewayEndpoint, on_lost: Callable[[BokehSSHError], None]
) -> Iterator[None]:
    """Hold an idle connection to what is published; when that ends, and no new one can be made, it is gone.

    :param on_lost: called then, on a thread of its own
    """
    over = threading.Event()
    held: list[socket.socket] = []

    def watch() -> None:
        with wanted(None), contextlib.suppress(BokehSSHError, OSError):
            while not over.is_set():
                try:
                    sock = gateway.open_socket(str(end.where), timeout=gateway.hop.timeout)
                except ForwardError:
                    msg = f"what was published under the name {end.name!r} is gone"
                    on_lost(ConnectionLostError(msg, host=gateway.name, hint="publish it again"))
                    return
                held[:] = [sock]
                with sock:
                    while not over.is_set() and sock.recv(1):
                        pass
                over.wait(_PAUSE)  # a server may end what nobody uses, now and then

    thread = Thread(watch, name=f"bokeh-ssh published {end.name}")
    thread.start()
    try:
        yield
    finally:
        over.set()
        for sock in held:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        thread.join(_GIVING_UP)


@contextlib.contextmanager
def relay(
    request: PublicationRequest, *, again: bool, on_lost: Callable[[BokehSSHError], object], reason: str
) -> Iterator[GatewayEndpoint]:
    """Make the gateway listen for this program, which joins what arrives there to the server.

    :param again: whether it has listened for us before
    :param on_lost: called where it cannot listen any more
    :raises BokehSSHError: as :func:`listening`
    """
    handler = to_peer(request.gateway, request.host, request.target)
    with listening(
        request.gateway,
        request.wanted,
        handler,
        allow_exposed=request.allow_exposed,
        again=again,
        on_lost=on_lost,
    ) as where:
        yield GatewayEndpoint(where, "relay", reason=reason)


def host_sidecar(
    request: PublicationRequest,
    options: GatewayOptions,
    server: Server | None,
    route: str,
    warn: Callable[[str], object],
) -> GatewayEndpoint | None:
    """Publish a server that is left from the Bokeh host, beside it and for as long as it lives.

    :param warn: called where it is left, and not published for longer than this program lives
    :returns: None where it is not to be left, or what publishes it has yet to come back
    :raises UnavailableError: if the host cannot publish by itself
    """
    if server is None:
        return None
    made = sidecar_endpoint(server, request)
    if made and not _answers(request.gateway, made[0]):
        return None
    if made is None and not options.detach:
        return None
    if made is None and options.forward_agent:  # what publishes it must be able to come back without anybody
        warn(_ENDS_HERE + "an agent that is lent is not there for another login")
        return None
    try:
        where, name = made or start_publisher_sidecar(server, request, _new_names(server, route))
    except UnavailableError as exc:
        warn(_ENDS_HERE + exc.error.message)
        raise
    return GatewayEndpoint(where, "host", name)


_ENDS_HERE = "the server is left running, but its way through the gateway ends with this tunnel: "
#: Why a relay does not stay.
RELAY_ENDS = _ENDS_HERE + "a relay is this program's own"


def _new_names(server: Server, route: str) -> list[str]:
    """Return what it may be published under: what its app is called; that with the server's own id."""
    name = as_name(route.strip("/") or "bokeh")
    return [name, as_name(f"{name[:30]}-{server.server_ref.id}")] if server.server_ref else [name]


def agent_to_lend(gateway: Connection) -> Agent:
    """Return the agent that the host is to have for a moment; the one that would log in there from here.

    :raises UnavailableError: if there is none
    """
    address = agent_address(gateway.hop.config.identity_agent)
    if address is None:
        msg = "there is no SSH agent here to lend"
        hint = "start one, add your key to it (ssh-add), and leave IdentityAgent unset"
        raise UnavailableError(ForwardError(msg, host=gateway.name, hint=hint))
    return Agent(address)


def _answers(gateway: Connection, where: Endpoint) -> bool:
    try:
        http_get(gateway, where, "/metadata", timeout=gateway.hop.timeout)
    except (TargetUnreachableError, OSError):
        return False
    return True
