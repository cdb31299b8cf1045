"""Tunnels to a machine, and Bokeh servers that were started there without our help."""

from __future__ import annotations

from typing import Any

from beds import Machine, Running, until
from bokeh_ssh import DirectTunnel


def tunnel_to(machine: Machine, app: str | None = None, **keywords: Any) -> DirectTunnel:
    """Make a tunnel, of this process, that uses the machine's own interpreter."""
    words = {"python": machine.python, "isolate": False, **machine.login, **keywords}
    return DirectTunnel(machine.host, machine.user, app, **words)


def serve_on(machine: Machine, *words: str, user: str | None = None) -> Any:
    """Run a Bokeh server on the machine without our help: the ``nohup bokeh serve &`` of the docs."""
    command = [machine.python, "-m", "bokeh", "serve", "--address", "127.0.0.1", "--port", "0", *words]
    owner = machine.user if machine.kind == "docker" else None
    return machine.spawn(command, user=user or owner)


def port_of(running: Running) -> int:
    """Wait for the server to say where it listens."""
    line = until(
        lambda: [line for line in running.log.splitlines() if "running at: http" in line],
        timeout=40,
        what="Bokeh to listen",
    )
    return int(line[0].rpartition(":")[2].partition("/")[0])
