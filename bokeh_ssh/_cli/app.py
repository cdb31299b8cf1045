"""The command line: what people type. The only place that prints, prompts or exits, with what it is made of.

Here is its grammar: each command is a function whose parameters and docstring are its usage, and which
returns what was asked. ``_cli.run`` carries that out. Nothing of the library that needs paramiko is imported
before.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

from bokeh_ssh._cli.completion import (
    complete_host,
    complete_machine_or_tunnel,
    complete_server,
    complete_server_or_job,
    find_aliases,
)
from bokeh_ssh._cli.hints import with_command
from bokeh_ssh._cli.options.command import Asked, Command, Program, takes
from bokeh_ssh._cli.options.flag import Flag
from bokeh_ssh._cli.options.table import (
    ATTACH,
    BATCH,
    DEMO,
    EXPOSED,
    FORWARD,
    GATEWAY,
    HELD,
    JOB,
    LOGGED,
    LOGIN,
    LOGIN_ONCE,
    OUTPUT,
    QUEUE,
    REMOTE,
    START,
    STARTED_ONCE,
    TUNNEL,
    VISIT,
)
from bokeh_ssh._cli.options.words import as_flag
from bokeh_ssh._cli.std_streams import OutputError, standing
from bokeh_ssh._core.errors import UsageError
from bokeh_ssh._core.settings import surface
from bokeh_ssh._version import DOCUMENTATION, __version__


def _examples(*lines: str) -> str:
    head = f"[bold]Examples[/bold], and more at {DOCUMENTATION}"
    return "\n".join((head, *(f"  bokeh-ssh {line}" for line in lines)))


_EPILOG = f"""\
{_examples("HOST app.py", "HOST ./app.py --upload --dev --show", "doctor HOST")}

A HOST in place of a command means direct; `bokeh-ssh COMMAND --help` shows a command's options.
Each is a keyword argument of the same name in Python. Passwords and codes are asked for."""

app = typer.Typer(
    name="bokeh-ssh",
    cls=Program,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=_EPILOG,
)


def _argument(metavar: str, text: str, complete: Callable[..., list[str]] | None = None) -> Any:
    return typer.Argument(metavar=metavar, help=text, show_default=False, autocompletion=complete)


def _switch(*names: str, text: str, **more: Any) -> Any:
    return typer.Option(*names, metavar="", help=text, **more)


_MACHINE = "A name, user@host:port, or an alias of the ssh config"
Target = Annotated[str, _argument("HOST", f"{_MACHINE}.", complete_host)]
Apps = Annotated[list[str] | None, _argument("APP", "Apps to serve: paths on the Bokeh host.")]
Show = Annotated[bool, _switch("--show", text="Open it in the browser.")]


def _command(
    name: str, *examples: str, flags: Sequence[Flag]
) -> Callable[[Callable[..., Asked]], Callable[..., Asked]]:
    """Make a command of a function that returns what was asked."""

    def decorate(function: Callable[..., Asked]) -> Callable[..., Asked]:
        epilog = _examples(*examples) if examples else None
        app.command(name, cls=Command, epilog=epilog)(takes(function, name, flags, _carry_out))
        return function

    return decorate


def _carry_out(asked: Asked) -> None:
    from bokeh_ssh._cli.run import carry_out

    raise typer.Exit(carry_out(asked))


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"bokeh-ssh {__version__}")
        raise typer.Exit


@app.callback()
def _top(
    version: Annotated[
        bool, _switch("--version", text="Show the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Open a Bokeh server that runs on another machine, through SSH, as if it ran here."""


@_command(
    "direct",
    "direct me@host dashboard.py --show",
    "direct me@host ./app.py --upload --dev --setup 'conda activate viz'",
    "direct me@host app.py --command 'panel serve' -- --args --year 2024",
    flags=(*TUNNEL, *BATCH, *QUEUE, *JOB, *LOGIN, *LOGGED, *HELD),
)
def direct(host: Target, apps: Apps = None, show: Show = False, **keywords: Any) -> Asked:
    """Open a Bokeh server on HOST; start it there if it does not run.

    Like `bokeh serve APP` there and `ssh -NL 5006:localhost:5006 HOST` here.
    """
    return Asked(host, {"app": apps or None, **keywords}, show=show)


@_command(
    "attach", "attach me@host", "attach me@host dashboard --show", flags=(*ATTACH, *LOGIN, *LOGGED, *HELD)
)
def attach(
    host: Target,
    name: Annotated[
        str | None,
        _argument("NAME", "Its id, app or route, as `ls` shows them; none: the only one.", complete_server),
    ] = None,
    show: Show = False,
    **keywords: Any,
) -> Asked:
    """Open a server of yours that runs on HOST: a detached one, or one that waits for its client to return.

    At the end a detached server keeps running; another one ends, as if this command had started it.
    """
    return Asked(host, {"server": name or "*", **keywords}, show=show)


@_command(
    "gateway",
    "gateway me@gateway",
    "gateway me@login.cluster dashboard.py --host node17",
    flags=(*GATEWAY, *TUNNEL, *LOGIN, *LOGGED, *HELD),
)
def gateway(
    gateway: Annotated[str, _argument("GATEWAY", f"{_MACHINE}.", complete_host)],
    apps: Apps = None,
    show: Show = False,
    **keywords: Any,
) -> Asked:
    """Open a Bokeh server through a port of GATEWAY; without --host, a server that was published there.

    Like `ssh -NR 5006:localhost:5006 GATEWAY` on the Bokeh host and `ssh -NL ...` to it here.
    """
    return Asked(gateway, {"app": apps or None, **keywords}, show=show)


@_command("up", "up", "up big --show", flags=(*GATEWAY, *TUNNEL, *LOGIN, *LOGGED, *HELD))
def up(
    which: Annotated[str | None, _argument("NAME", "One of several in the file.")] = None,
    show: Show = False,
    **keywords: Any,
) -> Asked:
    r"""Open the app of this project, as pyproject.toml (\[tool.bokeh-ssh]) or bokeh-ssh.toml says.

    Options override the file.
    """
    return Asked(which, keywords, show=show)


@_command(
    "publish",
    "publish dashboard.py --gateway me@gateway",
    "publish --gateway me@gateway --name dashboard --background",
    flags=(*REMOTE, *START, *LOGIN, *LOGGED, *HELD),
)
def publish(
    gateway: Annotated[
        str,
        typer.Option(
            "--gateway",
            "-g",
            metavar="TARGET",
            help="Where to publish it.",
            show_default=False,
            autocompletion=complete_host,
        ),
    ],
    apps: Annotated[
        list[str] | None, _argument("APP", "Apps to serve, on this machine; none: a server that runs.")
    ] = None,
    **keywords: Any,
) -> Asked:
    """On the Bokeh host: serve APP, or use a running server, and publish it on a gateway.

    Like `bokeh serve APP` and `ssh -NR 5006:localhost:5006 GATEWAY`.
    """
    return Asked(gateway, {"app": apps or (), **keywords})


@_command(
    "forward",
    "forward me@host -L 8888:localhost:8888",
    "forward me@host --remote-port 8888",
    flags=(*FORWARD, *EXPOSED, *LOGIN, *OUTPUT, *HELD),
)
def forward(
    host: Target,
    local: Annotated[
        list[str] | None,
        typer.Option("-L", metavar="SPEC", help="A local forward as for ssh: [BIND:]PORT:HOST:HOSTPORT."),
    ] = None,
    remote: Annotated[
        list[str] | None, typer.Option("-R", metavar="SPEC", help="A remote forward, likewise.")
    ] = None,
    **keywords: Any,
) -> Asked:
    """Forward one port, Bokeh's or not: give --remote-port, or -L or -R as for ssh.

    Like `ssh -N -L` and `ssh -N -R`.
    """
    return Asked(host, {"-L": local or (), "-R": remote or (), **keywords})


@_command("ls", "ls", "ls me@host", "ls .", flags=(*VISIT, *OUTPUT))
def list_(
    host: Annotated[
        str | None,
        _argument("HOST", f"{_MACHINE}; '.' is this machine; none: the tunnels here.", complete_host),
    ] = None,
    **keywords: Any,
) -> Asked:
    """List your servers on HOST, in use, detached, or waiting; without HOST, the tunnels of this machine.

    Like `ps` there, for the servers that bokeh-ssh has started.
    """
    return Asked(host, keywords)


@_command("stop", "stop 5006", "stop me@host dashboard", flags=(*VISIT, *OUTPUT))
def stop(
    host: Annotated[
        str | None,
        _argument(
            "HOST | TUNNEL",
            "A machine, '.' for this one; or a tunnel of this machine: its port, address, process id or app; "
            "none: the only tunnel.",
            complete_machine_or_tunnel,
        ),
    ] = None,
    name: Annotated[
        str | None,
        _argument(
            "NAME",
            "Its id, app or route, or a job's name or number, as `ls` shows them; none: the only one.",
            complete_server_or_job,
        ),
    ] = None,
    **keywords: Any,
) -> Asked:
    """End a tunnel of this machine; or one of your servers on HOST, with all that it started; or a job."""
    return Asked(host, {"name": name, **keywords})


@_command("status", "status", "status 5006 --watch", flags=OUTPUT)
def status(
    name: Annotated[
        str | None,
        _argument(
            "TUNNEL",
            "Its port, address, process id or app, or a HOST for all to that; none: all.",
            complete_machine_or_tunnel,
        ),
    ] = None,
    watch: Annotated[
        bool, _switch("--watch", "-w", text="Show it again every second, until Ctrl-C.")
    ] = False,
    **keywords: Any,
) -> Asked:
    """Show the tunnels of this machine: each machine on the route with its round trip, and the traffic.

    Also how long each has been open, and how often it has reconnected.
    """
    return Asked(name, {"watch": watch, **keywords})


@_command("cache", "cache", "cache --clear", flags=OUTPUT)
def cache(clear: Annotated[bool, _switch("--clear", text="Remove them.")] = False, **keywords: Any) -> Asked:
    """Show where static files of servers are kept on this machine, their number and their size."""
    return Asked(None, {"clear": clear, **keywords})


@_command(
    "doctor",
    "doctor me@host",
    "doctor me@node17 --jump me@login.cluster --setup 'module load bokeh'",
    flags=(*STARTED_ONCE, *BATCH, *LOGIN_ONCE, *OUTPUT),
)
def doctor(host: Target, **keywords: Any) -> Asked:
    """Check everything on the way to a server on HOST, and say what to do about what does not work.

    Logs in, tries what a tunnel would do, starts a server for a moment. Exit code 1 if a tunnel cannot work.
    With --batch, asks the scheduler there about a job as it would be submitted, and submits none.
    """
    return Asked(host, keywords)


@_command("demo", flags=(*DEMO, *LOGGED))
def demo(
    no_show: Annotated[bool, _switch("--no-show", text="Only print the address.")] = False, **keywords: Any
) -> Asked:
    """Try it without another machine: an SSH server on this one, a Bokeh app on it, and a tunnel to that."""
    return Asked(None, keywords, show=not no_show)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 well, 1 failed, 2 misused, 130 interrupted before it was open.

    :param argv: the words after the program's name; None takes this program's own
    """
    code: str | int | None = 0
    with standing() as streams, surface(as_flag):
        try:
            _run(list(sys.argv[1:] if argv is None else argv))
        except SystemExit as exc:
            code = exc.code
        try:
            streams.check()
        except KeyboardInterrupt:
            streams.end_soon()
            code = code or 130
        except OutputError as exc:
            code = code or 1
            fault = exc.__cause__
            if not isinstance(fault, BrokenPipeError):  # who has left wants to hear no more
                why = getattr(fault, "strerror", fault)
                print(f"bokeh-ssh: standard output cannot be written to ({why})", file=sys.stderr)
    sys.exit(code)


def _run(words: list[str]) -> None:
    # The parser would mix what follows "--" into the apps; it is for bokeh serve, word for word.
    named = {each.name: each for each in app.registered_commands if each.name}
    words = with_command(words, list(named), lambda word: word in find_aliases())
    asked = app
    if words and words[0] in named:  # typer would prepare all the others and their flags too
        asked = copy.copy(app)
        asked.registered_commands = [named[words[0]]]
    end = words.index("--") if "--" in words else len(words)
    rest = {"obj": {"args": words[end + 1 :], "words": words[:end]}, "prog_name": "bokeh-ssh"}
    if "--json" not in words[:end]:
        asked(args=words[:end], **rest)
    try:
        code = asked(args=words[:end], standalone_mode=False, **rest)
    except Exception as exc:
        say = getattr(exc, "format_message", None)  # typer's own errors, by whatever name it has for them
        if say is None:
            raise
        from bokeh_ssh._cli.json_output import error_fields, record

        print(record("error", **error_fields(UsageError(say(), hint="see --help"), 2)))
        code = 2
    sys.exit(code)
