"""An app that counts what its server has seen: it tells the same server from a new one."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import apps
from beds import Machine
from bokeh_ssh import DirectTunnel, Event, GatewayTunnel
from cable import Cable

#: Counts what its server has seen: a new server begins at 1 again. For Bokeh and ``light_bokeh``.
COUNTER = """
import os
from bokeh.io import curdoc

seen = int(os.environ.get("SEEN_BY_THIS_SERVER", "0")) + 1
os.environ["SEEN_BY_THIS_SERVER"] = str(seen)
curdoc().title = f"seen {seen} by {os.getpid()}"
"""


@contextmanager
def cabled(machine: Machine, tmp_path: Path) -> Iterator[tuple[Cable, Machine]]:
    """Put a cable before a machine."""
    with Cable(machine.host, machine.port) as cable:
        yield cable, cable.machine(machine, tmp_path)


def tunnel_with_events(
    machine: Machine, app: str | None, events: list[Event], **keywords: Any
) -> DirectTunnel:
    """Make a tunnel, of this process, that writes its events down."""
    words = {
        "python": machine.python,
        "isolate": False,
        "on_event": events.append,
        **machine.login,
        **keywords,
    }
    return DirectTunnel(machine.host, machine.user, app, **words)


def ask(tunnel: DirectTunnel | GatewayTunnel) -> str:
    """Open a page of the counting app; gives what it shows."""
    found = re.search("<title>(.*)</title>", apps.get(tunnel.url))
    assert found
    return found[1]


def servers(machine: Machine, app: str) -> list[int]:
    """List the processes that serve the app."""
    return [
        pid
        for pid in machine.pids(app)
        if "serve" in str(machine.execute(["ps", "-ww", "-o", "args=", "-p", str(pid)]))
    ]
