"""The synthetic stream: the fitted skew, the planted AUC, and rows that depend on nothing else."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from shardlab.data import Reader, SyntheticCriteoSource
from shardlab.data.criteo_fit import _SPARSE_FIT, dense_quantiles, rank_quantiles
from shardlab.errors import DataError
from shardlab.presets import CRITEO_KAGGLE_CARDINALITIES, CRITEO_SPARSE_NAMES
from tests.shardlab.data.criteo_rows import flat

TABLES = dict(zip(CRITEO_SPARSE_NAMES, CRITEO_KAGGLE_CARDINALITIES, strict=True))
SAMPLE = 100_000
FIRST_IDS = [624, 107, 7227503, 634447, 231, 0, 4306, 316, 2, 88264, 5033, 3803586, 1121, 14, 5557,
             2228223, 2, 989, 1424, 1, 735061, 15, 7, 262761, 0, 64827]
FIRST_COUNTS = [0, 0, 13, 0, 3064, 161, 2, 8, 990, 0, 18, 0, 11]


def auc(scores: np.ndarray, labels: np.ndarray) -> float:
    ranks = np.empty(len(scores))
    ranks[np.argsort(scores)] = np.arange(1, len(scores) + 1)
    positive = labels.sum()
    area = ranks[labels == 1].sum() - positive * (positive + 1) / 2
    return float(area / positive / (len(labels) - positive))


@pytest.fixture(scope="module")
def sample() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return flat(list(Reader(SyntheticCriteoSource(TABLES, seed=1), 5000, stop=SAMPLE)))


def test_label_rate_and_planted_auc(sample: tuple[torch.Tensor, ...]) -> None:
    labels = sample[0].numpy()
    logits = SyntheticCriteoSource(TABLES, seed=1).teacher_logits(0, SAMPLE)
    # Standard errors at this size: 0.0014 of the rate, 0.0016 of the AUC.
    assert abs(labels.mean() - 0.256) < 0.006
    assert abs(auc(logits, labels) - 0.800) < 0.007


def test_ids_have_the_fitted_skew(sample: tuple[torch.Tensor, ...]) -> None:
    for ids, fit, rows in zip(sample[2].numpy().T, _SPARSE_FIT, CRITEO_KAGGLE_CARDINALITIES,
                              strict=True):
        assert 0 <= ids.min() <= ids.max() < rows
        missing, top = fit[0], fit[1]
        assert abs((ids == 0).mean() - missing) < 0.01
        present = np.bincount(ids[ids > 0])
        # Values that fall on one row add up, which shows in small tables.
        assert present.max() / present.sum() > top - 0.015
        if rows > 1_000_000:
            assert abs(present.max() / present.sum() - top) < 0.005
            hot = np.sort(present)[::-1]
            assert abs(hot[:1000].sum() / present.sum() - fit[4]) < 0.02


def test_large_tables_are_touched_all_over(sample: tuple[torch.Tensor, ...]) -> None:
    ids = sample[2][:, CRITEO_SPARSE_NAMES.index("C3")].numpy()
    # 56,124 distinct values were found in 119,000 real ones.
    assert 0.4 < len(np.unique(ids)) / len(ids) < 0.6
    assert np.bincount(ids * 10 // TABLES["C3"], minlength=10).min() > len(ids) // 50


def test_dense_values_are_logs_of_counts(sample: tuple[torch.Tensor, ...]) -> None:
    dense = sample[1].double().numpy()
    assert dense.min() == 0
    counts = np.expm1(dense)
    assert np.abs(counts - np.round(counts)).max() < 1e-5 * counts.max()
    table = dense_quantiles()
    assert np.abs(dense.mean(axis=0) - table.mean(axis=1)).max() < 0.05


def test_rank_quantiles_rise_to_the_cardinality() -> None:
    table = rank_quantiles()
    assert (np.diff(table) >= 0).all()
    assert (table[:, -1].astype(int) <= CRITEO_KAGGLE_CARDINALITIES).all()
    # The rarest value is one of the last percent where the tail reaches that far.
    assert table[2, -1] > 0.99 * CRITEO_KAGGLE_CARDINALITIES[2]


@pytest.mark.parametrize("start", [0, 1, 1023, 5000, 2**40], ids=lambda s: f"start={s}")
def test_a_row_depends_on_its_index_alone(start: int) -> None:
    source = SyntheticCriteoSource(TABLES, seed=2)
    whole = source.read(start, start + 2100)
    rows = [source.read(row, row + 1) for row in range(start, start + 2100, 97)]
    for i, row in zip(range(0, 2100, 97), rows, strict=True):
        assert whole.labels[i] == row.labels[0]
        assert np.array_equal(whole.dense[i], row.dense[0])
        assert [bags.values[i] for bags in whole.bags] == [bags.values[0] for bags in row.bags]


def test_seeds_give_other_rows() -> None:
    first, again, other = (SyntheticCriteoSource(TABLES, seed=s).read(0, 500) for s in (1, 1, -2))
    assert np.array_equal(first.dense, again.dense)
    assert not np.array_equal(first.dense, other.dense)
    assert not np.array_equal(first.bags[2].values, other.bags[2].values)


def test_first_row_of_seed_0_stays_what_it_is() -> None:
    """Figures quoted for the demo hold only while the stream does."""
    block = SyntheticCriteoSource(TABLES).read(0, 1)
    assert [int(bags.values[0]) for bags in block.bags] == FIRST_IDS
    assert np.round(np.expm1(block.dense[0])).astype(int).tolist() == FIRST_COUNTS


def test_smaller_tables_and_chosen_features() -> None:
    full = SyntheticCriteoSource(TABLES).read(0, 300)
    few = SyntheticCriteoSource({"C20": 2, "big": 40}, {"big": "C3"}).read(0, 300)
    assert np.array_equal(few.labels, full.labels)
    assert few.bags[0].values.max() == 1
    assert few.bags[1].values.max() < 40
    assert np.array_equal(few.bags[1].values == 0, full.bags[2].values == 0)


def test_unknown_column_is_refused() -> None:
    with pytest.raises(DataError, match=r"feature 'user' asks for column 'user'; synthetic Crit"):
        SyntheticCriteoSource({"user": 5})
