"""Whether the listener on a port there is still the one from before, and when nobody need ask again."""

from __future__ import annotations

import queue
import socket
import sys
import time
from collections.abc import Callable

import pytest

from beds import Machine
from bokeh_ssh._forwarding.port_ownership import PortOwnershipMonitor, monitor_port
from connections import connected

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="others do not tell who listens")


def judge(monitor: PortOwnershipMonitor, opened_at: float) -> tuple[bool, bool]:
    """Return the verdict, and whether it was there at once."""
    verdicts: queue.SimpleQueue[bool] = queue.SimpleQueue()
    monitor.verify(verdicts.put, opened_at)
    at_once = not verdicts.empty()
    return verdicts.get(timeout=10), at_once


def test_listener_that_has_stayed_is_not_looked_at_twice(sshd: Callable[..., Machine]) -> None:
    """After a loss, a channel from before the first look may be used if that has found the same listener: a
    later one is looked at, and so is each if another listener is there, even if it is one's own."""
    errors: list[object] = []
    began = time.monotonic()
    with connected(sshd()) as connection:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
            with monitor_port(connection, port, errors.append) as first:
                assert first.wait()
                assert judge(first, began) == (True, False)
            with monitor_port(connection, port, errors.append, first) as second:
                assert second.wait()
                assert judge(second, began) == (True, True)
                assert judge(second, time.monotonic()) == (True, False)
        with (
            socket.create_server(("127.0.0.1", port)),
            monitor_port(connection, port, errors.append, second) as third,
        ):
            assert third.wait()
            assert judge(third, began) == (True, False)
    assert errors == []
