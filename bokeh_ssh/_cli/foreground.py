"""One tunnel or forward that a command holds: opened, announced, held until it ends. Signals and exit codes.

It is held in the foreground, or in the background from when it is open.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from bokeh_ssh._cli.completion import find_aliases
from bokeh_ssh._cli.display import Display, flush
from bokeh_ssh._cli.hints import advise, advise_app
from bokeh_ssh._cli.json_output import JsonDisplay
from bokeh_ssh._cli.options.command import ORIGINS, Asked
from bokeh_ssh._cli.output_queue import OutputQueue
from bokeh_ssh._cli.prompts import find_prompt
from bokeh_ssh._cli.std_streams import OutputError, current
from bokeh_ssh._cli.tunnels.background import Leave
from bokeh_ssh._cli.tunnels.control import answering
from bokeh_ssh._core.errors import BokehSSHError, UsageError
from bokeh_ssh._core.events import Event, Prompt, Question, ignore
from bokeh_ssh._core.settings import setting
from bokeh_ssh._core.text import clean
from bokeh_ssh._tunnels.openable import Openable, follow_log, names_of
from bokeh_ssh._tunnels.redirect_page import remove_all

FAILED = 1
MISUSED = 2
INTERRUPTED = 130

#: What asks a program to end. Where one is ignored (nohup, a shell's &) it stays so.
_ENDINGS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")
#: Seconds within which signals count as one: a closing terminal sends two, and so do some wrappers.
_TOGETHER = 0.5


class Foreground:
    """What a command works with while it runs.

    :param asked: what was typed; what of it is for the display is taken out
    :param leave: what lets go of the terminal once the tunnel is open; None stays on it
    :ivar asked: the same; of a project's app, as if all had been typed
    :ivar display: shows what happens
    :ivar prompt: asks the person at the terminal; None where there is none
    :ivar stack: what is closed after the tunnel
    """

    def __init__(self, asked: Asked, leave: Leave | None = None) -> None:
        self.asked = asked
        self._command = asked.command
        verbose, json, quiet, log = (
            asked.keywords.pop(name, False) for name in ("verbose", "json", "quiet", "log")
        )
        self._verbose = verbose
        shown = Display(moving=not verbose, quiet=quiet, advise_app=self._advise_app)
        self.display: Display | JsonDisplay = JsonDisplay() if json else shown
        self._output_queue = OutputQueue(lambda lines: self.display.log_lines(lines)) if log else None
        self._logging = _set_up_logging(verbose)
        asking = find_prompt()
        self._asking = self.display.prompt(asking) if asking else None
        self.prompt: Prompt | None = self._ask if asking else None
        self._leave = leave
        self.stack = contextlib.ExitStack()
        self._streams = current()
        self._began = time.time()

    def hold(
        self, make: Callable[[Foreground], Openable], announce: Callable[[Foreground, Openable], None]
    ) -> int:
        """Open what ``make`` makes, announce it, and wait until it ends or is ended.

        :returns: the exit code: 0 also where Ctrl-C ended what stood; 130 where it ended what had yet to open
        """
        stood = False
        with self._signals():
            try:
                with self.stack:
                    thing = make(self)
                    # Who was to read it is gone; on a thread, as whoever writes holds what closing may need.
                    self._streams.on_fault = lambda: threading.Thread(
                        target=thing.close, name="bokeh-ssh end", daemon=True
                    ).start()
                    if self._output_queue:
                        follow_log(thing, self._output_queue.put)
                    self.stack.enter_context(
                        answering(lambda: self._describe(thing), lambda: self._stop(thing))
                    )
                    with thing:
                        stood = True
                        self.display.stop()
                        announce(self, thing)
                        self._say_how_it_ends(thing)
                        self.check()
                        if self._leave:
                            self._go_to_background(self._leave)
                        if self._output_queue:
                            self._output_queue.start()
                        thing.wait()
            except KeyboardInterrupt:
                self.display.stop()
                if not stood:
                    self.display.warn("Interrupted")
                return 0 if stood else INTERRUPTED
            except OutputError:
                return FAILED
            except BokehSSHError as exc:
                return FAILED if self._streams.fault else self.fail(exc)
            finally:
                if self._leave and not stood:
                    self._leave.give_up()
                self._streams.on_fault = ignore
                self._let_out()
        return 0

    def on_event(self, event: Event) -> None:
        """Show an event; from any thread."""
        self.display.on_event(event)

    def _ask(self, question: Question) -> str | None:
        """Ask the person; nobody, once it runs in the background."""
        return self._asking(question) if self._asking else None

    def _say_how_it_ends(self, thing: Openable) -> None:
        if not self._leave:
            stays = getattr(thing, "detached", False)
            self.display.hint(
                "Ctrl-C ends the tunnel; the server keeps running." if stays else "Ctrl-C ends it."
            )

    def advise(self, error: BokehSSHError) -> None:
        """Add the next step that fits what was typed to an error."""
        config = self.asked.keywords.get("ssh_config", "~/.ssh/config")
        advise(error, self.asked, find_aliases(config) if config else ())

    def _advise_app(self, traceback: str) -> str:
        return advise_app(traceback, self.asked.apps, self.asked.keywords)

    def _go_to_background(self, leave: Leave) -> None:
        """Let go of the terminal, and let the command that was typed end."""
        self.display.hint(f"It runs in the background (process {os.getpid()}), and writes to {leave.path}")
        self.display.hint(f"See bokeh-ssh status; end it with: bokeh-ssh stop {os.getpid()}")
        self._asking = None
        ready = self.display.ready
        if isinstance(self.display, Display):
            self.display = Display(moving=False, advise_app=self._advise_app)
            self.display.ready = ready
        self._streams.leave_terminal()
        leave.finish()

    def _describe(self, thing: Openable) -> dict[str, Any]:
        """Return what other commands on this machine get of it: addresses without a session's id."""
        host, apps = names_of(thing)
        status = thing.status()
        urls: tuple[str, ...] = ()
        if self.display.ready:
            with contextlib.suppress(BokehSSHError):  # it has ended
                urls = getattr(thing, "urls", (self.display.ready,))
        return {
            "pid": os.getpid(),
            "command": self._command,
            "host": host,
            "apps": list(apps),
            "job": getattr(getattr(thing, "job", None), "id", ""),
            "addresses": [url.partition("?")[0] for url in urls],
            "began": self._began,
            "background": self._leave is not None,
            "log": str(self._leave.path) if self._leave else "",
            "status": dataclasses.asdict(status),
        }

    def _stop(self, thing: Openable) -> None:
        self.display.note("Ended by bokeh-ssh stop")
        thing.close()

    def do(self, action: Callable[[Foreground], int | None]) -> int:
        """Do something that ends by itself; return the exit code, that which it gives if it does."""
        with self._signals():
            try:
                code = action(self) or 0
                self.check()
                return code
            except OutputError:
                return FAILED
            except KeyboardInterrupt:
                self.display.stop()
                self.display.warn("Interrupted")
                return INTERRUPTED
            except BokehSSHError as exc:
                return self.fail(exc)
            finally:
                self._let_out()

    def check(self) -> None:
        """Refuse to go on where standard output takes nothing any more.

        :raises OutputError: if it does not; ``main`` reports it
        """
        self._streams.check()

    def fail(self, error: BokehSSHError) -> int:
        """Print an error, after all that was logged; return the exit code."""
        self._let_out(patience=None)
        code = MISUSED if isinstance(error, UsageError) else FAILED
        self.advise(error)
        if error.setting in ORIGINS:
            source = f"{setting(error.setting)} comes from {ORIGINS[error.setting]}"
            error.advise("; ".join(filter(None, (error.sentences[1], source))))
        self.display.error(error, code, trace=self._verbose > 1)
        return code

    def _let_out(self, patience: float | None = 1.0) -> None:
        """Let what waits to be shown be shown; idempotent.

        :param patience: seconds for a reader to take what was logged; None where it is waited for anyway
        """
        self.display.stop()
        if self._output_queue:
            self._output_queue.close()
        if self._logging:
            self._logging.close(patience)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Let each signal that ends a program be a KeyboardInterrupt, and a second one the end at once."""
        first: list[float] = []

        def handle(number: int, frame: FrameType | None) -> None:
            now = time.monotonic()
            if not first:
                first.append(now)
                self._streams.end_soon()
                self.display.interrupted()
                if self.display.moving:
                    self._streams.mark(b"\r")  # what comes next covers the ^C
                raise KeyboardInterrupt
            if now - first[0] > _TOGETHER:
                if self.display.moving:
                    self._streams.mark(b"\x1b[?25h\n")  # the moving line hides the cursor
                flush()
                remove_all()
                os._exit(INTERRUPTED)

        before = {}
        for name in _ENDINGS:
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, handle)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def show(display: Display | JsonDisplay, browse: Callable[[], bool]) -> None:
    """Open the app in a browser, where there is one with a display.

    :param browse: opens it, and returns whether there was one
    """
    graphical = sys.platform in ("win32", "darwin") or any(
        os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER")
    )
    if not graphical or not browse():
        display.note("No browser was found here; open the address in one yourself")


def _set_up_logging(verbose: int) -> OutputQueue | None:
    """Log to standard error: nothing, what happens (1), everything of ours (2), paramiko's too (3).

    :returns: what the lines go through, as whoever logs must not wait for a reader; None where there are none
    """
    if not verbose:
        # Without any handler Python writes warnings to standard error, paramiko's tracebacks among them.
        logging.getLogger().addHandler(logging.NullHandler())
        return None
    backlog = OutputQueue(
        lambda lines: sys.stderr.writelines(f"{clean(line, 20_000, lines=True)}\n" for line in lines)
    )
    backlog.start()
    handler = _LogHandler(backlog)
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s: %(message)s", "%H:%M:%S"))
    logging.getLogger().addHandler(handler)
    logging.getLogger("bokeh_ssh").setLevel(logging.INFO if verbose == 1 else logging.DEBUG)
    logging.getLogger("paramiko").setLevel(logging.DEBUG if verbose > 2 else logging.CRITICAL)
    return backlog


class _LogHandler(logging.Handler):
    """Puts what is logged into a backlog."""

    def __init__(self, backlog: OutputQueue) -> None:
        super().__init__()
        self._backlog = backlog

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._backlog.put([self.format(record)])
        except Exception:  # noqa: BLE001 - as logging's own handlers do
            self.handleError(record)
