"""How soon ids come back: reuse distances of an endless stream of ids in bounded memory.

The reuse distance of an access is the number of other ids used since the last access to its id; an
LRU cache of c rows hits exactly the accesses of a distance below c. A tracker that is told to
follow fewer ids can keep

* the ids used last: all distances below their number stay exact, longer ones look like first uses;
* the ids whose hash lies below a threshold (SHARDS): their distances, divided by their share, are
  those of the stream.

**Source:** Waldspurger, Park, Garthwaite and Ahmad, "Efficient MRC construction with SHARDS", FAST
2015, with its adjustment for the number of accesses (SHARDS-adj). Counting in whole arrays: own.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shardlab.data.hashing import splitmix64

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

_ALL = 1 << 64
#: Cache sizes at which misses are counted: four per octave, up to 2^40 rows.
CACHE_SIZES: Ints = np.unique(np.ceil(2.0 ** (np.arange(161) / 4)).astype(np.int64))
_NEVER = np.iinfo(np.int64).min


def smaller_before(keys: Ints) -> Ints:
    """For every element, how many elements before it are smaller.

    Bit by bit from the highest, as in a wavelet matrix: a stable partition of the elements that
    agree in all higher bits, in which those with this bit set count the others before them.

    Args:
        keys: [n].

    Returns:
        [n].
    """
    count = len(keys)
    order = np.argsort(keys, kind="stable")
    ranks = np.empty(count, np.int64)
    ascending = keys[order]
    first = np.concatenate([[True], ascending[1:] != ascending[:-1]]) if count else np.ones(0, bool)
    ranks[order] = np.maximum.accumulate(np.where(first, np.arange(count), 0))
    found, element = np.zeros(count, np.int64), np.arange(count)
    node = np.zeros(count, np.int64)  # where the elements of equal higher bits begin
    for bit in range(max(count - 1, 0).bit_length() - 1, -1, -1):
        one = (ranks[element] >> bit & 1).astype(bool)
        zeros = np.concatenate([[0], np.cumsum(~one)])
        in_node = zeros[:-1] - zeros[node]
        found[element] += np.where(one, in_node, 0)
        node = np.where(one, zeros[-1] + node - zeros[node], zeros[node])
        element = np.concatenate([element[~one], element[one]])
        node = np.concatenate([node[~one], node[one]])
    return found


@dataclass
class Accesses:
    """Accesses of one block to ids that are followed, in order.

    Attributes:
        ids: [n].
        samples: [n] the sample of each.
        before: [n] the sample of the access before to the same id; -1 for the first.
        weight: how many accesses of the stream one of them stands for.
    """

    ids: Ints
    samples: Ints
    before: Ints
    weight: float


class ReuseTracker:
    """Follows a stream of ids; all of them until it is told to follow fewer.

    Attributes:
        ids: [k] ids that are followed, ascending.
        counts: [k] their accesses since they are followed.
        share: share of all ids whose accesses are counted.
        accesses: accesses of the whole stream.
    """

    def __init__(self) -> None:
        self.ids = np.empty(0, np.int64)
        self.counts = np.empty(0, np.int64)
        self.accesses = 0
        self._limit = _ALL
        self._position = np.empty(0, np.int64)  # of the last access, by a count of accesses
        self._sample = np.empty(0, np.int64)
        self._clock = 0
        self._hits = np.zeros(len(CACHE_SIZES) + 1)  # by the smallest cache that hits
        self._followed = 0.0  # accesses to followed ids, scaled like _hits

    @property
    def share(self) -> float:
        return self._limit / _ALL

    def add(self, ids: Ints, samples: Ints) -> Accesses:
        """Takes the next accesses.

        Args:
            ids: [n].
            samples: [n] ascending.

        Returns:
            Those to ids that are followed.
        """
        self.accesses += len(ids)
        if self._limit < _ALL:
            kept = splitmix64(ids) < np.uint64(self._limit)
            ids, samples = ids[kept], samples[kept]
        before = np.full(len(ids), -1, np.int64)
        if len(ids):
            order = np.argsort(ids, kind="stable")
            starts = np.flatnonzero(np.concatenate([[True], np.diff(ids[order]) != 0]))
            place = np.searchsorted(self.ids, ids[order[starts]])
            known = np.zeros(len(starts), bool)
            inside = place < len(self.ids)
            known[inside] = self.ids[place[inside]] == ids[order[starts[inside]]]
            before = self._record(samples, order, starts, np.where(known, place, -1))
            self._merge(ids, samples, order, starts, np.where(known, place, -1))
        return Accesses(ids, samples, before, 1 / self.share)

    def _record(self, samples: Ints, order: Ints, starts: Ints, place: Ints) -> Ints:
        """Counts distances; returns the sample of each access's access before."""
        count = len(order)
        earlier = np.empty(count, np.int64)  # entry of the access before, in this block
        earlier[order[1:]] = order[:-1]
        earlier[order[starts]] = _NEVER
        first, old = order[starts], place >= 0
        # Earlier blocks lie before this one: their positions become negative.
        earlier[first[old]] = self._position[place[old]] - self._clock
        smaller = smaller_before(earlier)
        again = earlier >= 0
        distance = np.full(count, -1, np.int64)
        distance[again] = smaller[again] - (earlier[again] + 1)
        recent = np.sort(self._position)
        above = len(recent) - np.searchsorted(recent, self._position[place[old]], side="right")
        # Ids that were seen before this block and again in it, or new in it, stand above once.
        distance[first[old]] = smaller[first[old]] + above
        scaled = distance[distance >= 0] / self.share
        self._hits += np.bincount(np.searchsorted(CACHE_SIZES, scaled, side="right"),
                                  minlength=len(self._hits))
        self._followed += count
        before = np.full(count, -1, np.int64)
        before[again] = samples[earlier[again]]
        before[first[old]] = self._sample[place[old]]
        return before

    def _merge(self, ids: Ints, samples: Ints, order: Ints, starts: Ints, place: Ints) -> None:
        """Takes the last access and the number of accesses of every id of the block."""
        ends = np.append(starts[1:], len(order)) - 1
        count, last = ends - starts + 1, order[ends]
        old, new = place >= 0, place < 0
        self.counts[place[old]] += count[old]
        self._position[place[old]] = self._clock + last[old]
        self._sample[place[old]] = samples[last[old]]
        merged = np.concatenate([self.ids, ids[last[new]]])
        at = np.argsort(merged, kind="stable")
        self.ids = merged[at]
        self.counts = np.concatenate([self.counts, count[new]])[at]
        self._position = np.concatenate([self._position, self._clock + last[new]])[at]
        self._sample = np.concatenate([self._sample, samples[last[new]]])[at]
        self._clock += len(order)

    def keep_recent(self, most: int) -> None:
        """Goes on with the ``most`` ids that were used last."""
        if len(self.ids) > most:
            self._keep(self._position >= np.partition(self._position, -most)[-most])

    def keep_sample(self, most: int) -> None:
        """Goes on with at most ``most`` ids, taken by their hash."""
        if len(self.ids) <= most:
            return
        hashes, before = splitmix64(self.ids), self._limit
        self._limit = int(np.partition(hashes, most)[most])
        self._keep(hashes < np.uint64(self._limit))
        self._hits *= self._limit / before
        self._followed *= self._limit / before

    def _keep(self, kept: Bools) -> None:
        self.ids, self.counts = self.ids[kept], self.counts[kept]
        self._position, self._sample = self._position[kept], self._sample[kept]

    @property
    def distinct(self) -> float:
        """Different ids of the stream, of a tracker that did not `keep_recent`."""
        return len(self.ids) / self.share

    def miss_ratios(self) -> Floats:
        """[len(CACHE_SIZES)] share of all accesses that an LRU cache of each size misses."""
        expected = self.accesses * self.share
        # The followed ids are a few times too hot or too cold: the difference hits any cache.
        hits = np.cumsum(self._hits)[:len(CACHE_SIZES)] + (expected - self._followed)
        return np.clip(1 - hits / max(expected, 1.0), 0.0, 1.0)
