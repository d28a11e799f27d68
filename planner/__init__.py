"""Decides where every table goes: ``plan(tables, topology, batch_size) -> PlanResult``.

Runs without torch, on a laptop or a login node. It cuts tables by rows and columns over equal
ranks, one copy of every row (or one on every rank), and lays each on hbm, ddr or ssd with caches in
between, by measured or assumed skew of ids. It minimises the predicted time of the slowest rank's
step and prints a proven lower bound beside it.

    from shardlab.planner import plan
    result = plan(tables, "8xh100", batch_size=2048)
    result.plan                     # a ShardingPlan
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from shardlab.planner.replicas import group_of
from shardlab.planner.settings import DenseModel, PlanSettings, Replicas
from shardlab.planner.this_machine import local_cpu
from shardlab.planner.topology import Topology
from shardlab.planner.topology_file import read_topology

if TYPE_CHECKING:
    from shardlab.planner.result import PlanResult
    from shardlab.specs import EmbeddingBagConfig

__all__ = ["DenseModel", "PlanSettings", "Replicas", "Topology", "group_of", "local_cpu", "plan",
           "read_topology"]


def plan(tables: Sequence[EmbeddingBagConfig], topology: Topology | str | Path, batch_size: int,
         optimizer: str = "row_wise_adagrad",
         settings: PlanSettings | None = None) -> PlanResult:
    """Places every table on the ranks of a topology.

    The same arguments give the same plan, whatever the machine that plans, unless the settings
    limit its time.

    Args:
        tables: the tables; what they ask for (sharding, exchange, storage, ranks) is obeyed.
        topology: the machine, or what `read_topology` understands: ``"8xh100"``, a YAML file.
        batch_size: samples of one rank in one step.
        optimizer: sparse optimiser, a name of `shardlab.storage_bytes.OPTIMIZER_STATE`.
        settings: dense model, wire dtypes, statistics of ids, time limit; None: none of these.

    Returns:
        The plan with predicted bytes and milliseconds.

    Raises:
        ConfigError: wrong arguments, all problems at once.
        PlanError: nothing fits; says what, by how much, and the smallest changes that would.
    """
    # NumPy takes most of the time that importing the planner would cost.
    from time import process_time

    from shardlab.errors import PlanError
    from shardlab.planner.build import build_result
    from shardlab.planner.infeasible import explain
    from shardlab.planner.problem import ShardLabModel
    from shardlab.planner.request import build_request
    from shardlab.planner.solve import solve_model

    start = process_time()
    machine = topology if isinstance(topology, Topology) else read_topology(topology)
    request = build_request(tables, machine, batch_size, optimizer, settings or PlanSettings())
    limit = request.settings.time_limit
    model = ShardLabModel(request)
    solved = solve_model(model, lambda: limit is not None and process_time() - start > limit)
    if solved is None:
        error: PlanError = explain(request)
        raise error
    return build_result(request, model.pricer, solved, process_time() - start)
