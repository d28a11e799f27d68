"""How often which rows of every table are used: measured, or assumed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from shardlab.planner import zipf
from shardlab.planner.statistics import IdStatistics, Statistics
from shardlab.specs import EmbeddingBagConfig

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


class Access(Protocol):
    """The ids of T tables. ``table`` is an array [n] of table numbers, and so are the results.

    Caches and hot rows are counted over the whole table. A row-wise shard whose cache holds the
    same share of its rows as all shards together do has the table's ratio.

    Attributes:
        assumption: in words, for reports: what was measured or assumed.
        pooling: [T] mean ids of a bag of one feature.
    """

    assumption: str
    pooling: Floats

    def unique(self, samples: float) -> Floats:
        """[T] different ids of all features of a table in a batch of so many samples."""

    def hot_share(self, table: Ints, rows: Floats) -> Floats:
        """Share of ids that take one of the ``rows`` most frequent rows of the table.

        What a cache that keeps the most frequent rows (an ideal LFU) hits.
        """

    def miss_ratio(self, table: Ints, cache_rows: Floats) -> Floats:
        """Share of ids, repeated ones counted, that an LRU cache misses.

        A step of N ids misses min(N x ratio, its different ids) rows. 0 where the cache holds the
        whole table.
        """

    def fullest_block(self, table: Ints, parts: Ints) -> Floats:
        """Share of ids in the fullest of ``parts`` equal blocks of rows: what pooled exchange
        puts on one owner."""

    def fullest_unique_block(self, table: Ints, parts: Ints, unique: Floats) -> Floats:
        """Share of a batch's ``unique`` different ids in its fullest of ``parts`` equal blocks:
        what the exchange of unique rows puts on one owner.

        Skew that lasts, and the chance of one batch: of k blocks that expect m ids each, the
        fullest gets about sqrt(2 m ln k) more (largest of k Poisson numbers).
        """


def build_access(tables: Sequence[EmbeddingBagConfig],
                 statistics: Statistics | None = None) -> Access:
    """The measured ids of the tables, or where there are none the assumption of `zipf`.

    Raises:
        ConfigError: the statistics lack a feature of the tables.
    """
    if statistics is None:
        return ZipfAccess(tables)
    return MeasuredAccess(tables, statistics)


class ZipfAccess:
    """Zipf's law with `zipf.ZIPF_EXPONENT`, and the pooling factors that the tables state."""

    def __init__(self, tables: Sequence[EmbeddingBagConfig]) -> None:
        self.assumption = f"ids assumed to follow Zipf's law, exponent {zipf.ZIPF_EXPONENT}"
        self.pooling = np.array([table.pooling_factor for table in tables], dtype=np.float64)
        self._rows = np.array([table.num_embeddings for table in tables], dtype=np.float64)
        self._features = np.array([len(table.feature_names) for table in tables], dtype=np.float64)

    def unique(self, samples: float) -> Floats:
        """See `Access`; features that share a table draw from the same distribution."""
        return zipf.unique_ids(self._rows, samples * self._features * self.pooling)

    def hot_share(self, table: Ints, rows: Floats) -> Floats:
        """See `Access`."""
        return zipf.hot_share(self._rows[table], rows)

    def miss_ratio(self, table: Ints, cache_rows: Floats) -> Floats:
        """See `Access`."""
        return zipf.lru_miss_ratio(self._rows[table], cache_rows)

    def fullest_block(self, table: Ints, parts: Ints) -> Floats:
        """See `Access`."""
        return zipf.fullest_block(self._rows[table], parts)

    def fullest_unique_block(self, table: Ints, parts: Ints, unique: Floats) -> Floats:
        """See `Access`; different ids lie evenly, but for chance."""
        return with_chance(1.0 / parts, parts, unique)


class MeasuredAccess:
    """The records of statistics; several features without a record of their own are added up."""

    def __init__(self, tables: Sequence[EmbeddingBagConfig], statistics: Statistics) -> None:
        self.assumption = f"ids as measured in {statistics.data}, {statistics.samples:,} samples"
        self._records = [statistics.of(table.feature_names) for table in tables]
        self._rows = np.array([table.num_embeddings for table in tables], dtype=np.float64)
        self.pooling = np.array([_mean(records, lambda record: record.pooling_factor,
                                       by_ids=False) for records in self._records])

    def unique(self, samples: float) -> Floats:
        """See `Access`."""
        found = [sum(float(record.unique_ids(samples)) for record in records)
                 for records in self._records]
        return np.asarray(np.minimum(np.array(found), self._rows))

    def hot_share(self, table: Ints, rows: Floats) -> Floats:
        """See `Access`."""
        return self._ask(table, lambda x, record: record.hot_share(x), rows)

    def miss_ratio(self, table: Ints, cache_rows: Floats) -> Floats:
        """See `Access`."""
        found = self._ask(table, lambda x, record: record.miss_ratio(x), cache_rows)
        return np.asarray(np.where(cache_rows >= self._rows[table], 0.0, found))

    def fullest_block(self, table: Ints, parts: Ints) -> Floats:
        """See `Access`."""
        return self._ask(table, lambda x, record: record.fullest_block(x), parts)

    def fullest_unique_block(self, table: Ints, parts: Ints, unique: Floats) -> Floats:
        """See `Access`."""
        lasting = self._ask(table, lambda x, record: record.fullest_unique_block(x), parts)
        return with_chance(lasting, parts, unique)

    def _ask(self, table: Ints, curve: Callable[[Floats | Ints, IdStatistics], Floats],
             x: Floats | Ints) -> Floats:
        """Evaluates each table's curve at its own entries of ``x``."""
        out = np.empty(len(table))
        order = np.argsort(table, kind="stable")
        for entries in np.split(order, np.flatnonzero(np.diff(table[order])) + 1):
            if len(entries):
                records, points = self._records[int(table[entries[0]])], x[entries]
                out[entries] = _mean(records, partial(curve, points))
        return out


def _mean(records: Sequence[IdStatistics], value: Callable[[IdStatistics], Floats | float],
          by_ids: bool = True) -> Floats | float:
    """Mean of a figure over records, weighted by their ids or all alike."""
    weights = [float(max(record.ids, 1)) if by_ids else 1.0 for record in records]
    total = sum(weight * value(record) for weight, record in zip(weights, records, strict=True))
    return total / sum(weights)


def with_chance(share: Floats, parts: Ints, unique: Floats) -> Floats:
    """The expected largest share of ``parts`` blocks in one batch of ``unique`` ids."""
    expected = np.maximum(share * unique, 1e-9)
    excess = np.sqrt(2 * np.log(np.maximum(parts, 1)) / expected)
    return np.asarray(np.minimum(share * (1 + excess), 1.0))
