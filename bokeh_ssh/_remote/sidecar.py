"""A program beside a server, in its process group: started when a client wants it, ended with the server.

A publication on a gateway is one: whoever ends the server ends that too, and it lives for as long.
"""

from __future__ import annotations

import json

from bokeh_ssh._remote.process_group import piped, start

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any


class Sidecar:
    """What runs beside the server, if anything.

    :ivar pid: its process; 0 where none runs
    :ivar status: the last that it said of itself: a JSON object, on a line of its standard output
    """

    def __init__(self) -> None:
        self.pid = 0
        self.status: dict[str, Any] = {}

    def start(self, argv: list[bytes], env: dict[bytes, bytes], group: int) -> list[int]:
        """Start it; return our ends of its standard output and error.

        :raises OSError: if it cannot be started
        """
        self.status = {}

        def begin(outputs: list[int]) -> None:
            self.pid = start(argv, env, group, outputs)

        return piped(begin)

    def read_status(self, lines: Sequence[str]) -> bool:
        """Take lines of its standard output; return whether it has said something."""
        heard = False
        for line in lines:
            try:
                word = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(word, dict):
                self.status, heard = word, True
        return heard

    def note_ended(self) -> None:
        """Take note that it has."""
        self.pid, self.status = 0, {}
