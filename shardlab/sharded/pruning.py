"""Periodic decisions over all ranks: what a chunk must be worth to stay, and who may hold how much.

Tables with one schedule share one budget. At a decision every rank tells, in two small all-reduces,
its chunks by utility and table (for the tables' units) and the bytes that it would keep at every
threshold; then every rank knows the same threshold and its own budget. Nothing else is exchanged.

Source: arXiv 2401.04408 (a global ratio from which those of tables and columns emerge).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shardlab.comm import Groups, all_reduce_
from shardlab.ops.chunk_numbers import BINS
from shardlab.plan import ShardingPlan
from shardlab.specs import EmbeddingBagConfig
from shardlab.storage.base import LocalShard, Storage
from shardlab.storage.chunk_budget import common_threshold, common_unit, demand_curve
from shardlab.storage.chunk_stores import plan_stores
from shardlab.storage.mixed import MixedStorage
from shardlab.storage.pruned import PrunedStorage
from shardlab.storage_specs import TOGETHER, PrunedSpec


@dataclass
class Contest:
    """Tables that share a budget.

    Attributes:
        spec: of any of them: the schedule is the same.
        tables: their names.
        targets, full: bytes of every rank: of its budget, and with every chunk present.
        decided_at: step of the last decision; 0: there was none.
        threshold: that chunks had to reach then.
    """

    spec: PrunedSpec
    tables: list[str]
    targets: list[int]
    full: list[int]
    decided_at: int = 0
    threshold: float = 0.0

    def is_due(self, step: int) -> bool:
        """Whether a decision follows this step."""
        return step >= self.spec.warmup and step % self.spec.period == 0

    def limits(self, step: int) -> list[int]:
        """Bytes of every rank after a decision at this step: the ramp, then the targets."""
        spec = self.spec
        if spec.start != "dense" or step >= spec.warmup + spec.ramp:
            return self.targets
        left = 1.0 - (step - spec.warmup) / max(spec.ramp, 1)
        return [target + max(0, round(left * (full - target)))
                for target, full in zip(self.targets, self.full, strict=True)]


def pruned_part(storage: Storage) -> PrunedStorage | None:
    """The pruned shards of a rank's storage; None where it has none."""
    parts = storage.parts if isinstance(storage, MixedStorage) else [storage]
    return next((part for part in parts if isinstance(part, PrunedStorage)), None)


class PruningCouncil:
    """Takes the decisions of a collection; every rank has one, and all call it at every step.

    Args:
        tables: of the collection.
        plan: where they go.
        optimizer: kind of row optimiser.
        storage: of this rank.
        groups: the ranks.
    """

    def __init__(self, tables: Sequence[EmbeddingBagConfig], plan: ShardingPlan, optimizer: str,
                 storage: Storage, groups: Groups) -> None:
        self._storage, self._groups = pruned_part(storage), groups
        self.contests = _contests(tables, plan, optimizer)
        self._table_of = {} if self._storage is None else {
            block: local.table.name for block, local in enumerate(self._storage.shards)}

    def after_step(self, step: int) -> None:
        """Decides for the contests that are due."""
        for contest in self.contests:
            if contest.is_due(step):
                self._decide(contest, step)

    def _decide(self, contest: Contest, step: int) -> None:
        units = self._units(contest) if contest.spec.normalize else {}
        own = torch.zeros(self._groups.world_size, BINS + 4, dtype=torch.float64)
        own[self._groups.rank] = self._own(contest)
        curves, rest = self._over_ranks(own).split([BINS + 1, 3], 1)
        present, sketches, is_full = rest.T
        limits = torch.tensor(contest.limits(step), dtype=torch.float64)
        left = 1 - contest.spec.headroom
        room = (limits * left - sketches).clamp(min=0)
        # Pages and slabs may leave a store full below its limit.
        room = torch.where(is_full > 0, room.minimum(present * left), room)
        slack = contest.spec.slack if self._groups.world_size > 1 else 0.0
        thresholds, kept = common_threshold(curves, room * (1 + slack), float(room.sum()))
        held = torch.minimum(kept, present) + sketches
        budgets = held + (limits.sum() - held.sum()) * limits / limits.sum()
        rank = self._groups.rank
        contest.decided_at, contest.threshold = step, float(thresholds[rank])
        self._carry_out(contest, float(budgets[rank]))
        if self._storage is not None:
            self._storage.measure_by({block: units[table] for block, table in
                                      self._table_of.items() if units.get(table, 0) > 0})

    def _over_ranks(self, own: Tensor) -> Tensor:
        """The sum of all ranks' tensors, on the CPU."""
        return all_reduce_(own.to(self._groups.device), self._groups).cpu()

    def _stores(self, contest: Contest) -> list[int]:
        """This rank's stores of a contest."""
        if self._storage is None:
            return []
        return [number for number, plan in enumerate(self._storage.stores)
                if plan.spec.schedule == contest.spec.schedule]

    def _units(self, contest: Contest) -> dict[str, float]:
        """What gradient norms of every table were on all ranks just now; 0: not measured."""
        found = torch.zeros(2, len(contest.tables), dtype=torch.float64)
        for store in self._stores(contest):
            assert self._storage is not None
            for block in self._storage.stores[store].blocks:
                unit = float(self._storage.measured[block])
                place = contest.tables.index(self._table_of[block])
                found[:, place] += torch.tensor([unit, float(unit > 0)])
        total, count = self._over_ranks(found)
        units = total / count.clamp(min=1)
        if contest.spec.normalize == TOGETHER:
            units.fill_(common_unit(units))
        return dict(zip(contest.tables, units.tolist(), strict=True))

    def _own(self, contest: Contest) -> Tensor:
        """fp64 [BINS + 4]: bytes that would be kept at every threshold; bytes of present chunks;
        of sketches; stores that were full.
        """
        own = torch.zeros(BINS + 4, dtype=torch.float64)
        for store in self._stores(contest):
            assert self._storage is not None
            counts = self._storage.utility_counts(store).sum(0)
            cost = self._storage.chunk_cost(store)
            own[:BINS + 1] += demand_curve(counts, cost)
            own[BINS + 1] += float(counts.sum()) * cost
            own[BINS + 2] += self._storage.fixed_bytes(store)
            own[BINS + 3] += self._storage.is_full(store)
        return own

    def _carry_out(self, contest: Contest, budget: float) -> None:
        """Evicts, and shares this rank's budget between its stores as they keep chunks."""
        stores = self._stores(contest)
        if not stores:
            return
        assert self._storage is not None
        thresholds = torch.full((len(self._storage.shards),), contest.threshold)
        self._storage.decide_together(stores, thresholds, round(budget))


def _contests(tables: Sequence[EmbeddingBagConfig], plan: ShardingPlan,
              optimizer: str) -> list[Contest]:
    """Tables of one schedule, with the bytes of every rank."""
    configs = {table.name: table for table in tables}
    shards: dict[tuple[object, ...], list[LocalShard]] = {}
    for entry in plan.tables:
        if isinstance(entry.storage, PrunedSpec) and not entry.storage.is_full:
            shards.setdefault(entry.storage.schedule, []).extend(
                LocalShard(configs[entry.table], shard, entry.storage, entry.replicated)
                for shard in entry.shards)
    contests = []
    for found in shards.values():
        spec = found[0].storage
        assert isinstance(spec, PrunedSpec)
        targets, full = [0] * plan.world_size, [0] * plan.world_size
        for rank in range(plan.world_size):
            mine = [local for local in found if local.shard.rank == rank]
            for store in plan_stores(mine, optimizer):
                targets[rank] += min(store.target, store.full_bytes)
                full[rank] += store.full_bytes
        names = list(dict.fromkeys(local.table.name for local in found))
        contests.append(Contest(spec, names, targets, full))
    return contests
