"""Commands that take flags: they are read, filled up with defaults, and shown in the help."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from typer.core import TyperArgument, TyperCommand, TyperGroup, TyperOption

from bokeh_ssh._cli.hints import explain_command, explain_option, nearest
from bokeh_ssh._cli.options.flag import KINDS, Flag
from bokeh_ssh._cli.options.table import APP_ONLY, BATCH, COMMANDS, EVERY_KEYWORD, JOB_ONLY, START_ONLY
from bokeh_ssh._cli.options.words import as_flag
from bokeh_ssh._cli.user_config import PREFIX, path_of_config, read_config, read_environment
from bokeh_ssh._core.errors import UsageError
from bokeh_ssh._jobs.batch import Batch

#: Where settings of this command come from that were not typed: variables, and the person's file.
ORIGINS: dict[str, str] = {}


@dataclass
class Asked:
    """What was typed of a command.

    :ivar target: the machine, or what else the command is about; None where none was named
    :ivar keywords: what was typed, or set elsewhere, by its keyword
    :ivar show: whether to open it in the browser
    :ivar command: the command's name
    """

    target: str | None
    keywords: dict[str, Any]
    show: bool = False
    command: str = ""

    @property
    def apps(self) -> list[str]:
        """The apps that were named."""
        apps = self.keywords.get("app") or ()
        return [apps] if isinstance(apps, str) else list(apps)


def takes(
    function: Callable[..., Asked], name: str, flags: Sequence[Flag], carry_out: Callable[[Asked], None]
) -> Callable[..., None]:
    """Make what typer calls for a command of that name, with these flags besides the function's parameters.

    :param function: gets what was typed, the flags as keywords of the class
    """
    table = {flag.keyword: flag for flag in flags}

    def command(context: typer.Context, verbose: int, help_all: bool = False, **typed: Any) -> None:
        keywords, rest = {}, {}
        for word, value in typed.items():
            if word not in table:
                rest[word] = value
            elif value is not None and value != []:
                keywords[word] = table[word].value(value)
        without_app = "apps" in rest and not rest["apps"]
        try:
            keywords = _with_defaults(keywords, name, table, without_app)
        except UsageError as exc:
            raise typer.BadParameter("; ".join(exc.in_words(as_flag))) from exc
        for flag in flags:
            if flag.default is not None:
                keywords.setdefault(flag.keyword, flag.default)
        _add_args(context.obj["args"], keywords, takes_args="args" in table, without_app=without_app)
        if keywords.get("json") and keywords.get("quiet"):
            msg = "--json and --quiet cannot be given together"
            raise typer.BadParameter(msg, param_hint="'--json'")
        asked = function(**rest, **keywords, verbose=verbose)
        carry_out(dataclasses.replace(asked, command=name))

    own = inspect.signature(function, eval_str=True).parameters.values()
    parameters = [parameter for parameter in own if parameter.kind is not parameter.VAR_KEYWORD]
    parameters += [_CONTEXT, _VERBOSE, *(flag.parameter for flag in flags)]
    if not all(flag.first for flag in flags):
        parameters.append(_help_all(table))
    # Both are read by typer, some versions the one, some the other.
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # any callable has one
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    command.__doc__ = function.__doc__
    return command


def _parameter(name: str, kind: Any, default: Any = inspect.Parameter.empty) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)


_CONTEXT = _parameter("context", typer.Context)
_VERBOSE = _parameter(
    "verbose",
    Annotated[
        int,
        typer.Option(
            "--verbose",
            "-v",
            count=True,
            metavar="",
            help="Log what happens; -vv logs everything.",
            show_default=False,
        ),
    ],
    0,
)


def _add_args(args: Sequence[str], keywords: dict[str, Any], *, takes_args: bool, without_app: bool) -> None:
    """Add what stood after ``--``, which is for the server.

    :param without_app: whether no app was named before that, where one may be
    """
    if not args:
        return
    if not takes_args:
        msg = f"nothing can be given to bokeh serve here: {args[0]}"
        raise typer.BadParameter(msg, param_hint="'--'")
    if without_app and "command" not in keywords and not args[0].startswith("-"):
        msg = f"{args[0]} stands after --, which is for options of bokeh serve; name an app before it"
        raise typer.BadParameter(msg, param_hint="'--'")
    keywords["args"] = (*keywords.get("args", ()), *args)


def _with_defaults(
    typed: dict[str, Any], command: str, table: Mapping[str, Flag], without_app: bool
) -> dict[str, Any]:
    """Add what the environment and the person's own file say to what was typed.

    :raises UsageError: if either says what cannot be
    """
    one = command in ("forward", "publish")  # what is forwarded there is typed each time
    kinds = {name: flag.kind for name, flag in table.items() if not (one and flag.panel == "Ports")}
    known = {name: KINDS.get(name, bool) for name in EVERY_KEYWORD}
    environment = read_environment(kinds, known)
    file = read_config(command, kinds, known, COMMANDS)
    batch = typed.get("batch") or environment.get("batch") or file.get("batch") or typed.get("job")
    useless = set() if batch else JOB_ONLY | ({"name"} if "account" in table else set())
    if without_app:
        useless |= START_ONLY if command == "publish" else APP_ONLY
    if typed.get("launch") is False:
        useless |= {"detach"}
    found = {**file, **environment}
    ORIGINS.clear()
    for name in found.keys() - useless - typed.keys():
        ORIGINS[name] = f"{PREFIX}{name.upper()}" if name in environment else str(path_of_config())
    return typed | {name: table[name].of_default(found[name]) for name in ORIGINS}


def of_own_file(keywords: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of them that are there because the person's own file says so."""
    path = str(path_of_config())
    return {name: value for name, value in keywords.items() if ORIGINS.get(name) == path}


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
    return _parameter("help_all", Annotated[bool, option], False)


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
                if name.removeprefix("--").replace("-", "_") in EVERY_KEYWORD:
                    wrong.possibilities = []
                    wrong.message += f". It is an option of other commands: leave it out of {self.name}"
                elif server and not meant:
                    ssh = "" if name.startswith("--") else "; one of ssh into ~/.ssh/config"
                    wrong.message += f". An option of the server goes after --: -- {name}{ssh}"
            raise

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Return what stands in the usage: a machine is ``HOST``, and not one of a set of words."""
        return [piece.strip("{}") for piece in super().collect_usage_pieces(ctx)]

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

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the command; say of one of other programs how it is called here."""
        try:
            return super().resolve_command(ctx, args)
        except Exception as exc:
            wrong: Any = exc  # typer's own, which has no public name
            if habit := explain_command(args[0]):
                wrong.message = f"No such command {args[0]!r}. {habit}"
            raise


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
