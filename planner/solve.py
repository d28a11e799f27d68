"""From a cost model to a solved problem: which tiers are needed, and which storages.

1. Everything on hbm, where tables leave the tier open.
2. Where that does not fit, or hbm binds, ddr joins; where ddr does not suffice or binds, ssd.
   A farther tier is slower in every model and only saves nearer ones: where the farthest tier in
   use does not bind, the next one cannot help.
3. Where tables name several storages, the first of each table is taken unless it does not fit
   (`preferences`).
"""

from __future__ import annotations

from dataclasses import dataclass

from shardlab.planner.improve import Expired, never
from shardlab.planner.placement import Problem
from shardlab.planner.preferences import preferred
from shardlab.planner.problem import CostModel
from shardlab.planner.search import Solution, solve
from shardlab.storage_specs import Tier

# Tier -> its column among prices and sizes.
_COLUMN = {tier: column for column, tier in enumerate(Tier)}


@dataclass(frozen=True)
class Solved:
    """A problem with the best plan found.

    Attributes:
        problem: the options that the user's preferences leave, with their costs.
        solution: the search's answer.
        everything: the options before preferences took some away.
    """

    problem: Problem
    solution: Solution
    everything: Problem


def solve_model(model: CostModel, expired: Expired = never) -> Solved | None:
    """The best plan by a cost model, or None when nothing fits.

    Args:
        model: prices options.
        expired: whether time is up.
    """
    best: Solved | None = None
    for count in range(1, len(model.tiers) + 1):
        tiers = model.tiers[:count]
        everything = model.problem(tiers)
        problem = preferred(everything)
        solution = None if problem is None else solve(problem, expired)
        if problem is None or solution is None:
            continue
        if best is None or _is_better(Solved(problem, solution, everything), best):
            best = Solved(problem, solution, everything)
        binds = solution.bound.prices[_COLUMN[tiers[-1]]] > 0
        if not binds and not problem.options.preference[solution.placement.choice].any():
            break
    return best


def _is_better(found: Solved, best: Solved) -> bool:
    """By the user's preferences first, then by time."""
    ranks = [int(entry.problem.options.preference[entry.solution.placement.choice].sum())
             for entry in (found, best)]
    if ranks[0] != ranks[1]:
        return ranks[0] < ranks[1]
    return found.solution.placement.slowest_ms < best.solution.placement.slowest_ms
