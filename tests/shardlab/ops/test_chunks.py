"""The index of chunks: native against dictionaries, over random admissions, evictions, moves."""

from __future__ import annotations

import os
from dataclasses import replace

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from shardlab.chunk_layout import FEW_SLOTS, PAGE_BYTES, ChunkLayout, key_bytes
from shardlab.codecs import mixed
from shardlab.ops.chunk_index import ChunkRows, Offers, StoreShape
from shardlab.ops.chunk_marks import Marks, RowRange
from shardlab.ops.chunk_numbers import BINS, bin_edges, cell_value, mixed32
from shardlab.ops.chunks import NativeChunkIndex, index_span_bytes
from shardlab.ops.chunks_reference import ReferenceChunkIndex
from shardlab.ops.registry import native

pytestmark = pytest.mark.skipif(native() is None, reason="the native library is not built")

ROWS = (50, 2000)
PAYLOAD, STATE = 8, 4
WIDE_PAYLOAD = 124  # of rows whose index has shorter runs, if they are one chunk


def shape(chunks=3, *, sketch=2, most=6000, rows=2050, wide=False, **more):
    options = {"payload_bytes": PAYLOAD, "key_bytes": 8 if wide else 4, **more}
    layout = ChunkLayout(chunks, state_bytes=STATE, sketch_lines=sketch, **options)
    return StoreShape(layout, 16, most, rows, wide)


class Pair:
    """Both faces of one index; every call goes to both, and they must agree."""

    def __init__(self, budget, **options):
        one = shape(**options)
        places = (0, one.layout.chunks) if one.layout.shared else (-1, -1)
        chunks = one.layout.chunks
        blocks = torch.tensor([[0, 0, 0, chunks, 77, places[0], 0],
                               [0, 100, 0, chunks, -5, places[1], ROWS[0]]])[:1 if one.wide else 2]
        self.arena = torch.zeros(one.max_chunks * one.layout.record_bytes, dtype=torch.uint8)
        at = self.arena.data_ptr()
        memory = torch.zeros(index_span_bytes([one]), dtype=torch.uint8)
        pool = (at, at + one.max_chunks * one.layout.payload_bytes)
        self.faces = (NativeChunkIndex([one], blocks, memory, [pool]),
                      ReferenceChunkIndex([one], blocks))
        self.num_blocks = len(blocks)
        self.evicted = [torch.zeros(len(blocks), dtype=torch.int64) for _ in range(2)]
        for face in self.faces:
            face.set_budget(0, budget)
            face.notes_losses = True

    def both(self, call):
        mine, reference = (call(face) for face in self.faces)
        for a, b in zip(_tensors(mine), _tensors(reference), strict=True):
            assert torch.equal(a, b)
        return mine

    def check(self):
        self.both(lambda face: torch.tensor(vars(face.numbers(0)).popitem()[1]))
        assert self.faces[0].numbers(0) == self.faces[1].numbers(0)
        assert self.faces[0].held_bytes(0) == self.faces[1].held_bytes(0)
        self.both(lambda face: face.sketch(0))
        self.both(lambda face: face.changed_lines(0))
        assert torch.equal(*self.evicted)
        losses = self.both(lambda face: vars(face.take_losses()))
        assert (losses["places"] >= 0).sum(1).gt(losses["left"]).all()
        for marks in Marks:
            for block in (-1, self.num_blocks - 1):
                where = RowRange(1, 1800, block, marks=marks)
                whole = self.both(lambda face, where=where: in_order(face.list_between(0, where)))
                parts = [self.faces[0].list_between(0, replace(where, slice=i, slices=3))
                         for i in range(3)]
                assert torch.equal(in_order(torch.cat(parts)), whole)
                assert [face.count_between(0, where) for face in self.faces] == 2 * [len(whole)]
        for what in range(2):  # utilities, and rows by chunks
            parts = [self.both(lambda face, part=part, what=what:
                               face.count(0, 0.9, (part, 3))[what]) for part in range(3)]
            assert torch.equal(sum(parts), self.faces[0].count(0, 0.9)[what])
        for block in range(self.num_blocks):
            found = self.both(lambda face, block=block: vars(face.list_rows(block)))
            self.both(lambda face, block=block, rows=found["rows"]: vars(
                face.look_up(block, torch.cat([rows, rows + 1]))))
            at = found["places"][found["places"] >= 0]
            assert torch.unique(at).numel() == at.numel(), "two chunks at one place"

    def offers(self, face, ids, norms, *, weight=1.0, threshold=0.0, key=3):
        margins = torch.full((self.num_blocks,), 1.25)
        counts = torch.tensor([len(part) for part in ids])
        segments = torch.stack([torch.arange(len(ids)), counts.cumsum(0) - counts, counts], 1)
        flat = torch.tensor([row for part in ids for row in part], dtype=torch.int64)
        return Offers(segments, flat, norms, torch.full((self.num_blocks,), weight),
                      torch.full((self.num_blocks,), threshold), key, margins,
                      self.evicted[self.faces.index(face)])

    def step(self, ids, norms, **options):
        self.both(lambda face: face.touch(self.offers(face, ids, norms, **options)))
        flat = self.offers(self.faces[0], ids, norms)
        here = self.faces[0].places(flat.segments, flat.ids).T >= 0
        offered = torch.where(here, -1.0, norms).contiguous()
        return self.both(lambda face: face.offer(self.offers(face, ids, offered, **options)))

    def decide(self, decay, threshold, key=9):
        limits = torch.full((self.num_blocks,), threshold)
        return self.both(lambda face: face.decide(0, decay, limits, key))


def in_order(pairs):
    return torch.tensor(sorted(map(tuple, pairs.tolist())), dtype=torch.int64).view(-1, 2)


def _tensors(value):
    if value is None:
        return []
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        return [*value.values()]
    return list(value) if isinstance(value, tuple) else [value]


BATCH = st.tuples(st.lists(st.integers(0, ROWS[0] - 1), max_size=8, unique=True),
                  st.lists(st.integers(0, ROWS[1] - 1), max_size=40, unique=True))
ACTIONS = st.one_of(
    st.tuples(st.just("step"), BATCH, st.integers(0, 1 << 30),
              st.sampled_from([0.0, 0.1, 1.0, 50.0])),
    st.tuples(st.just("decide"), st.sampled_from([0.0, 0.5, 0.9, 1.0]),
              st.sampled_from([0.0, 1e-20, 0.3, 1.0, float("inf")])),
    st.tuples(st.just("compact"), st.booleans()),
    st.tuples(st.just("budget"), st.integers(0, 1 << 17)),
    st.tuples(st.just("unmark")), st.tuples(st.just("reload")))


@hypothesis.given(st.lists(ACTIONS, max_size=25), st.integers(0, 1 << 17),
                  st.sampled_from([0, 2]),
                  st.sampled_from([(1, PAYLOAD), (1, WIDE_PAYLOAD), (3, PAYLOAD)]), st.booleans(),
                  st.sampled_from([4, 8]))
@hypothesis.settings(max_examples=120, deadline=None)
def test_faces_agree_over_any_history(actions, budget, sketch, row, is_shared, key_bytes):
    chunks, payload = row
    pair = Pair(budget, sketch=sketch, chunks=chunks, shared=2 * chunks * is_shared,
                key_bytes=key_bytes, payload_bytes=payload)
    for action, *rest in actions:
        if action == "step":
            ids, seed, threshold = rest
            generator = torch.Generator().manual_seed(seed)
            norms = torch.rand(sum(map(len, ids)), chunks, generator=generator) - 0.1
            pair.step(ids, norms, threshold=threshold, weight=1.25, key=seed)
        elif action == "decide":
            pair.decide(*rest)
        elif action == "compact":
            pair.both(lambda face, tight=rest[0]: face.compact(0, tight=tight))
        elif action == "budget":
            for face in pair.faces:
                face.set_budget(0, rest[0])
        elif action == "unmark":
            for face in pair.faces:
                face.clear_marks(0)
        else:
            pair.both(lambda face: face.compact(0, tight=True))
            _reload(pair)
        pair.check()


def _reload(pair):
    """All rows out and in again."""
    found = [pair.faces[0].list_rows(block) for block in range(pair.num_blocks)]
    blocks = torch.cat([torch.full_like(rows.rows, block) for block, rows in enumerate(found)])
    rows = ChunkRows(*(torch.cat([getattr(one, name) for one in found])
                       for name in ("rows", "places", "utilities")))
    pair.both(lambda face: face.load(0, blocks, rows))


def test_places_of_rows_that_are_not_there():
    pair = Pair(1 << 20)
    ids = [[3, 49], [0, 1999]]
    admitted = pair.step(ids, torch.tensor([[1.0, -1, 2], [0, 0, 0], [1, 1, 1], [-1, 1, -1]]))
    assert admitted[:, :2].tolist() == [[0, 0], [0, 2], [2, 0], [2, 1], [2, 2], [3, 1]]
    segments = torch.tensor([[0, 0, 3], [1, 3, 2]])
    found = pair.both(lambda face: face.places(segments, torch.tensor([49, 3, 4, 1999, 3])))
    assert found.T.tolist() == [[-1, -1, -1], [0, -1, 1], [-1, -1, -1], [-1, 5, -1], [-1, -1, -1]]


def test_budget_is_never_exceeded_and_nearly_filled():
    budget = 1 << 17
    pair = Pair(budget, most=100_000, sketch=2)
    pair.step([list(range(50)), list(range(2000))], torch.ones(2050, 3))
    held = pair.faces[0].held_bytes(0)
    assert budget * 0.9 < held <= budget
    pair.check()


def test_freed_places_are_taken_last_in_first_out():
    pair = Pair(1 << 20)
    pair.step([[0, 1, 2, 3], []], torch.tensor([[5.0, -1, -1], [1, -1, -1], [5, -1, -1],
                                                [1, -1, -1]]))
    gone = pair.decide(1.0, 2.0)
    assert gone.tolist() == [2, 0]
    index = pair.faces[0]
    assert index.numbers(0).free == 2
    stack = {1, 3}
    first = pair.step([[9], []], torch.tensor([[9.0, -1, -1]]))[0, 2]
    second = pair.step([[8], []], torch.tensor([[9.0, -1, -1]]))[0, 2]
    assert {int(first), int(second)} == stack
    pair.decide(1.0, 8.0)
    third = pair.step([[7], []], torch.tensor([[9.0, -1, -1]]))[0, 2]
    assert int(third) not in (int(first), int(second))


@pytest.mark.parametrize(("chunks", "payload", "taken"), [
    (1, PAYLOAD, 7 / 8), (1, WIDE_PAYLOAD, 3 / 4), (3, WIDE_PAYLOAD, 7 / 8)])
def test_slots_stay_empty_where_that_costs_little(chunks, payload, taken):
    pair = Pair(1 << 22, chunks=chunks, payload_bytes=payload, rows=4000, most=6200)
    pair.step([list(range(50)), list(range(2000))], torch.ones(2050, chunks))
    pair.both(lambda face: face.compact(0, tight=True))
    pair.check()
    now = pair.faces[0].numbers(0)
    assert now.rows == 2050
    assert 0.97 * taken < now.rows / now.slots <= taken


def test_in_a_full_store_offers_replace_what_is_worth_less_and_nothing_else():
    pair = Pair(16 * PAGE_BYTES, chunks=1, payload_bytes=WIDE_PAYLOAD, sketch=0)
    pair.step([[], list(range(1000))], torch.full((1000, 1), 100.0))
    full = pair.faces[0].numbers(0)
    assert 100 < full.rows < 1000
    assert pair.step([[], list(range(1000, 1900))], torch.full((900, 1), 90.0)).shape[0] == 0
    assert pair.faces[0].numbers(0).refused - full.refused == 900
    pair.step([[], list(range(100))], torch.full((100, 1), 1000.0))
    admitted = pair.step([[], list(range(1900, 2000))], torch.full((100, 1), 150.0))
    assert 90 < admitted.shape[0] <= 100  # the least of eight rows is one of 100 nearly always
    pair.check()


def test_new_row_replaces_the_least_whole_row_where_slots_are_short():
    pair = Pair(1 << 17, sketch=0, rows=20)
    old = list(range(300))
    pair.step([[], old], torch.full((len(old), 3), 2.0))
    before = pair.faces[0].numbers(0)
    assert before.rows < 100
    assert before.top < before.committed  # there is room for chunks, but not for rows
    pair.step([[], [1950, 1951]], torch.tensor([[2.0, 2.0, 2.0], [2.6, 0.0, 9.0]]))
    pair.check()
    found = pair.faces[0].list_rows(1)
    assert 1950 not in found.rows  # worth no more than those that are there
    assert (found.places[found.rows == 1951] >= 0).tolist() == [[True, False, True]]
    after = pair.faces[0].numbers(0)
    assert (after.rows, after.used, after.free) == (before.rows, before.used - 1, 1)


def test_evicted_chunk_needs_more_than_it_had():
    """Its utility goes to the sketch, so that one access does not bring it back."""
    pair = Pair(1 << 20)
    pair.step([[1], []], torch.tensor([[1.0, -1, -1]]))
    pair.decide(1.0, 1.5)
    assert pair.step([[1], []], torch.tensor([[0.25, -1, -1]]), threshold=1.5).shape[0] == 0
    assert pair.step([[1], []], torch.tensor([[0.75, -1, -1]]), threshold=1.5).shape[0] == 1
    pair.check()


def test_chunks_without_utility_leave_by_chance_not_all_at_once():
    pair = Pair(1 << 20, most=10_000)
    pair.step([[], list(range(2000))], torch.full((2000, 3), 1e-30))
    pair.decide(0.0, 0.0)
    pair.decide(1.0, 2.0 ** -49)
    left = pair.faces[0].numbers(0).used
    assert 2700 < left < 3300


def test_bins_begin_at_cell_values():
    edges = bin_edges()
    assert edges[0] == 0
    assert edges[1:BINS].tolist() == [float(cell_value(code)) for code in range(1, BINS)]
    assert (edges.diff() > 0).all()


def test_wide_stores_take_any_row():
    pair = Pair(1 << 20, wide=True, rows=100)
    ids = [[0, 5, (1 << 62) + 3, (1 << 63) - 2]]
    pair.step(ids, torch.ones(4, 3))
    assert pair.faces[0].list_rows(0).rows.tolist() == sorted(ids[0])
    pair.check()


def test_keys_of_32_bits_are_a_bijection_up_to_the_last_row():
    last = (1 << 32) - 1
    numbers = torch.cat([torch.arange(100_000), torch.arange(last - 100_000, last + 1)])
    keys = mixed32(numbers)
    assert keys.unique().numel() == numbers.numel()
    assert 0 <= int(keys.min()) < 1 << 18
    assert last - (1 << 18) < int(keys.max()) <= last
    assert mixed32(torch.tensor(0)) == 0
    assert key_bytes(last) == 4
    assert key_bytes(last + 1) == 8


def test_rows_of_many_shards_and_of_one_chunk_are_found_by_keys_of_32_bits():
    rows = (3_000_000_000, 0, 1_200_000_000)
    one = shape(1, most=4000, rows=4000)
    before = [0, rows[0], rows[0]]
    blocks = torch.tensor([[0, 0, 0, 1, 5, -1, first] for first in before])
    memory = torch.zeros(index_span_bytes([one]), dtype=torch.uint8)
    index = NativeChunkIndex([one], blocks, memory, [(0, 0)])
    index.set_budget(0, 1 << 30)
    wanted = [torch.tensor([0, 7, rows[0] - 1]), None, torch.tensor([0, 9, rows[2] - 1])]
    for block in (0, 2):
        index.insert(block, ChunkRows(wanted[block], torch.zeros(3, 1, dtype=torch.int32),
                                      torch.full((3, 1), 7, dtype=torch.int16)))
    for block in (0, 2):
        assert torch.equal(index.list_rows(block).rows, wanted[block])
        assert (index.look_up(block, wanted[block]).places >= 0).all()
        assert (index.look_up(block, wanted[block][1:] - 1).places < 0).all()
    assert index.list_rows(1).rows.numel() == 0


def test_mixed_is_a_bijection_that_keeps_zero():
    values = torch.arange(-500, 500)
    assert torch.unique(mixed(values)).numel() == 1000
    assert mixed(torch.tensor(0)) == 0


@pytest.mark.slow
@pytest.mark.skipif("SHARDLAB_LONG_TESTS" not in os.environ, reason="half a minute; set "
                    "SHARDLAB_LONG_TESTS")
@pytest.mark.parametrize("seed", range(2))
def test_a_million_operations_against_a_dictionary(seed):
    """Chunks of a table of 200,000 rows: who is present, and what each is worth."""
    generator = torch.Generator().manual_seed(seed)
    rows, chunks, batch = 200_000, 2, 4096
    one = shape(chunks, sketch=0, most=rows * chunks, rows=rows)
    memory = torch.zeros(index_span_bytes([one]), dtype=torch.uint8)
    index = NativeChunkIndex([one], torch.tensor([[0, 0, 0, chunks, 1, -1, 0]]), memory, [(0, 0)])
    index.set_budget(0, 1 << 40)
    worth: dict[tuple[int, int], float] = {}
    for number in range(130):
        ids = torch.unique((torch.rand(batch, generator=generator) ** 3 * rows).long())
        norms = (torch.rand(ids.numel(), chunks, generator=generator) * 8).round() - 2
        threshold = float(number % 5)
        offers = Offers(torch.tensor([[0, 0, ids.numel()]]), ids, norms, torch.ones(1),
                        torch.tensor([threshold]), 0, torch.ones(1),
                        torch.zeros(1, dtype=torch.int64))
        index.touch(offers)
        here = index.places(offers.segments, ids).T >= 0
        index.offer(replace(offers, norms=torch.where(here, -1.0, norms).contiguous()))
        for (row, chunk), norm in zip(
                [(row, k) for row in ids.tolist() for k in range(chunks)],
                norms.view(-1).tolist(), strict=True):
            if norm > 0 and ((row, chunk) in worth or norm >= threshold):
                worth[row, chunk] = worth.get((row, chunk), 0.0) + norm
        if number % 13 == 12:
            # Sums are exact where it matters.
            index.decide(0, 1.0, torch.tensor([3.0]), number)
            worth = {at: u for at, u in worth.items() if u >= 3.0}
            index.compact(0, tight=True)
        if number % 13 == 11:
            _compare(index, worth, chunks)
    assert index.numbers(0).slots > FEW_SLOTS


def _compare(index, worth, chunks):
    found = index.list_rows(0)
    values = (found.utilities.int() << 16).view(torch.float32)
    mine = {(row, k): float(values[i, k]) for i, row in enumerate(found.rows.tolist())
            for k in range(chunks) if found.places[i, k] >= 0}
    assert mine.keys() == worth.keys()
    # Eight bits, rounded stochastically: exact up to 256, a random walk beyond.
    assert all(mine[at] == u if u <= 256 else abs(mine[at] - u) <= 0.2 * u
               for at, u in worth.items())
