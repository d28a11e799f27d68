"""A finished plan with everything that was predicted for it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from shardlab.plan import ShardingPlan
from shardlab.planner.cuts import Cut
from shardlab.planner.estimate import PHASES
from shardlab.planner.settings import PlanSettings
from shardlab.planner.sizes import ShardBytes
from shardlab.planner.topology import Topology
from shardlab.specs import ExchangeKind, ShardingType
from shardlab.storage_bytes import TierBytes
from shardlab.storage_specs import StorageSpec

if TYPE_CHECKING:
    from shardlab.planner.solve import Solved


@dataclass(frozen=True)
class RankPrediction:
    """What one rank is expected to hold and to spend in a step.

    Attributes:
        rank: the rank.
        held: its shards, by tier and by what it is for.
        buffer_bytes: exchange buffers, in hbm.
        dense_bytes: the dense model, in hbm.
        phase_ms: milliseconds by phase, in the order of `estimate.PHASES`.
        hidden_ms: the part of prefetching that runs while the dense part does.
        written_bytes: what a step of its shards writes to the disk.
    """

    rank: int
    held: ShardBytes
    buffer_bytes: int
    dense_bytes: int
    phase_ms: tuple[float, ...]
    hidden_ms: float = 0.0
    written_bytes: float = 0.0

    @property
    def ms(self) -> float:
        """Milliseconds of the rank's step."""
        return sum(self.phase_ms) - self.hidden_ms

    @property
    def table_bytes(self) -> int:
        """Shards on all tiers: rows, optimiser state, caches."""
        return self.held.total.total

    @property
    def bytes(self) -> TierBytes:
        """Everything, by tier."""
        return self.held.total + TierBytes(hbm=self.buffer_bytes + self.dense_bytes)


@dataclass(frozen=True)
class OptionCost:
    """One way to lay a table, and what it would cost.

    Attributes:
        cut: type, row and column blocks.
        exchange: what crosses the wire.
        storage: how shards are held.
        preference: place of the storage in the user's order, 0 first.
        work_ms: milliseconds summed over all ranks.
        largest_ms: milliseconds of its costliest piece on a rank.
        bytes: of all ranks together, buffers included.
        shard_bytes: of one shard, its buffers included.
        fits: it would find room in an empty fleet.
        allowed: the order of preference left it to the search.
        chosen: the plan takes it.
    """

    cut: Cut
    exchange: ExchangeKind
    storage: StorageSpec
    preference: int
    work_ms: float
    largest_ms: float
    bytes: TierBytes
    shard_bytes: TierBytes
    fits: bool
    allowed: bool
    chosen: bool


@dataclass(frozen=True)
class TablePrediction:
    """What was chosen for one table, what it costs, and why.

    Attributes:
        table: its name.
        sharding: chosen type.
        exchange: chosen kind, never ``auto``.
        storage: chosen storage, a tier on every level.
        preference: place of the storage in the user's order, 0 first.
        preferences: how many storages the user allows.
        ranks: rank of every shard, in the plan's order.
        shard_bytes: rows, optimiser state and caches of every shard, on all tiers.
        shard_ms: milliseconds of every shard on its rank.
        held: all shards together, by tier and by what it is for.
        buffer_bytes: exchange buffers, all ranks together.
        common_ms: milliseconds on every rank, for its own samples.
        phase_ms: milliseconds of all ranks together, in the order of `estimate.PHASES`.
        why: one sentence.
    """

    table: str
    sharding: ShardingType
    exchange: ExchangeKind
    storage: StorageSpec
    preference: int
    preferences: int
    ranks: tuple[int, ...]
    shard_bytes: tuple[int, ...]
    shard_ms: tuple[float, ...]
    held: ShardBytes
    buffer_bytes: int
    common_ms: float
    phase_ms: tuple[float, ...]
    why: str

    @property
    def work_ms(self) -> float:
        """Milliseconds of all ranks together."""
        return sum(self.phase_ms)


@dataclass(frozen=True)
class PlanResult:
    """The plan, its prediction, and how good it is.

    Attributes:
        plan: what `train` executes.
        topology: the machine it is for.
        batch_size: samples of one rank in one step.
        optimizer: sparse optimiser.
        settings: what else was taken into account.
        assumption: about ids, in words.
        capacity: bytes of one rank's hbm that shards and buffers may take.
        host_capacity: bytes of one host's ddr and ssd that shards may take.
        ranks: prediction per rank.
        tables: prediction per table, in the caller's order.
        lower_bound_ms: no plan of the options tried has a faster slowest rank.
        binding: what holds the plan back: names of full tiers, or of the table whose largest
            piece takes that long, or nothing but work.
        optimal: the plan was proven to be the best of the options.
        start: where the search found it: greedy, largest_differencing or exact.
        sync_bytes: what an average rank sends to other replica groups in a step.
        cpu_seconds: CPU time that planning took; not part of equality.
        solved: the search's own account; not part of equality.
    """

    plan: ShardingPlan
    topology: Topology
    batch_size: int
    optimizer: str
    settings: PlanSettings
    assumption: str
    capacity: int
    host_capacity: TierBytes
    ranks: tuple[RankPrediction, ...]
    tables: tuple[TablePrediction, ...]
    lower_bound_ms: float
    binding: tuple[str, ...]
    optimal: bool
    start: str
    sync_bytes: float = 0.0
    cpu_seconds: float = field(default=0.0, compare=False)
    solved: Solved | None = field(default=None, compare=False, repr=False)

    @property
    def slowest(self) -> RankPrediction:
        """The rank that a step waits for."""
        return max(self.ranks, key=lambda rank: rank.ms)

    @property
    def step_ms(self) -> float:
        """Milliseconds of the slowest rank's step."""
        return self.slowest.ms

    @property
    def samples_per_s(self) -> float:
        """Samples of all ranks per second."""
        return self.plan.job_ranks * self.batch_size / self.step_ms * 1e3

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
        phases = sum(max(rank.phase_ms[phase] for rank in self.ranks)
                     for phase in range(len(PHASES)))
        return phases - min(rank.hidden_ms for rank in self.ranks)

    @property
    def gap(self) -> float:
        """How much slower than the lower bound the step is, as a share of the bound."""
        return self.step_ms / self.lower_bound_ms - 1 if self.lower_bound_ms else 0.0

    @property
    def hosts(self) -> tuple[TierBytes, ...]:
        """What the ranks of every host hold together."""
        size = self.topology.ranks_per_host
        totals = []
        for first in range(0, len(self.ranks), size):
            total = TierBytes()
            for rank in self.ranks[first:first + size]:
                total += rank.bytes
            totals.append(total)
        return tuple(totals)

    @property
    def disk_bytes_per_s(self) -> float:
        """What training writes to the disk of the host that is written most."""
        size = self.topology.ranks_per_host
        return max(sum(rank.written_bytes for rank in self.ranks[first:first + size])
                   for first in range(0, len(self.ranks), size)) / self.step_ms * 1e3

    @property
    def disk_life_s(self) -> float | None:
        """Seconds of training that the disk is rated for; None: it is not written, or not rated."""
        disk = self.topology.ssd
        if disk is None or disk.endurance_bytes is None or not self.disk_bytes_per_s:
            return None
        return disk.endurance_bytes / self.disk_bytes_per_s

    def options(self, table: str) -> tuple[OptionCost, ...]:
        """Every option of a table that was considered, least work first.

        Raises:
            ConfigError: there is no such table.
        """
        from shardlab.planner.build import option_costs

        return option_costs(self, table)
