"""Adding up over ranks: of one host through shared memory, of several hosts in two stages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol

import torch.distributed as dist
from torch import Tensor

from shardlab.comm.lanes import Finish
from shardlab.comm.worker import LaneWorker
from shardlab.ops.piece_sum import sum_pieces_

#: Pieces begin on a cache line of fp32.
_ALIGN_ELEMENTS = 16


class SumLane(Protocol):
    """What sums need of a lane through shared memory."""

    def all_to_all(self, out: Tensor, source: Tensor, out_splits: Sequence[int],
                   source_splits: Sequence[int]) -> Finish:
        """Starts a transfer."""

    def all_gather(self, out: Tensor, source: Tensor, out_splits: Sequence[int]) -> Finish:
        """Starts sending ``source`` to every rank."""


#: What is done with a piece [begin, begin + size) of a vector.
OverHosts = Callable[[Tensor, int], None]


class StartedSum:
    """A sum under way: pieces travel to the ranks that add them up, then sums travel to all.

    Args:
        add_up: waits for the pieces, adds them up and starts to send the sum; what it returns waits
            for all sums.
    """

    def __init__(self, add_up: Callable[[], Finish]) -> None:
        self._add_up = add_up
        self._gathered: Finish | None = None

    def pass_on(self) -> None:
        """The first half: several sums wait for their peers once where all do this first."""
        if self._gathered is None:
            self._gathered = self._add_up()

    def __call__(self) -> None:
        """Waits until the sum is there."""
        self.pass_on()
        assert self._gathered is not None
        self._gathered()


def start_sum(tensor: Tensor, lane: SumLane, rank: int, world_size: int,
              then: OverHosts | None = None, unit: int = _ALIGN_ELEMENTS,
              *, scale: float = 1.0) -> StartedSum:
    """Starts adding up ``tensor`` over all ranks, in place.

    Every rank adds up one piece, in the order of ranks, and sends the sum to all: all have the same
    bits. Each rank sends and receives 2 (W - 1) / W of the tensor's bytes, as a ring would; a piece
    is copied into shared memory and out of it, twice, where gloo writes to a socket and reads.

    Args:
        tensor: contiguous, CPU, the same shape on every rank; must be left alone until the wait.
        lane: for sums alone; its transfers are in the same order on every rank.
        rank, world_size: of the lane.
        then: what is done with this rank's piece of the sum, and where it begins, before all get
            it.
        unit: pieces begin at multiples of so many elements.
        scale: multiplies the sums.

    Returns:
        A call that waits; raises RuntimeError if a peer ended or is late. First halves must be in
        the order of the starts: half of the transfer starts there.

    Source: own; reduce-scatter and all-gather are the standard ones.
    """
    flat = tensor.view(-1)
    units = -(-flat.numel() // unit)
    ends = [min(flat.numel(), units * (r + 1) // world_size * unit) for r in range(world_size)]
    sizes = [end - begin for begin, end in zip([0, *ends], ends, strict=False)]
    begin = ends[rank] - sizes[rank]
    own = flat[begin:ends[rank]]
    parts = own.new_empty(world_size - 1, sizes[rank])
    due = [0 if r == rank else sizes[rank] for r in range(world_size)]
    scattered = lane.all_to_all(parts.view(-1), flat, due, sizes)

    def add_up() -> Finish:
        scattered()
        sum_pieces_(own, parts, rank, scale)
        if then is not None:
            then(own, begin)
        return lane.all_gather(flat, own, sizes)

    return StartedSum(add_up)


@dataclass(frozen=True)
class HostSum:
    """Adds up over hosts of L ranks each, in two stages.

    A rank adds up one piece over its host, then over all hosts with those that hold the same piece,
    and sends it to its host. Of B bytes, 2 (H - 1) / H B leave a host of H in all; a ring over all
    ranks sends 2 (W - 1) / W B over every link between hosts. All of it is done in a thread, so
    that the backward pass goes on meanwhile.

    Attributes:
        inside: lane of the host, for sums alone.
        place, ranks_per_host: of this rank.
        across: ranks of this number on all hosts; for sums alone.
        timeout_s: seconds after which the sum over hosts has failed.
        worker: the thread.
    """

    inside: SumLane
    place: int
    ranks_per_host: int
    across: dist.ProcessGroup
    timeout_s: float
    worker: LaneWorker

    def start(self, tensor: Tensor, over_hosts: OverHosts | None = None,
              unit: int = _ALIGN_ELEMENTS) -> Finish:
        """Starts adding up a contiguous CPU tensor in place; every rank does, in the same order.

        Args:
            tensor: the tensor.
            over_hosts: adds up a piece over hosts; None: in fp32.
            unit: as of `start_sum`.
        """
        def add() -> None:
            start_sum(tensor, self.inside, self.place, self.ranks_per_host,
                      over_hosts or self._over_hosts, unit)()

        return self.worker.submit(add).result

    def _over_hosts(self, piece: Tensor, _: int) -> None:
        if not piece.numel():  # as on all ranks of this number
            return
        work = dist.all_reduce(piece, group=self.across, async_op=True)
        assert work is not None
        work.wait(timedelta(seconds=self.timeout_s))
