"""The servers of an account: left running on purpose, listed, chosen, taken over, ended."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from beds import Machine, until
from bokeh_ssh import Host
from bokeh_ssh._cli.notify_ready import announce
from bokeh_ssh._core.errors import (
    ConnectionLostError,
    LaunchError,
    LaunchTimeoutError,
    ServerGoneError,
    ServerNotFoundError,
    ServerTakenError,
    SessionError,
    UsageError,
)
from bokeh_ssh._core.events import ServerExited
from bokeh_ssh._remote.control_socket import remove_stale
from bokeh_ssh._server.launch_spec import Launch
from bokeh_ssh._server.local_runner import ShellRunner
from bokeh_ssh._server.registry import RemoteServer, _server, choose, list_servers, stop_server
from bokeh_ssh._server.server import Server
from bokeh_ssh._ssh.connect import connect

if os.name != "posix":
    pytest.skip("the remote side is a POSIX system", allow_module_level=True)

from local_runner import FAKE, Bench, Held, LocalRunner, kinds, processes
from programs import CLI, login


@pytest.fixture
def place() -> Path:
    """Where the servers of this test are found; nothing of it is left afterwards."""
    return Path(os.environ["BOKEH_SSH_DIR"])


def ids(runner: LocalRunner) -> list[str]:
    return [server.id for server in list_servers(runner)]


# --- left running


def test_detached_server_needs_nobody(bench: Bench, mark: str) -> None:
    """After detach() no grace time and no lease end it, whoever comes and goes; stopping it does."""
    held = Held(bench, mark, grace=0, lease=1.5)
    ticket = held.server.detach()
    assert held.server.detached
    assert not held.server.lost
    held.session.vanish()
    assert kinds(bench, ServerExited) == []
    left = time.monotonic()
    until(lambda: time.monotonic() - left > 2.5, what="grace and lease are long over")
    assert held.alive()
    again = Server.adopt(bench.runner(), ticket, launch=Launch(grace=0, lease=1.5))
    assert again.detached
    bench.runners[-1].sessions[-1].vanish()
    left = time.monotonic()
    until(lambda: time.monotonic() - left > 2.5, what="they are over once more")
    assert held.alive()
    stop_server(bench.runner(), ticket.id)
    held.check_gone()


def test_detaching_is_confirmed_or_an_error(bench: Bench, mark: str) -> None:
    """Where the remote side says nothing, it is an error, and taken back where it still can be."""
    held = Held(bench, mark, grace=0)
    os.kill(held.supervisor, signal.SIGSTOP)
    with pytest.raises(ConnectionLostError):
        held.server.detach(timeout=0.3)
    assert not held.server.detached
    os.kill(held.supervisor, signal.SIGCONT)
    assert held.session.process.wait(20) is not None


def test_server_that_nobody_could_find_is_not_left(bench: Bench, mark: str, place: Path) -> None:
    """Without a private directory there is no detaching, and the error says why; the server is still held."""
    place.write_text("")
    held = Held(bench, mark)
    with pytest.raises(LaunchError, match="no directory"):
        held.server.detach()
    assert held.alive()
    assert held.server.stop() is True
    place.unlink()


def test_end_of_a_detached_server_is_kept(bench: Bench, mark: str, place: Path) -> None:
    """One that ended by itself is listed with status and last lines, with no process, until it is stopped."""
    held = Held(bench, mark, "child exit")
    held.server.detach()
    held.session.vanish()
    held.go.touch()
    held.check_gone()
    (server,) = list_servers(bench.runner())
    assert (server.state, server.status, server.attached) == ("ended", 3, False)
    assert server.log[-1] == "last words"
    stop_server(bench.runner(), server)
    assert not place.exists()
    assert list_servers(bench.runner()) == []


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a refusal is no proof, and is tried again")
def test_what_is_left_behind_holds_nobody(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A supervisor looks through what others left and waits for none of it: its server writes meanwhile."""
    place.mkdir(0o700)
    for number in range(30):
        record = place / f"{number:08x}" / "record"
        record.parent.mkdir()
        record.write_text(json.dumps({"ended": time.time()} if number < 10 else {"identity": "1:0"}))
        if number >= 20:  # killed, so that its socket is left
            with socket.socket(socket.AF_UNIX) as sock:
                sock.bind(str(record.with_name("control")))

    def never(seconds: float) -> None:
        assert not seconds

    with monkeypatch.context() as patch:
        patch.setattr(time, "sleep", never)
        remove_stale()
    assert sorted(path.name for path in place.iterdir()) == [f"{number:08x}" for number in range(10)]
    shutil.rmtree(place)


# --- listed


def test_list_tells_what_there_is(bench: Bench, mark: str) -> None:
    """Every server with process, port, routes, versions, since when, and whether somebody is there."""
    before = time.time()
    first = Held(bench, mark, args=("--args", "--api-key", "canary"))
    second = Held(bench, f"{mark}-2", app=("a dir/one.py", "two/"))
    second.session.vanish()

    def both() -> list[RemoteServer]:
        servers = list_servers(bench.runner(), python=sys.executable)
        return servers if len(servers) == 2 and not servers[1].attached else []

    one, two = until(both, what="it is seen that one is alone")
    assert one.server_ref.id == first.server.server_ref.id  # type: ignore[union-attr]
    assert (one.pid, one.port, one.routes) == (first.server.pid, first.server.port, ("/fake",))
    assert (one.state, one.attached, one.detached) == ("running", True, False)
    assert one.versions == "Bokeh 3.9.9, Tornado 6.5"
    assert one.node == os.uname().nodename
    assert before - 1 < one.born <= one.since < time.time() + 1
    assert "canary" not in repr(one)
    assert one.command[0] == sys.executable
    assert two.apps == ("a dir/one.py", "two/")
    assert {"one", "one.py", "a dir/one.py", "two", "fake", two.id} <= two.names
    os.kill(one.pid, signal.SIGSTOP)
    until(lambda: list_servers(bench.runner())[0].state == "stopped", what="it is told apart")
    os.kill(one.pid, signal.SIGCONT)
    stop_server(bench.runner(), two)


def test_supervisor_that_hangs_is_listed_as_such(bench: Bench, mark: str) -> None:
    """One that does not answer hides neither itself nor the others."""
    held = Held(bench, mark)
    os.kill(held.supervisor, signal.SIGSTOP)
    (server,) = list_servers(bench.runner())
    assert (server.state, server.pid) == ("silent", held.server.pid)
    with pytest.raises(LaunchTimeoutError):
        stop_server(bench.runner(), server)
    os.kill(held.supervisor, signal.SIGCONT)


def test_server_that_is_starting_is_listed(bench: Bench, mark: str) -> None:
    """One that is not ready is there all the same, and cannot be taken over."""
    runner = bench.runner()
    env = {"FAKE": "silent child", "FAKE_MARK": mark}

    def start() -> None:
        with pytest.raises(LaunchError):
            Server.start(runner, Launch(command=FAKE, env=env, python=sys.executable, timeout=20))

    starter = threading.Thread(target=start)
    starter.start()
    (server,) = until(lambda: list_servers(bench.runner()), what="it is there")
    assert server.state == "starting"
    with pytest.raises(ServerTakenError, match="being started"):
        Server.adopt(bench.runner(), server.server_ref, launch=Launch())
    stop_server(bench.runner(), server)
    starter.join(20)
    assert not starter.is_alive()
    until(lambda: not processes(mark), what="it is gone")


def test_nothing_to_list_is_an_empty_list(bench: Bench, place: Path) -> None:
    """On a machine where nothing of ours runs, nothing is made either."""
    assert list_servers(bench.runner()) == []
    assert not place.exists()


def test_machine_that_cannot_be_asked_is_told(bench: Bench) -> None:
    """An account without a shell, and one whose shell hangs, each have their error."""
    deny = bench.script("deny", "#!/bin/sh\necho 'This account is closed.'\nexit 1\n")
    with pytest.raises(SessionError, match="This account is closed"):
        list_servers(LocalRunner(deny))
    hang = bench.script("hang", "#!/bin/sh\nsleep 60\n")
    runner = LocalRunner(hang)
    with pytest.raises(LaunchTimeoutError):
        list_servers(runner, timeout=0.5)
    assert runner.sessions[0].process.wait(30) is not None


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(["id", "ready", "apps", "argv", "log", "born", "state", "status", "node", "port"]),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
            lambda inner: (
                st.lists(inner) | st.dictionaries(st.sampled_from(["port", "pid", "routes"]), inner)
            ),
        ),
    )
)
def test_any_answer_is_survived(message: dict[str, Any]) -> None:
    """Whatever a far side says of its servers, it makes a record or none, and never an error."""
    made = _server("host", "node", message)
    assert made is None or (isinstance(made.names, frozenset) and 0 <= made.port < 65536 and made.server_ref)


# --- chosen


def server(number: str, **more: Any) -> RemoteServer:
    return RemoteServer(host="h", node="n", id=number, state="running", **more)


def test_name_chooses_one_or_none() -> None:
    """An id, a route or an app names a server; what fits none or several is an error that lists them."""
    one = server("11111111", routes=("/sliders",), apps=("~/apps/sliders.py",))
    two = server("22222222", routes=("/sliders", "/other"))
    assert choose([one, two], "11111111", host="h") is one
    assert choose([one, two], "other", host="h") is two
    assert choose([one], None, host="h") is one
    assert choose([one, two], "~/apps/sliders.py", host="h") is one
    with pytest.raises(UsageError, match="11111111 /sliders, 22222222 /sliders /other"):
        choose([one, two], "sliders", host="h")
    with pytest.raises(UsageError):
        choose([one, two], None, host="h")
    with pytest.raises(ServerNotFoundError, match=r"11111111 ~/apps/sliders\.py, 22222222"):
        choose([one, two], "nope", host="h")
    with pytest.raises(ServerNotFoundError, match="no server of yours; start one"):
        choose([], None, host="h")


def test_server_of_a_publication_is_the_publications() -> None:
    """Of a publication and the server that it started, the publication is meant; the other one has its id."""
    outer = server("11111111", routes=("/sliders",))
    inner = server("22222222", routes=("/sliders",), within="11111111")
    assert choose([inner, outer], "sliders", host="h") is outer
    assert choose([inner, outer], None, host="h") is outer
    assert choose([inner, outer], "22222222", host="h") is inner
    assert choose([inner], "sliders", host="h") is inner  # the other is no longer there


# --- ended


def test_stopping_takes_it_from_whoever_holds_it(bench: Bench, mark: str, place: Path) -> None:
    """stop_server() ends a server that ignores TERM, with all that it started, and its client is told."""
    held = Held(bench, mark, "child deaf")
    stop_server(bench.runner(), ids(bench.runner())[0], timeout=10)
    assert not held.grandchildren()
    assert held.server.wait(30)
    assert held.server.exit_status == -signal.SIGKILL
    assert not place.exists()
    with pytest.raises(ServerGoneError):
        stop_server(bench.runner(), "00000000")


# --- what is no Bokeh server


def test_command_of_its_own_tells_that_it_is_ready(bench: Bench, mark: str) -> None:
    """A command that is run verbatim gets no options, and is ready when it says so, wherever it listens."""
    code = (
        f"import sys, time; sys.path.insert(0, {str(Path(__file__).parents[2])!r})\n"
        "from bokeh_ssh._cli.notify_ready import announce\n"
        "print('Bokeh app running at: http://localhost:1/x')\n"
        "print('Starting Bokeh server with process id: 1')\n"
        "print(sys.argv[1:], announce(6001, routes=['/pub'], versions='mine'), announce(6002), flush=True)\n"
        f"time.sleep(600)  # {mark}\n"
    )
    server = bench.start(command=(sys.executable, "-c", code, "a b"), verbatim=True)
    assert (server.port, server.routes, server.versions) == (6001, ("/pub",), "mine")
    until(lambda: "['a b'] True False" in server.log, what="what it said of itself")
    ticket = server.detach()
    assert list_servers(bench.runner())[0].port == 6001
    stop_server(bench.runner(), ticket.id)
    until(lambda: not processes(mark), what="it is gone")


def test_announcement_without_a_supervisor_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that nobody holds tells nobody."""
    assert announce(1) is False
    monkeypatch.setenv("BOKEH_SSH_READY_FD", "nonsense")
    assert announce(1) is False


def test_server_within_another_says_so(bench: Bench, mark: str) -> None:
    """A server that another one started, as a publication does, knows which."""
    inner = {"FAKE": "child", "FAKE_MARK": mark}
    code = (
        f"import sys, time; sys.path.insert(0, {str(Path(__file__).parents[2])!r})\n"
        "from bokeh_ssh._cli.notify_ready import announce\n"
        "from bokeh_ssh._server.server import Launch, Server\n"
        "from bokeh_ssh._server.local_runner import ShellRunner\n"
        f"launch = Launch(command={FAKE!r}, python=sys.executable, env={inner!r}, grace=0)\n"
        "server = Server.start(ShellRunner(), launch)\n"
        "announce(server.port); time.sleep(600)\n"
    )
    outer = bench.start(command=(sys.executable, "-c", code), verbatim=True)
    first, second = list_servers(bench.runner())
    assert (first.within, second.within) == ("", first.id)
    assert choose([first, second], None, host="h") is first
    assert outer.stop() is True
    until(lambda: not processes(mark), what="what it started is gone too")


# --- over real sessions


def test_servers_are_found_over_ssh(machine: Machine) -> None:
    """Left running over one connection, found and opened over another, ended over a third."""
    host = Host(machine.host, machine.user, **machine.login)
    with connect(host) as first:
        server = Server.start(first, Launch(python=machine.python, grace=0))
        left = server.detach()
    with connect(host) as second:
        found = choose(list_servers(second), left.id, host=second.name)
        assert (found.pid, found.port, found.detached) == (server.pid, server.port, True)
        assert not found.attached
        again = Server.adopt(second, found.server_ref, launch=Launch(grace=0))
        assert again.pid == server.pid
        assert choose(list_servers(second), left.id, host="").attached
        again.close()
    with connect(host) as third:
        stop_server(third, left.id)
        assert left.id not in [server.id for server in list_servers(third)]
    assert machine.execute(["kill", "-0", str(server.pid)]).status != 0


def test_publication_is_held_without_anybody(
    embedded: Callable[..., Machine], tmp_path: Path, mark: str
) -> None:
    """A whole ``bokeh-ssh publish`` is left running, listed with the gateway port, ended with all of it."""
    gateway = embedded()
    app = tmp_path / f"{mark}.py"
    app.write_text("from bokeh.plotting import curdoc, figure\ncurdoc().add_root(figure())\n")
    words = ["publish", str(app), "-g", gateway.host, "--remote-port", "0", *login(gateway)]
    launch = Launch(command=(*CLI, *words), python=sys.executable, verbatim=True)
    left = Server.start(ShellRunner(), launch).detach()
    assert left.port in {port for _, port in gateway.listening()}
    found = choose(list_servers(ShellRunner()), mark, host="")
    assert (found.id, found.port, found.routes) == (left.id, left.port, (f"/{mark}",))
    with urllib.request.urlopen(f"http://127.0.0.1:{left.port}/{mark}/metadata", timeout=20) as answer:
        assert answer.status == 200
    stop_server(ShellRunner(), found)
    until(lambda: not processes(mark), what="the server that it started is gone too")
    assert left.port not in {port for _, port in gateway.listening()}
    assert list_servers(ShellRunner()) == []


def test_servers_are_found_on_this_machine(mark: str) -> None:
    """The same through this machine's own shell, as on a host that publishes."""
    launch = Launch(command=FAKE, python=sys.executable, env={"FAKE": "child", "FAKE_MARK": mark})
    left = Server.start(ShellRunner(), launch).detach()
    (found,) = list_servers(ShellRunner())
    assert found.id == left.id
    assert json.dumps(found.command)
    stop_server(ShellRunner(), found)
    until(lambda: not processes(mark), what="it is gone")
