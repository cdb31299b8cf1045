"""The command line: what people type. The only place that prints, prompts or exits, with what it is made of.

A command makes one object of the library and holds it in the foreground; everything else is in its flags.
Nothing of the library that needs paramiko is imported before a command runs.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, Optional

import typer

from bokeh_ssh._flags import takes
from bokeh_ssh._flagtable import DEMO, EXPOSED, FORWARD, GATEWAY, LOGIN, REMOTE, START, TUNNEL
from bokeh_ssh._version import __version__

if TYPE_CHECKING:
    from collections.abc import Callable

    from bokeh_ssh._foreground import Foreground
    from bokeh_ssh._lifecycle import Lifecycle

_EPILOG = "A flag does what the keyword of the same name does in Python. Passwords and codes are asked for."

app = typer.Typer(
    name="bokeh-ssh",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=_EPILOG,
)

Target = Annotated[
    str, typer.Argument(metavar="HOST", help="A name, user@host:port, or an alias of the ssh config.")
]
GatewayTarget = Annotated[
    str, typer.Argument(metavar="GATEWAY", help="A name, user@host:port, or an alias of the ssh config.")
]
Apps = Annotated[
    Optional[list[str]],  # noqa: UP045 - evaluated at run time
    typer.Argument(metavar="APP", help="Apps to serve: paths on the Bokeh host.", show_default=False),
]
Show = Annotated[bool, typer.Option("--show", metavar="", help="Open it in the browser.")]
Verbose = Annotated[
    int,
    typer.Option(
        "--verbose",
        "-v",
        count=True,
        metavar="",
        help="Log what happens; -vv everything, with tracebacks.",
        show_default=False,
    ),
]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"bokeh-ssh {__version__}")
        raise typer.Exit


@app.callback()
def _top(
    version: Annotated[
        bool,
        typer.Option("--version", metavar="", callback=_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Open a Bokeh server that runs on another machine, through SSH, as if it ran here."""


@app.command()
@takes(*TUNNEL, *LOGIN)
def direct(
    context: typer.Context,
    host: Target,
    apps: Apps = None,
    show: Show = False,
    verbose: Verbose = 0,
    **keywords: Any,
) -> None:
    """Open a Bokeh server on HOST; start it there if it does not run.

    Like `bokeh serve APP` there and `ssh -NL 5006:localhost:5006 HOST` here.
    """
    _add_args(context, keywords)

    def make(foreground: Foreground) -> Lifecycle:
        from bokeh_ssh._direct import DirectTunnel

        return DirectTunnel(host, app=apps or None, **_common(foreground), **keywords)

    _hold(make, _announce_urls(show), verbose)


@app.command()
@takes(*GATEWAY, *TUNNEL, *LOGIN)
def gateway(
    context: typer.Context,
    gateway: GatewayTarget,
    apps: Apps = None,
    show: Show = False,
    verbose: Verbose = 0,
    **keywords: Any,
) -> None:
    """Open a Bokeh server through a port of GATEWAY; without --host, what was published there.

    Like `ssh -NR 5006:localhost:5006 GATEWAY` on the Bokeh host and `ssh -NL ...` to it here.
    """
    _add_args(context, keywords)

    def make(foreground: Foreground) -> Lifecycle:
        from bokeh_ssh._gateway import GatewayTunnel

        return GatewayTunnel(gateway, app=apps or None, **_common(foreground), **keywords)

    _hold(make, _announce_urls(show), verbose)


@app.command()
@takes(*REMOTE, *START, *LOGIN)
def publish(
    context: typer.Context,
    gateway: Annotated[
        str,
        typer.Option("--gateway", "-g", metavar="TARGET", help="Where to publish it.", show_default=False),
    ],
    apps: Annotated[
        Optional[list[str]],  # noqa: UP045 - evaluated at run time
        typer.Argument(
            metavar="APP",
            help="Apps to serve, on this machine; none: a server that runs.",
            show_default=False,
        ),
    ] = None,
    verbose: Verbose = 0,
    **keywords: Any,
) -> None:
    """On the Bokeh host: serve APP, or take the server that runs, and publish it on a gateway's port.

    Like `bokeh serve APP` and `ssh -NR 5006:localhost:5006 GATEWAY`.
    """
    _add_args(context, keywords)

    def make(foreground: Foreground) -> Lifecycle:
        from bokeh_ssh._publication import Publication

        return Publication(gateway, app=apps or (), **_common(foreground), **keywords)

    def announce(foreground: Foreground, publication: Any) -> None:
        port = publication.remote_port
        foreground.display.addresses(foreground.display.ready)
        more = "" if port == 5006 else f" --gateway-port {port}"
        foreground.display.hint(f"Open it on your own machine with: bokeh-ssh gateway {gateway}{more}")

    _hold(make, announce, verbose)


@app.command()
@takes(*FORWARD, *EXPOSED, *LOGIN)
def forward(
    context: typer.Context,
    host: Target,
    local: Annotated[
        Optional[str],  # noqa: UP045 - evaluated at run time
        typer.Option("-L", metavar="[BIND:]PORT:HOST:HOSTPORT", help="A local forward, as ssh writes it."),
    ] = None,
    remote: Annotated[
        Optional[str],  # noqa: UP045 - evaluated at run time
        typer.Option("-R", metavar="[BIND:]PORT:HOST:HOSTPORT", help="A remote forward, as ssh writes it."),
    ] = None,
    verbose: Verbose = 0,
    **keywords: Any,
) -> None:
    """Forward one port, Bokeh's or not: give --remote-port, or -L or -R as to ssh.

    Like `ssh -N -L` and `ssh -N -R`.
    """
    _take_no_args(context)

    def make(foreground: Foreground) -> Lifecycle:
        from bokeh_ssh._forwards import make_forward

        return make_forward(host, local, remote, keywords | _common(foreground))

    def announce(foreground: Foreground, _: Any) -> None:
        foreground.display.addresses(foreground.display.ready)

    _hold(make, announce, verbose)


@app.command()
@takes(*DEMO)
def demo(
    context: typer.Context,
    no_show: Annotated[bool, typer.Option("--no-show", metavar="", help="Only print the address.")] = False,
    verbose: Verbose = 0,
    **keywords: Any,
) -> None:
    """Try it without another machine: an SSH server on this one, a Bokeh app on it, and a tunnel to that."""
    _take_no_args(context)

    def make(foreground: Foreground) -> Lifecycle:
        from bokeh_ssh._demo import APP, demo_machine, demo_python
        from bokeh_ssh._direct import DirectTunnel

        host = foreground.stack.enter_context(demo_machine())
        foreground.display.note(
            f"An SSH server listens on 127.0.0.1, port {host.port}; its keys are made for this demo"
        )
        common = _common(foreground)
        common.pop("prompt")  # its login never asks
        return DirectTunnel(host, app=APP, python=demo_python(), grace=10, **common, **keywords)

    _hold(make, _announce_urls(not no_show), verbose)


def _hold(
    make: Callable[[Foreground], Lifecycle], announce: Callable[[Foreground, Any], None], verbose: int
) -> NoReturn:
    from bokeh_ssh._foreground import Foreground, set_up_logging

    set_up_logging(verbose)
    foreground = Foreground(verbose)

    def announce_and_tell(thing: Lifecycle) -> None:
        announce(foreground, thing)
        foreground.display.hint("Ctrl-C ends it.")

    raise typer.Exit(foreground.hold(make, announce_and_tell))


def _announce_urls(browse: bool) -> Callable[[Foreground, Any], None]:
    def announce(foreground: Foreground, tunnel: Any) -> None:
        from bokeh_ssh._foreground import show

        foreground.display.addresses(*tunnel.urls)
        if browse:
            show(foreground.display, tunnel.url)

    return announce


def _common(foreground: Foreground) -> dict[str, Any]:
    # This process computes nothing that could slow the tunnel down: no need for another one (isolate).
    return {"prompt": foreground.prompt, "on_event": foreground.display.on_event, "isolate": False}


def _add_args(context: typer.Context, keywords: dict[str, Any]) -> None:
    """Add what stood after ``--``."""
    if context.obj["args"]:
        keywords["args"] = (*keywords.get("args", ()), *context.obj["args"])


def _take_no_args(context: typer.Context) -> None:
    if context.obj["args"]:
        msg = f"nothing can be given to bokeh serve here: {context.obj['args'][0]}"
        raise typer.BadParameter(msg, param_hint="'--'")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 well, 1 failed, 2 misused, 130 interrupted before it was open.

    :param argv: the words after the program's name; None takes this program's own
    """
    words = list(sys.argv[1:] if argv is None else argv)
    # The parser would mix what follows "--" into the apps; it is for bokeh serve, word for word.
    end = words.index("--") if "--" in words else len(words)
    app(args=words[:end], obj={"args": words[end + 1 :]}, prog_name="bokeh-ssh")
