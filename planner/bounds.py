"""A lower bound of the slowest rank's time that no plan of the options can beat."""

from __future__ import annotations

import numpy as np

from shardlab.planner.placement import Problem

_HALVINGS = 45
_PRICE_STEPS = 40
# Prices of memory that are tried, as powers of ten of milliseconds per byte.
_LOWEST_PRICE, _HIGHEST_PRICE = -25.0, 2.0


def lower_bound(problem: Problem) -> float:
    """Smallest T such that one option per table can be picked with

        every picked option's largest piece + everybody's common cost <= T   (nothing is cut
        finer than its pieces), and
        total work of the picked options <= ranks x T                        (average <= maximum),

    while their total bytes fit all ranks together. The memory condition enters through a
    Lagrange multiplier (a price per byte), whose every value gives a valid bound.

    Returns:
        Milliseconds; infinite when no such T exists, so that nothing fits.
    """
    fits = problem.largest_bytes <= problem.capacity
    leanest = problem.least(np.where(fits, problem.total_bytes, np.inf))
    room = problem.world_size * problem.capacity
    if not fits[leanest].all() or problem.total_bytes[leanest].sum() > room:
        return float("inf")
    common = np.minimum.reduceat(problem.costs.common_ms, problem.options.first[:-1])
    others = common.sum() - common[problem.options.table]
    reach = np.where(fits, problem.largest_ms + others, np.inf)
    fixed = problem.costs.fixed_ms
    low = float(np.minimum.reduceat(reach, problem.options.first[:-1]).max())
    high = low + float(problem.total_ms[leanest].sum())
    if _least_work(problem, reach, low) <= problem.world_size * low:
        return fixed + low
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if _least_work(problem, reach, middle) <= problem.world_size * middle:
            high = middle
        else:
            low = middle
    return fixed + low


def _least_work(problem: Problem, reach: np.ndarray, limit: float) -> float:
    """A lower bound of the total work of options within ``limit`` that fit all ranks' memory."""
    first = problem.options.first[:-1]
    allowed = np.where(reach <= limit, problem.total_ms, np.inf)
    chosen = problem.least(allowed)
    work = float(allowed[chosen].sum())
    room = problem.world_size * problem.capacity
    if problem.total_bytes[chosen].sum() <= room:
        return work

    def dual(price: float) -> float:
        priced = np.minimum.reduceat(allowed + price * problem.total_bytes, first)
        return float(priced.sum()) - price * room

    low, high = _LOWEST_PRICE, _HIGHEST_PRICE
    for _ in range(_PRICE_STEPS):  # the dual is concave in the price: narrow by thirds
        left, right = low + (high - low) / 3, high - (high - low) / 3
        at_left, at_right = dual(10.0 ** left), dual(10.0 ** right)
        work = max(work, at_left, at_right)
        low, high = (left, high) if at_left < at_right else (low, right)
    return work
