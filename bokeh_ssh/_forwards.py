"""What ``bokeh-ssh forward`` makes of its flags, or of ssh's own ``-L`` and ``-R``."""

from __future__ import annotations

import re
from typing import Any

from bokeh_ssh._errors import UsageError
from bokeh_ssh._flagtable import FORWARD
from bokeh_ssh._local import LocalForward
from bokeh_ssh._remote import RemoteForward
from bokeh_ssh._target import parse_port

_PART = r"\[[^\]]*\]|[^:\[\]]*"
_SPEC = re.compile(rf"(?:(?P<bind>{_PART}):)?(?P<port>\d+):(?P<host>{_PART}):(?P<hostport>\d+)")


def parse_forward(spec: str) -> tuple[str | None, int, str, int]:
    """Take apart ``[bind_address:]port:host:hostport``, with IPv6 addresses in brackets, as ``ssh -L`` does.

    >>> parse_forward("6006:localhost:5006")
    (None, 6006, 'localhost', 5006)
    >>> parse_forward("[::1]:0:[fe80::2]:5006")
    ('::1', 0, 'fe80::2', 5006)

    :raises UsageError: if it is written otherwise
    """
    found = _SPEC.fullmatch(spec)
    if not found:
        msg = f"{spec!r} is not a forward"
        raise UsageError(msg, hint="write it as [BIND:]PORT:HOST:HOSTPORT, such as 6006:localhost:5006")
    bind, host = (part if part is None else part.strip("[]") for part in (found["bind"], found["host"]))
    port = parse_port(found["port"], spec) if int(found["port"]) else 0
    return bind, port, host or "", parse_port(found["hostport"], spec)


def make_forward(
    host: str, local: str | None, remote: str | None, keywords: dict[str, Any]
) -> LocalForward | RemoteForward:
    """Make the forward that was asked for, by flags or as ``ssh`` writes it.

    :param local: the value of ``-L``
    :param remote: the value of ``-R``
    :param keywords: the flags that were given, and the login keywords
    :raises UsageError: if it was asked for in two ways, or in none
    """
    ways = [name for name, spec in (("-L", local), ("-R", remote)) if spec is not None]
    ways += sorted({flag.keyword for flag in FORWARD} & set(keywords))
    if not ways:
        msg = "it is not said what to forward"
        raise UsageError(msg, hint="give remote_port=, or -L or -R as to ssh")
    if len(ways) > 1 and ways[0].startswith("-"):
        msg = f"{ways[0]} and {ways[1]} cannot be given together"
        raise UsageError(msg, hint="give -L, -R, or the flags; run it once for each forward")
    allow_exposed = keywords.pop("allow_exposed", False)
    if remote is not None:
        bind, port, target, target_port = parse_forward(remote)
        if bind is not None:  # empty and "*" are every address, which the protocol writes as ""
            keywords["bind_address"] = "" if bind == "*" else bind
        return RemoteForward(
            host,
            remote_port=port,
            local_host=target,
            local_port=target_port,
            allow_exposed=allow_exposed,
            **keywords,
        )
    if local is not None:
        bind, port, target, target_port = parse_forward(local)
        if bind is not None:
            keywords["bind_address"] = "0.0.0.0" if bind in ("", "*") else bind  # noqa: S104 - asked for
        keywords |= {"local_port": port, "remote_host": target, "remote_port": target_port}
    if "remote_port" not in keywords:
        msg = "it is not said which port to forward to"
        raise UsageError(msg, hint="give remote_port=")
    return LocalForward(host, **keywords)
