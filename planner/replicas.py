"""Replica groups: the part of a machine that one has, and what keeping their tables alike costs.

A rank sends to each of the R - 1 others that hold its shards, per step and on average over its
group's S ranks, with g different rows of a table that the group touches, h that any group does, i
bytes of an id and D columns:

    every step     sum over tables of g (i + 4 D) / S; of more than two groups (g + h) (i + 4 D) / R
                   / S: each merges a part of the rows
    every N steps  the same, with g and h the rows of N steps, 4 (D + n) in the place of 4 D for n
                   numbers of state, over N

Copies of a table on every rank of a group are counted as the shards of one.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from shardlab.errors import ConfigError
from shardlab.planner.settings import Replicas
from shardlab.planner.topology import Topology
from shardlab.replication import ranks_of_a_group
from shardlab.storage_bytes import OPTIMIZER_STATE
from shardlab.wire_bytes import id_bytes

if TYPE_CHECKING:
    from shardlab.planner.request import Request
    from shardlab.planner.workload import Workload

_FP32_BYTES = 4
_MS = 1e3


def group_of(machine: Topology, replicas: int,
             sync_every_steps: int = 1) -> tuple[Topology, Replicas]:
    """The part of a machine that one of several replica groups has.

    Args:
        machine: all ranks.
        replicas: groups; ranks of one follow each other.
        sync_every_steps: as in `shardlab.plan.ShardingPlan`.

    Raises:
        ConfigError: ranks or hosts do not divide into so many groups.
    """
    if replicas == 1:
        return machine, Replicas()
    size, host = ranks_of_a_group(machine.world_size, replicas), machine.ranks_per_host
    if size % host and host % size:
        raise ConfigError(f"parallel.replicas: {replicas} groups of {size} ranks do not fit hosts "
                          f"of {host}; a group takes whole hosts, or a host whole groups")
    per_host = max(1, host // size)
    disk = machine.ssd
    if disk is not None:
        disk = replace(disk, capacity_bytes=disk.capacity_bytes // per_host,
                       read_iops=disk.read_iops / per_host, write_iops=disk.write_iops / per_host,
                       read_bytes_per_s=disk.read_bytes_per_s / per_host,
                       write_bytes_per_s=disk.write_bytes_per_s / per_host)
    group = replace(machine, name=f"{machine.name}, one of {replicas} groups",
                    hosts=max(1, size // host), ranks_per_host=min(size, host),
                    ddr_bytes=machine.ddr_bytes // per_host, ssd=disk)
    return group, Replicas(replicas, per_host, sync_every_steps)


def all_groups(group: Topology, replicas: Replicas) -> Topology:
    """Ranks, hosts and links of all groups together."""
    return replace(group, hosts=group.hosts * replicas.groups // replicas.per_host,
                   ranks_per_host=group.ranks_per_host * replicas.per_host)


def sync_bytes(request: Request, work: Workload) -> float:
    """Bytes that an average rank sends in a step to the others that hold its shards."""
    replicas, ranks = request.settings.replicas, request.topology.world_size
    if replicas.groups == 1:
        return 0.0
    steps, others = replicas.sync_every_steps, replicas.groups - 1
    per_column, per_row = OPTIMIZER_STATE[request.optimizer] if steps > 1 else (0, 0)
    numbers = work.columns * (1 + per_column) + per_row
    batch = steps * ranks * request.batch_size
    rows = work.access.unique(batch)
    if replicas.groups > 2:
        rows = (rows + work.access.unique(replicas.groups * batch)) / replicas.groups
    ids = [id_bytes(int(count)) for count in work.rows.tolist()]
    return float(others * (rows * (ids + _FP32_BYTES * numbers)).sum() / ranks / steps)


def sync_ms(request: Request, work: Workload) -> float:
    """Milliseconds of a step for that: links within and between hosts run side by side."""
    replicas, topology = request.settings.replicas, request.topology
    if replicas.groups == 1:
        return 0.0
    size = sync_bytes(request, work) / (replicas.groups - 1)
    near, far = replicas.per_host - 1, replicas.groups - replicas.per_host
    return _MS * max(float(topology.intra_host.seconds(size, near)),
                     float(topology.inter_host.seconds(size, far)))
