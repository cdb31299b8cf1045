"""Unix sockets on the server's machine: listening on one that only the account there may use.

sshd makes the socket, but does not take it away: neither at the end, nor when it finds one that nobody serves
(``StreamLocalBindUnlink`` is off by default). Both are done by a command there, where one may be run.
"""

from __future__ import annotations

import contextlib
import logging
import posixpath
import shlex
from collections.abc import Iterator

from bokeh_ssh._connection import Connection
from bokeh_ssh._endpoint import Origin, in_words
from bokeh_ssh._errors import (
    ConnectionLostError,
    ForwardError,
    ForwardingRefusedError,
    GatewayExposedError,
    SocketInUseError,
    TargetUnreachableError,
)
from bokeh_ssh._script import run_script
from bokeh_ssh._stream import Stream
from bokeh_ssh._transport import IncomingHandler

log = logging.getLogger("bokeh_ssh.forward")

_CONNECT_FAILED = 2
#: Seconds for a command there; a login shell's start files may be slow.
_PATIENCE = 10.0
#: Seconds for the goodbye: to see that the line is up, and to tidy up where it is.
_GLANCE = 1.0
_GOODBYE = 3.0

#: Why a server does not listen, once it is known that nobody answers there.
_CLEAR = """\
if [ -S "$p" ] && [ ! -h "$p" ]; then
  if [ ! -O "$p" ]; then say foreign
  elif rm -f -- "$p" 2>/dev/null; then say removed
  else say stuck; fi
elif [ -e "$p" ] || [ -h "$p" ]; then say file
elif [ ! -d "$d" ]; then say folder
elif [ ! -w "$d" ] || [ ! -x "$d" ]; then say access
else say nothing; fi"""

#: Who may use it (sshd's StreamLocalBindMask decides at first), and who may put another in its place.
_SECURE = """\
chmod 600 -- "$p" 2>/dev/null
set -- $(LC_ALL=C ls -ld -- "$p" 2>/dev/null); m=$1
set -- $(LC_ALL=C ls -ld -- "$d/." 2>/dev/null)
say mode "$m,$1\""""

_REMOVE = 'if [ -S "$p" ] && [ -O "$p" ] && rm -f -- "$p"; then say removed; else say left; fi'

#: Linux tells who listens; a socket that we may write to is one that we may connect to.
_SERVED = """\
if [ -w "$p" ] && [ -r /proc/net/unix ]; then
  while read -r a b c flags e f g path; do
    if [ "$flags" = 00010000 ] && [ "$path" = "$p" ]; then say served; exit; fi
  done < /proc/net/unix
fi
say unknown"""

_REASONS = {
    "foreign": "another user's socket is in the way",
    "stuck": "an old socket is in the way, and cannot be removed",
    "file": "a file that is not a socket is in the way",
}
_FOLDERS = {"folder": "its folder does not exist", "access": "you may not write to its folder"}


@contextlib.contextmanager
def listening_at(
    connection: Connection,
    path: str,
    handler: IncomingHandler,
    *,
    allow_exposed: bool,
    replace: bool = False,
) -> Iterator[str]:
    """Have the connection's server listen on a socket while the context lasts; gives its path.

    A socket that nobody serves any more is removed first. What the mode of the new one is, is looked at, and
    put right, where a command may be run there.

    :param replace: it was ours before, and whoever still answers on it is what is left of that: an SSH server
        that has not noticed yet that its line has gone down
    :raises SocketInUseError: somebody answers on it, or something else is in the way
    :raises ForwardingRefusedError: the server forbids it
    :raises GatewayExposedError: other users of that machine could use it
    :raises ForwardError: it cannot be made
    """
    if replace:
        _ask(connection, path, _REMOVE, _PATIENCE)
    if _answers(connection, path):
        raise _taken(connection, path, "somebody listens there")
    try:
        connection.listen(path, _refuse)
    except ForwardingRefusedError as exc:
        _clear(connection, path, exc)
        connection.listen(path, _refuse)
    commands = False
    try:
        mode = _ask(connection, path, _SECURE, _PATIENCE)
        commands = mode is not None
        if not allow_exposed and mode and _is_open(*mode[1].partition(",")[::2]):
            msg = f"other users of that machine could use the socket {path}"
            hint = "choose a folder that only you may enter, or allow it with allow_exposed=True"
            raise GatewayExposedError(msg, host=connection.name, hint=hint)
        connection.transport.listen(path, handler)
        yield path
    finally:
        connection.transport.unlisten(path)
        with contextlib.suppress(ConnectionLostError):
            if connection.alive and connection.ping(_GLANCE):
                # Removed first: as long as the server listens, it cannot be anybody else's.
                if commands and not _ask(connection, path, _REMOVE, _GOODBYE):
                    log.info("%s: the socket %s was left there", connection.name, path)
                connection.unlisten(path)


def check_forbidden(connection: Connection, path: str) -> None:
    """Find out whether a channel to a socket was refused because the server forbids it: OpenSSH does not say.

    :raises ForwardingRefusedError: if somebody listens there, and the account may connect to it
    """
    found = _ask(connection, path, _SERVED, _PATIENCE)
    if found and found[0] == "served":
        msg = f"the server forbids forwarding to {in_words(path)}"
        hint = "ask the administrator for AllowStreamLocalForwarding"
        raise ForwardingRefusedError(msg, host=connection.name, hint=hint)


def _refuse(stream: Stream, origin: Origin) -> None:
    stream.reject(_CONNECT_FAILED)


def _answers(connection: Connection, path: str) -> bool | None:
    """Tell whether somebody listens on a socket there; None where that cannot be asked."""
    try:
        connection.open_socket(path, timeout=connection.hop.timeout).close()
    except TargetUnreachableError:
        return False
    except ForwardingRefusedError:
        return None
    return True


def _clear(connection: Connection, path: str, refusal: ForwardingRefusedError) -> None:
    """Find out why the server does not listen on a socket, and remove one that nobody serves.

    :raises ForwardError: where that does not help
    """
    answers = _answers(connection, path)
    if answers:
        raise _taken(connection, path, "somebody listens there") from refusal
    found = _ask(connection, path, _CLEAR, _PATIENCE) if answers is False else None
    if found is None:
        msg = f"{refusal.message}: it forbids that, or something is in the way"
        hint = f"remove {path} there if nobody uses it; or ask for AllowStreamLocalForwarding"
        raise ForwardingRefusedError(msg, host=connection.name, hint=hint) from refusal
    event, _ = found
    if event in _REASONS:
        raise _taken(connection, path, _REASONS[event]) from refusal
    if event in _FOLDERS:
        msg = f"the server cannot make the socket {path} ({_FOLDERS[event]})"
        hint = "choose a folder of yours that exists"
        raise ForwardError(msg, host=connection.name, hint=hint) from refusal
    if event != "removed":
        raise refusal


def _ask(connection: Connection, path: str, script: str, timeout: float) -> tuple[str, str] | None:
    folder = posixpath.dirname(path)
    names = f"p={shlex.quote(path)}; d={shlex.quote(folder)}"
    said = run_script(connection, f"{names}\n{script}", timeout=timeout)
    return None if said is None else (str(said["event"]), str(said.get("text", "")))


def _is_open(mode: str, folder: str) -> bool:
    """Tell from two modes as ``ls`` writes them whether others may use a socket, or replace it."""
    return (len(mode) >= 10 and mode[4:10] != "------") or (
        len(folder) >= 10 and folder[8] == "w" and folder[9] not in "tT"
    )


def _taken(connection: Connection, path: str, why: str) -> SocketInUseError:
    msg = f"the socket {path} cannot be had ({why})"
    hint = "choose another name or remote_socket, or end what listens there"
    return SocketInUseError(msg, host=connection.name, hint=hint, path=path, side="remote")
