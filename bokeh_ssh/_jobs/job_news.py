"""Warnings of a job's end, from its holder and from the clock."""

from __future__ import annotations

import contextlib
import json
import logging
import socket
import threading
from collections.abc import Callable

from bokeh_ssh._core.errors import BokehSSHError, ForwardError
from bokeh_ssh._core.threads import Thread
from bokeh_ssh._core.waiting import wait
from bokeh_ssh._ssh.connection import Connection

log = logging.getLogger("bokeh_ssh.job")

#: Seconds until the holder must have taken the connection.
_TIMEOUT = 10.0
#: Seconds between two looks, where nothing is due: clocks are set, and machines sleep.
_LOOK = 60.0
_LINE = 1 << 10
#: Seconds for what it does just now, when it is closed.
_GIVING_UP = 2.0


class JobNews:
    """Calls when the holder passes a warning on, or a time has come; while it is entered.

    :param connection: leads to the job's machine
    :param path: the holder's socket there; empty where it has none
    :param name: distinguishes this tunnel from others, also after a loss
    :param next_due: returns in how many seconds it is to be called; None: not for a time
    :param on_news: called on a thread of its own; with whether a warning came
    :ivar clients: how many tunnels use the job, as far as that is known
    """

    def __init__(
        self,
        connection: Connection,
        path: str,
        name: str,
        next_due: Callable[[], float | None],
        on_news: Callable[[bool], None],
    ) -> None:
        self._connection = connection
        self._path = path
        self._name = name
        self._next_due = next_due
        self._on_news = on_news
        self._sock, self._silent = socket.socketpair()
        self._over = False
        self._opened = threading.Event()
        self._kept = threading.Event()
        self._rest = b""
        self.clients = 0
        self._thread = Thread(self._run, name=f"bokeh-ssh job news {connection.name}")

    def __enter__(self) -> JobNews:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._over = True
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._silent.close()
        self._thread.join(_GIVING_UP)

    def keep_job(self) -> bool:
        """Ask the holder to stay without clients; return whether it has confirmed that."""
        wait(self._opened, _TIMEOUT)
        with contextlib.suppress(OSError):
            self._sock.sendall(b"keep\n")
        return wait(self._kept, _TIMEOUT)

    def _run(self) -> None:
        try:
            self._open()
            self._opened.set()
            with self._sock:
                while not self._over:
                    self._listen()
        except (BokehSSHError, OSError) as exc:  # the line went down, or it is closed: reported elsewhere
            log.debug("%s: news of the job: %s", self._connection.name, exc)

    def _open(self) -> None:
        """Connect to the holder; without it there is the clock alone."""
        try:
            opened = self._connection.open_socket(self._path, timeout=_TIMEOUT) if self._path else None
        except ForwardError as exc:
            log.debug("%s: no news of the job: %s", self._connection.name, exc)
            return
        if opened:
            before, self._sock = self._sock, opened
            before.close()
            opened.sendall(self._name.encode() + b"\n")

    def _listen(self) -> None:
        """Wait for a line, or until something is due, and call."""
        due = self._next_due()
        self._sock.settimeout(max(0.01, min(_LOOK, _LOOK if due is None else due)))
        try:
            data = self._sock.recv(_LINE)
        except TimeoutError:
            if due is not None and due <= _LOOK:
                self._on_news(False)
            return
        self._over = self._over or not data
        *lines, self._rest = (self._rest[-_LINE:] + data).split(b"\n")
        for line in lines:
            self._take(line)

    def _take(self, line: bytes) -> None:
        try:
            message = json.loads(line)
            event = message["event"]
        except (ValueError, KeyError, TypeError, RecursionError):
            return
        if event == "warned":
            self._on_news(True)
        elif event == "kept":
            self._kept.set()
        elif event == "clients" and isinstance(message.get("count"), int):
            self.clients = message["count"]
