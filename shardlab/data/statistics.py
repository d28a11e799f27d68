"""What the ids of real data look like, read once in bounded memory.

For every feature, and for the features of a table together: pooling factor, different ids by batch
size, share of the hottest rows, misses of a cache by its size, and skew of row blocks. Figures are
exact as long as a group of features has at most ``most_ids`` different ids. Beyond that, caches and
batches of up to ``most_ids`` rows stay exact, and larger ones are estimated from a sample of the
ids, as large again (`reuse`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shardlab.data.reuse import CACHE_SIZES, Accesses, ReuseTracker
from shardlab.data.rows import Bags, RowBlock, RowSource
from shardlab.errors import DataError

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

#: Different ids of a group of features that are followed; about 60 bytes each.
MOST_IDS = 1 << 17
#: Batch sizes at which different ids are counted.
BATCH_SIZES = tuple(4 ** power for power in range(3, 15))
#: Samples read at once, and ids of one feature that they may hold.
_BLOCK_SAMPLES, _BLOCK_IDS = 16_384, 1 << 20
#: Samples that a first look takes to find out how large bags are.
_LOOK_SAMPLES = 256
#: Row blocks that are told apart; coarser cuts into powers of two are sums of them.
_FINE_BLOCKS = 4096
#: Of the ids followed for being recent, this share is taken for the hottest ones.
_HOT_SHARE = 1 / 32


@dataclass(frozen=True)
class IdFigures:
    """The ids of a group of features; see the fields of the same names in the file's format,
    `shardlab.planner.statistics.IdStatistics`.

    Attributes:
        features: their names.
        rows: rows of their table.
        samples: samples read.
        ids: ids read.
        max_pooling: ids of the largest bag.
        distinct: different ids.
        followed: 1.0: all is exact; else the share of ids in the sample.
        unique: (samples of a batch, mean different ids).
        hot: (rows, share of ids that take one of so many hottest rows).
        miss: (rows of an LRU cache, share of ids that it misses).
        blocks: (equal row blocks, share of ids, share of a batch's different ids in the fullest).
        hottest: (row, ids that take it) of the most frequent rows, those first.
    """

    features: tuple[str, ...]
    rows: int
    samples: int
    ids: int
    max_pooling: int
    distinct: float
    followed: float
    unique: tuple[tuple[float, float], ...]
    hot: tuple[tuple[float, float], ...]
    miss: tuple[tuple[float, float], ...]
    blocks: tuple[tuple[float, float, float], ...]
    hottest: tuple[tuple[int, int], ...] = ()


class _Windows:
    """Different ids in consecutive batches of each of `BATCH_SIZES`.

    An access is the first of its id in its batch if the access before lies in another one: one
    comparison for any batch size.
    """

    def __init__(self) -> None:
        self.current = np.zeros(len(BATCH_SIZES))
        self.complete = np.zeros(len(BATCH_SIZES))

    def add(self, found: Accesses, start: int, stop: int) -> None:
        """Takes the accesses of samples [start, stop)."""
        for i, size in enumerate(BATCH_SIZES):
            batch = found.samples // size
            new = (found.before < 0) | (found.before // size != batch)
            # Batches that end within these samples are complete.
            closed = batch < stop // size
            self.complete[i] += new[closed].sum() * found.weight
            if stop // size > start // size:
                self.complete[i] += self.current[i]
                self.current[i] = 0.0
            self.current[i] += new[~closed].sum() * found.weight

    def mean(self, samples: int) -> dict[int, float]:
        """Batch size -> mean different ids of its complete batches."""
        return {size: float(self.complete[i]) / (samples // size)
                for i, size in enumerate(BATCH_SIZES) if samples >= size}


class IdCollector:
    """Gathers the figures of one group of features.

    Args:
        features: names, read as one stream.
        rows: rows of their table.
        most_ids: different ids that are followed.
    """

    def __init__(self, features: Sequence[str], rows: int, most_ids: int = MOST_IDS) -> None:
        self.features, self.rows, self.most_ids = tuple(features), rows, most_ids
        self.samples, self.max_pooling = 0, 0
        self._recent, self._windows = ReuseTracker(), _Windows()
        self._sampled: tuple[ReuseTracker, _Windows] | None = None
        self._in_block = np.zeros(_FINE_BLOCKS)
        self._unique_in_block = np.zeros(_FINE_BLOCKS)

    def add(self, bags: Sequence[Bags], count: int) -> None:
        """Takes the next ``count`` samples.

        Args:
            bags: one entry per feature.
            count: bags of each.

        Raises:
            DataError: an id lies outside the table; names features and id.
        """
        ids, samples = self._stream(bags, count)
        self._count_blocks(ids)
        stop = self.samples + count
        self._windows.add(self._recent.add(ids, samples), self.samples, stop)
        if self._sampled is not None:
            tracker, windows = self._sampled
            windows.add(tracker.add(ids, samples), self.samples, stop)
        self.samples = stop
        if len(self._recent.ids) > self.most_ids:
            if self._sampled is None:
                self._sampled = copy.deepcopy((self._recent, self._windows))
            self._recent.keep_recent(self.most_ids)
        if self._sampled is not None and len(self._sampled[0].ids) > self.most_ids:
            self._sampled[0].keep_sample(self.most_ids * 3 // 4)  # not again with the next block

    def _stream(self, bags: Sequence[Bags], count: int) -> tuple[Ints, Ints]:
        """Ids of all features in the order of samples, and the sample of each."""
        sample = np.arange(self.samples, self.samples + count)
        parts = []
        for part in bags:
            sizes = part.sizes()
            if len(sizes):
                self.max_pooling = max(self.max_pooling, int(sizes.max()))
            parts.append((part.values, sample if part.lengths is None
                          else np.repeat(sample, sizes)))
        ids, samples = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        if len(bags) > 1:
            order = np.argsort(samples, kind="stable")
            ids, samples = ids[order], samples[order]
        if len(ids) and not (ids.min() >= 0 and ids.max() < self.rows):
            wrong = ids[(ids < 0) | (ids >= self.rows)][0]
            raise DataError(f"feature {', '.join(self.features)}: id {wrong} lies outside its "
                            f"table of {self.rows} rows; raise num_embeddings, or hash the column "
                            "(raw_integers: false)")
        return ids, samples

    def _count_blocks(self, ids: Ints) -> None:
        # Block b of even_splits has the rows from rows * b // blocks on.
        block = ((ids + 1) * _FINE_BLOCKS - 1) // self.rows
        self._in_block += np.bincount(block, minlength=_FINE_BLOCKS)
        different = np.unique(ids)
        self._unique_in_block += np.bincount(
            ((different + 1) * _FINE_BLOCKS - 1) // self.rows, minlength=_FINE_BLOCKS)

    def figures(self) -> IdFigures:
        """What was found in the samples so far."""
        whole = self._sampled[0] if self._sampled else self._recent
        return IdFigures(
            self.features, self.rows, self.samples, self._recent.accesses, self.max_pooling,
            round(whole.distinct, 1), whole.share, tuple(self._unique(whole.distinct)),
            tuple(self._hot()), tuple(self._miss(whole.distinct)), tuple(self._blocks()),
            tuple(self._hottest()))

    def _hottest(self) -> list[tuple[int, int]]:
        """Followed for being recent, the hottest are never forgotten: their counts are exact."""
        counts, ids = self._recent.counts, self._recent.ids
        order = np.lexsort((ids, -counts))[:round(self.most_ids * _HOT_SHARE)]
        return [(row, count) for row, count in
                zip(ids[order].tolist(), counts[order].tolist(), strict=True) if count > 1]

    def _unique(self, distinct: float) -> list[tuple[float, float]]:
        means = self._windows.mean(self.samples)
        if self._sampled is not None:
            # A count of at most `most_ids` has missed no repetition: so many ids are remembered.
            means.update({size: mean for size, mean in self._sampled[1].mean(self.samples).items()
                          if means[size] > self.most_ids})
        if self.samples:
            means[self.samples] = distinct
        return [(size, round(means[size], 3)) for size in sorted(means)] or [(1, 0.0)]

    def _hot(self) -> list[tuple[float, float]]:
        total = max(self._recent.accesses, 1)
        counts = -np.sort(-self._recent.counts)
        rows, taken = np.arange(1, len(counts) + 1, dtype=np.float64), np.cumsum(counts) / total
        if self._sampled is not None:
            rows, taken = self._hot_sampled(counts, total)
        if not len(rows):
            return [(1, 0.0)]
        below = int(np.searchsorted(CACHE_SIZES, rows[-1]))
        points = np.append(CACHE_SIZES[:below].astype(np.float64), rows[-1])
        return [(round(x, 1), round(y, 6)) for x, y in
                zip(points.tolist(), np.interp(points, rows, taken).tolist(), strict=True)]

    def _hot_sampled(self, counts: Ints, total: int) -> tuple[Floats, Floats]:
        """The hottest ids come back soon and so are never forgotten; others from the sample."""
        assert self._sampled is not None
        tracker = self._sampled[0]
        hottest = round(self.most_ids * _HOT_SHARE)
        head = np.cumsum(counts[:hottest]) / total
        names = self._recent.ids[np.argsort(-self._recent.counts, kind="stable")[:hottest]]
        tail = -np.sort(-tracker.counts[~np.isin(tracker.ids, names)])
        rows = len(head) + np.arange(1, len(tail) + 1) / tracker.share
        share = head[-1] + (1 - head[-1]) * np.cumsum(tail) / max(int(tail.sum()), 1)
        return (np.concatenate([np.arange(1.0, len(head) + 1), rows]),
                np.concatenate([head, share]))

    def _miss(self, distinct: float) -> list[tuple[float, float]]:
        ratio = self._recent.miss_ratios()
        if self._sampled is not None:
            far = int(np.searchsorted(CACHE_SIZES, self.most_ids, side="right"))
            ratio[far:] = np.minimum(self._sampled[0].miss_ratios()[far:], ratio[far - 1])
        last = int(np.searchsorted(CACHE_SIZES, distinct)) + 1
        return [(size, round(miss, 6)) for size, miss in
                zip(CACHE_SIZES[:last].tolist(), ratio[:last].tolist(), strict=True)]

    def _blocks(self) -> list[tuple[float, float, float]]:
        found, parts = [], 1
        while parts <= min(_FINE_BLOCKS, self.rows):
            shares = [float(fine.reshape(parts, -1).sum(axis=1).max() / max(fine.sum(), 1))
                      for fine in (self._in_block, self._unique_in_block)]
            found.append((parts, *(max(round(share, 6), 1 / parts) for share in shares)))
            parts *= 2
        return found


def collect(source: RowSource, groups: Mapping[tuple[str, ...], int], rows: tuple[int, int],
            most_ids: int = MOST_IDS,
            progress: Callable[[int], None] | None = None) -> list[IdFigures]:
    """Reads some rows of a source once.

    Args:
        source: the rows.
        groups: features that are read as one stream -> rows of their table.
        rows: the first row, and the row to stop before.
        most_ids: different ids of a group that are followed.
        progress: is told how many rows have been read, after each block.

    Returns:
        The figures of each group, in order.

    Raises:
        DataError: a row cannot be read, or an id lies outside its table.
    """
    collectors = [IdCollector(features, size, most_ids) for features, size in groups.items()]
    done = 0
    for block in _blocks(source, *rows):
        for collector in collectors:
            collector.add([block.bags[source.features.index(name)]
                           for name in collector.features], len(block.labels))
        done += len(block.labels) + block.skipped
        if progress is not None:
            progress(done)
    return [collector.figures() for collector in collectors]


def _blocks(source: RowSource, start: int, stop: int) -> Iterable[RowBlock]:
    """Blocks of rows [start, stop), small enough for `_BLOCK_IDS` ids of a feature."""
    look = source.open()
    first = look.read(start, min(start + _LOOK_SAMPLES, stop))
    look.close()
    largest = max((len(bags.values) for bags in first.bags), default=0)
    per_sample = max(largest / max(len(first.labels), 1), 1.0)
    size = int(min(_BLOCK_SAMPLES, max(_BLOCK_IDS / per_sample, _LOOK_SAMPLES)))
    cursor = source.open()
    try:
        for low in range(start, stop, size):
            yield cursor.read(low, min(low + size, stop))
    finally:
        cursor.close()
