"""A server that is already there: whether it is one of Bokeh's, answers, and is ours."""

from __future__ import annotations

import contextlib
import http.client
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import urlsplit

from bokeh_ssh._core.endpoint import Endpoint, format_endpoint
from bokeh_ssh._core.errors import (
    ForeignServerError,
    ForwardError,
    SessionError,
    TargetUnreachableError,
)
from bokeh_ssh._core.proc_net import find_owner, owner_command
from bokeh_ssh._core.waiting import wait
from bokeh_ssh._ssh.connection import Connection

#: Seconds between two looks at a server that does not answer yet.
_PAUSE = 0.05
#: Bytes of what a machine says of a port's owner; there are few rows of those who listen there.
_MOST_SAID = 1 << 16


@dataclass(frozen=True)
class HttpProbe:
    """What answered an HTTP request: its status, and its ``Server`` and ``Location`` headers."""

    status: int
    software: str
    location: str = ""

    @property
    def is_bokeh(self) -> bool:
        """Whether it can be a Bokeh server, which is a Tornado one."""
        return self.software.startswith("TornadoServer")


def http_get(connection: Connection, target: Endpoint, path: str, *, timeout: float) -> HttpProbe:
    """Send a GET request to ``target`` as seen from the server.

    :raises TargetUnreachableError: if nothing listens there, or the connection ends without a word: an SSH
        server may say that it is connected before it tries
    :raises ForwardingRefusedError: the SSH server forbids it
    :raises ConnectionLostError: if the line goes down
    :raises OSError: if what listens gives no HTTP answer in time
    """
    sock = connection.open_socket(target, timeout=timeout)
    client = http.client.HTTPConnection("localhost", timeout=timeout)
    with contextlib.closing(client):
        client.sock = sock
        sock.settimeout(timeout)
        try:
            client.request("GET", path)
            answer = client.getresponse()
        except (http.client.RemoteDisconnected, ConnectionResetError, BrokenPipeError) as exc:
            if not connection.ping(timeout):
                raise connection.lost_error() from exc
            msg = f"nothing answers on {format_endpoint(target)} there (the connection ends without a word)"
            hint = "check that the server runs and the port"
            raise TargetUnreachableError(msg, host=connection.name, hint=hint) from exc
        except http.client.HTTPException as exc:
            msg = f"no HTTP answer: {exc!r}"
            raise OSError(msg) from exc
        return HttpProbe(answer.status, answer.getheader("Server") or "", answer.getheader("Location") or "")


def find_route(connection: Connection, target: Endpoint, *, timeout: float) -> str:
    """Find the path of a server's app; ``"/"`` where it serves none or several."""
    try:
        path = urlsplit(http_get(connection, target, "/", timeout=timeout).location).path
    except (OSError, ValueError, ForwardError):
        return "/"
    return path if re.fullmatch(r"/[\w./~-]+", path, re.ASCII) else "/"


def probe_port(connection: Connection, port: int, *, timeout: float) -> HttpProbe | None:
    """Find out what answers on ``port`` of the server's loopback; None where nothing listens.

    Asks for ``/metadata``, which starts no session and runs no app.

    :raises ForwardingRefusedError: the SSH server forbids it
    """
    try:
        return http_get(connection, ("localhost", port), "/metadata", timeout=timeout)
    except TargetUnreachableError:
        return None
    except OSError:
        return HttpProbe(0, "")  # something listens, but speaks no HTTP


def is_answering(connection: Connection, target: Endpoint, *, timeout: float) -> bool:
    """Return whether anything comes back from ``target``, as seen from the server, to a request."""
    try:
        http_get(connection, target, "/metadata", timeout=timeout)
    except (ForwardError, TimeoutError):
        return False
    except OSError:  # it is not HTTP
        pass
    return True


def wait_until_ready(
    probe: Callable[[float], HttpProbe],
    *,
    timeout: float,
    accept: Callable[[HttpProbe], bool],
    broken: Callable[[], None],
) -> None:
    """Ask until the answer is acceptable.

    :param look: asks, within that many seconds
    :param broken: raises if there is no point in going on
    :raises TimeoutError: if it was not within ``timeout`` seconds, with the last answer as its text
    """
    deadline = time.monotonic() + timeout
    pause = threading.Event()
    last = "no answer"
    while (left := deadline - time.monotonic()) > 0:
        broken()
        try:
            found = probe(min(left, 10.0))
            if accept(found):
                return
            last = f"status {found.status}"
        except (OSError, TargetUnreachableError) as exc:
            last = str(exc)
        pause.wait(_PAUSE)
    broken()
    raise TimeoutError(last)


def check_owner(connection: Connection, port: int) -> None:
    """Refuse a listener that belongs to another user of the remote machine.

    Where the owner cannot be seen (no command may be run, no ``/proc/net/tcp``) nothing is learnt.

    :raises ForeignServerError: if it is somebody else's
    """
    said = bytearray()
    ended = threading.Event()

    def hear(data: bytes) -> None:
        said.extend(data[: _MOST_SAID - len(said)])
        if len(said) == _MOST_SAID:
            ended.set()

    try:
        session = connection.run(
            owner_command(port),
            on_stdout=hear,
            on_stderr=lambda data: None,
            on_exit=lambda status: ended.set(),
            timeout=connection.hop.timeout,
        )
    except SessionError:
        return
    session.write_eof()
    wait(ended, connection.hop.timeout)
    session.close()
    found = find_owner(said.decode("utf-8", "replace"), port)
    if found is None:
        return
    me, owner = found
    if me != owner:
        msg = f"the server on port {port} belongs to another user (uid {owner}, you are {me})"
        hint = "choose another remote_port, or allow it with allow_foreign=True"
        raise ForeignServerError(msg, host=connection.name, hint=hint, port=port, owner=owner)
