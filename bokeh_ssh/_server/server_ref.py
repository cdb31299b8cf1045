"""What a client keeps of a server that it holds, to find it again: a plain record."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any
from urllib.parse import quote

#: Left as they are in a URL's path (RFC 3986, pchar), since browsers leave them too; what is quoted stays so.
_UNQUOTED = "/!$&'()*+,;=:@~%"


def as_paths(routes: Iterable[str]) -> tuple[str, ...]:
    """Write what a machine says that its routes are for a URL; what would lead to another machine is none.

    >>> as_paths(["/a b", "@evil.example/x"])
    ('/a%20b',)
    """
    return tuple(quote(route, safe=_UNQUOTED) for route in routes if route.startswith("/"))


@dataclass(frozen=True, kw_only=True)
class ServerRef:
    """A server on a machine, and the right to have it back. Can be pickled.

    :param host: the machine, as the user named it
    :param id: names the server among those of the account there
    :param token: the right to take it over also from a client that still seems to be there: a secret
    :param node: the machine's own name for itself; of a cluster's login nodes, only this one has the server
    :param python: the interpreter that the supervisor runs on
    :param libraries: where that finds its libraries (LD_LIBRARY_PATH), as ``module load`` says it
    :param place: the directory there where it is found
    :param supervisor: what holds the server there: its process, and when that began
    :param pid: the server's process there
    :param port: of that machine's loopback; 0 where it listens on a socket
    :param socket: the path of its socket there; empty where it listens on a port
    :param routes: the paths of its apps
    :param key: what its sessions are signed with, where they are: a secret
    """

    host: str
    id: str
    token: str = field(default="", repr=False)
    node: str = ""
    python: str = ""
    libraries: str = ""
    place: str = ""
    supervisor: str = ""
    pid: int = 0
    port: int = 0
    socket: str = ""
    routes: tuple[str, ...] = ()
    key: str = field(default="", repr=False)

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> ServerRef:
        """Make one of what is known of a server, and perhaps more."""
        return cls(**{each.name: facts[each.name] for each in fields(cls) if each.name in facts})
