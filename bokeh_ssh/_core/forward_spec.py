"""What ``ssh`` takes after ``-L`` and ``-R``, taken apart. Text only."""

from __future__ import annotations

from bokeh_ssh._core.endpoint import Endpoint
from bokeh_ssh._core.errors import UsageError
from bokeh_ssh._core.host import parse_port
from bokeh_ssh._core.settings import setting

#: Where it listens: an address (None is loopback, "" or "*" all) and a port, or the path of a socket.
Listen = tuple[str | None, int] | str
_SHAPES = "[BIND:]PORT:HOST:HOSTPORT, PORT:/SOCKET, /SOCKET:HOST:HOSTPORT or /SOCKET:/SOCKET"


#: Says, behind a port, that what answers there is a web server.
_HTTP = "/http"


def split_http(spec: str) -> tuple[str, bool]:
    """Take off a forward what says that it is one to a web server, and return whether that was said.

    >>> split_http("8888:localhost:8888/http")
    ('8888:localhost:8888', True)
    >>> split_http("8888:/run/http")
    ('8888:/run/http', False)
    """
    head, colon, port = spec.removesuffix(_HTTP).rpartition(":")
    http = spec.endswith(_HTTP) and bool(colon) and port.isascii() and port.isdigit()
    return (f"{head}:{port}", True) if http else (spec, False)


def check_http(listen: Listen) -> None:
    """Check that what leads to a web server listens on loopback only: each request has to name this machine.

    :raises UsageError: if it does not
    """
    if isinstance(listen, str) or not is_loopback(listen[0]):
        msg = "a forward to a web server listens on a loopback port only"
        raise UsageError(
            msg, hint=f"leave out {setting('http=True')} (or /http), or the address or socket to listen on"
        )


def is_loopback(address: str | None) -> bool:
    """Return whether an address to listen on is one of loopback, as far as its text says."""
    return address in (None, "localhost", "::1") or (address or "").startswith("127.")


def parse_forward(spec: str) -> tuple[Listen, Endpoint]:
    """Take apart what ``ssh`` takes after ``-L`` and ``-R``: where to listen, and where that leads.

    What has a slash is the path of a socket. Colons in brackets, or after a backslash, part nothing.

    >>> parse_forward("6006:localhost:5006")
    ((None, 6006), ('localhost', 5006))
    >>> parse_forward("[::1]:0:[fe80::2]:5006")
    (('::1', 0), ('fe80::2', 5006))
    >>> parse_forward("5006:/run/me/app.sock")
    ((None, 5006), '/run/me/app.sock')
    >>> parse_forward("/run/me/app.sock:localhost:5006")
    ('/run/me/app.sock', ('localhost', 5006))

    :raises UsageError: if it is written otherwise
    """
    # As OpenSSH's parse_forward (readconf.c): which parts are paths says what the others are.
    parts = _parts(spec)
    paths = tuple("/" in part for part in parts)
    if len(parts) in (2, 3) and paths == (*(False,) * (len(parts) - 1), True):
        return _listen(parts[:-1], spec), parts[-1]
    if paths == (True, True):
        return parts[0], parts[1]
    if paths == (True, False, False):
        return parts[0], (parts[1], parse_port(parts[2], spec))
    if len(parts) in (3, 4) and not any(paths):
        return _listen(parts[:-2], spec), (parts[-2], parse_port(parts[-1], spec))
    raise _not_a_forward(spec)


def _listen(parts: list[str], spec: str) -> Listen:
    digits = parts[-1]
    port = 0 if digits.isascii() and digits.isdigit() and not int(digits) else parse_port(digits, spec)
    return (parts[0] if len(parts) == 2 else None), port


def _parts(spec: str) -> list[str]:
    parts: list[str] = []
    at = 0
    while True:
        if spec.startswith("[", at):
            end = spec.find("]", at)
            part, at = spec[at + 1 : end], end + 1
        else:
            end, part = at, ""
            while end < len(spec) and spec[end] != ":":
                end += 1 + (spec[end] == "\\")
            part, at = _bare(spec[at:end]), end
        if not end >= 0 or at > len(spec) or spec[at : at + 1] not in ("", ":"):
            raise _not_a_forward(spec)
        parts.append(part)
        if at == len(spec):
            return parts
        at += 1


def _bare(part: str) -> str:
    """Take away the backslashes that are there for what follows them."""
    pieces = iter(part.split("\\"))
    first = next(pieces)
    return first + "".join(piece or "\\" + next(pieces, "") for piece in pieces)


def _not_a_forward(spec: str) -> UsageError:
    msg = f"{spec!r} is not a forward"
    return UsageError(msg, hint=f"write it as {_SHAPES}, such as 6006:localhost:5006")
