"""Which requests ask for a file of BokehJS by the hash of its content, and the answers to them. Pure text.

Bokeh's pages name such a file with the SHA-512 of its content: ``/static/js/bokeh.min.js?v=b93164...``, with
the server's prefix in front. So the answer is known before it is asked for, whichever server is asked, and
can be checked. The server itself answers any ``v`` with the file that it has.

Only the plain request of a browser counts: what a server may answer in another way (``Range``, ``HEAD``,
HTTP/1.0, a connection that is to be closed) is left to it.
"""

from __future__ import annotations

import email.utils
import re
from collections.abc import Sequence
from typing import NamedTuple

#: Bytes of a file that is kept. The largest of BokehJS 3.10 has 5 MB; one that is served is in memory.
MOST_BYTES = 16 * 1024 * 1024

_FOLDER = "/static/js/"
#: Other names below ``static`` are left alone: those could be an app's own files.
_FILE = re.compile(r"(?P<name>bokeh[a-z0-9.-]{0,40}\.js)\?v=(?P<sha512>[0-9a-f]{128})")
#: What stands before that: a path without anything that a server may read as another one.
_PREFIX = re.compile(r"(?:/[A-Za-z0-9_~-][A-Za-z0-9._~-]*)*")
#: Headers with which the answer may be another one than the whole file.
_DECIDE = frozenset(
    {
        "content-length",
        "expect",
        "if-match",
        "if-modified-since",
        "if-range",
        "if-unmodified-since",
        "pragma",
        "range",
        "transfer-encoding",
        "upgrade",
    }
)
_TAGS = re.compile(r'(?:W/)?"[^"\\]*"(?:[ \t]*,[ \t]*(?:W/)?"[^"\\]*")*')
_TAG = re.compile(r'"([^"]*)"')

_STATUS = re.compile(rb"HTTP/1\.[01] 200 ")
_LENGTH = re.compile(rb"^content-length:[ \t]*([0-9]{1,18})[ \t]*\r?$", re.IGNORECASE | re.MULTILINE)
#: An answer that is not the file as it is, or that is not to be kept.
_UNFIT = re.compile(
    rb"^(?:content-encoding:|content-range:|transfer-encoding:|set-cookie:|vary:[ \t]*\*"
    rb"|cache-control:[^\n]*no-store)",
    re.IGNORECASE | re.MULTILINE,
)


class StaticFile(NamedTuple):
    """A file of BokehJS.

    :ivar name: the last part of its path
    :ivar sha512: of its content, in hexadecimal digits
    """

    name: str
    sha512: str


def name_static_file(name: str, sha512: str) -> StaticFile | None:
    """Return the file of that name and content; None where it is none that pages ask for."""
    return StaticFile(name, sha512) if _FILE.fullmatch(f"{name}?v={sha512}") else None


class StaticRequest(NamedTuple):
    """A request for one.

    :ivar known: whether the browser has it already, and only asks whether it is still the same
    """

    file: StaticFile
    known: bool


def read_static_request(method: str, target: str, headers: Sequence[tuple[str, str]]) -> StaticRequest | None:
    """Return which file is asked for; None where the answer is the server's alone.

    >>> read_static_request("GET", "/app/static/js/bokeh.min.js?v=" + 128 * "0", []).file.name
    'bokeh.min.js'
    >>> read_static_request("GET", "/static/js/bokeh.min.js", [])

    :param headers: names in lower case, and values
    """
    prefix, _, rest = target.rpartition(_FOLDER)
    found = _FILE.fullmatch(rest)
    if found is None or method != "GET" or not (target.startswith("/") and _PREFIX.fullmatch(prefix)):
        return None
    known: bool | None = None
    for name, value in headers:
        if name in _DECIDE:
            # With an ETag the date does not count (RFC 9110, section 13.1.3), whichever comes first.
            if name != "if-modified-since" or not any(other == "if-none-match" for other, _ in headers):
                return None
        elif name == "if-none-match":
            if known is not None or not _TAGS.fullmatch(value):
                return None
            known = found["sha512"] in _TAG.findall(value)
        elif name == "cache-control" and ("no-cache" in value.lower() or "no-store" in value.lower()):
            return None  # somebody reloads, and wants to see what the server has
    return StaticRequest(StaticFile(found["name"], found["sha512"]), bool(known))


def write_static_head(request: StaticRequest, length: int) -> bytes:
    """Write the head of the answer, as Bokeh does.

    :param length: of the file, in bytes
    """
    lines = [
        "HTTP/1.1 304 Not Modified" if request.known else "HTTP/1.1 200 OK",
        f"Date: {email.utils.formatdate(usegmt=True)}",
        "Accept-Ranges: bytes",
        f'Etag: "{request.file.sha512}"',
        "Cache-Control: max-age=315360000",  # ten years
    ]
    if not request.known:
        lines += ["Content-Type: text/javascript", f"Content-Length: {length}"]
    return "\r\n".join([*lines, "", ""]).encode("ascii")


def find_length_to_keep(head: bytes) -> int:
    """Return how long the file is that follows the head of an answer; 0 where it cannot be kept."""
    found = _LENGTH.findall(head)
    if not _STATUS.match(head) or len(found) != 1 or _UNFIT.search(head):
        return 0
    length = int(found[0])
    return length if length <= MOST_BYTES else 0
