"""What is forwarded to: it sends, swallows or echoes, as the first line of a connection says.

``send COUNT`` sends and closes; ``sink`` and ``hash`` read to the end and answer with the count or the
digest; ``echo`` gives back what comes. Standard library only; nothing here may be slower than a peer.
"""

from __future__ import annotations

import hashlib
import json
import socket
import struct
import sys
import threading

from conformance import BLOCK

_ROOM = 1 << 20
#: One connection that hangs must not outlive the run by much.
_DEADLINE = 300.0


def send(sock: socket.socket, count: int) -> None:
    """Send ``count`` bytes of the pattern that is the same everywhere, see ``conformance.pattern``."""
    block = memoryview(BLOCK)
    while count > 0:
        sock.sendall(block[:count])
        count -= len(block)


def sink(sock: socket.socket, rest: bytes) -> None:
    """Read to the end, and tell how much it was."""
    room = bytearray(_ROOM)
    total = len(rest)
    while got := sock.recv_into(room):
        total += got
    sock.sendall(struct.pack(">Q", total))


def digest(sock: socket.socket, rest: bytes) -> None:
    """Read to the end, and tell its SHA-256."""
    found = hashlib.sha256(rest)
    while part := sock.recv(_ROOM):
        found.update(part)
    sock.sendall(found.digest())


def echo(sock: socket.socket, rest: bytes) -> None:
    """Give back what comes."""
    while rest:
        sock.sendall(rest)
        rest = sock.recv(1 << 16)


def handle(sock: socket.socket) -> None:
    """Do what the first line says; whoever asked may go away at any time."""
    with sock:
        try:
            sock.settimeout(_DEADLINE)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            line = b""
            while b"\n" not in line:
                part = sock.recv(4096)
                if not part:
                    return
                line += part
            line, _, rest = line.partition(b"\n")
            name, *numbers = line.decode().split()
            if name == "send":
                send(sock, int(numbers[0]))
            elif name == "echo":
                echo(sock, rest or sock.recv(1 << 16))
            else:
                {"sink": sink, "hash": digest}[name](sock, rest)
        except OSError:
            pass  # the driver of the loads tells what went wrong


def serve(listener: socket.socket) -> None:
    """Serve each connection on a thread of its own; most of them block in C, outside the interpreter lock."""
    threading.stack_size(256 * 1024)
    while True:
        try:
            sock, _ = listener.accept()
        except OSError:
            return
        threading.Thread(target=handle, args=(sock,), daemon=True).start()


def main() -> None:
    """Tell the port, and serve until standard input ends."""
    sys.stdin.readline()
    with socket.create_server(("127.0.0.1", 0), backlog=4096) as listener:
        threading.Thread(target=serve, args=(listener,), daemon=True).start()
        print(json.dumps({"port": listener.getsockname()[1]}), flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
