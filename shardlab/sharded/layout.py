"""A plan compiled for one rank: which slot of which rank serves which ids, and where output goes.

A *slot* is one stream of ids to one shard: for a table exchanged as ``rows`` the unique ids of all
its features that fall into the shard's rows, for ``pooled`` the bags of one feature. A *group* is
what several slots share: column shards of the same rows get the same ids.

A table with hot rows is laid out with K more rows in front, the hot ones, which every rank holds;
the row blocks of the plan follow, K rows further down. A hot id is renumbered to one of the first K
(`hot_ids`), and so is read at home; K rows that nobody asks for any more stay behind.

On every rank slots are ordered: all ranks but this one ascending, then this one. What stays here
then lies behind what travels, in every buffer, and is never copied by a collective.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from shardlab.errors import PlanError
from shardlab.plan import ShardingPlan
from shardlab.specs import EmbeddingBagConfig, ExchangeKind
from shardlab.storage import LocalShard
from shardlab.storage_specs import Choice, StorageSpec, resolve_storage
from shardlab.table_plan import Shard, TablePlan, WireDtypes
from shardlab.wire_bytes import id_bytes


@dataclass(frozen=True)
class Slot:
    """One stream of ids from this rank to one shard.

    Attributes:
        rank: owner.
        block: number of the shard among the owner's shards.
        table: number of the table.
        feature: number of the feature, -1 for all features of the table (``rows`` exchange).
        shard: the rectangle.
        group: number of the group whose ids it gets.
        chunk: which column piece of the table this is, counted among the group's slots.
        read: whether rows come back (replicas elsewhere only get gradients).
        hot: of copies of hot rows: ids go to this rank's own copy alone, and gradients are added up
            over the ranks by `hot_rows`.
    """

    rank: int
    block: int
    table: int
    feature: int
    shard: Shard
    group: int
    chunk: int
    read: bool
    hot: bool = False

    @property
    def id_bytes(self) -> int:
        """Bytes of an id on the wire."""
        return id_bytes(self.shard.rows)


@dataclass(frozen=True)
class Group:
    """Ids of one row block of a table (``rows``) or of a feature (``pooled``)."""

    table: int
    feature: int
    row_start: int
    row_end: int


@dataclass(frozen=True)
class Layout:
    """Everything about a plan that does not change from step to step, seen from one rank.

    Rows of groups and slots count from the first hot row, those of ``local_shards`` and ``plans``
    from the table's first.
    """

    rank: int
    world_size: int
    tables: tuple[EmbeddingBagConfig, ...]
    features: tuple[str, ...]
    feature_table: tuple[int, ...]
    feature_columns: tuple[int, ...]  # first output column of every feature
    total_columns: int
    kinds: tuple[ExchangeKind, ...]  # per table: rows or pooled
    local_shards: tuple[LocalShard, ...]
    groups: tuple[Group, ...]  # first all of the rows exchange, then all of the pooled
    slots: tuple[Slot, ...]  # over all ranks, this one last
    plans: tuple[TablePlan, ...]  # in the order of the tables
    wires: tuple[WireDtypes, ...]  # per table
    hot_rows: tuple[tuple[int, ...], ...]  # per table, ascending

    @property
    def num_homes(self) -> int:
        """How many of the local shards are no copies of hot rows; they come first."""
        return sum(not local.table_rows for local in self.local_shards)

    @property
    def peers(self) -> list[int]:
        """All ranks in slot order."""
        return [r for r in range(self.world_size) if r != self.rank] + [self.rank]

    def slots_of(self, rank: int) -> list[Slot]:
        """A rank's slots, in order."""
        return [slot for slot in self.slots if slot.rank == rank]

    def tables_of(self, kind: ExchangeKind) -> list[int]:
        """Numbers of the tables exchanged this way."""
        return [t for t, found in enumerate(self.kinds) if found is kind]

    def first_column(self, slot: Slot) -> int:
        """First output column of a pooled slot."""
        return self.feature_columns[slot.feature] + slot.shard.col_start

    def features_of(self, table: int) -> list[int]:
        """Numbers of the features that read a table; they are consecutive."""
        return [f for f, owner in enumerate(self.feature_table) if owner == table]


def compile_layout(tables: tuple[EmbeddingBagConfig, ...], plan: ShardingPlan,
                   rank: int) -> Layout:
    """Compiles a plan for one rank.

    Raises:
        PlanError: the plan does not cover the tables on its world size.
    """
    plan.check(tables, plan.world_size)
    placed = {entry.table: entry for entry in plan.tables}
    plans = [placed[table.name] if plan.world_size > 1 else
             replace(placed[table.name], hot_rows=()) for table in tables]
    spread = [_with_copies(entry, table, plan.world_size)
              for entry, table in zip(plans, tables, strict=True)]
    features = [(name, t) for t, table in enumerate(tables) for name in table.feature_names]
    widths = [tables[t].embedding_dim for _, t in features]
    columns = torch.tensor([0, *widths]).cumsum(0).tolist()
    kinds = tuple(_kind(entry, plan.world_size) for entry in plans)
    groups = _build_groups(kinds, spread, [t for _, t in features])
    owned = {r: _owned(spread, r) for r in range(plan.world_size)}
    order = [r for r in range(plan.world_size) if r != rank] + [rank]
    slots = [slot for r in order for slot in _slots(r, rank, owned[r], groups, spread)]
    # In a world of one nothing travels, so nothing is encoded.
    wires = [entry.wire if plan.world_size > 1 else WireDtypes() for entry in plans]
    return Layout(
        rank=rank, world_size=plan.world_size, tables=tables,
        features=tuple(name for name, _ in features),
        feature_table=tuple(t for _, t in features), feature_columns=tuple(columns[:-1]),
        total_columns=columns[-1], kinds=kinds,
        local_shards=tuple(_local_shard(tables[t], plans[t], shard) for t, shard in owned[rank]),
        groups=groups, slots=tuple(slots), plans=tuple(plans), wires=tuple(wires),
        hot_rows=tuple(entry.hot_rows for entry in plans))


def _with_copies(plan: TablePlan, table: EmbeddingBagConfig, world_size: int) -> TablePlan:
    """A table with its hot rows in front, a copy on every rank."""
    count = len(plan.hot_rows)
    if not count:
        return plan
    copies = [Shard(rank, 0, count, 0, table.embedding_dim) for rank in range(world_size)]
    homes = [replace(shard, row_start=shard.row_start + count, row_end=shard.row_end + count)
             for shard in plan.shards]
    return replace(plan, shards=(*copies, *homes))


def _is_copy(plan: TablePlan, shard: Shard) -> bool:
    return shard.row_end <= len(plan.hot_rows)


def _local_shard(table: EmbeddingBagConfig, plan: TablePlan, shard: Shard) -> LocalShard:
    storage, count = _storage(plan, table), len(plan.hot_rows)
    if _is_copy(plan, shard):
        return LocalShard(table, shard, storage, replicated=True, table_rows=plan.hot_rows)
    shard = replace(shard, row_start=shard.row_start - count, row_end=shard.row_end - count)
    return LocalShard(table, shard, storage, plan.replicated)


def _storage(plan: TablePlan, table: EmbeddingBagConfig) -> StorageSpec:
    """A plan's storage with all that follows from its table's size."""
    storage = resolve_storage(plan.storage, table.num_embeddings, table.embedding_dim)
    assert not isinstance(storage, Choice)
    return storage


def _kind(plan: TablePlan, world_size: int) -> ExchangeKind:
    """What crosses the wire for a table, where the plan leaves it open or it has no choice."""
    if (plan.replicated or plan.hot_rows) and world_size > 1:
        return ExchangeKind.ROWS  # replicas need every gradient row, bags would be more
    if plan.exchange is not ExchangeKind.AUTO:
        return plan.exchange
    return ExchangeKind.POOLED if world_size == 1 else ExchangeKind.ROWS


def _owned(plans: list[TablePlan], rank: int) -> list[tuple[int, Shard]]:
    """(table, shard) on a rank, in the order of its blocks: one kind of storage after another, then
    copies of hot rows."""
    found = [(t, shard) for t, plan in enumerate(plans) for shard in plan.shards
             if shard.rank == rank]
    return sorted(found, key=lambda pair: (_is_copy(plans[pair[0]], pair[1]),
                                           type(plans[pair[0]].storage).__name__, pair[0],
                                           pair[1].row_start, pair[1].col_start))


def _row_blocks(plan: TablePlan) -> list[tuple[int, int]]:
    """Distinct row ranges at a finest common cut, ascending.

    Column blocks of a grid may cut rows differently: the union of all cuts serves them all.

    Raises:
        PlanError: row blocks whose columns are cut differently, which would need a pooling pass
            per row block.
    """
    columns: dict[tuple[int, int], set[tuple[int, int]]] = {}
    for shard in plan.shards:
        columns.setdefault((shard.row_start, shard.row_end), set()).add(
            (shard.col_start, shard.col_end))
    if len({frozenset(cut) for cut in columns.values()}) > 1:
        raise PlanError(f"table {plan.table!r}: every row block must be cut at the same columns; "
                        f"found {sorted(columns.items())}")
    cuts = sorted({edge for shard in plan.shards for edge in (shard.row_start, shard.row_end)})
    return list(pairwise(cuts))


def _build_groups(kinds: tuple[ExchangeKind, ...], plans: list[TablePlan],
                  feature_table: list[int]) -> tuple[Group, ...]:
    rows = [Group(t, -1, *block) for t, plan in enumerate(plans)
            if kinds[t] is ExchangeKind.ROWS for block in _row_blocks(plan)]
    pooled = [Group(t, f, *block) for f, t in enumerate(feature_table)
              if kinds[t] is ExchangeKind.POOLED for block in _row_blocks(plans[t])]
    return (*rows, *pooled)


def _slots(rank: int, me: int, owned: list[tuple[int, Shard]], groups: tuple[Group, ...],
           plans: list[TablePlan]) -> list[Slot]:
    slots = []
    for block, (table, shard) in enumerate(owned):
        plan = plans[table]
        lefts = sorted({other.col_start for other in plan.shards})
        for number, group in enumerate(groups):
            inside = shard.row_start <= group.row_start and group.row_end <= shard.row_end
            if group.table == table and inside:
                copy = _is_copy(plan, shard)
                slots.append(Slot(rank, block, table, group.feature, shard, number,
                                  lefts.index(shard.col_start), hot=copy,
                                  read=rank == me or not (copy or plan.replicated)))
    return slots


def bag_slots(layout: Layout) -> list[tuple[int, Slot]]:
    """(number, slot) of the pooled slots by feature and columns, within these by row."""
    slots = [(i, slot) for i, slot in enumerate(layout.slots) if slot.feature >= 0]
    return sorted(slots, key=lambda pair: (pair[1].feature, pair[1].shard.col_start,
                                           layout.groups[pair[1].group].row_start))


def column(values: Sequence[Any]) -> Tensor:
    """int64 tensor of a list, also when it is empty."""
    return torch.tensor(values, dtype=torch.int64)
