"""``bokeh-ssh doctor``: what it looks at, and what it says of each."""

from __future__ import annotations

from beds import Machine
from programs import login, run_here

CHECKS = [
    "this machine", "name", "port", "host key", "login", "round trip", "forwarding", "sockets",
    "as a gateway", "files", "server", "after a loss", "your servers",
]  # fmt: skip


def examine(machine: Machine, *words: str, code: int = 0) -> dict[str, tuple[str, str, str]]:
    """Run it; gives verdict, text and hint by check."""
    start = ["--python", machine.python]
    told = run_here("doctor", machine.host, *start, *login(machine), *words, code=code)
    assert told.stderr == ""
    rows = [line.split("\t") for line in told.stdout.splitlines()]
    return {row[1]: (row[0], row[2], row[3] if len(row) > 3 else "") for row in rows}
