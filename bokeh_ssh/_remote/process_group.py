"""Programs in process groups: how they are started, and what becomes of them."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

PATIENCE = 5.0  # seconds between TERM and KILL where nobody says otherwise


def piped(begin: Callable[[list[int]], object]) -> list[int]:
    """Start a program; return what its standard output and error are read from.

    :param begin: starts it, with what these are to be
    :raises OSError: if it cannot be started
    """
    ours, theirs = zip(os.pipe(), os.pipe())  # noqa: B905 - Python 3.8
    try:
        begin(list(theirs))
    except OSError:
        for fd in ours:
            os.close(fd)
        raise
    finally:
        for fd in theirs:
            os.close(fd)
    for fd in ours:
        os.set_blocking(fd, False)
    return list(ours)


def start(argv: list[bytes], env: dict[bytes, bytes], group: int, outputs: list[int]) -> int:
    """Start a program in a group, with nothing to read; return its process id.

    :param group: 0 for one of its own
    :param outputs: what becomes its standard output and error
    :raises OSError: if it cannot be started
    """
    actions: list[tuple[Any, ...]] = [(os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0)]
    actions += [(os.POSIX_SPAWN_DUP2, fd, number) for number, fd in enumerate(outputs, 1)]
    ignored = [signal.SIGHUP, signal.SIGINT, signal.SIGPIPE, signal.SIGXFSZ]  # exec would pass that on
    return os.posix_spawnp(argv[0], argv, env, file_actions=actions, setpgroup=group, setsigdef=ignored)


def let_go(*kept: int) -> list[int]:
    """Let go of all descriptors but these, whose new numbers are given; the session must not be held open."""
    high = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3) for fd in kept]
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


def changes(kept: int) -> Iterator[tuple[int, str, int]]:
    """Reap children; return each with "exit" and its status (below 0: a signal), "stopped" or "continued".

    The zombie of ``kept`` stays, so that nobody else gets its number, which is its group's too; after that
    exit nothing else is reported. Where Python has no ``waitid`` (before 3.13 on macOS) it does not stay, and
    the number is pinned for as long as the group has members.
    """
    with contextlib.suppress(ChildProcessError):
        if not hasattr(os, "waitid"):
            flags = os.WNOHANG | os.WUNTRACED | os.WCONTINUED
            for pid, status in iter(lambda: os.waitpid(-1, flags), (0, 0)):
                if os.WIFEXITED(status):
                    yield pid, "exit", os.WEXITSTATUS(status)
                elif os.WIFSIGNALED(status):
                    yield pid, "exit", -os.WTERMSIG(status)
                else:
                    yield pid, "stopped" if os.WIFSTOPPED(status) else "continued", 0
            return
        ended, halted = os.WEXITED | os.WNOWAIT | os.WNOHANG, os.WSTOPPED | os.WCONTINUED | os.WNOHANG
        for found in iter(lambda: os.waitid(os.P_ALL, 0, ended), None):
            if found.si_pid != kept:
                os.waitpid(found.si_pid, 0)
            yield found.si_pid, "exit", found.si_status * (1 if found.si_code == os.CLD_EXITED else -1)
            if found.si_pid == kept:
                return
        for found in iter(lambda: os.waitid(os.P_PID, kept, halted) if kept else None, None):
            yield kept, "continued" if found.si_code == os.CLD_CONTINUED else "stopped", 0
