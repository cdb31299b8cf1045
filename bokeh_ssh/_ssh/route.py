"""Which machines a connection goes through: the caller's words and the ssh config put together."""

from __future__ import annotations

import dataclasses
import getpass
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field

from bokeh_ssh._core.errors import ConfigError, UsageError
from bokeh_ssh._core.host import Host, hide_secret
from bokeh_ssh._core.settings import setting
from bokeh_ssh._core.this_machine.home import expand
from bokeh_ssh._ssh.config import lookup
from bokeh_ssh._ssh.config.lookup import HostConfig, Session
from bokeh_ssh._ssh.tcp import Origin

_MOST_HOPS = 8
DEFAULT_TIMEOUT = 15.0


@dataclass(frozen=True)
class Hop:
    """One machine on the way: what to dial, and as whom to log in.

    :param label: the machine as the user named it, for messages
    :param timeout: seconds for each stage of connecting
    :param by: the machine through which a stream leads there, in place of a connection to a port of it
    :ivar account: the login name, for messages
    :ivar known_as: the name under which known_hosts has it (``HostKeyAlias``)
    :ivar known_port: the port under which known_hosts has it; a ``HostKeyAlias`` stands there without one
    :ivar proxy_command: the command that makes the connection, for the shell; empty where we dial
    :ivar control_path: the socket of a connection that ``ssh`` may keep open to it; empty where ours is not
        to use one: as with ``ssh``, which for ``ControlMaster yes`` and ``ask`` makes a new one
    :ivar origin: from where it is dialled, and how often, where we dial it
    :ivar own_known_hosts: the account's own files with known host keys; the first one gets new keys
    :ivar known_hosts: all files with known host keys
    """

    host: Host
    config: HostConfig
    label: str
    hostname: str
    port: int
    user: str
    timeout: float
    by: str = ""

    account: str = field(init=False)
    known_as: str = field(init=False)
    known_port: int | None = field(init=False)
    proxy_command: str = field(init=False)
    control_path: str = field(init=False)
    origin: Origin = field(init=False)
    own_known_hosts: tuple[str, ...] = field(init=False)
    known_hosts: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        config, given = self.config, self.host.known_hosts_files
        usable = config.control_master in (None, "false", "auto", "autoask") and os.name == "posix"
        user, system = config.user_known_hosts, config.global_known_hosts
        own = lookup.USER_KNOWN_HOSTS if user is None else user
        own = tuple(str(expand(path)) for path in (own if given is None else given))
        system = () if given is not None else lookup.GLOBAL_KNOWN_HOSTS if system is None else system
        derived = {
            "account": hide_secret(self.user),
            "known_as": config.host_key_alias or self.hostname,
            "known_port": None if config.host_key_alias else self.port,
            "proxy_command": config.proxy_command or "",
            "control_path": config.control_path or "" if usable else "",
            "origin": Origin(
                config.address_family or socket.AF_UNSPEC,
                config.bind_address or "",
                config.bind_interface or "",
                config.connection_attempts or 1,
            ),
            "own_known_hosts": own,
            "known_hosts": (*own, *system),
        }
        for name, value in derived.items():
            object.__setattr__(self, name, value)

    @property
    def where(self) -> str:
        """The machine and its port, if one is connected to, for messages."""
        return self.hostname if self.by else f"{self.hostname} port {self.port}"


def find_hop(host: Host, *, through: str | None = None, session: Session = "exec") -> Hop:
    """Look the host up in its ssh config.

    :param through: the machine that it is reached through; None where ``jump`` or the config says that
    :param session: what the connection is for, which the config may ask (``Match sessiontype``)
    :raises ConfigError: if the config cannot be followed
    :raises ResolveError: if the config asks for a canonical name, and there is none
    """
    target = host.target
    path = None if host.ssh_config is None else os.fspath(host.ssh_config)
    if through is None and host.jump is not None:
        through = next((jump.target.host for jump in reversed(_as_hosts(host, host.jump))), "")
    config = lookup.load(path, target.host, user=target.user, port=target.port, jump=through, session=session)
    try:
        account = target.user or config.user or getpass.getuser()
    except (KeyError, OSError, ImportError) as exc:  # no account database entry, as in some containers
        msg = "no user name was given and this account has none"
        raise UsageError(msg, host=target.host, hint=f"give {setting('user=')} or user@host") from exc
    return Hop(
        host=host,
        config=config,
        label=target.host,
        hostname=config.hostname,
        port=target.port or config.port or 22,
        user=account,
        timeout=host.timeout or config.connect_timeout or DEFAULT_TIMEOUT,
    )


def goes_its_own_way(host: Host) -> bool:
    """Return whether ``jump`` or the ssh config says how to reach the host."""
    if host.jump is not None:
        return True
    config = find_hop(host).config
    return config.proxy_jump is not None or config.proxy_command is not None


def find_route(host: Host, *, via: str | None = None, session: Session = "exec") -> list[Hop]:
    """List the machines to log in to, in order; the host itself is the last (``ssh -J``).

    As with ``ssh -J``, what is given for the host (keys, password, user) is not for its jump hosts: they
    have their own ``Host`` or ssh config. Where to find config and known hosts, and ``prompt``, are.

    :param via: the machine that the host is reached through, whatever its config says
    :param session: what the connection to the host is for; those before it forward, as with ``ssh -W``
    :raises ConfigError: if the way leads in a circle or the config cannot be followed
    """
    hop = find_hop(host, through=via, session=session)
    route = [hop]
    while via is None:
        first = route[0]
        jumps = _jumps(first)
        if not jumps:
            return route
        # Only the first of a list may have a way of its own; the others are reached through it.
        before = [None, *(jump.target.host for jump in jumps[:-1])]
        route[:0] = [
            find_hop(
                jump if through is None else dataclasses.replace(jump, jump=()),
                through=through,
                session="none",
            )
            for jump, through in zip(jumps, before, strict=True)
        ]
        # By name too: what is "localhost" to one machine is another machine's own.
        places = [(h.label, h.hostname, h.port, h.user) for h in route]
        if len(set(places)) < len(places) or len(route) > _MOST_HOPS:
            msg = f"the way leads in a circle: {' -> '.join(h.label for h in route)}"
            raise ConfigError(
                msg,
                host=hop.label,
                hint=(f"check {setting('jump=')} and the ProxyJump lines of your ssh config"),
            )
    return route


def _jumps(hop: Hop) -> list[Host]:
    given = hop.host.jump
    return _as_hosts(hop.host, hop.config.proxy_jump or () if given is None else given)


def _as_hosts(host: Host, given: str | Host | Sequence[str | Host]) -> list[Host]:
    listed: Sequence[str | Host] = (given,) if isinstance(given, (str, Host)) else tuple(given)
    names: list[str | Host] = []
    for item in listed:
        names += [item] if isinstance(item, Host) else [part.strip() for part in item.split(",")]
    return [name if isinstance(name, Host) else alike(host, name) for name in names]


def alike(host: Host, name: str, **changes: object) -> Host:
    """Make a :class:`Host` for another machine that is looked up and verified as this one is."""
    return Host(
        name,
        **{  # type: ignore[arg-type]  # the types are those of Host's own fields
            "allow_agent": host.allow_agent,
            "look_for_keys": host.look_for_keys,
            "timeout": host.timeout,
            "known_hosts": host.known_hosts,
            "host_keys": host.host_keys,
            "ssh_config": host.ssh_config,
            "prompt": host.prompt,
            **changes,
        },
    )
