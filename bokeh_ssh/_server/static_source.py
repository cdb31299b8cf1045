"""Files of BokehJS from the machine that a server starts on, compressed, before a browser asks for them.

A page of Bokeh loads 4 MB of them, which Bokeh does not compress. While the server starts, the line is idle.
"""

from __future__ import annotations

import base64
import logging
import threading
import zlib
from collections.abc import Callable, Collection
from typing import Any, Protocol

from bokeh_ssh._core.errors import BokehSSHError
from bokeh_ssh._core.threads import Thread
from bokeh_ssh._server.registry import ControlRequest
from bokeh_ssh._ssh.connection import Connection

log = logging.getLogger("bokeh_ssh.forward")

#: Files that are taken, and bytes of one: bounds on what the far side can make us keep.
_MOST_FILES = 16
_MOST_BYTES = 16 * 1024 * 1024
#: Seconds for all of them: 1.4 MB travel, at 50 kbit/s or more.
_TIMEOUT = 240.0


class Sink(Protocol):
    """Takes the content of one file."""

    def write(self, data: memoryview) -> None: ...
    def finish(self) -> None: ...
    def discard(self) -> None: ...


class StaticSource:
    """Has the files sent, on a thread of its own. What does not come, comes when a browser asks for it.

    :param known: returns the hashes (SHA-512) of the files that are here already
    :param expect: gets the name and the hash of a file that is about to come; returns what takes it, or None
        where it is not wanted
    """

    def __init__(
        self,
        connection: Connection,
        known: Callable[[], Collection[str]],
        expect: Callable[[str, str], Sink | None],
    ) -> None:
        self._connection = connection
        self._known = known
        self._expect = expect
        self._sinks: dict[str, Sink] = {}
        self._request: ControlRequest | None = None
        self._closed = False
        self._thread: threading.Thread | None = None
        self._lock = threading.RLock()  # a signal handler may close meanwhile

    def start(self, python: str, folder: str) -> None:
        """Ask for them; returns at once.

        :param python: an interpreter there
        :param folder: where its Bokeh is installed
        """
        with self._lock:
            if self._closed or self._thread:
                return
            self._thread = Thread(self._run, python, folder, name="bokeh-ssh static source")
            self._thread.start()

    def close(self, timeout: float = 2.0) -> None:
        """Take no more of them; idempotent."""
        with self._lock:
            self._closed = True
            request, thread = self._request, self._thread
        if request:
            request.cancel()
        if thread:
            thread.join(timeout)

    def _run(self, python: str, folder: str) -> None:
        order = {"do": "static", "folder": folder, "known": sorted(self._known())}
        request = ControlRequest(self._connection, order, python, _TIMEOUT, self._receive)
        with self._lock:
            if self._closed:
                return
            self._request = request
        try:
            request.carry_out("end")
        except BokehSSHError as exc:
            log.info("files of BokehJS come when they are asked for: %s", exc)
        finally:
            with self._lock:
                self._closed = True
                for sink in self._sinks.values():
                    sink.discard()

    def _receive(self, message: dict[str, Any]) -> None:
        """Take a message, on the connection's thread; one of another shape, or too late, is ignored."""
        try:
            with self._lock:
                if not self._closed:
                    self._take(message)
        except (KeyError, TypeError, ValueError, zlib.error) as exc:
            log.info("a message about static files is ignored: %r", exc)

    def _take(self, message: dict[str, Any]) -> None:
        if message["event"] == "files":
            for name, sha512 in message["files"][:_MOST_FILES]:
                if sink := self._expect(str(name), str(sha512)):
                    self._sinks[str(sha512)] = sink
        elif message["event"] == "file" and (sink := self._sinks.get(str(message["sha512"]))):
            inflater = zlib.decompressobj()
            sink.write(memoryview(inflater.decompress(base64.b64decode(message["data"]), _MOST_BYTES)))
            sink.finish()
