"""A lower bound of the slowest rank's time that no plan of the options can beat."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shardlab.planner.placement import Problem

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

# The bound is computed to this share of itself, and is valid however early it stops.
_TOLERANCE = 5e-4
_BISECTIONS, _COLUMNS = 12, 40
# Price, in multiples of all work, of bytes that do not fit: where it is paid, nothing fits.
_PENALTY = 1e3
# Shares of a tier below this are rounding.
_UNFIT = 1e-6
_RESOURCES = 3
_GOLDEN = 0.6180339887498949


@dataclass(frozen=True)
class Bound:
    """A proven lower bound, and what makes it so.

    Attributes:
        ms: no plan has a faster slowest rank; infinite where nothing fits.
        prices: [3] milliseconds of all ranks together that one byte more of hbm, ddr and ssd
            would save.
        fetch_price: milliseconds that one of prefetching costs, 0 to 1.
        table: the table whose largest piece alone takes so long; -1: work and memory bind.
    """

    ms: float
    prices: Floats
    fetch_price: float = 1.0
    table: int = -1


def lower_bound(problem: Problem) -> Bound:
    """Smallest T such that one option per table can be picked, or mixed, with

        every picked option's largest piece + everybody's common cost <= T   (nothing is cut
        finer than its pieces), and
        total work of the picked options <= ranks x T                        (average <= maximum),

    while their total bytes fit all ranks, all ddr and all ssd together. The linear program over
    mixtures is solved by generating choices (Dantzig and Wolfe); every iteration's dual prices give
    a valid bound.
    """
    prices = np.zeros(_RESOURCES)
    fits = problem.fits_alone
    first = problem.options.first[:-1]
    if not np.logical_or.reduceat(fits, first).all():
        return Bound(float("inf"), prices)
    common = np.minimum.reduceat(problem.costs.common_ms, first)
    others = problem.costs.fixed_ms + common.sum() - np.repeat(
        common, np.diff(problem.options.first))
    reach = np.where(fits, problem.largest_ms + others, np.inf)
    largest = np.minimum.reduceat(reach, first)
    low = float(largest.max())
    work = _Work(problem, fits)
    least, used = work.least(reach, np.inf)
    if not np.isfinite(least):
        return Bound(least, prices)
    average = work.average(least)
    if average <= low and work.average(work.least(reach, low, enough=low)[0]) <= low:
        return Bound(low, work.prices, work.fetch_price, int(np.argmax(largest)))
    low = max(low, average)
    if reach[used].max() > low:
        low = _bisect(work, reach, low)
    return Bound(low, work.prices, work.fetch_price)


@dataclass(frozen=True)
class Relaxed:
    """Options of least work that take a share of all memory, or less.

    Attributes:
        prices: [3] milliseconds per byte of hbm, ddr and ssd.
        fetch_price: milliseconds that one of prefetching costs.
        choice: [T] an option for every table, the best mixture rounded.
    """

    prices: Floats
    fetch_price: float
    choice: Ints


def relax(problem: Problem, limit_ms: float, fill: float, largest: float) -> Relaxed | None:
    """The linear program of `lower_bound`, with some memory left free.

    Args:
        problem: options and ranks.
        limit_ms: options whose pieces take longer are barred.
        fill: share of every tier that may be taken.
        largest: pieces that take a larger share of a rank's memory are barred.

    Returns:
        None if nothing takes so little.
    """
    work = _Work(problem, problem.fits_alone & (problem.fullness <= largest), fill)
    if not np.isfinite(work.least(problem.largest_ms, limit_ms)[0]):
        return None
    return Relaxed(work.prices, work.fetch_price, _rounded(problem, work.mixture))


def _rounded(problem: Problem, mixture: list[tuple[float, Ints]]) -> Ints:
    """One option per table out of a mixture of choices: of the tables that it splits, as many take
    each choice as its weight says, large and small ones alike."""
    choices = np.stack([choice for _, choice in mixture])
    split = np.flatnonzero((choices != choices[0]).any(axis=0))
    rounded: Ints = choices[0].copy()
    size = problem.total_bytes[choices[0][split]].sum(axis=1)
    split = split[np.argsort(-size, kind="stable")]
    # Multiples of the golden ratio fill [0, 1) evenly, however many there are.
    position = (np.arange(len(split)) + 0.5) * _GOLDEN % 1
    weights = np.cumsum([weight for weight, _ in mixture])
    which = np.minimum(np.searchsorted(weights, position * weights[-1], side="right"),
                       len(mixture) - 1)
    rounded[split] = choices[which, split]
    return rounded


def _bisect(work: _Work, reach: Floats, low: float) -> float:
    """The smallest T at or above ``low``, from below."""
    high = work.average(work.least(reach, low, enough=low)[0])
    if high <= low:
        return low
    if not np.isfinite(high):
        high = 2 * low
        while not work.average(work.least(reach, high, enough=high)[0]) <= high:
            low, high = high, 2 * high
    for _ in range(_BISECTIONS):
        if high - low <= _TOLERANCE * low:
            break
        middle = (low + high) / 2
        if work.average(work.least(reach, middle, enough=middle)[0]) <= middle:
            high = middle
        else:
            low = middle
    return low


class _Work:
    """Least total work of mixtures of choices that fit all memory together.

    Attributes:
        prices: [3] of the last call: ms per byte of hbm, ddr, ssd.
        fetch_price: of the last call.
        mixture: of the last call: choices [T] and their weights.
    """

    def __init__(self, problem: Problem, fits: NDArray[np.bool_], fill: float = 1.0) -> None:
        self.problem, self.fits = problem, fits
        self.room = np.maximum(fill * problem.room, 1.0)
        self.shares = problem.total_bytes / self.room
        self.window = problem.world_size * problem.window_ms
        self.prices, self.fetch_price = np.zeros(_RESOURCES), 1.0 if not self.window else 0.0
        self.mixture: list[tuple[float, Ints]] = []

    def average(self, least: float) -> float:
        """Milliseconds of the average rank."""
        return self.problem.costs.fixed_ms + least / self.problem.world_size

    def least(self, reach: Floats, limit: float, enough: float = 0.0) -> tuple[float, Ints]:
        """A lower bound of the work of options within ``limit``, and the options of its mixture.

        Args:
            reach: [O] milliseconds that picking an option forces on some rank.
            limit: options beyond it are barred.
            enough: stop once the average is known to lie below or above this.
        """
        problem = self.problem
        allowed = np.flatnonzero(self.fits & (reach <= limit * (1 + 1e-12)))
        tables = problem.options.table[allowed]
        starts = np.searchsorted(tables, np.arange(problem.num_tables))
        if not len(allowed) or len(np.unique(tables)) < problem.num_tables:
            return float("inf"), allowed
        busy, fetch = problem.total_busy[allowed], problem.total_fetch[allowed]
        shares = self.shares[allowed]
        columns: list[Ints] = []

        def pick(values: Floats) -> tuple[float, Ints]:
            lowest = np.minimum.reduceat(values, starts)
            hits = np.flatnonzero(values == np.repeat(
                lowest, np.diff(np.append(starts, len(allowed)))))
            of = tables[hits]
            return float(lowest.sum()), hits[np.flatnonzero(np.append(True, np.diff(of) != 0))]

        work, chosen = pick(busy + self.fetch_price * fetch)
        self.prices = np.zeros(_RESOURCES)
        if not self.window and np.all(shares[chosen].sum(axis=0) <= 1):
            self.mixture = [(1.0, allowed[chosen])]
            return work, allowed[chosen]
        columns = [chosen, *(pick(shares[:, kind])[1] for kind in range(_RESOURCES))]
        if self.window:
            columns.append(pick(busy + fetch)[1])
        best, penalty = -np.inf, _PENALTY * float(busy.sum() + fetch.sum() + 1.0)
        for _ in range(_COLUMNS):
            master = _solve_master(columns, (busy, fetch, shares), self.window, penalty)
            priced = busy + master.fetch_price * fetch + shares @ master.prices
            value, chosen = pick(priced)
            value -= float(master.prices.sum()) + master.fetch_price * self.window
            if value > best:
                best = value
                self.prices, self.fetch_price = master.prices / self.room, master.fetch_price
            self.mixture = [(weight, allowed[column]) for column, weight
                            in zip(columns, master.weights.tolist(), strict=True) if weight > 0]
            if master.work - best <= _TOLERANCE * abs(best) or \
                    self.average(best) > enough > 0 or 0 < self.average(master.work) <= enough:
                break
            columns.append(chosen)
        used = np.unique(np.concatenate([choice for _, choice in self.mixture]))
        return (float("inf") if master.unfit > _UNFIT else best), used


@dataclass(frozen=True)
class _Master:
    """The best mixture of known choices."""

    work: float
    weights: Floats
    prices: Floats
    fetch_price: float
    unfit: float


def _solve_master(columns: list[Ints], costs: tuple[Floats, Floats, Floats], window: float,
                  penalty: float) -> _Master:
    """Minimises work + prefetching beyond the window over mixtures that fit."""
    from scipy.optimize import linprog

    busy, fetch, shares = costs
    work = np.array([busy[column].sum() for column in columns])
    fetched = np.array([fetch[column].sum() for column in columns])
    used = np.array([shares[column].sum(axis=0) for column in columns])
    count = len(columns)
    # Variables: weights; bytes that do not fit, by tier; prefetching beyond the window.
    objective = np.concatenate([work, np.full(_RESOURCES, penalty), [1.0]])
    upper = np.zeros((_RESOURCES + 1, count + _RESOURCES + 1))
    upper[:_RESOURCES, :count] = used.T
    upper[range(_RESOURCES), range(count, count + _RESOURCES)] = -1
    upper[_RESOURCES, :count], upper[_RESOURCES, -1] = fetched, -1
    equal = np.concatenate([np.ones(count), np.zeros(_RESOURCES + 1)])[None]
    limits = np.array([1.0] * _RESOURCES + [window])
    scale = max(float(work.max()), 1e-300)
    solved = linprog(objective / scale, upper, limits, equal, [1.0], method="highs-ds")
    duals = -solved.ineqlin.marginals * scale
    return _Master(float(solved.fun * scale), solved.x[:count], np.maximum(duals[:_RESOURCES], 0),
                   float(np.clip(duals[_RESOURCES], 0.0, 1.0)),
                   float(solved.x[count:count + _RESOURCES].sum()))
