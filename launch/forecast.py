"""Whether a plan fits the memory that is free now: asked before anything large is allocated."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shardlab.errors import ForecastError, PlanError, ShardLabError
from shardlab.planner.units import format_bytes

if TYPE_CHECKING:
    from shardlab.comm import Groups
    from shardlab.config import JobConfig
    from shardlab.plan import ShardingPlan
    from shardlab.planner.request import Request
    from shardlab.planner.result import PlanResult

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")
_LARGEST_TABLES = 8  # in the breakdown


@dataclass(frozen=True)
class Free:
    """Bytes that are free on a rank's device and on its host, as the rank sees them."""

    hbm: int | None
    host: int
    ssd: int | None


def host_free() -> int:
    """Bytes of host memory that may still be allocated: the machine's, capped by the container's.

    Memory that holds cached files counts as free.
    """
    machine = next(int(line.split()[1]) * 1024 for line in _MEMINFO.read_text().splitlines()
                   if line.startswith("MemAvailable:"))
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        used = int((_CGROUP / "memory.current").read_text())
        stat = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
    except OSError:  # no container with a limit that we could read
        return machine
    if limit == "max":
        return machine
    return min(machine, int(limit) - used + int(stat["inactive_file"]) + int(stat["active_file"]))


def measure_free(job: JobConfig, groups: Groups) -> Free:
    """What is free for this rank now."""
    hbm = None
    if groups.device.type == "cuda":
        import torch

        hbm = int(torch.cuda.mem_get_info(groups.device)[0])
    ssd = None
    if job.train.ssd_dir is not None:
        folder = Path(job.train.ssd_dir).absolute()
        while not folder.exists():
            folder = folder.parent
        ssd = shutil.disk_usage(folder).free
    return Free(hbm, host_free(), ssd)


def check_memory(job: JobConfig, plan: ShardingPlan, groups: Groups) -> None:
    """Refuses a plan that is predicted not to fit; every rank must call it.

    Raises:
        ForecastError: on every rank: what each full tier needs and has, the largest tables on it,
            and the smallest changes that fit.
    """
    from shardlab.comm import broadcast_text, gather_objects_json

    free = [Free(**entry) for entry in gather_objects_json(vars(measure_free(job, groups)), groups)]
    text = ""
    if groups.rank == 0:
        request = _request(job, plan, groups)
        if request is not None:
            text = forecast(plan, request, free, on_device=groups.device.type == "cuda")
    text = broadcast_text(text, groups)
    if text:
        raise ForecastError(text)


def _request(job: JobConfig, plan: ShardingPlan, groups: Groups) -> Request | None:
    """The job on this run's machine; None: its topology describes another one."""
    from shardlab.launch.planning import job_request, run_topology

    topology = run_topology(job, groups)
    return None if topology.world_size != groups.world_size else \
        job_request(job, topology, given=plan)


def forecast(plan: ShardingPlan, request: Request, free: Sequence[Free], on_device: bool) -> str:
    """What does not fit, as text; empty where all does.

    Args:
        plan: the plan to be executed.
        request: the job on the machine that it runs on, of replica groups a group's part.
        free: of every rank, by rank.
        on_device: hbm is memory of its own; else it is a part of the host's.
    """
    from shardlab.planner.rate import rate

    try:
        result = rate(plan, request)
    except PlanError:  # a plan that the planner has no prices for is executed unforeseen
        return ""
    size = request.topology.ranks_per_host * request.settings.replicas.per_host
    lines, everywhere = [], result.ranks * plan.replicas
    for first in range(0, len(everywhere), size):
        ranks = everywhere[first:first + size]
        here, host = free[first:first + size], first // size
        needed = sum(rank.bytes.ddr for rank in ranks)
        if on_device:
            lines += [_line(f"rank {number}: hbm", rank.bytes.hbm, own.hbm)
                      for number, (rank, own) in enumerate(zip(ranks, here, strict=True), first)]
        else:
            needed += sum(rank.bytes.hbm for rank in ranks)
        lines.append(_line(f"host {host}: memory", needed, min(own.host for own in here)))
        disk = [own.ssd for own in here if own.ssd is not None]
        if disk:
            lines.append(_line(f"host {host}: ssd", sum(rank.bytes.ssd for rank in ranks),
                               min(disk)))
    over = [line for line in lines if line]
    if not over:
        return ""
    return "\n".join(["the job is predicted not to fit the memory that is free "
                      "(train.check_memory):", *over, *_breakdown(result),
                      *_remedy(request, free, on_device)])


def _line(where: str, needed: int, have: int | None) -> str:
    if have is None or needed <= have:
        return ""
    return (f"  {where} needs {format_bytes(needed)}, {format_bytes(have)} are free, "
            f"{format_bytes(needed - have)} too little")


def _breakdown(result: PlanResult) -> list[str]:
    """Where the bytes go, all ranks together, the largest tables first."""
    tables = sorted(result.tables, key=lambda table: -sum(table.shard_bytes))
    lines = [f"  table {table.table}: {format_bytes(sum(table.shard_bytes))} "
             f"({table.sharding.value} on {len(set(table.ranks))} ranks)"
             for table in tables[:_LARGEST_TABLES]]
    rest = tables[_LARGEST_TABLES:]
    if rest:
        total = sum(sum(table.shard_bytes) for table in rest)
        lines.append(f"  {len(rest)} other tables: {format_bytes(total)}")
    buffers = sum(rank.buffer_bytes for rank in result.ranks)
    dense = sum(rank.dense_bytes for rank in result.ranks)
    return ["all ranks together:", *lines, f"  exchange buffers: {format_bytes(buffers)}",
            f"  dense model and its optimizer: {format_bytes(dense)}"]


def _remedy(request: Request, free: Sequence[Free], on_device: bool) -> list[str]:
    """A plan for what is free, or the planner's smallest changes that would fit it."""
    from shardlab.launch.planning import plan_request

    topology = request.topology
    usable = 1 - topology.reserved_fraction
    per_host = request.settings.replicas.per_host  # groups share what is free
    host = min(own.host for own in free) // per_host
    disks = [own.ssd // per_host for own in free if own.ssd is not None]
    changes: dict[str, Any] = {"ssd": None}  # without train.ssd_dir no table may lie there
    if disks and topology.ssd is not None:
        changes["ssd"] = replace(topology.ssd, capacity_bytes=min(disks))
    if on_device:
        changes["hbm_bytes"] = max(1, min(own.hbm or 0 for own in free))
        changes["ddr_bytes"] = host
    else:  # arenas and ddr share the host's memory, as they do in the topology
        share = topology.hbm_bytes * topology.ranks_per_host
        arenas = int(host * share / (share + topology.ddr_bytes))
        changes["hbm_bytes"] = max(1, int(arenas / topology.ranks_per_host / usable))
        changes["ddr_bytes"] = int((host - arenas) / usable)
    try:
        plan_request(replace(request, topology=replace(topology, **changes)))
    except ShardLabError as error:
        return str(error).split("\n")
    return ["smallest change: another plan fits; leave plan out, or free the memory that other "
            "programs hold"]
