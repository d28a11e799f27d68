"""A finished plan with everything that was predicted for it."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from shardlab.plan import ShardingPlan, TablePlan, build_table_plan
from shardlab.planner.enumerate import Cut
from shardlab.planner.estimate import PHASES
from shardlab.planner.placement import Problem
from shardlab.planner.request import Request
from shardlab.planner.search import Solution
from shardlab.planner.topology import Topology
from shardlab.planner.units import format_bytes, format_ms
from shardlab.specs import EmbeddingBagConfig, ExchangeKind, ShardingType, Tier

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class RankPrediction:
    """What one rank is expected to hold and to spend in a step.

    Attributes:
        rank: the rank.
        table_bytes: rows and optimiser state of its shards.
        buffer_bytes: exchange buffers.
        phase_ms: milliseconds by phase, in the order of `estimate.PHASES`.
    """

    rank: int
    table_bytes: int
    buffer_bytes: int
    phase_ms: tuple[float, ...]

    @property
    def ms(self) -> float:
        return sum(self.phase_ms)


@dataclass(frozen=True)
class TablePrediction:
    """What was chosen for one table, what it costs, and why.

    Attributes:
        table: its name.
        sharding: chosen type.
        exchange: chosen kind, never ``auto``.
        ranks: rank of every shard, in the plan's order.
        shard_bytes: rows and optimiser state of every shard.
        shard_ms: milliseconds of every shard on its rank.
        buffer_bytes: exchange buffers, all ranks together.
        common_ms: milliseconds on every rank, for its own samples.
        why: one sentence.
    """

    table: str
    sharding: ShardingType
    exchange: ExchangeKind
    ranks: tuple[int, ...]
    shard_bytes: tuple[int, ...]
    shard_ms: tuple[float, ...]
    buffer_bytes: int
    common_ms: float
    why: str


@dataclass(frozen=True)
class PlanResult:
    """The plan, its prediction, and how good it is.

    Attributes:
        plan: what `train` executes.
        topology: the machine it is for.
        batch_size: samples of one rank in one step.
        optimizer: sparse optimiser.
        capacity: bytes of one rank that shards and buffers may take.
        ranks: prediction per rank.
        tables: prediction per table, in the caller's order.
        lower_bound_ms: no plan of the options tried has a faster slowest rank.
        optimal: the plan was proven to be the best of them.
        start: where the search found it: greedy, largest_differencing or exact.
        cpu_seconds: CPU time that planning took; not part of equality.
    """

    plan: ShardingPlan
    topology: Topology
    batch_size: int
    optimizer: str
    capacity: int
    ranks: tuple[RankPrediction, ...]
    tables: tuple[TablePrediction, ...]
    lower_bound_ms: float
    optimal: bool
    start: str
    cpu_seconds: float = field(default=0.0, compare=False)

    @property
    def slowest(self) -> RankPrediction:
        """The rank that a step waits for."""
        return max(self.ranks, key=lambda rank: rank.ms)

    @property
    def step_ms(self) -> float:
        """Milliseconds of the slowest rank: the embedding part of a step."""
        return self.slowest.ms

    @property
    def mean_ms(self) -> float:
        """Milliseconds of the average rank."""
        return sum(rank.ms for rank in self.ranks) / len(self.ranks)

    @property
    def imbalance(self) -> float:
        """Slowest over average rank."""
        return self.step_ms / self.mean_ms

    @property
    def barrier_ms(self) -> float:
        """Milliseconds of a step in which every phase waits for its own slowest rank."""
        return sum(max(rank.phase_ms[phase] for rank in self.ranks)
                   for phase in range(len(PHASES)))

    @property
    def gap(self) -> float:
        """How much slower than the lower bound the step is, as a share of the bound."""
        return self.step_ms / self.lower_bound_ms - 1 if self.lower_bound_ms else 0.0


def build_result(request: Request, problem: Problem, solution: Solution,
                 cpu_seconds: float) -> PlanResult:
    """Turns the search's answer into a plan with its predictions."""
    placement = solution.placement
    plans, predictions = [], []
    for index, table in enumerate(request.tables):
        option, ranks = int(placement.choice[index]), placement.ranks[index].tolist()
        cut = problem.options.cuts[option]
        plans.append(_table_plan(table, cut, ranks, bool(problem.options.pooled[option])))
        predictions.append(_table_prediction(problem, index, option, ranks, plans[-1],
                                             _why(problem, table, index, option)))
    return PlanResult(
        plan=ShardingPlan(problem.world_size, tuple(plans)), topology=request.topology,
        batch_size=request.batch_size, optimizer=request.optimizer, capacity=problem.capacity,
        ranks=_rank_predictions(problem, solution), tables=tuple(predictions),
        lower_bound_ms=solution.lower_bound_ms, optimal=solution.optimal, start=solution.start,
        cpu_seconds=cpu_seconds)


def _table_plan(table: EmbeddingBagConfig, cut: Cut, ranks: list[int],
                pooled: bool) -> TablePlan:
    return build_table_plan(table, cut.sharding, ranks, columns=cut.col_parts,
                            exchange=ExchangeKind.POOLED if pooled else ExchangeKind.ROWS,
                            tier=Tier.HBM)


def _table_prediction(problem: Problem, index: int, option: int, ranks: list[int],
                      plan: TablePlan, why: str) -> TablePrediction:
    costs, pieces = problem.costs, problem.options.pieces(option)
    buffers = costs.buffer_bytes[pieces].sum() + problem.world_size * costs.common_bytes[option]
    return TablePrediction(
        table=plan.table, sharding=plan.sharding, exchange=plan.exchange, ranks=tuple(ranks),
        shard_bytes=tuple(costs.table_bytes[pieces].tolist()),
        shard_ms=tuple(costs.ms[pieces].tolist()), buffer_bytes=int(buffers),
        common_ms=float(costs.common_ms[option]), why=why)


def _rank_predictions(problem: Problem, solution: Solution) -> tuple[RankPrediction, ...]:
    costs, placement = problem.costs, solution.placement
    phases = np.tile(costs.fixed_phase_ms + costs.common_phase_ms[placement.choice].sum(axis=0),
                     (problem.world_size, 1))
    table_bytes = np.zeros(problem.world_size, dtype=np.int64)
    buffers = np.full(problem.world_size, costs.common_bytes[placement.choice].sum())
    for option, ranks in zip(placement.choice.tolist(), placement.ranks, strict=True):
        pieces = problem.options.pieces(option)
        phases[ranks] += costs.phase_ms[pieces]
        table_bytes[ranks] += costs.table_bytes[pieces]
        buffers[ranks] += costs.buffer_bytes[pieces]
    return tuple(RankPrediction(rank, int(table_bytes[rank]), int(buffers[rank]),
                                tuple(phases[rank].tolist()))
                 for rank in range(problem.world_size))


def describe_cut(cut: Cut) -> str:
    """``row_wise x8``, ``grid_shard 2x4``, ``table_wise``."""
    if cut.row_parts > 1 and cut.col_parts > 1:
        return f"{cut.sharding.value} {cut.col_parts}x{cut.row_parts}"
    parts = cut.row_parts * cut.col_parts
    return cut.sharding.value if parts == 1 else f"{cut.sharding.value} x{parts}"


def _why(problem: Problem, table: EmbeddingBagConfig, index: int, option: int) -> str:
    """The reason in numbers: the cheapest way, or what is wrong with it."""
    options, total = problem.options, problem.total_ms
    every = list(options.of_table(index))
    asked = f"{table.sharding.value} was asked for" if table.sharding else ""
    if len(every) == 1:
        return asked or "the only way on one rank"
    ranked = sorted(every, key=lambda other: (total[other], other))
    prefix = f"{asked}; " if asked else ""
    if ranked[0] == option:
        runner = ranked[1]
        return (f"{prefix}least work, {format_ms(total[option])}; next "
                f"{describe_cut(options.cuts[runner])}, {format_ms(total[runner])}")
    cheapest = describe_cut(options.cuts[ranked[0]])
    if problem.largest_bytes[ranked[0]] > problem.capacity:
        return (f"{prefix}{cheapest} does not fit: "
                f"{format_bytes(problem.largest_bytes[ranked[0]])} on one rank of "
                f"{format_bytes(problem.capacity)}")
    extra = format_ms(total[option] - total[ranked[0]])
    if problem.largest_ms[option] < problem.largest_ms[ranked[0]]:
        return (f"{prefix}balance: {format_ms(problem.largest_ms[option])} on a rank, {cheapest} "
                f"{format_ms(problem.largest_ms[ranked[0]])}; costs {extra} more work")
    return f"{prefix}packs better than {cheapest}; costs {extra} more work"
