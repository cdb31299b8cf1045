"""The tables: for a terminal, and for the documentation."""

from __future__ import annotations

from typing import Any

from benchmarks import facts
from benchmarks.rows import TITLES, Metric, Results, Row, Scale, failure, other_rows, rows, value

_NOTHING = "-"


def cell(row: Row, found: dict[str, Any]) -> str:
    """Say what came of one round, in a line."""
    if "failed" in found:
        return f"failed: {found['failed']}"
    said = [f"{_number(metric, found.get(metric.key))} {metric.unit}" for metric in row.metrics]
    if "cpu" in found:
        said.append(f"{found['cpu']:.2f} s processor, peak {found['peak'] / 1024:.0f} MB")
    return ", ".join(said)


def _number(metric: Metric, number: float | None) -> str:
    if number is None:
        return _NOTHING
    digits = metric.digits + (1 if not metric.digits and number < 10 and metric.unit == "MB/s" else 0)
    return f"{number:.{digits}f}"


def _lines(kept: dict[str, Any], notes: list[str]) -> list[list[str]]:
    """Lay the measured values out: a line for each metric of each row; reasons of failure go to ``notes``."""
    results: Results = kept["results"]
    scale = Scale(**kept["scale"])
    table = []
    for row in [*rows(scale), *other_rows(scale)]:
        if row.key not in results:
            continue
        for metric in row.metrics:
            cells = [_cell(results, row, peer, metric, notes) for peer in TITLES]
            table.append([f"{row.title}, {metric.unit}", *cells])
        if any("cpu" in one for rounds in results[row.key].values() for one in rounds):
            table += [
                _extra(results, row, *words)
                for words in (("cpu", 1.0, "s processor"), ("peak", 1024.0, "MB peak"))
            ]
    return table


def _extra(results: Results, row: Row, key: str, unit: float, title: str) -> list[str]:
    numbers = [value(results, row.key, peer, key) for peer in TITLES]
    digits = 2 if unit == 1 else 0
    return [f"   {title}", *(_NOTHING if n is None else f"{n / unit:.{digits}f}" for n in numbers)]


def _cell(results: Results, row: Row, peer: str, metric: Metric, notes: list[str]) -> str:
    reason = failure(results, row.key, peer)
    if reason is None:
        return _number(metric, value(results, row.key, peer, metric.key))
    if reason.startswith(("not offered", "not installed")):
        return reason.partition(":")[0]
    note = f"{row.title}, {TITLES[peer]}: failed: {reason}"
    if note not in notes:
        notes.append(note)
    return "failed"


def _goals(kept: dict[str, Any]) -> list[list[str]]:
    said = {True: "yes", False: "NO", None: "not measured"}
    return [
        [
            goal["work"],
            goal["goal"],
            _NOTHING if goal["measured"] is None else f"{goal['measured']:.2f}",
            said[goal["reached"]],
        ]
        for goal in kept["goals"]
    ]


_GOAL_HEAD = ["work", "to reach", "measured", "reached"]


def text(kept: dict[str, Any]) -> str:
    """Lay it out for a terminal."""
    notes = list(kept["notes"])
    lines = _lines(kept, notes)
    parts = [
        facts.sentence(kept["machine"]),
        _aligned([["", *TITLES.values()], *lines]),
        *(["\n".join(notes)] if notes else []),
        _aligned([_GOAL_HEAD, *_goals(kept)]),
        _count(kept),
    ]
    return "\n\n".join(parts)


def _count(kept: dict[str, Any]) -> str:
    measured = [goal for goal in kept["goals"] if goal["reached"] is not None]
    reached = sum(goal["reached"] for goal in measured)
    return f"{reached} of {len(measured)} numbers reached; {len(kept['goals']) - len(measured)} not measured"


def _aligned(table: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    found = []
    for line in table:
        first, *rest = line
        cells = [
            first.ljust(widths[0]),
            *(word.rjust(width) for word, width in zip(rest, widths[1:], strict=True)),
        ]
        found.append("  ".join(cells).rstrip())
    return "\n".join(found)


def markdown(kept: dict[str, Any]) -> str:
    """Lay it out for the documentation, which includes it."""
    notes = list(kept["notes"])
    lines = _lines(kept, notes)
    scale = kept["scale"]
    parts = [
        "<!-- written by nox -s bench -->",
        f"{facts.sentence(kept['machine'])} Medians of {scale['rounds']} rounds.",
        "### What is to be reached, and what was measured",
        _table([_GOAL_HEAD, *_goals(kept)]),
        f"{_count(kept)}.",
        "### Every peer",
        _table([["", *TITLES.values()], *[[line[0].strip(), *line[1:]] for line in lines]]),
        *(["\n".join(f"- {note}" for note in notes)] if notes else []),
    ]
    return "\n\n".join(parts) + "\n"


def _table(table: list[list[str]]) -> str:
    head, *body = table
    rule = ["---", *("---:" for _ in head[1:])]
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, rule, *body))
