"""What a server starts, and what leaves its process group: it ends with the server, however that ends."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import apps
from beds import Machine, until
from bokeh_ssh._core.events import ServerExited, ServerResponsive, ServerUnresponsive
from bokeh_ssh._remote import process_tree
from connections import end, there
from counting import tunnel_with_events
from processes import kill

if os.name != "posix":
    pytest.skip("the remote side is a POSIX system", allow_module_level=True)

from bokeh_ssh._server.registry import list_servers, stop_server
from local_runner import FAKE, Bench, Held, alive, kinds, processes, pythons

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux lets orphans be adopted")

_LOOP = 'while :; do sleep 1; done # "$0"'
_DAEMON = """
import os, sys
if os.fork():
    os._exit(0)
os.setsid()
if os.fork():
    os._exit(0)
os.chdir("/")
os.execv("/bin/sh", ["sh", "-c", *sys.argv[1:]])
"""
#: How programs leave the group that they were started in; MARK and LOOP are put in.
_WAYS = {
    "setsid": "setsid sh -c LOOP MARK &",
    "session": 'PYTHON -S -c \'import subprocess, sys; subprocess.Popen(["sh", "-c", *sys.argv[1:]],'
    " start_new_session=True)' LOOP MARK",
    "group": 'PYTHON -S -c \'import os, sys; os.setpgid(0, 0); os.execv("/bin/sh", ["sh", "-c",'
    " *sys.argv[1:]])' LOOP MARK &",
    "daemon": "PYTHON -S DAEMON LOOP MARK",
    "nohup": "nohup setsid sh -c LOOP MARK >/dev/null 2>&1 &",
    "bare": "env -i /usr/bin/setsid /bin/sh -c LOOP MARK </dev/null >/dev/null 2>&1 &",
    "stopped": "setsid sh -c 'kill -STOP $$; '\"LOOP\" MARK &",
}
#: A command that leaves something in its group, and fails as an old Bokeh does, until it is given a port.
_KNOWS_NO_SOCKETS = """#!/bin/sh
case " $* " in *" --unix-socket "*)
  sh -c 'trap "" TERM; : >{left}; {loop}' &
  while [ ! -e {left} ]; do sleep 0.05; done
  echo "bokeh: error: unrecognized arguments: --unix-socket /x" >&2
  exit 2
esac
exec "$@"
"""
#: Goes on without its first thread, and holds a file locked for as long.
_HEADLESS = """
import ctypes, fcntl, os, sys, threading, time
lock = open(sys.argv[1])
fcntl.flock(lock, fcntl.LOCK_SH)
threading.Thread(target=time.sleep, args=(600,)).start()
os.close(3)
ctypes.CDLL(None).pthread_exit(None)
"""
_DEAF = "setsid sh -c \"trap '' TERM; LOOP\" MARK &"


def escaped(bench: Bench, mark: str, *ways: str, **launch: object) -> Held:
    """Start a server that starts programs which leave its group, each in one of these ways."""
    daemon = bench.script("daemon.py", _DAEMON)
    lines = ["#!/bin/sh"]
    for number, way in enumerate(ways or _WAYS.values()):
        quoted = "'" + _LOOP + "'"
        inner = _LOOP.replace('"', '\\"').replace("$", "\\$")
        line = way.replace('"LOOP"', f'"{inner}"').replace("; LOOP", f"; {inner}").replace("LOOP", quoted)
        line = line.replace("PYTHON", sys.executable).replace("DAEMON", daemon)
        lines.append(line.replace("MARK", f"{mark}-{number}"))
    wrapper = bench.script("wrapper", "\n".join([*lines, 'exec "$@"', ""]))
    runner = bench.runner(**launch.pop("runs_in", {}))  # type: ignore[arg-type]
    env = {"FAKE": "", "FAKE_MARK": mark, "FAKE_GO": str(bench.path / "go")}
    server = bench.start(runner, command=(wrapper, *FAKE), env=env, **launch)
    held = Held.__new__(Held)
    held.mark, held.bench, held.server, held.session = mark, bench, server, runner.sessions[-1]
    held.go, held.supervisor = bench.path / "go", held.heard("started")[-1]["supervisor"]
    count = len(lines) - 1
    until(lambda: len(processes(mark)) >= count, what="all of them to run")
    return held


@pytest.fixture
def bystander(mark: str) -> Iterator[subprocess.Popen[bytes]]:
    """A program that looks like the others, and that nobody but the test has started."""
    with subprocess.Popen(["sh", "-c", _LOOP, f"by-{mark}"], start_new_session=True) as popen:
        yield popen
        assert popen.poll() is None, "what is not ours was ended"
        os.killpg(popen.pid, signal.SIGKILL)


def strays(mark: str, bystander: subprocess.Popen[bytes]) -> set[int]:
    """List those of the server's programs that run."""
    rows = {pid: process_tree.read_process(pid) for pid in processes(mark)}
    return {pid for pid, row in rows.items() if row and row[1] != bystander.pid}


@contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """See that something does not take longer."""
    began = time.monotonic()
    yield
    assert time.monotonic() - began < seconds


def beginning(bench: Bench, text: str) -> dict[str, str]:
    """Have Pythons begin with a text: from a directory that is neither the home nor the current one."""
    folder = bench.path / "begins"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(text)
    return {"PYTHONPATH": str(folder)}


def test_all_that_left_the_group_ends_with_stop(
    bench: Bench, mark: str, bystander: subprocess.Popen[bytes]
) -> None:
    """In whichever way they left, they are ended, TERM first; what else runs is not."""
    held = escaped(bench, mark)
    group = process_tree.members(os.getpgid(held.server.pid), process_tree.table())
    assert len(strays(mark, bystander) - group) >= len(_WAYS)  # the control: none is a member
    with deadline(30):
        assert held.server.stop() is True
        assert strays(mark, bystander) == set()  # and it has said so only then
    assert held.session.process.wait(20) == 0


def test_the_oldest_python_ends_them_too(bench: Bench, mark: str, bystander: subprocess.Popen[bytes]) -> None:
    """Python 3.8, which knows no pidfd, adopts and ends what left the group."""
    found = pythons("3.8")
    if not found:
        pytest.skip("there is no Python 3.8 here")
    held = escaped(bench, mark, _WAYS["setsid"], _WAYS["daemon"], python=found[0])
    assert held.server.stop() is True
    assert strays(mark, bystander) == set()


def test_what_ignores_term_is_killed(bench: Bench, mark: str, bystander: subprocess.Popen[bytes]) -> None:
    """A program in a session of its own that does not listen ends with the patience that a server has."""
    held = escaped(bench, mark, _DEAF)
    began = time.monotonic()
    assert held.server.stop(timeout=10) is True
    assert 2 < time.monotonic() - began < 11
    assert strays(mark, bystander) == set()


def test_program_whose_first_thread_has_ended_is_ended(bench: Bench) -> None:
    """The system shows it as a zombie, though its other threads go on."""
    lock = bench.path / "lock"
    lock.touch()
    program = bench.script("headless.py", _HEADLESS)
    line = f"{{ setsid {sys.executable} -S {program} {lock} 3>&1 >/dev/null & }} | cat"  # until 3 is closed
    wrapper = bench.script("wrapper", f'#!/bin/sh\n{line}\nexec "$@"\n')
    server = bench.start(command=(wrapper, *FAKE), env={"FAKE": ""})
    with lock.open() as file:
        with pytest.raises(BlockingIOError):  # the control
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert server.stop() is True
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_who_is_started_while_we_look_is_seen(mark: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that starts another one, and ends, between two looks of ours does not hide that."""
    look, line = process_tree.read_process, f"read go; sh -c '{_LOOP}' {mark} >/dev/null & echo $!"
    with subprocess.Popen(["sh", "-c", line], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as popen:

        def late(pid: int) -> process_tree.Row | None:
            if pid == popen.pid and popen.poll() is None:
                assert popen.stdin
                popen.stdin.write(b"\n")
                popen.stdin.close()
                popen.wait(20)
            return look(pid)

        monkeypatch.setattr(process_tree, "read_process", late)
        rows = process_tree.table()
        assert popen.stdout
        started = int(popen.stdout.read())
    os.kill(started, signal.SIGKILL)
    assert popen.pid not in rows
    assert started in rows
    assert rows[started][0] != popen.pid


@pytest.mark.parametrize("how", ["grace", "exits", "killed", "supervisor", "guardian first"])
def test_all_of_it_ends_however_the_server_does(
    bench: Bench, mark: str, how: str, bystander: subprocess.Popen[bytes]
) -> None:
    """When the grace time is over; with the server itself; with who watches over it killed."""
    held = escaped(bench, mark, grace=0.5 if how == "grace" else 600)
    first, bare = held.guardian, how == "guardian first"
    if how == "grace":
        held.session.vanish()
    elif how in ("exits", "killed"):
        os.kill(held.server.pid, signal.SIGTERM if how == "exits" else signal.SIGKILL)
    elif bare:  # what no parent of ours has, and who has no environment either, nobody knows
        os.kill(first, signal.SIGKILL)
        known = {held.session.process.pid, held.supervisor, first}
        until(lambda: processes(held.server._nonce) - known, what="another one")
    if how == "supervisor" or bare:
        os.kill(held.supervisor, signal.SIGKILL)
    until(lambda: len(strays(mark, bystander)) <= bare, what="they are gone")
    until(lambda: not held.alive(), what="the server is gone")
    assert held.session.process.wait(20) is not None
    kill(strays(mark, bystander))


@pytest.mark.parametrize("lacks", ["guardian", "guardian for a while", "waitid"])
def test_what_becomes_of_it_is_told_all_the_same(
    bench: Bench, mark: str, lacks: str, bystander: subprocess.Popen[bytes]
) -> None:
    """Without its parent, or where that is stopped; and where Python leaves no child that ended unreaped."""
    begins = "import os; del os.waitid" if lacks == "waitid" else ""
    held = escaped(bench, mark, runs_in=beginning(bench, begins))
    if lacks == "guardian":
        os.kill(held.guardian, signal.SIGKILL)
        until(lambda: held.guardian == held.supervisor, what="the supervisor to adopt it")
    elif lacks == "guardian for a while":
        os.kill(held.guardian, signal.SIGSTOP)
    os.kill(held.server.pid, signal.SIGSTOP)
    until(lambda: kinds(bench, ServerUnresponsive), what="it is told")
    os.kill(held.server.pid, signal.SIGCONT)
    until(lambda: kinds(bench, ServerResponsive), what="it is told")
    assert len(strays(mark, bystander)) >= len(_WAYS)
    os.kill(held.server.pid, signal.SIGKILL)
    until(lambda: kinds(bench, ServerExited), what="it is told")
    assert held.server.exit_status == -signal.SIGKILL
    until(lambda: not strays(mark, bystander), what="they are gone")


def test_number_of_the_group_stays_taken(bench: Bench, mark: str) -> None:
    """A server that has ended keeps its number, which is its group's, until that is empty."""
    held = Held(bench, mark, "child deaf")
    guardian = held.guardian
    os.kill(held.server.pid, signal.SIGKILL)
    until(lambda: kinds(bench, ServerExited), what="it is told")
    [deaf] = held.grandchildren()  # it has five seconds
    row = process_tree.read_process(held.server.pid)
    assert row
    assert (row[0], row[2]) == (guardian, "Z")
    os.kill(deaf, signal.SIGKILL)
    held.check_gone()
    assert process_tree.read_process(held.server.pid) is None


@pytest.mark.parametrize("looks", ["ls", "stop", "launch"])
def test_server_that_nobody_holds_ends_when_somebody_looks(
    bench: Bench, mark: str, looks: str, bystander: subprocess.Popen[bytes]
) -> None:
    """Where all that watch over a server are killed at once it runs on, until the account's next look."""
    held = escaped(bench, mark, _WAYS["setsid"], _WAYS["daemon"], grace=600)
    name = held.server.server_ref.id
    held.kill_holders()
    assert held.alive()  # the control
    assert len(strays(mark, bystander)) >= 2
    if looks == "ls":
        assert [server.id for server in list_servers(bench.runner())] == []
    elif looks == "stop":
        stop_server(bench.runner(), name)
    else:
        bench.start(command=FAKE, env={"FAKE": ""})
    if looks != "launch":
        assert not held.alive()  # it is over when they say so
    until(lambda: not held.alive() and not strays(mark, bystander), what="it has ended")
    place = Path(os.environ["BOKEH_SSH_DIR"], name)
    until(lambda: not place.exists(), what="its place is gone")


def test_server_whose_holders_are_killed_ends_where_the_anchor_is_left(
    bench: Bench, mark: str, bystander: subprocess.Popen[bytes]
) -> None:
    """What the SSH server executed waits for the guardian, and then ends what that has not."""
    runs_in = beginning(
        bench, "import time; wait = time.sleep; time.sleep = lambda seconds: wait(seconds / 10)"
    )
    held = escaped(bench, mark, _WAYS["setsid"], _WAYS["daemon"], grace=600, runs_in=runs_in)
    held.kill_holders()
    until(lambda: not held.alive() and not strays(mark, bystander), what="it has ended")
    until(lambda: not any(Path(os.environ["BOKEH_SSH_DIR"]).glob("*")), what="its place is gone")


def test_what_setup_leaves_running_is_its_own(bench: Bench, mark: str) -> None:
    """A program older than the supervisor, as ``setup`` may start one, is not ended with the server."""
    line = f"sh -c '{_LOOP}' {mark} >/dev/null 2>&1 3>&- 4>&- &"
    server = bench.start(command=FAKE, setup=line, env={"FAKE": ""})
    until(lambda: processes(mark), what="it to run")
    assert server.stop() is True
    [pid] = processes(mark)
    os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("how", ["stop", "exits", "supervisor", "guardian"])
def test_without_ctypes_the_group_ends_all_the_same(bench: Bench, mark: str, how: str) -> None:
    """Where orphans cannot be adopted, what is in the group ends, and what left it stays, as is said."""
    runs_in = beginning(bench, "import sys; sys.modules['ctypes'] = None")
    held = escaped(bench, mark, _WAYS["setsid"], f"sh -c LOOP in-{mark} &", runs_in=runs_in)
    if how == "stop":
        assert held.server.stop() is True
    else:
        others = {"exits": held.server.pid, "supervisor": held.supervisor, "guardian": held.guardian}
        os.kill(others[how], signal.SIGKILL)
    stay = 0 if how == "supervisor" else 1  # then all that has our mark is looked for
    until(lambda: not held.alive() and len(processes(mark)) <= stay, what="the group has ended")
    assert held.session.process.wait(20) is not None
    left = processes(mark)
    assert len(left) == stay
    kill(left)


@pytest.mark.parametrize(
    "begins", ["", "import sys; sys.modules['ctypes'] = None"], ids=["ctypes", "no ctypes"]
)
def test_attempt_that_failed_leaves_nothing(bench: Bench, mark: str, begins: str) -> None:
    """What one has left that knew no sockets has ended before another is started, with a port."""
    left = bench.path / "left"
    text = _KNOWS_NO_SOCKETS.format(loop=_LOOP.replace('"$0"', mark), left=left)
    runner = bench.runner(**beginning(bench, begins))
    server = bench.start(
        runner, command=(bench.script("wrapper", text), *FAKE), env={"FAKE": ""}, socket=True
    )
    assert server.no_socket
    assert left.exists()  # the control: it ran
    assert processes(mark) == set()


def test_number_that_another_process_has_is_left_alone(mark: str) -> None:
    """A process that was seen is not sent a signal once its number is another's."""
    with subprocess.Popen(["sh", "-c", _LOOP, mark]) as popen:
        row = process_tree.read_process(popen.pid)
        assert row
        process_tree.signal_process(popen.pid, row[3] - 1, signal.SIGKILL)
        assert alive(popen.pid)
        process_tree.signal_process(popen.pid, row[3], signal.SIGKILL)  # the control
        assert popen.wait(20) == -signal.SIGKILL


#: An app that starts a program in a session of its own.
_STARTS = """
import subprocess
from bokeh.io import curdoc
from bokeh.models import Div
subprocess.Popen(["sh", "-c", 'while :; do sleep 1; done # "$0"', {mark!r}], start_new_session=True)
curdoc().add_root(Div(text="started"))
"""


@pytest.fixture
def real(request: pytest.FixtureRequest, docker_engine: object) -> Machine:
    """A real sshd, in a container of this test's own."""
    container: Callable[[], Machine] = request.getfixturevalue("container")
    return container()


def test_what_an_app_starts_ends_with_its_tunnel(real: Machine, mark: str) -> None:
    """Through a real sshd: with the tunnel; and of a server that is left running, when it is stopped."""
    app = apps.put(real, "starts.py", _STARTS.format(mark=mark))

    def runs() -> bool:
        return mark in str(real.execute(["ps", "-A", "-ww", "-o", "args="]))

    with tunnel_with_events(real, app, [], isolate=False) as tunnel:
        apps.get(tunnel.url)
        until(runs, what="it to run")
    assert not runs()
    with tunnel_with_events(real, app, [], isolate=False, detach=True) as tunnel:
        apps.get(tunnel.url)
        name = tunnel.server
        assert name
    assert runs()
    assert [server.id for server in there(real)] == [name]
    end(real, name)
    assert not runs()
