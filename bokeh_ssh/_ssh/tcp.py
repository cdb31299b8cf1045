"""TCP to a name and port, before a deadline, whichever of its addresses answers first."""

from __future__ import annotations

import errno
import itertools
import os
import selectors
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bokeh_ssh._core.errors import ConnectError, ConnectTimeoutError, RefusedError, ResolveError
from bokeh_ssh._core.settings import setting
from bokeh_ssh._core.this_machine.interfaces import list_addresses
from bokeh_ssh._core.waiting import SLICE, heed, in_time, wait

#: A family, and an address as sockets of it take one.
Address = tuple[socket.AddressFamily, Any]

#: Seconds that one address has for itself before the next is tried beside it (RFC 8305, section 5).
_STAGGER = 0.25
_IN_PROGRESS = {errno.EINPROGRESS, errno.EWOULDBLOCK, errno.EAGAIN, getattr(errno, "WSAEWOULDBLOCK", 10035)}


@dataclass(frozen=True)
class Origin:
    """From where to dial, and how: what the ssh config says.

    :ivar family: the one family whose addresses are dialled (``AddressFamily``); ``AF_UNSPEC`` is any
    :ivar address: a name or address of ours (``BindAddress``)
    :ivar interface: a network interface, where no address is said (``BindInterface``)
    :ivar attempts: how often to dial, a second apart (``ConnectionAttempts``)
    """

    family: int = socket.AF_UNSPEC
    address: str = ""
    interface: str = ""
    attempts: int = 1

    def find(self, family: socket.AddressFamily, timeout: float) -> tuple[object, ...] | None:
        """Return the address to bind to; None for any.

        :raises OSError: if there is none of this family
        """
        if self.address:
            found = look_up(self.address, None, family=family, flags=socket.AI_PASSIVE, timeout=timeout)
            if isinstance(found, list):
                return tuple(found[0][4])
            raise OSError(errno.EADDRNOTAVAIL, os.strerror(errno.EADDRNOTAVAIL))
        if not self.interface:
            return None
        mine = [
            each
            for each in list_addresses() or ()
            if each.interface == self.interface and each.family == family
        ]
        mine.sort(key=lambda each: each.is_local)  # as ssh: those that hold elsewhere too come first
        if not mine:
            raise OSError(errno.EADDRNOTAVAIL, os.strerror(errno.EADDRNOTAVAIL))
        scope = (0, mine[0].scope) if family == socket.AF_INET6 else ()
        return (mine[0].address, 0, *scope)

    def __str__(self) -> str:
        return self.address or self.interface


#: From wherever the system likes, once.
ANYWHERE = Origin()
#: Seconds between two attempts.
_BETWEEN = 1.0


def no_delay(sock: socket.socket) -> None:
    """Turn Nagle's algorithm off; a socket that is not TCP is left as it is."""
    try:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    except OSError:  # a socket pair is a Unix socket on POSIX
        pass


def resolve(
    host: str, port: int, *, name: str, timeout: float, family: int = socket.AF_UNSPEC
) -> list[Address]:
    """Look up the addresses of ``host``, IPv6 and IPv4 taking turns.

    :param name: the host as the user named it, for messages
    :param timeout: seconds
    :param family: whose addresses are wanted (``AddressFamily``)
    :raises ResolveError: if it has none, or the look-up did not answer in time
    """
    answer = look_up(host, port, family=family, timeout=timeout)
    if answer is None:
        msg = f"looking up {host} took more than {timeout:.3g} s"
        raise ResolveError(msg, host=name, hint="check the network and the name server")
    if isinstance(answer, Exception):
        msg = f"{host} has no address ({_reason(answer)})"
        hint = "check the spelling and the HostName line of your ssh config"
        if family != socket.AF_UNSPEC:
            msg = f"{host} has no address of the family that AddressFamily asks for ({_reason(answer)})"
            hint = "check the AddressFamily line of your ssh config"
        raise ResolveError(msg, host=name, hint=hint) from answer
    return interleave([(found[0], found[4]) for found in answer])


def look_up(
    host: str, port: int | None, *, family: int = socket.AF_UNSPEC, flags: int = 0, timeout: float
) -> list[Any] | OSError | ValueError | None:
    """Look a name up (``getaddrinfo``), for streams.

    The system's own look-up cannot be cancelled, so it is left to finish on a thread of its own when it takes
    longer.

    :param timeout: seconds
    :returns: what getaddrinfo says; the error where there is no address; None where it takes too long
    """

    def ask() -> list[Any] | OSError | ValueError:
        try:
            return socket.getaddrinfo(host, port, family, socket.SOCK_STREAM, 0, flags)
        except (OSError, ValueError) as exc:  # UnicodeError among them: a label too long for IDNA
            return exc

    try:
        return in_time(ask, timeout, f"bokeh-ssh resolve {host}")
    except TimeoutError:
        return None


def interleave(addresses: Sequence[Address]) -> list[Address]:
    """Order addresses so that families take turns, the first one's first (RFC 8305, section 4)."""
    first = addresses[0][0] if addresses else socket.AF_INET
    mine = [a for a in addresses if a[0] == first]
    others = [a for a in addresses if a[0] != first]
    return [each for pair in itertools.zip_longest(mine, others) for each in pair if each]


def dial(
    host: str,
    port: int,
    *,
    name: str,
    timeout: float,
    prefer: Sequence[str] = (),
    avoid: Sequence[str] = (),
    origin: Origin = ANYWHERE,
) -> socket.socket:
    """Connect to ``host``; a dead address beside a live one costs a quarter of a second.

    :param name: the host as the user named it, for messages
    :param timeout: seconds for the look-up and the connection together, and for each further attempt
    :param prefer: addresses to begin with, in this order, where the host has them
    :param avoid: addresses to try last
    :param origin: from where to dial, and how often
    :returns: a connected, non-inheritable socket with TCP_NODELAY
    :raises ResolveError: the name has no address
    :raises RefusedError: every address refused, with the last reason as the cause
    :raises ConnectTimeoutError: no address answered in time
    :raises ConnectError: there is no such address to dial from
    """
    deadline = time.monotonic() + timeout
    addresses = resolve(host, port, name=name, timeout=timeout, family=origin.family)
    order = {address: number for number, address in enumerate(prefer)}
    order |= dict.fromkeys(avoid, len(order) + 1)
    addresses.sort(key=lambda address: order.get(address[1][0], len(prefer)))
    for left in range(origin.attempts - 1, -1, -1):
        try:
            return _dial_once(addresses, f"{host} port {port}", name, timeout, deadline, origin)
        except ConnectError:
            if not left:
                raise
        wait(threading.Event(), _BETWEEN)
        deadline = time.monotonic() + timeout
    raise AssertionError  # the loop returns or raises


def _dial_once(
    addresses: Sequence[Address], where: str, name: str, timeout: float, deadline: float, origin: Origin
) -> socket.socket:
    with _Race(addresses, origin, timeout) as race:
        sock = race.run(deadline)
    if sock is not None:
        no_delay(sock)
        return sock
    if race.unbound and not race.waiting and len(race.unbound) == len(race.failures):
        msg = f"cannot dial from {origin} ({_reason(race.unbound[-1])})"
        hint = "check the lines BindAddress and BindInterface of your ssh config"
        raise ConnectError(msg, host=name, hint=hint) from race.unbound[-1]
    if race.failures and not race.waiting:
        last = race.failures[-1]
        hint = "check host and port, and that an SSH server runs there"
        kind = RefusedError if _refused(last) else ConnectError
        msg = f"cannot connect to {where} ({_reason(last)})"
        raise kind(msg, host=name, hint=hint) from last
    msg = f"{where} did not answer within {timeout:.3g} s"
    ways = f"use {setting('jump=')}, or give a longer {setting('timeout')}"
    raise ConnectTimeoutError(msg, host=name, hint=f"check the network, a VPN or a firewall, {ways}")


class _Race:
    """Attempts side by side; the first to connect wins and the others are closed."""

    def __init__(self, addresses: Sequence[Address], origin: Origin = ANYWHERE, timeout: float = 1.0) -> None:
        self._left = list(addresses)
        self._origin = origin
        self._timeout = timeout
        self.unbound: list[OSError] = []
        self._selector = selectors.DefaultSelector()
        self.failures: list[OSError] = []

    def __enter__(self) -> _Race:
        return self

    def __exit__(self, *exc: object) -> None:
        self.waiting = len(self._selector.get_map() or ())
        for key in list((self._selector.get_map() or {}).values()):
            key.fileobj.close()  # type: ignore[union-attr]  # only sockets are registered
        self._selector.close()

    def run(self, deadline: float) -> socket.socket | None:
        """Return the winner, or None when all failed or the deadline came."""
        while (left := deadline - time.monotonic()) > 0:
            heed()
            if self._left:
                won = self._start(*self._left.pop(0))
                if won:
                    return won
            if not self._selector.get_map():
                if self._left:
                    continue
                return None
            pause = min(left, _STAGGER if self._left else SLICE)
            for key, _ in self._selector.select(pause):
                sock = key.fileobj
                assert isinstance(sock, socket.socket)
                self._selector.unregister(sock)
                code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                if code == 0:
                    return sock
                sock.close()
                self.failures.append(OSError(code, errno.errorcode.get(code, str(code))))
        return None

    def _start(self, family: socket.AddressFamily, address: tuple[object, ...]) -> socket.socket | None:
        try:
            sock = socket.socket(family, socket.SOCK_STREAM)
        except OSError as exc:  # this machine has no IPv6
            self.failures.append(exc)
            return None
        try:
            mine = self._origin.find(family, self._timeout)
            if mine is not None:
                sock.bind(mine)
        except OSError as exc:
            sock.close()
            self.failures.append(exc)
            self.unbound.append(exc)
            return None
        sock.setblocking(False)
        code = sock.connect_ex(address)
        if code == 0:
            return sock
        if code in _IN_PROGRESS:
            # Windows reports a failed connect through the exceptional set, which selectors folds into
            # EVENT_WRITE, so one interest serves everywhere.
            self._selector.register(sock, selectors.EVENT_WRITE)
            return None
        sock.close()
        self.failures.append(OSError(code, errno.errorcode.get(code, str(code))))
        return None


def _refused(exc: OSError) -> bool:
    return exc.errno in (errno.ECONNREFUSED, errno.ECONNRESET, getattr(errno, "WSAECONNREFUSED", 10061))


def _reason(exc: Exception) -> str:
    if isinstance(exc, OSError) and exc.errno is not None and not isinstance(exc, socket.gaierror):
        return os.strerror(exc.errno).lower()
    return str(getattr(exc, "strerror", None) or exc).lower()
