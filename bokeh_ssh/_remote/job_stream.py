"""Join standard input and output to the SSH server of a batch job.

Runs on the node, in a job step beside the holder's (``srun``), or on a login node, which connects to the
holder's port (``tcp``) or has the holder connect to one here (``back``): standard library only, Python 3.8 or
newer. It reads one line of JSON (``mark``, ``job``, ``timeout``, ``ways``, ``nodes``; and ``client_key``, of
a client that is new there), and says one: ``connected``, with the server's public host key and the way, or
``refused`` with ``why``. After ``connected``, every byte is the SSH server's or its client's.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import socket
import threading
import time

from bokeh_ssh._remote.job_place import (
    DIAL,
    DOOR,
    TokenListener,
    allow_key,
    connect,
    find_job_place,
    meeting_place,
    read_record,
    write_record,
)
from bokeh_ssh._remote.run_dir import unsafe

TYPE_CHECKING = False  # typing costs milliseconds of a start and is not needed to run
if TYPE_CHECKING:
    from typing import Any, NoReturn

_PAUSE = 0.05  # seconds between two looks for the holder
_CHUNK = 1 << 18  # bytes; srun takes large pieces much faster than small ones
_REACH = 3.0  # seconds for a connection to the node
_BACK = 20.0  # seconds for one from it: it looks every 2 s, or every 10 s where it has clients


def write_all(fd: int, data: bytes) -> None:
    """Write all of it."""
    left = memoryview(data)
    while left:
        left = left[os.write(fd, left) :]


def copy_in(sock: socket.socket) -> None:
    """Pass what comes from the client to the server, then its end."""
    with contextlib.suppress(OSError):  # the other direction sees the end
        for data in iter(lambda: os.read(0, _CHUNK), b""):
            sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)


def copy_out(sock: socket.socket) -> None:
    """Pass what comes from the server to the client, until it ends."""
    with contextlib.suppress(OSError):
        for data in iter(lambda: sock.recv(_CHUNK), b""):
            write_all(1, data)


def find(order: dict[str, Any]) -> str:
    """Find where the holder has left its record; empty where it has not."""
    if "srun" in order["ways"]:
        return find_job_place(order["job"])
    place = meeting_place(order["job"])
    return place if not unsafe(place) and read_record(place) else ""


def reach(order: dict[str, Any], place: str, record: dict[str, Any]) -> tuple[socket.socket, str]:
    """Connect to the holder, in the first of the ways that leads there; say which one.

    :raises OSError: if none does
    """
    hosts = [record["node"], *order["nodes"]]
    for way in order["ways"]:
        sock: socket.socket | None = None
        if way == "srun":
            sock = socket.socket(socket.AF_UNIX)
            sock.connect(os.path.join(place, DOOR))
        elif way == "tcp" and record.get("port"):
            sock = connect(hosts, record["port"], record["word"], _REACH)
        elif way == "back":
            sock = await_holder(place, hosts)
        if sock:
            return sock, way
    raise OSError(f"no way leads to it (tried: {', '.join(order['ways'])})")


def await_holder(place: str, hosts: list[str]) -> socket.socket | None:
    """Listen here, say where, and wait for the holder to connect."""
    name = DIAL + secrets.token_hex(8)
    listener = TokenListener()
    here = [*filter(None, map(own_address, hosts)), os.uname().nodename]
    write_record(place, {"hosts": here, "port": listener.port, "word": listener.word}, name)
    try:
        return listener.wait(_BACK)
    finally:
        listener.close()
        with contextlib.suppress(OSError):  # the holder has it
            os.unlink(os.path.join(place, name))


def own_address(host: str) -> str:
    """Return the address by which this machine talks to another one; empty where there is none."""
    try:
        family, kind, _, _, end = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as sock:
            sock.connect(end)  # sends nothing
            return str(sock.getsockname()[0])
    except (OSError, UnicodeError):
        return ""


def main() -> NoReturn:
    """Find the holder, say so, and carry bytes."""
    # A warning to all steps of a job is the holder's to pass on.
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    text = b""
    while text[-1:] != b"\n":
        byte = os.read(0, 1)
        if not byte:
            os._exit(3)
        text += byte
    order = json.loads(text)

    def say(event: str, **facts: object) -> None:
        write_all(1, (order["mark"] + json.dumps({"event": event, **facts}) + "\n").encode("ascii"))

    deadline = time.monotonic() + float(order["timeout"])
    place = find(order)
    while not place and time.monotonic() < deadline:
        time.sleep(_PAUSE if "srun" in order["ways"] else _REACH / 6)
        place = find(order)
    record = read_record(place) if place else {}
    if not record or record.get("why"):
        say("refused", node=os.uname().nodename, why=record.get("why", ""))
        os._exit(1)
    try:
        if order.get("client_key"):  # who runs this in the job has its account already
            allow_key(place, order["client_key"])
        sock, way = reach(order, place, record)
    except OSError as exc:
        say("refused", node=record.get("node"), why=exc.strerror or str(exc), lost=True)
        os._exit(1)
    record.pop("word", None)
    say("connected", **record, way=way)
    threading.Thread(target=copy_in, args=(sock,), daemon=True).start()
    copy_out(sock)
    os._exit(0)
