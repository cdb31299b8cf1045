"""How a command of the command line is carried out: held in the foreground or done, and announced."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any, NoReturn

import typer

from bokeh_ssh._cli.completion import find_aliases
from bokeh_ssh._cli.hints import advise, advise_app
from bokeh_ssh._cli.options.table import LOGGED
from bokeh_ssh._core.endpoint import format_endpoint
from bokeh_ssh._core.errors import BokehSSHError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from bokeh_ssh._cli.foreground import Foreground
    from bokeh_ssh._cli.tunnels.background import Leave
    from bokeh_ssh._tunnels.openable import Openable


def hold(
    make: Callable[[Foreground], Openable],
    announce: Callable[[Foreground, Any], None],
    verbose: int,
    keywords: dict[str, Any],
    apps: Sequence[str] = (),
    command: str = "",
    plan: Callable[[], tuple[str, str, Mapping[str, Any]]] | None = None,
) -> NoReturn:
    """Make it, and hold it. What of ``keywords`` is for the display is taken out before that."""
    leave = None
    background_wanted = keywords.pop("background", False)
    if keywords.pop("dry_run", False) and plan:
        _show_plan(make, verbose, keywords, plan)
    if background_wanted:
        from bokeh_ssh._cli.tunnels import background

        try:
            leave = background.fork()
        except BokehSSHError as exc:
            raise typer.Exit(_foreground(verbose, keywords).fail(exc)) from exc
    foreground = _foreground(verbose, keywords, leave)
    foreground.command = command
    set_hints(foreground, apps, keywords)

    def announce_and_notify(thing: Openable) -> None:
        announce(foreground, thing)
        stays = getattr(thing, "detached", False)
        if not leave:
            foreground.display.hint(
                "Ctrl-C ends the tunnel; the server keeps running." if stays else "Ctrl-C ends it."
            )

    raise typer.Exit(foreground.hold(make, announce_and_notify))


def set_hints(foreground: Foreground, apps: Sequence[str], keywords: Mapping[str, Any]) -> None:
    """Let errors get the next step that fits these apps and keywords."""
    config = keywords.get("ssh_config", "~/.ssh/config")
    foreground.advise = lambda error: advise(error, apps, keywords, find_aliases(config) if config else ())
    foreground.advise_app = lambda traceback: advise_app(traceback, apps, keywords)


def _show_plan(
    make: Callable[[Foreground], Openable],
    verbose: int,
    keywords: dict[str, Any],
    plan: Callable[[], tuple[str, str, Mapping[str, Any]]],
) -> NoReturn:
    """Print what would be done; what cannot be is an error as ever."""

    def show(foreground: Foreground) -> None:
        from bokeh_ssh._cli.tunnels import dry_run

        typed = dict(keywords)
        foreground.display.note(f"Would open {repr(make(foreground)).strip('<>').rpartition(', ')[0]}")
        command, target, made = plan()
        foreground.display.plan(dry_run.plan(command, target, {**typed, **made}))

    raise typer.Exit(_foreground(verbose, keywords).do(show))


def do(action: Callable[[Foreground], int | None], verbose: int, keywords: dict[str, Any]) -> NoReturn:
    """Do something that ends by itself."""
    raise typer.Exit(_foreground(verbose, keywords).do(action))


def visit(foreground: Foreground, keywords: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of what looks at a machine once."""
    login = {**keywords, "prompt": foreground.prompt}
    python = login.pop("python", None)
    return {"python": python, "on_event": foreground.display.on_event, "login": login}


def _foreground(verbose: int, keywords: dict[str, Any], leave: Leave | None = None) -> Foreground:
    from bokeh_ssh._cli.foreground import Foreground

    names = [flag.keyword for flag in LOGGED if flag.keyword in keywords]
    try:
        return Foreground(verbose, leave=leave, **{name: keywords.pop(name) for name in names})
    except BokehSSHError as exc:
        raise typer.BadParameter(exc.message, param_hint="'--json'") from exc


def other_half(gateway: str, where: str | int) -> str:
    """Write what opens it elsewhere."""
    gateway = shlex.quote(gateway)
    if isinstance(where, int):
        more = f" --gateway-port {where}"
    else:
        _, named, name = where.rpartition("/pub-")
        more = f" --name {name}" if named else ""
        if not named:
            return f"bokeh-ssh forward {gateway} --remote-socket {where}"
    return f"bokeh-ssh gateway {gateway}{more}"


def announce_urls(browse: bool, host: str = "") -> Callable[[Foreground, Any], None]:
    """Make what says where an open tunnel leads, and shows it in the browser if ``browse``."""

    def announce(foreground: Foreground, tunnel: Any) -> None:
        from bokeh_ssh._cli.foreground import show
        from bokeh_ssh._tunnels.openable import info_of

        foreground.display.addresses(*tunnel.urls)
        for name, target in info_of(tunnel).forwards:
            foreground.display.hint(f"{name} leads to {format_endpoint(target)} there")
        if host and tunnel.server and tunnel.detached:
            machine, job = shlex.quote(host), getattr(tunnel, "job", None)
            again, name = (f"--job {job.id}", job.id) if job else (tunnel.server, tunnel.server)
            again, stop = f"bokeh-ssh attach {machine} {again}", f"bokeh-ssh stop {machine} {name}"
            foreground.display.hint(f"Again: {again}    For good: {stop}")
        if browse:
            show(foreground.display, lambda: tunnel.show(inline=False))

    return announce


def common(foreground: Foreground) -> dict[str, Any]:
    """Return what every tunnel and forward of the command line gets."""
    # This process computes nothing that could slow the tunnel down: no need for another one (isolate).
    return {"prompt": foreground.prompt, "on_event": foreground.on_event, "isolate": False}


def add_args(context: typer.Context, keywords: dict[str, Any], *, needs_app: bool = False) -> None:
    """Add what stood after ``--``.

    :param needs_app: whether none was named before that, where a server that runs would be used without
    """
    args = context.obj["args"]
    if args and needs_app and "command" not in keywords and not args[0].startswith("-"):
        msg = f"{args[0]} stands after --, which is for options of bokeh serve; name an app before it"
        raise typer.BadParameter(msg, param_hint="'--'")
    if args:
        keywords["args"] = (*keywords.get("args", ()), *args)


def take_no_args(context: typer.Context) -> None:
    """Refuse what stood after ``--``."""
    if context.obj["args"]:
        msg = f"nothing can be given to bokeh serve here: {context.obj['args'][0]}"
        raise typer.BadParameter(msg, param_hint="'--'")
