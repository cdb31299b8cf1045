"""Which account of this machine a local connection comes from (Linux).

TCP has no ``SO_PEERCRED``, so a port on loopback is open to every user of the machine; ``ssh -L`` leaves it
so. But the kernel knows the owner of the socket at the other end: at once through ``sock_diag(7)``, or in the
table of all, ``/proc/net/tcp``. On systems that have neither, everybody gets in, as with ``ssh -L``.

Once the program at the other end has closed its socket, Linux before 6.17 says 0 for its owner, whoever that
was; later ones remember. A socket that is only shut down in one direction still has its owner.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from bokeh_ssh._core.this_machine.proc_net import find_peer

#: (user id, number of the socket); the number is 0 once the program at the other end has closed it.
Owner = tuple[int, int]

#: In place of a user id: the program has closed its end, and nobody can know any more whose it was; the end
#: is there, and the system does not say whose it is.
GONE = -1
UNKNOWN = -2

_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_NLMSG_ERROR = 2
_NLM_F_REQUEST = 1
# enum of include/net/tcp_states.h, as TCP_INFO has it too.
_ESTABLISHED = 1
_CLOSE = 7
_LISTEN = 10
_ANY_STATE = 0xFFFFFFFF
# struct nlmsghdr, and struct inet_diag_req_v2 up to the addresses (linux/inet_diag.h).
_HEAD = struct.Struct("=IHHII")
_REQUEST = struct.Struct("=BBBBI")
_TAIL = struct.Struct("=III")  # any interface, and no cookie
_FOUND = struct.Struct("=II")
_ERROR = struct.Struct("=i")
_FOUND_AT = 80
_TIMEOUT = 1.0


class PeerUidCheck:
    """Finds out who at the other end of a connection is another user of this machine."""

    def __init__(self) -> None:
        self._me = {os.geteuid(), 0} if sys.platform == "linux" and hasattr(os, "geteuid") else set()
        self._query = _choose_query() if self._me else None

    def foreign_uid(self, sock: socket.socket) -> int | None:
        """Return the user id of a stranger, :data:`GONE` or :data:`UNKNOWN`; None for this account, and root.

        Who is there can read what is sent; who has gone can only have sent something. So one counts as gone
        when the kernel knows no program at the other end, and not when it merely does not answer.
        """
        if self._query is None:
            return None
        missing = False
        # A table that is read while it changes can miss a row.
        for query in (self._query, find_in_table, find_in_table):
            if _state(sock) == _CLOSE:
                return GONE  # reset by the other end
            try:
                owner = query(sock)
            except OSError:  # this way does not answer now
                continue
            if owner == (0, 0):
                return GONE
            if owner:
                return None if owner[0] in self._me else owner[0]
            missing = True
        return GONE if missing and _state(sock) != _ESTABLISHED else UNKNOWN

    def close(self) -> None:
        """Let go of the line to the kernel; idempotent."""
        if isinstance(self._query, SockDiag):
            self._query.close()


def _state(sock: socket.socket) -> int:
    """Return the state of our own end: established until the other has closed, and its last byte is here."""
    return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]


def _choose_query() -> Callable[[socket.socket], Owner | None] | None:
    """Choose how to ask: the first that knows who we are, since not all systems answer, or tell the truth."""
    with contextlib.suppress(OSError), socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(1)
        with socket.socket() as here:
            here.settimeout(_TIMEOUT)
            here.connect(listener.getsockname())
            sock, _ = listener.accept()
            with sock:
                me = os.geteuid(), os.fstat(here.fileno()).st_ino
                with contextlib.suppress(OSError):
                    sock_diag = SockDiag()
                    with contextlib.suppress(OSError):
                        if sock_diag(sock) == me:
                            return sock_diag
                    sock_diag.close()
                if find_in_table(sock) == me:
                    return find_in_table
    return None


class SockDiag:
    """Asks the kernel for one socket: 14 µs, or 64 with cold caches, however many there are."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, _NETLINK_SOCK_DIAG)
        self._socket.settimeout(_TIMEOUT)
        self._lock = threading.Lock()
        self._sequence = 0

    def close(self) -> None:
        """Hang up."""
        self._socket.close()

    def __call__(self, sock: socket.socket) -> Owner | None:
        """Return who owns the other end; None if there is no such socket.

        :raises OSError: if the kernel does not answer
        """
        theirs, ours = sock.getpeername(), sock.getsockname()
        request = (
            _REQUEST.pack(sock.family, socket.IPPROTO_TCP, 0, 0, _ANY_STATE)
            + struct.pack(">HH", theirs[1], ours[1])
            + socket.inet_pton(sock.family, theirs[0]).ljust(16, b"\0")
            + socket.inet_pton(sock.family, ours[0]).ljust(16, b"\0")
            + _TAIL.pack(0, 0xFFFFFFFF, 0xFFFFFFFF)
        )
        with self._lock:
            self._sequence = (self._sequence + 1) & 0xFFFFFFFF
            size = _HEAD.size + len(request)
            self._socket.send(
                _HEAD.pack(size, _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST, self._sequence, 0) + request
            )
            while True:
                answer = self._socket.recv(8192)
                _, kind, _, number, _ = _HEAD.unpack_from(answer)
                if number == self._sequence:
                    break
        if kind == _NLMSG_ERROR:
            (error,) = _ERROR.unpack_from(answer, _HEAD.size)
            if error == -errno.ENOENT:
                return None
            raise OSError(-error, os.strerror(abs(error)))
        if kind != _SOCK_DIAG_BY_FAMILY or len(answer) < _FOUND_AT + _FOUND.size:
            msg = f"the kernel gave an answer of kind {kind} and {len(answer)} bytes"
            raise OSError(msg)
        if answer[_HEAD.size + 1] == _LISTEN:  # it is gone, and another listens on its port
            return None
        uid, inode = _FOUND.unpack_from(answer, _FOUND_AT)
        return uid, inode


def find_in_table(sock: socket.socket) -> Owner | None:
    """Find it in the table of all sockets."""
    table = "tcp6" if sock.family == socket.AF_INET6 else "tcp"
    return find_peer(
        Path("/proc/net", table).read_text(encoding="ascii", errors="replace"),
        _as_listed(sock.getpeername()),
        _as_listed(sock.getsockname()),
    )


def _as_listed(address: tuple[str, int]) -> str:
    """Write an address as the table does: each group of four bytes in the machine's own order."""
    host, port = address[:2]
    raw = socket.inet_pton(socket.AF_INET6 if ":" in host else socket.AF_INET, host)
    groups = struct.unpack(f"={len(raw) // 4}I", raw)
    return "".join(f"{group:08X}" for group in groups) + f":{port:04X}"
