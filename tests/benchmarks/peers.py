"""The peers: each opens one forward with its own default options, in a process of its own.

The process reads an order, opens the forward and tells its port; then it waits, or computes (``busy``), until
its standard input ends. With ``attach`` it opens and closes the forward several times, and tells how long
each took to the first byte.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

_LOOPBACK = "127.0.0.1"
_DEADLINE = 60.0


@dataclass(frozen=True)
class Order:
    """Where to log in, and what to forward.

    :param target: the port that is forwarded to
    :param remote: whether the SSH server listens (``ssh -R``), not this machine (``-L``)
    :param ssh: the command line of stock ``ssh`` up to what is to be forwarded
    """

    peer: str
    host: str
    port: int
    user: str
    key: str
    known_hosts: str
    target: int
    remote: bool
    ssh: tuple[str, ...]


@dataclass(frozen=True)
class Opened:
    """A forward that stands: the port to connect to, and the processes that are it."""

    port: int
    pids: tuple[int, ...]


class NotOfferedError(Exception):
    """That peer has no such thing."""


Peer = Callable[[Order], AbstractContextManager[Opened]]


def _here(port: int) -> Opened:
    return Opened(port, (os.getpid(),))


def _free_port() -> int:
    with contextlib.closing(socket.socket()) as sock:
        sock.bind((_LOOPBACK, 0))
        port: int = sock.getsockname()[1]
        return port


@contextmanager
def raw(order: Order) -> Iterator[Opened]:
    """Forward nothing: the target itself, which is the limit."""
    yield _here(order.target)


@contextmanager
def ssh(order: Order) -> Iterator[Opened]:
    """Run OpenSSH's client: ``ssh -N -L`` or ``-R``."""
    listen = 0 if order.remote else _free_port()
    flag = "-R" if order.remote else "-L"
    forward = f"{_LOOPBACK}:{listen}:{_LOOPBACK}:{order.target}"
    words = [*order.ssh, "-N", flag, forward, order.host]
    process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        yield Opened(_allocated(process) if order.remote else _connectable(process, listen), (process.pid,))
    finally:
        process.terminate()
        process.wait(30)
        assert process.stderr
        process.stderr.close()


def _allocated(process: subprocess.Popen[str]) -> int:
    assert process.stderr
    for line in process.stderr:  # it ends with the process, which gives up by itself
        if found := re.match(r"Allocated port (\d+)", line):
            return int(found[1])
    msg = "ssh -R did not tell its port"
    raise RuntimeError(msg)


def _connectable(process: subprocess.Popen[str], port: int) -> int:
    """Wait until ssh listens, which it does once it has logged in."""
    end = time.monotonic() + _DEADLINE
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection((_LOOPBACK, port), timeout=1):
            return port
        time.sleep(0.0005)  # it has no other way to say so; short, or this would be what is measured
    msg = "ssh -L does not listen"
    raise RuntimeError(msg)


@contextmanager
def ssh_gcm(order: Order) -> Iterator[Opened]:
    """Run OpenSSH's client with the cipher that suits these processors best."""
    with ssh(Order(**{**vars(order), "ssh": (*order.ssh, "-c", "aes128-gcm@openssh.com")})) as opened:
        yield opened


@contextmanager
def asyncssh(order: Order) -> Iterator[Opened]:
    """Run asyncssh, its event loop on a thread of its own: the main thread is the program's."""
    import asyncio

    import asyncssh as library

    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    def do(work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, loop).result(_DEADLINE)

    async def connect() -> Any:
        return await library.connect(
            order.host,
            order.port,
            username=order.user,
            client_keys=[order.key],
            known_hosts=order.known_hosts,
            agent_path=None,
            config=None,
        )

    try:
        connection = do(connect())
        open_ = connection.forward_remote_port if order.remote else connection.forward_local_port

        async def listen() -> Any:
            return await open_(_LOOPBACK, 0, _LOOPBACK, order.target)

        listener = do(listen())
        yield _here(listener.get_port())
        loop.call_soon_threadsafe(connection.abort)
        do(connection.wait_closed())
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(5)


@contextmanager
def sshtunnel(order: Order) -> Iterator[Opened]:
    """Run sshtunnel as it comes."""
    import sshtunnel as library

    if order.remote:
        msg = "it has no remote forward"
        raise NotOfferedError(msg)
    with library.SSHTunnelForwarder(
        (order.host, order.port),
        ssh_username=order.user,
        ssh_pkey=order.key,
        local_bind_address=(_LOOPBACK, 0),
        remote_bind_address=(_LOOPBACK, order.target),
        ssh_config_file=None,
        allow_agent=False,
        host_pkey_directories=[],
    ) as forwarder:
        yield _here(forwarder.local_bind_port)


@contextmanager
def fabric(order: Order) -> Iterator[Opened]:
    """Run fabric's forward on a connection."""
    import fabric as library

    keywords = {"key_filename": order.key, "allow_agent": False, "look_for_keys": False}
    config = library.Config(overrides={"load_ssh_configs": False})
    listen = _free_port()
    with library.Connection(
        order.host, user=order.user, port=order.port, connect_kwargs=keywords, config=config
    ) as connection:
        if order.remote:
            forward = connection.forward_remote(listen, order.target, _LOOPBACK, _LOOPBACK)
        else:
            forward = connection.forward_local(listen, order.target, _LOOPBACK, _LOOPBACK)
        with forward:
            yield _here(listen)


@contextmanager
def ours(order: Order, *, isolate: bool = False) -> Iterator[Opened]:
    """Run bokeh_ssh's public forwards."""
    import bokeh_ssh

    login: dict[str, Any] = {
        "port": order.port,
        "key_filename": order.key,
        "known_hosts": order.known_hosts,
        "ssh_config": None,
        "allow_agent": False,
        "look_for_keys": False,
        "isolate": isolate,
    }
    if order.remote:
        remote = bokeh_ssh.RemoteForward(
            order.host, order.user, remote_port=0, local_host=_LOOPBACK, local_port=order.target, **login
        )
        with remote:
            yield _here(remote.remote_port)
    else:
        local = bokeh_ssh.LocalForward(
            order.host, order.user, remote_port=order.target, remote_host=_LOOPBACK, **login
        )
        with local:
            yield _here(local.local_port)


def ours_isolated(order: Order) -> AbstractContextManager[Opened]:
    """Run bokeh_ssh's forwards with ``isolate=True``."""
    return ours(order, isolate=True)


PEERS: dict[str, Peer] = {
    "raw": raw,
    "ssh": ssh,
    "ssh-gcm": ssh_gcm,
    "asyncssh": asyncssh,
    "sshtunnel": sshtunnel,
    "fabric": fabric,
    "ours": ours,
    "ours-isolated": ours_isolated,
}


def attach(peer: Peer, order: Order) -> float:
    """Open the forward and read one byte through it; gives the milliseconds from start to byte."""
    began = time.perf_counter()
    with peer(order) as opened, socket.create_connection((_LOOPBACK, opened.port), timeout=_DEADLINE) as sock:
        sock.sendall(b"send 1\n")
        if not sock.recv(1):
            msg = "the connection ended without a byte"
            raise RuntimeError(msg)
        return (time.perf_counter() - began) * 1e3


def compute() -> int:
    """Run pure Python on the main thread, as a notebook that computes does, until standard input ends."""
    ended = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), ended.set()), daemon=True).start()
    total = 0
    while not ended.is_set():
        for number in range(1000):
            total += number * number % 7
    return total


def live(peer: Peer, order: Order) -> None:
    """Keep the forward open until standard input ends; compute from when it says ``busy``."""
    with peer(order) as opened:
        say({"port": opened.port, "pids": opened.pids})
        if json.loads(sys.stdin.readline() or "0") == "busy":
            say({})
            compute()
        sys.stdin.read()


def say(message: dict[str, Any]) -> None:
    """Tell whoever started this process."""
    print(json.dumps(message), flush=True)


def main() -> None:
    """Do as standard input says."""
    words = json.loads(sys.stdin.readline())
    times = words.pop("attach", 0)
    order = Order(**words)
    peer = PEERS[order.peer]
    try:
        if times:
            attach(peer, order)  # imports what it needs: that has a row of its own
            say({"times": [attach(peer, order) for _ in range(times)]})
        else:
            live(peer, order)
    except NotOfferedError as exc:
        say({"failed": f"not offered: {exc}"})
    except ImportError as exc:
        say({"failed": f"not installed: {exc.name}"})
    except Exception as exc:  # noqa: BLE001  # whatever a library raises is what its cell tells
        say({"failed": f"{type(exc).__name__}: {exc}"[:200]})


if __name__ == "__main__":
    main()
