"""Programs under test, run as people run them: with pipes, or on a terminal of their own."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from types import TracebackType
from typing import Any, NamedTuple

import pytest

from beds import Machine, until

#: What moves the cursor, colours or hides on a terminal.
ESCAPES = re.compile(r"\x1b(\[[0-?]*[ -/]*[@-~]|\]8;[^\x1b]*\x1b\\)")
CLI = (sys.executable, "-m", "bokeh_ssh")


class Told(NamedTuple):
    """What a command has shown."""

    code: int
    stdout: str
    stderr: str


def run_here(*words: str, code: int | None = 0) -> Told:
    """Run a command to its end in this process: one of its own takes a second. A code is checked if given."""
    from bokeh_ssh._cli.app import main

    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        with pytest.raises(SystemExit) as ended:
            main(words)
    told = Told(int(ended.value.code or 0), out.getvalue(), err.getvalue())
    assert code in (None, told.code), told
    return told


class Program:
    """A program with pipes and without a terminal; ended, if it still runs, with the ``with`` block.

    :param words: the words after ``bokeh-ssh``
    :param stdin: what it finds on standard input; None is a pipe that stays open
    """

    def __init__(
        self,
        *words: str,
        stdin: bytes | None = None,
        argv: Sequence[str] = CLI,
        env: dict[str, str] | None = None,
    ) -> None:
        self.stdout = ""
        self.stderr = ""
        self._stdin = stdin
        self._own = env or {}  # what is not of the tests' own environment
        self.process = self._start([*argv, *words], os.environ | (env or {}))
        self._threads = self._read()

    def _start(self, words: list[str], env: dict[str, str]) -> subprocess.Popen[bytes]:
        pipe = subprocess.PIPE
        # A session of its own has no terminal, even where the tests have one.
        return subprocess.Popen(words, stdin=pipe, stdout=pipe, stderr=pipe, env=env, start_new_session=True)

    def _read(self) -> list[threading.Thread]:
        assert self.process.stdin
        if self._stdin is not None:
            self.process.stdin.write(self._stdin)
            self.process.stdin.close()
        return [self._thread("stdout", self.process.stdout), self._thread("stderr", self.process.stderr)]

    def _thread(self, name: str, pipe: Any) -> threading.Thread:
        def read() -> None:
            with pipe:
                while data := self._take(pipe):
                    setattr(self, name, getattr(self, name) + data.decode(errors="replace"))

        thread = threading.Thread(target=read, daemon=True)
        thread.start()
        return thread

    def _take(self, pipe: Any) -> bytes:
        return pipe.read1(65536)  # type: ignore[no-any-return]

    def __enter__(self) -> Any:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(30)
        for thread in self._threads:
            thread.join(30)
        if self.process.stdin:
            self.process.stdin.close()

    def __str__(self) -> str:
        return f"--- stdout\n{self.stdout}\n--- stderr\n{self.stderr}\n--- exit code {self.process.poll()}"

    def expect(self, text: str, *, timeout: float = 30) -> None:
        """Wait until it has written ``text`` on either stream."""
        try:
            until(
                lambda: text in self.stderr + self.stdout or self.process.poll() is not None,
                timeout=timeout,
                what=text,
            )
            if self.process.poll() is not None:
                for thread in self._threads:
                    thread.join(30)
            assert text in self.stderr + self.stdout
        except AssertionError:
            raise AssertionError(f"it did not write {text!r}:\n{self}") from None

    def address(self) -> str:
        """Wait for the address, and give it."""
        try:
            return until(lambda: self.stdout.partition("\n")[0] * ("\n" in self.stdout), timeout=60)
        except AssertionError:
            raise AssertionError(f"no address:\n{self}") from None

    def interrupt(self, number: int = signal.SIGINT) -> None:
        """Send it a signal."""
        self.process.send_signal(number)

    def end(self, timeout: float = 30) -> int:
        """Wait for its end, and give the exit code."""
        try:
            code = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it did not end:\n{self}") from None
        for thread in self._threads:
            thread.join(30)
        return code


class OnTerminal(Program):
    """A program on a terminal of its own: all three streams, and /dev/tty. ``stdout`` has it all."""

    def _start(self, words: list[str], env: dict[str, str]) -> subprocess.Popen[bytes]:
        import fcntl
        import pty
        import termios

        self._master, slave = pty.openpty()

        def take_terminal() -> None:
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)

        env = env | {"TERM": "xterm-256color", "COLUMNS": "160"} | self._own
        try:
            return subprocess.Popen(
                words,
                stdin=slave,
                stdout=slave,
                stderr=slave,
                env=env,
                start_new_session=True,
                preexec_fn=take_terminal,
            )
        finally:
            os.close(slave)

    def _read(self) -> list[threading.Thread]:
        return [self._thread("stdout", os.fdopen(self._master, "rb", 0, closefd=True))]

    def _take(self, pipe: Any) -> bytes:
        try:
            return os.read(pipe.fileno(), 65536)
        except OSError:  # EIO: nobody has the terminal any more
            return b""

    @property
    def screen(self) -> str:
        """What it wrote, without escape sequences."""
        return ESCAPES.sub("", self.stdout)

    def type(self, text: str) -> None:
        """Type, with the return key."""
        os.write(self._master, text.encode() + b"\r")

    def answer(self, question: str, text: str) -> None:
        """Wait for a question, forget what was before it, and answer."""
        self.expect(question)
        self.stdout = self.stdout.partition(question)[2]
        self.type(text)


def login(machine: Machine) -> list[str]:
    """Give the flags that log in to a machine of the tests with its key."""
    return [*unkeyed(machine), "-i", str(machine.key_path)]


def unkeyed(machine: Machine) -> list[str]:
    """Give the flags that reach a machine of the tests, without a key."""
    alone = ["-F", "none", "--no-allow-agent", "--no-look-for-keys"]
    return ["-p", str(machine.port), "-l", machine.user, "--known-hosts", str(machine.known_hosts), *alone]
