"""Notices that this machine's network has changed, as far as it matters, or that the machine has slept.

What matters is which of its addresses this machine would use for the world, and for the machine that was
lost: containers and bridges come and go without a change of that.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
from collections.abc import Callable, Iterable
from typing import Any

from bokeh_ssh._core.threads import Thread
from bokeh_ssh._core.waiting import clocks

#: The groups of rtnetlink(7) that report addresses and routes.
_GROUPS = 0x10 | 0x100 | 0x40 | 0x400  # IPV4_IFADDR, IPV6_IFADDR, IPV4_ROUTE, IPV6_ROUTE
#: Seconds between two looks for what no event reports, and until a burst of changes is over.
_LOOK = 5.0
_SETTLED = 1.0
#: Addresses that are nobody's (RFC 5737, RFC 3849): a UDP socket that is connected to one sends nothing, and
#: shows which address of this machine would be used.
_NOWHERE = ("192.0.2.1", "2001:db8::1")


class NetworkWatch:
    """A thread that notices when the network has changed; a context manager.

    :param on_change: called at the first change of a burst, and once more after the last
    :param peers: addresses that matter
    :param name: for the thread's name
    """

    def __init__(self, on_change: Callable[[], None], peers: Iterable[str], name: str) -> None:
        self._on_change = on_change
        self._targets = (*_NOWHERE, *peers)
        self._over = threading.Event()
        self._name = f"bokeh-ssh network {name}"
        self._stack = contextlib.ExitStack()  # ends it

    def __enter__(self) -> NetworkWatch:
        # Where no file or thread is to be had, nothing is noticed, and the attempts go on without.
        with contextlib.suppress(OSError, RuntimeError), contextlib.ExitStack() as stack:
            wake_recv, wake_send = map(stack.enter_context, socket.socketpair())
            selector = stack.enter_context(selectors.DefaultSelector())
            thread = Thread(self._run, wake_recv, selector, name=self._name)
            thread.start()
            stack.pop_all()  # the thread closes its own
            self._stack.enter_context(wake_send)
            self._stack.callback(thread.join, 2)
            self._stack.callback(wake_send.send, b"!")
        return self

    def __exit__(self, *exc: object) -> None:
        self._over.set()
        with contextlib.suppress(OSError):
            self._stack.close()

    def _run(self, wake_recv: socket.socket, selector: selectors.BaseSelector) -> None:
        with wake_recv, selector, contextlib.ExitStack() as stack:
            events = _events()
            selector.register(wake_recv, selectors.EVENT_READ)
            if events:
                selector.register(stack.enter_context(events), selectors.EVENT_READ)
            sources, restless = _sources(self._targets), False
            while not self._over.is_set():
                before = clocks()
                pause = _SETTLED if restless else _LOOK
                ready = selector.select(pause)
                if self._over.is_set():
                    return
                took = [b - a for a, b in zip(before, clocks(), strict=True)]
                slept = max(took) - min(took) > _LOOK or max(took) > pause + _LOOK
                if ready and events:
                    _take_all(events)
                sources, old = _sources(self._targets), sources
                changed = slept or sources != old
                if changed != restless:  # the first change, and the quiet after the last
                    self._on_change()
                restless = changed


def _events() -> socket.socket | None:
    """Open what reports changes: rtnetlink(7) on Linux, route(4) on BSD and macOS; None where neither is."""
    with contextlib.suppress(OSError, AttributeError):
        family: Any = getattr(socket, "AF_NETLINK", None)
        if family is not None:
            sock = socket.socket(family, socket.SOCK_RAW, 0)  # NETLINK_ROUTE
            sock.bind((0, _GROUPS))
        else:
            sock = socket.socket(getattr(socket, "AF_ROUTE"), socket.SOCK_RAW, 0)  # noqa: B009  # not everywhere
        sock.setblocking(False)
        return sock
    return None


def _take_all(sock: socket.socket) -> None:
    """Read what was reported; that it was too much to keep is a change as well."""
    with contextlib.suppress(OSError):
        while sock.recv(65536):
            pass


def _sources(targets: Iterable[str]) -> tuple[str, ...]:
    """Return the address of this machine that it would use for each target; empty where there is no way."""
    found = []
    for target in targets:
        source = ""
        family = socket.AF_INET6 if ":" in target else socket.AF_INET
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as sock:
            sock.connect((target, 9))
            source = str(sock.getsockname()[0])
        found.append(source)
    return tuple(found)
