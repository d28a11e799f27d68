"""The search against brute force, its own bound, and itself."""

from __future__ import annotations

from itertools import permutations, product

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from shardlab.planner.bounds import lower_bound
from shardlab.planner.choices import choices
from shardlab.planner.exact import solve_exactly
from shardlab.planner.placement import Placement, Problem
from shardlab.planner.problem import ShardLabModel
from shardlab.planner.search import find_layout, leanest, solve
from shardlab.planner.settings import DenseModel, PlanSettings
from shardlab.planner.topology import Topology
from shardlab.specs import EmbeddingBagConfig, ExchangeKind, ShardingType
from tests.planner.fleets import (
    assert_sums,
    generated_fleet,
    machine,
    problem_for,
    request_for,
    tiered,
)


def brute_force(problem: Problem) -> float | None:
    """Least slowest-rank time over every option and every assignment to different ranks."""
    ways: list[list[Placement]] = []
    for table in range(problem.num_tables):
        found = []
        for option in problem.options.of_table(table):
            for ranks in permutations(range(problem.world_size),
                                      int(problem.options.pieces[option])):
                placement = Placement(problem)
                placement.put(table, option, np.array(ranks))
                found.append(placement)
        ways.append(found)
    best = None
    for combination in product(*ways):
        whole = Placement(problem)
        for part in combination:
            whole.busy += part.busy
            whole.fetch += part.fetch
            whole.used += part.used
            whole.pools += part.pools
            whole.common_ms += part.common_ms - problem.costs.fixed_ms
            whole.common_bytes += part.common_bytes
        if whole.fits:
            best = whole.slowest_ms if best is None else min(best, whole.slowest_ms)
    return best


def check_against_brute_force(problem: Problem) -> None:
    expected, solution = brute_force(problem), solve(problem)
    if expected is None:
        assert solution is None
        return
    assert solution is not None
    assert solution.optimal
    assert solution.placement.slowest_ms == pytest.approx(expected, rel=1e-9)
    assert solution.placement.fits
    assert lower_bound(problem).ms <= expected * (1 + 1e-9)


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
    least = roomy.total_bytes[roomy.least(roomy.total_bytes[:, 0]), 0].sum() / ranks
    check_against_brute_force(
        problem_for(tables, machine(f"{ranks}xcpu", least * tightness / 0.9), batch_size=32))


@hypothesis.given(rows=st.lists(st.integers(10_000, 60_000), min_size=1, max_size=2),
                  name=st.sampled_from(["2xh100", "2x1xh100"]),
                  hbm=st.floats(0.2, 1.3), ddr=st.floats(0.0, 1.3))
@hypothesis.settings(max_examples=30)
def test_tiny_instances_on_several_tiers_equal_brute_force(
        rows: list[int], name: str, hbm: float, ddr: float) -> None:
    tables = [EmbeddingBagConfig(count, 16, f"t{i}", sharding=("table_wise", "row_wise"))
              for i, count in enumerate(rows)]
    size = sum(rows) * 68
    topology = tiered(name, hbm * size / 2, ddr * size)
    # A window, so that prefetching counts only where it exceeds it.
    dense = DenseModel(flops_per_sample=2e5)
    model = ShardLabModel(request_for(tables, topology, 32, settings=PlanSettings(dense=dense)))
    problem = model.problem(model.tiers)
    assert problem.window_ms > 0
    # The branches that pruning by symmetry may not cut: pieces of different hosts.
    check_against_brute_force(problem)


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
    least = roomy.total_bytes[roomy.least(roomy.total_bytes[:, 0]), 0].sum() / 8
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


def test_choices_are_coarse_and_fine() -> None:
    problem = problem_for(generated_fleet(60), machine("8xh200"))
    bound = lower_bound(problem)
    found = choices(problem, bound)
    assert len(found) > 3
    promises = [choice.promise for choice in found]
    assert promises == sorted(promises)
    assert min(choice.hope_ms for choice in found if not choice.excess) >= bound.ms * (1 - 1e-9)
    largest = [problem.largest_ms[choice.options].max() for choice in found]
    assert min(largest) < max(largest) / 2


def test_nothing_fits() -> None:
    tables = [EmbeddingBagConfig(10**7, 64, "t")]
    problem = problem_for(tables, machine("2xcpu", 1 << 30))
    assert lower_bound(problem).ms == float("inf")
    assert solve(problem) is None
    assert leanest(problem) == find_layout(problem) == 0


def test_out_of_time_there_still_is_a_plan() -> None:
    problem = problem_for(generated_fleet(60), machine("8xh200"))
    hasty, patient = solve(problem, lambda: True), solve(problem)
    assert hasty is not None
    assert patient is not None
    assert_sums(hasty.placement)
    assert hasty.placement.fits
    # Levelled memory may cost a hundredth.
    assert patient.placement.slowest_ms <= hasty.placement.slowest_ms * 1.01


def memory_of(tables: list[EmbeddingBagConfig], share: float) -> Topology:
    """Two hosts whose hbm holds this share of the tables, and ddr the rest."""
    size = sum(table.num_embeddings * (4 * table.embedding_dim + 4) for table in tables)
    return tiered("2x8xh100", share * size / 16 / 0.9, size)


def test_equal_tables_are_split_between_tiers() -> None:
    tables = [EmbeddingBagConfig(10**6, 64, f"t{i}", sharding="table_wise") for i in range(64)]
    problem = problem_for(tables, memory_of(tables, 0.6))
    solution = solve(problem)
    assert solution is not None
    assert solution.placement.slowest_ms / solution.lower_bound_ms < 1.15
    assert 0 < (problem.costs.piece_bytes[solution.placement.choice, 1] == 0).mean() < 1


@pytest.mark.parametrize("share", [0.3, 0.7, 1.02])
def test_what_hbm_does_not_hold_goes_to_ddr(share: float) -> None:
    tables = generated_fleet(80, largest_rows=5e7)
    problem = problem_for(tables, memory_of(tables, share))
    solution = solve(problem)
    assert solution is not None
    assert_sums(solution.placement)
    assert solution.placement.fits
    if share < 1:
        assert solution.bound.prices[0] > 0
        assert solution.placement.pools[:, 0].min() > 0
    assert solution.placement.slowest_ms / solution.lower_bound_ms < 1.05


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
        group = int(problem.options.group[option])
        hosts = (ranks // 4).reshape(-1, group)
        assert (hosts == hosts[:, :1]).all()
