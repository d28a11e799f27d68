"""Charts as inline SVG: stacked bars, columns for many ranks, and a map of tables over ranks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape

_WIDTH, _HEIGHT = 1000.0, 100.0
# The map: a cell, a letter of a name, and the longest name that is written out.
_CELL, _LETTER, _LONGEST_NAME = 14, 6.6, 26


def legend(colours: Mapping[str, str], names: Iterable[str]) -> str:
    """Colours and what they mean."""
    entries = "".join(f'<span><i style="background:{colours[name]}"></i>{escape(name)}</span>'
                      for name in names)
    return f'<div class="legend">{entries}</div>'


def stacked_bar(parts: Sequence[tuple[str, float, str]], whole: float,
                colours: Mapping[str, str]) -> str:
    """One bar.

    Args:
        parts: (name, size, words for the pointer) from left to right.
        whole: size of the bar's full width.
        colours: name -> colour.
    """
    shapes, start = [], 0.0
    for name, size, words in parts:
        width = _WIDTH * size / whole if whole else 0.0
        if width > 0:
            shapes.append(f'<rect x="{start:.1f}" width="{width:.1f}" height="10" '
                          f'fill="{colours[name]}"><title>{escape(words)}</title></rect>')
        start += width
    return (f'<svg class="bar" viewBox="0 0 {_WIDTH:.0f} 10" preserveAspectRatio="none">'
            f'{"".join(shapes)}</svg>')


def bar_rows(rows: Iterable[tuple[str, str, str, str]]) -> str:
    """(label, bar, value, share) under each other."""
    cells = "".join(f'<span class="soft">{escape(label)}</span>{bar}'
                    f'<span class="value">{escape(value)}</span>'
                    f'<span class="value soft">{escape(share)}</span>'
                    for label, bar, value, share in rows)
    return f'<div class="bars">{cells}</div>'


def stacked_columns(columns: Sequence[Sequence[tuple[str, float, str]]], top: float,
                    colours: Mapping[str, str], limit: float | None = None) -> str:
    """A slim column for each of many ranks.

    Args:
        columns: per column, (name, size, words for the pointer) from below.
        top: size at the upper edge.
        colours: name -> colour.
        limit: size at which a line is drawn.
    """
    width, shapes = _WIDTH / max(len(columns), 1), []
    for number, parts in enumerate(columns):
        level = _HEIGHT
        for name, size, words in parts:
            height = _HEIGHT * size / top if top else 0.0
            level -= height
            if height > 0:
                shapes.append(f'<rect x="{number * width:.2f}" y="{level:.2f}" '
                              f'width="{width * 1.02:.2f}" height="{height:.2f}" '
                              f'fill="{colours[name]}"><title>{escape(words)}</title></rect>')
    if limit is not None:
        at = _HEIGHT * (1 - limit / top)
        shapes.append(f'<line class="limit" x1="0" x2="{_WIDTH:.0f}" y1="{at:.2f}" '
                      f'y2="{at:.2f}"/>')
    return (f'<svg class="columns" viewBox="0 0 {_WIDTH:.0f} {_HEIGHT:.0f}" '
            f'preserveAspectRatio="none">{"".join(shapes)}</svg>')


def placement_map(tables: Sequence[tuple[str, Mapping[int, float]]], ranks: int) -> str:
    """Which table lies on which rank; the stronger a cell, the more time it takes there.

    Args:
        tables: (name, rank -> milliseconds) from above.
        ranks: number of ranks.
    """
    most = max((ms for _, held in tables for ms in held.values()), default=0.0)
    names = round(_LETTER * min(_LONGEST_NAME, max(len(name) for name, _ in tables))) + 14
    width, height = names + ranks * _CELL + 8, (len(tables) + 1) * _CELL + 6
    shapes = [_rank_numbers(ranks, names)]
    for row, (name, held) in enumerate(tables):
        y = (row + 1) * _CELL
        short = name if len(name) <= _LONGEST_NAME else name[:_LONGEST_NAME - 1] + "…"
        shapes.append(f'<text x="{names - 8}" y="{y + 11}" text-anchor="end">{escape(short)}'
                      f'<title>{escape(name)}</title></text>')
        shapes.append(f'<rect class="empty" x="{names}" y="{y + 1}" width="{ranks * _CELL - 1}" '
                      f'height="{_CELL - 2}"/>')
        for rank, ms in sorted(held.items()):
            strength = 0.25 + 0.75 * ms / most if most else 1.0
            shapes.append(
                f'<rect class="cell" x="{names + rank * _CELL}" y="{y + 1}" '
                f'width="{_CELL - 1}" height="{_CELL - 2}" opacity="{strength:.2f}">'
                f'<title>{escape(name)} on rank {rank}: {ms:.3g} ms</title></rect>')
    return (f'<div class="map"><svg width="{width}" height="{height}" '
            f'viewBox="0 0 {width} {height}">{"".join(shapes)}</svg></div>')


def _rank_numbers(ranks: int, names: int) -> str:
    step = 1 if ranks <= 16 else 8
    return "".join(f'<text class="soft" x="{names + rank * _CELL + _CELL / 2:.0f}" y="11" '
                   f'text-anchor="middle">{rank}</text>' for rank in range(0, ranks, step))
