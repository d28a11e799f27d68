"""Lanes for an exchange in two stages: inside a host, and across hosts.

With H hosts of L ranks each, rank (h, l) talks inside host h to the L ranks (h, *), and across
hosts to the H ranks (*, l) of its column. Everything between two hosts thus passes a rank of each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import Tensor

from shardlab.comm.groups import Groups, Stages
from shardlab.comm.joining import shared_memory_lanes
from shardlab.comm.lanes import Finish, Lane, TorchLane
from shardlab.comm.shared_memory import PeerError
from shardlab.comm.shared_sum import HostSum
from shardlab.comm.worker import LaneWorker
from shardlab.errors import LaunchError

#: For ids and rows of the step, for batches that come, and for gradients.
_LANES = 3


def two_stages_refusal(groups: Groups) -> str:
    """Why an exchange cannot have two stages; empty: it can."""
    of_rank = groups.host_of_rank
    counts = [of_rank.count(host) for host in range(max(of_rank) + 1)]
    if len(counts) == 1:
        return f"all {groups.world_size} ranks are on one host"
    if len(set(counts)) > 1:
        return f"hosts have different numbers of ranks: {counts}"
    if counts[0] == 1:
        return f"each of {len(counts)} hosts has one rank"
    if list(of_rank) != sorted(of_rank):
        return f"ranks of a host are not consecutive: their hosts are {list(of_rank)}"
    return ""


def with_stages(groups: Groups) -> Groups:
    """The same ranks with lanes for two stages. Every rank must call it, in the same order.

    Raises:
        LaunchError: the ranks' places do not allow it, or the inside of a host cannot have the
            transport that was asked for.
    """
    refusal = two_stages_refusal(groups)
    if refusal:
        raise LaunchError(f"exchange.hierarchy two_stage was asked for, but {refusal}; it needs "
                          "two hosts or more with two ranks or more on each, by host; use auto "
                          "or flat")
    hosts = max(groups.host_of_rank) + 1
    size = groups.world_size // hosts
    host, place = divmod(groups.rank, size)
    mates = list(range(host * size, host * size + size))
    column = list(range(place, groups.world_size, size))
    inside, words = _inside_lanes(groups, mates)
    across = _torch_lanes(groups, column)
    sums = None
    if len(inside) > _LANES:
        sums = HostSum(PartLane(inside[_LANES], mates), place, size, _torch_group(groups, column),
                       groups.timeout_s, LaneWorker())
    near = (True,) * size
    far = tuple(rank == groups.rank for rank in column)
    backend = dist.get_backend(groups.process_group)
    transport = f"{words} inside {hosts} hosts of {size} ranks, {backend} between them"
    return replace(groups, transport=f"two stages, {transport}", stages=Stages(
        host, hosts, place, size,
        *(replace(groups, exchange=PartLane(lane, mates), near=near) for lane in inside[:_LANES]),
        *(replace(groups, exchange=PartLane(lane, column), near=far) for lane in across),
        worker=None if groups.worker is None else LaneWorker(), transport=transport, sums=sums))


def _inside_lanes(groups: Groups, mates: Sequence[int]) -> tuple[Sequence[Lane], str]:
    """Lanes of one host, and what they run over in words; all hosts take the same.

    Through shared memory there is one more, for sums.
    """
    if groups.wanted_transport != "gloo":
        lanes, refusal = shared_memory_lanes(groups, mates, _LANES + 1)
        if lanes:
            return lanes, "shared memory"
        if groups.wanted_transport == "shared_memory":
            raise LaunchError(f"rank {groups.rank}: shared memory was asked for, but {refusal}; "
                              "use transport auto or gloo")
    return _torch_lanes(groups, mates), str(dist.get_backend(groups.process_group))


def sum_lanes(groups: Groups, members: Sequence[int]) -> tuple[Lane, Lane]:
    """Two lanes of some ranks for sums in a codec; these ranks call it, in the same order."""
    first, second = (TorchLane(_torch_group(groups, members), groups.timeout_s) for _ in range(2))
    return PartLane(first, members), PartLane(second, members)


def _torch_lanes(groups: Groups, members: Sequence[int]) -> list[Lane]:
    """Lanes of some ranks over the process group's backend."""
    return [TorchLane(_torch_group(groups, members), groups.timeout_s) for _ in range(_LANES)]


def _torch_group(groups: Groups, members: Sequence[int]) -> dist.ProcessGroup:
    """A process group of some ranks; only these call it."""
    world = dist.get_process_group_ranks(groups.process_group)
    made: dist.ProcessGroup = dist.new_group(
        [world[rank] for rank in members], timeout=timedelta(seconds=groups.timeout_s),
        use_local_synchronization=True)
    return made


class PartLane:
    """A lane of some ranks; failures name ranks by their number in the whole job.

    Args:
        lane: of these ranks alone.
        ranks: number of each of them in the job.
    """

    def __init__(self, lane: Any, ranks: Sequence[int]) -> None:
        self._lane, self._ranks = lane, tuple(ranks)

    def all_to_all(self, out: Tensor, source: Tensor, out_splits: Sequence[int],
                   source_splits: Sequence[int]) -> Finish:
        """Starts a transfer, by number in the lane."""
        return self._naming(self._lane.all_to_all(out, source, out_splits, source_splits))

    def all_gather(self, out: Tensor, source: Tensor, out_splits: Sequence[int]) -> Finish:
        """Starts sending ``source`` to every rank of the lane."""
        return self._naming(self._lane.all_gather(out, source, out_splits))

    def _naming(self, finish: Finish) -> Finish:
        def named() -> None:
            try:
                finish()
            except PeerError as error:
                raise PeerError([self._ranks[rank] for rank in error.ended],
                                [self._ranks[rank] for rank in error.late], error.text) from error

        return named
