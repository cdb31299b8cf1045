"""What is measured, and the numbers to reach."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from benchmarks.sites import SITES, Site

#: The order of the columns, and what stands above them.
TITLES = {
    "raw": "raw TCP",
    "ssh": "ssh",
    "ssh-gcm": "ssh, aes128-gcm",
    "asyncssh": "asyncssh",
    "sshtunnel": "sshtunnel",
    "fabric": "fabric",
    "ours": "bokeh_ssh",
    "ours-isolated": "bokeh_ssh, isolate=True",
}
ALL = tuple(TITLES)
FORWARDS = tuple(name for name in ALL if name != "raw")


@dataclass(frozen=True)
class Scale:
    """How much of everything: sizes in bytes, times in seconds.

    :param limit: a transfer that takes longer is cut short, and its rate is that until then
    :param patience: what is not done in this time has failed
    """

    rounds: int = 5
    bulk: int = 256 * 10**6
    one_of_16: int = 16 * 10**6
    slow: int = 64 * 10**6
    busy: int = 128 * 10**6
    checked: int = 24 * 10**6
    trips: int = 2000
    busy_trips: int = 1000
    opened: int = 300
    held: int = 2000
    attaches: int = 3
    imports: int = 3
    launches: int = 3
    page_loads: int = 1
    drag: int = 60
    limit: float = 10.0
    patience: float = 60.0
    busy_limit: float = 4.0
    delay: float = 0.05


QUICK = Scale(
    rounds=1,
    bulk=4 * 10**6,
    one_of_16=10**6,
    slow=2 * 10**6,
    busy=10**6,
    checked=10**6,
    trips=60,
    busy_trips=30,
    opened=10,
    held=40,
    attaches=1,
    imports=1,
    launches=1,
    drag=5,
    limit=20.0,
    patience=20.0,
    busy_limit=1.0,
    delay=0.01,
)


@dataclass(frozen=True)
class Line:
    """A line to the SSH server.

    :param trip: milliseconds of a round trip
    :param rate: Mbit/s in each direction; 0 for as many as come
    """

    trip: float
    rate: float

    @property
    def key(self) -> str:
        """What its rows are called by."""
        return f"{self.trip:g}-{self.rate:g}"

    @property
    def title(self) -> str:
        """What it is called."""
        return f"{self.trip:g} ms, {f'{self.rate:g} Mbit/s' if self.rate else 'no limit'}"


#: Home, abroad, a train; and what only its length slows down.
LINES = (Line(40, 10), Line(100, 10), Line(300, 4.8), Line(100, 0))


@dataclass(frozen=True)
class Metric:
    """One number of a row: its key in a result, its unit, and whether more of it is better."""

    key: str
    unit: str
    more: bool = True
    digits: int = 0


RATE = Metric("rate", "MB/s")
MEDIAN = Metric("median", "ms", more=False, digits=2)
P99 = Metric("p99", "ms, p99", more=False, digits=2)
OPENS = Metric("rate", "/s")
TRIPS = Metric("trips", "round trips", more=False, digits=1)
MILLISECONDS = Metric("time", "ms", more=False)


@dataclass(frozen=True)
class Row:
    """A load, through a forward of a kind, over a link.

    :param load: the name of a function in ``loads``; None for what is measured in another way
    :param words: its arguments
    :param remote: through ``ssh -R`` in place of ``-L``
    :param slow: over the long link
    :param trip: over a line of that many milliseconds
    :param busy: while the client's main thread computes
    :param once: measured in one round only
    """

    key: str
    title: str
    metrics: tuple[Metric, ...]
    load: str | None = None
    words: dict[str, Any] = field(default_factory=dict)
    peers: tuple[str, ...] = FORWARDS
    remote: bool = False
    slow: bool = False
    trip: float = 0.0
    busy: bool = False
    once: bool = False


def rows(scale: Scale) -> list[Row]:
    """List everything that is measured through a forward by ``loads``."""
    size = f"{scale.bulk / 1e6:g} MB"
    bulk = {"size": scale.bulk, "limit": scale.limit}
    many = {"size": scale.one_of_16, "count": 16, "limit": scale.limit}
    trips = {"size": 200, "count": scale.trips, "limit": scale.limit}
    opened = {"count": scale.opened, "limit": scale.limit / 2}
    held = {"count": scale.held, "limit": scale.patience}
    slow = {"size": scale.slow, "limit": scale.limit}
    busy = {"size": scale.busy, "limit": scale.busy_limit}
    busy_trips = {"size": 200, "count": scale.busy_trips, "limit": scale.busy_limit}
    spread = Metric("spread", "slowest : fastest", more=False, digits=2)
    served = (Metric("served", "served"), Metric("each", "KB each", more=False, digits=1))
    held_metrics = (*served, Metric("threads", "more threads", more=False))
    far = f"link of {scale.delay * 2000:g} ms, {scale.slow / 1e6:g} MB down"
    programs = tuple(name for name in FORWARDS if name != "ssh-gcm")
    return [
        Row("download", f"download, {size}", (RATE,), "download", bulk, ALL),
        Row("upload", f"upload, {size}", (RATE,), "upload", bulk, ALL),
        Row("downloads", "16 downloads at once", (RATE, spread), "downloads", many, ALL),
        Row("round-trip", "round trip, 200 bytes", (MEDIAN, P99), "round_trips", trips, ALL),
        Row("opens", "connections, one by one", (OPENS,), "opens", opened, ALL),
        Row("hold", f"{scale.held} open connections", held_metrics, "hold", held, once=True),
        Row("remote-download", f"-R: download, {size}", (RATE,), "download", bulk, remote=True),
        Row("remote-upload", f"-R: upload, {size}", (RATE,), "upload", bulk, remote=True),
        Row("remote-downloads", "-R: 16 downloads at once", (RATE, spread), "downloads", many, remote=True),
        Row(
            "remote-round-trip", "-R: round trip, 200 bytes", (MEDIAN, P99), "round_trips", trips, remote=True
        ),
        Row("remote-opens", "-R: connections, one by one", (OPENS,), "opens", opened, remote=True),
        Row("remote-hold", f"-R: {scale.held} open", held_metrics, "hold", held, remote=True, once=True),
        Row("slow", far, (RATE,), "download", slow, slow=True),
        Row(
            "far-round-trip",
            "round trip at 40 ms, 200 bytes",
            (MEDIAN, P99),
            "round_trips",
            trips,
            ("ssh", "ours"),
            trip=40.0,
        ),
        Row("busy-download", "busy: download", (RATE,), "download", busy, programs, busy=True),
        Row(
            "busy-round-trip",
            "busy: round trip",
            (MEDIAN, P99),
            "round_trips",
            busy_trips,
            programs,
            busy=True,
        ),
    ]


#: What is counted in round trips, with the one for TCP: its key, what it is, and the most.
TRIP_ROWS = (
    ("launch", "launch: until ready", 9.0),
    ("upload", "upload and launch: until ready", 11.0),
    ("attach", "attach: until open", 5.0),
    ("page", "attach, and a page's first answer", 6.0),
    ("forward", "forward: until open", 5.0),
    ("jump", "forward through one jump host", 9.0),  # that of one hop, and 4 as its login takes with TCP
    ("back", "back after a loss: until a WebSocket answers", 6.0),
)
FLOATS = "far-floats-100-10"


#: How the bytes get from a cluster's login node to a job.
WAYS = ("srun", "tcp", "back")


def job_rows(scale: Scale, way: str) -> list[Row]:
    """List what is measured of one way to a batch job, beside ``ssh`` to its machine by a jump host."""
    bulk = {"size": scale.slow, "limit": scale.limit}
    trips = {"size": 200, "count": scale.trips, "limit": scale.limit}
    size, peers = f"{scale.slow / 1e6:g} MB", ("ssh", "ours")
    return [
        Row(f"job-{way}-download", f"job, by {way}: download, {size}", (RATE,), "download", bulk, peers),
        Row(f"job-{way}-upload", f"job, by {way}: upload, {size}", (RATE,), "upload", bulk, peers),
        Row(
            f"job-{way}-round-trip", f"job, by {way}: round trip", (MEDIAN, P99), "round_trips", trips, peers
        ),
    ]


def dd_row(scale: Scale) -> Row:
    """Return the row of what ``srun`` carries with no tunnel."""
    return Row("job-dd", f"srun dd, {scale.slow / 1e6:g} MB, with no tunnel", (RATE,), peers=("raw",))


def trip_row(key: str, title: str) -> Row:
    """Return a row of what is counted in round trips."""
    return Row(f"trips-{key}", title, (TRIPS,), peers=("ours",))


def other_rows(scale: Scale) -> list[Row]:
    """List everything that is measured in other ways."""
    return [
        Row("attach", "attach: to the first byte", (MILLISECONDS,)),
        Row("import", "import", (MILLISECONDS,)),
        Row("first-use", "import, with what connects", (MILLISECONDS,)),
        Row("launch", "launch: to ready", (MILLISECONDS,)),
        Row("page", "page load", (MILLISECONDS,)),
        Row("drag", f"slider drag, {scale.drag} steps", (MEDIAN, P99)),
        *(row for line in LINES for row in page_rows(line)),
        *map(site_row, SITES),
        floats_row(),
        *(trip_row(key, title) for key, title, _ in TRIP_ROWS),
        *(row for way in WAYS for row in job_rows(scale, way)),
        dd_row(scale),
    ]


def floats_row() -> Row:
    """Return the row of a page with much data."""
    title = "page with 20 MB of smooth floats at 100 ms, 10 Mbit/s"
    return Row(FLOATS, title, (MILLISECONDS,), peers=("ssh", "ours"))


def site_row(site: Site) -> Row:
    """Return the row of another server's page."""
    return Row(site.key, site.title, (MILLISECONDS,), peers=("ssh", "ours"))


def page_rows(line: Line) -> list[Row]:
    """List what is measured of a page over a line, until its slider is there."""
    title = f"page at {line.title}"
    return [
        Row(f"far-seen-{line.key}", f"{title}, a Bokeh seen before", (MILLISECONDS,), peers=("ssh", "ours")),
        Row(f"far-compressed-{line.key}", f"{title}, with -C", (MILLISECONDS,), peers=("ssh",)),
        Row(f"far-first-{line.key}", f"{title}, launched, the first time", (MILLISECONDS,), peers=("ours",)),
    ]


#: What came of a row: peer -> rounds, each a metric's value by key, or why it failed under "failed".
Results = dict[str, dict[str, list[dict[str, Any]]]]


def failure(results: Results, row: str, peer: str) -> str | None:
    """Tell why a peer failed a row, if it did."""
    found = results.get(row, {}).get(peer, [])
    return next((str(one["failed"]) for one in found if "failed" in one), None)


def value(results: Results, row: str, peer: str, key: str) -> float | None:
    """Give the median over the rounds; None where there is no number, or a round failed."""
    if failure(results, row, peer):
        return None
    found = [one[key] for one in results.get(row, {}).get(peer, []) if one.get(key) is not None]
    return statistics.median(found) if found else None


@dataclass(frozen=True)
class Goal:
    """A number to reach."""

    work: str
    measure: Callable[[Results], float | None]
    limit: float
    at_least: bool
    unit: str

    def reached(self, results: Results) -> bool | None:
        """Tell whether it is; None where it was not measured."""
        found = self.measure(results)
        if found is None:
            return None
        return found >= self.limit if self.at_least else found <= self.limit

    @property
    def text(self) -> str:
        """Say it."""
        return f"{'>=' if self.at_least else '<='} {self.limit:g} {self.unit}"


def _ratio(row: str, key: str, of: str, to: str) -> Callable[[Results], float | None]:
    def measure(results: Results) -> float | None:
        one, other = value(results, row, of, key), value(results, row, to, key)
        return one / other if one is not None and other else None

    return measure


def _across(key: str, one: tuple[str, str], other: tuple[str, str]) -> Callable[[Results], float | None]:
    def measure(results: Results) -> float | None:
        above, below = value(results, *one, key), value(results, *other, key)
        return above / below if above is not None and below else None

    return measure


def _later(row: str, of: str, than: str) -> Callable[[Results], float | None]:
    def measure(results: Results) -> float | None:
        one, other = value(results, row, of, "time"), value(results, row, than, "time")
        return (one - other) / 1e3 if one is not None and other is not None else None

    return measure


def _own(row: str, key: str) -> Callable[[Results], float | None]:
    return lambda results: value(results, row, "ours", key)


def _forward_goals(scale: Scale, prefix: str, flag: str) -> Iterable[Goal]:
    def against(row: str, key: str, peer: str, limit: float, at_least: bool = True) -> Goal:
        name = f"ssh {flag}" if peer == "ssh" else peer
        work = next(row_.title for row_ in rows(scale) if row_.key == prefix + row)
        work += ", p99" if key == "p99" else ""
        return Goal(work, _ratio(prefix + row, key, "ours", peer), limit, at_least, f"x {name}")

    yield against("download", "rate", "ssh", 1.2)
    yield against("download", "rate", "asyncssh", 1.8)
    if not prefix:
        yield against("download", "rate", "sshtunnel", 3)
    yield against("upload", "rate", "ssh", 1)
    yield against("upload", "rate", "asyncssh", 1.3)
    yield against("downloads", "rate", "ssh", 1)
    at_once = f"{'-R: ' if prefix else ''}16 downloads at once"
    yield Goal(at_once, _own(f"{prefix}downloads", "spread"), 2, at_least=False, unit="slowest : fastest")
    yield against("round-trip", "median", "ssh", 1.3, at_least=False)
    yield against("round-trip", "p99", "ssh", 1.2, at_least=False)
    yield against("opens", "rate", "ssh", 2)
    yield against("opens", "rate", "asyncssh", 1.2)


def goals(scale: Scale) -> list[Goal]:
    """List the numbers to reach."""
    found = list(_forward_goals(scale, "", "-L"))
    for key, flag in (("hold", ""), ("remote-hold", "-R: ")):
        work = f"{flag}{scale.held} open connections"
        found += [
            Goal(work, _own(key, "served"), scale.held, at_least=True, unit="served"),
            Goal(work, _own(key, "threads"), 0, at_least=False, unit="more threads"),
            Goal(work, _own(key, "each"), 8, at_least=False, unit="KB each"),
        ]
    found += _forward_goals(scale, "remote-", "-R")
    isolated = "ours-isolated"
    idle = ("download", isolated), ("round-trip", isolated)
    return [
        *found,
        Goal(
            f"link of {scale.delay * 2000:g} ms", _ratio("slow", "rate", "ours", "ssh"), 3, True, "x ssh -L"
        ),
        Goal("busy: download", _across("rate", ("busy-download", isolated), idle[0]), 0.8, True, "x idle"),
        Goal(
            "busy: round trip",
            _across("median", ("busy-round-trip", isolated), idle[1]),
            1.3,
            False,
            "x idle",
        ),
        Goal("attach", _ratio("attach", "time", "ours", "ssh"), 0.5, False, "x ssh -L"),
        Goal("attach, isolate=True", _later("attach", isolated, "ours"), 0.4, False, "s later"),
        Goal("launch", _later("launch", isolated, "raw"), 0.4, False, "s more than the server's own start"),
        Goal("import bokeh_ssh", _ratio("import", "time", "ours", "raw"), 1.1, False, "x import paramiko"),
        *(goal for line in LINES for goal in _page_goals(line)),
        *(
            Goal(site.title, _across("time", (site.key, "ours"), (site.key, "ssh")), 0.4, False, "x ssh -L")
            for site in SITES
        ),
        Goal(floats_row().title, _ratio(FLOATS, "time", "ours", "ssh"), 0.7, False, "x ssh -L"),
        Goal(
            "round trip at 40 ms", _ratio("far-round-trip", "median", "ours", "ssh"), 1.01, False, "x ssh -L"
        ),
        *(
            Goal(title, _own(f"trips-{key}", "trips"), most, False, "round trips")
            for key, title, most in TRIP_ROWS
        ),
        Goal(
            "job, by srun: download",
            _across("rate", ("job-srun-download", "ours"), (dd_row(scale).key, "raw")),
            0.9,
            True,
            "x srun dd",
        ),
        Goal("job, by tcp: download", _ratio("job-tcp-download", "rate", "ours", "ssh"), 1, True, "x ssh -J"),
    ]


def _page_goals(line: Line) -> Iterable[Goal]:
    seen, compressed, first = (row.key for row in page_rows(line))
    title = f"page at {line.title}"
    if not line.rate:
        yield Goal(title, _ratio(seen, "time", "ours", "ssh"), 0.8, False, "x ssh -L")
        return
    yield Goal(title, _ratio(seen, "time", "ours", "ssh"), 0.33, False, "x ssh -L")
    yield Goal(title, _across("time", (seen, "ours"), (compressed, "ssh")), 0.6, False, "x ssh -C -L")
    yield Goal(
        f"{title}, first time", _across("time", (first, "ours"), (seen, "ssh")), 0.55, False, "x ssh -L"
    )
