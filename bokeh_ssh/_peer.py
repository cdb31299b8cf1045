"""Which account of this machine a local connection comes from (Linux).

TCP has no ``SO_PEERCRED``, so a port on loopback is open to every user of the machine; ``ssh -L`` leaves it
so. But the kernel tells the owner of the socket at the other end: at once through ``sock_diag(7)``, or in the
table of all, ``/proc/net/tcp``. On systems that tell neither, everybody gets in, as with ``ssh -L``.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from bokeh_ssh._owner import find_peer

#: (user id, number of the socket); the number is 0 once the program at the other end has closed it.
Owner = tuple[int, int]

_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_NLM_F_REQUEST = 1
_LISTEN = 10
_ANY_STATE = 0xFFFFFFFF
# struct nlmsghdr, and struct inet_diag_req_v2 up to the addresses (linux/inet_diag.h).
_HEAD = struct.Struct("=IHHII")
_REQUEST = struct.Struct("=BBBBI")
_TAIL = struct.Struct("=III")  # any interface, and no cookie
_FOUND = struct.Struct("=II")
_FOUND_AT = 80
_TIMEOUT = 1.0


class Strangers:
    """Tells who is refused.

    A connection whose program has closed it already is refused as well: its owner is not known any more.
    """

    def __init__(self) -> None:
        self._me = {os.geteuid(), 0} if sys.platform == "linux" and hasattr(os, "geteuid") else set()
        self._ask = _way() if self._me else None

    def find(self, sock: socket.socket) -> int | None:
        """Give the user id of a stranger, -1 for who has gone; None for this account, and for root."""
        if self._ask is None:
            return None
        try:
            owner = self._ask(sock)
        except OSError:  # it has gone, or the system does not answer any more
            owner = None
        if owner is None or not owner[1]:
            return -1
        return None if owner[0] in self._me else owner[0]

    def close(self) -> None:
        """Let go of the line to the kernel; idempotent."""
        if isinstance(self._ask, Diagnosis):
            self._ask.close()


def _way() -> Callable[[socket.socket], Owner | None] | None:
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
                    diagnosis = Diagnosis()
                    with contextlib.suppress(OSError):
                        if diagnosis(sock) == me:
                            return diagnosis
                    diagnosis.close()
                if look_up(sock) == me:
                    return look_up
    return None


class Diagnosis:
    """Asks the kernel for one socket: 14 µs, or 64 with cold caches, however many there are."""

    def __init__(self) -> None:
        self._line = socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, _NETLINK_SOCK_DIAG)
        self._line.settimeout(_TIMEOUT)
        self._lock = threading.Lock()
        self._asked = 0

    def close(self) -> None:
        """Hang up."""
        self._line.close()

    def __call__(self, sock: socket.socket) -> Owner | None:
        theirs, ours = sock.getpeername(), sock.getsockname()
        request = (
            _REQUEST.pack(sock.family, socket.IPPROTO_TCP, 0, 0, _ANY_STATE)
            + struct.pack(">HH", theirs[1], ours[1])
            + socket.inet_pton(sock.family, theirs[0]).ljust(16, b"\0")
            + socket.inet_pton(sock.family, ours[0]).ljust(16, b"\0")
            + _TAIL.pack(0, 0xFFFFFFFF, 0xFFFFFFFF)
        )
        with self._lock:
            self._asked = (self._asked + 1) & 0xFFFFFFFF
            size = _HEAD.size + len(request)
            self._line.send(_HEAD.pack(size, _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST, self._asked, 0) + request)
            while True:
                answer = self._line.recv(8192)
                _, kind, _, number, _ = _HEAD.unpack_from(answer)
                if number == self._asked:
                    break
        if kind != _SOCK_DIAG_BY_FAMILY or len(answer) < _FOUND_AT + _FOUND.size:
            return None  # there is no such socket
        if answer[_HEAD.size + 1] == _LISTEN:  # it is gone, and another listens on its port
            return None
        uid, inode = _FOUND.unpack_from(answer, _FOUND_AT)
        return uid, inode


def look_up(sock: socket.socket) -> Owner | None:
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
