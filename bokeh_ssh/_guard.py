"""Whether a local HTTP request may go to the server, by the beginning of its connection. Pure text.

A web page can have its own name lead to this machine (DNS rebinding); then the browser takes our port for a
part of that page's site, and lets it read everything. What gives such a request away is its ``Host``: the
browser says the name that it was told. Scripts and Bokeh's own clients say ``localhost``, or what they were
given. Browsers keep connections by name, so the first request of each tells for all that follow on it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit

#: Bytes of a request's head that are looked at; servers take 64 KiB, cookies of a whole campus included.
MOST = 64 * 1024

#: The beginning of an HTTP/1 request (RFC 9112, section 3). TLS and everything else looks otherwise.
_METHOD = re.compile(rb"[A-Z]{1,20}(?: |$)")
_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})

Verdict = Literal["more", "pass", "refuse"]


@dataclass(frozen=True)
class Guard:
    """What local requests are let in.

    :param port: the port here
    :param origins: ``host:port`` of the pages that may talk to the server besides
    :param check_origin: look at the origin of WebSockets too: not for servers whose rules we do not know
    """

    port: int
    origins: tuple[str, ...] = ()
    check_origin: bool = True

    def judge(self, head: bytes) -> tuple[Verdict, str]:
        r"""Tell what to do with a connection that begins with ``head``, and why where it is refused.

        >>> guard = Guard(5006)
        >>> guard.judge(b"GET / HTTP/1.1\r\nHost: localhost:5006\r\n\r\n")
        ('pass', '')
        >>> guard.judge(b"GET / HTTP/1.1\r\nHost: evil.example:5006\r\n\r\n")
        ('refuse', "the name 'evil.example' does not belong to this machine")
        >>> guard.judge(b"GET / HTTP/1.1\r\nHost: loc")
        ('more', '')
        """
        if not _METHOD.match(head[:21]):
            return ("pass", "") if head else ("more", "")
        text, end, _ = head.partition(b"\r\n\r\n")
        if not end:
            return ("more", "") if len(head) < MOST else ("refuse", "the head of the request does not end")
        _, *lines = text.decode("latin-1").split("\r\n")
        names = [
            (name.strip().lower(), value.strip()) for name, _, value in (x.partition(":") for x in lines)
        ]
        hosts = [value for name, value in names if name == "host"]
        if len(hosts) > 1:
            return "refuse", "it has more than one Host"
        if hosts and not self._is_ours(hosts[0]):
            return "refuse", f"the name {_name(hosts[0])!r} does not belong to this machine"
        headers = dict(names)
        if self.check_origin and headers.get("upgrade", "").lower() == "websocket" and "origin" in headers:
            origin = headers["origin"]
            if not self._may_talk(origin):
                return "refuse", f"pages of {origin[:200]!r} may not open WebSockets here (extra_origins)"
        return "pass", ""

    def _is_ours(self, host: str) -> bool:
        name = _name(host)
        return _is_loopback(name) or name in {_name(origin) for origin in self.origins}

    def _may_talk(self, origin: str) -> bool:
        try:
            parts = urlsplit(origin)
            name, port = (parts.hostname or "").lower(), parts.port
        except ValueError:
            return False
        port = port or {"http": 80, "https": 443}.get(parts.scheme, 0)
        if _is_loopback(name) and port == self.port:
            return True
        allowed = {(_name(text), _port(text)) for text in self.origins}
        return (name, port) in allowed or "*" in self.origins


def _is_loopback(name: str) -> bool:
    return name in _LOOPBACK or name.endswith(".localhost")  # RFC 6761, section 6.3


def _name(host: str) -> str:
    """Give the name in ``host:port``, in lower case, without a final dot."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    name = host.partition(":")[0] if host.count(":") <= 1 else host
    return name.lower().rstrip(".")


def _port(host: str) -> int:
    digits = host.rpartition("]")[2].partition(":")[2]
    return int(digits) if digits.isdigit() else 80


def refusal(reason: str) -> bytes:
    """Write the answer to a request that is refused."""
    body = f"bokeh_ssh does not let this request in: {reason}.\n".encode()
    head = (
        "HTTP/1.1 403 Forbidden\r\nContent-Type: text/plain; charset=utf-8\r\n"
        f"Content-Length: {len(body)}\r\nX-Content-Type-Options: nosniff\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + body
