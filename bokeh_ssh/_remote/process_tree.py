"""The processes of this machine: who started whom, and how they are ended.

What needs ``/proc`` or Linux does nothing elsewhere, and says so.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterable

    #: Parent, process group, letter of the state, and when it was started (in ticks; 0: not known).
    Row = tuple[int, int, str, int]
    Table = dict[int, Row]

_SET_CHILD_SUBREAPER = 36
_ROUNDS = 50  # in which a machine that starts programs all the time is read
_FIELDS = 20  # of /proc/PID/stat, from the state to the start time


def adopt() -> bool:
    """Adopt what our descendants leave behind; False where the system cannot do that.

    Linux alone has it (``prctl(2)``), and Python only with ctypes, which some builds lack or may not use.
    """
    try:
        import ctypes

        none = ctypes.c_ulong(0)
        libc = ctypes.CDLL(None)
        return os.uname().sysname == "Linux" and not libc.prctl(
            _SET_CHILD_SUBREAPER, ctypes.c_ulong(1), none, none, none
        )
    except Exception:  # noqa: BLE001 - no ctypes, no such function, no memory that may be executed
        return False


def read_process(pid: int) -> Row | None:
    """Look at one process; None where it has ended, and where /proc does not say."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as stat:
            words = stat.read().rpartition(b")")[2].split()[:_FIELDS]  # the name before may hold anything
        # The state is that of the first thread: the others go on where that has ended alone.
        state = "S" if words[0] == b"Z" and int(words[17]) > 1 else words[0].decode()
        return int(words[1]), int(words[2]), state, int(words[19])
    except (OSError, ValueError, IndexError):
        return None


def table() -> Table:
    """List the processes that run; a zombie does not.

    On Linux, what runs and was started by one that is listed, or by one that has ended meanwhile, is listed.
    """
    if os.path.exists("/proc/self/stat"):
        return _all()
    rows: Table = {}
    with os.popen("ps -A -o pid=,ppid=,pgid=,stat=") as ps:  # noqa: S605, S607 - where ps is, PATH knows
        for line in ps:
            with contextlib.suppress(ValueError):
                pid, parent, group, state = line.split()[:4]
                rows[int(pid)] = int(parent), int(group), state, 0
    return {pid: row for pid, row in rows.items() if _runs(row)}


def _all() -> Table:
    """Read /proc until there is nobody new: one that forks and ends while it is read would hide its child."""
    rows: Table = {}
    seen: set[int] = set()
    for _ in range(_ROUNDS):
        new = {int(name) for name in os.listdir("/proc") if name.isdigit()} - seen
        seen |= new
        # Whose parent ended after we have looked at it has another by now.
        orphans = {pid for pid, row in rows.items() if row[0] and row[0] not in rows}
        found = {pid: read_process(pid) for pid in new | orphans}
        if not new and all(row == rows[pid] for pid, row in found.items()):
            break
        for pid in found:
            rows.pop(pid, None)
        rows.update((pid, row) for pid, row in found.items() if row and _runs(row))
    return rows


def _runs(row: Row) -> bool:
    return row[2][:1] not in ("Z", "X")


def members(group: int, rows: Table) -> set[int]:
    """List the processes of a group; there is none with the number 0."""
    return {pid for pid, row in rows.items() if group and row[1] == group}


def below(root: int, rows: Table, spare: Container[int] = ()) -> set[int]:
    """List the descendants of a process, without those that are spared and theirs."""
    children: dict[int, list[int]] = {}
    for pid, row in rows.items():
        children.setdefault(row[0], []).append(pid)
    found: set[int] = set()
    left = [root]
    while left:
        for pid in children.get(left.pop(), ()):
            if pid not in spare and pid not in found:
                found.add(pid)
                left.append(pid)
    return found


def marked(entry: bytes, rows: Table) -> set[int]:
    """List the processes that were started with this entry in their environment, and their descendants."""
    found = set()
    for pid in rows:
        with contextlib.suppress(OSError), open(f"/proc/{pid}/environ", "rb") as environ:
            if entry in environ.read().split(b"\0"):
                found |= {pid} | below(pid, rows)
    return found - {os.getpid()}


def values(name: bytes, pids: Iterable[int]) -> set[bytes]:
    """List the values that processes were started with for a variable; where /proc does not say, none."""
    found = set()
    for pid in pids:
        with contextlib.suppress(OSError), open(f"/proc/{pid}/environ", "rb") as environ:
            for entry in environ.read().split(b"\0"):
                if entry.startswith(name + b"="):
                    found.add(entry[len(name) + 1 :])
    return found


def signal_process(pid: int, since: int, *signals: int) -> None:
    """Send signals to a process if it is still the one that was seen: its number may be another's by now."""
    fd = -1
    try:
        with contextlib.suppress(AttributeError, PermissionError):  # before Python 3.9; not allowed in here
            fd = os.pidfd_open(pid)
        seen = read_process(pid)
        if seen is None or seen[3] != since:
            return
        for number in signals:
            if fd >= 0:
                signal.pidfd_send_signal(fd, number)
            else:
                os.kill(pid, number)
    except OSError:  # it has ended; or it is another user's now (setuid), whom we cannot end
        pass
    finally:
        if fd >= 0:
            os.close(fd)


def press(found: Iterable[int], rows: Table, asked: set[tuple[int, int]], group: int, kill: bool) -> None:
    """Send processes TERM, or KILL; TERM only once, and at once to all of a group whose number is pinned.

    :param asked: who was sent TERM
    """
    signals = (signal.SIGKILL,) if kill else (signal.SIGTERM, signal.SIGCONT)  # a stopped one takes it then
    who = {(-group, 0) if group and rows[pid][1] == group else (pid, rows[pid][3]) for pid in found}
    for pid, since in who if kill else who - asked:
        if pid > 0:
            signal_process(pid, since, *signals)
            continue
        for number in signals:
            with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS: EPERM if all are zombies
                os.killpg(group, number)
    asked |= who


def end(find: Callable[[Table], Iterable[int]], patience: float, group: int = 0) -> None:
    """End processes, and those that they start meanwhile: TERM, patience, KILL. Returns when none is left.

    :param find: chooses them from all that run; is asked again and again
    :param patience: seconds until KILL; what is not gone as long after that cannot be ended
    :param group: a process group that they may be in, whose number is pinned
    """
    kill_deadline = time.monotonic() + patience
    asked: set[tuple[int, int]] = set()
    while True:
        rows = table()
        left = list(find(rows))
        now = time.monotonic()
        if not left or now > kill_deadline + patience:
            return
        press(left, rows, asked, group, kill=now >= kill_deadline)
        time.sleep(0.05)
