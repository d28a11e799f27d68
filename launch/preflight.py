"""What can be known to go wrong before a job enters a queue: the plan, paths, versions."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from shardlab.errors import ConfigError, LaunchError, PlanError, ShardLabError

if TYPE_CHECKING:
    from shardlab.comm import Groups
    from shardlab.config import JobConfig
    from shardlab.plan import ShardingPlan
    from shardlab.planner import Topology
    from shardlab.planner.request import Request

#: File systems that every node of a cluster sees at one path, by the names of /proc/mounts.
SHARED_SYSTEMS = frozenset({
    "nfs", "nfs4", "lustre", "gpfs", "beegfs", "ceph", "fuse.ceph", "fuse.glusterfs", "glusterfs",
    "panfs", "wekafs", "orangefs", "afs", "cifs", "smb3", "fuse.juicefs", "daos", "fuse.s3fs"})
_MOUNTS = Path("/proc/mounts")


@dataclass(frozen=True)
class Nodes:
    """The nodes that a job asks for.

    Attributes:
        nodes: their number.
        ranks_per_node: ranks on each.
        gpus: whether ranks run on GPUs.
        assume_shared: take the user's word that all nodes see the same paths.
    """

    nodes: int
    ranks_per_node: int
    gpus: bool
    assume_shared: bool = False


def check(job: JobConfig, nodes: Nodes) -> list[str]:
    """Checks a job for the nodes it asks for; returns what was seen, one line each.

    Raises:
        LaunchError: everything that would make it fail, each with its remedy.
    """
    problems: list[str] = []
    seen: list[str] = []
    for look in (_plan, _paths, _versions):
        try:
            seen += look(job, nodes)
        except LaunchError as error:
            problems.append(str(error))
    if problems:
        raise LaunchError("not submitted:\n" + "\n".join(f"  {line}" for text in problems
                                                        for line in text.split("\n")))
    return seen


def _plan(job: JobConfig, nodes: Nodes) -> list[str]:
    from shardlab.launch.planning import job_request, plan_request, read_job_plan

    ranks = nodes.nodes * nodes.ranks_per_node
    try:
        given = None if job.plan is None else read_job_plan(Path(job.plan), job, ranks)
        topology = _topology(job, nodes)
        if topology is None:
            return [f"plan      not checked against memory: say what the GPUs are, such as --set "
                    f"topology={nodes.nodes}x{nodes.ranks_per_node}xh100"]
        request = job_request(job, topology, given=given)
        if given is not None:
            return [_given(given, request, job, nodes)]
        result = plan_request(request)
    except ShardLabError as error:
        raise LaunchError(f"plan: {error}", error.exit_code) from None
    most = max(rank.bytes.hbm for rank in result.ranks)
    return [f"plan      fits {ranks} ranks of {topology.name}; the fullest holds "
            f"{most / 2**30:.2f} of {result.capacity / 2**30:.2f} GiB of hbm"]


def _given(plan: ShardingPlan, request: Request, job: JobConfig, nodes: Nodes) -> str:
    """What is said of the plan that a job names; PlanError where it is too large for the nodes."""
    from shardlab.launch.forecast import Free, forecast
    from shardlab.planner.replicas import all_groups

    topology = all_groups(request.topology, request.settings.replicas)
    disk = None if job.train.ssd_dir is None or topology.ssd is None else \
        topology.ssd.capacity_bytes
    if nodes.gpus:
        have = Free(topology.hbm_bytes, topology.ddr_bytes, disk)
    else:
        arenas = topology.hbm_bytes * topology.ranks_per_host
        have = Free(None, topology.ddr_bytes + arenas, disk)
    over = forecast(plan, request, [have] * topology.world_size, on_device=nodes.gpus)
    if over:
        lines = over.split("\n")[1:]  # the first speaks of memory that is free now
        raise PlanError("\n".join([f"{job.plan} does not fit {topology.world_size} ranks of "
                                   f"{topology.name}:", *lines]))
    return f"plan      {job.plan} fits {topology.world_size} ranks of {topology.name}"


def _topology(job: JobConfig, nodes: Nodes) -> Topology | None:
    """The job's topology, or nodes like this machine; None: GPUs that nobody described."""
    from shardlab.launch.planning import without_absent_disk
    from shardlab.planner import local_cpu, read_topology

    ranks = nodes.nodes * nodes.ranks_per_node
    if job.topology is not None:
        named = read_topology(job.topology)
        if named.world_size != ranks and not job.train.elastic:
            raise LaunchError(f"topology {named.name} has {named.world_size} ranks, the nodes "
                              f"asked for have {nodes.nodes} x {nodes.ranks_per_node}; change one "
                              "of them")
        named = replace(named, hosts=nodes.nodes, ranks_per_host=nodes.ranks_per_node)
        return without_absent_disk(named, job)
    if nodes.gpus:
        return None
    here = local_cpu(nodes.ranks_per_node)
    here = replace(here, name=f"nodes like this machine ({here.name})", hosts=nodes.nodes)
    return without_absent_disk(here, job)


def _paths(job: JobConfig, nodes: Nodes) -> list[str]:
    from shardlab.data.files import expand_paths

    problems, found = [], []
    if job.train.run_dir is None:
        raise LaunchError("train.run_dir: absent; a job that is started again must find its "
                          "folder (--set train.run_dir=PATH)")
    paths = [("train.run_dir", Path(job.train.run_dir))]
    try:
        data = expand_paths(job.data.path) if job.data.path else []
    except ShardLabError as error:
        problems.append(str(error))
        data = []
    paths += [("data.path", Path(path)) for path in data]
    paths += [(key, Path(path)) for key, path in (("plan", job.plan),
                                                  ("statistics", job.statistics)) if path]
    folder = _existing(paths[0][1])
    if not os.access(folder, os.W_OK):
        problems.append(f"train.run_dir: {folder} cannot be written")
    for key, path in paths:
        kind = file_system(path)
        if kind not in SHARED_SYSTEMS and nodes.nodes > 1 and not nodes.assume_shared:
            problems.append(f"{key}: {path} lies on {kind}, which other nodes do not see; move it "
                            "to a shared file system, or say --assume-shared")
    if problems:
        raise LaunchError("\n".join(problems))
    found.append(f"paths     {len(paths)} found, run folder {paths[0][1]} on "
                 f"{file_system(paths[0][1])}")
    return found


def _existing(path: Path) -> Path:
    """The path, or its nearest parent that exists."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def file_system(path: Path) -> str:
    """Type of the file system that a path lies on, or will; "unknown" outside Linux."""
    if not _MOUNTS.is_file():
        return "unknown"
    target = _existing(path).resolve()
    best, kind = -1, "unknown"
    for line in _MOUNTS.read_text(encoding="utf-8").splitlines():
        point, system = line.split()[1:3]
        point = point.replace("\\040", " ")
        if target.is_relative_to(point) and len(point) > best:
            best, kind = len(point), system
    return kind


def versions() -> dict[str, str]:
    """Versions that all ranks must agree on."""
    found = {"python": platform.python_version()}
    for package in ("shardlab", "torch", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    return found


def _versions(job: JobConfig, nodes: Nodes) -> list[str]:
    have = versions()
    absent = [package for package, number in have.items() if number == "absent"]
    if absent:
        raise LaunchError(f"versions: {', '.join(absent)} not installed in this environment, "
                          "which the job will use")
    return ["versions  " + ", ".join(f"{name} {number}" for name, number in have.items())]


def check_versions(groups: Groups) -> None:
    """Ranks of a job that run different versions are refused; every rank must call it.

    Raises:
        LaunchError: names the first rank that differs, and in what.
    """
    from shardlab.comm import gather_objects_json

    if groups.world_size > 1:
        compare_versions(gather_objects_json(versions(), groups))


def compare_versions(found: Sequence[dict[str, str]]) -> None:
    """Raises LaunchError where ranks' versions differ from rank 0's."""
    for rank, have in enumerate(found):
        for name, number in have.items():
            if number != found[0][name]:
                raise LaunchError(f"rank {rank} has {name} {number}, rank 0 has "
                                  f"{found[0][name]}; give all nodes one environment")


def absolute_paths(job: JobConfig) -> list[str]:
    """Overrides that make a job's paths independent of the folder it is started in.

    Raises:
        ConfigError: the job has no run folder.
    """
    if job.train.run_dir is None:
        raise ConfigError("train.run_dir: absent; name it, on a path that all nodes see")
    given = {"train.run_dir": job.train.run_dir, "plan": job.plan, "statistics": job.statistics,
             "train.ssd_dir": job.train.ssd_dir}
    if job.topology is not None and Path(job.topology).exists():
        given["topology"] = job.topology
    # Slurm starts the ranks, so that no rank should start others.
    overrides = ["ranks=1"]
    overrides += [f"{key}={Path(path).absolute()}" for key, path in given.items() if path]
    if job.data.path:
        paths = ", ".join(f'"{Path(path).absolute()}"' for path in job.data.path)
        overrides.append(f"data.path=[{paths}]")
    return overrides
