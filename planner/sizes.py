"""Bytes of pieces on every tier, for many pieces at once; and of one shard, split into parts.

`storage_bytes.tier_bytes` is the truth for one shard. The search needs it for a million pieces:
`piece_bytes` gives the same numbers, or at most a set of a cache and a promille more.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from shardlab.cache_layout import cache_layout
from shardlab.errors import ConfigError
from shardlab.log_layout import log_layout
from shardlab.planner.enumerate import Options
from shardlab.storage_bytes import TierBytes, cache_bytes, chunk_layout, record_layout, tier_bytes
from shardlab.storage_specs import LevelSpec, PrunedSpec, RowsSpec, StorageSpec, Tier

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

TIERS = tuple(Tier)
_HBM, _DDR, _SSD = range(len(TIERS))
#: Bytes of a piece that cannot be held so: a record longer than a disk takes, a shape that a
#: tensor train does not divide into.
IMPOSSIBLE = np.int64(1) << 60


def piece_bytes(options: Options, optimizer: str) -> Ints:
    """[O, 3] bytes of the largest piece of every option on hbm, ddr and ssd, without buffers."""
    size = np.zeros((len(options), len(TIERS)), dtype=np.int64)
    for number, variant in enumerate(options.variants):
        chosen = np.flatnonzero(options.variant == number)
        if not len(chosen):
            continue
        rows, columns = options.rows[chosen], options.columns[chosen]
        if isinstance(variant.spec, RowsSpec):
            for width in np.unique(columns).tolist():
                some = columns == width
                size[chosen[some]] = _rows_bytes(variant.spec, rows[some], width, optimizer)
        else:
            size[chosen] = _one_by_one(variant.spec, rows, columns, optimizer)
    return size


def _rows_bytes(spec: RowsSpec, rows: Ints, columns: int, optimizer: str) -> Ints:
    size = np.zeros((len(rows), len(TIERS)), dtype=np.int64)
    record = record_layout(spec.home, columns, optimizer, spec.state_dtype).record_bytes
    home = TIERS.index(spec.home.tier or Tier.HBM)
    if home == _SSD:
        size[:, [_DDR, _SSD]] = _log_bytes(rows, record)
    else:
        size[:, home] = rows * record
    for level in spec.levels[:-1]:
        size[:, TIERS.index(level.tier or Tier.HBM)] += _cache_bytes(
            level, rows, columns, optimizer, spec.state_dtype)
    return size


def _log_bytes(rows: Ints, record: int) -> Ints:
    """[n, 2] bytes in memory and on disk of logs of many sizes, `log_layout.log_layout`."""
    sizes, index = np.unique(rows, return_inverse=True)
    return np.array([_bytes_of_log(size, record) for size in sizes.tolist()])[index.reshape(-1)]


def _bytes_of_log(rows: int, record: int) -> tuple[int, int]:
    try:
        layout = log_layout(rows, record)
    except ConfigError:
        return int(IMPOSSIBLE), int(IMPOSSIBLE)
    return layout.memory_bytes, layout.file_bytes


def _cache_bytes(level: LevelSpec, rows: Ints, columns: int, optimizer: str,
                 state_dtype: str) -> Ints:
    """`storage_bytes.cache_bytes`, linear between sizes.

    Tags are wider from some number of rows per set on, and the last set may be of any size:
    between two sizes the larger bytes per slot count, and a set is added.
    """
    marks = np.unique(np.concatenate([
        [rows.min(), rows.max()], 1 << np.arange(4, int(rows.max()).bit_length())]))
    per_slot = np.array([_bytes_per_slot(level, int(mark), columns, optimizer, state_dtype)
                         for mark in marks.tolist()])
    worst = np.maximum.accumulate(per_slot)
    slots = np.minimum(np.ceil(level.fraction * rows) + level.ways,
                       -(-rows // level.ways) * level.ways)
    return np.asarray(np.ceil(slots * worst[np.searchsorted(marks, rows)]), dtype=np.int64)


def _bytes_per_slot(level: LevelSpec, rows: int, columns: int, optimizer: str,
                    state_dtype: str) -> float:
    slots = cache_layout(rows, level.fraction, level.ways).slots
    return cache_bytes(level, rows, columns, optimizer, state_dtype) / slots


def _one_by_one(spec: StorageSpec, rows: Ints, columns: Ints, optimizer: str) -> Ints:
    keys, index = np.unique(np.stack([rows, columns]), axis=1, return_inverse=True)
    sizes = [_exact(spec, height, width, optimizer) for height, width in keys.T.tolist()]
    return np.array(sizes, dtype=np.int64).reshape(-1, len(TIERS))[index.reshape(-1)]


def _exact(spec: StorageSpec, rows: int, columns: int, optimizer: str) -> list[int]:
    try:
        size = tier_bytes(spec, rows, columns, optimizer)
    except ConfigError:
        return [int(IMPOSSIBLE)] * len(TIERS)
    return [size.hbm, size.ddr, size.ssd]


@dataclass(frozen=True)
class ShardBytes:
    """What a shard takes, by tier and by what it is for.

    Attributes:
        tables: rows with their scales, cores or chunks; pages that are not full.
        state: optimiser state of the rows.
        cache: caches with their copies of rows and state, tags and counters.
    """

    tables: TierBytes = field(default_factory=TierBytes)
    state: TierBytes = field(default_factory=TierBytes)
    cache: TierBytes = field(default_factory=TierBytes)

    def __add__(self, other: ShardBytes) -> ShardBytes:
        return ShardBytes(self.tables + other.tables, self.state + other.state,
                          self.cache + other.cache)

    @property
    def total(self) -> TierBytes:
        return self.tables + self.state + self.cache


def shard_bytes(spec: StorageSpec, rows: int, columns: int, optimizer: str) -> ShardBytes:
    """Splits `storage_bytes.tier_bytes` of one shard."""
    whole = tier_bytes(spec, rows, columns, optimizer)
    bare = tier_bytes(spec, rows, columns, "sgd")
    if isinstance(spec, PrunedSpec):  # the budget holds both
        layout = chunk_layout(spec, rows, columns, optimizer)
        part = whole.total * layout.state_bytes // layout.record_bytes
        state = TierBytes.on(spec.tier, part)
        return ShardBytes(tables=_less(whole, state), state=state)
    if not isinstance(spec, RowsSpec):
        return ShardBytes(tables=bare, state=_less(whole, bare))
    cache = TierBytes()
    for level in spec.levels[:-1]:
        cache += TierBytes.on(level.tier, cache_bytes(level, rows, columns, optimizer,
                                                      spec.state_dtype))
    state = TierBytes.on(spec.home.tier, rows * record_layout(
        spec.home, columns, optimizer, spec.state_dtype).state_bytes)
    return ShardBytes(_less(_less(whole, cache), state), state, cache)


def _less(whole: TierBytes, part: TierBytes) -> TierBytes:
    return TierBytes(whole.hbm - part.hbm, whole.ddr - part.ddr, whole.ssd - part.ssd)
