"""What the command line sends to other programs: one JSON object a line, on standard output.

The names of objects and of their fields are part of the interface: they change as the Python names do.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import re
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

from bokeh_ssh._cli.cache import Kept
from bokeh_ssh._cli.display import repeat
from bokeh_ssh._cli.doctor import Finding
from bokeh_ssh._cli.messages import describe_error, next_step
from bokeh_ssh._cli.options.words import as_flag
from bokeh_ssh._cli.tunnels.registry import HeldTunnel
from bokeh_ssh._core.errors import BokehSSHError
from bokeh_ssh._core.events import Event, Prompt
from bokeh_ssh._core.settings import Wording
from bokeh_ssh._jobs.job import ListedJob
from bokeh_ssh._server.registry import RemoteServer


def name_of(event: Event) -> str:
    """Return the name of an event: that of its class, in lower case, with underscores.

    >>> from bokeh_ssh import HostKeyAdded
    >>> name_of(HostKeyAdded(host="h", key_type="", fingerprint="", path=""))
    'host_key_added'
    """
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", type(event).__name__).lower()


def record(event: str, **fields: Any) -> str:
    """Write one object: what it is, when it was, and its fields."""
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="milliseconds")
    # In plain ASCII, whatever the locale; half a surrogate pair from a file name goes out as it is escaped.
    return json.dumps({"event": event, "time": now.replace("+00:00", "Z"), **fields})


def error_fields(error: BokehSSHError, exit_code: int, wording: Wording = as_flag) -> dict[str, Any]:
    """Return the fields of an ``error`` object."""
    return {
        "type": type(error).__name__,
        "stage": error.stage,
        "host": error.host,
        "setting": error.setting,
        "message": describe_error(error, wording),
        "hint": next_step(error, wording),
        "log": list(getattr(error, "log", ())),
        "exit_code": exit_code,
    }


def server_fields(server: RemoteServer) -> dict[str, Any]:
    """Return what is written of a server; not what is our own way to it."""
    every = dataclasses.asdict(server)
    return {name: value for name, value in every.items() if name not in ("python", "libraries", "place")}


class JsonDisplay:
    """Reports what happens in JSON; shows nothing. Has what ``Display`` has."""

    moving = False

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.ready = ""
        self.wording: Wording = as_flag

    def on_event(self, event: Event) -> None:
        """Print an event; from any thread."""
        self.ready = getattr(event, "url", "") or self.ready
        self.write(name_of(event), **dataclasses.asdict(event))

    def write(self, event: str, **fields: Any) -> None:
        """Write one object."""
        line = record(event, **fields)
        with self._lock:
            sys.stdout.write(line + "\n")
            sys.stdout.flush()

    def addresses(self, *texts: str) -> None:
        """Print the addresses that can be opened now."""
        self.write("opened", addresses=list(texts))

    def servers(self, servers: Sequence[RemoteServer]) -> None:
        """Print which servers there are."""
        for server in servers:
            self.write("server", **server_fields(server))

    def tunnels(self, tunnels: Sequence[HeldTunnel]) -> None:
        """Print which tunnels this machine has, and what each does."""
        for tunnel in tunnels:
            fields = dataclasses.asdict(tunnel)
            fields.pop("path")
            if tunnel.status:
                fields["status"]["rate"] = tunnel.status.rate
            self.write("tunnel", **fields, state=tunnel.state)

    def statuses(
        self, find: Callable[[], Sequence[HeldTunnel]], *, watch: bool, check: Callable[[], None]
    ) -> None:
        """Print the same, once or every second."""
        repeat(lambda: self.tunnels(find()), watch, check)

    def plan(self, lines: Sequence[str]) -> None:
        """Print what would be done."""
        self.write("plan", commands=list(lines))

    def jobs(self, jobs: Sequence[ListedJob]) -> None:
        """Print which jobs there are."""
        for job in jobs:
            self.write("job", **dataclasses.asdict(job))

    def cache(self, kept: Kept) -> None:
        """Print what is kept on this machine."""
        self.write("cache", **dataclasses.asdict(kept))

    def begin(self, text: str) -> None:
        """Print nothing: what comes of it is printed."""

    def finding(self, finding: Finding) -> None:
        """Print what was found."""
        self.write("finding", **dataclasses.asdict(finding))

    def done(self, text: str, event: str, **fields: Any) -> None:
        """Print what was done."""
        self.write(event, **fields)

    def log_lines(self, lines: Sequence[str]) -> None:
        """Print what the server wrote."""
        for line in lines:
            self.write("log", line=line)

    def error(self, error: BokehSSHError, exit_code: int, *, trace: bool = False) -> None:
        """Print an error; no object comes after it."""
        self.write("error", **error_fields(error, exit_code, self.wording))

    def note(self, text: str) -> None:
        """Print how things are."""
        self.write("note", text=text)

    def warn(self, text: str) -> None:
        """Print what does not work as hoped."""
        self.write("warning", text=text)

    def prompt(self, ask: Prompt) -> Prompt:
        """Leave the question to the terminal."""
        return ask

    def hint(self, text: str) -> None:
        """Print nothing: it is for people."""

    def interrupted(self) -> None:
        """Print nothing: ``closed`` comes."""

    def stop(self) -> None:
        """Do nothing: no line moves."""
