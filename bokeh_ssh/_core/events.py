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
    """A connection to ``host`` is being opened, through ``via`` if that is not empty.

    :param via: a machine, ``"its ProxyCommand"``, or the ControlMaster of ``ssh`` that is used
    """

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
class HostKeyVerified(Event):
    """The machine was reached, and has shown that it is the right one. No credential was sent yet."""

    key_type: str
    fingerprint: str


@dataclass(frozen=True, kw_only=True)
class Authenticated(Event):
    """The login succeeded, with these methods in order (two where the server wants two).

    :param methods: as SSH names them; ``("ControlMaster",)`` where ``ssh`` was logged in already
    """

    user: str
    methods: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class JobSubmitted(Event):
    """The scheduler of ``host`` has accepted the batch job, under the number ``job``."""

    job: str


@dataclass(frozen=True, kw_only=True)
class JobWaiting(Event):
    """The job is queued. Told at first, and when one of the two changes.

    :param reason: why it waits, in the scheduler's word; empty where it has not said
    :param estimated_start: when the scheduler expects to start it, in seconds since the epoch; None: no word
    """

    job: str
    reason: str = ""
    estimated_start: float | None = None


@dataclass(frozen=True, kw_only=True)
class JobStarted(Event):
    """The job runs on ``node``.

    :param ends_at: when its time limit ends it, in seconds since the epoch; None: not known
    """

    job: str
    node: str
    ends_at: float | None = None


@dataclass(frozen=True, kw_only=True)
class JobReached(Event):
    """The machine of a batch job is reached; again, where another way was taken than before.

    :param node: that machine
    :param way: how the login node gets there, see :class:`Batch`
    """

    job: str
    node: str
    way: str


@dataclass(frozen=True, kw_only=True)
class JobEnding(Event):
    """The job will end soon: 10 and 2 minutes before its time limit, and when the scheduler warns it.

    :param seconds: until its time limit; None where a warning came that has nothing to do with that
    :param warned: whether it is told since the scheduler has warned the job
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
    """The app is being brought there: of ``size`` bytes in ``files``, ``sent`` have arrived.

    Told at the start, with 0, at the end, and in between at most ten times a second.
    """

    files: int
    size: int
    sent: int


@dataclass(frozen=True, kw_only=True)
class Updated(Event):
    """Changes of the app were brought there (``dev=True``): ``changed`` and ``removed`` are paths in it."""

    changed: tuple[str, ...]
    removed: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Launched(Event):
    """The remote server listens: on ``port`` of its own loopback, or on ``socket``, a path there.

    :param compressed: whether it compresses what pages get over their WebSockets: where a round trip takes
        more than 10 ms, or you have asked for it
    """

    port: int
    pid: int
    versions: str
    socket: str = ""
    compressed: bool = False


@dataclass(frozen=True, kw_only=True)
class Attached(Event):
    """A server that was already there: found on ``port``, or one of your own that was left running.

    :param port: on that machine; 0 where it listens on a socket
    :param name: what it was published under
    :param id: what names it there, where it is one of your own
    :param pid: its process there, likewise
    """

    port: int = 0
    name: str = ""
    id: str = ""
    pid: int = 0


@dataclass(frozen=True, kw_only=True)
class ReverseForwarded(Event):
    """The gateway's ``port``, or private ``socket``, leads to the server.

    :param by: who dialled: "host" or "relay"
    :param reason: why it was not the host, where it could have been
    """

    by: str
    port: int = 0
    socket: str = ""
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Ready(Event):
    """The whole way was tried and works; ``url`` opens it. What is secret in it is not in the ``repr``."""

    url: str

    def __repr__(self) -> str:
        """Leave out the query, which has a session's id or a token: events are logged, and printed."""
        path, query, _ = self.url.partition("?")
        return f"Ready(host={self.host!r}, url={path + query + '...' * bool(query)!r})"


@dataclass(frozen=True, kw_only=True)
class AppFailed(Event):
    """The app's own code raised: its page is blank. ``traceback`` is what it wrote.

    With ``reload``, it was changed (``dev=True``) and cannot run as it is. The server runs on with the app as
    it was; if it listens on a port, and the files compile, it has ended, and the next change starts it.
    """

    traceback: str
    reload: bool = False


@dataclass(frozen=True, kw_only=True)
class ServerUnresponsive(Event):
    """The remote server process exists but does not answer.

    :param reason: ``"stopped"``: it does not run; ``"busy"``: it runs, and has answered nothing for a while
    """

    reason: str = "stopped"


@dataclass(frozen=True, kw_only=True)
class ServerResponsive(Event):
    """The remote server answers again."""


@dataclass(frozen=True, kw_only=True)
class ServerExited(Event):
    """The remote server ended by itself; ``exit_status`` is negative for a signal.

    :param memory_limit: where it was killed for memory, as :class:`ServerExitedError` has it
    """

    exit_status: int | None
    memory_limit: int | None = None


@dataclass(frozen=True, kw_only=True)
class ServerTaken(Event):
    """Another client has taken the remote server over; it runs on, and is no longer ours."""


@dataclass(frozen=True, kw_only=True)
class Lost(Event):
    """What stood is down; :class:`Reconnecting` follows where it is made again, and nothing else does."""

    reason: str


@dataclass(frozen=True, kw_only=True)
class Reconnecting(Event):
    """The connection is made again in ``delay`` seconds.

    :param attempt: 1 for the first one after a loss
    :param reason: why it was lost, or why the attempt before this one failed
    """

    attempt: int
    delay: float
    reason: str


@dataclass(frozen=True, kw_only=True)
class Reconnected(Event):
    """It works again, at the same local address.

    :param same_server: whether the remote server is the one from before, with its sessions; False where it
        had ended and was started anew. True where no server was started by us
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
    :param echo: whether the answer may be shown while it is typed
    :param instructions: what the server wants said before the question
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


def ignore(event: Event) -> None:
    """Take an event and do nothing: the default ``on_event``."""
