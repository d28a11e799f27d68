"""Adding up over all ranks in the order of ranks, over whatever lane rows and gradients take."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from shardlab.comm.collectives import all_to_all
from shardlab.comm.groups import Groups


def piece_edges(elements: int, world_size: int) -> list[int]:
    """First element of the piece that every rank adds up, and the end: [world_size + 1]."""
    return [elements * rank // world_size for rank in range(world_size + 1)]


def ordered_sum_(tensor: Tensor, groups: Groups, phase: str = "exchange") -> Tensor:
    """Adds up a tensor over all ranks in place: ((rank 0 + rank 1) + rank 2) + ...

    A backend's all-reduce adds in an order of its own, other for every piece. This one gives the
    bits that an owner gets who adds what ranks send it. Each rank adds up one piece and sends the
    sum to all: 2 (W - 1) / W of the bytes leave a rank, as with a ring.

    Args:
        tensor: contiguous, the same shape on every rank.
        groups: the ranks; uses the `exchange` lane.
        phase: of the step, for the error of a fault.

    Raises:
        ExchangeError: a rank ended, stalled or cannot be reached.
    """
    world, rank, flat = groups.world_size, groups.rank, tensor.view(-1)
    if world == 1:
        return tensor
    edges = piece_edges(flat.numel(), world)
    sizes = [end - start for start, end in pairwise(edges)]
    own = flat[edges[rank]:edges[rank + 1]]
    parts = own.new_empty(world, sizes[rank])
    # What stays here is no part of a collective.
    others = [size * (r != rank) for r, size in enumerate(sizes)]
    mine = [sizes[rank] * (r != rank) for r in range(world)]
    arrived = own.new_empty(sum(mine))
    away = torch.cat([flat[:edges[rank]], flat[edges[rank + 1]:]])
    all_to_all(arrived, away, mine, others, groups, phase).wait()
    parts[rank] = own
    parts[[r for r in range(world) if r != rank]] = arrived.view(world - 1, -1)
    total = parts[0]
    for part in parts[1:]:  # a sum over a dimension may take another order
        total += part
    own.copy_(total)
    all_to_all(away, total.repeat(world - 1), others, mine, groups, phase).wait()
    flat[:edges[rank]], flat[edges[rank + 1]:] = away[:edges[rank]], away[edges[rank]:]
    return tensor
