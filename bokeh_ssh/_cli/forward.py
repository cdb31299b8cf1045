"""What ``bokeh-ssh forward`` makes of its flags, or of ssh's own ``-L`` and ``-R``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bokeh_ssh._cli.options.table import FORWARD
from bokeh_ssh._core.endpoint import Endpoint
from bokeh_ssh._core.errors import UsageError
from bokeh_ssh._core.forward_spec import Listen, parse_forward, split_http
from bokeh_ssh._core.settings import setting
from bokeh_ssh._tunnels.local_forward import LocalForward
from bokeh_ssh._tunnels.remote_forward import RemoteForward


def make_forward(host: str, **keywords: Any) -> LocalForward | RemoteForward:
    """Make the forward that was asked for, by flags or as ``ssh`` writes it.

    :param keywords: the flags that were given, the login keywords, and the values of ``-L`` and ``-R``, of
        which there may be one
    :raises UsageError: if it was asked for in two ways, or in none
    """
    local: Sequence[str] = keywords.pop("-L")
    remote: Sequence[str] = keywords.pop("-R")
    ways = ["-L"] * len(local) + ["-R"] * len(remote)
    beside = set() if remote else {"http", "cache"}  # go with -L
    ways += [setting(name) for name in sorted(({flag.keyword for flag in FORWARD} - beside) & set(keywords))]
    if not ways:
        msg = "it is not said what to forward"
        raise UsageError(
            msg,
            hint=(f"give {setting('remote_port=')} or {setting('remote_socket=')}, or -L or -R as to ssh"),
        )
    if len(ways) > 1 and ways[0].startswith("-"):
        msg = f"{ways[0]} and {ways[1]} cannot be given together"
        raise UsageError(msg, hint="give -L, -R, or the flags; run it once for each forward")
    allow_exposed = keywords.pop("allow_exposed", False)
    if remote:
        listen, target = parse_forward(remote[0])
        return RemoteForward(
            host, allow_exposed=allow_exposed, **_named(listen, target, "remote", "local"), **keywords
        )
    if local:
        spec, http = split_http(local[0])
        keywords |= _named(*parse_forward(spec), "local", "remote") | ({"http": True} if http else {})
    return LocalForward(host, **keywords)


def _named(listen: Listen, target: Endpoint, here: str, there: str) -> dict[str, Any]:
    """Return both ends of a forward as keywords."""
    named: dict[str, Any] = {}
    if isinstance(listen, str):
        named[f"{here}_socket"] = listen
    else:
        bind, named[f"{here}_port"] = listen
        if bind is not None:
            # Empty and "*" are every address, which the protocol writes as "".
            everywhere = "" if here == "remote" else "0.0.0.0"  # noqa: S104 - asked for
            named["bind_address"] = everywhere if bind in ("", "*") else bind
    if isinstance(target, str):
        named[f"{there}_socket"] = target
    else:
        named[f"{there}_host"], named[f"{there}_port"] = target
    return named
