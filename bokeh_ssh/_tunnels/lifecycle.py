"""One life of what people open: its states, what leads from one to the next, and what is told of that.

::

    new ──▶ connecting ──▶ ready ──▶ lost ──▶ reconnecting ──▶ ready
                 │           │        ▲ │          │
                 │           │        └─┼──────────┤ it may pass
                 ▼           ▼          ▼          ▼
               failed      failed    closed      failed
"""

from __future__ import annotations

import contextlib
import enum
import logging
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from bokeh_ssh._core.dispatcher import Dispatcher, parked
from bokeh_ssh._core.endpoint import Endpoint
from bokeh_ssh._core.errors import BokehSSHError, TunnelClosedError
from bokeh_ssh._core.events import Closed, Event, Lost, Warned, ignore
from bokeh_ssh._core.this_machine.scarcity import scarcity_of
from bokeh_ssh._core.threads import Flag
from bokeh_ssh._core.waiting import SLICE, wait, wait_for, wanted
from bokeh_ssh._forwarding.status import TunnelStatus
from bokeh_ssh._jobs.job import Job

log = logging.getLogger("bokeh_ssh")

#: Seconds that ``close()`` waits for an opening that is under way to give up.
GIVING_UP = 2.0
#: Seconds that it waits for another thread that closes the same thing.
_OTHERS = 15.0
#: Seconds that opening, closing and asking wait for ``on_event`` to have taken what came before; and after
#: Ctrl-C. One that takes longer delays them, and holds nobody up.
_HANDLERS = 5.0
_HURRIED = 0.5
#: What is said of a server, with the seconds of its grace.
UNREACHED = "the server could not be told to end; it does so by itself within {:g} s"


class State(enum.Enum):
    """What something that is opened does; the values are what users see."""

    NEW = "new"
    CONNECTING = "connecting"
    READY = "ready"
    LOST = "lost"
    RECONNECTING = "reconnecting"
    CLOSED = "closed"
    FAILED = "failed"

    @property
    def is_open(self) -> bool:
        """Whether it works, or may soon."""
        return self not in (State.NEW, State.CLOSED, State.FAILED)


#: Where each state may lead. "lost" may be skipped: what a child process did in the moment in which it became
#: ready is not told.
_NEXT = {
    State.NEW: {State.CONNECTING},
    State.CONNECTING: {State.READY, State.CLOSED, State.FAILED},
    State.READY: {State.LOST, State.RECONNECTING, State.CLOSED, State.FAILED},
    State.LOST: {State.RECONNECTING, State.CLOSED, State.FAILED},
    State.RECONNECTING: {State.READY, State.LOST, State.CLOSED, State.FAILED},
    State.FAILED: {State.CLOSED},
    State.CLOSED: set(),
}


@dataclass(frozen=True)
class TunnelInfo:
    """What is known of something that is opened; a child process sends it whole.

    :ivar local_port: the port here; 0 where there is none yet, or it is a socket
    :ivar remote_port: the port there, likewise
    :ivar remote_socket: the path of the socket there
    :ivar name: what it is published under on a gateway
    :ivar reverse: who had the gateway listen
    :ivar forwards: what ``forwards=`` has opened here, and where each leads
    :ivar routes: the paths of the apps; a secret may be in them
    :ivar key: what session ids must be signed with
    :ivar tls: whether the server speaks TLS
    :ivar server: what names the server on its machine
    :ivar detached: whether the server runs on at the end
    :ivar grace: seconds that it does where it cannot be told to end; None where there is no server
    :ivar outcome: what became of it, see :class:`Closed`
    :ivar job: the batch job that it runs in
    """

    local_port: int = 0
    remote_port: int = 0
    remote_socket: str | None = None
    name: str | None = None
    reverse: Literal["host", "relay"] | None = None
    forwards: tuple[tuple[str, Endpoint], ...] = ()
    routes: tuple[str, ...] = field(default=("/",), repr=False)
    key: str = field(default="", repr=False)
    tls: bool = False
    server: str = ""
    detached: bool = False
    grace: float | None = None
    outcome: str = ""
    job: Job | None = None


@dataclass(frozen=True)
class Opening:
    """What is to be opened, in this process or in a child process.

    :ivar label: the machine, for events and errors
    :ivar parts: makes what it consists of from the session, and ``args``; found by its name in a child
    :ivar reconnect: whether a connection that was lost is made again
    :ivar info: what is known before
    """

    label: str
    parts: Callable[..., Any]
    args: tuple[Any, ...] = field(repr=False)
    reconnect: bool
    info: TunnelInfo


class Session(Protocol):
    """What is open during one life: in this process, or in a child process."""

    @property
    def info(self) -> TunnelInfo:
        """What is known of it by now."""

    @property
    def log(self) -> tuple[str, ...]:
        """The last lines of the server that it has started."""

    def status(self) -> TunnelStatus:
        """Return what it does now."""

    def open(self) -> Event:
        """Open all of it; what outlives connections goes on the life's stack.

        :returns: that it is ready, to be told once it is
        :raises BokehSSHError: whatever went wrong
        """

    def on_ready(self) -> None:
        """Take note that it is ready; called while nothing else can change its state."""

    def close(self, *, at_once: bool = False) -> None:
        """Close everything that goes over SSH, and end what was started elsewhere; never interrupted.

        :param at_once: wait for no answer of a server that is silent
        """


class Lifecycle:
    """One life, from an ``open()`` to its end. Thread-safe.

    :param make_session: makes what is open; opens nothing yet
    :param events: takes events to the program's handler
    :param deliver: told each event; must not block
    :ivar state: what it does
    :ivar error: why it has failed; or why the attempt that is under way will
    :ivar session: what is open
    :ivar stack: what is closed last
    :ivar change: notified of each new state
    :ivar on_state: told each new state
    :ivar on_log: gets the server's lines as they come; must not block
    """

    def __init__(
        self,
        label: str,
        make_session: Callable[[Lifecycle], Session],
        events: Dispatcher[Event],
        deliver: Callable[[Event], object] | None,
    ) -> None:
        self.label = label
        self.state = State.NEW
        self.error: BokehSSHError | None = None
        self.stack = contextlib.ExitStack()
        self.change = threading.Condition()
        self.on_state: Callable[[], object] = ignore
        self.on_log: Callable[[list[str]], object] = ignore
        self._events = events
        self.deliver = deliver or ignore
        self._opener: threading.Thread | None = None
        self._fault: BokehSSHError | None = None  # what its opening has raised
        self._closer: threading.Thread | None = None
        self._cancelled = False
        self._closable = False
        self._ending = False
        self._closed = Flag()
        self.session = make_session(self)

    @property
    def leaving(self) -> bool:
        """Whether connections are closed for good, and not because they are made again."""
        return not self.state.is_open or self._ending

    def _move(self, state: State) -> bool:
        """Go on to a state, if the one that it is in leads there."""
        with self.change:
            if state not in _NEXT[self.state]:
                return False
            self.state = state
            if state.is_open and self._ending:  # a signal handler has closed it just now
                self.state = State.CLOSED
            self.change.notify_all()
        self.on_state()
        return self.state is state

    # Opening.

    def begin(self) -> None:
        """Begin: from here on it is open, and :meth:`open` has to follow."""
        with self.change:
            self._opener = threading.current_thread()
            self._events.stays = True
            self._move(State.CONNECTING)
            self._closable = True  # last: before that, a signal handler has nothing to close

    def open(self) -> None:
        """Open what has begun.

        :raises TunnelClosedError: if it was closed meanwhile
        :raises BokehSSHError: whatever went wrong; nothing is left open then
        """
        try:
            with wanted(self.check_wanted):
                ready = self.session.open()
            self.become_ready(ready)
            self.await_handlers()
        except BaseException as exc:
            fault = exc if isinstance(exc, BokehSSHError) else None
            scarce = scarcity_of(exc, self.label)
            with self.change:
                cancelled = self._cancelled and isinstance(exc, Exception)  # what it uses was closed
                self._fault = None if cancelled else scarce or fault
                if self._closable:  # else closed by a signal handler, or by another thread once it stood
                    self._closable = False
                    self._move(State.FAILED)
                self._ending = True
            self._abort()
            if cancelled:
                self._move(State.CLOSED)
            self._events.finish()
            with wanted(None):
                self.await_handlers()
            if cancelled:
                raise self._was_closed() from exc
            if scarce:
                raise scarce from (exc.__cause__ if fault else exc)
            raise
        finally:
            self._opener = None
        if self._ending:
            wait(self._closed, _OTHERS)
            raise self._was_closed()

    def _was_closed(self) -> TunnelClosedError:
        return TunnelClosedError("it was closed while it opened", host=self.label)

    def await_opened(self) -> None:
        """Wait while another thread opens it; not in ``on_event``, which that thread waits for in turn.

        :raises BokehSSHError: what the opening has raised there
        """
        if self._opener is not threading.current_thread() and not self._events.is_here:
            with parked(lambda: self.state is not State.CONNECTING), self.change:
                while self.state is State.CONNECTING:
                    self.change.wait(SLICE)
        if not self.state.is_open:
            raise self._fault or self._was_closed()

    def check_open(self) -> None:
        """Refuse to work before it is open and after it is closed.

        :raises TunnelClosedError: in those states
        """
        if not self.state.is_open:
            why = f": {self.error.message}" if self.error and self.state is State.FAILED else ""
            msg = f"the tunnel is {self.state.value}{why}"
            hint = "use it in a with statement, or call open() first"
            raise TunnelClosedError(msg, host=self.label, hint=hint) from self.error

    def check_wanted(self) -> None:
        """Stop opening what is being closed; for waits that would not notice.

        :raises TunnelClosedError: if it is
        """
        if self._cancelled:
            raise self._was_closed()

    def check_unbroken(self) -> None:
        """Stop an attempt for which it is too late.

        :raises BokehSSHError: if a connection of it broke, or it is being closed
        """
        if self.error:
            raise self.error
        self.check_wanted()

    def become_ready(self, told: Event) -> None:
        """Take note that it stands.

        :param told: that it is ready, or is again, for the handler: who is told finds it so
        :raises BokehSSHError: if it broke in the last moment, or is being closed
        """
        with self.change:
            self.check_unbroken()
            if not self._move(State.READY):
                raise self._was_closed()
            self.deliver(told)
            self.session.on_ready()

    # Losing a connection, and making it again.

    def lose(self, error: BokehSSHError, *, again: bool, told: Event | None) -> Lost | None:
        """Note that it broke; never blocks.

        :param again: whether it is to be made again
        :param told: what broke it, told whether or not that changes a state
        :returns: what was told; None where it changes no state
        """
        with self.change:
            if self.state in (State.CONNECTING, State.RECONNECTING):
                self.error = self.error or error  # the attempt that is under way fails with it
            stood = self.state is State.READY
            if stood:
                self.error = None if again else error
                self._move(State.LOST if again else State.FAILED)
            if told:
                self.deliver(told)
            if not stood:
                return None
            lost = Lost(host=error.host or self.label, reason=error.message)
            self.deliver(lost)  # before anybody who waits for the end can go on
            return lost

    def mend(self) -> None:
        """Note that what broke while it opens was made again, so that the attempt under way goes on."""
        with self.change:
            if self.error and self.error.temporary and self.state in (State.CONNECTING, State.RECONNECTING):
                self.error = None

    def retry(self) -> bool:
        """Begin an attempt to make it again; False if nobody wants it any more."""
        with self.change:
            if self.state is not State.LOST:
                return False
            self.error = None
            return self._move(State.RECONNECTING)

    def fail_attempt(self, error: BokehSSHError) -> bool:
        """Note that an attempt has failed; return whether another one may do better."""
        with self.change:
            if self.state is not State.RECONNECTING:
                return False
            if error.temporary:
                self.error = None
                return self._move(State.LOST)
            self.error = error
            self._move(State.FAILED)
            self.deliver(Lost(host=error.host or self.label, reason=str(error)))
            return False

    def follow(self, state: State, error: BokehSSHError | None) -> None:
        """Be in the state that a child process tells of; that it has closed is told once we have."""
        with self.change:
            if self.state.is_open and state is not State.CLOSED:
                self.error = error
                self._move(state)

    # Closing.

    def close(self) -> None:
        """Close it, and end what it started, everywhere; idempotent, from any thread.

        Where another thread closes it already, waits until that is done, so that a program may end then.
        """
        opener = self._opener
        whose = self._claim()
        if whose == "opener":
            # It sees its connections end, cleans up by itself and says so.
            self._abort()
            self._await_opener(opener)
        elif whose == "other":
            self._closed.wait(_OTHERS)
            with wanted(None):
                self.await_handlers()
        if whose != "ours":
            return
        try:
            with wanted(None):  # a signal handler may close what this very thread opens
                self.session.close()
                self.stack.close()
        finally:
            closed = Closed(host=self.label, server=self.session.info.outcome)
            with self.change:  # it can be opened again from here on
                self.deliver(closed)
                self._events.finish()
                self._closer = None
                self._closed.set()
            log.info("%s", closed)
            with wanted(None):
                self.await_handlers()

    def end_like(self, before: Lifecycle) -> None:
        """Be closed, as a forked child's copy of its parent's is: what was known stays, nothing is ended."""
        if before.state is not State.NEW:
            self.state, self.session = State.CLOSED, before.session

    def await_close(self) -> None:
        """Wait until another thread that closes it has done so, with a deadline."""
        if self._closer not in (None, threading.current_thread()):
            wait(self._closed, _OTHERS)

    def _abort(self) -> None:
        self.session.close(at_once=True)
        self.stack.close()

    def _await_opener(self, opener: threading.Thread | None) -> None:
        """Wait a little for an opening that is given up to have cleaned up."""

        def is_over() -> bool:
            return self._opener is not opener or self.state is State.CLOSED

        with wanted(None), parked(is_over), self.change:
            wait_for(self.change, is_over, GIVING_UP)

    def _claim(self) -> Literal["ours", "opener", "other", "nobody"]:
        """Find out whose part it is to close it, and begin."""
        here = threading.current_thread()
        with self.change:
            if not self._closable:
                # A signal handler may be in the middle of the very thread that closes it.
                return "nobody" if self._closer in (None, here) else "other"
            self._cancelled = self._cancelled or self.state in (State.CONNECTING, State.RECONNECTING)
            self._ending = True
            if self.state is State.CONNECTING and self._opener is not here:
                return "opener"
            self._closable, self._closer = False, here
            self._move(State.CLOSED)
            return "ours"

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it ends; see :meth:`Openable.wait`."""
        deadline = None if timeout is None else time.monotonic() + timeout
        try:
            with parked(lambda: not self.state.is_open), self.change:
                while self.state.is_open:
                    left = SLICE if deadline is None else min(SLICE, deadline - time.monotonic())
                    if left <= 0:
                        return False
                    self.change.wait(left)
            self.await_handlers()
        except KeyboardInterrupt:
            self.close()
            return True
        if self.error:
            raise self.error
        return True

    # What is told.

    def emit(self, event: Event) -> None:
        """Log and tell what happened; from any thread, waits for no handler."""
        self.deliver(event)
        log.info("%s", event)

    def warn(self, text: str, host: str = "") -> None:
        """Report what the person should know of."""
        self.emit(Warned(host=host or self.label, text=text))

    def await_handlers(self) -> None:
        """Wait until ``on_event`` has taken all events so far, with a deadline."""
        hurry = isinstance(sys.exc_info()[1], KeyboardInterrupt)
        self._events.drain(_HURRIED if hurry else _HANDLERS)
