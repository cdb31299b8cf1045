"""SSH's binary packets (RFC 4253, section 6) with few system calls and few copies.

paramiko's packetizer reads a packet with two ``recv`` calls and copies it seven times. This one reads ahead,
decrypts in place of copying, hands channel data on without a ``Message``, and sends several packets at once.
It does so for AES-GCM and ChaCha20-Poly1305, one of which every current server has; all else is paramiko's.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import zlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import paramiko.packet
from cryptography.exceptions import InvalidTag
from paramiko.common import MSG_CHANNEL_DATA
from paramiko.message import Message
from paramiko.packet import NeedRekeyException
from paramiko.ssh_exception import SSHException

from bokeh_ssh._core.events import ignore
from bokeh_ssh._ssh.crypto.chacha20_poly1305 import ChaCha20Poly1305

#: Bytes read ahead: one system call for what sshd sends in several.
_READ_AHEAD = 256 * 1024
#: The longest packet taken; RFC 4253, section 6.1 asks for 35000, OpenSSH takes 256 KiB (PACKET_MAX_SIZE).
MAX_PACKET_LENGTH = 256 * 1024 + 1024
#: The longest line before the key exchange; RFC 4253, section 4.2 allows 255 characters.
_MAX_LINE = 8192
_TAG = 16
#: Linux alone has it.
_QUICKACK = getattr(socket, "TCP_QUICKACK", 0)
_MASK = (1 << 64) - 1
_NOTHING = memoryview(b"")
_channel_data = struct.Struct(">BII").pack
_uint32 = struct.Struct(">I").pack
_read_uint32 = struct.Struct(">I").unpack_from
#: A packet's padding length as a byte, by its value.
_BYTE = [bytes((value,)) for value in range(256)]


class InflateError(SSHException):
    """The server compresses in a way that it should not."""


class Inflater:
    """Undoes the server's compression (RFC 4253, section 6.2), making no more of a packet than one may hold.

    paramiko inflates whatever comes: 200 KB become 200 MB. What is compressed is a packet's payload. Section
    6.1 asks for 32768 bytes of that; we take more, but no more than the longest packet has.
    """

    def __init__(self) -> None:
        self._zlib = zlib.decompressobj()

    def __call__(self, data: bytes) -> bytes:
        """Inflate one payload.

        :raises InflateError: if it is none, or of more than :data:`MAX_PACKET_LENGTH` bytes
        """
        try:
            payload = self._zlib.decompress(data, MAX_PACKET_LENGTH + 1)
        except zlib.error as exc:
            msg = f"the server sent what is not compressed data ({exc})"
            raise InflateError(msg) from exc
        if len(payload) > MAX_PACKET_LENGTH:
            msg = f"the server sent a packet that inflates to more than {MAX_PACKET_LENGTH} bytes"
            raise InflateError(msg)
        if not payload or self._zlib.eof:  # zlib would keep all that comes after such an end
            msg = "the server sent compressed data that is empty or ends"
            raise InflateError(msg)
        return payload


class ChannelData:
    """Bytes for a channel, to be sent in packets of at most ``limit`` bytes."""

    __slots__ = ("data", "limit", "number")

    def __init__(self, number: int, data: memoryview, limit: int) -> None:
        self.number = number
        self.data = data
        self.limit = limit

    def payloads(self) -> list[tuple[bytes, memoryview]]:
        """Split them (RFC 4254, section 5.2)."""
        number, data, limit, size = self.number, self.data, self.limit, len(self.data)
        if size <= limit:
            return [(_channel_data(MSG_CHANNEL_DATA, number, size), data)]
        parts = [data[start : start + limit] for start in range(0, size, limit)]
        return [(_channel_data(MSG_CHANNEL_DATA, number, len(part)), part) for part in parts]


if TYPE_CHECKING:
    from typing_extensions import Buffer

    class _Base(paramiko.packet.Packetizer):
        """The private names of paramiko's that this module uses; a test looks for each of them."""

        REKEY_PACKETS_OVERFLOW_MAX: int
        REKEY_BYTES_OVERFLOW_MAX: int
        _initial_kex_done: bool

        def _trigger_rekey(self) -> None: ...
        def _read_timeout(self, timeout: float) -> bytes: ...

else:
    _Base = paramiko.packet.Packetizer


class Packetizer(_Base):
    """paramiko's packetizer, faster.

    It has the same name as its base on purpose: Python mangles ``self.__name`` with the name of the class,
    so the base's private attributes can be used as they are written there.

    :ivar on_data: takes the decrypted packet of channel data and its end without padding, and returns whether
        it was taken; it may gather them until
    :ivar on_pause: is called, which is before anything else is handed on and before it waits for more
    """

    if TYPE_CHECKING:
        __socket: socket.socket
        __closed: bool
        __need_rekey: bool
        __aead_in: bool
        __aead_out: bool
        __iv_in: bytes
        __iv_out: bytes
        __block_engine_in: Any
        __block_engine_out: Any
        __block_size_out: int
        __compress_engine_in: Any
        __compress_engine_out: Any
        __sequence_number_in: int
        __sequence_number_out: int
        __received_bytes: int
        __received_packets: int
        __received_bytes_overflow: int
        __received_packets_overflow: int
        __sent_bytes: int
        __sent_packets: int
        __write_lock: Any

    # RFC 4253, section 9: after each gigabyte. paramiko's half of that is twice a second at full speed.
    REKEY_BYTES = 1 << 30

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(sock)
        self._quick = False
        self._waits_in = 0  # the process whose threads wait for as long as it takes
        self._gathering = False
        self._buffer = bytearray(_READ_AHEAD)
        self._view = memoryview(self._buffer)
        self._start = 0
        self._end = 0
        self._length = -1  # of the packet that begins in the buffer, once it is decrypted
        self._random = b""
        self._random_at = 0
        self.received = self.sent = 0  # bytes in all
        self.on_data: Callable[[bytes, int], bool] | None = None
        self.on_pause: Callable[[], None] = ignore

    # Reading: the transport thread only.

    def _fill(self, count: int, *, check_rekey: bool = False) -> None:
        """Read until there are at least ``count`` bytes in the buffer.

        :raises EOFError: if the connection ends first, or we close it
        :raises NeedRekeyException: if nothing is there, and keys are to be changed
        """
        while self._end - self._start < count:
            if self._start + count > len(self._buffer):
                self._make_room(count)
            elif self._start == self._end:
                self._start = self._end = 0
            if self.handshake_timed_out():
                raise EOFError
            try:
                if self._quick:
                    self.__socket.setsockopt(socket.IPPROTO_TCP, _QUICKACK, 1)
                got = self.__socket.recv_into(self._view[self._end :])
            except (TimeoutError, BlockingIOError, InterruptedError):
                if self.__closed:
                    raise EOFError from None
                if check_rekey and self.__need_rekey and self._start == self._end:
                    raise NeedRekeyException from None
                continue
            except OSError as exc:
                if self.__closed:
                    raise EOFError from exc
                raise
            if not got:
                raise EOFError
            self._end += got
            self.received += got

    def settle(self) -> None:
        """Use the socket for good, once the first keys are in use: only then is nothing timed by paramiko.

        A call on it then waits for as long as it takes: :meth:`close` ends it. With paramiko's timeout of
        0.1 s an idle connection would wake the processor ten times a second, and Python makes a ``poll``
        before each call. New keys that we want while nothing comes wait for the next packet, at the latest an
        answer to a keepalive. And sshd holds a small packet back until the one before is acknowledged
        (Nagle's algorithm, which it leaves on for forwards without a terminal) while the kernel delays that
        by 40 ms.
        """
        sock = self.__socket
        if _QUICKACK and sock.family != getattr(socket, "AF_UNIX", None):
            self._quick = True
        if os.name == "posix":  # elsewhere it is not known whether close() wakes another thread
            self._waits_in = os.getpid()
            sock.settimeout(None)

    def close(self) -> None:
        """Close the socket; whoever reads or writes, on another thread, is woken."""
        self.__closed = True
        if self._waits_in == os.getpid():  # a forked child would end its parent's connection
            with contextlib.suppress(OSError):
                self.__socket.shutdown(socket.SHUT_RDWR)
        super().close()

    def _make_room(self, count: int) -> None:
        rest = bytes(self._view[self._start : self._end])
        if count > len(self._buffer):
            self._view.release()
            self._buffer = bytearray(count + _READ_AHEAD)
            self._view = memoryview(self._buffer)
        self._view[: len(rest)] = rest
        self._start, self._end = 0, len(rest)

    def read_all(self, n: int, check_rekey: bool = False) -> bytes:
        """Read ``n`` bytes."""
        if n > MAX_PACKET_LENGTH:  # paramiko would wait for as much as the far side says
            msg = f"a packet of {n} bytes"
            raise SSHException(msg)
        self._fill(n, check_rekey=check_rekey)
        data = bytes(self._view[self._start : self._start + n])
        self._start += n
        return data

    def readline(self, timeout: float) -> str:
        """Read a line before the key exchange; one that does not end is refused."""
        found = -1
        while (found := self._buffer.find(b"\n", self._start, self._end)) < 0:
            if self._end - self._start > _MAX_LINE:
                msg = f"a line of more than {_MAX_LINE} bytes"
                raise SSHException(msg)
            self._wait_for_more(timeout)
        line = bytes(self._view[self._start : found])
        self._start = found + 1
        return line.rstrip(b"\r").decode("utf-8", "replace")

    def _wait_for_more(self, timeout: float) -> None:
        # paramiko's own way to wait with a deadline takes what came; it is put where we look for it.
        data = self._read_timeout(timeout)
        self._make_room(self._end - self._start + len(data))
        self._view[self._end : self._end + len(data)] = data
        self._end += len(data)

    def read_message(self) -> tuple[int, Message]:
        """Read a packet; channel data is handed on by the way, together with what of it came with it."""
        if not self.__aead_in:
            kind, message = super().read_message()
            return kind, message
        while True:
            if self._gathering and not self._has_packet():
                self._pause()
            packet, end = self._read_packet()
            if self.__compress_engine_in is not None:
                packet = b"\0" + self.__compress_engine_in(packet[1:end])
                end = len(packet)
            kind = packet[1]
            if kind == MSG_CHANNEL_DATA and self.on_data is not None and self.on_data(packet, end):
                self._gathering = True
                if self.__need_rekey:
                    self._pause()
                    raise NeedRekeyException  # lets the transport begin; it asks us again
                continue
            if self._gathering:
                self._pause()
            message = Message(packet[2:end])
            message.seqno = (self.__sequence_number_in - 1) & 0xFFFFFFFF
            return kind, message

    def _pause(self) -> None:
        self._gathering = False
        self.on_pause()

    def _has_packet(self) -> bool:
        """Return whether a whole packet is in the buffer."""
        there = self._end - self._start
        return there >= 4 and there >= 4 + self._packet_length() + _TAG

    def _packet_length(self) -> int:
        """Return the length of the packet that begins in the buffer, where four bytes of it are."""
        if not isinstance(self.__block_engine_in, ChaCha20Poly1305):
            return int(_read_uint32(self._buffer, self._start)[0])
        if self._length < 0:
            head = self._view[self._start : self._start + 4]
            self._length = int.from_bytes(
                self.__block_engine_in.length(self.__sequence_number_in, head), "big"
            )
        return self._length

    def _read_packet(self) -> tuple[bytes, int]:
        """Read and decrypt one; return it from the padding length on, and its end."""
        if self._end - self._start < 4:
            self._fill(4, check_rekey=True)
        length = self._packet_length()
        if not 5 <= length <= MAX_PACKET_LENGTH:
            msg = f"a packet of {length} bytes"
            raise SSHException(msg)
        whole = 4 + length + _TAG
        if self._end - self._start < whole:
            self._fill(whole)
        try:
            packet = self._decrypt(length)
        except InvalidTag as exc:
            msg = "Mismatched MAC"
            raise SSHException(msg) from exc
        self._start += whole
        self._length = -1
        self._count_received(whole)
        end = length - packet[0]
        if end < 2:
            msg = "a packet without a payload"
            raise SSHException(msg)
        return packet, end

    def _decrypt(self, length: int) -> bytes:
        """Decrypt a packet that is in the buffer, and step its nonce on."""
        at, engine = self._start, self.__block_engine_in
        end = at + 4 + length
        if isinstance(engine, ChaCha20Poly1305):
            number = self.__sequence_number_in  # which is the nonce, and is counted with the packets
            return engine.open(number, self._view[at:end], self._view[end : end + _TAG], skip=4)
        packet: bytes = engine.decrypt(  # RFC 5647, section 7.3
            self.__iv_in, self._view[at + 4 : end + _TAG], self._view[at : at + 4]
        )
        self.__iv_in = _next(self.__iv_in)
        return packet

    def _count_received(self, whole: int) -> None:
        following = (self.__sequence_number_in + 1) & 0xFFFFFFFF
        if following == 0 and not self._initial_kex_done:
            msg = "Sequence number rolled over during initial kex!"
            raise SSHException(msg)
        self.__sequence_number_in = following
        self.__received_bytes += whole
        self.__received_packets += 1
        if self.__need_rekey:
            self.__received_bytes_overflow += whole
            self.__received_packets_overflow += 1
            if (
                self.__received_packets_overflow >= self.REKEY_PACKETS_OVERFLOW_MAX
                or self.__received_bytes_overflow >= self.REKEY_BYTES_OVERFLOW_MAX
            ):
                msg = "the server ignores requests for new keys"
                raise SSHException(msg)
        elif self.__received_packets >= self.REKEY_PACKETS or self.__received_bytes >= self.REKEY_BYTES:
            self._want_new_keys()

    def _want_new_keys(self) -> None:
        self.__received_bytes_overflow = 0
        self.__received_packets_overflow = 0
        self._trigger_rekey()

    # Writing: under the base's lock.

    def send_message(self, data: Message | ChannelData) -> None:
        """Send a message, or as many packets as channel data needs."""
        if not self.__aead_out:
            if isinstance(data, ChannelData):
                for head, part in data.payloads():
                    super().send_message(Message(head + bytes(part)))
            else:
                super().send_message(data)
            return
        payloads = data.payloads() if isinstance(data, ChannelData) else [(data.asbytes(), _NOTHING)]
        with self.__write_lock:
            out: list[bytes] = []
            for head, part in payloads:
                if self.__compress_engine_out is None:
                    self._build(head, part, out)
                else:
                    self._build(self.__compress_engine_out(head + bytes(part)), _NOTHING, out)
            whole = b"".join(out)
            self.write_all(whole)
            self.__sent_bytes += len(whole)
            self.__sent_packets += len(payloads)
            if (
                self.__sent_packets >= self.REKEY_PACKETS or self.__sent_bytes >= self.REKEY_BYTES
            ) and not self.__need_rekey:
                self._want_new_keys()

    def _build(self, head: bytes, part: memoryview, out: list[bytes]) -> None:
        """Pad and encrypt one packet; what is padded is all but its length (RFC 5647, section 7.2)."""
        size = 1 + len(head) + len(part)
        padding = 4 + (-(size + 4)) % self.__block_size_out
        at = self._random_at
        if at + padding > len(self._random):
            self._random, at = os.urandom(4096), 0
        self._random_at = at + padding
        length = _uint32(size + padding)
        plain = b"".join((_BYTE[padding], head, part, self._random[at : at + padding]))
        engine = self.__block_engine_out
        if isinstance(engine, ChaCha20Poly1305):
            out.append(engine.seal(self.__sequence_number_out, length, plain))
        else:
            out.append(length)
            out.append(engine.encrypt(self.__iv_out, plain, length))
            self.__iv_out = _next(self.__iv_out)
        following = (self.__sequence_number_out + 1) & 0xFFFFFFFF
        if not following and not self._initial_kex_done:
            msg = "Sequence number rolled over during initial kex!"
            raise SSHException(msg)
        self.__sequence_number_out = following

    def write_all(self, out: Buffer) -> None:
        """Write all of it, however often the socket is full.

        :raises EOFError: if the connection is no more
        """
        rest = memoryview(out)
        self.sent += len(rest)
        while rest:
            try:
                sent = self.__socket.send(rest)
                if sent == len(rest):
                    return
                rest = rest[sent:]
            except (TimeoutError, BlockingIOError, InterruptedError):
                if self.__closed:
                    raise EOFError from None
            except OSError as exc:
                raise EOFError from exc


def _next(iv: bytes) -> bytes:
    """Count the last eight bytes of a nonce up (RFC 5647, section 7.1)."""
    return iv[:4] + ((int.from_bytes(iv[4:], "big") + 1) & _MASK).to_bytes(8, "big")
