"""The conformance target, run on this machine or on another, and the checks that are made against it."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import conformance
from beds import Machine, Result, until

SOURCE = Path(conformance.__file__).read_text(encoding="utf-8")


@contextmanager
def target_here() -> Iterator[int]:
    """Run the target on this machine; gives its port."""
    with conformance.listen() as listener:
        threading.Thread(target=conformance.serve, args=(listener,), daemon=True).start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)


@contextmanager
def target_on(machine: Machine) -> Iterator[int]:
    """Run the target on the machine; gives its port."""
    with machine.spawn([machine.python, "-u", "-c", SOURCE, "serve"]) as running:
        yield int(until(lambda: running.log.strip(), what="the target to listen"))


def check_on(machine: Machine, name: str, port: int) -> Result:
    """Run one check on the machine, against a port of its own loopback."""
    words = [machine.python, "-c", SOURCE, "check", name, "127.0.0.1", str(port)]
    return machine.execute(words, timeout=90)
