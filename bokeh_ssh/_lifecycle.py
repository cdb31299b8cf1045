"""Opening, living and closing, the same for every public object."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from typing import Any, Literal, TypeVar

from bokeh_ssh._errors import BokehSSHError, TunnelClosedError
from bokeh_ssh._events import Closed, Event, Lost, OnEvent, ignore
from bokeh_ssh._fork import in_child
from bokeh_ssh._isolated import Child, is_possible
from bokeh_ssh._wait import SLICE, wanted

log = logging.getLogger("bokeh_ssh")

State = Literal["new", "connecting", "ready", "lost", "closed", "failed"]
_Self = TypeVar("_Self", bound="Lifecycle")


class Lifecycle:
    """Something that is opened, used and closed, once or several times.

    A subclass opens its parts in :meth:`_start`, each pushed on the stack that is given, and calls
    :meth:`_lose` when something breaks while it lives.
    """

    _label = ""
    #: The attributes that an object in a child process tells the one that is seen here.
    _shared: tuple[str, ...] = ()

    def __new__(cls: type[_Self], *args: Any, **keywords: Any) -> _Self:
        made = super().__new__(cls)
        made._recipe = args, keywords  # to make it again in a child process
        return made

    _recipe: tuple[tuple[Any, ...], dict[str, Any]]

    def __init__(self, on_event: OnEvent | None, isolate: bool) -> None:
        self._listener = on_event or ignore
        self._isolate = isolate
        self._child: Child | None = None
        self._state: State = "new"
        self._stack = contextlib.ExitStack()
        self._change = threading.Condition()
        self._error: BokehSSHError | None = None
        self._opener: threading.Thread | None = None
        self._cancelled = False
        in_child(self, Lifecycle._abandon)

    def _abandon(self) -> None:
        """Be closed in a forked child, without touching what is the parent's; it can be opened anew there."""
        self._change = threading.Condition()  # another thread may have held the old one
        if self._state != "new":
            self._state = "closed"
        self._parents = self._stack  # kept, or what ends with it would be ended here
        self._stack = contextlib.ExitStack()

    def _start(self, stack: contextlib.ExitStack) -> None:
        """Open everything; what must be closed goes on ``stack``."""
        raise NotImplementedError

    @property
    def state(self) -> State:
        """What it does: "new", "connecting", "ready", "lost", "closed" or "failed"."""
        return self._state

    def open(self: _Self) -> _Self:
        """Open it; does nothing if it is open. After :meth:`close` it opens anew.

        :raises BokehSSHError: whatever went wrong; nothing is left open then
        """
        with self._change:
            if self._state in ("connecting", "ready", "lost"):
                return self
            self._state = "connecting"
            self._error = None
            self._cancelled = False
            self._opener = threading.current_thread()
            self._stack = stack = contextlib.ExitStack()
        try:
            with wanted(self._check_wanted):
                if self._isolate and is_possible():
                    self._start_child(stack)
                else:
                    self._start(stack)
            self._become_ready()
        except BaseException as exc:
            self._set("failed")
            stack.close()
            if self._cancelled and isinstance(exc, BokehSSHError):
                self._set("closed")
                msg = "it was closed while it opened"
                raise TunnelClosedError(msg, host=self._label) from exc
            raise
        finally:
            self._opener = None
        return self

    def _start_child(self, stack: contextlib.ExitStack) -> None:
        """Have a child process open it, and take over what it found."""
        args, keywords = self._recipe
        keywords = {name: value for name, value in keywords.items() if name not in ("on_event", "isolate")}
        child = self._child = Child(self._label, self._emit, self._lose)
        stack.callback(child.close)
        for name, value in child.open(type(self).__name__, args, keywords).items():
            setattr(self, name, value)

    def _facts(self) -> dict[str, Any]:
        """Tell what an object in another process needs to know to stand for this one."""
        return {name: getattr(self, name) for name in self._shared}

    def _check_wanted(self) -> None:
        """Stop opening what is being closed; for waits that would not notice.

        :raises TunnelClosedError: if it is
        """
        if self._cancelled:
            msg = "it was closed while it opened"
            raise TunnelClosedError(msg, host=self._label)

    def _become_ready(self) -> None:
        with self._change:
            if self._error:  # it broke in the last moment
                raise self._error
            self._check_wanted()
            self._state = "ready"
            self._change.notify_all()

    def close(self) -> None:
        """Close it, and end what it started, everywhere; idempotent, from any thread."""
        with self._change:
            opening = self._state == "connecting"
            self._cancelled = self._cancelled or opening
            elsewhere = opening and self._opener is not threading.current_thread()
            if self._state in ("new", "closed", "failed"):
                return
            if not elsewhere:
                self._state = "closed"
                self._change.notify_all()
        if elsewhere:
            # The opener sees its connections end, cleans up by itself and says so.
            self._stack.close()
            return
        try:
            with wanted(None):  # a signal handler may close what this very thread opens
                self._stack.close()
        finally:
            self._emit(Closed(host=self._label))

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it ends. Ctrl-C ends it: everything is closed, and the wait returns.

        :param timeout: seconds; None waits for ever
        :returns: False if it still lives after ``timeout`` seconds
        :raises BokehSSHError: why it ended, if it was not closed by us
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        try:
            with self._change:
                while self._state in ("connecting", "ready"):
                    left = SLICE if deadline is None else min(SLICE, deadline - time.monotonic())
                    if left <= 0:
                        return False
                    self._change.wait(left)
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

    def _lose(self, error: BokehSSHError) -> None:
        """Note that it broke while it lived; from any thread, never blocks."""
        with self._change:
            if self._state not in ("connecting", "ready"):
                return
            self._error = self._error or error
            if self._state == "ready":
                self._state = "lost"
            self._change.notify_all()
        self._emit(Lost(host=error.host or self._label, reason=error.message))

    def _set(self, state: State) -> None:
        with self._change:
            self._state = state
            self._change.notify_all()

    def _check_open(self) -> None:
        """Refuse to work before it is open and after it is closed.

        :raises TunnelClosedError: in those states
        """
        if self._state not in ("ready", "lost", "connecting"):
            msg = f"the tunnel is {self._state}"
            hint = "use it in a with statement, or call open() first"
            raise TunnelClosedError(msg, host=self._label, hint=hint)

    def _emit(self, event: Event) -> None:
        log.debug("%s", event)
        try:
            self._listener(event)
        except Exception:  # a listener's bug must not take the tunnel down
            log.exception("on_event failed")
