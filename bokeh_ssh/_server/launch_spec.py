"""What to start on the remote machine: the request as a record, the server's command line. Text only."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import unquote

from bokeh_ssh._core.errors import LaunchError, UsageError
from bokeh_ssh._core.host import check_port
from bokeh_ssh._core.keywords import is_time
from bokeh_ssh._core.settings import set_to, setting
from bokeh_ssh._server.payload import payload

#: The oldest Bokeh whose options and log lines we rely on, and the oldest Python the supervisor runs on.
OLDEST_BOKEH = (2, 4)
OLDEST_PYTHON = (3, 8)

#: Options that we give ourselves, and what the caller can use in their place.
_OURS = {
    "--port": f"give {setting('remote_port=')} instead",
    "--address": "it listens on 127.0.0.1 of that machine; the tunnel leads there",
    "--unix-socket": "it listens on 127.0.0.1 of that machine; the tunnel leads there",
    "--log-file": "its log is read from its standard error; use the tunnel's .log",
    "--log-level": "info, debug or trace: the port is read from lines that others hide",
}

#: Bokeh's option that has it compress what it sends over a WebSocket, if the browser takes that.
COMPRESSION = "--websocket-compression-level"

#: Seconds for which the token of a page opens its session: for as long as anybody leaves a page open.
_TOKEN_LIFETIME = 365 * 24 * 3600
#: Settings of the remote environment that would override the options we give, or hide the lines we read.
UNSET = ("BOKEH_ALLOW_WS_ORIGIN", "BOKEH_LOG_LEVEL", "BOKEH_PY_LOG_LEVEL")


#: Where a command of the caller's own takes its port, or the path of its socket.
_PLACES = ("{port}", "{socket}")
#: How callers know what is called otherwise here.
_KEYWORDS = {"timeout": "launch_timeout", "origins": "extra_origins"}
#: Commands that are modules of a Python package.
_PACKAGED = (("bokeh", "serve"), ("panel", "serve"))
#: What says where they listen, for servers that are none of Bokeh's.
_LISTENS = {
    "jupyter": "--no-browser --port {port}",
    "voila": "--no-browser --port {port}",
    "streamlit": "--server.headless=true --server.port={port}",
    "marimo": "--headless --port {port}",
    "gunicorn": "--bind unix:{socket}",
    **dict.fromkeys(("tensorboard", "shiny", "uvicorn", "mlflow", "flask"), "--port {port}"),
}


def split(command: str | Sequence[str]) -> tuple[str, ...]:
    """Split a command into words.

    :raises UsageError: if it is empty or has unbalanced quotes
    """
    try:
        words = tuple(shlex.split(command) if isinstance(command, str) else command)
    except ValueError as exc:
        msg = f"{set_to('command', command)} has unbalanced quotes"
        raise UsageError(msg, hint="give a list of words") from exc
    if not words or not words[0]:
        msg = f"{setting('command')} is empty"
        raise UsageError(msg, hint='give "bokeh serve", "panel serve" or your own')
    return words


def is_packaged(words: tuple[str, ...]) -> bool:
    """Return whether it runs as a module of that machine's Python."""
    return words[:2] in _PACKAGED


def is_plain(words: tuple[str, ...]) -> bool:
    """Return whether it is not a Bokeh server: its command has a place for the port or the socket.

    >>> is_plain(("streamlit", "run", "--server.port={port}")), is_plain(("panel", "serve"))
    (True, False)
    """
    return any(place in word for place in _PLACES for word in words)


def place_texts(words: tuple[str, ...], env: Mapping[str, str]) -> tuple[str, ...]:
    """Return the texts with a place for the port: the command, and if it is not Bokeh's the variables.

    >>> place_texts(("npm", "start"), {"PORT": "{port}"})
    ('npm', 'start', '{port}')
    """
    return words if is_packaged(words) else (*words, *env.values())


def is_option(word: str, option: str) -> bool:
    """Return whether a word is an option, or the beginning of one: Bokeh's parser accepts that too.

    >>> is_option("--addr=0.0.0.0", "--address"), is_option("--prefix", "--port")
    (True, False)
    """
    name = word.partition("=")[0]
    return len(name) > 2 and name.startswith("--") and option.startswith(name)


def own_options(args: Sequence[str]) -> Sequence[str]:
    """Return what comes before ``--args`` and the app's own arguments.

    >>> own_options(["--glob", "--args", "--port"])
    ['--glob']
    """
    ends = (at for at, word in enumerate(args) if "=" not in word and is_option(word, "--args"))
    return args[: next(ends, len(args))]


def has_option(argv: Sequence[str], option: str) -> bool:
    """Return whether a server's command line has an option."""
    return any(is_option(word, option) for word in own_options(argv))


def is_servable(route: str, root: str) -> bool:
    """Return whether Bokeh answers at the route of an app.

    It uses a route as a regular expression, and matches it with the path as the browser has quoted it.

    :param root: what comes before the app's own name; it is already quoted

    >>> is_servable("/user/a%20b/app", "/user/a%20b"), is_servable("/a%20b", ""), is_servable("/a+b", "")
    (True, False, False)
    """
    return not set("%()*+$") & set(route.removeprefix(root))


@dataclass(frozen=True, kw_only=True)
class Launch:
    """A server to start on the remote machine. Paths are that machine's; ``~/`` is the home there.

    :param app: paths of the apps; none serves an empty document
    :param args: more options, passed on as they are
    :param command: ``"bokeh serve"``, ``"panel serve"`` or what takes the same options; or, with ``{port}``
        or ``{socket}`` in it, any web server: it gets no options of ours, and is ready when it listens there
    :param python: the interpreter; None takes the first of ``python3`` and ``python`` that has the package
    :param setup: shell lines to run first, in a login shell (bash where there is one); each item is one step
        that must succeed. ``conda activate`` and ``module load`` work even where only interactive shells
        have them
    :param cwd: where to run it; None is the home
    :param env: environment variables to add; the values are sent over standard input only
    :param port: None takes any free one
    :param origins: ``host:port`` of the pages that may talk to it
    :param grace: seconds that it outlives a client that vanished, once it is ready
    :param timeout: seconds until it must be ready
    :param lease: seconds of silence after which a client counts as vanished
    :param socket: listen on a Unix socket in the account's private directory there, where that can be had;
        else on a port
    :param sign: answer only to sessions whose id is signed (``--session-ids external-signed``); the key is
        ``BOKEH_SECRET_KEY`` of ``env``, or a random one. "port": only if it listens on a port after all
    :param verbatim: ``command`` is all there is: none of Bokeh's options are added, and it says by itself
        that it is ready, by a line of JSON with ``port`` or ``socket``, and maybe ``routes`` and
        ``versions``, on the descriptor that ``BOKEH_SSH_READY_FD`` of its environment numbers
    :param brings: ``app`` are names in a folder that is made there, to be filled by :meth:`Server.start`'s
        ``bring`` before it is run, in that folder unless ``cwd`` says otherwise; it ends with the server
    :param dev: it is restarted, at the same address, when the app's files change, and open pages are
        loaded again; one that cannot run ends nothing: the next change is waited for
    :param watch: seconds between two looks whether it answers; 0 never looks, nor is there any at what takes
        TLS, which would log it, or runs ``verbatim``, whose port may be another machine's
    :param prefix: the path that all of its pages are under
    :param compresses: asked when the command line goes out: whether what its pages get over their WebSockets
        is to be compressed
    :param packs: if so, and if it listens on a socket, all that it sends is to be packed in its place
    :raises UsageError: if something cannot work; nothing was started
    """

    app: tuple[str, ...] = ()
    args: tuple[str, ...] = ()
    command: str | tuple[str, ...] = "bokeh serve"
    python: str | None = None
    setup: str | tuple[str, ...] = field(default=(), repr=False)
    cwd: str | None = None
    env: Mapping[str, str] = field(default_factory=dict, repr=False)
    port: int | None = None
    origins: tuple[str, ...] = ()
    grace: float = 600
    timeout: float = 60
    lease: float = 45
    socket: bool = False
    sign: bool | Literal["port"] = False
    verbatim: bool = False
    brings: bool = False
    dev: bool = False
    watch: float = 10
    prefix: str = ""
    compresses: Callable[[], bool] = field(default=lambda: False, repr=False, compare=False)
    packs: bool = False

    def __post_init__(self) -> None:
        one = {"python": self.python, "cwd": self.cwd, "setup": self.setup, "command": self.command}
        for name, value in one.items():
            if value is not None:
                _check_text(name, (value,) if isinstance(value, str) else value)
        for name, values in (("app", self.app), ("args", self.args), ("origins", self.origins)):
            _check_text(name, values)
        _check_text("env", (*self.env, *self.env.values()))
        for name in self.env:
            if not name or "=" in name:
                msg = f"{name!r} is not the name of an environment variable"
                raise UsageError(msg)
        for name in ("grace", "timeout", "lease", "watch"):
            seconds = getattr(self, name)
            if not is_time(seconds):
                msg = f"{set_to(_KEYWORDS.get(name, name), seconds)} is not a time"
                raise UsageError(msg, hint="give seconds, 0 or more")
        if self.port is not None:
            check_port(self.port, "remote_port")
        if self.python == "" or self.cwd == "" or "" in self.app:
            msg = "a path is empty"
            raise UsageError(msg, hint="leave it out, or give a path of the remote machine")
        self._check_kind()
        self._check_args()
        self._check_place()
        self.words  # noqa: B018 - raises if the command cannot be taken apart

    def _check_kind(self) -> None:
        """Refuse a server that is known to be none of Bokeh's, where its command does not say where it is."""
        if self.verbatim or self.plain:
            return
        program = self.words[2 if self.words[1:2] == ("-m",) and len(self.words) > 2 else 0]
        name = program.rpartition("/")[2]
        place = _LISTENS.get("jupyter" if name.startswith("jupyter") else name)
        if place:
            msg = f"{setting('command')} does not say where {name} is to listen"
            raise UsageError(msg, hint=f"add {place} to it, in place of a port of your own")

    def _check_args(self) -> None:
        """Refuse options that would keep us from finding the server."""
        own = self._command_options
        before = list(own_options(own))
        if "--" in before or len(before) < len(own):
            name = "--" if "--" in before else "--args"
            msg = f"{name} cannot be given in {setting('command')}, where it would take away our own options"
            raise UsageError(msg, hint=f"give it in {setting('args')}: they are options of the server")
        self._check_options("command", own)
        self._check_options("args", self._own_args)

    def _check_options(self, where: str, args: tuple[str, ...]) -> None:
        for i, arg in enumerate(args):
            name, equals, value = arg.partition("=")
            if not self.plain:  # of another kind of server it is not known what it takes for what
                name = next((option for option in _OURS if is_option(arg, option)), name)
            if name == "--log-level":
                value = value if equals else "".join(args[i + 1 : i + 2])
                if value in ("info", "debug", "trace"):
                    continue
            if is_option(arg, "--session-ids") and self.sign:
                msg = "--session-ids cannot be given where sessions are to be signed"
                raise UsageError(msg, hint="leave out one of the two")
            if name == "--dev" and self.dev:
                msg = "--dev is given twice"
                raise UsageError(msg, hint=f"leave it out of {setting('args')}")
            if name in _OURS:
                msg = f"{name} cannot be given in {setting(where)}"
                raise UsageError(msg, hint=_OURS[name])

    def _check_place(self) -> None:
        """Refuse to have no place, or two, for where it listens."""
        if self.socket and self.port is not None:
            msg = "a server listens on a socket or on a port, not on both"
            raise UsageError(msg, hint="leave out one")
        if self.plain:
            texts = place_texts(self.words, self.env)
            both = all(any(place in text for text in texts) for place in _PLACES)
            if both or (self.port is not None and "{port}" not in " ".join(texts)):
                msg = "the command has no place for the port" if not both else "the command has two places"
                raise UsageError(msg, hint="write {port} into it, or {socket}")
            if self.sign is True or self.origins or self.dev:
                msg = f"only Bokeh's own servers sign sessions, take origins, and restart by {setting('dev')}"
                raise UsageError(
                    msg, hint=f"leave that out, or leave {{port}} and {{socket}} out of {setting('command')}"
                )
        given = (self.app, self.args, self.origins, self.port is not None, self.socket, self.sign, self.dev)
        if self.verbatim and any(given):
            msg = "a command that is run verbatim gets no options of ours"
            raise UsageError(msg, hint=f"write all of it into {setting('command')}")

    @property
    def words(self) -> tuple[str, ...]:
        """``command`` taken apart.

        :raises UsageError: if it is empty or has unbalanced quotes
        """
        return split(self.command)

    @property
    def plain(self) -> bool:
        """Whether it is a web server of another kind, which listens where its command says."""
        return not self.verbatim and is_plain(place_texts(self.words, self.env))

    @property
    def package(self) -> str:
        """The package that Python must have; empty for a command of the caller's own."""
        if self.verbatim or self.plain:
            return ""
        return self.words[0] if is_packaged(self.words) else ""

    def argv(self, *, compresses: bool = False) -> list[str | list[str]]:
        """Return the server's command line; a list in it stands for a word that only the far side knows.

        :param compresses: whether Bokeh is to compress what pages get over their WebSockets
        """
        words: list[str | list[str]] = [_home(self.words[0]), *self.words[1:]]
        if self.package:
            words = [["python", "python3"], "-m", *self.words]
        if self.verbatim:
            return words
        apps = [["brought", app] if self.brings else _home(not_an_option(app)) for app in self.app]
        if self.plain:
            return [self._filled(word) for word in words] + apps + list(self.args)
        session = max(15, int(self.grace))
        # One that is restarted would take another port then, were it any free one.
        port = str(self.port or ("free" if self.dev else 0))
        where = ["--address", "127.0.0.1", "--port", port]
        signed = ["--session-ids", "external-signed"]
        where += signed if self.sign == "port" else []
        compression: list[str] = []
        if "serve" in self.words and compresses:  # a script of one's own may not know it, near or far
            # The lowest level: while a message is compressed, the server does nothing else.
            compression = [COMPRESSION, "1", "--websocket-compression-mem-level", "8"]
        if self.socket and self.packs:  # else it is packed
            where, compression = where + compression, []
        words += [["listen", *where]] if self.socket or port == "free" else where
        options = ["--log-level", "info"]
        # Pages that come back after the line was down must find their session: BokehJS reconnects by itself,
        # with the token that the page was loaded with, however long ago.
        options += ["--unused-session-lifetime", str(session * 1000)]
        options += ["--session-token-expiration", str(_TOKEN_LIFETIME)]
        options += signed if self.sign is True else []
        options += ["--prefix", self.prefix] if self.prefix else []
        options += compression
        for origin in self.origins:
            options += ["--allow-websocket-origin", origin]
        # The caller's options come last: of two the last one counts, and --args swallows all that follow.
        return [*words, *options, *apps, *self.args]

    @staticmethod
    def _filled(word: str | list[str]) -> str | list[str]:
        return ["fill", word] if isinstance(word, str) and is_plain((word,)) else word

    def display_argv(self) -> tuple[str, ...]:
        """Return the command line as far as it is known here, for messages."""
        known: list[str] = []
        for word in self.argv():
            known += [word] if isinstance(word, str) else word[1:]
        return (self.python or "python3", *known[1:]) if self.package else tuple(known)

    @property
    def _options(self) -> tuple[str, ...]:
        return (*self._command_options, *self._own_args)

    @property
    def _uses_tls(self) -> bool:
        return any(arg.partition("=")[0] in ("--ssl-certfile", "--ssl-keyfile") for arg in self._options)

    @property
    def _own_args(self) -> tuple[str, ...]:
        """``args`` without what is the app's own."""
        return tuple(own_options(self.args))

    @property
    def _command_options(self) -> tuple[str, ...]:
        """What the command of one of Bokeh's servers has after ``serve``."""
        words = self.words
        if self.plain or self.verbatim or "serve" not in words:
            return ()
        return words[words.index("serve") + 1 :]

    def _value(self, option: str, args: tuple[str, ...]) -> str:
        """Return what ``args`` say for an option; the last one counts."""
        value = ""
        for i, arg in enumerate(args):
            name, equals, text = arg.partition("=")
            if name == option:
                value = text if equals else "".join(args[i + 1 : i + 2])
        return value

    @property
    def root(self) -> str:
        """The path that all pages are under, empty or with a slash in front: what comes last counts."""
        given = self._value("--prefix", self._own_args) or self.prefix
        given = given or self._value("--prefix", self._command_options)
        return "/" + given.strip("/") if given.strip("/") else ""

    def check_routes(self, routes: Sequence[str], host: str) -> None:
        """Refuse routes at which Bokeh does not answer.

        :raises LaunchError: for the first of them
        """
        for route in routes:
            if not self.plain and not is_servable(route, self.root):
                msg = f"Bokeh cannot serve an app under the name {unquote(route)!r}"
                hint = "rename it, with plain letters, digits, - and _ only"
                raise LaunchError(msg, host=host, hint=hint)

    def spec(self, mark: str, token: str = "", key: str = "") -> bytes:
        """Return the supervisor's first message: a line of JSON.

        :param token: lets whoever has it take the server over from a client that is there
        :param key: what session ids are signed with; empty leaves them unsigned
        """
        signing = {"BOKEH_SECRET_KEY": key, "BOKEH_SIGN_SESSIONS": "yes"} if key else {}
        message: dict[str, Any] = {
            "do": "start",
            "mark": mark,
            "token": token,
            "argv": self.argv(compresses=self.compresses()),
            "apps": list(self.app),
            "brings": self.brings,
            "inside": self.cwd is None,
            "prefix": self.root,
            "glob": "--glob" in self._options,
            "socket": self.socket,
            "plain": self.plain,
            "packs": self.packs and self.socket and sys.byteorder == "little" and self.compresses(),
            "port": self.port or 0,
            "no_socket": "Bokeh takes no TLS on a socket" if self._uses_tls else "",
            "signed": self.sign if key else False,
            "notify": self.verbatim,
            "reload": payload("dev_server").decode() if self.dev else "",
            "watch": 0 if self._uses_tls or self.verbatim or self.plain else self.watch,
            "env": dict(self.env),
            "signing": signing,
            "unset": UNSET,
            "grace": self.grace,
            "lease": self.lease,
        }
        return encode_message(message)


def encode_message(message: Mapping[str, Any]) -> bytes:
    """Write a message to the supervisor."""
    return json.dumps(message).encode("ascii") + b"\n"


def _check_text(name: str, values: Iterable[object]) -> None:
    for value in values:
        try:
            fine = isinstance(value, str) and "\0" not in value
            if isinstance(value, str):
                value.encode("utf-8", "surrogateescape")
        except UnicodeEncodeError:
            fine = False
        if not fine:  # the value itself may be a secret
            msg = (
                f"{setting(_KEYWORDS.get(name, name))} has something that is not text, or has a NUL character"
            )
            raise UsageError(msg, hint="no program can be given that")


def not_an_option(path: str) -> str:
    """Return a path that no program reads as an option."""
    return f"./{path}" if path.startswith("-") else path


def _home(path: str) -> str | list[str]:
    return ["home", path] if re.match(r"~[\w.-]*/", path, re.ASCII) else path
