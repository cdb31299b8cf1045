"""Undoes what the other machine has done to a server's bytes so that fewer travel; see ``_remote.packing``.

The window counts what travels, and the local socket takes what that stands for. Credit for a block goes back
once all of it was taken. What the local program does not take yet waits as it came, so the window bounds the
memory: a block is at most eight times what travels.
"""

from __future__ import annotations

import collections
import logging
import operator
import socket
import struct
import threading
import zlib
from array import array
from collections.abc import Callable, Iterable
from itertools import accumulate, repeat
from typing import Any

from bokeh_ssh._forwarding.filtered_relay import FilteredRelay
from bokeh_ssh._ssh.relay import Loop, RelayChannel

log = logging.getLogger("bokeh_ssh.forward")

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
    :ivar order: held for what was received, until it is delivered
    :ivar behind: whether the loop's thread unpacks, since the local program does not take all at once
    :ivar late: ends of the channel, which follow what is to be unpacked
    """

    def __init__(self, channel: RelayChannel) -> None:
        self.order = threading.Lock()
        self.behind = False
        self.late: list[Callable[[], None]] = []
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

    def receive(self, parts: list[memoryview]) -> None:
        """Keep what arrived."""
        for part in parts:
            self._unread += part

    def unpack(self) -> memoryview | None:
        """Return the content of the next block; None where no more is complete.

        :raises NotPackedError: if what arrived is not packed
        """
        if len(self._unread) < _HEAD.size:
            return None
        how, skip, size, packed = _HEAD.unpack_from(self._unread)
        came = _HEAD.size + max(packed, -(-size // _LEAST))
        if size > _MOST or packed > size + _OVERHEAD or self._ended:
            msg = f"a block of {size} bytes in {packed}"
            raise NotPackedError(msg)
        if len(self._unread) < came:
            return None
        data = bytes(memoryview(self._unread)[_HEAD.size : _HEAD.size + packed])
        del self._unread[:came]
        self._blocks.append((size, came))
        self._begun, self._ended = True, not size
        return memoryview(self._read(data, how, skip, size)) if size else self.unpack()

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


class UnpackingRelay(FilteredRelay):
    """A :class:`FilteredRelay` whose far side packs what it sends.

    The transport's thread unpacks what comes, as long as the local program takes it at once. Once it does
    not, the loop's thread unpacks a block each time the one before was taken.
    """

    __slots__ = ()

    _channel: UnpackingChannel

    def __init__(
        self, io_loop: Loop, sock: socket.socket, channel: RelayChannel, *rest: Any, **more: Any
    ) -> None:
        super().__init__(io_loop, sock, UnpackingChannel(channel), *rest, **more)

    def on_data(self, parts: list[memoryview]) -> None:
        """Take what arrived, and deliver what the local program takes of it."""
        channel = self._channel
        with channel.order:
            channel.receive(parts)
            if channel.behind:
                return
            while not channel.behind and self._deliver_block():
                channel.behind = bool(self._backlog)
        if channel.behind:  # that may have been taken meanwhile
            self._io_loop.post(self._catch_up)

    def _deliver_block(self) -> bool:
        """Deliver the next block; False if there is none."""
        try:
            block = None if self._broken else self._channel.unpack()
        except NotPackedError as exc:
            log.warning("the other machine does not pack as expected: %s", exc)
            self.break_off()
            return False
        if block is not None:
            super().on_data([block])
        return block is not None

    def _write_backlog(self) -> None:
        super()._write_backlog()
        self._catch_up()

    def _stop_reading(self) -> None:
        super()._stop_reading()
        self._io_loop.post(self._catch_up)

    def _catch_up(self) -> None:
        """Deliver one block more, if all before it was taken. Loop thread only."""
        channel = self._channel
        if not channel.behind or self._backlog or self._done:
            return
        with channel.order:
            channel.behind = self._deliver_block()
            late, channel.late = ([], channel.late) if channel.behind else (channel.late, [])
        for end in late:
            end()
        if channel.behind:
            self._io_loop.post(self._catch_up)

    def _end_channel(self, end: Callable[[], None]) -> None:
        with self._channel.order:
            if self._channel.behind:
                self._channel.late.append(end)
                return
        end()

    def on_eof(self) -> None:
        """Pass the end on, behind what is still packed."""
        self._end_channel(super().on_eof)

    def on_close(self) -> None:
        """Take the far side's close, behind what is still packed."""
        self._end_channel(super().on_close)

    def _on_channel_end(self, *, closed: bool) -> None:
        if self._channel.is_cut_off:
            self.break_off()
        else:
            super()._on_channel_end(closed=closed)
