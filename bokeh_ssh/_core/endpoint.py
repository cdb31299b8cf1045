"""Where a forward listens or leads: a TCP address or a Unix socket. Pure text."""

from __future__ import annotations

import re

from bokeh_ssh._core.errors import UsageError
from bokeh_ssh._core.settings import set_to, setting

#: ``(host, port)``, or the path of a Unix socket; of which machine, the place where it is used says.
Endpoint = tuple[str, int] | str
#: Who connected, as (address, port): servers log it.
Origin = tuple[str, int]

#: What stands for an origin that has no address: a program of ours, or a Unix socket.
HERE: Origin = ("127.0.0.1", 0)
#: Bytes of a path that fit into Linux's ``sockaddr_un`` with its NUL; the BSDs and macOS take four fewer.
LONGEST_PATH = 107

_LONGEST_NAME = 40
_NAME = re.compile(rf"[A-Za-z0-9_][A-Za-z0-9_.-]{{0,{_LONGEST_NAME - 1}}}")


def format_endpoint(endpoint: Endpoint) -> str:
    """Name it in a message.

    >>> format_endpoint(("localhost", 5006)), format_endpoint("/run/me/app.sock")
    ('localhost port 5006', 'the socket /run/me/app.sock')
    """
    return f"the socket {endpoint}" if isinstance(endpoint, str) else f"{endpoint[0]} port {endpoint[1]}"


def format_short(endpoint: Endpoint) -> str:
    """Write it as ``ssh -L`` would.

    >>> format_short(("::1", 5006)), format_short("/run/me/app.sock")
    ('[::1]:5006', '/run/me/app.sock')
    """
    if isinstance(endpoint, str):
        return endpoint
    host, port = endpoint
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def check_path(path: str, name: str, *, longest: int = LONGEST_PATH) -> None:
    """Refuse what cannot be the absolute path of a Unix socket.

    :param longest: bytes that the system takes
    :raises UsageError: if it is relative, is a folder, is too long, or has a NUL or a line end
    """
    if not isinstance(path, str) or not path.startswith("/") or path.endswith("/"):
        msg = f"{set_to(name, path)} is not the absolute path of a socket"
        raise UsageError(msg, hint="give a path that starts with /, in a folder that only you may enter")
    if "\0" in path or "\n" in path:
        msg = f"{set_to(name, path)} has a character that no socket's path may have"
        raise UsageError(msg, hint="choose another path")
    length = len(encode(path))
    if length > longest:
        msg = f"{setting(name)} has {length} bytes; a Unix socket's path may have {longest}"
        raise UsageError(msg, hint=f"choose a shorter path than {path}")


def check_instead(socket: object, name: str, **others: tuple[object, object]) -> None:
    """Refuse a socket together with the keywords that it stands in for.

    :param others: each keyword's value and its default, by its name
    :raises UsageError: if one of them was given too
    """
    more = [other for other, (value, default) in others.items() if value != default]
    if socket is not None and more:
        msg = f"{setting(f'{name}=')} and {setting(f'{more[0]}=')} cannot be given together"
        raise UsageError(msg, hint="a socket takes the place of host and port")


def check_name(name: object) -> None:
    """Refuse what cannot name something that is published.

    :raises UsageError: if it has anything but letters, digits, dots, dashes and underscores, or too many
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        msg = f"nothing can be published under {set_to('name', name)}"
        raise UsageError(msg, hint="use up to 40 letters, digits, dots, dashes and underscores")


def is_name(text: str) -> bool:
    """Return whether something can be published under that name."""
    return _NAME.fullmatch(text) is not None


def as_name(text: str) -> str:
    """Make a name of any text, such as an app's.

    >>> as_name("Verkäufe 2024.py")
    'Verk-ufe-2024.py'
    """
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", text).lstrip(".-")[:_LONGEST_NAME] or "app"


def encode(path: str) -> bytes:
    """Write a path or a name as the bytes that the other system sees."""
    return path.encode("utf-8", "surrogateescape")


def nearby(port: int) -> list[int]:
    """List the ports that are tried in turn where ``port`` is only preferred.

    A server that is published for others lets pages from all of these in (``--allow-websocket-origin``), so
    that one of them serves as well as the first.
    """
    return list(range(port, min(port + 10, 65536)))
