"""Undoes what the other machine has done to a server's bytes so that fewer travel; see ``_remote.packing``.

The window counts what travels, and the local socket takes what that stands for. Credit for a block goes back
once all of it was taken. A block is at most eight times what travels, so the window bounds the memory too.
"""

from __future__ import annotations

import collections
import operator
import struct
import zlib
from array import array
from collections.abc import Iterable
from itertools import accumulate, repeat

from bokeh_ssh._ssh.relay import RelayChannel

_HEAD = struct.Struct(">BBII")
_PLAIN, _BYTES, _MOST_DIFFERENCES = 0, 2, 2
_MOST = 1 << 16  # bytes of a block
_LEAST = 8
#: What deflate adds to what it cannot compress, and more.
_OVERHEAD = 1024
_MASK = (1 << 64) - 1


class NotPackedError(Exception):
    """The other machine sent something else."""


def restore(data: bytes, how: int, skip: int) -> bytes:
    """Return a block's bytes in their own order, from planes of bytes of the same significance."""
    if how < _BYTES:
        return data
    count = (len(data) - skip) // 8
    numbers = bytearray(8 * count)
    for i in range(8):
        numbers[i::8] = data[i * count : (i + 1) * count]
    if how > _BYTES:
        sums: Iterable[int] = array("Q", numbers)
        for _ in range(how - _BYTES):
            sums = accumulate(sums)
        numbers = bytearray(array("Q", map(operator.and_, sums, repeat(_MASK))))
    rest = data[8 * count :]
    return b"".join((rest[:skip], numbers, rest[skip:]))


class UnpackingChannel:
    """A channel whose far side packs what it sends, as a relay uses it; what goes there is left as it is.

    :param channel: the channel
    """

    def __init__(self, channel: RelayChannel) -> None:
        self._channel = channel
        self.writable = channel.writable
        self.send = channel.send
        self.send_eof = channel.send_eof
        self.close = channel.close
        self._inflater = zlib.decompressobj()
        self._unread = bytearray()
        self._blocks: collections.deque[tuple[int, int]] = collections.deque()  # sizes: here, and as it came
        self._taken = 0  # of the first of them
        self._begun = self._ended = False

    @property
    def is_cut_off(self) -> bool:
        """Whether there is more to come."""
        return bool(self._unread) or self._begun != self._ended

    def unpack(self, parts: list[memoryview]) -> list[memoryview]:
        """Return what these parts complete, in the order it was sent.

        :raises NotPackedError: if they are not packed
        """
        found = []
        for part in parts:
            self._unread += part
        while len(self._unread) >= _HEAD.size:
            how, skip, size, packed = _HEAD.unpack_from(self._unread)
            came = _HEAD.size + max(packed, -(-size // _LEAST))
            if size > _MOST or packed > size + _OVERHEAD or self._ended:
                msg = f"a block of {size} bytes in {packed}"
                raise NotPackedError(msg)
            if len(self._unread) < came:
                break
            data = bytes(memoryview(self._unread)[_HEAD.size : _HEAD.size + packed])
            del self._unread[:came]
            self._blocks.append((size, came))
            self._begun, self._ended = True, not size
            if size:
                found.append(memoryview(self._read(data, how, skip, size)))
        return found

    def _read(self, data: bytes, how: int, skip: int, size: int) -> bytes:
        try:
            if how != _PLAIN:
                data = self._inflater.decompress(data, size)
        except zlib.error as exc:
            raise NotPackedError(str(exc)) from exc
        if (
            len(data) != size
            or self._inflater.unconsumed_tail
            or skip > 7
            or how > _BYTES + _MOST_DIFFERENCES
        ):
            msg = f"a block of {size} bytes has {len(data)}, arranged as {how}, {skip}"
            raise NotPackedError(msg)
        return restore(data, how, skip)

    def credit(self, count: int) -> None:
        """Let the far side send as much as travelled for what was taken; as for a channel."""
        self._taken += count
        while self._blocks and self._taken >= self._blocks[0][0]:
            size, came = self._blocks.popleft()
            self._taken -= size
            self._channel.credit(came)
