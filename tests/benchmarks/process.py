"""Processes that say and are told things in lines of JSON, and what a process has cost."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import bokeh_ssh

_TESTS = Path(__file__).resolve().parent.parent
_PROC = Path("/proc")
_TICKS = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100


class PeerError(Exception):
    """A peer, or what drives it, did not do what it was there for; the text fits into a table."""


def environment() -> dict[str, str]:
    """Give the environment in which the same bokeh_ssh is found, and no agent or setting of the user's."""
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("SSH_", "BOKEH_", "PYTHON"))
    }
    places = [str(_TESTS), str(_TESTS / "support"), str(Path(bokeh_ssh.__file__).resolve().parent.parent)]
    return kept | {"PYTHONPATH": os.pathsep.join(places)}


class Child:
    """A Python process that runs a module of this package; its ``with`` block ends it.

    :param module: its name in this package
    :param order: the JSON that it reads first
    :param within: the command that runs it elsewhere, such as in another network
    """

    def __init__(
        self, module: str, order: dict[str, Any], directory: Path, within: Sequence[str] = ()
    ) -> None:
        self._module = module
        self._log = (directory / f"{module}.log").open("a+", encoding="utf-8", errors="replace")
        self.process = subprocess.Popen(
            [*within, sys.executable, "-m", f"benchmarks.{module}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=environment(),
            cwd=directory,  # not where another bokeh_ssh could be found
            text=True,
            start_new_session=True,
        )
        self._said: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.tell(order)

    def _read(self) -> None:
        assert self.process.stdout
        with self.process.stdout as lines:
            for line in lines:
                self._said.put(line)
        self._said.put("")

    def tell(self, message: Any) -> None:
        """Send one line."""
        assert self.process.stdin
        try:
            self.process.stdin.write(json.dumps(message) + "\n")
            self.process.stdin.flush()
        except OSError as exc:
            raise PeerError(self._last_words()) from exc

    def hear(self, timeout: float) -> dict[str, Any]:
        """Read one line.

        :raises PeerError: if none comes within ``timeout`` seconds, or it says that something failed
        """
        try:
            line = self._said.get(timeout=timeout)
        except queue.Empty:
            msg = f"no answer in {timeout:g} s"
            raise PeerError(msg) from None
        if not line:
            raise PeerError(self._last_words())
        message: dict[str, Any] = json.loads(line)
        if "failed" in message:
            raise PeerError(message["failed"])
        return message

    def _last_words(self) -> str:
        self._log.flush()
        text = Path(self._log.name).read_text(encoding="utf-8", errors="replace").strip()
        return text.splitlines()[-1][:200] if text else f"{self._module} ended"

    def __enter__(self) -> Child:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        assert self.process.stdin
        try:
            self.process.stdin.close()  # the order to end
        except OSError:
            pass  # it has ended
        try:
            self.process.wait(0.2 if kind else 15)
        except subprocess.TimeoutExpired:
            _end_group(self.process)
        self._reader.join(5)
        self._log.close()


def _end_group(process: subprocess.Popen[str]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)  # it leads a session of its own, so these are all its own
            process.wait(3)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def tree(roots: Iterable[int]) -> list[int]:
    """List processes and their descendants; only the roots where there is no ``/proc``."""
    below: dict[int, list[int]] = {}
    for path in _PROC.glob("[0-9]*/stat"):
        try:
            below.setdefault(int(_fields(int(path.parent.name))[1]), []).append(int(path.parent.name))
        except OSError:
            continue  # it has ended meanwhile
    found = list(roots)
    for pid in found:
        found += below.get(pid, [])
    return found


def _fields(pid: int) -> list[str]:
    """Read ``/proc/PID/stat`` from the state on: the name before it may have spaces."""
    return (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()


def cpu(roots: Iterable[int]) -> float:
    """Tell the processor time that processes and their descendants have used, in seconds."""
    ticks = 0
    for pid in tree(roots):
        try:
            ticks += sum(map(int, _fields(pid)[11:13]))
        except OSError:
            continue
    return ticks / _TICKS


def status(roots: Iterable[int], name: str) -> int:
    """Add up a line of ``/proc/PID/status`` (VmHWM, VmRSS in kB; Threads) over processes and descendants."""
    total = 0
    for pid in tree(roots):
        try:
            lines = (_PROC / str(pid) / "status").read_text().splitlines()
        except OSError:
            continue
        total += sum(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))
    return total
