"""One keyword of the classes as a flag: what is typed for it, and what becomes of that.

What is typed for a keyword, and what it is by default, is read off the records of the keywords.
"""

from __future__ import annotations

import dataclasses
import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import typer

from bokeh_ssh._jobs.batch import TYPES as BATCH_TYPES
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

    def of_default(self, value: Any) -> Any:
        """Return the keyword's value for what was set elsewhere; true and false are its own."""
        return value if isinstance(value, (bool, dict)) else self.value(value)

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
