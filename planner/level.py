"""Levels memory where that costs next to no time: a full rank is the first to run out."""

from __future__ import annotations

import numpy as np

from shardlab.planner.improve import SWAP_RANKS
from shardlab.planner.loose import Loose
from shardlab.planner.placement import HBM, Placement

# Smaller gains, as a share of the fullest rank, are not worth a move.
_WORTHWHILE = 0.01


def level_memory(placement: Placement, limit_ms: float, *, moves: int) -> None:
    """Moves and swaps pieces of the rank with the fullest hbm while that leaves less in use there.

    Args:
        placement: changed in place.
        limit_ms: no rank may become slower than this, or than the slowest is now.
        moves: most moves and swaps.
    """
    loose = Loose(placement)
    limit = max(limit_ms, placement.slowest_ms) - placement.common_ms
    for _ in range(moves):
        if not (_give(placement, loose, limit) or _swap(placement, loose, limit)):
            return


def _give(placement: Placement, loose: Loose, limit: float) -> bool:
    full = int(np.argmax(placement.used))
    here = loose.on(full)
    targets = np.delete(np.arange(placement.problem.world_size), full)
    if not len(here) or not len(targets):
        return False
    size = loose.size[here, HBM]
    after = np.maximum(placement.used[targets] + size[:, None],
                       placement.used[full] - size[:, None]).astype(np.float64)
    slow = loose.ms(placement.busy[targets] + loose.busy[here, None],
                    placement.fetch[targets] + loose.fetch[here, None]) > limit
    after[slow | loose.full(here, targets)] = np.inf
    best = int(np.argmin(after))
    if not after.flat[best] < placement.used[full] * (1 - _WORTHWHILE):
        return False
    loose.move(int(here[best // len(targets)]), int(targets[best % len(targets)]))
    return True


def _swap(placement: Placement, loose: Loose, limit: float) -> bool:
    full = int(np.argmax(placement.used))
    empty = np.argsort(placement.used, kind="stable")[:SWAP_RANKS]
    here = loose.on(full)
    there = np.flatnonzero(np.isin(loose.rank, empty[empty != full]))
    if not len(here) or not len(there):
        return False
    ranks = loose.rank[there]
    size = loose.size[here, None, HBM] - loose.size[None, there, HBM]
    busy = loose.busy[here, None] - loose.busy[None, there]
    fetch = loose.fetch[here, None] - loose.fetch[None, there]
    after = np.maximum(placement.used[full] - size, placement.used[ranks] + size)
    slow = (loose.ms(placement.busy[ranks] + busy, placement.fetch[ranks] + fetch) > limit) | \
        (loose.ms(placement.busy[full] - busy, placement.fetch[full] - fetch) > limit)
    after = np.where(slow | loose.full_after_swap(here, there), np.inf, after.astype(np.float64))
    best = int(np.argmin(after))
    if not after.flat[best] < placement.used[full] * (1 - _WORTHWHILE):
        return False
    mine, other = int(here[best // len(there)]), int(there[best % len(there)])
    target = int(loose.rank[other])
    loose.move(mine, target)
    loose.move(other, full)
    return True
