"""What the command line shows: progress and errors on standard error, addresses on standard output."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from rich.console import Console
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from bokeh_ssh._errors import BokehSSHError, PromptRequiredError, UnknownHostKeyError
from bokeh_ssh._events import (
    AppFailed,
    Attached,
    Authenticated,
    Closed,
    Connecting,
    Event,
    HostKeyAdded,
    Launched,
    Launching,
    Prompt,
    Question,
    Ready,
    ReverseForwarded,
    ServerResponsive,
    ServerUnresponsive,
    Warned,
)
from bokeh_ssh._flagtable import in_flags
from bokeh_ssh._text import clean

Kind = Literal["begin", "done", "note", "warn", "fail"]

_LONGEST = 1000
_LOG_LINES = 12
_TRYING = "Trying the whole way"
_STYLES = {"done": "green", "note": "dim", "warn": "yellow", "fail": "red"}
_MARKS = {"done": "✓", "note": "·", "warn": "!", "fail": "✗"}
_ASCII_MARKS = {"done": "+", "note": "-", "warn": "!", "fail": "x"}


@dataclass(frozen=True)
class Line:
    """What an event looks like: one line, more below it, and what is waited for after it."""

    kind: Kind
    text: str
    more: str = ""
    then: str = ""


def describe(event: Event) -> Line | None:
    """Say an event in words; None for those that an error or another event tells better."""
    host = event.host
    if isinstance(event, Connecting):
        via = f" through {event.via}" if event.via else ""
        return Line("begin", f"Connecting to {host}, port {event.port}{via}")
    if isinstance(event, HostKeyAdded):
        return Line("note", f"Added the {event.key_type} key of {host} ({event.fingerprint}) to {event.path}")
    if isinstance(event, Authenticated):
        return Line("done", f"Logged in to {host} as {event.user} ({', '.join(event.methods)})")
    if isinstance(event, Launching):
        return Line("begin", f"Starting the server on {host}")
    if isinstance(event, Launched):
        text = f"Started {event.versions} on {host}, port {event.port}, process {event.pid}"
        return Line("done", text, then=_TRYING)
    if isinstance(event, Attached):
        return Line("done", f"Found a server on port {event.port} of {host}", then=_TRYING)
    if isinstance(event, ReverseForwarded):
        by = "the Bokeh host" if event.by == "host" else "this machine"
        return Line("done", f"Port {event.port} of {host} leads to it, opened by {by}", event.reason, _TRYING)
    if isinstance(event, Ready):
        return Line("done", "Ready")
    if isinstance(event, AppFailed):
        return Line("fail", f"The app on {host} failed, and its page is blank", event.traceback)
    if isinstance(event, ServerUnresponsive):
        return Line("warn", f"The server on {host} does not respond: its process is stopped")
    if isinstance(event, ServerResponsive):
        return Line("note", f"The server on {host} responds again")
    if isinstance(event, Warned):
        return Line("warn", f"{host}: {event.text}")
    if isinstance(event, Closed):
        return Line("note", "Closed")
    return None


class Display:
    """Shows progress: with a moving line on a terminal, as plain lines elsewhere.

    :param moving: whether a line may move at all; it would garble log lines
    :ivar ready: what the last :class:`Ready` said opens it
    """

    def __init__(self, *, moving: bool = True) -> None:
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._moving = moving and self._console.is_terminal and not self._console.is_dumb_terminal
        self._marks = _MARKS if self._console.encoding.startswith("utf") else _ASCII_MARKS
        self._lock = threading.RLock()
        self._live: Live | None = None
        self._spinner = Spinner("dots" if self._console.encoding.startswith("utf") else "line", style="cyan")
        self._stage = ""
        self._began = 0.0
        self._interrupted = False
        self.ready = ""

    @property
    def moving(self) -> bool:
        """Whether a person watches the lines move."""
        return self._moving

    # What is told.

    def on_event(self, event: Event) -> None:
        """Show an event; from any thread."""
        if isinstance(event, Ready):
            self.ready = event.url
        line = describe(event)
        if line is None:
            return
        with self._lock:
            if line.kind == "begin":
                self._begin(clean(line.text, _LONGEST))
            else:
                self._write(line)

    def note(self, text: str) -> None:
        """Show a line that says how things are."""
        self._write(Line("note", text))

    def done(self, text: str) -> None:
        """Show a line that says what works now."""
        self._write(Line("done", text))

    def warn(self, text: str) -> None:
        """Show a line that says what does not work as hoped."""
        self._write(Line("warn", text))

    def hint(self, text: str) -> None:
        """Show a line without a mark: what can be done now."""
        with self._lock:
            self._console.print(Text(text, style="dim"))

    def addresses(self, *texts: str) -> None:
        """Write addresses on standard output, each as one line by itself."""
        with self._lock:
            self._stop()
            console = Console(highlight=False, soft_wrap=True)
            if console.is_terminal:
                console.print()
                for text in texts:
                    link = f" link {text}" if text.startswith("http") else ""
                    console.print(Text(f"  {text}", style=f"bold cyan{link}"))
                console.print()
            else:
                sys.stdout.writelines(f"{text}\n" for text in texts)
                sys.stdout.flush()

    def error(self, error: BokehSSHError, *, trace: bool = False) -> None:
        """Show an error: what failed, the last lines of a log where there is one, and the next step."""
        with self._lock:
            self.stop()
            if trace:
                text = "".join(traceback.format_exception(error))
                self._console.print(Text(clean(text, 100_000, lines=True), style="dim"))
            where = f"{error.host}: " if error.host else ""
            text = clean(f"{where}{in_flags(error.message)}", _LONGEST)
            self._console.print(Text.assemble(("bokeh-ssh: ", "bold red"), (text, "bold")))
            for line in getattr(error, "log", ())[-_LOG_LINES:]:
                self._console.print(Text(f"  | {clean(line, _LONGEST)}", style="dim"))
            hint = _hint(error)
            if hint:
                self._console.print(Text(f"  {hint}"))

    def interrupted(self) -> None:
        """Say, from now on, that everything is being closed. Safe in a signal handler."""
        self._interrupted = True
        if self._moving:
            with contextlib.suppress(OSError):
                os.write(2, b"\r")  # what comes next covers the ^C

    # The moving line.

    def prompt(self, ask: Prompt) -> Prompt:
        """Make ``ask`` have the terminal for itself while it asks."""

        def asking(question: Question) -> str | None:
            with self.paused():
                return ask(question)

        return asking

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the terminal alone for a while."""
        with self._lock:
            stage = self._stage
            self._stop()
        began = time.monotonic()
        try:
            yield
        finally:
            with self._lock:
                if stage and not self._stage:
                    self._stage = stage
                    self._began += time.monotonic() - began  # what a person takes to type is not the stage's
                    self._start()

    def stop(self) -> None:
        """Let no line move any more."""
        with self._lock:
            self._stop()
            self._stage = ""

    def _begin(self, text: str) -> None:
        if not self._moving:
            self._console.print(Text(text))
        self._stage = text
        self._began = time.monotonic()
        self._start()

    def _start(self) -> None:
        if self._moving and self._live is None:
            self._live = Live(
                console=self._console,
                get_renderable=self._moving_line,
                refresh_per_second=10,
                transient=True,
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self._live.start()

    def _stop(self) -> None:
        live, self._live = self._live, None
        if live:
            live.stop()

    def _moving_line(self) -> Table:
        seconds = time.monotonic() - self._began
        text = Text("Closing" if self._interrupted else self._stage, no_wrap=True, overflow="ellipsis")
        if seconds >= 1 and not self._interrupted:
            text.append(f"  {seconds:.0f} s", style="dim")
        row = Table.grid(padding=(0, 1))
        row.add_row(self._spinner, text)
        return row

    def _write(self, line: Line) -> None:
        with self._lock:
            self._stop()
            text = Text(clean(line.text, _LONGEST))
            if line.kind == "done" and self._stage:
                text.append(f"  {time.monotonic() - self._began:.1f} s", style="dim")
            if line.kind == "done":
                self._stage = ""
            mark = (f"{self._marks[line.kind]} ", f"bold {_STYLES[line.kind]}") if self._moving else ""
            self._console.print(Text.assemble(mark, text))
            for more in clean(line.more, 20_000, lines=True, tail=True).splitlines():
                self._console.print(Text(f"  | {more}", style="dim"))
            if line.then:
                self._stage, self._began = line.then, time.monotonic()
            if self._stage:
                self._start()


def _hint(error: BokehSSHError) -> str:
    if isinstance(error, PromptRequiredError):
        return "run it on a terminal, where it can ask, or name a key with --key-filename"
    if isinstance(error, UnknownHostKeyError) and "prompt=" in (error.hint or ""):
        how = "or use --host-keys accept-new after comparing the fingerprint"
        return f"run it on a terminal, where it can ask, {how}"
    return clean(in_flags(error.hint or ""), _LONGEST)


def flush() -> None:
    """Let what was written get out, as far as somebody still reads it."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
