"""A picture of how pruned tables went: chunks by table and rows by dimension over the steps."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

_WIDTH, _HEIGHT, _LEFT, _GAP = 640, 200, 60, 60
_COLORS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bbbbbb")
_MOST_LINES = 12


def write_pruned_plot(metrics: Path, target: Path) -> None:
    """Draws ``pruned`` records of a metrics file as SVG; writes nothing where there are none.

    Args:
        metrics: a file of JSON lines.
        target: the picture.
    """
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    found = [record for record in records if record.get("kind") == "pruned"]
    if not found:
        return
    last = found[-1]
    tables = sorted(last["present"], key=lambda name: -last["present"][name])[:_MOST_LINES]
    panels = [("chunks present, largest tables", {
                  name: [record["present"].get(name, 0) for record in found] for name in tables}),
              ("rows by chunks", {
                  f"{chunks} chunks": [record["rows_by_chunks"].get(chunks, 0) for record in found]
                  for chunks in last["rows_by_chunks"]}),
              ("bytes", {"held": [record["bytes"] for record in found]})]
    steps = [record["step"] for record in found]
    height = len(panels) * (_HEIGHT + _GAP)
    parts = [_panel(title, steps, lines, i * (_HEIGHT + _GAP) + _GAP // 2)
             for i, (title, lines) in enumerate(panels)]
    target.write_text(f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH + 240}" '
                      f'height="{height}" font-family="sans-serif" font-size="11">'
                      + "".join(parts) + "</svg>\n")


def _panel(title: str, steps: Sequence[int], lines: dict[str, list[Any]], top: int) -> str:
    most = max((value for line in lines.values() for value in line), default=0) or 1
    first, span = steps[0], max(1, steps[-1] - steps[0])
    parts = [f'<text x="{_LEFT}" y="{top - 6}" font-weight="bold">{escape(title)}</text>',
             f'<rect x="{_LEFT}" y="{top}" width="{_WIDTH - _LEFT}" height="{_HEIGHT}" '
             'fill="none" stroke="#999"/>',
             f'<text x="4" y="{top + 10}">{most:,}</text>',
             f'<text x="{_LEFT}" y="{top + _HEIGHT + 14}">step {first}</text>',
             f'<text x="{_WIDTH - 60}" y="{top + _HEIGHT + 14}">{steps[-1]}</text>']
    for number, (name, line) in enumerate(lines.items()):
        color = _COLORS[number % len(_COLORS)]
        points = " ".join(
            f"{_LEFT + (step - first) / span * (_WIDTH - _LEFT):.1f},"
            f"{top + _HEIGHT * (1 - value / most):.1f}"
            for step, value in zip(steps, line, strict=True))
        parts.append(f'<polyline points="{points}" fill="none" stroke="{color}"/>')
        parts.append(f'<text x="{_WIDTH + 10}" y="{top + 12 + 14 * number}" fill="{color}">'
                     f"{escape(name)}</text>")
    return "".join(parts)
