"""Keep both forwards busy for minutes, and compare what they hold afterwards with what they held before."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import beds
from soak.churn import KINDS, Churn

_TESTS = Path(__file__).resolve().parent.parent
#: Bytes after which each side asks for new keys; the least that sshd takes is 1 MiB in its own config.
_REKEY = 1 << 20
#: kB by which the resident memory may differ: an allocator keeps what it had at its busiest.
_SLACK = 6 * 1024
#: The part of the time after which caches and pools are as large as they get.
_WARM = 0.25

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Holding:
    """What a process holds.

    :param memory: resident, in kB
    """

    threads: int
    files: int
    memory: int


def look(pid: int) -> Holding:
    """Look at a process (Linux only: ``/proc``)."""
    place = Path("/proc", str(pid))
    lines = (line.split() for line in (place / "status").read_text(encoding="ascii").splitlines())
    found = {words[0]: words[1] for words in lines if len(words) > 1}
    return Holding(int(found["Threads:"]), sum(1 for _ in (place / "fd").iterdir()), int(found["VmRSS:"]))


def growth(before: Holding, after: Holding) -> list[str]:
    """Tell what has grown, in words; nothing if it is flat."""
    found = []
    if after.threads > before.threads:
        found.append(f"{after.threads - before.threads} threads more")
    if after.files > before.files:
        found.append(f"{after.files - before.files} descriptors more")
    if after.memory > before.memory + _SLACK:
        found.append(f"{after.memory - before.memory} kB more")
    return found


class SoakError(AssertionError):
    """It did not hold."""


class Watched:
    """A process that says and is told things in lines of JSON."""

    def __init__(self, words: Sequence[str], directory: Path) -> None:
        self._log = (directory / "soak.log").open("ab")
        self._process = subprocess.Popen(
            [sys.executable, *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=os.environ | {"PYTHONPATH": os.pathsep.join((str(_TESTS), *filter(None, sys.path)))},
            text=True,
        )
        self.pid = self._process.pid

    def ask(self, text: str = "") -> Any:
        """Say a line, if there is one to say, and read the answer."""
        assert self._process.stdin
        assert self._process.stdout
        if text:
            self._process.stdin.write(text + "\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            msg = (
                f"it has ended: {Path(self._log.name).read_text(encoding='utf-8', errors='replace')[-2000:]}"
            )
            raise SoakError(msg)
        return json.loads(line)

    def end(self) -> None:
        """Have it end by itself."""
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._log.close()


@contextmanager
def watched(words: Sequence[str], directory: Path) -> Iterator[Watched]:
    process = Watched(words, directory)
    try:
        yield process
    finally:
        process.end()


@contextmanager
def _target(directory: Path) -> Iterator[int]:
    """Run the target of the conformance suite in a process of its own; gives its port."""
    with subprocess.Popen(
        [sys.executable, str(_TESTS / "support" / "conformance.py"), "serve"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,  # it tells of each connection that was broken off
        text=True,
    ) as process:
        assert process.stdout
        try:
            yield int(process.stdout.readline())
        finally:
            process.kill()


def _settled(pid: int, before: Holding) -> Holding:
    """Look once all connections have gone, or after long enough for that."""
    try:
        beds.until(lambda: look(pid).files <= before.files, timeout=20)
    except AssertionError:
        pass  # that is what the comparison tells
    return look(pid)


def soak(machine: beds.Machine, seconds: float, directory: Path, tell: Tell) -> Counter[tuple[str, int]]:
    """Churn for so long; gives what was done.

    :raises SoakError: if a byte was wrong, a connection hung, keys were not changed, or something has grown
    """
    order = {"host": machine.host, "user": machine.user, "rekey": _REKEY, "login": machine.login}
    order["login"] = {name: _plain(value) for name, value in machine.login.items()}
    with _target(directory) as port, watched(["-m", "soak.forwards"], directory) as forwards:
        ports = forwards.ask(json.dumps(order | {"target": port}))["ports"]
        done: Counter[tuple[str, int]] = Counter()
        begun = look(forwards.pid)
        _churn(ports, seconds * _WARM, done, tell)
        before = _settled(forwards.pid, begun)
        tell(f"warm: {before}")
        _churn(ports, seconds * (1 - _WARM), done, tell)
        after = _settled(forwards.pid, before)
        said = forwards.ask("keys")
        tell(f"at the end: {after}; keys changed {said['keys']} times; {done.total()} connections")
        if said["states"] != ["ready", "ready"]:
            msg = f"the forwards are {said['states']}"
            raise SoakError(msg)
        if said["keys"] <= 2 + 2 * seconds * 0.1:
            msg = f"keys were changed {said['keys']} times only"
            raise SoakError(msg)
        if grown := growth(before, after) + growth(
            Holding(begun.threads, begun.files, after.memory),
            Holding(after.threads, after.files, after.memory),
        ):
            raise SoakError(", ".join(grown))
    return done


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def _churn(ports: list[int], seconds: float, done: Counter[tuple[str, int]], tell: Tell) -> None:
    end = time.monotonic() + seconds
    pause = threading.Event()
    with Churn(ports) as churn:
        while not churn.errors and (left := end - time.monotonic()) > 0:
            pause.wait(min(left, 0.5))
    done.update(churn.done)
    if churn.errors:
        msg = f"{type(churn.errors[0]).__name__}: {churn.errors[0]}"
        raise SoakError(msg) from churn.errors[0]


def main(argv: Sequence[str] | None = None) -> int:
    """Run it from the command line."""
    parser = argparse.ArgumentParser(prog="nox -s soak --", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10, help="how long (default: 10)")
    options = parser.parse_args(argv)

    def tell(line: str) -> None:
        print(line, flush=True)

    with tempfile.TemporaryDirectory(prefix="soak-") as name:
        directory = Path(name)
        with beds.local_sshd(beds.Key.generate(), directory, {"RekeyLimit": str(_REKEY)}) as machine:
            try:
                done = soak(machine, options.minutes * 60, directory, tell)
            except SoakError as exc:
                tell(f"FAILED: {exc}")
                return 1
    for kind in KINDS:
        tell(f"{kind.__name__:15} {sum(n for (what, _), n in done.items() if what == kind.__name__):7}")
    tell("flat: no thread, descriptor or memory more than before")
    return 0
