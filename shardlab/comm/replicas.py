"""Ranks as R replica groups of S: who exchanges rows, and who keeps copies of them alike.

    replicas=2, 6 ranks      group 0: 0 1 2      group 1: 3 4 5      copies: 0 3, 1 4, 2 5

A group is S ranks that follow each other, so that its all-to-alls stay on few hosts. Ranks with the
same place in their groups hold the same shards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from math import gcd

import torch
import torch.distributed as dist
from torch import Tensor

from shardlab.comm.collectives import all_to_all
from shardlab.comm.gather import gather_json
from shardlab.comm.groups import Groups
from shardlab.comm.joining import with_lanes
from shardlab.comm.shared_memory import host_identity
from shardlab.errors import ConfigError
from shardlab.replication import ranks_of_a_group


@dataclass(frozen=True)
class ReplicaGroups:
    """A rank's two neighbourhoods.

    Attributes:
        tables: the S ranks that share the tables; this rank's place counts in it.
        copies: the R ranks that hold the same shards, by replica.
    """

    tables: Groups
    copies: Groups


def split_replicas(groups: Groups, replicas: int) -> ReplicaGroups:
    """Makes both neighbourhoods, each with lanes of its own; every rank of the job must call it.

    Args:
        groups: all ranks.
        replicas: R; divides the number of ranks.

    Raises:
        ConfigError: it does not.
        LaunchError: the transport that the job asked for cannot be had.
    """
    size = ranks_of_a_group(groups.world_size, replicas)
    if replicas > 1 and groups.stages is not None:
        raise ConfigError("replica groups of the tables exchange flat; these ranks have lanes for "
                          "two stages: leave `comm.with_stages` or the replicas out")
    replica, place = divmod(groups.rank, size)
    tables = _part(groups, range(replica * size, (replica + 1) * size))
    return ReplicaGroups(tables, _part(groups, range(place, groups.world_size, size)))


def _part(groups: Groups, members: Sequence[int]) -> Groups:
    """Some ranks of the job, this one among them, numbered anew."""
    rank = members.index(groups.rank)
    # Ranks of a part that follow each other lie on one host in runs of this length.
    local = gcd(groups.local_world_size, len(members)) if members[-1] - members[0] < len(members) \
        else 1
    part = replace(groups, rank=rank, world_size=len(members), local_rank=rank % local,
                   local_world_size=local, process_group=None, exchange=None, look_ahead=None,
                   sums=None, members=tuple(members), stages=None,
                   host_of_rank=tuple(groups.host_of_rank[member] for member in members),
                   near=tuple(groups.near[member] for member in members) if groups.near else (),
                   transport="nothing travels: one rank")
    if len(members) == 1:
        return part
    part = replace(part, process_group=dist.new_group(
        list(members), timeout=timedelta(seconds=groups.timeout_s),
        use_local_synchronization=True))
    hosts = len(set(gather_json(host_identity(), part)))
    return with_lanes(part, hosts, groups.wanted_transport)


def gather_parts(own: Tensor, sizes: Sequence[int], groups: Groups, phase: str) -> list[Tensor]:
    """Every rank's tensor, by rank, on every rank; uses the `exchange` lane.

    Args:
        own: 1-D; this rank's.
        sizes: elements of every rank's.
        groups: the ranks.
        phase: of the step, for the error of a fault.

    Raises:
        ExchangeError: a rank ended, stalled or cannot be reached.
    """
    peers = groups.world_size - 1
    expected = [0 if rank == groups.rank else size for rank, size in enumerate(sizes)]
    sent = [0 if rank == groups.rank else own.numel() for rank in range(groups.world_size)]
    out = torch.empty(sum(expected), dtype=own.dtype, device=own.device)
    source = own if peers == 1 else own.repeat(peers)
    all_to_all(out, source, expected, sent, groups, phase).wait()
    parts = list(out.split(expected))
    parts[groups.rank] = own
    return parts


def send_parts(parts: Sequence[Tensor], sizes: Sequence[int], groups: Groups,
               phase: str) -> list[Tensor]:
    """What every rank has for this one, by rank; uses the `exchange` lane.

    Args:
        parts: 1-D, one for each rank; the one for this rank is returned as it is.
        sizes: elements that come from every rank.
        groups: the ranks.
        phase: of the step, for the error of a fault.

    Raises:
        ExchangeError: a rank ended, stalled or cannot be reached.
    """
    own = parts[groups.rank]
    expected = [0 if rank == groups.rank else size for rank, size in enumerate(sizes)]
    sent = [0 if rank == groups.rank else part.numel() for rank, part in enumerate(parts)]
    out = own.new_empty(sum(expected))
    source = torch.cat([part for rank, part in enumerate(parts) if rank != groups.rank])
    all_to_all(out, source, expected, sent, groups, phase).wait()
    received = list(out.split(expected))
    received[groups.rank] = own
    return received
