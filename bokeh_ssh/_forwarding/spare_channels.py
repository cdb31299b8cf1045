"""Channels to the server that are open before anybody connects.

Opening one takes a round trip, and the request another: with a spare one, the request goes out at once. Only
for servers that are known to wait for the client's first word, and to leave idle connections alone.
"""

from __future__ import annotations

import collections
import threading
import time
from collections.abc import Callable

from bokeh_ssh._core.endpoint import HERE, Endpoint
from bokeh_ssh._ssh.channel import Channel
from bokeh_ssh._ssh.connection import Connection, EarlyChannel

#: Seconds after which it is not used any more. Tornado ends what has been idle for an hour, and a request
#: that crosses that end on its way is lost.
_MOST_AGE = 1800.0
#: One for a page, and one for its WebSocket, which follows within a round trip.
_COUNT = 2

Check = Callable[[Callable[[bool], None]], None]


class SpareChannels:
    """A few channels to ``target``, for the next local connections.

    :param check: has the last word on each, see :meth:`Connection.forward`
    """

    def __init__(self, connection: Connection, target: Endpoint, check: Check | None) -> None:
        self._connection = connection
        self._target = target
        self._check = check
        self._unused: collections.deque[EarlyChannel] = collections.deque()
        self._asked = 0  # for those that have yet to come
        self._over = False
        self._lock = threading.RLock()  # a signal handler may close meanwhile

    def fill(self) -> None:
        """Ask for those that are missing; returns at once."""
        with self._lock:
            missing = 0 if self._over else _COUNT - len(self._unused) - self._asked
            self._asked += missing
        for _ in range(missing):
            self._connection.open_channel(
                self._target, HERE, self._on_open, lambda code, text: self._add(None)
            )

    def take(self) -> EarlyChannel | None:
        """Return a channel, which is the caller's from here on; None where there is none that is fit."""
        while True:
            with self._lock:
                early = self._unused.popleft() if self._unused else None
                if early and early.has_data:
                    self._over = True  # it speaks first: what it said would be old news
            if early is None:
                return None
            if early.untouched and time.monotonic() - early.since <= _MOST_AGE:
                return early
            early.channel.close()

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
            self._check(lambda fine: self._add(early, fit=fine))
        else:
            self._add(early)

    def _on_refusal(self, code: int, text: str) -> None:
        self._add(None)

    def _add(self, early: EarlyChannel | None, *, fit: bool = True) -> None:
        with self._lock:
            self._asked -= 1
            kept = fit and not self._over
            if early and kept:
                self._unused.append(early)
        if early and not kept:
            early.channel.close()
