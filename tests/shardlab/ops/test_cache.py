"""Placing rows in caches: the policies by hand, then every face against the reference."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from shardlab.cache_layout import CacheLayout, cache_layout
from shardlab.errors import ConfigError
from shardlab.ops.cache import COUNTERS, Placement, build_cache_index, cache_lookup, cache_place
from shardlab.ops.cache_index import CacheBlock, CacheIndex
from shardlab.ops.cache_reference import records
from shardlab.ops.unique import OutOfBoundsError
from tests.shardlab.ops.cases import INDEX_PLACES, face

POLICIES = [("lru", "always"), ("lfu", "always"), ("lfu", "frequency")]
#: The index lies on the CPU: its faces are the first two places.
FACES = [pytest.param(place.values[0].face, id=place.id, marks=place.marks)
         for place in INDEX_PLACES[:2]]


@pytest.fixture(params=FACES)
def chosen(request):
    with face(request.param):
        yield request.param


def one_set(ways: int, rows: int = 100, policy: str = "lru",
            admission: str = "always") -> CacheIndex:
    """One set above ``rows`` rows; a row's tag is the row."""
    layout = CacheLayout(sets=1, ways=ways, slots=ways, tag_bytes=2, record_bytes=3 * ways,
                         metadata_bytes=3 * ways)
    return build_cache_index([CacheBlock(rows, layout, policy, admission)])


def place(index: CacheIndex, rows: list[int], step: int = 0, **mode: bool) -> Placement:
    segments = torch.tensor([[0, 0, len(rows)]])
    return cache_place(index, segments, torch.tensor(rows, dtype=torch.int64), step, **mode)


def counters(placement: Placement, block: int = 0) -> dict[str, int]:
    return dict(zip(COUNTERS, placement.counters[block].tolist(), strict=True))


def lookup(index: CacheIndex, rows: list[int]) -> list[int]:
    return cache_lookup(index, torch.tensor([[0, 0, len(rows)]]), torch.tensor(rows)).tolist()


# ---------------------------------------------------------------- by hand
@pytest.mark.usefixtures("chosen")
class TestOneSet:
    def test_misses_fill_free_slots_then_hit(self):
        index = one_set(3)
        found = place(index, [7, 5, 7])
        assert found.places.tolist() == [0, 1, 0]
        assert found.fills.tolist() == [[0, 7, 0], [0, 5, 1]]
        assert found.evictions.numel() == 0
        assert found.counters.tolist() == [[1, 2, 0, 0, 0, 0]]
        again = place(index, [5, 9])
        assert again.places.tolist() == [1, 2]
        assert counters(again)["hits"] == 1
        assert index.occupied.tolist() == [3]

    def test_lru_evicts_what_was_used_longest_ago(self):
        index = one_set(3)
        for row in (1, 2, 3, 1):
            place(index, [row])
        found = place(index, [4])
        assert found.evictions.tolist() == [[0, 1, 2, 0]]
        assert place(index, [5]).evictions[0, 2] == 3

    def test_lru_goes_by_the_order_of_the_ids(self):
        index = one_set(3)
        place(index, [1, 2, 3])
        place(index, [3, 1, 2])
        assert place(index, [4]).evictions[0, 2] == 3

    def test_untouched_hit_leaves_the_order(self):
        index = one_set(2)
        place(index, [1, 2])
        place(index, [1], touch=False)
        assert place(index, [3]).evictions[0, 2] == 1

    def test_lfu_evicts_what_was_used_least(self):
        index = one_set(3, policy="lfu")
        for rows in ([1, 2, 3], [1, 3], [1, 2], [1, 3]):
            place(index, rows)
        assert place(index, [4]).evictions[0, 2] == 2
        assert place(index, [5]).evictions[0, 2] == 4

    def test_lfu_count_saturates_and_the_set_forgets(self):
        index = one_set(2, policy="lfu")
        for row, uses in ((1, 127), (2, 3), (1, 1)):
            for _ in range(uses):
                place(index, [row])
        states = records(index.meta, index.table, 0)[0, 4:] >> 1
        assert states.tolist() == [127 // 2 + 1, 3 // 2]

    def test_write_marks_dirty_until_the_row_leaves(self):
        index = one_set(2)
        place(index, [1, 2])
        place(index, [1], write=True, touch=False)
        assert place(index, [3, 4]).evictions.tolist() == [[0, 0, 1, 1], [0, 1, 2, 0]]
        assert place(index, [5]).evictions[0, 3] == 0

    def test_filled_row_that_will_be_written_is_dirty(self):
        index = one_set(1)
        place(index, [1], write=True)
        assert place(index, [2]).evictions.tolist() == [[0, 0, 1, 1]]

    def test_batch_larger_than_the_cache_is_staged_in_order(self):
        index = one_set(2)
        found = place(index, [9, 8, 7, 6, 7, 9, 6])
        assert found.places.tolist() == [0, 1, 2, 3, 2, 0, 3]
        assert found.fills.tolist() == [[0, 9, 0], [0, 8, 1], [0, 7, 2], [0, 6, 3]]
        assert found.counters.tolist() == [[3, 4, 0, 0, 0, 2]]

    def test_row_of_the_call_keeps_its_slot(self):
        index = one_set(2)
        place(index, [1, 2])
        found = place(index, [3, 4, 1])  # 1 is used last, but it is there
        assert found.places.tolist() == [1, 2, 0]
        assert found.evictions.tolist() == [[0, 1, 2, 0]]
        assert lookup(index, [1, 2, 3, 4]) == [0, -1, 1, -1]

    def test_admission_keeps_rare_rows_out_of_a_used_set(self):
        index = one_set(4, policy="lfu", admission="frequency")
        for _ in range(30):
            place(index, [1, 2, 3, 4])
        refused = [counters(place(index, [50 + i], step=i))["refused"] for i in range(40)]
        assert sum(refused) > 35  # a try succeeds once in 2^10
        assert lookup(index, [1, 2, 3, 4]).count(-1) <= 40 - sum(refused)

    def test_admission_lets_a_frequent_row_in(self):
        index = one_set(4, policy="lfu", admission="frequency")
        place(index, [1, 2, 3, 4])
        tries = next(step for step in range(100) if not counters(place(index, [5], step))["staged"])
        assert tries < 20  # a try succeeds once in two
        state = records(index.meta, index.table, 0)[0, 8 + lookup(index, [5])[0]]
        assert state == 2  # the weakest had one use: half of it, rounded down, and one

    def test_lookup_changes_nothing(self):
        index = one_set(2, policy="lfu")
        place(index, [1, 2])
        before = index.meta.clone()
        assert lookup(index, [2, 1, 3]) == [1, 0, -1]
        assert torch.equal(index.meta, before)


@pytest.mark.usefixtures("chosen")
@pytest.mark.parametrize("ways", [1, 4, 16])
def test_full_cache_gives_every_row_a_slot(ways):
    rows = 777
    index = build_cache_index([CacheBlock(rows, cache_layout(rows, 1.0, ways))])
    found = place(index, torch.randperm(rows).tolist())
    assert counters(found)["staged"] == counters(found)["evictions"] == 0
    assert found.places.unique().numel() == rows
    assert counters(place(index, [0, rows - 1]))["hits"] == 2


@pytest.mark.usefixtures("chosen")
def test_conflicts_are_misses_that_other_sets_had_room_for():
    index = build_cache_index([CacheBlock(16, CacheLayout(4, 2, 8, 2, 6, 24), "lru")])
    sets = cache_sets(index, 16)
    crowded = [row for row in range(16) if sets[row] == sets[0]]
    assert len(crowded) == 4
    found = counters(place(index, crowded))
    assert (found["staged"], found["conflicts"]) == (2, 2)
    found = counters(place(index, crowded[2:]))
    assert (found["evictions"], found["conflicts"]) == (2, 2)
    # With all slots taken a miss is nobody's fault.
    place(index, list(range(16)))
    assert index.occupied.tolist() == [8]
    found = counters(place(index, [row for row in range(16) if lookup(index, [row]) == [-1]]))
    assert (found["misses"], found["evictions"], found["conflicts"]) == (8, 8, 0)


def cache_sets(index: CacheIndex, rows: int) -> list[int]:
    """The set of every row, seen from where each lands in an empty cache."""
    layout = index.blocks[0].layout
    found = []
    for row in range(rows):
        empty = build_cache_index(index.blocks)
        found.append(int(place(empty, [row]).places) // layout.ways)
    return found


@pytest.mark.usefixtures("chosen")
def test_empty_calls():
    index = build_cache_index([])
    found = cache_place(index, torch.empty((0, 3), dtype=torch.int64),
                        torch.empty(0, dtype=torch.int64), 0)
    assert found.places.numel() == found.fills.numel() == found.counters.numel() == 0
    index = one_set(2)
    assert place(index, []).counters.tolist() == [[0] * len(COUNTERS)]


@pytest.mark.usefixtures("chosen")
def test_rows_beyond_32_bits():
    rows = 2**40
    layout = cache_layout(rows, 2**-29, 4)
    assert layout.tag_bytes == 4
    index = build_cache_index([CacheBlock(rows, layout, "lru")])
    ids = [rows - 1, 0, 2**39, 2**32 + 5]
    found = place(index, ids)
    assert sorted(found.fills[:, 1].tolist()) == sorted(ids)
    assert counters(place(index, ids))["hits"] + counters(found)["staged"] >= len(ids)
    left = place(index, list(range(4 * layout.slots))).evictions[:, 2].tolist()
    assert {row for row in ids if found.places[ids.index(row)] < layout.slots} <= {*left, 0}


# ---------------------------------------------------------------- refused
@pytest.mark.usefixtures("chosen")
@pytest.mark.parametrize("bad", [-1, 100, 2**62])
def test_row_out_of_bounds_changes_nothing(bad):
    index = one_set(4)
    place(index, [3])
    before = index.meta.clone()
    for call in (lambda: place(index, [3, 5, bad]), lambda: lookup(index, [3, 5, bad])):
        with pytest.raises(OutOfBoundsError, match="position 2"):
            call()
    assert torch.equal(index.meta, before)


@pytest.mark.usefixtures("chosen")
@pytest.mark.parametrize("segments", [
    [[1, 0, 1]], [[-1, 0, 1]], [[0, 0, 1], [0, 1, 1]], [[0, 0, 4]], [[0, -1, 1]], [[0, 0, -1]],
    [[0, 2**62, 2**62]]])
def test_wrong_segment_is_refused(segments):
    index, number = one_set(4), len(segments) - 1
    with pytest.raises(ValueError, match=rf"segment {number} is \[.*within the 3 ids"):
        cache_place(index, torch.tensor(segments), torch.tensor([1, 2, 3]), 0)


def test_wrong_tensors_and_words_are_refused():
    index = one_set(4)
    with pytest.raises(TypeError, match=r"ids: expected a contiguous torch\.int64"):
        cache_place(index, torch.tensor([[0, 0, 1]]), torch.tensor([1], dtype=torch.int32), 0)
    with pytest.raises(ValueError, match="found ids on meta"):
        cache_lookup(index, torch.tensor([[0, 0, 1]]),
                     torch.empty(1, dtype=torch.int64, device="meta"))
    with pytest.raises(ValueError, match=r"meta: expected \[12\] on cpu for 1 caches"):
        build_cache_index(index.blocks, torch.empty(11, dtype=torch.uint8))
    with pytest.raises(ConfigError, match="policy 'fifo'"):
        CacheBlock(5, cache_layout(5, 1.0, 4), "fifo")
    with pytest.raises(ConfigError, match="policy lru does not keep"):
        CacheBlock(5, cache_layout(5, 1.0, 4), "lru", "frequency")


# ---------------------------------------------------------------- faces
def random_blocks(choose: random.Random) -> list[CacheBlock]:
    blocks = []
    for _ in range(choose.randint(1, 4)):
        rows = choose.choice([1, 2, 5, 17, 100, 3000, 70_001])
        layout = cache_layout(rows, choose.choice([0.01, 0.05, 0.3, 1.0]),
                              choose.choice([1, 2, 3, 7, 8, 16, 17, 21, 42, 64]))
        policy, admission = choose.choice(POLICIES)
        blocks.append(CacheBlock(rows, layout, policy, admission, choose.randint(0, 2**40)))
    return blocks


def random_calls(choose: random.Random, blocks: list[CacheBlock], sizes: list[int]
                 ) -> list[tuple[Tensor, Tensor, int, bool, bool]]:
    """Arguments of calls: skewed ids, gaps between segments, blocks left out."""
    calls = []
    for step in range(8):
        segments, parts, end = [], [], 0
        for number, block in enumerate(blocks):
            if choose.random() < 0.2:
                continue
            gap, count = choose.choice([0, 3]), choose.choice(sizes)
            segments.append((number, end + gap, count))
            generator = torch.Generator().manual_seed(choose.randint(0, 2**31))
            unit = torch.rand(count, generator=generator, dtype=torch.float64)
            parts += [torch.full((gap,), -5), (unit**4 * block.rows).long()]
            end += gap + count
        ids = torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)
        calls.append((torch.tensor(segments, dtype=torch.int64).view(-1, 3), ids,
                      step * (2**30 + 7), choose.random() < 0.8, choose.random() < 0.5))
    return calls


def run_calls(blocks: list[CacheBlock], calls, chosen: str, threads: int = 1) -> list[Tensor]:
    """All that the calls return, and the index after each."""
    index = build_cache_index(blocks)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    found = []
    try:
        with face(chosen):
            for segments, ids, step, touch, write in calls:
                covered = torch.cat([torch.arange(start, start + count)
                                     for _, start, count in segments.tolist()] or [ids[:0]])
                placed = cache_place(index, segments, ids, step, touch=touch, write=write)
                found += [placed.places[covered], placed.fills, placed.evictions, placed.counters,
                          index.meta.clone(), index.occupied.clone(),
                          cache_lookup(index, segments, ids)[covered]]
    finally:
        torch.set_num_threads(before)
    return found


@pytest.mark.parametrize("chosen", FACES[1:])
@pytest.mark.parametrize("seed", range(12))
def test_faces_agree(chosen, seed):
    choose = random.Random(seed)
    blocks = random_blocks(choose)
    calls = random_calls(choose, blocks, [0, 1, 40, 400])
    for expected, found in zip(run_calls(blocks, calls, "reference"),
                               run_calls(blocks, calls, chosen), strict=True):
        assert torch.equal(expected, found)


@pytest.mark.parametrize("chosen", FACES[1:])
@pytest.mark.parametrize("seed", range(4))
def test_thread_counts_agree(chosen, seed):
    choose = random.Random(100 + seed)
    blocks = random_blocks(choose)
    calls = random_calls(choose, blocks, [0, 5000, 20_000])
    expected = run_calls(blocks, calls, chosen)
    for threads in (2, 8):
        for one, many in zip(expected, run_calls(blocks, calls, chosen, threads), strict=True):
            assert torch.equal(one, many)


@pytest.mark.parametrize("chosen", FACES[1:])
def test_large_parallel_call_agrees_with_the_reference(chosen):
    choose = random.Random(7)
    blocks = random_blocks(choose)
    calls = random_calls(choose, blocks, [4500])[:2]
    for expected, found in zip(run_calls(blocks, calls, "reference"),
                               run_calls(blocks, calls, chosen, threads=3), strict=True):
        assert torch.equal(expected, found)


# ---------------------------------------------------------------- how well it hits
def hit_rate(policy: str, admission: str, fraction: float) -> float:
    rows, batch, steps = 20_000, 600, 60
    generator = torch.Generator().manual_seed(3)
    names = torch.randperm(rows, generator=generator)
    index = build_cache_index([CacheBlock(rows, cache_layout(rows, fraction, 21), policy,
                                          admission)])
    hits = total = 0
    for step in range(steps):
        ranks = torch.tensor(float(rows)) ** torch.rand(batch, generator=generator)
        ids = names[(ranks.long() - 1).clamp(0)].unique()
        found = counters(place(index, ids.tolist(), step))
        if step >= steps // 2:
            hits, total = hits + found["hits"], total + ids.numel()
    return hits / total


def test_policies_keep_their_order_on_skewed_ids():
    lru, lfu = (hit_rate(policy, "always", 0.1) for policy in ("lru", "lfu"))
    assert lfu > lru + 0.02
    assert hit_rate("lfu", "frequency", 0.01) > hit_rate("lfu", "always", 0.01) + 0.02
