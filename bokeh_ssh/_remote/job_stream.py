"""Join standard input and output to the SSH server of a batch job that runs on this node.

Runs on the node, in a job step beside the holder's: standard library only, Python 3.8 or newer. It reads one
line of JSON (``mark``, ``job``, ``timeout``; and ``client_key``, of a client that is new there), and
says one: ``connected``, with the server's public host key, or ``refused`` with ``why``. After ``connected``,
every byte is the SSH server's or its client's.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time

from bokeh_ssh._remote.job_place import DOOR, allow_key, find_job_place, read_record

TYPE_CHECKING = False  # typing costs milliseconds of a start and is not needed to run
if TYPE_CHECKING:
    from typing import NoReturn

_PAUSE = 0.05  # seconds between two looks for the holder
_CHUNK = 1 << 18  # bytes; srun takes large pieces much faster than small ones


def write_all(fd: int, data: bytes) -> None:
    """Write all of it."""
    left = memoryview(data)
    while left:
        left = left[os.write(fd, left) :]


def copy_in(sock: socket.socket) -> None:
    """Pass what comes from the client to the server, then its end."""
    try:
        while True:
            data = os.read(0, _CHUNK)
            if not data:
                break
            sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
    except OSError:
        pass  # the other direction sees the end


def copy_out(sock: socket.socket) -> None:
    """Pass what comes from the server to the client, until it ends."""
    try:
        while True:
            data = sock.recv(_CHUNK)
            if not data:
                return
            write_all(1, data)
    except OSError:
        return


def main() -> NoReturn:
    """Find the holder, say so, and carry bytes."""
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
    place = find_job_place(order["job"])
    while not place and time.monotonic() < deadline:
        time.sleep(_PAUSE)
        place = find_job_place(order["job"])
    record = read_record(place) if place else {}
    if not record or record.get("why"):
        say("refused", node=os.uname().nodename, why=record.get("why", ""))
        os._exit(1)
    sock = socket.socket(socket.AF_UNIX)
    try:
        if order.get("client_key"):  # who runs this in the job has its account already
            allow_key(place, order["client_key"])
        sock.connect(os.path.join(place, DOOR))
    except OSError as exc:
        say("refused", node=os.uname().nodename, why=exc.strerror or str(exc))
        os._exit(1)
    say("connected", **record)
    threading.Thread(target=copy_in, args=(sock,), daemon=True).start()
    copy_out(sock)
    os._exit(0)
