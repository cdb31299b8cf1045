"""A process group with a keeper, which pins its number, and ends it where we were killed.

Runs on the remote machine: standard library only, Python 3.8 or newer, any POSIX system.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time

TYPE_CHECKING = False  # typing costs milliseconds of a launch and is not needed to run
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

PATIENCE = 5.0  # seconds between TERM and KILL where nobody says otherwise


def look(pid: int) -> tuple[int, str]:
    """Give the group of a process and the letter of its state; ``(0, "")`` where /proc does not say."""
    return _read(pid)[1:]


def _read(pid: int) -> tuple[int, int, str]:
    """Return the parent and the group of a process, and the letter of its state."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as stat:
            text = stat.read()
        state, parent, group = text.rpartition(b")")[2].split()[:3]  # the name before may hold anything
    except (OSError, ValueError):
        return 0, 0, ""
    return int(parent), int(group), state.decode()


def members(group: int) -> set[int]:
    """List the processes of a group that still run; a zombie does not."""
    if os.path.exists("/proc/self/stat"):
        table = [(int(name), *look(int(name))) for name in os.listdir("/proc") if name.isdigit()]
    else:
        with os.popen("ps -A -o pid=,pgid=,stat=") as ps:  # noqa: S605, S607 - where ps is, PATH knows
            table = [(int(pid), int(its), state) for pid, its, state in (row.split()[:3] for row in ps)]
    return {pid for pid, its, state in table if its == group and state[:1] not in ("Z", "X")}


def descendants(pid: int) -> set[int]:
    """List a process and what it has started, in whatever groups: ``timeout`` makes one.

    Where /proc does not say, that is the process alone.
    """
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc") if os.path.exists("/proc/self/stat") else ():
        if name.isdigit():
            children.setdefault(_read(int(name))[0], []).append(int(name))
    found, left = {pid}, [pid]
    while left:
        more = [child for child in children.get(left.pop(), ()) if child not in found]
        found.update(more)
        left += more
    return found


def send(group: int, *signals: int) -> None:
    """Send signals to a process group; one that is gone needs none."""
    for number in signals:
        with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS: EPERM for a group of zombies
            os.killpg(group, number)


def start(argv: list[bytes], env: dict[bytes, bytes], group: int) -> tuple[int, list[int]]:
    """Start a program in a group, with nothing to read and both its streams on pipes.

    :returns: its process id, and our ends of its standard output and error
    :raises OSError: if it cannot be started
    """
    actions: list[tuple[Any, ...]] = [(os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0)]
    ours, theirs = [], []
    for number in (1, 2):
        reads, writes = os.pipe()
        os.set_blocking(reads, False)
        actions.append((os.POSIX_SPAWN_DUP2, writes, number))
        ours.append(reads)
        theirs.append(writes)
    ignored = [signal.SIGHUP, signal.SIGINT, signal.SIGPIPE, signal.SIGXFSZ]  # exec would pass that on
    try:
        pid = os.posix_spawnp(argv[0], argv, env, file_actions=actions, setpgroup=group, setsigdef=ignored)
    except OSError:
        for fd in ours:
            os.close(fd)
        raise
    finally:
        for fd in theirs:
            os.close(fd)
    return pid, ours


def start_keeper(leave: Callable[[], object]) -> tuple[int, int]:
    """Fork the keeper; give its process id, which is the group's too, and the pipe that it waits on.

    :param leave: removes what a supervisor that was killed cannot
    """
    waits, lifeline = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            keep(waits, leave)
        finally:
            os._exit(0)
    os.setpgid(pid, pid)  # here too, so that the group exists before the server joins it
    os.close(waits)
    return pid, lifeline


def keep(lifeline: int, leave: Callable[[], object]) -> None:
    """Wait until the pipe ends, which means that the supervisor was killed; then end this group."""
    os.setpgid(0, 0)
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it is sent to the whole group, and we are in it
    null = os.open(os.devnull, os.O_RDWR)
    for number in range(3):  # the session must not be held open by us
        os.dup2(null, number)
    if lifeline != 3:
        os.dup2(lifeline, 3)
    os.closerange(4, 256)
    while os.read(3, 1):
        pass
    me = os.getpid()
    send(me, signal.SIGTERM, signal.SIGCONT)
    deadline = time.monotonic() + PATIENCE
    while members(me) - {me} and time.monotonic() < deadline:
        time.sleep(0.05)
    leave()
    send(me, signal.SIGKILL)
