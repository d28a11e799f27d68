"""Which option each table might take, before anything lies on a rank.

Choices are ranked by the time that each can hope for: a ladder of the least work among options
whose largest piece stays below a share of the lower bound and of a rank's memory, bytes paid at the
bound's prices; and, where memory is nearly full, mixtures of the bound's linear program, rounded.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

from shardlab.planner.bounds import Bound, Relaxed, relax
from shardlab.planner.placement import Problem
from shardlab.planner.settle import settle

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

# Largest piece of the choices tried, as a share of the lower bound and of a rank's memory.
_MS_LADDER = (1.0, 0.5, 0.2, 0.08, 0.02, 0.001)
_BYTE_LADDER = (1.0, 0.85, 0.7, 0.5, 0.3, 0.1, 0.03)
# Shares of all memory that choices aim at, because pieces do not pack without gaps; and the largest
# pieces that they are made of.
FILLS = (0.97, 0.93, 0.85)
_RELAXED_PIECES = (1.0, 0.5)
# Where memory binds: multiples of its price.
_SCALES = (1.0, 1.01, 1.03, 1.07, 1.15, 1.3, 1.6)
# What bytes that do not fit cost a choice when choices are compared, in multiples of its time.
_OVERFULL = 10.0


@dataclass(frozen=True)
class Choice:
    """One option per table.

    Attributes:
        options: [T] the options.
        hope_ms: milliseconds of the slowest rank that no layout of these options can beat.
        excess: share of the fullest tier that the options' bytes exceed it by; 0 where they fit.
    """

    options: Ints
    hope_ms: float
    excess: float

    @property
    def promise(self) -> float:
        """What choices are ranked by: hope, and how far it is from fitting."""
        return self.hope_ms * (1 + _OVERFULL * self.excess)


def choices(problem: Problem, bound: Bound) -> list[Choice]:
    """Different choices, the most promising first."""
    found: dict[bytes, Ints] = {}
    levels = [(scale * bound.prices, bound.fetch_price) for scale in _SCALES] \
        if bound.prices.any() else [(bound.prices, bound.fetch_price)]
    if fullness(problem, problem.least(problem.total_ms)) > min(FILLS):
        for relaxed, choice in _relaxations(problem, bound):
            found.setdefault(choice.tobytes(), choice)
            if not bound.prices.any() and relaxed.prices.any():
                levels.append((relaxed.prices, relaxed.fetch_price))
    for choice in _ladder(problem, bound, levels):
        found.setdefault(choice.tobytes(), choice)
    rated = [_rated(problem, choice) for choice in found.values()]
    return sorted(rated, key=lambda choice: choice.promise)


def _relaxations(problem: Problem, bound: Bound) -> Iterator[tuple[Relaxed, Ints]]:
    """The linear program with more and more memory left free, of coarse and of finer pieces, each
    with its mixture rounded and settled."""
    for largest, fill in product(_RELAXED_PIECES, FILLS):
        relaxed = relax(problem, bound.ms, fill, largest)
        if relaxed is not None:
            allowed = problem.fits_alone & (problem.fullness <= largest) & \
                (problem.largest_ms <= bound.ms)
            yield relaxed, relaxed.choice
            yield relaxed, settle(problem, relaxed.choice, allowed, fill)


def _ladder(problem: Problem, bound: Bound,
            levels: list[tuple[Floats, float]]) -> Iterator[Ints]:
    """Least work at every level of prices, of pieces up to every share of time and memory."""
    budget = bound.ms - problem.costs.fixed_ms
    first, counts = problem.options.first[:-1], np.diff(problem.options.first)
    full = np.where(problem.fits_alone, problem.fullness, np.inf)
    for prices, fetch_price in levels:
        values = problem.total_busy + fetch_price * problem.total_fetch + \
            problem.total_bytes @ prices
        for ms_share, byte_share in product(_MS_LADDER, _BYTE_LADDER):
            # Above 1: beyond one of the limits.
            excess = np.maximum(problem.largest_ms / (ms_share * budget), full / byte_share)
            least = np.minimum.reduceat(excess, first)
            limit = np.repeat(np.maximum(1.0, least), counts)
            yield problem.least(np.where(excess <= limit, values, np.inf))


def _rated(problem: Problem, choice: Ints) -> Choice:
    fetch = problem.total_fetch[choice].sum() / problem.world_size - problem.window_ms
    average = problem.total_busy[choice].sum() / problem.world_size + max(float(fetch), 0.0)
    common = problem.costs.common_ms[choice]
    largest = float((problem.largest_ms[choice] - common).max() + common.sum())
    return Choice(choice, problem.costs.fixed_ms + max(float(average), largest),
                  max(fullness(problem, choice) - 1, 0.0))


def fullness(problem: Problem, choice: Ints) -> float:
    """Share of the fullest tier that a choice takes."""
    return float((problem.total_bytes[choice].sum(axis=0) / np.maximum(problem.room, 1.0)).max())
