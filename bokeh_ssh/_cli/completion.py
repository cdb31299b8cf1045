"""What a half-typed word can become, for a shell: hosts, tunnels, servers. Never fails: it finds less."""

from __future__ import annotations

import contextlib
import glob
from pathlib import Path, PurePath
from typing import TYPE_CHECKING

import typer

from bokeh_ssh._core.errors import BokehSSHError
from bokeh_ssh._core.host import parse_target
from bokeh_ssh._core.this_machine.home import expand
from bokeh_ssh._ssh.config.syntax import all_words, split_keyword

if TYPE_CHECKING:
    from bokeh_ssh._cli.tunnels.registry import HeldTunnel

_MOST_FILES = 50


def find_aliases(path: str = "~/.ssh/config") -> list[str]:
    """List the names after ``Host`` that are no patterns, in the config and in what it includes."""
    found: dict[str, None] = {}
    waiting = [expand(path)]
    seen: set[Path] = set()
    while waiting and len(seen) < _MOST_FILES:
        file = waiting.pop(0)
        if file not in seen:
            seen.add(file)
            waiting += _read(file, found)
    return list(found)


def complete_host(incomplete: str) -> list[str]:
    """List what a half-typed ``HOST`` or ``USER@HOST`` can become."""
    user, at, begun = incomplete.rpartition("@")
    return [f"{user}{at}{alias}" for alias in find_aliases() if alias.startswith(begun)]


def complete_tunnel(incomplete: str) -> list[str]:
    """List what a half-typed tunnel of this machine can become: ports, process ids, apps."""
    from bokeh_ssh._cli.tunnels.registry import find_tunnels

    try:
        names = {name for tunnel in find_tunnels() for name in tunnel.names if ":" not in name}
    except BokehSSHError:
        return []
    return sorted(name for name in names if name.startswith(incomplete))


def complete_machine_or_tunnel(incomplete: str) -> list[str]:
    """List both hosts and tunnels."""
    return [*complete_tunnel(incomplete), *complete_host(incomplete)]


def complete_server(context: typer.Context, incomplete: str) -> list[str]:
    """List the apps of the tunnels that lead from this machine to the host that was typed; nobody logs in."""
    apps = {PurePath(app).stem for tunnel in _tunnels_to_host(context) for app in tunnel.apps}
    return sorted(app for app in apps if app.startswith(incomplete))


def complete_job(context: typer.Context, incomplete: str) -> list[str]:
    """List the jobs that the servers of those tunnels run in."""
    jobs = {tunnel.job for tunnel in _tunnels_to_host(context)} - {""}
    return sorted(job for job in jobs if job.startswith(incomplete))


def complete_server_or_job(context: typer.Context, incomplete: str) -> list[str]:
    """List both apps and jobs."""
    return [*complete_server(context, incomplete), *complete_job(context, incomplete)]


def _tunnels_to_host(context: typer.Context) -> list[HeldTunnel]:
    from bokeh_ssh._cli.tunnels.registry import find_tunnels

    try:
        host = parse_target(context.params.get("host") or "").host
        return [tunnel for tunnel in find_tunnels() if tunnel.host == host]
    except BokehSSHError:
        return []


def _read(file: Path, found: dict[str, None]) -> list[Path]:
    """Add a file's aliases; return the files that it includes."""
    included: list[Path] = []
    try:
        lines = file.read_text("utf-8", "replace").splitlines()
    except OSError:
        return []
    for line in lines:
        with contextlib.suppress(ValueError):  # a line that nobody could read
            keyword, rest = split_keyword(line) or ("", "")
            if keyword == "host":
                found.update(dict.fromkeys(word for word in all_words(rest) if not set(word) & set("*?!")))
            elif keyword == "include":
                for word in all_words(rest):
                    # As ssh: what is not absolute is beside the account's own config.
                    pattern = expand("~/.ssh") / expand(word)
                    included += map(Path, sorted(glob.glob(str(pattern))))  # noqa: PTH207  # Path.glob takes no absolute pattern
    return included
