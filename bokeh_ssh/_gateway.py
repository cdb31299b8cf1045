"""Situation two: a gateway stands between."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from bokeh_ssh._connection import Connection
from bokeh_ssh._errors import ServerNotFoundError, UsageError
from bokeh_ssh._events import OnEvent, ReverseForwarded, Warned
from bokeh_ssh._local import forwarding
from bokeh_ssh._remote import is_exposed, listening, to_peer
from bokeh_ssh._reverse import UnavailableError, dialled_back
from bokeh_ssh._route import alike, goes_its_own_way
from bokeh_ssh._target import Host, as_host, check_port, parse_target
from bokeh_ssh._tunnel import BOKEH_PORT, LOOPBACK, Serve, Tunnel

Reverse = Literal["auto", "host", "relay"]


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
    :param gateway_port: the port on the gateway; None takes 5006 for the local half, otherwise any free one
    :param gateway_address: ``host:port`` of the gateway as seen from the Bokeh host, where that differs
    :param allow_exposed: go on where a gateway with ``GatewayPorts yes`` opens the port to its network
    :param args: and all others: as for :class:`DirectTunnel`
    :raises UsageError: if an argument cannot work
    """

    _shared = (*Tunnel._shared, "_reverse")

    def __init__(
        self,
        gateway: str | Host,
        user: str | None = None,
        *,
        host: str | Host | None = None,
        app: str | Sequence[str] | None = None,
        reverse: Reverse = "auto",
        gateway_port: int | None = None,
        gateway_address: str | None = None,
        allow_exposed: bool = False,
        args: Sequence[str] = (),
        command: str | Sequence[str] = "bokeh serve",
        python: str | None = None,
        setup: str | Sequence[str] = (),
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
        local_port: int | None = None,
        remote_port: int | None = None,
        launch: bool | None = None,
        grace: float = 600.0,
        launch_timeout: float = 60.0,
        extra_origins: Sequence[str] = (),
        allow_foreign: bool = False,
        isolate: bool = True,
        on_event: OnEvent | None = None,
        **login: Any,
    ) -> None:
        serve = Serve.check(
            app,
            args,
            command=command,
            python=python,
            setup=setup,
            cwd=cwd,
            env=env,
            remote_port=remote_port,
            launch=launch,
            grace=grace,
            launch_timeout=launch_timeout,
            extra_origins=extra_origins,
            allow_foreign=allow_foreign,
        )
        super().__init__(serve, local_port, on_event, isolate)
        self._gateway = as_host(gateway, user, **login)
        self._label = self._gateway.target.host
        if reverse not in ("auto", "host", "relay"):
            msg = f"reverse={reverse!r} is not known"
            raise UsageError(msg, host=self._label, hint='use "auto", "host" or "relay"')
        if gateway_port is not None:
            check_port(gateway_port, "gateway_port")
        if host is None and (serve.must_launch or serve.args):
            msg = "there is no host to start a server on"
            hint = "give host=, or publish the app from the Bokeh host and leave out app"
            raise UsageError(msg, host=self._label, hint=hint)
        self._reverse_wanted: Reverse = reverse
        self._reverse: Literal["host", "relay"] | None = None
        self._gateway_port = gateway_port
        self._gateway_address = None if gateway_address is None else parse_target(gateway_address)
        self._allow_exposed = allow_exposed
        self._bokeh_host = None if host is None else self._as_bokeh_host(host)

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
    def reverse(self) -> Literal["host", "relay"] | None:
        """Who opened the gateway's port: "host" or "relay"; None where somebody had published already."""
        return self._reverse

    def _start(self, stack: contextlib.ExitStack) -> None:
        if self._wanted:
            self._bind(stack, BOKEH_PORT)  # a port that is taken here is told before anything is dialled
        gateway = self._connect(stack, self._gateway)
        if self._bokeh_host is None:
            port = self._remote_port = self._find_published(stack, gateway)
        else:
            via = None if goes_its_own_way(self._bokeh_host) else gateway
            host = self._connect(stack, self._bokeh_host, via)
            address, self._remote_port = self._find_or_launch(stack, host)
            port = self._open_reverse(stack, gateway, host, address)
        stack.enter_context(forwarding(self._sockets, gateway, LOOPBACK, port))
        self._prove(self._label)

    def _find_published(self, stack: contextlib.ExitStack, gateway: Connection) -> int:
        """Find the server that somebody published on the gateway.

        :raises ServerNotFoundError: if nothing is published there
        :raises ForeignServerError: if it belongs to another user of the gateway
        """
        port = self._gateway_port or self._serve.attach_port
        found = self._attach_to(stack, gateway, port)
        if not found:
            msg = f"nothing is published on port {port}"
            hint = f"on the Bokeh host, run: bokeh-ssh publish app.py --gateway {self._label}"
            raise ServerNotFoundError(msg, host=self._label, hint=hint)
        if not self._allow_exposed and is_exposed(gateway, port):
            text = f"port {port} is open to the gateway's whole network (GatewayPorts yes)"
            self._emit(Warned(host=self._label, text=text))
        return port

    def _open_reverse(
        self, stack: contextlib.ExitStack, gateway: Connection, host: Connection, address: str
    ) -> int:
        """Have the gateway listen for the server on ``host``; gives the gateway's port."""
        wanted = self._gateway_port or 0
        reason = ""
        if self._reverse_wanted != "relay":
            try:
                port = stack.enter_context(
                    dialled_back(
                        host,
                        gateway,
                        target=(address, self._remote_port),
                        wanted=wanted,
                        allow_exposed=self._allow_exposed,
                        seen_as=self._gateway_address,
                        python=self._serve.python,
                        env=dict(self._serve.env or {}),
                        on_lost=self._lose,
                    )
                )
            except UnavailableError as exc:
                if self._reverse_wanted == "host":
                    raise exc.error from exc
                reason = str(exc.error)
            else:
                self._reverse = "host"
                self._emit(ReverseForwarded(host=self._label, port=port, by="host"))
                return port
        handler = to_peer(gateway, host, address, self._remote_port)
        port = stack.enter_context(
            listening(gateway, LOOPBACK, wanted, handler, allow_exposed=self._allow_exposed)
        )
        self._reverse = "relay"
        self._emit(ReverseForwarded(host=self._label, port=port, by="relay", reason=reason))
        return port
