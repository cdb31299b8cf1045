"""Unix sockets on the server's machine: listening on one that only the account there may use.

sshd makes the socket, but does not take it away: neither at the end, nor when it finds one that nobody serves
(``StreamLocalBindUnlink`` is off by default). Both are done by a command there, where one may be run. The one
that takes it away waits there all the time: it does so, too, where we are killed, or the line is lost.
"""

from __future__ import annotations

import contextlib
import logging
import posixpath
import shlex
import threading
from collections.abc import Callable, Iterator
from typing import Any

from bokeh_ssh._core.endpoint import Origin, format_endpoint
from bokeh_ssh._core.errors import (
    BokehSSHError,
    ConnectionLostError,
    ForwardError,
    ForwardingRefusedError,
    GatewayExposedError,
    SocketInUseError,
    TargetUnreachableError,
)
from bokeh_ssh._core.settings import setting
from bokeh_ssh._core.threads import Thread
from bokeh_ssh._ssh.connection import Connection
from bokeh_ssh._ssh.messages import CONNECT_FAILED
from bokeh_ssh._ssh.remote_shell import begin, run_script
from bokeh_ssh._ssh.transport import Channel, IncomingHandler

log = logging.getLogger("bokeh_ssh.forward")

#: Seconds for a command there; a login shell's start files may be slow.
_PATIENCE = 10.0
#: Seconds for the goodbye: to see that the line is up, and to tidy up where it is.
_GLANCE = 1.0
_GOODBYE = 3.0
#: Seconds between two looks whether a socket that is listened on is still there.
_PAUSE = 5.0

#: Whether the folder is one where private sockets are kept (``published_sockets``): we make and remove it.
_OURS = """\
ours() {
  case ${p##*/} in tunnel-*|pub-*) ;; *) return 1;; esac
  case ${d##*/} in bokeh-ssh-*|.bokeh-ssh-*) return 0;; esac
  [ -n "$BOKEH_SSH_DIR" ] && [ "$(cd -P -- "$BOKEH_SSH_DIR" && pwd)" = "$(cd -P -- "$d" && pwd)" ]
} 2>/dev/null
leave() { if ours; then rmdir -- "$d" 2>/dev/null; fi; }
"""

#: Why a server does not listen, once it is known that nobody answers there.
_CLEAR = """\
if [ -S "$p" ] && [ ! -h "$p" ]; then
  if [ ! -O "$p" ]; then say foreign
  elif rm -f -- "$p" 2>/dev/null; then say removed
  else say stuck; fi
elif [ -e "$p" ] || [ -h "$p" ]; then say file
elif [ ! -d "$d" ]; then if ours && mkdir -m 700 -- "$d" 2>/dev/null; then say removed; else say folder; fi
elif [ ! -w "$d" ] || [ ! -x "$d" ]; then say access
else say nothing; fi"""

#: Who may use it (sshd's StreamLocalBindMask decides at first), and who may put another in its place.
_SECURE = """\
chmod 600 -- "$p" 2>/dev/null
set -- $(LC_ALL=C ls -ld -- "$p" 2>/dev/null); m=$1
set -- $(LC_ALL=C ls -ld -- "$d/." 2>/dev/null)
say mode "$m,$1\""""

_DROP = 'if [ -S "$p" ] && [ -O "$p" ] && rm -f -- "$p"; then say removed; else say left; fi'

#: And the folder of private sockets, where it was the last.
_REMOVE = 'r=left; if [ -S "$p" ] && [ -O "$p" ] && rm -f -- "$p"; then r=removed; fi; leave; say $r'
_LEAVE = 'if [ -d "$d" ]; then leave; say done; else say gone; fi'

#: Linux says who listens.
_WHETHER_SERVED = """\
served() {
  while read -r a b c flags e f g path; do
    if [ "$flags" = 00010000 ] && [ "$path" = "$p" ]; then return 0; fi
  done < /proc/net/unix
  return 1
}
"""

#: Stays while we listen, and does what it is ordered; when nobody can order it any more, it removes a socket
#: that nobody listens on. sshd lets go of it a moment after it has ended our sessions. A link distinguishes
#: it from one that was made meanwhile.
_KEEP = f"""\
trap '' HUP INT TERM PIPE
{_WHETHER_SERVED}while IFS= read -r x; do
  case $x in
    drop) {_DROP};;
    clear) {_CLEAR};;
    secure) {_SECURE};;
    look) if [ -S "$p" ] && [ -O "$p" ]; then say there; else say missing; fi;;
    remove) {_REMOVE}; exit;;
    leave) {_LEAVE}; exit;;
  esac
done
[ -r /proc/net/unix ] || exit
k=$p.$$
for n in 1 2 3 4 5; do
  ln -- "$p" "$k" 2>/dev/null || k=
  if served; then s=served; elif [ "$k" ] && [ ! "$p" -ef "$k" ]; then s=another; else s=; fi
  [ -z "$k" ] || rm -f -- "$k"
  case $s in '') {_REMOVE}; exit;; another) exit;; esac
  sleep 1
done"""

#: A socket that we may write to is one that we may connect to.
_SERVED = f"""\
{_WHETHER_SERVED}if [ -w "$p" ] && [ -r /proc/net/unix ] && served; then say served; else say unknown; fi"""

#: What it says when it has looked.
_LOOKS = ("there", "missing")

#: What is done by a command of its own where that one has ended.
_ALONE = {"remove": _REMOVE, "leave": _LEAVE}

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
    on_lost: Callable[[BokehSSHError], object] | None = None,
) -> Iterator[str]:
    """Ask the connection's server to listen on a socket while the context lasts; yield its path.

    A socket that nobody serves any more is removed first. What the mode of the new one is, is looked at, and
    put right, where a command may be run there.

    :param replace: it was ours before, and whoever still answers on it is what is left of that: an SSH server
        that has not noticed yet that its line has gone down
    :param on_lost: called where it was removed, and cannot be made again; otherwise that is done unasked
    :raises SocketInUseError: somebody answers on it, or something else is in the way
    :raises ForwardingRefusedError: the server forbids it
    :raises GatewayExposedError: other users of that machine could use it
    :raises ForwardError: it cannot be made
    """
    keeper = _Keeper(connection, path)
    listens = False
    try:
        if replace:
            keeper.does("drop")
        if _answers(connection, path):
            raise _taken(connection, path, "somebody listens there")
        listens = True  # from the moment on that it may
        try:
            connection.listen(path, _refuse)
        except ForwardError as exc:
            listens = False
            if not isinstance(exc, ForwardingRefusedError):
                raise
            _clear(connection, path, exc, keeper)
            listens = True
            connection.listen(path, _refuse)
        mode = keeper.does("secure")
        if not allow_exposed and mode and _is_open(*mode[1].partition(",")[::2]):
            msg = f"other users of that machine could use the socket {path}"
            hint = (
                f"choose a folder that only you may enter, or allow it with {setting('allow_exposed=True')}"
            )
            raise GatewayExposedError(msg, host=connection.name, hint=hint)
        connection.transport.listen(path, handler)
        keeper.watch(handler, on_lost)
        yield path
    finally:
        keeper.rest()
        connection.transport.unlisten(path)
        with contextlib.suppress(ConnectionLostError):
            if connection.alive and connection.ping(_GLANCE):
                # Removed first: as long as the server listens, it cannot be anybody else's.
                if not keeper.does("remove" if listens else "leave", _GOODBYE) and keeper.able:
                    log.info("%s: the socket %s was left there", connection.name, path)
                if listens:
                    connection.unlisten(path)
        keeper.close()


class _Keeper:
    """A command there that makes room for a socket, and takes it away: when ordered to, or when we have gone.

    :ivar able: whether a command may be run there
    """

    def __init__(self, connection: Connection, path: str) -> None:
        self._connection = connection
        self._path = path
        self._script = begin(connection, _about(path, _KEEP), timeout=_PATIENCE)
        self.able = self._script is not None
        self._rests = threading.Event()
        self._watcher: threading.Thread | None = None

    def watch(self, handler: IncomingHandler, on_lost: Callable[[BokehSSHError], object] | None) -> None:
        """See now and then that the socket is there, and make it again; the way in goes by its path."""
        if self._script:
            name = f"bokeh-ssh socket {self._connection.name}"
            self._watcher = Thread(self._check_path, handler, on_lost, name=name)
            self._watcher.start()

    def rest(self) -> None:
        """Look no more."""
        self._rests.set()
        if self._watcher:
            self._watcher.join(_GLANCE + _GOODBYE)

    def _check_path(
        self, handler: IncomingHandler, on_lost: Callable[[BokehSSHError], object] | None
    ) -> None:
        try:
            while not self._rests.wait(_PAUSE) and self._connection.alive:
                if (self.does("look", _GLANCE) or ("",))[0] == "missing":
                    self._make_again(handler)
        except ForwardError as exc:
            if on_lost and not self._rests.is_set():
                msg = f"the socket {self._path} was removed there, and cannot be made again ({exc.message})"
                on_lost(ConnectionLostError(msg, host=self._connection.name, hint="see its folder"))
        except ConnectionLostError:
            pass  # whoever holds the connection knows

    def _make_again(self, handler: IncomingHandler) -> None:
        log.info("%s: the socket %s was removed there", self._connection.name, self._path)
        self.does("clear")
        self._connection.unlisten(self._path)
        self._connection.listen(self._path, handler)
        self.does("secure")

    def does(self, word: str, timeout: float = _PATIENCE) -> tuple[str, str] | None:
        """Ask it to do one thing, and return what it says; None where that is not possible."""
        if self._script:
            self._script.tell(word)
            said = _said(self._script.word(timeout))
            while said and word != "look" and said[0] in _LOOKS:  # the late answer to another question
                said = _said(self._script.word(timeout))
            if said or not self._script.ended:
                return said
        if not self.able or word not in _ALONE:
            return None
        # Its session was ended meanwhile.
        return _run_probe(self._connection, self._path, _ALONE[word], timeout)

    def close(self) -> None:
        """Let go of it."""
        if self._script:
            self._script.close()


def leave(connection: Connection, path: str) -> bool:
    """Remove the folder that a private socket was to be in, if nothing is in it; quietly.

    :returns: whether somebody else had done that
    """
    with contextlib.suppress(ConnectionLostError):
        if connection.alive and connection.ping(_GLANCE):
            return _run_probe(connection, path, _LEAVE, _GOODBYE) == ("gone", "")
    return False


def remove(connection: Connection, path: str) -> None:
    """Remove a socket that the server listens on for us, but not its folder; quietly."""
    with contextlib.suppress(ConnectionLostError):
        _run_probe(connection, path, _DROP, _GOODBYE)


def check_forbidden(connection: Connection, path: str) -> None:
    """Find out whether a channel to a socket was refused because the server forbids it: OpenSSH does not say.

    :raises ForwardingRefusedError: if somebody listens there, and the account may connect to it
    """
    found = _run_probe(connection, path, _SERVED, _PATIENCE)
    if found and found[0] == "served":
        msg = f"the server forbids forwarding to {format_endpoint(path)}"
        hint = "ask the administrator for AllowStreamLocalForwarding"
        raise ForwardingRefusedError(msg, host=connection.name, hint=hint)


def _refuse(channel: Channel, origin: Origin) -> None:
    channel.reject(CONNECT_FAILED)


def _answers(connection: Connection, path: str) -> bool | None:
    """Return whether somebody listens on a socket there; None where that cannot be asked."""
    try:
        connection.open_socket(path, timeout=connection.hop.timeout).close()
    except TargetUnreachableError:
        return False
    except ForwardingRefusedError:
        return None
    return True


def _clear(connection: Connection, path: str, refusal: ForwardingRefusedError, keeper: _Keeper) -> None:
    """Find out why the server does not listen on a socket, and remove one that nobody serves.

    :raises ForwardError: where that does not help
    """
    answers = _answers(connection, path)
    if answers:
        raise _taken(connection, path, "somebody listens there") from refusal
    found = keeper.does("clear") if answers is False else None
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


def _run_probe(connection: Connection, path: str, script: str, timeout: float) -> tuple[str, str] | None:
    return _said(run_script(connection, _about(path, script), timeout=timeout))


def _about(path: str, script: str) -> str:
    names = f"p={shlex.quote(path)}; d={shlex.quote(posixpath.dirname(path))}"
    return f"{names}\n{_OURS}{script}"


def _said(word: dict[str, Any] | None) -> tuple[str, str] | None:
    return None if word is None else (str(word["event"]), str(word.get("text", "")))


def _is_open(mode: str, folder: str) -> bool:
    """Return from two modes, as ``ls`` writes them, whether others may use a socket, or replace it."""
    return (len(mode) >= 10 and mode[4:10] != "------") or (
        len(folder) >= 10 and folder[8] == "w" and folder[9] not in "tT"
    )


def _taken(connection: Connection, path: str, why: str) -> SocketInUseError:
    msg = f"the socket {path} cannot be used ({why})"
    hint = f"choose another name or {setting('remote_socket')}, or end what listens there"
    return SocketInUseError(msg, host=connection.name, hint=hint, path=path, side="remote")
