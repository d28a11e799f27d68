"""Unique ids of segments against a model of plain dicts, and the small index arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shardlab.ops.unique import (
    OutOfBoundsError,
    Uniques,
    fill_affine,
    pack_ids,
    split_sorted,
    take_affine,
    unique_segments,
)
from shardlab.specs import BoundsMode
from tests.shardlab.ops.cases import INDEX_PLACES, Place, draw_ids, face, segments

MODES = list(BoundsMode)
#: Limits on both sides of what a packed word holds, and of int32.
LIMITS = (1, 2, 5, 300, 2**31, 2**32, 2**32 + 1, 2**40)


@pytest.fixture(params=INDEX_PLACES)
def place(request) -> Place:
    return request.param


@dataclass
class Case:
    """Arguments of `unique_segments`, as lists."""

    ids: list[int]
    chunks: list[tuple[int, int, int, int, int]]
    limits: list[int]
    bounds: list[BoundsMode]
    bags: list[int] | None = None
    dtype: torch.dtype = torch.int64

    def run(self, place: Place, *, positions: bool = True, inverse: bool = True) -> Uniques:
        bags = None if self.bags is None else torch.tensor(self.bags, dtype=torch.int64,
                                                           device=place.device)
        ids = torch.tensor(self.ids, dtype=self.dtype, device=place.device)
        chunks = torch.tensor(self.chunks, dtype=torch.int64).view(-1, 5)
        with face(place.face):
            return unique_segments(ids, chunks, segments(self.limits, self.bounds), bags,
                                   positions=positions, inverse=inverse)


def model(case: Case) -> dict[str, list[int]] | int:
    """The lists of a `Uniques`, or the position of the first id that must be refused."""
    found: list[dict[int, list[tuple[int, int]]]] = [{} for _ in case.limits]
    refused = []
    for segment, start, count, base, step in case.chunks:
        for i in range(count):
            position = start + i
            bag, value = i if case.bags is None else case.bags[position], case.ids[position]
            if not 0 <= value < case.limits[segment]:
                if case.bounds[segment] is BoundsMode.ERROR:
                    refused.append(position)
                if case.bounds[segment] is BoundsMode.IGNORE:
                    continue
                value = 0
            found[segment].setdefault(value, []).append((base + bag * step, position))
    if refused:
        return min(refused)
    result: dict[str, list[int]] = {"ids": [], "splits": [0], "starts": [0], "sources": [],
                                    "positions": [], "inverse": [-1] * len(case.ids)}
    for groups in found:
        for value in sorted(groups):
            result["ids"].append(value)
            for source, position in groups[value]:
                result["sources"].append(source)
                result["positions"].append(position)
                result["inverse"][position] = len(result["ids"]) - 1
            result["starts"].append(len(result["sources"]))
        result["splits"].append(len(result["ids"]))
    return result


def check(case: Case, place: Place) -> None:
    expected = model(case)
    if isinstance(expected, int):
        with pytest.raises(OutOfBoundsError, match=f"id at position {expected} is out of bounds"):
            case.run(place)
        return
    found = case.run(place)
    assert {name: getattr(found, name).tolist() for name in expected} == expected
    assert found.splits.device.type == "cpu"


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Chunks tile the ids, but their order among the segments is another one."""
    limits = draw(st.lists(st.sampled_from(LIMITS), max_size=4))
    bounds = [draw(st.sampled_from(MODES)) for _ in limits]
    owners = draw(st.lists(st.integers(0, len(limits) - 1), max_size=6)) if limits else []
    ids: list[int] = []
    chunks = []
    dtype = draw(st.sampled_from([torch.int64, torch.int32]))
    largest = torch.iinfo(dtype).max
    for segment in owners:
        limit = limits[segment]
        good = st.one_of(st.integers(0, min(limit, 4) - 1), st.integers(0, limit - 1),
                         st.just(limit - 1))
        bad = st.sampled_from([-1, limit, limit + 7, -(2**31)])
        # A bad id in one of four chunks, so that most segments in ``error`` mode are well.
        value = st.one_of(good, bad) if draw(st.integers(0, 3)) == 0 else good
        drawn = draw(st.lists(value.filter(lambda x: x <= largest), max_size=9))
        chunks.append((segment, len(ids), len(drawn), draw(st.integers(0, 2**40)),
                       draw(st.integers(0, 99))))
        ids += drawn
    chunks.sort(key=lambda chunk: chunk[0])
    bags = draw(st.none() | st.lists(st.integers(0, 50), min_size=len(ids), max_size=len(ids)))
    return Case(ids, chunks, limits, bounds, bags, dtype)


@given(case=cases())
@pytest.mark.parametrize("place", INDEX_PLACES)
def test_unique_segments_equals_the_model(place, case):
    check(case, place)


@pytest.mark.parametrize("skew", ["uniform", "zipf", "one"])
@pytest.mark.parametrize("rows", [1, 3, 2000, 2049, 5_000_000], ids=lambda n: f"rows={n}")
def test_unique_of_many_ids(place, rows, skew):
    """Enough ids for every number of radix passes."""
    generator = torch.Generator().manual_seed(rows)
    ids = draw_ids(rows, 3000, skew, generator)
    check(Case(ids.tolist(), [(0, 0, 1000, 7, 3), (1, 1000, 2000, 0, 1)], [rows, rows],
               [BoundsMode.ERROR] * 2), place)


def test_unique_beyond_32_bits(place):
    """Ids whose lower 32 bits collide, among segments that fit one word."""
    wide = [2**32 + 5, 5, 2**33 + 5, 2**32 + 5, 2**40 - 1, 0, 5]
    case = Case([5, 3, 5, *wide], [(0, 0, 3, 0, 1), (1, 3, 7, 10, 2)], [10, 2**40],
                [BoundsMode.ERROR] * 2)
    assert case.run(place).ids.tolist() == [3, 5, 0, 5, 2**32 + 5, 2**33 + 5, 2**40 - 1]
    check(case, place)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("value", [-1, 4, 2**40, -(2**63), 2**63 - 1])
def test_bounds(place, mode, value):
    check(Case([1, 3, value, 1], [(0, 0, 4, 0, 1)], [4], [mode]), place)


def test_first_bad_id_of_all_segments_is_named(place):
    """Segment 0 stands later in the ids than segment 1."""
    case = Case([0, 9, 0, 0, 9], [(0, 3, 2, 0, 1), (1, 0, 3, 0, 1)], [4, 4],
                [BoundsMode.ERROR] * 2)
    with pytest.raises(OutOfBoundsError, match="position 1 ") as raised:
        case.run(place)
    assert raised.value.position == 1


def test_outputs_on_request_only(place):
    case = Case([2, 1, 2], [(0, 0, 3, 0, 1)], [4], [BoundsMode.ERROR])
    found = case.run(place, positions=False, inverse=False)
    assert found.positions is None
    assert found.inverse is None
    assert found.sources.tolist() == [1, 0, 2]


def test_ids_outside_every_chunk_have_no_unique(place):
    case = Case([2, 1, 2, 3], [(0, 1, 2, 0, 1)], [4], [BoundsMode.ERROR])
    assert case.run(place).inverse.tolist() == [-1, 0, 1, -1]


@pytest.mark.parametrize("dtype", [torch.int16, torch.float32])
def test_dtype_of_ids_is_checked(place, dtype):
    case = Case([1], [(0, 0, 1, 0, 1)], [4], [BoundsMode.ERROR], dtype=dtype)
    with pytest.raises(TypeError, match=f"ids: expected int32 or int64, found {dtype}"):
        case.run(place)


@pytest.mark.parametrize("threads", [1, 2, 3], ids=lambda n: f"threads={n}")
def test_unique_with_any_threads(place, threads):
    generator = torch.Generator().manual_seed(0)
    ids = [x for rows in (9, 4000, 2**33) for x in draw_ids(rows, 500, "zipf", generator).tolist()]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check(Case(ids, [(s, 500 * s, 500, 0, 1) for s in range(3)], [9, 4000, 2**33],
                   [BoundsMode.ERROR] * 3), place)
    finally:
        torch.set_num_threads(before)


# ---------------------------------------------------------------- small index arithmetic
@given(parts=st.lists(st.lists(st.integers(0, 30), max_size=8).map(sorted), min_size=1,
                      max_size=4), data=st.data())
@pytest.mark.parametrize("place", INDEX_PLACES)
def test_split_sorted_is_lower_bound(place, parts, data):
    queries = data.draw(st.lists(st.tuples(st.integers(0, len(parts) - 1), st.integers(-1, 31)),
                                 max_size=6))
    splits = torch.tensor([0, *(len(part) for part in parts)]).cumsum(0)
    ids = torch.tensor([x for part in parts for x in part], dtype=torch.int64).to(place.device)
    with face(place.face):
        found = split_sorted(ids, splits, torch.tensor(queries, dtype=torch.int64).view(-1, 2))
    assert found.tolist() == [int(splits[s]) + sum(x < row for x in parts[s])
                              for s, row in queries]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_pack_ids(place, dtype):
    ids = torch.tensor([2**40 + 1, 2**40 + 4, 7, 9, 11]).to(place.device)
    pieces = torch.tensor([(2, 3, 5, 2), (0, 2, 2**40, 0), (1, 0, 0, 5)])
    with face(place.face):
        found = pack_ids(ids, pieces, dtype)
    assert found.dtype == dtype
    assert found.tolist() == [1, 4, 2, 4, 6]


@pytest.mark.parametrize("pieces", [[], [(0, 0, 5, 5)]], ids=["none", "empty"])
def test_pack_no_ids(place, pieces):
    table = torch.tensor(pieces, dtype=torch.int64).view(-1, 4)
    with face(place.face):
        found = pack_ids(torch.tensor([], dtype=torch.int64, device=place.device), table,
                         torch.int32)
    assert found.shape == (0,)


def test_fill_affine(place):
    pieces = torch.tensor([(3, 2, 2**40, -1), (0, 3, 5, 10), (5, 0, 1, 1)])
    with face(place.face):
        found = fill_affine(pieces, 5, torch.device(place.device))
    assert found.tolist() == [5, 15, 25, 2**40, 2**40 - 1]


def test_take_affine(place):
    pieces = torch.tensor([(3, 2, 2**40, -1), (0, 3, 5, 10), (5, 0, 1, 1)])
    inverse = torch.tensor([4, 0, -1, 2, 2, 3, 1], device=place.device)
    with face(place.face):
        found = [take_affine(pieces, 5, inverse), take_affine(pieces[:0], 0, inverse[2:3]),
                 take_affine(pieces, 5, inverse[:0])]
    assert found[0].tolist() == [2**40 - 1, 5, -1, 25, 25, 2**40, 15]
    assert found[1].tolist() == [-1]
    assert found[2].tolist() == []
