"""What people give for a keyword, made what its annotation says; paths are paths, whatever their type."""

from __future__ import annotations

import collections.abc
import dataclasses
import functools
import os
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import Any, Literal, Union, get_args, get_origin

from bokeh_ssh._core.errors import UsageError
from bokeh_ssh._core.settings import set_to, setting

#: A path here or there: a text, or what has one (``pathlib.Path``).
StrPath = str | os.PathLike[str]
#: A word of a command line, or the value of a variable.
Word = str | os.PathLike[str] | float

#: How a kind is called, and what to give.
_KINDS: dict[Any, tuple[str, str]] = {
    bool: ("True or False", "give one of them"),
    int: ("a port number", "give a number from 1 to 65535"),
    float: ("a time", "give seconds"),
    str: ("a text", "give a text"),
    os.PathLike: ("a path", "give a text or a pathlib.Path"),
}


#: Seconds, more than thirty years: what is more, or infinite, overflows a clock or a socket's timeout.
_MOST_SECONDS = 1e9


class _MismatchError(Exception):
    """A value is none of a kind."""


def convert_keywords(record: Any) -> None:
    """Make each field of a frozen record what its annotation says.

    Paths become texts, and lists tuples; a number among words becomes a text.

    :raises UsageError: for the first that cannot be made that; the text does not have what may be a secret
    """
    hints = _hints(type(record))  # type: ignore[arg-type]  # typeshed: a class is hashable
    for each in dataclasses.fields(record):
        value = getattr(record, each.name)
        try:
            object.__setattr__(record, each.name, _convert(value, hints[each.name]))
        except _MismatchError:
            kind, hint = _name_kind(hints[each.name])
            what = set_to(each.name, value)
            if not each.repr:  # it may be a secret
                what = f"{setting(each.name)} of type {_name_type(value)}"
            msg = f"{what} is not {kind}"
            raise UsageError(msg, hint=hint) from None


def is_time(seconds: object, *, zero: bool = True) -> bool:
    """Return whether these are seconds that can be waited for.

    >>> is_time(1.5), is_time(0), is_time(0, zero=False), is_time(float("inf")), is_time(float("nan"))
    (True, True, False, False, False)

    :param zero: whether no time at all is one
    """
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)):
        return False
    return 0 <= seconds < _MOST_SECONDS and (zero or seconds > 0)


@functools.cache
def _hints(record: type) -> dict[str, Any]:
    return typing.get_type_hints(record)


def _convert(value: Any, hint: Any) -> Any:
    origin, kinds = get_origin(hint) or hint, get_args(hint)
    if origin is Any:
        return value
    if origin in (Union, types.UnionType):
        return _convert_to_any(value, kinds)
    if origin is Literal:
        # As with ==, an enum's member that is a text counts; 1 for True does not.
        found = [
            word for word in kinds if value == word and isinstance(value, bool) == isinstance(word, bool)
        ]
        return _accept(found[0] if found else None, bool(found))
    if origin is os.PathLike:
        return _accept(_path_text(value), isinstance(value, os.PathLike))
    if origin is collections.abc.Callable:
        return _accept(value, callable(value))
    if origin is collections.abc.Mapping:
        _accept(value, isinstance(value, Mapping))
        return {_convert(name, kinds[0]): _convert(item, kinds[1]) for name, item in value.items()}
    if origin is collections.abc.Sequence:
        _accept(value, isinstance(value, Iterable) and not isinstance(value, (str, bytes, Mapping)))
        return tuple(_convert(item, kinds[0]) for item in value)
    if origin in (int, float):
        numbers = (int,) if origin is int else (int, float)
        return _accept(value, isinstance(value, numbers) and not isinstance(value, bool))
    return _accept(value, isinstance(value, origin))


def _convert_to_any(value: Any, kinds: Sequence[Any]) -> Any:
    for kind in kinds:
        try:
            found = _convert(value, kind)
        except _MismatchError:
            continue
        return str(found) if kind is float and str in kinds else found
    raise _MismatchError


def _accept(value: Any, fits: bool) -> Any:
    if not fits:
        raise _MismatchError
    return value


def _path_text(value: Any) -> str:
    # With slashes: a Path of Windows may be one of the other machine.
    text = value.as_posix() if isinstance(value, PurePath) else _accept(value, hasattr(value, "__fspath__"))
    text = os.fspath(text)
    return str(_accept(text, isinstance(text, str)))


def _name_type(value: Any) -> str:
    """Return the type of a value, with those of what it contains.

    >>> _name_type(["a", None]), _name_type({"A": True}), _name_type(5)
    ('list[str, NoneType]', 'dict[str, bool]', 'int')
    """
    items = list(value) if isinstance(value, (list, tuple, dict)) else []
    items += value.values() if isinstance(value, dict) else ()
    names = dict.fromkeys(type(item).__name__ for item in items)
    return type(value).__name__ + (f"[{', '.join(names)}]" if names else "")


def _name_kind(hint: Any) -> tuple[str, str]:
    """Say what a keyword takes, and what to give."""
    kinds = [hint] if get_origin(hint) not in (Union, types.UnionType) else list(get_args(hint))
    words = [word for kind in kinds if get_origin(kind) is Literal for word in get_args(kind)]
    if words:
        known = " or ".join(f'"{word}"' if isinstance(word, str) else str(word) for word in words)
        return f"one of {known}", f"give {known}"
    origins = [get_origin(kind) or kind for kind in kinds]
    several = collections.abc.Sequence in origins
    if collections.abc.Mapping in origins:
        return "a mapping of names and texts", 'give one such as {"NAME": "value"}'
    if collections.abc.Callable in origins:
        return "a function", "give a function that takes one argument"
    path = any(os.PathLike in (get_origin(each), *map(get_origin, get_args(each))) for each in kinds)
    if several and not path and str not in origins:
        return "a list of texts", 'give one such as ["one", "two"]'
    name, hint_text = (
        _KINDS[os.PathLike]
        if path
        else next(
            (_KINDS[kind] for kind in origins if kind in _KINDS), ("what it takes", "see its documentation")
        )
    )
    return name + (", or a list of them" if several else ""), hint_text
