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
_BAR_WIDTH = 10


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

    console = Console(file=file, width=width, highlight=False)
    _print_summary(console, result)
    console.print(_rank_table(result, everything))
    console.print(_table_table(result, everything))
    _print_left_out(console, result, everything)


def _print_summary(console: Console, result: PlanResult) -> None:
    topology, slowest = result.topology, result.slowest
    hosts = f"{topology.hosts} host{'s' if topology.hosts > 1 else ''}"
    console.print(f"[bold]Plan[/bold] of {len(result.tables)} tables for {topology.name}: {hosts} "
                  f"x {topology.ranks_per_host} ranks, batch {result.batch_size} per rank, "
                  f"{result.optimizer}")
    proof = "proven optimal" if result.optimal else \
        f"lower bound {format_ms(result.lower_bound_ms)}, gap {result.gap:.1%}"
    console.print(f"  step     {format_ms(result.step_ms)} on rank {slowest.rank}, the slowest "
                  f"({proof}); {format_ms(result.barrier_ms)} if every phase waits for its own "
                  "slowest rank")
    console.print(f"  balance  slowest / average {result.imbalance:.3f}; found by {result.start} "
                  f"in {result.cpu_seconds:.2f} CPU s")
    used = max(rank.table_bytes + rank.buffer_bytes for rank in result.ranks)
    rows = sum(rank.table_bytes for rank in result.ranks)
    console.print(f"  memory   tables and optimiser state {format_bytes(rows)}; fullest rank "
                  f"{format_bytes(used)} of {format_bytes(result.capacity)} with exchange buffers")
    console.print(f"  assumed  ids follow Zipf({ZIPF_EXPONENT}), spread evenly over row blocks; "
                  "times are the embedding part of a step, phases one after another")


def _rank_table(result: PlanResult, everything: bool) -> Table:
    table = _new_table("Ranks, ms by phase", ["rank", "tables + state", "buffers", "full", "ms", ""])
    for phase in PHASES:
        table.add_column(phase, justify="right", no_wrap=True)
    for rank in _shown_ranks(result, everything):
        held = rank.table_bytes + rank.buffer_bytes
        table.add_row(str(rank.rank), format_bytes(rank.table_bytes),
                      format_bytes(rank.buffer_bytes), f"{held / result.capacity:.0%}",
                      f"{rank.ms:.3g}", _bar(rank.ms / result.step_ms),
                      *(f"{ms:.3g}" for ms in rank.phase_ms))
    return table


def _table_table(result: PlanResult, everything: bool) -> Table:
    table = _new_table("Tables, by work", ["table", "sharding", "exchange", "ranks", "bytes", "ms"])
    table.add_column("why", ratio=1)
    for entry in _shown_tables(result, everything):
        table.add_row(entry.table, entry.sharding.value, entry.exchange.value,
                      _compact(entry.ranks), format_bytes(sum(entry.shard_bytes)),
                      f"{_work(result, entry):.3g}", entry.why)
    return table


def _new_table(title: str, columns: list[str]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD,
                  pad_edge=False)
    for name in columns:
        numeric = name in ("tables + state", "buffers", "full", "bytes", "ms")
        table.add_column(name, justify="right" if numeric else "left", no_wrap=name != "table",
                         overflow="fold" if name == "table" else "ellipsis")
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
