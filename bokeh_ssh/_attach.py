"""A server that is already there: whether it is one of Bokeh's, answers, and is ours."""

from __future__ import annotations

import contextlib
import http.client
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from bokeh_ssh._connection import Connection
from bokeh_ssh._errors import (
    ForeignServerError,
    SessionError,
    TargetUnreachableError,
)
from bokeh_ssh._owner import OWNER_COMMAND, find_owner
from bokeh_ssh._wait import wait

#: Seconds between two looks at a server that does not answer yet.
_PAUSE = 0.05


@dataclass(frozen=True)
class Found:
    """What answered an HTTP request: its status and its ``Server`` header."""

    status: int
    software: str

    @property
    def is_bokeh(self) -> bool:
        """Whether it can be a Bokeh server, which is a Tornado one."""
        return self.software.startswith("TornadoServer")


def look(connection: Connection, port: int, *, timeout: float) -> Found | None:
    """Ask what answers on ``port`` of the server's loopback; None where nothing listens.

    Asks for ``/metadata``, which starts no session and runs no app.

    :raises ForwardingRefusedError: the SSH server forbids it
    """
    try:
        sock = connection.open_socket("localhost", port, timeout=timeout)
    except TargetUnreachableError:
        return None
    client = http.client.HTTPConnection("localhost", port, timeout=timeout)
    with contextlib.closing(client):
        client.sock = sock
        sock.settimeout(timeout)
        try:
            client.request("GET", "/metadata")
            answer = client.getresponse()
        except (OSError, http.client.HTTPException):
            return Found(0, "")  # something listens, but speaks no HTTP
        return Found(answer.status, answer.getheader("Server") or "")


def get(port: int, path: str, *, timeout: float) -> Found:
    """Ask through a local port: proves the whole way.

    :raises OSError: if the way is broken, or nothing answers in time
    """
    client = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    with contextlib.closing(client):
        try:
            client.request("GET", path)
            answer = client.getresponse()
            return Found(answer.status, answer.getheader("Server") or "")
        except http.client.HTTPException as exc:
            msg = f"no HTTP answer: {exc!r}"
            raise OSError(msg) from exc


def wait_until_ready(
    port: int, path: str, *, timeout: float, accept: Callable[[Found], bool], broken: Callable[[], None]
) -> None:
    """Ask through a local port until the answer is acceptable.

    :param broken: raises if there is no point in going on
    :raises TimeoutError: if it was not within ``timeout`` seconds, with the last answer as its text
    """
    deadline = time.monotonic() + timeout
    pause = threading.Event()
    last = "no answer"
    while (left := deadline - time.monotonic()) > 0:
        broken()
        try:
            found = get(port, path, timeout=min(left, 10.0))
            if accept(found):
                return
            last = f"status {found.status}"
        except OSError as exc:
            last = str(exc)
        pause.wait(_PAUSE)
    broken()
    raise TimeoutError(last)


def check_owner(connection: Connection, port: int) -> None:
    """Refuse a listener that belongs to another user of the remote machine.

    Where the owner cannot be seen (no command may be run, no ``/proc/net/tcp``) nothing is learnt.

    :raises ForeignServerError: if it is somebody else's
    """
    chunks: list[bytes] = []
    ended = threading.Event()
    try:
        session = connection.run(
            OWNER_COMMAND,
            on_stdout=chunks.append,
            on_stderr=lambda data: None,
            on_exit=lambda status: ended.set(),
            timeout=connection.hop.timeout,
        )
    except SessionError:
        return
    session.write_eof()
    wait(ended, connection.hop.timeout)
    session.close()
    found = find_owner(b"".join(chunks).decode("utf-8", "replace"), port)
    if found is None:
        return
    me, owner = found
    if me != owner:
        msg = f"the server on port {port} belongs to another user (uid {owner}, you are {me})"
        hint = "choose another remote_port, or allow it with allow_foreign=True"
        raise ForeignServerError(msg, host=connection.name, hint=hint, port=port, owner=owner)
