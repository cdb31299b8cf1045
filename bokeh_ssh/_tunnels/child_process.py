"""The parent's side of a child process that holds the SSH side (``isolate=True``).

A program that computes holds Python's interpreter lock, and threads of its own that forward would wait for
it: measured, 6 MB/s and 11 ms. A process of its own waits for nobody.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, BinaryIO

from bokeh_ssh._core import python_path
from bokeh_ssh._core.dispatcher import Dispatcher
from bokeh_ssh._core.errors import BokehSSHError, ConnectionLostError
from bokeh_ssh._core.events import Closed, Event, Lost, Ready
from bokeh_ssh._core.fork import in_child
from bokeh_ssh._core.threads import Thread
from bokeh_ssh._core.waiting import SLICE, clocks, heed, wait_for
from bokeh_ssh._forwarding.status import TunnelStatus
from bokeh_ssh._ssh.auth.prompt_cache import ask_person
from bokeh_ssh._tunnels import child_protocol
from bokeh_ssh._tunnels.lifecycle import UNREACHED, Lifecycle, Opening, State, TunnelInfo

log = logging.getLogger("bokeh_ssh")

#: Seconds for the child to end what it started, here and there: TERM, wait, KILL of a remote server.
_GOODBYE = 20.0
#: Seconds when nobody wants to wait, as after Ctrl-C; the child goes on by itself.
_HURRY = 1.5
#: Seconds without a word from the child, though it was asked for one, until it is taken for stopped or hung:
#: while Python starts there, while it opens something, and once that stands and nobody waits for it.
_STARTS = 30.0
_OPENS = 15.0
_STANDS = 60.0
#: Seconds for it to show that it runs, before it is given the time to end what it started.
_LAST_WORD = 5.0
#: Seconds for it to answer; it only has to look.
_TELLS = 3.0
#: Questions that may be open at once.
_MOST_ASKED = 100
#: Seconds that the watch may be late; if it is more, this program was stopped itself, or the machine slept.
_LATE = 5.0
#: Seconds for the handlers of its last log records, and for its threads; and in a hurry.
_LAST_RECORDS = 2.0
_NO_TIME = 0.1
#: The child finds the package where we have it, whatever its own path would be.
#: And paramiko gets no invoke: it asks for one directive of an ssh_config reader that we do not use, and is
#: a quarter of what there is to import.
_BOOT = (
    f"{python_path.START}import pickle, struct; i = sys.stdin.buffer; n = i.read(4) or sys.exit(); "
    "sys.modules['invoke'] = None; "
    "take(*pickle.loads(i.read(struct.unpack('>I', n)[0]))); "
    "from bokeh_ssh._tunnels.child_main import main; main()"
)


def is_possible() -> bool:
    """Return whether this program can start a Python of its own kind."""
    return bool(sys.executable) and not getattr(sys, "frozen", False)


class ChildSession:
    """What is open in a child process during one life.

    Nothing that is said to the child, asked of it or heard from it waits for it without a deadline, and the
    thread that hears it calls nothing that may block: a process can be stopped or hang at any time.

    :param what: what to open there
    :ivar info: what is known of it by now
    """

    def __init__(self, life: Lifecycle, what: Opening) -> None:
        self.info = what.info
        self._life = life
        self._what = what
        self._process: ChildProcess | None = None
        self._marshaller = child_protocol.Marshaller()
        self._missed: tuple[State, BokehSSHError | None] | None = None
        self._ready: Event = Ready(host=what.label, url="")  # until it has said so
        self._log: tuple[str, ...] = ()
        self._status = TunnelStatus("new")
        self._answers: queue.SimpleQueue[tuple[Any, ...]] = queue.SimpleQueue()  # to open()
        self._heard = threading.Condition()
        self._asked = self._told = 0  # how often for the server's lines, or for what it does
        # A handler of the program's log may use what is in the child, and so must not hold up who hears it.
        self._records = Dispatcher(_log, f"bokeh-ssh log {what.label}", "logging")

    def open(self) -> Event:
        """Open it in a child process; return that it is ready.

        Questions are asked on this thread; those of a later reconnection on one of their own.

        :raises BokehSSHError: whatever went wrong there
        :raises ConnectionLostError: if the child ends, or does not respond
        """
        what = dataclasses.replace(self._what, args=self._marshaller.pack(self._what.args))
        first = python_path.hand_over(), (what, log.getEffectiveLevel())
        process = self._process = ChildProcess(self._what.label, first, self._take, self._on_end)
        while True:
            word, *rest = self._next()
            if word in ("question", "sign"):
                self._answer(word, *rest)
            elif word == "failed":
                raise _with_cause(*rest)
            elif word == "ready":
                return self._ready
            else:
                raise process.end_error()

    def _next(self) -> tuple[Any, ...]:
        while True:
            heed()
            with contextlib.suppress(queue.Empty):
                return self._answers.get(timeout=SLICE)  # Windows cannot interrupt a longer wait

    def _answer(self, word: str, number: int, what: int, *asked: Any) -> None:
        """Ask the person, or have the key sign, and send what that gave."""
        assert self._process
        answer: Any = None
        try:
            if word == "question":
                self._life.await_handlers()
                answer = ask_person(self._marshaller.prompts[what], *asked)
            else:
                answer = _sign(self._marshaller.keys[what], *asked)
        finally:  # the child waits for it, whatever the prompt has raised
            self._process.send(("answer", number, self._marshaller.pack(answer)))

    def _answer_meanwhile(self, *message: Any) -> None:
        try:
            self._answer(*message)
        except Exception:  # whatever it is, it is the prompt's, and nobody above us would see it
            log.exception("prompt failed")

    @property
    def log(self) -> tuple[str, ...]:
        """The last lines of the server; those known last, if the child is gone or does not answer in time."""
        self._ask("log")
        return self._log

    def status(self) -> TunnelStatus:
        """Return what it does; what was known last, likewise."""
        self._ask("status")
        return self._status

    def _ask(self, word: str) -> None:
        """Ask the child for something, and wait for that a little."""
        process = self._process
        # Where it has yet to answer that many, it does not run, and the pipe would only fill up.
        if process and process.listens and self._asked - self._told < _MOST_ASKED:
            with self._heard:
                number = self._asked = self._asked + 1
                process.send((word, 0, None))
                wait_for(self._heard, lambda: self._told >= number or not process.listens, _TELLS)

    def on_ready(self) -> None:
        """Follow what it has done since it stood there."""
        missed, self._missed = self._missed, None
        if missed:
            self._life.follow(*missed)

    def close(self, *, at_once: bool = False) -> None:
        """Let the child close everything; say what becomes of the server where it could not end that."""
        process = self._process
        if not process or not process.close():
            return
        self._records.finish()
        self._records.drain(_NO_TIME if _is_hurried() else _LAST_RECORDS)
        if process.stands and process.fell and self.info.grace is not None:
            outcome = "left" if self.info.detached else "unreached"
            self.info = dataclasses.replace(self.info, outcome=outcome)
            if not self.info.detached:
                self._life.warn(UNREACHED.format(self.info.grace))

    # What the child says.

    def _take(self, word: str, *rest: Any) -> None:
        if word == "event":
            self._pass_on(*rest)
        elif word == "state":
            state, error, traceback, info = rest
            self._follow(state, _with_cause(error, traceback) if error else None, info)
        elif word in ("question", "sign") and self._process and self._process.stands:
            name = f"bokeh-ssh ask {self._what.label}"
            threading.Thread(
                target=self._answer_meanwhile, args=(word, *rest), name=name, daemon=True
            ).start()
        elif word == "log":
            self._records.put(rest[0])
        elif word in ("lines", "status"):
            with self._heard:
                if word == "lines":
                    self._log = rest[0] or self._log
                else:
                    self._status = rest[0]
                self._told += 1
                self._heard.notify_all()
        elif word != "hello":
            if word == "ready":
                assert self._process
                self.info, self._process.stands = rest[0], True
            self._answers.put((word, *rest))

    def _pass_on(self, event: Event, info: TunnelInfo) -> None:
        """Report what happened there; that it has closed is reported once we have."""
        self.info = info
        if isinstance(event, Ready):
            self._ready = event
        elif not isinstance(event, Closed):
            self._life.deliver(event)  # it was logged there, and logging here could block

    def _follow(self, state: State, error: BokehSSHError | None, info: TunnelInfo) -> None:
        """Be as it is there; wait with that until we have heard that it stood."""
        with self._life.change:
            if self._life.state is State.CONNECTING:
                self._missed = state, error
            else:
                self._life.follow(state, error)
            self.info = info

    def _on_end(self, error: BokehSSHError | None) -> None:
        """Fail, since the child process has ended.

        :param error: why, where it has ended by itself; that is reported before our end is
        """
        self._answers.put(("ended",))
        with self._heard:
            self._heard.notify_all()
        if error:
            lost = Lost(host=self._what.label, reason=error.message)
            with self._life.change:
                self._follow(State.FAILED, error, self.info)
                self._life.deliver(lost)
            self._records.finish()


def _is_hurried() -> bool:
    """Return whether nobody wants to wait, as after Ctrl-C."""
    return isinstance(sys.exc_info()[1], KeyboardInterrupt)


class ChildProcess:
    """A child process: what is said to it and heard from it, whether it runs, and its end.

    :param label: the host, for messages
    :param first: what is sent to it before anybody else can send something
    :param take: gets each message: a word and what belongs to it; must not block
    :param on_end: called when it has ended, with the reason where it did so by itself; must not block
    :ivar stands: whether it holds something that is open; set by whoever takes the messages
    :ivar fell: whether it ended, or was ended, before it had closed what it held
    """

    def __init__(
        self,
        label: str,
        first: Sequence[Any],
        take: Callable[..., None],
        on_end: Callable[[BokehSSHError | None], None],
    ) -> None:
        self.stands = False
        self.fell = False
        self._label = label
        self._take = take
        self._on_end = on_end
        self._change = threading.Condition()
        self._words = 0  # messages that it has sent
        self._asked = False  # whether it has yet to answer that it runs
        self._hangs = False  # whether it was ended for its silence
        self._dead = False
        self._closing = False
        self._over = threading.Event()
        self._orders: Dispatcher[bytes | None] = Dispatcher(
            self._write, f"bokeh-ssh orders {label}", "the child process", spare=()
        )
        flags: dict[str, Any] = {"start_new_session": True}
        if sys.platform == "win32":
            flags = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
        # Either way, Ctrl-C in the terminal is the parent's alone: the child is told what to do.
        self._process = subprocess.Popen(  # our own interpreter
            [sys.executable, "-c", _BOOT],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
            **flags,
        )
        assert self._process.stdin
        assert self._process.stdout
        self._to: BinaryIO = self._process.stdin  # type: ignore[assignment]  # IO[bytes] is one
        self._from: BinaryIO = self._process.stdout  # type: ignore[assignment]
        in_child(self, ChildProcess._abandon)
        for message in first:
            self.send(message)
        self._reader = Thread(self._read, name=f"bokeh-ssh child {label}")
        self._reader.start()
        self._watcher = Thread(self._watch, name=f"bokeh-ssh watch {label}")
        self._watcher.start()

    def _abandon(self) -> None:
        """Close a forked copy's ends of the pipes: the child takes their end for the parent's."""
        self._closing = self._dead = True
        self._change = threading.Condition()  # another thread may have held the old one
        null = os.open(os.devnull, os.O_RDWR)
        for stream in (self._to, self._from):
            with contextlib.suppress(OSError, ValueError):
                os.dup2(null, stream.fileno())  # closed, its number would be free, and closed again later
        os.close(null)

    @property
    def listens(self) -> bool:
        """Whether it may still answer."""
        return not (self._dead or self._closing)

    def close(self) -> bool:
        """Let the child close everything, and end; the last it said is handled before this returns.

        One that does not run is killed.

        :returns: whether it was not closed yet
        """
        hurry = _is_hurried()
        with self._change:
            if self._closing:
                return False
            self._closing = True
            words = self._words
        self._over.set()
        self._ping()
        self._orders.put(None)  # the order to stop
        self._orders.finish()
        if words:  # else it has nothing yet
            patience = _HURRY if hurry else _LAST_WORD
            with self._change:
                wait_for(self._change, lambda: self._dead or self._words > words, patience)
        runs = self._dead or self._words > words > 0
        ended = False
        if runs:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_HURRY if hurry else _GOODBYE)
                ended = True
        if not ended and not (hurry and runs):
            self.fell = True
            self._process.kill()
        patience = _NO_TIME if hurry else _LAST_RECORDS
        self._reader.join(patience)
        self._watcher.join(patience)
        self._orders.drain(patience)
        return True

    def send(self, message: Any) -> None:
        """Queue a message to be sent; that nobody takes it is noticed by others."""
        self._orders.put(child_protocol.dump(message))

    def _write(self, data: bytes | None) -> None:
        with contextlib.suppress(OSError, ValueError):  # it is gone, as its reader sees
            if data is None:
                self._to.close()  # needs no reader that is alive
            else:
                child_protocol.write(self._to, data)

    def _ping(self) -> None:
        """Ask the child whether it runs, unless it has yet to answer that."""
        if not self._asked:
            self._asked = True
            self.send(("ping", 0, None))

    def _watch(self) -> None:
        """End a child that says nothing any more, as one that was stopped, and wake who waits for it."""
        words, since = 0, time.monotonic()
        while True:
            patience = _STARTS if not self._words else _STANDS if self.stands else _OPENS
            pause = patience / 5
            before = clocks()
            if self._over.wait(pause):
                return
            after = clocks()
            late = max(b - a for a, b in zip(before, after, strict=True)) > pause + _LATE
            if late or self._words != words:
                words, since = self._words, after[0]
            elif after[0] - since >= patience:
                self._hangs = self.fell = True
                self._process.kill()
                return
            if words:  # else it does not hear yet
                self._ping()

    def end_error(self) -> ConnectionLostError:
        """Make the error of its end."""
        if self._hangs:
            msg = "the child process that holds the connection does not respond, and was ended"
            hint = "see whether something stops processes on this machine, and open it again"
            return ConnectionLostError(msg, host=self._label, hint=hint)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(1)
        status = self._process.returncode
        how = "ended" if status is None else f"ended by itself (exit status {status})"
        if status is not None and status < 0:
            why = ": there was no memory left, or somebody ended it" if status == -9 else ""
            how = f"was killed (signal {-status}{why})"
        msg = f"the child process that holds the connection {how}"
        hint = "open it again; a server that it started ends after its grace, until when it can be taken over"
        return ConnectionLostError(msg, host=self._label, hint=hint)

    def _read(self) -> None:
        try:
            while True:
                word, *rest = child_protocol.read(self._from)
                with self._change:
                    self._words += 1
                    self._change.notify_all()
                if word == "pong":
                    self._asked = False
                else:
                    self._take(word, *rest)
        except (EOFError, OSError, ValueError):
            pass
        finally:
            with self._change:
                self._dead = True
                by_itself = not self._closing
                self.fell = self.fell or by_itself
                self._change.notify_all()
            self._over.set()
            self._orders.put(None)
            self._orders.finish()
            self._on_end(self.end_error() if by_itself else None)
            self._process.wait()  # no zombie, also where nobody waited in close()
            self._from.close()


def _log(values: dict[str, Any]) -> None:
    """Hand a record of the child's to the logger of that name here."""
    record = logging.makeLogRecord(values)
    logger = logging.getLogger(record.name)
    if logger.isEnabledFor(record.levelno):
        logger.handle(record)


def _sign(key: Any, data: bytes, algorithm: str | None) -> bytes:
    signature = key.sign_ssh_data(data, algorithm)
    return bytes(getattr(signature, "asbytes", lambda: signature)())


class RemoteTraceback(Exception):  # noqa: N818  # it is where an error came from, not one itself
    """Where in the child an error came from; the ``__cause__`` of what is raised here."""


def _with_cause(error: BokehSSHError, traceback: str) -> BokehSSHError:
    error.__cause__ = RemoteTraceback(f"\n{traceback}")
    return error
