"""What a supervisor has said of its server, message by message; reported as events. Moves no bytes."""

from __future__ import annotations

import contextlib
import enum
import logging
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from typing import Any

from bokeh_ssh._core.events import (
    AppFailed,
    Event,
    OnEvent,
    ServerExited,
    ServerResponsive,
    ServerTaken,
    ServerUnresponsive,
    Warned,
    ignore,
)
from bokeh_ssh._core.framing import plain
from bokeh_ssh._server.launch_spec import COMPRESSION, Launch, has_option
from bokeh_ssh._server.log_parsing import RELOAD, AppErrors, Kept
from bokeh_ssh._server.server_ref import as_paths

_log = logging.getLogger("bokeh_ssh")

#: Interpreters that are remembered as tried: a bound on what the far side can make us keep.
_TRIED = 10
#: Words of a command line, and routes, that are kept.
_WORDS = 10_000

OnLog = Callable[[list[str]], object]
OnPackage = Callable[[str, str], object]


class Stage(enum.IntEnum):
    """How far a start, or taking a server over, has come. It only goes forward; stages may be left out."""

    LOGIN = 0  #: nothing of ours has run
    SHELL = 1  #: a shell of ours has said hello
    PYTHON = 2  #: it was sent what to run
    UPLOAD = 3  #: there is a folder for what is uploaded, and the server waits for it
    SERVER = 4  #: it was started
    READY = 5  #: it listens


@dataclass(frozen=True)
class Started:
    """What a supervisor says of itself when it has started a server, or hands one over.

    :param id: names the server among those of the account there; empty where nobody can find it
    :param node: the machine's own name for itself
    :param python: the interpreter that the supervisor runs on
    :param libraries: where that finds its libraries
    :param place: the directory there where the server is found
    :param nowhere: why there is no such directory; empty where there is one
    :param doomed: what ends the server with the session; empty where nothing does
    :param identity: the supervisor's process, and when that began
    """

    id: str = ""
    node: str = ""
    python: str = ""
    libraries: str = ""
    place: str = ""
    nowhere: str = ""
    doomed: str = ""
    identity: str = ""


@dataclass(frozen=True)
class Listening:
    """Where a server listens, and what it serves.

    :param port: the port of that machine's loopback; 0 where it is a socket
    :param socket: the path of the socket; empty where it is a port
    :param no_socket: why it is a port though the launch wanted a socket; empty otherwise
    :param pid: the server's process id there
    :param routes: the paths of its apps, ready for a URL; ``"/"`` where it serves none
    :param versions: such as ``"Bokeh 3.10.2, Tornado 6.6.1"``
    :param tls: whether it says that its addresses are https ones
    :param packed: the path of the socket that leads to it, and packs what it sends; empty where none does
    """

    port: int = 0
    socket: str = ""
    no_socket: str = ""
    pid: int = 0
    routes: tuple[str, ...] = ()
    versions: str = ""
    tls: bool = False
    packed: str = ""


@dataclass
class Evidence:
    """What was seen of a start, should it fail.

    :ivar argv: the server's command line, as far as it is known
    :ivar compresses: whether that has it compress what pages get over their WebSockets
    :ivar tried: the interpreters that could not be used, and why
    :ivar place: where in a start file, as far as that is known, a login was held up
    :ivar begun: how far the shell of ``setup`` has come, as ``setup2``; empty: not past its start files
    :ivar failed: the message that says where it ended; None where none came
    :ivar memory_limit: where the server was killed for memory: its limit in bytes, 0 where none is known
    """

    argv: tuple[str, ...]
    compresses: bool = False
    tried: list[dict[str, str]] = field(default_factory=list)
    place: str = ""
    begun: str = ""
    failed: dict[str, Any] | None = None
    memory_limit: int | None = None


@dataclass
class Secrets:
    """What only the supervisor and its client know.

    :ivar token: the right to take the server over from a client that still seems to be there
    :ivar key: what the ids of its sessions must be signed with; empty where they need not be
    :ivar confirmed: whether the supervisor has said which key that is
    """

    token: str = field(default="", repr=False)
    key: str = field(default="", repr=False)
    confirmed: bool = False


class ServerLog:
    """The last lines that a server wrote, and what its apps raised.

    :param on_lines: called with lines as they come, on the connection's thread: it must not block
    :ivar address: the path and query that a server of another kind than Bokeh's has written as its own; a
        secret, such as Jupyter's token, may be in it
    """

    def __init__(self, on_lines: OnLog = ignore) -> None:
        self.address = ""
        self._on_lines = on_lines
        self._lines = Kept()
        self._parser = AppErrors()

    @property
    def lines(self) -> tuple[str, ...]:
        """Standard output and error together, without escape sequences."""
        return self._lines.lines

    def note(self, *lines: str) -> None:
        """Add lines that are not the server's own."""
        self._lines.extend(lines)

    def feed(self, lines: list[str], *, again: bool) -> list[str]:
        """Add lines; return what apps have raised in them.

        :param again: whether they are from before this client: nobody is called with those
        """
        self._lines.extend(lines)
        if not again:
            self._on_lines(lines)
        return self._parser.feed(lines)


@dataclass
class UploadProgress:
    """What the supervisor has said of what was uploaded.

    :ivar directory: the path there of the folder for it; empty where there is none
    :ivar synced: the number of the last sync that was answered
    :ivar fault: why something could not be stored; empty where all could
    """

    directory: str = ""
    synced: int = 0
    fault: str = ""


@dataclass
class SidecarState:
    """What is known of a program that runs beside the server.

    :ivar status: what it has said of itself; empty before that
    :ivar ended: whether it has ended by itself
    :ivar on_end: called when it does, on the connection's thread
    """

    status: dict[str, Any] = field(default_factory=dict)
    ended: bool = False
    on_end: Callable[[], object] = lambda: None


def read_memory(message: dict[str, Any]) -> int | None:
    """Read for which limit of memory a server was killed; None where it was not."""
    limit = message.get("memory")
    return limit if isinstance(limit, int) and 0 <= limit < 1 << 62 else None


class ServerState:
    """What is known of one server. Messages come on the connection's thread.

    :ivar changed: notified of each change
    :ivar exit_status: how the server ended, negative for a signal; None while it runs, and where nobody could
        tell
    :ivar ended: set once the server has ended or the session is down
    :ivar gone: set once the whole remote process group is gone, or the session is down
    :ivar detached: whether it runs on without a client, for as long as nobody stops it
    :ivar kept: set once the supervisor has confirmed that
    :ivar taken: whether another client has taken it over
    :ivar stopping: whether we end it, so that its end is no event
    """

    def __init__(
        self,
        host: str,
        launch: Launch,
        on_event: OnEvent,
        on_log: OnLog = ignore,
        on_package: OnPackage | None = None,
    ) -> None:
        self._host = host
        self._launch = launch
        self._on_event = on_event
        self._on_package = on_package
        self.changed = threading.Condition()
        self.stage = Stage.LOGIN
        self.evidence = Evidence(launch.display_argv())
        self.started = Started()
        self.listening = Listening()
        self.log = ServerLog(on_log)
        self.secrets = Secrets()
        self.upload = UploadProgress()
        self.sidecar = SidecarState()
        self.exit_status: int | None = None
        self.ended = threading.Event()
        self.gone = threading.Event()
        self.detached = False
        self.kept = threading.Event()
        self.taken = False
        self.stopping = False

    @contextlib.contextmanager
    def changing(self, stage: Stage | None = None) -> Iterator[None]:
        """Notify those who wait for a change once the block has made it, and go on to a stage."""
        with self.changed:
            yield
            if stage is not None:
                self.stage = max(self.stage, stage)
            self.changed.notify_all()

    def receive(self, message: dict[str, Any]) -> None:
        """Take a message; one that is not known, or has another shape, changes nothing."""
        handle = getattr(self, "_handle_" + message["event"], None)
        if handle:
            # A message of another shape is another version's, or an attack; neither may end the connection.
            with contextlib.suppress(KeyError, TypeError, ValueError, AttributeError, OverflowError):
                handle(message)

    def emit(self, event: Event) -> None:
        """Report an event; whatever the handler raises is logged."""
        try:
            self._on_event(event)
        except Exception:  # noqa: BLE001 - whatever it is, it is the caller's, and must not end the connection
            _log.exception("on_event failed")

    def warn(self, text: str) -> None:
        """Report what does not work as hoped."""
        self.emit(Warned(host=self._host, text=text))

    def _handle_begun(self, message: dict[str, Any]) -> None:
        with self.changing():
            self.evidence.begun = plain(str(message["at"]))

    def _handle_tried(self, message: dict[str, Any]) -> None:
        if len(self.evidence.tried) < _TRIED:
            self.evidence.tried.append({key: plain(str(message[key])) for key in ("path", "kind", "text")})

    def _handle_python(self, message: dict[str, Any]) -> None:
        python, folder = str(message["path"]), str(message["bokeh"])
        if python and folder and self._on_package:
            self._on_package(python, folder)

    def _handle_failed(self, message: dict[str, Any]) -> None:
        argv = tuple(map(plain, message.get("argv", self.evidence.argv)[:_WORDS]))
        with self.changing():
            self.evidence.argv, self.evidence.failed = argv, message

    def _handle_crashed(self, message: dict[str, Any]) -> None:
        self.log.note(*map(plain, str(message["text"]).splitlines()))

    def _handle_started(self, message: dict[str, Any]) -> None:
        argv = tuple(map(plain, message["argv"][:_WORDS]))
        self.evidence.argv, self.evidence.compresses = argv, has_option(argv, COMPRESSION)
        self.upload.directory = str(message.get("depot") or "")
        self.started = Started(
            **{each.name: plain(str(message.get(each.name) or "")) for each in fields(Started)}
        )
        known = self.secrets
        self.secrets = Secrets(
            str(message.get("token", known.token)), str(message.get("key", known.key)), "key" in message
        )
        self.detached = message.get("detached") is True
        with self.changing(Stage.SERVER):
            pass

    def _handle_depot(self, message: dict[str, Any]) -> None:
        path = str(message["path"])
        with self.changing(Stage.UPLOAD):
            self.upload.directory = path

    def _handle_stored(self, message: dict[str, Any]) -> None:
        number, fault = int(message["number"]), plain(str(message["fault"]))
        with self.changing():
            self.upload.synced, self.upload.fault = number, self.upload.fault or fault

    def _handle_log(self, message: dict[str, Any]) -> None:
        again = bool(message.get("again"))
        for text in self.log.feed([plain(text) for text in message["lines"]], again=again):
            if not again:
                self.emit(
                    AppFailed(host=self._host, traceback=text, reload=RELOAD in text.partition("\n")[0])
                )

    def _handle_address(self, message: dict[str, Any]) -> None:
        path = str(message["path"])
        if re.fullmatch(r"/[!-~]{0,2000}", path):
            with self.changing():
                self.log.address = path

    def _handle_dropped(self, message: dict[str, Any]) -> None:
        self.log.note(f"[{int(message['lines'])} lines were lost here: the connection was too slow]")

    def _handle_ready(self, message: dict[str, Any]) -> None:
        port, pid, path = int(message["port"]), int(message["pid"]), plain(str(message.get("socket", "")))
        if not (0 < port < 65536 or (port == 0 and path[:1] == "/")):
            return
        found = Listening(
            port=port,
            socket="" if port else path,
            no_socket=plain(str(message.get("no_socket", ""))),
            pid=pid,
            routes=as_paths([plain(route) for route in message["routes"][:_WORDS]]) or ("/",),
            versions=plain(message["versions"]),
            tls=message.get("tls") is True,
            packed="" if port else plain(str(message.get("packed", ""))),
        )
        # One that is taken over was started in another way than this launch says.
        if found.socket and self._launch.sign == "port" and not self.secrets.confirmed:
            self.secrets.key = ""
        with self.changing(Stage.READY):
            self.listening = found

    def _handle_stopped(self, message: dict[str, Any]) -> None:
        self.emit(ServerUnresponsive(host=self._host, reason=message["event"]))

    def _handle_answers(self, _: dict[str, Any]) -> None:
        self.emit(ServerResponsive(host=self._host))

    _handle_busy, _handle_continued = _handle_stopped, _handle_answers

    def _handle_exit(self, message: dict[str, Any]) -> None:
        status, limit = int(message["status"]), read_memory(message)
        with self.changing():
            self.exit_status, self.evidence.memory_limit = status, limit
        self.ended.set()
        if self.stage is Stage.READY and not self.stopping:
            self.emit(
                ServerExited(host=self._host, exit_status=status, memory_limit=self.evidence.memory_limit)
            )

    def _handle_gone(self, _: dict[str, Any]) -> None:
        self.gone.set()
        self.ended.set()

    def _handle_along(self, message: dict[str, Any]) -> None:
        word = message["word"]
        with self.changing():
            self.sidecar.status = dict(word) or self.sidecar.status
            self.sidecar.ended = not word
        if not word:
            self.sidecar.on_end()

    def _handle_astray(self, message: dict[str, Any]) -> None:
        why = plain(str(message["why"]))
        if why:
            self.warn(
                f"the private directory there was removed, and cannot be made again ({why}), so after a lost "
                "connection a new server is started"
            )
        if message.get("bare") is True:
            self.warn("the uploaded files have been removed: open it again if pages fail")

    def _handle_detached(self, _: dict[str, Any]) -> None:
        self.kept.set()

    def _handle_taken(self, _: dict[str, Any]) -> None:
        self.taken = True
        self.gone.set()
        self.ended.set()
        if not self.stopping:
            self.emit(ServerTaken(host=self._host))

    def _handle_refused(self, message: dict[str, Any]) -> None:
        with self.changing():
            self.evidence.failed = message
