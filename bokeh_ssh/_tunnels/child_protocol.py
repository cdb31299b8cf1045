"""Packing what passes between a program and the child process that holds its SSH side.

Plain data goes as it is; what is of a class derived from a plain one, as that, since the child does not find
the program's own files. What belongs to one process alone is packed: a ``prompt`` becomes a number that the
child sends back with its question, and so does a key, whose private half stays in the program: the child has
it sign. All of it travels over a pipe between the two alone, never as an argument or in the environment.
"""

from __future__ import annotations

import dataclasses
import os
import pickle
import struct
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from bokeh_ssh._core.host import Host, Login

_LENGTH = struct.Struct(">I")
#: Makes it of what is of a class derived from it.
_PLAIN: dict[type, Callable[[Any], Any]] = {str: str.__str__, int: int.__int__, float: float.__float__}


@dataclass(frozen=True)
class PromptNumber:
    """Stands for a ``prompt`` of the parent's."""

    number: int


@dataclass(frozen=True)
class KeyNumber:
    """Stands for a key of the parent's: its public half."""

    number: int
    name: str
    blob: bytes


@dataclass(frozen=True)
class Fields:
    """Stands for a record of keywords; a :class:`Host` by itself is not pickled with a secret in it."""

    kind: type
    fields: dict[str, Any] = field(repr=False)


class Marshaller:
    """Packs arguments, and keeps the prompts and keys that it found in them."""

    def __init__(self) -> None:
        self.prompts: list[Callable[..., Any]] = []
        self.keys: list[Any] = []

    def pack(self, value: Any) -> Any:
        """Make a value fit to be sent."""
        if isinstance(value, (Host, Login)):  # Login: the keywords of a tunnel or forward
            names = [each.name for each in dataclasses.fields(value) if each.name != "on_event"]
            record = Host if isinstance(value, Host) else type(value)
            return Fields(record, {name: self.pack(getattr(value, name)) for name in names})
        if hasattr(value, "sign_ssh_data"):
            self.keys.append(value)
            return KeyNumber(len(self.keys) - 1, value.get_name(), value.asbytes())
        if isinstance(value, os.PathLike):
            return self.pack(os.fspath(value))
        for kind, make in _PLAIN.items():
            if isinstance(value, kind):
                return value if isinstance(value, bool) else make(value)
        if isinstance(value, Mapping):
            return {self.pack(name): self.pack(item) for name, item in value.items()}
        if isinstance(value, (Sequence, Set)) and not isinstance(value, (bytes, bytearray)):
            items = map(self.pack, value)
            return list(items) if isinstance(value, list) else tuple(items)
        if callable(value):
            self.prompts.append(value)
            return PromptNumber(len(self.prompts) - 1)
        return value


def unpack(value: Any, prompt: Callable[[int], Any], key: Callable[[KeyNumber], Any]) -> Any:
    """Undo what :class:`Marshaller` did, in the child.

    :param prompt: makes the callable that stands for a prompt's number
    :param key: makes the key that signs with the parent's
    """

    def undo(value: Any) -> Any:
        if isinstance(value, Fields):
            return value.kind(**{name: undo(item) for name, item in value.fields.items()})
        if isinstance(value, dict):
            return {name: undo(item) for name, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(map(undo, value))
        if isinstance(value, PromptNumber):
            return prompt(value.number)
        return key(value) if isinstance(value, KeyNumber) else value

    return undo(value)


def dump(message: Any) -> bytes:
    """Make the bytes of one message.

    :raises Exception: what pickle says of something that cannot be sent
    """
    data = pickle.dumps(message)
    return _LENGTH.pack(len(data)) + data


def write(stream: BinaryIO, data: bytes) -> None:
    """Write one message, as :func:`dump` made it; blocks while the other side does not read.

    :raises OSError: if the other side is gone
    """
    # Not by way of a buffer: Python aborts if it ends while a thread blocks in one.
    left = memoryview(data)
    while left:
        left = left[os.write(stream.fileno(), left) :]


def read(stream: BinaryIO) -> Any:
    """Read one message; only from a process of ours, since a pickle can do anything.

    :raises EOFError: if the other side is gone
    """
    head = stream.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        raise EOFError
    (length,) = _LENGTH.unpack(head)
    data = stream.read(length)
    if len(data) < length:
        raise EOFError
    return pickle.loads(data)  # noqa: S301  # from our own parent or child
