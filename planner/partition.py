"""Two ways to lay chosen options over ranks from scratch: greedy, and largest differencing."""

from __future__ import annotations

import heapq
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from shardlab.planner.placement import Placement, Problem, pick_ranks

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_TINY = 1e-30  # no division by a time of zero


class Order(Enum):
    """What greedy places first, and what it levels.

    TIME: largest piece first, on the least loaded rank. SHARE: by the larger of the shares of time
    and of memory, so that what is hard to fit comes early, on the least loaded rank. BYTES: most
    bytes first, on the emptiest rank: slow plans, but one that fits where there is one.
    """

    TIME = "time"
    SHARE = "share"
    BYTES = "bytes"


def greedy(problem: Problem, choice: Ints, order: Order = Order.TIME) -> Placement | int:
    """Tables in order of their largest piece, each on the best ranks with room.

    Args:
        problem: options and ranks.
        choice: [T] option of each table.
        order: what comes first, and what is levelled.

    Returns:
        The placement, or the index of the first table that found no room. A table whose option
        finds none takes the option of least work that does.
    """
    size = problem.largest_ms[choice]
    full = problem.largest_bytes[choice] / problem.capacity
    if order is Order.SHARE:
        size = np.maximum(size / max(float(size.max()), _TINY), full)
    elif order is Order.BYTES:
        size = full
    placement = Placement(problem)
    # Buffers that the tables still to come will want on every rank.
    ahead = int(problem.costs.common_bytes[choice].sum())
    for table in np.argsort(-size, kind="stable").tolist():
        ahead -= int(problem.costs.common_bytes[choice[table]])
        for option in (int(choice[table]), *problem.by_work(table)):
            ranks = pick_ranks(placement, option, ahead=ahead, by_bytes=order is Order.BYTES)
            if ranks is not None:
                placement.put(table, option, ranks)
                break
        else:
            return int(table)
    return placement


def largest_differencing(problem: Problem, choice: Ints) -> Placement | None:
    """Karmarkar and Karp's method for many ranks, on time alone; memory is repaired after.

    Every table starts as a vector of W slots that holds its pieces. The two vectors whose fullest
    and emptiest slots differ most are added, one turned upside down, until one is left: large
    differences cancel early. A table's pieces stay in different slots throughout.

    Tables that are tied to hosts are placed greedily first; the slots are then matched to ranks,
    fullest slot to least loaded rank.

    Returns:
        The placement, or None if the tied tables have no room. It may exceed the capacity.

    Source: Karmarkar and Karp, "The differencing method of set partitioning", 1982.
    """
    placement = Placement(problem)
    cuts = problem.options.cuts
    tied = [table for table, option in enumerate(choice.tolist()) if cuts[option].group]
    for table in sorted(tied, key=lambda table: -float(problem.largest_ms[choice[table]])):
        ranks = pick_ranks(placement, int(choice[table]))
        if ranks is None:
            return None
        placement.put(table, int(choice[table]), ranks)
    loose = np.setdiff1d(np.arange(problem.num_tables), tied)
    if not len(loose):
        return placement
    pieces = [problem.options.pieces(int(choice[table])) for table in loose]
    slots = difference([problem.costs.ms[piece] for piece in pieces], problem.world_size)
    # Slot 0 is the fullest.
    rank_of_slot = np.argsort(placement.loads, kind="stable")
    for table, slot in zip(loose.tolist(), slots, strict=True):
        placement.put(table, int(choice[table]), rank_of_slot[slot])
    return placement


def difference(groups: list[Floats], num_slots: int) -> list[Ints]:
    """Slots of every number of every group, by largest differencing; slot 0 has the largest sum.

    Args:
        groups: numbers, at most ``num_slots`` to a group, which go to different slots.
        num_slots: how many sums to level.

    Returns:
        Per group, the slot of each of its numbers.
    """
    sums: list[Floats] = []
    order_of: list[Ints] = []
    for group in groups:
        order = np.argsort(-group, kind="stable")
        vector = np.zeros(num_slots)
        vector[:len(group)] = group[order]
        sums.append(vector)
        order_of.append(order)
    heap = [(vector[-1] - vector[0], index) for index, vector in enumerate(sums)]
    heapq.heapify(heap)
    merges: list[tuple[int, int, Ints]] = []
    while len(heap) > 1:
        first, second = heapq.heappop(heap)[1], heapq.heappop(heap)[1]
        merged = sums[first] + sums[second][::-1]
        order = np.argsort(-merged, kind="stable")
        merges.append((first, second, order))
        sums.append(merged[order])
        heapq.heappush(heap, (sums[-1][-1] - sums[-1][0], len(sums) - 1))
    return _unfold(order_of, merges, num_slots)


def _unfold(order_of: list[Ints], merges: list[tuple[int, int, Ints]],
            num_slots: int) -> list[Ints]:
    """Follows the merges back: final slot of every position of every starting vector."""
    final: dict[int, Ints] = {len(order_of) + len(merges) - 1: np.arange(num_slots)}
    for index in range(len(merges) - 1, -1, -1):
        first, second, order = merges[index]
        before = np.empty(num_slots, dtype=np.int64)
        before[order] = final.pop(len(order_of) + index)
        final[first], final[second] = before, before[::-1]
    slots = []
    for index, order in enumerate(order_of):
        slot = np.empty(len(order), dtype=np.int64)
        slot[order] = final[index][:len(order)]
        slots.append(slot)
    return slots
