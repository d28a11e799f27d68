"""Every way to cut a table, its constraints honoured.

Where every rank talks to every owner, as in "ids out, rows back", it does not matter on which
host a shard lies. The types that tie a table to a host (table_row_wise, table_column_wise,
grid_shard) therefore cost what the same cut costs untied, and only take freedom away: they are
tried for the tables that allow them by name. Only grid_shard cuts finer than any other type: it is
also tried where a table has no column block left for every rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from shardlab.planner.topology import Topology
from shardlab.specs import EmbeddingBagConfig, ExchangeKind, ShardingType
from shardlab.storage_specs import (
    Choice,
    PrunedSpec,
    StorageRequest,
    TensorTrainSpec,
    cut_units,
)

#: Narrowest column block that is cut without being asked for: one 64-byte cache line of fp32.
MIN_COLUMNS = 16

#: Largest table, in fp32 bytes, that is copied to every rank without being asked for: a copy that
#: stays in a core's second-level cache. The times of larger copies are close to those of other
#: cuts in the model, closer than it is accurate, and they would multiply memory.
MAX_COPIED_BYTES = 2 << 20
_FP32_BYTES = 4


@dataclass(frozen=True)
class Cut:
    """One way to cut a table.

    Attributes:
        sharding: the type.
        row_parts: row blocks.
        col_parts: column blocks.
        group: this many consecutive pieces must lie on ranks of one host; 0: anywhere.
    """

    sharding: ShardingType
    row_parts: int
    col_parts: int
    group: int = 0


def _parts(limit: int) -> list[int]:
    """Numbers of blocks to try: 2 to 8, powers of two, and ``limit`` itself."""
    powers = [1 << bit for bit in range(1, max(limit, 1).bit_length())]
    return sorted({part for part in [*range(2, 9), *powers, limit] if 2 <= part <= limit})


@dataclass(frozen=True)
class Shape:
    """All that the cuts of a table depend on, so that equal tables share them.

    Attributes:
        rows: pieces that the rows can be cut into, at most as many as there are ranks for it.
        columns: columns.
        unit: columns of a block must be a multiple of it.
        splits: most column blocks.
        ranks: ranks that may hold a part.
        kinds: sharding types asked for; empty: any.
        copied: a copy on every rank may be tried.
    """

    rows: int
    columns: int
    unit: int
    splits: int
    ranks: int
    kinds: tuple[ShardingType, ...]
    copied: bool

    def column_parts(self, most: int, narrowest: int) -> list[int]:
        """Numbers of column blocks: equal blocks only, unless there is no such way."""
        limit = min(most, self.splits, self.columns // max(narrowest, self.unit))
        parts = _parts(limit)
        equal = [part for part in parts if self.columns % (part * self.unit) == 0]
        return equal or (parts if self.unit == 1 else [])


def _grid_cuts(shape: Shape, topology: Topology, narrowest: int) -> Iterator[Cut]:
    """Column blocks, each cut by rows over ranks of one host."""
    size = min(topology.ranks_per_host, shape.rows, shape.ranks)
    for row_parts in [1, *_parts(size)]:
        groups = topology.hosts * (topology.ranks_per_host // row_parts)
        for col_parts in [1, *shape.column_parts(min(groups, shape.ranks), narrowest)]:
            yield Cut(ShardingType.GRID_SHARD, row_parts, col_parts, group=row_parts)


def _asked_cuts(kind: ShardingType, shape: Shape, topology: Topology) -> list[Cut]:
    """The cuts of a type that the table asks for; one block where nothing can be cut."""
    host = min(topology.ranks_per_host, shape.ranks)
    if kind is ShardingType.ROW_WISE:
        cuts = [Cut(kind, parts, 1) for parts in _parts(shape.rows)]
    elif kind is ShardingType.COLUMN_WISE:
        cuts = [Cut(kind, 1, parts) for parts in shape.column_parts(shape.ranks, 1)]
    elif kind is ShardingType.TABLE_ROW_WISE:
        parts = min(host, shape.rows)
        cuts = [Cut(kind, parts, 1, group=parts)]
    elif kind is ShardingType.TABLE_COLUMN_WISE:
        cuts = [Cut(kind, 1, parts, group=parts) for parts in shape.column_parts(host, 1)]
    elif kind is ShardingType.GRID_SHARD:
        every = list(_grid_cuts(shape, topology, 1))
        cuts = [cut for cut in every if cut.row_parts > 1 and cut.col_parts > 1] or every
    else:
        cuts = [Cut(kind, 1, 1)]
    return cuts or [Cut(kind, 1, 1)]


def _free_cuts(shape: Shape, topology: Topology) -> list[Cut]:
    """The cuts of a table that asks for no type."""
    cuts = [Cut(ShardingType.TABLE_WISE, 1, 1)]
    if shape.ranks == 1:
        return cuts
    cuts += [Cut(ShardingType.ROW_WISE, parts, 1) for parts in _parts(shape.rows)]
    blocks = shape.column_parts(shape.ranks, MIN_COLUMNS)
    cuts += [Cut(ShardingType.COLUMN_WISE, 1, parts) for parts in blocks]
    if blocks and topology.hosts > 1 and blocks[-1] < shape.ranks == topology.world_size:
        cuts += [cut for cut in _grid_cuts(shape, topology, MIN_COLUMNS)
                 if cut.row_parts > 1 and cut.col_parts == blocks[-1]]
    if shape.copied:
        cuts.append(Cut(ShardingType.DATA_PARALLEL, 1, 1))
    return cuts


def shape_of(table: EmbeddingBagConfig, topology: Topology, request: StorageRequest) -> Shape:
    """What the cuts of a table depend on."""
    ranks = len(table.ranks) or topology.world_size
    everywhere = ranks == topology.world_size
    elements = table.num_embeddings * table.embedding_dim
    if isinstance(request, TensorTrainSpec):
        elements = request.piece_shape(table.num_embeddings, table.embedding_dim).parameters
    small = elements * _FP32_BYTES <= MAX_COPIED_BYTES
    kinds = tuple(kind for kind in table.allowed_sharding
                  if everywhere or kind is not ShardingType.DATA_PARALLEL)
    row_unit, column_unit = cut_units(request, table.num_embeddings, table.embedding_dim)
    return Shape(rows=min(-(-table.num_embeddings // row_unit), ranks),
                  columns=table.embedding_dim, unit=column_unit,
                  splits=table.max_column_splits or table.embedding_dim, ranks=ranks, kinds=kinds,
                  copied=small and everywhere and not _prunes(request)
                  and table.exchange is not ExchangeKind.POOLED)


def _prunes(request: StorageRequest) -> bool:
    """Ranks would have to agree on which chunks of a copy are there."""
    options = request.options if isinstance(request, Choice) else (request,)
    return any(isinstance(spec, PrunedSpec) for spec in options)


def table_cuts(table: EmbeddingBagConfig, topology: Topology) -> list[Cut]:
    """The cuts of one table."""
    return cuts_of(shape_of(table, topology, table.storage), topology)


def cuts_of(shape: Shape, topology: Topology) -> list[Cut]:
    """The cuts of every table of this shape."""
    if not shape.kinds:
        return _free_cuts(shape, topology)
    return [cut for kind in shape.kinds for cut in _asked_cuts(kind, shape, topology)]
