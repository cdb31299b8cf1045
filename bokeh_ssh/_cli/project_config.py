"""What ``bokeh-ssh up`` opens: a table in the project's ``pyproject.toml``, or a ``bokeh-ssh.toml``.

It says what an app needs, and comes from whoever wrote the project. So it may not lower a guard of who opens
it: what each value may be is in ``_cli.project_policy``. It brings nothing along that is not in its own
folder, and it is not taken from where somebody else may have put it. How to log in is the person's own
business, and stands in their ``~/.ssh/config``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bokeh_ssh._cli import project_policy
from bokeh_ssh._cli.hints import nearest
from bokeh_ssh._cli.options.flag import KINDS
from bokeh_ssh._cli.options.table import BATCH, EVERY_KEYWORD, GATEWAY, GATEWAY_ONLY, QUEUE, START, TUNNEL
from bokeh_ssh._cli.toml_file import check_shape, read_toml
from bokeh_ssh._core.errors import UsageError
from bokeh_ssh._core.settings import as_toml
from bokeh_ssh._jobs.batch import Batch

_FILE = "bokeh-ssh.toml"
_PROJECT = "pyproject.toml"
_APPS = "apps"
#: What is no flag of the tunnels, and what is a login's but changes nothing about whom to trust.
_OTHERS = ("gateway", "host", "app", "user", "port", "jump", "batch")
_JOB = {"batch", *(flag.keyword for flag in QUEUE)}
_SETTINGS = {*_OTHERS, *(flag.keyword for flag in (*GATEWAY, *TUNNEL, *START, *QUEUE))}
_KINDS = {name: KINDS[name] for name in _SETTINGS} | {"show": bool, "env": dict[str, str]}


@dataclass(frozen=True)
class Settings:
    """One app of a project.

    :ivar path: the file that says so
    :ivar keywords: those of a tunnel, and ``gateway``, ``host`` and ``show``
    """

    path: Path
    keywords: Mapping[str, Any]


def load(
    name: str | None,
    start: Path | None = None,
    typed: Mapping[str, Any] | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> Settings:
    """Find the closest file that has settings, from ``start`` upwards, and read the app of that name.

    :param name: None takes what stands outside of ``apps``, or the only app there is
    :param start: None is the current directory
    :param typed: the keywords that count before those of the file, since the person has given them
    :param defaults: those of the person's that count after it
    :raises UsageError: if there is none, or it says what it may not
    """
    start = start or _here()
    for folder in (start, *start.parents):
        for file in (folder / _FILE, folder / _PROJECT):
            read = read_toml(file)
            table = _own_table(file, read[0]) if read else None
            if read and table is not None:
                _check_owner(file, read[1], start)
                return Settings(file, _app(table, name, file, typed or {}, defaults or {}))
    msg = f"there is no {_FILE} here or above, nor a {_PROJECT} with [tool.bokeh-ssh]"
    raise UsageError(msg, hint='write one: host = "me@remote.host" and app = "dashboard.py"')


def _here() -> Path:
    try:
        return Path.cwd()
    except OSError as exc:
        msg = f"the current directory cannot be looked at ({exc.strerror})"
        raise UsageError(msg, hint="go to a project's folder, and run it there") from exc


def _own_table(file: Path, table: dict[str, Any]) -> dict[str, Any] | None:
    """Take the table of settings out of a file; None where it has none.

    :raises UsageError: if that is no table, or its name is mistyped
    """
    if file.name == _FILE:
        return table
    tool = table.get("tool")
    found = tool.get("bokeh-ssh") if isinstance(tool, dict) else None
    if found is None and isinstance(tool, dict) and "bokeh_ssh" in tool:
        msg = f"{file} has [tool.bokeh_ssh]"
        raise UsageError(msg, hint="write [tool.bokeh-ssh], with a hyphen")
    if found is not None and not isinstance(found, dict):
        msg = f"{file}: tool.bokeh-ssh is no table"
        raise UsageError(msg, hint="write [tool.bokeh-ssh]")
    return found


def _check_owner(file: Path, facts: os.stat_result, start: Path) -> None:
    """Refuse a file that somebody else may have put above where a person works, as into ``/tmp``.

    :param facts: of what was read, which need not be what is there now
    :raises UsageError: if it is not theirs, and they are not in its folder, or it can be anybody's
    """
    if not hasattr(os, "geteuid"):
        return
    mine = {0, os.geteuid()}
    folder, link = file.parent.stat(), file.lstat()
    if facts.st_mode & stat.S_IWOTH:
        msg = f"{file} can be written by every user of this machine, so anybody may have written it"
        raise UsageError(msg, hint=f"look at what it says, and then: chmod o-w {file}")
    if {facts.st_uid, link.st_uid} <= mine:
        return
    if folder.st_mode & stat.S_IWOTH or not file.parent.samefile(start):
        msg = f"{file} belongs to another user of this machine, who may have put it in your way"
        raise UsageError(msg, hint="copy the project, or go to its own folder and run it there")


def _app(
    table: dict[str, Any],
    name: str | None,
    file: Path,
    typed: Mapping[str, Any],
    defaults: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the keywords of one app: what stands outside of ``apps`` counts for all of them."""
    common = {key: value for key, value in table.items() if key != _APPS}
    apps = table.get(_APPS, {})
    if not isinstance(apps, dict) or not all(isinstance(app, dict) for app in apps.values()):
        msg = f"{file}: {_APPS} is no table of tables"
        raise UsageError(msg, hint="write [apps.NAME], or [tool.bokeh-ssh.apps.NAME]")
    if name is None and len(apps) == 1 and "app" not in common:
        name = next(iter(apps))
    if name is not None and name not in apps:
        known = f"there are {', '.join(apps)}" if apps else f"there is no table {_APPS}"
        msg = f"{file} has no app {name!r} ({known})"
        raise UsageError(msg, hint="run it without a name" + (", or with one of those" if apps else ""))
    if name is None and apps and not {"host", "gateway"} & common.keys():
        msg = f"{file} has several apps: {', '.join(apps)}"
        raise UsageError(msg, hint="say which: bokeh-ssh up NAME")
    every = common | (apps[name] if name is not None else {})
    keywords = {key.replace("-", "_"): value for key, value in every.items()}
    for key, value in keywords.items():
        keywords[key] = _checked(key, value, file)
    if not {"host", "gateway"} & keywords.keys():
        msg = f"{file} does not say where the app runs"
        raise UsageError(msg, hint='add host = "me@remote.host", or gateway')
    if "gateway" not in keywords and (useless := GATEWAY_ONLY & keywords.keys()):
        msg = f"{file}: {min(useless)} is for a way through a gateway, and none is named"
        raise UsageError(msg, hint='add gateway = "me@gateway.host", or leave it out')
    if "gateway" in keywords and _JOB & keywords.keys():
        msg = f"{file}: {min(_JOB & keywords.keys())} is for a host that is logged in to directly"
        raise UsageError(msg, hint="name the cluster's login node as host, and the gateway as jump")
    project_policy.check_together({**defaults, **keywords}, typed, file)
    return _rooted(keywords, file, {**defaults, **typed})


def _checked(key: str, value: Any, file: Path) -> Any:
    """Return a value as the tunnel's keyword takes it.

    :raises UsageError: if there is no such keyword, or it takes something else
    """
    project_policy.check(key, value, file)
    if key not in _KINDS:
        if key in EVERY_KEYWORD:
            msg = f"{file}: {key} is no setting of a project"
            batch = key in {flag.keyword for flag in BATCH}
            hint = "write it into a table called batch" if batch else "say it on the command line"
            raise UsageError(msg, hint=hint)
        msg = f"{file}: there is no setting {key!r}"
        raise UsageError(msg, hint=_suggest(key, sorted(_KINDS)))
    if key == "batch":
        return _as_batch(value, file)
    value = check_shape(key, value, _KINDS[key], file)
    project_policy.check_value(key, value, file)
    return value


def _suggest(name: str, known: list[str]) -> str:
    meant = nearest(name, known)
    return f"did you mean {meant}?" if meant else f"there are {', '.join(known)}"


def _as_batch(value: Any, file: Path) -> Batch | None:
    """Make a batch job of ``batch``: true, a scheduler's name, or a table of what it is to have.

    :raises UsageError: if it is none of them, or the table has something else
    """
    if isinstance(value, bool):
        return Batch() if value else None
    fields = {"scheduler": value} if isinstance(value, str) else value
    if not isinstance(fields, dict):
        msg = f"{file}: batch is neither true, nor a scheduler's name, nor a table"
        raise UsageError(msg, hint='write batch = true, or batch = { time = "2:00:00" }')
    known = [field.name for field in dataclasses.fields(Batch)]
    for name in fields:
        if name not in known:
            msg = f"{file}: batch has no {name!r}"
            raise UsageError(msg, hint=_suggest(name, known))
    try:
        return Batch(**fields)
    except (UsageError, TypeError) as exc:
        message, hint = exc.in_words(as_toml) if isinstance(exc, UsageError) else (str(exc), "")
        raise UsageError(f"{file}: batch: {message}", hint=hint) from exc


def _rooted(keywords: dict[str, Any], file: Path, typed: Mapping[str, Any]) -> dict[str, Any]:
    """Let paths of this machine begin at the file, wherever the command is run.

    :raises UsageError: if one leads out of the project
    """
    folder = file.parent
    brings = any(keywords.get(key) or key in typed for key in ("upload", "bring"))
    for key in ("app", "bring") if brings else ():
        for path in keywords.get(key, ()):
            if not _is_inside(path, folder):
                msg = f"{file}: {key} = {path!r} leads out of {folder}, and is not uploaded"
                raise UsageError(msg, hint="name a path in the project, or use --bring on the command line")
        if key in keywords:
            keywords[key] = tuple(str(folder / path) for path in keywords[key])
    return keywords


def _is_inside(path: str, folder: Path) -> bool:
    whole = folder / path
    try:
        with contextlib.suppress(FileNotFoundError):  # which is reported when it is brought
            whole.resolve(strict=True)  # from Python 3.13 on, only that sees a link to itself
        return whole.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError, ValueError):  # such a link; no path at all
        return False
