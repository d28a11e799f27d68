"""Two ways to lay chosen options over ranks from scratch: greedy, and largest differencing."""

from __future__ import annotations

import heapq
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from shardlab.planner.pick import pick_ranks
from shardlab.planner.placement import DDR, HBM, SSD, Placement, Problem

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_TINY = 1e-30  # no division by a time of zero
# Slots x tables from which largest differencing goes over hosts first, then over their ranks.
_HIERARCHICAL = 200_000


# Pieces up to these shares of a rank's mean time are preferred, in this order, where the option
# wanted finds no room.
_COARSE = (0.25, 0.5, 1.0)


class Order(Enum):
    """What greedy places first, and what it levels.

    TIME: largest piece first, on the least loaded rank. SHARE: by the larger of the shares of time
    and of memory, so that what is hard to fit comes early, on the rank that has most left of what
    the piece needs most: the least product of what it needs and what is taken. BYTES: fullest
    first, on the emptiest rank: slow plans, but one that fits where there is one.
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
    size, full = problem.largest_ms[choice], problem.fullness[choice]
    mean = max(float(problem.total_ms[choice].sum()) / problem.world_size, _TINY)
    if order is Order.SHARE:
        size = np.maximum(size / mean, full)
    elif order is Order.BYTES:
        size = full
    placement = Placement(problem)
    # Buffers that the tables still to come will want on every rank.
    ahead = int(problem.costs.common_bytes[choice].sum())
    # Tables that few ranks may hold come first; copies on all ranks last.
    free = np.array([len(problem.allowed.get(table, ())) or problem.world_size
                     for table in range(problem.num_tables)])
    for table in np.lexsort((-size, free)).tolist():
        option = int(choice[table])
        ahead -= int(problem.costs.common_bytes[option])
        levels = _levels(placement, option, order, mean)
        if not _place(placement, table, option, levels, mean, ahead):
            return int(table)
    return placement


def _place(placement: Placement, table: int, option: int, levels: Floats, mean: float,
           ahead: int) -> bool:
    """Places the table by this option, or by the one of least work that finds room, of those
    whose pieces are small against what a rank does, if there is one."""
    ranks = pick_ranks(placement, option, levels, ahead=ahead)
    if ranks is None:
        problem = placement.problem
        others = problem.by_work(table)
        others.sort(key=lambda other: int(np.searchsorted(
            _COARSE, problem.largest_ms[other] / mean)))
        for option in others:
            ranks = pick_ranks(placement, option, levels, ahead=ahead)
            if ranks is not None:
                break
    if ranks is None:
        return False
    placement.put(table, option, ranks)
    return True


def _levels(placement: Placement, option: int, order: Order, mean: float) -> Floats:
    """[W] what the pieces of an option go by, lowest first."""
    if order is Order.TIME:
        return placement.loads
    problem = placement.problem
    ranks, size = problem.ranks, problem.costs.piece_bytes[option]
    need = 1.0 if order is Order.BYTES else size[HBM] / ranks.capacity
    level = need * placement.used / ranks.capacity
    for tier, capacity in zip((DDR, SSD), ranks.pool_capacity, strict=True):
        if size[tier]:
            share = ranks.ranks_per_pool * size[tier] / capacity
            level = level + share * np.repeat(placement.pools[:, tier - 1] / capacity,
                                              ranks.ranks_per_pool)
    if order is Order.SHARE:
        level = level + problem.largest_ms[option] / mean * placement.loads / mean
    return np.asarray(level)


def largest_differencing(problem: Problem, choice: Ints) -> Placement | None:
    """Karmarkar and Karp's method for many ranks, on time alone; memory is repaired after.

    Every table starts as a vector of W slots that holds its pieces. The two vectors whose fullest
    and emptiest slots differ most are added, one turned upside down, until one is left: large
    differences cancel early. A table's pieces stay in different slots throughout.

    Of many tables and ranks, the slots are first hosts, and then the ranks of each host, so that
    vectors stay short.

    Tables that are tied to hosts or to ranks are placed greedily first; the slots are then matched
    to ranks, fullest slot to least loaded rank.

    Returns:
        The placement, or None if the tied tables have no room. It may exceed the capacity.

    Source: Karmarkar and Karp, "The differencing method of set partitioning", 1982.
    """
    placement = Placement(problem)
    bound = problem.options.group[choice] > 0
    bound[list(problem.allowed)] = True
    tied = np.flatnonzero(bound)
    for table in tied[np.argsort(-problem.largest_ms[choice[tied]], kind="stable")].tolist():
        ranks = pick_ranks(placement, int(choice[table]), placement.loads)
        if ranks is None:
            return None
        placement.put(table, int(choice[table]), ranks)
    loose = np.flatnonzero(~bound)
    if not len(loose):
        return placement
    pieces = [np.add(*problem.piece_ms(int(choice[table]))) for table in loose]
    world, host = problem.world_size, problem.ranks.ranks_per_host
    if world > host > 1 and len(loose) * world > _HIERARCHICAL:
        slots = difference_hosts(pieces, world // host, host)
        rank_of_slot = np.arange(world)
    else:
        slots = difference(pieces, world)
        # Slot 0 is the fullest.
        rank_of_slot = np.argsort(placement.loads, kind="stable")
    for table, slot in zip(loose.tolist(), slots, strict=True):
        placement.put(table, int(choice[table]), rank_of_slot[slot])
    return placement


def difference_hosts(groups: list[Floats], hosts: int, size: int) -> list[Ints]:
    """`difference` over hosts first, then over the ranks of each.

    Args:
        groups: numbers, at most ``hosts x size`` to a group, which go to different slots.
        hosts: how many hosts.
        size: slots of a host.

    Returns:
        Per group, the slot of each of its numbers; those of host h are h size to (h + 1) size - 1.
    """
    # A group larger than the number of hosts is folded: several of its numbers share a host.
    orders = [np.argsort(-group, kind="stable") for group in groups]
    sums = [np.add.reduceat(group[order], np.arange(0, len(group), -(-len(group) // hosts)))
            for group, order in zip(groups, orders, strict=True)]
    host_of = difference(sums, hosts)
    inside: list[list[tuple[int, Ints]]] = [[] for _ in range(hosts)]
    for number, (order, host) in enumerate(zip(orders, host_of, strict=True)):
        fold = -(-len(order) // hosts)
        for index, one in enumerate(host.tolist()):
            inside[one].append((number, order[index * fold:(index + 1) * fold]))
    slots = [np.empty(len(group), dtype=np.int64) for group in groups]
    for first, members in zip(range(0, hosts * size, size), inside, strict=True):
        found = difference([groups[number][which] for number, which in members], size)
        for (number, which), local in zip(members, found, strict=True):
            slots[number][which] = first + local
    return slots


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
