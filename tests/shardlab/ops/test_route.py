"""Routing of bags to row blocks against a model of plain lists."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shardlab.ops.route import RoutedBags, RouteTables, route_bags
from shardlab.ops.unique import BOUNDS_CODE, OutOfBoundsError
from shardlab.specs import BoundsMode
from tests.shardlab.ops.cases import INDEX_PLACES, Place, face


@pytest.fixture(params=INDEX_PLACES)
def place(request) -> Place:
    return request.param


@dataclass
class Table:
    """Bags of every feature, and the upper row bounds of the table's blocks."""

    bags: list[list[list[int]]]
    block_ends: list[int]
    bounds: BoundsMode = BoundsMode.ERROR

    @property
    def rows(self) -> int:
        return self.block_ends[-1]


@dataclass
class Case:
    """Arguments of `route_bags`, as lists; ``length`` where every bag has as many ids."""

    tables: list[Table]
    batch: int
    length: int = -1
    flat: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.flat = [x for table in self.tables for feature in table.bags for bag in feature
                     for x in bag]

    def run(self, place: Place, *, positions: bool = True, lengths: bool = True) -> RoutedBags:
        rows, sizes, feature, block = [], [], 0, 0
        for table in self.tables:
            rows.append((feature, len(table.bags), block, len(table.block_ends), table.rows,
                         BOUNDS_CODE[table.bounds]))
            feature, block = feature + len(table.bags), block + len(table.block_ends)
            sizes += [len(bag) for bags in table.bags for bag in bags]
        offsets = torch.tensor([0, *sizes]).cumsum(0).to(place.device)
        tables = RouteTables(
            torch.tensor(rows, dtype=torch.int64).view(-1, 6),
            torch.tensor([end for table in self.tables for end in table.block_ends],
                         dtype=torch.int64))
        ids = torch.tensor(self.flat, dtype=torch.int64, device=place.device)
        with face(place.face):
            return route_bags(ids, None if self.length >= 0 else offsets, self.length, self.batch,
                              tables, positions=positions, lengths=lengths)


def model(case: Case) -> dict[str, list[int]] | int:
    """ids and positions (None where undefined), counts and lengths; or the refused position."""
    result: dict[str, list] = {"ids": [], "positions": [], "counts": [], "lengths": []}
    position = 0
    for table in case.tables:
        blocks: list[list[tuple[int, int]]] = [[] for _ in table.block_ends]
        lengths, begin = [[] for _ in table.block_ends], position
        for bag in (bag for feature in table.bags for bag in feature):
            for sizes in lengths:
                sizes.append(0)
            for value in bag:
                if not 0 <= value < table.rows and table.bounds is BoundsMode.ERROR:
                    return position
                if 0 <= value < table.rows or table.bounds is BoundsMode.CLAMP_TO_ZERO:
                    value = value if 0 <= value < table.rows else 0
                    k = next(i for i, end in enumerate(table.block_ends) if value < end)
                    first = table.block_ends[k - 1] if k else 0
                    blocks[k].append((value - first, position))
                    lengths[k][-1] += 1
                position += 1
        dropped = [None] * (position - begin - sum(map(len, blocks)))
        result["ids"] += [row for block in blocks for row, _ in block] + dropped
        result["positions"] += [p for block in blocks for _, p in block] + dropped
        result["counts"] += [len(block) for block in blocks]
        result["lengths"] += [size for sizes in lengths for size in sizes]
    return result


def check(case: Case, place: Place) -> None:
    expected = model(case)
    if isinstance(expected, int):
        with pytest.raises(OutOfBoundsError, match=f"id at position {expected} is out of bounds"):
            case.run(place)
        return
    found = case.run(place)
    for name in ("ids", "positions"):
        assert [None if want is None else got for got, want in
                zip(getattr(found, name).tolist(), expected[name], strict=True)] == expected[name]
    assert found.counts.tolist() == expected["counts"]
    assert found.counts.device.type == "cpu"
    assert found.lengths.tolist() == expected["lengths"]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    batch, length = draw(st.integers(0, 4)), draw(st.sampled_from([-1, -1, 0, 1, 3]))
    tables = []
    for _ in range(draw(st.integers(0, 3))):
        ends = draw(st.lists(st.sampled_from([1, 2, 3, 10, 2**33, 2**40]), min_size=1, max_size=4,
                             unique=True).map(sorted))
        edges = [x for end in ends for x in (end - 1, end) if x < ends[-1]]
        good = st.one_of(st.integers(0, ends[-1] - 1), st.sampled_from([0, *edges]))
        bad = st.sampled_from([-1, ends[-1], 2**62, -(2**63)])
        value = st.one_of(good, bad) if draw(st.integers(0, 3)) == 0 else good
        size = {"max_size": 4} if length < 0 else {"min_size": length, "max_size": length}
        bags = st.lists(st.lists(value, **size), min_size=batch, max_size=batch)
        tables.append(Table(draw(st.lists(bags, min_size=1, max_size=2)), ends,
                            draw(st.sampled_from(list(BoundsMode)))))
    return Case(tables, batch, length)


@given(case=cases())
@pytest.mark.parametrize("place", INDEX_PLACES)
def test_route_bags_equals_the_model(place, case):
    check(case, place)


def test_block_edges(place):
    """The last row of a block and the first of the next, and an empty bag between."""
    case = Case([Table([[[0, 9], [], [10, 29, 30]], [[39], [11], [0]]], [10, 30, 40])], batch=3)
    found = case.run(place)
    assert found.ids.tolist() == [0, 9, 0, 0, 19, 1, 0, 9]
    assert found.counts.tolist() == [3, 3, 2]
    assert found.lengths.tolist() == [2, 0, 0, 0, 0, 1, 0, 0, 2, 0, 1, 0, 0, 0, 1, 1, 0, 0]
    check(case, place)


def test_tables_may_leave_features_out(place):
    """Tables route a part of the features; the other ids are not looked at."""
    tables = RouteTables(torch.tensor([(1, 1, 0, 2, 8, 0)]), torch.tensor([4, 8]))
    ids = torch.tensor([99, 7, 1, 5, -99], device=place.device)
    offsets = torch.tensor([0, 1, 4, 5], device=place.device)
    with face(place.face):
        found = route_bags(ids, offsets, -1, 1, tables, positions=True, lengths=True)
    assert found.ids[1:4].tolist() == [1, 3, 1]
    assert found.positions[1:4].tolist() == [2, 1, 3]
    assert found.counts.tolist() == [1, 2]
    assert found.lengths.tolist() == [1, 2]


@pytest.mark.parametrize("mode", list(BoundsMode))
@pytest.mark.parametrize("value", [-1, 8, -(2**63), 2**63 - 1])
def test_bounds(place, mode, value):
    check(Case([Table([[[1, value, 7]]], [4, 8], mode)], batch=1), place)


def test_first_bad_id_is_named(place):
    case = Case([Table([[[1], [2]]], [4]), Table([[[1], [4]]], [4])], batch=2, length=1)
    with pytest.raises(OutOfBoundsError, match="position 3 "):
        case.run(place)


def test_outputs_on_request_only(place):
    found = Case([Table([[[3], [1]]], [2, 4])], batch=2).run(place, positions=False,
                                                             lengths=False)
    assert found.positions is None
    assert found.lengths is None
    assert found.ids.tolist() == [1, 1]


@pytest.mark.parametrize("threads", [1, 2, 3], ids=lambda n: f"threads={n}")
def test_route_with_any_threads(place, threads):
    tables = [Table([[[(7 * b + t) % 50, b % 50] for b in range(40)]], [20, 50]) for t in range(5)]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check(Case(tables, batch=40), place)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("place", [p for p in INDEX_PLACES if p.id == "native"], indirect=True)
def test_ids_must_be_int64(place):
    tables = RouteTables(torch.tensor([(0, 1, 0, 1, 8, 0)]), torch.tensor([8]))
    with pytest.raises(TypeError, match="ids: expected a contiguous torch"):
        route_bags(torch.tensor([1], dtype=torch.int32), None, 1, 1, tables, positions=False,
                   lengths=False)
