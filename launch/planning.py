"""The plan of a job: the one it names, the one its run began with, or a new one of the planner.

Rank 0 decides; the other ranks receive the plan as text.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from shardlab.errors import LaunchError, PlanError, ShardLabError
from shardlab.plan import ShardingPlan
from shardlab.planner import Topology, local_cpu, plan, read_topology

if TYPE_CHECKING:
    from shardlab.comm import Groups
    from shardlab.config import JobConfig

#: Profile whose speeds are assumed for a GPU that has no profile of its own.
_USUAL_GPU = "a100-80gb"


def choose_plan(job: JobConfig, groups: Groups, previous: Path | None) -> ShardingPlan:
    """The plan that this run executes, the same on all ranks; every rank must call it.

    Args:
        job: the job; ``plan`` names a file, ``topology`` a machine to plan for.
        groups: the ranks.
        previous: plan of the run that is continued. It is kept on as many ranks as before,
            because another plan would sum gradients in another order; None: the run is new.

    Raises:
        PlanError: the plan does not fit the tables, the ranks or the memory.
        LaunchError: rank 0 failed; the others then say so.
    """
    from shardlab.comm import broadcast_text

    text, failure = "", None
    if groups.rank == 0:
        try:
            text = _decide(job, groups, previous).to_json()
        except ShardLabError as error:  # the other ranks wait for an answer
            failure = error
    text = broadcast_text(text, groups)
    if failure is not None:
        raise failure
    if not text:
        raise LaunchError("rank 0 found no plan; see its message")
    return ShardingPlan.from_json(text)


def _decide(job: JobConfig, groups: Groups, previous: Path | None) -> ShardingPlan:
    tables = job.table_configs()
    if job.plan is not None:
        return _read(Path(job.plan), job, groups.world_size)
    if previous is not None and _world_size(previous) == groups.world_size:
        return _read(previous, job, groups.world_size)
    topology = job_topology(job, groups)
    if topology.world_size != groups.world_size:
        raise PlanError(f"topology: {topology.name} has {topology.world_size} ranks, this run has "
                        f"{groups.world_size}; leave topology out to plan for this machine "
                        "(--set topology=)")
    return plan(tables, topology, job.batch_size, job.optimizer.sparse.kind).plan


def _world_size(path: Path) -> int:
    return ShardingPlan.from_json(path.read_text(encoding="utf-8")).world_size


def _read(path: Path, job: JobConfig, world_size: int) -> ShardingPlan:
    try:
        found = ShardingPlan.from_json(path.read_text(encoding="utf-8"))
        found.check(job.table_configs(), world_size)
    except (OSError, UnicodeDecodeError, PlanError) as error:
        raise PlanError(f"{path}: {error}") from None
    return found


def job_topology(job: JobConfig, groups: Groups) -> Topology:
    """The machine that a job names, or the one that its ranks run on."""
    if job.topology is not None:
        return read_topology(job.topology)
    hosts = groups.world_size // groups.local_world_size
    if groups.device.type == "cuda":
        return replace(_gpu(), hosts=hosts, ranks_per_host=groups.local_world_size)
    return replace(local_cpu(groups.local_world_size), hosts=hosts)


def _gpu() -> Topology:
    """The profile that is nearest to this machine's GPU, with the memory it really has."""
    import torch

    from shardlab.planner.profiles import PROFILES

    device, memory = torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory
    kin = [name for name in PROFILES if name.split("-")[0] in device.lower()] or [_USUAL_GPU]
    nearest = min(kin, key=lambda name: abs(PROFILES[name].hbm_bytes - memory))
    return replace(PROFILES[nearest], name=f"{device}, speeds of {nearest}", hbm_bytes=memory)
