"""Memory is levelled at next to no cost in time."""

from __future__ import annotations

import numpy as np

from shardlab.planner.level import level_memory
from shardlab.planner.placement import Placement
from shardlab.specs import EmbeddingBagConfig
from tests.planner.fleets import assert_sums, machine, problem_for


def crowded(rows: list[int], ranks: list[int]) -> Placement:
    """Whole tables of 32 columns and equal work on the ranks named."""
    tables = [EmbeddingBagConfig(count, 32, f"t{i}") for i, count in enumerate(rows)]
    placement = Placement(problem_for(tables, machine("2xcpu"), batch_size=4))
    for table, rank in enumerate(ranks):
        option = placement.problem.options.of_table(table)[0]
        placement.put(table, option, np.array([rank]))
    return placement


def test_swaps_equal_work() -> None:
    placement = crowded([10**6, 10**6, 10**5, 10**5], [0, 0, 1, 1])
    before = placement.slowest_ms
    level_memory(placement, before * 1.05, moves=10)
    assert_sums(placement)
    assert placement.used.max() / placement.used.min() < 1.01
    assert placement.slowest_ms <= before * 1.05


def test_moves_where_there_is_time() -> None:
    placement = crowded([10**6, 10**6], [0, 0])
    level_memory(placement, 0.0, moves=10)
    assert_sums(placement)
    assert placement.used[0] == placement.used[1]


def test_leaves_what_would_cost_time() -> None:
    placement = crowded([10**6, 10**3], [0, 1])
    before = placement.used.copy()
    level_memory(placement, 0.0, moves=10)
    np.testing.assert_array_equal(placement.used, before)


def test_stops_after_its_moves() -> None:
    placement = crowded([10**6] * 6, [0] * 6)
    level_memory(placement, 0.0, moves=1)
    assert [int(ranks[0]) for ranks in placement.ranks].count(1) == 1
