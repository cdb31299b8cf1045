"""A directory on a machine in the middle that only the account there may enter: where its sockets are."""

from __future__ import annotations

import contextlib
import secrets

from bokeh_ssh._connection import Connection
from bokeh_ssh._endpoint import LONGEST_PATH, check_path, encode, is_name
from bokeh_ssh._errors import ForwardError, UsageError
from bokeh_ssh._proof import Proof
from bokeh_ssh._script import run_script

_PATIENCE = 10.0

#: The same places, in the same order, as the supervisor takes (``_place``). Sockets of tunnels that died in
#: there without a goodbye are removed, where the system shows that nobody listens on them.
_FIND = """\
umask 077
for d in ${BOKEH_SSH_DIR:-"/tmp/bokeh-ssh-$(id -u)" "$HOME/.bokeh-ssh-$(uname -n)"}; do
  mkdir -m 700 -- "$d" 2>/dev/null
  if [ -d "$d" ] && [ ! -h "$d" ] && [ -O "$d" ]; then
    set -- $(LC_ALL=C ls -ld -- "$d")
    case $1 in drwx------*)
      if [ -r /proc/net/unix ]; then
        for s in "$d"/tunnel-* "$d"/pub-*; do
          if [ -S "$s" ] && ! grep -qF " $s" /proc/net/unix; then rm -f -- "$s"; fi
        done
      fi
      say folder "$d"; exit;;
    esac
  fi
done
say none"""


#: What is published there, and served; a place that does not exist is not made for that.
_LIST = """\
for d in ${BOKEH_SSH_DIR:-"/tmp/bokeh-ssh-$(id -u)" "$HOME/.bokeh-ssh-$(uname -n)"}; do
  if [ -d "$d" ] && [ ! -h "$d" ] && [ -O "$d" ]; then
    n=
    for s in "$d"/pub-*; do
      if [ -S "$s" ] && [ -O "$s" ]; then
        if [ ! -r /proc/net/unix ] || grep -qF " $s" /proc/net/unix; then n="$n/${s##*/pub-}"; fi
      fi
    done
    if [ -n "$n" ]; then say found "$n $d"; exit; fi
  fi
done
say none"""


def published(connection: Connection) -> dict[str, str]:
    """Find what the account has published there by name; gives the paths of the sockets.

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
    """Give the path of the socket that something is published on by name.

    :raises ForwardError: if there is no place for it
    :raises ConnectionLostError: if the line goes down
    """
    folder = private_directory(connection)
    path = f"{folder}/pub-{name}"
    if folder is None or len(encode(path)) > LONGEST_PATH:
        msg = "there is no private directory for what is published by name"
        hint = "publish it on a port, with remote_port, or name a directory there in BOKEH_SSH_DIR"
        raise ForwardError(msg, host=connection.name, hint=hint)
    return path


def private_directory(connection: Connection) -> str | None:
    """Find or make the account's private directory there; None where that cannot be had.

    :raises ConnectionLostError: if the line goes down
    """
    said = run_script(connection, _FIND, timeout=_PATIENCE)
    return str(said["text"]) if said and said["event"] == "folder" else None


def private_socket(connection: Connection) -> str | None:
    """Find a path for a socket that the server may listen on, and lead us to; None where it may not.

    :raises ConnectionLostError: if the line goes down
    """
    folder = private_directory(connection)
    if folder is None:
        return None
    path = f"{folder}/tunnel-{secrets.token_hex(4)}"
    if len(encode(path)) > LONGEST_PATH:
        return None
    proof = Proof(connection)
    try:
        connection.listen(path, proof.handle)
    except ForwardError:
        return None
    try:
        return path if proof.reaches(path) else None
    finally:
        proof.close()
        connection.unlisten(path)
