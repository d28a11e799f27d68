"""Expected unique ids against the exact sum."""

from __future__ import annotations

import numpy as np
import pytest

from shardlab.planner.zipf import unique_ids


@pytest.mark.parametrize("rows", [1, 2, 3, 31, 32, 33, 100, 10_000, 1_000_000])
@pytest.mark.parametrize("draws", [1, 2.5, 50, 2_048, 1_000_000])
def test_unique_ids_near_the_exact_sum(rows: int, draws: float) -> None:
    weight = np.arange(1, rows + 1.0) ** -1.05
    share = np.minimum(weight / weight.sum(), 1 - 1e-12)
    exact = -np.expm1(draws * np.log1p(-share)).sum()
    found = unique_ids(np.array([float(rows)]), np.array([float(draws)]))[0]
    assert found == pytest.approx(exact, rel=0.01)
    assert 0 < found <= min(rows, draws)


def test_unique_ids_counts_real_draws() -> None:
    rng = np.random.default_rng(3)
    weight = np.arange(1, 5_001.0) ** -1.05
    counts = [len(set(rng.choice(5_000, 4_096, p=weight / weight.sum()))) for _ in range(20)]
    found = unique_ids(np.array([5_000.0]), np.array([4_096.0]))[0]
    assert found == pytest.approx(np.mean(counts), rel=0.02)


def test_unique_ids_grows_with_draws_and_rows() -> None:
    draws = np.geomspace(1, 1e9, 40)
    found = unique_ids(np.full(40, 1e7), draws)
    assert (np.diff(found) > 0).all()
    rows = np.geomspace(1e3, 5e8, 40)
    assert (np.diff(unique_ids(rows, np.full(40, 1e5))) > 0).all()
