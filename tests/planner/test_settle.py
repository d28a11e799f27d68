"""Choices are made to fit by their sum, and spend what is left."""

from __future__ import annotations

import numpy as np

from shardlab.planner.placement import Problem
from shardlab.planner.settle import settle
from shardlab.specs import EmbeddingBagConfig
from tests.planner.fleets import problem_for, tiered


def two_tiers(share: float) -> Problem:
    tables = [EmbeddingBagConfig(rows, 64, f"t{rows}", sharding="table_wise")
              for rows in range(400_000, 1_200_000, 100_000)]
    size = sum(table.num_embeddings * 260 for table in tables)
    return problem_for(tables, tiered("4xh100", share * size / 4 / 0.9, 2 * size))


def fullest(problem: Problem, choice: np.ndarray, fill: float) -> float:
    return float((problem.total_bytes[choice].sum(axis=0)
                  / np.maximum(fill * problem.room, 1)).max())


def test_an_overfull_choice_gives_way() -> None:
    problem = two_tiers(0.6)
    fastest = problem.least(problem.total_ms)
    assert fullest(problem, fastest, 0.9) > 1
    settled = settle(problem, fastest, problem.fits_alone, 0.9)
    assert fullest(problem, settled, 0.9) <= 1
    assert (problem.options.table[settled] == np.arange(problem.num_tables)).all()
    # Tables whose options are as fast as can be are left alone.
    assert 0 < (settled != fastest).sum() < problem.num_tables


def test_room_that_is_left_is_spent() -> None:
    problem = two_tiers(1.5)
    slow = problem.least(problem.total_bytes[:, 0])
    settled = settle(problem, slow, problem.fits_alone, 0.95)
    assert (settled == problem.least(problem.total_ms)).all()


def test_only_allowed_options_are_taken() -> None:
    problem = two_tiers(0.6)
    fastest = problem.least(problem.total_ms)
    nothing = np.zeros(len(problem.options), dtype=bool)
    assert (settle(problem, fastest, nothing, 0.9) == fastest).all()
