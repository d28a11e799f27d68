"""Picks a storage where tables name several: the first of every table, unless that does not fit.

What is kept is quality, in the order in which the user stated it; time is the search's matter.
Where the first storages of all tables do not fit, tables step down their lists one storage at a
time: always the step that saves the most bytes, until a layout fits. Steps that turn out not to be
needed are then taken back, smallest saving first, and the last one is replaced by the smallest that
does as well. So few tables step down, and by few steps.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from shardlab.planner.placement import Placement, Problem
from shardlab.planner.search import find_layout

Ints = NDArray[np.int64]


def preferred(problem: Problem) -> Problem | None:
    """The problem with one storage left to every table, laid on any tiers.

    Returns:
        None if not even the last storages of all tables fit.
    """
    last = np.maximum.reduceat(problem.options.preference, problem.options.first[:-1])
    if not last.any():
        return problem
    steps = _steps(problem, last)
    level = np.zeros(problem.num_tables, dtype=np.int64)
    if not _fits(problem, level):
        needed = _fewest(problem, steps)
        if needed is None:
            return None
        level = _levels(problem, steps[:needed])
        for table in steps[:needed][::-1]:
            level[table] -= 1
            if not _fits(problem, level):
                level[table] += 1
        level = _smaller_last(problem, steps, needed, level)
    return _left(problem, level)


def _smaller_last(problem: Problem, steps: list[int], needed: int, level: Ints) -> Ints:
    """The last step needed, replaced by the step of the smallest saving that does as well."""
    without = level.copy()
    without[steps[needed - 1]] -= 1
    others = [table for table in dict.fromkeys(steps[needed:]) if level[table] == 0]
    low, high = 0, len(others)  # savings fall: the first ``low`` ones do
    while low < high:
        middle = (low + high) // 2
        trial = without.copy()
        trial[others[middle]] += 1
        if _fits(problem, trial):
            low = middle + 1
        else:
            high = middle
    if low == 0:
        return level
    without[others[low - 1]] += 1
    return without


def _steps(problem: Problem, last: Ints) -> list[int]:
    """Tables in the order in which they step down: largest saving of bytes first.

    A step counts for the average of itself and the steps after it, where these save more; so a
    table's steps stay in their order.
    """
    size = (problem.total_bytes / np.maximum(problem.room, 1.0)).sum(axis=1)
    preference = problem.options.preference
    steps: list[tuple[float, int, int]] = []
    for table in np.flatnonzero(last).tolist():
        options = np.array(problem.options.of_table(table))
        least = [float(size[options[preference[options] == level]].min())
                 for level in range(int(last[table]) + 1)]
        saved, start = float("inf"), 0
        while start < len(least) - 1:
            averages = [(least[start] - least[end]) / (end - start)
                        for end in range(start + 1, len(least))]
            length = 1 + int(np.argmax(averages))
            saved = min(saved, averages[length - 1])
            steps += [(-saved, table, start + step) for step in range(length)]
            start += length
    return [table for _, table, _ in sorted(steps)]


def _levels(problem: Problem, steps: list[int]) -> Ints:
    return np.bincount(np.array(steps, dtype=np.int64), minlength=problem.num_tables)


def _fewest(problem: Problem, steps: list[int]) -> int | None:
    """How many of the steps it takes to fit."""
    if not _fits(problem, _levels(problem, steps)):
        return None
    low, high = 0, len(steps)  # low does not fit, high does
    while high - low > 1:
        middle = (low + high) // 2
        if _fits(problem, _levels(problem, steps[:middle])):
            high = middle
        else:
            low = middle
    return high


def _left(problem: Problem, level: Ints) -> Problem:
    return problem.take(np.flatnonzero(
        problem.options.preference == level[problem.options.table]))


def _fits(problem: Problem, level: Ints) -> bool:
    return isinstance(find_layout(_left(problem, level)), Placement)
