"""What a flag of the command line is: a keyword of a class, as people type it."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import typer


@dataclass(frozen=True)
class Flag:
    """One keyword of a class as a flag.

    :param keyword: its name there; with dashes it is the flag's
    :param kind: the type of what is typed; list[str] can be repeated, bool has no value
    :param metavar: what stands for its value in the help
    :param help: what it does
    :param also: a second name, such as ``-p``
    :param name: the name, if it is not the keyword's
    :param convert: makes the keyword's value of what was typed; not called where nothing was
    :param default: what counts as typed where nothing was
    :param panel: the heading that it stands under
    :param complete: lists what a half-typed value can become, for a shell
    """

    keyword: str
    kind: Any
    metavar: str
    help: str
    _: dataclasses.KW_ONLY
    also: str = ""
    name: str = ""
    convert: Callable[[Any], Any] = lambda value: value
    default: Any = None
    panel: str = ""
    complete: Callable[[str], list[str]] | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """How it can be written, the usual way first."""
        return (self.name or "--" + self.keyword.replace("_", "-"), *self.also.split())

    @property
    def parameter(self) -> inspect.Parameter:
        """Give it as a parameter of a function, as typer wants it: None where it was not typed."""
        option = typer.Option(
            *self.names,
            help=self.help,
            rich_help_panel=self.panel,
            metavar=self.metavar,
            show_default=False,
            autocompletion=self.complete,
        )
        return inspect.Parameter(
            self.keyword,
            inspect.Parameter.KEYWORD_ONLY,
            default=self.default,
            annotation=Annotated[self.kind | None, option],
        )


def under(panel: str, *flags: Flag) -> tuple[Flag, ...]:
    """Put flags under a heading."""
    return tuple(dataclasses.replace(flag, panel=panel) for flag in flags)


def takes(*flags: Flag) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command these flags; it gets those that were typed, as keywords of the class."""
    table = {flag.keyword: flag for flag in flags}

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def command(**typed: Any) -> None:
            keywords = {}
            for name, value in typed.items():
                if name not in table:
                    keywords[name] = value
                elif value is not None and value != []:
                    keywords[name] = table[name].convert(value)
            function(**keywords)

        own = inspect.signature(function, eval_str=True).parameters.values()
        parameters = [parameter for parameter in own if parameter.kind is not parameter.VAR_KEYWORD]
        parameters += [flag.parameter for flag in flags]
        # Both are read by typer, some versions the one, some the other.
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # any callable has one
        command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return command

    return decorate
