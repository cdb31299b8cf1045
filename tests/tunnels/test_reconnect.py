"""A line that goes down is made again: the same local address, the same answers, nothing lost silently."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import conformance
from beds import MADE_ANEW, PASSWORD, Key, Knobs, Machine, free_port, until
from bokeh_ssh import (
    BokehSSHError,
    ChangedHostKeyError,
    Closed,
    ConnectionLostError,
    Event,
    LocalForward,
    Lost,
    Question,
    Ready,
    Reconnected,
    Reconnecting,
    RemoteForward,
)
from bokeh_ssh._forwarding import listener
from counting import cabled
from events import kinds
from processes import children
from targets import check_on, target_here, target_on


@pytest.fixture
def quick(tmp_path: Path) -> str:
    """An ssh config that notices a dead line in two seconds; the default takes fifteen."""
    path = tmp_path / "quick_config"
    path.write_text("ServerAliveInterval 1\nServerAliveCountMax 2\n", encoding="ascii")
    return str(path)


def forward_to(machine: Machine, port: int, **keywords: Any) -> LocalForward:
    """Make a local forward to a port of the machine's loopback."""
    return LocalForward(
        machine.host,
        machine.user,
        remote_port=port,
        remote_host="127.0.0.1",
        **{**machine.login, **keywords},
    )


def echo(port: int, timeout: float = 20) -> None:
    """See that a target answers behind a local port."""
    with socket.create_connection(("127.0.0.1", port), timeout=timeout) as sock:
        sock.sendall(b"echo\nhello")
        assert conformance.read_exactly(sock, 5) == b"hello"


def fill(sock: socket.socket) -> None:
    """Send until nothing more is taken."""
    sock.settimeout(0.5)
    with suppress(OSError):  # full, or reset already
        while True:
            sock.sendall(bytes(1 << 20))


@pytest.mark.parametrize("isolate", [False, True])
def test_what_has_failed_can_be_opened_again(
    embedded: Callable[..., Machine], tmp_path: Path, isolate: bool, no_leaks: Any
) -> None:
    """Where nobody has closed it in between, it gives its port back first, and takes it again."""
    events: list[Event] = []
    machine = embedded()
    with target_on(machine) as port, no_leaks(), cabled(machine, tmp_path) as (cable, there):
        local = free_port()
        words = {"local_port": local, "reconnect": False, "isolate": isolate, "on_event": events.append}
        with forward_to(there, port, **words) as forward:
            cable.pull()
            with pytest.raises(ConnectionLostError):
                forward.wait(20)
            assert forward.open().state == "ready"
            echo(local)
    until(lambda: kinds(events)[-1] is Closed)
    assert kinds(events) == [Ready, Lost, Closed, Ready, Closed]


@pytest.mark.parametrize("isolate", [False, True])
@pytest.mark.parametrize("answer", [PASSWORD, None], ids=["right", "none"])
def test_opening_of_another_thread_is_waited_for(
    embedded: Callable[..., Machine], isolate: bool, answer: str | None
) -> None:
    """Whoever opens what is being opened has it open then, or the same error."""
    asked, go_on = threading.Event(), threading.Event()

    def prompt(question: Question) -> str | None:
        asked.set()
        assert go_on.wait(20)
        return answer

    def run() -> None:
        try:
            results.append(forward.open().state)
        except BokehSSHError as exc:
            results.append(type(exc).__name__)

    results: list[str] = []
    machine = embedded(Knobs(password=True, require=("password",)))
    forward = forward_to(machine, 1, isolate=isolate, prompt=prompt)
    threads = [threading.Thread(target=run) for _ in range(2)]
    threads[0].start()
    try:
        assert asked.wait(20)
        threads[1].start()
        threads[1].join(0.2)  # as long as it takes where it does not wait
    finally:
        go_on.set()
        for thread in threads:
            thread.join(20)
        forward.close()
    assert results == (["ready"] if answer else ["AuthenticationError"]) * 2


@pytest.mark.parametrize("isolate", [False, True])
def test_line_that_breaks_is_made_again(
    machine: Machine, tmp_path: Path, isolate: bool, no_leaks: Any
) -> None:
    """A reset line is made again at the same local port; what was open is reset, not ended."""
    events: list[Event] = []
    with target_on(machine) as port, no_leaks(), cabled(machine, tmp_path) as (cable, there):
        forward = forward_to(there, port, isolate=isolate, on_event=events.append)
        with forward:
            local = forward.local_port
            echo(local)
            assert kinds(events) == [Ready]  # the control: nothing happens by itself
            with conformance.ask(("127.0.0.1", local), "echo") as sock:
                sock.sendall(b"x")
                assert sock.recv(1) == b"x"
                cable.pull()
                with pytest.raises(ConnectionResetError):
                    sock.recv(1)
            until(lambda: kinds(events)[-1] is Reconnected, what="the line to be back")
            assert (forward.state, forward.local_port) == ("ready", local)
            echo(local)
            assert 2 <= cable.made <= 2 + MADE_ANEW
        until(lambda: kinds(events)[-1] is Closed)
        assert kinds(events) == [Ready, Lost, Reconnecting, Reconnected, Closed]


def test_control_without_reconnection(machine: Machine, tmp_path: Path) -> None:
    """With ``reconnect=False`` the same cut ends it, and ``wait`` raises why."""
    with target_on(machine) as port, cabled(machine, tmp_path) as (cable, there):
        with forward_to(there, port, reconnect=False) as forward:
            cable.pull()
            with pytest.raises(ConnectionLostError):
                forward.wait(20)
            assert forward.state == "failed"
        assert (forward.state, cable.made) == ("closed", 1)


def test_silent_line_is_noticed_and_made_again(machine: Machine, tmp_path: Path, quick: str) -> None:
    """A line on which nothing comes through is noticed within interval x count, and made again."""
    events: list[Event] = []
    with (
        target_on(machine) as port,
        cabled(machine, tmp_path) as (cable, there),
        forward_to(there, port, ssh_config=quick, on_event=events.append, timeout=10) as forward,
    ):
        cable.cut()
        until(lambda: Lost in kinds(events), what="the silence to be noticed")
        [lost] = [event for event in events if isinstance(event, Lost)]
        assert "did not answer for 2 s" in lost.reason
        assert cable.held > 0
        cable.mend()
        until(lambda: forward.state == "ready", what="the line to be back")
        echo(forward.local_port)


def test_short_cut_loses_nothing(machine: Machine, tmp_path: Path) -> None:
    """A cut shorter than the keepalive's bound is survived by the same connection, byte for byte."""
    events: list[Event] = []
    size = 4 << 20
    with (
        target_on(machine) as port,
        cabled(machine, tmp_path) as (cable, there),
        forward_to(there, port, on_event=events.append) as forward,
    ):
        with conformance.ask(("127.0.0.1", forward.local_port), f"send {size}") as sock:
            start = conformance.read_exactly(sock, 1 << 16)
            cable.cut()
            until(lambda: cable.held > 0, what="the cut to be felt")
            threading.Timer(3.0, cable.mend).start()
            assert start + conformance.read_all(sock) == conformance.pattern(size)
        assert kinds(events) == [Ready]
        assert cable.made == 1


def test_connections_during_an_outage_are_held(machine: Machine, tmp_path: Path) -> None:
    """A new local connection waits for the line to be back, and is served then."""
    with (
        target_on(machine) as port,
        cabled(machine, tmp_path) as (cable, there),
        forward_to(there, port) as forward,
    ):
        cable.refuse()
        until(lambda: forward.state in ("lost", "reconnecting"), what="the loss")
        served = threading.Event()

        def use() -> None:
            echo(forward.local_port)
            served.set()

        user = threading.Thread(target=use)
        user.start()
        until(
            lambda: forward._lifecycle.session._parts._forward._acceptor._held,
            what="the connection to be held",
        )
        assert not served.is_set()
        cable.mend()
        assert served.wait(20)
        user.join()


def test_connections_are_held_for_a_stated_time(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that has waited long enough is reset; a page's WebSocket is given more time."""
    monkeypatch.setattr(listener, "PATIENCE", 2.0)
    with cabled(machine, tmp_path) as (cable, there), forward_to(there, 1) as forward:
        cable.refuse()
        until(lambda: forward.state in ("lost", "reconnecting"), what="the loss")
        address = ("127.0.0.1", forward.local_port)
        with socket.create_connection(address, timeout=4) as page:
            page.sendall(b"GET /app/ws HTTP/1.1\r\nHost: localhost\r\nUpgrade: WebSocket\r\n\r\n")
            conformance.expect_reset(address)
            with pytest.raises(TimeoutError):
                page.recv(1)
            monkeypatch.setattr(listener, "PAGE_PATIENCE", 0.0)
    assert not [thread for thread in threading.enumerate() if thread.name == "bokeh-ssh hold"]


def test_close_while_it_is_lost_is_quick(machine: Machine, tmp_path: Path, no_leaks: Any) -> None:
    """Closing between two attempts cancels them, and leaves nothing."""
    events: list[Event] = []
    with cabled(machine, tmp_path) as (cable, there):
        with no_leaks():
            forward = forward_to(there, 1, on_event=events.append).open()
            cable.refuse()
            until(lambda: kinds(events).count(Reconnecting) >= 3, what="attempts to fail")
            tries = [event for event in events if isinstance(event, Reconnecting)]
            first, second, third = (event.delay for event in tries)
            assert first < 0.5 <= second <= 1 < third <= 2  # it gives the network more and more time
            assert any(word in tries[0].reason for word in ("line went down", "nothing used it", "reset"))
            assert all("hung up" in event.reason or "reset" in event.reason for event in tries[1:])
            forward.close()
        assert forward.state == "closed"
        cable.mend()
        made = cable.made
    assert cable.made == made
    assert kinds(events)[-1] is Closed


def test_close_while_an_attempt_is_under_way(
    machine: Machine, tmp_path: Path, quick: str, no_leaks: Any
) -> None:
    """Closing in the middle of an attempt that gets no answer takes two seconds at most."""
    with no_leaks(), cabled(machine, tmp_path) as (cable, there):
        forward = forward_to(there, 1, ssh_config=quick).open()
        cable.cut()
        until(lambda: forward.state == "reconnecting", what="an attempt")
        closer = threading.Thread(target=forward.close)
        closer.start()
        closer.join(12)
        assert not closer.is_alive()
        assert forward.state == "closed"


def test_changed_host_key_ends_it(embedded: Callable[..., Machine], key: Key, tmp_path: Path) -> None:
    """When another machine answers after a loss, it gets no credential, and no further visit."""
    machine, other = embedded(), embedded()
    events: list[Event] = []
    with cabled(machine, tmp_path) as (cable, there), forward_to(there, 1, on_event=events.append) as forward:
        cable._target = (other.host, other.port)
        cable.pull()
        with pytest.raises(ChangedHostKeyError):
            forward.wait(20)
        assert (forward.state, cable.made) == ("failed", 2)
        assert kinds(events) == [Ready, Lost, Reconnecting, Lost]


@pytest.mark.parametrize("isolate", [False, True])
def test_password_is_asked_for_once(embedded: Callable[..., Machine], tmp_path: Path, isolate: bool) -> None:
    """What a person typed for the first login does for the ones after it."""
    machine = embedded(Knobs(password=True, require=("password",)))
    asked: list[Question] = []

    def prompt(question: Question) -> str:
        asked.append(question)
        return PASSWORD

    events: list[Event] = []
    with (
        cabled(machine, tmp_path) as (cable, there),
        forward_to(there, 1, prompt=prompt, isolate=isolate, on_event=events.append),
    ):
        for times in (1, 2):
            cable.pull()
            until(lambda: kinds(events).count(Reconnected) == times, what="the line to be back")  # noqa: B023
    assert [question.kind for question in asked] == ["password"]


@pytest.mark.parametrize("isolate", [False, True])
def test_codes_are_asked_for_again(embedded: Callable[..., Machine], tmp_path: Path, isolate: bool) -> None:
    """A code works once, so a person is asked for another one; the password is not asked for again."""
    from bokeh_ssh._demo.ssh_server import Challenge

    codes = {"Verification code: ": "123456"}
    machine = embedded(
        Knobs(password=True, interactive=True, require=("password", "keyboard-interactive")),
        challenges=(Challenge(codes),),
    )
    asked: list[Question] = []

    def prompt(question: Question) -> str:
        asked.append(question)
        return PASSWORD if question.kind == "password" else codes[question.text]

    events: list[Event] = []
    with (
        cabled(machine, tmp_path) as (cable, there),
        forward_to(there, 1, prompt=prompt, isolate=isolate, on_event=events.append),
    ):
        cable.pull()
        until(lambda: Reconnected in kinds(events), what="the line to be back")
    assert [question.kind for question in asked] == ["password", "interactive", "interactive"]


def test_wrong_answer_is_not_remembered(embedded: Callable[..., Machine], tmp_path: Path) -> None:
    """A password that was refused is asked for again, and only the one that worked is used later."""
    machine = embedded(Knobs(password=True, require=("password",)))
    answers = ["wrong", PASSWORD]
    events: list[Event] = []
    with (
        cabled(machine, tmp_path) as (cable, there),
        forward_to(there, 1, prompt=lambda question: answers.pop(0), on_event=events.append),
    ):
        cable.pull()
        until(lambda: Reconnected in kinds(events), what="the line to be back")
    assert not answers


def test_remote_forward_comes_back_on_its_port(machine: Machine, tmp_path: Path) -> None:
    """A remote forward is made again on the gateway's same port, whichever that was."""
    events: list[Event] = []
    with (
        target_here() as target,
        cabled(machine, tmp_path) as (cable, there),
        RemoteForward(
            there.host,
            there.user,
            remote_port=0,
            local_port=target,
            local_host="127.0.0.1",
            on_event=events.append,
            **there.login,
        ) as forward,
    ):
        port = forward.remote_port
        assert check_on(machine, "echo", port).status == 0
        cable.pull()
        until(lambda: Reconnected in kinds(events), timeout=30, what="the line to be back")
        assert forward.remote_port == port
        assert check_on(machine, "echo", port).status == 0


def test_failed_attempt_leaves_nothing(machine: Machine, tmp_path: Path, no_leaks: Any) -> None:
    """Each attempt that fails takes its threads and sockets with it, however many there are."""
    events: list[Event] = []
    with cabled(machine, tmp_path) as (cable, there), forward_to(there, 1, on_event=events.append) as forward:
        cable.refuse()
        until(lambda: Reconnecting in kinds(events), what="the loss")
        with no_leaks():
            seen = kinds(events).count(Reconnecting)
            until(lambda: kinds(events).count(Reconnecting) > seen, what="one more attempt")
        cable.mend()
        until(lambda: forward.state == "ready", what="the line to be back")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux sets limits of another process")
def test_line_is_made_again_once_files_can_be_opened(
    embedded: Callable[..., Machine], tmp_path: Path
) -> None:
    """Out of file descriptors it says so, stays lost, and comes back when there are some again."""
    import resource

    events: list[Event] = []
    machine = embedded()
    with target_on(machine) as port, cabled(machine, tmp_path) as (cable, there):
        with forward_to(there, port, isolate=True, on_event=events.append) as forward:
            [child] = children()
            soft, hard = resource.prlimit(child, resource.RLIMIT_NOFILE)
            resource.prlimit(child, resource.RLIMIT_NOFILE, (3, hard))
            cable.pull()
            until(lambda: any("no more files" in getattr(event, "reason", "") for event in events))
            assert forward.state in ("lost", "reconnecting")
            resource.prlimit(child, resource.RLIMIT_NOFILE, (soft, hard))
            until(lambda: forward.state == "ready", what="the line to be back")
            echo(forward.local_port)


def test_line_is_given_up_where_no_thread_can_be_had(
    embedded: Callable[..., Machine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever waits is told; nothing stays lost for ever."""

    def start(thread: threading.Thread) -> None:
        if "reconnect" in thread.name:
            msg = "can't start new thread"
            raise RuntimeError(msg)
        begin(thread)

    machine, begin = embedded(), threading.Thread.start
    with target_on(machine) as port, cabled(machine, tmp_path) as (cable, there):
        with forward_to(there, port) as forward:
            monkeypatch.setattr(threading.Thread, "start", start)
            cable.pull()
            with pytest.raises(BokehSSHError, match="can't start new thread"):
                forward.wait(20)


_OPEN_WITH_FEW = """
import os, resource, sys
from bokeh_ssh import LocalForward, ResourceError
def forward():
    return LocalForward(%r, %r, remote_host="127.0.0.1", remote_port=int(sys.argv[1]), **%r)
with forward():
    pass  # whatever is imported on the way
used, hard = len(os.listdir("/proc/self/fd")) - 1, resource.getrlimit(resource.RLIMIT_NOFILE)[1]
for few in range(used, used + 30):
    resource.setrlimit(resource.RLIMIT_NOFILE, (few, hard))
    made = forward()
    try:
        made.open()
        print("open", few - used)
        break
    except ResourceError as exc:
        assert "Too many open files" in str(exc) and exc.host and made.state == "failed"
    finally:
        made.close()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lists what is open")
def test_too_few_files_are_told_as_such(embedded: Callable[..., Machine]) -> None:
    """However many may still be opened, either it stands, or the error is about that alone."""
    machine = embedded()
    script = _OPEN_WITH_FEW % (machine.host, machine.user, machine.login)
    with target_on(machine) as port:
        words = [sys.executable, "-c", script, str(port)]
        done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert not done.stderr
    assert done.stdout.startswith("open ")


def test_listener_that_fails_does_not_stop_it(machine: Machine, tmp_path: Path) -> None:
    """An ``on_event`` that raises changes nothing."""

    def on_event(event: Event) -> None:
        raise ZeroDivisionError

    with cabled(machine, tmp_path) as (cable, there), forward_to(there, 1, on_event=on_event) as forward:
        cable.pull()
        until(lambda: cable.made >= 2 and forward.state == "ready", what="the line to be back")


def test_temporary_errors_are_those_that_may_pass() -> None:
    """What a later attempt may get past is marked in the tree; a refusal is not."""
    import bokeh_ssh

    temporary = {
        name
        for name in bokeh_ssh.__all__
        if isinstance(found := getattr(bokeh_ssh, name), type)
        and issubclass(found, BokehSSHError)
        and found.temporary
    }
    assert temporary == {
        "ConnectError",
        "ConnectTimeoutError",
        "KDCUnreachableError",
        "ConnectionLostError",
        "LaunchTimeoutError",
        "PortInUseError",
        "ProtocolError",
        "RefusedError",
        "ResolveError",
        "ResourceError",
        "SecurityKeyAbsentError",
        "ServerNotFoundError",
        "SocketInUseError",
        "TargetUnreachableError",
    }


# The keepalive, and what waits for a line that is silent.


def test_pending_writes_do_not_hold_the_watchdog(machine: Machine, tmp_path: Path, quick: str) -> None:
    """A silent cut is noticed in the same time while data is stuck on its way."""
    events: list[Event] = []
    with (
        target_on(machine) as port,
        cabled(machine, tmp_path) as (cable, there),
        forward_to(there, port, ssh_config=quick, on_event=events.append, timeout=10) as forward,
        conformance.ask(("127.0.0.1", forward.local_port), "echo") as sock,
    ):
        cable.cut()
        fill(sock)
        until(lambda: Lost in kinds(events), what="the silence to be noticed")
        assert cable.held > 0
        cable.mend()
        until(lambda: forward.state == "ready", what="the line to be back")
        echo(forward.local_port)


@pytest.mark.parametrize("full", [False, True], ids=["idle", "full"])
def test_close_on_a_silent_line_takes_two_seconds_at_most(
    machine: Machine, tmp_path: Path, full: bool, no_leaks: Any
) -> None:
    """Nobody waits for a server that does not answer, though nothing has noticed yet."""
    with target_on(machine) as port, no_leaks(), cabled(machine, tmp_path) as (cable, there):
        forward = forward_to(there, port).open()
        with conformance.ask(("127.0.0.1", forward.local_port), "echo") as sock:
            cable.cut()
            if full:
                fill(sock)
            assert forward.state == "ready"
            closer = threading.Thread(target=forward.close)
            began = time.monotonic()
            closer.start()
            closer.join(30)
            assert time.monotonic() - began < 12  # the promise is 2; a loaded machine may be late


def test_remote_forward_on_a_silent_line_closes_in_two_seconds(machine: Machine, tmp_path: Path) -> None:
    """Taking the gateway's port back does not wait for a gateway that does not answer."""
    with cabled(machine, tmp_path) as (cable, there):
        forward = RemoteForward(there.host, there.user, remote_port=0, **there.login).open()
        cable.cut()
        began = time.monotonic()
        forward.close()
        assert time.monotonic() - began < 12
        assert cable.held > 0


_SLEEPER = """
import json, sys, threading
from bokeh_ssh import LocalForward
host, user, login = json.loads(sys.argv[1])
def tell(event):
    print(type(event).__name__, flush=True)
with LocalForward(host, user, remote_port=1, on_event=tell, **login) as forward:
    print("open", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("cut", [False, True], ids=["control", "cut"])
def test_waking_up_asks_once(machine: Machine, tmp_path: Path, cut: bool) -> None:
    """After this machine slept, one question decides: a dead line is made again, a live one kept."""
    config = tmp_path / "patient_config"
    config.write_text("ServerAliveInterval 1\nServerAliveCountMax 60\n", encoding="ascii")
    with cabled(machine, tmp_path) as (cable, there):
        login = {**there.login, "ssh_config": str(config)}
        process = subprocess.Popen(
            [sys.executable, "-c", _SLEEPER, json.dumps([there.host, there.user, login])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        with process:
            assert process.stdout
            assert process.stdin
            until(lambda: process.stdout.readline() == "open\n", what="the forward")  # type: ignore[union-attr]
            os.kill(process.pid, signal.SIGSTOP)
            asleep = time.monotonic()
            if cut:
                cable.cut()
            until(lambda: time.monotonic() > asleep + 3.5, what="it to have slept")
            os.kill(process.pid, signal.SIGCONT)
            if cut:
                assert process.stdout.readline() == "Lost\n"
                assert time.monotonic() - asleep < 3.5 + 20  # 60 s without the sleep
                cable.mend()
                while process.stdout.readline() != "Reconnected\n":
                    pass
            process.stdin.close()
            rest = process.stdout.read()
            assert process.wait(20) == 0
            assert "Lost" not in rest
            assert (cable.made > 1) is cut
