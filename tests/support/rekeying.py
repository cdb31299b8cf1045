"""A storm of bytes and connections in which keys change, through each kind of forward."""

from __future__ import annotations

import hashlib
import inspect
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

import conformance
from beds import Machine, until
from bokeh_ssh import LocalForward, RemoteForward
from conformance import DEADLINE, MIB, ask, pattern, read_all, read_exactly
from targets import SOURCE

LIMIT = MIB  # what OpenSSH takes in its config, and asyncssh too


def storm(address: tuple[str, int]) -> None:
    """Move bytes both ways, byte-exact, while connections open and close all the time."""

    def down() -> None:
        with ask(address, f"send {6 * MIB}") as sock:
            assert read_all(sock) == pattern(6 * MIB)

    def up() -> None:
        with ask(address, "hash") as sock:
            sock.sendall(pattern(6 * MIB))
            sock.shutdown(socket.SHUT_WR)
            assert read_all(sock) == hashlib.sha256(pattern(6 * MIB)).digest()

    def short() -> None:
        for size in (1, 70_000, 300) * 10:
            with ask(address, "echo") as sock:
                sock.sendall(pattern(size))
                assert read_exactly(sock, size) == pattern(size)

    with ThreadPoolExecutor(8) as pool:
        for job in [pool.submit(work) for work in (down, up, short, short, down, up)]:
            job.result(DEADLINE)


#: The same as a program, for the other machine.
STORM = "\n".join(
    (
        SOURCE.partition('if __name__ == "__main__"')[0],
        inspect.getsource(storm),
        "storm(('127.0.0.1', int(sys.argv[1])))",
    )
)


@contextmanager
def local_way(machine: Machine) -> Iterator[Callable[[], None]]:
    """Open a local forward to the conformance target on the machine; gives the storm through it."""
    with (
        machine.spawn([machine.python, "-u", "-c", SOURCE, "serve"]) as running,
        LocalForward(
            machine.host,
            machine.user,
            remote_port=int(until(lambda: running.log.strip(), what="the target to listen")),
            remote_host="127.0.0.1",
            **machine.login,
        ) as forward,
    ):
        yield lambda: storm(("127.0.0.1", forward.local_port))
        assert forward.state == "ready"


@contextmanager
def remote_way(machine: Machine) -> Iterator[Callable[[], None]]:
    """Open a remote forward to the conformance target here; gives the storm through it, from the machine."""
    with conformance.listen() as listener:
        threading.Thread(target=conformance.serve, args=(listener,), daemon=True).start()
        port = listener.getsockname()[1]
        with RemoteForward(
            machine.host,
            machine.user,
            remote_port=0,
            local_port=port,
            local_host="127.0.0.1",
            **machine.login,
        ) as forward:

            def work() -> None:
                done = machine.execute([machine.python, "-c", STORM, str(forward.remote_port)], timeout=90)
                assert done.status == 0, done.stderr

            yield work
            assert forward.state == "ready"
        listener.shutdown(socket.SHUT_RDWR)


WAYS = pytest.mark.parametrize("way", [local_way, remote_way], ids=["local", "remote"])
