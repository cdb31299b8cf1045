"""One SSH channel (RFC 4254, section 5), as lean as a forward needs it.

paramiko's own ``Channel`` buffers in two pipes and sends from whichever thread calls; this one hands
what arrives straight to its sink on the transport thread, and is sent on by the loop's thread alone.
That makes what may be sent two counters with one writer each, so they need no lock.
"""

from __future__ import annotations

import struct
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from paramiko.common import (
    MSG_CHANNEL_CLOSE,
    MSG_CHANNEL_EOF,
    MSG_CHANNEL_FAILURE,
    MSG_CHANNEL_OPEN_FAILURE,
    MSG_CHANNEL_OPEN_SUCCESS,
    MSG_CHANNEL_REQUEST,
    MSG_CHANNEL_WINDOW_ADJUST,
)

from bokeh_ssh._ssh.packetizer import ChannelData

if TYPE_CHECKING:
    from paramiko.message import Message

#: What the far side may send at first before we give credit. The same as OpenSSH's (channels.h).
WINDOW = 2 * 1024 * 1024
#: What it may grow to on a link that is long and fast: 32 MiB fill 2.5 Gbit/s at 100 ms.
MOST_WINDOW = 32 * 1024 * 1024
#: The largest packet of channel data taken; OpenSSH sends 32 KiB at most.
MAX_PACKET = 128 * 1024
_ADMINISTRATIVELY_PROHIBITED = 1
_CONNECT_FAILED = 2
#: In place of a reason code, all of which a server may send: nobody has answered.
LOST = -1


class ChannelHandler(Protocol):
    """Takes what a stream receives, on the transport thread: must not block and must not raise."""

    def on_data(self, parts: list[memoryview]) -> None: ...
    def on_eof(self) -> None: ...
    def on_close(self) -> None: ...
    def on_lost(self) -> None: ...
    def on_window(self) -> None: ...


class Carrier(Protocol):
    """What a stream needs of its transport."""

    def send_now(self, packet: bytes | ChannelData) -> None: ...
    def send_later(self, packet: bytes) -> None: ...
    def forget(self, channel: Channel) -> None: ...
    def grow_window(self, count: int) -> int: ...

    @property
    def rtt(self) -> float: ...


class Nowhere:
    """A sink that does nothing, as before one is set, and after the end; a base for those that do little."""

    def on_data(self, parts: list[memoryview]) -> None: ...
    def on_eof(self) -> None: ...
    def on_close(self) -> None: ...
    def on_lost(self) -> None: ...
    def on_window(self) -> None: ...


_NOWHERE = Nowhere()


class ReceiveWindow:
    """What the far side may send on a channel (RFC 4254, section 5.2), fitted to the link.

    :ivar size: bytes that it may be ahead of the reader
    :ivar received: bytes that it has sent so far
    """

    def __init__(self, carrier: Carrier) -> None:
        self._carrier = carrier
        self.size = WINDOW
        self.received = 0
        self._delivered = 0
        self._credited = WINDOW
        self._owed = 0
        self._mark = 0.0
        self._marked = 0

    @property
    def waiting(self) -> int:
        """How many bytes have yet to be delivered."""
        return self.received - self._delivered

    def receive(self, count: int) -> bool:
        """Count what arrived; False where it is more than the far side may send."""
        self.received += count
        return self.received <= self._credited

    def deliver(self, count: int) -> int:
        """Count what was delivered; return the credit that is to be sent now."""
        self._delivered += count
        self._owed += count
        if self._owed < self.size // 4:
            return 0
        more = self._owed + self._resize()
        self._owed = 0
        self._credited += more
        return more

    def _resize(self) -> int:
        """Fit the window to the link; return the bytes by which it changes.

        A window in two round trips or less means that the far side waits for credit, so twice the window is
        of use, if the reader keeps up and the connection has memory to lend. Three quarters are looked at:
        credit goes out in quarters and a bit, so that the last of them falls short, and waiting for it would
        cost a round trip each time. When the reader no longer keeps up, what was lent is given back: what
        waits here is what the window lets in.
        """
        if self.waiting > self.size // 2 and self.size > WINDOW:
            back = min(self._owed, self.size - WINDOW)
            self.size -= back
            self._carrier.grow_window(-back)
            return -back
        if not self._mark:  # from the first data on: before that, a program has yet to ask for it
            self._mark = time.monotonic()
        if self._delivered - self._marked < self.size * 3 // 4:
            return 0
        now = time.monotonic()
        took, self._mark, self._marked = now - self._mark, now, self._delivered
        if took > 1.5 * self._carrier.rtt or self.waiting > self.size // 8 or self.size >= MOST_WINDOW:
            return 0
        more = self._carrier.grow_window(self.size)
        self.size += more
        return more

    def give_back(self) -> None:
        """Return what it has grown by: nothing that came waits any more."""
        self._carrier.grow_window(WINDOW - self.size)
        self.size = WINDOW


class Channel:
    """An SSH channel.

    :param carrier: the transport
    :param number: our number for it
    :param on_open: called on the transport thread when the far side has confirmed it
    :param on_refused: called there with the reason code and text of RFC 4254, section 5.1, when it has
        not; :data:`LOST` means that the connection died first
    """

    __slots__ = (
        "__weakref__",
        "_carrier",
        "_close_received",
        "_close_sent",
        "_eof_received",
        "_granted",
        "_opened",
        "_order",
        "_sent",
        "handler",
        "max_packet",
        "number",
        "on_open",
        "on_refused",
        "remote_number",
        "window",
    )

    def __init__(
        self,
        carrier: Carrier,
        number: int,
        on_open: Callable[[Channel], None] | None = None,
        on_refused: Callable[[int, str], None] | None = None,
    ) -> None:
        self._carrier = carrier
        self.number = number
        self.remote_number = 0
        self.on_open = on_open
        self.on_refused = on_refused
        self.handler: ChannelHandler = _NOWHERE
        self.max_packet = 0
        self._opened = False
        self._granted = 0  # written by the transport thread alone
        self._sent = 0  # written by the loop's thread alone
        self.window = ReceiveWindow(carrier)
        self._eof_received = False
        self._close_sent = False
        self._close_received = False
        self._order = threading.RLock()  # a signal handler may close what its thread is about to

    # Sending: the loop's thread only, except close().

    def writable(self) -> int:
        """How many bytes the far side takes now."""
        return 0 if self._close_sent or self._close_received else self._granted - self._sent

    def send(self, data: memoryview) -> None:
        """Send at most :meth:`writable` bytes. May block while the connection is full or changes keys."""
        self._sent += len(data)
        self._carrier.send_now(ChannelData(self.remote_number, data, self.max_packet))

    def send_eof(self) -> None:
        """Send EOF: no more data comes (RFC 4254, section 5.3)."""
        if not self._close_sent and not self._close_received:
            self._carrier.send_now(struct.pack(">BI", MSG_CHANNEL_EOF, self.remote_number))

    def request(self, kind: bytes, payload: bytes, *, want_reply: bool = True) -> None:
        """Ask for something on the channel (RFC 4254, section 5.4)."""
        head = struct.pack(">BII", MSG_CHANNEL_REQUEST, self.remote_number, len(kind))
        self._send_later(head + kind + bytes((want_reply,)) + payload)

    def _send_later(self, packet: bytes) -> None:
        """Queue a message, unless our CLOSE is queued: it may be the last that the far side knows of.

        A server that knows the number no more may end the whole connection over it.
        """
        with self._order:
            if not self._close_sent:
                self._carrier.send_later(packet)

    def credit(self, count: int) -> None:
        """Let the far side send ``count`` bytes more, since that many were delivered.

        Callers hold their own lock: this is called from the transport thread and the loop's thread.
        """
        if not self._close_sent and (more := self.window.deliver(count)):
            self._send_later(struct.pack(">BII", MSG_CHANNEL_WINDOW_ADJUST, self.remote_number, more))

    def close(self) -> None:
        """Close both directions; idempotent, from any thread, never blocks."""
        self._send_close()
        if self._close_received:
            self._end()
        else:
            self.window.give_back()

    def _send_close(self) -> bool:
        """Send our CLOSE; False if it was sent before."""
        with self._order:
            if self._close_sent:
                return False
            self._close_sent = True
            if self._opened:
                self._carrier.send_later(struct.pack(">BI", MSG_CHANNEL_CLOSE, self.remote_number))
            return True

    # Answering a channel that the far side opened.

    def accept(self) -> None:
        """Confirm it; :meth:`attach` a sink on the same thread, the loop's, before anything can arrive."""
        self._opened = True
        self._carrier.send_later(
            struct.pack(
                ">BIIII", MSG_CHANNEL_OPEN_SUCCESS, self.remote_number, self.number, WINDOW, MAX_PACKET
            )
        )

    def attach(self, handler: ChannelHandler) -> None:
        """Pass what arrives from here on to ``handler``."""
        self.handler = handler
        if self._close_received:  # the connection died meanwhile, and told nobody
            handler.on_lost()

    def reject(self, code: int = _ADMINISTRATIVELY_PROHIBITED, text: bytes = b"") -> None:
        """Refuse it with a reason code of RFC 4254, section 5.1."""
        self._close_sent = True
        self._carrier.send_later(
            struct.pack(">BIII", MSG_CHANNEL_OPEN_FAILURE, self.remote_number, code, len(text))
            + text
            + struct.pack(">I", 0)
        )
        self._carrier.forget(self)

    @property
    def asked(self) -> bool:
        """Whether we have asked for it, and the far side has yet to answer."""
        return self.on_open is not None and not self._opened

    # Receiving: the transport thread.

    def set_remote(self, number: int, window: int, max_packet: int) -> None:
        """Note what the far side said when the channel was opened."""
        self.remote_number = number
        self._granted = window
        self.max_packet = max(1, min(max_packet, MAX_PACKET))

    def confirmed(self) -> None:
        """Report to the opener that the far side has confirmed."""
        with self._order:
            self._opened = True
            given_up = self._close_sent
            if given_up:  # now there is something to close
                self._carrier.send_later(struct.pack(">BI", MSG_CHANNEL_CLOSE, self.remote_number))
        if self.on_open and not given_up:
            self.on_open(self)

    def refused(self, code: int, text: str) -> None:
        """Report to the opener that the far side has refused."""
        if self.on_refused and not self._close_sent:
            self._close_sent = True
            self.on_refused(code, text)

    def feed(self, parts: list[memoryview]) -> None:
        """Take data, in the order it came."""
        if self._take(sum(map(len, parts))):
            self.handler.on_data(parts)

    def take_data(self, message: Message) -> None:
        """Take data that the transport has not taken by itself, as in a key exchange."""
        self.feed([memoryview(message.get_binary())])

    def take_extended_data(self, message: Message) -> None:
        """Take what a program writes to its standard error."""
        kind = message.get_int()
        data = message.get_binary()
        if not self._take(len(data)):
            return
        on_stderr = getattr(self.handler, "on_stderr", None)
        if kind == 1 and on_stderr:
            on_stderr(data)
        else:  # nobody's data still used the window up
            self.credit(len(data))

    def _take(self, count: int) -> bool:
        """Count what arrived; a server that sends past its window is cut off (paramiko does not look)."""
        if self._close_received or self._eof_received or self._close_sent:
            return False
        if not self.window.receive(count):
            self.close()
            self.handler.on_lost()
            return False
        return True

    def take_window_adjust(self, message: Message) -> None:
        """Take credit."""
        self._granted += message.get_int()
        self.handler.on_window()

    def take_eof(self, message: Message) -> None:
        """Take it that no more data comes."""
        if not self._eof_received:
            self._eof_received = True
            self.handler.on_eof()

    def take_close(self, message: Message) -> None:
        """Take the far side's CLOSE, and answer it."""
        self._close_received = True
        if self.asked:  # in place of an answer, which nobody needs to wait for any more
            self.refused(_CONNECT_FAILED, "the server closed it")
        self.handler.on_close()
        answered = self._send_close()  # at once (RFC 4254, section 5.3), whatever the sink has yet to deliver
        self._end(waits=answered and self.window.waiting > 0)

    def take_request(self, message: Message) -> None:
        """Take how a program has ended; refuse all else that the far side asks for."""
        kind = message.get_binary()
        want_reply = message.get_boolean()
        on_exit = getattr(self.handler, "on_exit", None)
        if kind == b"exit-status" and on_exit:
            on_exit(message.get_int())
        elif kind == b"exit-signal" and on_exit:
            on_exit(-_signal_number(message.get_binary().decode("ascii", "replace")))
        elif want_reply:  # keepalive@openssh.com (ClientAliveInterval) among them: any answer will do
            self._send_later(struct.pack(">BI", MSG_CHANNEL_FAILURE, self.remote_number))

    def take_reply(self, *, ok: bool) -> None:
        """Take the answer to a request of ours."""
        on_reply = getattr(self.handler, "on_reply", None)
        if on_reply:
            on_reply(ok)

    def _unlink(self) -> None:
        """Pass over paramiko's own call of that name as the transport dies: it still counts as alive then."""

    def lose(self) -> None:
        """Take it that the transport has died."""
        if self._opened and not self._close_received:
            self._close_received = self._close_sent = True
            self.handler.on_lost()
        elif not self._opened:
            self.refused(LOST, "the connection was lost")
            self._close_received = self._close_sent = True

    def _end(self, *, waits: bool = False) -> None:
        self.handler = _NOWHERE
        self.on_open = self.on_refused = None
        if not waits:  # else the sink has something yet, and calls close() when it has not
            self.window.give_back()
        self._carrier.forget(self)


def _signal_number(name: str) -> int:
    """Turn an RFC 4254 signal name ("KILL") into the number that it has everywhere; 1 if unknown."""
    numbers = {"HUP": 1, "INT": 2, "QUIT": 3, "ILL": 4, "ABRT": 6, "FPE": 8, "KILL": 9, "SEGV": 11}
    return {**numbers, "PIPE": 13, "ALRM": 14, "TERM": 15}.get(name, 1)
