"""An SSH server of the account's own, for one connection: a way in where a session can be had, but no login.

It is the machine's ``sshd -i``, run as the account by that session: nothing listens anywhere. One key gets
in, which is made here and never written anywhere; its host key comes over the session. It uses no PAM, so
nothing is asked; what PAM has put into the session's environment is passed on.
"""

from __future__ import annotations

import base64
import contextlib
import secrets
import socket
import time
from collections.abc import Callable

import paramiko

from bokeh_ssh._core.text import clean
from bokeh_ssh._core.waiting import SLICE, heed
from bokeh_ssh._ssh.remote_shell import encode, exec_line

#: Makes host key and settings, says the host key or what is missing, and serves once a line has come.
_SCRIPT = """
mask=$(umask)
umask 077
refuse() { printf '%s-refused %s\\n' "$mark" "$1"; exit 1; }
PATH=$PATH:/usr/sbin:/usr/local/sbin:/sbin:/usr/local/bin
sshd=$(command -v sshd) || refuse 'there is no sshd'
d=$(mktemp -d "${TMPDIR:-/tmp}/bokeh-ssh-sshd-XXXXXXXX") || refuse 'there is no place for its files'
trap 'rm -rf "$d"' EXIT
trap 'exit 1' HUP INT TERM
ssh-keygen -q -t ecdsa -b 256 -N '' -f "$d/key" < /dev/null > /dev/null || refuse 'no key is made'
printf '%s\\n' "$client_key" > "$d/authorized_keys"
printf '%s\\n' "HostKey $d/key" "AuthorizedKeysFile $d/authorized_keys" 'AuthenticationMethods publickey' \
    'PasswordAuthentication no' 'KbdInteractiveAuthentication no' 'UsePAM no' 'StrictModes no' \
    'PidFile none' 'PrintMotd no' 'PrintLastLog no' 'X11Forwarding no' \
    'GatewayPorts clientspecified' 'MaxSessions 100' 'ClientAliveInterval 15' 'ClientAliveCountMax 4' \
    'Subsystem sftp internal-sftp' > "$d/config"
cp "$d/config" "$d/plain"
passed=$(env | grep -E '^[A-Za-z_][A-Za-z0-9_]*=[A-Za-z0-9_.,:/@%+=-]+$' \
    | grep -Ev '^(_|PWD|OLDPWD|SHLVL|HOME|USER|LOGNAME|SHELL|MAIL|TERM|SSH_[A-Z0-9_]*)=' | tr '\\n' ' ')
[ -z "$passed" ] || printf 'SetEnv %s\\n' "$passed" >> "$d/config"
"$sshd" -t -f "$d/config" 2> /dev/null || cp "$d/plain" "$d/config"
why=$("$sshd" -t -f "$d/config" 2>&1) || refuse "sshd refuses its settings: $why"
printf '%s-key %s\\n' "$mark" "$(cut -d ' ' -f 1,2 "$d/key.pub")"
umask "$mask"
IFS= read -r go && "$sshd" -i -f "$d/config" 2> /dev/null
"""
#: Bytes that start files may write before.
_MOST = 64 * 1024
_CHUNK = 4096


class OwnServerError(Exception):
    """None can be had; the text says why. Never leaves the package."""


class OwnServer:
    """A server that is ready for its one connection.

    :param open_session: runs a command there; returns a socket with its input and output
    :param timeout: seconds
    :ivar sock: what leads to it
    :ivar key: the one that gets in
    :ivar host_key: its own
    :raises OwnServerError: if there is none
    """

    def __init__(self, open_session: Callable[[str], socket.socket], timeout: float) -> None:
        self.key = paramiko.ECDSAKey.generate(bits=256)  # what a FIPS machine takes too
        mark = secrets.token_hex(16)
        line = f"{self.key.get_name()} {self.key.get_base64()}"
        deadline = time.monotonic() + timeout
        with contextlib.ExitStack() as stack:
            self.sock = open_session(exec_line(mark))
            stack.callback(self.sock.close)
            self._said = b""
            try:
                self._wait_for(f"{mark}hello", deadline)
                self.sock.sendall(encode(f"mark={mark}\nclient_key='{line}'\n{_SCRIPT}"))
                said = self._wait_for(f"{mark}-", deadline)
                kind, _, rest = said.partition(" ")
                if kind != "key":
                    raise OwnServerError(clean(rest, 200))
                self.host_key = base64.b64decode(rest.partition(" ")[2])
                self.sock.sendall(b"go\n")
            except (OSError, ValueError) as exc:
                msg = "no command can be run there"
                raise OwnServerError(msg) from exc
            stack.pop_all()

    def _wait_for(self, mark: str, deadline: float) -> str:
        """Return the rest of the line that begins with ``mark``."""
        while True:
            line, newline, rest = self._said.partition(b"\n")
            if newline:
                self._said = rest
                if line.startswith(mark.encode()):
                    return line[len(mark) :].decode("utf-8", "replace").strip()
                continue
            left = deadline - time.monotonic()
            if left <= 0 or len(self._said) > _MOST:
                msg = "the shell there does not begin to run it"
                raise OwnServerError(msg)
            heed()
            self.sock.settimeout(min(left, SLICE))
            try:
                more = self.sock.recv(_CHUNK)
            except TimeoutError:
                continue
            if not more:
                msg = "no command can be run there"
                raise OwnServerError(msg)
            self._said += more
