"""A network cable between a client and a server on this machine, which a test can cut, pull and mend."""

from __future__ import annotations

import socket
import struct
import threading
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path

from beds import Machine

_RESET = struct.pack("ii", 1, 0)


class Cable:
    """Carries TCP connections to a server; a context manager.

    Silent, it holds what is sent on existing connections until it is mended, as TCP does by sending it again,
    and takes new connections without an answer. That is how a network looks in which packets are dropped.

    :param host: the server's address
    :param port: its port
    :ivar port: where to connect instead
    :ivar made: how many connections were made through it
    :ivar carried: how many bytes it has carried, both ways
    :ivar held: how many bytes came while it was silent: proof that the cut was felt
    """

    def __init__(self, host: str, port: int) -> None:
        self._target = (host, port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.made = 0
        self.carried = 0
        self.held = 0
        self._whole = threading.Event()
        self._whole.set()
        self._refusing = False
        self._closed = False
        self._socks: set[socket.socket] = set()
        self._lock = threading.Lock()

    def __enter__(self) -> Cable:
        threading.Thread(target=self._accept, name="cable", daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._closed = True
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.pull()
        self._whole.set()

    def cut(self) -> None:
        """Let nothing through, and say nothing."""
        self._whole.clear()

    def mend(self) -> None:
        """Let everything through again, what was held first."""
        self._refusing = False
        self._whole.set()

    def pull(self) -> None:
        """Reset every connection."""
        with self._lock:
            socks, self._socks = self._socks, set()
        for sock in socks:
            with suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                sock.shutdown(socket.SHUT_RD)
            sock.close()

    def refuse(self) -> None:
        """Reset every connection, and each new one at once."""
        self._refusing = True
        self.pull()

    def machine(self, machine: Machine, directory: Path) -> Machine:
        """Give the machine as it is reached through this cable."""
        line = machine.known_hosts.read_text(encoding="ascii").split(maxsplit=1)[1]
        known = directory / f"known_hosts-cable-{self.port}"
        known.write_text(f"[127.0.0.1]:{self.port} {line}", encoding="ascii")
        return replace(machine, host="127.0.0.1", port=self.port, known_hosts=known)

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            if self._refusing:
                near.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                near.close()
                continue
            self.made += 1
            threading.Thread(target=self._carry, args=(near,), name="cable", daemon=True).start()

    def _carry(self, near: socket.socket) -> None:
        with self._lock:
            self._socks.add(near)
        self._whole.wait()
        try:
            far = socket.create_connection(self._target, timeout=30)
        except OSError:
            near.close()
            return
        far.settimeout(None)
        with self._lock:
            self._socks.add(far)
        back = threading.Thread(target=self._copy, args=(far, near), name="cable", daemon=True)
        back.start()
        with closing(near), closing(far):
            self._copy(near, far)
            back.join()

    def _copy(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                if not self._whole.is_set():
                    self.held += len(data)
                    self._whole.wait()
                with self._lock:
                    self.carried += len(data)
                sink.sendall(data)
        for sock, how in ((sink, socket.SHUT_WR), (source, socket.SHUT_RD)):
            with suppress(OSError):
                sock.shutdown(how)
