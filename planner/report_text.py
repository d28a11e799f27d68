"""Pieces that the reports share: numbers, bars, names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from shardlab.phases import PHASES
from shardlab.planner.units import format_bytes
from shardlab.specs import ShardingType
from shardlab.storage_specs import PrunedSpec, StorageSpec, TensorTrainSpec, describe_storage
from shardlab.table_plan import TablePlan

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

    from shardlab.planner.result import PlanResult

#: A letter and a colour for every phase, so that a bar reads without colours too.
PHASE_LETTERS = dict(zip(PHASES, "ifrwpgudo", strict=True))
PHASE_STYLES = dict(zip(PHASES, ("blue", "bright_cyan", "green", "cyan", "yellow", "magenta",
                                 "red", "bright_black", "white"), strict=True))
_DAY_S = 86_400
_FULL = 0.9  # a tier that is fuller than this is shown as a warning


def number(value: float) -> str:
    """Two digits or more, without an exponent."""
    size = abs(value)
    digits = 0 if size >= 100 else 1 if size >= 10 else 3 if 0 < size < 0.1 else 2
    return f"{value:.{digits}f}"


def rate_text(samples_per_s: float) -> str:
    """``1.72 M samples/s``."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if samples_per_s >= size:
            return f"{samples_per_s / size:.3g} {unit} samples/s"
    return f"{samples_per_s:.3g} samples/s"


def disk_text(result: PlanResult) -> str:
    """What training writes to the disk, and how long that may go on; empty where it is not written.
    """
    if not result.disk_bytes_per_s:
        return ""
    written = f"{format_bytes(result.disk_bytes_per_s)}/s written"
    life = result.disk_life_s
    if life is None:
        return f"{written}, endurance not known"
    return f"{written}: the disk is rated for {life / _DAY_S:.3g} days of it"


def signed(value: float, text: str) -> str:
    """``+3.1 ms`` of 3.1; nothing has no sign."""
    return f"{'+' if value > 0 else ''}{text}"


def compact(ranks: Iterable[int]) -> str:
    """``0-7,9``: sorted ranks with runs joined; long lists as their number."""
    runs: list[list[int]] = []
    for rank in sorted(set(ranks)):
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    if len(runs) > 3:
        return f"{sum(end - start + 1 for start, end in runs)} ranks"
    return ",".join(str(start) if start == end else f"{start}-{end}" for start, end in runs)


def describe_shards(entry: TablePlan) -> str:
    """``row_wise x8``, ``grid_shard 2x4`` (column blocks x row blocks), ``table_wise``."""
    name: str = entry.sharding.value
    if entry.sharding is ShardingType.DATA_PARALLEL:
        return name
    rows = len({shard.row_start for shard in entry.shards})
    columns = len({shard.col_start for shard in entry.shards})
    if rows > 1 and columns > 1:
        return f"{name} {columns}x{rows}"
    return name if len(entry.shards) == 1 else f"{name} x{len(entry.shards)}"


def storage_text(spec: StorageSpec) -> str:
    """`describe_storage`, with the tier where that leaves it out."""
    if isinstance(spec, TensorTrainSpec | PrunedSpec) and spec.tier is not None:
        return f"{describe_storage(spec)} on {spec.tier.value}"
    return describe_storage(spec)


def fill_bar(share: float, width: int) -> Text:
    """How full something is, over its whole width."""
    from rich.text import Text

    full = min(width, round(share * width)) or (1 if share > 0 else 0)
    style = "red" if share > 1 else "yellow" if share > _FULL else "green"
    return Text("█" * full, style) + Text("·" * (width - full), "bright_black")


def phase_bar(phase_ms: Sequence[float], longest_ms: float, width: int) -> Text:
    """A bar of phase letters; a step of ``longest_ms`` fills the width."""
    from rich.text import Text

    bar, done, drawn = Text(), 0.0, 0
    for phase, ms in zip(PHASES, phase_ms, strict=True):
        done += ms
        end = min(width, round(done / longest_ms * width)) if longest_ms else 0
        bar.append(PHASE_LETTERS[phase] * (end - drawn), PHASE_STYLES[phase])
        drawn = max(drawn, end)
    return bar


def legend(phases: Iterable[str]) -> Text:
    """What the letters of `phase_bar` mean."""
    from rich.text import Text

    text = Text("  ")
    for phase in phases:
        text.append(PHASE_LETTERS[phase], f"bold {PHASE_STYLES[phase]}")
        text.append(f" {phase}  ", "bright_black")
    return text


def share_of(used: float, limit: float) -> str:
    """``12 GiB of 72 GiB (17 %)``."""
    share = f" ({used / limit:.0%})" if limit else ""
    return f"{format_bytes(used)} of {format_bytes(limit)}{share}"


def grid(title: str, left: Sequence[str], right: Sequence[str] = (),
         flexible: Sequence[str] = ()) -> Table:
    """A table with a header line; numbers to the right, ``flexible`` columns may wrap.

    Args:
        title: above the table.
        left: headings of columns that stand to the left.
        right: headings of columns of numbers, after those.
        flexible: headings of further columns, whose text is folded.
    """
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD,
                  pad_edge=False, show_edge=False)
    for name in left:
        table.add_column(name, no_wrap=True, overflow="fold")
    for name in right:
        table.add_column(name, justify="right", no_wrap=True)
    for name in flexible:
        table.add_column(name, overflow="fold", ratio=1)
    return table
