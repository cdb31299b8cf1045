"""What is told while a tunnel opens, lives and ends, and what is asked: plain records.

Records only, so that they can be shown, logged, or sent to another process unchanged.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something happened to a tunnel.

    :param host: the machine it happened on or with, as the user named it
    """

    host: str


@dataclass(frozen=True, kw_only=True)
class Connecting(Event):
    """A connection to ``host`` is being opened, through ``via`` if that is not empty."""

    address: str
    port: int
    via: str = ""


@dataclass(frozen=True, kw_only=True)
class HostKeyAdded(Event):
    """An unknown host key was accepted, as asked, and remembered in ``path``."""

    key_type: str
    fingerprint: str
    path: str


@dataclass(frozen=True, kw_only=True)
class Authenticated(Event):
    """The login succeeded, with these methods in order (two where the server wants two)."""

    user: str
    methods: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Launching(Event):
    """The remote server is being started."""

    command: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Launched(Event):
    """The remote server listens on ``port`` of its own loopback."""

    port: int
    pid: int
    versions: str


@dataclass(frozen=True, kw_only=True)
class Attached(Event):
    """A server that was already there answers on ``port``."""

    port: int


@dataclass(frozen=True, kw_only=True)
class ReverseForwarded(Event):
    """The gateway's ``port`` leads to the server; ``by`` tells who dialled: "host" or "relay"."""

    port: int
    by: str
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Ready(Event):
    """The whole way was tried and works; ``url`` opens it."""

    url: str


@dataclass(frozen=True, kw_only=True)
class AppFailed(Event):
    """The app's own code raised: its page is blank. ``traceback`` is what it wrote."""

    traceback: str


@dataclass(frozen=True, kw_only=True)
class ServerUnresponsive(Event):
    """The remote server process exists but does not run (stopped)."""


@dataclass(frozen=True, kw_only=True)
class ServerResponsive(Event):
    """The remote server runs again."""


@dataclass(frozen=True, kw_only=True)
class ServerExited(Event):
    """The remote server ended by itself; ``exit_status`` is negative for a signal."""

    exit_status: int | None


@dataclass(frozen=True, kw_only=True)
class Lost(Event):
    """The connection went down."""

    reason: str


@dataclass(frozen=True, kw_only=True)
class Closed(Event):
    """The tunnel ended; everything it started was ended too."""


@dataclass(frozen=True, kw_only=True)
class Warned(Event):
    """Something works, but not as well or as privately as it could."""

    text: str


@dataclass(frozen=True, kw_only=True)
class Question:
    """Something only a person can answer.

    :param kind: ``"password"``, ``"passphrase"``, ``"interactive"`` (a code, a choice) or ``"host_key"``
    :param host: the machine it is about
    :param text: the question itself
    :param echo: whether the answer may be shown while it is typed
    :param instructions: what the server wants said before the question
    """

    kind: str
    host: str
    text: str
    echo: bool = False
    instructions: str = ""


#: Takes a question, gives the answer; None declines. For ``"host_key"``, ``"yes"`` accepts.
Prompt = Callable[[Question], "str | None"]

#: Takes each event, on whatever thread it happens; must return soon and must not raise.
OnEvent = Callable[[Event], None]


def ignore(event: Event) -> None:
    """Take an event and do nothing: the default ``on_event``."""
