"""Turns the search's answer into a plan with its predictions."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from shardlab.errors import ConfigError, nearest_name
from shardlab.plan import ShardingPlan
from shardlab.planner.costs import Priced
from shardlab.planner.estimate import PREFETCH, Pricer
from shardlab.planner.placement import Placement, Problem
from shardlab.planner.request import Request
from shardlab.planner.result import OptionCost, PlanResult, RankPrediction, TablePrediction
from shardlab.planner.sizes import ShardBytes, shard_bytes
from shardlab.planner.solve import Solved
from shardlab.planner.variants import storage_options
from shardlab.planner.why import why
from shardlab.specs import ExchangeKind
from shardlab.storage_bytes import TierBytes
from shardlab.storage_specs import Tier
from shardlab.table_plan import Shard, TablePlan, build_table_plan

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class _Chosen:
    """The options that the plan takes, priced by phase."""

    request: Request
    problem: Problem
    placement: Placement
    priced: Priced

    def piece_phases(self, table: int) -> Floats:
        """[n, phases] of the pieces of a table."""
        option = int(self.placement.choice[table])
        count = int(self.problem.options.pieces[option])
        which = np.minimum(np.arange(count) % int(self.problem.options.row_parts[option]), 1)
        phases: Floats = self.priced.phase_ms[table][which]
        return phases

    def piece_written(self, table: int) -> Floats:
        """[n] bytes that a step of the pieces of a table writes to the disk."""
        first, other = self.priced.written_bytes[table]
        option = int(self.placement.choice[table])
        number = np.arange(int(self.problem.options.pieces[option]))
        of_first = number % int(self.problem.options.row_parts[option]) == 0
        written: Floats = np.where(of_first, first, other)
        return written


def build_result(request: Request, pricer: Pricer, solved: Solved,
                 cpu_seconds: float) -> PlanResult:
    """The plan of a solved request.

    Args:
        request: what was asked.
        pricer: the model that priced it.
        solved: the search's answer.
        cpu_seconds: what planning took.
    """
    problem, solution = solved.problem, solved.solution
    chosen = _Chosen(request, problem, solution.placement, pricer.price(
        problem.options, solution.placement.choice))
    held = lru_cache(maxsize=None)(shard_bytes)
    plans, predictions, shards = [], [], []
    for index, table in enumerate(request.tables):
        entry = _table_plan(chosen, index)
        sizes = [held(entry.storage, shard.rows, shard.columns, request.optimizer)
                 for shard in entry.shards]
        phases = chosen.piece_phases(index)
        plans.append(_with_predictions(entry, sizes, phases))
        predictions.append(_table_prediction(chosen, index, entry, sizes, phases))
        shards.append(sizes)
        assert entry.table == table.name
    topology = request.topology
    return PlanResult(
        plan=_with_groups(ShardingPlan(problem.world_size, tuple(plans)), request),
        topology=topology,
        batch_size=request.batch_size, optimizer=request.optimizer, settings=request.settings,
        assumption=pricer.work.access.assumption, capacity=request.capacity,
        host_capacity=TierBytes(ddr=topology.ddr_capacity, ssd=topology.ssd_capacity),
        ranks=_rank_predictions(chosen, pricer, shards), tables=tuple(predictions),
        lower_bound_ms=solution.lower_bound_ms, binding=_binding(request, solved),
        optimal=solution.optimal, start=solution.start, sync_bytes=pricer.sync_bytes,
        cpu_seconds=cpu_seconds, solved=solved)


def _with_groups(plan: ShardingPlan, request: Request) -> ShardingPlan:
    replicas = request.settings.replicas
    return plan.with_replicas(replicas.groups, replicas.sync_every_steps)


def _table_plan(chosen: _Chosen, index: int) -> TablePlan:
    options, option = chosen.problem.options, int(chosen.placement.choice[index])
    cut = options.cut(option)
    plan = build_table_plan(
        chosen.request.tables[index], cut.sharding, chosen.placement.ranks[index].tolist(),
        columns=cut.col_parts, storage=options.storage(option),
        exchange=ExchangeKind.POOLED if options.pooled[option] else ExchangeKind.ROWS)
    return replace(plan, wire=chosen.request.settings.wire)


def _with_predictions(plan: TablePlan, sizes: list[ShardBytes], phases: Floats) -> TablePlan:
    shards = tuple(
        Shard(shard.rank, shard.row_start, shard.row_end, shard.col_start, shard.col_end,
              size.total, ms)
        for shard, size, ms in zip(plan.shards, sizes, phases.sum(axis=1).tolist(), strict=True))
    return replace(plan, shards=shards)


def _table_prediction(chosen: _Chosen, index: int, plan: TablePlan, sizes: list[ShardBytes],
                      phases: Floats) -> TablePrediction:
    problem, option = chosen.problem, int(chosen.placement.choice[index])
    world, common = problem.world_size, chosen.priced.common_phase_ms[index]
    buffers = int(chosen.priced.buffer_bytes[index]) * len(sizes) + \
        world * int(chosen.priced.common_bytes[index])
    return TablePrediction(
        table=plan.table, sharding=plan.sharding, exchange=plan.exchange, storage=plan.storage,
        preference=int(problem.options.preference[option]),
        preferences=len(storage_options(chosen.request.tables[index].storage)),
        ranks=tuple(shard.rank for shard in plan.shards),
        shard_bytes=tuple(size.total.total for size in sizes),
        shard_ms=tuple(phases.sum(axis=1).tolist()), held=sum(sizes, ShardBytes()),
        buffer_bytes=buffers, common_ms=float(common.sum()),
        phase_ms=tuple((phases.sum(axis=0) + world * common).tolist()),
        why=why(problem, chosen.request.tables[index], index, option))


def _rank_predictions(chosen: _Chosen, pricer: Pricer,
                      shards: list[list[ShardBytes]]) -> tuple[RankPrediction, ...]:
    problem, placement = chosen.problem, chosen.placement
    common = pricer.fixed_phase_ms + chosen.priced.common_phase_ms.sum(axis=0)
    phases = np.tile(common, (problem.world_size, 1))
    buffers = np.full(problem.world_size, chosen.priced.common_bytes.sum())
    held = np.zeros((problem.world_size, 3, len(Tier)), dtype=np.int64)
    written = np.zeros(problem.world_size)
    for table, ranks in enumerate(placement.ranks):
        phases[ranks] += chosen.piece_phases(table)
        buffers[ranks] += chosen.priced.buffer_bytes[table]
        written[ranks] += chosen.piece_written(table)
        held[ranks] += np.array([_numbers(size) for size in shards[table]])
    dense = chosen.request.settings.dense.bytes
    return tuple(
        RankPrediction(rank, ShardBytes(*(TierBytes(*part) for part in held[rank].tolist())),
                       int(buffers[rank]), dense, tuple(phases[rank].tolist()),
                       min(float(phases[rank, PREFETCH]), problem.window_ms),
                       float(written[rank]))
        for rank in range(problem.world_size))


def _numbers(size: ShardBytes) -> list[list[int]]:
    return [[part.hbm, part.ddr, part.ssd] for part in (size.tables, size.state, size.cache)]


def _binding(request: Request, solved: Solved) -> tuple[str, ...]:
    bound = solved.solution.bound
    if bound.table >= 0:
        return (f"largest piece of table {request.tables[bound.table].name!r}",)
    return tuple(tier.value for tier, price in zip(Tier, bound.prices, strict=True) if price > 0)


def option_costs(result: PlanResult, table: str) -> tuple[OptionCost, ...]:
    """Every option of a table, least work first; see `PlanResult.options`."""
    names = [entry.table for entry in result.tables]
    if table not in names:
        raise ConfigError(f"no table {table!r}{nearest_name(table, names)}; known: "
                          f"{', '.join(names[:20])}{', ...' if len(names) > 20 else ''}")
    assert result.solved is not None
    everything, index = result.solved.everything, names.index(table)
    entry = result.tables[index]
    found = [_option_cost(everything, option, entry) for option in everything.by_work(index)]
    return tuple(found)


def _option_cost(problem: Problem, option: int, entry: TablePrediction) -> OptionCost:
    options = problem.options
    preference = int(options.preference[option])
    exchange = ExchangeKind.POOLED if options.pooled[option] else ExchangeKind.ROWS
    cut, storage = options.cut(option), options.storage(option)
    chosen = (storage, exchange, cut.sharding, int(options.pieces[option])) == (
        entry.storage, entry.exchange, entry.sharding, len(entry.ranks))
    return OptionCost(
        cut=cut, exchange=exchange, storage=storage, preference=preference,
        work_ms=float(problem.total_ms[option]), largest_ms=float(problem.largest_ms[option]),
        bytes=_tiers(problem.total_bytes[option]),
        shard_bytes=_tiers(problem.costs.piece_bytes[option]),
        fits=bool(problem.fits_alone[option]), allowed=preference == entry.preference,
        chosen=chosen)


def _tiers(size: NDArray[np.generic]) -> TierBytes:
    return TierBytes(*(int(part) for part in size))
