"""The benchmark works: every byte arrives, and what is told was measured. No test here looks at a time."""

from __future__ import annotations

import hashlib
import json
import socket
import threading
import xml.etree.ElementTree as ET
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

import beds
import conformance
from benchmarks import browser, delay, jobs, loads, plot, report, run, starts, target
from benchmarks.rows import FLOATS, QUICK, TITLES, WAYS, Results, goals, job_rows, other_rows, rows
from skips import missing

TINY = replace(
    QUICK,
    bulk=300_001,
    one_of_16=10_007,
    slow=100_003,
    busy=10_007,
    checked=300_001,
    trips=10,
    busy_trips=5,
    opened=2,
    held=20,
    limit=60.0,
    patience=60.0,
    busy_limit=60.0,
    delay=0.001,
)

pytestmark = pytest.mark.once


@pytest.fixture
def served() -> Any:
    """The target of the loads, on this machine; gives its address."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:
        threading.Thread(target=target.serve, args=(listener,), daemon=True).start()
        yield listener.getsockname()
        listener.shutdown(socket.SHUT_RDWR)


@pytest.mark.slow
@pytest.mark.timeout(900)  # some fifty processes and logins, one after the other
def test_every_peer_here_carries_every_byte(tmp_path: Path) -> None:
    """A tiny run: ``ssh`` and both ways of ours pass a load each way, and one of them all, bytes checked; the
    parts are put together, and figures are written."""
    if beds.find_sshd() is None:
        missing("OpenSSH's sshd is not installed")
    run = pytest.importorskip("benchmarks.run", reason="the benchmark reads /proc and sends POSIX signals")
    told: list[str] = []
    parts = {
        ("download", "remote-upload"): ("raw", "ssh", "ours", "ours-isolated"),
        ("attach",): ("ssh", "ours"),
        (
            *("upload", "downloads", "round-trip", "opens", "hold", "remote-download", "remote-hold", "slow"),
            *("busy-download", "far-round-trip"),
        ): ("ours",),
    }
    kept = run.together(
        [run.measure(TINY, only=only, peers=peers, tell=told.append) for only, peers in parts.items()]
    )
    assert not [line for line in told if "failed" in line]
    assert set(kept["results"]) == {row for only in parts for row in only}
    run.write(kept, tmp_path)
    assert json.loads((tmp_path / "benchmark.json").read_text(encoding="utf-8")) == kept
    assert "bokeh_ssh" in (tmp_path / "benchmark.md").read_text(encoding="utf-8")
    assert ET.parse(tmp_path / "benchmark.svg").getroot().tag.endswith("svg")


@pytest.mark.slow
@pytest.mark.timeout(400)  # a browser, and seconds for each page through ssh
def test_page_over_a_slow_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """A browser opens a page over a line of 40 ms and 10 Mbit/s: through ``ssh``, through a tunnel that finds
    the server, and through one that launches it; the pages of other servers, through a forward; and one with
    data, of which there is little here."""
    if beds.find_sshd() is None or browser.find() is None:
        missing("OpenSSH's sshd or Chromium is not installed")
    run = pytest.importorskip("benchmarks.run", reason="the benchmark reads /proc and sends POSIX signals")
    monkeypatch.setattr(starts, "FLOATS", starts.FLOATS.replace("1_250_000", "1_250"))
    told: list[str] = []
    only = ("far-seen-40-10", "far-first-40-10", "far-panel-100-10", "far-lab-100-10", FLOATS)
    kept = run.measure(TINY, only=only, tell=told.append)
    assert not [line for line in told if "failed" in line]
    assert {key: set(found) for key, found in kept["results"].items()} == {
        "far-seen-40-10": {"ssh", "ours"},
        "far-first-40-10": {"ours"},
        "far-panel-100-10": {"ssh", "ours"},
        "far-lab-100-10": {"ssh", "ours"},
        FLOATS: {"ssh", "ours"},
    }


@pytest.mark.slow
@pytest.mark.timeout(400)  # a cluster, and a job for each way
def test_ways_to_a_job() -> None:
    """Each way to a batch job carries each load, beside ``ssh -J`` and ``srun`` alone."""
    if lacking := jobs.find_lacking():
        missing(f"a Slurm of its own needs {lacking}")
    told: list[str] = []
    only = [row.key for way in WAYS for row in job_rows(TINY, way)]
    kept = run.measure(TINY, only=[*only, "job-dd"], tell=told.append)
    assert not [line for line in told if "failed" in line]
    assert {key: set(found) for key, found in kept["results"].items()} == {
        **{key: {"ssh", "ours"} for key in only},
        "job-dd": {"raw"},
    }


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_round_trips_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of them is opened over a line with a delay, and over one without."""
    if beds.find_sshd() is None:
        missing("OpenSSH's sshd is not installed")
    run = pytest.importorskip("benchmarks.run", reason="the benchmark reads /proc and sends POSIX signals")
    monkeypatch.setattr(run, "_TRIP", 20.0)
    monkeypatch.setattr(run, "_OFTEN", 2)
    told: list[str] = []
    only = [f"trips-{key}" for key in ("attach", "jump", "back")]  # the others are made alike
    kept = run.measure(TINY, only=only, tell=told.append)
    assert not [line for line in told if "failed" in line]
    assert {key: set(found) for key, found in kept["results"].items()} == {key: {"ours"} for key in only}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("download", {"size": 2_000_003, "limit": 60}),
        ("upload", {"size": 2_000_003, "limit": 60}),
        ("downloads", {"size": 100_003, "count": 5, "limit": 60}),
        ("round_trips", {"size": 200, "count": 40, "limit": 60}),
        ("opens", {"count": 3, "limit": 60}),
    ],
)
def test_loads_check_what_they_carry(served: Any, name: str, words: dict[str, Any]) -> None:
    """Each load passes where the bytes arrive as they were sent; it raises where they do not (below)."""
    assert loads.LOADS[name](served, verify=True, **words)


def test_a_download_that_lost_bytes_is_none() -> None:
    """A load on a connection that ends early, or brings other bytes, fails."""
    for answer in (conformance.pattern(999), b"x" * 1000):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            answering = threading.Thread(target=_answer, args=(listener, answer))
            answering.start()
            with pytest.raises(loads.LoadError):
                loads.download(listener.getsockname(), size=1000, limit=60, verify=True)
            answering.join()


def _answer(listener: socket.socket, answer: bytes) -> None:
    sock, _ = listener.accept()
    with sock:
        sock.recv(100)
        sock.sendall(answer)


def test_an_upload_whose_answer_is_lost_fails() -> None:
    """A forward that takes the half-close for the end of both directions does not pass."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        closing = threading.Thread(target=_swallow, args=(listener,))
        closing.start()
        with pytest.raises(loads.LoadError, match="half-close"):
            loads.upload(listener.getsockname(), size=1000, limit=60, verify=False)
        closing.join()


def _swallow(listener: socket.socket) -> None:
    sock, _ = listener.accept()
    with sock:
        conformance.read_all(sock)


@pytest.mark.parametrize("rate", [0.0, 5e7])
def test_the_long_link_loses_nothing(served: Any, rate: float) -> None:
    """Both directions and the half-close pass the delaying proxy as they are, with a limit too."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        words = (listener, served[1], 0.002, rate)
        threading.Thread(target=delay.serve, args=words, daemon=True).start()
        for name in ("download", "upload"):
            loads.LOADS[name](listener.getsockname(), size=5_000_001, limit=60, verify=True)
        loads.round_trips(listener.getsockname(), size=200, count=20, limit=60, verify=True)
        listener.shutdown(socket.SHUT_RDWR)


def test_the_pattern_is_that_of_the_conformance_suite() -> None:
    """What the digest of a download is compared with is what the suite sends."""
    size = 3 * len(conformance.BLOCK) + 5
    assert loads._expected(size) == hashlib.sha256(conformance.pattern(size)).digest()


def invented(**changed: list[dict[str, Any]]) -> dict[str, Any]:
    """Make figures for every row and peer, with some changed: ``download__ours=[...]``."""
    results: Results = {}
    for row in [*rows(TINY), *other_rows(TINY)]:
        results[row.key] = {peer: [{m.key: 10.0 for m in row.metrics}] for peer in TITLES}
    for name, found in changed.items():
        row_key, _, peer = name.partition("__")
        results[row_key][peer] = found
    machine = {"date": "2020-01-01", "cores": 2, "processor": "p", "memory": "1048576 kB", "system": "s"}
    machine |= {"python": "3", "openssh": "o", "versions": {"paramiko": "4"}, "load": 0.5}  # type: ignore[dict-item]
    told = [
        {
            "work": goal.work,
            "goal": goal.text,
            "measured": goal.measure(results),
            "reached": goal.reached(results),
        }
        for goal in goals(TINY)
    ]
    return {"machine": machine, "scale": asdict(TINY), "results": results, "notes": [], "goals": told}


def first(kept: dict[str, Any], work: str) -> Any:
    """Find whether the first number of a work is reached."""
    return next(goal["reached"] for goal in kept["goals"] if goal["work"].startswith(work))


def test_medians_are_compared() -> None:
    """A number is reached by the median of the rounds, not by the best."""
    rounds = [{"rate": 11.0}, {"rate": 100.0}, {"rate": 11.5}]
    assert first(invented(download__ours=rounds), "download") is False
    rounds = [{"rate": 12.5}, {"rate": 1.0}, {"rate": 13.0}]
    assert first(invented(download__ours=rounds), "download") is True


def test_a_failed_round_is_no_number() -> None:
    """One failure among the rounds takes the number away, and its reason is told in both tables."""
    kept = invented(download__ours=[{"rate": 99.0}, {"failed": "3 of 9 bytes came"}])
    assert first(kept, "download") is None
    for told in (report.text(kept), report.markdown(kept)):
        assert "3 of 9 bytes came" in told
        assert "not measured" in told
    assert "failed" in plot.draw(kept)


def test_what_a_peer_has_not_is_no_failure() -> None:
    """A peer without a remote forward has that in its cell."""
    kept = invented(**{"remote-download__sshtunnel": [{"failed": "not offered: it has no remote forward"}]})
    assert "not offered" in report.text(kept)
    assert "failed" not in report.text(kept)


def test_parts_of_a_run_are_put_together() -> None:
    """A run in parts tells what a run in one would; a row that is in two parts is refused."""
    whole = invented(download__ours=[{"rate": 12.5}])
    halves = [{**whole, "results": {}, "notes": ["n"]} for _ in range(2)]
    for number, (key, found) in enumerate(whole["results"].items()):
        halves[number % 2]["results"] = halves[number % 2]["results"] | {key: found}
    again = run.together(halves)
    assert again["goals"] == whole["goals"]
    assert again["notes"] == ["n"]
    assert report.text({**again, "notes": []}) == report.text(whole)
    with pytest.raises(ValueError, match="download"):
        run.together([*halves, whole])
