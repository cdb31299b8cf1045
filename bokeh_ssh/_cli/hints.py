"""What people type out of habit, and what they meant. Text, and what lies in the current directory."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from bokeh_ssh._core.errors import BokehSSHError, ConnectError, LaunchError, ServerNotFoundError
from bokeh_ssh._core.settings import setting

#: The last line of a traceback about a file that is not there, and about a module.
_NO_FILE = re.compile(r"^FileNotFoundError: .*'(?P<name>[^'\n]+)'\s*$", re.MULTILINE)
_NO_MODULE = re.compile(r"^ModuleNotFoundError: No module named '(?P<name>\w+)", re.MULTILINE)

#: What may stand before a command.
_TOP = ("-h", "--help", "--version", "--install-completion", "--show-completion")


def with_command(words: Sequence[str], commands: Collection[str]) -> list[str]:
    """Return the words of a command line with ``direct`` in front where they begin with a machine or a flag.

    >>> with_command(["me@host", "app.py"], ["direct", "gateway"])
    ['direct', 'me@host', 'app.py']
    >>> with_command(["gatewy", "me@host"], ["direct", "gateway"])
    ['gatewy', 'me@host']
    """
    first = words[0] if words else ""
    if not first or first in commands or first.partition("=")[0] in _TOP:
        return list(words)
    if not first.startswith("-"):
        alone = all(word.startswith("-") for word in words[1:]) and not set("@.:") & set(first)
        if alone or difflib.get_close_matches(first, commands, n=1, cutoff=0.75):
            return list(words)  # a word that may be meant as a command is no machine
    return ["direct", *words]


def nearest(name: str, names: Collection[str]) -> str:
    """Return the name that was probably meant; empty where none is near.

    >>> nearest("uplaod", ["upload", "setup"])
    'upload'
    """
    return next(iter(difflib.get_close_matches(name, names, n=1, cutoff=0.7)), "")


def advise(error: BokehSSHError, apps: Sequence[str], typed: Mapping[str, Any]) -> None:
    """Give the error a better next step, where what was typed shows what was meant.

    :param apps: the apps that were named
    :param typed: the keywords that were typed
    """
    hint = ""
    if isinstance(error, ConnectError) and apps and typed.get("port"):
        hint = (
            f"{setting('port=')} is the SSH server's; for the app's port, use "
            f"{setting('remote_port=')} there or {setting('local_port=')} here"
        )
    elif isinstance(error, LaunchError) and "does not exist" in error.message and not typed.get("upload"):
        here = [app for app in apps if Path(app).exists()]
        hint = f"{here[0]} is on this machine: upload it with {setting('upload=True')}" if here else ""
    elif (
        isinstance(error, ServerNotFoundError) and "no server named" in error.message and not typed.get("job")
    ):
        hint = f"{error.hint}; one in a batch job is opened with {setting('job=')}, by name or number"
    if hint:
        error.advise(hint)


def advise_app(traceback: str, apps: Sequence[str], typed: Mapping[str, Any]) -> str:
    """Return the next step for an app that was uploaded without what it opens or imports; else empty.

    :param traceback: what the app's failure wrote
    """
    found = _find_left_here(traceback, apps) if typed.get("upload") or typed.get("bring") else None
    return f"{found} is on this machine: upload it too, with {setting(f'bring={found}')}" if found else ""


def _find_left_here(traceback: str, apps: Sequence[str]) -> Path | None:
    file, module = _NO_FILE.search(traceback), _NO_MODULE.search(traceback)
    names = [file["name"]] if file else [f"{module['name']}.py", module["name"]] if module else []
    for name in names:
        # There it may be named from the folder that it was not uploaded to.
        parts = [part for part in Path(name).parts if part not in ("/", "..")]
        for path in (Path(*parts[at:]) for at in range(len(parts))):
            for folder in (*(Path(app).parent for app in apps), Path()):
                if (folder / path).exists():
                    return folder / path.parts[0]
    return None
