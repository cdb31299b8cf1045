"""A process group with a keeper, which pins its number, and ends it where we were killed.

Runs on the remote machine: standard library only, Python 3.8 or newer, any POSIX system.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal

from bokeh_ssh import _tree

TYPE_CHECKING = False  # typing costs milliseconds of a launch and is not needed to run
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

PATIENCE = 5.0  # seconds between TERM and KILL where nobody says otherwise


def members(group: int) -> set[int]:
    """List the processes of a group that still run; a zombie does not."""
    return {pid for pid, row in _tree.table().items() if row[1] == group}


def descendants(pid: int) -> set[int]:
    """List a process and what it has started, in whatever groups: ``timeout`` makes one.

    Where /proc does not say, that is the process alone.
    """
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc") if os.path.exists("/proc/self/stat") else ():
        if name.isdigit():
            children.setdefault(parent(int(name)), []).append(int(name))
    found, left = {pid}, [pid]
    while left:
        more = [child for child in children.get(left.pop(), ()) if child not in found]
        found.update(more)
        left += more
    return found


def parent(pid: int) -> int:
    """Look who started a process; 0 where /proc does not say."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as stat:
            return int(stat.read().rpartition(b")")[2].split()[1])
    except (OSError, ValueError, IndexError):
        return 0


def send(group: int, *signals: int) -> None:
    """Send signals to a process group; one that is gone needs none."""
    for number in signals:
        with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS: EPERM for a group of zombies
            os.killpg(group, number)


def pipes() -> tuple[list[int], list[int]]:
    """Make what the standard output and error of a program are read from: our ends, and its own."""
    ours, theirs = zip(os.pipe(), os.pipe())  # noqa: B905 - Python 3.8
    for fd in ours:
        os.set_blocking(fd, False)
    return list(ours), list(theirs)


def start(argv: list[bytes], env: dict[bytes, bytes], group: int, outputs: list[int]) -> int:
    """Start a program in a group, with nothing to read; gives its process id.

    :param outputs: what becomes its standard output and error
    :raises OSError: if it cannot be started
    """
    actions: list[tuple[Any, ...]] = [(os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0)]
    actions += [(os.POSIX_SPAWN_DUP2, fd, number) for number, fd in enumerate(outputs, 1)]
    ignored = [signal.SIGHUP, signal.SIGINT, signal.SIGPIPE, signal.SIGXFSZ]  # exec would pass that on
    return os.posix_spawnp(argv[0], argv, env, file_actions=actions, setpgroup=group, setsigdef=ignored)


def let_go(*kept: int) -> list[int]:
    """Let go of all descriptors but these, whose new numbers are given; the session must not be held open."""
    high = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 64) for fd in kept]
    null = os.open(os.devnull, os.O_RDWR)
    for number in range(3):
        os.dup2(null, number)
    try:
        every = [int(name) for name in os.listdir("/proc/self/fd")]
    except OSError:
        every = list(range(1024))
    for fd in every:
        if fd > 2 and fd not in high:
            with contextlib.suppress(OSError):
                os.close(fd)
    return high


def start_keeper(leave: Callable[[], object], mark: bytes) -> tuple[int, int]:
    """Fork the keeper; give its process id, which is the group's too, and the pipe that it waits on.

    :param leave: removes what a supervisor that was killed cannot
    :param mark: what stands in the environment of all that is ours; empty where nothing does
    """
    waits, lifeline = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            keep(waits, leave, mark)
        finally:
            os._exit(0)
    os.setpgid(pid, pid)  # here too, so that the group exists before the server joins it
    os.close(waits)
    return pid, lifeline


def keep(lifeline: int, leave: Callable[[], object], mark: bytes) -> None:
    """Wait until the pipe ends, which means that the supervisor was killed; then end this group."""
    os.setpgid(0, 0)
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it is sent to the whole group, and we are in it
    (waits,) = let_go(lifeline)
    while os.read(waits, 1):
        pass
    me = os.getpid()
    send(me, signal.SIGTERM, signal.SIGCONT)

    def ours(rows: _tree.Table) -> set[int]:
        found = {pid for pid, row in rows.items() if row[1] == me} - {me}
        return found | (_tree.marked(mark, rows) if mark else set())

    _tree.end(ours, PATIENCE)
    leave()
    send(me, signal.SIGKILL)
