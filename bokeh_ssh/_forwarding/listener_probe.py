"""Whether what connects to a listener of ours on the server comes here: only a word that comes back counts.

That a server says it listens does not mean that it does so on every address of the name that it was given
(Dropbear is content with one of 127.0.0.1 and ::1, and the other may be somebody else's). That it confirms a
channel does not mean that it leads anywhere (Twisted Conch confirms each, and tries to connect after that).
"""

from __future__ import annotations

import contextlib
import secrets
import socket

from bokeh_ssh._core.endpoint import Endpoint, Origin
from bokeh_ssh._core.errors import ForwardError
from bokeh_ssh._ssh.connection import Connection
from bokeh_ssh._ssh.transport import Channel, Nowhere

#: Seconds for a word to go there and back, and round trips besides; a server that is busy may take some.
_PATIENCE = 5.0
_TRIPS = 10
#: Seconds for a word that was late since the line was.
_AGAIN = 1.0
#: Connections that are listened to at a time: all who have waited for the line may come there meanwhile.
_MOST = 1024


class ListenerProbe:
    """Takes the place of a listener's handler while it is found out where that can be reached.

    :param connection: whose server listens
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        # Lines, since a stranger who gets the first may be a web server: one that answers is done with.
        self._word = f"bokeh-ssh {secrets.token_hex(16)}\r\n\r\n".encode()
        self._answer = secrets.token_bytes(16)
        self._channels: list[_ProbeChannel] = []

    def handle(self, channel: Channel, origin: Origin) -> None:
        """Take a connection to the listener; see ``IncomingHandler``."""
        if len(self._channels) >= _MOST:
            channel.reject()
            return
        ear = _ProbeChannel(self._connection, channel, self._word, self._answer)
        self._channels.append(ear)
        self._connection.io_loop.post(ear.start)

    def reaches(self, target: Endpoint) -> bool | None:
        """Return whether what connects to ``target``, as seen from the server, comes here.

        :returns: None where the server does not connect there, or may not
        :raises ConnectionLostError: if the line goes down
        """
        patience = _PATIENCE + _TRIPS * self._connection.transport.rtt
        try:
            sock = self._connection.open_socket(target, timeout=patience)
        except ForwardError:
            return None
        with contextlib.closing(sock):
            sock.settimeout(patience)
            if self._is_answered(sock, self._word):
                return True
            # A line that is down, or was for a moment, says nothing about who listens.
            if not self._connection.ping(patience):
                raise self._connection.lost_error()
            sock.settimeout(patience - _PATIENCE + _AGAIN)
            return self._is_answered(sock, b"")

    def _is_answered(self, sock: socket.socket, word: bytes) -> bool:
        with contextlib.suppress(OSError):
            sock.sendall(word)
            return self._read(sock) == self._answer
        return False

    def _read(self, sock: socket.socket) -> bytes:
        said = b""
        while len(said) < len(self._answer) and self._answer.startswith(said):
            more = sock.recv(len(self._answer) - len(said))
            if not more:
                break
            said += more
        return said

    def close(self) -> None:
        """Close what was listened to."""
        for ear in self._channels:
            self._connection.io_loop.post(ear.channel.close)


class _ProbeChannel(Nowhere):
    """Answers the word, on one connection to the listener."""

    def __init__(self, connection: Connection, channel: Channel, word: bytes, answer: bytes) -> None:
        self.channel = channel
        self._connection = connection
        self._word = word
        self._answer = answer
        self._heard = b""

    def start(self) -> None:
        """Take the connection. Loop thread only."""
        self.channel.accept()
        self.channel.attach(self)

    def _reply(self) -> None:
        if self._answer and self._heard == self._word and self.channel.writable() >= len(self._answer):
            with contextlib.suppress(OSError):  # the line goes down: then nobody asks any more
                self.channel.send(memoryview(self._answer))
            self._answer = b""

    def on_data(self, parts: list[memoryview]) -> None:
        self._heard = (self._heard + b"".join(parts))[: len(self._word) + 1]
        if self._heard == self._word:
            self._connection.io_loop.post(self._reply)

    def on_window(self) -> None:
        self._connection.io_loop.post(self._reply)
