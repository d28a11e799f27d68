"""The machine that this process runs on, as far as a plan without a probe needs it."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from shardlab.planner.profiles import read_profile
from shardlab.planner.topology import Topology

#: Share of this machine's memory that `local_cpu` gives to the ranks' arenas (the hbm tier); the
#: ddr tier gets the rest.
ARENA_SHARE = 0.75


def local_cpu(ranks: int) -> Topology:
    """The ``cpu`` profile with this machine's own memory: `ARENA_SHARE` of it for the arenas of
    ``ranks`` ranks, the rest for the ddr tier."""
    memory = machine_memory()
    arenas = int(memory * ARENA_SHARE)
    return replace(read_profile("cpu"), name=f"{ranks}xcpu (this machine)", ranks_per_host=ranks,
                   hbm_bytes=arenas // ranks, ddr_bytes=memory - arenas)


def machine_memory() -> int:
    """Bytes of memory that this process may use: the machine's, capped by the container's."""
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(pages, *(int(text) for text in _cgroup_limits() if text.isdigit()), pages)


def _cgroup_limits() -> list[str]:
    """Memory limits of the container we run in, v2 and v1; "max" when there is none."""
    paths = ["/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"]
    return [Path(path).read_text().strip() for path in paths if os.access(path, os.R_OK)]
