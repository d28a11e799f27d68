"""Ranks in the terminal report: bytes per tier and milliseconds per phase, as bars."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

from shardlab.phases import PHASES
from shardlab.planner.report_text import fill_bar, grid, legend, number, phase_bar
from shardlab.planner.result import PlanResult, RankPrediction
from shardlab.planner.units import format_bytes

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

# More ranks are shown as those that matter, and a summary.
_SHOWN = 16
_ENDS = 3
_FILL_BAR, _PHASE_BAR, _WIDE_PHASE_BAR = 8, 24, 40
_WIDE = 100


@dataclass(frozen=True)
class _Row:
    """A rank and why it is shown."""

    rank: RankPrediction
    note: str


def print_ranks(console: Console, result: PlanResult, *, everything: bool) -> None:
    """Prints bytes and milliseconds of the ranks; of many, the slowest, the fullest, a summary."""
    wide = console.width >= _WIDE
    rows = _rows(result, everything)
    tiers = [tier for tier in ("hbm", "ddr", "ssd")
             if any(getattr(rank.bytes, tier) for rank in result.ranks)]
    noted = any(row.note for row in rows)
    table = grid("Ranks: bytes by tier, ms by phase", ["rank", *([""] if noted else []), "full"],
                 [*tiers, "ms"], ["step"])
    for row in rows:
        table.add_row(*_cells(result, row, tiers, noted=noted, wide=wide))
    console.print(table)
    console.print(legend(phase for index, phase in enumerate(PHASES)
                         if any(rank.phase_ms[index] for rank in result.ranks)))
    left = len(result.ranks) - len(rows)
    if left:
        console.print(f"  {left} ranks are not shown (--all shows them); of all {len(result.ranks)}"
                      " (least / median / most):")
        for line in _summary(result, tiers):
            console.print(f"    {line}")
    console.print()


def _rows(result: PlanResult, everything: bool) -> list[_Row]:
    if everything or len(result.ranks) <= _SHOWN:
        return [_Row(rank, "") for rank in result.ranks]
    slowest = sorted(result.ranks, key=lambda rank: (-rank.ms, rank.rank))
    fullest = sorted(result.ranks, key=lambda rank: (-rank.bytes.hbm, rank.rank))
    rows = [_Row(rank, "slowest") for rank in slowest[:_ENDS]]
    rows += [_Row(rank, "fullest") for rank in fullest[:_ENDS]]
    return [*rows, _Row(slowest[-1], "fastest")]


def _cells(result: PlanResult, row: _Row, tiers: Sequence[str], *, noted: bool,
           wide: bool) -> list[str | Text]:
    rank, limit = row.rank, result.capacity + row.rank.dense_bytes
    bar = phase_bar(rank.phase_ms, result.step_ms, _WIDE_PHASE_BAR if wide else _PHASE_BAR)
    return [str(rank.rank), *([row.note] if noted else []),
            fill_bar(rank.bytes.hbm / limit, _FILL_BAR),
            *(format_bytes(size) if size else "-"
              for size in (getattr(rank.bytes, tier) for tier in tiers)), number(rank.ms), bar]


def _summary(result: PlanResult, tiers: Sequence[str]) -> list[str]:
    times = [rank.ms for rank in result.ranks]
    lines = [f"step  {number(min(times))} / {number(median(times))} / {number(max(times))} ms"]
    for tier in tiers:
        held = [getattr(rank.bytes, tier) for rank in result.ranks]
        lines.append(f"{tier}   " + " / ".join(
            format_bytes(size) for size in (min(held), median(held), max(held))))
    return lines
