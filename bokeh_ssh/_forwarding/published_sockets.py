"""A directory on a machine in the middle that only the account there may enter: where its sockets are."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterator

from bokeh_ssh._core.endpoint import LONGEST_PATH, check_path, encode, is_name
from bokeh_ssh._core.errors import ForwardError, UsageError
from bokeh_ssh._core.settings import setting
from bokeh_ssh._forwarding.listener_probe import ListenerProbe
from bokeh_ssh._forwarding.remote_sockets import leave, remove
from bokeh_ssh._ssh.connection import Connection
from bokeh_ssh._ssh.remote_shell import run_script

_PATIENCE = 10.0

#: The same places, in the same order and looked at alike, as the supervisor's (``_remote.run_dir``).
_PLACES = """\
umask 077
set -f
if [ -n "$BOKEH_SSH_DIR" ]; then
  set -- "$BOKEH_SSH_DIR"
  while case $1 in ?*/) ;; *) false;; esac do set -- "${1%/}"; done
else
  n=$(uname -n | tr -c 'A-Za-z0-9_.\\n-' _ | cut -c1-32)
  set -- "/tmp/bokeh-ssh-$(id -u)" "${HOME%/}/.bokeh-ssh-$n"
fi
served() { # others may listen on paths that begin like this one
  grep -F " $1" /proc/net/unix | (while read -r a b c f e i g q; do [ "$q" != "$1" ] || exit 7; done)
  [ $? = 7 ]
}
me=$(id -u)
top=$(set -- $(LC_ALL=C ls -ldn -- /); echo "$3")
straight() {
  case $1 in /?*) ;; *) return 1;; esac
  h=${1%/*}
  h=$(cd -P -- "${h:-/}" 2>/dev/null && pwd -P) || return 1
  d=${h%/}/${1##*/}
}
good() {
  if [ ! -d "$d" ] || [ -h "$d" ] || [ ! -O "$d" ]; then return 1; fi
  set -- $(LC_ALL=C ls -ldn -- "$d")
  case $1 in drwx------*) ;; *) return 1;; esac
  q=$h
  while :; do
    set -- $(LC_ALL=C ls -ldn -- "$q")
    if [ "$3" != 0 ] && [ "$3" != "$me" ] && [ "$3" != "$top" ]; then return 1; fi
    case $1 in d????????[tT]*) ;; d????w*|d???????w*) return 1;; d*) ;; *) return 1;; esac
    if [ "$q" = / ]; then return 0; fi
    q=${q%/*}; q=${q:-/}
  done
}
"""

#: Finds or makes the directory. Sockets of tunnels that died in there without a goodbye are removed, where
#: the system shows that nobody listens on them.
_FIND = f"""\
{_PLACES}
for w do
  straight "$w" || continue
  m=; mkdir -m 700 -- "$d" 2>/dev/null && m=1
  if good; then
    if [ -r /proc/net/unix ]; then
      set +f
      for s in "$d"/tunnel-* "$d"/pub-*; do
        if [ -S "$s" ] && ! served "$s"; then rm -f -- "$s"; fi
      done
    fi
    say folder "$d"; exit
  fi
  if [ -n "$m" ]; then rmdir -- "$d"; fi
done
say none"""


#: What is published there, and served; a place that does not exist is not made for that.
_LIST = f"""\
{_PLACES}
for w do
  if straight "$w" && good; then
    n=
    set +f
    for s in "$d"/pub-*; do
      if [ -S "$s" ] && [ -O "$s" ]; then
        if [ ! -r /proc/net/unix ] || served "$s"; then n="$n/${{s##*/pub-}}"; fi
      fi
    done
    set -f
    if [ -n "$n" ]; then say found "$n $d"; exit; fi
  fi
done
say none"""


def published(connection: Connection) -> dict[str, str]:
    """Find what the account has published there by name; return the paths of the sockets.

    :raises ConnectionLostError: if the line goes down
    """
    said = run_script(connection, _LIST, timeout=_PATIENCE)
    if not said or said["event"] != "found":
        return {}
    names, _, folder = str(said.get("text", "")).partition(" ")
    found = {}
    for name in names.split("/"):
        path = f"{folder}/pub-{name}"
        with contextlib.suppress(UsageError):
            check_path(path, "name")
            if is_name(name):
                found[name] = path
    return found


def named_socket(connection: Connection, name: str) -> str:
    """Return the path of the socket that something is published on by name.

    :raises ForwardError: if there is no place for it
    :raises ConnectionLostError: if the line goes down
    """
    folder = private_directory(connection)
    path = f"{folder}/pub-{name}"
    if folder is None or len(encode(path)) > LONGEST_PATH:
        msg = "there is no private directory for what is published by name"
        hint = (
            f"publish it on a port, with {setting('remote_port')}, or name a directory there in BOKEH_SSH_DIR"
        )
        raise ForwardError(msg, host=connection.name, hint=hint)
    return path


def private_directory(connection: Connection) -> str | None:
    """Find or make the account's private directory there; None where that is not possible.

    :raises ConnectionLostError: if the line goes down
    """
    said = run_script(connection, _FIND, timeout=_PATIENCE)
    return str(said["text"]) if said and said["event"] == "folder" else None


class Spot:
    """Where a private socket may be.

    :ivar path: None where there can be none
    :ivar busy: set by who listens there, and sees to it by itself that nothing is left
    """

    def __init__(self, path: str | None) -> None:
        self.path = path
        self.busy = False


@contextlib.contextmanager
def private_socket(connection: Connection) -> Iterator[Spot]:
    """Find a path for a socket that the server may listen on, and lead us to.

    Nothing is there yet. After the context nothing is left of the directory, if nothing else is in it.

    :raises ConnectionLostError: if the line goes down
    """
    spot = Spot(_find(connection))
    try:
        yield spot
    finally:
        if spot.path and not spot.busy:
            leave(connection, spot.path)


def _find(connection: Connection) -> str | None:
    for _ in range(3):
        folder = private_directory(connection)
        path = f"{folder}/tunnel-{secrets.token_hex(4)}"
        if folder is None:
            return None
        works = False
        try:
            works = len(encode(path)) <= LONGEST_PATH and _leads(connection, path)
        finally:
            again = not works and leave(connection, path)
        if works:
            return path
        if not again:  # else whoever was the last there has taken the directory away between the two
            return None
    return None


def _leads(connection: Connection, path: str) -> bool:
    proof = ListenerProbe(connection)
    try:
        connection.listen(path, proof.handle)
    except ForwardError:
        return False
    try:
        return bool(proof.reaches(path))
    finally:
        proof.close()
        remove(connection, path)  # while it listens, it cannot be anybody else's
        connection.unlisten(path)
