"""The plan of a job: the one it names, the one its run began with, or a new one of the planner.

Rank 0 decides; the other ranks receive the plan as text. Nothing here needs torch but
`choose_plan` and `job_topology`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from shardlab.errors import LaunchError, PlanError, ShardLabError
from shardlab.launch.dense_model import dense_model
from shardlab.plan import ShardingPlan
from shardlab.planner import PlanSettings, Topology, group_of, local_cpu, plan, read_topology
from shardlab.storage_specs import Tier
from shardlab.table_plan import WireDtypes

if TYPE_CHECKING:
    from shardlab.comm import Groups
    from shardlab.config import JobConfig
    from shardlab.config.models import TableWireConfig, WireConfig
    from shardlab.planner.request import Request
    from shardlab.planner.result import PlanResult


@dataclass(frozen=True)
class ChosenPlan:
    """What a run executes.

    Attributes:
        plan: where tables go.
        text: the plan as the run folder keeps it, its predictions beside it.
        wire_is_open: the job leaves codecs open, and no former run has chosen them.
        hot_rows_are_open: the job wants hot rows, and no former run has found them.
    """

    plan: ShardingPlan
    text: str
    wire_is_open: bool = False
    hot_rows_are_open: bool = False

    def with_plan(self, plan: ShardingPlan) -> ChosenPlan:
        """The same predictions beside another plan."""
        return replace(self, plan=plan, text=plan.to_json(json.loads(self.text).get("predicted")))


def job_request(job: JobConfig, topology: Topology, time_limit: float | None = None,
                given: ShardingPlan | None = None) -> Request:
    """What there is to plan for a job.

    Args:
        job: the job.
        topology: the machine, of all replica groups together.
        time_limit: CPU seconds that the search may take; None: as many as it needs.
        given: a plan that is only to be rated: its replica groups count; None: the job's.

    Raises:
        ConfigError: the job asks for what the machine does not have, or its statistics cannot be
            read.
        PlanError: the dense model leaves no room for tables.
    """
    from shardlab.planner.request import build_request
    from shardlab.planner.statistics import read_statistics

    statistics = None if job.statistics is None else read_statistics(job.statistics)
    groups = job.parallel if given is None else given
    group, replicas = group_of(topology, groups.replicas, groups.sync_every_steps)
    settings = PlanSettings(dense=dense_model(job), statistics=statistics, time_limit=time_limit,
                            wire=_wire(job.wire), replicas=replicas)
    return build_request(job.table_configs(), group, job.batch_size, job.optimizer.sparse.kind,
                         settings)


def _wire(section: WireConfig | TableWireConfig, every: WireDtypes | None = None) -> WireDtypes:
    """A section as the plan has it; ``auto`` begins as fp32, what is absent is as in ``every``."""
    given = {name: value for name in ("forward", "backward", "rounding", "error_feedback")
             if (value := getattr(section, name)) is not None}
    given |= {name: "fp32" for name in ("forward", "backward") if given.get(name) == "auto"}
    return replace(every or WireDtypes(), **given)


def asks_for_choice(job: JobConfig) -> bool:
    """Whether a job leaves a codec open."""
    return "auto" in (job.wire.forward, job.wire.backward) or any(
        "auto" in (section.forward, section.backward) for section in job.wire.tables.values())


def wired(plan: ShardingPlan, job: JobConfig) -> ShardingPlan:
    """The plan with the codecs that the job asks for.

    Raises:
        PlanError: error feedback for a table whose bags are pooled by their owner.
    """
    every = _wire(job.wire)
    tables = {name: _wire(section, every) for name, section in job.wire.tables.items()}
    return plan.with_wire(every, tables).with_dense_wire(job.wire.dense, job.wire.rounding)


def plan_request(request: Request) -> PlanResult:
    """The planner's plan of a request.

    Raises:
        PlanError: nothing fits.
    """
    return plan(request.tables, request.topology, request.batch_size, request.optimizer,
                request.settings)


def read_job_plan(path: Path, job: JobConfig, world_size: int) -> ShardingPlan:
    """Reads a plan that a job is to execute.

    Raises:
        PlanError: it cannot be read, or does not fit tables or ranks, by name.
    """
    try:
        found = ShardingPlan.from_json(path.read_text(encoding="utf-8"))
        found.check(job.table_configs(), world_size)
        _check_groups(found, job)
    except (OSError, UnicodeDecodeError, PlanError) as error:
        raise PlanError(f"{path}: {error}") from None
    return found


def choose_plan(job: JobConfig, groups: Groups, previous: Path | None) -> ChosenPlan:
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
            text = _decide(job, groups, previous)
        except ShardLabError as error:  # the other ranks wait for an answer
            failure = error
    text = broadcast_text(text, groups)
    if not text:  # whichever rank is heard first, its message says what is wrong
        reason = broadcast_text("" if failure is None else str(failure), groups)
        raise failure or LaunchError(f"rank 0 found no plan: {reason}")
    kept = previous is not None and _is_kept(previous, job, groups)
    from shardlab.launch.hot_rows import wishes

    new = job.plan is None and not kept
    return ChosenPlan(ShardingPlan.from_json(text), text, new and asks_for_choice(job),
                      new and groups.world_size > 1 and bool(wishes(job)))


def _decide(job: JobConfig, groups: Groups, previous: Path | None) -> str:
    """A plan as JSON with its predictions."""
    if job.plan is not None and not _outgrown(job, groups):
        return _rated(read_job_plan(Path(job.plan), job, groups.world_size), job, groups)
    if previous is not None and _is_kept(previous, job, groups):
        read_job_plan(previous, job, groups.world_size)
        return previous.read_text(encoding="utf-8")
    topology = run_topology(job, groups)
    if topology.world_size != groups.world_size:
        raise PlanError(f"topology: {topology.name} has {topology.world_size} ranks, this run has "
                        f"{groups.world_size}; leave topology out to plan for this machine "
                        "(--set topology=)")
    from shardlab.planner.plan_file import plan_to_json

    result = plan_request(job_request(job, topology))
    return plan_to_json(replace(result, plan=wired(result.plan, job)))


def _outgrown(job: JobConfig, groups: Groups) -> bool:
    """Whether an elastic job's plan is for another number of ranks than there are."""
    return job.train.elastic and job.plan is not None and \
        _world_size(Path(job.plan)) != groups.world_size


def _rated(given: ShardingPlan, job: JobConfig, groups: Groups) -> str:
    """A given plan as it is, beside it what it is predicted to take on this run's machine."""
    from shardlab.planner.plan_file import predicted_data
    from shardlab.planner.rate import rate

    topology = job_topology(job, groups)
    if topology.world_size != groups.world_size:
        return given.to_json()  # a plan for this run, and a topology for another
    return given.to_json(predicted_data(rate(given, job_request(job, topology, given=given))))


def _world_size(path: Path) -> int:
    return ShardingPlan.from_json(path.read_text(encoding="utf-8")).job_ranks


def _is_kept(path: Path, job: JobConfig, groups: Groups) -> bool:
    """Whether a former run's plan is for these ranks, in the job's replica groups."""
    found = ShardingPlan.from_json(path.read_text(encoding="utf-8"))
    return found.job_ranks == groups.world_size and (
        found.replicas, found.sync_every_steps) == (job.parallel.replicas,
                                                    job.parallel.sync_every_steps)


def _check_groups(plan: ShardingPlan, job: JobConfig) -> None:
    """Raises PlanError where a job that names a plan asks for other replica groups."""
    asked = (job.parallel.replicas, job.parallel.sync_every_steps)
    found = (plan.replicas, plan.sync_every_steps)
    if asked not in ((1, 1), found):
        raise PlanError("parallel: the job asks for replicas {} and sync_every_steps {}, its plan "
                        "has {} and {}; leave parallel out, or plan again".format(*asked, *found))


def without_absent_disk(topology: Topology, job: JobConfig) -> Topology:
    """The machine as the planner may use it: tables lie on disk only where the job names a folder.

    A table that asks for the disk by itself keeps it, for the error that names the missing folder.
    """
    asks = any(level.tier is Tier.SSD for table in job.table_configs()
               for level in getattr(table.storage, "levels", ()))
    return topology if job.train.ssd_dir is not None or asks else replace(topology, ssd=None)


def job_topology(job: JobConfig, groups: Groups) -> Topology:
    """The machine that a job names, or the one that its ranks run on; see `without_absent_disk`."""
    return without_absent_disk(_named_or_here(job, groups), job)


def _named_or_here(job: JobConfig, groups: Groups) -> Topology:
    if job.topology is not None:
        return read_topology(job.topology)
    hosts = groups.world_size // groups.local_world_size
    if groups.device.type == "cuda":
        return replace(_gpu(), hosts=hosts, ranks_per_host=groups.local_world_size)
    return replace(local_cpu(groups.local_world_size), hosts=hosts)


def run_topology(job: JobConfig, groups: Groups) -> Topology:
    """`job_topology`, with as many ranks as an elastic job has found."""
    topology = job_topology(job, groups)
    if topology.world_size == groups.world_size or not job.train.elastic:
        return topology
    hosts = groups.world_size // groups.local_world_size
    return replace(topology, hosts=hosts, ranks_per_host=groups.local_world_size)


def _gpu() -> Topology:
    """The profile that is nearest to this machine's GPU, with the memory it really has."""
    import torch

    from shardlab.planner.profiles import nearest_profile

    device, memory = torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory
    nearest = nearest_profile(device, memory)
    return replace(nearest, name=f"{device}, speeds of {nearest.name}", hbm_bytes=memory)
