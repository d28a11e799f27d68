"""A home that a second thread may read: one call at a time.

Homes in memory need no such thing: reading moves nothing, and the writer of a snapshot does
not care for rows that change under its hands. A home on disk keeps buffers and an index.
"""

from __future__ import annotations

from threading import Lock

from torch import Tensor

from shardlab.ops.records import MoveEnd
from shardlab.storage.levels import Home


class SharedHome:
    """Passes every call on to a home, one at a time.

    Args:
        home: what holds the rows.
    """

    def __init__(self, home: Home) -> None:
        self._home, self._lock = home, Lock()
        self.numbers = home.numbers

    def source(self, jobs: Tensor, rows: Tensor) -> MoveEnd:
        """Where the records of these rows can be read until the next call."""
        with self._lock:
            return self._home.source(jobs, rows)

    def target(self, jobs: Tensor, rows: Tensor) -> MoveEnd:
        """Where new records of these rows are to be written before `commit`."""
        with self._lock:
            return self._home.target(jobs, rows)

    def commit(self) -> None:
        """Takes over what was written to the last target."""
        with self._lock:
            self._home.commit()

    def prefetch(self, jobs: Tensor, rows: Tensor) -> None:
        """Tells that these rows will be asked for soon."""
        with self._lock:
            self._home.prefetch(jobs, rows)

    def flush(self) -> None:
        """Waits until everything is written."""
        with self._lock:
            self._home.flush()

    def read_range(self, number: int, first: int, count: int) -> tuple[Tensor, Tensor]:
        """fp32 rows and states of a shard."""
        with self._lock:
            return self._home.read_range(number, first, count)

    def write_range(self, number: int, first: int, rows: Tensor | None,
                    state: Tensor | None) -> None:
        """Encodes fp32 rows, or states, or both, and writes them."""
        with self._lock:
            self._home.write_range(number, first, rows, state)
