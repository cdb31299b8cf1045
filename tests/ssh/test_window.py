"""How a stream's window grows and shrinks, with a link that is all arithmetic."""

from __future__ import annotations

import struct
import threading
from typing import Any

import pytest
from paramiko.common import MSG_CHANNEL_WINDOW_ADJUST

import bokeh_ssh._ssh.transport
from bokeh_ssh._ssh.transport import _WINDOW_BUDGET, MOST_WINDOW, WINDOW, Channel, Transport

_ADJUST = struct.Struct(">BII")
_PACKET = 32 * 1024
MIB = 1 << 20


class Clock:
    """A time that tests make pass."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


class Carrier:
    """What a stream needs of a transport: counts the credit that it gives."""

    def __init__(self, rtt: float) -> None:
        self.rtt = rtt
        self.credit = WINDOW
        self._window_granted = 0
        self._window_lock = threading.Lock()

    grow_window = Transport.grow_window

    def send_now(self, packet: Any) -> None: ...

    def send_later(self, packet: bytes) -> None:
        if packet[0] == MSG_CHANNEL_WINDOW_ADJUST:
            self.credit += _ADJUST.unpack(packet)[2]

    def forget(self, stream: Channel) -> None: ...


class Link:
    """A stream whose sender uses all the credit it has, in each round trip, and a reader."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, rtt: float, carrier: Carrier | None = None) -> None:
        self.clock = Clock()
        monkeypatch.setattr(bokeh_ssh._ssh.transport, "time", self.clock)
        self.carrier = carrier or Carrier(rtt)
        self.stream = Channel(self.carrier, 0)
        self.stream._opened = True
        self.sent = 0
        self.delivered = 0
        self._start = self.carrier.credit - WINDOW

    @property
    def waiting(self) -> int:
        return self.sent - self.delivered

    def round_trip(self, seconds: float, reads: float = 1.0) -> None:
        """Let all that there is credit for arrive in ``seconds``, and a share of it be read."""
        burst = self.carrier.credit - self._start - self.sent
        for at in range(0, burst, _PACKET):
            size = min(_PACKET, burst - at)
            self.clock.now += seconds * size / burst
            self.sent += size
            assert self.stream._take(size)
            taken = min(self.waiting, int(size * reads))
            self.delivered += taken
            if taken:
                self.stream.credit(taken)
        if not burst:
            self.clock.now += seconds

    def read(self, count: int) -> None:
        """Read what waits, in parts."""
        while count > 0 and self.waiting:
            taken = min(count, self.waiting, _PACKET)
            self.delivered += taken
            count -= taken
            self.stream.credit(taken)


def test_window_doubles_in_each_round_trip_of_a_long_link(monkeypatch: pytest.MonkeyPatch) -> None:
    """A link that the window holds back fills in five round trips, from 2 MiB to 32 MiB."""
    link = Link(monkeypatch, rtt=0.1)
    found = []
    for _ in range(7):
        link.round_trip(0.1)
        found.append(link.stream.window.size // MIB)
    assert found == [4, 8, 16, 32, 32, 32, 32]
    assert link.stream.window.size == MOST_WINDOW


def test_window_of_a_slow_link_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: where the bytes take longer than the way, more of a window is of no use."""
    link = Link(monkeypatch, rtt=0.1)
    for _ in range(20):
        link.round_trip(0.4)
    assert link.stream.window.size == WINDOW


def test_reader_that_falls_behind_gets_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where half of what comes is not read, the window does not grow, however long the link."""
    link = Link(monkeypatch, rtt=0.1)
    for _ in range(20):
        link.round_trip(0.1, reads=0.5)
        assert link.waiting <= link.stream.window.size
    assert link.stream.window.size == WINDOW


def test_window_shrinks_when_the_reader_falls_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was lent goes back, byte for byte, when what came is not read."""
    link = Link(monkeypatch, rtt=0.1)
    for _ in range(7):
        link.round_trip(0.1)
    assert link.stream.window.size == MOST_WINDOW, "the control: it had grown"
    assert link.carrier._window_granted == MOST_WINDOW - WINDOW
    link.round_trip(0.1, reads=0.0)  # all of it waits now
    assert link.waiting >= MOST_WINDOW * 3 // 4
    for _ in range(200):
        link.read(MIB)
        link.round_trip(0.1, reads=0.0)
        assert link.waiting <= link.stream.window.size + MOST_WINDOW  # what was on its way when it shrank
    assert link.stream.window.size < MOST_WINDOW // 4
    assert link.carrier._window_granted == link.stream.window.size - WINDOW
    assert link.waiting <= MOST_WINDOW // 2


def test_all_windows_of_a_connection_share_one_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many streams grow, they grow by 64 MiB together; each that ends gives its part back."""
    carrier = Carrier(0.1)
    streams = []
    for _ in range(8):
        carrier.credit = WINDOW
        link = Link(monkeypatch, rtt=0.1, carrier=carrier)
        for _ in range(7):
            link.round_trip(0.1)
        streams.append(link.stream)
        assert (
            carrier._window_granted
            == sum(stream.window.size - WINDOW for stream in streams)
            <= _WINDOW_BUDGET
        )
    assert carrier._window_granted == _WINDOW_BUDGET, "the control: the bound was met"
    assert streams[-1].window.size == WINDOW
    for stream in streams:
        stream._end()
    assert carrier._window_granted == 0


def test_overrun_is_what_was_not_credited(monkeypatch: pytest.MonkeyPatch) -> None:
    """A byte more than the window is not taken, at any size of it; the whole window is."""
    link = Link(monkeypatch, rtt=0.1)
    for _ in range(3):
        link.round_trip(0.1)
    left = link.carrier.credit - link.sent
    assert link.stream._take(left)
    assert not link.stream._take(1)
