"""What lives on SSH connections: each that it opens, it is lost with, and logs in again as it did before."""

from __future__ import annotations

import contextlib
import time

from bokeh_ssh._core.events import OnEvent, Ready
from bokeh_ssh._core.host import Host
from bokeh_ssh._ssh.auth.prompt_cache import PromptCache
from bokeh_ssh._ssh.connect import OpenStream, connect
from bokeh_ssh._ssh.connection import Connection
from bokeh_ssh._tunnels.lifecycle import Lifecycle

#: Seconds that a server has to show that it is there before what it holds for us is ended over it.
_LAST_WORD = 1.0
#: Addresses of machines that are remembered.
_MOST_PEERS = 8


class Link(Lifecycle):
    """Something that is open while its connections are."""

    def __init__(self, on_event: OnEvent | None, isolate: bool, reconnect: bool) -> None:
        super().__init__(on_event, isolate, reconnect)
        self._prompt_cache = PromptCache(self._await_handlers)
        self._connections: list[Connection] = []

    def _connect(
        self,
        connection_stack: contextlib.ExitStack,
        host: Host,
        via: Connection | None = None,
        stream: OpenStream | None = None,
    ) -> Connection:
        """Connect and log in, with what a person has answered before; when it is lost, so is this."""
        connection = connection_stack.enter_context(
            connect(
                host,
                via=via,
                on_event=self._emit,
                prompt_cache=self._prompt_cache,
                stream=stream,
                prefer=self._peers,
            )
        )
        self._connections.append(connection)
        self._peers = tuple(dict.fromkeys((*self._peers, *connection.peers)))[-_MOST_PEERS:]
        connection_stack.callback(self._connections.remove, connection)
        connection.on_lost(lambda _: self._on_connection_lost(connection.lost_error()))
        return connection

    def _drop_silent_connections(self) -> None:
        """Close connections that do not answer, so that ending what they carry does not wait for them."""
        asked = [
            (connection, connection.send_keepalive())
            for connection in list(self._connections)
            if connection.alive
        ]
        deadline = time.monotonic() + _LAST_WORD
        for connection, reply in asked:
            if not reply.wait(max(0.0, deadline - time.monotonic())):
                connection.give_up(f"the server did not answer for {_LAST_WORD:g} s")

    def _emit_ready(self, host: str, url: str) -> None:
        """Say that it works; when it works again, that is told as such."""
        if self._state == "connecting":
            self._emit(Ready(host=host, url=url))
