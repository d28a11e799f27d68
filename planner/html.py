"""The plan as one HTML page with charts: the same as the terminal report, nothing from elsewhere.

    totals -> the step -> ranks: time, memory -> tables over ranks -> every table
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from shardlab.phases import PHASES
from shardlab.planner.html_charts import (
    bar_rows,
    legend,
    placement_map,
    stacked_bar,
    stacked_columns,
)
from shardlab.planner.html_style import PHASE_COLOURS, SCRIPT, STYLE, USE_COLOURS
from shardlab.planner.rate import overfull
from shardlab.planner.report_text import (
    compact,
    describe_shards,
    disk_text,
    number,
    rate_text,
    storage_text,
)
from shardlab.planner.result import PlanResult, RankPrediction, TablePrediction
from shardlab.planner.units import format_bytes, format_ms
from shardlab.words import counted

# More ranks than this become slim columns; more columns than this, a choice of them.
_BARS, _COLUMNS = 32, 512
_MAP_TABLES, _MAP_RANKS = 60, 256

Part = tuple[str, float, str]


def plan_to_html(result: PlanResult) -> str:
    """The page.

    Args:
        result: the plan.

    Returns:
        HTML that needs no other file.
    """
    title = f"{len(result.tables)} tables on {result.topology.name}"
    parts = [_head(result, title), _step(result), _times(result), _memory(result), _map(result),
             _storages(result), _tables(result), _foot(result)]
    return (f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            f'<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>Plan: {escape(title)}</title><style>{STYLE}</style></head>\n<body><main>\n"
            + "\n".join(part for part in parts if part)
            + f"\n</main><script>{SCRIPT}</script></body></html>\n")


def _head(result: PlanResult, title: str) -> str:
    topology = result.topology
    fullest = max(result.ranks, key=lambda rank: rank.bytes.hbm)
    full = fullest.bytes.hbm / (result.capacity + fullest.dense_bytes)
    gap = "optimal" if result.optimal else f"{result.gap:.1%}" if result.lower_bound_ms else "-"
    bound = f"over a bound of {format_ms(result.lower_bound_ms)}" if result.lower_bound_ms \
        else "the plan was given"
    cards = [(format_ms(result.step_ms), f"a step, of rank {result.slowest.rank}"),
             (rate_text(result.samples_per_s).removesuffix(" samples/s"), "samples per second"),
             (gap, bound), (f"{result.imbalance:.3f}", "slowest over average rank"),
             (f"{full:.1%}", f"hbm of rank {fullest.rank}, the fullest"),
             (format_bytes(sum(rank.table_bytes for rank in result.ranks)),
              "tables, state and caches")]
    shown = "".join(f'<div class="card"><b>{escape(value)}</b><span>{escape(words)}</span></div>'
                    for value, words in cards)
    held = f" Held by {', '.join(result.binding)}." if result.binding else ""
    disk = f" Of a host's disk: {disk_text(result)}." if disk_text(result) else ""
    warnings = "".join(f'<div class="warn">Does not fit: {escape(line)}</div>'
                       for line in overfull(result))
    wire = result.settings.wire
    return (f"<h1>{escape(title)}</h1><p>{counted(topology.hosts, 'host')} x "
            f"{counted(topology.ranks_per_host, 'rank')}, batch {result.batch_size} per rank, "
            f"{escape(result.optimizer)}, wire {escape(wire.forward)} and "
            f"{escape(wire.backward)}, dense gradients {escape(result.settings.dense.wire)}. "
            f"Predicted, with {escape(result.assumption)}."
            f"{escape(held)}{escape(disk)}</p>{warnings}"
            f'<div class="cards">{shown}</div>')


def _phase_parts(phase_ms: Sequence[float], where: str) -> list[Part]:
    return [(phase, ms, f"{where}{phase} {format_ms(ms)}")
            for phase, ms in zip(PHASES, phase_ms, strict=True)]


def _used_phases(result: PlanResult) -> list[str]:
    return [phase for index, phase in enumerate(PHASES)
            if any(rank.phase_ms[index] for rank in result.ranks)]


def _step(result: PlanResult) -> str:
    """The critical path: phases of the slowest rank, one bar each, each where it begins."""
    slowest, rows, start = result.slowest, [], 0.0
    whole = sum(slowest.phase_ms)
    for phase, ms in zip(PHASES, slowest.phase_ms, strict=True):
        if ms:
            blank: Part = ("blank", start, "")
            bar = stacked_bar([blank, (phase, ms, f"{phase} {format_ms(ms)}")], whole,
                              {**PHASE_COLOURS, "blank": "transparent"})
            rows.append((phase, bar, f"{number(ms)} ms", f"{ms / whole:.0%}"))
        start += ms
    hidden = f" {format_ms(slowest.hidden_ms)} of prefetching run beside the dense part." \
        if slowest.hidden_ms else ""
    return (f"<h2>The step</h2><p>The phases of rank {slowest.rank}, the slowest, one after "
            f"another.{hidden} If every phase waited for its own slowest rank, the step would "
            f"take {format_ms(result.barrier_ms)}.</p>{bar_rows(rows)}")


def _times(result: PlanResult) -> str:
    head = "<h2>Time of the ranks</h2>" + legend(PHASE_COLOURS, _used_phases(result))
    if len(result.ranks) <= _BARS:
        return head + bar_rows(
            (f"rank {rank.rank}", stacked_bar(_phase_parts(rank.phase_ms, ""),
                                              max(sum(one.phase_ms) for one in result.ranks),
                                              PHASE_COLOURS), f"{number(rank.ms)} ms",
             f"{rank.ms / result.step_ms:.0%}")
            for rank in result.ranks)
    ranked = sorted(result.ranks, key=lambda rank: (-rank.ms, rank.rank))
    shown = _chosen(ranked)
    top = 1.05 * max(sum(rank.phase_ms) for rank in ranked)
    columns = [_phase_parts(rank.phase_ms, f"rank {rank.rank}, {format_ms(rank.ms)}: ")
               for rank in shown]
    return (head + stacked_columns(columns, top, PHASE_COLOURS)
            + _axis(f"rank {ranked[0].rank}, the slowest: {format_ms(ranked[0].ms)}",
                    f"rank {ranked[-1].rank}: {format_ms(ranked[-1].ms)}", ranked, shown))


def _chosen(ranked: Sequence[RankPrediction]) -> list[RankPrediction]:
    """All of them, or evenly spread ones with both ends."""
    if len(ranked) <= _COLUMNS:
        return list(ranked)
    last = len(ranked) - 1
    return [ranked[round(number * last / (_COLUMNS - 1))] for number in range(_COLUMNS)]


def _axis(left: str, right: str, ranked: Sequence[RankPrediction],
          shown: Sequence[RankPrediction]) -> str:
    some = f"{len(shown)} of {len(ranked)} ranks, evenly spread" if len(shown) < len(ranked) \
        else f"{len(ranked)} ranks"
    return (f'<div class="axis"><span>{escape(left)}</span><span>{some}</span>'
            f"<span>{escape(right)}</span></div>")


def _uses(rank: RankPrediction, where: str) -> list[Part]:
    """What a rank's hbm is used for."""
    sizes = {"tables": rank.held.tables.hbm, "state": rank.held.state.hbm,
             "cache": rank.held.cache.hbm, "buffers": rank.buffer_bytes,
             "dense": rank.dense_bytes}
    return [(name, float(size), f"{where}{name} {format_bytes(size)}")
            for name, size in sizes.items()]


def _memory(result: PlanResult) -> str:
    limit = result.capacity + result.ranks[0].dense_bytes
    used = [name for index, name in enumerate(USE_COLOURS)
            if any(_uses(rank, "")[index][1] for rank in result.ranks)]
    line = " The line marks it." if len(result.ranks) > _BARS else ""
    head = (f"<h2>Memory of the ranks</h2><p>hbm: {format_bytes(limit)} of a rank may be used; "
            f"the rest is the machine's reserve.{line}</p>" + legend(USE_COLOURS, used))
    if len(result.ranks) <= _BARS:
        whole = max(limit, *(rank.bytes.hbm for rank in result.ranks))
        chart = bar_rows(
            (f"rank {rank.rank}", stacked_bar(_uses(rank, ""), whole, USE_COLOURS),
             format_bytes(rank.bytes.hbm), f"{rank.bytes.hbm / limit:.1%}")
            for rank in result.ranks)
    else:
        ranked = sorted(result.ranks, key=lambda rank: (-rank.bytes.hbm, rank.rank))
        shown = _chosen(ranked)
        top = 1.05 * max(limit, ranked[0].bytes.hbm)
        columns = [_uses(rank, f"rank {rank.rank}: ") for rank in shown]
        left, right = (f"rank {rank.rank}: {format_bytes(rank.bytes.hbm)}"
                       for rank in (ranked[0], ranked[-1]))
        chart = stacked_columns(columns, top, USE_COLOURS, limit) + \
            _axis(left, right, ranked, shown)
    return head + chart + "".join(_hosts(result, tier) for tier in ("ddr", "ssd"))


def _hosts(result: PlanResult, tier: str) -> str:
    """A host tier, where anything lies on it."""
    held, limit = [getattr(size, tier) for size in result.hosts], getattr(
        result.host_capacity, tier)
    if not any(held):
        return ""
    whole, colours = max(limit, *held), {"held": USE_COLOURS["tables"]}
    fullest = sorted(range(len(held)), key=lambda host: (-held[host], host))[:_BARS]
    rows = [(f"host {host}", stacked_bar([("held", held[host], format_bytes(held[host]))], whole,
                                         colours),
             format_bytes(held[host]), f"{held[host] / limit:.1%}") for host in sorted(fullest)]
    some = f", the {len(fullest)} fullest of {len(held)}" if len(fullest) < len(held) else ""
    return (f"<h2>{tier} of the hosts</h2><p>{format_bytes(limit)} of a host may be used{some}."
            f"</p>{bar_rows(rows)}")


def _by_work(result: PlanResult) -> list[TablePrediction]:
    return sorted(result.tables, key=lambda entry: (-entry.work_ms, entry.table))


def _map(result: PlanResult) -> str:
    if len(result.ranks) > _MAP_RANKS:
        return ""
    shown = []
    for entry in _by_work(result)[:_MAP_TABLES]:
        held: dict[int, float] = {}
        for rank, ms in zip(entry.ranks, entry.shard_ms, strict=True):
            held[rank] = held.get(rank, 0.0) + ms
        shown.append((entry.table, held))
    some = f"The {len(shown)} tables of most work. " if len(shown) < len(result.tables) else ""
    return (f"<h2>Tables over ranks</h2><p>{some}The stronger a cell, the more of the rank's time "
            f"the table takes there.</p>{placement_map(shown, len(result.ranks))}")


def _storages(result: PlanResult) -> str:
    """Storages with their bytes and work, where there is more than one."""
    groups: dict[str, list[TablePrediction]] = {}
    for entry in result.tables:
        groups.setdefault(storage_text(entry.storage), []).append(entry)
    if len(groups) == 1:
        return ""
    rows = []
    for name, entries in sorted(groups.items(), key=lambda item: -len(item[1])):
        sizes = [sum(getattr(entry.held.total, tier) for entry in entries)
                 for tier in ("hbm", "ddr", "ssd")]
        later = sum(1 for entry in entries if entry.preference)
        rows.append(f"<tr><td>{escape(name)}</td><td class=n>{len(entries)}</td>"
                    + "".join(f"<td class=n>{format_bytes(size) if size else '-'}</td>"
                              for size in sizes)
                    + f"<td class=n>{number(sum(entry.work_ms for entry in entries))}</td>"
                    f"<td class=n>{later or '-'}</td></tr>")
    return ("<h2>Storages</h2><div class=scroll><table><thead><tr><th>storage</th>"
            "<th class=n>tables</th><th class=n>hbm</th><th class=n>ddr</th><th class=n>ssd</th>"
            "<th class=n>ms of all ranks</th><th class=n>not their first choice</th></tr></thead>"
            f"<tbody>{''.join(rows)}</tbody></table></div>")


def _tables(result: PlanResult) -> str:
    plans = {entry.table: entry for entry in result.plan.tables}
    rows = []
    for entry in _by_work(result):
        plan = plans[entry.table]
        height, width = (max(getattr(shard, end) for shard in plan.shards)
                         for end in ("row_end", "col_end"))
        size = entry.held.total.total
        rows.append(
            f'<tr><td class=name>{escape(entry.table)}</td>'
            f'<td class=n data-value="{height * width}">{height:,} x {width}</td>'
            f"<td>{escape(describe_shards(plan))}</td><td>{escape(entry.exchange.value)}</td>"
            f"<td>{escape(storage_text(entry.storage))}</td><td>{compact(entry.ranks)}</td>"
            f'<td class=n data-value="{size}">{format_bytes(size)}</td>'
            f'<td class=n data-value="{entry.work_ms:.6g}">{number(entry.work_ms)}</td>'
            f"<td class=why>{escape(entry.why)}</td></tr>")
    heads = "".join(f'<th data-key{" class=n" if name in ("size", "bytes", "ms") else ""}>'
                    f"{name}</th>" for name in ("table", "size", "sharding", "exchange", "storage",
                                                "ranks", "bytes", "ms", "why"))
    return ("<h2>Every table</h2><p>Bytes with optimiser state and caches, milliseconds of all "
            "ranks together; most work first. A click on a heading sorts.</p>"
            '<input id=filter type=search placeholder="filter" aria-label="filter tables">'
            f"<div class=scroll><table id=tables><thead><tr>{heads}</tr></thead>"
            f"<tbody>{''.join(rows)}</tbody></table></div>")


def _foot(result: PlanResult) -> str:
    search = f"found by {escape(result.start)} in {result.cpu_seconds:.2f} CPU seconds" \
        if result.lower_bound_ms else "given, not searched"
    return f"<footer>Plan {search}. Written by shardlab plan --html.</footer>"
