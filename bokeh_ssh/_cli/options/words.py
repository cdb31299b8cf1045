"""Settings in words, as whoever gave them would write them."""

from __future__ import annotations

import shlex
from collections.abc import Collection

from bokeh_ssh._cli.options.table import BATCH, FORWARD, GATEWAY, JOB, LOGIN, QUEUE, REMOTE, TUNNEL
from bokeh_ssh._core.settings import Wording, as_keyword, as_toml

_NAMES = {
    flag.keyword: flag.names[0]
    for flag in (*LOGIN, *TUNNEL, *BATCH, *QUEUE, *JOB, *GATEWAY, *REMOTE, *FORWARD)
}


def words_of(of_project: Collection[str]) -> Wording:
    """Return what words settings that a project's file has as they stand there, all others as flags."""
    return lambda name, value: (as_toml if name in of_project else as_flag)(name, value)


def as_flag(name: str, value: str | None) -> str:
    """Word a setting as its flag.

    >>> as_flag("launch", "False"), as_flag("host_keys", "accept-new"), as_flag("remote_port", "")
    ('--attach', '--host-keys accept-new', '--remote-port')
    >>> as_flag("bring", "my data")
    "--bring 'my data'"
    >>> as_flag("args", None)  # --arg is for what cannot be written so
    "the server's options after --"
    """
    if name == "args":
        return "the server's options after --"
    known = _NAMES.get(name)
    if known is None:
        return as_keyword(name, value)
    value = value or ""
    yes, _, no = known.partition("/")
    if no:
        return no if value == "False" else yes
    words = {"()": " none", "True": "", "False": "", "": ""}
    return yes + words[value] if value in words else f"{yes} {shlex.quote(value)}"
