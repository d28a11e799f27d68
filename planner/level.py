"""Levels memory where that costs next to no time: a full rank is the first to run out."""

from __future__ import annotations

import numpy as np

from shardlab.planner.improve import SWAP_RANKS, Loose
from shardlab.planner.placement import Placement

# Smaller gains, as a share of the fullest rank, are not worth a move.
_WORTHWHILE = 0.01


def level_memory(placement: Placement, limit_ms: float, *, moves: int) -> None:
    """Moves and swaps pieces of the fullest rank while that leaves less memory in use there.

    Args:
        placement: changed in place.
        limit_ms: no rank may become slower than this, or than the slowest is now.
        moves: most moves and swaps.
    """
    loose = Loose(placement)
    limit = max(limit_ms, placement.slowest_ms)
    for _ in range(moves):
        if not (_give(placement, loose, limit) or _swap(placement, loose, limit)):
            return


def _give(placement: Placement, loose: Loose, limit: float) -> bool:
    full = int(np.argmax(placement.used))
    here = np.flatnonzero(loose.rank == full)
    if not len(here):
        return False
    after = np.maximum(placement.used[None, :] + loose.bytes[here, None],
                       placement.used[full] - loose.bytes[here, None]).astype(np.float64)
    slow = placement.loads[None, :] + loose.ms[here, None] > limit
    after[slow | loose.present[loose.table[here]]] = np.inf
    best = int(np.argmin(after))
    if not after.flat[best] < placement.used[full] * (1 - _WORTHWHILE):
        return False
    loose.move(int(here[best // after.shape[1]]), best % after.shape[1])
    return True


def _swap(placement: Placement, loose: Loose, limit: float) -> bool:
    full = int(np.argmax(placement.used))
    empty = np.argsort(placement.used, kind="stable")[:SWAP_RANKS]
    here = np.flatnonzero(loose.rank == full)
    there = np.flatnonzero(np.isin(loose.rank, empty[empty != full]))
    if not len(here) or not len(there):
        return False
    ranks = loose.rank[there]
    size = loose.bytes[here, None] - loose.bytes[None, there]
    ms = loose.ms[here, None] - loose.ms[None, there]
    after = np.maximum(placement.used[full] - size, placement.used[ranks] + size)
    barred = (placement.loads[ranks] + ms > limit) | (placement.loads[full] - ms > limit) | \
        loose.present[np.ix_(loose.table[here], ranks)] | loose.present[loose.table[there], full]
    after = np.where(barred, np.inf, after.astype(np.float64))
    best = int(np.argmin(after))
    if not after.flat[best] < placement.used[full] * (1 - _WORTHWHILE):
        return False
    mine, other = int(here[best // len(there)]), int(there[best % len(there)])
    target = int(loose.rank[other])
    loose.move(mine, target)
    loose.move(other, full)
    return True
