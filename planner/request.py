"""What the user asked for, checked once, and the search problem made of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from shardlab.errors import ConfigError, PlanError, nearest_name
from shardlab.planner.enumerate import enumerate_options
from shardlab.planner.estimate import estimate
from shardlab.planner.placement import Problem
from shardlab.planner.topology import Topology
from shardlab.planner.units import format_bytes
from shardlab.planner.workload import build_workload
from shardlab.specs import OPTIMIZER_STATE, EmbeddingBagConfig, Tier, check_tables


@dataclass(frozen=True)
class Request:
    """A planning job.

    Attributes:
        tables: the tables.
        topology: the machine.
        batch_size: samples of one rank in one step.
        optimizer: sparse optimiser, a name of `shardlab.specs.OPTIMIZER_STATE`.
        dense_bytes: bytes of one rank that the caller wants kept free besides the topology's
            reserve.
    """

    tables: tuple[EmbeddingBagConfig, ...]
    topology: Topology
    batch_size: int
    optimizer: str
    dense_bytes: int

    @property
    def capacity(self) -> int:
        """Bytes of one rank for shards and exchange buffers."""
        return self.topology.capacity - self.dense_bytes


def build_request(tables: Sequence[EmbeddingBagConfig], topology: Topology, batch_size: int,
                  optimizer: str, dense_bytes: int) -> Request:
    """Checks the parts of a request.

    Raises:
        ConfigError: lists every problem: table clashes, unknown optimiser, a batch size or
            pooling factor that is not positive, a storage tier that cannot be planned yet.
        PlanError: ``dense_bytes`` leave no room for tables.
    """
    check_tables(tables)
    problems = []
    if optimizer not in OPTIMIZER_STATE:
        problems.append(f"optimizer: unknown {optimizer!r}"
                        f"{nearest_name(optimizer, list(OPTIMIZER_STATE))}; "
                        f"known: {', '.join(OPTIMIZER_STATE)}")
    if batch_size < 1:
        problems.append(f"batch_size: expected at least 1 sample per rank, found {batch_size}")
    if dense_bytes < 0:
        problems.append(f"dense_bytes: expected at least 0, found {dense_bytes}")
    for table in tables:
        tier = table.storage.home.tier
        if tier not in (None, Tier.HBM):
            problems.append(f"table {table.name!r}: asks for tier {tier.value!r}; this planner "
                            f"places tables on {Tier.HBM.value!r} only")
        if not table.pooling_factor > 0:
            problems.append(f"table {table.name!r}: pooling_factor must be above 0, found "
                            f"{table.pooling_factor!r}")
    if problems:
        raise ConfigError(problems)
    request = Request(tuple(tables), topology, batch_size, optimizer, dense_bytes)
    if request.capacity <= 0:
        raise PlanError(
            f"dense_bytes: {format_bytes(dense_bytes)} per rank leave no room for tables: a rank "
            f"of {topology.name} has {format_bytes(topology.capacity)} after its reserve; "
            f"smallest change: keep dense_bytes below {format_bytes(topology.capacity)}")
    return request


def build_problem(request: Request) -> Problem:
    """Options, costs and capacity of a request."""
    topology = request.topology
    work = build_workload(request.tables, topology.world_size, request.batch_size)
    options = enumerate_options(request.tables, topology, work)
    costs = estimate(request.tables, options, work, topology, request.optimizer)
    return Problem(options, costs, topology.world_size, topology.ranks_per_host,
                   request.capacity)
