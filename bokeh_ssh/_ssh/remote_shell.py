"""A few lines of ``sh`` on the remote machine, through whatever login shell there is, and what they say."""

from __future__ import annotations

import secrets
import threading
from collections import deque
from typing import Any

from bokeh_ssh._core.errors import SessionError
from bokeh_ssh._core.framing import Reader
from bokeh_ssh._core.text import clean
from bokeh_ssh._core.waiting import wait, wait_for
from bokeh_ssh._ssh.runner import Runner, Session

#: Things that are kept of what a script says: a bound on what the far side can make us keep.
_WORDS = 100
_MOST_COMPLAINT = 1000

#: Says one thing of two plain words.
_SAY = 'say() { printf \'%s{"event":"%s","text":"%s"}\\n\' "$mark" "$1" "$2"; }'


#: Reads one line as :func:`encode` wrote it and runs it. ``read`` takes not one byte more (POSIX).
READ = 'IFS= read -r s <&3; eval "$(printf %b "$s")"'


def exec_line(mark: str) -> str:
    """Return the command for the login shell: sh, dash, bash, ksh, zsh, csh, tcsh, fish, ash alike.

    :param mark: letters and digits that mark our lines; they come out joined, so that a start file that
        prints the command it was started for does not say hello in our place
    """
    half = len(mark) // 2
    hello = f'echo {mark[:half]}"{mark[half:]}"hello'
    return f"exec /bin/sh -c '{hello}; {READ.replace('<&3', '')}'"


def exec_script(mark: str, script: str) -> str:
    """Return the command for the login shell that runs a short script, without a word from here.

    That is a round trip less than :func:`exec_line`. Others on that machine see a command.

    :param mark: as for :func:`exec_line`
    :param script: in one line without quotes, but for double ones; may call ``say WORD TEXT``
    """
    half = len(mark) // 2
    # A shell in between may take a backslash for something, so the double quotes come as an argument.
    say = 'say() { echo "$m{${q}event$q:$q$1$q,${q}text$q:$q$2$q}"; }'
    return f"""exec /bin/sh -c 'q=$1; m={mark[:half]}"{mark[half:]}"; {say}; {script}' sh '"'"""


def encode(text: str) -> bytes:
    r"""Write a script as one line for ``printf %b``: octal for all but plain characters."""
    raw = text.encode("utf-8", "surrogateescape")
    plain = (chr(byte) if 32 <= byte < 127 and byte != 92 else f"\\0{byte:03o}" for byte in raw)
    return "".join(plain).encode("ascii") + b"\n"


class Script:
    """A script that runs there, from its hello on. Made by :func:`begin`.

    :ivar ended: whether it runs no more
    """

    def __init__(self) -> None:
        self.mark = secrets.token_hex(16)
        self._reader = Reader(self.mark)
        self._change = threading.Condition()
        self._words: deque[dict[str, Any]] = deque(maxlen=_WORDS)
        self.ended = False
        self.session: Session | None = None

    def on_stdout(self, data: bytes) -> None:
        with self._change:
            self._words.extend(self._reader.feed(data))
            self._change.notify_all()

    def on_exit(self, status: int | None) -> None:
        with self._change:
            self.ended = True
            self._change.notify_all()

    def word(self, timeout: float) -> dict[str, Any] | None:
        """Wait for the next thing that it says, as ``event`` and ``text``; None where nothing comes."""
        with self._change:
            wait_for(self._change, lambda: self._words or self.ended, timeout)
            return self._words.popleft() if self._words else None

    def tell(self, line: str) -> None:
        """Write a line to its standard input; never blocks."""
        if self.session:
            self.session.write(line.encode("ascii") + b"\n")

    def close(self) -> None:
        """End its standard input, and its session."""
        if self.session:
            self.session.close()


def begin(connection: Runner, script: str, *, timeout: float) -> Script | None:
    """Run ``script``, which may call ``say WORD [WORD]``; who takes it closes it.

    :param timeout: seconds until it must have begun
    :returns: None where no command may be run, or none begins in time
    :raises ConnectionLostError: if the line goes down
    """
    made = Script()
    try:
        made.session = connection.run(
            exec_line(made.mark),
            on_stdout=made.on_stdout,
            on_stderr=lambda data: None,
            on_exit=made.on_exit,
            timeout=timeout,
        )
    except SessionError:
        return None
    try:
        hello = made.word(timeout)
    except BaseException:
        made.close()
        raise
    if hello is None or hello["event"] != "hello":
        made.close()
        return None
    made.session.write(encode(f"mark={made.mark}\n{_SAY}\n{script}"))
    return made


def run_script(connection: Runner, script: str, *, timeout: float) -> dict[str, Any] | None:
    """Run ``script``, which may call ``say WORD [WORD]`` once; return that as ``event`` and ``text``.

    :param timeout: seconds for all of it
    :returns: None where no command may be run, or nothing was said in time
    :raises ConnectionLostError: if the line goes down
    """
    script_there = begin(connection, script, timeout=timeout)
    if script_there is None:
        return None
    try:
        return script_there.word(timeout)
    finally:
        script_there.close()


def read_complaint(connection: Runner, *, timeout: float) -> str:
    """Return what is on standard error where a command does nothing; empty where none may be run.

    :raises ConnectionLostError: if the line goes down
    """
    said = bytearray()
    ended = threading.Event()

    def hear(data: bytes) -> None:
        said.extend(data[: max(0, _MOST_COMPLAINT - len(said))])

    def end(status: int | None) -> None:
        ended.set()

    try:
        session = connection.run(
            ":", on_stdout=lambda data: None, on_stderr=hear, on_exit=end, timeout=timeout
        )
    except SessionError:
        return ""
    try:
        wait(ended, timeout)
    finally:
        session.close()
    return clean(bytes(said), _MOST_COMPLAINT)
