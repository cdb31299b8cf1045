"""What the other side can make us keep: bounded in bytes, on the remote machine and here."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import sys
import threading
import time
import types
from collections.abc import Callable
from typing import Any

import pytest

from beds import until
from bokeh_ssh._cli.output_queue import OutputQueue
from bokeh_ssh._core.dispatcher import Dispatcher
from bokeh_ssh._core.events import AppFailed
from bokeh_ssh._core.framing import Reader
from bokeh_ssh._forwarding.port_ownership import PortOwnershipMonitor
from bokeh_ssh._remote import client_stream
from bokeh_ssh._server.launch_spec import Launch
from bokeh_ssh._server.log_parsing import AppErrors
from bokeh_ssh._server.server_state import ServerState
from memory import peak
from processes import proc

if os.name != "posix":
    pytest.skip("the remote side is a POSIX system", allow_module_level=True)

from local_runner import FAKE, Bench, LocalSession, heard

_MIB = 1 << 20
_SIZE = 48 * _MIB  # of what is written

#: Floods by the name in the first argument once the file GO is there, then makes the file DONE.
_FLOODS = """
import os, sys, time
kind, go, done, size = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
while not os.path.exists(go):
    time.sleep(0.02)
piece = {
    "lines": b"x" * 99 + b"\\n",
    "blank-lines": b"\\n",
    "one-line": b"x",
    "controls": b"\\x01" * 999 + b"\\n",
    "wide": ("\\U0001f600" * 250 + "\\n").encode(),
    "words": b'{"event": "port", "name": "' + b"n" * 900 + b'"}\\n',
}[kind]
block = piece * (65536 // len(piece))
for _ in range(size // len(block)):
    left = memoryview(block)
    while left:
        left = left[os.write(1, left):]
open(done, "w").close()
time.sleep(600)
"""


def memory(pid: int) -> int:
    """Tell how many bytes a process has had in use at most."""
    for line in proc(f"{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(pid)


def stalled(session: LocalSession) -> None:
    session.stalled.set()


def gone(session: LocalSession) -> None:
    session.vanish()


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
@pytest.mark.parametrize("client", [stalled, gone])
@pytest.mark.parametrize("kind", ["lines", "blank-lines", "one-line", "controls", "wide", "words"])
def test_supervisor_keeps_little_of_a_flood(
    bench: Bench, kind: str, client: Callable[[LocalSession], None]
) -> None:
    """48 MiB that nobody reads are drained, and cost the supervisor some MB at most, whatever they are."""
    flood = bench.script("flood.py", _FLOODS)
    go, done = bench.path / "go", bench.path / "done"
    size = _SIZE // 16 if kind == "blank-lines" else _SIZE
    words = [sys.executable, "-S", flood, kind, str(go), str(done), str(size)]
    wrapper = bench.script("wrapper", f'#!/bin/sh\n{" ".join(words)} &\nexec "$@"\n')
    command = FAKE if kind == "words" else (wrapper, *FAKE)
    server = bench.start(command=command, env={"FAKE": ""}, lease=100)
    session = bench.runners[-1].sessions[-1]
    if kind == "words":
        server.send(do="accompany", argv=words, env={})
        server.heartbeat()
        until(lambda: b'"beat"' in session.received, what="it to have begun")
    supervisor = heard(server, session, "started")[-1]["supervisor"]
    before = memory(supervisor)
    client(session)
    go.touch()
    until(done.exists, timeout=60, what="all to be taken")
    assert memory(supervisor) - before < 12 * _MIB
    assert len(session.received) < 8 * _MIB
    session.vanish()  # else it would wait for its client to take the end
    os.kill(supervisor, signal.SIGTERM)  # whoever could stop it is not there


def test_words_too_deep_to_be_read_are_none(bench: Bench) -> None:
    """JSON that is nested without end is skipped, on the other side as on this one."""
    server = bench.start(command=FAKE, env={"FAKE": ""})
    program = "print('[' * 60000); print('{\"a\":' * 10000); print('{\"event\": \"port\"}', flush=True)"
    program = f"import time; {program}; time.sleep(600)"
    assert server.start_sidecar((sys.executable, "-S", "-c", program), {}, 20) == {"event": "port"}
    reader = Reader("m" * 32)
    assert reader.feed(b"m" * 32 + b"[" * 60000 + b"\n") == []


def test_orders_too_long_are_skipped(bench: Bench) -> None:
    """A message of more than 4 MiB is skipped whole; what comes after it is obeyed."""
    server = bench.start(command=FAKE, env={"FAKE": ""}, lease=100)
    session = bench.runners[-1].sessions[-1]
    supervisor = heard(server, session, "started")[-1]["supervisor"]
    before = memory(supervisor) if sys.platform == "linux" else 0
    for _ in range(10):
        session.write(b"x" * _MIB)
    session.write(b'{"do": "stop"}{\n')
    server.heartbeat()
    until(lambda: b'"beat"' in session.received, what="an answer to what follows")
    if sys.platform == "linux":
        assert memory(supervisor) - before < 12 * _MIB
    assert not server.ended.is_set()


def test_lines_that_lie_about_ports_cost_little(bench: Bench) -> None:
    """An app that says again and again where it listens, and lies, holds up neither its start nor its end."""
    text = "".join(
        f"Bokeh app running at: http://x:{port}/\nStarting Bokeh server with process id: {port}\n"
        for port in range(1, 20_000)
    )
    lies = bench.path / "lies"
    lies.write_text(text)
    wrapper = bench.script("wrapper", f'#!/bin/sh\ncat {lies} >&2\nexec "$@"\n')
    server = bench.start(command=(wrapper, *FAKE), env={"FAKE": ""})
    began = time.monotonic()
    assert server.stop() is True
    assert time.monotonic() - began < 15


def test_log_here_is_bounded_in_characters() -> None:
    """Of lines of any length so many characters are kept as are of use; the last ones."""
    heard = ServerState("host", Launch(), lambda event: None)
    for number in range(100):
        heard.receive({"event": "log", "lines": [f"{number} {at} " + "x" * 20_000 for at in range(100)]})
    assert sum(map(len, heard.log.lines)) <= _MIB
    assert heard.log.lines[-1].startswith("99 99 ")
    heard.receive({"event": "log", "lines": [""] * 5000})
    assert len(heard.log.lines) == 2000


def test_errors_of_apps_are_bounded() -> None:
    """A traceback without end is cut, and one that is as it should be is whole."""
    errors = AppErrors()
    start = ["Error running application handler x", "Traceback (most recent call last)"]
    [found] = errors.feed([*start, *("  " + "x" * 5000 for _ in range(10_000)), "ValueError: y"])
    assert len(found) < 100_000
    [found] = errors.feed([*start, "  File x", "ValueError: y"])
    assert found == "\n".join([*start, "  File x", "ValueError: y"])


def test_what_waits_for_a_slow_handler_is_bounded_in_bytes(caplog: pytest.LogCaptureFixture) -> None:
    """Large events that a handler does not take go, the oldest first, and are counted."""
    go, seen = threading.Event(), []

    def handle(event: AppFailed) -> None:
        go.wait(20)
        seen.append(event.traceback[:3])

    dispatcher = Dispatcher[AppFailed](handle, "slow", "on_event")
    with caplog.at_level(logging.WARNING, "bokeh_ssh"):
        for number in range(200):
            dispatcher.put(AppFailed(host="host", traceback=f"{number:03}" + "x" * _MIB))
        assert dispatcher._size <= 32 * _MIB
        go.set()
        dispatcher.finish()
        assert dispatcher.drain(20)
    assert seen[-1] == "199"
    assert 30 <= len(seen) <= 34
    assert "has missed" in caplog.text


def test_lines_that_wait_for_a_terminal_are_bounded() -> None:
    """Lines that nobody takes are kept for some MB at most; how many are missing is said."""
    shown: list[str] = []
    backlog = OutputQueue(shown.extend)
    for _ in range(20):
        backlog.put(["x" * 8000] * 1000)
    backlog.start()
    backlog.close(10)
    assert sum(map(len, shown)) < 5 * _MIB
    lost = int(shown[0].split()[0][1:])
    assert lost + len(shown) - 1 == 20_000


def test_what_a_list_of_servers_says_is_bounded(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that says more of its servers than there can be is not listened to for ever."""
    from bokeh_ssh._server import registry

    monkeypatch.setattr(registry, "_MOST_BYTES", 1000)
    run = registry.ControlRequest(bench.runner(), {"do": "list"}, None, 5)
    for number in range(1000):
        run._on_stdout(run._nonce.encode() + json.dumps({"event": "server", "n": number}).encode() + b"\n")
    assert len(run._messages) < 30


class _Floods:
    """A connection whose machine says the same to whatever is executed there, 64 MiB of it."""

    name = "host"
    hop = types.SimpleNamespace(timeout=20)

    def __init__(self, say: Callable[[str, int], bytes]) -> None:
        self._say = say

    def run(self, command: str, *, on_stdout: Callable[[bytes], None], **_: object) -> types.SimpleNamespace:
        for number in range(1024):
            on_stdout(self._say(command, number))
        return types.SimpleNamespace(write_eof=nothing, close=nothing)


def nothing() -> None:
    pass


def test_words_that_nobody_asked_for_are_not_kept() -> None:
    """What watches over a port keeps nothing of messages that it does not know."""

    def say(command: str, number: int) -> bytes:
        mark = "".join(re.findall(r'm=(\w+)"(\w+)"', command)[0]).encode()
        return mark + b'{"event": "%08d' % number + b"x" * 65536 + b'"}\n'

    connection: Any = _Floods(say)
    assert peak(lambda: PortOwnershipMonitor(connection, 5006, lambda error: None)._begin()) < 2 * _MIB


def test_of_what_a_slow_client_misses_the_last_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """While a client takes nothing, log lines are counted, and of all else the last of a kind waits."""
    sent = bytearray()
    full = threading.Event()

    def write(fd: int, data: bytes) -> int:
        if full.is_set():
            raise BlockingIOError
        sent.extend(data)
        return len(data)

    monkeypatch.setattr(client_stream, "os", types.SimpleNamespace(write=write))
    wire = client_stream.ClientStream("mark")
    full.set()
    for number in range(3000):
        wire.send("log", stream="out", lines=["x" * 1000])
        wire.send("along", word={"number": number, "text": "x" * 1000})
        wire.send("stopped" if number % 2 else "continued")
        wire.send("stored", number=number, fault="full" if number == 2500 else "")
    assert wire._size < 1.1 * _MIB
    assert len(wire._deferred) == 3
    full.clear()
    wire.flush()
    wire.send("exit", status=0)
    said = [json.loads(line.removeprefix("mark")) for line in sent.decode().splitlines()]
    lines = sum(len(each["lines"]) for each in said if each["event"] == "log")
    assert [each["event"] for each in said[-5:]] == ["dropped", "along", "stopped", "stored", "exit"]
    assert said[-5]["lines"] + lines == 3000
    assert said[-4]["word"]["number"] == 2999
    assert said[-2]["fault"] == "full"
