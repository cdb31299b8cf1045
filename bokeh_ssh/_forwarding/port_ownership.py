"""Watches over a port of the server's machine: that it is one's own, and still is when something goes there.

A listener can end, and another user of that machine take its port, between two pages of one browser. So a
local connection is led on only once the port was looked at *after* the SSH server had connected to it: a
listener that is there then, and was there at the beginning, is the one that took the connection.

A connection from before the first look may be used if that look finds a listener that was there before the
tunnel's last connection was lost, or nobody else's socket with that port: whoever has accepted a connection
has a socket with it, and whoever has yet to accept one still listens.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import secrets
import threading
from collections.abc import Callable, Iterator

from bokeh_ssh._core.errors import BokehSSHError, ConnectionLostError, ForeignServerError, SessionError
from bokeh_ssh._core.framing import Reader
from bokeh_ssh._core.settings import setting
from bokeh_ssh._core.this_machine.proc_net import Listener, listeners, listening, owners, touching
from bokeh_ssh._core.waiting import wait_for
from bokeh_ssh._ssh.connection import Connection
from bokeh_ssh._ssh.remote_shell import exec_script
from bokeh_ssh._ssh.session import Session

#: Called with whether the port is still one's own; on the connection's thread, so it must not block.
Verdict = Callable[[bool], None]

#: Looks at all sockets of one port once, but for connections that are one's own or nobody's, and at its
#: listeners again for each line of its input.
_LOOK = (
    'rows() { grep -hi "$1" /proc/net/tcp /proc/net/tcp6 2>/dev/null; }; '
    'join() { while read -r row; do printf "%s;" "$row"; done; }; '
    'me=$(id -u); taken=" 0[1-9BC] [^ ]* [^ ]* [^ ]*  *"; '
    "[ -r /proc/net/tcp ] || { say blind; exit; }; "
    'say uid "$me"; say looked "$(rows "$all" | grep -vi -e "$taken$me " -e "${taken}0  *0 0 " | join)"; '
    'while read -r n; do say seen "$n;$(rows "$port" | join)"; done'
)


class PortOwnershipMonitor:
    """Checks, again and again, whether the listener on a port is still the one from the beginning.

    Made by :func:`monitor_port`. It begins on a thread of its own, since that takes two round trips.

    :param on_taken: called when the port becomes another user's; on the connection's thread
    :param before: watched over the same port, over a connection that was lost
    """

    def __init__(
        self,
        connection: Connection,
        port: int,
        on_taken: Callable[[BokehSSHError], None],
        before: PortOwnershipMonitor | None = None,
    ) -> None:
        self._connection = connection
        self._port = port
        self._on_taken = on_taken
        self._nonce = secrets.token_hex(16)
        self._reader = Reader(self._nonce)
        self._change = threading.Condition(threading.RLock())  # a signal handler may close meanwhile
        self._numbers = itertools.count()
        self._asked: dict[str, Verdict] = {}
        self._looked: bool | None = None  # False where nothing is seen
        self._me = -1
        self._first: frozenset[Listener] = frozenset()
        self._before = before._first if before else self._first
        self._sure = False  # whether the first look is enough for what was connected before
        self._early: list[tuple[Verdict, float]] = []  # who asks before it
        self._sees = False
        self._error: BokehSSHError | None = None
        self._begun = False
        self._ended = False
        self._leaving = False
        self._session: Session | None = None

    def begin(self) -> None:
        """Begin to look, on a thread of its own."""
        threading.Thread(target=self._begin, name="bokeh-ssh port monitor", daemon=True).start()

    def _begin(self) -> None:
        sees, error = False, None
        try:
            sees = self._start(self._connection.hop.timeout)
        except SessionError:  # no command may be run, so nothing is seen
            pass
        except BokehSSHError as exc:
            error = exc
        with self._change:
            self._sees, self._error, self._begun = sees, error, True
            early, self._early = self._early, []
            self._change.notify_all()
        for verdict, opened_at in early:
            self.verify(verdict, opened_at)

    def _start(self, timeout: float) -> bool:
        """Look for the first time; return whether it sees anything."""
        session = self._connection.run(
            exec_script(
                self._nonce, f'port="{listening(self._port)}"; all="{touching(self._port)}"; {_LOOK}'
            ),
            on_stdout=self._on_stdout,
            on_stderr=lambda data: None,
            on_exit=self._on_exit,
            timeout=timeout,
        )
        with self._change:
            self._session = session
            left = self._leaving
        if left:
            session.close()
        with self._change:
            wait_for(self._change, lambda: left or self._looked is not None or self._ended, timeout)
            return not left and bool(self._looked)

    def wait(self) -> bool:
        """Wait until it has begun; return whether it sees anything.

        :raises ConnectionLostError: if the line goes down
        """
        with self._change:
            wait_for(self._change, lambda: self._begun, 3 * self._connection.hop.timeout)
        if self._error:
            raise self._error
        return self._sees

    def check_owner(self) -> None:
        """Refuse a listener that was another user's at the first look; where nothing is seen, none is.

        :raises ForeignServerError: if it was
        :raises ConnectionLostError: if the line goes down
        """
        if not self.wait():
            return
        foreign = self._foreign_owner(self._first)
        if foreign is not None:
            msg = (
                f"the server on port {self._port} belongs to another user (uid {foreign}, you are {self._me})"
            )
            hint = (
                f"choose another {setting('remote_port')}, or allow it with {setting('allow_foreign=True')}"
            )
            raise ForeignServerError(
                msg, host=self._connection.name, hint=hint, port=self._port, owner=foreign
            )

    def _foreign_owner(self, now: frozenset[Listener]) -> int | None:
        if self._me < 0:  # that machine does not say who we are
            return None
        return next((owner for owner, _ in now if owner != self._me), None)

    def verify(self, verdict: Verdict, opened_at: float = math.inf) -> None:
        """Look at the port, and report; returns at once. Where nothing is seen, all are fine.

        :param opened_at: when the channel was confirmed that is to be used. Before the first look, that one
            decides
        """
        with self._change:
            if not self._begun:
                self._early.append((verdict, opened_at))
                return
            session = None if self._ended else self._session
            fine: bool | None = None
            if not self._sees:
                fine = self._error is None
            elif session is None:
                fine = False
            elif opened_at < session.replied_at:
                fine = self._sure
            number = str(next(self._numbers))
            if fine is None:
                self._asked[number] = verdict
        if fine is not None:
            verdict(fine)
        elif session:
            session.write(f"{number}\n".encode())

    def close(self) -> None:
        """End it; idempotent."""
        with self._change:
            self._leaving = True
            session = self._session
        if session:
            session.write_eof()
            session.close()

    def _on_stdout(self, data: bytes) -> None:
        for message in self._reader.feed(data):
            event, text = message["event"], str(message.get("text", ""))
            if event == "uid" and text.isdecimal() and len(text) < 20:  # as Python reads numbers
                self._me = int(text)
            elif event == "looked":
                self._first = self._read(text)
                others = owners(text.replace(";", "\n"), self._port) - {self._me}
                self._sure = bool(self._first & self._before) or (bool(self._first) and not others)
            elif event == "seen":
                number, _, rows = text.partition(";")
                verdict = self._asked.pop(number, None)
                if verdict:
                    verdict(self._judge(self._read(rows)))
            if event in ("looked", "blind"):
                with self._change:
                    self._looked = event == "looked"
                    self._change.notify_all()

    def _read(self, rows: str) -> frozenset[Listener]:
        return listeners(rows.replace(";", "\n"), self._port)

    def _judge(self, now: frozenset[Listener]) -> bool:
        foreign = self._foreign_owner(now)
        if foreign is not None:
            msg = f"port {self._port} belongs to another user now (uid {foreign}, you are {self._me})"
            hint = "see who took it; start the server again on another port, or on a private socket"
            self._on_taken(
                ForeignServerError(msg, host=self._connection.name, hint=hint, port=self._port, owner=foreign)
            )
            return False
        same = not self._first or bool(now & self._first)
        # A server of one's own that was restarted is fine, for the next connection: whose this one is, is
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
        # Where the line went down, that is reported, and not this.
        if self._looked and not self._leaving and self._connection.alive:
            msg = f"the check of who owns port {self._port} has ended"
            self._on_taken(ConnectionLostError(msg, host=self._connection.name, hint="open it again"))


@contextlib.contextmanager
def monitor_port(
    connection: Connection,
    port: int,
    on_taken: Callable[[BokehSSHError], None],
    before: PortOwnershipMonitor | None = None,
) -> Iterator[PortOwnershipMonitor]:
    """Watch over the port while the context lasts; begins in the background.

    :param on_taken: called when the port becomes another user's; on the connection's thread
    :param before: watched over the same port, over a connection that was lost
    """
    monitor = PortOwnershipMonitor(connection, port, on_taken, before)
    monitor.begin()
    try:
        yield monitor
    finally:
        monitor.close()
