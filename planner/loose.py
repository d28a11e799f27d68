"""The pieces that local improvement may move, as flat arrays that follow the placement."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from shardlab.planner.placement import DDR, HBM, SSD, Placement

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


class Loose:
    """Pieces of options that neither fill every rank nor are tied to hosts.

    Attributes:
        placement: what they belong to; `move` and `recut` change it too.
        table: [P] table of each piece.
        inside: [P] number of the piece in its option.
        rank: [P] where it lies; -1 once its table was cut another way.
        busy: [P] milliseconds without prefetching.
        fetch: [P] milliseconds of prefetching.
        size: [P, 3] bytes on hbm, ddr and ssd.
        barred: [T, W] ranks that hold a piece of the table, or may not.
    """

    def __init__(self, placement: Placement) -> None:
        problem = placement.problem
        self.placement = placement
        self.barred: Bools = np.zeros((problem.num_tables, problem.world_size), dtype=bool)
        for table, ranks in problem.allowed.items():
            self.barred[table] = True
            self.barred[table, ranks] = False
        self.start: Ints = np.full(problem.num_tables, -1, dtype=np.int64)
        self._clear()
        self._append(range(problem.num_tables))

    def _clear(self) -> None:
        self.table: Ints = np.zeros(0, dtype=np.int64)
        self.inside, self.rank = self.table, self.table
        self.busy: Floats = np.zeros(0)
        self.fetch = self.busy
        self.size: Ints = np.zeros((0, 3), dtype=np.int64)

    def _append(self, tables: range | list[int]) -> None:
        problem, held = self.placement.problem, self.placement.ranks
        loose, end = [], len(self.table)
        for table in tables:
            self.barred[table, held[table]] = True
            option = int(self.placement.choice[table])
            if len(held[table]) < problem.world_size and not problem.options.group[option]:
                loose.append((table, option))
                self.start[table], end = end, end + len(held[table])
        if not loose:
            return
        counts = np.array([len(held[table]) for table, _ in loose])
        options = np.repeat([option for _, option in loose], counts)
        inside = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        which = np.minimum(inside % problem.options.row_parts[options], 1)
        costs = problem.costs
        self.table = np.append(self.table, np.repeat([table for table, _ in loose], counts))
        self.inside = np.append(self.inside, inside)
        self.rank = np.append(self.rank, np.concatenate([held[table] for table, _ in loose]))
        self.busy = np.append(self.busy, costs.busy_ms[options, which])
        self.fetch = np.append(self.fetch, costs.fetch_ms[options, which])
        self.size = np.concatenate([self.size, costs.piece_bytes[options]])

    def on(self, rank: int) -> Ints:
        """The pieces on a rank."""
        return np.flatnonzero(self.rank == rank)

    def move(self, index: int, rank: int) -> None:
        """Moves one piece to ``rank``."""
        placement, table, before = self.placement, int(self.table[index]), int(self.rank[index])
        both, sign = [before, rank], np.array([-1, 1])
        placement.busy[both] += sign * self.busy[index]
        placement.fetch[both] += sign * self.fetch[index]
        placement.used[both] += sign * self.size[index, HBM]
        if self.size[index, DDR] or self.size[index, SSD]:
            sharers = placement.problem.ranks.ranks_per_pool
            placement.pools[before // sharers] -= self.size[index, 1:]
            placement.pools[rank // sharers] += self.size[index, 1:]
        held = placement.ranks[table].copy()
        held[self.inside[index]] = rank
        placement.ranks[table] = held
        self.barred[table, before], self.barred[table, rank] = False, True
        self.rank[index] = rank

    def recut(self, table: int, option: int, ranks: Ints) -> None:
        """Gives a table another option."""
        placement = self.placement
        self.barred[table, placement.ranks[table]] = False
        if self.start[table] >= 0:
            start = int(self.start[table])
            self.rank[start:start + len(placement.ranks[table])] = -1
            self.start[table] = -1
        placement.take(table)
        placement.put(table, option, ranks)
        self._append([table])

    def ms(self, busy: Floats, fetch: Floats) -> Floats:
        """Time of ranks that do so much."""
        return np.asarray(busy + np.maximum(fetch - self.placement.problem.window_ms, 0.0))

    def full(self, pieces: Ints, ranks: Ints) -> Bools:
        """[pieces, ranks] the rank may not take the piece, or has no room for it."""
        placement = self.placement
        limits = placement.problem.ranks
        free = limits.capacity - placement.common_bytes - placement.used[ranks]
        size = self.size[pieces]
        full = self.barred[np.ix_(self.table[pieces], ranks)] | (size[:, [HBM]] > free)
        if size[:, DDR].any() or size[:, SSD].any():
            pool, mine = ranks // limits.ranks_per_pool, \
                self.rank[pieces] // limits.ranks_per_pool
            left = limits.pool_capacity - placement.pools[pool]
            over = (size[:, None, 1:] > left[None]).any(axis=2)
            full |= over & (pool[None, :] != mine[:, None])
        return np.asarray(full)

    def full_after_swap(self, mine: Ints, others: Ints) -> Bools:
        """[mine, others] two pieces of different ranks cannot change places."""
        placement = self.placement
        limits = placement.problem.ranks
        free = limits.capacity - placement.common_bytes
        here, there = self.rank[mine], self.rank[others]
        more = self.size[mine][:, None, HBM] - self.size[others][None, :, HBM]
        full = (placement.used[there] + more > free) | \
            (placement.used[here][:, None] - more > free) | \
            self.barred[np.ix_(self.table[mine], there)] | \
            self.barred[self.table[others][None, :], here[:, None]]
        deep = self.size[mine][:, None, 1:] - self.size[others][None, :, 1:]
        if deep.any():
            pool_here, pool_there = here // limits.ranks_per_pool, there // limits.ranks_per_pool
            gain = placement.pools[pool_there][None] + deep > limits.pool_capacity
            loss = placement.pools[pool_here][:, None] - deep > limits.pool_capacity
            full |= (gain | loss).any(axis=2) & (pool_here[:, None] != pool_there[None, :])
        return np.asarray(full)
