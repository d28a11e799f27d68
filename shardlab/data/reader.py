"""One rank's batches of a source, cut so that all ranks together hold the global batch."""

from __future__ import annotations

from collections.abc import Iterator

from shardlab.data.batch import Batch
from shardlab.data.rows import RowSource
from shardlab.errors import DataError


class Reader:
    """Iterates over this rank's part of every global batch.

    Global batch i holds the ``batch_size * world_size`` rows from ``start`` on, and rank r the
    r-th contiguous part of it: the global batch depends on the product only. The last one may
    be smaller; its rows are then spread evenly, and a rank may get none. A bad row that is
    skipped keeps its place, so the batch that it lies in is smaller by one. Iterating again
    begins at ``start`` again.

    Args:
        source: the rows.
        batch_size: rows per rank and step.
        rank: which part of the global batch is read.
        world_size: number of ranks.
        start: first row; a batch's ``position`` continues behind that batch.
        stop: row to stop before; None or more than there are: all rows.
        drop_last: leave out a last global batch that is not full.

    Attributes:
        skipped: bad rows that this rank has left out, over all iterations.

    Raises:
        DataError: an argument out of range, or an endless source without ``stop``.
    """

    def __init__(self, source: RowSource, batch_size: int, *, rank: int = 0,
                 world_size: int = 1, start: int = 0, stop: int | None = None,
                 drop_last: bool = False) -> None:
        if batch_size < 1 or world_size < 1 or not 0 <= rank < world_size:
            raise DataError(f"reader: needs batch_size >= 1 and 0 <= rank < world_size, found "
                            f"batch_size {batch_size}, rank {rank}, world_size {world_size}")
        if start < 0 or (stop is not None and stop < start):
            raise DataError(f"reader: rows [{start}, {stop}) are no range")
        self.source, self.batch_size = source, batch_size
        self.rank, self.world_size = rank, world_size
        self.start, self.drop_last = start, drop_last
        self.skipped = 0
        self._stop = stop

    @property
    def keys(self) -> tuple[str, ...]:
        """Feature names, in the order of every batch."""
        return self.source.features

    @property
    def num_dense(self) -> int:
        """Dense features of a row."""
        return self.source.num_dense

    @property
    def global_batch_size(self) -> int:
        """Rows of all ranks in a step."""
        return self.batch_size * self.world_size

    @property
    def stop(self) -> int:
        """Row behind the last one; the first call may have to count a text file's lines."""
        rows = self.source.num_rows()
        if rows is None and self._stop is None:
            raise DataError("reader: the source is endless; give stop")
        bounds = [bound for bound in (rows, self._stop) if bound is not None]
        return max(min(bounds), self.start)

    def __len__(self) -> int:
        """Steps of one iteration, the same on every rank."""
        rows, size = self.stop - self.start, self.global_batch_size
        return rows // size if self.drop_last else -(-rows // size)

    def __iter__(self) -> Iterator[Batch]:
        cursor, size, stop = self.source.open(), self.global_batch_size, self.stop
        try:
            for step in range(len(self)):
                first = self.start + step * size
                last = min(first + size, stop)
                rows = last - first
                block = cursor.read(first + rows * self.rank // self.world_size,
                                    first + rows * (self.rank + 1) // self.world_size)
                self.skipped += block.skipped
                yield block.to_batch(self.keys, last)
        finally:
            cursor.close()
