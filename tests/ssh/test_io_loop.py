"""The loop that serves local sockets: what it has not begun to serve is not lost with it."""

from __future__ import annotations

import errno
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from beds import until
from bokeh_ssh._ssh.io_loop import IOLoop


@pytest.fixture
def loop() -> Iterator[IOLoop]:
    """A loop that ends with the test."""
    loop = IOLoop("test")
    yield loop
    loop.close()


@pytest.mark.parametrize("over", [False, True])
def test_adopted_socket_ends_with_the_loop(loop: IOLoop, over: bool) -> None:
    """A socket that waits for a call to the loop is closed with it, or at once where that is over."""
    ended = threading.Event()
    here, there = socket.socketpair()
    with here, there:
        if over:
            loop.close()
        loop.adopt(here, ended.set)
        assert ended.is_set() is over
        loop.close()
        until(ended.is_set, what="its end to be told")
        assert there.recv(1) == b""
        assert here.fileno() == -1


def test_released_socket_is_somebody_elses(loop: IOLoop) -> None:
    """What was handed on is not closed, and nothing is told of it."""
    ended = threading.Event()
    here, there = socket.socketpair()
    with here, there:
        loop.adopt(here, ended.set)
        loop.release(here)
        loop.close()
        here.sendall(b"x")
        assert there.recv(1) == b"x"
        assert not ended.is_set()


def test_dial_under_way_ends_with_the_loop(loop: IOLoop) -> None:
    """A connection that is being made when the loop ends is given up, and its socket closed."""
    with ExitStack() as stack:
        full = stack.enter_context(socket.socket())
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        for _ in range(5):  # its queue takes nobody more
            other = stack.enter_context(socket.socket())
            other.setblocking(False)
            assert other.connect_ex(full.getsockname()) in (0, errno.EINPROGRESS)
        loop.dial([(socket.AF_INET, full.getsockname())], 60, lambda sock, error: None)
        until(lambda: loop._loose, what="it to connect")
        (sock,) = loop._loose
        loop.close()
        until(lambda: sock.fileno() == -1, what="it to be given up")
