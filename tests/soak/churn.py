"""What connections do, in any order and all at once; each checks every byte that it is owed."""

from __future__ import annotations

import hashlib
import random
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable

from conformance import MIB, ask, pattern, read_all, read_exactly

Address = tuple[str, int]
_RESET = struct.pack("ii", 1, 0)
_DOWN = pattern(3 * MIB)
_UP = pattern(2 * MIB + 12_345)
_DIGEST = hashlib.sha256(_UP).digest()


def echo(address: Address, chance: random.Random, pause: threading.Event) -> None:
    """Open, get back what was sent, close."""
    data = _UP[: chance.choice((1, 200, 32_768, 100_001))]
    with ask(address, "echo") as sock:
        sock.sendall(data)
        assert read_exactly(sock, len(data)) == data


def download(address: Address, chance: random.Random, pause: threading.Event) -> None:
    """Read to the end."""
    with ask(address, f"send {len(_DOWN)}") as sock:
        assert read_all(sock) == _DOWN


def half_close(address: Address, chance: random.Random, pause: threading.Event) -> None:
    """Send, half-close, and get the answer."""
    with ask(address, "hash") as sock:
        sock.sendall(_UP)
        sock.shutdown(socket.SHUT_WR)
        assert read_all(sock) == _DIGEST


def slow(address: Address, chance: random.Random, pause: threading.Event) -> None:
    """Read with rests, so that what comes has to wait."""
    with ask(address, f"send {len(_DOWN)}") as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16 * 1024)
        parts = [read_exactly(sock, len(_DOWN) // 4) for _ in range(4) if not pause.wait(0.05)]
        assert b"".join(parts) == _DOWN[: sum(map(len, parts))]
        if len(parts) == 4:
            assert read_all(sock) == b""


def walk_away(address: Address, chance: random.Random, pause: threading.Event) -> None:
    """Close in the middle of a download."""
    with ask(address, f"send {len(_DOWN)}") as sock:
        read_exactly(sock, chance.randrange(1, len(_DOWN)))


def break_off(address: Address, chance: random.Random, pause: threading.Event) -> None:
    """Reset in the middle of an echo."""
    with ask(address, "echo") as sock:
        sock.sendall(_UP[:50_000])
        sock.recv(1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)


def be_broken_off(address: Address, chance: random.Random, pause: threading.Event) -> None:
    """See the target break off."""
    with ask(address, "reset 1000") as sock:
        try:
            assert _DOWN[:1000].startswith(read_all(sock))
        except ConnectionError:
            pass


def open_only(address: Address, chance: random.Random, pause: threading.Event) -> None:
    """Open and close, without a word."""
    socket.create_connection(address, timeout=30).close()


Work = Callable[[Address, random.Random, threading.Event], None]
KINDS: tuple[Work, ...] = (
    echo,
    download,
    half_close,
    slow,
    walk_away,
    break_off,
    be_broken_off,
    open_only,
)
#: How often each: most connections of a page are short.
_SHARES = (10, 2, 2, 1, 1, 4, 3, 4)


class Churn:
    """Threads that do all of it until they are told to stop; a context manager.

    :ivar done: how often each was done, by its name and the port
    :ivar errors: what went wrong
    """

    def __init__(self, ports: list[int], threads: int = 6) -> None:
        self.done: Counter[tuple[str, int]] = Counter()
        self.errors: list[BaseException] = []
        self._ports = ports
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._threads = [
            threading.Thread(target=self._work, args=(seed,), name="churn", daemon=True)
            for seed in range(threads)
        ]

    def __enter__(self) -> Churn:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(60)

    def _work(self, seed: int) -> None:
        chance = random.Random(seed)
        while not self._stop.is_set() and not self.errors:
            [work] = chance.choices(KINDS, _SHARES)
            port = chance.choice(self._ports)
            try:
                work(("127.0.0.1", port), chance, self._stop)
            except Exception as exc:  # noqa: BLE001  # whatever it was ends the run, which tells it
                self.errors.append(exc)
                return
            with self._lock:
                self.done[work.__name__, port] += 1
