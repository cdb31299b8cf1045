"""What people open: opened, used, waited for and closed, once or several times; with ``async with`` too.

asyncio is imported at the first use: it takes as long as all of ours.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from bokeh_ssh._core.dispatcher import Dispatcher, parked
from bokeh_ssh._core.errors import TunnelClosedError, UsageError
from bokeh_ssh._core.events import Event, ignore
from bokeh_ssh._core.fork import in_child
from bokeh_ssh._core.host import Host
from bokeh_ssh._core.settings import set_to
from bokeh_ssh._forwarding.status import StateName, TunnelStatus
from bokeh_ssh._ssh.auth.prompt_cache import PromptCache
from bokeh_ssh._tunnels.child_process import ChildSession, is_possible
from bokeh_ssh._tunnels.lifecycle import Lifecycle, Opening, Session, State, TunnelInfo
from bokeh_ssh._tunnels.local_session import LocalSession, Parts
from bokeh_ssh._tunnels.options import (
    DirectOptions,
    GatewayOptions,
    LocalForwardOptions,
    RemoteForwardOptions,
)

if TYPE_CHECKING:
    import asyncio

_Self = TypeVar("_Self", bound="Openable")
_Options = DirectOptions | GatewayOptions | LocalForwardOptions | RemoteForwardOptions


class Openable:
    """Something that is opened, used and closed, once or several times: each time is one :class:`Lifecycle`.

    :param host: the machine that is logged in to first
    :param parts: makes what it consists of from the session and ``args``: here, or in a child process
    :param info: what is known before anything is open
    """

    _apps: tuple[str, ...] = ()
    _on_state: Callable[[], object] | None = None

    def __init__(
        self,
        options: _Options,
        host: Host,
        parts: Callable[..., Parts],
        *args: Any,
        info: TunnelInfo | None = None,
    ) -> None:
        self._label = host.target.host
        self._what = Opening(self._label, parts, args, bool(options.reconnect), info or TunnelInfo())
        self._isolate = options.isolate
        self._listener = options.on_event or ignore
        self._prompt_cache = PromptCache(lambda: self._lifecycle.await_handlers())
        self._parents: list[Lifecycle] = []
        self._reset()
        in_child(self, Openable._abandon)

    def _reset(self) -> None:
        self._opening = threading.RLock()
        # Events come on any thread, those among them that must not wait: a connection's, a loop's.
        name = f"bokeh-ssh events {self._label}"
        self._events: Dispatcher[Event] = Dispatcher(self._listener, name, "on_event")
        self._lifecycle = self._new_lifecycle()

    def _new_lifecycle(self) -> Lifecycle:
        deliver = None if self._listener is ignore else self._events.put
        life = Lifecycle(self._label, self._make_session, self._events, deliver)
        life.on_state = self._on_state or life.on_state
        return life

    def _make_session(self, life: Lifecycle) -> Session:
        if self._isolate and is_possible():
            return ChildSession(life, self._what)
        return LocalSession(life, self._what, self._prompt_cache)

    def _abandon(self) -> None:
        """Be closed in a forked child, without touching what is the parent's; it can be opened there."""
        before = self._lifecycle
        self._parents.append(before)  # kept, or what ends with it would be ended here
        self._on_state = None
        self._reset()
        self._lifecycle.end_like(before)

    def __reduce__(self) -> NoReturn:
        msg = (
            f"a {type(self).__name__} cannot be pickled, since its connection belongs to this process: make "
            "a new one where it is needed, or pass its url or local_port on"
        )
        raise TypeError(msg)

    @property
    def _info(self) -> TunnelInfo:
        return self._lifecycle.session.info

    @property
    def _open_info(self) -> TunnelInfo:
        """The same, of what is open.

        :raises TunnelClosedError: if it is not
        """
        self._lifecycle.check_open()
        return self._info

    @property
    def state(self) -> StateName:
        """The state that it is in.

        "new", "connecting", "ready", "lost" (waiting to reconnect), "reconnecting", "closed" or "failed" (it
        ended by itself; :meth:`wait` raises the reason).
        """
        state: StateName = self._lifecycle.state.value
        return state

    def status(self) -> TunnelStatus:
        """Return its machines, their round trips, the bytes that it has carried, and since when it is open.

        >>> from bokeh_ssh import LocalForward
        >>> status = LocalForward("example.org", remote_port=8888).status()
        >>> status.state, status.hops, status.received
        ('new', (), 0)
        """
        return dataclasses.replace(self._lifecycle.session.status(), state=self.state)

    def open(self: _Self) -> _Self:
        """Open it; does nothing if it is open. After :meth:`close` it opens again, but not from ``on_event``.

        If another thread is opening it, waits until that is done, except in ``on_event``. When it returns,
        ``on_event`` has been called for all events so far, unless that takes more than 5 s.

        :raises TunnelClosedError: if it was closed meanwhile, in ``on_event`` too; in ``on_event``, if it has
            ended
        :raises BokehSSHError: if something went wrong; nothing is left open then
        """
        if self._lifecycle.state is not State.NEW:
            self._lifecycle.await_close()
            if self._lifecycle.state is State.FAILED and not self._events.is_here:
                self._lifecycle.close()  # what is left of it: the port here, too
        with self._opening:
            lifecycle = self._lifecycle
            begun = lifecycle.state is not State.NEW
            if begun and not lifecycle.state.is_open:
                if self._events.is_here:  # what it handles is over
                    msg = "it has ended"
                    raise TunnelClosedError(msg, host=self._label, hint="open it again outside of on_event")
                lifecycle, begun = self._new_lifecycle(), False
                self._lifecycle = lifecycle
            if not begun:
                lifecycle.begin()
        if begun:
            lifecycle.await_opened()
        else:
            lifecycle.open()
        return self

    def close(self) -> None:
        """Close it, and end everything that it started; idempotent, from any thread.

        If another thread is closing it, waits until that is done, so the program may end afterwards. It can
        be called in ``on_event`` too; a running :meth:`open` then raises :exc:`TunnelClosedError`.
        """
        self._lifecycle.close()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it ends; reconnecting does not end it. Ctrl-C closes it, and the wait returns.

        :param timeout: seconds; None waits for ever
        :returns: False if it is still open after ``timeout`` seconds
        :raises BokehSSHError: the reason, if it ended by itself
        """
        if timeout is not None and not (isinstance(timeout, (int, float)) and timeout == timeout):  # not NaN
            msg = f"{set_to('timeout', timeout)} is not a time"
            raise UsageError(msg, hint="give seconds, or None to wait for ever")
        return self._lifecycle.wait(timeout)

    def __enter__(self: _Self) -> _Self:
        return self.open()

    def __exit__(self, *exc: object) -> None:
        self.close()

    async def __aenter__(self: _Self) -> _Self:
        import asyncio

        opening = _on_thread(self.open, "open")
        with parked(opening.done):
            try:
                await asyncio.shield(opening)
            except asyncio.CancelledError:
                await _whatever_comes(_on_thread(self.close, "close"), opening)
                raise
        return self

    async def __aexit__(self, *exc: object) -> None:
        import asyncio

        closing = _on_thread(self.close, "close")
        with parked(closing.done):
            if await _whatever_comes(closing):
                raise asyncio.CancelledError
        closing.result()

    async def ended(self) -> None:
        """Wait until it ends, as :meth:`wait` does, while other tasks run; cancelling ends only the wait.

        :raises BokehSSHError: the reason, if it ended by itself
        """
        import asyncio

        waiting = _on_thread(self.wait, "wait")
        with parked(waiting.done):
            await asyncio.shield(waiting)


def follow_log(opened: Openable, take: Callable[[list[str]], object]) -> None:
    """Pass the server's lines on as they come, for what is opened next; ``take`` must not block."""
    opened._lifecycle.on_log = take


def follow_state(opened: Openable, take: Callable[[], object]) -> None:
    """Call ``take`` at each new state, now and after it is opened again; it must not block."""
    opened._on_state = opened._lifecycle.on_state = take


def names_of(opened: Openable) -> tuple[str, tuple[str, ...]]:
    """Return its machine, as it was named, and its apps."""
    return opened._label, opened._apps


def info_of(opened: Openable) -> TunnelInfo:
    """Return what is known of it: more than users see."""
    return opened._info


def _on_thread(call: Callable[[], Any], what: str) -> asyncio.Future[Any]:
    """Call it on a thread of its own: for those of an executor the program would wait at its end."""
    import asyncio

    loop = asyncio.get_running_loop()
    future: asyncio.Future[Any] = loop.create_future()

    def settle(result: Any, error: BaseException | None) -> None:
        if future.cancelled():
            return
        if error:
            future.set_exception(error)
            future.exception()  # whoever gave up waiting has no use for it, and Python would complain
        else:
            future.set_result(result)

    def work() -> None:
        result, error = None, None
        try:
            result = call()
        except BaseException as exc:  # noqa: BLE001 - raised where it is awaited
            error = exc
        with contextlib.suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(settle, result, error)

    threading.Thread(target=work, name=f"bokeh-ssh async {what}", daemon=True).start()
    return future


async def _whatever_comes(*futures: asyncio.Future[Any]) -> bool:
    """Wait for all of them, also while being cancelled; return whether that happened."""
    import asyncio

    cancelled = False
    for future in futures:
        while not future.done():
            try:
                await asyncio.wait((future,))
            except asyncio.CancelledError:
                cancelled = True
    return cancelled
