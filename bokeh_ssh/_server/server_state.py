"""What a supervisor has said of its server, message by message; told on as events. Moves no bytes."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import deque
from collections.abc import Callable
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
)
from bokeh_ssh._core.framing import plain
from bokeh_ssh._server.launch_spec import Launch
from bokeh_ssh._server.log_parsing import AppErrors, Kept
from bokeh_ssh._server.server_ref import as_paths

_log = logging.getLogger("bokeh_ssh")

#: Interpreters that are remembered as tried: a bound on what the far side can make us keep.
_TRIED = 10
#: Words of a command line, and routes, that are kept.
_WORDS = 10_000


def _nothing(_: list[str]) -> None:
    pass


def _quiet() -> None:
    pass


class ServerState:
    """What is known of one server. Messages come on the connection's thread.

    :ivar port: the port of that machine's loopback that it listens on; 0 where it is a socket
    :ivar socket: the path of the socket that it listens on; empty where it is a port
    :ivar no_socket: why it is a port though the launch wanted a socket; empty otherwise
    :ivar key: what the ids of its sessions must be signed with (see ``_server.session_ids``), a secret; empty
        where they need not be
    :ivar pid: its process id there
    :ivar routes: the paths of its apps, ready for a URL; ``"/"`` where it serves none
    :ivar versions: such as ``"Bokeh 3.10.2, Tornado 6.6.1"``
    :ivar upload_dir: the path there of the folder with what was brought; empty where nothing is
    :ivar exit_status: negative for a signal; None while it runs, and where nobody could tell
    :ivar ended: set once the server has ended or the session is down; :attr:`lost` tells which
    :ivar detached: whether it runs on without a client, for as long as nobody stops it
    :ivar doomed: what ends it with the session, where the machine ends all that a login has started
    :ivar taken: whether another client has taken it over, which is one way of being lost
    """

    def __init__(self, host: str, launch: Launch, on_event: OnEvent) -> None:
        self.host = host
        self.launch = launch
        self.port = 0
        self.socket = ""
        self.no_socket = ""
        self.key = ""
        self.pid = 0
        self.routes: tuple[str, ...] = ()
        self.versions = ""
        self.upload_dir = ""
        self.exit_status: int | None = None
        self.ended = threading.Event()
        self.detached = False
        self.taken = False
        #: Gets its lines as they come, on the connection's thread: it must not block.
        self.on_log: Callable[[list[str]], object] = _nothing
        #: Told, likewise, when what goes along with it ends by itself.
        self.on_sidecar_ended: Callable[[], object] = _quiet
        self._on_event = on_event
        self._token = ""
        self._started: dict[str, str] = {}
        self._lines = Kept()
        self._failures = AppErrors()
        self._app_errors: deque[str] = deque(maxlen=20)
        self._argv = launch.display_argv()
        self._tried: list[dict[str, str]] = []
        self._changed = threading.Condition()
        self._stage = "login"  # then shell, python, maybe depot, server, ready
        self._synced = 0  # the number of the last sync that was answered
        self._fault = ""  # why something that was sent could not be stored
        self._failed: dict[str, Any] | None = None
        self._exited = False  # the server has
        self._gone = threading.Event()  # the whole remote process group is, or the session
        self._sidecar_status: dict[str, Any] = {}  # what goes along with it says of itself
        self._sidecar_ended = False
        self._kept = threading.Event()  # the supervisor holds it whoever comes and goes
        self._stopping = False
        self._key_told = False  # whether the far side has said what sessions are signed with
        self._parted = False  # whether we left it on purpose

    @property
    def doomed(self) -> str:
        return self._started.get("doomed", "")

    @property
    def log(self) -> tuple[str, ...]:
        """Its last lines, standard output and error together, without escape sequences."""
        return self._lines.lines

    @property
    def app_errors(self) -> tuple[str, ...]:
        """What apps raised, as Bokeh wrote it: such an app's page is blank."""
        return tuple(self._app_errors)

    def _send(self, **message: Any) -> None:
        """Say something to the supervisor; nothing where there is no session."""
        raise NotImplementedError

    def _receive(self, message: dict[str, Any]) -> None:
        """Take a message; one that is not known, or has another shape, changes nothing."""
        handle = getattr(self, "_handle_" + message["event"], None)
        if handle:
            # A message of another shape is another version's, or an attack; neither may end the line.
            with contextlib.suppress(KeyError, TypeError, ValueError, AttributeError, OverflowError):
                handle(message)

    def _handle_tried(self, message: dict[str, Any]) -> None:
        if len(self._tried) < _TRIED:
            self._tried.append({key: plain(str(message[key])) for key in ("path", "kind", "text")})

    def _handle_failed(self, message: dict[str, Any]) -> None:
        self._argv = tuple(map(plain, message.get("argv", self._argv)[:_WORDS]))
        self._update(_failed=message)

    def _handle_crashed(self, message: dict[str, Any]) -> None:
        self._lines.extend(map(plain, str(message["text"]).splitlines()))

    def _handle_started(self, message: dict[str, Any]) -> None:
        self._argv = tuple(map(plain, message["argv"][:_WORDS]))
        names = ("id", "node", "python", "libraries", "place", "nowhere", "doomed", "identity")
        self.upload_dir = str(message.get("depot") or "")
        self._started = {name: plain(str(message.get(name) or "")) for name in names}
        self._token = str(message.get("token", self._token))
        self.key = str(message.get("key", self.key))
        self._key_told = "key" in message
        self.detached = message.get("detached") is True
        self._update(_stage="server")

    def _handle_depot(self, message: dict[str, Any]) -> None:
        self._update(upload_dir=str(message["path"]), _stage="depot")

    def _handle_stored(self, message: dict[str, Any]) -> None:
        fault = plain(str(message["fault"]))
        self._update(_synced=int(message["number"]), _fault=self._fault or fault)

    def _handle_log(self, message: dict[str, Any]) -> None:
        lines = [plain(text) for text in message["lines"]]
        self._lines.extend(lines)
        if not message.get("again"):
            self.on_log(lines)
        for text in self._failures.feed(lines):
            self._app_errors.append(text)
            if not message.get("again"):
                self._emit(AppFailed(host=self.host, traceback=text))

    def _handle_dropped(self, message: dict[str, Any]) -> None:
        self._lines.extend([f"[{int(message['lines'])} lines were lost here: the connection was too slow]"])

    def _handle_ready(self, message: dict[str, Any]) -> None:
        port, pid, path = int(message["port"]), int(message["pid"]), plain(str(message.get("socket", "")))
        if not (0 < port < 65536 or (port == 0 and path[:1] == "/")):
            return
        self.socket = "" if port else path
        self.no_socket = plain(str(message.get("no_socket", "")))
        # One that is taken over was started in another way than this launch says.
        if self.socket and self.launch.sign == "port" and not self._key_told:
            self.key = ""
        self.routes = as_paths([plain(route) for route in message["routes"][:_WORDS]]) or ("/",)
        self.versions = plain(message["versions"])
        self._update(port=port, pid=pid, _stage="ready")

    def _handle_stopped(self, _: dict[str, Any]) -> None:
        self._emit(ServerUnresponsive(host=self.host, reason="stopped"))

    def _handle_busy(self, _: dict[str, Any]) -> None:
        self._emit(ServerUnresponsive(host=self.host, reason="busy"))

    def _handle_answers(self, _: dict[str, Any]) -> None:
        self._emit(ServerResponsive(host=self.host))

    def _handle_continued(self, _: dict[str, Any]) -> None:
        self._emit(ServerResponsive(host=self.host))

    def _handle_exit(self, message: dict[str, Any]) -> None:
        self._update(exit_status=int(message["status"]), _exited=True)
        self._send(do="seen")
        self.ended.set()
        if self._stage == "ready" and not self._stopping:
            self._emit(ServerExited(host=self.host, exit_status=self.exit_status))

    def _handle_gone(self, _: dict[str, Any]) -> None:
        self._gone.set()
        self.ended.set()

    def _handle_along(self, message: dict[str, Any]) -> None:
        word = message["word"]
        self._update(_sidecar_status=dict(word) or self._sidecar_status, _sidecar_ended=not word)
        if not word:
            self.on_sidecar_ended()

    def _handle_astray(self, message: dict[str, Any]) -> None:
        why = plain(str(message["why"]))
        if why:
            text = f"the private directory there was removed, and cannot be made again ({why})"
            text += ", so after a loss the server is started anew"
            self._emit(Warned(host=self.host, text=text))
        if message.get("bare") is True:
            text = "what was brought there has been removed: open it again if pages fail"
            self._emit(Warned(host=self.host, text=text))

    def _handle_detached(self, _: dict[str, Any]) -> None:
        self._kept.set()

    def _handle_taken(self, _: dict[str, Any]) -> None:
        self.taken = True
        self._gone.set()
        self.ended.set()
        if not self._stopping:
            self._emit(ServerTaken(host=self.host))

    def _handle_refused(self, message: dict[str, Any]) -> None:
        if message.get("why") == "exited":
            self._send(do="seen")
        self._update(_failed=message)

    def _update(self, **values: Any) -> None:
        with self._changed:
            for name, value in values.items():
                setattr(self, name, value)
            self._changed.notify_all()

    def _emit(self, event: Event) -> None:
        try:
            self._on_event(event)
        except Exception:  # noqa: BLE001 - whatever it is, it is the caller's, and must not end the connection
            _log.exception("on_event failed")
