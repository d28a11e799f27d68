"""Every way to cut each table that the search may choose from, as flat arrays.

An *option* is one table under one sharding type with a number of row and column blocks; a
*piece* is one rectangle of an option, not yet on a rank. Pieces stand in the order in which
`shardlab.plan.build_table_plan` makes the shards, so a list of ranks turns one into the other.

Where every rank talks to every owner, as in "ids out, rows back", it does not matter on which
host a shard lies. The types that tie a table to a host (table_row_wise, table_column_wise,
grid_shard) therefore cost what row_wise and column_wise cost and only take freedom away: they
are enumerated for the tables that ask for them, and for no other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shardlab.planner.topology import Topology
from shardlab.planner.workload import Workload
from shardlab.specs import EmbeddingBagConfig, ExchangeKind, ShardingType

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

#: Narrowest column block that is cut without being asked for: one 64-byte cache line of fp32.
MIN_COLUMNS = 16

#: Largest table, in fp32 bytes, that is copied to every rank without being asked for: a copy that
#: stays in a core's second-level cache. The times of larger copies are close to those of other
#: cuts in the model, closer than it is accurate, and they would multiply memory.
MAX_COPIED_BYTES = 2 << 20


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


@dataclass(frozen=True)
class Options:
    """All options of all tables; O options, P pieces, T tables.

    Attributes:
        cuts: O cuts, those of a table side by side.
        table: [O] index of the table.
        first: [T + 1] first option of each table.
        pooled: [O] bags are pooled at the owner; otherwise unique rows are exchanged.
        start: [O + 1] first piece of each option.
        option: [P] the option of each piece.
        rows: [P] rows of each piece.
        columns: [P] columns of each piece.
    """

    cuts: tuple[Cut, ...]
    table: Ints
    first: Ints
    pooled: Bools
    start: Ints
    option: Ints
    rows: Ints
    columns: Ints

    def of_table(self, table: int) -> range:
        """The options of a table."""
        return range(int(self.first[table]), int(self.first[table + 1]))

    def pieces(self, option: int) -> slice:
        """The pieces of an option."""
        return slice(int(self.start[option]), int(self.start[option + 1]))


def _parts(limit: int) -> list[int]:
    """Numbers of blocks to try: 2 to 8, powers of two, and ``limit`` itself."""
    powers = [1 << bit for bit in range(1, max(limit, 1).bit_length())]
    return sorted({part for part in [*range(2, 9), *powers, limit] if 2 <= part <= limit})


def _row_cuts(table: EmbeddingBagConfig, topology: Topology) -> Iterator[Cut]:
    most = min(topology.world_size, table.num_embeddings)
    for parts in _parts(most):
        yield Cut(ShardingType.ROW_WISE, parts, 1)


def _column_parts(table: EmbeddingBagConfig, most: int, narrowest: int) -> list[int]:
    """Numbers of column blocks: equal blocks only, unless there is no such way."""
    parts = _parts(min(most, table.embedding_dim // narrowest))
    return [part for part in parts if table.embedding_dim % part == 0] or parts


def _grid_cuts(table: EmbeddingBagConfig, topology: Topology) -> Iterator[Cut]:
    """Column blocks, each cut by rows over ranks of one host."""
    size = min(topology.ranks_per_host, table.num_embeddings)
    for row_parts in [1, *_parts(size)]:
        groups = topology.hosts * (topology.ranks_per_host // row_parts)
        for col_parts in [1, *_column_parts(table, groups, 1)]:
            yield Cut(ShardingType.GRID_SHARD, row_parts, col_parts, group=row_parts)


def _asked_cuts(table: EmbeddingBagConfig, topology: Topology) -> list[Cut]:
    """The cuts of the type that the table asks for; one block where nothing can be cut."""
    kind = table.sharding
    host = topology.ranks_per_host
    if kind is ShardingType.ROW_WISE:
        cuts = list(_row_cuts(table, topology))
    elif kind is ShardingType.COLUMN_WISE:
        cuts = [Cut(kind, 1, parts)
                for parts in _column_parts(table, topology.world_size, 1)]
    elif kind is ShardingType.TABLE_ROW_WISE:
        parts = min(host, table.num_embeddings)
        cuts = [Cut(kind, parts, 1, group=parts)]
    elif kind is ShardingType.TABLE_COLUMN_WISE:
        cuts = [Cut(kind, 1, parts, group=parts)
                for parts in _column_parts(table, host, 1)]
    elif kind is ShardingType.GRID_SHARD:
        every = list(_grid_cuts(table, topology))
        cuts = [cut for cut in every if cut.row_parts > 1 and cut.col_parts > 1] or every
    else:
        assert kind is not None
        cuts = [Cut(kind, 1, 1)]
    return cuts or [Cut(kind, 1, 1)]


def table_cuts(table: EmbeddingBagConfig, topology: Topology) -> list[Cut]:
    """The cuts of one table, its ``sharding`` constraint honoured."""
    if table.sharding is not None:
        return _asked_cuts(table, topology)
    cuts = [Cut(ShardingType.TABLE_WISE, 1, 1)]
    if topology.world_size > 1:
        cuts += _row_cuts(table, topology)
        cuts += [Cut(ShardingType.COLUMN_WISE, 1, parts)
                 for parts in _column_parts(table, topology.world_size, MIN_COLUMNS)]
        small = table.num_embeddings * table.embedding_dim * 4 <= MAX_COPIED_BYTES
        if small and table.exchange is not ExchangeKind.POOLED:
            cuts.append(Cut(ShardingType.DATA_PARALLEL, 1, 1))
    return cuts


def _pooled(tables: Sequence[EmbeddingBagConfig], work: Workload, cuts: Sequence[Cut],
            table: Ints, world_size: int) -> Bools:
    """[O] resolves ``exchange: auto``: the kind that puts fewer bytes on the wire.

    Per source, with u unique ids of F features, n ids and B bags of a feature, c column and k row
    blocks, D columns:

        rows:   4 u c + 8 u D                      ids; rows there and gradients back
        pooled: F (c (4 n + 4 B k) + 8 B k D)      ids and bag lengths; bags of every row block

    A data_parallel table sends nothing but gradients of unique rows, whatever it asks for. On one
    rank nothing is sent, and pooling at the owner saves the copy.
    """
    asked = [tables[index].exchange for index in table]
    row_parts = np.array([cut.row_parts for cut in cuts])
    col_parts = np.array([cut.col_parts for cut in cuts])
    unique, ids, bags, columns = (array[table] for array in
                                  (work.unique, work.ids, work.bags, work.columns))
    by_rows = 4 * unique * col_parts + 8 * unique * columns
    by_bags = work.features[table] * (
        4 * col_parts * (ids + bags * row_parts) + 8 * bags * row_parts * columns)
    copied = np.array([cut.sharding is ShardingType.DATA_PARALLEL for cut in cuts])
    fewer = ((by_bags < by_rows) & ~copied) | (world_size == 1)
    wanted = np.array([kind is ExchangeKind.POOLED for kind in asked]) & \
        (~copied | (world_size == 1))
    return np.where([kind is ExchangeKind.AUTO for kind in asked], fewer, wanted)


def enumerate_options(tables: Sequence[EmbeddingBagConfig], topology: Topology,
                      work: Workload) -> Options:
    """All options of all tables."""
    per_table = [table_cuts(table, topology) for table in tables]
    cuts = tuple(cut for cuts in per_table for cut in cuts)
    counts = np.array([len(cuts) for cuts in per_table])
    table = np.repeat(np.arange(len(tables)), counts)
    world = topology.world_size
    copies = np.array([world if cut.sharding is ShardingType.DATA_PARALLEL else 1 for cut in cuts])
    row_parts = np.array([cut.row_parts for cut in cuts])
    col_parts = np.array([cut.col_parts for cut in cuts])
    pieces = row_parts * col_parts * copies
    start = np.concatenate([[0], np.cumsum(pieces)])
    option = np.repeat(np.arange(len(cuts)), pieces)
    inside = np.arange(start[-1]) - start[option]
    rows = work.rows.astype(np.int64)[table][option]
    columns = work.columns.astype(np.int64)[table][option]
    # data_parallel: every copy is block 0 of 1. The others run through the row blocks of the
    # first column block, then of the second, as build_table_plan does.
    row_block = inside % row_parts[option]
    col_block = np.where(copies[option] > 1, 0, inside // row_parts[option])
    return Options(
        cuts=cuts, table=table, first=np.concatenate([[0], np.cumsum(counts)]),
        pooled=_pooled(tables, work, cuts, table, world), start=start, option=option,
        rows=_even(rows, row_block, row_parts[option]),
        columns=_even(columns, col_block, col_parts[option]))


def _even(size: Ints, block: Ints, parts: Ints) -> Ints:
    """Length of a block of `shardlab.plan.even_splits`."""
    return size * (block + 1) // parts - size * block // parts
