"""paramiko's Transport and channels, with their stalls and guesses taken out.

What is different, and why:

- Once the connection is up, one thread sends: the loop's. What the transport thread itself wants said
  (window credit, answers to requests and closes) is queued for it. paramiko sends such things from the
  transport thread, where during a key change they wait for that same thread until the connection dies.
- Global requests are answered in order (RFC 4254, section 4), have a deadline, and "denied" means that
  the server said so. That it does not know them is an answer too (TinySSH knows none).
- Channels that the server opens are refused unless they belong to a listener of ours, and each listener
  has its own handler.
- A message for a channel that both sides have closed is ignored, as long as the number was ours once:
  some servers send an exit status after their CLOSE.
- A channel hands what arrives straight to its handler on the transport thread, and is sent on by the loop's
  thread alone. That makes what may be sent two counters with one writer each, so they need no lock.
  paramiko's own buffers in two pipes, and sends from whichever thread calls.
- What a packet inflates to is bounded.
- It is alive only while its thread is.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import logging
import operator
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import paramiko
from paramiko.common import (
    MSG_CHANNEL_CLOSE,
    MSG_CHANNEL_DATA,
    MSG_CHANNEL_EOF,
    MSG_CHANNEL_EXTENDED_DATA,
    MSG_CHANNEL_FAILURE,
    MSG_CHANNEL_OPEN,
    MSG_CHANNEL_OPEN_FAILURE,
    MSG_CHANNEL_OPEN_SUCCESS,
    MSG_CHANNEL_REQUEST,
    MSG_CHANNEL_SUCCESS,
    MSG_CHANNEL_WINDOW_ADJUST,
    MSG_GLOBAL_REQUEST,
    MSG_REQUEST_FAILURE,
    MSG_UNIMPLEMENTED,
)
from paramiko.message import Message

from bokeh_ssh._core.endpoint import HERE, Endpoint, Origin
from bokeh_ssh._core.fork import in_child
from bokeh_ssh._core.threads import Flag
from bokeh_ssh._core.waiting import wait
from bokeh_ssh._ssh.algorithms import CIPHERS, KEX, MACS, Algorithms, Mismatch, Offer
from bokeh_ssh._ssh.crypto import mldsa
from bokeh_ssh._ssh.io_loop import IOLoop
from bokeh_ssh._ssh.messages import AGENT, CONNECT_FAILED, PROHIBITED, SHORTAGE, strings
from bokeh_ssh._ssh.packetizer import ChannelData, InflateError, Inflater, Packetizer

log = logging.getLogger("bokeh_ssh.transport")

#: Answers that wait to be sent; a server that asks faster than it reads has no good intentions.
_MOST_WAITING = 50_000
#: Channels that a server may have open through one listener at a time.
_MOST_INCOMING = 4096
#: What the far side may send at first before we give credit. The same as OpenSSH's (channels.h).
WINDOW = 2 * 1024 * 1024
#: What it may grow to on a link that is long and fast: 32 MiB fill 2.5 Gbit/s at 100 ms.
MOST_WINDOW = 32 * 1024 * 1024
#: The largest packet of channel data taken; OpenSSH sends 32 KiB at most.
MAX_PACKET = 128 * 1024
#: In place of a reason code, all of which a server may send: nobody has answered.
LOST = -1
#: Seconds after which a server that has answered no global request is asked for a channel in addition: of a
#: kind that there is not, so that it refuses.
_UNANSWERED = 0.4
_NO_KIND = b"probe@bokeh-ssh"
_uint32 = struct.Struct(">I").unpack_from
_numbers = struct.Struct(">II").unpack_from
_MOST_TEXT = 1024  # bytes of a name that a server may send
#: Bytes by which the windows of all channels of a connection may grow together: the bound of what slow
#: readers can make us keep, on top of 2 MiB for each of them.
_WINDOW_BUDGET = 64 * 1024 * 1024


if TYPE_CHECKING:

    class _Base(paramiko.Transport):
        """The private names of paramiko's that this module uses; a test looks for each of them."""

        packetizer: Packetizer
        _cipher_info: dict[str, Any]
        _key_info: dict[str, Any]
        _compression_info: dict[str, Any]
        _handler_table: dict[int, Callable[[Message], None]]
        _expected_packet: tuple[int, ...]
        _channels: _Channels
        channels_seen: Any
        active: bool
        clear_to_send: threading.Event
        clear_to_send_lock: threading.Lock

        def _send_user_message(self, data: Message | ChannelData) -> None: ...
        def _verify_key(self, host_key: bytes, sig: bytes) -> None: ...
        def _really_parse_kex_init(self, m: Message, ignore_first_byte: bool) -> dict[str, Any]: ...
        def _parse_disconnect(self, m: Message) -> None: ...
        def _check_banner(self) -> None: ...
        def _log(self, level: int, msg: str | list[str], *args: object) -> None: ...
        def _parse_request_success(self, m: Message) -> None: ...
        def _parse_request_failure(self, m: Message) -> None: ...
        def _parse_global_request(self, m: Message) -> None: ...
        def _parse_channel_open(self, m: Message) -> None: ...
        def _parse_channel_open_success(self, m: Message) -> None: ...
        def _parse_channel_open_failure(self, m: Message) -> None: ...
        def _next_channel(self) -> int: ...

else:
    _Base = paramiko.Transport


class Reply:
    """The answer to a global request, once it is there.

    :param granted: called with the payload if the server does it, before anything that comes after the answer
        is read; on the transport thread
    :ivar unknown: the server says that it does not know such requests
    """

    def __init__(self, granted: Callable[[bytes], object] | None = None) -> None:
        self.granted = granted
        self._done = threading.Event()
        self.asked = time.monotonic()
        self.ok = False
        self.payload = b""
        self.lost = False
        self.unknown = False

    def set(self, *, ok: bool = False, payload: bytes = b"", lost: bool = False) -> None:
        if not self._done.is_set():
            self.ok, self.payload, self.lost = ok, payload, lost
            self._done.set()

    def wait(self, timeout: float) -> bool:
        """Wait for the answer; False if none came in ``timeout`` seconds."""
        return wait(self._done, timeout)


class ChannelHandler(Protocol):
    """Takes what a channel receives, on the transport thread: must not block and must not raise."""

    def on_data(self, parts: list[memoryview]) -> None: ...
    def on_eof(self) -> None: ...
    def on_close(self) -> None: ...
    def on_lost(self) -> None: ...
    def on_window(self) -> None: ...


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

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
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
            self._transport.grow_window(-back)
            return -back
        if not self._mark:  # from the first data on: before that, a program has yet to ask for it
            self._mark = time.monotonic()
        if self._delivered - self._marked < self.size * 3 // 4:
            return 0
        now = time.monotonic()
        took, self._mark, self._marked = now - self._mark, now, self._delivered
        if took > 1.5 * self._transport.rtt or self.waiting > self.size // 8 or self.size >= MOST_WINDOW:
            return 0
        more = self._transport.grow_window(self.size)
        self.size += more
        return more

    def give_back(self) -> None:
        """Return what it has grown by: nothing that came waits any more."""
        self._transport.grow_window(WINDOW - self.size)
        self.size = WINDOW


class Channel:
    """An SSH channel.

    :param number: our number for it
    :param on_open: called on the transport thread when the far side has confirmed it
    :param on_refused: called there with the reason code and text of RFC 4254, section 5.1, when it has
        not; :data:`LOST` means that the connection died first
    :ivar opened_at: when it was confirmed, by ``time.monotonic()``
    """

    __slots__ = (
        "__weakref__",
        "_close_received",
        "_close_sent",
        "_eof_received",
        "_granted",
        "_opened",
        "_order",
        "_sent",
        "_transport",
        "handler",
        "max_packet",
        "number",
        "on_open",
        "on_refused",
        "opened_at",
        "remote_number",
        "window",
    )

    def __init__(
        self,
        transport: Transport,
        number: int,
        on_open: Callable[[Channel], None] | None = None,
        on_refused: Callable[[int, str], None] | None = None,
    ) -> None:
        self._transport = transport
        self.number = number
        self.remote_number = 0
        self.on_open = on_open
        self.on_refused = on_refused
        self.handler: ChannelHandler = _NOWHERE
        self.max_packet = 0
        self._opened = False
        self.opened_at = 0.0
        self._granted = 0  # written by the transport thread alone
        self._sent = 0  # written by the loop's thread alone
        self.window = ReceiveWindow(transport)
        self._eof_received = False
        self._close_sent = False
        self._close_received = False
        self._order = threading.RLock()  # a signal handler may close what its thread is about to

    # Sending: the loop's thread only, except close().

    def writable(self) -> int:
        """Count the bytes that the far side takes now."""
        return 0 if self._close_sent or self._close_received else self._granted - self._sent

    def send(self, data: memoryview) -> None:
        """Send at most :meth:`writable` bytes. May block while the connection is full or changes keys."""
        self._sent += len(data)
        self._transport.send_now(ChannelData(self.remote_number, data, self.max_packet))

    def send_eof(self) -> None:
        """Send EOF: no more data comes (RFC 4254, section 5.3)."""
        if not self._close_sent and not self._close_received:
            self._transport.send_now(struct.pack(">BI", MSG_CHANNEL_EOF, self.remote_number))

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
                self._transport.send_later(packet)

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
                self._transport.send_later(struct.pack(">BI", MSG_CHANNEL_CLOSE, self.remote_number))
            return True

    # Answering a channel that the far side opened.

    def accept(self) -> None:
        """Confirm it; :meth:`attach` a sink on the same thread, the loop's, before anything can arrive."""
        self._opened = True
        self._transport.send_later(
            struct.pack(
                ">BIIII", MSG_CHANNEL_OPEN_SUCCESS, self.remote_number, self.number, WINDOW, MAX_PACKET
            )
        )

    def attach(self, handler: ChannelHandler) -> None:
        """Pass what arrives from here on to ``handler``, and what has been kept so far."""
        if isinstance(self.handler, EarlyChannel):
            self.handler.hand_over(handler)
            return
        self.handler = handler
        if self._close_received:  # the connection died meanwhile, and nobody was called
            handler.on_lost()

    def reject(self, code: int = PROHIBITED, text: bytes = b"") -> None:
        """Refuse it with a reason code of RFC 4254, section 5.1."""
        self._close_sent = True
        self._transport.send_later(
            struct.pack(">BIII", MSG_CHANNEL_OPEN_FAILURE, self.remote_number, code, len(text))
            + text
            + struct.pack(">I", 0)
        )
        self._transport.forget(self)

    @property
    def asked(self) -> bool:
        """Whether we have asked for it, and the far side has yet to answer."""
        return self.on_open is not None and not self._opened

    @property
    def over(self) -> bool:
        """Whether either side has closed it, or the far side sends nothing more."""
        return self._close_sent or self._close_received or self._eof_received

    # Receiving: the transport thread.

    def set_remote(self, number: int, window: int, max_packet: int) -> None:
        """Note what the far side said when the channel was opened."""
        self.remote_number = number
        self._granted = window
        self.max_packet = max(1, min(max_packet, MAX_PACKET))

    def confirmed(self) -> None:
        """Report to the opener that the far side has confirmed."""
        self.opened_at = time.monotonic()
        with self._order:
            self._opened = True
            given_up = self._close_sent
            if given_up:  # now there is something to close
                self._transport.send_later(struct.pack(">BI", MSG_CHANNEL_CLOSE, self.remote_number))
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
            self.refused(CONNECT_FAILED, "the server closed it")
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
        self._transport.forget(self)


class EarlyChannel:
    """A channel that nobody uses yet; what comes on it is kept, within its window.

    :ivar has_data: whether the far side has sent something
    """

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.has_data = False
        self._calls: list[Callable[[ChannelHandler], None]] = []
        self._handler: ChannelHandler | None = None
        self._lock = threading.RLock()  # the transport's thread brings, any thread hands over
        channel.attach(self)

    @property
    def untouched(self) -> bool:
        """Whether the far side has neither sent anything nor ended it."""
        return not self._calls

    def hand_over(self, handler: ChannelHandler) -> None:
        """Pass another handler what came, and all that follows."""
        with self._lock:
            for call in self._calls:
                call(handler)
            self._handler = handler
            if self.channel.handler is self:  # else it has ended, and that was handed over
                self.channel.handler = handler

    def _keep(self, call: Callable[[ChannelHandler], None]) -> None:
        with self._lock:
            if self._handler:  # handed over while this was on its way here
                call(self._handler)
            else:
                self._calls.append(call)

    def on_data(self, parts: list[memoryview]) -> None:
        self.has_data = True
        self._keep(lambda handler: handler.on_data(parts))

    def on_eof(self) -> None:
        self._keep(lambda handler: handler.on_eof())

    def on_close(self) -> None:
        self._keep(lambda handler: handler.on_close())

    def on_lost(self) -> None:
        self._keep(lambda handler: handler.on_lost())

    def on_window(self) -> None:
        pass  # whoever comes after asks how much it may send


class AskedChannel:
    """A channel that is asked for together with the login, for whoever wants such a one afterwards.

    :ivar request: its type, and what follows that in the request
    :ivar channel: what is asked for
    :ivar answered: whether the far side has said something to it
    """

    def __init__(self, request: tuple[bytes, bytes]) -> None:
        self.request = request
        self.channel: Channel | None = None
        self.answered = False
        self._opened: Channel | None = None
        self._refusal = (0, "")
        self._told: tuple[Callable[[Channel], None], Callable[[int, str], None]] | None = None
        self._lock = threading.RLock()  # the transport's thread answers, any thread takes it

    def take(
        self, on_open: Callable[[Channel], None], on_refused: Callable[[int, str], None]
    ) -> Channel | None:
        """Pass the answer on, at once if it is there; None where the far side has ended it meanwhile."""
        with self._lock:
            if not self.answered:
                self._told = on_open, on_refused
            elif self._opened is None:
                on_refused(*self._refusal)
            elif self._opened.over:
                self._opened.close()
                return None
            else:
                on_open(self._opened)
        return self.channel

    def opened(self, channel: Channel) -> None:
        """Take it that the far side has confirmed it."""
        with self._lock:
            self.answered, self._opened = True, channel
            if self._told:
                self._told[0](channel)
            else:
                EarlyChannel(channel)

    def refused(self, code: int, text: str) -> None:
        """Take it that the far side has refused it."""
        with self._lock:
            self.answered, self._refusal = True, (code, text)
            if self._told:
                self._told[1](code, text)


def _signal_number(name: str) -> int:
    """Turn an RFC 4254 signal name ("KILL") into the number that it has everywhere; 1 if unknown."""
    numbers = {"HUP": 1, "INT": 2, "QUIT": 3, "ILL": 4, "ABRT": 6, "FPE": 8, "KILL": 9, "SEGV": 11}
    return {**numbers, "PIPE": 13, "ALRM": 14, "TERM": 15}.get(name, 1)


#: (channel, origin): decides with ``channel.accept`` or ``channel.reject``, later and on any thread.
IncomingHandler = Callable[[Channel, Origin], None]


class UnknownChannelError(paramiko.SSHException):
    """The server speaks of a channel that never was."""


class _Numbers:
    """Our numbers for channels, given out one after the other, and which they were.

    This is paramiko's ``channels_seen`` too, a dict that it puts its own channels in and never takes any out
    of. No lock: a signal handler may open a channel between any two steps of the thread that does.
    """

    def __init__(self) -> None:
        self._left = iter(range(1 << 32))

    def take(self) -> int:
        """Return the next one."""
        return next(self._left)

    def __contains__(self, number: int) -> bool:
        if number < (1 << 32) - operator.length_hint(self._left):
            return True
        # paramiko would end the connection just as well, but keep to itself why.
        msg = f"the server speaks of a channel that never was (number {number})"
        raise UnknownChannelError(msg)

    def __setitem__(self, number: int, seen: bool) -> None:
        pass


class _Channels(dict[int, Channel]):
    """What is open, in the place of paramiko's map, which holds channels weakly.

    A channel lives until both sides have closed it. No lock: a signal handler may close what its thread is
    about to open a channel of.
    """

    put = dict.__setitem__

    def delete(self, number: int) -> None:
        self.pop(number, None)


class Transport(_Base):
    """One SSH connection as a client.

    :param sock: connected to the server
    :param io_loop: sends everything that is not key exchange or login
    :param prefer_host_keys: host key algorithms to ask for first, since we know keys of those kinds
    :param algorithms: what to ask for
    :ivar ended_unused: the far side hung up while no channel was open
    :ivar abandoned: this is the copy in a forked child; the parent's goes on
    """

    def __init__(
        self,
        sock: socket.socket,
        io_loop: IOLoop,
        *,
        prefer_host_keys: Sequence[str] = (),
        algorithms: Algorithms | None = None,
    ) -> None:
        self._algorithms = algorithms or Algorithms()
        self._server_offer: Offer | None = None
        self._prefer_host_keys = tuple(prefer_host_keys)
        super().__init__(
            sock,
            default_window_size=WINDOW,
            default_max_packet_size=MAX_PACKET,
            packetizer_class=Packetizer,
        )
        self._key_info = {**super()._key_info, mldsa.NAME: mldsa.CompositeKey}
        self._channels = _Channels()
        self._handler_table[MSG_UNIMPLEMENTED] = self._parse_unimplemented
        self.packetizer.on_data = self._on_data
        self.packetizer.on_pause = self._flush_batch
        self._batch: list[memoryview] = []  # what came for one channel at a time, of one read
        self._batch_channel: Channel | None = None
        options = self.get_security_options()
        options.ciphers = self._algorithms.ciphers
        options.digests = self._algorithms.macs
        options.kex = self._algorithms.kex
        self.io_loop = io_loop
        self.host_key_blob = b""
        self.disconnect_message = ""
        self.preamble: list[str] = []
        self.ended_unused = False
        self.abandoned = False
        self._on_end: Callable[[], None] | None = None
        # No lock around the two: a signal handler may ask between any two steps of the thread that asks.
        self._outbox: collections.deque[tuple[bytes, Reply | None]] = collections.deque()
        self._replies: collections.deque[Reply] = collections.deque()
        self._numbers = self.channels_seen = _Numbers()
        self._window_granted = 0
        self._window_lock = threading.Lock()
        self._round_trips: collections.deque[float] = collections.deque(maxlen=8)
        self._listeners: dict[Endpoint, IncomingHandler] = {}
        self._ahead: dict[tuple[bytes, bytes], collections.deque[AskedChannel]] = {}
        self._unanswered: list[AskedChannel] = []  # as far as is known
        self._ended = threading.Event()
        self._worked = Flag()  # what its thread has to do is done
        in_child(self, Transport._abandon)

    @property
    def fault(self) -> str:
        """What the server did that ended the connection; empty where it is not known."""
        ours = isinstance(self.saved_exception, (UnknownChannelError, InflateError))
        return str(self.saved_exception) if ours else ""

    @property
    def alive(self) -> bool:
        """Whether it still works: paramiko's ``is_active`` stays true when its thread has died."""
        return self.is_alive() and bool(self.is_active())

    # Key exchange.

    @property
    def preferred_keys(self) -> tuple[str, ...]:
        # As OpenSSH's order_hostkeyalgs: ask first for the kinds of key that known_hosts has, so that
        # a server which gained a new kind does not look unknown.
        usual = self._algorithms.host_keys
        if self._algorithms.keep_host_keys:
            return usual
        known = [name for name in self._prefer_host_keys if name in usual]
        return (*known, *(name for name in usual if name not in known))

    def _really_parse_kex_init(self, m: Message, ignore_first_byte: bool = False) -> dict[str, Any]:
        lists = super()._really_parse_kex_init(m, ignore_first_byte)
        if ignore_first_byte:  # our own, read again
            return lists
        offer = self._server_offer = Offer({k: v[:] for k, v in lists.items() if isinstance(v, list)})
        for way in ("client", "server"):
            # As OpenSSH: what authenticates by itself needs no MAC, and servers may have none that we have.
            if offer.macs_implied(self._algorithms, way):
                lists[f"{way}_mac_algo_list"] += self._algorithms.macs
        return lists

    @property
    def speaks(self) -> bool:
        """Whether the server has begun a key exchange."""
        return self._server_offer is not None

    @property
    def mismatch(self) -> Mismatch | None:
        """What the server and we have nothing in common of, if that is so."""
        return self._server_offer.mismatch(self._algorithms) if self._server_offer else None

    def _verify_key(self, host_key: bytes, sig: bytes) -> None:
        # Kept as sent: a host certificate cannot be got back from paramiko's key object.
        self.host_key_blob = bytes(host_key)
        super()._verify_key(host_key, sig)

    def _parse_disconnect(self, m: Message) -> None:
        m.get_int()
        self.disconnect_message = m.get_binary()[:500].decode("utf-8", "replace")

    def _check_banner(self) -> None:
        # As paramiko's, but what came instead of "SSH-" is kept for the error, and each line has the
        # same deadline (RFC 4253, section 4.2 allows other lines before it).
        for _ in range(100):
            try:
                line = self.packetizer.readline(self.banner_timeout)
            except Exception as exc:
                msg = f"no SSH banner: {exc}"
                raise paramiko.SSHException(msg) from exc
            if line.startswith("SSH-"):
                break
            self.preamble.append(line[:200])
        else:
            msg = "no SSH banner in 100 lines"
            raise paramiko.SSHException(msg)
        self.remote_version = line
        version, _, software = line.partition(" ")[0].partition("-")[2].partition("-")
        if version not in ("2.0", "1.99") or not software:
            msg = f"the server speaks SSH {version}, not 2.0"
            raise paramiko.SSHException(msg)

    # Life and death.

    def _log(self, level: int, msg: str | list[str], *args: object) -> None:
        # What paramiko calls an error, ours tell. Were it logged as one, Python would print it, with a
        # traceback, wherever nobody has set up logging.
        super()._log(logging.DEBUG, msg, *args)

    def run(self) -> None:
        try:
            super().run()
        finally:
            self.packetizer.complete_handshake()  # ends paramiko's timer thread where the handshake failed
            self._ended.set()
            for reply in (*self._replies.copy(), *(asked for _, asked in self._outbox.copy())):
                if reply:
                    reply.set(lost=True)
            end = self.saved_exception
            self.ended_unused = isinstance(end, EOFError) and not (end.__cause__ or self._channels)
            for channel in list(self._channels.values()):
                channel.lose()
            if self._on_end:
                self._on_end()
            self._worked.set()

    def on_end(self, call: Callable[[], None]) -> None:
        """Call ``call`` on the transport thread when the connection has ended, however it did."""
        self._on_end = call
        if self._ended.is_set():
            call()

    def shut(self, timeout: float) -> None:
        """Close at once and wait up to ``timeout`` seconds for the thread."""
        self.close()
        if self.is_alive() and threading.current_thread() is not self:
            self._worked.wait(timeout)

    def _abandon(self) -> None:
        """Close a forked child's copies of all sockets: not one byte of its may go out."""
        self.abandoned = True
        self.active = False
        self._ended = threading.Event()
        self._ended.set()
        self.sock.close()
        self.io_loop.abandon()

    # Sending.

    def send_now(self, packet: bytes | ChannelData) -> None:
        """Send on this thread; waits while the connection is full or changes keys. Loop thread only.

        :raises BrokenPipeError: if the connection is no more
        """
        message = Message(packet) if isinstance(packet, bytes) else packet
        try:
            with self.clear_to_send_lock:
                if self.clear_to_send.is_set() and self.active:  # paramiko itself asks in 0.1 s steps
                    self.packetizer.send_message(message)
                    return
            self._send_user_message(message)
        except (EOFError, OSError, paramiko.SSHException) as exc:
            msg = "the SSH connection is gone"
            raise BrokenPipeError(errno.EPIPE, msg) from exc

    def send_later(self, packet: bytes, reply: Reply | None = None) -> None:
        """Send from the loop's thread, in order; never blocks. ``reply`` gets what the server answers."""
        full = len(self._outbox) > _MOST_WAITING
        if full:
            self.packetizer.close()
        else:
            self._outbox.append((packet, reply))
            self.io_loop.post(self._send_one)
        if reply and (full or self._ended.is_set()):
            reply.set(lost=True)

    def _send_one(self) -> None:
        packet, reply = self._outbox.popleft()
        if reply:
            self._replies.append(reply)
            if self._ended.is_set():
                reply.set(lost=True)
        if self.active:
            with contextlib.suppress(BrokenPipeError):  # run() lets know whoever waits for an answer
                self.send_now(packet)

    # Global requests.

    def send_global_request(
        self, kind: bytes, payload: bytes = b"", granted: Callable[[bytes], object] | None = None
    ) -> Reply:
        """Send a global request that wants a reply (RFC 4254, section 4); see :class:`Reply`."""
        reply = Reply(granted)
        packet = struct.pack(">BI", MSG_GLOBAL_REQUEST, len(kind)) + kind + b"\x01" + payload
        self.send_later(packet, reply)
        return reply

    def send_question(self) -> Reply:
        """Ask the server for any answer (``ServerAliveInterval``); never blocks."""
        waiting = self._replies[0].asked if self._replies else time.monotonic()
        reply = self.send_global_request(b"keepalive@openssh.com")
        if not self._round_trips and time.monotonic() - waiting > _UNANSWERED:
            self.request_channel(_NO_KIND, b"", Channel.close, lambda code, _: reply.set(lost=code == LOST))
        return reply

    def _parse_request_success(self, m: Message) -> None:
        self._answer(ok=True, payload=m.get_remainder())

    def _parse_request_failure(self, m: Message) -> None:
        self._answer(ok=False, payload=b"")

    def _parse_unimplemented(self, m: Message) -> None:
        # Nothing else that a client sends once it is logged in may be unknown to a server.
        self._answer(ok=False, payload=b"", unknown=True)

    def _answer(self, *, ok: bool, payload: bytes, unknown: bool = False) -> None:
        reply = self._replies.popleft() if self._replies else None
        if reply:  # otherwise nobody has asked
            reply.unknown = unknown
            self._round_trips.append(time.monotonic() - reply.asked)
            if self._unanswered and len(self._round_trips) > 1:
                self._ask_again()
            if ok and reply.granted:
                reply.granted(payload)
            reply.set(ok=ok, payload=payload)

    @property
    def rtt(self) -> float:
        """The shortest of the last round trips, in seconds; 0 before the first."""
        return min(self._round_trips, default=0.0)

    @property
    def carried(self) -> tuple[int, int]:
        """Bytes received and sent so far, with what SSH itself needs."""
        packetizer: Packetizer = self.packetizer
        return packetizer.received, packetizer.sent

    def grow_window(self, count: int) -> int:
        """Let a channel's window grow by up to ``count`` bytes, or take them back if it is negative."""
        with self._window_lock:
            granted = min(count, _WINDOW_BUDGET - self._window_granted)
            self._window_granted += granted
            return granted

    def _parse_global_request(self, m: Message) -> None:
        m.get_binary()
        if m.get_boolean():  # keepalive@openssh.com among them: a failure is an answer too
            self.send_later(bytes((MSG_REQUEST_FAILURE,)))

    # Channels.

    def _on_data(self, packet: bytes, end: int) -> bool:
        """Take a decrypted packet of channel data, from its padding length on, past paramiko's loop."""
        if self._expected_packet:  # in a key exchange: paramiko's loop knows what to do with it
            return False
        number, length = _numbers(packet, 2)
        channel = self._channels.get(number)
        if channel is None or length != end - 10:
            return False
        if channel is not self._batch_channel:
            self._flush_batch()
            self._batch_channel = channel
        self._batch.append(memoryview(packet)[10:end])
        return True

    def _flush_batch(self) -> None:
        """Pass to a channel what came for it: many packets, one system call."""
        channel, self._batch_channel = self._batch_channel, None
        if channel:
            parts, self._batch = self._batch, []
            channel.feed(parts)

    def _next_channel(self) -> int:
        return self._numbers.take()

    def request_channel(
        self,
        kind: bytes,
        payload: bytes,
        on_open: Callable[[Channel], None],
        on_refused: Callable[[int, str], None],
    ) -> Channel:
        """Ask for a channel (RFC 4254, section 5.1); returns at once, the callbacks report.

        One that was asked for ahead is taken first: then they may be called on the caller's thread.
        """
        asked = self._ahead.get((kind, payload))
        if asked:
            with contextlib.suppress(IndexError):  # another thread has taken the last
                if channel := asked.popleft().take(on_open, on_refused):
                    return channel
        return self._request_channel(kind, payload, on_open, on_refused)

    def ask_ahead(self, requests: Iterable[tuple[bytes, bytes]]) -> None:
        """Ask for channels that will be wanted, before the server has said that we are logged in.

        It passes them to the service that the login is for (RFC 4252, section 5.3). With compression that
        begins once we are logged in (``zlib@openssh.com``), nothing can be sent before it says so.

        :param requests: of each its type, and what follows that in the request
        """
        for request in requests if self.local_compression == "none" else ():
            asked = AskedChannel(request)
            asked.channel = self._request_channel(*request, asked.opened, asked.refused)
            self._ahead.setdefault(request, collections.deque()).append(asked)
            self._unanswered.append(asked)

    def drop_ahead(self) -> None:
        """Forget them: we are not logged in."""
        asked, self._unanswered = self._unanswered, []
        self._ahead.clear()
        for each in asked:
            if each.channel:
                each.channel.close()
                self.forget(each.channel)

    def close_unclaimed(self) -> None:
        """Close the channels that were asked for ahead, and that nobody has wanted so far."""
        for asked in list(self._ahead.values()):
            with contextlib.suppress(IndexError):
                while channel := asked.popleft().channel:
                    channel.close()

    def _ask_again(self) -> None:
        """Ask once more for what was lost by a server that forgets what comes together with a login.

        Others have answered by now, the second time that they answer something else; but for targets that
        take their time.
        """
        lost, self._unanswered = [each for each in self._unanswered if not each.answered], []
        for each in lost:
            if each.channel:
                each.channel.close()
            each.channel = self._request_channel(*each.request, each.opened, each.refused)

    def _request_channel(
        self,
        kind: bytes,
        payload: bytes,
        on_open: Callable[[Channel], None],
        on_refused: Callable[[int, str], None],
    ) -> Channel:
        channel = Channel(self, self._numbers.take(), on_open, on_refused)
        head = struct.pack(">BI", MSG_CHANNEL_OPEN, len(kind)) + kind
        self._channels[channel.number] = channel
        if self._ended.is_set():
            self.forget(channel)
            channel.lose()
        else:
            self.send_later(head + struct.pack(">III", channel.number, WINDOW, MAX_PACKET) + payload)
        return channel

    def _parse_channel_open_success(self, m: Message) -> None:
        channel = self._channels.get(m.get_int())
        if channel and channel.asked:
            channel.set_remote(m.get_int(), m.get_int(), m.get_int())
            try:
                channel.confirmed()
            except Exception:  # one connection's failure must not end the others
                log.exception("a channel could not be used")
                channel.close()

    def _parse_channel_open_failure(self, m: Message) -> None:
        channel = self._channels.get(m.get_int())
        if channel and channel.asked:
            code = m.get_int()
            text = m.get_binary()[:500].decode("utf-8", "replace")
            self.forget(channel)
            channel.refused(code, text)

    def forget(self, channel: Channel) -> None:
        """Drop a channel that both sides have closed."""
        self._channels.delete(channel.number)

    def listen(self, where: Endpoint, handler: IncomingHandler) -> None:
        """Hand connections to ``where`` on the server to ``handler``."""
        self._listeners[where] = handler

    def unlisten(self, where: Endpoint) -> None:
        """Refuse such connections from now on."""
        self._listeners.pop(where, None)

    def _parse_channel_open(self, m: Message) -> None:
        kind = m.get_binary()
        channel = Channel(self, self._numbers.take())
        channel.set_remote(m.get_int(), m.get_int(), m.get_int())
        found = forwarded(kind, m.get_remainder())
        handler = self._find_listener(found[0]) if found else None
        if found is None or handler is None:
            channel.reject()
        elif (
            max(len(self._channels), self.io_loop.open_relays) >= _MOST_INCOMING
        ):  # closed ones still deliver
            channel.reject(SHORTAGE)
        else:
            self._channels[channel.number] = channel
            try:
                handler(channel, found[1])
            except Exception:  # one connection's failure must not end the others
                log.exception("a forwarded connection failed")
                channel.reject(CONNECT_FAILED)

    def _find_listener(self, where: Endpoint) -> IncomingHandler | None:
        handler = self._listeners.get(where)
        if handler is None and isinstance(where, tuple):
            # Some servers send the address they bound, not the one they were asked for.
            same = (h for at, h in self._listeners.items() if isinstance(at, tuple) and at[1] == where[1])
            handler = next(same, None)
        return handler

    _cipher_info = CIPHERS
    _mac_info = MACS
    _kex_info = KEX

    _compression_info = {  # noqa: RUF012  # paramiko's own shape
        name: (deflate, inflate and Inflater)
        for name, (deflate, inflate) in paramiko.Transport._compression_info.items()  # type: ignore[attr-defined]
    }

    _channel_handler_table: dict[int, Callable[[Channel, Message], None]] = {  # noqa: RUF012  # paramiko's own shape
        MSG_CHANNEL_SUCCESS: lambda channel, m: channel.take_reply(ok=True),
        MSG_CHANNEL_FAILURE: lambda channel, m: channel.take_reply(ok=False),
        MSG_CHANNEL_DATA: Channel.take_data,
        MSG_CHANNEL_EXTENDED_DATA: Channel.take_extended_data,
        MSG_CHANNEL_WINDOW_ADJUST: Channel.take_window_adjust,
        MSG_CHANNEL_REQUEST: Channel.take_request,
        MSG_CHANNEL_EOF: Channel.take_eof,
        MSG_CHANNEL_CLOSE: Channel.take_close,
    }


def forwarded(kind: bytes, rest: bytes) -> tuple[Endpoint, Origin] | None:
    """Read what a server says of a channel that it opens: which listener it is for, and who connected.

    :param kind: the type of the channel
    :param rest: what follows the packet size in its message
    :returns: None for any other type, and for what does not parse
    """
    try:
        if kind == b"forwarded-tcpip":
            host, rest = _take(rest)
            origin, end = _take(rest[4:])
            return (host, _uint32(rest)[0]), (origin, _uint32(end)[0])
        if kind == b"forwarded-streamlocal@openssh.com":
            return _take(rest)[0], HERE
        if kind == AGENT.encode():
            return AGENT, HERE
    except (struct.error, ValueError):
        pass
    return None


def _take(rest: bytes) -> tuple[str, bytes]:
    """Read a path or a name; return it and what follows."""
    raw, rest = strings(rest, 1)
    if len(raw) > _MOST_TEXT:
        msg = "a name is too long"
        raise ValueError(msg)
    return raw.decode("utf-8", "surrogateescape"), rest
