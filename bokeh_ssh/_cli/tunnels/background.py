"""A command that goes to the background once its tunnel is open, as ``ssh -f`` does.

It forks before anything is opened: the child has the terminal until then, and can ask; the parent waits, and
ends with what became of that. So a shell goes on once it is open, or has the exit code of its failure.
"""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from bokeh_ssh._cli.tunnels.registry import is_alive
from bokeh_ssh._core.errors import UsageError
from bokeh_ssh._core.this_machine.home import find_home

if TYPE_CHECKING:
    from types import FrameType

#: Bytes of a log, after which a new one is begun; the one before is kept.
_LONGEST = 4_000_000
#: Seconds for which the log of a process that has ended is kept.
_KEPT = 14 * 86400.0


class Leave:
    """The child's end: what lets go of the terminal, and lets the parent end; made by :func:`fork`.

    :ivar path: the log
    """

    def __init__(self, told: int, file: LogFile) -> None:
        self._told = told
        self._file = file
        self.path = file.path

    def finish(self) -> None:
        """Let go of the terminal; from here on all goes to the log."""
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os.setsid()
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 0)
        os.close(null)
        self._file.take_over()
        with contextlib.suppress(OSError):
            os.write(self._told, b"!")
        os.close(self._told)

    def give_up(self) -> None:
        """Leave no log behind, where nothing was opened."""
        with contextlib.suppress(OSError):
            self.path.unlink()


class LogFile(io.TextIOBase):
    """A log that only this account may read, with the time of each line, of a bounded length.

    :raises OSError: if it cannot be made
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.RLock()
        self._begins = True
        self._file = self._open()
        self._taken = False

    def _open(self) -> int:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
        return os.open(self.path, flags, 0o600)

    def take_over(self) -> None:
        """Be standard output and error, of this process and of those that it starts."""
        sys.stdout = sys.stderr = self
        self._taken = True
        self._redirect()

    def _redirect(self) -> None:
        if self._taken:
            for number in (1, 2):
                os.dup2(self._file, number)

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        with self._lock, contextlib.suppress(OSError):
            if os.fstat(self._file).st_size > _LONGEST:
                os.replace(self.path, f"{self.path}.1")  # noqa: PTH105 - a name, not a Path
                os.close(self._file)
                self._file = self._open()
                self._redirect()
            now = time.strftime("%Y-%m-%d %H:%M:%S ")
            lines = []
            for line in text.splitlines(keepends=True):
                lines.append(now + line if self._begins else line)
                self._begins = line.endswith("\n")
            os.write(self._file, "".join(lines).encode("utf-8", "backslashreplace"))
        return len(text)


def fork() -> Leave:
    """Go on in a child process; the parent waits until :meth:`Leave.finish`, or for its end, and exits.

    :raises UsageError: if this system has no processes of that kind, or no log can be made
    """
    if not hasattr(os, "fork"):
        msg = "this system cannot send a program to the background"
        raise UsageError(msg, hint="leave out --background, and leave the window open")
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    ready_recv, ready_send = os.pipe()
    pid = os.fork()
    if pid:
        os.close(ready_send)
        _wait(pid, ready_recv)
    os.close(ready_recv)
    try:
        folder = _make_folder()
        file = LogFile(folder / f"{os.getpid()}.log")
    except OSError as exc:
        msg = f"the log of a tunnel in the background cannot be written ({exc})"
        raise UsageError(msg, hint="set XDG_STATE_HOME to a folder of yours") from exc
    return Leave(ready_send, file)


def _wait(pid: int, ready: int) -> NoReturn:
    """Wait until the child is in the background, or has ended; exit as it did."""

    def pass_on(number: int, frame: FrameType | None) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to the child too
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, pass_on)
    if os.read(ready, 1):
        raise SystemExit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    raise SystemExit(code if code >= 0 else 128 - code)


def _make_folder() -> Path:
    """Make the folder of logs, and remove what is old."""
    base = os.environ.get("XDG_STATE_HOME", "")
    home = find_home()
    if not base.startswith("/"):
        if home is None:
            msg = "this account has no home directory"
            raise OSError(msg)
        base = str(home / ".local" / "state")
    folder = Path(base, "bokeh-ssh")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for path in folder.glob("*.log*"):
        with contextlib.suppress(OSError, ValueError):
            if time.time() - path.lstat().st_mtime > _KEPT and not is_alive(int(path.name.partition(".")[0])):
                path.unlink()
    return folder
