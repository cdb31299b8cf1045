"""The process that the SSH server executed, and what goes on without it.

Some SSH servers end what they executed when its channel ends (Apache MINA sends TERM, Twisted Conch HUP,
others KILL, to that process, its group or its children). So that one only waits, as the channel's *anchor*,
and the supervisor runs in a session of its own, as nobody's child: all that it learns from such an end is
that its client has gone.

Where supervisor and guardian are killed at once, the anchor, if it is left, ends what was theirs.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time

from bokeh_ssh._remote import process_tree
from bokeh_ssh._remote.control_socket import remove_run_dir
from bokeh_ssh._remote.process_group import PATIENCE
from bokeh_ssh._remote.run_dir import RunDir

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

_PAUSE = 0.5  # seconds between two looks whether the guardian lives, and has ended all
_LOOKS = 12  # in which it has, with the patience that it has


class Anchor:
    """The line to the process that stays.

    :ivar fd: ends when that one is ended; -1 where there is none
    """

    def __init__(self, fd: int = -1) -> None:
        self.fd = fd

    def _write(self, data: bytes) -> None:
        if self.fd >= 0:
            with contextlib.suppress(OSError):  # it was ended before
                os.write(self.fd, data)

    def watch(self, run_dir: RunDir) -> None:
        """Let it look after a place: should we be killed, and whoever else does."""
        self._write(os.fsencode(run_dir.path) + b"\n")

    def let_go(self) -> None:
        """Listen to it no more."""
        if self.fd >= 0:
            os.close(self.fd)
        self.fd = -1

    def end(self, status: int) -> NoReturn:
        """End this process, and the one that stays, with this exit status."""
        self._write(bytes([status]))
        os._exit(status)


def detach_session() -> Anchor:
    """Go on in a new process and session; the one that was executed stays, and ends as this one does."""
    ours, its = (end.detach() for end in socket.socketpair())
    try:
        pid = os.fork()
    except OSError:  # the account has too many: then it is as it is
        os.close(ours)
        os.close(its)
        return Anchor()
    if pid:
        os.close(ours)
        stay(pid, its)
    os.close(its)
    os.setsid()
    with contextlib.suppress(OSError):  # this one will do
        if os.fork():
            os._exit(0)
    return Anchor(ours)


def stay(pid: int, fd: int) -> NoReturn:
    """Wait for the other end of a line, with none of the session's streams, and end in the same way.

    :param pid: a child that has ended by then
    """
    for number in (signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    null = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):  # they are the other's: one ends when that closes it
        os.dup2(null, stream)
    os.waitpid(pid, 0)
    path, status = read_anchor(fd)
    if not status:  # it was killed, and could not even say so
        try:
            if path and not os.fork():
                os.setsid()  # out of reach of the session's end, which does not wait for this
                succeed(RunDir(os.fsdecode(path)))
        finally:
            os.kill(os.getpid(), signal.SIGKILL)
    os._exit(status[0])


def succeed(run_dir: RunDir) -> None:
    """End what a supervisor that was killed has left, unless its guardian does."""
    for _ in range(_LOOKS):
        if not process_tree.marked(run_dir.mark, process_tree.table()):
            break
        time.sleep(_PAUSE)
    remove_run_dir(run_dir, PATIENCE)


def read_anchor(fd: int) -> tuple[bytes, bytes]:
    """Hear which place to look after, and the exit status; either is empty where it was not said."""
    said = b""
    while True:
        part = os.read(fd, 1 << 12)
        said += part
        path, _, status = said.rpartition(b"\n")
        if status or not part:
            return path, status
