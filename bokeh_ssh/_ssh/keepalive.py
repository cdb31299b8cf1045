"""Asks a server regularly whether it is still there (``ServerAliveInterval`` and ``ServerAliveCountMax``)."""

from __future__ import annotations

import socket
import threading
from collections import deque
from collections.abc import Callable

from bokeh_ssh._core.waiting import clocks
from bokeh_ssh._ssh.transport import Reply, Transport


class Keepalive:
    """A thread that ends a connection whose server has not answered for ``interval * count`` seconds.

    After this machine slept there is no point in patience: the network is another one, or the server has
    given us up. Then one question is asked, and its answer must come within one interval.

    :param transport: logged in
    :param interval: seconds between two questions
    :param count: how many may go unanswered
    :param give_up: told the reason when the server is taken for gone, just before the connection is ended
    """

    def __init__(
        self, transport: Transport, interval: float, count: int, give_up: Callable[[str], None], name: str
    ) -> None:
        self._transport = transport
        self._interval = interval
        self._count = count
        self._give_up = give_up
        self._stopped = threading.Event()
        self._asked: deque[tuple[float, Reply]] = deque()  # when the answer must be there, and the answer
        self._thread = threading.Thread(target=self._run, name=f"bokeh-ssh keepalive {name}", daemon=True)

    def start(self) -> None:
        """Begin to ask."""
        _bound_retransmission(self._transport, self._interval * self._count)
        self._thread.start()

    def stop(self, timeout: float) -> None:
        """Ask no more; waits up to ``timeout`` seconds for the thread."""
        self._stopped.set()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join(timeout)

    def _run(self) -> None:
        before = clocks()
        due = before[0] + self._interval / 2  # when to ask next; whoever starts this has asked just now
        while self._transport.alive:
            pause = min([due, *(until for until, _ in list(self._asked)[:1])]) - before[0]
            if self._stopped.wait(max(0.0, pause)):
                return
            after = clocks()
            slept = max(b - a for a, b in zip(before, after, strict=True)) > pause + self._interval + 1
            before = after
            if slept:
                self._asked.clear()
            while any(reply.wait(0) for _, reply in self._asked):  # a later answer tells as much
                self._asked.popleft()
            if self._asked and after[0] >= self._asked[0][0]:
                self._give_up(f"the server did not answer for {self._interval * self._count:g} s")
                self._transport.shut(0)
                return
            if slept or after[0] >= due:
                due = after[0] + self._interval
                patience = self._interval * (1 if slept else max(0.5, self._count - 1))
                self._asked.append((after[0] + patience, self._transport.send_question()))


def _bound_retransmission(transport: Transport, seconds: float) -> None:
    """Let the system give up on data that nobody acknowledges when we would: its own is 15 minutes."""
    option = getattr(socket, "TCP_USER_TIMEOUT", None)  # Linux
    if option is None or seconds <= 0:
        return
    try:
        sock = transport.sock
        assert isinstance(sock, socket.socket)
        sock.setsockopt(socket.IPPROTO_TCP, option, int(seconds * 1000))
    except OSError:  # through a jump host it is one end of a socket pair
        pass
