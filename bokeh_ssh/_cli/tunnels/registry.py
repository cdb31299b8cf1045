"""The tunnels that commands hold on this machine, found by their sockets: listed, chosen, ended."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from bokeh_ssh._cli.tunnels.control import SUFFIX, ask, ask_to_stop, folders, is_private, supported
from bokeh_ssh._core.errors import BokehSSHError, ServerNotFoundError, UsageError
from bokeh_ssh._forwarding.status import HopStatus, TunnelStatus

#: Seconds for a tunnel to end.
_ENDS = 30.0
#: Seconds for which a socket at which nobody listens may be one that is being made.
_YOUNG = 5.0


@dataclass(frozen=True)
class HeldTunnel:
    """A tunnel or forward that a command on this machine holds.

    :ivar pid: the command's process
    :ivar command: what was typed after ``bokeh-ssh``: ``"direct"``, ``"up"``, ...
    :ivar host: the machine that it was opened to
    :ivar apps: the apps that were named
    :ivar job: the number of the batch job that the server runs in; empty without one
    :ivar addresses: where it can be opened; empty before it is
    :ivar began: when, in seconds since 1970
    :ivar background: whether it runs without a terminal
    :ivar log: the file that it then writes to; empty elsewhere
    :ivar status: what it does; None where it does not answer
    """

    pid: int
    command: str = ""
    host: str = ""
    apps: tuple[str, ...] = ()
    job: str = ""
    addresses: tuple[str, ...] = ()
    began: float = 0.0
    background: bool = False
    log: str = ""
    status: TunnelStatus | None = None
    path: Path = dataclasses.field(default=Path(), repr=False)

    @property
    def state(self) -> str:
        """As of a tunnel; ``"silent"`` where it does not answer."""
        return self.status.state if self.status else "silent"

    @property
    def names(self) -> set[str]:
        """By what it can be named: its process, an address or its port, an app."""
        names = {str(self.pid), *self.apps}
        for address in self.addresses:
            bare = address.partition("://")[2] or address
            place = bare.partition("/")[0] if not bare.startswith("/") else bare
            names |= {address, address.rstrip("/"), bare, place, place.rpartition(":")[2]}
        names |= {PurePath(app).name for app in self.apps}
        return names | {PurePath(app).stem for app in self.apps}


def find_tunnels() -> list[HeldTunnel]:
    """List those of this account, oldest first; what processes that have ended left behind is removed.

    :raises UsageError: if this system has no sockets to ask them by
    """
    if not supported():
        msg = "the tunnels of this machine are asked over Unix sockets, which Python does not have here"
        raise UsageError(msg, hint="look at the windows that they run in")
    found = []
    for folder in folders():
        if is_private(folder):
            found += [each for path in sorted(folder.glob(f"*{SUFFIX}")) if (each := _look(path))]
    return sorted(found, key=lambda each: (each.began, each.pid))


def _look(path: Path) -> HeldTunnel | None:
    pid = int(path.stem) if path.stem.isascii() and path.stem.isdigit() else 0
    try:
        answer = ask(path)
    except FileNotFoundError:
        return None
    except ConnectionRefusedError:
        with contextlib.suppress(OSError):
            if time.time() - path.lstat().st_mtime > _YOUNG or not is_alive(pid):
                path.unlink()
        return None
    try:
        return _parse(answer, path) if answer else HeldTunnel(pid, path=path)
    except (KeyError, TypeError, ValueError, AttributeError):  # another version's
        return HeldTunnel(pid, path=path)


def _parse(answer: dict[str, Any], path: Path) -> HeldTunnel:
    status = dict(answer.pop("status"))
    status.pop("rate", None)
    status["hops"] = tuple(HopStatus(**hop) for hop in status["hops"])
    known = {field.name for field in dataclasses.fields(HeldTunnel)} - {"path", "status"}
    fields = {name: value for name, value in answer.items() if name in known}
    fields |= {name: tuple(map(str, fields[name])) for name in ("apps", "addresses")}
    tunnel = HeldTunnel(**fields, status=TunnelStatus(**status), path=path)
    _check_kinds(tunnel, HeldTunnel(0, status=TunnelStatus("new")))
    _check_kinds(tunnel.status, TunnelStatus("new"))
    for hop in status["hops"]:
        _check_kinds(hop, HopStatus("", round_trip=hop.round_trip and 0.0))
    return tunnel


def _check_kinds(answer: object, model: object) -> None:
    """Check that each field of an answer is of the kind that the model's is.

    :raises TypeError: if one is not
    """
    for name, value in vars(model).items():
        kind = (int, float) if isinstance(value, float) else type(value)
        if not isinstance(vars(answer)[name], kind):
            raise TypeError(name)


def is_alive(pid: int) -> bool:
    """Return whether a process of that number runs, whoever's it is."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return pid > 0


def choose(tunnels: Sequence[HeldTunnel], name: str | None) -> HeldTunnel:
    """Return the one of that process, address, port or app; without a name, the only one.

    :raises ServerNotFoundError: if there is none
    :raises UsageError: if there are several
    """
    meant = [each for each in tunnels if name is None or name in each.names]
    if len(meant) == 1:
        return meant[0]
    if not meant:
        msg = f"no tunnel of this machine is named {name}" if name else "no tunnel is open on this machine"
        hint = "bokeh-ssh ls shows which there are" if tunnels else "bokeh-ssh HOST APP opens one"
        raise ServerNotFoundError(msg, hint=hint)
    some = ", ".join(f"{each.pid} ({' '.join(each.addresses) or each.host})" for each in meant[:5])
    more = f", and {len(meant) - 5} more" if len(meant) > 5 else ""
    msg = f"there is more than one: {some}{more}"
    raise UsageError(msg, hint="name its process id or its port")


def find_named(name: str | None) -> list[HeldTunnel]:
    """List the tunnels to that machine, else the one of that name; without a name, all.

    :raises BokehSSHError: as :func:`choose`
    """
    tunnels = find_tunnels()
    if not name:
        return tunnels
    host = name.rpartition("@")[2]
    return [each for each in tunnels if each.host == host] or [choose(tunnels, name)]


def ended_here(name: str | None) -> HeldTunnel | None:
    """End the tunnel that is named so, or the only one; return it, or None where a machine must be meant.

    :raises BokehSSHError: if there is none, several, or it does not end
    """
    if name is not None and not supported():
        return None
    tunnels = find_tunnels()
    known = any(name in each.names for each in tunnels)
    if name is not None and not known and not name.isdigit() and "://" not in name:
        return None
    tunnel = choose(tunnels, name)
    stop(tunnel)
    return tunnel


def stop(tunnel: HeldTunnel) -> None:
    """End it, as Ctrl-C does; wait until its process has ended.

    :raises BokehSSHError: if it does not
    """
    if not ask_to_stop(tunnel.path, _ENDS):
        msg = f"process {tunnel.pid} did not end within {_ENDS:g} s"
        raise BokehSSHError(msg, hint=f"see what it does; to end it at once: kill -9 {tunnel.pid}")
