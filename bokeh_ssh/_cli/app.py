"""The command line: what people type. The only place that prints, prompts or exits, with what it is made of.

A command makes one object of the library and holds it in the foreground; everything else is in its flags.
Nothing of the library that needs paramiko is imported before a command runs.
"""

from __future__ import annotations

import copy
import shlex
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from bokeh_ssh._cli.completion import (
    complete_host,
    complete_machine_or_tunnel,
    complete_server,
    complete_server_or_job,
    find_aliases,
)
from bokeh_ssh._cli.hints import check_order, with_command
from bokeh_ssh._cli.notify_ready import announce as announce_ready
from bokeh_ssh._cli.options.command import ORIGINS, Command, Program, take_batch, takes
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
    OUTPUT,
    QUEUE,
    REMOTE,
    START,
    STARTED_ONCE,
    TUNNEL,
    VISIT,
)
from bokeh_ssh._cli.options.words import as_flag, words_of
from bokeh_ssh._cli.run import (
    add_args,
    announce_urls,
    common,
    do,
    hold,
    other_half,
    set_hints,
    take_no_args,
    visit,
)
from bokeh_ssh._cli.std_streams import OutputError, standing
from bokeh_ssh._cli.user_config import weakens
from bokeh_ssh._core.settings import surface
from bokeh_ssh._version import DOCUMENTATION, __version__

if TYPE_CHECKING:
    from bokeh_ssh._cli.foreground import Foreground
    from bokeh_ssh._tunnels.openable import Openable


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

Target = Annotated[
    str,
    typer.Argument(
        metavar="HOST",
        help="A name, user@host:port, or an alias of the ssh config.",
        autocompletion=complete_host,
    ),
]
Machine = Annotated[
    Optional[str],  # noqa: UP045 - evaluated at run time
    typer.Argument(
        metavar="HOST",
        help="A name, user@host:port, or an alias of the ssh config; '.' is this machine; none: the "
        "tunnels here.",
        show_default=False,
        autocompletion=complete_host,
    ),
]
GatewayTarget = Annotated[
    str,
    typer.Argument(
        metavar="GATEWAY",
        help="A name, user@host:port, or an alias of the ssh config.",
        autocompletion=complete_host,
    ),
]
Apps = Annotated[
    Optional[list[str]],  # noqa: UP045 - evaluated at run time
    typer.Argument(metavar="APP", help="Apps to serve: paths on the Bokeh host.", show_default=False),
]
_SERVER_HELP = "Its id, app or route, as `ls` shows them; none: the only one."
ServerName = Annotated[
    Optional[str],  # noqa: UP045 - evaluated at run time
    typer.Argument(metavar="NAME", help=_SERVER_HELP, show_default=False, autocompletion=complete_server),
]
Show = Annotated[bool, typer.Option("--show", metavar="", help="Open it in the browser.")]
Verbose = Annotated[
    int,
    typer.Option(
        "--verbose",
        "-v",
        count=True,
        metavar="",
        help="Log what happens; -vv logs everything.",
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


@app.command(
    cls=Command,
    epilog=_examples(
        "direct me@host dashboard.py --show",
        "direct me@host ./app.py --upload --dev --setup 'conda activate viz'",
        "direct me@host app.py --command 'panel serve' -- --args --year 2024",
    ),
)
@takes(*TUNNEL, *BATCH, *QUEUE, *JOB, *LOGIN, *LOGGED, *HELD)
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
    add_args(context, keywords, needs_app=not apps)

    def make(foreground: Foreground) -> Openable:
        from bokeh_ssh._tunnels.direct import DirectTunnel

        check_order(host)
        take_batch(keywords)
        return DirectTunnel(host, app=apps or None, **common(foreground), **keywords)

    hold(
        make,
        announce_urls(show, host),
        verbose,
        keywords,
        apps or (),
        command="direct",
        plan=lambda: ("direct", host, {"app": apps}),
    )


@app.command(cls=Command, epilog=_examples("attach me@host", "attach me@host dashboard --show"))
@takes(*ATTACH, *LOGIN, *LOGGED, *HELD)
def attach(
    context: typer.Context,
    host: Target,
    name: ServerName = None,
    show: Show = False,
    verbose: Verbose = 0,
    **keywords: Any,
) -> None:
    """Open a server of yours that runs on HOST: a detached one, or one that waits for its client to return.

    At the end a detached server keeps running; another one ends, as if this command had started it.
    """
    take_no_args(context)

    def make(foreground: Foreground) -> Openable:
        from bokeh_ssh._tunnels.direct import DirectTunnel

        return DirectTunnel(host, server=name or "*", **common(foreground), **keywords)

    hold(
        make,
        announce_urls(show, host),
        verbose,
        keywords,
        command="attach",
        plan=lambda: ("attach", host, {}),
    )


@app.command(
    cls=Command, epilog=_examples("gateway me@gateway", "gateway me@login.cluster dashboard.py --host node17")
)
@takes(*GATEWAY, *TUNNEL, *LOGIN, *LOGGED, *HELD)
def gateway(
    context: typer.Context,
    gateway: GatewayTarget,
    apps: Apps = None,
    show: Show = False,
    verbose: Verbose = 0,
    **keywords: Any,
) -> None:
    """Open a Bokeh server through a port of GATEWAY; without --host, a server that was published there.

    Like `ssh -NR 5006:localhost:5006 GATEWAY` on the Bokeh host and `ssh -NL ...` to it here.
    """
    add_args(context, keywords, needs_app=not apps)

    def make(foreground: Foreground) -> Openable:
        from bokeh_ssh._tunnels.gateway import GatewayTunnel

        return GatewayTunnel(gateway, app=apps or None, **common(foreground), **keywords)

    def announce(foreground: Foreground, tunnel: Any) -> None:
        announce_urls(show)(foreground, tunnel)
        from bokeh_ssh._ssh.route import find_hop, goes_its_own_way
        from bokeh_ssh._tunnels.gateway import bokeh_host_of

        bokeh_host = bokeh_host_of(tunnel)
        if bokeh_host and tunnel.server and tunnel.detached:
            host = keywords["host"]
            more = (
                f" --name {tunnel.name}"
                if tunnel.name
                else f" --host {shlex.quote(host)} --server {tunnel.server}"
            )
            through = shlex.quote(gateway)
            way = "" if goes_its_own_way(bokeh_host) else f" -J {through}"
            user = "" if "@" in host else f"{find_hop(bokeh_host).user}@"  # the gateway's, by default
            there = shlex.quote(f"{user}{host}")
            foreground.display.hint(f"Again: bokeh-ssh gateway {through}{more}")
            foreground.display.hint(f"For good: bokeh-ssh stop {there}{way} {tunnel.server}")

    hold(
        make,
        announce,
        verbose,
        keywords,
        apps or (),
        command="gateway",
        plan=lambda: ("gateway", gateway, {"app": apps}),
    )


@app.command(cls=Command, epilog=_examples("up", "up big --show"))
@takes(*GATEWAY, *TUNNEL, *LOGIN, *LOGGED, *HELD)
def up(
    context: typer.Context,
    which: Annotated[
        Optional[str],  # noqa: UP045 - evaluated at run time
        typer.Argument(metavar="NAME", help="One of several in the file.", show_default=False),
    ] = None,
    show: Show = False,
    verbose: Verbose = 0,
    defaults: Any = None,
    **keywords: Any,
) -> None:
    r"""Open the app of this project, as pyproject.toml (\[tool.bokeh-ssh]) or bokeh-ssh.toml says.

    Options override the file.
    """
    add_args(context, keywords)
    wanted = [show]
    made: list[Any] = []

    def make(foreground: Foreground) -> Openable:
        from bokeh_ssh._cli.project_config import load
        from bokeh_ssh._tunnels.direct import DirectTunnel
        from bokeh_ssh._tunnels.gateway import GatewayTunnel

        # Not what weakens a check: the project says which machines that is for.
        own = {name: value for name, value in defaults.items() if not weakens(name, value)}
        settings = load(which, typed=keywords, defaults=own)
        foreground.display.note(f"As {settings.path} says")
        of_project = {*settings.keywords} - keywords.keys()
        foreground.display.wording = words_of(of_project)
        for name in of_project:
            ORIGINS.pop(name, None)
        every = {**own, **settings.keywords, **common(foreground), **keywords}
        wanted[0] = bool(every.pop("show", False)) or show
        gateway, apps = every.pop("gateway", None), every.get("app") or ()
        set_hints(foreground, [apps] if isinstance(apps, str) else list(apps), every)
        made[:] = ["direct" if gateway is None else "gateway", gateway or every["host"], dict(every)]
        if gateway is None:
            return DirectTunnel(every.pop("host"), **every)
        return GatewayTunnel(gateway, **every)

    def announce(foreground: Foreground, tunnel: Any) -> None:
        announce_urls(wanted[0])(foreground, tunnel)

    hold(make, announce, verbose, keywords, command="up", plan=lambda: (made[0], made[1], made[2]))


@app.command(
    cls=Command,
    epilog=_examples(
        "publish dashboard.py --gateway me@gateway",
        "publish --gateway me@gateway --name dashboard --background",
    ),
)
@takes(*REMOTE, *START, *LOGIN, *LOGGED, *HELD)
def publish(
    context: typer.Context,
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
    """On the Bokeh host: serve APP, or use a running server, and publish it on a gateway.

    Like `bokeh serve APP` and `ssh -NR 5006:localhost:5006 GATEWAY`.
    """
    add_args(context, keywords, needs_app=not apps)

    def make(foreground: Foreground) -> Openable:
        from bokeh_ssh._tunnels.publication import Publication

        return Publication(gateway, app=apps or (), **common(foreground), **keywords)

    def announce(foreground: Foreground, publication: Any) -> None:
        where = publication.remote_socket or publication.remote_port
        announce_ready(where, routes=publication.routes)
        foreground.display.addresses(foreground.display.ready)
        foreground.display.hint(f"Open it on your own machine with: {other_half(gateway, where)}")

    hold(
        make,
        announce,
        verbose,
        keywords,
        apps or (),
        command="publish",
        plan=lambda: ("publish", gateway, {"app": apps}),
    )


@app.command(
    cls=Command,
    epilog=_examples("forward me@host -L 8888:localhost:8888", "forward me@host --remote-port 8888"),
)
@takes(*FORWARD, *EXPOSED, *LOGIN, *OUTPUT, *HELD)
def forward(
    context: typer.Context,
    host: Target,
    local: Annotated[
        Optional[list[str]],  # noqa: UP045 - evaluated at run time
        typer.Option("-L", metavar="SPEC", help="A local forward as for ssh: [BIND:]PORT:HOST:HOSTPORT."),
    ] = None,
    remote: Annotated[
        Optional[list[str]],  # noqa: UP045 - evaluated at run time
        typer.Option("-R", metavar="SPEC", help="A remote forward, likewise."),
    ] = None,
    verbose: Verbose = 0,
    **keywords: Any,
) -> None:
    """Forward one port, Bokeh's or not: give --remote-port, or -L or -R as for ssh.

    Like `ssh -N -L` and `ssh -N -R`.
    """
    take_no_args(context)

    def make(foreground: Foreground) -> Openable:
        from bokeh_ssh._cli.forward import make_forward

        return make_forward(host, local or (), remote or (), keywords | common(foreground))

    def announce(foreground: Foreground, _: Any) -> None:
        foreground.display.addresses(foreground.display.ready)

    specs = {"-L": local[0] if local else None, "-R": remote[0] if remote else None}
    hold(make, announce, verbose, keywords, command="forward", plan=lambda: ("forward", host, specs))


@app.command("ls", cls=Command, epilog=_examples("ls", "ls me@host", "ls ."))
@takes(*VISIT, *OUTPUT)
def list_(context: typer.Context, host: Machine = None, verbose: Verbose = 0, **keywords: Any) -> None:
    """List your servers on HOST, in use, detached, or waiting; without HOST, the tunnels of this machine.

    Like `ps` there, for the servers that bokeh-ssh has started.
    """
    take_no_args(context)

    def look(foreground: Foreground) -> None:
        if host is None:
            from bokeh_ssh._cli.tunnels.registry import find_tunnels

            foreground.display.tunnels(find_tunnels())
            return
        from bokeh_ssh._cli.servers import find

        servers, jobs = find(host, **visit(foreground, keywords))
        if servers or not jobs:
            foreground.display.servers(servers)
        if jobs:
            foreground.display.jobs(jobs)

    do(look, verbose, keywords)


@app.command(cls=Command, epilog=_examples("stop 5006", "stop me@host dashboard"))
@takes(*VISIT, *OUTPUT)
def stop(
    context: typer.Context,
    host: Annotated[
        Optional[str],  # noqa: UP045 - evaluated at run time
        typer.Argument(
            metavar="HOST | TUNNEL",
            help="A machine, '.' for this one; or a tunnel of this machine: its port, address, process id or "
            "app; none: the only tunnel.",
            show_default=False,
            autocompletion=complete_machine_or_tunnel,
        ),
    ] = None,
    name: Annotated[
        Optional[str],  # noqa: UP045 - evaluated at run time
        typer.Argument(
            metavar="NAME",
            help="Its id, app or route, or a job's name or number, as `ls` shows them; none: the only one.",
            show_default=False,
            autocompletion=complete_server_or_job,
        ),
    ] = None,
    verbose: Verbose = 0,
    **keywords: Any,
) -> None:
    """End a tunnel of this machine; or one of your servers on HOST, with all that it started; or a job."""
    take_no_args(context)

    def end_it(foreground: Foreground) -> None:
        from bokeh_ssh._cli.servers import end
        from bokeh_ssh._cli.tunnels.registry import ended_here
        from bokeh_ssh._core.errors import ResolveError
        from bokeh_ssh._jobs.job import ListedJob

        tunnel = ended_here(host) if name is None else None
        if tunnel:
            foreground.display.ended_tunnel(tunnel)
            return
        assert host is not None
        try:
            ended = end(host, name, **visit(foreground, keywords))
        except ResolveError as error:
            if name is None:
                error.advise(f"{error.sentences[1]}; no tunnel of this machine is named {host} either")
            raise
        if isinstance(ended, ListedJob):
            foreground.display.cancelled(ended)
        else:
            foreground.display.ended(ended)

    do(end_it, verbose, keywords)


@app.command(cls=Command, epilog=_examples("status", "status 5006 --watch"))
@takes(*OUTPUT)
def status(
    context: typer.Context,
    name: Annotated[
        Optional[str],  # noqa: UP045 - evaluated at run time
        typer.Argument(
            metavar="TUNNEL",
            help="Its port, address, process id or app, or a HOST for all to that; none: all.",
            show_default=False,
            autocompletion=complete_machine_or_tunnel,
        ),
    ] = None,
    watch: Annotated[
        bool, typer.Option("--watch", "-w", metavar="", help="Show it again every second, until Ctrl-C.")
    ] = False,
    verbose: Verbose = 0,
    **keywords: Any,
) -> None:
    """Show the tunnels of this machine: each machine on the route with its round trip, and the traffic.

    Also how long each has been open, and how often it has reconnected.
    """
    take_no_args(context)

    def look(foreground: Foreground) -> None:
        from bokeh_ssh._cli.tunnels.registry import find_named

        foreground.display.statuses(lambda: find_named(name), watch=watch, check=foreground.check)

    do(look, verbose, keywords)


@app.command(cls=Command, epilog=_examples("cache", "cache --clear"))
@takes(*OUTPUT)
def cache(
    context: typer.Context,
    clear: Annotated[bool, typer.Option("--clear", metavar="", help="Remove them.")] = False,
    verbose: Verbose = 0,
    **keywords: Any,
) -> None:
    """Show where static files of servers are kept on this machine, their number and their size."""
    take_no_args(context)

    def look(foreground: Foreground) -> None:
        from bokeh_ssh._cli.cache import examine

        foreground.display.cache(examine(clear=clear))

    do(look, verbose, keywords)


@app.command(
    cls=Command,
    epilog=_examples(
        "doctor me@host", "doctor me@node17 --jump me@login.cluster --setup 'module load bokeh'"
    ),
)
@takes(*STARTED_ONCE, *BATCH, *(flag for flag in LOGIN if flag.keyword != "reconnect"), *OUTPUT)
def doctor(context: typer.Context, host: Target, verbose: Verbose = 0, **keywords: Any) -> None:
    """Check everything on the way to a server on HOST, and say what to do about what does not work.

    Logs in, tries what a tunnel would do, starts a server for a moment. Exit code 1 if a tunnel cannot work.
    With --batch, asks the scheduler there about a job as it would be submitted, and submits none.
    """
    add_args(context, keywords)

    def look(foreground: Foreground) -> int:
        from bokeh_ssh._cli.doctor import examine
        from bokeh_ssh._core.host import Host
        from bokeh_ssh._server.options import ServerOptions

        check_order(host)
        start = {flag.keyword for flag in STARTED_ONCE} & keywords.keys()
        serve = ServerOptions(launch=True, **{name: keywords.pop(name) for name in start})
        take_batch(keywords)
        batch = keywords.pop("batch", None)
        code = 0
        for finding in examine(
            Host(host, **keywords, prompt=foreground.prompt), serve, foreground.display.begin, batch
        ):
            foreground.display.finding(finding)
            foreground.check()
            code = 1 if finding.verdict == "bad" else code
        return code

    do(look, verbose, keywords)


@app.command(cls=Command)
@takes(*DEMO, *LOGGED)
def demo(
    context: typer.Context,
    no_show: Annotated[bool, typer.Option("--no-show", metavar="", help="Only print the address.")] = False,
    verbose: Verbose = 0,
    **keywords: Any,
) -> None:
    """Try it without another machine: an SSH server on this one, a Bokeh app on it, and a tunnel to that."""
    take_no_args(context)

    def make(foreground: Foreground) -> Openable:
        from bokeh_ssh._demo.demo import APP, demo_machine
        from bokeh_ssh._tunnels.direct import DirectTunnel

        host = foreground.stack.enter_context(demo_machine())
        foreground.display.note(
            f"An SSH server listens on 127.0.0.1, port {host.port}, with keys made for this demo"
        )
        shared = common(foreground)
        shared.pop("prompt")  # its login never asks
        # Its machine ends with this process: then nobody can come back.
        return DirectTunnel(host, app=APP, python=sys.executable, grace=2, cache=False, **shared, **keywords)

    hold(make, announce_urls(not no_show), verbose, keywords, command="demo")


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
    named = {each.name or each.callback.__name__: each for each in app.registered_commands if each.callback}
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
        from bokeh_ssh._cli.json_output import record

        fields: dict[str, Any] = {
            "type": "UsageError",
            "stage": "use",
            "host": None,
            "setting": None,
            "hint": "see --help",
            "log": [],
        }
        print(record("error", **fields, message=say(), exit_code=2))
        code = 2
    sys.exit(code)
