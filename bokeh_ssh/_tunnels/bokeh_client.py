"""Bokeh's own client, at the address of a tunnel: sessions and embedding, signed where that is needed.

Bokeh is imported at the first use: it is not needed for a tunnel.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import threading
from typing import Any

from bokeh_ssh._core.errors import UsageError
from bokeh_ssh._server.session_ids import new_session_id, token_of


def pull(url: str, key: str, **keywords: Any) -> Any:
    """Open a session with a document of the server's.

    :param key: what session ids have to be signed with; empty where they need not be
    :raises UsageError: if Bokeh is not installed here
    """
    session = _session(url, key, keywords)
    session.pull()
    return session


def push(url: str, key: str, document: Any, **keywords: Any) -> Any:
    """Open a session with a document of ours; None takes the current one (``curdoc()``).

    :raises UsageError: if Bokeh is not installed here
    """
    session = _session(url, key, keywords)
    session.push(_import("bokeh.io").curdoc() if document is None else document)
    return session


def embed(url: str, query: str, **keywords: Any) -> str:
    """Return the script that embeds an app in a page; ``query`` is to be part of its address.

    :raises UsageError: if Bokeh is not installed here
    """
    script = str(_import("bokeh.embed").server_document(url=url, **keywords))
    return script.replace("/autoload.js?", f"/autoload.js{query}&", 1) if query else script


def _session(url: str, key: str, keywords: dict[str, Any]) -> Any:
    client = _import("bokeh.client")
    made = _session_class(client.ClientSession, key)
    wanted = keywords.pop("session_id", None)
    return made(
        session_id=wanted or (new_session_id(key) if key else None),
        websocket_url=f"{url.replace('http', 'ws', 1).rstrip('/')}/ws",
        io_loop=keywords.pop("io_loop", None) or _loop_class()(make_current=False),
        **keywords,
    )


def _session_class(session: Any, key: str) -> Any:
    """Make a class of client sessions; a ``key`` signs their tokens, whatever the key of this process is."""

    class Session(session):  # type: ignore[misc]  # Bokeh is imported at run time
        @property
        def token(self) -> str:
            return token_of(self.id, key) if key else str(super().token)

        def close(self, why: str = "closed") -> None:
            """Close the connection to the server."""
            loop = self._connection.io_loop
            close = super().close
            if not isinstance(loop, _loop_class()):
                close(why)
                return

            async def closing() -> None:
                close(why)

            # Bokeh closes it while no loop runs, for which tornado asks asyncio for one. There is none after
            # asyncio.run(), and from Python 3.14 on there never is.
            loop.run_sync(closing)

    return Session


@functools.cache
def _loop_class() -> Any:
    """Make the class of the loops that sessions run on, each while somebody waits for it.

    No thread can run two loops at once, and in a notebook one runs already on the thread that runs the cells:
    there Bokeh's client fails with "Cannot run the event loop while another loop is running".
    """
    import asyncio

    from tornado.platform.asyncio import AsyncIOLoop

    class Loop(AsyncIOLoop):
        def start(self) -> None:
            try:
                asyncio.get_running_loop()
            except RuntimeError:
                super().start()
                return
            failed: list[BaseException] = []

            def run() -> None:
                try:
                    AsyncIOLoop.start(self)
                except BaseException as exc:  # noqa: BLE001 - raised where it is waited for
                    failed.append(exc)

            thread = threading.Thread(target=run, name="bokeh-ssh session", daemon=True)
            thread.start()
            try:
                thread.join()
            except KeyboardInterrupt:
                with contextlib.suppress(RuntimeError):  # it has ended meanwhile
                    self.add_callback(self.stop)
                thread.join(1)
                raise
            if failed:
                raise failed[0]

    return Loop


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as exc:
        msg = "Bokeh is not installed here"
        raise UsageError(msg, hint="install it with: pip install 'bokeh-ssh[bokeh]'") from exc
