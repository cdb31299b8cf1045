"""Bokeh's own client, at the address of a tunnel: sessions and embedding, signed where that is needed.

Bokeh is imported at the first use: it is not needed for a tunnel.
"""

from __future__ import annotations

import contextlib
import email.utils
import functools
import http.client
import importlib
import ssl
import threading
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from bokeh_ssh._core.errors import AppAccessError, UsageError
from bokeh_ssh._core.settings import setting
from bokeh_ssh._server.session_ids import new_session_id, token_of

#: Seconds for the server to say whether it wants a login.
_PATIENCE = 10.0
#: Seconds by which clocks may differ: tokens of sessions are good for 300.
_CLOCKS = 120.0


def pull(url: str, key: str, **keywords: Any) -> Any:
    """Open a session with a document of the server's.

    :param key: what session ids have to be signed with; empty where they need not be
    :raises UsageError: if Bokeh is not installed here, or cannot read what the server's version sends
    :raises AppAccessError: if the server wants a login of its own, or a signed session that we cannot sign,
        or the connection is lost, as by a document of more than ``max_message_size`` bytes
    """
    session = _session(url, key, keywords)
    with _access(url, session):
        session.pull()
    return session


def push(url: str, key: str, document: Any, **keywords: Any) -> Any:
    """Open a session with a document of ours; None takes the current one (``curdoc()``).

    :raises UsageError: as :func:`pull`
    :raises AppAccessError: as :func:`pull`
    """
    session = _session(url, key, keywords)
    with _access(url, session):
        session.push(_import("bokeh.io").curdoc() if document is None else document)
    return session


def embed(url: str, query: str, **keywords: Any) -> str:
    """Return the script that embeds an app in a page; ``query`` is to be part of its address.

    :raises UsageError: if Bokeh is not installed here
    """
    script = str(_import("bokeh.embed").server_document(url=url, **keywords))
    return script.replace("/autoload.js?", f"/autoload.js{query}&", 1) if query else script


@contextlib.contextmanager
def _access(url: str, session: Any) -> Iterator[None]:
    """Say why the server does not let us in, ends the connection or is not understood, where Bokeh fails.

    :raises AppAccessError: in the first two cases
    :raises UsageError: in the third
    """
    path = urlsplit(url).path
    status, ahead = _ask(url, f"{path.rstrip('/')}/metadata")
    if status == 404 and path == "/":  # no app is there, which its page would run
        status, ahead = _ask(url, path)
    if status in (302, 303, 307, 401, 403):  # asked first: tornado leaves open what a redirect has met
        msg = f"the server wants a login of its own before it opens {path} (status {status})"
        raise AppAccessError(msg, hint="log in with a browser, at the tunnel's url")
    try:
        yield
    except OSError as exc:
        code = getattr(session, "error_code", None)
        if code in (403, 500):  # the second for an id that is not signed as the server's settings want it
            msg = f"the server opens no session of {path} for this program (status {code})"
            hint = (
                "where its own settings have session ids signed, start "
                f"it with {setting('signed=True')}, or attach with that and its BOKEH_SECRET_KEY in "
                f"{setting('env=')}; or see its log"
            )
            if ahead > _CLOCKS:
                hint = (
                    f"its clock is {ahead / 60:.0f} minutes ahead of this machine's, so that what it is "
                    "shown has run out: set the wrong one right"
                )
            raise AppAccessError(msg, hint=hint) from exc
        raise
    except Exception as exc:  # such as KeyError and DeserializationError, as a document's form has changed
        if session.error_reason is not None:  # lost: Bokeh would wait for ever for an answer
            msg = f"the connection to the server was lost before the document of {path} was there"
            hint = (
                "a document of more than 20 MiB needs max_message_size=, in bytes, and to be pushed also the "
                "server's --websocket-max-message-size; or see its log"
            )
            session.close()
            raise AppAccessError(msg, hint=hint) from exc
        _check_versions(session, exc)
        raise


def _check_versions(session: Any, cause: Exception) -> None:
    """Check that Bokeh has the same minor version here and there; what each one says of itself counts.

    :raises UsageError: if not
    """
    here, there = str(_import("bokeh").__version__), ""
    with contextlib.suppress(Exception):  # the connection may be what has failed
        there = str(session.request_server_info()["version_info"]["bokeh"])
    session.close()
    if there and there.split(".")[:2] != here.split(".")[:2]:
        msg = f"Bokeh {here} here and Bokeh {there} of the server do not understand each other"
        hint = f"install the server's version here: pip install 'bokeh=={'.'.join(there.split('.')[:2])}.*'"
        raise UsageError(msg, hint=hint) from cause


def _ask(url: str, path: str) -> tuple[int, float]:
    """Return the status that a path of a server has, and by how many seconds its clock is ahead of ours.

    Both are 0 where no answer comes.
    """
    where = urlsplit(url)
    client: http.client.HTTPConnection
    if where.scheme == "https":
        client = http.client.HTTPSConnection(where.netloc, timeout=_PATIENCE, context=_unchecked())
    else:
        client = http.client.HTTPConnection(where.netloc, timeout=_PATIENCE)
    with contextlib.closing(client):
        try:
            client.request("GET", path)
            answer = client.getresponse()
        except (OSError, http.client.HTTPException):
            return 0, 0.0
        try:
            date = email.utils.parsedate_to_datetime(answer.getheader("Date", "")).timestamp()
        except (TypeError, ValueError, OverflowError):
            return answer.status, 0.0
        return answer.status, date - time.time()


def _unchecked() -> ssl.SSLContext:
    """Return what takes every certificate: SSH has led to the right machine."""
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


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
        _opened: Any = None

        def __init__(self, *, websocket_url: str, **keywords: Any) -> None:
            super().__init__(websocket_url=websocket_url, **keywords)
            if websocket_url.startswith("wss:"):
                keywords.pop("session_id")
                self._connection = _tls_connection_class()(self, websocket_url, **keywords)

        @property
        def token(self) -> str:
            return token_of(self.id, key) if key else str(super().token)

        def connect(self) -> None:
            """Connect to the server."""
            super().connect()
            self._opened = self._connection._socket  # which Bokeh leaves open where the connection is lost

        def close(self, why: str = "closed") -> None:
            """Close the connection to the server."""
            loop = self._connection.io_loop

            def close() -> None:
                super(Session, self).close(why)
                if self._opened is not None:
                    self._opened.close(1000, why)

            if not isinstance(loop, _loop_class()):
                close()
                return

            async def closing() -> None:
                close()

            # Bokeh closes it while no loop runs, for which tornado asks asyncio for one. There is none after
            # asyncio.run(), and from Python 3.14 on there never is.
            loop.run_sync(closing)

    return Session


@functools.cache
def _tls_connection_class() -> Any:
    """Make the class of connections by TLS: Bokeh's own checks the certificate, and cannot be told not to."""
    bokeh, states = _import("bokeh.client.connection"), _import("bokeh.client.states")

    base: Any = bokeh.ClientConnection

    class Connection(base):  # type: ignore[misc]  # Bokeh is imported at run time
        async def _connect_async(self) -> None:
            url = bokeh.format_url_query_arguments(self._url, self._arguments)
            request = bokeh.HTTPRequest(url, ssl_options=_unchecked())
            try:
                socket = await bokeh.websocket_connect(
                    request,
                    subprotocols=["bokeh", self._session.token],
                    max_message_size=self._max_message_size,
                )
            except bokeh.HTTPClientError as exc:
                why = states.ErrorReason.HTTP_ERROR, exc.code, exc.message
                await self._transition_to_disconnected(bokeh.DISCONNECTED(*why))
            except (OSError, bokeh.WebSocketError) as exc:
                why = states.ErrorReason.NETWORK_ERROR, None, str(exc)
                await self._transition_to_disconnected(bokeh.DISCONNECTED(*why))
            else:
                self._socket = bokeh.WebSocketClientConnectionWrapper(socket)
                await self._transition(bokeh.CONNECTED_BEFORE_ACK())

    return Connection


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
