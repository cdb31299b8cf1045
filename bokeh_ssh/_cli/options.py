"""The flags of the command line, in a table: each is a keyword of the classes, and says so.

What is typed for a keyword, and what it is by default, is read off the records of the keywords. The classes
themselves are not imported: they bring paramiko, which ``--help`` need not wait for.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import os
import shlex
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import typer
from typer.core import TyperArgument, TyperCommand, TyperGroup, TyperOption

from bokeh_ssh._cli.completion import complete_host, complete_job
from bokeh_ssh._cli.hints import explain_option, nearest
from bokeh_ssh._cli.user_config import PREFIX, merge, path_of_config, read_config, read_environment
from bokeh_ssh._core.errors import UsageError
from bokeh_ssh._core.settings import Wording, as_keyword, as_toml
from bokeh_ssh._jobs.batch import TYPES as BATCH_TYPES
from bokeh_ssh._jobs.batch import Batch
from bokeh_ssh._tunnels.options import (
    DirectOptions,
    GatewayOptions,
    LocalForwardOptions,
    RemoteForwardOptions,
)


def _typed_as(kind: Any) -> Any:
    """Return what is typed for a keyword of that type.

    >>> _typed_as(int | None), _typed_as(str | Sequence[str])
    (<class 'int'>, list[str])
    """
    members = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    if any(get_origin(each) in (Sequence, Mapping) for each in members):
        return list[str]
    return str if str in members else members[0]


_RECORDS = (RemoteForwardOptions, LocalForwardOptions, GatewayOptions, DirectOptions)
_TYPES = BATCH_TYPES | {name: kind for record in _RECORDS for name, kind in get_type_hints(record).items()}
#: What is typed for each keyword; list[str] can be repeated, bool has no value.
KINDS = {name: _typed_as(kind) for name, kind in _TYPES.items()}
KINDS |= {"command": str, "known_hosts": str, "batch": bool}  # one text, though Python takes several


#: Where settings of this command come from that were not typed: variables, and the person's file.
ORIGINS: dict[str, str] = {}


def _read(kind: Callable[[str], Any], what: str) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        try:
            return kind(text)
        except ValueError:
            msg = f"{text!r} is not {what}"
            raise typer.BadParameter(msg) from None

    return read


#: How numbers are read; typer's own words do not say what was typed.
_NUMBERS: dict[Any, Callable[[str], Any]] = {
    int: _read(int, "a whole number"),
    float: _read(float, "a number"),
}


@dataclass(frozen=True)
class Flag:
    """One keyword of a class as a flag.

    :param keyword: its name there; with dashes it is the flag's
    :param metavar: what stands for its value in the help
    :param help: what it does; {default} in it is the keyword's, in a tunnel
    :param also: a second name, such as ``-p``
    :param name: the name, if it is not the keyword's
    :param convert: makes the keyword's value of what was typed; not called where nothing was. None takes it
        as it is, and a list as a tuple
    :param default: what counts as typed where nothing was
    :param panel: the heading that it stands under
    :param first: whether ``--help`` shows it; ``--help-all`` shows all
    :param complete: lists what a half-typed value can become, for a shell
    """

    keyword: str
    metavar: str
    help: str
    _: dataclasses.KW_ONLY
    also: str = ""
    name: str = ""
    convert: Callable[[Any], Any] | None = None
    default: Any = None
    panel: str = ""
    first: bool = False
    complete: Callable[..., list[str]] | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """How it can be written, the usual way first."""
        return (self.name or "--" + self.keyword.replace("_", "-"), *self.also.split())

    @property
    def kind(self) -> Any:
        """The type of what is typed; what no tunnel takes has no value."""
        return KINDS.get(self.keyword, bool)

    def value(self, typed: Any) -> Any:
        """Return the keyword's value for what was typed."""
        if self.convert:
            return self.convert(typed)
        return tuple(typed) if isinstance(typed, list) else typed

    @property
    def parameter(self) -> inspect.Parameter:
        """It as a parameter of a function, as typer wants it: None where it was not typed."""
        default = getattr(GatewayOptions, self.keyword, None)
        option = typer.Option(
            *self.names,
            help=self.help.replace(
                "{default}", f"{default:g}" if isinstance(default, float) else str(default)
            ),
            rich_help_panel=None if self.first else self.panel,
            # A shell that completes a word gets all of them.
            hidden=not self.first and "_BOKEH_SSH_COMPLETE" not in os.environ,
            metavar=self.metavar,
            show_default=False,
            autocompletion=self.complete,
            parser=_NUMBERS.get(self.kind),
        )
        return inspect.Parameter(
            self.keyword,
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[self.kind | None, option],
        )


def under(panel: str, *flags: Flag) -> tuple[Flag, ...]:
    """Put flags under a heading."""
    return tuple(dataclasses.replace(flag, panel=panel) for flag in flags)


def takes(*flags: Flag) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add these flags to a command; it gets those that were typed, as keywords of the class."""
    table = {flag.keyword: flag for flag in flags}

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def command(**typed: Any) -> None:
            typed.pop("help_all", None)
            keywords, rest = {}, {}
            for name, value in typed.items():
                if name not in table:
                    rest[name] = value
                elif value is not None and value != []:
                    keywords[name] = table[name].value(value)
            try:
                keywords, own = _with_defaults(keywords, function.__name__.rstrip("_"), table)
            except UsageError as exc:
                raise typer.BadParameter("; ".join(exc.in_words(as_flag))) from exc
            if "defaults" in parameters_of:
                rest["defaults"] = own
            else:
                keywords = own | keywords
            for flag in flags:
                if flag.default is not None:
                    keywords.setdefault(flag.keyword, flag.default)
            function(**rest, **keywords)

        parameters_of = inspect.signature(function, eval_str=True).parameters
        parameters = [
            parameter
            for parameter in parameters_of.values()
            if parameter.kind is not parameter.VAR_KEYWORD and parameter.name != "defaults"
        ]
        parameters += [flag.parameter for flag in flags]
        if not all(flag.first for flag in flags):
            parameters.append(_help_all(table))
        # Both are read by typer, some versions the one, some the other.
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # any callable has one
        command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return command

    return decorate


def _with_defaults(
    typed: dict[str, Any], command: str, table: Mapping[str, Flag]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Add what the environment says to what was typed; return also what the person's own file says.

    :raises UsageError: if either says what cannot be
    """
    one = command in ("forward", "publish")  # what is forwarded there is typed each time
    kinds = {name: flag.kind for name, flag in table.items() if not (one and flag.panel == "Ports")}
    known = dict.fromkeys(EVERY_KEYWORD, bool) | {
        name: KINDS[name] for name in EVERY_KEYWORD if name in KINDS
    }
    convert = {name: flag.convert for name, flag in table.items()}
    environment = read_environment(kinds, known)
    file = read_config(command, kinds, known, COMMANDS)
    batch = typed.get("batch") or environment.get("batch") or file.get("batch") or typed.get("job")
    for defaults in (environment, file):
        only = JOB_ONLY | ({"name"} if "account" in table else set())
        for name in () if batch else only & defaults.keys():
            del defaults[name]
    ORIGINS.clear()
    ORIGINS.update(dict.fromkeys(file, str(path_of_config())))
    ORIGINS.update((name, f"{PREFIX}{name.upper()}") for name in environment)
    for name in typed:
        ORIGINS.pop(name, None)
    return merge(typed, environment, convert), merge({}, file, convert)


def _help_all(flags: Mapping[str, Flag]) -> inspect.Parameter:
    """Make ``--help-all``, which shows the flags that ``--help`` leaves out, each under its heading."""

    def show(context: typer.Context, wanted: bool) -> None:
        if not wanted:
            return
        for parameter in context.command.params:
            flag = flags.get(parameter.name or "")
            if flag and isinstance(parameter, TyperOption):
                parameter.hidden = False
                parameter.rich_help_panel = flag.panel
        typer.echo(context.get_help())
        raise typer.Exit

    option = typer.Option(
        "--help-all", metavar="", help="Show all options and exit.", is_eager=True, callback=show
    )
    annotation = Annotated[bool, option]
    return inspect.Parameter("help_all", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=annotation)


class Command(TyperCommand):
    """A command whose help names no types of Python's: they say nothing that the help does not."""

    def __init__(self, *args: Any, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        for parameter in self.params:
            if isinstance(parameter, TyperArgument):
                parameter.display_type_rich = lambda ctx: None  # type: ignore[method-assign]  # no option for it
                kind: Any = copy.copy(getattr(parameter, "type", None))
                if kind:  # typer before 0.29 asks this instead
                    kind.get_metavar = lambda *_, **__: ""
                    vars(parameter)["type"] = kind

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the words; say of an unknown option where one of the server's goes."""
        try:
            return super().parse_args(ctx, args)
        except Exception as exc:
            wrong: Any = exc  # typer's own, which has no public name
            if hasattr(wrong, "message"):
                wrong.message = wrong.message.removeprefix("Value error, ")  # typer 0.29's, of a choice
            name = getattr(exc, "option_name", None)
            if name in ("--batch", "--job") and self.name == "gateway":
                wrong.possibilities = []
                wrong.message += (
                    ". A job is submitted from its login node: bokeh-ssh direct --batch -J GATEWAY"
                )
                raise
            if self.name == "forward" and "unexpected extra argument" in str(wrong):
                wrong.message += ". The port to forward is --remote-port, or written with -L as for ssh."
            if name and str(wrong).startswith("No such option"):
                server = "args" in {each.name for each in self.params}
                if habit := explain_option(name):
                    wrong.message += f". {habit}"
                    wrong.possibilities = []
                    raise
                meant = nearest(name, wrong.possibilities or ())
                wrong.possibilities = [meant] if meant else []
                if server and not meant:
                    ssh = "" if name.startswith("--") else "; one of ssh into ~/.ssh/config"
                    wrong.message += f". An option of the server goes after --: -- {name}{ssh}"
            raise

    def get_help_option(self, ctx: Any) -> TyperOption | None:
        """Return ``--help``."""
        option = super().get_help_option(ctx)
        if option:
            option.metavar = ""
        return option


class Program(TyperGroup):
    """All commands, with a help that likewise names no types."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Return its options, also those that typer adds."""
        parameters = super().get_params(ctx)
        for parameter in parameters:
            if isinstance(parameter, TyperOption):
                parameter.metavar = ""
        return parameters

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Take the name of a shell after --show-completion and --install-completion; typer ignores it."""
        option, _, shell = "=".join(args[:2]).partition("=")
        for parameter in self.get_params(ctx) if shell else ():
            if option in ("--show-completion", "--install-completion") and option in parameter.opts:
                parameter.callback(ctx, parameter, shell)
        return super().parse_args(ctx, args)


def take_batch(keywords: dict[str, Any]) -> None:
    """Put what was typed of a batch job together, as ``batch``.

    :raises UsageError: if something of it was typed without ``--batch``, or cannot be
    """
    asked = keywords.pop("batch", False)
    given = {flag.keyword: keywords.pop(flag.keyword) for flag in BATCH if flag.keyword in keywords}
    if given and not asked:
        flag = next(flag for flag in BATCH if flag.keyword in given)
        msg = f"{flag.names[0]} is for a batch job"
        raise UsageError(msg, hint="add --batch, or leave it out")
    if asked:
        keywords["batch"] = Batch(**given)


def _environment(pairs: Sequence[str]) -> dict[str, str]:
    """Read ``NAME=VALUE`` words; a NAME alone has its value here, so that no secret need be typed."""
    found = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            if name not in os.environ:
                msg = f"{name} is not set here; write NAME=VALUE"
                raise typer.BadParameter(msg, param_hint="'--env'")
            value = os.environ[name]
        found[name] = value
    return found


def _jump(targets: Sequence[str]) -> tuple[str, ...]:
    names = [name.strip() for target in targets for name in target.split(",")]
    return () if names == ["none"] else tuple(names)


def _path(path: str) -> str | None:
    return None if path == "none" else path


def _no(_: bool) -> bool:
    return False


#: How events are printed.
OUTPUT = under(
    "Output",
    Flag("json", "", "Print events as JSON objects, one per line, on standard output.", name="--json"),
    Flag("quiet", "", "Show only the address and problems.", also="-q", name="--quiet"),
)

#: The same, where there is a server.
LOGGED = (
    *OUTPUT,
    *under("Output", Flag("log", "", "Show the server's output.", name="--log", first=True)),
)

#: How a command holds what it opens.
HELD = under(
    "Output",
    Flag(
        "background",
        "",
        "Go to the background once open (ssh -f).",
        also="-f",
        name="--background",
        first=True,
    ),
    Flag("dry_run", "", "Print what would be done, as commands of ssh; connect nowhere.", name="--dry-run"),
)

#: The login keywords that can be typed: secrets are asked for, and never on a command line that ``ps`` shows.
LOGIN = under(
    "Login",
    Flag("user", "NAME", "The login name (ssh -l).", also="-l"),
    Flag("port", "PORT", "The SSH server's port (ssh -p).", also="-p"),
    Flag("key_filename", "FILE", "A private key file; repeat for several (ssh -i).", also="-i", first=True),
    Flag(
        "jump",
        "TARGET",
        "A machine to go through; repeat, or separate with commas; 'none' goes directly (ssh -J).",
        also="-J",
        convert=_jump,
        complete=complete_host,
        first=True,
    ),
    Flag("known_hosts", "FILE", "The file of known host keys."),
    Flag(
        "host_keys",
        "strict|ask|accept-new",
        "How to treat an unknown host key (default: ask).",
        default="ask",
    ),
    Flag(
        "ssh_config",
        "FILE",
        "The ssh config file; 'none' reads none (ssh -F).",
        also="-F",
        convert=_path,
    ),
    Flag("allow_agent", "", "Do not use the SSH agent.", name="--no-allow-agent", convert=_no),
    Flag("look_for_keys", "", "Do not try ~/.ssh/id_*.", name="--no-look-for-keys", convert=_no),
    Flag(
        "gss_auth",
        "",
        "Log in with a Kerberos ticket, or not (default: as your ssh config says).",
        name="--gss-auth/--no-gss-auth",
    ),
    Flag(
        "gss_deleg_creds",
        "",
        "Delegate your Kerberos ticket to the machine, and log in with it (ssh -K).",
        name="--gss-deleg-creds/--no-gss-deleg-creds",
        also="-K/-k",
    ),
    Flag("timeout", "SECONDS", "Time for each stage of connecting (default: 15)."),
    Flag(
        "compression", "", "SSH compression, for slow connections (ssh -C).", also="-C", name="--compression"
    ),
    Flag(
        "reconnect",
        "",
        "End when the connection is lost, in place of reconnecting.",
        name="--no-reconnect",
        convert=_no,
    ),
)

#: The same for what looks at a machine once, and asks a program there.
VISIT = (
    *(flag for flag in LOGIN if flag.keyword != "reconnect"),
    *under(
        "What runs",
        Flag("python", "PATH", "A Python on that machine (default: the first that runs).", first=True),
    ),
)

#: How a server is started, wherever it is.
START = under(
    "What runs",
    Flag(
        "args",
        "OPTION",
        "An option for bokeh serve; repeat, or write all of them after --.",
        also="--arg",
    ),
    Flag(
        "command",
        "WORDS",
        "'bokeh serve', 'panel serve', or any web server with {port} in place of its port.",
    ),
    Flag("python", "PATH", "The Python that has Bokeh (default: the first on the PATH).", first=True),
    Flag("setup", "LINE", "A shell line to run first, such as 'conda activate viz'; repeat.", first=True),
    Flag("cwd", "PATH", "The directory to run in."),
    Flag(
        "env",
        "NAME=VALUE",
        "An environment variable for the server; NAME alone takes its value here; repeat.",
        convert=_environment,
    ),
    Flag(
        "grace",
        "SECONDS",
        "How long the server stays if bokeh-ssh is killed (default: {default}; publish: 60).",
    ),
    Flag("launch_timeout", "SECONDS", "Time for the server to become ready (default: {default})."),
    Flag(
        "extra_origins",
        "HOST:PORT",
        "Another site whose pages may embed the app; repeat.",
        also="--origin",
    ),
)

#: The same for one that is ended at once.
STARTED_ONCE = tuple(flag for flag in START if flag.keyword != "grace")

_LOCAL_PORT = Flag(
    "local_port",
    "PORT",
    "The port on this machine; 0: any free one (default: 5006, or a free one).",
    first=True,
)

_ALLOW_OTHERS = Flag(
    "allow_others",
    "",
    "Let other users of this machine use the local port, as ssh -L does.",
    name="--allow-others",
)

_CACHE = Flag(
    "cache",
    "",
    "Keep no static files on this machine, and use none that are kept (see bokeh-ssh cache).",
    name="--no-cache",
    convert=_no,
)

#: What both tunnels share.
TUNNEL = (
    *under(
        "Ports",
        _LOCAL_PORT,
        Flag(
            "remote_port",
            "PORT",
            "The server's port on that machine (default: any free one; to attach, 5006).",
        ),
        Flag(
            "forwards",
            "[BIND:]PORT:HOST:HOSTPORT[/http]",
            "Another port to forward, as for ssh -L; /http if a web server is there; repeat.",
            also="--forward -L",
        ),
    ),
    *under(
        "What runs",
        Flag(
            "launch",
            "",
            "Always start a server, or only attach to a running one (default: start one for an APP; "
            "without APP, attach, or start one if none answers).",
            name="--launch/--attach",
        ),
    ),
    *START,
    *under(
        "What runs",
        Flag("ready", "PATH", "A page that answers when the server is ready (with --command)."),
        Flag(
            "upload",
            "",
            "Upload APP from this machine: a script or a folder, without files that git ignores.",
            first=True,
        ),
        Flag(
            "bring",
            "PATH",
            "Another file or folder to upload, beside APP; repeat (uploads APP too).",
        ),
        Flag(
            "server",
            "NAME",
            "Take over a running server of yours: its id, app or route as ls shows them; '*': the only one.",
        ),
        Flag("detach", "", "Leave the server running at the end.", first=True),
        Flag(
            "dev",
            "",
            "Restart the server and reload open pages when the app's files change (with --upload, here).",
            first=True,
        ),
        Flag("allow_foreign", "", "Attach to a server of another user.", name="--allow-foreign"),
        _ALLOW_OTHERS,
        _CACHE,
        Flag(
            "allow_any_origin",
            "",
            "Let pages of any site open WebSockets to the server.",
            name="--allow-any-origin",
        ),
        Flag(
            "signed",
            "",
            "Accept only signed sessions, or also those of other users of its machine (default: a private "
            "socket; signed sessions if there is none).",
            name="--signed/--unsigned",
        ),
    ),
)

#: What a DirectTunnel has besides: ``batch``, taken apart.
BATCH = under(
    "In a batch job",
    Flag(
        "batch",
        "",
        "Run the server in a batch job of the cluster with login node HOST (Slurm, PBS, LSF, Grid Engine).",
        first=True,
    ),
    Flag("time", "LIMIT", "The job's time limit, as the scheduler writes it: 2:00:00 (LSF: 2:00)."),
    Flag("queue", "NAME", "The queue (Slurm: partition)."),
    Flag("account", "NAME", "The account or project that pays."),
    Flag("cpus", "N", "CPUs of the job."),
    Flag("memory", "SIZE", "Memory of the job, such as 32G."),
    Flag("gpus", "N", "GPUs of the job."),
    Flag("name", "NAME", "The job's name in the queue (default: the app's).", name="--job-name"),
    Flag("extra", "OPTION", "One more option of the submit command; repeat.", name="--batch-arg"),
    Flag("scheduler", "NAME", "slurm, pbs, lsf or sge (default: the one that is there)."),
    Flag("way", "WAY", "How to get from HOST to the job: srun, tcp or back (default: what leads there)."),
)

#: What goes with it, and is the tunnel's own.
QUEUE = under(
    "In a batch job",
    Flag("queue_timeout", "SECONDS", "How long the job may wait (default: as long as it takes)."),
    Flag(
        "resubmit",
        "",
        "Submit a new job when this one reaches its time limit, or loses its machine.",
        name="--resubmit",
    ),
)

JOB = under(
    "In a batch job",
    Flag(
        "job",
        "ID",
        "Run the server in this job, by number or name, which runs or waits; it stays at the end.",
        complete=complete_job,
    ),
)

#: What opens a server that runs.
ATTACH = (
    *JOB,
    *under("Ports", _LOCAL_PORT, _ALLOW_OTHERS, _CACHE),
    *under(
        "What runs",
        Flag("detach", "", "Leave the server running at the end, from now on.", first=True),
        Flag("python", "PATH", "A Python on that machine (default: the first that runs).", first=True),
        Flag(
            "grace",
            "SECONDS",
            "How long the server stays if bokeh-ssh is killed (default: {default}).",
        ),
    ),
)

_ALLOW_EXPOSED = Flag(
    "allow_exposed",
    "",
    "Accept a gateway that opens the port to its whole network (GatewayPorts yes).",
    name="--allow-exposed",
)

#: What a GatewayTunnel has besides.
GATEWAY = under(
    "Gateway",
    Flag(
        "host",
        "TARGET",
        "The Bokeh host, reached through the gateway; without it, the host publishes by itself.",
        complete=complete_host,
        first=True,
    ),
    Flag(
        "reverse",
        "auto|host|relay",
        "Who opens the gateway's port: the Bokeh host, this machine (relay), or the host if it can "
        "(default: {default}).",
    ),
    Flag("name", "NAME", "The name that it was published under (default: the only one).", first=True),
    Flag("gateway_port", "PORT", "The port on the gateway (default: what is published by name, or 5006)."),
    Flag("gateway_address", "HOST:PORT", "The gateway as the Bokeh host sees it, if that differs."),
    Flag(
        "forward_agent",
        "",
        "Forward your SSH agent to the Bokeh host, for its login to the gateway only (ssh -A).",
        also="-A",
        name="--forward-agent",
    ),
    _ALLOW_EXPOSED,
)

#: What a RemoteForward takes.
REMOTE = under(
    "Ports",
    Flag(
        "name",
        "NAME",
        "Publish it under this name, for your account only (default: the app's name).",
        first=True,
    ),
    Flag(
        "remote_port",
        "PORT",
        "A port on the gateway in place of a name, open to its other users; 0: any free one.",
    ),
    Flag("local_port", "PORT", "The server's port (default: 5006; for an APP, any free one).", first=True),
    Flag("local_host", "HOST", "The machine that the server runs on (default: this one)."),
    Flag("local_socket", "PATH", "The Unix socket that the server listens on."),
    Flag(
        "remote_socket",
        "PATH",
        "A Unix socket on the gateway in place of a port; only you can connect to it.",
    ),
    Flag(
        "bind_address",
        "ADDRESS",
        "The address that the gateway listens on; any but loopback opens it to others.",
    ),
    _ALLOW_EXPOSED,
)

#: What a LocalForward takes.
FORWARD = under(
    "Ports",
    Flag("remote_port", "PORT", "The target's port.", first=True),
    Flag("remote_host", "NAME", "The target, as seen from HOST (default: HOST itself).", first=True),
    Flag("remote_socket", "PATH", "A Unix socket on HOST as the target, in place of a port.", first=True),
    Flag("local_port", "PORT", "The port on this machine (default: any free one).", first=True),
    Flag(
        "local_socket",
        "PATH",
        "A Unix socket on this machine in place of a port; only you can connect to it.",
    ),
    Flag("bind_address", "ADDRESS", "The local address to listen on; any but loopback opens it to others."),
    Flag(
        "allow_others",
        "",
        "Let other users of this machine use the local port, as ssh -L does; or refuse also programs "
        "that close too soon to see whose they are (default: let these in).",
        name="--allow-others/--no-allow-others",
    ),
    Flag(
        "http",
        "",
        "A web server is there: refuse requests of other sites' pages, keep static files on this machine.",
    ),
    _CACHE,
)

#: What ``forward -R`` takes besides.
EXPOSED = under("Ports", _ALLOW_EXPOSED)

#: What the demo takes: its server, app and login are its own.
DEMO = under("Ports", _LOCAL_PORT)

#: Every keyword that some flag is, but what says how a single command runs.
EVERY_KEYWORD = {
    flag.keyword
    for flag in (*LOGGED, *LOGIN, *TUNNEL, *BATCH, *QUEUE, *JOB, *GATEWAY, *REMOTE, *FORWARD, *HELD)
}
#: The commands that have settings.
COMMANDS = frozenset(
    {
        *("direct", "attach", "gateway", "up", "publish", "forward"),
        *("ls", "stop", "status", "doctor", "cache", "demo"),
    }
)
#: What means nothing without a batch job.
JOB_ONLY = {flag.keyword for flag in (*BATCH, *QUEUE)} - {"batch", "name"}

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
