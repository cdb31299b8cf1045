"""The parent of a server, between it and the supervisor: whoever is left ends the server, and all of its own.

The server leads a process group, whose number is pinned by its zombie until all is over. A process that left
the group and the session (``setsid``, a daemon) is found by who started it, as long as its ancestors live.
When those end, it becomes a child of the nearest ancestor that adopts, where that can be had (Linux): this
process, or should it be killed, the supervisor, which started this one.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal

from bokeh_ssh._remote import process_tree
from bokeh_ssh._remote.process_group import PATIENCE, changes, let_go

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

_CHUNK = 1 << 12


class Guardian:
    """A process that starts another one, reports what becomes of that, and ends all of it if we are killed.

    It waits on a pipe whose end means that.

    :param begin: starts that one, which leads a process group; gives its process id, or 0
    :param leave: removes what a supervisor that was killed cannot
    :param mark: what stands in the environment of all that is ours; empty where nothing does
    :param adopts: whether it is to adopt what that one leaves behind
    :ivar pid: its own process; 0 once that has been reaped
    :ivar child: the one that it has started
    :raises OSError: if that cannot be started
    """

    def __init__(
        self, begin: Callable[[], int], leave: Callable[[], object], mark: bytes, adopts: bool
    ) -> None:
        self._rest = b""
        waits, self._death_pipe = os.pipe()
        self._word, report = os.pipe()
        try:
            self.pid = os.fork()
            if not self.pid:
                try:
                    _guard(begin, leave, mark, adopts, waits, report)
                finally:
                    os._exit(0)
        except OSError:
            self._close()
            raise
        finally:
            os.close(waits)
            os.close(report)
        with open(self._word, "rb", 0, closefd=False) as word:
            first = word.readline()
        if first[:1] != b"+":
            self._close()
            raise OSError(int(first[1:] or errno.ECHILD), "")
        self.child = int(first)
        os.set_blocking(self._word, False)

    def fileno(self) -> int:
        """Return what to wait for; -1 once nothing more will be reported."""
        return self._word

    def read_changes(self) -> list[tuple[str, int]]:
        """Return what became of the child since: "exit" and its status, "stopped" or "continued"."""
        try:
            data = os.read(self._word, _CHUNK)
        except BlockingIOError:
            return []
        if not data:
            self._close()
            return []
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [(event.decode(), int(status)) for event, status in map(bytes.split, lines)]

    def resume(self) -> None:
        """Resume it, should somebody have stopped it."""
        if self.pid:
            os.kill(self.pid, signal.SIGCONT)

    def dismiss(self) -> None:
        """End it, and take over what it has, where that can be adopted; idempotent."""
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        self.pid = 0
        self._close()

    def _close(self) -> None:
        for fd in (self._word, self._death_pipe):
            if fd >= 0:
                os.close(fd)
        self._word = self._death_pipe = -1


def _guard(
    begin: Callable[[], int], leave: Callable[[], object], mark: bytes, adopts: bool, waits: int, report: int
) -> None:
    """Begin, report what there is to report until the supervisor is killed, and then end all."""
    os.setpgid(0, 0)  # what is sent to the server's group, or to the session's, is not for us
    adopts = adopts and process_tree.adopt()
    try:
        wake, wakes = os.pipe()
        for fd in (wake, wakes):
            os.set_blocking(fd, False)
        signal.set_wakeup_fd(wakes, warn_on_full_buffer=False)
        child = begin()
    except OSError as exc:
        os.write(report, b"-%d\n" % (exc.errno or 0))
        return
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with contextlib.suppress(OSError):  # nobody listens any more: we notice below
        os.write(report, b"+%d\n" % child)
    waits, report, wake, wakes = let_go(waits, report, wake, wakes)
    signal.set_wakeup_fd(wakes, warn_on_full_buffer=False)
    ended = False
    ready: list[int] = []
    while waits not in ready:
        for pid, event, status in () if ended else changes(child):
            if pid == child:
                ended = event == "exit"
                with contextlib.suppress(OSError):
                    os.write(report, f"{event} {status}\n".encode())
        ready, _, _ = select.select([waits, wake], [], [])
        if wake in ready:
            with contextlib.suppress(BlockingIOError):
                os.read(wake, _CHUNK)

    def ours(rows: process_tree.Table) -> set[int]:
        found = process_tree.members(child, rows) | (process_tree.marked(mark, rows) if mark else set())
        return found | (process_tree.below(os.getpid(), rows) if adopts else set())

    process_tree.end(ours, PATIENCE, child)
    leave()
