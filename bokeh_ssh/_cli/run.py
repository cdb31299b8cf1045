"""How a command is carried out: what it opens and announces, or what it does. Imported once one runs."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Callable, Mapping
from typing import Any

from bokeh_ssh._cli.cache import examine as examine_cache
from bokeh_ssh._cli.doctor import examine
from bokeh_ssh._cli.foreground import Foreground, show
from bokeh_ssh._cli.forward import make_forward
from bokeh_ssh._cli.hints import check_order
from bokeh_ssh._cli.json_output import server_fields
from bokeh_ssh._cli.notify_ready import announce as announce_ready
from bokeh_ssh._cli.options.command import ORIGINS, Asked, of_own_file, take_batch
from bokeh_ssh._cli.options.table import GATEWAY_ONLY, STARTED_ONCE
from bokeh_ssh._cli.options.words import words_of
from bokeh_ssh._cli.project_config import load
from bokeh_ssh._cli.servers import end, find
from bokeh_ssh._cli.tunnels import background, dry_run
from bokeh_ssh._cli.tunnels.registry import ended_here, find_named, find_tunnels
from bokeh_ssh._cli.user_config import weakens
from bokeh_ssh._core.endpoint import format_endpoint
from bokeh_ssh._core.errors import BokehSSHError, ResolveError, UsageError
from bokeh_ssh._core.host import Host
from bokeh_ssh._core.settings import setting
from bokeh_ssh._jobs.job import ListedJob
from bokeh_ssh._server.options import ServerOptions
from bokeh_ssh._ssh.route import find_hop, goes_its_own_way
from bokeh_ssh._tunnels.direct import DirectTunnel
from bokeh_ssh._tunnels.gateway import GatewayTunnel, bokeh_host_of
from bokeh_ssh._tunnels.openable import Openable, info_of
from bokeh_ssh._tunnels.publication import Publication


def carry_out(asked: Asked) -> int:
    """Do what was asked, or hold what it opens until that ends; return the exit code."""
    dry, in_background = (asked.keywords.pop(name, False) for name in ("dry_run", "background"))
    does = _plan if dry else _DOES.get(asked.command)
    if does:
        return Foreground(asked).do(does)
    leave = None
    if in_background:
        try:
            leave = background.fork()
        except BokehSSHError as exc:
            return Foreground(asked).fail(exc)
    announce = _ANNOUNCES.get(asked.command, _announce_urls)
    return Foreground(asked, leave).hold(_MAKES[asked.command], announce)


# What commands open.


def _common(foreground: Foreground) -> dict[str, Any]:
    # This process computes nothing that could slow the tunnel down: no need for another one (isolate).
    return {"prompt": foreground.prompt, "on_event": foreground.on_event, "isolate": False}


def _make(kind: Callable[..., Openable], foreground: Foreground) -> Openable:
    return kind(foreground.asked.target, **_common(foreground), **foreground.asked.keywords)


def _direct(foreground: Foreground) -> Openable:
    check_order(foreground.asked)
    take_batch(foreground.asked.keywords)
    return _make(DirectTunnel, foreground)


def _up(foreground: Foreground) -> Openable:
    """Make what the project's file says, as if it had been typed."""
    asked = foreground.asked
    own = of_own_file(asked.keywords)
    typed = {name: value for name, value in asked.keywords.items() if name not in own}
    # Not what weakens a check: the project says which machines that is for.
    own = {name: value for name, value in own.items() if not weakens(name, value)}
    settings = load(asked.target, typed=typed, defaults=own)
    foreground.display.note(f"As {settings.path} says")
    of_project = settings.keywords.keys() - typed.keys()
    foreground.display.wording = words_of(of_project)
    for name in of_project:
        ORIGINS.pop(name, None)
    every = {**own, **settings.keywords, **typed}
    browse = bool(every.pop("show", False)) or asked.show
    command = "gateway" if every.get("gateway") else "direct"
    target = every.pop("gateway", None) or every.pop("host")
    for name in GATEWAY_ONLY & every.keys() if command == "direct" else ():
        if name not in ORIGINS:
            msg = f"{setting(name)} is for a way through a gateway, and {settings.path} names none"
            raise UsageError(msg, hint="leave it out, or write gateway = ... there")
        del every[name]  # a default, for other projects
    foreground.asked = Asked(target, every, browse, command)
    return _make(GatewayTunnel if command == "gateway" else DirectTunnel, foreground)


def _demo(foreground: Foreground) -> Openable:
    from bokeh_ssh._demo.demo import APP, demo_machine  # what it needs is an extra

    host = foreground.stack.enter_context(demo_machine())
    foreground.display.note(
        f"An SSH server listens on 127.0.0.1, port {host.port}, with keys made for this demo"
    )
    own = _common(foreground)
    own.pop("prompt")  # its login never asks
    # Its machine ends with this process: then nobody can come back.
    return DirectTunnel(
        host, app=APP, python=sys.executable, grace=2, cache=False, **own, **foreground.asked.keywords
    )


_MAKES: dict[str, Callable[[Foreground], Openable]] = {
    "direct": _direct,
    "attach": _direct,
    "gateway": lambda foreground: _make(GatewayTunnel, foreground),
    "up": _up,
    "publish": lambda foreground: _make(Publication, foreground),
    "forward": lambda foreground: _make(make_forward, foreground),
    "demo": _demo,
}


def _plan(foreground: Foreground) -> None:
    """Print what would be done; what cannot be is an error as ever."""
    typed = dict(foreground.asked.keywords)
    made = _MAKES[foreground.asked.command](foreground)
    foreground.display.note(f"Would open {repr(made).strip('<>').rpartition(', ')[0]}")
    asked = foreground.asked
    foreground.display.plan(dry_run.plan(asked.command, asked.target or "", {**typed, **asked.keywords}))


# What is said once it is open.


def _announce_urls(foreground: Foreground, tunnel: Any) -> None:
    """Say where an open tunnel leads; show it in the browser if that was asked for."""
    asked = foreground.asked
    foreground.display.addresses(*tunnel.urls)
    for name, target in info_of(tunnel).forwards:
        foreground.display.hint(f"{name} leads to {format_endpoint(target)} there")
    if asked.target and tunnel.server and tunnel.detached:
        again = _again_by_gateway if asked.command == "gateway" else _again
        for line in again(asked.target, asked.keywords, tunnel):
            foreground.display.hint(line)
    if asked.show:
        show(foreground.display, lambda: tunnel.show(inline=False))


def _again(host: str, keywords: Mapping[str, Any], tunnel: DirectTunnel) -> list[str]:
    machine, job = shlex.quote(host), tunnel.job
    again, name = (f"--job {job.id}", job.id) if job else (tunnel.server, tunnel.server)
    return [f"Again: bokeh-ssh attach {machine} {again}    For good: bokeh-ssh stop {machine} {name}"]


def _again_by_gateway(gateway: str, keywords: Mapping[str, Any], tunnel: GatewayTunnel) -> list[str]:
    bokeh_host = bokeh_host_of(tunnel)
    if bokeh_host is None:
        return []
    through, host = shlex.quote(gateway), keywords["host"]
    more = f"--name {tunnel.name}" if tunnel.name else f"--host {shlex.quote(host)} --server {tunnel.server}"
    way = "" if goes_its_own_way(bokeh_host) else f" -J {through}"
    user = "" if "@" in host else f"{find_hop(bokeh_host).user}@"  # the gateway's, by default
    return [
        f"Again: bokeh-ssh gateway {through} {more}",
        f"For good: bokeh-ssh stop {shlex.quote(user + host)}{way} {tunnel.server}",
    ]


def _announce_publication(foreground: Foreground, publication: Any) -> None:
    where = publication.remote_socket or publication.remote_port
    announce_ready(where, routes=publication.routes)
    _announce_address(foreground, publication)
    there = _other_half(foreground.asked.target or "", where)
    foreground.display.hint(f"Open it on your own machine with: {there}")


def _other_half(gateway: str, where: str | int) -> str:
    gateway = shlex.quote(gateway)
    if isinstance(where, int):
        return f"bokeh-ssh gateway {gateway} --gateway-port {where}"
    _, named, name = where.rpartition("/pub-")
    if named:
        return f"bokeh-ssh gateway {gateway} --name {name}"
    return f"bokeh-ssh forward {gateway} --remote-socket {where}"


def _announce_address(foreground: Foreground, _: Any) -> None:
    foreground.display.addresses(foreground.display.ready)


_ANNOUNCES: dict[str, Callable[[Foreground, Any], None]] = {
    "publish": _announce_publication,
    "forward": _announce_address,
}


# What commands do that end by themselves.


def _visit(foreground: Foreground) -> dict[str, Any]:
    """Return the arguments of what looks at a machine once."""
    login = {**foreground.asked.keywords, "prompt": foreground.prompt}
    python = login.pop("python", None)
    return {"python": python, "on_event": foreground.display.on_event, "login": login}


def _ls(foreground: Foreground) -> None:
    host = foreground.asked.target
    if host is None:
        foreground.display.tunnels(find_tunnels())
        return
    servers, jobs = find(host, **_visit(foreground))
    if servers or not jobs:
        foreground.display.servers(servers)
    if jobs:
        foreground.display.jobs(jobs)


def _stop(foreground: Foreground) -> None:
    host, name = foreground.asked.target, foreground.asked.keywords.pop("name")
    tunnel = ended_here(host) if name is None else None
    if tunnel:
        what = " ".join(tunnel.addresses) or "the tunnel"
        fields = {"pid": tunnel.pid, "host": tunnel.host, "addresses": list(tunnel.addresses)}
        text = f"Ended {what} to {tunnel.host} (process {tunnel.pid})"
        foreground.display.done(text, "ended_tunnel", **fields)
        return
    assert host is not None
    try:
        ended = end(host, name, **_visit(foreground))
    except ResolveError as error:
        if name is None:
            error.advise(f"{error.sentences[1]}; no tunnel of this machine is named {host} either")
        raise
    if isinstance(ended, ListedJob):
        text = f"Cancelled job {ended.id} ({ended.name}) on {ended.host}"
        foreground.display.done(text, "cancelled", **dataclasses.asdict(ended))
    else:
        text = f"Ended {' '.join(ended.apps) or 'the server'} on {ended.host} ({ended.id})"
        foreground.display.done(text, "ended", **server_fields(ended))


def _status(foreground: Foreground) -> None:
    asked = foreground.asked
    foreground.display.statuses(
        lambda: find_named(asked.target), watch=asked.keywords["watch"], check=foreground.check
    )


def _cache(foreground: Foreground) -> None:
    foreground.display.cache(examine_cache(clear=foreground.asked.keywords["clear"]))


def _doctor(foreground: Foreground) -> int:
    asked, keywords = foreground.asked, foreground.asked.keywords
    check_order(asked)
    start = {flag.keyword for flag in STARTED_ONCE} & keywords.keys()
    serve = ServerOptions(launch=True, **{name: keywords.pop(name) for name in start})
    take_batch(keywords)
    batch = keywords.pop("batch", None)
    code = 0
    machine = Host(asked.target or "", **keywords, prompt=foreground.prompt)
    for finding in examine(machine, serve, foreground.display.begin, batch, foreground.advise):
        foreground.display.finding(finding)
        foreground.check()
        code = 1 if finding.verdict == "bad" else code
    return code


_DOES: dict[str, Callable[[Foreground], int | None]] = {
    "ls": _ls,
    "stop": _stop,
    "status": _status,
    "cache": _cache,
    "doctor": _doctor,
}
