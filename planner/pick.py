"""Which ranks take the pieces of an option: the least loaded ones with room."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from shardlab.planner.placement import DDR, HBM, SSD, Placement, Problem

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def pick_ranks(placement: Placement, option: int, levels: Floats, *, ahead: int = 0,
               crowded: bool = False) -> Ints | None:
    """The ranks with the lowest level that have room for the option's pieces.

    The costliest piece goes to the lowest level. Common costs are the same everywhere and do not
    matter here; their bytes do.

    Args:
        placement: what is placed so far.
        option: what to place.
        levels: [W] what is levelled: milliseconds, or bytes.
        ahead: bytes to leave free on every rank for what is still to come.
        crowded: as if all ranks were empty; the caller makes room.

    Returns:
        [n] a rank for every piece; None if there is no room.
    """
    problem = placement.problem
    costs, count = problem.costs, int(problem.options.pieces[option])
    size = costs.piece_bytes[option]
    if crowded:
        if not problem.fits_alone[option]:
            return None
        placement = _emptied(placement)
    free = problem.ranks.capacity - placement.common_bytes - ahead - int(costs.common_bytes[option])
    room = placement.used <= free - size[HBM]
    if free < size[HBM] or placement.used.max() > free:
        return None
    allowed = problem.allowed.get(int(problem.options.table[option]))
    if allowed is not None:
        room = room & np.isin(np.arange(problem.world_size), allowed)
    if problem.options.group[option]:
        return _pick_grouped(placement, option, levels, room)
    candidates = np.flatnonzero(room)
    if len(candidates) < count:
        return None
    if size[DDR] or size[SSD]:
        return _order(problem, option, _within_pools(placement, option, levels, candidates))
    if count == 1:
        return candidates[[int(np.argmin(levels[candidates]))]]
    if count == len(candidates) == problem.world_size and problem.options.copied[option]:
        return candidates
    return _order(problem, option, _lowest(levels, candidates, count))


def _emptied(placement: Placement) -> Placement:
    """The same ranks, holding nothing."""
    return Placement(placement.problem)


def _lowest(levels: Floats, candidates: Ints, count: int) -> Ints:
    """The candidates with the ``count`` lowest levels, lowest first; equals by number."""
    values = levels[candidates]
    if count < len(candidates) // 8:
        bound = np.partition(values, count - 1)[count - 1]
        candidates = candidates[values <= bound]
        values = levels[candidates]
    lowest: Ints = candidates[np.argsort(values, kind="stable")[:count]]
    return lowest


def _order(problem: Problem, option: int, lowest: Ints | None) -> Ints | None:
    """Costliest pieces to the lowest ranks; piece order."""
    if lowest is None or problem.options.row_parts[option] == 1:
        return lowest
    busy, fetch = problem.piece_ms(option)
    ranks = np.empty(len(lowest), dtype=np.int64)
    ranks[np.argsort(-(busy + fetch), kind="stable")] = lowest
    return ranks


def _pool_slots(placement: Placement, option: int) -> Ints:
    """[pools] pieces of the option that still fit each pool."""
    size = placement.problem.costs.piece_bytes[option, 1:]
    left = placement.problem.ranks.pool_capacity - placement.pools
    slots = np.full(len(left), placement.problem.world_size)
    for tier in range(2):
        if size[tier]:
            slots = np.minimum(slots, left[:, tier] // size[tier])
    return np.asarray(np.maximum(slots, 0))


def _within_pools(placement: Placement, option: int, levels: Floats,
                  candidates: Ints) -> Ints | None:
    """As `_lowest`, no more pieces in a pool than fit it."""
    count = int(placement.problem.options.pieces[option])
    order = candidates[np.argsort(levels[candidates], kind="stable")]
    pool = order // placement.problem.ranks.ranks_per_pool
    by_pool = np.argsort(pool, kind="stable")
    starts = np.flatnonzero(np.append(True, np.diff(pool[by_pool]) != 0))
    place = np.empty(len(order), dtype=np.int64)
    place[by_pool] = np.arange(len(order)) - np.repeat(
        starts, np.diff(np.append(starts, len(order))))
    order = order[place < _pool_slots(placement, option)[pool]]
    return order[:count] if len(order) >= count else None


def _pick_grouped(placement: Placement, option: int, levels: Floats,
                  room: NDArray[np.bool_]) -> Ints | None:
    """Each group of pieces on one host: the one whose fullest rank is lowest."""
    problem = placement.problem
    group, host = int(problem.options.group[option]), problem.ranks.ranks_per_host
    hosts = problem.world_size // host
    slots = _pool_slots(placement, option)
    per_pool = problem.ranks.ranks_per_pool
    free = room.copy()
    ranks: list[Ints] = []
    for _ in range(int(problem.options.pieces[option]) // group):
        usable = free & np.repeat(slots >= (group if per_pool >= host else 1), per_pool)
        level = np.where(usable, levels, np.inf).reshape(hosts, host)
        order = np.argsort(level, axis=1, kind="stable")[:, :group]
        worst = np.take_along_axis(level, order, axis=1).max(axis=1)
        best = int(np.argmin(worst))
        if not np.isfinite(worst[best]):
            return None
        chosen = best * host + order[best]
        free[chosen] = False
        np.subtract.at(slots, chosen // per_pool, 1)
        ranks.append(chosen)
    return np.concatenate(ranks)
