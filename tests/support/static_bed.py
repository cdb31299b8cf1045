"""Ports that lead to a web server over SSH and answer requests for static files, and what asks there."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterator

from beds import Machine
from bokeh_ssh._core.backoff import Attempts
from bokeh_ssh._forwarding.listener import bind, open_acceptor
from bokeh_ssh._forwarding.request_filter import RequestFilter
from bokeh_ssh._forwarding.static_cache import StaticCache
from bokeh_ssh._forwarding.static_store import StaticStore
from connections import connected

LOOPBACK = "127.0.0.1"
_PATIENCE = 20.0


@contextlib.contextmanager
def led(
    machine: Machine, port: int, store: StaticStore, tell: Callable[[str], None], site: str = ""
) -> Iterator[int]:
    """Lead a port here to one on the machine, with a cache in between; gives the port here."""
    with contextlib.ExitStack() as stack:
        connection = stack.enter_context(connected(machine))
        attempts = Attempts()
        cache = StaticCache(store, tell)
        stack.callback(cache.close)
        acceptor = open_acceptor(stack, bind(0), tell, True, attempts)
        stack.callback(attempts.stop)
        checks = RequestFilter(acceptor.port)
        stack.enter_context(acceptor.forwarding(connection, (LOOPBACK, port), checks, None, cache, site=site))
        yield acceptor.port


def request(target: str, *lines: str, method: str = "GET", version: str = "1.1") -> bytes:
    """Write a request."""
    return "\r\n".join([f"{method} {target} HTTP/{version}", *lines, "Host: localhost", "", ""]).encode()


class Reader:
    """One connection, with requests and answers."""

    def __init__(self, port: int) -> None:
        self.sock = socket.create_connection((LOOPBACK, port), timeout=_PATIENCE)
        self._file = self.sock.makefile("rb")

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()
        self.sock.close()

    def ask(self, data: bytes, *, head: bool = False) -> tuple[int, dict[str, str], bytes]:
        """Send a request; gives the status, the headers in lower case, and the body."""
        self.sock.sendall(data)
        return self.read(head=head)

    def read(self, *, head: bool = False) -> tuple[int, dict[str, str], bytes]:
        """Read one answer, behind those that only announce it."""
        status, headers = 100, dict[str, str]()
        while status < 200 and status != 101:
            status, headers = self._read_head()
        if head or status in (204, 304):
            return status, headers, b""
        if headers.get("transfer-encoding") == "chunked":
            body = b""
            while size := int(self._file.readline(), 16):
                body += self._file.read(size)
                self._file.readline()
            self._file.readline()
            return status, headers, body
        count = int(headers["content-length"]) if "content-length" in headers else -1
        return status, headers, self._file.read(count)

    def _read_head(self) -> tuple[int, dict[str, str]]:
        status, headers = int(self._file.readline().split()[1]), {}
        while line := self._file.readline().strip().decode("latin-1"):
            name, _, value = line.partition(":")
            headers[name.lower()] = value.strip()
        return status, headers
