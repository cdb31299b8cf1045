"""Watches over a port of the server's machine: that it is still one's own when something is to go there.

A listener can end, and another user of that machine take its port, between two pages of one browser. So a
local connection is led on only once the port was looked at *after* the SSH server had connected to it: a
listener that is there then, and was there at the beginning, is the one that took the connection.
"""

from __future__ import annotations

import contextlib
import itertools
import secrets
import threading
from collections.abc import Callable, Iterator

from bokeh_ssh._core.errors import BokehSSHError, ConnectionLostError, ForeignServerError, SessionError
from bokeh_ssh._core.framing import Reader
from bokeh_ssh._core.proc_net import Listener, listeners, listening
from bokeh_ssh._core.waiting import wait_for
from bokeh_ssh._ssh.connection import Connection
from bokeh_ssh._ssh.remote_shell import encode, exec_line

#: Told whether the port is still one's own; on the connection's thread, so it must not block.
Verdict = Callable[[bool], None]

#: What is waited for.
_WORDS = ("hello", "uid", "blind")
#: Answers each line of its input with the listeners of one port; one ``grep`` a time.
_LOOK = """\
say() { printf '%s{"event":"%s","text":"%s"}\\n' "$mark" "$1" "$2"; }
[ -r /proc/net/tcp ] || { say blind; exit; }
say uid "$(id -u)"
while read -r n; do
  x=$(grep -hi "$port" /proc/net/tcp /proc/net/tcp6 2>/dev/null | tr '\\n' ';')
  say seen "$n;$x"
done"""


class PortOwnershipMonitor:
    """Tells, again and again, whether the listener on a port is still the one from the beginning.

    Made by :func:`monitor_port`.
    """

    def __init__(self, connection: Connection, port: int, on_taken: Callable[[BokehSSHError], None]) -> None:
        self._host = connection.name
        self._port = port
        self._on_taken = on_taken
        self._nonce = secrets.token_hex(16)
        self._reader = Reader(self._nonce)
        self._change = threading.Condition()
        self._numbers = itertools.count()
        self._asked: dict[str, Verdict] = {}
        self._said: set[str] = set()
        self._me = -1
        self._first: frozenset[Listener] = frozenset()
        self._ended = False
        self._leaving = False
        self._session = connection.run(
            exec_line(self._nonce),
            on_stdout=self._on_stdout,
            on_stderr=lambda data: None,
            on_exit=self._on_exit,
            timeout=connection.hop.timeout,
        )

    def _start(self, timeout: float) -> bool:
        """Look for the first time; return whether it sees anything."""
        if not self._wait("hello", timeout):
            return False
        self._session.write(encode(f"mark={self._nonce}; port='{listening(self._port)}'\n{_LOOK}\n"))
        return self._wait("uid", timeout)

    def _wait(self, word: str, timeout: float) -> bool:
        with self._change:
            wait_for(
                self._change, lambda: word in self._said or "blind" in self._said or self._ended, timeout
            )
            return word in self._said

    def verify(self, verdict: Verdict) -> None:
        """Look at the port, and tell; returns at once."""
        with self._change:
            over = self._ended
            number = str(next(self._numbers))
            if not over:
                self._asked[number] = verdict
        if over:
            verdict(False)
        else:
            self._session.write(f"{number}\n".encode())

    def close(self) -> None:
        """End it."""
        self._leaving = True
        self._session.write_eof()
        self._session.close()

    def _on_stdout(self, data: bytes) -> None:
        for message in self._reader.feed(data):
            event, text = message["event"], str(message.get("text", ""))
            if event == "uid" and text.isdecimal() and len(text) < 20:  # as Python reads numbers
                self._me = int(text)
            elif event == "seen":
                number, _, rows = text.partition(";")
                verdict = self._asked.pop(number, None)
                if verdict:
                    verdict(self._judge(listeners(rows.replace(";", "\n"), self._port)))
            if event in _WORDS:
                with self._change:
                    self._said.add(event)
                    self._change.notify_all()

    def _judge(self, now: frozenset[Listener]) -> bool:
        foreign = [owner for owner, _ in now if owner != self._me]
        if foreign:
            msg = f"port {self._port} belongs to another user now (uid {foreign[0]}, you are {self._me})"
            hint = "see who took it; start the server again on another port, or on a private socket"
            self._on_taken(
                ForeignServerError(msg, host=self._host, hint=hint, port=self._port, owner=foreign[0])
            )
            return False
        same = not self._first or bool(now & self._first)
        # A server of one's own that was started anew is fine, for the next connection: whose this one is, is
        # not known.
        self._first = now
        return same and bool(now)

    def _on_exit(self, status: int | None) -> None:
        with self._change:
            self._ended = True
            asked, self._asked = self._asked, {}
            self._change.notify_all()
        for verdict in asked.values():
            verdict(False)
        if "uid" in self._said and not self._leaving:
            msg = f"nobody watches over port {self._port} any more"
            self._on_taken(ConnectionLostError(msg, host=self._host, hint="open it again"))


@contextlib.contextmanager
def monitor_port(
    connection: Connection, port: int, on_taken: Callable[[BokehSSHError], None]
) -> Iterator[PortOwnershipMonitor | None]:
    """Watch over the port while the context lasts; None where it would see nothing.

    :param on_taken: told when the port is another user's; on the connection's thread
    :raises ConnectionLostError: if the line goes down
    """
    try:
        monitor = PortOwnershipMonitor(connection, port, on_taken)
    except SessionError:
        yield None
        return
    try:
        yield monitor if monitor._start(connection.hop.timeout) else None
    finally:
        monitor.close()
