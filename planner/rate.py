"""Predicts what a given plan holds and takes, whoever made it.

Rectangles, ranks and storages are those of the plan. Bytes are exact. Times are those of the
planner's own options, whose blocks are equal: a table that is cut unevenly is priced by its largest
block, the first of every column block as the fullest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from shardlab.plan import ShardingPlan
from shardlab.planner.costs import Priced
from shardlab.planner.enumerate import SHARDING_TYPES, Options
from shardlab.planner.estimate import PREFETCH, Pricer
from shardlab.planner.problem import ShardLabModel
from shardlab.planner.request import Request
from shardlab.planner.result import PlanResult, RankPrediction, TablePrediction
from shardlab.planner.sizes import ShardBytes, shard_bytes
from shardlab.planner.units import format_bytes
from shardlab.planner.variants import Variant, storage_options
from shardlab.specs import ExchangeKind
from shardlab.storage_bytes import TierBytes
from shardlab.storage_specs import Tier
from shardlab.table_plan import Shard, TablePlan

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_WHY = "as the plan says"


@dataclass(frozen=True)
class _Rated:
    """A table of the plan, its shards column block by column block, with their predictions."""

    entry: TablePlan
    sizes: list[ShardBytes]
    phases: Floats
    written: Floats


def rate(plan: ShardingPlan, request: Request) -> PlanResult:
    """What a plan holds and takes on the machine of a request.

    Args:
        plan: any plan of the request's tables. An exchange that is left open (``auto``) is what
            training makes of it: unique rows, on one rank pooled bags. Its wire dtypes are the
            plan's where all tables have the same, else the request's.
        request: tables, machine, batch, optimiser, settings.

    Returns:
        As planning does, without a lower bound: nothing was searched.

    Raises:
        PlanError: the plan does not fit tables or ranks, by name.
    """
    plan.check(request.tables, request.topology.world_size * request.settings.replicas.groups)
    wires = {entry.wire for entry in plan.tables}
    if len(wires) == 1:
        request = replace(request, settings=replace(request.settings, wire=wires.pop()))
    named = {entry.table: entry for entry in plan.tables}
    entries = [_ordered(named[table.name]) for table in request.tables]
    pricer = ShardLabModel(request).pricer
    entries = [replace(entry, wire=request.settings.wire, exchange=_exchange(
        entry, ExchangeKind.POOLED if plan.world_size == 1 else ExchangeKind.ROWS))
        for entry in entries]
    priced = pricer.price(_options(entries), np.arange(len(entries)))
    rated = [_rated(entry, priced, index, request.optimizer)
             for index, entry in enumerate(entries)]
    world, topology = plan.world_size, request.topology
    tables = tuple(_table(rated[index], priced, index, world, request)
                   for index in range(len(rated)))
    return PlanResult(
        plan=replace(plan, tables=tuple(table.entry for table in rated)), topology=topology,
        batch_size=request.batch_size, optimizer=request.optimizer, settings=request.settings,
        assumption=pricer.work.access.assumption, capacity=request.capacity,
        host_capacity=TierBytes(ddr=topology.ddr_capacity, ssd=topology.ssd_capacity),
        ranks=_ranks(rated, priced, pricer, world), tables=tables, lower_bound_ms=0.0, binding=(),
        optimal=False, start="given", sync_bytes=pricer.sync_bytes)


def _ordered(entry: TablePlan) -> TablePlan:
    """Row block after row block of the first column block, then of the second."""
    if entry.replicated:
        return replace(entry, shards=tuple(sorted(entry.shards, key=lambda shard: shard.rank)))
    return replace(entry, shards=tuple(
        sorted(entry.shards, key=lambda shard: (shard.col_start, shard.row_start))))


def _parts(entry: TablePlan) -> tuple[int, int]:
    """Row and column blocks."""
    return (len({shard.row_start for shard in entry.shards}),
            len({shard.col_start for shard in entry.shards}))


def _options(entries: Sequence[TablePlan]) -> Options:
    """One option per table: what the plan says."""
    variants: dict[Variant, int] = {}
    columns = np.array([
        (SHARDING_TYPES.index(entry.sharding), *_parts(entry), len(entry.shards),
         variants.setdefault(Variant(entry.storage, 0), len(variants)),
         max(shard.rows for shard in entry.shards), max(shard.columns for shard in entry.shards))
        for entry in entries], dtype=np.int64).T
    sharding, row_parts, col_parts, pieces, variant, rows, width = columns
    count = np.arange(len(entries))
    return Options(
        variants=tuple(variants), first=np.arange(len(entries) + 1), table=count,
        sharding=sharding, row_parts=row_parts, col_parts=col_parts, pieces=pieces,
        group=np.zeros(len(entries), dtype=np.int64), variant=variant, rows=rows, columns=width,
        pooled=np.array([entry.exchange is ExchangeKind.POOLED for entry in entries]))


def _exchange(entry: TablePlan, open_kind: ExchangeKind) -> ExchangeKind:
    """What crosses the wire; of copies nothing but gradients of unique rows does."""
    if entry.replicated and len(entry.shards) > 1:
        return ExchangeKind.ROWS
    return open_kind if entry.exchange is ExchangeKind.AUTO else entry.exchange


def choose_exchanges(plan: ShardingPlan, request: Request) -> ShardingPlan:
    """The same plan, every exchange that is left open (``auto``) set to the kind of less work.

    Args:
        plan: a plan that fits the request.
        request: tables, machine, batch, optimiser, settings.
    """
    works = []
    for kind in (ExchangeKind.ROWS, ExchangeKind.POOLED):
        result = rate(replace(plan, tables=tuple(
            replace(entry, exchange=_exchange(entry, kind)) for entry in plan.tables)), request)
        works.append({table.table: table.work_ms for table in result.tables})
    rows, pooled = works
    return replace(plan, tables=tuple(
        replace(entry, exchange=_exchange(entry, ExchangeKind.POOLED if
                                          pooled[entry.table] < rows[entry.table]
                                          else ExchangeKind.ROWS)) for entry in plan.tables))


def _rated(entry: TablePlan, priced: Priced, index: int, optimizer: str) -> _Rated:
    sizes = [shard_bytes(entry.storage, shard.rows, shard.columns, optimizer)
             for shard in entry.shards]
    which = np.minimum(np.arange(len(entry.shards)) % _parts(entry)[0], 1)
    which = np.zeros_like(which) if entry.replicated else which
    phases = priced.phase_ms[index][which]
    shards = tuple(
        Shard(shard.rank, shard.row_start, shard.row_end, shard.col_start, shard.col_end,
              size.total, ms)
        for shard, size, ms in zip(entry.shards, sizes, phases.sum(axis=1).tolist(), strict=True))
    return _Rated(replace(entry, shards=shards), sizes, phases, priced.written_bytes[index][which])


def _table(rated: _Rated, priced: Priced, index: int, world: int,
           request: Request) -> TablePrediction:
    entry, common = rated.entry, priced.common_phase_ms[index]
    wanted = storage_options(request.tables[index].storage)
    buffers = int(priced.buffer_bytes[index]) * len(entry.shards) + \
        world * int(priced.common_bytes[index])
    return TablePrediction(
        table=entry.table, sharding=entry.sharding, exchange=entry.exchange,
        storage=entry.storage, preference=0, preferences=len(wanted),
        ranks=tuple(shard.rank for shard in entry.shards),
        shard_bytes=tuple(size.total.total for size in rated.sizes),
        shard_ms=tuple(shard.ms for shard in entry.shards),
        held=sum(rated.sizes, ShardBytes()), buffer_bytes=buffers, common_ms=float(common.sum()),
        phase_ms=tuple((rated.phases.sum(axis=0) + world * common).tolist()), why=_WHY)


def _ranks(rated: Sequence[_Rated], priced: Priced, pricer: Pricer,
           world: int) -> tuple[RankPrediction, ...]:
    phases = np.tile(pricer.fixed_phase_ms + priced.common_phase_ms.sum(axis=0), (world, 1))
    buffers = np.full(world, priced.common_bytes.sum())
    held = np.zeros((world, 3, len(Tier)), dtype=np.int64)
    written = np.zeros(world)
    for index, table in enumerate(rated):
        # A rank may hold several shards of a table: sums must not overwrite each other.
        ranks = np.array([shard.rank for shard in table.entry.shards])
        np.add.at(phases, ranks, table.phases)
        np.add.at(written, ranks, table.written)
        np.add.at(buffers, ranks, priced.buffer_bytes[index])
        np.add.at(held, ranks, np.array([
            [[part.hbm, part.ddr, part.ssd] for part in (size.tables, size.state, size.cache)]
            for size in table.sizes]))
    dense = pricer.request.settings.dense.bytes
    return tuple(
        RankPrediction(rank, ShardBytes(*(TierBytes(*part) for part in held[rank].tolist())),
                       int(buffers[rank]), dense, tuple(phases[rank].tolist()),
                       min(float(phases[rank, PREFETCH]), pricer.window_ms), float(written[rank]))
        for rank in range(world))


def overfull(result: PlanResult) -> list[str]:
    """Where a plan asks for more memory than there is: one line each, the fullest first."""
    found = [(rank.bytes.hbm - rank.dense_bytes, result.capacity, f"rank {rank.rank}: hbm")
             for rank in result.ranks]
    for host, size in enumerate(result.hosts):
        found += [(size.ddr, result.host_capacity.ddr, f"host {host}: ddr"),
                  (size.ssd, result.host_capacity.ssd, f"host {host}: ssd")]
    over = sorted(((used - limit, used, limit, where) for used, limit, where in found
                   if used > limit), reverse=True)
    return [f"{where} holds {format_bytes(used)} of {format_bytes(limit)}, "
            f"{format_bytes(excess)} too much" for excess, used, limit, where in over]
