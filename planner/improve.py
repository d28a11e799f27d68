"""Local improvement: repair memory, then shorten the slowest rank move by move.

Three moves, tried in this order on the slowest rank until none helps: give a piece to another
rank, swap a piece against one of a fast rank, take another option for one of its tables. A move is
taken only if every rank it touches ends below the slowest rank's time, so the sorted list of loads
falls and the search ends. Nothing is random.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from shardlab.planner.loose import Loose
from shardlab.planner.pick import pick_ranks
from shardlab.planner.placement import HBM, Placement

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

# Gains below this share are rounding.
_RELATIVE = 1e-9
# Fast ranks whose pieces are tried in swaps; ranks that are tried first for a piece.
SWAP_RANKS, _NEAR_RANKS = 8, 128
# Tables of the slowest rank that are cut anew, and other options tried of each.
_RECUT_TABLES, _RECUT_OPTIONS = 12, 12
# Options of less work that are tried against what is in their way.
_SAVINGS = 48

Expired = Callable[[], bool]


def never() -> bool:
    """A clock that never runs out."""
    return False


def repair(placement: Placement) -> bool:
    """Moves pieces off ranks and pools that hold too much, to the emptiest ranks with room.

    Returns:
        False if something still holds too much; the placement is then of no use.
    """
    loose = Loose(placement)
    for _ in range(4 * len(loose.table) + 1):
        over = _excess(placement)
        if over is None:
            return True
        ranks, tier, excess = over
        on = (loose.rank >= ranks[0]) & (loose.rank <= ranks[-1])
        here = np.flatnonzero(on & (loose.size[:, tier] > 0))
        every = np.arange(placement.problem.world_size)
        targets = every[(every < ranks[0]) | (every > ranks[-1])]
        if not len(here) or not len(targets):
            return False
        full = loose.full(here, targets)
        able = np.flatnonzero(~full.all(axis=1))
        if not len(able):
            return False
        # The smallest piece that cures the excess, else the largest that can move.
        size = loose.size[here[able], tier]
        enough = size >= excess
        pick = int(able[np.argmin(np.where(enough, size, size.max() + 1))] if enough.any()
                   else able[np.argmax(size)])
        free = targets[~full[pick]]
        loose.move(int(here[pick]), int(free[np.argmin(placement.loads[free])]))
    return False


def _excess(placement: Placement) -> tuple[Ints, int, int] | None:
    """The ranks that hold too much together, on which tier, and by how many bytes."""
    ranks = placement.problem.ranks
    worst = int(np.argmax(placement.used))
    over = int(placement.used[worst]) + placement.common_bytes - ranks.capacity
    if over > 0:
        return np.array([worst]), HBM, over
    excess = placement.pools - np.array(ranks.pool_capacity)
    pool, tier = divmod(int(np.argmax(excess)), 2)
    if excess[pool, tier] <= 0:
        return None
    first = pool * ranks.ranks_per_pool
    return np.arange(first, first + ranks.ranks_per_pool), 1 + tier, int(excess[pool, tier])


def improve(placement: Placement, target_ms: float, *, moves: int, recuts: int,
            expired: Expired = never) -> None:
    """Improves ``placement`` in place until ``target_ms``, a dead end, or the budgets' end.

    Args:
        placement: a placement that fits.
        target_ms: stop once the slowest rank is this fast.
        moves: most moves and swaps to make.
        recuts: most other options to try.
        expired: whether time is up.
    """
    loose = Loose(placement)
    while moves > 0 and placement.slowest_ms > target_ms and not expired():
        if _give(placement, loose) or _swap(placement, loose):
            moves -= 1
            continue
        tried, better = _recut(placement, loose, recuts)
        recuts -= tried
        if not better:
            break
    placement.refresh()


def kick(placement: Placement, target_ms: float, *, kicks: int, moves: int,
         expired: Expired = never) -> Placement:
    """Leaves dead ends: takes another option for a table, even where that alone costs time or
    takes more room than there is, improves the result with moves and swaps, and keeps it if it
    ends faster.

    Args:
        placement: an improved placement; it is left as it is.
        target_ms: stop once the slowest rank is this fast.
        kicks: most options to try.
        moves: most moves and swaps after each.
        expired: whether time is up.

    Returns:
        The fastest placement seen.
    """
    found = True
    while found and placement.slowest_ms > target_ms:
        found = False
        for table, option in chain(_savings(placement), _other_options(placement)):
            if kicks <= 0 or expired():
                return placement
            kicks -= 1
            trial = _forced(placement, table, option)
            if trial is None:
                continue
            improve(trial, target_ms, moves=moves, recuts=0)
            if trial.slowest_ms < placement.slowest_ms * (1 - _RELATIVE):
                placement, found = trial, True
                break
    return placement


def _forced(placement: Placement, table: int, option: int) -> Placement | None:
    """The placement with another option for a table, other pieces moved out of its way."""
    trial = placement.copy()
    trial.take(table)
    ranks = pick_ranks(trial, option, trial.loads)
    if ranks is None:
        ranks = pick_ranks(trial, option, trial.used.astype(np.float64), crowded=True)
        if ranks is None:
            return None
        trial.put(table, option, ranks)
        return trial if repair(trial) else None
    trial.put(table, option, ranks)
    return trial


def _savings(placement: Placement) -> Iterator[tuple[int, int]]:
    """(table, option of it with less work over all ranks), largest saving first."""
    problem = placement.problem
    now = np.repeat(problem.total_ms[placement.choice], np.diff(problem.options.first))
    saved = np.where(problem.fits_alone, now - problem.total_ms, 0.0)
    for option in np.argsort(-saved, kind="stable")[:_SAVINGS].tolist():
        if saved[option] > 0:
            yield int(problem.options.table[option]), option


def _give(placement: Placement, loose: Loose) -> bool:
    """Moves the piece of the slowest rank whose move leaves both ranks fastest."""
    loads = placement.loads
    slow = int(np.argmax(loads))
    here = loose.on(slow)
    if not len(here):
        return False
    world = placement.problem.world_size
    if world > 2 * _NEAR_RANKS:
        near = np.argpartition(loads, _NEAR_RANKS)[:_NEAR_RANKS]
        if _give_to(placement, loose, here, np.sort(near[near != slow])):
            return True
    return _give_to(placement, loose, here, np.delete(np.arange(world), slow))


def _give_to(placement: Placement, loose: Loose, here: Ints, targets: Ints) -> bool:
    if not len(targets):
        return False
    slow = int(loose.rank[here[0]])
    top = float(placement.loads[slow])
    left = loose.ms(placement.busy[slow] - loose.busy[here], placement.fetch[slow]
                    - loose.fetch[here])
    after = np.maximum(left[:, None], loose.ms(
        placement.busy[targets] + loose.busy[here, None],
        placement.fetch[targets] + loose.fetch[here, None]))
    after[loose.full(here, targets)] = np.inf
    best = int(np.argmin(after))
    if not after.flat[best] < top * (1 - _RELATIVE):
        return False
    loose.move(int(here[best // len(targets)]), int(targets[best % len(targets)]))
    return True


def _swap(placement: Placement, loose: Loose) -> bool:
    """Swaps the two pieces, one of the slowest rank, that leave both ranks fastest."""
    loads = placement.loads
    slow = int(np.argmax(loads))
    fast = np.argsort(loads, kind="stable")[:SWAP_RANKS]
    here = loose.on(slow)
    there = np.flatnonzero(np.isin(loose.rank, fast[fast != slow]))
    if not len(here) or not len(there):
        return False
    busy = loose.busy[here, None] - loose.busy[None, there]
    fetch = loose.fetch[here, None] - loose.fetch[None, there]
    ranks = loose.rank[there]
    after = np.maximum(
        loose.ms(placement.busy[slow] - busy, placement.fetch[slow] - fetch),
        loose.ms(placement.busy[ranks] + busy, placement.fetch[ranks] + fetch))
    after[loose.full_after_swap(here, there)] = np.inf
    best = int(np.argmin(after))
    if not after.flat[best] < loads[slow] * (1 - _RELATIVE):
        return False
    mine, other = int(here[best // len(there)]), int(there[best % len(there)])
    target = int(loose.rank[other])
    loose.move(mine, target)
    loose.move(other, slow)
    return True


def _recut(placement: Placement, loose: Loose, budget: int) -> tuple[int, bool]:
    """Takes the option for one table of the slowest rank that helps most: (tried, found one)."""
    problem = placement.problem
    limit, tried = placement.slowest_ms * (1 - _RELATIVE), 0
    best: tuple[int, int, Ints] | None = None
    trial, taken = placement, -1
    for table, option in _other_options(placement):
        if tried >= budget:
            break
        tried += 1
        if table != taken:
            trial, taken = placement.copy(), table
            trial.take(table)
        ranks = pick_ranks(trial, option, trial.loads)
        if ranks is None:
            continue
        busy, fetch = problem.piece_ms(option)
        there = loose.ms(trial.busy[ranks] + busy, trial.fetch[ranks] + fetch).max()
        slowest = max(float(trial.loads.max()), float(there)) + trial.common_ms + \
            float(problem.costs.common_ms[option])
        if slowest < limit:
            limit, best = slowest, (table, option, ranks)
    if best is None:
        return tried, False
    loose.recut(*best)
    return tried, True


def _other_options(placement: Placement) -> Iterator[tuple[int, int]]:
    """(table, another option of it), for the costliest tables of the slowest rank, of each those
    whose pieces are small enough to help, least work first."""
    problem = placement.problem
    share = _shares_of(placement, int(np.argmax(placement.loads)))
    for table in np.argsort(-share, kind="stable")[:_RECUT_TABLES].tolist():
        others = [option for option in problem.by_work(table)
                  if option != placement.choice[table]]
        if len(others) > _RECUT_OPTIONS:
            smaller = [option for option in others if problem.largest_ms[option] < share[table]]
            others = smaller[:_RECUT_OPTIONS] or others[:_RECUT_OPTIONS]
        yield from ((table, option) for option in others)


def _shares_of(placement: Placement, rank: int) -> Floats:
    """[T] milliseconds that each table costs a rank."""
    problem = placement.problem
    counts = problem.options.pieces[placement.choice]
    held = np.flatnonzero(np.concatenate(placement.ranks) == rank)
    table = np.searchsorted(np.cumsum(counts), held, side="right")
    option = placement.choice[table]
    inside = held - (np.cumsum(counts) - counts)[table]
    which = np.minimum(inside % problem.options.row_parts[option], 1)
    costs = problem.costs
    share: Floats = costs.common_ms[placement.choice]
    np.add.at(share, table, costs.busy_ms[option, which] + costs.fetch_ms[option, which])
    return share
