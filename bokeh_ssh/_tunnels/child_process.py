"""The parent's side of a child process that holds the SSH side (``isolate=True``).

A program that computes holds Python's interpreter lock, and threads of its own that forward would wait for
it: measured, 6 MB/s and 11 ms. A process of its own waits for nobody.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, BinaryIO

from bokeh_ssh._core import python_path
from bokeh_ssh._core.dispatcher import Dispatcher
from bokeh_ssh._core.errors import BokehSSHError, ConnectionLostError
from bokeh_ssh._core.events import Event
from bokeh_ssh._core.fork import in_child
from bokeh_ssh._core.waiting import SLICE, clocks, heed, wait_for
from bokeh_ssh._ssh.auth.prompt_cache import ask_person
from bokeh_ssh._tunnels import child_protocol

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
#: Seconds for it to tell something; it only has to look.
_TELLS = 3.0
#: Questions that may be open at once.
_MOST_ASKED = 100
#: Seconds that the watch may be late; if it is more, this program was stopped itself, or the machine slept.
_LATE = 5.0
#: Seconds for the handlers of its last log records.
_LAST_RECORDS = 2.0
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


#: (event, facts)
OnEvent = Callable[[Event, "dict[str, Any]"], None]
#: (state, error, facts)
OnState = Callable[[Any, "BokehSSHError | None", "dict[str, Any]"], None]


class Child:
    """A child process with one tunnel or forward in it.

    Nothing that is said to it, asked of it or heard from it waits for it without a deadline, and the thread
    that hears it calls nothing that may block: a process can be stopped or hang at any time.

    :param label: the host, for messages
    :param on_event: gets its events, and what is known of the object by then; must not block
    :param on_state: told each state that it has once it stood, with the error behind it, where there is one,
        and what has changed of its facts; must not block
    :param on_end: told why the process ended, where it did so by itself; must not block
    :param before: called before a person is asked
    :ivar stood: whether what is in it has been open
    :ivar fell: whether it ended, or was ended, before it had closed what it held
    """

    def __init__(
        self,
        label: str,
        *,
        on_event: OnEvent,
        on_state: OnState,
        on_end: Callable[[BokehSSHError], None],
        before: Callable[[], object],
    ) -> None:
        self._label = label
        self._on_event = on_event
        self._on_state = on_state
        self._on_end = on_end
        self._before = before
        self._marshaller = child_protocol.Marshaller()
        self.stood = False
        self._answers: queue.SimpleQueue[tuple[Any, ...]] = queue.SimpleQueue()  # to open()
        self._slots: dict[int, queue.SimpleQueue[Any]] = {}  # to get()
        self._numbers = itertools.count()
        self._change = threading.Condition()
        self._words = 0  # messages that it has sent
        self._pinged = self._ponged = 0
        self._hangs = False  # whether it was ended for its silence
        self._dead = False
        self._closing = False
        self._over = threading.Event()
        self.fell = False
        self._orders: Dispatcher[bytes | None] = Dispatcher(
            self._write, f"bokeh-ssh orders {label}", "the child process", spare=()
        )
        # A handler of the program's log may use what is in the child, and so must not hold up who hears it.
        self._records = Dispatcher(_log, f"bokeh-ssh log {label}", "logging")
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
        in_child(self, _abandon_child)
        self._reader = threading.Thread(target=self._read, name=f"bokeh-ssh child {label}", daemon=True)
        self._reader.start()
        self._watcher = threading.Thread(target=self._watch, name=f"bokeh-ssh watch {label}", daemon=True)
        self._watcher.start()

    def open(self, kind: str, args: tuple[Any, ...], keywords: dict[str, Any]) -> dict[str, Any]:
        """Make and open an object in the child; return its facts.

        Questions are asked on this thread; those of a later reconnection on one of their own.

        :raises BokehSSHError: whatever went wrong there
        :raises ConnectionLostError: if the child ends, or does not respond
        """
        packed = self._marshaller.pack(args), self._marshaller.pack(keywords)
        self._send(python_path.hand_over())
        self._send((kind, *packed, log.getEffectiveLevel()))
        while True:
            word, *rest = self._next()
            if word in ("question", "sign"):
                self._answer(word, *rest)
            elif word == "ready":
                facts: dict[str, Any] = rest[0]
                return facts
            elif word == "failed":
                raise _with_cause(*rest)
            else:
                raise self._hung() if self._hangs else self._ended()

    def _next(self) -> tuple[Any, ...]:
        while True:
            heed()
            with contextlib.suppress(queue.Empty):
                return self._answers.get(timeout=SLICE)  # Windows cannot interrupt a longer wait

    def _answer(self, word: str, number: int, what: int, *asked: Any) -> None:
        """Ask the person, or have the key sign, and send what that gave."""
        answer: Any = None
        try:
            if word == "question":
                self._before()
                answer = ask_person(self._marshaller.prompts[what], *asked)
            else:
                answer = _sign(self._marshaller.keys[what], *asked)
        finally:  # the child waits for it, whatever the prompt has raised
            self._send(("answer", number, self._marshaller.pack(answer)))

    def _answer_meanwhile(self, *message: Any) -> None:
        try:
            self._answer(*message)
        except Exception:  # whatever it is, it is the prompt's, and nobody above us would see it
            log.exception("prompt failed")

    def get(self, name: str) -> Any:
        """Read an attribute of the object there; None if the child is gone, or does not tell it in time."""
        number = next(self._numbers)
        slot: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._slots[number] = slot
        try:
            # Where it has yet to answer that many, it does not run, and the pipe would only fill up.
            if self._dead or self._closing or len(self._slots) > _MOST_ASKED:
                return None
            self._send(("get", number, name))
            return slot.get(timeout=_TELLS)
        except queue.Empty:
            return None
        finally:
            del self._slots[number]

    def close(self) -> None:
        """Let the child close everything, and end; the last it said is handled before this returns.

        One that does not run is killed.
        """
        hurry = isinstance(sys.exc_info()[1], KeyboardInterrupt)
        with self._change:
            if self._closing:
                return
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
        if threading.current_thread() is not self._reader:
            self._reader.join(0.1 if hurry else _LAST_RECORDS)
        self._watcher.join(0.1 if hurry else _LAST_RECORDS)
        self._orders.drain(0.1 if hurry else _LAST_RECORDS)
        self._records.finish()
        self._records.drain(0.1 if hurry else _LAST_RECORDS)

    def _send(self, message: Any) -> None:
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
        if self._pinged == self._ponged:
            self._pinged += 1
            self._send(("ping", 0, None))

    def _watch(self) -> None:
        """End a child that says nothing any more, as one that was stopped; whoever waits for it is told."""
        words, since = 0, time.monotonic()
        while True:
            patience = _STARTS if not self._words else _STANDS if self.stood else _OPENS
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

    def _ended(self) -> ConnectionLostError:
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

    def _hung(self) -> ConnectionLostError:
        msg = "the child process that holds the connection does not respond, and was ended"
        hint = "see whether something stops processes on this machine, and open it again"
        return ConnectionLostError(msg, host=self._label, hint=hint)

    def _read(self) -> None:
        try:
            while True:
                self._take(child_protocol.read(self._from))
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
            self._answers.put(("ended",))
            for slot in list(self._slots.values()):
                slot.put(None)
            if by_itself:
                self._on_end(self._hung() if self._hangs else self._ended())
                self._records.finish()
            self._process.wait()  # no zombie, also where nobody waited in close()
            self._from.close()

    def _take(self, message: tuple[Any, ...]) -> None:
        with self._change:
            self._words += 1
            self._change.notify_all()
        word, *rest = message
        if word == "event":
            self._on_event(*rest)
        elif word == "state":
            state, error, traceback, facts = rest
            self._on_state(state, _with_cause(error, traceback) if error else None, facts)
        elif word in ("question", "sign") and self.stood:
            threading.Thread(
                target=self._answer_meanwhile, args=message, name=f"bokeh-ssh ask {self._label}", daemon=True
            ).start()
        elif word == "log":
            self._records.put(rest[0])
        elif word == "got":
            slot = self._slots.get(rest[0])
            if slot:
                slot.put(rest[1])
        elif word == "pong":
            self._ponged += 1
        elif word != "hello":
            self.stood = self.stood or word == "ready"
            self._answers.put(message)


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


def _abandon_child(child: Child) -> None:
    """Close a forked copy's ends of the pipes: the child takes their end for the parent's."""
    child._closing = child._dead = True
    child._change = threading.Condition()  # another thread may have held the old one
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (child._to, child._from):
        with contextlib.suppress(OSError, ValueError):
            os.dup2(null, stream.fileno())  # closing would free a number that the file object closes again
    os.close(null)
