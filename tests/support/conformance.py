"""What any forward must do: a TCP target that behaves as it is asked, and the checks that drive it.

Standard library only and runnable by itself, so that either half can run on another machine::

    python conformance.py serve                    prints its port
    python conformance.py check NAME HOST PORT     ends with 0 if the forward at HOST PORT keeps the promise

A connection to the target begins with one line that says how to behave; see the ``on_`` functions.
"""

from __future__ import annotations

import hashlib
import socket
import struct
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

BLOCK = bytes(range(251)) * 4177  # about 1 MiB, with no period that divides a packet size
DEADLINE = 60.0
MIB = 1 << 20
_last = hashlib.sha256()
_last_done = threading.Event()
_stalled = threading.Event()
_go = threading.Event()


def pattern(count: int) -> bytes:
    """Make ``count`` bytes that are the same everywhere."""
    return (BLOCK * (count // len(BLOCK) + 1))[:count]


def read_all(sock: socket.socket) -> bytes:
    """Read to the end of file."""
    parts = []
    while part := sock.recv(1 << 18):
        parts.append(part)
    return b"".join(parts)


def read_exactly(sock: socket.socket, count: int) -> bytes:
    """Read ``count`` bytes; fewer are an error."""
    parts: list[bytes] = []
    while count:
        part = sock.recv(min(count, 1 << 18))
        assert part, f"the connection ended {count} bytes early"
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def expect_reset(address: tuple[str, int], words: bytes = b"") -> None:
    """A connection is reset, as early as while it is made or asks: no moment of that is promised."""
    with suppress(ConnectionResetError), socket.create_connection(address, timeout=DEADLINE) as sock:
        sock.sendall(words)
        answer = sock.recv(1)
        raise AssertionError(f"no reset, but {answer!r}")


# The target.


def on_echo(sock: socket.socket) -> None:
    """Send back what comes."""
    while part := sock.recv(1 << 16):
        sock.sendall(part)


def on_send(sock: socket.socket, count: int) -> None:
    """Send ``count`` bytes and close."""
    sock.sendall(pattern(count))


def on_hash(sock: socket.socket) -> None:
    """Read to the end, then answer with the digest: needs the half-close to arrive, and not to close both."""
    sock.sendall(hashlib.sha256(read_all(sock)).digest())


def on_bye(sock: socket.socket, count: int) -> None:
    """Send, half-close, and go on reading; ``last`` tells what came."""
    global _last
    _last_done.clear()
    sock.sendall(pattern(count))
    sock.shutdown(socket.SHUT_WR)
    _last = hashlib.sha256(read_all(sock))
    _last_done.set()


def on_last(sock: socket.socket) -> None:
    """Tell the digest of what the last ``bye`` read."""
    assert _last_done.wait(DEADLINE)
    sock.sendall(_last.digest())


def on_flood(sock: socket.socket, count: int) -> None:
    """Write without reading until nothing moves any more, and read once ``go`` has come."""
    _stalled.clear()
    _go.clear()
    sock.sendall(flood(sock, count, _wait_for_go))


def _wait_for_go() -> None:
    _stalled.set()
    assert _go.wait(DEADLINE)


def on_go(sock: socket.socket) -> None:
    """Let ``flood`` read, once its own writing has stalled too: then both directions were full at once."""
    assert _stalled.wait(DEADLINE)
    _go.set()
    sock.sendall(b"!")


def on_reset(sock: socket.socket, count: int) -> None:
    """Send and break off."""
    sock.sendall(pattern(count))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def flood(sock: socket.socket, count: int, stalled: Callable[[], None]) -> bytes:
    """Write ``count`` bytes and read as many; the digest read.

    :param stalled: called when the writing has stalled; reading begins when it returns
    """
    progress = threading.Event()
    data = memoryview(pattern(count))

    def write() -> None:
        sent = 0
        while sent < count:
            sent += sock.send(data[sent : sent + 65536])
            progress.set()

    writer = threading.Thread(target=write)
    writer.start()
    while progress.wait(0.5):
        progress.clear()
    assert writer.is_alive(), "the writing never stalled: not both directions were full"
    stalled()
    digest = hashlib.sha256(read_exactly(sock, count)).digest()
    writer.join(DEADLINE)
    assert digest == hashlib.sha256(pattern(count)).digest()
    return digest


def handle(sock: socket.socket) -> None:
    """Behave as the first line says; whoever asked may go away at any time."""
    with sock, suppress(ConnectionError):
        sock.settimeout(DEADLINE)
        line = b""
        while not line.endswith(b"\n"):
            part = sock.recv(1)
            if not part:
                return
            line += part
        name, *numbers = line.decode().split()
        globals()[f"on_{name}"](sock, *map(int, numbers))


def serve(listener: socket.socket) -> None:
    """Serve each connection on a thread of its own, until the listener is closed."""
    while True:
        try:
            sock, _ = listener.accept()
        except OSError:
            return
        threading.Thread(target=handle, args=(sock,), daemon=True).start()


def listen() -> socket.socket:
    """Listen on loopback, on any free port."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=512)
    listener.settimeout(None)
    return listener


# The checks.


def ask(address: tuple[str, int], words: str) -> socket.socket:
    """Connect and say how to behave."""
    sock = socket.create_connection(address, timeout=DEADLINE)
    sock.sendall(words.encode() + b"\n")
    return sock


def check_echo(address: tuple[str, int]) -> None:
    """Small and odd sizes come back as they are, one after the other."""
    with ask(address, "echo") as sock:
        for size in (1, 2, 255, 4096, 32768, 32769, 100_001):
            sock.sendall(pattern(size))
            assert read_exactly(sock, size) == pattern(size), size


def check_download(address: tuple[str, int]) -> None:
    """Every byte of a large download arrives, and then the end of file."""
    with ask(address, f"send {24 * MIB}") as sock:
        assert read_all(sock) == pattern(24 * MIB)


def check_upload_half_close(address: tuple[str, int]) -> None:
    """The end of an upload arrives as a half-close, and the answer to it comes back."""
    with ask(address, "hash") as sock:
        sock.sendall(pattern(24 * MIB))
        sock.shutdown(socket.SHUT_WR)
        assert read_all(sock) == hashlib.sha256(pattern(24 * MIB)).digest()


def check_target_half_close(address: tuple[str, int]) -> None:
    """When the target is done sending, we can still send."""
    with ask(address, "bye 100001") as sock:
        assert read_all(sock) == pattern(100_001)
        sock.sendall(pattern(5 * MIB))
    with ask(address, "last") as sock:
        assert read_all(sock) == hashlib.sha256(pattern(5 * MIB)).digest()


def check_both_full(address: tuple[str, int]) -> None:
    """Both directions full at once is not the end: everything flows when somebody reads."""

    def go() -> None:
        with ask(address, "go") as other:
            assert read_all(other) == b"!"

    with ask(address, f"flood {32 * MIB}") as sock:
        digest = flood(sock, 32 * MIB, go)
        assert read_all(sock) == digest


def check_slow_reader(address: tuple[str, int]) -> None:
    """A connection that nobody reads from does not slow the others."""
    with ask(address, f"send {24 * MIB}") as slow:
        slow.recv(1, socket.MSG_PEEK)
        for _ in range(20):
            check_echo(address)
        assert read_all(slow) == pattern(24 * MIB)


def check_many(address: tuple[str, int]) -> None:
    """Five hundred connections at once are all served; ``select`` could not."""
    with ThreadPoolExecutor(32) as pool:
        socks = list(pool.map(lambda _: ask(address, "echo"), range(500)))
        try:
            for number, sock in enumerate(socks):
                sock.sendall(b"%06d" % number)
            assert [read_exactly(sock, 6) for sock in socks] == [b"%06d" % n for n in range(500)]
        finally:
            for sock in socks:
                sock.close()


def check_reset(address: tuple[str, int]) -> None:
    """A target that breaks off ends the connection here; nothing hangs."""
    with ask(address, "reset 1000") as sock:
        try:
            assert pattern(1000).startswith(read_all(sock))
        except ConnectionError:
            pass


def check_interleaved(address: tuple[str, int]) -> None:
    """Sixteen transfers at once, both ways, stay apart."""
    jobs = [check_download, check_upload_half_close, check_echo, check_echo] * 2
    with ThreadPoolExecutor(len(jobs)) as pool:
        for job in [pool.submit(check, address) for check in jobs]:
            job.result(DEADLINE)


CHECKS = {
    name[len("check_") :]: check for name, check in list(globals().items()) if name.startswith("check_")
}


def main(words: list[str]) -> None:
    """Run one half from the command line."""
    if words[0] == "serve":
        listener = listen()
        print(listener.getsockname()[1], flush=True)  # noqa: T201  # whoever started it reads that
        serve(listener)
    else:
        _, name, host, port = words
        CHECKS[name]((host, int(port)))


if __name__ == "__main__":
    main(sys.argv[1:])
