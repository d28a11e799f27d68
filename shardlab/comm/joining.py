"""The one place that makes process groups and lanes; everything else receives `Groups`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from shardlab.comm.gather import gather_json
from shardlab.comm.groups import DEFAULT_TIMEOUT_S, Groups
from shardlab.comm.lanes import TorchLane
from shardlab.comm.shared_memory import Meeting, host_identity, missing_support
from shardlab.comm.watch import Watch, own_address
from shardlab.comm.worker import LaneWorker
from shardlab.errors import LaunchError

#: How ranks exchange rows: `auto` takes shared memory where all ranks share a host.
TRANSPORTS = ("auto", "gloo", "shared_memory")
TRANSPORT_VARIABLE = "SHARDLAB_TRANSPORT"
#: `Groups.exchange` and `Groups.look_ahead`; through shared memory also `Groups.sums`.
_LANES, _SHARED_LANES = 2, 3


def init(timeout_s: float = DEFAULT_TIMEOUT_S, transport: str = "auto") -> Groups:
    """Joins the ranks that torchrun or srun started; a process on its own is a world of one.

    Reads RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT. NCCL where CUDA
    is there, else gloo.

    Args:
        timeout_s: seconds after which a collective has failed.
        transport: of `TRANSPORTS`; SHARDLAB_TRANSPORT overrules it.

    Raises:
        LaunchError: RANK or WORLD_SIZE alone is set, or the transport cannot be had.
    """
    if dist.is_initialized():
        return build_groups(dist.group.WORLD, timeout_s=timeout_s, transport=transport)
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
    return build_groups(dist.group.WORLD, timeout_s=timeout_s, transport=transport)


def build_groups(process_group: dist.ProcessGroup | None = None,
                 local_world_size: int | None = None, *, timeout_s: float = DEFAULT_TIMEOUT_S,
                 transport: str = "auto") -> Groups:
    """Groups over an initialised process group. Every rank must call it, in the same order.

    Args:
        process_group: None takes the default group, or a world of one when there is none.
        local_world_size: ranks per host, host by host; None reads LOCAL_WORLD_SIZE, else all ranks
            share one. What ranks say of their hosts counts where None was given.
        timeout_s: seconds after which a transfer has failed.
        transport: of `TRANSPORTS`; SHARDLAB_TRANSPORT overrules it.

    Raises:
        LaunchError: the transport cannot be had.
    """
    if process_group is None:
        if not dist.is_initialized():
            return init(timeout_s, transport)
        process_group = dist.group.WORLD
    assert process_group is not None
    rank, world = dist.get_rank(process_group), dist.get_world_size(process_group)
    local = local_world_size or int(os.environ.get("LOCAL_WORLD_SIZE", world))
    nccl = dist.get_backend(process_group) == "nccl"
    device = torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")
    groups = Groups(rank, world, rank % local, local, device, process_group, timeout_s=timeout_s,
                    worker=None if nccl else LaneWorker())
    hosts = gather_json(host_identity(), groups)
    watch = Watch(own_address(len(set(hosts)) == 1))
    watch.meet(gather_json(watch.address, groups))
    of_rank = _numbered([str(number // local) for number in range(world)] if local_world_size
                        else hosts)
    groups = replace(groups, watch=watch, host_of_rank=of_rank,
                     near=tuple(host == of_rank[rank] for host in of_rank),
                     wanted_transport=os.environ.get(TRANSPORT_VARIABLE, transport))
    return with_lanes(groups, len(set(hosts)), groups.wanted_transport)


def _numbered(hosts: Sequence[str]) -> tuple[int, ...]:
    """Numbers of names in the order in which they first occur."""
    numbers: dict[str, int] = {}
    return tuple(numbers.setdefault(host, len(numbers)) for host in hosts)


def shutdown() -> None:
    """Leaves the process group; harmless in a world of one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def with_lanes(groups: Groups, hosts: int, wanted: str) -> Groups:
    """The groups with lanes over the wanted transport; all of their ranks take the same one.

    Args:
        groups: with a process group, without lanes; every rank of it calls this.
        hosts: how many they are on.
        wanted: of `TRANSPORTS`.

    Raises:
        LaunchError: the transport cannot be had.
    """
    if wanted not in TRANSPORTS:
        raise LaunchError(f"transport {wanted!r} is not one of {', '.join(TRANSPORTS)}; look at "
                          f"exchange.transport and {TRANSPORT_VARIABLE}")
    lanes: list[Any] = []
    refusal = f"{wanted} was asked for"
    if wanted != "gloo":
        refusal = f"ranks are on {hosts} hosts"
        if groups.device.type != "cpu" or hosts == 1:
            lanes, refusal = shared_memory_lanes(groups, range(groups.world_size), _SHARED_LANES)
    if lanes:
        return replace(groups, exchange=lanes[0], look_ahead=lanes[1], sums=lanes[2],
                       transport="shared memory: all ranks are on one host")
    if wanted == "shared_memory":
        raise LaunchError(f"rank {groups.rank}: shared memory was asked for, but {refusal}; use "
                          "transport auto or gloo")
    ranks = dist.get_process_group_ranks(groups.process_group)
    # Ranks that are no members of a part do not call this.
    made = [TorchLane(dist.new_group(ranks, timeout=timedelta(seconds=groups.timeout_s),
                                     use_local_synchronization=bool(groups.members)),
                      groups.timeout_s) for _ in range(_LANES)]
    backend = dist.get_backend(groups.process_group)
    return replace(groups, exchange=made[0], look_ahead=made[1],
                   transport=f"{backend}: {refusal}")


def shared_memory_lanes(groups: Groups, members: Sequence[int],
                        count: int) -> tuple[list[Any], str]:
    """Lanes of some ranks of one host, or none and the reason; all ranks get the same answer.

    Every rank of ``groups`` calls it, with the ranks it shares lanes with.

    Args:
        groups: all ranks.
        members: ranks of the lanes, ascending, this one among them.
        count: lanes to make.
    """
    if groups.device.type != "cpu":
        return [], "tensors are on GPUs"
    refusal, meeting, lanes = missing_support(), None, []
    if not refusal:
        try:
            meeting = Meeting(list(members).index(groups.rank), len(members), count,
                              groups.timeout_s)
        except OSError as error:
            refusal = f"rank {groups.rank} got no shared memory: {error}"
    names = gather_json(["" if meeting is None else meeting.name, refusal], groups)
    refusal = next((reason for _, reason in names if reason), "")
    if not refusal and meeting is not None:
        try:
            lanes = meeting.make_lanes([names[rank][0] for rank in members])
        except (OSError, RuntimeError) as error:
            refusal = f"rank {groups.rank} got no shared memory: {error}"
    elif meeting is not None:
        meeting.close()
    refusal = next((reason for reason in gather_json(refusal, groups) if reason), "")
    return ([], refusal) if refusal else (lanes, "")
