"""Situation two: a gateway stands between."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from typing import Literal, get_args

from bokeh_ssh._core.backoff import pause_before
from bokeh_ssh._core.endpoint import Endpoint, check_name
from bokeh_ssh._core.errors import BokehSSHError, ConnectionLostError, ServerNotFoundError, UsageError
from bokeh_ssh._core.events import Ready, ReverseForwarded, ignore
from bokeh_ssh._core.host import Host, check_port, parse_target
from bokeh_ssh._core.settings import set_to, setting
from bokeh_ssh._core.waiting import wait
from bokeh_ssh._forwarding.published_sockets import Spot, private_socket
from bokeh_ssh._server.options import LOOPBACK
from bokeh_ssh._server.probe import is_answering
from bokeh_ssh._server.server import Server
from bokeh_ssh._ssh.connection import Connection
from bokeh_ssh._ssh.route import alike, goes_its_own_way
from bokeh_ssh._tunnels.base import Tunnel
from bokeh_ssh._tunnels.gateway_endpoint import (
    RELAY_ENDS,
    GatewayEndpoint,
    agent_to_lend,
    await_published,
    host_sidecar,
    relay,
    watching,
)
from bokeh_ssh._tunnels.host_publisher import PublicationRequest, UnavailableError, publish_from_host
from bokeh_ssh._tunnels.lifecycle import TunnelInfo
from bokeh_ssh._tunnels.local_session import LocalSession
from bokeh_ssh._tunnels.options import GatewayOptions, Reverse, arguments_of
from bokeh_ssh._tunnels.remote_forward import OTHER_LOOPBACK
from bokeh_ssh._tunnels.tunnel_parts import FoundServer, TunnelParts


class GatewayTunnel(Tunnel):
    """Open a Bokeh server through a gateway's port (``ssh -R`` there, ``ssh -L`` here).

    Three shapes:

    - ``GatewayTunnel(gateway, user)``: the Bokeh host publishes by itself (``bokeh-ssh publish``, or
      :class:`RemoteForward`); this is the local half.
    - ``GatewayTunnel(gateway, user, host=..., app=...)``: the host is reached through the gateway.
    - ``GatewayTunnel(gateway, user, host=Host(..., jump=()), app=...)``: the host is reached by another route
      (a VPN, a second network, the ssh config's ProxyJump).

    >>> tunnel = GatewayTunnel("gateway.example.org", "me")
    >>> tunnel.state
    'new'

    :param gateway: the machine in between: a name, an address, ``user@host:port``, an ssh config alias, or
        a :class:`Host`
    :param user: the login name on the gateway
    :param host: the Bokeh host. For a name, the login uses the gateway's user, keys and policies, but not its
        password; give a :class:`Host` for another login
    :param app: an app or several to serve: paths on the Bokeh host
    :param reverse: who opens the gateway's port: the Bokeh host itself ("host", needs bokeh_ssh and a login
        there), this machine ("relay"), or the host if it can ("auto")
    :param name: for the local half, the name that the server was published under; None uses the only one.
        The tunnel waits for it for ``launch_timeout`` seconds, and if it is gone later, for as long as it
        takes
    :param gateway_port: the port on the gateway; None: for the local half, what is published by name, or else
        5006; otherwise a socket that only your account there can use, or a free port if that is not possible
    :param gateway_address: ``host:port`` of the gateway as seen from the Bokeh host, if that differs
    :param forward_agent: forward this machine's SSH agent to the Bokeh host while it logs in to the gateway
        (like ``ssh -A``, but only for that login)
    :param detach: as for :class:`DirectTunnel`; the server also stays published on the gateway, under a
        :attr:`name`, if the host can do that: with bokeh_ssh, and its own login
    :param allow_exposed: accept a gateway that opens the port to its network (``GatewayPorts yes``)
    :param args: this and all others are as for :class:`DirectTunnel` and :class:`Host`
    :raises UsageError: if an argument cannot work
    """

    @arguments_of(GatewayOptions)
    def __init__(self, options: GatewayOptions, gateway: Host) -> None:
        label = gateway.target.host
        if options.reverse not in get_args(Reverse):
            msg = f"{set_to('reverse', options.reverse)} is not known"
            raise UsageError(msg, host=label, hint='use "auto", "host" or "relay"')
        if options.gateway_port is not None:
            check_port(options.gateway_port, "gateway_port")
        alone = options.host is None
        if alone and (options.must_launch or options.args or options.server or options.detach):
            msg = "there is no host to start a server on, or to find one"
            hint = f"give {setting('host=')}, or publish the app from the Bokeh host and leave out the app"
            raise UsageError(msg, host=label, hint=hint)
        if options.name is not None:
            check_name(options.name)
            if not alone or options.gateway_port is not None:
                what = "port" if alone else "host"
                msg = f"{setting('name')} finds what is published already, but a {what} was given"
                raise UsageError(msg, host=label, hint="leave out one of the two")
        if options.forward_agent and (alone or options.reverse == "relay"):
            msg = f"{setting('forward_agent')} is for a host that logs in to the gateway, " + (
                "but none is given" if alone else "and a relay does not"
            )
            raise UsageError(
                msg, host=label, hint=(f'give {setting("host=")}, and {setting("reverse=host")} or "auto"')
            )
        if options.gateway_address is not None:
            parse_target(options.gateway_address)
        self._bokeh_host = None if options.host is None else _as_bokeh_host(options.host, gateway)
        info = TunnelInfo(name=options.name)
        super().__init__(options, gateway, GatewayParts, options, gateway, self._bokeh_host, info=info)

    def __repr__(self) -> str:
        to = f" to {self._bokeh_host.target.host}" if self._bokeh_host else ""
        return f"<GatewayTunnel via {self._label}{to}, {self.state}>"

    @property
    def name(self) -> str | None:
        """The name that it is published under on the gateway; None where it has none.

        With that, ``GatewayTunnel(gateway, name=...)`` opens it again without a login on the Bokeh host.
        """
        return self._info.name

    @property
    def reverse(self) -> Literal["host", "relay"] | None:
        """Who opened the gateway's port: "host" or "relay"; None where somebody had published already."""
        return self._info.reverse


def bokeh_host_of(tunnel: GatewayTunnel) -> Host | None:
    """Return the Bokeh host with its login; None for the local half."""
    return tunnel._bokeh_host


def _as_bokeh_host(host: str | Host, gateway: Host) -> Host:
    if isinstance(host, Host):
        return host
    user = parse_target(host).user or gateway.target.user
    login = {"pkey": gateway.pkey, "key_filename": gateway.key_filename, "passphrase": gateway.passphrase}
    # Not the password: it would be sent to the host, and who runs that is another question.
    return alike(gateway, host, user=user, **login)


class GatewayParts(TunnelParts):
    """What an open :class:`GatewayTunnel` consists of."""

    _options: GatewayOptions

    def __init__(
        self, session: LocalSession, options: GatewayOptions, gateway: Host, bokeh_host: Host | None
    ) -> None:
        super().__init__(session, options, gateway)
        self._bokeh_host = bokeh_host
        self._end: GatewayEndpoint | None = None
        self._host_connection: Connection | None = None
        self._waits = False  # whether what is to be found is not published yet

    @property
    def info(self) -> TunnelInfo:
        """What is known by now."""
        end = self._end or GatewayEndpoint("", name=self._options.name)
        return dataclasses.replace(super().info, reverse=end.by, name=end.name)

    def _name_site(self, endpoint: Endpoint, found: FoundServer) -> str:
        return ""  # what is found on the gateway may be another machine's each time

    def connect_all(self) -> tuple[Ready, bool]:
        """Connect to the gateway, make it listen for the server or find that there, and lead there."""
        options, stack = self._options, self._session.connection_stack
        if self._bokeh_host is None:
            gateway, end, found = self._reach_published()
            same = True
        else:
            gateway = self._session.connect(self._host)
            # A socket that only this account may use, where there can be one.
            private = options.gateway_port is None and options.signed is not False
            spot = stack.enter_context(private_socket(gateway)) if private else Spot(None)
            # A port is open to all who can log in there: a server behind one answers to signed sessions only.
            host, found, same = self._reach_server(self._bokeh_host, gateway, must_sign=spot.path is None)
            wanted = spot.path or (LOOPBACK, options.gateway_port or 0)
            seen_as = None if options.gateway_address is None else parse_target(options.gateway_address)
            request = PublicationRequest(
                host, gateway, found.endpoint, wanted, options.allow_exposed, seen_as
            )
            end = self._publish(request, found)
            spot.busy = end.by == "relay"
        return self._start_forwarding(gateway, end.where, found), same

    def _reach_server(
        self, bokeh_host: Host, gateway: Connection, *, must_sign: bool
    ) -> tuple[Connection, FoundServer, bool]:
        """Connect to the Bokeh host, and get the server; one that has not gone with the gateway is kept."""
        before, found = self._host_connection, self._acquisition.found
        if before and before.alive and self._session.holds_server and found:
            return before, found, True
        self._session.drop_kept()
        apart = goes_its_own_way(bokeh_host)
        with self._session.keeping() if apart else contextlib.nullcontext():
            host = self._connect_host(bokeh_host, None if apart else gateway)
            found, same = self._acquisition.acquire(host, must_sign=must_sign)
        self._host_connection = host if apart else None
        return host, found, same

    # What is published already.

    def _reach_published(self) -> tuple[Connection, GatewayEndpoint, FoundServer]:
        """Connect to the gateway, and find what is published there.

        A connection that is lost while that is waited for is made again, as it is once all stands.

        :raises BokehSSHError: as :meth:`_find_published`
        """
        deadline, losses = time.monotonic() + self._options.launch_timeout, 0
        while True:
            try:
                gateway = self._connect_host(self._host)
                if losses:
                    self._session.life.mend()
                return gateway, *self._find_published(gateway, deadline)
            except BokehSSHError as exc:
                again = self._waits and exc.temporary and not isinstance(exc, ServerNotFoundError)
                if not (again and self._options.reconnect and time.monotonic() < deadline):
                    raise
                losses += 1
                if losses == 1:
                    self._session.life.warn(f"{exc.message}; the gateway is tried again")
                self._session.connection_stack.close()
                wait(threading.Event(), pause_before(losses))

    def _note_wait(self, what: str) -> None:
        if not self._waits:
            self._waits = True
            self._session.life.warn(what)

    def _find_published(self, gateway: Connection, deadline: float) -> tuple[GatewayEndpoint, FoundServer]:
        """Find the server that somebody published on the gateway: by name, or else on a port.

        :param deadline: until when it is waited for, unless it was found before
        :raises ServerNotFoundError: if nothing is published there, by the name not within ``launch_timeout``
        :raises UsageError: if several are
        :raises ForeignServerError: if it belongs to another user of the gateway
        """
        options, before = self._options, self._end
        by_port = options.gateway_port or options.remote_port or (before and before.name is None)
        end = None
        if not by_port:
            seconds = float("inf") if before else deadline - time.monotonic()
            name = before.name if before else options.name
            note = self._session.life.warn if before else self._note_wait
            end = await_published(gateway, name, seconds, note)
        if end is None:
            return self._find_port(gateway)
        self._end = end
        watch = watching(gateway, end, self._session.lose)
        self._session.connection_stack.enter_context(watch)
        return end, self._acquisition.attach_published(gateway, end.where, end.name or "")

    def _find_port(self, gateway: Connection) -> tuple[GatewayEndpoint, FoundServer]:
        port = self._options.gateway_port or self._options.attach_port
        found = self._acquisition.attach_to(gateway, port)
        if not found:
            msg = f"nothing is published on port {port}"
            more = f" --remote-port {port}" if self._options.gateway_port else ""
            hint = f"on the Bokeh host, run: bokeh-ssh publish app.py --gateway {gateway.name}{more}"
            raise ServerNotFoundError(msg, host=gateway.name, hint=hint)
        if not self._options.allow_exposed and is_answering(gateway, (OTHER_LOOPBACK, port), timeout=5):
            self._session.life.warn(f"port {port} is open to the gateway's whole network (GatewayPorts yes)")
        self._end = GatewayEndpoint((LOOPBACK, port))
        return self._end, found

    # What is published from here.

    def _publish(self, request: PublicationRequest, found: FoundServer) -> GatewayEndpoint:
        """Make the gateway listen for the server, by the host or by a relay."""
        options, session, before = self._options, self._session, self._end
        stack = session.connection_stack
        warn = session.life.warn if before is None else ignore  # once is enough
        end, reason = None, ""
        if options.reverse != "relay":
            try:
                end = host_sidecar(request, options, found.held, found.routes[0], warn)
                if end and found.held:
                    self._follow_sidecar(found.held)
                end = end or GatewayEndpoint(stack.enter_context(self._host_session(request)), "host")
            except UnavailableError as exc:
                if options.reverse == "host":
                    raise exc.error from exc
                reason = str(exc.error)
        elif options.detach and found.held:
            warn(RELAY_ENDS)
        if end is None:
            again = before is not None
            end = stack.enter_context(relay(request, again=again, on_lost=session.lose, reason=reason))
        self._end = end
        if isinstance(end.where, tuple) and not found.key and options.signed is None:
            session.life.warn(f"port {end.where[1]} is open to the other users of the gateway")
        where = {"socket": end.where} if isinstance(end.where, str) else {"port": end.where[1]}
        session.life.emit(
            ReverseForwarded(host=request.gateway.name, by=end.by or "", reason=end.reason, **where)
        )
        return end

    def _host_session(self, request: PublicationRequest) -> contextlib.AbstractContextManager[Endpoint]:
        """Publish the server from the Bokeh host in a session of ours, with which that ends."""
        options = self._options
        agent = agent_to_lend(request.gateway) if options.forward_agent else None
        return publish_from_host(
            request,
            python=options.python_path,
            env=options.variables,
            agent=agent,
            on_lost=self._session.lose,
        )

    def _follow_sidecar(self, server: Server) -> None:
        def lost() -> None:
            msg = "what publishes the server has ended"
            error = ConnectionLostError(msg, host=self._session.life.label, hint="open it again")
            self._session.lose(error)

        server.state.sidecar.on_end = lost
        if not server.sidecar_status:  # it ended in between
            lost()
