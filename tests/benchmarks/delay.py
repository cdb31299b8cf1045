"""A long link: a TCP proxy that hands everything on a fixed time after it came, at a rate that all share."""

from __future__ import annotations

import collections
import json
import selectors
import socket
import sys
import threading
import time

_CHUNK = 1 << 20
#: Bytes under way in one direction; 1 GB/s at 50 ms is 50 MB.
_MOST = 256 * 1024 * 1024


class Direction:
    """One direction of the link, which all connections share.

    :param delay: seconds under way
    :param rate: bytes a second; 0 for as many as come
    """

    def __init__(self, delay: float, rate: float = 0.0) -> None:
        self.delay = delay
        self.rate = rate
        #: Bytes read at a time and under way for one connection: with a rate, as routers have them, few.
        self.chunk = 16 * 1024 if rate else _CHUNK
        self.most = max(256 * 1024, int(2 * rate * delay)) if rate else _MOST
        self._free = 0.0  # when the last of what was taken has gone out
        self._lock = threading.Lock()

    def due(self, count: int) -> float:
        """Take that many bytes; return when they arrive."""
        now = time.monotonic()
        if not self.rate:
            return now + self.delay
        with self._lock:
            self._free = max(self._free, now) + count / self.rate
            return self._free + self.delay


class _Line:
    """One direction of one connection."""

    def __init__(self, source: socket.socket, sink: socket.socket, direction: Direction) -> None:
        self.source = source
        self.sink = sink
        self._direction = direction
        self._under_way: collections.deque[tuple[float, memoryview | None]] = collections.deque()
        self._size = 0
        self._ended = False
        self.stuck = False
        self.done = False

    @property
    def wants(self) -> bool:
        """Whether it reads on."""
        return not self._ended and self._size < self._direction.most

    def read(self) -> None:
        """Take what is there."""
        try:
            data = self.source.recv(self._direction.chunk)
        except BlockingIOError:
            return
        self._under_way.append((self._direction.due(len(data)), memoryview(data) if data else None))
        self._size += len(data)
        self._ended = not data

    def write(self) -> float | None:
        """Hand on what is due; gives the seconds to what is next."""
        self.stuck = False
        while self._under_way:
            due, data = self._under_way[0]
            left = due - time.monotonic()
            if left > 0:
                return left
            if data is None:
                self._under_way.clear()  # told once: a sink that has ended by then cannot be told again
                self.sink.shutdown(socket.SHUT_WR)
                self.done = True
                return None
            try:
                count = self.sink.send(data)
            except BlockingIOError:
                self.stuck = True
                return None
            self._size -= count
            if count == len(data):
                self._under_way.popleft()
            else:
                self._under_way[0] = (due, data[count:])
        return None


def carry(here: socket.socket, there: socket.socket, up: Direction, down: Direction) -> None:
    """Carry one connection, both ways, to its end."""
    with here, there, selectors.DefaultSelector() as selector:
        for sock in (here, there):
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            selector.register(sock, selectors.EVENT_READ)
        lines = (_Line(here, there, up), _Line(there, here, down))
        try:
            while not all(line.done for line in lines):
                _turn(selector, lines)
        except OSError:
            pass  # one end broke off: both are closed


def _turn(selector: selectors.BaseSelector, lines: tuple[_Line, _Line]) -> None:
    pauses = [pause for line in lines if (pause := line.write()) is not None]
    forth, back = lines
    for line, other in ((forth, back), (back, forth)):
        mask = (selectors.EVENT_READ if line.wants else 0) | (selectors.EVENT_WRITE if other.stuck else 0)
        watched = line.source in selector.get_map()
        if mask and not watched:
            selector.register(line.source, mask)
        elif mask and selector.get_key(line.source).events != mask:
            selector.modify(line.source, mask)
        elif not mask and watched:
            selector.unregister(line.source)
    if not selector.get_map():
        time.sleep(min(pauses, default=0))  # all that is left is to wait for what is under way
        return
    for key, mask in selector.select(min(pauses, default=None)):
        if mask & selectors.EVENT_READ:
            next(line for line in lines if line.source is key.fileobj).read()


def serve(listener: socket.socket, port: int, delay: float, rate: float = 0.0) -> None:
    """Carry each connection to ``port`` on a thread of its own, until the listener is closed.

    :param delay: seconds, in each direction
    :param rate: bytes a second, in each direction, of all connections together; 0 for as many as come
    """
    up, down = Direction(delay, rate), Direction(delay, rate)
    while True:
        try:
            here, _ = listener.accept()
            there = socket.create_connection(("127.0.0.1", port), timeout=10)
        except OSError:
            return
        threading.Thread(target=carry, args=(here, there, up, down), daemon=True).start()


def main() -> None:
    """Tell the port, and serve until standard input ends."""
    order = json.loads(sys.stdin.readline())
    with socket.create_server(("127.0.0.1", 0), backlog=128) as listener:
        words = (listener, order["port"], order["delay"], order.get("rate", 0.0))
        threading.Thread(target=serve, args=words, daemon=True).start()
        print(json.dumps({"port": listener.getsockname()[1]}), flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
