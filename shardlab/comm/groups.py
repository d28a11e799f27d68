"""The one place that makes process groups; everything else receives `Groups`."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from shardlab.errors import LaunchError

DEFAULT_TIMEOUT_S = 600.0
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Groups:
    """This rank's place, and the groups it talks in.

    Attributes:
        rank, world_size: of the whole job.
        local_rank, local_world_size: on this host.
        device: where tables and dense layers of this rank live.
        process_group: of all ranks, for the dense part; None in a world of one without a group.
        exchange_group: of all ranks, for tables alone, so that the order of dense and sparse
            collectives need not agree between ranks.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    device: torch.device = _CPU
    process_group: dist.ProcessGroup | None = None
    exchange_group: dist.ProcessGroup | None = None


def init(timeout_s: float = DEFAULT_TIMEOUT_S) -> Groups:
    """Joins the ranks that torchrun or srun started; a process on its own is a world of one.

    Reads RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT. NCCL where CUDA
    is there, else gloo.

    Raises:
        LaunchError: RANK or WORLD_SIZE alone is set.
    """
    if dist.is_initialized():
        return build_groups(dist.group.WORLD)
    have = [name for name in ("RANK", "WORLD_SIZE") if name in os.environ]
    cuda = torch.cuda.is_available()
    if not have:
        return Groups(device=torch.device("cuda", 0) if cuda else torch.device("cpu"))
    if len(have) == 1:
        raise LaunchError(f"{have[0]}={os.environ[have[0]]} is set but its partner is not; start "
                          "ranks with torchrun, srun or `shardlab train --ranks N`")
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(seconds=timeout_s))
    return build_groups(dist.group.WORLD)


def build_groups(process_group: dist.ProcessGroup | None = None,
                 local_world_size: int | None = None) -> Groups:
    """Groups over an initialised process group. Every rank must call it, in the same order.

    Args:
        process_group: None takes the default group, or a world of one when there is none.
        local_world_size: ranks per host; None reads LOCAL_WORLD_SIZE, else all ranks share one.
    """
    if process_group is None:
        if not dist.is_initialized():
            return init()
        process_group = dist.group.WORLD
    assert process_group is not None
    rank, world = dist.get_rank(process_group), dist.get_world_size(process_group)
    local = local_world_size or int(os.environ.get("LOCAL_WORLD_SIZE", world))
    nccl = dist.get_backend(process_group) == "nccl"
    device = torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")
    exchange = dist.new_group(dist.get_process_group_ranks(process_group))
    return Groups(rank, world, rank % local, local, device, process_group, exchange)


def shutdown() -> None:
    """Leaves the process group; harmless in a world of one."""
    if dist.is_initialized():
        dist.destroy_process_group()
