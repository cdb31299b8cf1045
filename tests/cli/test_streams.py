"""Standard output and error that are closed or full, or that nobody reads."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from processes import proc

if os.name != "posix":
    pytest.skip("redirections of POSIX", allow_module_level=True)

import fcntl
import termios

from beds import Machine, until
from programs import CLI, Program, login

#: How a stream is spoilt, in the words of a shell, and what is said about it.
SPOILT = {
    "closed": (">&-", "Bad file descriptor"),
    "full": ("> /dev/full", "No space left on device"),
    "left": ("", ""),  # a pipe without a reader
}


@pytest.fixture
def machine(light: Callable[..., Machine]) -> Machine:
    """A machine with a stand-in for Bokeh."""
    return light()


@pytest.fixture
def app(tmp_path: Path) -> str:
    """An app that writes a lot into its log when it is asked for a page."""
    path = tmp_path / "sliders.py"
    path.write_text("for _ in range(3000): print('x' * 100, flush=True)\n")
    return str(path)


def run(*words: str, spoilt: str = "", timeout: float = 60) -> subprocess.CompletedProcess[str]:
    """Run the command line from a shell, with a redirection."""
    argv = ["sh", "-c", f'exec "$@" {spoilt}', "sh", *CLI, *words]
    return subprocess.run(
        argv,
        capture_output=True,
        text=True,
        timeout=timeout,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )


@pytest.mark.parametrize("words", ["--version", "--help", "ls --help", "ls --json it --bad"])
def test_output_that_is_not_taken_is_an_error(words: str) -> None:
    """Whatever could not be said on standard output makes for an exit status, and one line with the reason,
    never a traceback; without a reader there is nothing to say."""
    pieces = words.split()
    usage = "--bad" in pieces
    for how, (redirection, said) in SPOILT.items():
        done = run_to_nobody(*pieces) if how == "left" else run(*pieces, spoilt=redirection)
        assert done.returncode == (2 if usage else 1), (how, done)
        told = [f"bokeh-ssh: standard output cannot be written to ({said})"]
        assert done.stderr.splitlines() == told * bool(said)
    control = run(*pieces)
    assert control.returncode == (2 if usage else 0), control
    assert control.stdout


def run_to_nobody(*words: str) -> subprocess.CompletedProcess[str]:
    """Run the command line with a standard output whose reader has left."""
    ear, mouth = os.pipe()
    os.close(ear)
    try:
        return subprocess.run(
            [*CLI, *words],
            stdout=mouth,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            stdin=subprocess.DEVNULL,
        )
    finally:
        os.close(mouth)


@pytest.mark.parametrize("how", ["2>&-", "2> /dev/full", "2> /dev/full <&-"])
def test_error_output_that_is_not_taken_is_nothing(how: str) -> None:
    """Without a standard error all is as usual: the exit status, and standard output."""
    done = run("--version", spoilt=how)
    assert (done.returncode, done.stdout.split()[0]) == (0, "bokeh-ssh")
    assert run("ls", "--nonsense", spoilt=how).returncode == 2
    assert run("ls", "--port", "1", "127.0.0.1", "--json", spoilt=how).returncode == 1


@pytest.mark.parametrize("how", SPOILT)
def test_tunnel_that_cannot_be_announced_is_closed(machine: Machine, app: str, how: str) -> None:
    """A tunnel whose address nobody can be told ends at once and tidily: its server too."""
    words = ["direct", machine.host, app, "--local-port", "0", *login(machine)]
    redirection, said = SPOILT[how]
    done = run_to_nobody(*words) if how == "left" else run(*words, spoilt=redirection)
    assert done.returncode == 1, done
    assert "Traceback" not in done.stderr
    if said:
        assert done.stderr.splitlines()[-1].endswith(f"cannot be written to ({said})")
    until(lambda: not machine.pids(app), what="the server to be gone")


def test_reader_that_leaves_ends_a_tunnel(machine: Machine, app: str) -> None:
    """A reader of --json that leaves once it has what it wants ends the tunnel at the next event, tidily."""
    words = [*CLI, "direct", machine.host, app, "--local-port", "0", "--json", "--log", *login(machine)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stderr
        try:
            url = ""
            while '"opened"' not in url:
                url = process.stdout.readline()
            process.stdout.close()
            load(json.loads(url)["addresses"][0])
            assert process.wait(30) == 1
            assert process.stderr.read() == ""
        finally:
            process.kill()
    until(lambda: not machine.pids(app), what="the server to be gone")


def test_tunnel_without_error_output_works(machine: Machine, app: str) -> None:
    """A tunnel whose standard error is full works all the same, and Ctrl-C ends it with 0."""
    words = ["direct", machine.host, app, "--local-port", "0", *login(machine)]
    with Program(argv=["sh", "-c", 'exec "$@" 2> /dev/full', "sh", *CLI, *words]) as program:
        with urllib.request.urlopen(program.address()) as page:
            assert b"Bokeh" in page.read()
        program.interrupt()
        assert program.end() == 0, program


@pytest.mark.parametrize("json_", [False, True])
def test_first_interrupt_counts_where_nobody_reads(machine: Machine, app: str, json_: bool) -> None:
    """With --log into a pipe that nobody reads and that is full, the first Ctrl-C closes everything."""
    ear, mouth = os.pipe()
    words = [*CLI, "direct", machine.host, app, "--local-port", "0", "--log", *login(machine)]
    streams = {"stdout": mouth} if json_ else {"stdout": subprocess.PIPE, "stderr": mouth}
    with subprocess.Popen([*words, *["--json"] * json_], start_new_session=True, **streams) as process:  # type: ignore[call-overload]
        os.close(mouth)
        try:
            failed = load(_opened(ear) if json_ else _address(process))
            until(lambda: failed or _waiting(ear) > 50_000, timeout=60, what="a pipe that is full")
            assert not failed
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == 0
        finally:
            process.kill()
            os.close(ear)
    until(lambda: not machine.pids(app), what="the server to be gone")


def test_first_interrupt_counts_where_a_terminal_takes_nothing(machine: Machine, app: str) -> None:
    """With --log onto a terminal that is full, the first Ctrl-C closes everything."""
    master, slave = pty.openpty()
    words = [*CLI, "direct", machine.host, app, "--local-port", "0", "--log", *login(machine)]
    env = os.environ | {"TERM": "xterm"}
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=slave, start_new_session=True, env=env
    ) as process:
        try:
            failed = load(_address(process))
            until(lambda: failed or _is_full(slave), timeout=60, what="a terminal that is full")
            assert not failed
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == 0
        finally:
            process.kill()
            os.close(master)
            os.close(slave)
    until(lambda: not machine.pids(app), what="the server to be gone")


@pytest.mark.parametrize("flag", ["-v", "-vv"])
def test_log_that_nobody_reads_holds_nobody_up(machine: Machine, app: str, flag: str) -> None:
    """With -v into a pipe that nobody reads and that is full, what comes in is led on or refused as ever,
    though that is logged; the first Ctrl-C closes everything."""
    ear, mouth = os.pipe()
    words = [*CLI, "direct", machine.host, app, "--local-port", "0", flag, *login(machine)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=mouth, start_new_session=True) as process:
        try:
            assert process.stdout
            url = process.stdout.readline().decode().strip()
            _fill(mouth)
            for _ in range(3):
                with pytest.raises(urllib.error.HTTPError, match="403") as caught:
                    urllib.request.urlopen(urllib.request.Request(url, headers={"Host": "evil.example"}))
                caught.value.close()
                with urllib.request.urlopen(url) as page:
                    assert b"Bokeh" in page.read()
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == 0
        finally:
            process.kill()
            os.close(ear)
            os.close(mouth)


def test_address_is_told_where_nobody_reads_the_rest(machine: Machine, app: str) -> None:
    """A standard error that is full from the beginning does not keep the address back."""
    ear, mouth = os.pipe()
    _fill(mouth)
    words = [*CLI, "direct", machine.host, app, "--local-port", "0", "--log", *login(machine)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=mouth, start_new_session=True) as process:
        try:
            assert process.stdout
            with urllib.request.urlopen(process.stdout.readline().decode().strip()) as page:
                assert b"Bokeh" in page.read()
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == 0
        finally:
            process.kill()
            os.close(ear)
            os.close(mouth)


#: A thread waits for a reader of standard error, and the main thread is about to say something too.
_BOTH = """
import signal, sys, threading
from bokeh_ssh._cli.std_streams import standing

with standing() as streams:
    write, waits = streams.write, threading.Event()

    def noted(descriptor, data):
        waits.set()
        return write(descriptor, data)

    streams.write = noted
    signal.signal(signal.SIGINT, lambda *_: streams.end_soon())
    threading.Thread(target=print, args=("thread",), kwargs={"file": sys.stderr}, daemon=True).start()
    waits.wait()
    print("main is next", flush=True)
    print("main", file=sys.stderr)
print("ended")
"""

#: A thread still has something to say when all else is over, as one that shows a long log does.
_LATE = """
import sys, threading
from bokeh_ssh._cli.std_streams import standing

again, more = threading.Event(), threading.Event()

def say():
    again.wait()
    for count in range(100_000):
        print("thread", file=sys.stderr)
        more.set()

threading.Thread(target=say, daemon=True).start()
with standing() as streams:
    streams.end_soon()
again.set()
more.wait(1)
"""


def test_thread_that_still_writes_does_not_hold_up_the_end() -> None:
    """A thread that is left with lines to show, into a pipe that nobody reads, holds up nobody."""
    ear, mouth = os.pipe()
    _fill(mouth)
    words = [sys.executable, "-c", _LATE]
    env = {
        name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"
    }  # as people have it
    with subprocess.Popen(words, stderr=mouth, start_new_session=True, env=env) as process:
        try:
            assert process.wait(30) == 0
        finally:
            process.kill()
            os.close(ear)
            os.close(mouth)


def test_interrupt_counts_where_two_wait_for_a_reader() -> None:
    """Ctrl-C is seen while the main thread waits for another one, which waits for somebody to read a pipe."""
    ear, mouth = os.pipe()
    _fill(mouth)
    words = [sys.executable, "-c", _BOTH]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=mouth, start_new_session=True) as process:
        try:
            assert process.stdout
            assert process.stdout.readline() == b"main is next\n"
            until(lambda: "S" in _state(process.pid), what="the main thread to wait")
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == 0
            assert process.stdout.read() == b"ended\n"
        finally:
            process.kill()
            os.close(ear)
            os.close(mouth)


def _state(pid: int) -> str:
    """Return what a process's main thread does, as a letter of the kernel's."""
    return proc(f"{pid}/task/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0]


def _fill(mouth: int) -> None:
    """Fill a pipe, for all who write to it."""
    os.set_blocking(mouth, False)
    with suppress(BlockingIOError):
        while True:
            os.write(mouth, bytes(select.PIPE_BUF))
    os.set_blocking(mouth, True)


def load(url: str) -> list[Exception]:
    """Load a page, which has its app write, on a thread: the tunnel may end meanwhile.

    :returns: gets why it could not be loaded, should that be so: then nothing is written
    """
    failed: list[Exception] = []

    def get() -> None:
        try:
            with urllib.request.urlopen(url, timeout=60) as page:
                page.read()
        except (OSError, ValueError) as exc:
            failed.append(exc)

    threading.Thread(target=get, daemon=True).start()
    return failed


def _address(process: subprocess.Popen[bytes]) -> str:
    """Read the address that it opens; it has none where it has failed."""
    assert process.stdout
    line = process.stdout.readline()
    assert line, f"no address: it ended with {process.wait(30)}"
    return line.decode().strip()


def _is_full(terminal: int) -> bool:
    """Tell whether a terminal takes nothing."""
    return not select.select([], [terminal], [], 0)[1]


def _opened(ear: int) -> str:
    """Read JSON lines until the one with the address."""
    read = b""
    while b'"opened"' not in read or not read.endswith(b"\n"):
        read += os.read(ear, 1)
    return str(json.loads(read.splitlines()[-1])["addresses"][0])


def _waiting(ear: int) -> int:
    """Tell how many bytes of a pipe nobody has read yet."""
    return int.from_bytes(fcntl.ioctl(ear, termios.FIONREAD, bytes(4)), sys.byteorder)
