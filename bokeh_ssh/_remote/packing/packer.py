"""Make what a server sends smaller, between its socket and the SSH server: a process with its own socket.

What the client sends goes on as it is. What the server sends goes in blocks, which the client's
``_forwarding.unpacker`` undoes: a head (:data:`HEAD`), so many bytes, and zeros until it is an eighth of the
block's size, so that nobody can fill the client's memory from a small window. A block of size 0 is the end.

Numbers hardly compress as they are. In place of each number that fills 8 bytes comes its difference from the
one before, or the difference of these, and then all first bytes, all second bytes, and so on. What does best
with a sample is taken, so it does not matter what the numbers are, and where they begin.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
import sys
import time

from bokeh_ssh._remote.process_group import let_go

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

#: How a block is arranged, the bytes in front of the first number, its size, and what follows of it.
HEAD = struct.Struct(">BBII")
PLAIN, DEFLATED, BYTES = 0, 1, 2  # from 2 on: arranged by bytes, after as many differences, and deflated
MOST = 1 << 16  # bytes of a block
LEAST = 8  # the size of a block is at most this times what is sent
SAMPLE = 1 << 12
AGAIN = 16  # blocks until another sample is taken
ROUND = 1 << 22  # bytes sent without a pause until the pace is looked at: twice a window
PAUSE = 0.05  # seconds


def subtract(data: bytes, times: int) -> bytes:
    """Return the differences of numbers of 8 bytes, the first from 0; and so on, so many times.

    All of them at once, as one number of that many digits: each has its highest bit apart, so that none
    borrows from its neighbour.
    """
    count = len(data) // 8
    all_bits = (1 << 64 * count) - 1
    high = int.from_bytes(b"\0\0\0\0\0\0\0\x80" * count, "little")
    numbers = int.from_bytes(data, "little")
    for _ in range(times):
        before = (numbers << 64) & all_bits
        numbers = ((numbers | high) - (before & ~high)) ^ ((numbers ^ before ^ all_bits) & high)
    return numbers.to_bytes(8 * count, "little")


def arrange(data: bytes, how: int, skip: int) -> bytes:
    """Return a block's bytes in another order, numbers as differences: see the module's text."""
    if how < BYTES:
        return data
    end = len(data) - (len(data) - skip) % 8
    numbers = subtract(data[skip:end], how - BYTES)
    return b"".join([*(numbers[i::8] for i in range(8)), data[:skip], data[end:]])


def choose(data: bytes) -> tuple[int, int]:
    """Return how to arrange what is like this."""
    from zlib import compress

    begin = len(data) // 16 * 8
    sample = data[begin : begin + SAMPLE]
    ways = [(DEFLATED, 0), (BYTES, 0), *((BYTES + order, skip) for order in (1, 2) for skip in range(8))]
    return min(ways, key=lambda way: len(compress(arrange(sample, *way), 1)))


class Packer:
    """Packs what goes over one connection."""

    def __init__(self) -> None:
        from zlib import compressobj

        self.deflater = compressobj(1)
        self.way = DEFLATED, 0
        self.left = 0  # blocks until another sample is taken
        self.expected = 0.0  # what is left of a block, as a share

    def pack(self, data: bytes) -> bytes:
        """Return a block with this in it."""
        from zlib import Z_SYNC_FLUSH

        if len(data) < 2 * SAMPLE:
            self.way, self.left = (DEFLATED, 0), 0
        elif self.left == 0:
            self.way, self.left, self.expected = choose(data), AGAIN, 0.0
        else:
            self.left -= 1
        packed = self.deflater.compress(arrange(data, *self.way)) + self.deflater.flush(Z_SYNC_FLUSH)
        share = len(packed) / len(data)
        self.expected = self.expected or share
        if share > 1.2 * self.expected:
            self.left = 0  # other numbers follow, or they begin elsewhere
        return block(data, *self.way, packed)


def block(data: bytes, how: int, skip: int, packed: bytes) -> bytes:
    """Return a block as it is sent."""
    head = HEAD.pack(how, skip, len(data), len(packed))
    return head + packed + bytes(max(0, -(-len(data) // LEAST) - len(packed)))


class Pace:
    """Sees whether more gets through unpacked: a fast line takes more than can be packed meanwhile.

    :ivar plain: whether that is so, as far as is known
    """

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Begin again: the server has sent nothing for a while, so the line has emptied."""
        self.plain = False
        self.rates: dict[bool, float] = {}  # bytes of the server's a second, unpacked or not
        self.begin_round()

    def begin_round(self) -> None:
        """Count from here on."""
        self.came = self.went = 0
        self.packing = self.sending = 0.0

    def count(self, came: int, went: int, packing: float, sending: float) -> None:
        """Count a block: its size, the bytes sent, and the seconds for both."""
        self.came, self.went = self.came + came, self.went + went
        self.packing, self.sending = self.packing + packing, self.sending + sending
        if self.went < ROUND:
            return
        self.rates[self.plain] = self.came / (self.packing + self.sending)
        if len(self.rates) == 2:
            self.plain = self.rates[True] > self.rates[False]
        else:
            self.plain = self.sending < self.packing / 10  # the line waits for us: try it
        self.begin_round()


def receive(sock: socket.socket) -> bytes:
    """Return what comes next: nothing once it has ended, be it over what it has not read (ECONNRESET)."""
    try:
        return sock.recv(MOST)
    except OSError:
        return b""


def send_packed(server: socket.socket, client: socket.socket) -> None:
    """Pack and send all that the server sends, and its end."""
    packer, pace, begun = Packer(), Pace(), False
    while True:
        asked = time.monotonic()
        data = receive(server)
        came = time.monotonic()
        if not data:
            break
        if came > asked + PAUSE:
            pace.restart()
        begun = True
        made = block(data, PLAIN, 0, data) if pace.plain else packer.pack(data)
        packed = time.monotonic()
        client.sendall(made)
        pace.count(len(data), len(made), packed - came, time.monotonic() - packed)
    if begun:  # else it has ended before it has said anything, as a connection does that nobody uses
        client.sendall(block(b"", PLAIN, 0, b""))
    client.shutdown(socket.SHUT_WR)


def send_on(client: socket.socket, server: socket.socket) -> None:
    """Send on all that the client sends, and its end; or as much as the server takes, which has its say."""
    try:
        for data in iter(lambda: receive(client), b""):
            server.sendall(data)
    except (OSError, MemoryError):
        end(client, socket.SHUT_RD)
    end(server, socket.SHUT_WR)


def end(sock: socket.socket, how: int) -> None:
    """Shut it down, and wake whoever waits for it; it may have ended by itself."""
    with contextlib.suppress(OSError):
        sock.shutdown(how)


def carry(client: socket.socket, server: socket.socket, path: str) -> None:
    """Carry one connection to its end."""
    from threading import Thread

    with client, server:
        there = Thread(target=send_on, args=(client, server), daemon=True)
        try:
            server.connect(path)
            there.start()
        except (OSError, RuntimeError):
            refuse(client)
            return
        try:
            send_packed(server, client)
        except (OSError, MemoryError):  # the client is gone, or a limit is reached
            refuse(client)
            end(client, socket.SHUT_RDWR)
            end(server, socket.SHUT_RDWR)
        there.join()


def refuse(client: socket.socket) -> None:
    """Let the client break it off: an end alone would be an empty answer."""
    with contextlib.suppress(OSError):
        client.send(b"\0", socket.MSG_DONTWAIT)  # not even a head


def serve(listener: socket.socket, path: str) -> NoReturn:
    """Carry each connection on a thread of its own; where there can be no more, let in nobody any more."""
    import resource
    from threading import Thread

    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    spare_memory()
    with contextlib.suppress(OSError, RuntimeError), listener:
        while True:
            server = socket.socket(socket.AF_UNIX)
            os.close(os.dup(server.fileno()))  # there is one more for who comes, else nobody is let in
            client = listener.accept()[0]
            try:
                Thread(target=carry, args=(client, server, path), daemon=True).start()
            except RuntimeError:
                refuse(client)
                raise
    while True:
        signal.pause()


def spare_memory() -> None:
    """Let threads reserve little: a batch system may count what is reserved, and kill the job for it."""
    import threading

    threading.stack_size(1 << 18)  # of 8 MiB
    with contextlib.suppress(Exception):  # no ctypes, or another C library, which reserves less
        import ctypes

        ctypes.CDLL(None).mallopt(-8, 1)  # glibc's M_ARENA_MAX: else 64 MiB for each thread


def start_packer(listens: str, path: str, group: int) -> bool:
    """Start it in the server's process group, which it ends with; return whether it listens.

    :param listens: where it is to
    :param path: the server's socket
    """
    if sys.byteorder != "little":  # as the client is
        return False
    try:
        import zlib  # noqa: F401 - a Python may have been built without it

        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(listens)
            os.chmod(listens, 0o600)
            listener.listen(128)
            pid = os.fork()
            if not pid:
                run(listener.fileno(), path, group)
        with contextlib.suppress(OSError):  # it has done so itself, or is gone
            os.setpgid(pid, group)
    except (OSError, ImportError):
        return False
    return True


def run(listener: int, path: str, group: int) -> NoReturn:
    """Serve, in the process that was forked for that."""
    try:
        os.setpgid(0, group)
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGTERM, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        serve(socket.socket(fileno=let_go(listener)[0]), path)
    finally:
        os._exit(0)
