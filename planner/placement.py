"""The search's state: which option each table takes, and on which ranks its pieces lie."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shardlab.planner.enumerate import Options
from shardlab.planner.estimate import Costs

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Problem:
    """Priced options and the ranks that must hold one option of every table.

    Attributes:
        options: what can be chosen.
        costs: what it costs.
        world_size: number of ranks, all equal.
        ranks_per_host: consecutive ranks that share a host.
        capacity: bytes of one rank for shards and exchange buffers.
    """

    options: Options
    costs: Costs
    world_size: int
    ranks_per_host: int
    capacity: int

    @property
    def num_tables(self) -> int:
        return len(self.options.first) - 1

    @cached_property
    def total_ms(self) -> Floats:
        """[O] an option's milliseconds summed over all ranks."""
        total: Floats = np.add.reduceat(self.costs.ms, self.options.start[:-1])
        return total + self.world_size * self.costs.common_ms

    @cached_property
    def total_bytes(self) -> Ints:
        """[O] an option's bytes summed over all ranks."""
        total: Ints = np.add.reduceat(self.costs.bytes, self.options.start[:-1])
        return total + self.world_size * self.costs.common_bytes

    @cached_property
    def largest_ms(self) -> Floats:
        """[O] milliseconds that at least one rank spends on the option."""
        largest: Floats = np.maximum.reduceat(self.costs.ms, self.options.start[:-1])
        return largest + self.costs.common_ms

    @cached_property
    def largest_bytes(self) -> Ints:
        """[O] bytes that at least one rank holds of the option."""
        largest: Ints = np.maximum.reduceat(self.costs.bytes, self.options.start[:-1])
        return largest + self.costs.common_bytes

    def by_work(self, table: int) -> list[int]:
        """The options of a table, least total milliseconds first."""
        options = self.options.of_table(table)
        order = np.argsort(self.total_ms[options.start:options.stop], kind="stable")
        return [options.start + int(index) for index in order]

    def least(self, values: NDArray[np.generic]) -> Ints:
        """[T] the option of each table with the least of ``values`` [O]; the first of equals."""
        lowest = np.minimum.reduceat(values, self.options.first[:-1])
        table = self.options.table
        hits = np.flatnonzero(values == lowest[table])
        first = np.unique(table[hits], return_index=True)[1]
        chosen: Ints = hits[first]
        return chosen


class Placement:
    """One option per table, its pieces on ranks, and what that adds up to on each rank.

    Attributes:
        choice: [T] option of each table; -1 while the table is not placed.
        ranks: per table, the rank of each piece of its option.
        loads: [W] milliseconds.
        used: [W] bytes.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.choice: Ints = np.full(problem.num_tables, -1, dtype=np.int64)
        self.ranks: list[Ints] = [np.zeros(0, dtype=np.int64)] * problem.num_tables
        self.loads: Floats = np.full(problem.world_size, problem.costs.fixed_ms)
        self.used: Ints = np.zeros(problem.world_size, dtype=np.int64)

    def copy(self) -> Placement:
        """An independent copy."""
        twin = Placement.__new__(Placement)
        twin.problem, twin.choice, twin.ranks = self.problem, self.choice.copy(), list(self.ranks)
        twin.loads, twin.used = self.loads.copy(), self.used.copy()
        return twin

    @property
    def slowest_ms(self) -> float:
        """Milliseconds of the slowest rank."""
        return float(self.loads.max())

    @property
    def fits(self) -> bool:
        """Every rank holds no more than it can."""
        return bool(self.used.max() <= self.problem.capacity)

    def put(self, table: int, option: int, ranks: Ints) -> None:
        """Places ``table`` by ``option``, piece i on ``ranks[i]`` (all different)."""
        costs, pieces = self.problem.costs, self.problem.options.pieces(option)
        self.choice[table], self.ranks[table] = option, ranks
        self.loads += costs.common_ms[option]
        self.used += costs.common_bytes[option]
        self.loads[ranks] += costs.ms[pieces]
        self.used[ranks] += costs.bytes[pieces]

    def take(self, table: int) -> None:
        """Undoes `put`."""
        costs, option = self.problem.costs, int(self.choice[table])
        pieces, ranks = self.problem.options.pieces(option), self.ranks[table]
        self.loads -= costs.common_ms[option]
        self.used -= costs.common_bytes[option]
        self.loads[ranks] -= costs.ms[pieces]
        self.used[ranks] -= costs.bytes[pieces]
        self.choice[table] = -1

    def refresh(self) -> None:
        """Sums loads anew, so that rounding does not add up over many moves."""
        self.loads[:] = self.problem.costs.fixed_ms
        self.used[:] = 0
        for table, option in enumerate(self.choice.tolist()):
            self.put(table, option, self.ranks[table])


def pick_ranks(placement: Placement, option: int, *, ahead: int = 0,
               by_bytes: bool = False) -> Ints | None:
    """The least loaded ranks with room for the option's pieces; None if there are too few.

    The costliest piece goes to the least loaded rank. Common costs are the same everywhere and
    do not matter here; their bytes do.

    Args:
        placement: what is placed so far.
        option: what to place.
        ahead: bytes to leave free on every rank for what is still to come.
        by_bytes: level memory instead of time.
    """
    problem = placement.problem
    loads = placement.used if by_bytes else placement.loads
    costs, pieces = problem.costs, problem.options.pieces(option)
    used = placement.used + costs.common_bytes[option] + ahead
    if used.max() > problem.capacity:
        return None
    size = costs.bytes[pieces]
    if problem.options.cuts[option].group:
        return _pick_grouped(problem, used, loads, option)
    room = np.flatnonzero(used + size.max() <= problem.capacity)
    if len(room) < len(size):
        return None
    if len(size) == 1:
        return room[[int(np.argmin(loads[room]))]]
    least = room[np.argsort(loads[room], kind="stable")[:len(size)]]
    ranks = np.empty(len(size), dtype=np.int64)
    cost = size if by_bytes else costs.ms[pieces]
    ranks[np.argsort(-cost, kind="stable")] = least
    return ranks


def _pick_grouped(problem: Problem, used: Ints, loads: NDArray[Any], option: int) -> Ints | None:
    """As `pick_ranks`, each group of pieces on one host: the one whose fullest rank is least."""
    pieces, group = problem.options.pieces(option), problem.options.cuts[option].group
    free = np.ones(problem.world_size, dtype=bool)
    ranks: list[Ints] = []
    for first_piece in range(pieces.start, pieces.stop, group):
        size = problem.costs.bytes[first_piece:first_piece + group].max()
        found: list[tuple[float, int, Ints]] = []
        for first in range(0, problem.world_size, problem.ranks_per_host):
            host = np.arange(first, first + problem.ranks_per_host)
            room = host[free[host] & (used[host] + size <= problem.capacity)]
            if len(room) >= group:
                order = room[np.argsort(loads[room], kind="stable")[:group]]
                found.append((float(loads[order].max()), first, order))
        if not found:
            return None
        best = min(found, key=lambda entry: entry[:2])[2]
        free[best] = False
        ranks.append(best)
    return np.concatenate(ranks)
