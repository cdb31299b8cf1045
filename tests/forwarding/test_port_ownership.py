"""Whether the listener on a port there is still the one from before, and when nobody need ask again."""

from __future__ import annotations

import os
import queue
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from beds import Machine, until
from bokeh_ssh._forwarding.port_ownership import PortOwnershipMonitor, monitor_port
from cable import Cable
from connections import connected

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="others do not tell who listens")

LOOPBACK = "127.0.0.1"
#: Listens, accepts one connection, and keeps that alone.
_LEAVE = """
import socket
with socket.create_server(("127.0.0.1", 0)) as listener:
    print(listener.getsockname()[1], flush=True)
    kept, _ = listener.accept()
print("left", flush=True)
input()
"""


def judge(monitor: PortOwnershipMonitor, opened_at: float) -> tuple[bool, bool]:
    """Return the verdict, and whether it was there at once."""
    verdicts: queue.SimpleQueue[bool] = queue.SimpleQueue()
    monitor.verify(verdicts.put, opened_at)
    at_once = not verdicts.empty()
    return verdicts.get(timeout=10), at_once


@contextmanager
def stranger() -> Iterator[int]:
    """Run a server of another user that listens no more, but has a connection; gives its port."""
    with subprocess.Popen(
        ["/usr/bin/python3", "-c", _LEAVE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, user=65534, cwd="/"
    ) as process:
        assert process.stdin
        assert process.stdout
        port = int(process.stdout.readline())
        with socket.create_connection((LOOPBACK, port), timeout=10):
            assert process.stdout.readline() == b"left\n"
            yield port
            process.stdin.close()


def test_what_was_connected_before_the_first_look(sshd: Callable[..., Machine]) -> None:
    """A channel from before the first look may be used if nobody else has a socket with that port; a later
    one is looked at. Who asks before the first look is told after it."""
    errors: list[object] = []
    began = time.monotonic()
    with connected(sshd()) as connection, socket.create_server((LOOPBACK, 0)) as listener:
        port = listener.getsockname()[1]
        with (
            socket.create_connection((LOOPBACK, port), timeout=10),
            listener.accept()[0],
            monitor_port(connection, port, errors.append) as monitor,
        ):
            assert judge(monitor, began)[0]
            assert monitor.wait()
            assert judge(monitor, began) == (True, True)
            assert judge(monitor, time.monotonic()) == (True, False)
        listener.close()
        with monitor_port(connection, port, errors.append) as monitor:  # it has ended
            assert judge(monitor, began) == (False, False)
    assert errors == []


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only root can act as another user here")
def test_connection_that_another_user_may_have_accepted(sshd: Callable[..., Machine]) -> None:
    """Where another user had the port, what was connected before the first look may be theirs; not after a
    loss, if the listener from before is still there."""
    errors: list[object] = []
    began = time.monotonic()
    with connected(sshd()) as connection, stranger() as port, socket.create_server((LOOPBACK, port)):
        with monitor_port(connection, port, errors.append) as first:
            first.check_owner()
            assert judge(first, began) == (False, True)
            assert judge(first, time.monotonic()) == (True, False)
        with monitor_port(connection, port, errors.append, first) as second:
            assert second.wait()
            assert judge(second, began) == (True, True)
    assert errors == []


def test_line_that_goes_down_is_not_told_as_the_end_of_the_check(
    sshd: Callable[..., Machine], tmp_path: Path
) -> None:
    """Who hears of the loss is told of the line, and not of what went over it."""
    errors: list[object] = []
    machine = sshd()
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        Cable(machine.host, machine.port) as cable,
        connected(cable.machine(machine, tmp_path)) as connection,
        monitor_port(connection, listener.getsockname()[1], errors.append) as monitor,
    ):
        assert monitor.wait()
        cable.pull()
        until(lambda: monitor._ended and not connection.alive, what="the loss")
    assert errors == []
