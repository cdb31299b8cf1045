"""What a person has set for all commands: in the environment, and in a file of their own.

A flag counts first, then the variable BOKEH_SSH_NAME, then a project's file (``up`` alone), then
``~/.config/bokeh-ssh/config.toml``, then the default. Both are the person's own, so they may say what flags
may; but what weakens a check is not taken from the file for a project, whose machines somebody else chose.
"""

from __future__ import annotations

import os
import shlex
import stat
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from bokeh_ssh._cli.hints import nearest
from bokeh_ssh._cli.toml_file import check_shape, read_toml
from bokeh_ssh._core.errors import UsageError
from bokeh_ssh._core.this_machine.home import find_home

#: What names of variables begin with.
PREFIX = "BOKEH_SSH_"
#: What our own programs set; no settings.
_OURS = frozenset(
    {"DIR", "READY_FD", "WITHIN", "SEARCH", "PYTHONPATH", "SUPERVISOR", "PUBLICATION", "PROGRAMS"}
)
_YES = ("1", "true", "yes", "on")
_NO = ("0", "false", "no", "off")
#: What opens something to others, or lends something of the person's own: not for every project.
GUARDS = frozenset(
    {
        *("allow_any_origin", "allow_exposed", "allow_foreign", "allow_others", "forward_agent"),
        *("gss_auth", "gss_deleg_creds", "signed"),
    }
)


def weakens(name: str, value: Any) -> bool:
    """Return whether a setting opens something to others, or lends something of the person's own."""
    return name in GUARDS and (value is False if name == "signed" else bool(value))


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
    read = read_toml(path) if path else None
    if path is None or read is None:
        return {}
    table, facts = read
    others = stat.S_IWGRP | stat.S_IWOTH
    if hasattr(os, "geteuid") and (facts.st_uid not in (0, os.geteuid()) or facts.st_mode & others):
        msg = f"{path} can be written by other users of this machine"
        raise UsageError(msg, hint=f"look at what it says, and then: chmod go-w {path}")
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
