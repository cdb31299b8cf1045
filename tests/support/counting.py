"""An app that counts what its server has seen: it tells the same server from a new one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from beds import Machine
from bokeh_ssh import DirectTunnel, Event, GatewayTunnel
from cable import Cable

#: Counts what its server has seen: a new server begins at 1 again.
COUNTER = """
import os
from bokeh.io import curdoc
from bokeh.models import Div
from bokeh.application import application

seen = os.environ.setdefault("SEEN_BY_THIS_SERVER", "0")
os.environ["SEEN_BY_THIS_SERVER"] = str(int(seen) + 1)
curdoc().add_root(Div(text=f"seen {int(seen) + 1} by {os.getpid()}", name="text"))
"""


@contextmanager
def cabled(machine: Machine, tmp_path: Path) -> Iterator[tuple[Cable, Machine]]:
    """Put a cable before a machine."""
    with Cable(machine.host, machine.port) as cable:
        yield cable, cable.machine(machine, tmp_path)


def tunnel_with_events(
    machine: Machine, app: str | None, events: list[Event], **keywords: Any
) -> DirectTunnel:
    """Make a tunnel that writes its events down."""
    words = {"python": machine.python, "on_event": events.append, **machine.login, **keywords}
    return DirectTunnel(machine.host, machine.user, app, **words)


def ask(tunnel: DirectTunnel | GatewayTunnel) -> str:
    """Open a session of the counting app; gives what it shows."""
    with tunnel.pull_session() as session:
        return str(session.document.select_one({"name": "text"}).text)


def servers(machine: Machine, app: str) -> list[int]:
    """List the processes that serve the app."""
    return [
        pid
        for pid in machine.pids(app)
        if "serve" in str(machine.execute(["ps", "-ww", "-o", "args=", "-p", str(pid)]))
    ]
