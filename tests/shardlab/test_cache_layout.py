"""Shapes of caches: within the asked share, every row in one place, bytes as stored."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shardlab.cache_layout import cache_layout
from shardlab.errors import ConfigError
from shardlab.ops.cache_reference import locate, rows_of

ROWS = st.one_of(st.integers(1, 200), st.integers(1, 5000), st.just(2**20 + 7))
FRACTIONS = st.one_of(st.floats(1e-4, 1.0), st.sampled_from([0.01, 0.05, 0.1, 1.0]))
WAYS = st.integers(1, 64)


@given(rows=ROWS, fraction=FRACTIONS, ways=WAYS)
def test_cache_stays_within_its_fraction(rows, fraction, ways):
    layout = cache_layout(rows, fraction, ways)
    assert layout.slots == layout.sets * layout.ways
    assert 1 <= layout.ways <= min(ways, rows)
    if fraction < 1:
        wanted = max(1, fraction * rows)
        # A wide set may cost up to half of its slots where there are few; never more.
        assert wanted / 2 - 1 < layout.slots <= wanted * (1 + 1e-6)
    else:
        assert rows <= layout.slots < rows + layout.sets
    assert layout.metadata_bytes == layout.sets * layout.record_bytes
    exact = layout.ways * (layout.tag_bytes + 1)
    assert exact <= layout.record_bytes <= exact * 1.025


@given(rows=ROWS, fraction=FRACTIONS, ways=WAYS)
def test_set_and_tag_name_one_row(rows, fraction, ways):
    layout = cache_layout(rows, fraction, ways)
    ids = torch.arange(rows) if rows < 10_000 else torch.randint(0, rows, (5000,))
    sets, tags = locate(ids, layout.sets)
    assert torch.equal(rows_of(sets, tags, layout.sets), ids)
    assert int(sets.min()) >= 0
    assert int(sets.max()) < layout.sets
    assert int(tags.max()) < 2 ** (8 * layout.tag_bytes) - 1
    if rows < 10_000:
        assert int(torch.bincount(sets).max()) <= -(-rows // layout.sets)


@pytest.mark.parametrize("stride", [2, 21, 1000, 2500, 625 * 64])
def test_rows_in_steps_spread_over_the_sets(stride):
    sets = 2500
    found = torch.bincount(locate(torch.arange(20_000) * stride, sets)[0], minlength=sets)
    # 8 rows a set on average; a plain remainder would put 20,000 into the sets of one residue.
    assert int(found.max()) < 30


@pytest.mark.parametrize(("rows", "fraction", "ways", "shape"), [
    (10_000_000, 0.05, 16, (31_250, 16, 2, 48)),
    (10_000_000, 0.05, 21, (23_809, 21, 2, 64)),
    (10_000_000, 0.05, 42, (11_904, 42, 2, 128)),
    (1, 0.01, 16, (1, 1, 2, 3)),
    (17, 1.0, 16, (2, 9, 2, 27)),
    (1000, 0.1, 64, (2, 50, 2, 150)),
    (65_535, 0.0002, 16, (1, 13, 2, 39)),
    (65_536, 0.0002, 16, (1, 13, 4, 65)),
    (2**31, 2**-20, 25, (81, 25, 4, 128)),
])
def test_layout_of(rows, fraction, ways, shape):
    layout = cache_layout(rows, fraction, ways)
    assert (layout.sets, layout.ways, layout.tag_bytes, layout.record_bytes) == shape


@pytest.mark.parametrize(("rows", "fraction", "ways"), [
    (0, 0.5, 4), (5, 0.0, 4), (5, 1.5, 4), (5, 0.5, 0), (5, 0.5, 65)])
def test_layout_refuses(rows, fraction, ways):
    with pytest.raises(ConfigError, match=f"found rows {rows}, fraction {fraction:g}, ways {ways}"):
        cache_layout(rows, fraction, ways)


def test_layout_with_too_many_rows_a_set():
    with pytest.raises(ConfigError, match="raise fraction 1e-12 or use more shards"):
        cache_layout(2**40, 1e-12, 1)


def test_layout_with_too_many_sets():
    with pytest.raises(ConfigError, match="at most 2147483647"):
        cache_layout(2**40, 1.0, 16)
