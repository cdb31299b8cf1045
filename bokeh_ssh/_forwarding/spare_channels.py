"""Channels to the server that are open before anybody connects.

Opening one takes a round trip, and the request another: with a spare one, the request goes out at once. Only
for servers that are known to wait for the client's first word, and to leave idle connections alone.
"""

from __future__ import annotations

import collections
import threading
import time
from collections.abc import Callable
from typing import Protocol

from bokeh_ssh._core.endpoint import HERE, Endpoint
from bokeh_ssh._ssh.connection import Connection
from bokeh_ssh._ssh.transport import Channel, EarlyChannel

#: Seconds after which it is not used any more. Tornado ends what has been idle for an hour, and a request
#: that crosses that end on its way is lost.
_MOST_AGE = 1800.0
#: One for a page, and one for its WebSocket, which follows within a round trip.
SPARE = 2
#: As many as a browser has to one server, less the one that the page came over; WebSockets do not count.
SPARE_OF_PAGE = 6


class Check(Protocol):
    """Has the last word on a channel, see :meth:`Connection.forward`; may be told when it was confirmed."""

    def __call__(self, verdict: Callable[[bool], None], opened_at: float = ..., /) -> None: ...


def open_spare(connection: Connection, target: Endpoint, check: Check | None) -> SpareChannels:
    """Ask for the channels of the next page; returns at once."""
    spare = SpareChannels(connection, target, check)
    spare.fill()
    return spare


class SpareChannels:
    """A few channels to ``target``, for the next local connections.

    :param check: has the last word on each, see :meth:`Connection.forward`
    :param count: how many there are
    """

    def __init__(
        self, connection: Connection, target: Endpoint, check: Check | None, count: int = SPARE
    ) -> None:
        self._connection = connection
        self._target = target
        self._check = check
        self._count = count
        self._unused: collections.deque[EarlyChannel] = collections.deque()
        self._asked = 0  # how many have yet to come
        self._waiting: collections.deque[Callable[[EarlyChannel | None], None]] = collections.deque()
        self._over = False
        self._lock = threading.RLock()  # a signal handler may close meanwhile

    def keep(self, count: int) -> None:
        """Let there be as many from now on."""
        self._count = count
        self.fill()

    def fill(self) -> None:
        """Ask for those that are missing; returns at once."""
        with self._lock:
            coming = self._asked - len(self._waiting)
            missing = 0 if self._over else max(0, self._count - len(self._unused) - coming)
            self._asked += missing
        for _ in range(missing):
            self._connection.open_channel(self._target, HERE, self._on_open, lambda *_: self._add(None))

    def take(self, use: Callable[[EarlyChannel | None], None]) -> None:
        """Call ``use`` with a channel that is its own from here on, at once where there is one.

        Else with the next that comes, which is earlier than one that is asked for now; and with None where
        there is none, and none under way.
        """
        early = None
        with self._lock:
            while self._unused and early is None:
                early = self._unused.popleft()
                if not early.untouched or time.monotonic() - early.channel.opened_at > _MOST_AGE:
                    self._over = self._over or early.has_data  # it speaks first, which is old news by now
                    early.channel.close()
                    early = None
            if early is None and self._asked > len(self._waiting):
                self._waiting.append(use)
                return
        use(early)

    def close(self) -> None:
        """Close them, and open no more; idempotent."""
        with self._lock:
            self._over = True
            unused, self._unused = self._unused, collections.deque()
        for early in unused:
            early.channel.close()

    # On the transport's thread, as long as nothing is to be checked.

    def _on_open(self, channel: Channel) -> None:
        early = EarlyChannel(channel)
        if self._check:
            self._check(lambda fine: self._add(early, fit=fine), channel.opened_at)
        else:
            self._add(early)

    def _add(self, early: EarlyChannel | None, *, fit: bool = True) -> None:
        with self._lock:
            self._asked -= 1
            if early and (self._over or not fit):
                early.channel.close()
                early = None
            use = self._waiting.popleft() if self._waiting else None
            if early and use is None:
                self._unused.append(early)
        if use:
            use(early)
