"""How straight the way through the package is: what ``tests/support/way.py`` traces, bounded."""

from __future__ import annotations

import gc
import re
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import apps
import way
from beds import Machine, until
from bokeh_ssh import DirectTunnel, LocalForward

ARCHITECTURE = Path(__file__).parents[2] / "docs" / "architecture.md"


def test_picture_of_the_way_is_true(sshd: Callable[..., Machine]) -> None:
    """Opening a tunnel passes every module of the picture in docs/architecture.md, and has no more different
    crossings between modules than when that was made; how often a wait looks does not count."""
    machine = sshd()
    app = apps.put(machine, "app.py", apps.SLIDER)
    tunnel = DirectTunnel(
        machine.host, machine.user, app=app, python=sys.executable, isolate=False, **machine.login
    )
    gc.collect()
    gc.disable()  # what other tests left is not to be ended by the thread that is looked at
    try:
        with way.traced() as traced:
            tunnel.open()
    finally:
        gc.enable()
    tunnel.close()
    calls = traced.of(threading.current_thread().name)
    text = ARCHITECTURE.read_text(encoding="utf-8")
    picture = text.partition("The modules that the caller's thread passes")[2].partition("```text\n")[2]
    named, folder = set(), ""
    for line in picture.partition("```")[0].splitlines():
        first, _, rest = line.partition(" ")
        folder = first or folder
        names = re.findall(r"\b[a-z]\w+(?=[ ,;:]|$)", rest.partition(":")[0])
        named |= {f"{folder}.{name}" for name in names}
    assert len(named) > 25
    assert named - set(way.modules(calls)) == set()
    # Where the shell's greeting has come before its session was known, this thread answers it.
    answers = any(call.function == "supervisor_input" for call in calls)
    assert len(set(way.crossings(calls))) <= 120 + 9 * answers


def test_way_of_a_connection_is_short(sshd: Callable[..., Machine]) -> None:
    """From accepting a local connection to the request for its channel there are 6 modules at most."""
    machine = sshd()
    with way.traced(threads=True) as traced:
        with LocalForward(machine.host, machine.user, remote_port=machine.port, **machine.login) as forward:
            until(lambda: not forward.status().sessions, what="the look at the port to be over")
            assert forward._lifecycle.session._connections[0].io_loop.drain(20), "its end to be"
            gc.collect()  # what is left of the login is not to be ended by the thread that is looked at
            opened = len(traced.calls)
            with socket.create_connection(("127.0.0.1", forward.local_port)) as sock:
                assert sock.recv(4) == b"SSH-"
    passed = way.modules(way.first_connection(traced.calls[opened:]))
    assert passed[0] == "_forwarding.listener"
    assert len(passed) <= 6
