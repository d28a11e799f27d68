"""Why a table lies where it lies: the choice, the next best, and what would change it.

What would change a choice is not guessed: the whole request is planned again with one thing changed
at a time, and the changes under which the table is laid differently are named.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from time import process_time
from typing import TYPE_CHECKING, Any

from shardlab.errors import ConfigError, PlanError
from shardlab.phases import PHASES
from shardlab.planner import plan
from shardlab.planner.report_text import (
    PHASE_LETTERS,
    PHASE_STYLES,
    compact,
    describe_shards,
    grid,
    number,
    signed,
    storage_text,
)
from shardlab.planner.request import Request
from shardlab.planner.result import OptionCost, PlanResult, TablePrediction
from shardlab.planner.topology_file import change_fields
from shardlab.planner.units import format_bytes, format_ms
from shardlab.planner.why import describe_cut
from shardlab.specs import ShardingType
from shardlab.storage_bytes import TierBytes
from shardlab.words import counted

if TYPE_CHECKING:
    from rich.console import Console

_BAR = 30
_SHOWN_OPTIONS = 10
#: CPU seconds after which no further change is tried: large fleets take seconds each.
_PATIENCE_S = 20.0


@dataclass(frozen=True)
class Change:
    """One thing changed, and what the table then gets.

    Attributes:
        what: the change, in words.
        choice: how the table is then laid, in words; empty: as before.
    """

    what: str
    choice: str


def changes(request: Request, result: PlanResult, table: str,
            patience_s: float = _PATIENCE_S) -> tuple[list[Change], list[str]]:
    """What a table would get if one thing were different.

    Args:
        request: what was planned.
        result: its plan.
        table: a table of it.
        patience_s: CPU seconds after which no further change is tried.

    Returns:
        The changes that were tried, and the words of those that were not.
    """
    before, tried, left = _choice(result, table), [], []
    start = process_time()
    for what, make in _variations(request, table):
        if process_time() - start > patience_s:
            left.append(what)
            continue
        try:
            changed = make()
            other = plan(changed.tables, changed.topology, changed.batch_size, changed.optimizer,
                         changed.settings)
        except (PlanError, ConfigError):
            tried.append(Change(what, "nothing fits"))
            continue
        after = _choice(other, table)
        tried.append(Change(what, "" if after == before else after))
    return tried, left


def _variations(request: Request, table: str) -> Iterator[tuple[str, Callable[[], Request]]]:
    """(words, what makes the changed request), the nearest changes first."""
    topology = request.topology
    config = next(entry for entry in request.tables if entry.name == table)

    def field(**values: Any) -> Callable[[], Request]:
        return lambda: replace(request, topology=change_fields(topology, values))

    def own(**values: Any) -> Callable[[], Request]:
        changed = tuple(replace(entry, **values) if entry.name == table else entry
                        for entry in request.tables)
        return lambda: replace(request, tables=changed)

    for batch in (request.batch_size * 4, request.batch_size // 4):
        if batch:
            yield (f"batch {batch} instead of {request.batch_size}",
                   partial(replace, request, batch_size=batch))
    for factor, words in ((2, "twice"), (0.5, "half")):
        yield f"{words} the hbm of a rank", field(hbm_bytes=round(topology.hbm_bytes * factor))
    link = "inter_host" if topology.hosts > 1 else "intra_host"
    curve = getattr(topology, link).curve
    for factor, words in ((4, "4 times"), (0.25, "a quarter of")):
        yield (f"{words} the links' speed",
               field(**{link: {"bytes_per_s": {size: speed * factor for size, speed in curve}}}))
    yield "twice the hosts", field(hosts=2 * topology.hosts)
    for factor in (10.0, 0.1):
        pooling = max(config.pooling_factor * factor, 1.0)
        if pooling != config.pooling_factor and request.settings.statistics is None:
            yield f"{pooling:g} ids per bag in this table", own(pooling_factor=pooling)
    if config.sharding is not None:
        yield "no sharding type asked for", own(sharding=None)
    yield "this table alone on the machine", lambda: replace(request, tables=(config,))


def _choice(result: PlanResult, table: str) -> str:
    entry = _entry(result, table)
    plan_entry = next(one for one in result.plan.tables if one.table == table)
    return (f"{describe_shards(plan_entry)}, {entry.exchange.value} exchange, "
            f"{storage_text(entry.storage)}")


def _entry(result: PlanResult, table: str) -> TablePrediction:
    return next(entry for entry in result.tables if entry.table == table)


def print_explanation(console: Console, request: Request, result: PlanResult, table: str) -> None:
    """Prints why a table lies where it lies.

    Args:
        console: where to.
        request: what was planned.
        result: its plan.
        table: a table of it.

    Raises:
        ConfigError: there is no such table; suggests the nearest name.
    """
    options = result.options(table)
    entry = _entry(result, table)
    config = next(one for one in request.tables if one.name == table)
    console.print(f"Table {table}: {_choice(result, table)}", style="bold")
    console.print(f"  size     {config.num_embeddings:,} x {config.embedding_dim}, "
                  f"{counted(len(config.feature_names), 'feature')}, "
                  f"{config.pooling_factor:g} ids per bag")
    console.print(f"  lies on  rank{'s' * (len(entry.ranks) > 1)} {compact(entry.ranks)}; "
                  f"{_tiers(entry.held.total)} with optimiser state "
                  f"({format_bytes(entry.held.state.total)}) and caches "
                  f"({format_bytes(entry.held.cache.total)})")
    console.print(f"  because  {entry.why}")
    if any(table in binding for binding in result.binding):
        console.print("  it is this table that keeps the step from being faster")
    console.print()
    _print_phases(console, result, entry)
    _print_options(console, options)
    _print_without(console, request, result, entry)
    tried, left = changes(request, result, table)
    _print_changes(console, tried, left)


def _tiers(size: TierBytes) -> str:
    parts = [f"{format_bytes(getattr(size, tier))} of {tier}" for tier in ("hbm", "ddr", "ssd")
             if getattr(size, tier)]
    return ", ".join(parts)


def _print_phases(console: Console, result: PlanResult, entry: TablePrediction) -> None:
    from rich.text import Text

    table = grid("Its work, all ranks together (ms)", ["phase", ""], ["ms", "of the fleet's"])
    longest = max(entry.phase_ms)
    for index, phase in enumerate(PHASES):
        ms, total = entry.phase_ms[index], sum(rank.phase_ms[index] for rank in result.ranks)
        if ms:
            bar = PHASE_LETTERS[phase] * round(_BAR * ms / longest)
            table.add_row(phase, Text(bar, PHASE_STYLES[phase]), number(ms), f"{ms / total:.1%}")
    console.print(table)
    console.print()


def _print_options(console: Console, options: tuple[OptionCost, ...]) -> None:
    """The chosen option, and the others by their work."""
    chosen = next((option for option in options if option.chosen), None)
    one_storage = len({option.storage for option in options}) == 1
    all_possible = all(option.fits and option.allowed for option in options)
    table = grid(f"Its {counted(len(options), 'option')}, least work first",
                 ["", "option", *([] if one_storage else ["storage"])],
                 ["ms", "more", "on a rank", "bytes"], ["" if all_possible else "but"])
    if not one_storage:
        table.columns[2].no_wrap = False  # a chain of levels is long
    shown = list(options[:_SHOWN_OPTIONS])
    if chosen is not None and chosen not in shown:
        shown.append(chosen)
    for option in shown:
        extra = option.work_ms - (chosen.work_ms if chosen else options[0].work_ms)
        table.add_row(
            ">" if option.chosen else "", f"{describe_cut(option.cut)}, {option.exchange.value}",
            *([] if one_storage else [storage_text(option.storage)]), number(option.work_ms),
            "" if option.chosen else signed(extra, format_ms(extra)), number(option.largest_ms),
            format_bytes(option.bytes.total),
            _objection(option, chosen), style="bold" if option.chosen else None)
    console.print(table)
    if len(options) > len(shown):
        console.print(f"  and {len(options) - len(shown)} of more work")
    console.print("  ms: work of all ranks together; on a rank: what its costliest piece takes; "
                  "bytes: on all tiers,\n  with exchange buffers\n")


def _objection(option: OptionCost, chosen: OptionCost | None) -> str:
    """Why an option could not be taken; empty: it could."""
    if not option.fits:
        return "does not fit"
    if option.allowed:
        return ""
    if chosen is not None and option.preference > chosen.preference:
        return "a storage that you prefer fits"
    return "does not fit with the others"


def _print_without(console: Console, request: Request, result: PlanResult,
                   entry: TablePrediction) -> None:
    """What the whole step would take if the table's sharding type were not there."""
    others = tuple(kind for kind in ShardingType if kind is not entry.sharding)
    name = entry.sharding.value
    tables = tuple(replace(one, sharding=others) if one.name == entry.table else one
                   for one in request.tables)
    try:
        other = plan(tables, request.topology, request.batch_size, request.optimizer,
                     request.settings)
    except (PlanError, ConfigError):
        console.print(f"  Without {name} for this table nothing fits.\n")
        return
    change = other.step_ms / result.step_ms - 1
    console.print(f"  Without {name} for this table: {_choice(other, entry.table)}; the step "
                  f"{format_ms(other.step_ms)} instead of {format_ms(result.step_ms)} "
                  f"({change:+.1%})\n")


def _print_changes(console: Console, tried: list[Change], left: list[str]) -> None:
    console.print("What would change it (everything planned again)", style="bold")
    for change in tried:
        if change.choice:
            console.print(f"  {change.what}: {change.choice}")
    same = [change.what for change in tried if not change.choice]
    if same:
        console.print(f"  the same choice with: {'; '.join(same)}")
    if left:
        console.print(f"  not tried, planning takes too long: {'; '.join(left)}")
