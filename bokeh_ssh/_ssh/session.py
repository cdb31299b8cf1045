"""One command on the remote machine: its streams as callbacks."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable

from bokeh_ssh._ssh.io_loop import IOLoop
from bokeh_ssh._ssh.messages import string
from bokeh_ssh._ssh.transport import Channel

#: Seconds for an exit status and a CLOSE, after the end of what the command says.
_AFTER_EOF = 1.0


class Session:
    """An exec channel (RFC 4254, section 6.5). Made by ``Connection.run``.

    :ivar replied: set when the server has said whether it runs the command
    :ivar replied_at: when that was, by ``time.monotonic()``
    :ivar ended: set when the channel is gone, however it ended
    """

    def __init__(
        self,
        io_loop: IOLoop,
        on_stdout: Callable[[bytes], None],
        on_stderr: Callable[[bytes], None],
        on_exit: Callable[[int | None], None],
    ) -> None:
        self._io_loop = io_loop
        self._on_stdout = on_stdout
        self._on_stderr = on_stderr
        self._on_exit = on_exit
        self._channel: Channel | None = None
        self._queue = bytearray()
        self._eof = False
        self._eof_sent = False
        self._status: int | None = None
        self._lock = threading.RLock()  # a signal handler may close while its thread writes
        self.accepted = False
        self.replied = threading.Event()
        self.replied_at = 0.0
        self.ended = threading.Event()

    def opened(self, channel: Channel) -> None:
        """Take the stream that was opened for it."""
        self._channel = channel
        channel.attach(self)

    def write(self, data: bytes) -> None:
        """Queue bytes for the command's standard input; never blocks, from any thread."""
        with self._lock:
            if self._eof or self.ended.is_set():
                return
            self._queue += data
        self._io_loop.post(self._flush)

    def write_eof(self) -> None:
        """End the command's standard input after what is queued."""
        with self._lock:
            self._eof = True
        self._io_loop.post(self._flush)

    def signal(self, name: str) -> None:
        """Send the command a signal, such as ``"KILL"`` (RFC 4254, section 6.9); there is no answer."""
        channel = self._channel
        if channel:
            channel.request(b"signal", string(name.encode()), want_reply=False)

    def hand_over(self, rest: bytes) -> socket.socket:
        """Return a local socket that the command's streams are joined to from here on.

        Called from ``on_stdout`` alone. Nothing is reported of the command any more: its end is the socket's.

        :param rest: what has come already for whoever reads that socket
        """
        assert self._channel
        ours, theirs = socket.socketpair()
        theirs.sendall(rest)  # one packet at most, which its buffer takes
        self._channel.handler = self._io_loop.relay(theirs, self._channel)
        return ours

    def close(self) -> None:
        """Close the channel after what is queued and fits, with an end before it; idempotent."""
        channel = self._channel
        if channel:
            self.write_eof()
            self._io_loop.post(channel.close)

    def _flush(self) -> None:
        channel = self._channel
        if channel is None or self.ended.is_set():
            return
        while True:
            with self._lock:
                room = channel.writable()
                part = bytes(self._queue[:room]) if room > 0 else b""
                del self._queue[: len(part)]
                finish = self._eof and not self._queue and not self._eof_sent
                self._eof_sent = self._eof_sent or finish
            try:
                if part:
                    channel.send(memoryview(part))
                if finish:
                    channel.send_eof()
            except OSError:  # the line goes down, which the transport reports
                return
            if not part:
                return

    # What the stream reports, on the transport thread.

    def on_data(self, parts: list[memoryview]) -> None:
        data = b"".join(parts)
        self._credit(len(data))
        self._on_stdout(data)

    def on_stderr(self, data: bytes) -> None:
        self._credit(len(data))
        self._on_stderr(data)

    def _credit(self, count: int) -> None:
        if self._channel:
            self._channel.credit(count)

    def on_reply(self, ok: bool) -> None:
        self.accepted, self.replied_at = ok, time.monotonic()
        self.replied.set()

    def on_exit(self, status: int) -> None:
        self._status = status

    def on_eof(self) -> None:
        # The exit status may still come, and a CLOSE should (RFC 4254, section 5.3); but a command that says
        # nothing more is over for all that are run here, and some servers leave it at that.
        self._io_loop.post(lambda: self._io_loop.later(_AFTER_EOF, self._give_up))

    def _give_up(self) -> None:
        """End it, where the server has not. Loop thread only."""
        if self.ended.is_set():
            return
        if self._channel:
            self._channel.close()
        self._end()

    def on_window(self) -> None:
        self._io_loop.post(self._flush)

    def on_close(self) -> None:
        self._end()

    def on_lost(self) -> None:
        self._end()

    def _end(self) -> None:
        with self._lock:
            if self.ended.is_set():
                return
            self.ended.set()
            self._queue.clear()
        self.replied.set()
        self._on_exit(self._status)
