"""The loads: what is done through a forward, and how long it takes. Runs in a process of its own.

Standard library only, large buffers, and one thread: nothing here may be slower than a peer. A rate is in
10^6 bytes per second, a time in milliseconds. With ``verify`` every byte is checked, and the rate means less.
"""

from __future__ import annotations

import hashlib
import json
import selectors
import socket
import statistics
import struct
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from conformance import BLOCK

Address = tuple[str, int]
_ROOM = 1 << 20
#: Bytes of the answer in the rows that open connections: a small file.
_SMALL = 1000


class LoadError(Exception):
    """The load could not be carried, or not as it was."""


def _ask(address: Address, words: str, limit: float) -> socket.socket:
    sock = socket.create_connection(address, timeout=limit)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.sendall(words.encode() + b"\n")
    return sock


def _blocks(size: int) -> Iterator[memoryview]:
    block = memoryview(BLOCK)
    while size > 0:
        yield block[:size]
        size -= len(block)


def _expected(size: int) -> bytes:
    digest = hashlib.sha256()
    for block in _blocks(size):
        digest.update(block)
    return digest.digest()


def _check(*, ok: bool, what: str) -> None:
    if not ok:
        raise LoadError(what)


def _take(count: int, exactly: int, limited: bool) -> bool:
    """Tell whether a transfer is complete; one that its time limit cut short is good as far as it goes."""
    _check(ok=count == exactly or (limited and 0 < count < exactly), what=f"{count} of {exactly} bytes came")
    return count == exactly


def download(address: Address, size: int, limit: float, verify: bool) -> dict[str, Any]:
    """Read ``size`` bytes to the end of file, for ``limit`` seconds at most."""
    room = memoryview(bytearray(_ROOM))
    digest = hashlib.sha256()
    began = time.perf_counter()
    count, limited = 0, False
    with _ask(address, f"send {size}", limit) as sock:
        while got := sock.recv_into(room):
            count += got
            if verify:
                digest.update(room[:got])
            if time.perf_counter() - began > limit:
                limited = True
                break
        took = time.perf_counter() - began
    complete = _take(count, size, limited)
    if verify:
        _check(
            ok=complete and digest.digest() == _expected(size), what="the bytes that came are not those sent"
        )
    return {"rate": count / took / 1e6, "complete": complete, "verified": verify}


def upload(address: Address, size: int, limit: float, verify: bool) -> dict[str, Any]:
    """Send ``size`` bytes, half-close, and wait for the target to say what came."""
    began = time.perf_counter()
    count = 0
    with _ask(address, "hash" if verify else "sink", limit) as sock:
        for block in _blocks(size):
            sock.sendall(block)
            count += len(block)
            if time.perf_counter() - began > limit:
                break
        sock.shutdown(socket.SHUT_WR)
        try:
            answer = _read(sock, 32 if verify else 8)
        except LoadError as exc:
            msg = "the answer to a half-close is lost"
            raise LoadError(msg) from exc
        took = time.perf_counter() - began
    if verify:
        _check(ok=answer == _expected(count), what="the bytes that came are not those sent")
    else:
        (came,) = struct.unpack(">Q", answer)
        _check(ok=came == count, what=f"{came} of {count} bytes came")
    return {"rate": count / took / 1e6, "complete": count == size, "verified": verify}


def _read(sock: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        part = sock.recv(count - len(data))
        _check(ok=bool(part), what=f"the connection ended {count - len(data)} bytes early")
        data += part
    return data


def downloads(address: Address, size: int, count: int, limit: float, verify: bool) -> dict[str, Any]:
    """Read ``count`` downloads at once; ``spread`` is how much longer the slowest took than the fastest.

    Where ``limit`` ends it, ``spread`` is how much more the fastest got than the slowest.
    """
    room = memoryview(bytearray(_ROOM))
    began = time.perf_counter()
    came = [0] * count
    digests = [hashlib.sha256() for _ in range(count)]
    ends: list[float] = []
    with selectors.DefaultSelector() as selector:
        for number in range(count):
            sock = _ask(address, f"send {size}", limit)
            sock.setblocking(False)
            selector.register(sock, selectors.EVENT_READ, number)
        while selector.get_map():
            left = limit - (time.perf_counter() - began)
            if left <= 0:
                for key in list(selector.get_map().values()):
                    key.fileobj.close()  # type: ignore[union-attr]
                _check(ok=min(came) > 0 and not verify, what=f"{len(ends)} of {count} done in {limit:g} s")
                return {"rate": sum(came) / limit / 1e6, "spread": max(came) / min(came), "complete": False}
            for key, _ in selector.select(left):
                sock, number = key.fileobj, key.data  # type: ignore[assignment]
                got = sock.recv_into(room)
                came[number] += got
                if verify:
                    digests[number].update(room[:got])
                if not got:
                    ends.append(time.perf_counter() - began)
                    selector.unregister(sock)
                    sock.close()
    for total in came:
        _take(total, size, limited=False)
    if verify:
        right = _expected(size)
        _check(
            ok=all(digest.digest() == right for digest in digests),
            what="the bytes that came are not those sent",
        )
    return {"rate": size * count / max(ends) / 1e6, "spread": max(ends) / min(ends), "complete": True}


def round_trips(address: Address, size: int, count: int, limit: float, verify: bool) -> dict[str, Any]:
    """Send ``size`` bytes and wait for them to come back, ``count`` times."""
    times = []
    began = time.perf_counter()
    with _ask(address, "echo", limit) as sock:
        for number in range(count + count // 20):
            data = (b"%08d" % number) * (size // 8)
            start = time.perf_counter_ns()
            sock.sendall(data)
            answer = _read(sock, len(data))
            times.append(time.perf_counter_ns() - start)
            _check(ok=answer == data, what="the bytes that came back are not those sent")
            if time.perf_counter() - began > limit and len(times) > 20:
                break
    times = times[len(times) // 20 :]  # the first ones warm up
    cut = statistics.quantiles(times, n=100)
    return {"median": statistics.median(times) / 1e6, "p99": cut[98] / 1e6, "verified": verify}


def opens(address: Address, count: int, limit: float, verify: bool) -> dict[str, Any]:
    """Open a connection, read a small answer to its end, close it; ``count`` times, one after the other."""
    right = BLOCK[:_SMALL]
    began = time.perf_counter()
    done = 0
    for _ in range(count):
        with _ask(address, f"send {_SMALL}", limit) as sock:
            data = b""
            while part := sock.recv(_ROOM):
                data += part
        _check(ok=data == right, what=f"connection {done + 1} got {len(data)} of {_SMALL} bytes")
        done += 1
        if time.perf_counter() - began > limit:
            break
    return {"rate": done / (time.perf_counter() - began), "verified": verify}


def hold(address: Address, count: int, limit: float, verify: bool) -> dict[str, Any]:
    """Open ``count`` connections and use each; say so, and use each again when told to."""
    end = time.perf_counter() + limit
    reasons: list[str] = []

    def left() -> float:
        seconds = end - time.perf_counter()
        _check(ok=seconds > 0, what=f"not all in {limit:g} s")
        return seconds

    def begin(number: int) -> socket.socket | None:
        try:
            sock = _ask(address, "echo", min(30, left()))
            sock.sendall(b"%06d" % number)
            return sock
        except (OSError, LoadError) as exc:
            reasons.append(str(exc))
            return None

    def answers(number: int, sock: socket.socket | None) -> bool:
        if sock is None:
            return False
        try:
            sock.settimeout(min(30, left()))
            return _read(sock, 6) == b"%06d" % number
        except (OSError, LoadError) as exc:
            reasons.append(str(exc))
            return False

    began = time.perf_counter()
    with ThreadPoolExecutor(16) as pool:
        socks = list(pool.map(begin, range(count)))
    try:
        served = [answers(number, sock) for number, sock in enumerate(socks)]
        took = time.perf_counter() - began
        print(json.dumps({"held": sum(served)}), flush=True)
        sys.stdin.readline()
        end = time.perf_counter() + limit
        for number, sock in enumerate(socks):
            if sock and served[number]:
                sock.sendall(b"%06d" % number)
        still = sum(answers(number, sock) for number, sock in enumerate(socks) if served[number])
    finally:
        for sock in socks:
            if sock:
                sock.close()
    if not still:
        raise LoadError(reasons[-1] if reasons else "none was served")
    return {
        "served": still,
        "rate": sum(served) / took,
        "why": reasons[-1] if reasons else "",
        "verified": verify,
    }


LOADS: dict[str, Callable[..., dict[str, Any]]] = {
    function.__name__: function for function in (download, upload, downloads, round_trips, opens, hold)
}


def main() -> None:
    """Carry out the one load that standard input asks for, and tell what came of it."""
    order = json.loads(sys.stdin.readline())
    address = ("127.0.0.1", order.pop("port"))
    try:
        result = LOADS[order.pop("load")](address, **order)
    except TimeoutError:
        result = {"failed": "it stalled"}
    except (OSError, LoadError) as exc:
        result = {"failed": str(exc)}
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
