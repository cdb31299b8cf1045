"""A connection that ``ssh`` keeps open for others (``ControlMaster``), as the way to a machine behind it.

Its control socket is spoken to (OpenSSH's PROTOCOL.mux, version 4), so no ``ssh`` is run, which would make a
connection of its own where the master has just ended. The master gets a descriptor, and carries
what goes through it. POSIX only.
"""

from __future__ import annotations

import array
import logging
import os
import socket
import stat
import struct
import time
from contextlib import ExitStack
from pathlib import Path

from bokeh_ssh._core.errors import RefusedError, TargetUnreachableError
from bokeh_ssh._core.text import clean
from bokeh_ssh._core.waiting import SLICE, heed
from bokeh_ssh._ssh.messages import string

log = logging.getLogger("bokeh_ssh.connection")

_VERSION = 4
_HELLO = 1
_NEW_SESSION, _ALIVE_CHECK, _NEW_STREAM = 0x10000002, 0x10000004, 0x10000008
_DENIED, _FAILURE, _ALIVE, _OPENED = 0x80000002, 0x80000003, 0x80000005, 0x80000006
_MOST = 256 * 1024  # as mux.c
#: The port of a Unix socket (PORT_STREAMLOCAL, -2).
_SOCKET_PORT = 0xFFFFFFFE
_STRANGE = "it gives no answer that is known"
#: Seconds for an answer that a master gives by itself.
_PATIENCE = 3.0
_uint32 = struct.Struct(">I")


class MasterError(Exception):
    """A master cannot be used, or no longer; the text says why. Never leaves the package."""


class _SilentError(MasterError):
    """It has not answered in time."""


class MasterSocket(socket.socket):
    """A stream through a master, which closes both ways once the other side has sent its end."""

    _control: socket.socket

    def close(self) -> None:
        super().close()
        self._control.close()  # which is how the master learns of it


class ControlMaster:
    """A master that answers.

    :param path: its control socket
    :param name: what it is, for messages
    """

    peers: tuple[str, ...] = ()

    def __init__(self, path: str, name: str) -> None:
        self._path = path
        self.name = name

    def __repr__(self) -> str:
        return f"<ControlMaster {self._path}>"

    @classmethod
    def find(cls, path: str, label: str) -> ControlMaster | None:
        """Ask a master whether it is there.

        :param label: the machine that it is connected to
        :return: None where there is none: no socket, or a dead one
        :raises MasterError: if it does not answer, or is not the account's own
        """
        control = _Control.connect(path, _PATIENCE)
        if control is None:
            return None
        with control.sock:
            control.send(_ALIVE_CHECK, b"")
            kind, pid = control.receive()
        if kind != _ALIVE:
            raise MasterError(_STRANGE)
        log.info("%s: using the ControlMaster %s (pid %s)", label, path, int.from_bytes(pid[:4], "big"))
        return cls(path, f"the ControlMaster of {label}")

    def open_socket(self, target: tuple[str, int], *, timeout: float) -> socket.socket:
        """Connect to ``target`` as seen from the master's server (``ssh -W``); return a local socket.

        :raises RefusedError: the server forbids it, or cannot connect there; the master does not say which
        :raises TargetUnreachableError: that machine has not answered within ``timeout`` seconds
        :raises MasterError: the master has ended, denies it, or has not answered
        """
        host, port = target
        try:
            return self._open_stream(host, port, timeout)
        except _SilentError as exc:
            if not self._has_connection():
                raise
            msg = f"{host} port {port} did not answer within {timeout:.3g} s"
            raise TargetUnreachableError(msg, host=self.name) from exc

    def _has_connection(self) -> bool:
        """Return whether the master's server still answers; whatever it says to a path that is none."""
        try:
            self._open_stream("/", _SOCKET_PORT, _PATIENCE).close()
        except RefusedError:
            pass
        except MasterError:
            return False
        return True

    def open_session(self, command: str, *, timeout: float) -> socket.socket:
        """Run a command on the master's server (``ssh -T``); return a local socket with its input and output.

        :raises MasterError: the master has ended, denies it, or has not answered; or its server refuses it
        """
        no_flags = bytes(4 * 4) + b"\xff" * 4  # no terminal, X11, agent, subsystem; no escape character
        with Path(os.devnull).open("wb") as nothing:
            body = string(b"") + no_flags + string(b"") + string(command.encode())
            kind, rest, sock = self._open(_NEW_SESSION, body, timeout, nothing.fileno())
        if sock is None:
            raise MasterError(clean(rest[4:], 200) if kind == _FAILURE else _STRANGE)
        return sock

    def _open_stream(self, host: str, port: int, timeout: float) -> socket.socket:
        body = string(b"") + string(host.encode()) + _uint32.pack(port)
        kind, rest, sock = self._open(_NEW_STREAM, body, timeout)
        if sock is not None:
            return sock
        if kind == _FAILURE:
            said = clean(rest[4:], 200)
            msg = f"its server forbids a connection to {host} port {port}, or cannot make one ({said})"
            hint = "check the name as that server sees it, that an SSH server runs there, and PermitOpen"
            raise RefusedError(msg, host=self.name, hint=hint)
        raise MasterError("permission was denied" if kind == _DENIED else _STRANGE)

    def _open(
        self, request: int, body: bytes, timeout: float, *errors: int
    ) -> tuple[int, bytes, socket.socket | None]:
        """Ask for a channel that uses our descriptors; return the answer, and the socket where it is opened.

        :param errors: the descriptor for what a command writes to standard error
        """
        control = _Control.connect(self._path, min(timeout, _PATIENCE))
        if control is None:
            raise _ended()
        ours, theirs = socket.socketpair()
        with ExitStack() as stack, theirs:
            stack.callback(control.sock.close)
            stack.callback(ours.close)
            control.send(request, body)
            for descriptor in (theirs.fileno(), theirs.fileno(), *errors):
                control.send_descriptor(descriptor)
            control.deadline = time.monotonic() + timeout
            kind, rest = control.receive()
            if kind != _OPENED:
                return kind, rest, None
            stack.pop_all()
        made = MasterSocket(fileno=ours.detach())
        made._control = control.sock
        return kind, rest, made

    def close(self) -> None:
        """Do nothing: the master is not ours to end."""


class _Control:
    """One connection to a control socket, and until when an answer is awaited."""

    def __init__(self, sock: socket.socket, deadline: float) -> None:
        self.sock = sock
        self.deadline = deadline

    @classmethod
    def connect(cls, path: str, timeout: float) -> _Control | None:
        """Connect and exchange versions; None where nobody listens.

        :raises MasterError: if it does not answer, or is another user's
        """
        try:
            found = Path(path).stat()
        except OSError:
            return None
        if not stat.S_ISSOCK(found.st_mode):
            return None
        _check_owner(found.st_uid)
        sock = socket.socket(socket.AF_UNIX)
        control = cls(sock, time.monotonic() + timeout)
        try:
            sock.settimeout(timeout)
            try:
                sock.connect(path)
            except TimeoutError:
                raise
            except OSError as exc:  # dead, or its path is too long
                log.debug("control socket %s: %s", path, exc)
                sock.close()
                return None
            if hasattr(socket, "SO_PEERCRED"):
                credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
                _check_owner(struct.unpack("3i", credentials)[1])
            control.send(_HELLO)
            kind, _ = control.receive()
            if kind != _HELLO or control.version != _VERSION:
                msg = f"it speaks version {control.version} of the protocol, not {_VERSION}"
                raise MasterError(msg)
        except TimeoutError as exc:
            sock.close()
            msg = f"it did not answer within {timeout:g} s"
            raise MasterError(msg) from exc
        except BaseException:
            sock.close()
            raise
        return control

    def send(self, kind: int, rest: bytes | None = None) -> None:
        """Send a message; one with ``rest`` is a request, of which there is one at a time.

        :raises MasterError: if the master has ended
        """
        body = _uint32.pack(_VERSION) if rest is None else _uint32.pack(0) + rest
        try:
            self.sock.sendall(_uint32.pack(4 + len(body)) + _uint32.pack(kind) + body)
        except OSError as exc:
            raise _ended() from exc

    def send_descriptor(self, descriptor: int) -> None:
        """Hand a descriptor over, with one byte, as mm_send_fd() does."""
        rights = array.array("i", [descriptor])
        try:
            self.sock.sendmsg([b"\0"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
        except OSError as exc:
            raise _ended() from exc

    def receive(self) -> tuple[int, bytes]:
        """Return the kind of the next message, and what follows its version or number."""
        size = _uint32.unpack(self._read(4))[0]
        if not 8 <= size <= _MOST:
            raise MasterError(_STRANGE)
        body = self._read(size)
        self.version = _uint32.unpack_from(body, 4)[0]
        return _uint32.unpack_from(body)[0], body[8:]

    def _read(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            left = self.deadline - time.monotonic()
            if left <= 0:
                msg = "it did not answer in time"
                raise _SilentError(msg)
            heed()
            self.sock.settimeout(min(left, SLICE))
            try:
                more = self.sock.recv(count - len(data))
            except TimeoutError:
                continue
            except OSError as exc:
                raise _ended() from exc
            if not more:
                raise _ended()
            data += more
        return data


def _check_owner(uid: int) -> None:
    if uid != os.geteuid():
        msg = f"its control socket belongs to another user (uid {uid})"
        raise MasterError(msg)


def _ended() -> MasterError:
    return MasterError("it has ended")
