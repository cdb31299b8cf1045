"""What a project's file may say: each value is looked at as what somebody else has written.

It may say what its app needs, and so what is run on the machine that it names. It may not change who gets in,
here, there or on a gateway, nor what of this machine is brought along or listens: that is said on the command
line, or in one's own ``~/.ssh/config``. Text only.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, get_args

from bokeh_ssh._cli.user_config import GUARDS
from bokeh_ssh._core.endpoint import check_name
from bokeh_ssh._core.errors import UsageError
from bokeh_ssh._core.forward_spec import parse_forward, split_http
from bokeh_ssh._core.host import check_port, check_user, parse_target
from bokeh_ssh._core.settings import as_toml
from bokeh_ssh._server.launch_spec import Launch, is_option, is_plain, own_options, split
from bokeh_ssh._tunnels.options import Reverse

#: What logs a person in, or says whom to trust.
_LOGIN = frozenset(
    {"password", "passphrase", "pkey", "key_filename", "known_hosts", "host_keys", "ssh_config", "prompt"}
)
#: Options of Bokeh's and Panel's that say who gets in, and what they are refused for.
_OPTIONS = {
    "--allow-websocket-origin": "lets pages of others use the app",
    "--session-ids": "may let in who has no signed session",
    "--cookie-secret": "is a secret that all who have the file would know",
}
#: Variables of theirs that do the same, or are a secret that all who have the file would know.
_VARIABLES = frozenset(
    {
        "BOKEH_ALLOW_WS_ORIGIN",
        "BOKEH_COOKIE_SECRET",
        "BOKEH_SECRET_KEY",
        "BOKEH_SIGN_SESSIONS",
        "PANEL_COOKIE_SECRET",
    }
)
#: Ours: where servers are found, and what passes between our own programs.
_OURS = "BOKEH_SSH_"
_LOOPBACK = (None, "localhost", "127.0.0.1", "::1")
_ORIGIN = re.compile(
    r"\A(?:localhost|127\.0\.0\.1|\[::1\]|(?:[a-z0-9-]+\.)+localhost)(?::(\d{1,5}))?", re.ASCII
)
#: The smallest port that each takes.
_PORTS = {"local_port": 0, "remote_port": 0, "gateway_port": 0, "port": 1}
_DAY = 86400
#: The most seconds: no server stays for ever because a file says so, which is why ``detach`` is refused too.
_TIMES = {"grace": 7 * _DAY, "launch_timeout": _DAY, "queue_timeout": 7 * _DAY}
_TYPED = "say it on the command line, where you want it"


class _Refused(Exception):  # noqa: N818  # it becomes an error that names the file
    """Why a value is refused, and what to do instead."""

    def __init__(self, why: str, hint: str) -> None:
        super().__init__(why)
        self.hint = hint


def check(key: str, value: Any, file: object) -> None:
    """Refuse what a project may not say, before its type is looked at.

    :param key: a keyword, with underscores
    :raises UsageError: names the file, the key, why, and what to do instead
    """
    hint = _TYPED
    if key in _LOGIN:
        why, hint = "", "what logs you in belongs into your ~/.ssh/config"
    elif key in GUARDS and (key != "signed" or value is False):
        why = ", which may not open anything to others"
    elif key == "detach":
        why = ", which may not leave anything running"
    else:
        return
    raise _error(f"{key} has no place in a project{why}", hint, file)


def check_value(key: str, value: Any, file: object) -> None:
    """Refuse a value of the right type that lowers a guard, or that no tunnel takes.

    :raises UsageError: likewise
    """
    rule = _RULES.get(key)
    try:
        if key in _PORTS:
            check_port(value, key, zero=not _PORTS[key])
        elif key in _TIMES:
            _check_time(value, _TIMES[key])
        elif key == "args":
            _check_args(value)
        elif rule:
            every = value if isinstance(value, tuple) else (value,)
            for each in sorted(every, key=lambda each: each != "*"):  # the worst is reported
                rule(each)
    except _Refused as exc:
        raise _error(f"{key} {exc}", exc.hint, file) from None
    except UsageError as exc:
        message, hint = exc.in_words(as_toml)
        raise _error(message if message.startswith(key) else f"{key}: {message}", hint, file) from exc


def check_together(keywords: Mapping[str, Any], typed: Mapping[str, Any], file: object) -> None:
    """Refuse what lowers a guard only with something else.

    :param typed: what the person has given, which counts first
    :raises UsageError: likewise
    """
    every = {**keywords, **typed}
    if every.get("gateway_port") is None or "gateway_port" in typed or every.get("host") is None:
        return  # without a host it is a port that is looked at, not one that is opened
    signs = every.get("signed") is not False and not is_plain(split(every.get("command", "bokeh serve")))
    if not signs or not (every.get("app") or every.get("launch")):
        what = "gateway_port opens a port to all users of the gateway, where no signed session is asked for"
        raise _error(what, f"leave it out, for a socket there that only you may use; or {_TYPED}", file)


def _error(text: str, hint: str | None, file: object) -> UsageError:
    return UsageError(f"{file}: {text}", hint=hint or "leave it out of the file")


def _check_time(value: float, most: int) -> None:
    if not 0 <= value <= most:  # nor is it, where it is no number (NaN)
        why = f"is not from 0 to {most} seconds, which is what a project may ask for"
        raise _Refused(why, "write a number of seconds, or say it on the command line")


def _check_origin(origin: str) -> None:
    found = _ORIGIN.fullmatch(origin)
    if not found or not 0 < int(found[1] or 80) < 65536:
        why = f'= "{origin}" has no place in a project, which may not open anything to pages of others'
        hint = "a project may name pages of this machine, such as localhost:8000; for others " + _TYPED
        raise _Refused(why, hint)


def _check_forward(spec: str) -> None:
    listen, _ = parse_forward(split_http(spec)[0])
    if isinstance(listen, str):
        why = f"may listen on ports alone, and not on the socket {listen!r} of this machine"
        raise _Refused(why, "write a port in its place, or forward it on the command line")
    if listen[0] not in _LOOPBACK:
        why = f"may listen on loopback alone, and not on {listen[0]!r}"
        raise _Refused(why, "leave the address out, or forward it on the command line")


def _check_args(args: Sequence[str]) -> None:
    for word in own_options(args):
        for option, what in _OPTIONS.items():
            if is_option(word, option):
                raise _Refused(f"may not have {word!r}: {option} {what}", _TYPED)
    Launch(args=tuple(args))


def _check_command(command: str) -> None:
    words = split(command)
    _check_args([word for word in words[1:] if any(is_option(word, name) for name in _OPTIONS)])
    # Some commands set variables: env NAME=VALUE bokeh serve.
    _check_names(word.partition("=")[0] for word in words if "=" in word)
    Launch(command=command)


def _check_env(env: Mapping[str, str]) -> None:
    _check_names(env)
    Launch(env=env)


def _check_names(names: Iterable[str]) -> None:
    for name in names:
        if name.upper() in _VARIABLES or name.upper().startswith(_OURS):
            raise _Refused(f"may not set {name}, which is not for a project to say", _TYPED)


def _check_reverse(who: str) -> None:
    if who not in get_args(Reverse):
        raise _Refused(f"= {who!r} is not known", 'write "auto", "host" or "relay"')


_RULES: dict[str, Callable[[Any], object]] = {
    "command": _check_command,
    "env": _check_env,
    "extra_origins": _check_origin,
    "forwards": _check_forward,
    "gateway": parse_target,
    "gateway_address": parse_target,
    "host": parse_target,
    "jump": parse_target,
    "name": check_name,
    "reverse": _check_reverse,
    "user": check_user,
    "python": lambda path: Launch(python=path),
    "cwd": lambda path: Launch(cwd=path),
    "setup": lambda step: Launch(setup=step),
    "app": lambda path: Launch(app=(path,)),
}
