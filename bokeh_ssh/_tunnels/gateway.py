"""Situation two: a gateway stands between."""

from __future__ import annotations

import contextlib
from typing import Literal, get_args

from bokeh_ssh._core.endpoint import Endpoint, as_name, check_name
from bokeh_ssh._core.errors import (
    ConnectionLostError,
    ForwardError,
    ServerNotFoundError,
    TargetUnreachableError,
    UsageError,
)
from bokeh_ssh._core.events import Attached, ReverseForwarded, Warned
from bokeh_ssh._core.host import Host, check_port, parse_target
from bokeh_ssh._forwarding.published_sockets import Spot, private_socket, published
from bokeh_ssh._server.options import BOKEH_PORT, LOOPBACK
from bokeh_ssh._server.probe import check_owner, find_route, http_get, is_answering
from bokeh_ssh._server.server import Server
from bokeh_ssh._ssh.auth.agent import Agent, agent_address
from bokeh_ssh._ssh.connection import Connection
from bokeh_ssh._ssh.route import alike, goes_its_own_way
from bokeh_ssh._tunnels.base import Tunnel
from bokeh_ssh._tunnels.host_publisher import (
    UnavailableError,
    publish_from_host,
    sidecar_endpoint,
    start_publisher_sidecar,
)
from bokeh_ssh._tunnels.options import GatewayOptions, Reverse, arguments_of
from bokeh_ssh._tunnels.remote_forward import OTHER_LOOPBACK, listening, to_peer


class GatewayTunnel(Tunnel):
    """Open a Bokeh server through a gateway's port (``ssh -R`` there, ``ssh -L`` here).

    Three shapes:

    - ``GatewayTunnel(gateway, user)``: the Bokeh host publishes by itself (``bokeh-ssh publish``, or
      :class:`RemoteForward`); this is the local half.
    - ``GatewayTunnel(gateway, user, host=..., app=...)``: the host is reached through the gateway.
    - ``GatewayTunnel(gateway, user, host=Host(..., jump=()), app=...)``: the host is reached by a way of its
      own (a VPN, a second route, the ssh config's ProxyJump).

    >>> tunnel = GatewayTunnel("gateway.example.org", "me")
    >>> tunnel.state
    'new'

    :param gateway: the machine in between: a name, an address, ``user@host:port``, an ssh config alias, or
        a :class:`Host`
    :param user: the login name on the gateway
    :param host: the Bokeh host. A name is logged in to with the gateway's user, keys and policies, but not
        with its password; give a :class:`Host` for its own
    :param app: an app or several to serve: paths on the Bokeh host
    :param reverse: who opens the gateway's port: the Bokeh host itself ("host", needs bokeh_ssh and a login
        there), this machine ("relay"), or the host if it can ("auto")
    :param name: for the local half, what it was published under; None takes the only one
    :param gateway_port: the port on the gateway; None takes what is published by name, or else 5006, for the
        local half; otherwise a socket that only this account there may use, and a free port where that cannot
        be had
    :param gateway_address: ``host:port`` of the gateway as seen from the Bokeh host, where that differs
    :param forward_agent: lend this machine's SSH agent to the Bokeh host while that logs in to the gateway
        (like ``ssh -A``, but for that one login)
    :param detach: as for :class:`DirectTunnel`; the server's place on the gateway is left too, under a
        :attr:`name`, where the host can keep it: with bokeh_ssh, and a login of its own
    :param allow_exposed: go on where a gateway with ``GatewayPorts yes`` opens the port to its network
    :param args: and all others: as for :class:`DirectTunnel` and :class:`Host`
    :raises UsageError: if an argument cannot work
    """

    _shared = (*Tunnel._shared, "_reverse", "_name")

    _serve: GatewayOptions

    @arguments_of(GatewayOptions)
    def __init__(self, options: GatewayOptions, gateway: Host) -> None:
        super().__init__(options, gateway)
        self._gateway = gateway
        if options.reverse not in get_args(Reverse):
            msg = f"reverse={options.reverse!r} is not known"
            raise UsageError(msg, host=self._label, hint='use "auto", "host" or "relay"')
        if options.gateway_port is not None:
            check_port(options.gateway_port, "gateway_port")
        alone = options.host is None
        if alone and (options.must_launch or options.args or options.server or options.detach):
            msg = "there is no host to start a server on, or to find one"
            hint = "give host=, or publish the app from the Bokeh host and leave out app"
            raise UsageError(msg, host=self._label, hint=hint)
        if options.name is not None:
            check_name(options.name)
            if not alone or options.gateway_port is not None:
                msg = f"name finds what is published already, but a {'port' if alone else 'host'} was given"
                raise UsageError(msg, host=self._label, hint="leave out one of the two")
        if options.forward_agent and (alone or options.reverse == "relay"):
            msg = "forward_agent is for a host that logs in to the gateway, " + (
                "but none is given" if alone else "and a relay does not"
            )
            raise UsageError(msg, host=self._label, hint='give host=, and reverse="host" or "auto"')
        self._name = options.name  # or what was found
        self._reverse: Literal["host", "relay"] | None = None
        address = options.gateway_address
        self._gateway_address = None if address is None else parse_target(address)
        self._spot = Spot(None)
        self._bokeh_host = None if options.host is None else self._as_bokeh_host(options.host)

    def _as_bokeh_host(self, host: str | Host) -> Host:
        if isinstance(host, Host):
            return host
        mine = self._gateway
        user = parse_target(host).user or mine.target.user
        # Not the password: it would be told to the host, and who runs that is another question.
        return alike(
            mine, host, user=user, pkey=mine.pkey, key_filename=mine.key_filename, passphrase=mine.passphrase
        )

    def __repr__(self) -> str:
        to = f" to {self._bokeh_host.target.host}" if self._bokeh_host else ""
        return f"<GatewayTunnel via {self._label}{to}, {self._state}>"

    @property
    def name(self) -> str | None:
        """The name that it is published under on the gateway; None where it has none.

        With that, ``GatewayTunnel(gateway, name=...)`` opens it again without a login on the Bokeh host.
        """
        return self._name

    @property
    def reverse(self) -> Literal["host", "relay"] | None:
        """Who opened the gateway's port: "host" or "relay"; None where somebody had published already."""
        return self._reverse

    def _connect_all(self, connection_stack: contextlib.ExitStack) -> bool:
        gateway = self._connect(connection_stack, self._gateway)
        end: Endpoint
        if self._bokeh_host is None:
            self._start_extra_forwards(connection_stack, gateway)
            end = self._find_published(gateway)
            same = True
        else:
            via = None if goes_its_own_way(self._bokeh_host) else gateway
            host = self._connect(connection_stack, self._bokeh_host, via)
            self._start_extra_forwards(connection_stack, host)
            wanted = self._choose_end(connection_stack, gateway)
            target, same = self._find_or_launch(connection_stack, host)
            end = self._open_reverse(connection_stack, gateway, host, target, wanted)
        self._start_forwarding(connection_stack, gateway, end, self._label)
        return same

    def _open_local(self, stack: contextlib.ExitStack) -> None:
        super()._open_local(stack)
        self._reverse = None
        self._name = self._serve.name

    def _choose_end(self, connection_stack: contextlib.ExitStack, gateway: Connection) -> Endpoint:
        """Choose where the gateway is to listen: on a socket that only this account may use, or on a port.

        A port is open to all who can log in there, so a server behind one answers to signed sessions only.
        """
        self._spot = Spot(None)
        if self._serve.gateway_port is None and self._serve.signed is not False:
            self._spot = connection_stack.enter_context(private_socket(gateway))
        self._must_sign = self._spot.path is None
        return self._spot.path or (LOOPBACK, self._serve.gateway_port or 0)

    def _find_published(self, gateway: Connection) -> Endpoint:
        """Find the server that somebody published on the gateway: by name, or else on a port.

        :raises ServerNotFoundError: if nothing is published there
        :raises UsageError: if several are
        :raises ForeignServerError: if it belongs to another user of the gateway
        """
        if not (self._serve.gateway_port or self._serve.remote_port):
            path = self._find_named(gateway)
            if path:
                return path
        return (LOOPBACK, self._find_port(gateway))

    def _find_named(self, gateway: Connection) -> str | None:
        if self._attached and self._name is None:
            return None  # it was a port before
        names = published(gateway)
        if self._name is None and len(names) > 1:
            msg = f"several are published there: {', '.join(sorted(names))}"
            raise UsageError(msg, host=self._label, hint="say which, with name")
        name = self._name or next(iter(names), None)
        if name is None:
            return None
        path, timeout = names.get(name, ""), gateway.hop.timeout
        try:
            is_bokeh = bool(path) and http_get(gateway, path, "/metadata", timeout=timeout).is_bokeh
        except (TargetUnreachableError, OSError):
            path = ""
        if not path:
            there = f" (there are: {', '.join(sorted(names))})" if names.keys() - {name} else ""
            msg = f"nothing is published under the name {name!r}{there}"
            hint = f"on the Bokeh host, run: bokeh-ssh publish app.py --gateway {self._label} --name {name}"
            raise ServerNotFoundError(msg, host=self._label, hint=hint)
        if not is_bokeh:
            msg = f"what is published under the name {name!r} is not a Bokeh server"
            raise ServerNotFoundError(msg, host=self._label, hint="use LocalForward with its remote_socket")
        self._bind(BOKEH_PORT)
        self._server_outcome = "left"
        if not self._attached:
            self._routes = (find_route(gateway, path, timeout=timeout),)
            self._emit(Attached(host=self._label, name=name))
        self._attached, self._name = True, name
        return path

    def _find_port(self, gateway: Connection) -> int:
        port = self._serve.gateway_port or self._serve.attach_port
        found = self._attach_to(gateway, port)
        if not found:
            msg = f"nothing is published on port {port}"
            hint = f"on the Bokeh host, run: bokeh-ssh publish app.py --gateway {self._label}"
            raise ServerNotFoundError(msg, host=self._label, hint=hint)
        self._remote_port = port
        self._attached = True
        if not self._serve.allow_exposed and is_answering(gateway, (OTHER_LOOPBACK, port), timeout=5):
            text = f"port {port} is open to the gateway's whole network (GatewayPorts yes)"
            self._emit(Warned(host=self._label, text=text))
        return port

    def _open_reverse(
        self,
        connection_stack: contextlib.ExitStack,
        gateway: Connection,
        host: Connection,
        target: Endpoint,
        wanted: Endpoint,
    ) -> Endpoint:
        """Ask the gateway to listen for the server on ``host``; return where it does."""
        reason, again = "", self._reverse is not None
        if self._serve.reverse != "relay":
            try:
                end = self._find_left_published(
                    gateway, host, target, wanted
                ) or connection_stack.enter_context(
                    publish_from_host(
                        host,
                        gateway,
                        target=target,
                        wanted=wanted,
                        allow_exposed=self._serve.allow_exposed,
                        seen_as=self._gateway_address,
                        python=self._serve.python,
                        env=dict(self._serve.env or {}),
                        agent=self._lend_agent(gateway),
                        on_lost=self._on_connection_lost,
                    )
                )
            except UnavailableError as exc:
                if self._serve.reverse == "host":
                    raise exc.error from exc
                reason = str(exc.error)
            else:
                if isinstance(end, tuple) and not self._serve.allow_foreign:
                    check_owner(gateway, end[1])
                return self._emit_reverse("host", end)
        elif self._serve.detach and self._server:
            self._warn_published_ended("a relay is this program's own")
        handler = to_peer(gateway, host, target)
        end = connection_stack.enter_context(
            listening(
                gateway,
                wanted,
                handler,
                allow_exposed=self._serve.allow_exposed,
                again=again,
                on_lost=self._on_connection_lost,
            )
        )
        self._spot.busy = True
        return self._emit_reverse("relay", end, reason)

    def _find_left_published(
        self, gateway: Connection, host: Connection, target: Endpoint, wanted: Endpoint
    ) -> Endpoint | None:
        """Find where a server that is left running is published, or have it published so.

        :returns: None where it is not to be left, or what publishes it has yet to come back
        :raises UnavailableError: if the host cannot publish by itself
        """
        server = self._server
        if server is None:
            return None
        made = sidecar_endpoint(server, gateway, wanted, self._gateway_address)
        if made is None and self._serve.detach:
            if self._serve.forward_agent:  # what publishes it must be able to come back without anybody
                self._warn_published_ended("an agent that is lent is not there for another login")
                return None
            try:
                made = start_publisher_sidecar(
                    host,
                    server,
                    gateway,
                    target=target,
                    wanted=wanted,
                    names=self._new_names(server),
                    allow_exposed=self._serve.allow_exposed,
                    seen_as=self._gateway_address,
                )
            except UnavailableError as exc:
                self._warn_published_ended(exc.error.message)
                raise
        elif made and not _answers(gateway, made[0]):
            return None
        if made is None:
            return None
        end, self._name = made
        server.on_sidecar_ended(self._on_published_lost)
        if not server.sidecar_status:  # it ended in between
            self._on_published_lost()
        return end

    def _on_published_lost(self) -> None:
        msg = "what publishes the server has ended"
        self._on_connection_lost(ConnectionLostError(msg, host=self._label, hint="open it again"))

    def _new_names(self, server: Server) -> list[str]:
        """Return what it may be published under: what its app is called; that with the server's own id."""
        name = as_name(self._routes[0].strip("/") or "bokeh")
        return [name, as_name(f"{name[:30]}-{server.server_ref.id}")] if server.server_ref else [name]

    def _warn_published_ended(self, why: str) -> None:
        if self._reverse is None:  # once is enough
            text = f"the server is left running, but its way through the gateway ends with this tunnel: {why}"
            self._emit(Warned(host=self._label, text=text))

    def _lend_agent(self, gateway: Connection) -> Agent | None:
        """Return the agent that the host is to have for a moment; the one that would log in there from here.

        :raises UnavailableError: if it is wanted, and there is none
        """
        if not self._serve.forward_agent:
            return None
        address = agent_address(gateway.hop.config.identity_agent)
        if address is None:
            msg = "there is no SSH agent here to lend"
            hint = "start one, add your key to it (ssh-add), and leave IdentityAgent unset"
            raise UnavailableError(ForwardError(msg, host=self._label, hint=hint))
        return Agent(address)

    def _emit_reverse(self, by: Literal["host", "relay"], end: Endpoint, reason: str = "") -> Endpoint:
        self._reverse = by
        if isinstance(end, tuple) and not self._key and self._serve.signed is None:
            text = f"port {end[1]} is open to the other users of the gateway"
            self._emit(Warned(host=self._label, text=text))
        where = {"socket": end} if isinstance(end, str) else {"port": end[1]}
        self._emit(ReverseForwarded(host=self._label, by=by, reason=reason, **where))
        return end


def _answers(gateway: Connection, end: Endpoint) -> bool:
    try:
        http_get(gateway, end, "/metadata", timeout=gateway.hop.timeout)
    except (TargetUnreachableError, OSError):
        return False
    return True
