"""The plan for people: a report for terminals of 80 columns or more.

    summary -> the step, phase by phase -> ranks -> storages -> tables
"""

from __future__ import annotations

from typing import IO, TYPE_CHECKING

from shardlab.phases import PHASES
from shardlab.planner.rate import overfull
from shardlab.planner.report_ranks import print_ranks
from shardlab.planner.report_tables import print_storages, print_tables
from shardlab.planner.report_text import (
    PHASE_LETTERS,
    PHASE_STYLES,
    disk_text,
    grid,
    number,
    rate_text,
    share_of,
)
from shardlab.planner.result import PlanResult
from shardlab.planner.units import format_bytes, format_ms
from shardlab.words import counted

if TYPE_CHECKING:
    from rich.console import Console

_BAR = 30
_MEANING = {
    "ids": "de-duplicate ids, send them to owners", "prefetch": "caches fetch missing rows",
    "read": "owners read rows", "rows": "rows travel", "pool": "pool bags, and undo it",
    "grads": "gradients travel", "update": "merge gradients, step rows",
    "dense": "the dense model", "overhead": "Python and launches"}


def print_report(result: PlanResult, file: IO[str] | None = None, *, width: int | None = None,
                 everything: bool = False) -> None:
    """Prints the plan.

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
    _print_step(console, result)
    print_ranks(console, result, everything=everything)
    print_storages(console, result)
    print_tables(console, result, everything=everything)


def _print_summary(console: Console, result: PlanResult) -> None:
    topology = result.topology
    console.print(f"Plan of {counted(len(result.tables), 'table')} for {topology.name}",
                  style="bold")
    ranks = f"{counted(topology.hosts, 'host')} x {counted(topology.ranks_per_host, 'rank')}"
    lines = {
        "job": f"{ranks}, batch {result.batch_size} per rank, {result.optimizer}"
               + _wire(result),
        **_groups(result),
        "step": f"{format_ms(result.step_ms)} on rank {result.slowest.rank}, the slowest: "
                f"{rate_text(result.samples_per_s)}",
        "bound": _bound(result),
        "balance": f"slowest / average {result.imbalance:.3f}",
        **_memory(result),
        "data": result.assumption}
    for name, text in lines.items():
        _print_line(console, name, text)
    for line in overfull(result):
        console.print(f"  does not fit: {line}", style="bold red")
    console.print()


def _print_line(console: Console, name: str, text: str) -> None:
    """A named line, folded under itself."""
    from rich.table import Table

    line = Table.grid(padding=(0, 1))
    line.add_column(width=9)
    line.add_column(overflow="fold")
    line.add_row(f"  {name}", text)
    console.print(line)


def _groups(result: PlanResult) -> dict[str, str]:
    """How many groups hold the tables, and what keeping them alike sends."""
    plan = result.plan
    if plan.replicas == 1:
        return {}
    how = "gradients merged in every step" if plan.sync_every_steps == 1 else \
        f"rows averaged every {plan.sync_every_steps} steps"
    return {"groups": f"{plan.replicas} groups of {plan.world_size} ranks, placed alike, {how}: "
                        f"{format_bytes(result.sync_bytes)} per rank and step; tables take "
                        f"{plan.replicas} times the memory"}


def _wire(result: PlanResult) -> str:
    wire = result.settings.wire
    dense = result.settings.dense.wire
    text = "" if dense == "fp32" else f", dense gradients {dense}"
    if (wire.forward, wire.backward) == ("fp32", "fp32"):
        return text
    return f", wire {wire.forward} / {wire.backward}{text}"


def _bound(result: PlanResult) -> str:
    """How good the plan is, and what keeps it from being better."""
    if not result.lower_bound_ms:
        return "none: the plan was given, not searched"
    proof = "proven optimal" if result.optimal else \
        f"{format_ms(result.lower_bound_ms)} at least, gap {result.gap:.1%}"
    held = f"; held by {', '.join(result.binding)}" if result.binding else ""
    return f"{proof}{held}; {result.start}, {result.cpu_seconds:.2f} CPU s"


def _memory(result: PlanResult) -> dict[str, str]:
    """Fullest rank and hosts, tier by tier where it holds anything."""
    fullest = max(result.ranks, key=lambda rank: rank.bytes.hbm)
    limit = result.capacity + fullest.dense_bytes
    lines = {"hbm": f"{share_of(fullest.bytes.hbm, limit)} on rank {fullest.rank}, the fullest"}
    for tier in ("ddr", "ssd"):
        held = [getattr(size, tier) for size in result.hosts]
        if any(held):
            limit = getattr(result.host_capacity, tier)
            where = f"host {held.index(max(held))}, the fullest"
            lines[tier] = f"{share_of(max(held), limit)} on {where}"
    if disk_text(result):
        lines["disk"] = disk_text(result)
    total = sum(rank.table_bytes for rank in result.ranks)
    lines["tables"] = f"{format_bytes(total)} with optimiser state and caches, all ranks together"
    if result.plan.replicas > 1:
        lines["tables"] += f" of a group; {format_bytes(total * result.plan.replicas)} of all"
    return lines


def _print_step(console: Console, result: PlanResult) -> None:
    """The critical path: the slowest rank's phases, beside those of the average rank."""
    from rich.text import Text

    slowest, count = result.slowest, len(result.ranks)
    wide = console.width >= 100
    table = grid(f"The step of rank {slowest.rank}, one phase after another (ms)",
                 ["phase", ""], ["ms", "share", "average"], ["what"] if wide else [])
    longest = max(slowest.phase_ms)
    for index, phase in enumerate(PHASES):
        ms = slowest.phase_ms[index]
        average = sum(rank.phase_ms[index] for rank in result.ranks) / count
        if not ms and not average:
            continue
        bar = Text(PHASE_LETTERS[phase] * round(_BAR * ms / longest), PHASE_STYLES[phase])
        row: list[str | Text] = [phase, bar, number(ms), f"{ms / slowest.ms:.0%}", number(average)]
        table.add_row(*row, *([_MEANING[phase]] if wide else []))
    console.print(table)
    notes = [f"sum {format_ms(result.barrier_ms)} if every phase waits for its own slowest rank"]
    if slowest.hidden_ms:
        notes.append(f"{format_ms(slowest.hidden_ms)} of prefetching run beside the dense part")
    console.print(f"  {'; '.join(notes)}\n")
