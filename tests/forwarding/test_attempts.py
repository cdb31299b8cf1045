"""A lost line is tried at once when somebody waits for it, and nothing that waits is reset meanwhile."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

import conformance
from beds import MADE_ANEW, Machine, until
from bokeh_ssh import ConnectionLostError, Event, LocalForward, Lost, Reconnected, Reconnecting
from bokeh_ssh._core import backoff
from bokeh_ssh._core.backoff import Attempts
from bokeh_ssh._forwarding import listener
from bokeh_ssh._forwarding.listener import bind, open_acceptor
from bokeh_ssh._forwarding.request_filter import RequestFilter
from bokeh_ssh._tunnels import local_session
from cable import Cable
from connections import connected
from fakes import Listener
from targets import target_here

LOOPBACK = "127.0.0.1"


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have attempts far apart, as after a long outage."""
    monkeypatch.setattr(backoff, "_FIRST_PAUSE", 60.0)
    monkeypatch.setattr(backoff, "_LONGEST_PAUSE", 60.0)


@contextmanager
def cabled(
    make: Callable[..., Machine], directory: Path, **keywords: Any
) -> Iterator[tuple[Cable, LocalForward, list[Event]]]:
    """Open a forward over a cable that can be pulled."""
    machine = make()
    events: list[Event] = []
    with target_here() as port, Cable(machine.host, machine.port) as cable:
        there = cable.machine(machine, directory)
        with LocalForward(
            there.host,
            there.user,
            remote_port=port,
            remote_host=LOOPBACK,
            on_event=events.append,
            **{**there.login, **keywords},
        ) as forward:
            yield cable, forward, events


@contextmanager
def away(
    make: Callable[..., Machine], directory: Path, **keywords: Any
) -> Iterator[tuple[Cable, LocalForward, list[Event]]]:
    """Lose a forward's line, and let the first attempt fail; the next one is a minute away."""
    with cabled(make, directory, **keywords) as (cable, forward, events):

        def paused() -> bool:
            return any(isinstance(event, Reconnecting) and event.attempt == 2 for event in events)

        conformance.check_echo((LOOPBACK, forward.local_port))
        cable.refuse()
        until(paused, what="a pause")
        yield cable, forward, events


def early(events: list[Event]) -> int:
    """Count the attempts that began before their time."""
    return sum(isinstance(event, Reconnecting) and event.delay == 0 for event in events)


@pytest.mark.usefixtures("patient")
def test_connection_starts_an_attempt(embedded: Callable[..., Machine], tmp_path: Path) -> None:
    """A page that is loaded when the line can be had again is served at once, not when the pause is over."""
    with away(embedded, tmp_path) as (cable, forward, events):
        cable.mend()
        conformance.check_echo((LOOPBACK, forward.local_port))
        until(lambda: Reconnected in map(type, events), what="it to be told")
        assert early(events) == 1


def test_first_attempt_is_told_once(
    embedded: Callable[..., Machine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody who comes, or a network that changes, within its short pause is not told as one more loss."""
    monkeypatch.setattr(local_session, "pause_before", lambda *_, **__: 60.0)
    with cabled(embedded, tmp_path) as (cable, forward, events):
        cable.pull()
        until(lambda: any(isinstance(event, Reconnecting) for event in events), what="the pause")
        conformance.check_echo((LOOPBACK, forward.local_port))
        assert [event.attempt for event in events if isinstance(event, Reconnecting)] == [1]


@pytest.mark.usefixtures("patient")
def test_attempt_ends_that_waits_on_a_network_that_was_left(
    embedded: Callable[..., Machine], tmp_path: Path
) -> None:
    """An attempt that nobody has answered gives way to one on the new network, once for each change."""
    with away(embedded, tmp_path, timeout=300) as (cable, forward, events):
        made = cable.made
        cable.cut()  # connections are taken, and nothing answers
        cable._refusing = False
        forward._lifecycle.session.attempts.want()
        until(lambda: cable.made > made and forward.state == "reconnecting", what="an attempt")
        forward._lifecycle.session.attempts.note_change()
        until(lambda: cable.made > made + 1 and forward.state == "reconnecting", what="another attempt")
        forward._lifecycle.session.attempts.note_change()  # the end of the same change
        assert not forward.wait(1)
        assert cable.made == made + 2
        cable.mend()
        until(lambda: any(isinstance(e, Reconnected) for e in events), what="the line to be back")
        assert made + 2 <= cable.made <= made + 2 + MADE_ANEW
        reasons = [e.reason for e in events if isinstance(e, Reconnecting)]
        assert any("network changed" in reason for reason in reasons)


@pytest.mark.usefixtures("patient")
def test_nothing_is_reset_while_an_attempt_is_under_way(
    embedded: Callable[..., Machine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What has waited for its time is served by an attempt that takes longer than that."""
    monkeypatch.setattr(listener, "PATIENCE", 0.2)
    with away(embedded, tmp_path) as (cable, forward, _):
        made = cable.made
        cable.cut()  # connections are taken, and nothing answers
        cable._refusing = False
        with conformance.ask((LOOPBACK, forward.local_port), "echo") as sock:
            until(lambda: cable.made > made and forward.state == "reconnecting", what="an attempt")
            sock.settimeout(0.5)
            with pytest.raises(TimeoutError):  # its time is over by then
                sock.recv(1)
            cable.mend()
            sock.settimeout(30)
            sock.sendall(b"x")
            assert conformance.read_exactly(sock, 1) == b"x"


@pytest.mark.usefixtures("patient")
def test_control_failed_attempt_ends_the_wait(
    embedded: Callable[..., Machine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the attempt fails that was made for it, what has waited for its time is reset."""
    monkeypatch.setattr(listener, "PATIENCE", 0.2)
    with away(embedded, tmp_path) as (_, forward, events):
        conformance.expect_reset((LOOPBACK, forward.local_port))
        until(lambda: early(events) >= 1, what="the attempt to be told")


@pytest.mark.parametrize("how", ["silent", "reset"])
def test_connection_that_is_not_made_yet_waits_for_the_next_line(
    embedded: Callable[..., Machine], tmp_path: Path, how: str
) -> None:
    """A page that is loaded while the line is dead, and nobody has noticed, is not reset with it."""
    machine = embedded()
    config = tmp_path / "config"
    config.write_text("ServerAliveInterval 1\nServerAliveCountMax 2\n", encoding="ascii")
    events: list[Event] = []
    with target_here() as port, Cable(machine.host, machine.port) as cable:
        there = cable.machine(machine, tmp_path)
        login = {**there.login, "ssh_config": str(config)}
        with LocalForward(
            there.host, there.user, remote_port=port, remote_host=LOOPBACK, on_event=events.append, **login
        ) as forward:
            conformance.check_echo((LOOPBACK, forward.local_port))
            with conformance.ask((LOOPBACK, forward.local_port), "echo") as open_before:
                open_before.sendall(b"x")
                assert conformance.read_exactly(open_before, 1) == b"x"
                cable.cut()
                with conformance.ask((LOOPBACK, forward.local_port), "echo") as sock:
                    until(lambda: cable.held, what="its request to be on the line")
                    if how == "reset":
                        cable.pull()
                    until(lambda: any(isinstance(event, Lost) for event in events), what="the loss")
                    with pytest.raises(ConnectionResetError):  # the control
                        open_before.recv(1)
                    cable.pull()  # what was sent on the dead line never arrives
                    cable.mend()
                    sock.sendall(b"x")
                    assert conformance.read_exactly(sock, 1) == b"x"


@pytest.mark.parametrize("checked", [False, True])
def test_request_that_was_not_sent_yet_waits_for_the_next_line(
    embedded: Callable[..., Machine], tmp_path: Path, checked: bool
) -> None:
    """So is a request that was read and let in already: it goes on over the next line, whole and once."""
    machine = embedded()
    request = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
    got: list[bytes] = []

    def answer(sock: socket.socket, number: int) -> None:
        if head := sock.recv(65536):
            got.append(head)
            sock.sendall(b"HTTP/1.1 204 No Content\r\n\r\n")

    with ExitStack() as stack:
        target = LOOPBACK, stack.enter_context(Listener(answer)).port
        cable = stack.enter_context(Cable(machine.host, machine.port))
        first = stack.enter_context(connected(cable.machine(machine, tmp_path)))
        second = stack.enter_context(connected(machine))
        entrance = open_acceptor(stack, bind(0), lambda _: None, True, Attempts())
        guard = RequestFilter(entrance.port)
        asked: list[Callable[[bool], None]] = []
        check = (lambda verdict, _: asked.append(verdict)) if checked else None
        leading = entrance.forwarding(first, target, guard, check)
        with leading:
            if not checked:
                cable.cut()
            sock = stack.enter_context(socket.create_connection((LOOPBACK, entrance.port), timeout=30))
            sock.sendall(request)
            until(lambda: asked if checked else cable.held, what="the channel to be asked for")
            cable.refuse()
            cable.mend()
            until(lambda: not first.alive, what="the loss")
            for verdict in asked:
                verdict(False)  # as when what watches over the port ends
            until(lambda: entrance._held, what="it to wait")
        stack.enter_context(entrance.forwarding(second, target, guard))
        assert sock.recv(100).startswith(b"HTTP/1.1 204")
    assert got == [request]


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("back", [True, False])
def test_more_than_can_be_held_wait_too(
    embedded: Callable[..., Machine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, back: bool
) -> None:
    """Connections beyond the bound wait in the kernel's queue, and are served in turn, or reset at last."""
    monkeypatch.setattr(listener, "_MOST_HELD", 3)
    monkeypatch.setattr(listener, "PATIENCE", 5.0)
    with away(embedded, tmp_path) as (cable, forward, _), ExitStack() as stack:
        address = LOOPBACK, forward.local_port
        socks = [stack.enter_context(conformance.ask(address, "echo")) for _ in range(10)]
        for sock in socks:
            sock.settimeout(0.1)
            with pytest.raises(TimeoutError):
                sock.recv(1)
            sock.settimeout(30)
        if back:
            cable.mend()
            for sock in socks:
                sock.sendall(b"x")
                assert conformance.read_exactly(sock, 1) == b"x"
        else:  # the control
            forward.close()
            for sock in socks:
                with pytest.raises(ConnectionResetError):
                    sock.recv(1)


@pytest.mark.usefixtures("patient")
def test_attempts_are_bounded(
    embedded: Callable[..., Machine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program that connects all the time does not have the server bothered all the time."""
    monkeypatch.setattr(listener, "PATIENCE", 0.05)
    monkeypatch.setattr(backoff, "_GAP", 0.05)
    with away(embedded, tmp_path) as (_, forward, events):

        def attempts_after_one_more() -> int:
            with suppress(ConnectionError):
                socket.create_connection((LOOPBACK, forward.local_port), timeout=30).close()
            return early(events)

        until(lambda: attempts_after_one_more() >= backoff._EARLY, what="the early attempts")
        with pytest.raises(AssertionError):
            until(lambda: attempts_after_one_more() > backoff._EARLY + 1, timeout=2)


def test_line_that_breaks_as_it_comes_back_is_made_again(
    embedded: Callable[..., Machine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second loss in the moment in which the line stands again is one like any other."""
    with cabled(embedded, tmp_path) as (cable, forward, events):
        become_ready = forward._lifecycle.become_ready

        def break_at_once(told: Event) -> None:
            monkeypatch.undo()
            become_ready(told)
            cable.pull()
            until(lambda: forward.state != "ready", what="the second loss")

        monkeypatch.setattr(forward._lifecycle, "become_ready", break_at_once)
        cable.pull()
        until(lambda: sum(isinstance(event, Reconnected) for event in events) == 2, what="the line")
        conformance.check_echo((LOOPBACK, forward.local_port))
    told = [type(event) for event in events if isinstance(event, (Lost, Reconnected))]
    assert told == [Lost, Reconnected] * 2


@pytest.mark.parametrize(
    ("header", "is_page"),
    [
        (b"Upgrade: websocket", True),
        (b"upgrade:WebSocket", True),
        (b"Accept: */*", False),
        (b"Referer: /?upgrade: websocket", False),  # the control
    ],
)
def test_websocket_is_known_behind_many_cookies(header: bytes, is_page: bool) -> None:
    """What waits longer is a request for a WebSocket, however long its head is, and in which order."""
    head = b"GET /ws HTTP/1.1\r\nHost: localhost\r\nCookie: " + bytes(40_000).replace(b"\0", b"x")
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(head + b"\r\n" + header + b"\r\n\r\n")
        assert listener._is_page(theirs, b"") == is_page
        assert len(theirs.recv(65536)) > 40_000


def test_failed_tunnel_holds_nobody(embedded: Callable[..., Machine], tmp_path: Path) -> None:
    """Where no attempt will follow, a connection is reset at once, and does not wait."""
    machine = embedded()
    with target_here() as port, Cable(machine.host, machine.port) as cable:
        there = cable.machine(machine, tmp_path)
        with LocalForward(
            there.host, there.user, remote_port=port, remote_host=LOOPBACK, reconnect=False, **there.login
        ) as forward:
            address = (LOOPBACK, forward.local_port)
            cable.refuse()
            until(lambda: forward.state == "failed", what="the end")
            conformance.expect_reset(address)
            with pytest.raises(ConnectionLostError):
                forward.wait(30)


def test_early_attempts_refill() -> None:
    """After a burst of early attempts there is one more each ten seconds, and stopping ends a wait."""
    attempts = Attempts()
    attempts.begin()
    told: list[int] = []
    for _ in range(backoff._EARLY):
        attempts.want()
        assert attempts.wait(60, lambda: told.append(1))
        attempts._ended = 0.0
    assert len(told) == backoff._EARLY
    attempts.want()
    waiting = threading.Thread(target=lambda: told.append(int(attempts.wait(60, lambda: None))))
    waiting.start()
    waiting.join(0.5)
    assert waiting.is_alive()
    attempts.stop()
    waiting.join(30)
    assert told[-1] == 0
    assert attempts.over
    assert not attempts.may_serve(0.0)


NETWORK = """
import subprocess, sys, threading
from bokeh_ssh._core.this_machine.network_changes import NetworkWatch
changed = threading.Event()
def ip(*words): subprocess.run(["ip", *words], check=True)
ip("link", "set", "lo", "up")
ip("link", "add", "here", "type", "veth", "peer", "name", "there")
ip("link", "set", "there", "up")
ip("link", "set", "here", "up")
with NetworkWatch(changed.set, ["198.51.100.7"], "test"):
    while not any("network" in thread.name for thread in threading.enumerate()): pass
    started = threading.Event(); started.wait(0.3)
    ip("addr", "add", "127.0.0.9/8", "dev", "lo")  # the control: nothing that matters
    assert not changed.wait(1.5), "a change that does not matter was told"
    ip("addr", "add", "198.51.100.1/24", "dev", "here")
    assert changed.wait(30), "an address that came was not told"
assert not [t for t in threading.enumerate() if "network" in t.name]
print("noticed")
"""


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="only Linux's root has namespaces")
def test_network_that_comes_back_is_noticed() -> None:
    """An address that this machine gets is noticed at once; one that does not matter is not."""
    if not shutil.which("unshare") or not shutil.which("ip"):
        pytest.skip("unshare and ip are not installed")
    command = ["unshare", "--net", sys.executable, "-c", NETWORK]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment, check=False)
    assert done.stdout == "noticed\n", done.stderr
