"""Chooses an option for every table and ranks for its pieces: the slowest rank as fast as can be.

1. A proven lower bound, and with it prices of memory: what a byte of every tier is worth.
2. A ladder of choices: per table the least work, bytes paid at these prices, among the options
   whose largest piece stays below a share of the lower bound and of a rank's memory. Coarse pieces
   cost less work, fine ones balance better.
3. The most promising choices are laid out greedily and by largest differencing; the best layouts
   of each method go on.
4. Local improvement of both, with kicks out of dead ends; the best one wins.
5. Small instances are then solved exactly.
6. Memory is levelled where that costs next to no time.

Deterministic: no randomness; effort is limited by counts, and by a clock only where the caller
sets a time limit.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shardlab.planner.bounds import Bound, lower_bound
from shardlab.planner.choices import FILLS, choices, fullness
from shardlab.planner.exact import solve_exactly
from shardlab.planner.improve import Expired, improve, kick, never, repair
from shardlab.planner.level import level_memory
from shardlab.planner.partition import Order, greedy, largest_differencing
from shardlab.planner.placement import Placement, Problem

Ints = NDArray[np.int64]

# Choices that are laid out by largest differencing where memory is tight.
_DIFFERENCED = 3
# Largest piece of the layouts that only have to fit, as a share of a rank's memory.
_LEAN_LADDER = (0.01, 0.03, 0.1, 0.3, 1.0)
# Choices that are laid out, and layouts that are improved, per starting method: at least so many,
# more of small instances.
_LAYOUTS, _MAX_LAYOUTS, _LAYOUT_WORK = 8, 24, 2_400_000
_KEEP, _MAX_KEEP, _KEEP_WORK = 2, 4, 60_000
_MOVES, _RECUTS = 3000, 4000
_EXACT_NODES = 20_000
# Layouts that are kicked, and how often: kicks are dearer the larger the instance; moves after
# each.
_KICKED, _MIN_KICKS, _MAX_KICKS, _KICK_WORK, _KICK_MOVES = 4, 3, 150, 500_000, 40
# A result this far from the bound is kicked again, so many times as often.
_FAR, _FAR_KICKS = 1.05, 4
# Improvement stops this close to the lower bound.
_CLOSE_ENOUGH = 1.001
# Time that levelling memory may cost, over the lower bound: less than the model's own error.
_LEVEL_WITHIN = 1.01


@dataclass(frozen=True)
class Solution:
    """The search's answer.

    Attributes:
        placement: the best placement found.
        bound: no plan of the options has a faster slowest rank than this says.
        start: how the winning layout began: "greedy", "largest_differencing" or "exact".
        optimal: proven the best of all plans of the options.
        starts: best milliseconds before improvement, by starting method.
    """

    placement: Placement
    bound: Bound
    start: str
    optimal: bool
    starts: dict[str, float]

    @property
    def lower_bound_ms(self) -> float:
        """No plan of the options has a faster slowest rank."""
        slowest = self.placement.slowest_ms
        return slowest if self.optimal else min(self.bound.ms, slowest)


def leanest(problem: Problem) -> Placement | int:
    """A layout that fits, whatever its time; or the table left over by the finest cuts.

    Every table takes the smallest share of all memory among the options below a share of a rank's
    memory, from fine to coarse, and memory is levelled.
    """
    left: list[int] = []
    full = problem.fullness
    size = (problem.total_bytes / np.maximum(problem.room, 1.0)).sum(axis=1)
    smallest = np.minimum.reduceat(full, problem.options.first[:-1])
    counts = np.diff(problem.options.first)
    for share in _LEAN_LADDER:
        limit = np.repeat(np.maximum(share, smallest), counts)
        choice = problem.least(np.where(full <= limit, size, np.inf))
        found = greedy(problem, choice, Order.BYTES)
        if isinstance(found, Placement):
            return found
        left.append(found)
    return left[0]


def find_layout(problem: Problem) -> Placement | int:
    """Any layout that fits; or the table that was left over."""
    found = leanest(problem)
    if isinstance(found, Placement):
        return found
    bound = lower_bound(problem)
    if np.isfinite(bound.ms):
        for choice in choices(problem, bound)[:_LAYOUTS]:
            placement = greedy(problem, choice.options, Order.SHARE)
            if isinstance(placement, Placement):
                return placement
    return found


def solve(problem: Problem, expired: Expired = never) -> Solution | None:
    """The best plan found, or None when no layout fits.

    Args:
        problem: options and ranks.
        expired: whether time is up; the best layout so far is then the answer.
    """
    bound = lower_bound(problem)
    if not np.isfinite(bound.ms):
        return None
    size = problem.num_tables * problem.world_size
    target = bound.ms * _CLOSE_ENOUGH
    layouts, starts = _layouts(problem, bound, expired), {}
    for start, placements in layouts.items():
        placements.sort(key=lambda placement: placement.slowest_ms)
        starts.update({start: placements[0].slowest_ms} if placements else {})
    improved: list[tuple[str, Placement]] = []
    for start, placements in layouts.items():
        for layout in placements[:min(_MAX_KEEP, max(_KEEP, _KEEP_WORK // size))]:
            improve(layout, target, moves=_MOVES, recuts=_RECUTS, expired=expired)
            improved.append((start, layout))
    improved.sort(key=lambda entry: entry[1].slowest_ms)
    kicks = min(_MAX_KICKS, max(_MIN_KICKS, _KICK_WORK // size))
    kicked = [(start, kick(layout, target, kicks=kicks, moves=_KICK_MOVES, expired=expired))
              for start, layout in improved[:_KICKED]]
    best = min(kicked, key=lambda entry: entry[1].slowest_ms, default=None)
    if best and best[1].slowest_ms > bound.ms * _FAR:
        best = best[0], kick(best[1], target, kicks=_FAR_KICKS * kicks, moves=_KICK_MOVES,
                             expired=expired)
    incumbent = best[1] if best else None
    exact, optimal = solve_exactly(problem, incumbent, _EXACT_NODES, expired)
    if exact is None:
        return None
    limit = exact.slowest_ms if optimal else bound.ms * _LEVEL_WITHIN
    if not expired():
        level_memory(exact, limit, moves=_MOVES)
    exact.refresh()
    start = best[0] if best and exact is incumbent else "exact"
    return Solution(exact, bound, start, optimal, starts)


def _layouts(problem: Problem, bound: Bound, expired: Expired) -> dict[str, list[Placement]]:
    """Layouts that fit, by starting method."""
    found: dict[str, list[Placement]] = {"greedy": [], "largest_differencing": []}
    size = problem.num_tables * problem.world_size
    count = min(_MAX_LAYOUTS, max(_LAYOUTS, _LAYOUT_WORK // size))
    # Where memory is nearly full, layouts by time alone hardly ever fit.
    tight = fullness(problem, problem.least(problem.total_ms)) > min(FILLS)
    best = np.inf
    for number, choice in enumerate(choices(problem, bound)[:count]):
        if expired() and np.isfinite(best):
            break
        if choice.hope_ms >= best:
            continue
        for order in (Order.SHARE, Order.TIME) if tight else (Order.TIME, Order.SHARE):
            placement = greedy(problem, choice.options, order)
            if isinstance(placement, Placement):
                found["greedy"].append(placement)
                if not tight:
                    break
        if not tight or number < _DIFFERENCED:
            differenced = largest_differencing(problem, choice.options)
            if differenced is not None and (differenced.fits or repair(differenced)):
                found["largest_differencing"].append(differenced)
        best = min((placement.slowest_ms for placements in found.values()
                    for placement in placements), default=np.inf)
    if not any(found.values()) or size <= _KEEP_WORK:
        lean = leanest(problem)
        if isinstance(lean, Placement):
            found["greedy"].append(lean)
    return found
