"""What the command line shows: progress and errors on standard error, addresses on standard output."""

from __future__ import annotations

import contextlib
import math
import sys
import textwrap
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from bokeh_ssh._cli.cache import Kept
from bokeh_ssh._cli.doctor import Finding
from bokeh_ssh._cli.messages import (
    HEAD,
    LONGEST,
    TUNNEL_HEAD,
    Line,
    describe,
    describe_end,
    describe_error,
    next_step,
    row,
    status_row,
    tunnel_row,
    tunnel_traffic,
    tunnel_way,
)
from bokeh_ssh._cli.options.words import as_flag
from bokeh_ssh._cli.tunnels.registry import HeldTunnel
from bokeh_ssh._core.errors import BokehSSHError
from bokeh_ssh._core.events import (
    AppFailed,
    Closed,
    Event,
    JobEnded,
    JobReached,
    Lost,
    Prompt,
    Question,
    Ready,
    Reconnected,
    Reconnecting,
    ServerExited,
    Uploading,
)
from bokeh_ssh._core.settings import Wording, word
from bokeh_ssh._core.text import clean
from bokeh_ssh._jobs.job import ListedJob
from bokeh_ssh._server.registry import RemoteServer

_LOG_LINES = 12
_BAR = 20  # columns
_EVERY = 1.0  # seconds
_FRAME = 6  # columns that a box takes
#: Lines of an error, with its next step, and of what failed at least, on 80 columns; -vv shows all of it. The
#: server's own last lines come besides.
_ERROR_LINES = 5
_LEAST_LINES = 2
_COLUMNS = 80
_STYLES = {"done": "green", "note": "dim", "warn": "yellow", "fail": "red"}
_MARKS = {"done": "✓", "note": "·", "warn": "!", "fail": "✗"}
_ASCII_MARKS = {"done": "+", "note": "-", "warn": "!", "fail": "x"}


_KINDS = {"good": "done", "note": "warn", "bad": "fail"}


class Display:
    """Shows progress: with a moving line on a terminal, as plain lines elsewhere.

    :param moving: whether a line may move at all; it would garble log lines
    :param quiet: show the address, and what is wrong; nothing else
    :ivar moving: whether a person watches the lines move
    :ivar ready: what the last :class:`Ready` said opens it
    :ivar wording: words the settings that errors name
    """

    def __init__(
        self,
        *,
        moving: bool = True,
        quiet: bool = False,
        advise_app: Callable[[str], str] = lambda traceback: "",
    ) -> None:
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        able = self._console.is_terminal and not self._console.is_dumb_terminal
        self.moving = moving and able and not quiet
        self._quiet = quiet
        self._marks = _MARKS if self._console.encoding.startswith("utf") else _ASCII_MARKS
        self._lock = threading.RLock()
        self._live: Live | None = None
        self._spinner = Spinner("dots" if self._console.encoding.startswith("utf") else "line", style="cyan")
        self._stage = ""
        self._due = 0.0  # when the stage began, or what it says will be tried
        self._opened = time.monotonic()  # when it all began
        self._interrupted = False
        self._part = 0.0  # of what is being brought there, that has arrived
        self._broken: Event | None = None  # what has ended that worked
        self._job = ""  # that the server runs in
        self._held: Line | None = None  # of a loss that the end of the job may explain
        self.ready = ""
        self.wording: Wording = as_flag
        self._advise_app = advise_app

    # What is reported.

    def on_event(self, event: Event) -> None:
        """Show an event; from any thread."""
        if isinstance(event, Ready):
            self.ready = event.url
        if isinstance(event, Uploading):
            self._part = event.sent / event.size if 0 < event.sent < event.size else 0.0
        if isinstance(event, (Lost, ServerExited)):
            self._broken = self._broken or event
        elif isinstance(event, (Ready, Reconnected)):
            self._broken = None
        line = describe_end(event, self._broken) if isinstance(event, Closed) else describe(event)
        if isinstance(event, JobReached):
            self._job = event.job
        held, self._held = self._held, None
        if held and isinstance(event, JobEnded):  # the error or the warning after it says why
            self._broken = event
            return
        if held:
            self._write(held)
        if line is None:
            return
        if self._job and isinstance(event, Reconnecting) and event.attempt == 1:
            self._held = line
            self.begin(f"Asking what became of job {self._job}")
            return
        with self._lock:
            if line.kind == "begin":
                self._begin(line)
            else:
                self._write(line)
        advice = self._advise_app(event.traceback) if isinstance(event, AppFailed) else ""
        if advice:
            self.hint(word(advice, self.wording))

    def note(self, text: str) -> None:
        """Show a line that says how things are."""
        self._write(Line("note", text))

    def warn(self, text: str) -> None:
        """Show a line that says what does not work as hoped."""
        self._write(Line("warn", text))

    def hint(self, text: str) -> None:
        """Show a line without a mark: what can be done now."""
        with self._lock:
            if not self._quiet:
                self._console.print(Text(text, style="dim"))

    def log_lines(self, lines: Sequence[str]) -> None:
        """Show what the server wrote."""
        with self._lock:
            for line in lines:
                self._console.print(_log_line(line))

    def addresses(self, *texts: str) -> None:
        """Write addresses on standard output, each as one line by itself."""
        # Where no line moves, nobody who waits for a reader of standard error keeps the address back.
        with self._lock if self.moving else contextlib.nullcontext():
            self._stop()
            console = Console(highlight=False, soft_wrap=True)
            if console.is_terminal and not self._quiet:
                console.print(_framed(console, texts))
            else:
                sys.stdout.writelines(f"{text}\n" for text in texts)
                sys.stdout.flush()

    def servers(self, servers: Sequence[RemoteServer]) -> None:
        """Write a table of servers on standard output; elsewhere than on a terminal, parted by tabs."""
        self._table(HEAD, list(map(row, servers)), "There is no server of yours")

    def tunnels(self, tunnels: Sequence[HeldTunnel]) -> None:
        """Write a table of tunnels, likewise."""
        none = "No tunnel is open on this machine; for your servers on another one: bokeh-ssh ls HOST"
        self._table(TUNNEL_HEAD, list(map(tunnel_row, tunnels)), none)

    def _table(
        self, head: Sequence[str], rows: Sequence[Sequence[str]], none: str = "", before: str = ""
    ) -> None:
        with self._lock:
            self._stop()
            console = Console(highlight=False)
            if not console.is_terminal:
                sys.stdout.writelines(before + "\t".join(words) + "\n" for words in rows)
            elif rows:
                table = Table(*head, box=None, pad_edge=False, header_style="dim")
                for words in rows:
                    table.add_row(*map(Text, words))
                console.print(table)
            else:
                self.hint(none)

    def statuses(
        self, find: Callable[[], Sequence[HeldTunnel]], *, watch: bool, check: Callable[[], None]
    ) -> None:
        """Write what tunnels do on standard output; elsewhere than on a terminal, parted by tabs.

        :param find: lists them, each time
        :param watch: whether it is shown again every second, until Ctrl-C
        :param check: raises where standard output takes nothing any more
        """
        console = Console(highlight=False)
        if not console.is_terminal:
            repeat(lambda: _write_rows(find()), watch, check)
        elif watch:
            with Live(console=console, auto_refresh=False) as live:
                repeat(lambda: live.update(_drawn(find()), refresh=True), watch, check)
        else:
            console.print(_drawn(find()))

    def plan(self, lines: Sequence[str]) -> None:
        """Write commands on standard output, a line each."""
        sys.stdout.writelines(f"{clean(line, 20_000)}\n" for line in lines)

    def jobs(self, jobs: Sequence[ListedJob]) -> None:
        """Write a table of jobs, likewise; elsewhere each line begins with "job"."""
        rows = [(job.id, job.name, job.state, job.node or job.reason, job.left) for job in jobs]
        self._table(("JOB", "NAME", "STATE", "NODE OR REASON", "TIME LEFT"), rows, before="job\t")

    def cache(self, kept: Kept) -> None:
        """Write what is kept on standard output; elsewhere than on a terminal, parted by tabs."""
        with self._lock:
            self._stop()
            console = Console(highlight=False, soft_wrap=True)
            if not console.is_terminal:
                sys.stdout.write(f"{kept.folder}\t{kept.files}\t{kept.size}\n")
                sys.stdout.flush()
                return
            size = f"{kept.size / 1_000_000:.1f} MB"
            done = ", removed now" if kept.cleared else ""
            console.print(Text(f"{kept.folder}: {kept.files} files, {size}{done}"))

    def begin(self, text: str) -> None:
        """Say what is done now, to a person who watches."""
        with self._lock:
            if self.moving:
                self._begin(Line("begin", text))

    def finding(self, finding: Finding) -> None:
        """Write what was found on standard output; elsewhere than on a terminal, parted by tabs."""
        with self._lock:
            self._stop()
            console = Console(highlight=False, soft_wrap=True)
            text, hint = clean(finding.text, LONGEST), clean(finding.hint, LONGEST)
            if not console.is_terminal:
                sys.stdout.write("\t".join((finding.verdict, finding.check, text, hint)).rstrip() + "\n")
                sys.stdout.flush()
            elif finding.verdict == "bad" or not self._quiet:
                kind = _KINDS[finding.verdict]
                mark = (f"{self._marks[kind]} ", f"bold {_STYLES[kind]}")
                console.print(Text.assemble(mark, (f"{finding.check}: ", "bold"), text))
                if hint:
                    console.print(Text(f"    {hint}", style="" if finding.verdict == "bad" else "dim"))

    def done(self, text: str, event: str, **fields: Any) -> None:
        """Say what was done; the event and its fields are for other programs."""
        with self._lock:
            self.stop()
            self._write(Line("done", text))

    def error(self, error: BokehSSHError, exit_code: int, *, trace: bool = False) -> None:
        """Show an error: what failed, the last lines of a log where there is one, and the next step."""
        with self._lock:
            self.stop()
            if trace:
                text = "".join(traceback.format_exception(error))
                self._console.print(Text(clean(text, 100_000, lines=True), style="dim"))
            hint = next_step(error, self.wording)
            left = _ERROR_LINES - len(_fill(hint, _COLUMNS).splitlines())
            most = max(_LEAST_LINES, left) * _COLUMNS - len("bokeh-ssh: …")
            text = f"{error.host}: " * bool(error.host) + describe_error(error, self.wording)
            text = clean(text, LONGEST if trace else most)
            self._console.print(Text.assemble(("bokeh-ssh: ", "bold red"), (text, "bold")))
            for line in getattr(error, "log", ())[-_LOG_LINES:]:
                self._console.print(_log_line(line))
            if hint:
                terminal = self._console.is_terminal
                self._console.print(Text(_fill(hint, self._console.width) if terminal else f"  {hint}"))

    def interrupted(self) -> None:
        """Say, from now on, that everything is being closed. Safe in a signal handler."""
        self._interrupted = True

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
                    pause = time.monotonic() - began  # what a person takes to type is not the stage's
                    self._due += pause
                    self._opened += pause
                    self._start()

    def stop(self) -> None:
        """Let no line move any more."""
        with self._lock if self.moving else contextlib.nullcontext():
            self._stop()
            self._stage = ""

    def _begin(self, line: Line) -> None:
        text = clean(line.text, LONGEST)
        if not self.moving and not self._quiet:
            when = f" in {line.wait:.0f} s" if line.wait else ""
            why = f": {clean(line.more, LONGEST)}" if line.more else ""
            self._console.print(Text(f"{text}{when}{why}"))
        self._await(text, line.wait)
        self._start()

    def _await(self, stage: str, wait: float = 0.0) -> None:
        self._stage = stage
        self._due = time.monotonic() + wait

    def _start(self) -> None:
        if self.moving and self._live is None:
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
        now = time.monotonic()
        cells: list[RenderableType] = [self._spinner]
        if self._interrupted:
            cells.append("Closing")
        else:
            cells.append(Text(self._stage, no_wrap=True, overflow="ellipsis"))
            if self._part:
                cells += [ProgressBar(1, self._part, _BAR, complete_style="cyan"), f"[dim]{self._part:4.0%}"]
            if self._due > now:
                cells.append(f"in {math.ceil(self._due - now)} s")
            elif now - self._due >= 1:
                cells.append(f"[dim] {now - self._due:.0f} s")
        row = Table.grid(padding=(0, 1))
        row.add_row(*cells)
        return row

    def _write(self, line: Line) -> None:
        with self._lock:
            if self._quiet and not line.loud and line.kind not in ("warn", "fail"):
                return
            self._stop()
            text = Text(clean(line.text, LONGEST))
            if line.kind == "done" and self._stage:
                now = time.monotonic()
                total = f", {now - self._opened:.1f} s in all" if line.total else ""
                text.append(f"  {now - self._due:.1f} s{total}", style="dim")
            if line.kind == "done":
                self._stage = ""
            mark = (f"{self._marks[line.kind]} ", f"bold {_STYLES[line.kind]}") if self.moving else ""
            self._console.print(Text.assemble(mark, text))
            for more in clean(line.more, 20_000, lines=True, tail=True).splitlines():
                self._console.print(Text(f"  | {more}", style="dim"))
            if line.then:
                self._await(line.then)
            if self._stage:
                self._start()


def repeat(show: Callable[[], object], watch: bool, check: Callable[[], None]) -> None:
    """Show it, once or every second; Ctrl-C is the usual end of the latter."""
    with contextlib.suppress(*[KeyboardInterrupt] if watch else []):
        show()
        check()
        while watch:
            time.sleep(_EVERY)
            show()
            check()


def _log_line(line: str) -> Text:
    """Return a line of a server's as it is shown: indented as it was, as in a traceback."""
    shown = clean(line, LONGEST, lines=True).replace("\n", " ").rstrip()
    return Text(f"  | {shown}", style="dim")


def _fill(hint: str, width: int) -> str:
    """Break a hint between words."""
    return textwrap.fill(
        hint,
        max(width, 20),
        initial_indent="  ",
        subsequent_indent="  ",
        break_long_words=False,
        break_on_hyphens=False,
    )


def _write_rows(tunnels: Sequence[HeldTunnel]) -> None:
    sys.stdout.writelines("\t".join(status_row(tunnel)) + "\n" for tunnel in tunnels)
    sys.stdout.flush()


def _drawn(tunnels: Sequence[HeldTunnel]) -> RenderableType:
    """Draw what tunnels do: each with its address and state, its machines, and what it carries."""
    if not tunnels:
        return Text("No tunnel is open on this machine", style="dim")
    parts = []
    for tunnel in tunnels:
        style = "green" if tunnel.state == "ready" else "yellow"
        where = clean(" ".join(tunnel.addresses) or tunnel.command, LONGEST)
        parts.append(Text.assemble((where, "bold"), "  ", (tunnel.state, style), f"  process {tunnel.pid}"))
        parts.append(Text(f"  {clean(tunnel_way(tunnel), LONGEST)}"))
        parts.append(Text(f"  {tunnel_traffic(tunnel)}", style="dim"))
    return Group(*parts)


def _framed(console: Console, texts: Sequence[str]) -> RenderableType:
    """Put addresses in a box; where they do not fit into one, they stand alone, whole."""
    rows = [
        Text(text, style=f"bold cyan link {text}" if text.startswith("http") else "bold cyan")
        for text in texts
    ]
    if max(map(len, texts), default=0) + _FRAME > console.width:
        return Group("", *rows, "")
    plain = not console.encoding.startswith("utf") or console.is_dumb_terminal
    return Panel.fit(
        Group(*rows), box=box.ASCII if plain else box.ROUNDED, padding=(0, 2), border_style="cyan"
    )


def flush() -> None:
    """Let what was written get out, as far as somebody still reads it."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, RuntimeError):  # the last: a signal came while it wrote
            stream.flush()
