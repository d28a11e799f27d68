"""Ranks, process groups, collectives and the count of bytes they move."""

from shardlab.comm.collectives import (
    WireBytes,
    Work,
    all_reduce_,
    all_to_all,
    barrier,
    broadcast_,
    broadcast_text,
    gather_objects_json,
    start_all_reduce,
)
from shardlab.comm.faults import naming
from shardlab.comm.groups import Groups, Stages
from shardlab.comm.host_lanes import two_stages_refusal, with_stages
from shardlab.comm.joining import build_groups, init, shutdown
from shardlab.comm.replicas import (
    ReplicaGroups,
    gather_parts,
    send_parts,
    split_replicas,
)

__all__ = ["Groups", "ReplicaGroups", "Stages", "WireBytes", "Work", "all_reduce_", "all_to_all",
           "barrier", "broadcast_", "broadcast_text", "build_groups", "gather_objects_json",
           "gather_parts", "init", "naming", "send_parts", "shutdown", "split_replicas",
           "start_all_reduce", "two_stages_refusal", "with_stages"]
