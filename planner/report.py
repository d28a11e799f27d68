"""The plan for people (terminal) and for programs (JSON)."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from typing import IO, TYPE_CHECKING, Any

from shardlab.plan import SCHEMA_VERSION, TablePlan
from shardlab.planner.estimate import PHASES
from shardlab.planner.result import PlanResult, RankPrediction, TablePrediction
from shardlab.planner.units import format_bytes, format_ms
from shardlab.planner.zipf import ZIPF_EXPONENT

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

# Longer lists are cut unless everything is asked for.
_SHOWN_RANKS, _SHOWN_TABLES = 16, 30
_BAR_WIDTH = 6
# Narrower terminals get fewer columns.
_WIDE = 100
_LEFT = ("table", "sharding", "exchange", "ranks", "why", "")


def print_report(result: PlanResult, file: IO[str] | None = None, *, width: int | None = None,
                 everything: bool = False) -> None:
    """Prints the plan: summary, ranks, tables.

    Args:
        result: the plan.
        file: where to; None: standard output.
        width: columns; None: the terminal's.
        everything: also the ranks and tables that are left out of long lists.
    """
    from rich.console import Console

    # Names of tables may hold brackets: no markup.
    console = Console(file=file, width=width, highlight=False, markup=False)
    _print_summary(console, result)
    console.print(_rank_table(result, everything, wide=console.width >= _WIDE))
    console.print(_table_table(result, everything, wide=console.width >= _WIDE))
    _print_left_out(console, result, everything)


def _print_summary(console: Console, result: PlanResult) -> None:
    topology, slowest = result.topology, result.slowest
    hosts = f"{topology.hosts} host{'s' if topology.hosts > 1 else ''}"
    console.print(f"Plan of {len(result.tables)} tables for {topology.name}", style="bold")
    console.print(f"  job      {hosts} x {topology.ranks_per_host} ranks, batch "
                  f"{result.batch_size} per rank, {result.optimizer}")
    proof = "proven optimal" if result.optimal else \
        f"lower bound {format_ms(result.lower_bound_ms)}, gap {result.gap:.1%}"
    console.print(f"  step     {format_ms(result.step_ms)} on rank {slowest.rank}, the slowest; "
                  f"{proof}")
    console.print(f"           {format_ms(result.barrier_ms)} if every phase waits for its own "
                  "slowest rank")
    console.print(f"  balance  slowest / average {result.imbalance:.3f}; found by {result.start} "
                  f"in {result.cpu_seconds:.2f} CPU s")
    used = max(rank.table_bytes + rank.buffer_bytes for rank in result.ranks)
    rows = sum(rank.table_bytes for rank in result.ranks)
    console.print(f"  memory   tables and optimiser state {format_bytes(rows)}")
    console.print(f"           fullest rank {format_bytes(used)} of "
                  f"{format_bytes(result.capacity)}, exchange buffers included")
    console.print(f"  assumed  ids follow Zipf({ZIPF_EXPONENT}), spread evenly over row blocks;")
    console.print("           the embedding part of a step only, one phase after another")
    console.print()


def _rank_table(result: PlanResult, everything: bool, *, wide: bool) -> Table:
    unit, scale = ("ms", 1.0) if result.step_ms >= 1 else ("us", 1e3)
    header = ["rank", "tables", "buffers", "full", unit, "", *PHASES]
    rows = []
    for rank in _shown_ranks(result, everything):
        held = rank.table_bytes + rank.buffer_bytes
        rows.append([str(rank.rank), format_bytes(rank.table_bytes),
                     format_bytes(rank.buffer_bytes), f"{held / result.capacity:.0%}",
                     _number(rank.ms * scale), _bar(rank.ms / result.step_ms),
                     *(_number(ms * scale) for ms in rank.phase_ms)])
    hidden = set() if wide else {"buffers", ""}
    return _table(f"Ranks: bytes, and {unit} by phase", header, rows, hidden)


def _table_table(result: PlanResult, everything: bool, *, wide: bool) -> Table:
    header = ["table", "sharding", "exchange", "ranks", "bytes", "ms", "why"]
    rows = [[entry.table, entry.sharding.value, entry.exchange.value, _compact(entry.ranks),
             format_bytes(sum(entry.shard_bytes)), _number(_work(result, entry)), entry.why]
            for entry in _shown_tables(result, everything)]
    hidden = set() if wide else {"exchange", "ranks"}
    return _table("Tables: bytes and ms over all ranks, most work first", header, rows, hidden)


def _table(title: str, header: list[str], rows: list[list[str]], hidden: set[str]) -> Table:
    """A table in which only names and reasons may wrap, and numbers stand to the right."""
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD,
                  pad_edge=False)
    shown = [index for index, name in enumerate(header) if name not in hidden]
    for index in shown:
        name = header[index]
        flexible = name in ("table", "why")
        longest = max((len(row[index]) for row in rows), default=0)
        table.add_column(
            name, justify="left" if name in _LEFT else "right", no_wrap=not flexible,
            overflow="fold", min_width=None if flexible else max(longest, len(name)),
            ratio=1 if name == "why" else None)
    for row in rows:
        table.add_row(*(row[index] for index in shown))
    return table


def _print_left_out(console: Console, result: PlanResult, everything: bool) -> None:
    ranks = len(result.ranks) - len(_shown_ranks(result, everything))
    tables = len(result.tables) - len(_shown_tables(result, everything))
    if ranks or tables:
        console.print(f"  not shown: {ranks} ranks between the slowest and the fastest, "
                      f"{tables} tables of less work")


def _shown_ranks(result: PlanResult, everything: bool) -> list[RankPrediction]:
    """All ranks, or the slower half and the faster half of those that are shown."""
    if everything or len(result.ranks) <= _SHOWN_RANKS:
        return list(result.ranks)
    ranked = sorted(result.ranks, key=lambda rank: (-rank.ms, rank.rank))
    half = _SHOWN_RANKS // 2
    return [*ranked[:half], *ranked[-half:]]


def _shown_tables(result: PlanResult, everything: bool) -> list[TablePrediction]:
    ranked = sorted(result.tables, key=lambda entry: (-_work(result, entry), entry.table))
    return ranked if everything else ranked[:_SHOWN_TABLES]


def _work(result: PlanResult, entry: TablePrediction) -> float:
    """Milliseconds of a table summed over all ranks."""
    return sum(entry.shard_ms) + len(result.ranks) * entry.common_ms


def _number(value: float) -> str:
    """Three digits or more, without an exponent."""
    digits = 0 if value >= 100 else 1 if value >= 10 else 2
    return f"{value:.{digits}f}"


def _bar(share: float) -> str:
    return "█" * max(1, round(share * _BAR_WIDTH))


def _compact(ranks: Iterable[int]) -> str:
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


def plan_to_json(result: PlanResult) -> str:
    """The plan as JSON that `ShardingPlan.from_json` reads, with a ``predicted`` entry beside it.

    ``predicted`` holds the topology, the totals, and per rank and table (shards in the plan's
    order) the bytes and milliseconds of the report.
    """
    predicted: dict[str, Any] = {
        "topology": asdict(result.topology), "batch_size": result.batch_size,
        "optimizer": result.optimizer, "capacity": result.capacity, "phases": list(PHASES),
        "step_ms": result.step_ms, "barrier_ms": result.barrier_ms,
        "imbalance": result.imbalance, "lower_bound_ms": result.lower_bound_ms,
        "gap": result.gap, "optimal": result.optimal, "start": result.start,
        "ranks": [asdict(rank) for rank in result.ranks],
        "tables": [_json_table(entry) for entry in result.tables],
    }
    return json.dumps({"version": SCHEMA_VERSION, "world_size": result.plan.world_size,
                       "tables": [_json_plan(entry) for entry in result.plan.tables],
                       "predicted": predicted}, indent=1)


def _json_plan(entry: TablePlan) -> dict[str, Any]:
    return {"table": entry.table, "sharding": entry.sharding.value,
            "exchange": entry.exchange.value,
            "shards": [{**vars(shard), "tier": shard.tier.value} for shard in entry.shards]}


def _json_table(entry: TablePrediction) -> dict[str, Any]:
    return {"table": entry.table, "shard_bytes": list(entry.shard_bytes),
            "shard_ms": list(entry.shard_ms), "buffer_bytes": entry.buffer_bytes,
            "common_ms": entry.common_ms, "why": entry.why}
