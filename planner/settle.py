"""Makes a choice of options fit all memory by its sum, at the least cost in time."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from shardlab.planner.placement import Problem

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

# Tables that get another option, at most.
_MAX_SWITCHES = 40
_TINY = 1e-12


def settle(problem: Problem, choice: Ints, allowed: Bools, fill: float) -> Ints:
    """Switches tables to other options, one after the other: first those that bring the sums of
    bytes closest to their limits for the least time, then, while the sums fit, those that save
    the most time.

    Args:
        problem: options and ranks.
        choice: [T] option of each table.
        allowed: [O] options that may be taken.
        fill: share of every tier that may be taken.

    Returns:
        [T] the new choice.
    """
    shares = problem.total_bytes / np.maximum(fill * problem.room, 1.0)
    time, table = problem.total_ms, problem.options.table
    choice, total = choice.copy(), shares[choice].sum(axis=0)
    for _ in range(_MAX_SWITCHES):
        current = choice[table]
        over = float(np.maximum(total - 1, 0).sum())
        left = np.maximum(total - shares[current] + shares - 1, 0).sum(axis=1)
        cost = time - time[current]
        if over > _TINY:
            better = allowed & (left < over * (1 - _TINY))
            merit = np.where(better, -np.maximum(cost, _TINY) / np.maximum(over - left, _TINY),
                             -np.inf)
        else:
            better = allowed & (left <= 0) & (cost < -_TINY)
            merit = np.where(better, -cost, -np.inf)
        best = int(np.argmax(merit))
        if not np.isfinite(merit[best]):
            break
        of = int(table[best])
        total += shares[best] - shares[choice[of]]
        choice[of] = best
    return choice
