"""Servers that end what they executed when its channel ends: what we hold there is out of their reach."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import apps
import other_servers
from beds import Key, Machine, until
from bokeh_ssh import Closed, Event, Host, Launched, Reconnected, ServerExited, Warned
from bokeh_ssh._server.launch_spec import Launch
from bokeh_ssh._server.local_runner import ShellRunner
from bokeh_ssh._server.registry import list_servers, stop_server
from bokeh_ssh._server.server import Server
from bokeh_ssh._server.server_state import Stage
from bokeh_ssh._ssh.connect import connect
from bokeh_ssh._ssh.connection import Connection
from counting import COUNTER, ask, cabled, servers, tunnel_with_events
from events import kinds
from local_runner import FAKE, Bench, Held, alive, processes
from processes import kill, running
from skips import missing

pytestmark = pytest.mark.skipif(os.name != "posix", reason="the supervisor needs POSIX")

#: What a server sends to what it executed, and to whom: MINA's way, and worse ones. (Conch sends HUP to the
#: process alone.)
WAYS = [
    (("TERM",), "process"),
    (("TERM",), "group"),
    (("HUP",), "group"),
    (("KILL",), "process"),
    (("TERM", "HUP", "KILL"), "tree"),
]


@pytest.fixture(params=[*WAYS, "conch", "mina"], ids=str)
def ender(
    request: pytest.FixtureRequest, embedded: Callable[..., Machine], key: Key, tmp_path: Path
) -> Iterator[Machine]:
    """A machine whose SSH server ends what it executed: the embedded one, in each way, Conch, and MINA."""
    if request.param in ("conch", "mina"):
        try:
            words = other_servers.command(request.param, tmp_path)
        except other_servers.MissingError as exc:
            if request.param == "mina":  # its way is among those of the embedded one
                pytest.skip(str(exc))
            missing(str(exc))
        with other_servers.running(words, key, tmp_path) as machine:
            yield machine
        return
    signals, reach = request.param
    yield embedded(hangup=signals, hangup_reach=reach, env={"BOKEH_SSH_DIR": os.environ["BOKEH_SSH_DIR"]})


@pytest.fixture
def mina(light: Callable[..., Machine]) -> Machine:
    """A machine whose SSH server does as Apache MINA's."""
    return light(hangup=("TERM",))


def line_to(machine: Machine) -> Connection:
    """Log in."""
    return connect(Host(machine.host, machine.user, **machine.login))


@contextmanager
def started(connection: Connection, mark: str, **words: Any) -> Iterator[Server]:
    """Start a fake server there, and end it on the line that is there at the end."""
    launch = Launch(command=FAKE, python=sys.executable, env={"FAKE": "child", "FAKE_MARK": mark}, **words)
    server = Server.start(connection, launch)
    until(lambda: processes(mark), what="all of it to run")
    try:
        yield server
    finally:
        server.close()


def run_to_its_end(connection: Connection, command: str) -> Callable[[], object]:
    """Run a command in a session, and end that; gives what tells whether the session has."""
    ended = threading.Event()
    session = connection.run(
        command,
        on_stdout=lambda data: None,
        on_stderr=lambda data: None,
        on_exit=lambda status: ended.set(),
        timeout=10,
    )
    until(lambda: processes(command.rpartition(" ")[2]), what="it to run")
    session.close()
    return ended.is_set


def test_control_what_such_a_server_executes_ends(ender: Machine, mark: str) -> None:
    """The control: a program that is run there plainly is gone with its channel."""
    with line_to(ender) as connection:
        run_to_its_end(connection, f"exec tail -f /dev/null --pid=1 -s 1 {mark}")
        until(lambda: not processes(mark), what="it to be ended")


def test_server_that_was_left_is_still_there(ender: Machine, mark: str) -> None:
    """``detach`` leaves it running, whatever that server does to what it executed, and it is had back."""
    with line_to(ender) as connection, started(connection, mark) as server:
        ticket, launch = server.detach(), server.launch
        until(lambda: server.ended.is_set(), what="the channel to have ended")
    with line_to(ender) as again:
        [found] = list_servers(again, python=sys.executable)
        assert (found.id, found.detached) == (ticket.id, True)
        until(lambda: not list_servers(again, python=sys.executable)[0].attached, what="nobody to be there")
        back = Server.adopt(again, ticket, launch=launch)
        assert back.pid == ticket.pid
        assert back.stop()
    until(lambda: not processes(mark), what="nothing to be left")


def test_server_outlives_a_cut(ender: Machine, mark: str) -> None:
    """After a loss it is there for its grace time, the same one; stopped, nothing of it is left."""
    with line_to(ender) as connection, started(connection, mark, grace=60) as server:
        ticket = server.server_ref
        assert ticket
        connection.transport.packetizer.close()
        until(lambda: server.ended.is_set(), what="the loss")
    with line_to(ender) as again:
        back = Server.adopt(again, ticket, launch=server.launch)
        assert back.pid == ticket.pid
        assert back.stop()
    until(lambda: not processes(mark), what="nothing to be left")


def test_tunnel_through_such_a_server(mina: Machine, tmp_path: Path) -> None:
    """A whole tunnel: after a cut it is the same server, and what was left on purpose opens again."""
    app = apps.put(mina, "counter.py", COUNTER)
    events: list[Event] = []
    with cabled(mina, tmp_path) as (cable, there):
        with tunnel_with_events(there, app, events, isolate=False, detach=True) as tunnel:
            [launched] = [event for event in events if isinstance(event, Launched)]
            before, name = ask(tunnel), tunnel.server
            cable.pull()
            until(lambda: Reconnected in kinds(events), what="the line to be back")
            [back] = [event for event in events if isinstance(event, Reconnected)]
            assert back.same_server
            assert ask(tunnel) == before.replace("seen 1", "seen 2")
    assert events[-1] == Closed(host=mina.host, server="left")
    assert servers(mina, app) == [launched.pid]
    assert not [event for event in events if isinstance(event, Warned)]
    with tunnel_with_events(mina, None, events, server=name) as again:
        assert ask(again) == before.replace("seen 1", "seen 3")
    with line_to(mina) as connection:
        stop_server(connection, str(name), python=mina.python)
    until(lambda: not servers(mina, app), what="it to end")


def test_server_that_was_left_and_ended_is_not_called_left(
    light: Callable[..., Machine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a machine ends it in a way that nothing tells of, that is seen at the end, and said."""
    here = light()
    app = apps.put(here, "counter.py", COUNTER)
    close = Server.close

    def end_all(server: Server) -> None:
        close(server)
        place = os.environ["BOKEH_SSH_DIR"]
        kill(running(place))
        until(lambda: not running(place), what="all to be killed")

    monkeypatch.setattr(Server, "close", end_all)
    events: list[Event] = []
    with tunnel_with_events(here, app, events, isolate=False, detach=True):
        pass
    assert events[-1] == Closed(host=here.host, server="ended")
    [warned] = [event.text for event in events if isinstance(event, Warned)]
    assert "ended with its session" in warned


@pytest.mark.parametrize(("detach", "fate"), [(True, "left"), (False, "ended")])
def test_end_of_a_server_that_took_the_place_of_another(
    light: Callable[..., Machine], detach: bool, fate: str
) -> None:
    """Where sockets cannot be forwarded (MINA, Conch) a second one is started: its end is what counts."""
    here = light(streamlocal=False)
    app = apps.put(here, "counter.py", COUNTER)
    events: list[Event] = []
    with tunnel_with_events(here, app, events, isolate=False, detach=detach) as tunnel:
        name = tunnel.server
    assert len([event for event in events if isinstance(event, Launched)]) == 2
    assert events[-1] == Closed(host=here.host, server=fate)
    assert len(servers(here, app)) == detach
    if detach:
        with line_to(here) as connection:
            stop_server(connection, str(name), python=here.python)
    until(lambda: not servers(here, app), what="it to end")


def test_what_was_executed_is_killed_alone(bench: Bench, mark: str) -> None:
    """Without it the client is gone, no more: the session ends, and the server has its grace time."""
    held = Held(bench, mark, grace=60)
    os.kill(held.anchor, signal.SIGKILL)
    until(lambda: held.server.ended.is_set(), what="the session to end")
    assert held.server.lost
    assert alive(held.supervisor)
    assert held.alive()
    ticket = held.server.server_ref
    assert ticket
    back = Server.adopt(bench.runner(), ticket, launch=held.server.launch)
    assert back.pid == held.server.pid
    assert back.stop()
    held.check_gone()


@pytest.mark.parametrize(("status", "told"), [(143, []), (5, [ServerExited])])
def test_status_that_stands_for_a_signal_is_no_end_of_the_server(status: int, told: list[type]) -> None:
    """128 and a signal, as some servers tell it, is a loss: what was executed was killed, and no more."""
    events: list[Event] = []
    client = Server(ShellRunner(), Launch(), events.append)
    client.state.stage = Stage.READY
    client._on_exit(status)
    assert client.lost
    assert [type(event) for event in events] == told


def test_session_of_its_own(bench: Bench, mark: str) -> None:
    """Neither the session nor the group of what was executed has anything else in it."""
    held = Held(bench, mark)
    assert os.getsid(held.anchor) == held.anchor
    for pid in (held.supervisor, held.server.pid, *held.grandchildren()):
        assert os.getsid(pid) == os.getsid(held.supervisor) != held.anchor
        assert os.getpgid(pid) != held.anchor
    assert held.server.stop()
    assert held.session.process.wait(20) == 0


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_hangup_of_a_living_session_changes_nothing(bench: Bench, mark: str, number: signal.Signals) -> None:
    """What was executed survives what the supervisor survives, as long as the line stands."""
    held = Held(bench, mark, lease=0.6)
    os.kill(held.anchor, number)
    seen = len(held.heard("beat"))
    until(lambda: len(held.heard("beat")) > seen + 1, what="it answers")
    assert not held.server.ended.is_set()
