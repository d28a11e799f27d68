"""The search's problem and state: which option each table takes, and on which ranks it lies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from shardlab.planner.costs import Costs
from shardlab.planner.enumerate import Options

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

#: Columns of `Costs.piece_bytes`.
HBM, DDR, SSD = range(3)


@dataclass(frozen=True)
class Ranks:
    """Equal ranks, and the memory that plans may fill.

    Attributes:
        world_size: number of ranks.
        ranks_per_host: consecutive ranks that share a host.
        ranks_per_pool: consecutive ranks that share ddr and ssd.
        capacity: bytes of one rank's hbm for shards and exchange buffers.
        pool_capacity: bytes of the ddr and the ssd of one pool.
    """

    world_size: int
    ranks_per_host: int
    ranks_per_pool: int
    capacity: int
    pool_capacity: tuple[int, int]

    @property
    def pools(self) -> int:
        """How many pools there are."""
        return self.world_size // self.ranks_per_pool


@dataclass(frozen=True)
class Problem:
    """Priced options and the ranks that must hold one option of every table.

    Attributes:
        options: what can be chosen.
        costs: what it costs.
        ranks: where it can go.
        window_ms: prefetching that costs nothing, per rank.
        allowed: table -> the only ranks that may hold it; tables without an entry may lie anywhere.
    """

    options: Options
    costs: Costs
    ranks: Ranks
    window_ms: float = 0.0
    allowed: Mapping[int, Ints] = field(default_factory=dict)

    @property
    def num_tables(self) -> int:
        return len(self.options.first) - 1

    @property
    def world_size(self) -> int:
        return self.ranks.world_size

    def take(self, chosen: Ints) -> Problem:
        """Only these options, ascending; every table must keep one."""
        return replace(self, options=self.options.take(chosen), costs=self.costs.take(chosen))

    @cached_property
    def room(self) -> Floats:
        """[3] bytes of all ranks together on hbm, ddr and ssd."""
        ddr, ssd = self.ranks.pool_capacity
        return np.array([self.world_size * self.ranks.capacity, self.ranks.pools * ddr,
                         self.ranks.pools * ssd], dtype=np.float64)

    @cached_property
    def total_busy(self) -> Floats:
        """[O] milliseconds summed over all ranks, without prefetching."""
        return self._sum(self.costs.busy_ms) + self.world_size * self.costs.common_ms

    @cached_property
    def total_fetch(self) -> Floats:
        """[O] milliseconds of prefetching summed over all ranks."""
        return self._sum(self.costs.fetch_ms)

    @cached_property
    def total_ms(self) -> Floats:
        """[O] both."""
        return np.asarray(self.total_busy + self.total_fetch)

    def _sum(self, piece: Floats) -> Floats:
        first = self.options.pieces // self.options.row_parts
        return np.asarray(first * piece[:, 0] + (self.options.pieces - first) * piece[:, 1])

    @cached_property
    def total_bytes(self) -> Floats:
        """[O, 3] bytes summed over all ranks."""
        total: Floats = np.multiply(self.options.pieces[:, None], self.costs.piece_bytes,
                                    dtype=np.float64)
        total[:, HBM] += np.multiply(self.world_size, self.costs.common_bytes, dtype=np.float64)
        return total

    @cached_property
    def largest_ms(self) -> Floats:
        """[O] milliseconds that at least one rank spends on the option."""
        fetch = np.maximum(self.costs.fetch_ms - self.window_ms, 0.0)
        return np.asarray((self.costs.busy_ms + fetch).max(axis=1) + self.costs.common_ms)

    @cached_property
    def largest_bytes(self) -> Ints:
        """[O] hbm bytes that at least one rank holds of the option."""
        return np.asarray(self.costs.piece_bytes[:, HBM] + self.costs.common_bytes)

    @cached_property
    def free_bytes(self) -> Ints:
        """[O] hbm of a rank that is left for the option beside the other tables' least buffers."""
        first = self.options.first
        least = np.minimum.reduceat(self.costs.common_bytes, first[:-1])
        others = least.sum() - np.repeat(least, np.diff(first))
        return np.asarray(self.ranks.capacity - others)

    @cached_property
    def fits_alone(self) -> Bools:
        """[O] the option finds room where nothing but other tables' buffers lies."""
        ddr, ssd = self.ranks.pool_capacity
        size = self.costs.piece_bytes
        fits: Bools = (self.largest_bytes <= self.free_bytes) & (size[:, DDR] <= ddr) & \
            (size[:, SSD] <= ssd) & np.all(self.total_bytes <= self.room, axis=1)
        return fits

    @cached_property
    def fullness(self) -> Floats:
        """[O] the largest share of what a rank has for it that a piece takes: of hbm beside
        buffers, or of the rank's share of ddr or ssd."""
        sharers = self.ranks.ranks_per_pool
        size = self.costs.piece_bytes
        lower = size[:, 1:] / np.maximum(np.array(self.ranks.pool_capacity) / sharers, 1.0)
        near = self.largest_bytes / np.maximum(self.free_bytes, 1)
        return np.asarray(np.maximum(near, lower.max(axis=1)))

    def piece_ms(self, option: int) -> tuple[Floats, Floats]:
        """([n], [n]) milliseconds of the pieces of an option without prefetching, and of that."""
        count, rows = int(self.options.pieces[option]), int(self.options.row_parts[option])
        which = np.minimum(np.arange(count) % rows, 1)
        return self.costs.busy_ms[option][which], self.costs.fetch_ms[option][which]

    def by_work(self, table: int) -> list[int]:
        """The options of a table, least total milliseconds first."""
        options = self.options.of_table(table)
        order = np.argsort(self.total_ms[options.start:options.stop], kind="stable")
        found: list[int] = (options.start + order).tolist()
        return found

    def least(self, values: NDArray[np.generic]) -> Ints:
        """[T] the option of each table with the least of ``values`` [O]; the first of equals."""
        first = self.options.first[:-1]
        lowest = np.minimum.reduceat(values, first)
        hits = np.flatnonzero(values == np.repeat(lowest, np.diff(self.options.first)))
        table = self.options.table[hits]
        chosen: Ints = hits[np.flatnonzero(np.append(True, np.diff(table) != 0))]
        return chosen


class Placement:
    """One option per table, its pieces on ranks, and what that adds up to.

    Attributes:
        choice: [T] option of each table; -1 while the table is not placed.
        ranks: per table, the rank of each piece of its option.
        busy: [W] milliseconds of the pieces, without prefetching.
        fetch: [W] milliseconds of prefetching.
        used: [W] bytes of hbm of the pieces with their buffers.
        pools: [pools, 2] bytes of ddr and ssd.
        common_ms: milliseconds on every rank.
        common_bytes: buffers on every rank.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        world, tables = problem.world_size, problem.num_tables
        self.choice: Ints = np.full(tables, -1, dtype=np.int64)
        self.ranks: list[Ints] = [np.zeros(0, dtype=np.int64)] * tables
        self.busy: Floats = np.zeros(world)
        self.fetch: Floats = np.zeros(world)
        self.used: Ints = np.zeros(world, dtype=np.int64)
        self.pools: Ints = np.zeros((problem.ranks.pools, 2), dtype=np.int64)
        self.common_ms, self.common_bytes = problem.costs.fixed_ms, 0

    def copy(self) -> Placement:
        """An independent copy."""
        twin = Placement.__new__(Placement)
        twin.problem, twin.choice, twin.ranks = self.problem, self.choice.copy(), list(self.ranks)
        twin.busy, twin.fetch = self.busy.copy(), self.fetch.copy()
        twin.used, twin.pools = self.used.copy(), self.pools.copy()
        twin.common_ms, twin.common_bytes = self.common_ms, self.common_bytes
        return twin

    @property
    def loads(self) -> Floats:
        """[W] milliseconds of the pieces: what prefetching exceeds its window counts."""
        if not self.problem.window_ms:
            return self.busy + self.fetch
        return self.busy + np.maximum(self.fetch - self.problem.window_ms, 0.0)

    @property
    def slowest_ms(self) -> float:
        """Milliseconds of the slowest rank."""
        return float(self.loads.max()) + self.common_ms

    @property
    def fits(self) -> bool:
        """Nothing holds more than it can."""
        ranks = self.problem.ranks
        return bool(self.used.max() + self.common_bytes <= ranks.capacity
                    and np.all(self.pools <= ranks.pool_capacity))

    def put(self, table: int, option: int, ranks: Ints) -> None:
        """Places ``table`` by ``option``, piece i on ``ranks[i]`` (all different)."""
        self.choice[table], self.ranks[table] = option, ranks
        self._add(option, ranks, 1)

    def take(self, table: int) -> None:
        """Undoes `put`."""
        self._add(int(self.choice[table]), self.ranks[table], -1)
        self.choice[table] = -1

    def _add(self, option: int, ranks: Ints, sign: int) -> None:
        costs = self.problem.costs
        busy, fetch = self.problem.piece_ms(option)
        size = costs.piece_bytes[option]
        self.common_ms += sign * float(costs.common_ms[option])
        self.common_bytes += sign * int(costs.common_bytes[option])
        self.busy[ranks] += sign * busy
        self.fetch[ranks] += sign * fetch
        self.used[ranks] += sign * size[HBM]
        if size[DDR] or size[SSD]:
            np.add.at(self.pools, ranks // self.problem.ranks.ranks_per_pool, sign * size[1:])

    def refresh(self) -> None:
        """Sums anew, so that rounding does not add up over many moves."""
        fresh = Placement(self.problem)
        for table, option in enumerate(self.choice.tolist()):
            fresh.put(table, option, self.ranks[table])
        self.busy, self.fetch, self.used, self.pools = \
            fresh.busy, fresh.fetch, fresh.used, fresh.pools
        self.common_ms, self.common_bytes = fresh.common_ms, fresh.common_bytes
