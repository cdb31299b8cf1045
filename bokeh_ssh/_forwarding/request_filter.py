"""Which local HTTP requests may go to the server, by what their heads say. Pure text.

A web page can have its own name lead to this machine (DNS rebinding); then the browser takes our port for a
part of that page's site, and lets it read everything. What gives such a request away is its ``Host``: the
browser says the name that it was told. Scripts and Bokeh's own clients say ``localhost``, or what they were
given. A page may open a WebSocket to anywhere, and read what comes: what gives that away is its ``Origin``.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass

from bokeh_ssh._core.settings import setting, shown

#: ``uri-host [ ":" port ]`` (RFC 9110, section 7.2), and nothing else: with a ``@``, a ``/`` or something
#: behind a ``]``, two programs may read two names.
_HOST = re.compile(r"(?:(?P<name>[A-Za-z0-9._-]+)|\[(?P<address>[0-9A-Fa-f:.]+)\])(?::(?P<port>[0-9]{1,5}))?")
_ABSOLUTE = re.compile(r"https?://(?P<host>[^/?#]*)(?:[/?#].*)?", re.IGNORECASE)
_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
_PORTS = {"http": 80, "https": 443}
#: Bokeh's word for the pages of all sites.
_ANY = "*"


@dataclass(frozen=True)
class RequestFilter:
    """What local requests are let in.

    :param port: the port here
    :param origins: ``host:port`` of the pages that may talk to the server besides; ``*`` is any
    :param origins_setting: the setting that adds to these; empty if none does
    :param proxied: whether a web server here passes requests on (jupyter-server-proxy), with the name that
        its own pages have. What a page has led here past it names our port: a browser says each but 80 and
        443.
    """

    port: int
    origins: tuple[str, ...] = ()
    origins_setting: str = ""
    proxied: bool = False

    def find_fault(self, method: str, target: str, headers: Sequence[tuple[str, str]]) -> str:
        """Find why a request is refused; empty where it is let in.

        >>> guard = RequestFilter(5006)
        >>> guard.find_fault("GET", "/", [("host", "localhost:5006")])
        ''
        >>> guard.find_fault("GET", "/", [("host", "evil.example:5006")])
        "the name 'evil.example:5006' does not belong to this machine"

        :param headers: names in lower case, and values
        """
        # Scripts that say no Host, as HTTP/1.0 allows, are refused with the rest: whom they mean is unknown.
        hosts = [value for name, value in headers if name == "host"]
        if len(hosts) != 1:
            return "it has more than one Host" if hosts else "it has no Host"
        if method.upper() == "CONNECT":
            return "this is no proxy"
        if not target.startswith("/") and target != "*":
            # A server has to prefer that name to the Host (RFC 9112, section 3.2.2).
            absolute = _ABSOLUTE.fullmatch(target)
            if absolute is None:
                return "it does not ask for a path"
            hosts.append(absolute["host"])
        for host in hosts:
            if not self._is_ours(host):
                return f"the name {host[:200]!r} does not belong to this machine"
        # Whatever else is needed for a WebSocket is the server's business; no page can send these otherwise.
        if not any(name == "upgrade" or name.startswith("sec-websocket-") for name, _ in headers):
            return ""
        for name, value in headers:
            if name in ("origin", "sec-websocket-origin") and not self._may_talk(value, hosts):
                how = self.origins_setting and shown(f" ({setting(self.origins_setting)} lets them)")
                return f"pages of {value[:200]!r} may not open WebSockets here{how}"
        return ""

    def _is_ours(self, host: str) -> bool:
        name = _name(host)
        direct = self.port in _PORTS.values() or _port(host, 0) == self.port
        if self.proxied and name is not None and not direct:
            return True
        return _is_loopback(name) or (name is not None and name in map(_name, self.origins))

    def _may_talk(self, origin: str, hosts: Sequence[str]) -> bool:
        if _ANY in self.origins:
            return True
        scheme, _, host = origin.partition("://")
        if scheme not in _PORTS or _name(host) is None:
            return False
        if self.proxied and all(host.lower() == each.lower() for each in hosts):
            return True
        page = _name(host), _port(host, _PORTS[scheme])
        return (_is_loopback(page[0]) and page[1] == self.port) or page in {
            (_name(text), _port(text, 80)) for text in self.origins
        }


def _is_loopback(name: str | None) -> bool:
    return name is not None and (name in _LOOPBACK or name.endswith(".localhost"))  # RFC 6761, section 6.3


def _name(host: str) -> str | None:
    """Read the name in ``host:port``, in lower case, without a final dot; None where it is not written so."""
    match = _HOST.fullmatch(host)
    if match is None:
        return None
    if match["name"]:
        return match["name"].lower().removesuffix(".")
    try:
        return str(ipaddress.IPv6Address(match["address"]))
    except ValueError:
        return None


def _port(host: str, default: int) -> int:
    match = _HOST.fullmatch(host)
    return int(match["port"] or default) if match else default


def refusal(reason: str) -> bytes:
    """Write the answer to a request that is refused."""
    body = f"bokeh_ssh does not let this request in: {reason}.\n".encode()
    head = (
        "HTTP/1.1 403 Forbidden\r\nContent-Type: text/plain; charset=utf-8\r\n"
        f"Content-Length: {len(body)}\r\nX-Content-Type-Options: nosniff\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + body
