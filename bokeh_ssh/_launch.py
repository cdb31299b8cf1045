"""What to start on the remote machine: the request as a record, the server's command line. Text only."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from bokeh_ssh._errors import UsageError
from bokeh_ssh._target import check_port

#: The oldest Bokeh whose options and log lines we rely on, and the oldest Python the supervisor runs on.
OLDEST_BOKEH = (2, 4)
OLDEST_PYTHON = (3, 8)

#: Options that we give ourselves, and what the caller can use in their place.
_OURS = {
    "--port": "give remote_port= instead",
    "--address": "it listens on 127.0.0.1 of that machine; the tunnel leads there",
    "--unix-socket": "it listens on 127.0.0.1 of that machine; the tunnel leads there",
    "--log-file": "its log is read from its standard error; use the tunnel's .log",
    "--log-level": "info, debug or trace: the port is read from lines that others hide",
}

#: Settings of the remote environment that would override the options we give, or hide the lines we read.
UNSET = ("BOKEH_ALLOW_WS_ORIGIN", "BOKEH_LOG_LEVEL", "BOKEH_PY_LOG_LEVEL")


@dataclass(frozen=True, kw_only=True)
class Launch:
    """A server to start on the remote machine. Paths are that machine's; ``~/`` is the home there.

    :param app: paths of the apps; none serves an empty document
    :param args: more options, passed on as they are
    :param command: ``"bokeh serve"``, ``"panel serve"`` or what takes the same options
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
        for name in ("grace", "timeout", "lease"):
            seconds = getattr(self, name)
            if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 0 <= seconds < 1e9:
                msg = f"{name}={seconds!r} is not a time"
                raise UsageError(msg, hint="give seconds, 0 or more")
        if self.port is not None:
            check_port(self.port, "port")
        if self.python == "" or self.cwd == "" or "" in self.app:
            msg = "a path is empty"
            raise UsageError(msg, hint="leave it out, or give a path of the remote machine")
        self._check_args()
        self.words  # noqa: B018 - raises if the command cannot be taken apart

    def _check_args(self) -> None:
        """Refuse options that would take away what we need to find the server."""
        for i, arg in enumerate(self.args):
            if arg == "--args":  # what follows is the app's own
                return
            name, equals, value = arg.partition("=")
            if name == "--log-level":
                value = value if equals else "".join(self.args[i + 1 : i + 2])
                if value in ("info", "debug", "trace"):
                    continue
            if name in _OURS:
                msg = f"{name} cannot be given in args"
                raise UsageError(msg, hint=_OURS[name])

    @property
    def words(self) -> tuple[str, ...]:
        """``command`` taken apart.

        :raises UsageError: if it is empty or has unbalanced quotes
        """
        try:
            words = tuple(shlex.split(self.command) if isinstance(self.command, str) else self.command)
        except ValueError as exc:
            msg = f"command={self.command!r} has unbalanced quotes"
            raise UsageError(msg, hint="give a list of words") from exc
        if not words or not words[0]:
            msg = "command is empty"
            raise UsageError(msg, hint='give "bokeh serve", "panel serve" or your own')
        return words

    @property
    def package(self) -> str:
        """The package that Python must have; empty for a command of the caller's own."""
        return self.words[0] if self.words[:2] in (("bokeh", "serve"), ("panel", "serve")) else ""

    def argv(self) -> list[str | list[str]]:
        """Give the server's command line; a list in it stands for a word that only the far side knows."""
        words: list[str | list[str]] = [_home(self.words[0]), *self.words[1:]]
        if self.package:
            words = [["python", "python3"], "-m", *self.words]
        session = max(15, int(self.grace))
        options = ["--address", "127.0.0.1", "--port", str(self.port or 0), "--log-level", "info"]
        # Pages that come back after the line was down must find their session (BokehJS reconnects by itself).
        options += ["--unused-session-lifetime", str(session * 1000)]
        options += ["--session-token-expiration", str(max(300, session))]
        for origin in self.origins:
            options += ["--allow-websocket-origin", origin]
        # The caller's options come last: of two the last one counts, and --args swallows all that follow.
        return [*words, *options, *(_home(not_an_option(path)) for path in self.app), *self.args]

    def shown(self) -> tuple[str, ...]:
        """Give the command line as far as it is known here, for messages."""
        known = (word if isinstance(word, str) else word[1] for word in self.argv())
        return (self.python or "python3", *list(known)[1:]) if self.package else tuple(known)

    def spec(self, mark: str) -> bytes:
        """Give the supervisor's first message: a line of JSON."""
        message: dict[str, Any] = {
            "do": "start",
            "mark": mark,
            "argv": self.argv(),
            "env": dict(self.env),
            "unset": UNSET,
            "grace": self.grace,
            "lease": self.lease,
        }
        return line(message)


def line(message: Mapping[str, Any]) -> bytes:
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
            msg = f"{name} has something that is not text, or has a NUL character"
            raise UsageError(msg, hint="no program can be given that")


def not_an_option(path: str) -> str:
    """Give a path that nobody takes for an option."""
    return f"./{path}" if path.startswith("-") else path


def _home(path: str) -> str | list[str]:
    return ["home", path] if re.match(r"~[\w.-]*/", path, re.ASCII) else path
