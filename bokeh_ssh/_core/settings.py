"""Settings that sentences name: Python words them as keywords, the command line as flags, a project as TOML.

A sentence is made with :func:`setting` where it names one. So whoever shows it has the name as data, and no
pattern guesses at words.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

#: What marks one in a sentence: characters for private use. A text of others that has them is worded too, at
#: worst: nothing is done with what it names.
_BEGIN, _END = "\ue000", "\ue001"
#: What stands before a value that was given, which is shown as Python writes it.
_GIVEN = "\ue002"
_MARKED = re.compile(f"{_BEGIN}([a-z_]+)(?:=([^{_END}]*))?{_END}")

#: Words a setting: its name; its value, empty where only the name with "=" is meant, None without that.
Wording = Callable[[str, "str | None"], str]


def setting(words: str) -> str:
    """Mark a setting in a sentence: ``name``, ``name=`` or ``name=value``; texts stand without quotes."""
    return f"{_BEGIN}{words}{_END}"


def set_to(name: str, value: object) -> str:
    """Mark a setting in a sentence with the value that it was given, which is shown as Python writes it.

    >>> [word(set_to("port", "a"), wording) for wording in (as_keyword, as_toml, lambda *_: "--port")]
    ["port='a'", "port = 'a'", "--port 'a'"]
    """
    return setting(f"{name}={_GIVEN}{value!r}")


def as_keyword(name: str, value: str | None) -> str:
    """Word it as in Python.

    >>> as_keyword("launch", "True"), as_keyword("reverse", "relay"), as_keyword("jump", "")
    ('launch=True', 'reverse="relay"', 'jump=')
    """
    if value is None:
        return name
    plain = value in ("", "True", "False", "None", "()")
    return f"{name}={value}" if plain else f'{name}="{value}"'


def as_toml(name: str, value: str | None) -> str:
    """Word it as in a project's file.

    >>> as_toml("launch", "True"), as_toml("reverse", "relay"), as_toml("jump", "")
    ('launch = true', 'reverse = "relay"', 'jump')
    """
    if not value:
        return name
    return f"{name} = {value.lower()}" if value in ("True", "False") else f'{name} = "{value}"'


def word(text: str, wording: Wording) -> str:
    """Return a sentence in which all settings are worded so.

    >>> word(f"start one with {setting('launch=True')}", as_toml)
    'start one with launch = true'
    """
    return _MARKED.sub(lambda found: _word_one(found[1], found[2], wording), text)


_surface: Wording = as_keyword


@contextmanager
def surface(wording: Wording) -> Iterator[None]:
    """Word settings so in what this process shows beside errors: the pages that it answers with, warnings.

    An error keeps the setting as data instead, since it may be shown by another program.
    """
    global _surface
    before, _surface = _surface, wording
    try:
        yield
    finally:
        _surface = before


def shown(text: str) -> str:
    """Return a sentence as this process words it.

    >>> shown(f"give {setting('jump')}")
    'give jump'
    """
    return word(text, _surface)


def _word_one(name: str, value: str | None, wording: Wording) -> str:
    if value is None or not value.startswith(_GIVEN):
        return wording(name, value)
    head = wording(name, "")
    between = "" if head.endswith("=") else " = " if head == name else " "
    return f"{head}{between}{value[1:]}"


def first_setting(*texts: str) -> str | None:
    """Return the name of the first setting that is named in these."""
    found = _MARKED.search("\n".join(texts))
    return found[1] if found else None
