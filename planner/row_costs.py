"""What reading, updating and fetching rows costs the owners of many options' pieces."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from shardlab.planner.enumerate import Options
from shardlab.planner.holding import Fetch, Holding, holding
from shardlab.planner.speeds import Speeds
from shardlab.storage_specs import TensorTrainSpec

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


class RowCosts:
    """Times of rows of one piece of each of n options.

    Attributes:
        columns: [n] columns of the piece.
        copied: [n] every rank holds the whole table.
        pooled: [n] bags are pooled at the owner.
    """

    def __init__(self, options: Options, chosen: Ints, optimizer: str, speeds: Speeds) -> None:
        self.columns = options.columns[chosen]
        self.copied, self.pooled = options.copied[chosen], options.pooled[chosen]
        self._table, self._height = options.table[chosen], options.rows[chosen]
        self._groups = self._group(options, options.variant[chosen], optimizer, speeds)

    def _group(self, options: Options, variant: Ints, optimizer: str,
               speeds: Speeds) -> list[tuple[Ints, Holding]]:
        """The options of each storage and width, with the costs of their rows."""
        wide = int(self.columns.max()) + 1
        key = variant * wide + self.columns
        order = np.argsort(key, kind="stable")
        ends = np.flatnonzero(np.append(np.diff(key[order]) != 0, True)) + 1
        found = []
        for some in np.split(order, ends[:-1]):
            number, width = divmod(int(key[some[0]]), wide)
            spec = options.variants[number].spec
            # The factors of a tensor train depend on its number of rows.
            heights = np.unique(self._height[some]).tolist() \
                if isinstance(spec, TensorTrainSpec) else [int(self._height[some[0]])]
            for height in heights:
                mine = some if len(heights) == 1 else some[self._height[some] == height]
                found.append((mine, holding(spec, height, width, optimizer, speeds)))
        return found

    def read(self, rows: Floats) -> Floats:
        """[n] milliseconds to read so many different rows."""
        time = np.empty(len(rows))
        for some, cost in self._groups:
            time[some] = cost.read_ms * rows[some]
            if cost.records:
                time[some] += cost.page_read_ms * self._pages(rows[some], some, cost.records)
        return time

    def update(self, rows: Floats) -> Floats:
        """[n] milliseconds to update so many different rows."""
        time = np.empty(len(rows))
        for some, cost in self._groups:
            time[some] = cost.update_ms * rows[some]
            if cost.records:
                time[some] += cost.page_write_ms * self._pages(rows[some], some, cost.records)
        return time

    def fetch(self, touched: Floats, accesses: Floats,
              miss_ratio: Callable[[float], Floats]) -> Floats:
        """[n] milliseconds of filling caches.

        Args:
            touched: [n] different rows.
            accesses: [n] ids, repeated ones counted.
            miss_ratio: share of the rows that a cache holds -> [T] share of ids that it misses.
        """
        time = np.zeros(len(touched))
        for some, fetch, missed in self._misses(touched, accesses, miss_ratio):
            time[some] += fetch.row_ms * missed
            if fetch.records:
                time[some] += fetch.page_ms * self._pages(missed, some, fetch.records)
        return time

    def written(self, touched: Floats, accesses: Floats,
                miss_ratio: Callable[[float], Floats]) -> Floats:
        """[n] bytes that a step writes to the disk; arguments as of `fetch`."""
        size = np.zeros(len(touched))
        for some, cost in self._groups:
            if cost.records:
                size[some] = cost.written_bytes * touched[some]
        for some, fetch, missed in self._misses(touched, accesses, miss_ratio):
            if fetch.records:
                size[some] += fetch.written_bytes * missed
        return size

    def _misses(self, touched: Floats, accesses: Floats, miss_ratio: Callable[[float], Floats],
                ) -> Iterator[tuple[Ints, Fetch, Floats]]:
        """Options that share costs, a way between their levels, and rows that take it."""
        for some, cost in self._groups:
            for fetch in cost.fetches:
                ratio = miss_ratio(fetch.fraction)[self._table[some]]
                yield some, fetch, np.minimum(touched[some], accesses[some] * ratio)

    def _pages(self, rows: Floats, some: Ints, records: int) -> Floats:
        """Pages that so many random rows of a piece touch; a record of several counts as one."""
        pages = self._height[some] / records
        return np.asarray(-pages * np.expm1(-rows / pages))
