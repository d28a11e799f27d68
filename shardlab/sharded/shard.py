"""`shard`: a user's model, its tables in shards over all ranks, its dense part on every rank."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from shardlab.comm import Groups, build_groups, split_replicas
from shardlab.errors import PlanError, ShardLabError
from shardlab.optim import RowOptimizer, RowWiseAdagrad
from shardlab.plan import ShardingPlan
from shardlab.replication import ranks_of_a_group
from shardlab.sharded.clock import PhaseClock
from shardlab.sharded.collection import ShardedEmbeddingBagCollection
from shardlab.sharded.dense import DenseReducer
from shardlab.sharded.embedding_bags import EmbeddingBagCollection
from shardlab.sharded.optimizer import ShardedOptimizer
from shardlab.sharded.replicas import Replication
from shardlab.specs import EmbeddingBagConfig, ShardingType
from shardlab.storage_specs import PrunedSpec
from shardlab.table_plan import DenseWire, build_table_plan

DenseOptimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


def adam(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """The default of dense parameters: torch.optim.Adam with a learning rate of 1e-3, fused."""
    return torch.optim.Adam(parameters, lr=1e-3, fused=True)


class ShardedModel(nn.Module):
    """A model whose collections are sharded; call it as you called the model.

    Args:
        module: the user's model, its collections already replaced.
        groups: the ranks.
        dense_wire: how gradients of the dense part travel.
        seed: of the run.
    """

    def __init__(self, module: nn.Module, groups: Groups, dense_wire: DenseWire | None = None,
                 seed: int = 0) -> None:
        super().__init__()
        self.module = module
        self.groups = groups
        dense = any(parameter.requires_grad for parameter in module.parameters())
        several = groups.process_group is not None
        self.reducer = DenseReducer(module, groups, dense_wire, seed) \
            if several and dense else None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the user's model."""
        if self.reducer is not None and self.training and torch.is_grad_enabled():
            self.reducer.share_buffers()
        return self.module(*args, **kwargs)

    @property
    def clock(self) -> PhaseClock:
        """Where the time of this rank's steps goes."""
        return next(iter(self.collections().values())).clock

    @property
    def table_groups(self) -> Groups:
        """The ranks that share the tables with this one: all, or those of its replica group."""
        return next(iter(self.collections().values())).groups

    @property
    def replica(self) -> tuple[int, int]:
        """Which of how many groups, that each hold all tables, this rank is in."""
        replicas = next(iter(self.collections().values())).replicas
        return (0, 1) if replicas is None else (replicas.number, replicas.count)

    def sync_replicas(self) -> None:
        """Makes the groups' tables alike; every rank calls it, between two steps."""
        for collection in self.collections().values():
            collection.sync_replicas()

    def collections(self) -> dict[str, ShardedEmbeddingBagCollection]:
        """The sharded collections by their path in the user's model."""
        return {name: child for name, child in self.module.named_modules()
                if isinstance(child, ShardedEmbeddingBagCollection)}

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Dense parameters and buffers under the user's names; tables are streamed in chunks."""
        return self.module.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Loads what `state_dict` gave."""
        return self.module.load_state_dict(*args, **kwargs)


def shard(model: nn.Module, plan: ShardingPlan | None = None, *,
          optimizer: RowOptimizer | None = None, dense_optimizer: DenseOptimizer = adam,
          groups: Groups | None = None, seed: int = 0,
          ssd_dir: str | None = None) -> tuple[ShardedModel, ShardedOptimizer]:
    """Shards every `EmbeddingBagCollection` of a model and makes its optimiser.

    Args:
        model: any nn.Module; its collections are replaced in place.
        plan: where tables go, and in how many groups of ranks; None lays them out here by
            `simple_plan`.
        optimizer: of the tables; None: `RowWiseAdagrad(lr=0.05)`.
        dense_optimizer: makes the optimiser of all other parameters.
        groups: the ranks; None takes the initialised process group, or a world of one.
        seed: of the tables' initial weights and of rounding; the same on all ranks.
        ssd_dir: folder for tables on disk; every rank makes one of its own in it.

    Returns:
        The model to call, and the one optimiser to step.

    Raises:
        ShardLabError: the model holds no collection.
        PlanError: the plan does not fit the tables or the world size.
    """
    rows = optimizer or RowWiseAdagrad(lr=0.05)
    groups = groups or build_groups()
    found = {name: child for name, child in model.named_modules()
             if isinstance(child, EmbeddingBagCollection)}
    if not found:
        raise ShardLabError("shard: the model holds no EmbeddingBagCollection; "
                            "build one with shardlab.EmbeddingBagCollection(tables)")
    everything = [table for child in found.values() for table in child.tables]
    if plan is None:
        plan = simple_plan(everything, groups)
    else:
        plan.check(everything, groups.world_size)
    replication = None
    table_groups = groups
    if plan.replicas > 1:
        split = split_replicas(groups, plan.replicas)
        replication, table_groups = Replication(split, plan.sync_every_steps), split.tables
    collections = []
    clock = PhaseClock(groups.device)
    for name, child in found.items():
        names = {table.name for table in child.tables}
        part = ShardingPlan(plan.world_size, tuple(t for t in plan.tables if t.table in names))
        sharded = ShardedEmbeddingBagCollection(child.tables, part, table_groups, rows.kind, seed,
                                                clock, ssd_dir)
        if replication is not None:
            sharded.replicate(replication)
        collections.append(sharded)
        model = _replace(model, name, sharded)
    model.to(groups.device)
    parameters = [p for p in model.parameters() if p.requires_grad]
    dense = dense_optimizer(parameters) if parameters else None
    sharded_model = ShardedModel(model, groups, plan.dense_wire, seed)
    return sharded_model, ShardedOptimizer(collections, rows, dense, groups, sharded_model.reducer)


def _replace(model: nn.Module, name: str, child: nn.Module) -> nn.Module:
    """Puts ``child`` at the path ``name``; returns the root, which is the child at path ""."""
    if not name:
        return child
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, child)
    return model


#: A table below this many fp32 elements is replicated by `simple_plan`: 64 KiB.
_TINY_ELEMENTS = 1 << 14


def simple_plan(tables: list[EmbeddingBagConfig], groups: Groups, replicas: int = 1,
                sync_every_steps: int = 1) -> ShardingPlan:
    """A plan without a planner: tiny tables everywhere, large ones by row, others balanced.

    A table with more elements than a rank's fair share is cut by rows; the rest go whole to the
    rank that holds least, largest first. The first type of ``table.sharding`` overrules.
    `shardlab.planner` knows machines and costs; this knows only sizes.

    Args:
        tables: the tables.
        groups: the ranks.
        replicas: groups of ranks that each hold all tables.
        sync_every_steps: as in `ShardingPlan`.

    Raises:
        PlanError: two tables share a name, in different collections.
        ConfigError: the ranks do not divide into so many groups.
    """
    if len({table.name for table in tables}) != len(tables):
        raise PlanError("tables of different collections share a name; plans need unique names")
    world = ranks_of_a_group(groups.world_size, replicas)
    local = min(groups.local_world_size, world)
    ranks = list(range(world))
    fair = sum(t.num_embeddings * t.embedding_dim for t in tables) / world
    load = [0] * world
    plans = {}
    for table in sorted(tables, key=lambda t: (-t.num_embeddings * t.embedding_dim, t.name)):
        kind = next(iter(table.allowed_sharding), None) or _simple_kind(table, fair, world)
        least = min(ranks, key=lambda r: load[r])
        first = least // local * local
        host = [r for r in range(first, first + local) if r < world]
        where = {ShardingType.TABLE_WISE: [least], ShardingType.TABLE_ROW_WISE: host,
                 ShardingType.TABLE_COLUMN_WISE: host[:table.embedding_dim],
                 ShardingType.COLUMN_WISE: ranks[:table.embedding_dim]}.get(kind, ranks)
        plans[table.name] = build_table_plan(table, kind, where)
        for entry in plans[table.name].shards:
            load[entry.rank] += entry.rows * entry.columns
    plan = ShardingPlan(world, tuple(plans[table.name] for table in tables))
    return plan.with_replicas(replicas, sync_every_steps)


def _simple_kind(table: EmbeddingBagConfig, fair: float, world: int) -> ShardingType:
    size = table.num_embeddings * table.embedding_dim
    # Ranks would have to agree on which chunks of a copy are there.
    if size <= _TINY_ELEMENTS and not isinstance(table.storage, PrunedSpec):
        return ShardingType.DATA_PARALLEL
    return ShardingType.ROW_WISE if world > 1 and size > fair else ShardingType.TABLE_WISE
