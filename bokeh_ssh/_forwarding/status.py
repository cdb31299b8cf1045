"""What a tunnel does at one moment: its machines, how far away they are, and what it has carried."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from bokeh_ssh._core.text import describe_age, describe_bytes

StateName = Literal["new", "connecting", "queued", "ready", "lost", "reconnecting", "closed", "failed"]


@dataclass(frozen=True)
class HopStatus:
    """One machine on the route.

    :ivar host: its name, as it was given
    :ivar state: ``"open"``, or ``"lost"`` if there is no connection to it now
    :ivar round_trip: seconds there and back, the shortest of the last few; None if not known
    """

    host: str
    state: Literal["open", "lost"] = "lost"
    round_trip: float | None = None


@dataclass(frozen=True)
class TunnelStatus:
    """The state of a tunnel or forward at one moment; see ``tunnel.status()``.

    :ivar state: as ``tunnel.state``
    :ivar hops: the machines that it logs in to, in their order from here
    :ivar uptime: seconds since it was first open; 0 before that
    :ivar received: bytes received over SSH, including those of SSH itself
    :ivar sent: bytes sent over SSH
    :ivar sessions: connections of browsers and other programs that are open now
    :ivar losses: how often it has reconnected after a loss
    """

    state: StateName
    hops: tuple[HopStatus, ...] = ()
    uptime: float = 0.0
    received: int = 0
    sent: int = 0
    sessions: int = 0
    losses: int = 0

    @property
    def rate(self) -> float:
        """Bytes per second in both directions, since it was first open."""
        return (self.received + self.sent) / self.uptime if self.uptime else 0.0


def describe_way(status: TunnelStatus) -> str:
    """Say by which machines it goes, and how each is.

    >>> hops = (HopStatus("login", "open", 0.012), HopStatus("node17"))
    >>> describe_way(TunnelStatus("lost", hops))
    'here -- login (open, round trip 12 ms) -- node17 (lost)'
    """
    hops = []
    for hop in status.hops:
        trip = "" if hop.round_trip is None else f", round trip {hop.round_trip * 1000:.3g} ms"
        hops.append(f"{hop.host} ({hop.state}{trip})")
    return " -- ".join(("here", *hops))


def describe_traffic(status: TunnelStatus) -> str:
    """Say what it has carried, and what it has survived.

    >>> describe_traffic(TunnelStatus("ready", uptime=90.0, received=20, sent=70, sessions=1))
    'open for 2 min; received 20 bytes, sent 70 bytes; 1 bytes/s; 1 connection; 0 losses survived'
    """
    parts = [
        f"open for {describe_age(status.uptime)}" if status.uptime else "not open yet",
        f"received {describe_bytes(status.received)}, sent {describe_bytes(status.sent)}",
        f"{describe_bytes(status.rate)}/s",
        f"{status.sessions} connection{'s' * (status.sessions != 1)}",
        f"{status.losses} loss{'es' * (status.losses != 1)} survived",
    ]
    return "; ".join(parts)
