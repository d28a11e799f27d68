"""Which segments of a log are free, and which are worth cleaning. Source: own."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from shardlab.log_layout import LogLayout

Ints = NDArray[np.int64]

_FREE, _USED, _CLEANING = range(3)
#: Of a partition's spare segments, an eighth is kept free: what is read to clean one queues behind
#: the batch that is being read ahead, and until then rows keep coming.
_WANTED_SHARE, _LEAST_FREE = 8, 3


class LogSegments:
    """The segments of the logs of several shards, numbered through; likewise their partitions.

    Attributes:
        layouts: shape of every shard's log.
        part_starts: int64 [shards + 1], first partition of every shard.
        free: int64 [partitions], free segments.
        wanted_free: int64 [partitions], cleaning starts when there are fewer.
        cleaning: int64 [partitions], segments that are being cleaned.
        segment_rows: int64 [partitions], records of a segment.
    """

    def __init__(self, layouts: Sequence[LogLayout]) -> None:
        self.layouts = list(layouts)
        self._part_rows = np.array([layout.partition_rows for layout in layouts], dtype=np.int64)
        self._shard_segment_rows = np.array([layout.segment_rows for layout in layouts],
                                            dtype=np.int64)
        parts = [layout.partitions for layout in layouts]
        self.part_starts = np.concatenate([[0], np.cumsum(parts)]).astype(np.int64)
        self._shard = np.repeat(np.arange(len(parts)), parts)
        self.segment_rows = self._shard_segment_rows[self._shard]
        sizes = np.array([layouts[s].partition_segments for s in self._shard], dtype=np.int64)
        self._starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        self._of_shard = self._starts[self.part_starts]
        total = int(self._starts[-1])
        self._live = np.zeros(total, dtype=np.int32)
        self._written = np.zeros(total, dtype=np.int64)
        self._state = np.zeros(total, dtype=np.uint8)
        self.free = sizes.astype(np.int64)
        spare = [layout.spare_segments for layout in layouts]
        self.wanted_free = np.maximum(_LEAST_FREE, np.repeat(spare, parts) // _WANTED_SHARE)
        self.cleaning = np.zeros(len(sizes), dtype=np.int64)

    @property
    def memory_bytes(self) -> int:
        """Bytes of what is kept of segments and partitions."""
        return int(self._live.nbytes + self._written.nbytes + self._state.nbytes
                   + self.free.nbytes + self.wanted_free.nbytes + self.cleaning.nbytes)

    def partitions(self, shards: Ints, rows: Ints) -> Ints:
        """Partition of rows of shards."""
        return np.asarray(self.part_starts[shards] + rows // self._part_rows[shards])

    def of_places(self, shards: Ints, places: Ints) -> Ints:
        """Segment of places in the files of shards."""
        return np.asarray(self._of_shard[shards] + places // self._shard_segment_rows[shards])

    def first_place(self, segment: int, part: int) -> tuple[int, int]:
        """(shard, place of the first record) of a segment of a partition."""
        shard = int(self._shard[part])
        inside = segment - int(self._of_shard[shard])
        return shard, inside * self.layouts[shard].segment_rows

    def written_by(self, segments: Ints, moment: int) -> NDArray[np.bool_]:
        """Whether segments have not been written since a moment."""
        return np.asarray(self._written[segments] <= moment)

    def take(self, part: int, moment: int) -> int:
        """A free segment of a partition that has one, as written full at a moment."""
        start, end = int(self._starts[part]), int(self._starts[part + 1])
        segment = start + int(np.argmin(self._state[start:end]))
        assert self._state[segment] == _FREE
        self._state[segment], self._written[segment] = _USED, moment
        self._live[segment] = self.segment_rows[part]
        self.free[part] -= 1
        return segment

    def give_back(self, segment: int, part: int) -> None:
        """Frees a segment that was cleaned."""
        self._state[segment], self._live[segment] = _FREE, 0
        self.free[part] += 1
        self.cleaning[part] -= 1

    def drop_records(self, segments: Ints) -> None:
        """Counts records out that are stale from now on; segments without any become free."""
        numbers, counts = np.unique(segments, return_counts=True)
        self._live[numbers] -= counts.astype(np.int32)
        empty = numbers[(self._live[numbers] == 0) & (self._state[numbers] == _USED)]
        self._state[empty] = _FREE
        np.add.at(self.free, np.searchsorted(self._starts, empty, side="right") - 1, 1)

    def begin_cleaning(self, part: int, count: int) -> list[int]:
        """Those with the fewest live records, at most ``count`` and none that is all live."""
        start, end = int(self._starts[part]), int(self._starts[part + 1])
        live = np.where(self._state[start:end] == _USED, self._live[start:end],
                        self.segment_rows[part])
        count = min(count, end - start)
        best = np.argpartition(live, count - 1)[:count]
        chosen = best[live[best] < self.segment_rows[part]] + start
        self._state[chosen] = _CLEANING
        self.cleaning[part] += len(chosen)
        return [int(segment) for segment in chosen]
