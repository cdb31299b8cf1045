"""Run it all: every peer under every load, in turn, on one SSH server; then tell."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import beds
from benchmarks import browser, facts, jobs, plot, process, report, sites, starts
from benchmarks.process import Child, PeerError
from benchmarks.rows import (
    FORWARDS,
    LINES,
    QUICK,
    TRIP_ROWS,
    WAYS,
    Line,
    Results,
    Row,
    Scale,
    dd_row,
    floats_row,
    goals,
    job_rows,
    other_rows,
    page_rows,
    rows,
    site_row,
    trip_row,
)
from benchmarks.sites import SITES, Site

_ROOT = Path(__file__).resolve().parent.parent.parent
_STATIC = _ROOT / "docs" / "_static"
#: Seconds for a peer to stand.
_START = 90.0
#: Loads that can check every byte, which costs time: done before what is timed.
_CHECKED = ("download", "upload", "downloads", "round_trips")

#: Milliseconds of a round trip over which they are counted, and how often: the first knows no key yet.
_TRIP, _OFTEN = 800.0, 3

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Page:
    """A page that is loaded over lines.

    :param seen: where its BokehJS is kept already
    """

    chromium: browser.Browser
    app: Path
    port: int
    seen: Path


class Bench:
    """What all rows share: one SSH server, one target, one long link to the server.

    :param stack: takes what must be ended
    :param tell: takes a line for each thing that was measured
    """

    def __init__(
        self, stack: ExitStack, scale: Scale, only: Sequence[str], peers: Sequence[str], tell: Tell
    ) -> None:
        self.scale = scale
        self.results: Results = {}
        self.notes: list[str] = []
        self._only = only
        self._peers = peers
        self._tell = tell
        self._directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="benchmark-")))
        # Bash reads the account's start files unless it takes itself for an inner shell. They may take longer
        # than all of a login, and only what runs a command would pay for them.
        start_files = {"SetEnv": "SHLVL=1"}
        self._machine = stack.enter_context(
            beds.local_sshd(beds.Key.generate(), self._directory, start_files)
        )
        self._target = self._serve(stack, "target", {})
        self._far = self._lead(stack, "far", scale.delay)
        self._lines = {
            row.trip: self._lead(stack, f"{row.trip:g}", row.trip / 2000)
            for row in rows(scale)
            if row.trip and self._wanted(row)
        }

    def _serve(self, stack: ExitStack, module: str, order: dict[str, Any]) -> int:
        return int(stack.enter_context(Child(module, order, self._directory)).hear(_START)["port"])

    def _lead(self, stack: ExitStack, name: str, delay: float, rate: float = 0.0) -> beds.Machine:
        """Return the machine as it is reached over a line of its own."""
        far = self._serve(stack, "delay", {"port": self._machine.port, "delay": delay, "rate": rate})
        known = self._machine.known_hosts.read_text(encoding="ascii").replace(
            str(self._machine.port), str(far)
        )
        path = self._directory / f"known_hosts-{name}"
        path.write_text(known, encoding="ascii")
        return replace(self._machine, port=far, known_hosts=path)

    def _wanted(self, row: Row) -> list[str]:
        if self._only and row.key not in self._only:
            return []
        return [peer for peer in row.peers if not self._peers or peer in self._peers]

    def _rotated(self, row: Row, number: int) -> list[str]:
        """List the peers of a row that have not failed it, beginning with another one in each round."""
        peers = self._wanted(row)
        start = number % len(peers) if peers else 0
        failed = [peer for peer, found in self.results.get(row.key, {}).items() if "failed" in found[-1]]
        return [peer for peer in peers[start:] + peers[:start] if peer not in failed]

    def _note(self, row: Row, peer: str, found: dict[str, Any]) -> None:
        self.results.setdefault(row.key, {}).setdefault(peer, []).append(found)
        self._tell(f"{row.title}: {peer}: {report.cell(row, found)}")

    def _order(
        self, row: Row, peer: str, target: int | None = None, machine: beds.Machine | None = None
    ) -> dict[str, Any]:
        machine = machine or self._lines.get(row.trip) or (self._far if row.slow else self._machine)
        return {
            "peer": peer,
            "host": machine.host,
            "port": machine.port,
            "user": machine.user,
            "key": str(machine.key_path),
            "known_hosts": str(machine.known_hosts),
            "target": target or self._target,
            "remote": row.remote,
            "ssh": machine.ssh("true")[:-2],
        }

    # Rows that are loads on a forward.

    def forwards(self) -> None:
        """Measure all rows that are loads on a forward."""
        for row in rows(self.scale):
            if row.load in _CHECKED and not row.busy:
                for peer in self._wanted(row):
                    self._check(row, peer)
            for number in range(1 if row.once else self.scale.rounds):
                for peer in self._rotated(row, number):
                    try:
                        found = self._measure(row, peer)
                    except PeerError as exc:
                        found = {"failed": str(exc)}
                    self._note(row, peer, found)

    def _check(self, row: Row, peer: str) -> None:
        words = dict(row.words)
        if row.load != "round_trips":
            words["size"] = min(words["size"], self.scale.checked)
        try:
            with Child("peers", self._order(row, peer), self._directory) as forward:
                self._load(row, forward.hear(_START)["port"], words | {"verify": True})
        except PeerError as exc:
            self._note(row, peer, {"failed": str(exc)})

    def _load(
        self, row: Row, port: int, words: dict[str, Any], meanwhile: Callable[[], None] | None = None
    ) -> Any:
        patience = row.words["limit"] + 30
        order = {"load": row.load, "port": port, **words}
        with Child("loads", order, self._directory) as driver:
            if meanwhile:
                driver.hear(patience)
                meanwhile()
                driver.tell("go on")
            return driver.hear(patience)

    def _measure(self, row: Row, peer: str) -> dict[str, Any]:
        with Child("peers", self._order(row, peer), self._directory) as forward:
            opened = forward.hear(_START)
            port, pids = opened["port"], opened["pids"]
            if row.busy:
                forward.tell("busy")
                forward.hear(_START)
            if row.load == "hold":
                return self._hold(row, port, pids)
            began = process.cpu(pids)
            found = self._load(row, port, row.words | {"verify": False})
            if peer != "raw":
                found |= {"cpu": process.cpu(pids) - began, "peak": process.status(pids, "VmHWM")}
            return dict(found)

    def _hold(self, row: Row, port: int, pids: list[int]) -> dict[str, Any]:
        """Hold connections, and look at what they cost the client while they stand."""
        warm = replace(row, load="round_trips")
        self._load(warm, port, {"size": 200, "count": 40, "limit": row.words["limit"], "verify": True})
        before = {name: process.status(pids, name) for name in ("VmRSS", "Threads")}
        cost: dict[str, Any] = {}

        def look() -> None:
            more = {name: process.status(pids, name) - before[name] for name in before}
            cost["each"] = more["VmRSS"] / row.words["count"]
            cost["threads"] = more["Threads"]

        found = self._load(row, port, row.words | {"verify": True}, look)
        count = row.words["count"]
        if found["served"] < count:
            return {"failed": f"{found['served']} of {count} served: {found['why']}", **cost}
        return found | cost

    # The others.

    def others(self) -> None:
        """Measure starts, and a page in a browser."""
        attach, import_, first_use, launch, page, drag, *_ = other_rows(self.scale)
        for number in range(self.scale.rounds):
            for peer in self._rotated(attach, number):
                self._attach(attach, peer)
            for row, used in ((import_, False), (first_use, True)):
                for _ in range(self.scale.imports if self._wanted(row) else 0):
                    self._note_all(row, starts.imports(used=used))
        app = self._directory / "app.py"
        app.write_text(starts.APP, encoding="utf-8")
        try:
            for _ in range(self.scale.launches * self.scale.rounds if self._wanted(launch) else 0):
                self._note_all(launch, starts.launches(self._machine, app))
            if self._wanted(page) or self._wanted(drag):
                self._pages(page, drag, app)
            lines = [line for line in LINES if any(map(self._wanted, page_rows(line)))]
            if lines:
                self._far_pages(lines, app)
            if self._wanted(floats_row()):
                self._far_floats(floats_row())
            self._trips(app)
        except PeerError as exc:
            self._skip(str(exc))
        for site in SITES:
            if self._wanted(site_row(site)):
                self._far_site(site)
        self._jobs()

    def _jobs(self) -> None:
        """Measure the ways to a batch job, on a Slurm of this machine's own."""
        ways = [way for way in WAYS if any(map(self._wanted, job_rows(self.scale, way)))]
        dd = dd_row(self.scale)
        if not ways and not self._wanted(dd):
            return
        if lacking := jobs.find_lacking():
            self._skip(f"skipped: the rows of a job, since a Slurm of its own needs {lacking}")
            return
        with ExitStack() as stack:
            bench = jobs.JobBench(stack, self._directory)
            for _ in range(self.scale.rounds if self._wanted(dd) else 0):
                self._note(dd, "raw", {"rate": bench.copy(self.scale.slow)})
            for way in ways:
                with ExitStack() as opened:
                    self._job(way, bench, opened)

    def _job(self, way: str, bench: jobs.JobBench, stack: ExitStack) -> None:
        ports = {}
        for peer, (module, order) in {"ours": bench.tunnel(way), "ssh": bench.ssh()}.items():
            try:
                ports[peer] = stack.enter_context(Child(module, order, self._directory)).hear(_START)["port"]
            except PeerError as exc:
                for row in job_rows(self.scale, way):
                    self._note(row, peer, {"failed": str(exc)})
        for row in filter(self._wanted, job_rows(self.scale, way)):
            for number in range(self.scale.rounds):
                for peer in self._rotated(row, number):
                    try:
                        found = self._load(row, ports[peer], row.words | {"verify": False})
                    except PeerError as exc:
                        found = {"failed": str(exc)}
                    self._note(row, peer, found)

    def _note_all(self, row: Row, found: dict[str, dict[str, Any]]) -> None:
        for peer, one in found.items():
            self._note(row, peer, one)

    def _skip(self, reason: str) -> None:
        self.notes.append(reason)
        self._tell(reason)

    def _attach(self, row: Row, peer: str) -> None:
        order = self._order(row, peer) | {"attach": self.scale.attaches}
        try:
            with Child("peers", order, self._directory) as forward:
                for time in forward.hear(self.scale.patience)["times"]:
                    self._note(row, peer, {"time": time})
        except PeerError as exc:
            self._note(row, peer, {"failed": str(exc)})

    def _find_browser(self) -> str | None:
        program = browser.find()
        if program is None:
            self._skip("skipped: the page rows, since there is no Chromium here (apt install chromium)")
        return program

    # A page over lines that are long, or slow.

    def _far_pages(self, lines: Sequence[Line], app: Path) -> None:
        program = self._find_browser()
        if program is None:
            return
        with (
            starts.bokeh_server(app, "--allow-websocket-origin", "*") as (port, _),
            browser.browser(program) as chromium,
        ):
            served = Page(chromium, app, port, self._directory / "seen")
            attach = {"remote_port": port, "launch": False}
            self._load_page(served, self._machine, attach, served.seen)  # the first time of all
            for line in lines:
                with ExitStack() as stack:
                    rate = line.rate * 1e6 / 8
                    far = self._lead(stack, "line", line.trip / 2000, rate)
                    for number in range(self.scale.rounds):
                        self._far_page(line, number, far, served)

    def _far_page(self, line: Line, number: int, far: beds.Machine, page: Page) -> None:
        seen, compressed, first = page_rows(line)
        attach = {"remote_port": page.port, "launch": False}
        launch = {"app": str(page.app)}
        turns = [(row, peer) for row in (seen, compressed, first) for peer in self._rotated(row, number)]
        for one, peer in turns:
            try:
                if peer == "ssh":
                    more = ["-C"] if one is compressed else []
                    time = self._load_through_ssh(one, page, far, more)
                elif one is first:
                    with tempfile.TemporaryDirectory(prefix="first-") as cache:
                        time = self._load_page(page, far, launch, Path(cache))
                else:
                    time = self._load_page(page, far, attach, page.seen)
            except PeerError as exc:
                self._note(one, peer, {"failed": str(exc)})
            else:
                self._note(one, peer, {"time": time})

    def _far_floats(self, row: Row) -> None:
        """Measure a page with much data, whose server is launched by us, and one that ``ssh`` leads to."""
        program = self._find_browser()
        if program is None:
            return
        app = self._directory / "floats.py"
        app.write_text(starts.FLOATS, encoding="utf-8")
        with (
            starts.bokeh_server(app, "--allow-websocket-origin", "*") as (port, _),
            browser.browser(program) as chromium,
            ExitStack() as stack,
        ):
            page = Page(chromium, app, port, self._directory / "seen")
            far = self._lead(stack, "floats", 0.05, 10e6 / 8)
            self._load_page(page, self._machine, {"app": str(app)}, page.seen)  # the first time
            for number in range(self.scale.rounds):
                for peer in self._rotated(row, number):
                    if peer == "ssh":
                        time = self._load_through_ssh(row, page, far, [])
                    else:
                        time = self._load_page(page, far, {"app": str(app)}, page.seen)
                    self._note(row, peer, {"time": time})

    # Round trips.

    def _trips(self, app: Path) -> None:
        """Count what takes how many round trips, by how much longer it takes over a long line."""
        wanted = [key for key, title, _ in TRIP_ROWS if self._wanted(trip_row(key, title))]
        if not wanted:
            return
        with (
            starts.bokeh_server(app, "--allow-websocket-origin", "*") as (port, _),
            ExitStack() as stack,
        ):
            near = self._lead(stack, "near", 0.0)
            far = self._lead(stack, "long", _TRIP / 2000)
            order = {"target": port, "app": str(app), "inner": self._machine.port, "count": _OFTEN}
            order["cache"] = str(self._directory / "seen")
            for key, title, _ in TRIP_ROWS:
                for _ in range(self.scale.rounds if key in wanted else 0):
                    kind = {"kind": key, "jump": key == "jump"}
                    try:
                        times = [self._time(order | kind, machine) for machine in (near, far)]
                    except PeerError as exc:
                        self._note(trip_row(key, title), "ours", {"failed": str(exc)})
                        break
                    # And TCP's own, which the line that is emulated here does not delay.
                    trips = 1 + (times[1] - times[0]) * 1000 / _TRIP
                    self._note(trip_row(key, title), "ours", {"trips": trips})

    def _time(self, order: dict[str, Any], machine: beds.Machine) -> float:
        login = {"port": machine.port, "key_filename": str(machine.key_path)}
        known = self._directory / "known_hosts-both"
        known.write_text(
            machine.known_hosts.read_text(encoding="ascii")
            + self._machine.known_hosts.read_text(encoding="ascii"),
            encoding="ascii",
        )
        words = {"host": machine.host, "user": machine.user, "login": login | {"known_hosts": str(known)}}
        with Child("trips", order | words, self._directory) as child:
            return float(min(child.hear(_START)["times"][1:]))

    def _far_site(self, site: Site) -> None:
        """Measure another server's page over a line, through ``ssh`` and a forward that keeps its files."""
        program = self._find_browser()
        if program is None:
            return
        row, seen = site_row(site), self._directory / site.key
        try:
            with (
                sites.running(site) as port,
                browser.browser(program) as chromium,
                ExitStack() as stack,
            ):
                far = self._lead(stack, site.key, 0.05, 10e6 / 8)
                self._load_site(site, chromium, self._machine, port, seen)  # the first time
                for number in range(self.scale.rounds):
                    for peer in self._rotated(row, number):
                        if peer == "ours":
                            time = self._load_site(site, chromium, far, port, seen)
                        else:
                            order = self._order(row, "ssh", port, far)
                            with Child("peers", order, self._directory) as forward:
                                local = forward.hear(_START)["port"]
                                time = chromium.load(f"http://127.0.0.1:{local}{site.page}", site.shown)
                        self._note(row, peer, {"time": time})
        except PeerError as exc:
            self._skip(str(exc))

    def _load_site(
        self, site: Site, chromium: browser.Browser, machine: beds.Machine, port: int, cache: Path
    ) -> float:
        """Load a site's page through a forward; return the milliseconds."""
        order = {"host": machine.host, "port": machine.port, "user": machine.user, "http": True}
        order |= {"key_filename": str(machine.key_path), "known_hosts": str(machine.known_hosts)}
        order |= {"remote_port": port, "remote_host": "127.0.0.1", "cache": str(cache)}
        with Child("tunnel", order, self._directory) as forward:
            return chromium.load(forward.hear(_START)["url"] + site.page, site.shown)

    def _load_through_ssh(self, row: Row, page: Page, machine: beds.Machine, more: list[str]) -> float:
        order = self._order(row, "ssh", page.port, machine)
        order["ssh"] += more
        with Child("peers", order, self._directory) as forward:
            local = forward.hear(_START)["port"]
            return page.chromium.measure(f"http://127.0.0.1:{local}/{page.app.stem}", 1)[0]

    def _load_page(self, page: Page, machine: beds.Machine, words: dict[str, Any], cache: Path) -> float:
        """Load the page through a tunnel; return the milliseconds."""
        order = {"host": machine.host, "port": machine.port, "user": machine.user}
        order |= {"key_filename": str(machine.key_path), "known_hosts": str(machine.known_hosts)}
        with Child("tunnel", {**order, **words, "cache": str(cache)}, self._directory) as tunnel:
            return page.chromium.measure(tunnel.hear(_START)["url"], 1)[0]

    def _pages(self, page: Row, drag: Row, app: Path) -> None:
        program = self._find_browser()
        if program is None:
            return
        with (
            starts.bokeh_server(app, "--allow-websocket-origin", "*") as (port, _),
            browser.browser(program) as chromium,
        ):
            chromium.measure(f"http://127.0.0.1:{port}/{app.stem}", 1)  # its own first time
            for number in range(self.scale.rounds):
                for peer in self._rotated(replace(page, peers=("raw", *FORWARDS)), number):
                    self._page(page, drag, peer, chromium, port, app.stem)

    def _page(self, page: Row, drag: Row, peer: str, chromium: browser.Browser, port: int, name: str) -> None:
        try:
            with Child("peers", self._order(page, peer, port), self._directory) as forward:
                local = forward.hear(_START)["port"]
                loaded, times = chromium.measure(f"http://127.0.0.1:{local}/{name}", self.scale.drag)
        except PeerError as exc:
            self._note(page, peer, {"failed": str(exc)})
            return
        self._note(page, peer, {"time": loaded})
        self._note(drag, peer, browser.summary(times))


def measure(
    scale: Scale, *, only: Sequence[str] = (), peers: Sequence[str] = (), tell: Tell
) -> dict[str, Any]:
    """Measure everything; gives what is kept as JSON.

    :param only: keys of rows; empty is all; likewise ``peers``
    """
    _raise_limits(scale)
    machine = facts.gather()
    with ExitStack() as stack:
        bench = Bench(stack, scale, only, peers, tell)
        bench.forwards()
        bench.others()
    return _keep(machine, scale, bench.results, bench.notes)


def _keep(machine: dict[str, Any], scale: Scale, results: Results, notes: list[str]) -> dict[str, Any]:
    return {
        "machine": machine,
        "scale": asdict(scale),
        "results": results,
        "notes": notes,
        "goals": [
            {
                "work": goal.work,
                "goal": goal.text,
                "measured": goal.measure(results),
                "reached": goal.reached(results),
            }
            for goal in goals(scale)
        ],
    }


def together(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Put the parts of a run together, which were measured one after the other with ``--only``.

    :raises ValueError: if two parts have the same row: what is compared must come from one run
    """
    results: Results = {}
    for part in parts:
        if twice := results.keys() & part["results"].keys():
            msg = f"measured twice: {', '.join(sorted(twice))}"
            raise ValueError(msg)
        results |= part["results"]
    first = parts[0]
    notes = list(dict.fromkeys(note for part in parts for note in part["notes"]))
    return _keep(first["machine"], Scale(**first["scale"]), results, notes)


def _raise_limits(scale: Scale) -> None:
    """Allow as many open files as the row with the most connections needs; what is started inherits it."""
    try:
        import resource
    except ImportError:
        return  # Windows has no such limit
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * scale.held + 500
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))


def main(argv: Sequence[str] | None = None) -> int:
    """Run it from the command line."""
    parser = argparse.ArgumentParser(prog="nox -s bench --", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes, one round: does it work at all")
    parser.add_argument("--rounds", type=int, help="how often each peer has its turn (default: 5)")
    parser.add_argument("--only", default="", help="rows, by key, with commas")
    parser.add_argument("--peers", default="", help="peers, by key, with commas")
    parser.add_argument("--out", type=Path, help="the directory for benchmark.json, .md and .svg")
    parser.add_argument(
        "--again", type=Path, action="append", help="measure nothing: tell what these JSON files hold"
    )
    options = parser.parse_args(argv)
    scale = QUICK if options.quick else Scale()
    scale = replace(scale, rounds=options.rounds or scale.rounds)
    only, peers = ([name for name in text.split(",") if name] for text in (options.only, options.peers))
    if options.again:
        kept = together([json.loads(path.read_text(encoding="utf-8")) for path in options.again])
    else:
        kept = measure(
            scale, only=only, peers=peers, tell=lambda line: print(line, file=sys.stderr, flush=True)
        )
    print(report.text(kept))
    # Only a whole run replaces the figures in the documentation.
    place = options.out or (None if options.quick or only or peers else _STATIC)
    if place:
        write(kept, place)
        print(f"written: benchmark.json, benchmark.md and benchmark.svg in {os.path.relpath(place)}")
    return 0


def write(kept: dict[str, Any], place: Path) -> None:
    """Write the figures, the tables of the documentation, and the picture."""
    place.mkdir(parents=True, exist_ok=True)
    (place / "benchmark.json").write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    (place / "benchmark.md").write_text(report.markdown(kept), encoding="utf-8")
    (place / "benchmark.svg").write_text(plot.draw(kept), encoding="utf-8")
