"""What a person has set for all commands: in the environment, and in a file of their own.

A flag counts first, then the variable BOKEH_SSH_NAME, then a project's file (``up`` alone), then
``~/.config/bokeh-ssh/config.toml``, then the default. Both are the person's own, so they may say what flags
may; but what weakens a check is not taken from the file for a project, whose machines somebody else chose.
"""

from __future__ import annotations

import os
import shlex
import stat
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from bokeh_ssh._cli.hints import nearest
from bokeh_ssh._core.errors import UsageError
from bokeh_ssh._core.this_machine.home import find_home

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

#: What names of variables begin with.
PREFIX = "BOKEH_SSH_"
#: What our own programs set; no settings.
_OURS = frozenset(
    {"DIR", "READY_FD", "WITHIN", "SEARCH", "PYTHONPATH", "SUPERVISOR", "PUBLICATION", "PROGRAMS"}
)
_YES = ("1", "true", "yes", "on")
_NO = ("0", "false", "no", "off")
#: Bytes of the file.
_MOST = 1 << 20
#: What opens something to others, or lends something of the person's own: not for every project.
GUARDS = frozenset(
    {
        *("allow_any_origin", "allow_exposed", "allow_foreign", "allow_others", "forward_agent"),
        *("gss_auth", "gss_deleg_creds", "signed"),
    }
)
#: What TOML has for each kind, how that is called, and an example; any other kind is a text.
_SHAPES: dict[Any, tuple[tuple[type, ...], str, str]] = {
    bool: ((bool,), "true or false", "true"),
    int: ((int,), "a number", "5006"),
    float: ((int, float), "a number", "60"),
    str: ((str,), "a text", '"text"'),
    list[str]: ((list,), "a list of texts", '["one", "two"]'),
    dict[str, str]: ((dict,), "a table of texts", '{ NAME = "value" }'),
}


def weakens(name: str, value: Any) -> bool:
    """Return whether a setting opens something to others, or lends something of the person's own."""
    return name in GUARDS and (value is False if name == "signed" else bool(value))


def check_shape(key: str, value: Any, kind: Any, file: object) -> Any:
    """Return a value of a TOML file as a keyword takes it: lists as tuples, and one text as a list of one.

    Words for the server may be numbers, and so may GPUs, which may have a kind before their number.

    :raises UsageError: if it is something else
    """
    types, what, example = _SHAPES.get(kind, _SHAPES[str])
    if list in types and isinstance(value, str):
        value = [value]
    if key == "args" and isinstance(value, list):
        value = [str(word) if type(word) in (int, float) else word for word in value]
    if key == "gpus" and type(value) is int:
        value = str(value)
    texts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    if type(value) not in types or not all(isinstance(text, str) for text in texts):
        msg = f"{file}: {key} is not {what}"
        raise UsageError(msg, hint=f"write {key} = {example}")
    return tuple(value) if isinstance(value, list) else value


def path_of_config() -> Path | None:
    """Return where the person's file is, or would be; None where there is no home."""
    base = os.environ.get("XDG_CONFIG_HOME", "")
    if base.startswith("/"):
        return Path(base, "bokeh-ssh", "config.toml")
    home = find_home()
    return home and home / ".config" / "bokeh-ssh" / "config.toml"


def read_environment(
    kinds: Mapping[str, Any], known: Collection[str], environ: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Return what variables say of these settings; an empty one says nothing.

    :param kinds: what each setting of the command takes
    :param known: the settings of all commands
    :raises UsageError: if one says what cannot be, or its name is mistyped
    """
    found = {}
    for name, text in (os.environ if environ is None else environ).items():
        key = name[len(PREFIX) :].lower()
        if not name.startswith(PREFIX) or name[len(PREFIX) :] in _OURS or not text:
            continue
        if key in kinds:
            found[key] = _parse(name, text, kinds[key])
        elif key not in known and (meant := nearest(key, known)):
            msg = f"the environment has {name}, which is no setting"
            raise UsageError(msg, hint=f"did you mean {PREFIX}{meant.upper()}?")
    return found


def _parse(name: str, text: str, kind: Any) -> Any:
    if kind is bool:
        if text.lower() not in (*_YES, *_NO):
            msg = f"{name}={text} is neither yes nor no"
            raise UsageError(msg, hint=f"write {name}=1 or {name}=0")
        return text.lower() in _YES
    if kind in (int, float):
        try:
            return kind(text)
        except ValueError as exc:
            msg = f"{name}={text} is not a number"
            raise UsageError(msg, hint=f"write {name}={'5006' if kind is int else '60'}") from exc
    if kind == list[str]:
        if name == f"{PREFIX}ARGS":
            try:
                return shlex.split(text)
            except ValueError as exc:
                msg = f"{name} cannot be split into words ({exc})"
                raise UsageError(msg, hint="quote it as for a shell") from exc
        return text.splitlines()
    return text


def read_config(
    command: str, kinds: Mapping[str, Any], known: Mapping[str, Any], commands: Collection[str]
) -> dict[str, Any]:
    """Return what the person's file says of these settings: above all tables, and in the command's own.

    :param kinds: what each setting of the command takes
    :param known: the same for all commands
    :param commands: their names, which are those of tables
    :raises UsageError: if it cannot be read, may have been written by others, or says what cannot be
    """
    path = path_of_config()
    text = _read(path) if path else None
    if path is None or text is None:
        return {}
    try:
        table: dict[str, Any] = tomllib.loads(text)
    except (ValueError, RecursionError) as exc:
        msg = f"{path} is no TOML ({exc})"
        raise UsageError(msg, hint="see toml.io") from exc
    found: dict[str, Any] = {}
    tables = [name for name in table if name in commands and isinstance(table[name], dict)]
    own = {name: table.pop(name) for name in tables}
    for name, settings in (("", table), *own.items()):
        for raw, value in settings.items():
            key = raw.replace("-", "_")
            if key not in known:
                meant = nearest(key, [*commands, *known] if isinstance(value, dict) else known)
                msg = f"{path}: there is no setting {raw!r}"
                meant = f"[{meant}]" if meant in commands else meant
                hint = f"did you mean {meant}?" if meant else "each is a flag, as in local_port = 5010"
                raise UsageError(msg, hint=hint)
            checked = check_shape(raw, value, dict[str, str] if key == "env" else known[key], path)
            if key in kinds and name in ("", command):
                found[key] = checked
    return found


def _read(path: Path) -> str | None:
    try:
        with path.open("rb") as stream:
            facts = os.fstat(stream.fileno())
            data = stream.read(_MOST + 1) if stat.S_ISREG(facts.st_mode) else b"\xff"
        text = data.decode("utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, UnicodeDecodeError) as exc:
        msg = f"{path} cannot be read ({exc})"
        raise UsageError(msg, hint="mend it, or move it away") from exc
    others = stat.S_IWGRP | stat.S_IWOTH
    if hasattr(os, "geteuid") and (facts.st_uid not in (0, os.geteuid()) or facts.st_mode & others):
        msg = f"{path} can be written by other users of this machine"
        raise UsageError(msg, hint=f"look at what it says, and then: chmod go-w {path}")
    return text
