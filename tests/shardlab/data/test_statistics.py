"""What real ids look like, against plain counting; in bounded memory; bad ids."""

from __future__ import annotations

import numpy as np
import pytest

from shardlab.data.rows import Bags
from shardlab.data.statistics import IdCollector, IdFigures
from shardlab.errors import DataError

ROWS = 500


def stream(samples: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Lengths and skewed ids of one feature, empty bags and repetitions included."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, 4, samples)
    return lengths, (rng.zipf(1.2, int(lengths.sum())) - 1) % ROWS


def collected(lengths: np.ndarray, ids: np.ndarray, block: int, most_ids: int) -> IdFigures:
    collector = IdCollector(["f"], ROWS, most_ids)
    ends = np.concatenate([[0], np.cumsum(lengths)])
    for low in range(0, len(lengths), block):
        high = min(low + block, len(lengths))
        collector.add([Bags(ids[ends[low]:ends[high]], lengths[low:high])], high - low)
    return collector.figures()


@pytest.mark.parametrize("block", [1, 7, 1000])
def test_figures_are_those_of_plain_counting(block: int) -> None:
    lengths, ids = stream(300)
    found = collected(lengths, ids, block, most_ids=10_000)
    assert (found.samples, found.ids, found.max_pooling) == (300, len(ids), int(lengths.max()))
    assert found.distinct == len(set(ids.tolist()))
    assert found.followed == 1.0
    sample = np.repeat(np.arange(300), lengths)
    unique = dict(found.unique)
    assert set(unique) == {64, 256, 300}
    for size in (64, 256):
        batches = [len(set(ids[sample // size == batch].tolist())) for batch in range(300 // size)]
        assert unique[size] == pytest.approx(np.mean(batches), abs=1e-3)
    taken = np.bincount(ids)
    expected = sorted(((row, count) for row, count in enumerate(taken.tolist()) if count > 1),
                      key=lambda pair: (-pair[1], pair[0]))
    assert list(found.hottest) == expected[:round(10_000 / 32)]
    counts = -np.sort(-taken)
    for rows, share in found.hot:
        assert share == pytest.approx(counts[:int(rows)].sum() / len(ids), abs=1e-6)
    parts, most, _ = found.blocks[1]
    assert parts == 2
    assert most == pytest.approx(max((ids < 250).mean(), (ids >= 250).mean()), abs=1e-6)


def test_features_of_a_table_are_one_stream() -> None:
    collector = IdCollector(["a", "b"], ROWS)
    collector.add([Bags(np.array([1, 2, 3]), None), Bags(np.array([3, 2, 1]), None)], 3)
    found = collector.figures()
    assert (found.ids, found.distinct) == (6, 3)
    # 1 3 | 2 2 | 3 1: a cache of one row keeps the second 2 only.
    assert dict(found.miss)[1] == pytest.approx(5 / 6, abs=1e-6)


def test_memory_is_bounded_and_small_figures_stay_exact() -> None:
    rng = np.random.default_rng(3)
    ids = (rng.zipf(1.1, 30_000) - 1) % 20_000
    figures = []
    for most in (1 << 20, 1024):
        collector = IdCollector(["f"], 20_000, most)
        for low in range(0, len(ids), 500):
            collector.add([Bags(ids[low:low + 500], None)], 500)
            assert len(collector._recent.ids) <= most
            assert collector._sampled is None or len(collector._sampled[0].ids) <= most
        figures.append(collector.figures())
    exact, bounded = figures
    assert bounded.followed < 1 == exact.followed
    assert bounded.ids == exact.ids
    assert bounded.distinct == pytest.approx(exact.distinct, rel=0.15)
    for size in (64, 256):
        assert dict(bounded.unique)[size] == dict(exact.unique)[size]
    small = [(rows, miss) for rows, miss in bounded.miss if rows <= 1024]
    assert small == [point for point in exact.miss if point[0] <= 1024]
    far = dict(exact.miss)
    assert all(abs(miss - far[rows]) < 0.06 for rows, miss in bounded.miss if rows in far)


def test_no_id_at_all() -> None:
    found = collected(np.zeros(5, dtype=np.int64), np.empty(0, dtype=np.int64), 2, 100)
    assert (found.ids, found.distinct, found.max_pooling) == (0, 0, 0)
    assert dict(found.unique) == {5: 0.0}
    assert found.hot == ((1, 0.0),)


@pytest.mark.parametrize("wrong", [-1, ROWS])
def test_ids_outside_the_table_are_named(wrong: int) -> None:
    with pytest.raises(DataError, match=f"feature f: id {wrong} lies outside its table of {ROWS} "
                                        "rows; raise num_embeddings, or hash the column"):
        collected(np.array([1, 1]), np.array([3, wrong]), 2, 100)
