"""The parent of a server, between it and the supervisor: whoever is left ends what the server leaves behind.

Runs on the remote machine: standard library only, Python 3.8 or newer. Only where orphans can be adopted
(Linux); elsewhere the supervisor is the server's parent itself.

A process that left its group and its session (``setsid``, a daemon) is found by who started it, as long as
its ancestors live. When those end, it becomes a child of the nearest ancestor that adopts. That is this
process, which starts the server; and should this one be killed, the supervisor, which started this one.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal

from bokeh_ssh import _tree
from bokeh_ssh._group import PATIENCE, let_go, pipes, start

TYPE_CHECKING = False  # typing costs milliseconds of a launch and is not needed to run
if TYPE_CHECKING:
    from collections.abc import Callable

_CHUNK = 1 << 12
_AFTER = 0.3  # seconds for the keeper to come first


class Foster:
    """A process that starts another one, tells what becomes of that, and ends all of it where we are killed.

    :param argv: to start, in the process group ``group``
    :param leave: removes what a supervisor that was killed cannot
    :ivar pid: its own process
    :ivar child: the one that it has started
    :ivar streams: our ends of that one's standard output and error
    :raises OSError: if that cannot be started
    """

    def __init__(
        self, argv: list[bytes], env: dict[bytes, bytes], group: int, leave: Callable[[], object]
    ) -> None:
        self._rest = b""
        self.pid = self.child = 0
        waits, self._lifeline = os.pipe()
        self._word, tells = os.pipe()
        self.streams, outputs = pipes()
        try:
            self.pid = os.fork()
            if not self.pid:
                try:
                    _raise(argv, env, group, outputs, waits, tells, leave)
                finally:
                    os._exit(0)
        finally:
            for fd in (waits, tells, *outputs):
                os.close(fd)
            if self.pid == 0:
                self._give_up()
        first = self._line()
        if first[:1] != b"+":
            self._give_up()
            raise OSError(int(first[1:] or errno.ECHILD), "")
        self.child = int(first)
        os.set_blocking(self._word, False)

    def _give_up(self) -> None:
        self.close()
        for fd in self.streams:
            os.close(fd)

    def fileno(self) -> int:
        """Give what to wait for; -1 once nothing more will be told."""
        return self._word

    def _line(self) -> bytes:
        text = b""
        while not text.endswith(b"\n"):
            data = os.read(self._word, 1)
            if not data:
                return b""
            text += data
        return text[:-1]

    def hear(self) -> list[int]:
        """Give what became of the child since, as from ``os.waitpid``."""
        try:
            data = os.read(self._word, _CHUNK)
        except BlockingIOError:
            return []
        if not data:
            self.close()
            return []
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [int(line) for line in lines]

    def close(self) -> None:
        """Have it end, with all that it has; idempotent."""
        for fd in (self._word, self._lifeline):
            if fd >= 0:
                os.close(fd)
        self._word = self._lifeline = -1


def _raise(
    argv: list[bytes],
    env: dict[bytes, bytes],
    group: int,
    outputs: list[int],
    waits: int,
    tells: int,
    leave: Callable[[], object],
) -> None:
    """Start it, and stay for as long as it runs."""
    os.setpgid(0, 0)  # what is sent to the server's group, or to the session's, is not for us
    _tree.adopt()
    wake, wakes = os.pipe()
    for fd in (wake, wakes):
        os.set_blocking(fd, False)
    signal.set_wakeup_fd(wakes, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    try:
        child = start(argv, env, group, outputs)
    except OSError as exc:
        os.write(tells, b"-%d\n" % (exc.errno or 0))
        return
    os.write(tells, b"+%d\n" % child)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    kept = let_go(waits, tells, wake, wakes)
    waits, tells, wake = kept[:3]
    signal.set_wakeup_fd(kept[3], warn_on_full_buffer=False)
    while True:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG | os.WUNTRACED | os.WCONTINUED)
            except ChildProcessError:
                pid = 0
            if not pid:
                break
            if pid == child:
                with contextlib.suppress(OSError):  # nobody listens any more: we notice below
                    os.write(tells, b"%d\n" % status)
                if not os.WIFSTOPPED(status) and not os.WIFCONTINUED(status):
                    return  # the supervisor adopts what is left
        ready, _, _ = select.select([waits, wake], [], [])
        if wake in ready:
            with contextlib.suppress(BlockingIOError):
                os.read(wake, _CHUNK)
        if waits in ready:
            break
    select.select([], [], [], _AFTER)

    def ours(rows: _tree.Table) -> set[int]:
        found = _tree.below(os.getpid(), rows)
        # As long as the keeper lives, its group is its own to end: nobody is sent TERM twice.
        return {pid for pid in found if group not in rows or rows[pid][1] != group}

    _tree.end(ours, PATIENCE)
    leave()
