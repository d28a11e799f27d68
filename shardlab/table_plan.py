"""Where one table goes: its shards, how they are held, and how its rows travel.

A shard is a rectangle, rows [row_start, row_end) x columns [col_start, col_end), on one rank.
Every sharding type is only another set of rectangles; `build_table_plan` makes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from shardlab.errors import PlanError
from shardlab.specs import EmbeddingBagConfig, ExchangeKind, ShardingType
from shardlab.storage_bytes import TierBytes
from shardlab.storage_specs import (
    Choice,
    LevelSpec,
    RowsSpec,
    StorageSpec,
    Tier,
    cut_units,
    place_home,
    resolve_storage,
)


@dataclass(frozen=True)
class Shard:
    """One rectangle of a table on one rank.

    Attributes:
        bytes: predicted by the planner, optimiser state included; zero where nobody predicted.
        ms: predicted milliseconds of a step on its rank.
    """

    rank: int
    row_start: int
    row_end: int
    col_start: int
    col_end: int
    bytes: TierBytes = field(default_factory=TierBytes)
    ms: float = 0.0

    @property
    def rows(self) -> int:
        return self.row_end - self.row_start

    @property
    def columns(self) -> int:
        return self.col_end - self.col_start


@dataclass(frozen=True)
class WireDtypes:
    """How a table's rows and gradients travel.

    Attributes:
        forward: codec of rows, a key of `storage_specs.DTYPES`.
        backward: codec of gradients.
        rounding: of gradients, ``stochastic`` or ``nearest``; rows are rounded to nearest.
        error_feedback: every rank keeps what rounding took from its gradients, 4 bytes an element
            of the table, and adds it to the row's next gradient; for unique rows only.
    """

    forward: str = "fp32"
    backward: str = "fp32"
    rounding: str = "stochastic"
    error_feedback: bool = False


@dataclass(frozen=True)
class DenseWire:
    """How gradients of the dense part travel.

    Attributes:
        codec: a key of `storage_specs.DTYPES`; ``fp32``: as they are.
        rounding: ``stochastic`` or ``nearest``.
    """

    codec: str = "fp32"
    rounding: str = "stochastic"


@dataclass(frozen=True)
class TablePlan:
    """Where one table goes. A ``data_parallel`` table has one whole-table shard per rank.

    Attributes:
        storage: how every shard is held; every level names its tier.
        hot_rows: ascending; of these every rank holds a copy besides, and reads that one.
    """

    table: str
    sharding: ShardingType
    exchange: ExchangeKind
    shards: tuple[Shard, ...]
    storage: StorageSpec = field(default_factory=lambda: RowsSpec((LevelSpec(tier=Tier.HBM),)))
    wire: WireDtypes = field(default_factory=WireDtypes)
    hot_rows: tuple[int, ...] = ()

    @property
    def replicated(self) -> bool:
        return self.sharding is ShardingType.DATA_PARALLEL


def even_splits(size: int, parts: int, unit: int = 1) -> list[tuple[int, int]]:
    """[start, end) of up to ``parts`` nearly equal, non-empty pieces of range(size).

    Args:
        size: end of the last piece.
        parts: pieces wanted.
        unit: pieces begin at multiples of it.
    """
    units = -(-size // unit)
    parts = max(1, min(parts, units))
    bounds = [min(size, unit * (units * i // parts)) for i in range(parts + 1)]
    return list(pairwise(bounds))


def build_table_plan(table: EmbeddingBagConfig, sharding: ShardingType, ranks: Sequence[int], *,
                     columns: int = 1, exchange: ExchangeKind | None = None,
                     storage: StorageSpec | None = None) -> TablePlan:
    """Lays one table over ranks.

    Args:
        table: the table.
        sharding: how to cut it.
        ranks: ``table_wise``: one rank. ``row_wise`` / ``table_row_wise``: one row block each
            (the ranks of one host for the latter). ``column_wise`` / ``table_column_wise``: one
            column block each. ``grid_shard``: ``columns`` consecutive groups of ranks, each
            group holding one column block cut by rows. ``data_parallel``: every rank.
        columns: column blocks of a ``grid_shard``.
        exchange: what crosses the wire; None takes the table's own choice.
        storage: how the shards are held; None takes the table's own. Levels that name no tier
            lie on hbm.

    Raises:
        PlanError: more column blocks than columns, ranks that do not divide into groups, or a
            storage that is still a choice.
    """
    rows, dim = table.num_embeddings, table.embedding_dim
    ranks = list(ranks)
    where = f"table {table.name!r}, {sharding.value}"
    held = resolve_storage(storage or table.storage, rows, dim)
    if isinstance(held, Choice):
        raise PlanError(f"{where}: the table's storage is still a choice of "
                        f"{len(held.options)}; let the planner choose, or name one")
    if not ranks or (sharding is ShardingType.TABLE_WISE and len(ranks) != 1):
        raise PlanError(f"{where}: wrong number of ranks: {ranks}")
    by_row = {ShardingType.ROW_WISE, ShardingType.TABLE_ROW_WISE}
    by_column = {ShardingType.COLUMN_WISE, ShardingType.TABLE_COLUMN_WISE}
    if sharding in by_row:
        groups = [ranks]
    elif sharding in by_column:
        groups = [[rank] for rank in ranks]
    elif sharding is ShardingType.GRID_SHARD:
        if columns < 1 or len(ranks) % columns:
            raise PlanError(f"{where}: {len(ranks)} ranks do not divide into {columns} groups")
        size = len(ranks) // columns
        groups = [ranks[i:i + size] for i in range(0, len(ranks), size)]
    else:
        groups = [[rank] for rank in ranks]
    if sharding is ShardingType.DATA_PARALLEL:
        shards = [Shard(rank, 0, rows, 0, dim) for rank in ranks]
    else:
        if len(groups) > dim:
            raise PlanError(f"{where}: {len(groups)} column blocks asked, "
                            f"the table has {dim} columns")
        row_unit, column_unit = cut_units(held, rows, dim)
        spans = even_splits(dim, len(groups), column_unit)
        shards = [Shard(rank, *block, *span)
                  for group, span in zip(groups, spans, strict=False)
                  for rank, block in zip(group, even_splits(rows, len(group), row_unit),
                                         strict=False)]
    return TablePlan(table.name, sharding, exchange or table.exchange, tuple(shards),
                     place_home(held, Tier.HBM))
