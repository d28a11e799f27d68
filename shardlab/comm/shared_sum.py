"""Adding up over the ranks of one host, through shared memory."""

from __future__ import annotations

import torch
from torch import Tensor

from shardlab.comm.lanes import Finish
from shardlab.comm.shared_memory import SharedMemoryLane

#: Pieces begin on a cache line of fp32.
_ALIGN_ELEMENTS = 16


def start_sum(tensor: Tensor, lane: SharedMemoryLane, rank: int, world_size: int) -> Finish:
    """Starts adding up ``tensor`` over all ranks, in place.

    Every rank adds up one piece, in the order of ranks, and sends the sum to all: all have the same
    bits. Each rank sends and receives 2 (W - 1) / W of the tensor's bytes, as a ring would; a piece
    is copied into shared memory and out of it, twice, where gloo writes to a socket and reads.

    Args:
        tensor: contiguous, CPU, the same shape on every rank; must be left alone until the wait.
        lane: for sums alone; its transfers are in the same order on every rank.
        rank, world_size: of the lane.

    Returns:
        A call that waits; raises RuntimeError if a peer ended or is late. Calls must be made in
        the order of the starts: half of the transfer starts there.

    Source: own; reduce-scatter and all-gather are the standard ones.
    """
    flat = tensor.view(-1)
    lines = -(-flat.numel() // _ALIGN_ELEMENTS)
    ends = [min(flat.numel(), lines * (r + 1) // world_size * _ALIGN_ELEMENTS)
            for r in range(world_size)]
    sizes = [end - begin for begin, end in zip([0, *ends], ends, strict=False)]
    own = flat[ends[rank] - sizes[rank]:ends[rank]]
    parts = own.new_empty(world_size, sizes[rank])
    scattered = lane.all_to_all(parts.view(-1), flat, [sizes[rank]] * world_size, sizes)

    def finish() -> None:
        scattered()
        torch.sum(parts, 0, out=own)
        lane.all_gather(flat, own, sizes)()

    return finish
