"""Which rank this process is, from torchrun's or Slurm's variables, and what the host offers."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from shardlab.errors import LaunchError

_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
#: Ports for Slurm jobs: below Linux's ephemeral range, which starts at 32768.
_FIRST_PORT, _PORTS = 12000, 20000
_CGROUP_LIMIT = Path("/sys/fs/cgroup/cpu.max")


@dataclass(frozen=True)
class RankInfo:
    """This process's place in a job that another program started.

    Attributes:
        rank: global rank, from 0.
        world_size: ranks of the job.
        local_rank: rank on this host, from 0.
        local_world_size: ranks on this host.
        master_addr: host of rank 0.
        master_port: TCP port where rank 0 listens.
        starter: "torchrun" or "srun".
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    master_addr: str
    master_port: int
    starter: str

    def __post_init__(self) -> None:
        for name, value, size in (("rank", self.rank, self.world_size),
                                  ("local_rank", self.local_rank, self.local_world_size)):
            if not 0 <= value < size:
                raise LaunchError(f"{self.starter} gave {name} {value} of {size}; "
                                  f"expected 0 to {size - 1}")

    def variables(self) -> dict[str, str]:
        """The same under torchrun's names, which torch.distributed reads."""
        values = (self.rank, self.world_size, self.local_rank, self.local_world_size,
                  self.master_addr, self.master_port)
        return {name: str(value) for name, value in zip(_TORCHRUN, values, strict=True)}


def find_rank(environ: Mapping[str, str] = os.environ) -> RankInfo | None:
    """Reads this process's rank; torchrun's variables win over Slurm's.

    Args:
        environ: environment variables.

    Returns:
        The rank, or None where neither torchrun nor an srun of several tasks started it.

    Raises:
        LaunchError: variables are missing, are no numbers, or contradict each other.
    """
    if "RANK" in environ or "WORLD_SIZE" in environ:
        return _from_torchrun(environ)
    # A batch script and a login shell have SLURM_PROCID too: only a step is an srun.
    if "SLURM_PROCID" in environ and _slurm_tasks(environ) > 1:
        return _from_slurm(environ)
    return None


def _from_torchrun(environ: Mapping[str, str]) -> RankInfo:
    missing = [name for name in _TORCHRUN if name not in environ]
    if missing:
        given = next(name for name in ("RANK", "WORLD_SIZE") if name in environ)
        raise LaunchError(f"{given} is set, but {', '.join(missing)} not; start through torchrun, "
                          f"set all of {', '.join(_TORCHRUN)}, or unset {given}")
    rank, world, local_rank, local_world = (_number(environ, name) for name in _TORCHRUN[:4])
    return RankInfo(rank, world, local_rank, local_world, environ["MASTER_ADDR"],
                    _number(environ, "MASTER_PORT"), "torchrun")


def _slurm_tasks(environ: Mapping[str, str]) -> int:
    return _number(environ, "SLURM_STEP_NUM_TASKS") if "SLURM_STEP_NUM_TASKS" in environ else 1


def _from_slurm(environ: Mapping[str, str]) -> RankInfo:
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_NODELIST", "")
    master = environ.get("MASTER_ADDR") or first_host(nodes)
    if not master:
        raise LaunchError("srun set neither SLURM_STEP_NODELIST nor SLURM_NODELIST; "
                          "set MASTER_ADDR to the host of rank 0")
    if "MASTER_PORT" in environ:
        port = _number(environ, "MASTER_PORT")
    else:  # the same on every rank, another for every job and step
        step = _number(environ, "SLURM_STEP_ID") if "SLURM_STEP_ID" in environ else 0
        port = _FIRST_PORT + (_number(environ, "SLURM_JOB_ID") * 16 + step) % _PORTS
    tasks = environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE", "")
    return RankInfo(
        _number(environ, "SLURM_PROCID"), _slurm_tasks(environ), _number(environ, "SLURM_LOCALID"),
        tasks_on_node(tasks, _number(environ, "SLURM_NODEID")), master, port, "srun")


def _number(environ: Mapping[str, str], name: str) -> int:
    text = environ.get(name)
    if text is None:
        raise LaunchError(f"{name} is not set, although the variables beside it are")
    if not text.isdecimal():
        raise LaunchError(f"{name} is {text!r}, expected a number")
    return int(text)


def first_host(nodes: str) -> str:
    """First host of a Slurm list: ``gpu[03-07,12],login`` gives ``gpu03``; "" for an empty one."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)
    text = first.group(0) if first else ""
    return re.sub(r"\[([^,\-\]]*)[^\]]*\]", r"\1", text)


def tasks_on_node(tasks: str, node: int) -> int:
    """Tasks of one node in Slurm's list: ``4(x2),3`` is 4, 4 and 3.

    Raises:
        LaunchError: the list is malformed or shorter than the node's number.
    """
    counts: list[int] = []
    for part in tasks.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if match is None:
            raise LaunchError(f"SLURM_STEP_TASKS_PER_NODE is {tasks!r}, "
                              "expected a list such as 4(x2),3")
        counts += [int(match.group(1))] * int(match.group(2) or 1)
    if node >= len(counts):
        raise LaunchError(f"SLURM_NODEID is {node}, but SLURM_STEP_TASKS_PER_NODE, {tasks!r}, "
                          f"names {len(counts)} nodes")
    return counts[node]


def available_cores() -> int:
    """Cores that this process may use: its affinity, capped by the container's CPU limit."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") \
        else os.cpu_count() or 1
    try:
        quota, period = _CGROUP_LIMIT.read_text().split()
    except (OSError, ValueError):  # no cgroup v2: no limit that we could read
        return cores
    return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))
