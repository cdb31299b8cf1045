"""Opening, living, coming back and closing, the same for every public object.

::

    new ──▶ connecting ──▶ ready ──▶ lost ──▶ reconnecting ──▶ ready
                 │           │        ▲ │          │
                 │           │        └─┼──────────┤ it may pass
                 ▼           ▼          ▼          ▼
               failed      failed    closed      failed
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import logging
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, Literal, TypeVar

from bokeh_ssh._core.backoff import Attempts, pause_before
from bokeh_ssh._core.dispatcher import Dispatcher, parked
from bokeh_ssh._core.errors import BokehSSHError, ConnectionLostError, TunnelClosedError
from bokeh_ssh._core.events import (
    Closed,
    Event,
    HostKeyVerified,
    Lost,
    OnEvent,
    Ready,
    Reconnected,
    Reconnecting,
    ignore,
)
from bokeh_ssh._core.fork import in_child
from bokeh_ssh._core.network_changes import NetworkWatch
from bokeh_ssh._core.waiting import SLICE, wait, wait_for, wanted
from bokeh_ssh._tunnels.aio import Awaiting
from bokeh_ssh._tunnels.child_process import Child, is_possible

log = logging.getLogger("bokeh_ssh")

State = Literal["new", "connecting", "queued", "ready", "lost", "reconnecting", "closed", "failed"]
_Self = TypeVar("_Self", bound="Lifecycle")

_OPEN = ("connecting", "ready", "lost", "reconnecting")
#: Seconds that ``close()`` waits for an attempt that is under way to give up.
_GIVING_UP = 2.0
#: Seconds that it waits for another thread that closes the same thing.
_OTHERS = 15.0
#: Seconds that opening, closing and asking wait for ``on_event`` to have taken what came before; and after
#: Ctrl-C. One that takes longer delays them, and holds nobody up.
_HANDLERS = 5.0
_HURRIED = 0.5


class Lifecycle(Awaiting):
    """Something that is opened, used and closed, once or several times; with ``async with`` too.

    A subclass opens what stays while lines come and go in :meth:`_open_local`, and everything that goes over
    SSH in :meth:`_connect_all`, which is called again after a loss. When something breaks it calls
    :meth:`_on_connection_lost`.
    """

    _label = ""
    #: The attributes that an object in a child process tells the one that is seen here.
    _shared: tuple[str, ...] = ()

    def __new__(cls: type[_Self], *args: Any, **keywords: Any) -> _Self:
        made = super().__new__(cls)
        made._constructor_args = args, keywords  # to make it again in a child process
        return made

    _constructor_args: tuple[tuple[Any, ...], dict[str, Any]]

    def __init__(self, on_event: OnEvent | None, isolate: bool, reconnect: bool) -> None:
        self._listener = on_event or ignore
        self._pending_event: Event | None = None  # that it is ready, or is again, until it is
        self._isolate = isolate
        self._reconnect = bool(reconnect)
        self._answered = False  # whether the attempt under way has met the server
        self._child: Child | None = None
        self._missed_state: tuple[State, BokehSSHError | None, dict[str, Any]] | None = None
        self._state: State = "new"
        self._stack = contextlib.ExitStack()  # what stays; below it
        self._connection_stack = contextlib.ExitStack()  # what goes over SSH
        self._change = threading.Condition()
        self._error: BokehSSHError | None = None
        self._opener: threading.Thread | None = None
        self._recovery: threading.Thread | None = None
        self._cancelled = False
        self._ending = threading.Event()
        self._attempts = Attempts()
        self._peers: tuple[str, ...] = ()  # addresses of the machines that it has reached from here
        self._ended = True  # whether there is nothing to close
        self._closer: threading.Thread | None = None  # who closes it now
        self._closed = threading.Event()
        self._server_outcome = ""  # what became of the remote server, see Closed
        #: For the child process: told each new state.
        self._on_state: Callable[[], object] = _nothing
        self._make_dispatcher()
        in_child(self, Lifecycle._abandon)

    def _make_dispatcher(self) -> None:
        # Events come on any thread, those among them that must not wait: a connection's, a loop's.
        self._dispatcher = Dispatcher(self._listener, "bokeh-ssh events", "on_event")
        #: Told each event; never blocks. The child process has another way.
        self._deliver: Callable[[Event], object] = (
            _nothing_of if self._listener is ignore else self._dispatcher.put
        )

    def _abandon(self) -> None:
        """Be closed in a forked child, without touching what is the parent's; it can be opened anew there."""
        self._change = threading.Condition()  # another thread may have held the old one
        self._make_dispatcher()
        self._closer = None
        if self._state != "new":
            self._state = "closed"
        self._recovery = None
        self._parents = (
            self._stack,
            self._connection_stack,
        )  # kept, or what ends with them would be ended here
        self._stack, self._connection_stack = contextlib.ExitStack(), contextlib.ExitStack()

    # What a subclass brings.

    def _open_local(self, stack: contextlib.ExitStack) -> None:
        """Open what outlives a loss; what must be closed goes on ``stack``."""

    def _connect_all(self, connection_stack: contextlib.ExitStack) -> bool:
        """Open everything that goes over SSH; what must be closed goes on ``connection_stack``.

        :returns: whether the remote server, if there is one, is the one from before
        """
        raise NotImplementedError

    def _drop_silent_connections(self) -> None:
        """Make sure that closing the line waits for nobody who does not answer."""

    def _report_outcome(self) -> None:
        """Report what could not be ended, once nothing more will be."""

    # Opening.

    @property
    def state(self) -> State:
        """What it does.

        "new", "connecting", "ready", "lost" (down, and waiting to try again), "reconnecting" (trying),
        "closed" or "failed" (it ended by itself; :meth:`wait` raises why).
        """
        return self._state

    def open(self: _Self) -> _Self:
        """Open it; does nothing if it is open. After :meth:`close` it opens anew, but not from ``on_event``.

        When it returns, ``on_event`` has taken all that was told meanwhile, unless that takes more than 5 s.

        :raises TunnelClosedError: if it was closed meanwhile, in ``on_event`` too; in ``on_event``, if it has
            ended
        :raises BokehSSHError: whatever went wrong; nothing is left open then
        """
        here = threading.current_thread()
        if self._closer not in (None, here):
            wait(self._closed, _OTHERS)
        with self._change:
            if self._state in _OPEN:
                return self
            if self._dispatcher.is_here:  # what it was told of is over
                msg = "it has ended"
                raise TunnelClosedError(msg, host=self._label, hint="open it again outside of on_event")
            self._error = None
            self._missed_state = None
            self._pending_event = None
            self._server_outcome = ""
            self._cancelled = False
            self._ending = ending = threading.Event()
            self._attempts = Attempts()
            self._opener = here
            self._stack, self._connection_stack = contextlib.ExitStack(), contextlib.ExitStack()
            self._dispatcher.begin(f"bokeh-ssh events {self._label}")
            self._set_state("connecting")
            self._ended = False  # last: before that, a signal handler has nothing to close
        try:
            with wanted(self._check_wanted):
                if self._isolate and is_possible():
                    self._start_child(self._stack)
                else:
                    self._open_local(self._stack)
                    self._connect_all(self._connection_stack)
            self._become_ready()
            self._await_handlers()
        except BaseException as exc:
            with self._change:
                closed = self._ended  # by a signal handler, or by another thread once it stood
                self._ended = True
                self._ending.set()
                self._attempts.stop()
                if not closed:
                    self._set_state("failed")
            self._close_connections()
            self._stack.close()
            cancelled = self._cancelled and isinstance(exc, BokehSSHError)
            if cancelled:
                self._set_state("closed")
            self._dispatcher.finish()
            with wanted(None):
                self._await_handlers()
            if cancelled:
                msg = "it was closed while it opened"
                raise TunnelClosedError(msg, host=self._label) from exc
            raise
        finally:
            self._opener = None
        if ending.is_set():
            wait(self._closed, _OTHERS)
            msg = "it was closed while it opened"
            raise TunnelClosedError(msg, host=self._label)
        return self

    def _start_child(self, stack: contextlib.ExitStack) -> None:
        """Open it in a child process, and take over what it found."""
        args, keywords = self._constructor_args
        keywords = {name: value for name, value in keywords.items() if name not in ("on_event", "isolate")}
        child = self._child = Child(
            self._label,
            on_event=self._pass_on,
            on_state=self._follow,
            on_end=self._fail_with_child,
            before=self._await_handlers,
        )
        stack.callback(child.close)
        self._apply_info(child.open(type(self).__name__, args, keywords))

    def _pass_on(self, event: Event, facts: dict[str, Any]) -> None:
        """Report what happened in the child process; that it has closed is told once we have."""
        if isinstance(event, Closed):
            self._server_outcome = event.server
            return
        with self._change:
            if self._state in _OPEN:
                self._apply_info(facts)
        self._queue(event)  # it was logged there, and logging here could block

    def _follow(self, state: State, error: BokehSSHError | None, facts: dict[str, Any]) -> None:
        """Be as the object in the child process is."""
        with self._change:
            if self._state == "connecting":  # it broke before we had heard that it stands
                self._missed_state = state, error, facts
            elif self._state in _OPEN and state != "closed":
                self._apply_info(facts)
                self._error = error
                self._set_state(state)

    def _fail_with_child(self, error: BokehSSHError) -> None:
        """Fail, since the child process has ended by itself."""
        lost = Lost(host=self._label, reason=error.message)
        with self._change:  # who waits for the end is to have been told of it
            self._follow("failed", error, {})
            self._deliver(lost)

    def _report_child_outcome(self) -> None:
        """Report what becomes of what the child process held, where that could not end it."""

    def _apply_info(self, facts: dict[str, Any]) -> None:
        for name, value in facts.items():
            setattr(self, name, value)

    def _info(self) -> dict[str, Any]:
        """Return what an object in another process needs to know to stand for this one."""
        return {name: getattr(self, name) for name in self._shared}

    def _check_wanted(self) -> None:
        """Stop opening what is being closed; for waits that would not notice.

        :raises TunnelClosedError: if it is
        """
        if self._cancelled:
            msg = "it was closed while it opened"
            raise TunnelClosedError(msg, host=self._label)

    def _check_attempt(self) -> None:
        """Stop an attempt that waits for nothing as well: this machine left the network that it began on.

        Once the server has answered it goes on: a person may be asked for a code.

        :raises TunnelClosedError: if it is being closed
        :raises ConnectionLostError: if the network has changed
        """
        self._check_wanted()
        if self._attempts.stale and not self._answered:
            msg = "this machine's network changed while it was reached"
            raise ConnectionLostError(msg, host=self._label)

    def _become_ready(self) -> None:
        with self._change:
            if self._error:  # it broke in the last moment
                raise self._error
            self._check_wanted()
            self._attempts.succeed()  # before it can be lost again, from which on there are others
            self._set_state("ready")
            if self._ending.is_set():  # by a signal handler, just now
                self._set_state("closed")
                self._check_wanted()
            unsaid, self._pending_event = self._pending_event, None
            if unsaid:
                self._deliver(unsaid)
            missed, self._missed_state = self._missed_state, None
            if missed:
                self._follow(*missed)

    # Losing the line, and making it again.

    def _on_connection_lost(self, error: BokehSSHError) -> None:
        """Note that it broke; from any thread, never blocks."""
        recovery = None
        with self._change:
            if self._state in ("connecting", "reconnecting"):
                self._error = self._error or error  # the attempt that is under way fails with it
            if self._state != "ready":
                return
            if self._reconnect and error.temporary:
                self._set_state("lost")
                self._attempts.begin()
                name = f"bokeh-ssh reconnect {self._label}"
                recovery = threading.Thread(
                    target=self._recover, args=(error.message,), name=name, daemon=True
                )
                self._recovery = recovery
            else:
                self._error = error
                self._set_state("failed")
                self._attempts.stop()
            lost = Lost(host=error.host or self._label, reason=error.message)
            self._deliver(lost)  # before anybody who waits for the end can go on
        log.debug("%s", lost)
        if recovery:
            recovery.start()

    def _recover(self, reason: str) -> None:
        """Make the line again, however often that takes.

        :param reason: why it was lost
        """
        attempts = self._attempts
        with NetworkWatch(attempts.note_change, self._peers, self._label):
            if not self._recover_with(attempts, reason):
                attempts.stop()

    def _recover_with(self, attempts: Attempts, reason: str) -> bool:
        """Try until it stands; False if it will not, or nobody wants it any more."""
        for attempt in itertools.count(1):
            self._close_connections()
            if self._ending.is_set():
                return False
            pause = pause_before(attempt)
            told = Reconnecting(host=self._label, attempt=attempt, delay=pause, reason=reason)
            self._emit(told)
            early = dataclasses.replace(told, delay=0.0)
            if not attempts.wait(pause, functools.partial(self._emit, early)) or not self._try_again():
                return False
            try:
                with wanted(self._check_attempt):
                    same = self._connect_all(self._connection_stack)
                back = self._pending_event = Reconnected(host=self._label, same_server=same)
                self._become_ready()
            except BokehSSHError as exc:
                reason = exc.message
                if not self._go_on_after(exc):
                    return False
                attempts.fail()
            except Exception as exc:  # a defect of ours; nobody above us would see it
                log.exception("making the connection again failed")
                self._go_on_after(BokehSSHError(f"making the connection again failed ({exc!r})"))
                return False
            else:
                log.debug("%s", back)
                return True
        return False

    def _try_again(self) -> bool:
        with self._change:
            if self._state != "lost":
                return False
            self._error = None
            self._answered = False
            self._connection_stack = contextlib.ExitStack()
            self._set_state("reconnecting")
            return True

    def _go_on_after(self, error: BokehSSHError) -> bool:
        """Note that an attempt failed; return whether another one may do better."""
        with self._change:
            if self._state == "reconnecting" and error.temporary:
                self._error = None
                self._set_state("lost")
                return True
            failed = self._state == "reconnecting"
            if failed:
                self._error = error
                self._set_state("failed")
                self._deliver(Lost(host=error.host or self._label, reason=str(error)))
        self._close_connections()
        return False

    def _close_connections(self) -> None:
        """Close everything that goes over SSH."""
        with wanted(None):
            self._connection_stack.close()

    @property
    def _leaving(self) -> bool:
        """Whether the line is being closed for good, and not because it is made again."""
        return self._state in ("closed", "failed") or self._ending.is_set()

    # Closing.

    def close(self) -> None:
        """Close it, and end what it started, everywhere; idempotent, from any thread.

        Where another thread closes it already, waits until that is done, so that a program may end then. In
        ``on_event`` it works too; an opening that is under way then raises :exc:`TunnelClosedError`.
        """
        opener = self._opener
        whose = self._claim()
        if whose == "opener":
            # It sees its connections end, cleans up by itself and says so.
            self._close_connections()
            self._stack.close()
            self._await_opener(opener)
        elif whose == "other":
            self._closed.wait(_OTHERS)
            with wanted(None):
                self._await_handlers()
        if whose != "ours":
            return
        recovery = self._recovery
        try:
            with wanted(None):  # a signal handler may close what this very thread opens
                self._drop_silent_connections()
                self._connection_stack.close()
                if recovery and recovery.is_alive() and recovery is not threading.current_thread():
                    recovery.join(_GIVING_UP)
                self._connection_stack.close()  # what an attempt that was under way still added
                self._report_outcome()
                self._stack.close()
                if self._child and self._child.fell and self._child.stood:
                    self._report_child_outcome()
        finally:
            self._recovery = None
            closed = Closed(host=self._label, server=self._server_outcome)
            with self._change:  # it can be opened again from here on
                self._deliver(closed)
                self._dispatcher.finish()
                self._closer = None
                self._closed.set()
            log.debug("%s", closed)
            with wanted(None):
                self._await_handlers()

    def _await_opener(self, opener: threading.Thread | None) -> None:
        """Wait a little for an opening that is given up to have cleaned up."""

        def is_over() -> bool:
            return self._opener is not opener or self._state == "closed"

        with wanted(None), parked(is_over), self._change:
            wait_for(self._change, is_over, _GIVING_UP)

    def _claim(self) -> Literal["ours", "opener", "other", "nobody"]:
        """Find out whose part it is to close it, and begin."""
        here = threading.current_thread()
        with self._change:
            if self._ended:
                # A signal handler may be in the middle of the very thread that closes it.
                return "nobody" if self._closer in (None, here) else "other"
            self._cancelled = self._cancelled or self._state in ("connecting", "reconnecting")
            self._ending.set()
            self._attempts.stop()
            if self._state == "connecting" and self._opener is not here:
                return "opener"
            self._ended, self._closer = True, here
            self._closed.clear()
            self._set_state("closed")
            return "ours"

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it ends; a line that is made again is no end. Ctrl-C closes it, and the wait returns.

        :param timeout: seconds; None waits for ever
        :returns: False if it still lives after ``timeout`` seconds
        :raises BokehSSHError: why it ended, if it was not closed by us
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        try:
            with parked(lambda: self._state not in _OPEN), self._change:
                while self._state in _OPEN:
                    left = SLICE if deadline is None else min(SLICE, deadline - time.monotonic())
                    if left <= 0:
                        return False
                    self._change.wait(left)
            self._await_handlers()
        except KeyboardInterrupt:
            self.close()
            return True
        if self._error:
            raise self._error
        return True

    def __enter__(self: _Self) -> _Self:
        return self.open()

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _set_state(self, state: State) -> None:
        with self._change:
            self._state = state
            self._change.notify_all()
        self._on_state()

    def _check_open(self) -> None:
        """Refuse to work before it is open and after it is closed.

        :raises TunnelClosedError: in those states
        """
        if self._state not in _OPEN:
            msg = f"the tunnel is {self._state}"
            hint = "use it in a with statement, or call open() first"
            raise TunnelClosedError(msg, host=self._label, hint=hint)

    def _emit(self, event: Event) -> None:
        """Log and tell what happened; from any thread, waits for no handler."""
        self._queue(event)
        log.debug("%s", event)

    def _queue(self, event: Event) -> None:
        with self._change:
            self._answered = self._answered or isinstance(event, HostKeyVerified)
            if isinstance(event, Ready) and self._state == "connecting":
                self._pending_event = event  # who is told that it is ready finds it so
            else:
                self._deliver(event)

    def _await_handlers(self) -> None:
        """Wait until ``on_event`` has taken all events so far, with a deadline."""
        hurry = isinstance(sys.exc_info()[1], KeyboardInterrupt)
        self._dispatcher.drain(_HURRIED if hurry else _HANDLERS)


def _nothing_of(event: Event) -> None:
    pass


def _nothing() -> None:
    pass
