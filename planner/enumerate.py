"""Every way to cut and to hold each table that the search may choose from, as flat arrays.

An *option* is one table under one sharding type with a number of row and column blocks, one
exchange and one storage; its *pieces* are the rectangles, not yet on ranks, in the order in which
`shardlab.plan.build_table_plan` makes the shards: row block after row block of the first column
block, then of the second.

Which cuts there are says `cuts`, which storages `variants`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from shardlab.errors import ConfigError
from shardlab.planner.cuts import Cut, Shape, cuts_of, shape_of
from shardlab.planner.topology import Topology
from shardlab.planner.variants import Variant, storage_variants
from shardlab.specs import EmbeddingBagConfig, ExchangeKind, ShardingType
from shardlab.storage_specs import (
    Choice,
    PrunedSpec,
    StorageRequest,
    StorageSpec,
    Tier,
    cut_units,
    home_tier,
    resolve_storage,
)

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

_FP32_BYTES = 4

SHARDING_TYPES = list(ShardingType)
_CODE = {kind: code for code, kind in enumerate(SHARDING_TYPES)}
_COPIED = _CODE[ShardingType.DATA_PARALLEL]


@dataclass(frozen=True)
class Options:
    """O options of T tables; the options of a table stand side by side.

    Attributes:
        variants: storages that options refer to.
        first: [T + 1] first option of each table.
        table: [O] index of the table.
        sharding: [O] index into `SHARDING_TYPES`.
        row_parts: [O] row blocks.
        col_parts: [O] column blocks.
        pieces: [O] rectangles; a copy on every rank for data_parallel.
        group: [O] as in `Cut`.
        pooled: [O] bags are pooled at the owner; otherwise unique rows are exchanged.
        variant: [O] index into ``variants``.
        rows: [O] rows of the largest piece.
        columns: [O] columns of the widest piece.
    """

    variants: tuple[Variant, ...]
    first: Ints
    table: Ints
    sharding: Ints
    row_parts: Ints
    col_parts: Ints
    pieces: Ints
    group: Ints
    pooled: Bools
    variant: Ints
    rows: Ints
    columns: Ints

    def __len__(self) -> int:
        return len(self.table)

    @property
    def copied(self) -> Bools:
        """[O] every rank holds the whole table."""
        return np.asarray(self.sharding == _COPIED)

    @cached_property
    def preference(self) -> Ints:
        """[O] place of the storage in the user's order of preference."""
        return np.array([entry.preference for entry in self.variants], dtype=np.int64)[self.variant]

    def of_table(self, table: int) -> range:
        """The options of a table."""
        return range(int(self.first[table]), int(self.first[table + 1]))

    def cut(self, option: int) -> Cut:
        """The cut of an option."""
        return Cut(SHARDING_TYPES[int(self.sharding[option])], int(self.row_parts[option]),
                   int(self.col_parts[option]), int(self.group[option]))

    def storage(self, option: int) -> StorageSpec:
        """The storage of an option."""
        return self.variants[int(self.variant[option])].spec

    def take(self, chosen: Ints) -> Options:
        """Only these options, ascending indices; every table must keep one."""
        counts = np.bincount(self.table[chosen], minlength=len(self.first) - 1)
        arrays = {name: getattr(self, name)[chosen] for name in _ARRAYS}
        return Options(variants=self.variants, first=_starts(counts), **arrays)


_ARRAYS = ("table", "sharding", "row_parts", "col_parts", "pieces", "group", "pooled", "variant",
           "rows", "columns")


def _starts(counts: Ints) -> Ints:
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


def _in_shares(request: StorageRequest, rows: int, columns: int) -> StorageRequest:
    """Budgets in bytes as shares of the table, so that they hold for parts of it too."""
    if isinstance(request, Choice):
        options = tuple(_in_shares(option, rows, columns) for option in request.options)
        return replace(request, options=options)  # type: ignore[arg-type]
    if isinstance(request, PrunedSpec) and request.bytes is not None:
        share = request.budget(rows, columns) / (rows * columns * _FP32_BYTES)
        return replace(request, ratio=share, bytes=None)
    return request


def _of_table(table: EmbeddingBagConfig) -> StorageRequest:
    """What a table asks for, as it holds for every part of it."""
    rows, columns = table.num_embeddings, table.embedding_dim
    try:
        return resolve_storage(_in_shares(table.storage, rows, columns), rows, columns)
    except ConfigError as error:
        raise ConfigError(f"table {table.name!r}: {error}") from None


def _largest(size: Ints, unit: Ints, parts: Ints) -> Ints:
    """The largest of so many pieces that begin at multiples of a unit."""
    units = -(-size // unit)
    return np.minimum(size, unit * -(-units // parts))


def _lies_on_hbm(spec: StorageSpec) -> bool:
    """Copies on every rank are worth it only in memory that is near."""
    return home_tier(spec) is Tier.HBM


class _Builder:
    """Makes the options of one table after another, and remembers what equal tables share."""

    def __init__(self, topology: Topology, tiers: tuple[Tier, ...]) -> None:
        self.topology, self.tiers = topology, tiers
        self.variants: dict[Variant, int] = {}
        self.known: dict[tuple[Shape, StorageRequest, ExchangeKind], Ints] = {}

    def columns_of(self, table: EmbeddingBagConfig) -> Ints:
        """[n, 6]: sharding, row_parts, col_parts, group, pooled, variant of every option."""
        request = _of_table(table)
        shape = shape_of(table, self.topology, request)
        key = shape, request, table.exchange
        if key not in self.known:
            self.known[key] = np.array(list(self._rows_of(*key)), dtype=np.int64)
        return self.known[key]

    def _rows_of(self, shape: Shape, request: StorageRequest,
                 exchange: ExchangeKind) -> Iterator[tuple[int, ...]]:
        variants = storage_variants(request, self.tiers, self.topology.device_host is not None)
        near = [variant for variant in variants if _lies_on_hbm(variant.spec)] or variants
        for cut in cuts_of(shape, self.topology):
            for pooled in self._exchanges(exchange, cut):
                for variant in near if cut.sharding is ShardingType.DATA_PARALLEL else variants:
                    number = self.variants.setdefault(variant, len(self.variants))
                    yield (_CODE[cut.sharding], cut.row_parts, cut.col_parts, cut.group, pooled,
                           number)

    def _exchanges(self, exchange: ExchangeKind, cut: Cut) -> tuple[int, ...]:
        """A data_parallel table sends nothing but gradients of unique rows, whatever it asks for.
        On one rank nothing is sent, and pooling at the owner saves the copy."""
        if self.topology.world_size == 1 and exchange is ExchangeKind.AUTO:
            return (1,)
        if cut.sharding is ShardingType.DATA_PARALLEL and self.topology.world_size > 1:
            return (0,)
        return {ExchangeKind.AUTO: (0, 1), ExchangeKind.ROWS: (0,),
                ExchangeKind.POOLED: (1,)}[exchange]


def enumerate_options(tables: Sequence[EmbeddingBagConfig], topology: Topology,
                      tiers: tuple[Tier, ...] = (Tier.HBM,)) -> Options:
    """All options of all tables.

    Args:
        tables: the tables.
        topology: the machine.
        tiers: tiers that storages without a tier may lie on.
    """
    builder = _Builder(topology, tiers)
    blocks = [builder.columns_of(table) for table in tables]
    counts = np.array([len(block) for block in blocks], dtype=np.int64)
    sharding, row_parts, col_parts, group, pooled, variant = np.concatenate(blocks).T
    table = np.repeat(np.arange(len(tables)), counts)
    units = np.array([cut_units(entry.storage, entry.num_embeddings, entry.embedding_dim)
                      for entry in tables], dtype=np.int64)[table]
    rows = np.array([entry.num_embeddings for entry in tables], dtype=np.int64)[table]
    columns = np.array([entry.embedding_dim for entry in tables], dtype=np.int64)[table]
    copies = np.where(sharding == _COPIED, topology.world_size, 1)
    return Options(
        variants=tuple(builder.variants), first=_starts(counts), table=table, sharding=sharding,
        row_parts=row_parts, col_parts=col_parts, pieces=row_parts * col_parts * copies,
        group=group, pooled=pooled.astype(bool), variant=variant,
        rows=_largest(rows, units[:, 0], row_parts),
        columns=_largest(columns, units[:, 1], col_parts))
