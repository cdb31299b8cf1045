"""The control socket of a command that holds a tunnel: what it does is asked there, and that it ends.

One line of JSON is read and one is written. Where the sockets are nobody but this account may enter; a
process that has ended leaves one at which nobody listens. No process id is trusted: what is asked to end is
who listens there.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
import select
import socket
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bokeh_ssh._core.errors import ForwardError, UsageError
from bokeh_ssh._core.this_machine.home import find_home
from bokeh_ssh._forwarding.local_sockets import bind

log = logging.getLogger("bokeh_ssh")

#: Bytes of a request and of an answer, and seconds for either.
_MOST = 1 << 16
_PATIENCE = 2.0
#: Seconds until who asks is accepted again where that failed.
_PAUSE = 0.2
SUFFIX = ".sock"
#: Names the folder, where it is set; for tests, as it does for servers.
_SETTING = "BOKEH_SSH_DIR"


def supported() -> bool:
    """Return whether this system has Unix sockets for Python: not on Windows."""
    return hasattr(socket, "AF_UNIX")


def folders() -> list[Path]:
    """List where the sockets may be, the usual place first.

    Not in XDG_RUNTIME_DIR: that is removed when a person logs out, and background tunnels stay.
    """
    if not supported():
        return []
    named = os.environ.get(_SETTING)
    if named:
        return [Path(f"{named}-tunnels")]
    found = [Path(f"/tmp/bokeh-ssh-{os.geteuid()}-tunnels")]  # noqa: S108 - see is_private
    if home := find_home():
        node = platform.node().partition(".")[0] or "node"  # a home may be many machines'
        found.append(home / f".bokeh-ssh-tunnels-{node}")
    return found


def is_private(folder: Path) -> bool:
    """Return whether it is a folder of this account's that nobody else may enter."""
    try:
        facts = folder.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(facts.st_mode) and facts.st_uid == os.geteuid() and not facts.st_mode & 0o077


def _make_folder() -> Path | None:
    for folder in folders():
        with contextlib.suppress(OSError):
            folder.mkdir(mode=0o700)
        if is_private(folder):
            return folder
    return None


@contextlib.contextmanager
def answering(describe: Callable[[], dict[str, Any]], stop: Callable[[], None]) -> Iterator[bool]:
    """Answer who asks what this process holds, while the context lasts.

    :param describe: returns that, fit for JSON
    :param stop: ends it; called on a thread of its own
    :returns: whether anybody can ask
    """
    folder = _make_folder()
    try:
        made = bind(str(folder / f"{os.getpid()}{SUFFIX}")) if folder else None
    except (ForwardError, UsageError) as exc:
        log.info("no control socket: %s", exc)
        made = None
    if made is None:
        yield False
        return
    try:
        end_recv, end_send = socket.socketpair()
    except OSError as exc:
        log.info("no control socket: %s", exc)
        made.close()
        yield False
        return
    held: list[socket.socket] = []  # who waits for this process to end, which closes these

    def serve() -> None:
        while True:
            ready, _, _ = select.select([made.sock, end_recv], [], [])
            if end_recv in ready:
                return
            try:
                client = made.sock.accept()[0]
            except OSError:  # as where no more files may be opened: who asks is still there, and waits
                select.select([end_recv], [], [], _PAUSE)
                continue
            client.settimeout(_PATIENCE)
            if not _answer(client, describe, stop):
                client.close()
            elif len(held) < 100:
                held.append(client)

    thread = threading.Thread(target=serve, name="bokeh-ssh control", daemon=True)
    thread.start()
    try:
        yield True
    finally:
        end_send.close()
        thread.join(_PATIENCE)
        end_recv.close()
        made.close()


def _answer(client: socket.socket, describe: Callable[[], dict[str, Any]], stop: Callable[[], None]) -> bool:
    """Answer one; return whether it is to see when this process ends."""
    try:
        asked = json.loads(_read_line(client)).get("request")
    except (ValueError, AttributeError, RecursionError, OSError):
        asked = None
    if asked == "stop":
        with contextlib.suppress(OSError):  # who asked need not stay for the answer
            client.sendall(b'{"stopping": true}\n')
        threading.Thread(target=stop, name="bokeh-ssh stop", daemon=True).start()
        return True
    answer = describe() if asked == "status" else {"error": "unknown request"}
    with contextlib.suppress(OSError):
        client.sendall(json.dumps(answer).encode("ascii") + b"\n")
    return False


def _read_line(sock: socket.socket) -> bytes:
    """Read up to the end of a line.

    :raises OSError: if it does not come in time
    """
    data = b""
    while b"\n" not in data and len(data) < _MOST:
        more = sock.recv(4096)
        if not more:
            break
        data += more
    return data


@contextlib.contextmanager
def _asked(path: Path, request: str) -> Iterator[socket.socket]:
    """Ask who listens there; yield where the answer comes."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(_PATIENCE)
        sock.connect(str(path))
        sock.sendall(json.dumps({"request": request}).encode("ascii") + b"\n")
        yield sock


def ask(path: Path) -> dict[str, Any] | None:
    """Ask who listens there what it holds.

    :returns: None where it does not answer in time
    :raises ConnectionRefusedError: if nobody listens there any more
    :raises FileNotFoundError: if there is no socket
    """
    try:
        with _asked(path, "status") as sock:
            answer = json.loads(_read_line(sock))
    except (ConnectionRefusedError, FileNotFoundError):
        raise
    except (OSError, ValueError, RecursionError):
        return None
    return answer if isinstance(answer, dict) and "status" in answer else None


def ask_to_stop(path: Path, timeout: float) -> bool:
    """Ask who listens there to end, and wait until it has.

    :param timeout: seconds
    :returns: False if it has not ended by then
    """
    try:
        with _asked(path, "stop") as sock:
            _read_line(sock)
            sock.settimeout(timeout)
            return not sock.recv(1)
    except (ConnectionError, FileNotFoundError):
        return True
    except OSError:
        return False
