"""Moves, swaps and other cuts shorten the slowest rank and keep the books."""

from __future__ import annotations

import numpy as np
import pytest

from shardlab.planner.improve import improve, kick, repair
from shardlab.planner.partition import Order, greedy, largest_differencing
from shardlab.planner.placement import Placement
from shardlab.specs import EmbeddingBagConfig
from tests.planner.fleets import assert_sums, generated_fleet, machine, problem_for, tiered


@pytest.fixture
def lopsided() -> Placement:
    """Forty tables, all on rank 0 of four."""
    problem = problem_for(generated_fleet(40), machine("4xcpu", 400 << 30))
    placement = Placement(problem)
    for table in range(40):
        placement.put(table, problem.options.of_table(table)[0], np.array([0]))
    return placement


def test_improve_balances_from_the_worst_start(lopsided: Placement) -> None:
    before = lopsided.slowest_ms
    improve(lopsided, 0.0, moves=500, recuts=500)
    assert_sums(lopsided)
    assert lopsided.slowest_ms < before / 2
    assert lopsided.loads.max() / lopsided.loads.mean() < 1.02


def test_improve_keeps_to_its_target_and_budget(lopsided: Placement) -> None:
    before = lopsided.loads.copy()
    improve(lopsided, lopsided.slowest_ms, moves=500, recuts=500)
    np.testing.assert_allclose(lopsided.loads, before)
    improve(lopsided, 0.0, moves=3, recuts=0)
    assert sum(int(ranks[0]) != 0 for ranks in lopsided.ranks) == 3


def test_kick_never_worsens(lopsided: Placement) -> None:
    improve(lopsided, 0.0, moves=500, recuts=0)
    before = lopsided.slowest_ms
    kicked = kick(lopsided, 0.0, kicks=30, moves=20)
    assert_sums(kicked)
    assert kicked.slowest_ms <= before
    assert lopsided.slowest_ms == before


def test_repair_makes_differencing_fit() -> None:
    tables = [EmbeddingBagConfig(rows, 32, f"t{rows}") for rows in range(20_000, 60_000, 1_000)]
    roomy = problem_for(tables, machine("4xcpu"))
    choice = np.array([options[0] for options in map(roomy.options.of_table, range(len(tables)))])
    size = roomy.total_bytes[choice, 0].sum() / 4
    problem = problem_for(tables, machine("4xcpu", size * 1.1 / 0.9))
    placement = largest_differencing(problem, choice)
    assert placement is not None
    assert repair(placement)
    assert placement.fits
    assert_sums(placement)


def test_repair_says_when_it_cannot() -> None:
    problem = problem_for([EmbeddingBagConfig(10**6, 64, "t")], machine("2xcpu", 100 << 20))
    placement = Placement(problem)
    placement.put(0, 0, np.array([0]))
    assert not repair(placement)


def test_moves_stay_within_memory() -> None:
    tables = generated_fleet(60)
    roomy = problem_for(tables, machine("8xh100"))
    least = roomy.total_bytes[roomy.least(roomy.total_bytes[:, 0]), 0].sum() / 8
    problem = problem_for(tables, machine("8xh100", least * 1.1 / 0.9))
    placement = greedy(problem, problem.least(problem.total_bytes[:, 0]), Order.BYTES)
    assert isinstance(placement, Placement)
    before = placement.slowest_ms
    improve(placement, 0.0, moves=200, recuts=300)
    assert placement.fits
    assert placement.slowest_ms < before
    assert_sums(placement)


def test_moves_stay_within_the_memory_of_hosts() -> None:
    storage = {"dtype": "fp32", "tier": "ddr"}
    tables = [EmbeddingBagConfig(rows, 64, f"t{rows}", storage=storage)
              for rows in range(100_000, 160_000, 1_000)]
    size = sum(table.num_embeddings for table in tables) * 260 / 2
    problem = problem_for(tables, tiered("2x4xh100", 1 << 30, size * 1.03 / 0.9))
    placement = greedy(problem, problem.least(problem.total_ms), Order.BYTES)
    assert isinstance(placement, Placement)
    improve(placement, 0.0, moves=300, recuts=100)
    assert placement.fits
    assert placement.pools[:, 0].max() > 0
    assert_sums(placement)


def test_repair_empties_a_crowded_host() -> None:
    storage = {"dtype": "fp32", "tier": "ddr"}
    tables = [EmbeddingBagConfig(100_000, 64, f"t{i}", storage=storage) for i in range(8)]
    problem = problem_for(tables, tiered("2x2xh100", 1 << 30, 5 * 26_000_000 / 0.9))
    placement = Placement(problem)
    for table in range(8):
        placement.put(table, problem.options.of_table(table)[0], np.array([table % 2]))
    assert not placement.fits
    assert repair(placement)
    assert placement.fits
    assert_sums(placement)


def test_time_ends_improvement(lopsided: Placement) -> None:
    before = lopsided.slowest_ms
    improve(lopsided, 0.0, moves=500, recuts=500, expired=lambda: True)
    assert lopsided.slowest_ms == pytest.approx(before)
    assert kick(lopsided, 0.0, kicks=30, moves=20, expired=lambda: True) is lopsided


def test_options_of_less_work_make_room_for_themselves() -> None:
    # Row blocks of every table lie everywhere; whole tables cost less, but the ranks are full.
    tables = [EmbeddingBagConfig(10**6, 64, f"t{i}", sharding=("table_wise", "row_wise"),
                                 exchange="pooled", pooling_factor=4.0) for i in range(8)]
    problem = problem_for(tables, machine("4xcpu", 620e6 / 0.9))
    placement = Placement(problem)
    for table in range(8):
        last = problem.options.of_table(table)[-1]
        placement.put(table, last, np.arange(4))
    assert placement.fits
    better = kick(placement, 0.0, kicks=60, moves=40)
    assert better.fits
    assert_sums(better)
    assert better.slowest_ms < placement.slowest_ms * 0.95
