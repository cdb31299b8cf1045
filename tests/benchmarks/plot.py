"""The picture for the documentation: a panel for each of some rows, a bar for each peer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from xml.sax.saxutils import escape

from benchmarks.rows import TITLES, Metric, Results, Row, Scale, failure, other_rows, rows, value

_PANELS = ("download", "upload", "downloads", "round-trip", "opens", "slow", "busy-download", "attach")
_WIDTH, _COLUMN, _BAR, _HEAD, _GAP = 860, 430, 18, 46, 14
_LABEL, _LONGEST = 150, 190
_STYLE = """
    .card { fill: #ffffff; stroke: #d4d9e0 }
    text { font: 12.5px system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif }
    .head { font-weight: 600; font-size: 15px; fill: #1b2430 }
    .note { fill: #566372 }
    .name { fill: #1b2430 }
    .end { text-anchor: end }
    .ours { fill: #2f66a3 }
    .peer { fill: #a9b6c6 }
    .limit { fill: #dfe5ec }
    @media (prefers-color-scheme: dark) {
      .card { fill: #131a22; stroke: #303b48 }
      .head, .name { fill: #e7edf4 }
      .note { fill: #a3b0bf }
      .ours { fill: #7db3f0 }
      .peer { fill: #556577 }
      .limit { fill: #2b3846 }
    }
"""


@dataclass(frozen=True)
class _Panel:
    row: Row
    metric: Metric
    bars: list[tuple[str, float | None, str]]  # peer, value, what is written beside

    @property
    def height(self) -> int:
        return _HEAD + len(self.bars) * _BAR + _GAP


def draw(kept: dict[str, Any]) -> str:
    """Draw the picture from what ``benchmark.json`` holds."""
    results: Results = kept["results"]
    scale = Scale(**kept["scale"])
    by_key = {row.key: row for row in [*rows(scale), *other_rows(scale)]}
    panels = [_panel(results, by_key[key]) for key in _PANELS if results.get(key)]
    parts, y = [], 10
    for number in range(0, len(panels), 2):
        pair = panels[number : number + 2]
        for column, panel in enumerate(pair):
            parts += _draw(panel, column * _COLUMN + 20, y + 6)
        y += max(panel.height for panel in pair)
    machine = kept["machine"]
    note = f"{machine['cores']} cores, {machine['openssh']}, Python {machine['python']}, loopback; medians"
    parts.append(f'<text class="note" x="20" y="{y + 16}">{escape(note)}</text>')
    height = y + 34
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" '
        f'height="{height}" role="img" aria-labelledby="title">\n'
        '  <title id="title">What forwards do under the same loads: bokeh_ssh and its peers</title>\n'
        f"  <style>{_STYLE}  </style>\n"
        f'  <rect class="card" x="0.5" y="0.5" width="{_WIDTH - 1}" height="{height - 1}" rx="8"/>\n  '
        + "\n  ".join(parts)
        + "\n</svg>\n"
    )


def _panel(results: Results, row: Row) -> _Panel:
    metric = row.metrics[0]
    bars = []
    for peer in TITLES:
        if peer not in results[row.key] or peer == "ssh-gcm":
            continue
        number = value(results, row.key, peer, metric.key)
        if number is not None:
            bars.append((peer, number, f"{number:.{metric.digits}f}"))
        elif "not " not in (failure(results, row.key, peer) or ""):
            bars.append((peer, None, "failed"))
    return _Panel(row, metric, bars)


def _draw(panel: _Panel, x: int, y: int) -> list[str]:
    better = "more" if panel.metric.more else "less"
    parts = [
        f'<text class="head" x="{x}" y="{y + 16}">{escape(panel.row.title)}</text>',
        f'<text class="note" x="{x}" y="{y + 32}">{escape(panel.metric.unit)}, {better} is better</text>',
    ]
    # Raw TCP would leave no room for the others to differ: its bar is cut.
    most = max((number for peer, number, _ in panel.bars if number and peer != "raw"), default=1.0)
    for number, (peer, amount, said) in enumerate(panel.bars):
        top = y + _HEAD + number * _BAR - 6
        kind = "limit" if peer == "raw" else "ours" if peer.startswith("ours") else "peer"
        length = min(1.0, (amount or 0) / most) * _LONGEST
        parts += [
            f'<text class="name end" x="{x + _LABEL - 8}" y="{top + 11}">{escape(TITLES[peer])}</text>',
            f'<rect class="{kind}" x="{x + _LABEL}" y="{top}" width="{length:.1f}" height="13" rx="2"/>',
            f'<text class="note" x="{x + _LABEL + length + 6:.1f}" y="{top + 11}">{said}</text>',
        ]
    return parts
