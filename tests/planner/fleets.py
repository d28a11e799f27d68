"""Tables and machines that several planner tests share."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from shardlab.planner.placement import Placement, Problem
from shardlab.planner.request import Request, build_problem, build_request
from shardlab.planner.topology import Topology, read_topology
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
    """A built-in machine, with another memory size if asked."""
    topology = read_topology(name)
    return topology if hbm_bytes is None else replace(topology, hbm_bytes=int(hbm_bytes))


def request_for(tables: list[EmbeddingBagConfig], topology: Topology, batch_size: int = 256,
                optimizer: str = "row_wise_adagrad") -> Request:
    """A checked request without dense bytes."""
    return build_request(tables, topology, batch_size, optimizer, 0)


def problem_for(tables: list[EmbeddingBagConfig], topology: Topology,
                batch_size: int = 256) -> Problem:
    """The priced options of a request."""
    return build_problem(request_for(tables, topology, batch_size))


def assert_sums(placement: Placement) -> None:
    """Loads and bytes are the sums of the pieces, and a table's pieces lie on different ranks."""
    problem = placement.problem
    loads = np.full(problem.world_size, problem.costs.fixed_ms)
    used = np.zeros(problem.world_size, dtype=np.int64)
    for option, ranks in zip(placement.choice.tolist(), placement.ranks, strict=True):
        assert len(set(ranks.tolist())) == len(ranks)
        loads += problem.costs.common_ms[option]
        used += problem.costs.common_bytes[option]
        pieces = problem.options.pieces(option)
        for rank, ms, size in zip(ranks, problem.costs.ms[pieces], problem.costs.bytes[pieces],
                                  strict=True):
            loads[rank] += ms
            used[rank] += size
    np.testing.assert_allclose(placement.loads, loads, rtol=1e-9)
    np.testing.assert_array_equal(placement.used, used)
