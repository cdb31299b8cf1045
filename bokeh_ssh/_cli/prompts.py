"""The person at the terminal: asked for passwords, codes and unknown host keys, wherever stdin leads."""

from __future__ import annotations

import contextlib
import getpass
import os
import sys
import warnings
from collections.abc import Iterator
from typing import TextIO

from bokeh_ssh._core.events import Prompt, Question
from bokeh_ssh._core.text import clean

_MOST = 2000
_INPUT, _OUTPUT = ("CONIN$", "CONOUT$") if sys.platform == "win32" else ("/dev/tty", "/dev/tty")


def find_prompt() -> Prompt | None:
    """Return what asks the person at the terminal; None where there is none. Stdin stays untouched."""
    try:
        with _open_terminal():
            return ask_question
    except OSError:
        return None


def ask_question(question: Question) -> str | None:
    """Ask on the terminal; hidden unless the question says that the answer may be shown.

    :returns: the answer; None if the input ended (Ctrl-D) or cannot be hidden
    """
    if question.instructions:
        _write_text(clean(question.instructions, _MOST, lines=True).rstrip() + "\n")
    # What a server sent ends without a space where it was tidied up; one looks the same from everybody.
    text = clean(question.text, _MOST, lines=True).rstrip() + " "
    try:
        return _ask_openly(text) if question.echo else _ask_hidden(text)
    except EOFError:
        _write_text("\n")
        return None
    except KeyboardInterrupt:
        _write_text("\n")
        raise


def _ask_hidden(text: str) -> str | None:
    with warnings.catch_warnings():
        # Where the echo cannot be turned off, getpass warns and shows what is typed; rather not.
        warnings.simplefilter("error", getpass.GetPassWarning)
        try:
            return getpass.getpass(text)
        except getpass.GetPassWarning:
            return None


def _ask_openly(text: str) -> str:
    with _open_terminal() as (source, sink):
        sink.write(text)
        sink.flush()
        line = source.readline()
    if not line:
        raise EOFError
    return line.rstrip("\r\n")


def _write_text(text: str) -> None:
    with _open_terminal() as (_, sink):
        sink.write(text)
        sink.flush()


@contextlib.contextmanager
def _open_terminal() -> Iterator[tuple[TextIO, TextIO]]:
    """Open the controlling terminal; standard input and error, if they are one, where there is none.

    :raises OSError: if there is no terminal at all
    """
    with contextlib.ExitStack() as stack:
        try:
            source = stack.enter_context(_open(_INPUT, os.O_RDONLY, "r"))
            sink = stack.enter_context(_open(_OUTPUT, os.O_WRONLY, "w"))
        except OSError:
            if not (sys.stdin and sys.stdin.isatty()):
                raise
            source, sink = sys.stdin, sys.stderr
        yield source, sink


def _open(path: str, access: int, mode: str) -> TextIO:
    # Looking for a terminal must not make it ours, which opening one does for a session that has none.
    descriptor = os.open(path, access | getattr(os, "O_NOCTTY", 0))
    encoding = None if sys.platform == "win32" else "utf-8"
    return os.fdopen(  # type: ignore[return-value]  # text, as the mode says
        descriptor, mode, encoding=encoding, errors="surrogateescape"
    )
