"""A server that is already there: whether it is one of Bokeh's, answers, and is ours."""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import logging
import socket
import ssl
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http import HTTPStatus
from urllib.parse import quote, urlsplit

from bokeh_ssh._core.endpoint import Endpoint, format_endpoint
from bokeh_ssh._core.errors import (
    BokehSSHError,
    ForwardError,
    ForwardingRefusedError,
    TargetUnreachableError,
)
from bokeh_ssh._core.this_machine.scarcity import is_scarce
from bokeh_ssh._core.waiting import wait
from bokeh_ssh._server.certificate import describe_certificate
from bokeh_ssh._ssh.connection import Connection

log = logging.getLogger("bokeh_ssh.tunnel")

#: Seconds between two looks at a server that is not ready yet, which may log each: at least, at most, and as
#: a part of the wait so far, by which a start is seen too late.
_PAUSE = 0.05
_LONGEST_PAUSE = 2.0
_PAUSE_SHARE = 0.1
#: Seconds for a question; with less, no answer says nothing.
_ENOUGH = 1.0
#: What OpenSSL says of a server that speaks old versions only: in its own words, and in the server's.
_OLD_TLS = ("UNSUPPORTED_PROTOCOL", "TLSV1_ALERT_PROTOCOL_VERSION")


@dataclass(frozen=True)
class HttpProbe:
    """What answered an HTTP request: its status, and its ``Server`` and ``Location`` headers.

    :ivar status: 0 where it gave no HTTP answer
    :ivar tls: whether it speaks TLS
    :ivar certificate: what is to be said of its certificate; empty without TLS
    :ivar error: why it could not be asked, where something listens; None where it was
    :ivar is_bokeh: whether it can be a Bokeh server, which is a Tornado one
    :ivar wants_login: whether a login of its own stands before its pages
    :ivar is_unavailable: whether what answers says that what it stands for does not do so yet
    """

    status: int
    software: str
    location: str = ""
    tls: bool = False
    certificate: str = ""
    error: ForwardError | None = None
    is_bokeh: bool = field(init=False)
    wants_login: bool = field(init=False)
    is_unavailable: bool = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "is_bokeh", self.software.startswith("TornadoServer"))
        object.__setattr__(self, "wants_login", self.status in (302, 303, 307, 401, 403))
        object.__setattr__(self, "is_unavailable", self.status in (502, 503, 504))


def http_get(
    connection: Connection, target: Endpoint, path: str, *, timeout: float, tls: bool = False
) -> HttpProbe:
    """Send a GET request to ``target`` as seen from the server; by TLS where that is what it speaks.

    No certificate is checked: SSH has led to this machine, and no other.

    :param tls: whether it is known to speak TLS, which would log a request without
    :raises TargetUnreachableError: if nothing listens there, or the connection ends without a word: an SSH
        server may say that it is connected before it tries
    :raises ForwardingRefusedError: the SSH server forbids it
    :raises ConnectionLostError: if the line goes down
    :raises OSError: if what listens gives no answer in time, or one that is neither HTTP nor TLS
    """
    if tls:
        found = _get_by_tls(connection, target, path, timeout)
        if found:
            return found
    sock = connection.open_socket(target, timeout=timeout)
    try:
        found = _get(sock, path, timeout)
    except (http.client.HTTPException, ConnectionResetError, BrokenPipeError) as exc:
        if not connection.ping(timeout):
            raise connection.lost_error() from exc
        secure = None if tls else _get_by_tls(connection, target, path, timeout)
        if secure:
            return secure
        if isinstance(exc, http.client.HTTPException) and not isinstance(exc, OSError):
            msg = f"no HTTP answer: {exc!r}"
            raise OSError(msg) from exc
        msg = f"nothing answers on {format_endpoint(target)} there (the connection ends without a word)"
        hint = "check that the server runs and the port"
        raise TargetUnreachableError(msg, host=connection.name, hint=hint) from exc
    # Some servers with TLS say in plain HTTP that they have it (nginx, Apache, Go's).
    secure = None if tls or found.status != 400 else _get_by_tls(connection, target, path, timeout)
    return secure or found


def ask_at_once(sock: socket.socket, path: str, *, timeout: float) -> HttpProbe | None:
    """Send a GET request over ``sock``, and close it; None where no HTTP answer comes.

    :param path: empty: ask nothing
    """
    try:
        return _get(sock, path, timeout) if path else None
    except (http.client.HTTPException, OSError):
        return None
    finally:
        sock.close()


def _get(sock: socket.socket, path: str, timeout: float) -> HttpProbe:
    client = http.client.HTTPConnection("localhost", timeout=timeout)
    with contextlib.closing(client):
        client.sock = sock
        sock.settimeout(timeout)
        client.request("GET", path)
        answer = client.getresponse()
        return HttpProbe(answer.status, answer.getheader("Server") or "", answer.getheader("Location") or "")


def _get_by_tls(connection: Connection, target: Endpoint, path: str, timeout: float) -> HttpProbe | None:
    """Send the request by TLS; None where that is not spoken there.

    :raises ForwardError: if it is spoken in versions only that browsers do not speak
    """
    sock = connection.open_socket(target, timeout=timeout)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    sock.settimeout(timeout)
    try:
        secure = context.wrap_socket(sock, server_hostname="localhost")
    except OSError as exc:  # ssl.SSLError is one
        sock.close()
        why = (isinstance(exc, ssl.SSLError) and exc.reason) or ""
        if why in _OLD_TLS:
            msg = f"what listens on {format_endpoint(target)} there speaks TLS older than 1.2 only"
            hint = "browsers refuse that: have the server allow TLS 1.2 or newer"
            raise ForwardError(msg, host=connection.name, hint=hint) from exc
        if "ALERT_HANDSHAKE_FAILURE" in why:
            return HttpProbe(0, "", tls=True, certificate="it lets nobody in without a certificate")
        return None
    found = HttpProbe(0, "", tls=True, certificate=describe_certificate(secure.getpeercert(True) or b""))
    try:
        answer = _get(secure, path, timeout)
    except (http.client.HTTPException, OSError):  # it may want a certificate of ours
        secure.close()
        return found
    return dataclasses.replace(answer, tls=True, certificate=found.certificate)


def find_route(
    connection: Connection, target: Endpoint, *, timeout: float, root: str = "/", tls: bool = False
) -> str:
    """Find the path of a server's app; ``root`` where it serves none or several, or wants a login first.

    :param root: what all of its pages are under
    :returns: empty where nothing is at ``root``
    """
    try:
        answer = http_get(connection, target, root, timeout=timeout, tls=tls)
        location = urlsplit(answer.location)
    except (OSError, ValueError, ForwardError):
        return root
    if answer.status == HTTPStatus.NOT_FOUND:
        return ""
    if location.query or location.netloc:  # it leads to the login, and what it is to lead back to
        return root
    return quote(location.path, safe="/~%") if location.path.startswith("/") else root


def probe_port(connection: Connection, port: int, *, timeout: float) -> HttpProbe | None:
    """Find out what answers on ``port`` of the server's loopback; None where nothing listens.

    Asks for ``/metadata``, which starts no session and runs no app.

    :raises ForwardingRefusedError: the SSH server forbids it
    """
    try:
        return http_get(connection, ("localhost", port), "/metadata", timeout=timeout)
    except TargetUnreachableError:
        return None
    except ForwardingRefusedError:
        raise
    except ForwardError as exc:
        return HttpProbe(0, "", error=exc)
    except OSError:
        return HttpProbe(0, "")  # something listens, but speaks no HTTP


def probe_server(connection: Connection, port: int, *, timeout: float) -> tuple[HttpProbe | None, str]:
    """Find out what answers on ``port``, and the path of its app (:func:`find_route`), both at once.

    The path is empty where nothing is at the root.

    Raises as :func:`probe_port`.
    """
    found: list[str] = []
    done = threading.Event()

    def find() -> None:
        try:
            found.append(find_route(connection, ("localhost", port), timeout=timeout))
        except BokehSSHError as exc:  # the probe meets the same, and says so
            log.debug("the path of the app was not found: %s", exc)
        finally:
            done.set()

    threading.Thread(target=find, name="bokeh-ssh route", daemon=True).start()
    probe = probe_port(connection, port, timeout=timeout)
    if probe is None or not probe.is_bokeh or not wait(done, timeout):
        return probe, "/"
    return probe, (found or ["/"])[0]


def is_answering(connection: Connection, target: Endpoint, *, timeout: float) -> bool:
    """Return whether anything comes back from ``target``, as seen from the server, to a request."""
    try:
        http_get(connection, target, "/metadata", timeout=timeout)
    except (ForwardError, TimeoutError):
        return False
    except OSError:  # it is not HTTP
        pass
    return True


class UnreadyError(TimeoutError):
    """No acceptable answer came in time; its text is the last one.

    :ivar status: the last answer's, 0 where there was none
    """

    def __init__(self, why: str, status: int) -> None:
        super().__init__(why)
        self.status = status


def wait_until_ready(
    probe: Callable[[float], HttpProbe],
    *,
    timeout: float,
    accept: Callable[[HttpProbe], bool],
    broken: Callable[[], None],
) -> HttpProbe:
    """Ask until the answer is acceptable, and return it.

    :param probe: asks, within that many seconds
    :param broken: raises if there is no point in going on
    :raises UnreadyError: if it was not within ``timeout`` seconds
    """
    began = time.monotonic()
    deadline = began + timeout
    pause = threading.Event()
    last, status = "no answer", 0
    while (left := deadline - time.monotonic()) > 0:
        broken()
        try:
            found = probe(min(left, 10.0))
            if accept(found):
                return found
            status = found.status
            last = f"status {status}"
        except (OSError, TargetUnreachableError) as exc:
            if is_scarce(exc):  # here, and not there
                raise
            if not status or left > _ENOUGH:  # else that it answered before says more
                last, status = str(exc), 0
        waited = time.monotonic() - began
        pause.wait(min(max(_PAUSE, waited * _PAUSE_SHARE), _LONGEST_PAUSE, max(0.0, timeout - waited)))
    broken()
    raise UnreadyError(last, status)
