"""The same objects with ``async with``: what blocks does so on a thread of its own.

asyncio is imported at the first use: it takes as long as all of ours.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from bokeh_ssh._core.dispatcher import parked

if TYPE_CHECKING:
    import asyncio

_Self = TypeVar("_Self", bound="Awaiting")


class Awaiting:
    """What opens, closes and waits, for asyncio; a subclass brings the three that block."""

    def open(self) -> Any:
        """Open it."""
        raise NotImplementedError

    def close(self) -> None:
        """Close it."""
        raise NotImplementedError

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it ends; False if it still lives after ``timeout`` seconds."""
        raise NotImplementedError

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
        """Wait until it ends, as :meth:`wait` does, while other tasks run; cancelling ends the wait alone.

        :raises BokehSSHError: why it ended, if it was not closed by us
        """
        import asyncio

        waiting = _on_thread(self.wait, "wait")
        with parked(waiting.done):
            await asyncio.shield(waiting)


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
