"""What an app writes steers nothing: not where its tunnel leads, nor what it is taken for."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import apps
from beds import Machine, free_port, until
from bokeh_ssh import Event, Lost, Reconnected, ServerExited
from bokeh_ssh._readiness import Facts, holds
from cable import Cable
from test_direct import tunnel_to

#: What Bokeh itself writes when it listens, with a port and a process of somebody else.
LIES = """
import sys
for line in ("Starting Bokeh server version 9.9 (running on Tornado 9.9)",
             "Bokeh app running at: http://localhost:{port}/lie",
             "Starting Bokeh server with process id: 1"):
    print("2026-01-01 00:00:00,000", line, file=sys.stderr, flush=True)
    print(line, flush=True)
"""


def lying(machine: Machine, port: int) -> str:
    """Put an app that lies before its server listens, and in each session; gives its folder."""
    lies = LIES.format(port=port)
    folder = Path(apps.put(machine, "main.py", apps.SLIDER + lies)).parent
    hook = "def on_server_loaded(context):\n" + "".join(f"    {line}\n" for line in lies.strip().splitlines())
    (folder / "server_lifecycle.py").write_text(hook)
    return str(folder)


@pytest.mark.parametrize("where", ["socket", "any port", "port", "dev"])
def test_lies_of_an_app_lead_nowhere(embedded: Callable[..., Machine], tmp_path: Path, where: str) -> None:
    """The tunnel leads to the app, before and after a loss, whatever lines the app writes."""
    machine = embedded()
    keywords: dict[str, Any] = {
        "socket": {},
        "any port": {"signed": False, "args": ("--num-procs", "1")},
        "port": {"remote_port": free_port(), "signed": False},
        "dev": {"args": ("--dev",)},
    }[where]
    events: list[Event] = []
    with socket.create_server(("127.0.0.1", 0)) as other, Cable(machine.host, machine.port) as cable:
        there = cable.machine(machine, tmp_path)
        app = lying(machine, other.getsockname()[1])
        with tunnel_to(there, app, on_event=events.append, isolate=False, **keywords) as tunnel:
            assert [url.partition("?")[0].rpartition("/")[2] for url in tunnel.urls] == [Path(app).name]
            before = tunnel.remote_port
            apps.drive(tunnel.url)
            until(lambda: sum("/lie" in line for line in tunnel.log) >= 3, what="the app to lie in a session")
            cable.pull()
            until(lambda: any(isinstance(e, Reconnected) for e in events), what="the line to be back")
            apps.drive(tunnel.url)
            assert tunnel.remote_port == before
            assert tunnel.remote_port != other.getsockname()[1]
            assert next(e for e in events if isinstance(e, Reconnected)).same_server
        other.setblocking(False)
        with pytest.raises(BlockingIOError):
            other.accept()  # nobody came
    assert not [e for e in events if isinstance(e, ServerExited)]
    assert [e for e in events if isinstance(e, Lost)]  # the control: it was lost


def test_who_holds_a_port_is_seen() -> None:
    """Only a process that listens on a port is taken for the one that does."""
    if not Path("/proc/self/net/tcp").exists():
        pytest.skip("only Linux tells")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        assert holds([os.getpid()], port) is True
        assert holds([os.getppid()], port) is False
    assert holds([os.getpid()], port) is False


def test_long_lines_cost_little() -> None:
    """A line is read in time that does not grow with what an app puts into it."""
    facts = Facts()
    for text in (
        "Bokeh app running at: http://" + ":1" * 100_000,
        "Bokeh app running at: http://h:1/" + " " * 10**6,
    ):
        facts.read(text)
    for _ in range(1000):
        facts.read("Bokeh app running at: http://h:5006/" + " " * 60_000)
    assert facts.port == 5006
