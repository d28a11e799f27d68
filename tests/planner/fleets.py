"""Tables and machines that several planner tests share."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from shardlab.planner.placement import Placement, Problem
from shardlab.planner.problem import ShardLabModel
from shardlab.planner.request import Request, build_request
from shardlab.planner.settings import PlanSettings
from shardlab.planner.topology import Topology
from shardlab.planner.topology_file import read_topology
from shardlab.specs import EmbeddingBagConfig

GIB = 1 << 30


def generated_fleet(num_tables: int, *, seed: int = 11,
                    largest_rows: float = 5e7) -> list[EmbeddingBagConfig]:
    """Log-uniform rows and pooling factors, as in the planner's benchmark inputs."""
    rng = np.random.default_rng([seed, num_tables])
    rows = np.exp(rng.uniform(np.log(1e3), np.log(largest_rows), num_tables)).astype(int)
    columns = rng.choice([32, 64, 96, 128, 256], num_tables)
    pooling = np.round(np.exp(rng.uniform(0.0, np.log(100.0), num_tables)), 2)
    return [EmbeddingBagConfig(int(r), int(c), f"table_{i}", pooling_factor=float(p))
            for i, (r, c, p) in enumerate(zip(rows, columns, pooling, strict=True))]


def machine(name: str, hbm_bytes: float | None = None) -> Topology:
    """A built-in machine without ddr and disks, with another memory size if asked."""
    topology = replace(read_topology(name), ddr_bytes=0, ssd=None)
    return topology if hbm_bytes is None else replace(topology, hbm_bytes=int(hbm_bytes))


def tiered(name: str, hbm: float, ddr: float, ssd: float = 0.0) -> Topology:
    """A built-in machine with these bytes of hbm per rank, ddr and ssd per host."""
    topology = read_topology(name)
    disk = replace(topology.ssd, capacity_bytes=int(ssd)) if ssd and topology.ssd else None
    return replace(topology, hbm_bytes=int(hbm), ddr_bytes=int(ddr), ssd=disk)


def request_for(tables: list[EmbeddingBagConfig], topology: Topology, batch_size: int = 256,
                optimizer: str = "row_wise_adagrad",
                settings: PlanSettings | None = None) -> Request:
    """A checked request."""
    return build_request(tables, topology, batch_size, optimizer, settings or PlanSettings())


def problem_for(tables: list[EmbeddingBagConfig], topology: Topology,
                batch_size: int = 256) -> Problem:
    """The priced options of a request, on all tiers of the machine."""
    model = ShardLabModel(request_for(tables, topology, batch_size))
    return model.problem(model.tiers)


def assert_sums(placement: Placement) -> None:
    """Loads and bytes are the sums of the pieces, and a table's pieces lie on different ranks."""
    problem, ranks_per_pool = placement.problem, placement.problem.ranks.ranks_per_pool
    busy, fetch = np.zeros(problem.world_size), np.zeros(problem.world_size)
    size = np.zeros((problem.world_size, 3), dtype=np.int64)
    common_ms, common_bytes = problem.costs.fixed_ms, 0
    for option, ranks in zip(placement.choice.tolist(), placement.ranks, strict=True):
        assert len(set(ranks.tolist())) == len(ranks) == problem.options.pieces[option]
        common_ms += problem.costs.common_ms[option]
        common_bytes += problem.costs.common_bytes[option]
        for rank, ms, fetched in zip(ranks, *problem.piece_ms(option), strict=True):
            busy[rank] += ms
            fetch[rank] += fetched
            size[rank] += problem.costs.piece_bytes[option]
    np.testing.assert_allclose(placement.busy, busy, rtol=1e-9)
    np.testing.assert_allclose(placement.fetch, fetch, rtol=1e-9)
    np.testing.assert_array_equal(placement.used, size[:, 0])
    np.testing.assert_array_equal(
        placement.pools, size[:, 1:].reshape(-1, ranks_per_pool, 2).sum(axis=1))
    assert abs(placement.common_ms - common_ms) <= 1e-9 * common_ms
    assert placement.common_bytes == common_bytes
