"""Exhaustive search with bounds, for instances small enough to be solved to the optimum."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations, permutations

import numpy as np
from numpy.typing import NDArray

from shardlab.planner.placement import Placement, Problem

Ints = NDArray[np.int64]

# Gains below this share are rounding.
_RELATIVE = 1e-12
# Instances beyond these sizes are not even tried.
_MAX_RANKS, _MAX_TABLES = 6, 12


def solve_exactly(problem: Problem, best: Placement | None,
                  max_nodes: int) -> tuple[Placement | None, bool]:
    """Depth-first branch and bound over options and rank assignments.

    Ranks are interchangeable, so states that are equal up to their order are visited once. A
    branch ends when its slowest rank, or the average of the work placed and the least work still
    to come, reaches the best placement known.

    Args:
        best: a placement to beat, or None.
        max_nodes: placements of a table to try before giving up.

    Returns:
        The best placement found, and whether it is proven optimal (None and True: nothing fits).
    """
    tied = any(cut.group for cut in problem.options.cuts)
    if tied or problem.world_size > _MAX_RANKS or problem.num_tables > _MAX_TABLES:
        return best, False
    search = _Search(problem, best, max_nodes)
    search.descend(Placement(problem), 0)
    return search.best, search.nodes <= max_nodes


class _Search:
    def __init__(self, problem: Problem, best: Placement | None, max_nodes: int) -> None:
        self.problem, self.best, self.max_nodes, self.nodes = problem, best, max_nodes, 0
        least = problem.total_ms[problem.least(problem.total_ms)]
        common = problem.costs.common_ms[problem.least(problem.costs.common_ms)]
        self.order = np.argsort(-least, kind="stable").tolist()
        # Least work, and least common cost, of the tables from each depth on.
        self.to_come = np.append(np.cumsum(least[self.order][::-1])[::-1], 0.0)
        self.common_to_come = np.append(np.cumsum(common[self.order][::-1])[::-1], 0.0)
        self.seen: list[set[bytes]] = [set() for _ in range(problem.num_tables + 1)]

    def descend(self, placement: Placement, depth: int) -> None:
        """Tries every way to place the tables from ``depth`` on."""
        if self._hopeless(placement, depth):
            return
        if depth == self.problem.num_tables:
            self.best = placement.copy()
            return
        table = self.order[depth]
        for option in self.problem.options.of_table(table):
            for ranks in self._assignments(option):
                self.nodes += 1
                if self.nodes > self.max_nodes:
                    return
                before = placement.loads.copy(), placement.used.copy()
                placement.put(table, option, ranks)
                if placement.fits and self._is_new(placement, depth):
                    self.descend(placement, depth + 1)
                placement.loads, placement.used = before
        placement.choice[table] = -1

    def _hopeless(self, placement: Placement, depth: int) -> bool:
        if self.best is None:
            return False
        average = placement.loads.mean() + self.to_come[depth] / self.problem.world_size
        reach = max(float(average), placement.slowest_ms + float(self.common_to_come[depth]))
        return reach >= self.best.slowest_ms * (1 - _RELATIVE)

    def _is_new(self, placement: Placement, depth: int) -> bool:
        state = np.stack([placement.loads, placement.used.astype(np.float64)])
        key = state[:, np.lexsort(state[::-1])].tobytes()
        if key in self.seen[depth]:
            return False
        self.seen[depth].add(key)
        return True

    def _assignments(self, option: int) -> Iterator[Ints]:
        """Rank lists for an option's pieces; equal pieces in one order only."""
        pieces = self.problem.options.pieces(option)
        costs = self.problem.costs
        alike = len(set(zip(costs.ms[pieces].tolist(), costs.bytes[pieces].tolist(),
                            strict=True))) == 1
        pick = combinations if alike else permutations
        for ranks in pick(range(self.problem.world_size), pieces.stop - pieces.start):
            yield np.array(ranks, dtype=np.int64)
