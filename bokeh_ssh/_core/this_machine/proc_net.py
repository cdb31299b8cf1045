"""Who owns a port, or the other end of a connection, from Linux's own tables. Pure text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

_LISTEN = "0A"

#: (the owner's user id, the number of the socket): another listener on the same port has another number.
Listener = tuple[int, int]


class _Row(NamedTuple):
    """One socket as ``/proc/net/tcp`` has it: addresses and state as they are written there."""

    local: str
    remote: str
    state: str
    uid: int
    inode: int

    @property
    def port(self) -> int:
        """The port of this end."""
        return int(self.local.rpartition(":")[2], 16)


def _rows(text: str) -> Iterator[_Row]:
    """Read the rows of a table; what is none is ignored, since the far side may say anything."""
    for line in text.splitlines():
        fields = line.split()
        try:
            row = _Row(fields[1], fields[2], fields[3], int(fields[7]), int(fields[9]))
            row.port  # noqa: B018 - raises if it is no number
        except (ValueError, IndexError):
            continue
        yield row


def listening(port: int) -> str:
    """Return the pattern by which ``grep -i`` finds the rows of those who listen on a port."""
    return f":{port:04X} [0-9A-F]*:[0-9A-F]* {_LISTEN} "


def listeners(text: str, port: int) -> frozenset[Listener]:
    """Find who listens on ``port`` in rows of ``/proc/net/tcp`` and ``tcp6``.

    >>> row = "0: 0100007F:138E 00000000:0000 0A 00000000:00000000 00:00000000 00000000 1001 0 77 1"
    >>> listeners(row, 5006)
    frozenset({(1001, 77)})
    """
    return frozenset((row.uid, row.inode) for row in _rows(text) if row.state == _LISTEN and row.port == port)


def touching(port: int) -> str:
    """Return the pattern by which ``grep -i`` finds the rows of all sockets whose own port is this one."""
    return f"^ *[0-9]*: [0-9A-F]*:{port:04X} "


def owners(text: str, port: int) -> frozenset[int]:
    """Find whose sockets have ``port``: those who listen, and who have accepted connections.

    >>> row = "1: 0100007F:138E 0100007F:D431 01 00000000:00000000 00:00000000 00000000 1001 0 78 1"
    >>> owners(row, 5006)
    frozenset({1001})
    """
    # A connection has no number while nobody has accepted it, and once it is closed.
    return frozenset(row.uid for row in _rows(text) if row.port == port and row.inode)


def find_peer(text: str, theirs: str, ours: str) -> tuple[int, int] | None:
    """Find who owns the end ``theirs`` of a connection to ``ours`` in ``/proc/net/tcp`` (or ``tcp6``).

    :param theirs: as the table writes addresses, likewise ``ours``
    :returns: the user id, and the number of the socket, which is 0 once it is closed

    >>> row = "0: 0100007F:D431 0100007F:138E 01 00000000:00000000 00:00000000 00000000 1001 0 77 1"
    >>> find_peer(row, "0100007F:D431", "0100007F:138E")
    (1001, 77)
    """
    for row in _rows(text):
        if row.local == theirs and row.remote == ours and row.state != _LISTEN:
            return row.uid, row.inode
    return None
