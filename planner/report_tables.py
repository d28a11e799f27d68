"""Tables in the terminal report: what was chosen for each, and what storages cost."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shardlab.planner.report_text import (
    compact,
    describe_shards,
    grid,
    number,
    signed,
    storage_text,
)
from shardlab.planner.result import OptionCost, PlanResult, TablePrediction
from shardlab.planner.units import format_bytes, format_ms
from shardlab.storage_specs import TensorTrainSpec

if TYPE_CHECKING:
    from rich.console import Console

_SHOWN, _SHOWN_CHOICES = 20, 5
_FP32_BYTES = 4
_WIDE, _WIDER = 100, 130


def print_tables(console: Console, result: PlanResult, *, everything: bool) -> None:
    """Prints every table's choice, most work first; of many, those of most work."""
    wide, wider = console.width >= _WIDE, console.width >= _WIDER
    one_storage = len({table.storage for table in result.tables}) == 1
    left = ["table", "sharding", *(["ranks"] if wide else []), *(["exchange"] if wider else []),
            *([] if one_storage else ["storage"])]
    grid_table = grid("Tables: bytes and ms of all ranks together, most work first",
                      left, ["bytes", "ms"], ["why"])
    grid_table.columns[0].no_wrap = False
    grid_table.columns[0].max_width = max(12, console.width // 4)
    if not one_storage:
        grid_table.columns[len(left) - 1].no_wrap = False
        grid_table.columns[len(left) - 1].max_width = max(12, console.width // 5)
    plans = {entry.table: entry for entry in result.plan.tables}
    ranked = sorted(result.tables, key=lambda entry: (-entry.work_ms, entry.table))
    shown = ranked if everything else ranked[:_SHOWN]
    for entry in shown:
        cells = [entry.table, describe_shards(plans[entry.table])]
        cells += [compact(entry.ranks)] if wide else []
        cells += [entry.exchange.value] if wider else []
        cells += [] if one_storage else [storage_text(entry.storage)]
        grid_table.add_row(*cells, format_bytes(entry.held.total.total), number(entry.work_ms),
                           entry.why)
    console.print(grid_table)
    if len(shown) < len(ranked):
        rest = ranked[len(shown):]
        console.print(f"  {len(rest)} tables of less work are not shown (--all shows them): "
                      f"{format_bytes(sum(entry.held.total.total for entry in rest))}, "
                      f"{number(sum(entry.work_ms for entry in rest))} ms")
    if one_storage:
        console.print(f"  every table is held as {storage_text(result.tables[0].storage)}")


def print_storages(console: Console, result: PlanResult) -> None:
    """Prints the storages that tables got, unless all have the same, and what they cost."""
    groups: dict[str, list[TablePrediction]] = {}
    for entry in result.tables:  # tensor trains of equal rank differ in their factors
        groups.setdefault(storage_text(entry.storage), []).append(entry)
    if len(groups) == 1:
        return
    tiers = [tier for tier in ("hbm", "ddr", "ssd")
             if any(getattr(entry.held.total, tier) for entry in result.tables)]
    table = grid("Storages: bytes and ms of all ranks together", ["storage"],
                 ["tables", *tiers, "ms"])
    table.columns[0].no_wrap = False
    for text, entries in sorted(groups.items(), key=lambda item: -len(item[1])):
        sizes = [sum(getattr(entry.held.total, tier) for entry in entries) for tier in tiers]
        table.add_row(text, str(len(entries)),
                      *(format_bytes(size) if size else "-" for size in sizes),
                      number(sum(entry.work_ms for entry in entries)))
    console.print(table)
    _print_trains(console, result)
    _print_choices(console, result)
    console.print()


def _print_trains(console: Console, result: PlanResult) -> None:
    """How small tensor trains make their tables, and those make all tables, without state."""
    plain, parameters, held = 0, 0, 0
    every, every_held, tables = 0, 0, 0
    for plan, entry in zip(result.plan.tables, result.tables, strict=True):
        rows = max(shard.row_end for shard in plan.shards)
        columns = max(shard.col_end for shard in plan.shards)
        copies = len(plan.shards) if plan.replicated else 1
        size, full = entry.held.tables.total + entry.held.cache.total, _FP32_BYTES * rows * columns
        every, every_held = every + full, every_held + size // copies
        if isinstance(plan.storage, TensorTrainSpec):
            tables, plain, held = tables + 1, plain + full, held + size // copies
            parameters += plan.storage.piece_shape(rows, columns).parameters
    if tables:
        console.print(
            f"  tensor trains: {tables} tables as {parameters:,} parameters, "
            f"{format_bytes(held)} instead of {format_bytes(plain)} of fp32 rows "
            f"({plain / held:.1f}x)")
        console.print(f"  all tables: {format_bytes(every_held)} instead of "
                      f"{format_bytes(every)} of fp32 rows ({every / every_held:.1f}x), without "
                      "optimiser state and copies")


def _print_choices(console: Console, result: PlanResult) -> None:
    """Tables that did not get their first choice: what they got instead, and what it costs."""
    stepped = [entry for entry in result.tables if entry.preference]
    if not stepped or result.solved is None:
        return
    free = sum(1 for entry in result.tables if entry.preferences > 1)
    console.print(f"  {len(stepped)} of {free} tables that leave the storage open did not get "
                  "their first choice:")
    for entry in sorted(stepped, key=lambda entry: -entry.held.total.total)[:_SHOWN_CHOICES]:
        console.print(f"    {entry.table}: {_stepped_down(result, entry)}")
    if len(stepped) > _SHOWN_CHOICES:
        console.print(f"    and {len(stepped) - _SHOWN_CHOICES} more")


def _stepped_down(result: PlanResult, entry: TablePrediction) -> str:
    options = result.options(entry.table)
    first: OptionCost = next(option for option in options if option.preference == 0)
    mine = next((option for option in options if option.chosen), None)
    text = f"{storage_text(entry.storage)} instead of {storage_text(first.storage)}"
    if mine is None:
        return text
    saved, extra = first.bytes.total - mine.bytes.total, mine.work_ms - first.work_ms
    return f"{text}: saves {format_bytes(saved)}, {signed(extra, format_ms(extra))} of work"
