"""``hot_rows: auto``: which copies relieve the busiest rank most.

The owner of a row sends it to every rank whose batch holds it, and gets as many gradients:
(W - 1) p times a row and a gradient, where p is the probability that a rank's batch holds it. A
copy costs every rank the sum of its gradients, 2 (W - 1) / W times there and back, in every step.
So a copy pays its owner where p > 2 / W, never with two ranks. Copies are taken from whichever rank
is the busiest, its hottest row first, and of all numbers of copies that one is kept with which the
busiest rank moves the fewest bytes. Where ids spread evenly over ranks, that is none.

Source: own.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from shardlab.plan import ShardingPlan
from shardlab.storage_bytes import payload_bytes
from shardlab.table_plan import TablePlan
from shardlab.wire_bytes import FP32_BYTES, HOT_MARKS


@dataclass(frozen=True)
class HotCounts:
    """How often rows of a table were taken.

    Attributes:
        samples: that were looked at.
        ids: of the table, in them.
        rows: (row, ids that took it), the most frequent first, by row where equal.
    """

    samples: int
    ids: int
    rows: tuple[tuple[int, int], ...]

    def share(self, rows: list[int]) -> float:
        """Share of the ids that take one of these rows."""
        wanted = set(rows)
        return sum(ids for row, ids in self.rows if row in wanted) / max(self.ids, 1)


@dataclass(frozen=True)
class _Row:
    """A row that may get a copy: bytes that its owner moves for others, and what a copy costs."""

    moved: float
    copy: float
    table: str
    row: int


def relieving_rows(counts: Mapping[str, HotCounts], plan: ShardingPlan,
                   batch_size: int) -> dict[str, list[int]]:
    """The rows to copy, by table, hottest first.

    Args:
        counts: of the tables that may have copies.
        plan: where they lie.
        batch_size: samples per rank.

    Returns:
        Numbers of rows, for every table of ``counts``.
    """
    world, entries = plan.world_size, {entry.table: entry for entry in plan.tables}
    load = [0.0] * world
    owned: list[list[_Row]] = [[] for _ in range(world)]
    for name, found in counts.items():
        for owner, row in _rows(entries[name], found, world, batch_size):
            load[owner] += row.moved
            owned[owner].append(row)
    for rows in owned:
        rows.sort(key=lambda row: (row.moved, row.table, row.row))
    taken = _take(load, owned)
    chosen: dict[str, list[int]] = {name: [] for name in counts}
    for row in taken:
        chosen[row.table].append(row.row)
    return chosen


def _rows(entry: TablePlan, counts: HotCounts, world: int,
          batch_size: int) -> Iterator[tuple[int, _Row]]:
    """(owner, row) of every counted row."""
    shards = sorted(entry.shards, key=lambda shard: shard.row_start)
    starts, columns = [shard.row_start for shard in shards], shards[0].columns
    travels = payload_bytes(entry.wire.forward, columns) + \
        payload_bytes(entry.wire.backward, columns)
    # Summed and handed back, each of which a rank sends and receives.
    copy = 2 * 2 * FP32_BYTES * (columns + HOT_MARKS) * (world - 1) / world
    for row, ids in counts.rows:
        held = -math.expm1(-ids * batch_size / counts.samples)
        yield (shards[bisect_right(starts, row) - 1].rank,
               _Row((world - 1) * held * travels, copy, entry.table, row))


def _take(load: list[float], owned: list[list[_Row]]) -> list[_Row]:
    """Rows off the busiest rank, one after another, as many as leave the busiest with least."""
    busiest = [(-moved, rank) for rank, moved in enumerate(load)]
    heapq.heapify(busiest)
    taken: list[_Row] = []
    spent, best, best_count = 0.0, max(load, default=0.0), 0
    while busiest and owned[busiest[0][1]]:
        moved, rank = busiest[0]
        row = owned[rank].pop()
        if row.moved <= row.copy:
            break
        heapq.heapreplace(busiest, (moved + row.moved, rank))
        taken.append(row)
        spent += row.copy
        if spent - busiest[0][0] < best:
            best, best_count = spent - busiest[0][0], len(taken)
    return taken[:best_count]
