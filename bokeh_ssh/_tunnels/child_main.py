"""The child process that holds the SSH side of one tunnel or forward (``isolate=True``).

Started by ``_tunnels.child_process``. It runs the same classes as the parent would; standard input brings
orders, and its end means that the parent is gone: then everything is closed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import os
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any, BinaryIO

import paramiko
from paramiko.message import Message

from bokeh_ssh._core.dispatcher import Dispatcher
from bokeh_ssh._core.errors import BokehSSHError
from bokeh_ssh._core.events import Closed, Event, Question, ignore
from bokeh_ssh._core.waiting import SLICE, heed
from bokeh_ssh._ssh.auth.prompt_cache import PromptCache
from bokeh_ssh._tunnels import child_protocol
from bokeh_ssh._tunnels.lifecycle import Lifecycle, Opening, State
from bokeh_ssh._tunnels.local_session import LocalSession

#: Seconds for an opening which nobody wants any more to notice, and a parent to read the last words.
_GOODBYE = 2.0


class _Parent:
    """The line to the parent.

    What is said waits for a thread that writes it: a parent that is stopped holds up nothing here.
    """

    def __init__(self, orders: BinaryIO, reports: BinaryIO) -> None:
        self.orders = orders
        self._reports = reports
        self._writer = Dispatcher(
            self._write,
            "bokeh-ssh reports",
            "the program",
            spare=(lambda said: said[0] == "log", lambda said: said[0] == "event"),
        )
        self._numbers = itertools.count()
        self._slots: dict[int, queue.SimpleQueue[Any]] = {}
        #: Set when the parent is gone, or wants all of it closed: then it answers nothing more.
        self.gone = threading.Event()
        self.done = threading.Event()

    def send(self, *message: Any) -> None:
        """Send a message, without waiting; nothing is sent to a parent that is gone."""
        self._writer.put((message[0], child_protocol.dump(message)))

    def _write(self, said: tuple[str, bytes]) -> None:
        with contextlib.suppress(OSError, ValueError):  # the end of the orders says that it is gone
            child_protocol.write(self._reports, said[1])

    def finish(self, timeout: float) -> None:
        """Send what waits, for ``timeout`` seconds at most."""
        self._writer.finish()
        self._writer.drain(timeout)

    def ask(self, number: int) -> Callable[[Question], str | None]:
        """Make the prompt with that number."""

        def prompt(question: Question) -> str | None:
            answer: str | None = self._ask("question", number, question)
            return answer

        return prompt

    def key(self, number: child_protocol.KeyNumber) -> _ParentsKey:
        """Make the key that signs with the parent's key of that number."""
        return _ParentsKey(self, number)

    def sign(self, number: int, data: bytes, algorithm: str | None) -> bytes:
        """Ask the parent to sign with its key of that number."""
        signature: bytes | None = self._ask("sign", number, data, algorithm)
        if signature is None:
            msg = "the parent is gone"
            raise paramiko.SSHException(msg)
        return signature

    def _ask(self, word: str, *asked: Any) -> Any:
        """Ask something, and wait: a person takes as long as they like, and the parent's end is noticed."""
        number = next(self._numbers)
        slot: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._slots[number] = slot
        try:
            self.send(word, number, *asked)
            while not self.gone.is_set():
                heed()
                with contextlib.suppress(queue.Empty):
                    return slot.get(timeout=SLICE)
            return None
        finally:
            del self._slots[number]

    def listen(self, held: Lifecycle) -> None:
        """Take orders until the parent is gone; then close everything.

        Nothing here waits for anything: that an answer comes shows the parent that this process runs.
        """
        try:
            while True:
                word, number, value = child_protocol.read(self.orders)
                if word == "answer":
                    slot = self._slots.get(number)
                    if slot:
                        slot.put(value)
                elif word == "log":
                    self.send("lines", held.session.log)
                elif word == "status":
                    self.send("status", held.session.status())
                elif word == "ping":
                    self.send("pong")
        except (EOFError, OSError):
            pass
        self.gone.set()
        held.close()
        if not self.done.wait(_GOODBYE):
            self.finish(_GOODBYE)
            os._exit(1)  # it still tries to reach a machine, where it has nothing yet


class _ParentsKey(paramiko.PKey):
    """A key whose private half is the parent's."""

    def __init__(self, parent: _Parent, key: child_protocol.KeyNumber) -> None:
        self._parent = parent
        self._key = key
        self.public_blob = None

    @property
    def name(self) -> str:
        """Its algorithm, such as ``ssh-ed25519``."""
        return self._key.name

    @property
    def _fields(self) -> tuple[object, ...]:
        return self._key.name, self._key.blob

    def asbytes(self) -> bytes:
        return self._key.blob

    def get_name(self) -> str:
        return self._key.name

    def get_bits(self) -> int:
        return 0

    def can_sign(self) -> bool:
        return True

    def sign_ssh_data(self, data: bytes, algorithm: str | None = None) -> Message:
        return Message(self._parent.sign(self._key.number, data, algorithm))


class _Relay(logging.Handler):
    """Sends log records to the parent, made fit to be sent."""

    def __init__(self, parent: _Parent) -> None:
        super().__init__()
        self._parent = parent

    def emit(self, record: logging.LogRecord) -> None:
        text = self.format(record)
        values = {**record.__dict__, "msg": text, "args": None, "exc_info": None, "exc_text": None}
        self._parent.send("log", values)


def _is_ours_to_log(record: logging.LogRecord) -> bool:
    """Return whether the parent does not log it itself, as it does that all is closed."""
    return not (isinstance(record.args, tuple) and any(isinstance(each, Closed) for each in record.args))


def main() -> None:
    """Run one object for the parent at the other end of the standard streams."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    reports = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what anything prints must not get in between
    parent = _Parent(sys.stdin.buffer, reports)
    parent.send("hello")
    what, level = child_protocol.read(parent.orders)
    logger = logging.getLogger("bokeh_ssh")
    logger.setLevel(level)
    logger.propagate = False
    logger.addHandler(_Relay(parent))
    logger.addFilter(_is_ours_to_log)
    life = _make(parent, what)
    listener = threading.Thread(target=parent.listen, args=(life,), name="bokeh-ssh parent")
    life.begin()
    listener.start()
    try:
        life.open()
    except BokehSSHError as exc:
        parent.send("failed", exc, traceback.format_exc())
    except BaseException:
        parent.send("failed", BokehSSHError("the child process failed"), traceback.format_exc())
        raise
    else:
        parent.send("ready", life.session.info)
        life.on_state = lambda: _send_state(parent, life)
        if life.state is not State.READY:  # it broke in between
            life.on_state()
        with contextlib.suppress(BokehSSHError):  # its state was sent to the parent
            life.wait()
    finally:
        parent.done.set()
    listener.join()
    parent.finish(_GOODBYE)


def _make(parent: _Parent, what: Opening) -> Lifecycle:
    """Make what lives here; all that it says goes to the parent, with what is known by then."""
    args = child_protocol.unpack(what.args, parent.ask, parent.key)
    what = dataclasses.replace(what, args=args)

    def deliver(event: Event) -> None:
        parent.send("event", event, life.session.info)

    life = Lifecycle(
        what.label,
        lambda life: LocalSession(life, what, PromptCache()),
        Dispatcher(ignore, "", "the program"),  # the parent has one
        deliver,
    )
    return life


def _send_state(parent: _Parent, life: Lifecycle) -> None:
    error = life.error
    trace = "".join(traceback.format_exception(error)) if error else ""
    parent.send("state", life.state, error, trace, life.session.info)
