"""Index arithmetic of the exchange: native against plain torch, and against what it promises."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shardlab.ops import cells
from shardlab.ops.registry import native

needs_native = pytest.mark.skipif(native() is None, reason="the native library is not built")


def _column(values):
    return torch.tensor(values, dtype=torch.int64)


@st.composite
def _ends(draw):
    """Both ends of a random wire: (end, ids, samples) of slots and of cells; homes agree."""
    ranks = draw(st.integers(1, 4))
    number = st.integers(0, 9)
    home = draw(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1), number, number),
                         max_size=3))
    size = draw(number)
    found = []
    for _ in range(2):
        away = [draw(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1), number, number),
                              max_size=3)) for _ in range(ranks - 1)]
        parts = [*away, home]
        rows = [row for part in parts for row in part]
        end = cells.CellEnd(_column([row[:3] for row in rows]).view(-1, 3), [*map(len, parts)])
        found.append((end, _column([row[3] for row in rows]),
                      [*(draw(number) for _ in away), size]))
    return found


@needs_native
@settings(max_examples=60, deadline=None)
@given(_ends(), st.sampled_from([0, 4]), st.booleans())
def test_place_cells_equals_reference(ends, head, cells_send):
    arguments = (*zip(*ends, strict=True), head, cells_send)
    expected = cells.place_cells_reference(*arguments)
    for mine, theirs in zip(cells.place_cells(*arguments), expected, strict=True):
        assert mine.parts == theirs.parts
        for name in ("vectors", "bytes", "at"):
            assert getattr(mine, name).tolist() == getattr(theirs, name).tolist(), name


@settings(max_examples=60, deadline=None)
@given(_ends(), st.sampled_from([0, 4]), st.booleans())
def test_placed_cells_tile_the_buffer(ends, head, cells_send):
    placed = cells.place_cells(*zip(*ends, strict=True), head, cells_send)
    slots, owned = placed
    travels = sum(placed[cells_send].parts[:-1])
    for index, (place, (end, _, _)) in enumerate(zip(placed, ends, strict=True)):
        first = 0 if index == cells_send else travels
        total = sum(slots.parts[:-1]) + sum(owned.parts[:-1])
        spans = [*zip(place.at.split(end.cells_of), place.bytes.split(end.cells_of),
                      place.parts, strict=True)]
        for part, (at, size, part_bytes) in enumerate(spans):
            begin = total if part == len(spans) - 1 else first
            expected = begin + head
            for cell_at, cell_bytes in zip(at.tolist(), size.tolist(), strict=True):
                assert cell_at == expected
                expected += cell_bytes
            assert expected == begin + part_bytes
            first += part_bytes


@pytest.mark.parametrize("face", ["reference", "native"])
def test_cells_count_pooled_samples_and_whole_words(face, monkeypatch):
    monkeypatch.setenv("SHARDLAB_FACE", face)
    # Rows of 3 bytes that travel, a replica that does not, bags of 5 bytes of each sample.
    end = cells.CellEnd(_column([[0, 1, 3], [0, 0, 8], [1, 1, 5]]), [3])
    slots, owned = cells.place_cells((end, end), (_column([7, 9, 2]),) * 2, ([4], [4]), 0, True)
    for place in (slots, owned):
        assert place.vectors.tolist() == [7, 0, 4]
        assert place.bytes.tolist() == [24, 0, 20]
        assert place.at.tolist() == [0, 24, 24]
        assert place.parts == [44]


@pytest.mark.parametrize("face", ["reference", "native"])
def test_route_slots(face, monkeypatch):
    monkeypatch.setenv("SHARDLAB_FACE", face)
    marks = _column([[0, 5], [5, 7], [7, 7]])
    table = _column([[1, 1, 100, 2], [0, 0, 0, 1], [0, 1, 3, 5], [2, 1, 0, 1]])
    pieces, counts, starts, total = cells.route_slots(table, marks[:, 0], marks[:, 1] - marks[:, 0])
    assert counts.tolist() == [2, 0, 5, 0]
    assert starts.tolist() == [5, 0, 0, 7]
    assert pieces.tolist() == [[5, 2, 100, 0, 2], [0, 0, 0, 4, 1], [0, 5, 3, 4, 5],
                               [7, 0, 0, 29, 1]]
    assert total == 29


@needs_native
@settings(max_examples=60, deadline=None)
@given(st.data())
def test_read_heads_equals_reference(data):
    slots, parts = data.draw(st.integers(0, 4)), data.draw(st.integers(1, 3))
    number = st.integers(0, 2**31 - 1)
    table = _column([[data.draw(st.integers(1, 5)), data.draw(st.integers(0, 1))]
                     for _ in range(slots)]).view(-1, 2)
    heads = torch.tensor([[data.draw(st.integers(0, 9)), -1, data.draw(st.integers(0, 4)),
                           data.draw(st.integers(0, 1)), *(data.draw(number) for _ in range(slots))]
                          for _ in range(parts)], dtype=torch.int32).view(parts, -1)
    found = [cells.read_heads(heads, table)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHARDLAB_FACE", "reference")
        found.append(cells.read_heads(heads, table))
    (counts, pieces, sizes), (counts_too, pieces_too, sizes_too) = found
    assert counts.tolist() == counts_too.tolist()
    assert pieces.tolist() == pieces_too.tolist()
    assert sizes == sizes_too


@pytest.mark.parametrize("face", ["reference", "native"])
def test_select_columns(face, monkeypatch):
    monkeypatch.setenv("SHARDLAB_FACE", face)
    pairs = _column([[1, 10], [2, 20], [3, 2**40]])
    found = cells.select_columns([pairs[:, 1], pairs[:, 0], pairs[:, 1]], _column([2, 0, 0]))
    assert found.tolist() == [[2**40, 3, 2**40], [10, 1, 10], [10, 1, 10]]
    assert cells.select_columns([pairs[:, 0]], _column([])).shape == (0, 1)


@pytest.mark.parametrize("face", ["reference", "native"])
def test_sums(face, monkeypatch):
    monkeypatch.setenv("SHARDLAB_FACE", face)
    counts, factors = _column([3, 2**40, 1, 5]), _column([2, 3, 10, 1])
    assert cells.sum_parts(counts, factors, [2, 0, 2]) == [6 + 3 * 2**40, 0, 15]
    assert cells.sum_by_key(counts, _column([1, 1, 0]), 3) == [1, 2**40 + 3, 0]
    assert cells.sum_by_key(counts, _column([]), 2) == [0, 0]
