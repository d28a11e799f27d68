"""A rank's place among all ranks, and the ways it talks to them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from shardlab.comm.lanes import Lane
from shardlab.comm.shared_memory import SharedMemoryLane
from shardlab.comm.shared_sum import HostSum
from shardlab.comm.watch import Watch
from shardlab.comm.worker import LaneWorker

DEFAULT_TIMEOUT_S = 600.0
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Groups:
    """This rank's place, and the ways it talks.

    Attributes:
        rank, world_size: of the whole job.
        local_rank, local_world_size: on this host.
        device: where tables and dense layers of this rank live.
        process_group: of all ranks, for the dense part; None in a world of one without a group.
        exchange: lane of all ranks for tables alone, so that the order of dense and sparse
            collectives need not agree between ranks; None in a world of one.
        look_ahead: another lane, for batches that come; None in a world of one.
        sums: lane for the gradients of the dense part, where ranks share memory; None:
            `process_group` adds them up.
        transport: what the lanes run over, and why, in words.
        watch: tells who is to blame for a failure; None in a world of one.
        timeout_s: seconds after which a collective has failed.
        worker: talks on the `look_ahead` lane; None: whoever looks ahead does it himself (on
            CUDA, whose collectives run beside the host anyway).
        host_of_rank: number of every rank's host, counted as ranks first name them.
        near: by rank of the `exchange` lane, whether it is on this host; () for a world of one.
        wanted_transport: of `joining.TRANSPORTS`, what was asked for.
        stages: lanes of an exchange in two stages; None: it has one.
        members: where these ranks are a part of the job, their numbers in the job; empty: all.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    device: torch.device = _CPU
    process_group: dist.ProcessGroup | None = None
    exchange: Lane | None = None
    look_ahead: Lane | None = None
    sums: SharedMemoryLane | None = None
    transport: str = "nothing travels: one rank"
    watch: Watch | None = None
    timeout_s: float = DEFAULT_TIMEOUT_S
    worker: LaneWorker | None = None
    host_of_rank: tuple[int, ...] = (0,)
    near: tuple[bool, ...] = ()
    wanted_transport: str = "auto"
    stages: Stages | None = None
    members: tuple[int, ...] = ()

    @property
    def shares_memory(self) -> bool:
        """Whether ranks exchange through shared memory: copying is work, and hides nothing."""
        return isinstance(self.exchange, SharedMemoryLane)

    @property
    def job_rank(self) -> int:
        """This rank as the job counts it."""
        return self.members[self.rank] if self.members else self.rank

    def ahead(self) -> Groups:
        """The same ranks, with the lane for batches that come as their exchange lane."""
        return replace(self, exchange=self.look_ahead)


@dataclass(frozen=True)
class Stages:
    """The two stages of one rank.

    Attributes:
        host, hosts: number of this host, and how many there are.
        place, ranks_per_host: number of this rank on its host, and how many it has.
        inside, inside_ahead: lanes to the ranks of this host, for the step and for batches that
            come; transfers go by number on the host.
        across, across_ahead: lanes to the ranks with this number on all hosts; transfers go by
            number of the host.
        inside_grads, across_grads: lanes for gradients.
        worker: passes gradients on while the backward goes on; None: whoever sends them does (on
            CUDA).
        transport: what the lanes run over, in words.
        sums: adds up gradients of the dense part, where ranks of a host share memory; None: they
            are added up over all ranks at once (NCCL knows the hosts itself).
    """

    host: int
    hosts: int
    place: int
    ranks_per_host: int
    inside: Groups
    inside_ahead: Groups
    inside_grads: Groups
    across: Groups
    across_ahead: Groups
    across_grads: Groups
    worker: LaneWorker | None
    transport: str
    sums: HostSum | None = None
