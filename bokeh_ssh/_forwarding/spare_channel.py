"""A channel to the server that is open before anybody connects.

Opening one takes a round trip, and the request another: with a spare one, the request goes out at once. Only
for servers that are known to wait for the client's first word, and to leave idle connections alone.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from bokeh_ssh._core.endpoint import HERE, Endpoint
from bokeh_ssh._ssh.channel import Channel
from bokeh_ssh._ssh.connection import Connection, EarlyChannel

#: Seconds after which it is not used any more. Tornado ends what has been idle for an hour, and a request
#: that crosses that end on its way is lost.
_MOST_AGE = 1800.0

Check = Callable[[Callable[[bool], None]], None]


class SpareChannel:
    """One channel to ``target``, for the next local connection.

    :param check: has the last word on it, see :meth:`Connection.forward`
    """

    def __init__(self, connection: Connection, target: Endpoint, check: Check | None) -> None:
        self._connection = connection
        self._target = target
        self._check = check
        self._early: EarlyChannel | None = None
        self._asked = False  # for one that has yet to come
        self._over = False
        self._lock = threading.RLock()  # a signal handler may close meanwhile

    def open(self) -> None:
        """Ask for one, unless there is one; returns at once."""
        with self._lock:
            if self._over or self._asked or self._early:
                return
            self._asked = True
        self._connection.open_channel(self._target, HERE, self._on_open, lambda code, text: self._keep(None))

    def take(self) -> EarlyChannel | None:
        """Return the channel, which is the caller's from here on; None where there is none that is fit."""
        with self._lock:
            early, self._early = self._early, None
            if early and early.has_data:
                self._over = True  # it speaks first: what it said would be old news
        if early and (not early.untouched or time.monotonic() - early.since > _MOST_AGE):
            early.channel.close()
            return None
        return early

    def close(self) -> None:
        """Close it, and open no other; idempotent."""
        with self._lock:
            self._over = True
            early, self._early = self._early, None
        if early:
            early.channel.close()

    # On the transport's thread, as long as nothing is to be checked.

    def _on_open(self, channel: Channel) -> None:
        early = EarlyChannel(channel)
        if self._check:
            self._check(lambda fine: self._keep(early, fit=fine))
        else:
            self._keep(early)

    def _keep(self, early: EarlyChannel | None, *, fit: bool = True) -> None:
        with self._lock:
            self._asked = False
            kept = fit and not self._over
            self._early = early if kept else None
        if early and not kept:
            early.channel.close()
