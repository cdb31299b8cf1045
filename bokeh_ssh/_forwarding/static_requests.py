"""Which requests ask for a file that may be kept on this side, and the answers to them. Pure text.

There are three kinds, by what says that a file that is here is the one that the server has:

- *Its address.* Bokeh's pages name a file with the SHA-512 of its content, behind the server's prefix:
  ``/static/js/bokeh.min.js?v=b93164...``. So the answer is known before it is asked for, whichever server is
  asked, and can be checked. The server itself answers any ``v`` with the file that it has.
- *The server, when it is asked again* (RFC 9110, section 13.1.2). The extensions of Bokeh, Panel's files
  among them, have an ETag that is the SHA-512 of the content.
- *The server, beforehand* (RFC 9111): it has called the file ``immutable`` and said for how long. That counts
  for this server alone, and only for an address with a fingerprint: JupyterLab says so of all its files.

Only the plain request of a browser counts: what a server may answer in another way (``Range``, ``HEAD``,
HTTP/1.0, a connection that is to be closed) is left to it.
"""

from __future__ import annotations

import email.utils
import hashlib
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

#: Bytes of a file that is kept. The largest of BokehJS 3.10 has 5 MB; one that is served is in memory.
MOST_BYTES = 16 * 1024 * 1024

_FOLDER = "/static/js/"
#: Other names below ``static`` are left alone: those could be an app's own files.
_FILE = re.compile(r"(?P<name>bokeh[a-z0-9.-]{0,40}\.js)\?v=(?P<sha512>[0-9a-f]{128})")
#: What stands before that: a path without anything that a server may read as another one.
_PREFIX = re.compile(r"(?:/[A-Za-z0-9_~-][A-Za-z0-9._~-]*)*")
#: Where Bokeh serves what packages bring along for all apps.
_EXTENSIONS = "/static/extensions/"
_MOST_TARGET = 1000
#: Pages and data are an app's own, and never kept: only what has one of these endings, and the type to it.
_TYPES = {
    "css": "text/css",
    "eot": "application/vnd.ms-fontobject",
    "ico": "image/vnd.microsoft.icon",
    "js": "text/javascript",
    "mjs": "text/javascript",
    "otf": "font/otf",
    "png": "image/png",
    "svg": "image/svg+xml",
    "ttf": "font/ttf",
    "wasm": "application/wasm",
    "woff": "font/woff",
    "woff2": "font/woff2",
}
_NAMED = re.compile(rf"[A-Za-z0-9._-]{{1,56}}\.(?P<ending>{'|'.join(_TYPES)})")
_TYPE = re.compile(
    rb"^content-type:[ \t]*(?:(?:text|application)/(?:x-)?javascript|text/css|font/|image/|application/wasm"
    rb"|application/(?:x-)?font-|application/vnd\.ms-fontobject|application/octet-stream)",
    re.IGNORECASE | re.MULTILINE,
)
#: What distinguishes one version of a file from the next: a hash as the name, or behind a dot or a dash in
#: it, or as a value of the query. A word has no capitals and no digits.
_HASH = re.compile(r"[0-9a-f]{8,}")
_WHOLE_HASH = 16
_HASH_PART = re.compile(r"[\w-]{8,}", re.ASCII)
_NO_WORD = re.compile(r"[0-9A-Z]")
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
#: And where only the server can know the content.
_DECIDE_MORE = _DECIDE | {"authorization", "cache-control", "if-none-match", "service-worker"}
#: What an answer may depend on (``Vary``) and be kept.
_VARYING = ("accept-encoding", "origin")
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
#: The same where its hash is not known beforehand: who may have it is the server's to say.
_UNFIT_MORE = re.compile(
    rb"^(?:[ \t]|content-range:|transfer-encoding:|set-cookie:"
    rb"|cache-control:[^\n]*(?:no-store|private|no-cache))",
    re.IGNORECASE | re.MULTILINE,
)
_SHA512_TAG = re.compile(rb'^etag:[ \t]*"([0-9a-f]{128})"[ \t]*\r?$', re.IGNORECASE | re.MULTILINE)
#: Of one connection (RFC 9110, section 7.6.1), or written by us.
_NOT_KEPT = frozenset(
    {
        "age",
        "connection",
        "content-length",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authentication-info",
        "proxy-connection",
        "te",
        "trailer",
        "upgrade",
    }
)


class StaticFile(NamedTuple):
    """A file by its content.

    :ivar name: the last part of its path
    :ivar sha512: of its content, in hexadecimal digits
    """

    name: str
    sha512: str


class Address(NamedTuple):
    """A file by its address.

    :ivar site: the machine, the account and the server there
    :ivar target: as it is asked for
    """

    site: str
    target: str

    @property
    def key(self) -> str:
        """What distinguishes it from others, in hexadecimal digits."""
        return hashlib.sha256(f"{self.site}\0{self.target}".encode()).hexdigest()


class Lasting(NamedTuple):
    """An answer that a server has called immutable.

    :ivar lines: of its head, behind the first one, without those that count for one connection alone
    :ivar varies: names and values in the request that it depends on
    :ivar since: when it was made, in seconds since 1970
    :ivar lasts: seconds that it may be used for
    """

    lines: tuple[str, ...]
    varies: tuple[tuple[str, str], ...]
    since: float
    lasts: int

    def is_fresh(self, now: float) -> bool:
        """Return whether it may still be used; not where the clock is set back by a day and more."""
        return self.since - 86400 < now < self.since + self.lasts


def name_static_file(name: str, sha512: str) -> StaticFile | None:
    """Return the file of that name and content; None where it is none that pages ask for."""
    return StaticFile(name, sha512) if _FILE.fullmatch(f"{name}?v={sha512}") else None


class StaticRequest(NamedTuple):
    """A request for one.

    :ivar name: the last part of its path
    :ivar sha512: of the content that is asked for; empty where the address does not say it
    :ivar target: as it is asked for
    :ivar again: whether the server is asked whether it has the same
    :ivar known: whether the browser has it already, and only asks whether it is still the same
    :ivar varies: names and values of headers that an answer may depend on
    :ivar head: all of it, as it came
    """

    name: str
    sha512: str
    target: str
    again: bool = False
    known: bool = False
    varies: tuple[tuple[str, str], ...] = ()
    head: bytes = b""


#: What is written of the head of a page's request into one that goes out before the browser asks.
_OF_SENDER = re.compile(rb"^(?:host|cookie|user-agent):[^\n]*\n", re.IGNORECASE | re.MULTILINE)
_COOKIES = re.compile(rb"^cookie:[^\n]*", re.IGNORECASE | re.MULTILINE)
_TARGET = re.compile("[!-~]+")
_WANTS_PAGE = re.compile(rb"^accept:[^\n]*text/html", re.IGNORECASE | re.MULTILINE)
_REFERER = re.compile(rb"^referer:[ \t]*https?://[^/\s]*(/[^?#\s]*)", re.IGNORECASE | re.MULTILINE)


def find_page(head: bytes) -> str:
    """Return the path of the page that a browser asks for; empty where it asks for something else."""
    target = head.split(b" ", 2)[1] if _WANTS_PAGE.search(head) else b""
    return target.partition(b"?")[0].decode("latin-1")


def find_referer(head: bytes) -> str:
    """Return the path of the page that a file is asked for by; empty where the request does not say."""
    found = _REFERER.search(head)
    page = found[1].decode("latin-1") if found else ""
    return "" if _NAMED.fullmatch(page.rpartition("/")[2]) else page


def read_cookies(head: bytes) -> list[bytes]:
    """Return the lines with cookies in a request's head."""
    return [line.strip() for line in _COOKIES.findall(head)]


def write_static_request(target: str, page: bytes) -> StaticRequest | None:
    """Return the request for a file of a page, as whoever asks for that page would write it.

    :param page: the head of the request for the page
    :returns: None where that is no file whose server is asked again
    """
    head = f"GET {target} HTTP/1.1\r\n".encode("latin-1") + b"".join(_OF_SENDER.findall(page)) + b"\r\n"
    request = read_static_request("GET", target, (), head) if _TARGET.fullmatch(target) else None
    return request if request and request.again else None


def read_static_request(
    method: str, target: str, headers: Sequence[tuple[str, str]], head: bytes = b""
) -> StaticRequest | None:
    """Return which file is asked for; None where the answer is the server's alone.

    >>> read_static_request("GET", "/app/static/js/bokeh.min.js?v=" + 128 * "0", []).name
    'bokeh.min.js'
    >>> read_static_request("GET", "/static/extensions/panel/panel.min.js", []).again
    True
    >>> read_static_request("GET", "/static/js/bokeh.min.js", [])

    :param headers: names in lower case, and values
    :param head: of the request, as it came
    """
    if method != "GET" or not target.startswith("/") or len(target) > _MOST_TARGET:
        return None
    prefix, _, rest = target.rpartition(_FOLDER)
    found = _FILE.fullmatch(rest)
    if found and _PREFIX.fullmatch(prefix):
        return _read_request_by_content(found, target, headers)
    name = target.partition("?")[0].rpartition("/")[2]
    again = _EXTENSIONS in target.partition("?")[0]
    if not (_NAMED.fullmatch(name) and (again or _has_fingerprint(name, target.partition("?")[2]))):
        return None
    if any(each in _DECIDE_MORE for each, _ in headers):
        return None
    varies = tuple((each, value.strip()) for each, value in headers if each in _VARYING)
    return StaticRequest(name, "", target, again=again, varies=varies, head=head)


def _has_fingerprint(name: str, query: str) -> bool:
    """Return whether another version of the file would have another address."""
    stem = name.rpartition(".")[0]
    values = (pair.partition("=") for pair in query.split("&"))
    if (len(stem) >= _WHOLE_HASH and _HASH.fullmatch(stem)) or any(
        key and _HASH.fullmatch(value) for key, _, value in values
    ):
        return True
    cut = stem.rfind(".")
    if cut < 1:
        cut = stem.find("-", 1)
    part = stem[cut + 1 :] if cut > 0 else ""
    return bool(_HASH_PART.fullmatch(part) and _NO_WORD.search(part))


def _read_request_by_content(
    found: re.Match[str], target: str, headers: Sequence[tuple[str, str]]
) -> StaticRequest | None:
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
    return StaticRequest(found["name"], found["sha512"], target, known=bool(known))


def write_static_head(request: StaticRequest, length: int) -> bytes:
    """Write the head of the answer to who asks by content, as Bokeh does.

    :param length: of the file, in bytes
    """
    lines = [
        "HTTP/1.1 304 Not Modified" if request.known else "HTTP/1.1 200 OK",
        f"Date: {email.utils.formatdate(usegmt=True)}",
        "Accept-Ranges: bytes",
        f'Etag: "{request.sha512}"',
        "Cache-Control: max-age=315360000",  # ten years
    ]
    if not request.known:
        lines += ["Content-Type: text/javascript", f"Content-Length: {length}"]
    return _join(lines)


def write_question(request: StaticRequest, hashes: Iterable[str]) -> bytes:
    r"""Write the request that asks whether the server has one of these, as the client would ask.

    >>> write_question(StaticRequest("a.js", "", "/a.js", head=b"GET /a.js HTTP/1.1\r\n\r\n"), ["00"])
    b'HEAD /a.js HTTP/1.1\r\nIf-None-Match: "00"\r\n\r\n'
    """
    tags = ", ".join(f'"{each}"' for each in hashes)
    return b"HEAD" + request.head[3:-2] + f"If-None-Match: {tags}\r\n\r\n".encode("ascii")


def read_unchanged(head: bytes) -> str:
    """Return the SHA-512 of what a server has, where it says that we have the same; else an empty text."""
    found = _SHA512_TAG.findall(head)
    unchanged = re.match(rb"HTTP/1\.1 304 ", head) and not _UNFIT_MORE.search(head)
    return found[0].decode("ascii") if unchanged and len(found) == 1 else ""


def write_unchanged_head(request: StaticRequest, head: bytes, length: int) -> bytes:
    """Write the head of an answer that the server has just called unchanged (RFC 9111, section 4.3.4).

    :param head: in which it said so
    :param length: of the file, in bytes
    """
    lines = (line for line in _lines_to_keep(head) if not line.lower().startswith("content-type:"))
    kind = f"Content-Type: {_TYPES[request.name.rpartition('.')[2]]}"
    return _join(["HTTP/1.1 200 OK", *lines, kind, f"Content-Length: {length}"])


def write_lasting_head(answer: Lasting, length: int, now: float) -> bytes:
    """Write the head of an answer that is used again.

    :param length: of the file, in bytes
    """
    age = f"Age: {max(0, round(now - answer.since))}"
    return _join(["HTTP/1.1 200 OK", *answer.lines, age, f"Content-Length: {length}"])


def _join(lines: Iterable[str]) -> bytes:
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def find_length_to_keep(head: bytes) -> int:
    """Return how long the file is that follows the head of an answer; 0 where it cannot be kept."""
    return 0 if _UNFIT.search(head) else _find_length(head)


def _find_length(head: bytes) -> int:
    found = _LENGTH.findall(head)
    if not _STATUS.match(head) or len(found) != 1:
        return 0
    length = int(found[0])
    return length if length <= MOST_BYTES else 0


def find_hash_to_keep(head: bytes) -> str:
    """Return the hash of the file that follows the head of an answer, where its ETag says it; else empty."""
    found = _SHA512_TAG.findall(head)
    unfit = _UNFIT.search(head) or _UNFIT_MORE.search(head) or re.search(rb"(?im)^vary:", head)
    return found[0].decode("ascii") if len(found) == 1 and not unfit and _find_length(head) else ""


def find_lasting(request: StaticRequest, head: bytes, now: float) -> Lasting | None:
    """Return what is to be kept of the head of an answer; None where it is not called immutable, or unfit."""
    if not _find_length(head) or _UNFIT_MORE.search(head) or not _TYPE.search(head):
        return None
    fields = [(name.strip().lower(), value.strip()) for name, _, value in _split(head)]
    control = ",".join(value for name, value in fields if name == "cache-control").lower()
    lasts = re.search(r"(?:^|[\s,])max-age=([0-9]{1,9})(?:$|[\s,])", control)
    if lasts is None or not re.search(r"(?:^|[\s,])immutable(?:$|[\s,])", control):
        return None
    nominated = {
        each.strip().lower() for name, value in fields if name == "vary" for each in value.split(",")
    }
    encoded = any(name == "content-encoding" for name, _ in fields)
    if not nominated <= set(_VARYING) or (encoded and "accept-encoding" not in nominated):
        return None
    ages = [value for name, value in fields if name == "age" and re.fullmatch("[0-9]{1,9}", value)]
    given = dict(request.varies)
    varies = tuple((name, given.get(name, "")) for name in sorted(nominated))
    answer = Lasting(tuple(_lines_to_keep(head)), varies, now - int((ages or ["0"])[0]), int(lasts[1]))
    return answer if answer.is_fresh(now) else None


def fits(answer: Lasting, request: StaticRequest) -> bool:
    """Check whether an answer is one to this request as well (RFC 9111, section 4.1)."""
    given = dict(request.varies)
    return all(given.get(name, "") == value for name, value in answer.varies)


def _split(head: bytes) -> list[tuple[str, str, str]]:
    lines = head.decode("latin-1").replace("\r\n", "\n").split("\n")[1:]
    return [line.partition(":") for line in lines if line]


def _lines_to_keep(head: bytes) -> list[str]:
    fields = _split(head)
    named = {
        each.strip().lower()
        for name, _, value in fields
        if name.lower() == "connection"
        for each in value.split(",")
    }
    left_out = _NOT_KEPT | named
    return [f"{name}:{value}" for name, _, value in fields if name.strip().lower() not in left_out]
