"""A bad link between a client and a server on this machine: tiny segments, jitter, stalls as after a loss."""

from __future__ import annotations

import random
import socket
import threading
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from beds import Machine

#: Bytes of a segment and how often it is that size: half of them are a single byte.
_SIZES = (1, 3, 100, 1448, 60_000)
_SHARES = (50, 15, 15, 15, 5)


class Rough:
    """Carries TCP connections to a server in segments of any size, late, and with rests; a context manager.

    TCP itself hides a lost packet: what a program sees of it is a rest in which nothing comes, then all that
    was behind it at once. Each direction has its own random numbers, the same in every run.

    :ivar port: where to connect instead
    :ivar single: how many segments were a single byte; ``late`` and ``stalls`` are how often it waited
    """

    def __init__(self, host: str, port: int, *, smooth: bool = False) -> None:
        self._target = (host, port)
        self._smooth = smooth
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.single = self.late = self.stalls = 0
        self._over = threading.Event()
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Rough:
        self._start(self._accept)
        return self

    def __exit__(self, *exc: object) -> None:
        self._over.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join(30)

    def machine(self, machine: Machine, directory: Path) -> Machine:
        """Give the machine as it is reached over this link."""
        line = machine.known_hosts.read_text(encoding="ascii").split(maxsplit=1)[1]
        known = directory / f"known_hosts-rough-{self.port}"
        known.write_text(f"[127.0.0.1]:{self.port} {line}", encoding="ascii")
        return replace(machine, host="127.0.0.1", port=self.port, known_hosts=known)

    def _start(self, work: object, *args: object) -> None:
        thread = threading.Thread(target=work, args=args, name="rough", daemon=True)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            far = socket.create_connection(self._target, timeout=30)
            for sock in (near, far):
                sock.settimeout(None)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._start(self._copy, near, far, 1)
            self._start(self._copy, far, near, 2)

    def _copy(self, source: socket.socket, sink: socket.socket, seed: int) -> None:
        chance = random.Random(seed)
        with suppress(OSError):
            while data := source.recv(1 << 16):
                rest = memoryview(data)
                while rest:
                    size = len(rest) if self._smooth else self._rest(chance)
                    sink.sendall(rest[:size])
                    rest = rest[size:]
        for sock in (source, sink):
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        if seed == 1:  # the other direction's thread has the same two sockets
            self._over.wait()
            source.close()
            sink.close()

    def _rest(self, chance: random.Random) -> int:
        """Wait, perhaps; gives the size of the next segment."""
        dice = chance.random()
        if dice < 0.01:
            self.stalls += 1
            self._over.wait(0.2)  # TCP's shortest time to send again
        elif dice < 0.05:
            self.late += 1
            self._over.wait(chance.random() * 0.005)
        [size] = chance.choices(_SIZES, _SHARES)
        self.single += size == 1
        return size
