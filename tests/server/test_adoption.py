"""A client that was away and comes back, or another in its place: one server, never two, never lost."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from beds import Machine, until
from bokeh_ssh import Host
from bokeh_ssh._core.errors import (
    BokehSSHError,
    ConnectionLostError,
    LaunchTimeoutError,
    PythonNotFoundError,
    ServerExitedError,
    ServerGoneError,
    ServerNotFoundError,
    ServerTakenError,
)
from bokeh_ssh._core.events import Event, ServerExited, ServerTaken, ServerUnresponsive
from bokeh_ssh._remote import control_client, run_dir
from bokeh_ssh._server.local_runner import ShellRunner
from bokeh_ssh._server.payload import payload
from bokeh_ssh._server.server import Launch, Server, ServerRef
from bokeh_ssh._ssh.connect import connect
from skips import missing

if os.name != "posix":
    pytest.skip("the remote side is a POSIX system", allow_module_level=True)

from local_runner import FAKE, Bench, Held, kinds, processes, pythons


@pytest.fixture
def place() -> Path:
    """Where the servers of this test are found; nothing of it is left afterwards."""
    return Path(os.environ["BOKEH_SSH_DIR"])


def ticket_of(held: Held) -> ServerRef:
    ticket = held.server.server_ref
    assert ticket is not None
    return ticket


def adopt(bench: Bench, ticket: ServerRef, *, shell: str = "sh", **more: Any) -> Server:
    """Take a server over through a session of its own."""
    launch = more.pop("launch", None) or Launch(grace=600)
    server = Server.adopt(
        bench.runner(*shell.split()), ticket, launch=launch, on_event=bench.events.append, **more
    )
    bench.servers.append(server)
    return server


def refused(bench: Bench, kind: type[BokehSSHError], ticket: ServerRef, **more: Any) -> Any:
    """Try to take over what cannot be had: exactly ``kind``, and no session is left."""
    with pytest.raises(kind) as caught:
        adopt(bench, ticket, **more)
    assert type(caught.value) is kind
    assert caught.value.host == bench.runners[-1].name
    assert bench.runners[-1].sessions[-1].process.wait(20) is not None
    return caught.value


# --- coming back


@pytest.mark.parametrize("version", ["here", "3.8"])
def test_client_that_comes_back_has_its_server_again(
    bench: Bench, mark: str, version: str, place: Path
) -> None:
    """Same process, port, routes, versions and log; its messages come, and it can be stopped."""
    found = pythons(version) if version != "here" else [sys.executable]
    if not found:
        pytest.skip(f"there is no Python {version} here")
    held = Held(bench, mark, grace=30, python=found[0])
    ticket = pickle.loads(pickle.dumps(ticket_of(held)))
    held.session.vanish()
    assert held.server.lost
    server = adopt(bench, ticket)
    before = held.server
    assert (server.pid, server.port, server.routes) == (before.pid, before.port, before.routes)
    assert (server.versions, server.log) == (before.versions, before.log)
    assert server.server_ref == ticket
    os.kill(server.pid, signal.SIGSTOP)
    until(lambda: kinds(bench, ServerUnresponsive), what="it is told")
    assert len(held.grandchildren()) == 1  # never two
    assert server.stop() is True
    assert server.exit_status == -signal.SIGTERM
    held.check_gone()
    assert bench.runners[-1].sessions[-1].process.wait(20) == 0
    until(lambda: not place.exists(), what="its place is gone")


@pytest.mark.parametrize("shell", ["dash", "csh", "fish", "zsh", "busybox sh"])
def test_every_login_shell_lets_it_come_back(bench: Bench, mark: str, shell: str) -> None:
    """Whatever the login shell is, the way back is the same."""
    if not shutil.which(shell.split()[0]):
        missing(f"{shell} is not installed")
    held = Held(bench, mark)
    held.session.vanish()
    assert adopt(bench, ticket_of(held), shell=shell).pid == held.server.pid


def test_python_of_a_module_is_found_again(bench: Bench, mark: str) -> None:
    """An interpreter that runs only with what ``module load`` sets is had again without setup."""
    if not shutil.which("bash"):
        missing("bash is not installed")
    text = (
        '#!/usr/bin/env bash\ncase "$LD_LIBRARY_PATH" in "/a b/lib") ;; *) exit 127;; esac\n'
        f'export PYTHONHOME={sys.base_prefix}; exec -a "$0" {Path(sys.executable).resolve()} "$@"\n'
    )
    python = bench.script("python", text)
    assert subprocess.run([python, "-c", ""]).returncode == 127
    held = Held(bench, mark, python=python, setup="export LD_LIBRARY_PATH='/a b/lib'")
    held.session.vanish()
    assert ticket_of(held).python == python
    adopt(bench, ticket_of(held), launch=Launch())
    newcomer = bench.runners[-1].sessions[-1].process.pid
    listing = subprocess.run(
        ["ps", "-ww", "-o", "args=", "-p", str(newcomer)], capture_output=True, text=True
    )
    assert listing.stdout.startswith(python)
    # The control: where that one does not run any more, another one will do.
    Path(python).unlink()
    bench.runners[-1].sessions[-1].vanish()
    assert adopt(bench, ticket_of(held), launch=Launch()).pid == held.server.pid


def test_no_python_any_more_is_told(bench: Bench, mark: str) -> None:
    """Where none runs, the error is Python's, not that the server is gone."""
    held = Held(bench, mark)
    ticket = dataclasses.replace(ticket_of(held), python="/nonexistent")
    runner = bench.runner(PATH="/nonexistent")
    with pytest.raises(PythonNotFoundError):
        Server.adopt(runner, ticket, launch=Launch())
    assert held.alive()


def test_adopted_server_is_held_as_before(bench: Bench, mark: str) -> None:
    """After the adoption heartbeats keep it; when that client is gone too, the grace time runs again."""
    held = Held(bench, mark, grace=0.5, lease=30)
    again = Launch(grace=3, lease=1.5)
    runner = bench.runner()
    server = Server.adopt(runner, ticket_of(held), launch=again)
    began = time.monotonic()
    until(lambda: runner.sessions[-1].received.count(b'"beat"') >= 8, what="heartbeats are answered")
    assert time.monotonic() - began > 1.5
    assert held.alive()
    gone = time.monotonic()
    runner.sessions[-1].vanish()
    assert server.lost
    held.check_gone()
    assert 2.5 < time.monotonic() - gone < 30


def test_silent_adopter_loses_its_lease(bench: Bench, mark: str) -> None:
    """One that came back and vanished without closing the line is noticed by its silence."""
    held = Held(bench, mark)
    server = adopt(bench, ticket_of(held), launch=Launch(grace=0.3, lease=0.9))
    server._closing.set()  # no heartbeat any more, and the line stays up
    server._lease_thread.join(30)
    held.check_gone()


def test_failed_attempts_do_not_cost_the_server(bench: Bench, mark: str) -> None:
    """Attempts that break off before, at and after the take-over leave it to the next one."""
    held = Held(bench, mark, grace=60)
    ticket = ticket_of(held)
    held.session.vanish()
    for word in (b"hello", b'"started"', b'"ready"'):
        runner = bench.runner()

        def cut(runner: Any = runner, word: bytes = word) -> None:
            until(lambda: runner.sessions and word in runner.sessions[0].received, what="it came so far")
            runner.sessions[0].vanish()

        cutter = threading.Thread(target=cut)
        cutter.start()
        try:
            Server.adopt(runner, ticket, launch=Launch())
        except ConnectionLostError:
            pass  # where it was cut early
        cutter.join()
        assert held.alive()
    server = adopt(bench, ticket)
    assert server.pid == held.server.pid
    assert len(held.grandchildren()) == 1


def test_newcomer_that_is_killed_does_not_cost_the_server(bench: Bench, mark: str) -> None:
    """The process that holds the new session can die: that is a client that has gone, no more."""
    held = Held(bench, mark, grace=60)
    held.session.vanish()
    server = adopt(bench, ticket_of(held))
    os.kill(bench.runners[-1].sessions[-1].process.pid, signal.SIGKILL)
    assert server.wait(20)
    assert held.alive()
    assert adopt(bench, ticket_of(held)).pid == held.server.pid


def test_many_come_back_at_once_and_one_has_it(bench: Bench, mark: str) -> None:
    """Of many sessions with the same ticket the last one holds the server; the others are told."""
    held = Held(bench, mark)
    ticket = ticket_of(held)
    held.session.vanish()
    came: list[Server] = []
    lost: list[BaseException] = []

    def come() -> None:
        try:
            came.append(adopt(bench, ticket))
        except ConnectionLostError as exc:  # taken over before it was told of anything
            lost.append(exc)

    threads = [threading.Thread(target=come) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(came) + len(lost) == 6
    until(lambda: sum(not server.ended.is_set() for server in came) == 1, what="one holds it")
    (holder,) = [server for server in came if not server.ended.is_set()]
    assert all(server.lost for server in came if server is not holder)
    assert len(held.grandchildren()) == 1
    assert holder.stop() is True


# --- a line that only seems to be there


def test_ticket_takes_it_from_a_session_that_seems_to_be_there(bench: Bench, mark: str) -> None:
    """A half-dead line does not keep its own client out; whoever still listens on it is told, once."""
    held = Held(bench, mark, grace=60)
    server = adopt(bench, ticket_of(held))
    assert held.server.wait(30)
    assert held.server.state.taken
    assert held.server.lost
    assert held.server.exit_status is None
    assert kinds(bench, ServerTaken, ServerExited) == [ServerTaken]
    held.server.close()
    held.session.vanish()  # the old line goes down at last, and it is nobody's any more
    server.heartbeat()
    until(lambda: b'"beat"' in bench.runners[-1].sessions[-1].received, what="it answers")
    assert held.alive()
    assert held.server.stop() is False  # it is not ours to stop
    assert held.alive()


def test_another_client_must_not_take_it_from_one_who_is_there(bench: Bench, mark: str) -> None:
    """Without the token only a server that nobody holds is taken over; the token is another one then."""
    held = Held(bench, mark, grace=60)
    ticket = ticket_of(held)
    stranger = ServerRef(host="", id=ticket.id)
    error = refused(bench, ServerTakenError, stranger)
    assert "another client" in str(error)
    refused(bench, ServerTakenError, ServerRef(host="", id=ticket.id, token="guess"))
    assert not held.server.ended.is_set()
    held.server.heartbeat()
    until(lambda: held.heard("beat"), what="the first one still has it")
    held.session.vanish()
    server = adopt(bench, stranger)
    assert server.pid == held.server.pid
    refused(bench, ServerTakenError, ticket)  # the first one does not take it back unasked
    assert server.server_ref != ticket
    assert adopt(bench, server.server_ref).pid == held.server.pid


def test_another_client_may_have_it_once_the_lease_is_over(bench: Bench, mark: str) -> None:
    """A client that is silent for longer than its lease does not keep others out."""
    held = Held(bench, mark, grace=60, lease=0.6)
    held.server._closing.set()
    held.server._lease_thread.join(30)
    ticket = ServerRef(host="", id=ticket_of(held).id)

    def had() -> bool:
        try:
            return adopt(bench, ticket).pid == held.server.pid
        except ServerTakenError:
            return False

    until(had, what="the lease is over")


# --- what is no longer there


def test_server_that_died_meanwhile_is_told_with_its_status(bench: Bench, mark: str, place: Path) -> None:
    """A server that ended while its client was away: how, and its last words; told once, then forgotten."""
    held = Held(bench, mark, "child exit", grace=60)
    ticket = ticket_of(held)
    held.session.vanish()
    held.go.touch()
    held.check_gone()
    (record,) = place.glob("*/record")
    assert stat.S_IMODE(record.stat().st_mode) == 0o600
    error = refused(bench, ServerExitedError, ticket)
    assert error.exit_status == 3
    assert error.log[-1] == "last words"
    until(lambda: not place.exists(), what="the record is gone")
    refused(bench, ServerGoneError, ticket)


def test_server_that_is_killed_while_the_line_is_half_dead_is_told(bench: Bench, mark: str) -> None:
    """The same where the supervisor cannot know that nobody hears it: only an answer counts as heard."""
    held = Held(bench, mark, grace=60)
    held.session.stalled.set()
    os.kill(held.server.pid, signal.SIGKILL)
    until(lambda: not held.grandchildren(), what="the group is gone")
    assert not held.server.ended.is_set()  # the proof that it was not told
    assert refused(bench, ServerExitedError, ticket_of(held)).exit_status == -signal.SIGKILL


def test_supervisor_that_hangs_up_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that ends closes its socket a moment before it is gone; who is only silent is not waited for."""
    looks = iter([False, False, True])
    monkeypatch.setattr(control_client, "is_stale", lambda place: next(looks))
    place = run_dir.RunDir(str(tmp_path))
    assert not control_client.ended(place, TimeoutError())
    assert control_client.ended(place, ConnectionResetError())


def test_server_that_dies_while_its_client_is_there_leaves_no_record(
    bench: Bench, mark: str, place: Path
) -> None:
    """Who was told does not have to be told again."""
    held = Held(bench, mark, "child exit")
    held.go.touch()
    assert held.server.wait(20)
    held.check_gone()
    assert held.server.exit_status == 3
    until(lambda: not place.exists(), what="nothing is left")
    refused(bench, ServerGoneError, ticket_of(held))


def test_server_whose_grace_is_over_is_gone(bench: Bench, mark: str, place: Path) -> None:
    """Reaped is reaped: a typed error, nothing started, nothing left."""
    held = Held(bench, mark, grace=0)
    ticket = ticket_of(held)
    held.session.vanish()
    held.check_gone()
    refused(bench, ServerGoneError, ticket)
    assert not place.exists()
    assert not held.grandchildren()


def test_server_that_is_being_ended_is_gone(bench: Bench, mark: str) -> None:
    """One that comes in the moment of the end does not hold it up."""
    held = Held(bench, mark, "child deaf", grace=0)
    ticket = ticket_of(held)
    held.session.vanish()  # five seconds of patience begin
    refused(bench, ServerGoneError, ticket)
    assert held.grandchildren()  # the proof that it was in between
    held.check_gone()


def test_supervisor_that_was_killed_leaves_no_place(bench: Bench, mark: str, place: Path) -> None:
    """The guardian removes the place; one who comes back finds the server gone."""
    held = Held(bench, mark, grace=60)
    ticket = ticket_of(held)
    assert place.exists()
    os.kill(held.supervisor, signal.SIGKILL)
    held.check_gone()
    until(lambda: not place.exists(), what="the place is gone")
    refused(bench, ServerGoneError, ticket)


def test_stale_place_is_removed_by_whoever_looks(bench: Bench, mark: str, place: Path) -> None:
    """With the guardian killed too, the next launch of the account, or one who comes back, tidies up."""
    held = Held(bench, mark, grace=60)
    ticket = ticket_of(held)
    group = os.getpgid(held.server.pid)
    held.kill_holders()
    os.killpg(group, signal.SIGKILL)
    (stale,) = place.iterdir()
    other = Held(bench, f"{mark}-2")
    until(lambda: not stale.exists(), what="the stale one is gone")
    assert [path.name for path in place.iterdir()] == [ticket_of(other).id]
    refused(bench, ServerGoneError, ticket)


def test_other_machine_of_a_cluster_is_told_apart(bench: Bench, mark: str) -> None:
    """Behind a name with many machines the wrong one says so: the server is not gone, just not there."""
    held = Held(bench, mark)
    ticket = ServerRef(host="", id="00000000", node="login2")
    error = refused(bench, ServerNotFoundError, ticket)
    assert os.uname().nodename in str(error)
    assert held.alive()


def test_supervisor_that_hangs_is_no_reason_to_give_up(bench: Bench, mark: str) -> None:
    """One that does not answer is told apart from one that is gone; it can be had when it answers again."""
    held = Held(bench, mark, grace=60)
    ticket = ticket_of(held)
    held.session.vanish()
    os.kill(held.supervisor, signal.SIGSTOP)
    with pytest.raises(LaunchTimeoutError):
        Server.adopt(bench.runner(), ticket, launch=Launch(), timeout=1)
    os.kill(held.supervisor, signal.SIGCONT)
    assert adopt(bench, ticket).pid == held.server.pid


# --- the place


def test_place_is_private_and_holds_no_secret(bench: Bench, mark: str, place: Path) -> None:
    """Directories 0700, socket and record 0600; the token is in no file, command line or repr."""
    args = ("--args", "--api-key", "canary", "--password=canary")
    held = Held(bench, mark, env={"CANARY": "canary"}, args=args)
    ticket = ticket_of(held)
    (home,) = place.iterdir()
    assert stat.S_IMODE(place.stat().st_mode) == 0o700
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (home, *home.iterdir())}
    assert modes == {ticket.id: 0o700, "control": 0o600, "record": 0o600}
    record = (home / "record").read_text()
    assert json.loads(record)["pid"] == held.server.pid
    assert "canary" not in record
    assert held.server.state.secrets.token not in record + repr(ticket) + repr(held.server)
    assert not processes(held.server.state.secrets.token)
    held.session.vanish()
    server = adopt(bench, ticket)
    assert not processes(held.server.state.secrets.token)
    assert held.server.state.secrets.token not in repr(server)


def test_account_is_all_that_counts(bench: Bench, mark: str) -> None:
    """Another user cannot even reach the socket, whatever they know."""
    if os.geteuid() != 0:
        pytest.skip("only root can act as another user here")
    held = Held(bench, mark)
    path = f"{ticket_of(held).place}/control"
    code = f"import socket; s = socket.socket(socket.AF_UNIX); s.connect({path!r}); print('in')"

    def as_user(user: int) -> str:
        words = [shutil.which("python3", path="/usr/bin:/bin") or sys.executable, "-c", code]
        return subprocess.run(words, capture_output=True, text=True, user=user, cwd="/").stderr

    assert "PermissionError" in as_user(65534)
    assert as_user(0) == ""  # the control: with the right to be there it works


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda path: path.mkdir(0o755) or path.chmod(0o755), "mode 755"),
        (lambda path: path.write_text(""), "no directory"),
        (lambda path: path.symlink_to(path.parent), "no directory"),
        (lambda path: path.mkdir(0o700) or os.chown(path, 65534, -1), "another user"),
    ],
    ids=["open", "file", "symlink", "foreign"],
)
def test_place_that_is_not_private_is_not_used(
    bench: Bench, mark: str, place: Path, make: Any, why: str
) -> None:
    """Where others could be in the place, the server runs, cannot be found again, and it is told why."""
    if why == "another user" and os.geteuid() != 0:
        pytest.skip("only root can give a directory away")
    make(place)
    held = Held(bench, mark)
    assert held.server.server_ref is None
    assert why in held.server.state.started.nowhere
    assert held.server.stop() is True
    assert place.is_symlink() or place.exists()
    (shutil.rmtree if place.is_dir() and not place.is_symlink() else os.unlink)(place)


def test_home_takes_the_place_of_tmp(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where somebody else has the directory in /tmp, it is one in the home, with the machine's name."""
    monkeypatch.delenv("BOKEH_SSH_DIR")
    monkeypatch.setenv("HOME", "/tmp")  # short enough
    first, second = run_dir.candidates()
    assert first == f"/tmp/bokeh-ssh-{os.getuid()}"
    assert second.startswith("/tmp/.bokeh-ssh-")
    taken = tmp_path / "taken"
    taken.write_text("")
    free = os.environ.get("TMPDIR", "/tmp") + f"/bs-{uuid.uuid4().hex[:6]}"
    monkeypatch.setattr(run_dir, "candidates", lambda: [str(taken), free])
    made, _, why = run_dir.make_run_dir(lambda path: path)
    assert made is not None
    assert made.path.startswith(f"{free}/")
    assert why == ""
    made.remove()
    assert not Path(free).exists()


def test_home_is_used_where_somebody_took_the_place(container: Callable[..., Any]) -> None:
    """The other user of a machine makes our directory in /tmp first: they get nothing, we lose nothing."""
    machine = container()
    uid = str(machine.execute("id -u alice"))
    machine.execute(["mkdir", "-m", "777", f"/tmp/bokeh-ssh-{uid}"], user="mallory")
    launch = Launch(python=machine.python, socket=True, grace=60)
    with connect(Host(machine.host, machine.user, **machine.login)) as connection:
        server = Server.start(connection, launch)
        ticket = server.server_ref
        assert ticket is not None
        assert ticket.place.startswith("/home/alice/.bokeh-ssh-machine")
        assert server.socket.startswith(ticket.place)
        again = Server.adopt(connection, ticket, launch=launch)
        assert again.pid == server.pid
        seen = machine.execute(["ls", ticket.place], user="mallory")
        assert seen.status != 0
        assert str(machine.execute(f"ls /tmp/bokeh-ssh-{uid}")) == ""
        assert again.stop() is True
        server.close()
    assert machine.execute(["ls", ticket.place]).status != 0


def test_default_place_is_in_tmp(container: Callable[..., Any]) -> None:
    """By default it is a directory in /tmp that the account may enter, and the other user may not."""
    machine = container()
    with connect(Host(machine.host, machine.user, **machine.login)) as connection:
        server = Server.start(connection, Launch(python=machine.python, socket=True))
        assert server.socket.startswith("/tmp/bokeh-ssh-")
        root = server.socket.rpartition("/")[0].rpartition("/")[0]
        assert str(machine.execute(["stat", "-c", "%a %U", root])) == "700 alice"
        code = f"import socket; socket.socket(socket.AF_UNIX).connect({server.socket!r}); print('in')"
        words = [machine.python, "-c", code]
        assert "PermissionError" in machine.execute(words, user="mallory").stderr
        assert str(machine.execute(words, user="alice")) == "in"  # the control
        assert server.stop() is True
    assert machine.execute(["ls", root]).status != 0


def test_directory_that_others_could_replace_is_not_used(tmp_path: Path) -> None:
    """A directory in one that anybody may write to without the sticky bit is not private."""
    inner = Path("/tmp", f"bs-{uuid.uuid4().hex[:6]}")
    (inner / "x").mkdir(mode=0o700, parents=True)
    try:
        assert run_dir.usable(str(inner / "x")) == ""
        inner.chmod(0o777)
        assert "replaced" in run_dir.usable(str(inner / "x"))
        inner.chmod(0o1777)
        assert run_dir.usable(str(inner / "x")) == ""
    finally:
        shutil.rmtree(inner)
    long = tmp_path / ("x" * 90)
    long.mkdir(mode=0o700)
    tmp_path.chmod(0o700)
    assert "too long" in run_dir.usable(str(long))


def test_place_looks_used_for_as_long_as_it_is(tmp_path: Path) -> None:
    """What cleans /tmp by age sees files that are touched now and then, and not all the time."""
    tmp_path.chmod(0o700)
    place = run_dir.RunDir(str(tmp_path))
    place.write({"pid": 1})
    old = time.time() - 1e6
    for path in (tmp_path, tmp_path / "record"):
        os.utime(path, (old, old))
    place.touch()
    assert place.age() > 9e5  # not all the time
    place.touched -= run_dir.TOUCH + 1
    place.touch()
    assert place.age() < 60
    assert time.time() - (tmp_path / "record").stat().st_mtime < 60


@pytest.mark.parametrize(("age", "kept"), [(60, True), (run_dir.KEEP + 60, False)])
def test_record_of_an_end_is_kept_for_a_day(
    bench: Bench, mark: str, place: Path, age: float, kept: bool
) -> None:
    """The next launch leaves a record that somebody may still come for, and removes one that is too old."""
    held = Held(bench, mark, "child exit", grace=60)
    ticket = ticket_of(held)
    held.session.vanish()
    held.go.touch()
    held.check_gone()
    then = time.time() - age
    os.utime(ticket.place, (then, then))
    other = Held(bench, f"{mark}-2")
    other.server.heartbeat()
    until(lambda: other.heard("beat"), what="it has looked around")
    assert Path(ticket.place).exists() is kept
    refused(bench, ServerExitedError if kept else ServerGoneError, ticket)


def test_system_need_not_tell_who_is_on_the_other_end(
    bench: Bench, mark: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where sockets have no credentials, the directory's permissions do, and all works the same."""
    before = b"import socket\ndel socket.SO_PEERCRED\n" if hasattr(socket, "SO_PEERCRED") else b""
    monkeypatch.setattr("bokeh_ssh._server.server.payload", lambda name: before + payload(name))
    held = Held(bench, mark, grace=60)
    held.session.vanish()
    assert adopt(bench, ticket_of(held)).pid == held.server.pid
    server = bench.start(socket=True)
    assert Path(server.socket).is_socket()
    assert server.pid > 0


def test_junk_at_the_door_does_not_disturb(bench: Bench, mark: str) -> None:
    """Requests that are none, and guests that say nothing, cost the server nothing."""
    held = Held(bench, mark, grace=60)
    ticket = ticket_of(held)
    guests = []
    for junk in (
        b"\n",
        b"nonsense\n",
        b"[]\n",
        b'{"do": "start"}\n',
        b'{"do": "adopt"}\n',
        b"x" * 100000,
        b"",
    ):
        guest = socket.socket(socket.AF_UNIX)
        guest.connect(f"{ticket.place}/control")
        try:
            guest.sendall(junk)
        except OSError:
            pass  # shown out before it had said it all
        guests.append(guest)
    held.session.vanish()
    assert adopt(bench, ticket).pid == held.server.pid
    for guest in guests:
        guest.close()


# --- over real sessions


def test_server_is_found_again_on_this_machine(mark: str, place: Path) -> None:
    """Through the shell of this machine, as publish starts servers, it is all the same."""
    events: list[Event] = []
    launch = Launch(command=FAKE, python=sys.executable, env={"FAKE": "child", "FAKE_MARK": mark})
    server = Server.start(ShellRunner(), launch, on_event=events.append)
    ticket = server.server_ref
    assert ticket is not None
    server.close()
    again = Server.adopt(ShellRunner(), ticket, launch=launch, on_event=events.append)
    assert again.pid == server.pid
    assert not [event for event in events if isinstance(event, ServerExited)]
    assert again.stop() is True
    until(lambda: not processes(mark) and not place.exists(), what="nothing is left")


def test_server_outlives_its_connection(machine: Machine) -> None:
    """Over SSH: the connection is lost, another one has the server back, and ends it."""
    host = Host(machine.host, machine.user, **machine.login)
    launch = Launch(python=machine.python, grace=60)
    with connect(host) as first:
        server = Server.start(first, launch)
        ticket = server.server_ref
        assert ticket is not None
        first.transport.close()  # as a line that breaks: nothing is said
        assert server.wait(30)
        assert server.lost
    with connect(host) as second:
        again = Server.adopt(second, ticket, launch=launch)
        assert (again.pid, again.port) == (server.pid, server.port)
        assert str(machine.execute(["ls", ticket.place])).split() == ["control", "record"]
        with connect(host) as third:  # while the second still seems to be there
            last = Server.adopt(third, ticket, launch=launch)
            assert again.wait(30)
            assert again.state.taken
            assert last.pid == server.pid
            assert last.stop() is True
        with pytest.raises(ServerGoneError):
            Server.adopt(second, ticket, launch=launch)
        again.close()
    assert machine.execute(["ls", ticket.place]).status != 0
    assert machine.execute(["kill", "-0", str(server.pid)]).status != 0
