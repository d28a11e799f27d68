"""Local improvement: repair memory, then shorten the slowest rank move by move.

Three moves, tried in this order on the slowest rank until none helps: give a piece to another
rank, swap a piece against one of a fast rank, cut one of its tables another way. A move is taken
only if every rank it touches ends below the slowest rank's time, so the sorted list of loads falls
and the search ends. Nothing is random and nothing depends on the clock.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from shardlab.planner.placement import Placement, pick_ranks

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

# Gains below this share are rounding.
_RELATIVE = 1e-9
# Fast ranks whose pieces are tried in swaps, and tables of the slowest rank that are cut anew.
SWAP_RANKS = 8
_RECUT_TABLES = 16


class Loose:
    """The pieces that may change rank: those of options that neither fill every rank nor are
    tied to hosts. Flat arrays, and [T, W] whether a rank holds a piece of a table."""

    def __init__(self, placement: Placement) -> None:
        problem = placement.problem
        self.placement = placement
        self.present = np.zeros((problem.num_tables, problem.world_size), dtype=bool)
        tables, inside, ranks, pieces = [], [], [], []
        for table, option in enumerate(placement.choice.tolist()):
            held = placement.ranks[table]
            self.present[table, held] = True
            if len(held) < problem.world_size and not problem.options.cuts[option].group:
                tables.append(np.full(len(held), table))
                inside.append(np.arange(len(held)))
                ranks.append(held)
                pieces.append(problem.options.start[option] + np.arange(len(held)))
        empty = [np.zeros(0, dtype=np.int64)]
        self.table = np.concatenate(tables or empty)
        self.inside = np.concatenate(inside or empty)
        self.rank = np.concatenate(ranks or empty)
        piece = np.concatenate(pieces or empty)
        self.ms, self.bytes = problem.costs.ms[piece], problem.costs.bytes[piece]

    def move(self, index: int, rank: int) -> None:
        """Moves one piece to ``rank``."""
        placement, table, before = self.placement, int(self.table[index]), int(self.rank[index])
        placement.loads[[before, rank]] += np.array([-1, 1]) * self.ms[index]
        placement.used[[before, rank]] += np.array([-1, 1]) * self.bytes[index]
        held = placement.ranks[table].copy()
        held[self.inside[index]] = rank
        placement.ranks[table] = held
        self.present[table, before], self.present[table, rank] = False, True
        self.rank[index] = rank


def repair(placement: Placement) -> bool:
    """Moves pieces off ranks that hold too much, to the emptiest ranks; False if that fails."""
    loose = Loose(placement)
    capacity = placement.problem.capacity
    for _ in range(4 * len(loose.table) + 1):
        worst = int(np.argmax(placement.used))
        if placement.used[worst] <= capacity:
            return True
        here = np.flatnonzero(loose.rank == worst)
        fits = (placement.used[None, :] + loose.bytes[here, None] <= capacity) & \
            ~loose.present[loose.table[here]]
        able = np.flatnonzero(fits.any(axis=1))
        if not len(able):
            return False
        # The smallest piece that cures the excess, else the largest that can move.
        size = loose.bytes[here[able]]
        enough = size >= placement.used[worst] - capacity
        pick = int(able[np.argmin(np.where(enough, size, size.max() + 1))] if enough.any()
                   else able[np.argmax(size)])
        targets = np.flatnonzero(fits[pick])
        loose.move(int(here[pick]), int(targets[np.argmin(placement.loads[targets])]))
    return False


def improve(placement: Placement, target_ms: float, *, moves: int, recuts: int) -> None:
    """Improves ``placement`` in place until ``target_ms``, a dead end, or the budgets' end.

    Args:
        placement: a placement that fits.
        target_ms: stop once the slowest rank is this fast.
        moves: most moves and swaps to make.
        recuts: most other cuts to try.
    """
    loose = Loose(placement)
    while moves > 0 and placement.slowest_ms > target_ms:
        if _give(placement, loose) or _swap(placement, loose):
            moves -= 1
            continue
        tried, better = _recut(placement, recuts)
        recuts -= tried
        if not better:
            break
        loose = Loose(placement)
    placement.refresh()


def kick(placement: Placement, target_ms: float, *, kicks: int, moves: int) -> Placement:
    """Leaves dead ends: cuts a table of the slowest rank anew, even where that alone costs time,
    improves the result with moves and swaps, and keeps it if it ends faster.

    Args:
        placement: an improved placement; it is left as it is.
        target_ms: stop once the slowest rank is this fast.
        kicks: most cuts to try.
        moves: most moves and swaps after each.

    Returns:
        The fastest placement seen.
    """
    found = True
    while found and placement.slowest_ms > target_ms:
        found = False
        for table, option in _other_cuts(placement):
            if kicks <= 0:
                return placement
            kicks -= 1
            trial = placement.copy()
            trial.take(table)
            ranks = pick_ranks(trial, option)
            if ranks is None:
                continue
            trial.put(table, option, ranks)
            improve(trial, target_ms, moves=moves, recuts=0)
            if trial.slowest_ms < placement.slowest_ms * (1 - _RELATIVE):
                placement, found = trial, True
                break
    return placement


def _give(placement: Placement, loose: Loose) -> bool:
    """Moves the piece of the slowest rank whose move leaves both ranks fastest."""
    slow = int(np.argmax(placement.loads))
    here = np.flatnonzero(loose.rank == slow)
    if not len(here):
        return False
    top = placement.loads[slow]
    after = np.maximum(placement.loads[None, :] + loose.ms[here, None],
                       top - loose.ms[here, None])
    full = placement.used[None, :] + loose.bytes[here, None] > placement.problem.capacity
    after[full | loose.present[loose.table[here]]] = np.inf
    best = int(np.argmin(after))
    if not after.flat[best] < top * (1 - _RELATIVE):
        return False
    loose.move(int(here[best // after.shape[1]]), best % after.shape[1])
    return True


def _swap(placement: Placement, loose: Loose) -> bool:
    """Swaps the two pieces, one of the slowest rank, that leave both ranks fastest."""
    slow, capacity = int(np.argmax(placement.loads)), placement.problem.capacity
    fast = np.argsort(placement.loads, kind="stable")[:SWAP_RANKS]
    here = np.flatnonzero(loose.rank == slow)
    there = np.flatnonzero(np.isin(loose.rank, fast[fast != slow]))
    if not len(here) or not len(there):
        return False
    top = placement.loads[slow]
    gain = loose.ms[here, None] - loose.ms[None, there]
    after = np.maximum(top - gain, placement.loads[loose.rank[there]] + gain)
    size = loose.bytes[here, None] - loose.bytes[None, there]
    barred = (placement.used[loose.rank[there]] + size > capacity) | \
        (placement.used[slow] - size > capacity) | \
        loose.present[np.ix_(loose.table[here], loose.rank[there])] | \
        loose.present[loose.table[there], slow]
    after[barred] = np.inf
    best = int(np.argmin(after))
    if not after.flat[best] < top * (1 - _RELATIVE):
        return False
    mine, other = int(here[best // len(there)]), int(there[best % len(there)])
    target = int(loose.rank[other])
    loose.move(mine, target)
    loose.move(other, slow)
    return True


def _recut(placement: Placement, budget: int) -> tuple[int, bool]:
    """Cuts the one table of the slowest rank anew that helps most: (cuts tried, found one)."""
    problem = placement.problem
    best, tried = (placement.slowest_ms * (1 - _RELATIVE), -1, -1, np.zeros(0, dtype=np.int64)), 0
    trial, taken = placement, -1
    for table, option in _other_cuts(placement):
        if tried >= budget:
            break
        tried += 1
        if table != taken:
            trial, taken = placement.copy(), table
            trial.take(table)
        ranks = pick_ranks(trial, option)
        if ranks is None:
            continue
        loads = trial.loads + problem.costs.common_ms[option]
        loads[ranks] += problem.costs.ms[problem.options.pieces(option)]
        if loads.max() < best[0]:
            best = float(loads.max()), table, option, ranks
    if best[1] < 0:
        return tried, False
    placement.take(best[1])
    placement.put(best[1], best[2], best[3])
    return tried, True


def _other_cuts(placement: Placement) -> Iterator[tuple[int, int]]:
    """(table, another option of it), for the costliest tables of the slowest rank."""
    problem = placement.problem
    slow = int(np.argmax(placement.loads))
    share = np.zeros(problem.num_tables)
    for table, option in enumerate(placement.choice.tolist()):
        mine = np.flatnonzero(placement.ranks[table] == slow)
        own = problem.costs.ms[problem.options.start[option] + mine].sum()
        share[table] = own + problem.costs.common_ms[option]
    for table in np.argsort(-share, kind="stable")[:_RECUT_TABLES].tolist():
        for option in problem.options.of_table(table):
            if option != placement.choice[table]:
                yield table, option
