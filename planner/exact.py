"""Exhaustive search with bounds, for instances small enough to be solved to the optimum."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations, permutations

import numpy as np
from numpy.typing import NDArray

from shardlab.planner.improve import Expired, never
from shardlab.planner.placement import Placement, Problem

Ints = NDArray[np.int64]

# Gains below this share are rounding.
_RELATIVE = 1e-12
# Instances beyond these sizes are not even tried.
_MAX_RANKS, _MAX_TABLES = 6, 12


def solve_exactly(problem: Problem, best: Placement | None, max_nodes: int,
                  expired: Expired = never) -> tuple[Placement | None, bool]:
    """Depth-first branch and bound over options and rank assignments.

    Where ranks are interchangeable, states that are equal up to their order are visited once. A
    branch ends when its slowest rank, or the average of the work placed and the least work still
    to come, reaches the best placement known.

    Args:
        problem: options and ranks.
        best: a placement to beat, or None.
        max_nodes: placements of a table to try before giving up.
        expired: whether time is up.

    Returns:
        The best placement found, and whether it is proven optimal (None and True: nothing fits).
    """
    tied = problem.options.group.any() or bool(problem.allowed)
    if tied or problem.world_size > _MAX_RANKS or problem.num_tables > _MAX_TABLES:
        return best, False
    search = _Search(problem, best, max_nodes, expired)
    search.descend(Placement(problem), 0)
    return search.best, not search.stopped


class _Search:
    def __init__(self, problem: Problem, best: Placement | None, max_nodes: int,
                 expired: Expired) -> None:
        self.problem, self.best, self.max_nodes, self.nodes = problem, best, max_nodes, 0
        self.expired, self.stopped = expired, False
        # Without prefetching beyond the window: less than any plan's work.
        least = problem.total_busy[problem.least(problem.total_busy)]
        common = problem.costs.common_ms[problem.least(problem.costs.common_ms)]
        self.order = np.argsort(-problem.total_ms[problem.least(problem.total_ms)],
                                kind="stable").tolist()
        # Least work, and least common cost, of the tables from each depth on.
        self.to_come = np.append(np.cumsum(least[self.order][::-1])[::-1], 0.0)
        self.common_to_come = np.append(np.cumsum(common[self.order][::-1])[::-1], 0.0)
        self.seen: list[set[bytes]] = [set() for _ in range(problem.num_tables + 1)]
        self.shared = problem.ranks.ranks_per_pool > 1 and \
            bool(problem.costs.piece_bytes[:, 1:].any())

    def descend(self, placement: Placement, depth: int) -> None:
        """Tries every way to place the tables from ``depth`` on."""
        if self._hopeless(placement, depth):
            return
        if depth == self.problem.num_tables:
            self.best = placement.copy()
            return
        table = self.order[depth]
        for option in self.problem.by_work(table):
            for ranks in self._assignments(option):
                self.nodes += 1
                if self.nodes > self.max_nodes or (self.nodes % 256 == 0 and self.expired()):
                    self.stopped = True
                if self.stopped:
                    return
                trial = placement.copy()
                trial.put(table, option, ranks)
                if trial.fits and self._is_new(trial, depth):
                    self.descend(trial, depth + 1)

    def _hopeless(self, placement: Placement, depth: int) -> bool:
        if self.best is None:
            return False
        average = placement.loads.mean() + placement.common_ms + \
            self.to_come[depth] / self.problem.world_size
        reach = max(float(average), placement.slowest_ms + float(self.common_to_come[depth]))
        return reach >= self.best.slowest_ms * (1 - _RELATIVE)

    def _is_new(self, placement: Placement, depth: int) -> bool:
        """Whether no state equal up to the order of ranks was seen at this depth."""
        if self.shared:  # ranks of different hosts are not interchangeable
            return True
        common = np.array([placement.common_ms, placement.common_bytes])
        state = np.stack([placement.busy, placement.fetch, placement.used.astype(np.float64),
                          *placement.pools.T.astype(np.float64)]) \
            if self.problem.ranks.ranks_per_pool == 1 else \
            np.stack([placement.busy, placement.fetch, placement.used.astype(np.float64)])
        key = state[:, np.lexsort(state[::-1])].tobytes() + common.tobytes()
        if key in self.seen[depth]:
            return False
        self.seen[depth].add(key)
        return True

    def _assignments(self, option: int) -> Iterator[Ints]:
        """Rank lists for an option's pieces; equal pieces in one order only."""
        busy, fetch = self.problem.piece_ms(option)
        alike = len(set(zip(busy.tolist(), fetch.tolist(), strict=True))) == 1
        pick = combinations if alike else permutations
        for ranks in pick(range(self.problem.world_size), len(busy)):
            yield np.array(ranks, dtype=np.int64)
