"""The events of a tunnel, and the questions to a person: plain records.

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
    """A connection to ``host`` is being opened, through ``via`` if that is not empty.

    :param port: the port on it; 0 for the machine of a batch job, of which no port is connected to
    :param via: a machine, ``"its ProxyCommand"``, or the ControlMaster of ``ssh`` that is used
    """

    address: str
    port: int
    via: str = ""


@dataclass(frozen=True, kw_only=True)
class HostKeyAdded(Event):
    """An unknown host key was accepted, as ``host_keys`` says, and added to ``path``."""

    key_type: str
    fingerprint: str
    path: str


@dataclass(frozen=True, kw_only=True)
class HostKeyVerified(Event):
    """The machine was reached and its host key is the right one. No credential has been sent yet."""

    key_type: str
    fingerprint: str


@dataclass(frozen=True, kw_only=True)
class TouchRequested(Event):
    """The login waits until somebody touches the security key that ``key`` is in, at most for a minute.

    :param key: the key file, or what the agent calls the key
    """

    key: str


@dataclass(frozen=True, kw_only=True)
class Authenticated(Event):
    """The login succeeded, with these methods in order (two if the server wants two).

    :param user: the login name; ``***`` replaces what follows a colon in it, which may be a secret
    :param methods: as SSH names them; ``("ControlMaster",)`` if a connection of ``ssh`` was used
    """

    user: str
    methods: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class JobSubmitted(Event):
    """The scheduler of ``host`` has accepted the batch job, under the number ``job``."""

    job: str


@dataclass(frozen=True, kw_only=True)
class JobWaiting(Event):
    """The job is queued, or suspended. Reported at first, and if ``reason`` or ``estimated_start`` changes.

    :param reason: why it waits, in the scheduler's word, or "suspended"; empty if it has not said
    :param estimated_start: when the scheduler expects to start it, in seconds since the epoch; None if it
        does not say, or has said a time that has passed
    :param stays: whether the job is left alone if the tunnel is closed now
    """

    job: str
    reason: str = ""
    estimated_start: float | None = None
    stays: bool = False


@dataclass(frozen=True, kw_only=True)
class JobStarted(Event):
    """The job runs on ``node``.

    :param ends_at: when its time limit ends it, in seconds since the epoch; None if not known
    """

    job: str
    node: str
    ends_at: float | None = None


@dataclass(frozen=True, kw_only=True)
class JobReached(Event):
    """The machine of a batch job is reached; reported again when it is reached in another way.

    :param node: that machine
    :param way: how the login node gets there, see :class:`Batch`
    """

    job: str
    node: str
    way: str


@dataclass(frozen=True, kw_only=True)
class JobEnding(Event):
    """The job will end soon: 10 and 2 minutes before its time limit, and when the scheduler warns it.

    :param seconds: until its time limit; None if the warning is about something else
    :param warned: whether the reason is a warning of the scheduler
    """

    job: str
    seconds: float | None
    warned: bool = False


@dataclass(frozen=True, kw_only=True)
class JobEnded(Event):
    """The job is over.

    :param state: how it ended, see :class:`JobEndedError`
    :param why: the same as a sentence
    """

    job: str
    state: str
    why: str


@dataclass(frozen=True, kw_only=True)
class Launching(Event):
    """The remote server is being started."""

    command: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Uploading(Event):
    """The app is being uploaded: of ``size`` bytes in ``files`` files, ``sent`` have arrived.

    Reported at the start, with 0, at the end, and in between at most ten times a second.
    """

    files: int
    size: int
    sent: int


@dataclass(frozen=True, kw_only=True)
class Updated(Event):
    """Changes of the app were uploaded (``dev=True``): ``changed`` and ``removed`` are paths in it."""

    changed: tuple[str, ...]
    removed: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Launched(Event):
    """The remote server listens: on ``port`` of its loopback interface, or on ``socket``, a path there.

    :param compressed: whether what it sends to pages is compressed, over WebSockets at least: if a round trip
        takes more than 10 ms, or you asked for it
    """

    port: int
    pid: int
    versions: str
    socket: str = ""
    compressed: bool = False


@dataclass(frozen=True, kw_only=True)
class Attached(Event):
    """A running server is used: one that answers on ``port``, or one of your own that was left running.

    :param port: its port on that machine; 0 if it listens on a socket
    :param name: the name that it was published under
    :param id: its id there, if it is one of your own
    :param pid: its process there, if it is one of your own
    """

    port: int = 0
    name: str = ""
    id: str = ""
    pid: int = 0


@dataclass(frozen=True, kw_only=True)
class ReverseForwarded(Event):
    """The gateway's ``port``, or private ``socket``, leads to the server.

    :param by: who opened it: "host" or "relay"
    :param reason: why it was the relay, if it could have been the host
    """

    by: str
    port: int = 0
    socket: str = ""
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Ready(Event):
    """The tunnel works from end to end; ``url`` opens it. The ``repr`` does not show what is secret in it."""

    url: str

    def __repr__(self) -> str:
        """Leave out the query, which has a session's id or a token: events are logged, and printed."""
        path, query, _ = self.url.partition("?")
        return f"Ready(host={self.host!r}, url={path + query + '...' * bool(query)!r})"


@dataclass(frozen=True, kw_only=True)
class AppFailed(Event):
    """The app's own code raised an exception, so its page is blank. ``traceback`` is what it wrote.

    With ``reload``, it was changed (``dev=True``) and the new version cannot run. The server keeps running
    with the old one; if it listens on a port, and the files compile, it has ended, and starts with the next
    change.
    """

    traceback: str
    reload: bool = False


@dataclass(frozen=True, kw_only=True)
class ServerUnresponsive(Event):
    """The remote server process exists but does not answer.

    :param reason: ``"stopped"``: its process is stopped; ``"busy"``: it runs, but does not answer
    """

    reason: str = "stopped"


@dataclass(frozen=True, kw_only=True)
class ServerResponsive(Event):
    """The remote server answers again."""


@dataclass(frozen=True, kw_only=True)
class ServerExited(Event):
    """The remote server ended by itself; ``exit_status`` is negative for a signal.

    :param memory_limit: if it was killed for memory, as in :class:`ServerExitedError`; else None
    """

    exit_status: int | None
    memory_limit: int | None = None


@dataclass(frozen=True, kw_only=True)
class ServerTaken(Event):
    """Another client has taken the remote server over; it keeps running, and is no longer ours."""


@dataclass(frozen=True, kw_only=True)
class Lost(Event):
    """The connection is lost. :class:`Reconnecting` follows if the tunnel reconnects."""

    reason: str


@dataclass(frozen=True, kw_only=True)
class Reconnecting(Event):
    """The tunnel will try to reconnect in ``delay`` seconds.

    :param attempt: its number, 1 for the first one after a loss
    :param reason: why the connection was lost, or why the previous attempt failed
    """

    attempt: int
    delay: float
    reason: str


@dataclass(frozen=True, kw_only=True)
class Reconnected(Event):
    """It works again, at the same local address.

    :param same_server: whether the remote server is the same as before, with its sessions; False if it had
        ended and a new one was started. True if no server was started by the tunnel
    """

    same_server: bool


@dataclass(frozen=True, kw_only=True)
class Closed(Event):
    """The tunnel ended; everything it started was ended too, as far as it could be reached.

    :param server: what became of the remote server: ``"ended"``; ``"left"``: it keeps running, because it ran
        before, or was detached; ``"unreached"``: it could not be told to end, and ends by itself within its
        grace time; empty if there was none, or if it is not known
    """

    server: str = ""


@dataclass(frozen=True, kw_only=True)
class Warned(Event):
    """Something works, but not as well or as privately as it could."""

    text: str


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question that only a person can answer.

    :param kind: ``"password"``, ``"passphrase"``, ``"interactive"`` (a code, a choice), ``"host_key"``, or
        ``"add_key"`` (AddKeysToAgent ask of the ssh config: ``"yes"`` adds the key)
    :param host: the machine it is about
    :param text: the question itself
    :param echo: whether the answer may be shown as it is typed
    :param instructions: text of the server to show before the question
    :param reusable: whether the answer will do for the next login too: a password or a passphrase, not a code
    """

    kind: str
    host: str
    text: str
    echo: bool = False
    instructions: str = ""
    reusable: bool = False


#: Takes a question, gives the answer; None declines. For ``"host_key"``, ``"yes"`` accepts.
Prompt = Callable[[Question], "str | None"]

#: Takes each event, one after the other. Those of a tunnel come on a thread of their own: it may take its
#: time, and use the tunnel.
OnEvent = Callable[[Event], None]


def ignore(*_: object) -> None:
    """Do nothing with an event, the default ``on_event``; or with whatever else is reported."""
