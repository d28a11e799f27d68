"""Decides where every table goes: ``plan(tables, topology, batch_size) -> PlanResult``.

Runs without torch, on a laptop or a login node. Today it cuts tables by rows and columns over
equal ranks, one copy of every row, in each rank's own memory (``hbm``; without CUDA an arena of
host memory), from an assumed skew of ids. It minimises the predicted time of the slowest rank's
embedding work and prints a proven lower bound beside it.

    from shardlab.planner import plan
    result = plan(tables, "8xh100", batch_size=2048)
    result.plan                     # a ShardingPlan
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from shardlab.planner.topology import Topology, local_cpu, read_topology

if TYPE_CHECKING:
    from shardlab.planner.result import PlanResult
    from shardlab.specs import EmbeddingBagConfig

__all__ = ["Topology", "local_cpu", "plan", "read_topology"]


def plan(tables: Sequence[EmbeddingBagConfig], topology: Topology | str | Path, batch_size: int,
         optimizer: str = "row_wise_adagrad", *, dense_bytes: int = 0) -> PlanResult:
    """Places every table on the ranks of a topology.

    The same arguments give the same plan, whatever the machine that plans.

    Args:
        tables: the tables; their ``sharding``, ``exchange`` and storage tier are obeyed.
        topology: the machine, or what `read_topology` understands: ``"8xh100"``, a YAML file.
        batch_size: samples of one rank in one step.
        optimizer: sparse optimiser, a name of `shardlab.specs.OPTIMIZER_STATE`.
        dense_bytes: bytes of each rank to keep free besides the topology's reserve.

    Returns:
        The plan with predicted bytes and milliseconds.

    Raises:
        ConfigError: wrong arguments, all problems at once.
        PlanError: nothing fits; says what, by how much, and the smallest changes that would.
    """
    # NumPy takes most of the time that importing the planner would cost.
    from time import process_time

    from shardlab.errors import PlanError
    from shardlab.planner.infeasible import explain
    from shardlab.planner.request import build_problem, build_request
    from shardlab.planner.result import build_result
    from shardlab.planner.search import solve

    start = process_time()
    machine = topology if isinstance(topology, Topology) else read_topology(topology)
    request = build_request(tables, machine, batch_size, optimizer, dense_bytes)
    problem = build_problem(request)
    solution = solve(problem)
    if solution is None:
        error: PlanError = explain(request, problem)
        raise error
    return build_result(request, problem, solution, process_time() - start)
