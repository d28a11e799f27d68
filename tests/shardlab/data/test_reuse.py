"""Reuse distances against a cache that is played through, access by access."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardlab.data.reuse import CACHE_SIZES, ReuseTracker, smaller_before


def lru_misses(ids: list[int], rows: int) -> int:
    """Misses of an LRU cache that starts empty."""
    cache: OrderedDict[int, None] = OrderedDict()
    misses = 0
    for row in ids:
        if row not in cache:
            misses += 1
            if len(cache) == rows:
                cache.popitem(last=False)
        cache[row] = None
        cache.move_to_end(row)
    return misses


def follow(tracker: ReuseTracker, ids: np.ndarray, block: int) -> list[int]:
    """Adds ids in blocks, one a sample; the sample before of each access."""
    before: list[int] = []
    for low in range(0, len(ids), block):
        some = ids[low:low + block]
        before += tracker.add(some, np.arange(low, low + len(some))).before.tolist()
    return before


@given(st.lists(st.integers(-5, 5), max_size=40))
def test_smaller_before_counts(keys: list[int]) -> None:
    expected = [sum(other < key for other in keys[:place]) for place, key in enumerate(keys)]
    assert smaller_before(np.array(keys, dtype=np.int64)).tolist() == expected


@settings(max_examples=60, deadline=None)
@given(ids=st.lists(st.integers(0, 12), max_size=80), block=st.integers(1, 81))
def test_every_cache_misses_as_often_as_counted(ids: list[int], block: int) -> None:
    tracker = ReuseTracker()
    before = follow(tracker, np.array(ids, dtype=np.int64), block)
    last: dict[int, int] = {}
    for place, row in enumerate(ids):
        assert before[place] == last.get(row, -1)
        last[row] = place
    assert tracker.ids.tolist() == sorted(set(ids))
    assert tracker.counts.tolist() == [ids.count(row) for row in sorted(set(ids))]
    assert tracker.distinct == len(set(ids))
    if ids:
        ratios = tracker.miss_ratios()
        for place, rows in enumerate(CACHE_SIZES[:12].tolist()):
            assert ratios[place] == pytest.approx(lru_misses(ids, rows) / len(ids))


def test_the_ids_used_last_keep_small_caches_exact() -> None:
    ids = np.random.default_rng(0).zipf(1.3, 6000) % 1000
    tracker, whole = ReuseTracker(), ReuseTracker()
    for low in range(0, len(ids), 100):
        some = ids[low:low + 100]
        tracker.add(some, np.arange(low, low + 100))
        whole.add(some, np.arange(low, low + 100))
        tracker.keep_recent(64)
    small = CACHE_SIZES <= 64
    np.testing.assert_allclose(tracker.miss_ratios()[small], whole.miss_ratios()[small])
    assert len(tracker.ids) == 64
    assert (tracker.miss_ratios() >= whole.miss_ratios() - 1e-12).all()


def test_a_sample_of_the_ids_stands_for_all_of_them() -> None:
    ids = np.random.default_rng(1).zipf(1.1, 60_000) % 20_000
    tracker, whole = ReuseTracker(), ReuseTracker()
    for low in range(0, len(ids), 2000):
        some = ids[low:low + 2000]
        tracker.add(some, np.arange(low, low + 2000))
        whole.add(some, np.arange(low, low + 2000))
        if len(tracker.ids) > 2000:
            tracker.keep_sample(1500)
    assert 0.05 < tracker.share < 0.5
    assert tracker.distinct == pytest.approx(whole.distinct, rel=0.1)
    # Caches as large as what is followed; smaller ones are left to `keep_recent`.
    large = CACHE_SIZES >= 1500
    assert np.abs(tracker.miss_ratios() - whole.miss_ratios())[large].max() < 0.05
