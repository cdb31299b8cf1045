"""The addresses of this machine's network interfaces (``getifaddrs``)."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import sys
from dataclasses import dataclass
from typing import Any

_IFF_UP = 1


@dataclass(frozen=True)
class InterfaceAddress:
    """An address of an interface that is up.

    :ivar family: ``AF_INET`` or ``AF_INET6``
    :ivar address: the address in digits, without its scope
    :ivar scope: number of the interface that an IPv6 address holds on alone; 0 if it holds everywhere
    """

    interface: str
    family: socket.AddressFamily
    address: str
    scope: int = 0

    @property
    def is_local(self) -> bool:
        """Whether it leads nowhere else: a loopback or link-local address."""
        address = ipaddress.ip_address(self.address)
        return address.is_loopback or (address.version == 6 and address.is_link_local)


def list_addresses() -> list[InterfaceAddress] | None:
    """List the addresses of all interfaces that are up, in the system's order.

    :returns: None where the system cannot be asked (Windows, a Python without ctypes)
    """
    try:
        import ctypes

        libc: Any = ctypes.CDLL(None, use_errno=True)
        get, free = libc.getifaddrs, libc.freeifaddrs
    except (ImportError, OSError, AttributeError, TypeError):  # TypeError: CDLL(None) on Windows
        return None

    class IfAddrs(ctypes.Structure):
        pass

    IfAddrs._fields_ = [
        ("next", ctypes.POINTER(IfAddrs)),
        ("name", ctypes.c_char_p),
        ("flags", ctypes.c_uint),
        ("address", ctypes.c_void_p),
    ]  # what follows is not read
    get.argtypes, free.argtypes = [ctypes.POINTER(ctypes.POINTER(IfAddrs))], [ctypes.POINTER(IfAddrs)]
    first = ctypes.POINTER(IfAddrs)()
    if get(ctypes.byref(first)):
        return None
    found: list[InterfaceAddress] = []
    try:
        each = first
        while each:
            entry = each.contents
            if entry.name and entry.address and entry.flags & _IFF_UP:
                family = _family(ctypes.string_at(entry.address, 2))
                if family is not None:
                    # sockaddr_in up to its address, or all of sockaddr_in6
                    data = ctypes.string_at(entry.address, 8 if family == socket.AF_INET else 28)
                    found.append(_read(entry.name.decode("utf-8", "surrogateescape"), family, data))
            each = entry.next
    finally:
        free(first)
    return found


def _family(head: bytes) -> socket.AddressFamily | None:
    """Read the family of a socket address: two bytes on Linux, the second alone where BSD has a length."""
    number = int.from_bytes(head, sys.byteorder) if sys.platform == "linux" else head[1]
    with contextlib.suppress(ValueError):
        family = socket.AddressFamily(number)
        return family if family in (socket.AF_INET, socket.AF_INET6) else None
    return None


def _read(name: str, family: socket.AddressFamily, data: bytes) -> InterfaceAddress:
    if family == socket.AF_INET:
        return InterfaceAddress(name, family, socket.inet_ntop(family, data[4:8]))
    scope = int.from_bytes(data[24:28], sys.byteorder)
    return InterfaceAddress(name, family, socket.inet_ntop(family, data[8:24]), scope)
