"""The bound is a bound, and says what binds."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy.optimize import linprog

from shardlab.planner.bounds import lower_bound, relax
from shardlab.planner.placement import Problem
from shardlab.specs import EmbeddingBagConfig
from tests.planner.fleets import generated_fleet, machine, problem_for, tiered


def relaxed(problem: Problem, limit: float) -> float:
    """The bound's linear program in one piece: least work of mixtures of options within a limit,
    as milliseconds of the average rank."""
    reach = problem.largest_ms + problem.costs.fixed_ms
    allowed = np.flatnonzero(problem.fits_alone & (reach <= limit))
    tables = problem.options.table[allowed]
    equal = (tables[None, :] == np.arange(problem.num_tables)[:, None]).astype(float)
    room = np.maximum(problem.room, 1.0)
    solved = linprog(problem.total_ms[allowed], (problem.total_bytes[allowed] / room).T,
                     np.ones(3), equal, np.ones(problem.num_tables))
    assert solved.success
    return problem.costs.fixed_ms + float(solved.fun) / problem.world_size


@pytest.mark.parametrize("share", [0.4, 0.8])
def test_generated_choices_solve_the_linear_program(share: float) -> None:
    tables = generated_fleet(30)
    size = sum(table.num_embeddings * (4 * table.embedding_dim + 4) for table in tables)
    problem = problem_for(tables, tiered("2x4xh100", share * size / 8 / 0.9, size))
    bound = lower_bound(problem)
    assert relaxed(problem, np.inf) <= bound.ms * (1 + 2e-3)
    assert relaxed(problem, bound.ms * 1.002) <= bound.ms * 1.002
    assert relaxed(problem, bound.ms * 0.99) >= bound.ms * 0.99
    assert bound.prices[0] > 0
    assert bound.prices[1] == bound.prices[2] == 0


def test_the_largest_piece_binds() -> None:
    tables = [*generated_fleet(10, largest_rows=1e5), EmbeddingBagConfig(
        10**6, 256, "hot", pooling_factor=500.0, sharding="table_wise")]
    problem = problem_for(tables, machine("16xh100"))
    bound = lower_bound(problem)
    assert bound.table == 10
    option = problem.options.of_table(10)[0]
    assert bound.ms > problem.largest_ms[option]
    assert not bound.prices.any()


def test_work_alone_binds() -> None:
    problem = problem_for(generated_fleet(40), machine("4xh200"))
    bound = lower_bound(problem)
    least = problem.least(problem.total_ms)
    assert bound.ms >= problem.costs.fixed_ms + problem.total_ms[least].sum() / 4 * (1 - 1e-9)
    assert bound.table == -1
    assert not bound.prices.any()


def test_prefetching_within_its_window_is_free() -> None:
    storage = {"levels": [{"dtype": "fp32", "tier": "hbm", "fraction": 0.01},
                          {"dtype": "fp32", "tier": "ddr"}]}
    tables = [EmbeddingBagConfig(10**6, 64, f"t{i}", storage=storage, pooling_factor=20.0)
              for i in range(12)]
    problem = problem_for(tables, tiered("4xh100", 4 << 30, 64 << 30))
    fetched = problem.total_fetch[problem.least(problem.total_fetch)].sum() / 4
    bounds = [lower_bound(replace(problem, window_ms=window)).ms
              for window in (0.0, fetched / 2, 10 * fetched)]
    assert bounds[0] - bounds[1] == pytest.approx(fetched / 2, rel=0.1)
    assert bounds[2] < bounds[1]


def test_prices_rise_as_less_may_be_taken() -> None:
    tables = generated_fleet(30)
    size = sum(table.num_embeddings * (4 * table.embedding_dim + 4) for table in tables)
    problem = problem_for(tables, tiered("4xh100", size / 4 / 0.9, size))
    found = [relax(problem, np.inf, fill, 1.0) for fill in (0.9, 0.5, 0.2)]
    prices = [entry.prices[0] for entry in found if entry is not None]
    assert prices == sorted(prices)
    assert prices[0] > 0
    used = [problem.total_bytes[entry.choice, 0].sum() for entry in found if entry is not None]
    assert used == sorted(used, reverse=True)
    assert relax(problem_for(tables, machine("4xh100", size / 4)), np.inf, 0.5, 1.0) is None
