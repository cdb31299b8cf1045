"""``isolate=True`` from wherever Python is written: each starts a child that is not the program again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from beds import Machine, until
from benchmarks.process import tree
from conformance import ask, read_exactly
from processes import proc
from targets import target_here

pytestmark = pytest.mark.every_python

#: What a person writes: no guard, and a line that tells how often it is run.
_PROGRAM = """
import json, os, sys
print("ran", flush=True)
from bokeh_ssh import LocalForward
words = json.loads(os.environ["WORDS"])
with LocalForward(words["host"], words["user"], remote_port=words["port"], remote_host="127.0.0.1",
                  isolate=True, **words["login"]) as forward:
    print(forward.local_port, flush=True)
    forward.wait()
"""
_CELL = """
import json, os
from bokeh_ssh import LocalForward
words = json.loads(os.environ["WORDS"])
forward = LocalForward(words["host"], words["user"], remote_port=words["port"], remote_host="127.0.0.1",
                       isolate=True, **words["login"]).open()
print(forward.local_port, os.getpid())
"""
_SPAWN = """
import multiprocessing
def work():
    exec(PROGRAM)
if __name__ == "__main__":
    process = multiprocessing.get_context({method!r}).Process(target=work)
    process.start()
    process.join()
"""


@pytest.fixture
def words(embedded: Callable[..., Machine]) -> Any:
    """What the program is told: where to log in, and the port of a target here."""
    machine = embedded()
    login = {name: str(value) if isinstance(value, Path) else value for name, value in machine.login.items()}
    with target_here() as port:
        yield {"host": machine.host, "user": machine.user, "port": port, "login": login}


def environment(words: dict[str, Any]) -> dict[str, str]:
    return {**os.environ, "WORDS": json.dumps(words), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def command(way: str, directory: Path) -> tuple[list[str], str | None]:
    """Give the command line, and what goes to standard input, for a way to run the program."""
    script = directory / "program.py"
    script.write_text(_PROGRAM, encoding="utf-8")
    spawn = directory / "spawn.py"
    if way == "script":
        return [str(script)], None
    if way == "-m":
        return ["-m", "program"], None
    if way == "-c":
        return ["-c", _PROGRAM], None
    if way == "standard input":
        return ["-"], _PROGRAM
    if way == "interactive":  # line by line: blocks end with an empty one
        return ["-i", "-q", "-c", "import sys; sys.ps1 = sys.ps2 = ''"], _PROGRAM + "\n"
    spawn.write_text(f"PROGRAM = {_PROGRAM!r}\n" + _SPAWN.format(method=way), encoding="utf-8")
    return [str(spawn)], None


#: How a program can come to run; the last three are of multiprocessing.
WAYS = ["script", "-m", "-c", "standard input", "interactive", "spawn", "forkserver", "fork"]


@pytest.mark.parametrize("way", WAYS)
def test_isolated_forward_works_from(way: str, words: dict[str, Any], tmp_path: Path) -> None:
    """The forward carries bytes, the program runs once, and the child goes with whoever opened it."""
    options, text = command(way, tmp_path)
    with (tmp_path / "stderr").open("wb") as stderr:
        process = subprocess.Popen(
            [sys.executable, *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            cwd=tmp_path,
            env=environment(words),
            start_new_session=True,
        )
    assert process.stdin
    assert process.stdout
    with process.stdin, process.stdout:
        if text:
            process.stdin.write(text)
            if way == "standard input":  # Python reads all of it before it begins
                process.stdin.close()
            else:
                process.stdin.flush()
        try:
            assert process.stdout.readline() == "ran\n", (tmp_path / "stderr").read_text()
            port = int(process.stdout.readline())
            check(port)
            [child] = holders(process.pid)
            os.kill(int(_stat(child)[1]), signal.SIGKILL)  # whoever opened it
            until(lambda: not _alive(child), what="the child to end")
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(30)
        assert process.stdout.read() == "", "the program was not run again"


def check(port: int) -> None:
    """See that bytes pass."""
    with ask(("127.0.0.1", port), "echo") as sock:
        sock.sendall(b"through")
        assert read_exactly(sock, 7) == b"through"


def holders(root: int) -> list[int]:
    """List the processes below one that hold a tunnel for it."""
    return [
        pid for pid in tree([root]) if b"bokeh_ssh._tunnels.child_main" in proc(f"{pid}/cmdline").read_bytes()
    ]


def _stat(pid: int) -> list[str]:
    text = proc(f"{pid}/stat").read_text(encoding="utf-8", errors="replace")
    return text.rpartition(")")[2].split()


def _alive(pid: int) -> bool:
    try:
        return _stat(pid)[0] != "Z"
    except OSError:
        return False


def test_isolated_forward_works_in_a_notebook(words: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A cell opens it; it works while the kernel computes and is interrupted, and ends with the kernel."""
    manager_of = pytest.importorskip("jupyter_client.manager")
    pytest.importorskip("ipykernel")
    for name, value in environment(words).items():
        monkeypatch.setenv(name, value)
    manager, client = manager_of.start_new_kernel(kernel_name="python3", startup_timeout=60)
    try:
        said: list[str] = []

        def hear(message: dict[str, Any]) -> None:
            said.append(message["content"].get("text", ""))

        reply = client.execute_interactive(_CELL, timeout=60, output_hook=hear)
        assert reply["content"]["status"] == "ok", reply
        port, kernel = map(int, "".join(said).split())
        [child] = holders(kernel)
        client.execute("print('computing', flush=True)\nwhile True: pass")
        until(lambda: "computing" in str(client.get_iopub_msg(timeout=10)["content"]), what="it to compute")
        check(port)
        manager.interrupt_kernel()
        until(
            lambda: "KeyboardInterrupt" in str(client.get_iopub_msg(timeout=10)["content"]),
            what="the interrupt",
        )
        check(port)  # the interrupt was the program's alone
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    until(lambda: not _alive(child), what="the child to end with its kernel")
