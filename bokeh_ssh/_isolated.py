"""The parent's side of a child process that holds the SSH side (``isolate=True``).

A program that computes holds Python's interpreter lock, and threads of its own that forward would wait for
it: measured, 6 MB/s and 11 ms. A process of its own waits for nobody.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any, BinaryIO

from bokeh_ssh import _parcel
from bokeh_ssh._errors import BokehSSHError, ConnectionLostError
from bokeh_ssh._events import Event, Lost
from bokeh_ssh._fork import in_child
from bokeh_ssh._wait import SLICE, heed

log = logging.getLogger("bokeh_ssh")

#: Seconds for the child to end what it started, here and there: TERM, wait, KILL of a remote server.
_GOODBYE = 20.0
#: Seconds when nobody wants to wait, as after Ctrl-C; the child goes on by itself.
_HURRY = 1.5
#: The child finds the package where we have it, whatever its own path would be.
#: And paramiko gets no invoke: it asks for one directive of an ssh_config reader that we do not use, and is
#: a quarter of what there is to import.
_BOOT = (
    "import pickle, struct, sys; i = sys.stdin.buffer; n = i.read(4) or sys.exit(); "
    "sys.modules['invoke'] = None; "
    "sys.path[:] = pickle.loads(i.read(struct.unpack('>I', n)[0])); "
    "from bokeh_ssh._child import main; main()"
)


def is_possible() -> bool:
    """Tell whether this program can start a Python of its own kind."""
    return bool(sys.executable) and not getattr(sys, "frozen", False)


#: (state, error, facts)
OnState = Callable[[Any, "BokehSSHError | None", "dict[str, Any]"], None]


class Child:
    """A child process with one tunnel or forward in it.

    :param label: the host, for messages
    :param on_event: gets its events, on a thread of ours
    :param on_state: told each state that it has once it stood, with the error behind it, where there is one,
        and what has changed of its facts; "failed" too if the process ends by itself
    """

    def __init__(self, label: str, on_event: Callable[[Event], None], on_state: OnState) -> None:
        self._label = label
        self._on_event = on_event
        self._on_state = on_state
        self._packer = _parcel.Packer()
        self._stands = False
        self._answers: queue.SimpleQueue[tuple[Any, ...]] = queue.SimpleQueue()
        self._lock = threading.Lock()  # one writer at a time
        self._getting = threading.Lock()
        self._closing = False
        flags: dict[str, Any] = {"start_new_session": True}
        if sys.platform == "win32":
            flags = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
        # Either way, Ctrl-C in the terminal is the parent's alone: the child is told what to do.
        self._process = subprocess.Popen(  # our own interpreter
            [sys.executable, "-c", _BOOT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, **flags
        )
        assert self._process.stdin
        assert self._process.stdout
        self._to: BinaryIO = self._process.stdin  # type: ignore[assignment]  # IO[bytes] is one
        self._from: BinaryIO = self._process.stdout  # type: ignore[assignment]
        in_child(self, _let_go)
        self._reader = threading.Thread(target=self._read, name=f"bokeh-ssh child {label}", daemon=True)
        self._reader.start()

    def open(self, kind: str, args: tuple[Any, ...], keywords: dict[str, Any]) -> dict[str, Any]:
        """Have the child make and open an object; gives its facts.

        Questions are asked on this thread; those of a later reconnection on one of their own.

        :raises BokehSSHError: whatever went wrong there
        """
        packed = self._packer.pack(args), self._packer.pack(keywords)
        self._send(sys.path)
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
                raise self._ended()

    def _next(self) -> tuple[Any, ...]:
        while True:
            heed()
            with contextlib.suppress(queue.Empty):
                return self._answers.get(timeout=SLICE)  # Windows cannot interrupt a longer wait

    def _answer(self, word: str, number: int, *asked: Any) -> None:
        """Ask the person, or have the key sign, and send what that gave."""
        if word == "question":
            answer = self._packer.prompts[number](*asked)
        else:
            answer = _sign(self._packer.keys[number], *asked)
        self._send(("answer", answer))

    def _answer_meanwhile(self, *message: Any) -> None:
        try:
            self._answer(*message)
        except BokehSSHError:  # the child is gone
            pass
        except Exception:  # whatever it is, it is the prompt's, and nobody above us would see it
            log.exception("prompt failed")
            with contextlib.suppress(BokehSSHError):
                self._send(("answer", None))

    def get(self, name: str) -> Any:
        """Read an attribute of the object there; None if the child is gone."""
        with self._getting:
            if self._closing:
                return None
            try:
                self._send(("get", name))
            except BokehSSHError:
                return None
            word, *rest = self._answers.get()
        return rest[0] if word == "got" else None

    def close(self) -> None:
        """Have the child close everything, and end; the last it said is handled before this returns."""
        hurry = isinstance(sys.exc_info()[1], KeyboardInterrupt)
        with self._getting:
            if self._closing:
                return
            self._closing = True
            with contextlib.suppress(OSError, ValueError):
                self._to.close()  # the order to stop; it needs no reader that is alive
        try:
            self._process.wait(_HURRY if hurry else _GOODBYE)
        except subprocess.TimeoutExpired:
            if not hurry:
                self._process.kill()
                self._process.wait()
        if threading.current_thread() is not self._reader:
            self._reader.join(0.1 if hurry else 2)

    def _send(self, message: Any) -> None:
        try:
            with self._lock:
                _parcel.write(self._to, message)
        except (OSError, ValueError) as exc:
            raise self._ended() from exc

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

    def _read(self) -> None:
        try:
            while True:
                self._take(_parcel.read(self._from))
        except (EOFError, OSError, ValueError):
            pass
        finally:
            self._process.wait()  # no zombie, also where nobody waited in close()
            self._from.close()
            self._answers.put(("ended",))
            if not self._closing:
                ended = self._ended()
                self._on_state("failed", ended, {})
                self._on_event(Lost(host=self._label, reason=ended.message))

    def _take(self, message: tuple[Any, ...]) -> None:
        word, *rest = message
        if word == "event":
            self._on_event(rest[0])
        elif word == "state":
            state, error, traceback, facts = rest
            self._on_state(state, _with_cause(error, traceback) if error else None, facts)
        elif word in ("question", "sign") and self._stands:
            threading.Thread(
                target=self._answer_meanwhile, args=message, name=f"bokeh-ssh ask {self._label}", daemon=True
            ).start()
        elif word == "log":
            record = logging.makeLogRecord(rest[0])
            logger = logging.getLogger(record.name)
            if logger.isEnabledFor(record.levelno):
                logger.handle(record)
        else:
            self._stands = self._stands or word == "ready"
            self._answers.put(message)


def _sign(key: Any, data: bytes, algorithm: str | None) -> bytes:
    signature = key.sign_ssh_data(data, algorithm)
    return bytes(getattr(signature, "asbytes", lambda: signature)())


class RemoteTraceback(Exception):  # noqa: N818  # it is where an error came from, not one itself
    """Where in the child an error came from; the ``__cause__`` of what is raised here."""


def _with_cause(error: BokehSSHError, traceback: str) -> BokehSSHError:
    error.__cause__ = RemoteTraceback(f"\n{traceback}")
    return error


def _let_go(child: Child) -> None:
    """Give up a forked copy's ends of the pipes: the child takes their end for the parent's."""
    child._closing = True
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (child._to, child._from):
        with contextlib.suppress(OSError, ValueError):
            os.dup2(null, stream.fileno())  # closing would free a number that the file object closes again
    os.close(null)
