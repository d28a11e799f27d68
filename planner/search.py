"""Chooses an option for every table and ranks for its pieces: the slowest rank as fast as can be.

1. A ladder of choices: per table the least work among the options whose largest piece stays below
   a share of the lower bound and of a rank's memory. Coarse pieces cost less work, fine ones
   balance better.
2. Every choice is laid out greedily and by largest differencing; the best layouts of each method
   go on.
3. Local improvement of both, with kicks out of dead ends; the best one wins.
4. Small instances are then solved exactly.
5. Memory is levelled where that costs next to no time.

Deterministic: no randomness, no clock; effort is limited by counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

from shardlab.planner.bounds import lower_bound
from shardlab.planner.exact import solve_exactly
from shardlab.planner.improve import improve, kick, repair
from shardlab.planner.level import level_memory
from shardlab.planner.partition import Order, greedy, largest_differencing
from shardlab.planner.placement import Placement, Problem

Ints = NDArray[np.int64]

# Largest piece of the choices tried, as a share of the lower bound and of a rank's memory.
_MS_LADDER = (1.0, 0.5, 0.2, 0.08, 0.02, 0.001)
_BYTE_LADDER = (1.0, 0.3, 0.1, 0.03)
# Largest piece of the layouts that only have to fit, as a share of a rank's memory.
_LEAN_LADDER = (0.01, 0.03, 0.1, 0.3, 1.0)
# Layouts that get improved, per starting method: at least two, more of small instances.
_KEEP, _KEEP_WORK = 2, 500
_MOVES, _RECUTS = 1500, 4000
_EXACT_NODES = 20_000
# Kicks are dearer the larger the instance; moves after each.
_MIN_KICKS, _MAX_KICKS, _KICK_WORK, _KICK_MOVES = 10, 300, 20_000, 40
# Improvement stops this close to the lower bound.
_CLOSE_ENOUGH = 1.001
# Time that levelling memory may cost, over the lower bound: less than the model's own error.
_LEVEL_WITHIN = 1.01


@dataclass(frozen=True)
class Solution:
    """The search's answer.

    Attributes:
        placement: the best placement found.
        lower_bound_ms: no plan of the options has a faster slowest rank.
        start: how the winning layout began: "greedy", "largest_differencing" or "exact".
        optimal: proven the best of all plans of the options.
        starts: best milliseconds before improvement, by starting method.
    """

    placement: Placement
    lower_bound_ms: float
    start: str
    optimal: bool
    starts: dict[str, float]


def choices(problem: Problem, bound_ms: float) -> list[Ints]:
    """Different choices of one option per table, from coarse to fine pieces."""
    found: dict[bytes, Ints] = {}
    budget = bound_ms - problem.costs.fixed_ms
    for ms_share, byte_share in product(_MS_LADDER, _BYTE_LADDER):
        # Above 1: beyond one of the limits.
        excess = np.maximum(problem.largest_ms / (ms_share * budget),
                            problem.largest_bytes / (byte_share * problem.capacity))
        least = np.minimum.reduceat(excess, problem.options.first[:-1])
        limit = np.maximum(1.0, least)[problem.options.table]
        choice = problem.least(np.where(excess <= limit, problem.total_ms, np.inf))
        found.setdefault(choice.tobytes(), choice)
    return list(found.values())


def leanest(problem: Problem) -> Placement | int:
    """A layout that fits, whatever its time; or the table left over by the finest cuts.

    Every table takes the fewest bytes among the options below a share of a rank's memory, from
    fine to coarse, and memory is levelled.
    """
    left: list[int] = []
    full = problem.largest_bytes / problem.capacity
    smallest = np.minimum.reduceat(full, problem.options.first[:-1])
    for share in _LEAN_LADDER:
        limit = np.maximum(share, smallest)[problem.options.table]
        choice = problem.least(np.where(full <= limit, problem.total_bytes, np.inf))
        found = greedy(problem, choice, Order.BYTES)
        if isinstance(found, Placement):
            return found
        left.append(found)
    return left[0]


def solve(problem: Problem) -> Solution | None:
    """The best plan found, or None when no layout fits."""
    bound = lower_bound(problem)
    if not np.isfinite(bound):
        return None
    size = problem.num_tables * problem.world_size
    kicks = min(_MAX_KICKS, max(_MIN_KICKS, _KICK_WORK // size))
    best: tuple[str, Placement] | None = None
    starts: dict[str, float] = {}
    for start, placements in _layouts(problem, bound).items():
        ranked = sorted(placements, key=lambda placement: placement.slowest_ms)
        starts.update({start: ranked[0].slowest_ms} if ranked else {})
        for layout in ranked[:max(_KEEP, _KEEP_WORK // size)]:
            improve(layout, bound * _CLOSE_ENOUGH, moves=_MOVES, recuts=_RECUTS)
            placement = kick(layout, bound * _CLOSE_ENOUGH, kicks=kicks, moves=_KICK_MOVES)
            if best is None or placement.slowest_ms < best[1].slowest_ms:
                best = start, placement
    incumbent = best[1] if best else None
    exact, optimal = solve_exactly(problem, incumbent, _EXACT_NODES)
    if exact is None:
        return None
    level_memory(exact, exact.slowest_ms if optimal else bound * _LEVEL_WITHIN, moves=_MOVES)
    exact.refresh()
    start = best[0] if best and exact is incumbent else "exact"
    return Solution(exact, exact.slowest_ms if optimal else min(bound, exact.slowest_ms), start,
                    optimal, starts)


def _layouts(problem: Problem, bound: float) -> dict[str, list[Placement]]:
    """Layouts that fit, by starting method."""
    found: dict[str, list[Placement]] = {"greedy": [], "largest_differencing": []}
    for choice in choices(problem, bound):
        for order in (Order.TIME, Order.SHARE):
            placement = greedy(problem, choice, order)
            if isinstance(placement, Placement):
                found["greedy"].append(placement)
                break
        differenced = largest_differencing(problem, choice)
        if differenced is not None and (differenced.fits or repair(differenced)):
            found["largest_differencing"].append(differenced)
    lean = leanest(problem)
    if isinstance(lean, Placement):
        found["greedy"].append(lean)
    return found
