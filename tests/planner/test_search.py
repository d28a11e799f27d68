"""The search against brute force, its own bound, and itself."""

from __future__ import annotations

from itertools import permutations, product

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from shardlab.planner.bounds import lower_bound
from shardlab.planner.exact import solve_exactly
from shardlab.planner.placement import Placement, Problem
from shardlab.planner.search import choices, leanest, solve
from shardlab.specs import EmbeddingBagConfig, ExchangeKind, ShardingType
from tests.planner.fleets import assert_sums, generated_fleet, machine, problem_for


def brute_force(problem: Problem) -> float | None:
    """Least slowest-rank time over every option and every assignment to different ranks."""
    costs, world = problem.costs, problem.world_size
    ways: list[list[tuple[np.ndarray, np.ndarray]]] = []
    for table in range(problem.num_tables):
        found = []
        for option in problem.options.of_table(table):
            pieces = problem.options.pieces(option)
            for ranks in permutations(range(world), pieces.stop - pieces.start):
                ms = np.full(world, costs.common_ms[option])
                size = np.full(world, costs.common_bytes[option])
                ms[list(ranks)] += costs.ms[pieces]
                size[list(ranks)] += costs.bytes[pieces]
                found.append((ms, size))
        ways.append(found)
    best = None
    for combination in product(*ways):
        size = sum(way[1] for way in combination)
        if size.max() <= problem.capacity:
            slowest = costs.fixed_ms + float(sum(way[0] for way in combination).max())
            best = slowest if best is None else min(best, slowest)
    return best


table_sizes = st.tuples(st.integers(1, 5000), st.sampled_from([4, 16, 33, 64]),
                        st.sampled_from([1.0, 3.5, 30.0]), st.sampled_from(list(ExchangeKind)))


@hypothesis.given(sizes=st.lists(table_sizes, min_size=1, max_size=3), ranks=st.integers(1, 3),
                  tightness=st.sampled_from([0.9, 1.02, 1.3, 100.0]))
@hypothesis.settings(max_examples=40)
def test_tiny_instances_equal_brute_force(
        sizes: list[tuple[int, int, float, ExchangeKind]], ranks: int, tightness: float) -> None:
    tables = [EmbeddingBagConfig(rows, columns, f"t{i}", pooling_factor=pooling, exchange=exchange)
              for i, (rows, columns, pooling, exchange) in enumerate(sizes)]
    roomy = problem_for(tables, machine(f"{ranks}xcpu"), batch_size=32)
    least = roomy.total_bytes[roomy.least(roomy.total_bytes)].sum() / ranks
    problem = problem_for(tables, machine(f"{ranks}xcpu", least * tightness / 0.9), batch_size=32)
    expected, solution = brute_force(problem), solve(problem)
    if expected is None:
        assert solution is None
        return
    assert solution is not None
    assert solution.optimal
    assert solution.placement.slowest_ms == pytest.approx(expected, rel=1e-9)
    assert solution.placement.fits
    assert lower_bound(problem) <= expected * (1 + 1e-9)


@pytest.mark.parametrize(("name", "tables", "gap"), [
    ("2xcpu", 26, 0.01), ("8xh100", 60, 0.02), ("2x8xh200", 150, 0.02)])
def test_gap_to_the_bound(name: str, tables: int, gap: float) -> None:
    topology = machine(name, 300 << 30)
    solution = solve(problem_for(generated_fleet(tables), topology))
    assert solution is not None
    assert_sums(solution.placement)
    assert solution.placement.fits
    assert 1 <= solution.placement.slowest_ms / solution.lower_bound_ms <= 1 + gap


def test_gap_where_memory_is_tight() -> None:
    tables = generated_fleet(80)
    roomy = problem_for(tables, machine("8xh100"))
    least = roomy.total_bytes[roomy.least(roomy.total_bytes)].sum() / 8
    problem = problem_for(tables, machine("8xh100", least * 1.05 / 0.9))
    solution = solve(problem)
    assert solution is not None
    assert solution.placement.fits
    assert solution.placement.slowest_ms / solution.lower_bound_ms < 1.1


def test_both_starts_are_tried_and_compared() -> None:
    solution = solve(problem_for(generated_fleet(60), machine("8xh200")))
    assert solution is not None
    assert set(solution.starts) == {"greedy", "largest_differencing"}
    assert solution.start in solution.starts
    assert solution.placement.slowest_ms <= min(solution.starts.values()) * 1.01


def test_choices_go_from_coarse_to_fine() -> None:
    problem = problem_for(generated_fleet(60), machine("8xh200"))
    found = choices(problem, lower_bound(problem))
    assert len(found) > 3
    largest = [problem.largest_ms[choice].max() for choice in found]
    work = [problem.total_ms[choice].sum() for choice in found]
    assert largest[-1] < largest[0]
    assert work[0] == min(work)


def test_nothing_fits() -> None:
    tables = [EmbeddingBagConfig(10**7, 64, "t")]
    problem = problem_for(tables, machine("2xcpu", 1 << 30))
    assert lower_bound(problem) == float("inf")
    assert solve(problem) is None
    assert leanest(problem) == 0


def test_exact_search_gives_up_on_large_instances() -> None:
    problem = problem_for(generated_fleet(13), machine("2xcpu", 64 << 30))
    start = Placement(problem)
    assert solve_exactly(problem, start, 10) == (start, False)


def test_exact_search_says_when_it_ran_out_of_nodes() -> None:
    problem = problem_for(generated_fleet(10), machine("4xcpu", 64 << 30))
    best, optimal = solve_exactly(problem, None, 30)
    assert not optimal
    assert best is None or best.fits


def test_tied_tables_stay_on_their_host() -> None:
    kinds = [ShardingType.TABLE_ROW_WISE, ShardingType.TABLE_COLUMN_WISE, ShardingType.GRID_SHARD]
    tables = [EmbeddingBagConfig(20_000 * (i + 1), 64, f"t{i}", sharding=kinds[i % 3])
              for i in range(9)]
    problem = problem_for(tables, machine("2x4xh100"))
    solution = solve(problem)
    assert solution is not None
    for option, ranks in zip(solution.placement.choice, solution.placement.ranks, strict=True):
        group = problem.options.cuts[option].group
        hosts = (ranks // 4).reshape(-1, group)
        assert (hosts == hosts[:, :1]).all()
