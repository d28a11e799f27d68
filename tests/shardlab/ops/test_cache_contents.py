"""What caches hold: dropping, cleaning, saving and restoring."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from shardlab.cache_layout import cache_layout
from shardlab.errors import CheckpointError
from shardlab.ops.cache import build_cache_index, cache_lookup, cache_place
from shardlab.ops.cache_contents import (
    CacheContents,
    cache_contents,
    cache_drop,
    cache_restore,
)
from shardlab.ops.cache_index import CacheBlock, CacheIndex
from shardlab.ops.unique import OutOfBoundsError

POLICIES = ["lru", "lfu"]
#: Of records without padding, with padding, and with long tags.
SHAPES = [(1000, 0.1, 8), (1000, 0.1, 21), (1_000_000, 0.0001, 7)]


def used_index(policy: str, shape: tuple[int, float, int] = SHAPES[0], steps: int = 6
               ) -> CacheIndex:
    """Two caches after a few steps, some of their rows dirty."""
    rows, fraction, ways = shape
    index = build_cache_index([
        CacheBlock(rows, cache_layout(rows, fraction, ways), policy, seed=number)
        for number in range(2)])
    run_steps(index, range(steps))
    return index


def run_steps(index: CacheIndex, steps: range) -> list[Tensor]:
    found = []
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        unit = torch.rand(80, generator=generator, dtype=torch.float64)
        ids = (unit**3 * index.blocks[0].rows).long()
        placed = cache_place(index, torch.tensor([[0, 0, 50], [1, 50, 30]]), ids, step,
                             write=step % 3 == 0)
        found += [placed.places, placed.fills, placed.evictions, placed.counters]
    return found


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("policy", POLICIES)
def test_contents_are_what_lookup_finds(policy, shape):
    index = used_index(policy, shape)
    for number, block in enumerate(index.blocks):
        contents = cache_contents(index, number)
        every = torch.arange(block.rows)
        slots = cache_lookup(index, torch.tensor([[number, 0, block.rows]]), every)
        held = (slots >= 0).nonzero().squeeze(1)
        order = slots[held].argsort()
        assert torch.equal(contents.slots, slots[held][order])
        assert torch.equal(contents.rows, held[order])
        assert contents.rows.numel() == index.occupied[number] > 0
        assert bool(contents.dirty.any())
        assert not bool(contents.dirty.all())


@pytest.mark.parametrize("policy", POLICIES)
def test_dropping_all_lists_everything_and_empties(policy):
    index = used_index(policy)
    before = [cache_contents(index, number) for number in range(2)]
    listed = cache_drop(index)
    for number, contents in enumerate(before):
        part = listed[listed[:, 0] == number]
        assert torch.equal(part[:, 1], contents.slots)
        assert torch.equal(part[:, 2], contents.rows)
        assert torch.equal(part[:, 3].bool(), contents.dirty)
        assert cache_contents(index, number).rows.numel() == 0
    assert index.occupied.tolist() == [0, 0]
    assert torch.equal(index.meta, build_cache_index(index.blocks).meta)


@pytest.mark.parametrize("policy", POLICIES)
def test_flush_lists_the_dirty_rows_and_keeps_the_cache(policy):
    index, twin = used_index(policy), used_index(policy)
    dirty = sum(int(cache_contents(index, number).dirty.sum()) for number in range(2))
    listed = cache_drop(index, keep=True)
    assert listed.shape[0] == dirty > 0
    assert bool((listed[:, 3] == 1).all())
    assert cache_drop(index, keep=True).shape == (0, 4)
    assert torch.equal(index.occupied, twin.occupied)
    placed, expected = run_steps(index, range(10, 11)), run_steps(twin, range(10, 11))
    assert torch.equal(placed[0], expected[0])
    assert torch.equal(placed[2][:, :3], expected[2][:, :3])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("policy", POLICIES)
def test_dropping_some_rows_leaves_the_others(policy, shape):
    index = used_index(policy, shape)
    before = cache_contents(index, 0)
    gone = torch.cat([before.rows[::2], before.rows[:1], torch.tensor([999])])
    listed = cache_drop(index, torch.tensor([[0, 0, gone.numel()]]), gone)
    leaving = torch.isin(before.rows, gone)
    assert torch.equal(listed[:, 2], before.rows[leaving])
    assert torch.equal(listed[:, 3].bool(), before.dirty[leaving])
    after = cache_contents(index, 0)
    assert torch.equal(after.rows, before.rows[~leaving])
    assert torch.equal(after.slots, before.slots[~leaving])
    assert torch.equal(after.dirty, before.dirty[~leaving])
    assert after.rows.numel() == index.occupied[0]
    if policy == "lfu":
        assert torch.equal(after.counters, before.counters[~leaving])
    else:
        check_ranks(after, before, index.blocks[0].layout.ways)


def check_ranks(after: CacheContents, before: CacheContents, ways: int) -> None:
    """Occupied slots have the ranks 0, 1, ... of their set, in the order from before."""
    age = dict(zip(before.slots.tolist(), before.counters.tolist(), strict=True))
    for number in (after.slots // ways).unique():
        own = after.slots // ways == number
        order = after.counters[own].argsort()
        assert after.counters[own][order].tolist() == list(range(int(own.sum())))
        ages = [age[slot] for slot in after.slots[own][order].tolist()]
        assert ages == sorted(ages)


def test_cleaning_some_rows():
    index = used_index("lfu")
    contents = cache_contents(index, 1)
    ids = contents.rows[contents.dirty][:2]
    segments = torch.tensor([[1, 0, 2]])
    assert cache_drop(index, segments, ids, keep=True)[:, 2].tolist() == sorted(
        ids.tolist(), key=lambda row: int(contents.slots[contents.rows == row]))
    assert cache_drop(index, segments, ids, keep=True).shape == (0, 4)
    after = cache_contents(index, 1)
    assert torch.equal(after.rows, contents.rows)
    assert int(after.dirty.sum()) == int(contents.dirty.sum()) - 2


def test_dropping_a_row_out_of_bounds():
    with pytest.raises(OutOfBoundsError, match="position 1"):
        cache_drop(used_index("lru"), torch.tensor([[0, 0, 2]]), torch.tensor([5, 1000]))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("drop", [False, True], ids=["full", "with gaps"])
@pytest.mark.parametrize("policy", POLICIES)
def test_restored_cache_goes_on_as_if_nothing_had_happened(policy, drop, shape):
    index = used_index(policy, shape)
    if drop:
        rows = cache_contents(index, 0).rows[1::3].contiguous()
        cache_drop(index, torch.tensor([[0, 0, rows.numel()]]), rows)
    restored = build_cache_index(index.blocks)
    for number in range(2):
        cache_restore(restored, number, cache_contents(index, number))
    assert torch.equal(restored.occupied, index.occupied)
    for expected, found in zip(run_steps(index, range(10, 16)),
                               run_steps(restored, range(10, 16)), strict=True):
        assert torch.equal(expected, found)
    for number in range(2):
        before, after = cache_contents(index, number), cache_contents(restored, number)
        assert torch.equal(before.counters, after.counters)


def test_restoring_replaces_what_was_there():
    index = used_index("lru")
    empty = CacheContents(*(torch.empty(0, dtype=dtype)
                            for dtype in (torch.int64, torch.int64, torch.uint8, torch.bool)))
    cache_restore(index, 0, empty)
    assert index.occupied[0] == 0
    assert cache_contents(index, 0).rows.numel() == 0
    assert index.occupied[1] > 0


@pytest.mark.parametrize(("change", "policy"), [
    (lambda saved: {"rows": saved.rows + 1}, "lfu"),
    (lambda saved: {"rows": saved.rows.clone().fill_(-1)}, "lfu"),
    (lambda saved: {"slots": saved.slots + 10_000}, "lfu"),
    (lambda saved: {"slots": saved.slots.flip(0), "rows": saved.rows.flip(0)}, "lfu"),
    (lambda saved: {"counters": saved.counters + 128}, "lfu"),
    (lambda saved: {"counters": saved.counters + 8}, "lru"),
])
def test_contents_of_another_cache_are_refused(change, policy):
    index = used_index(policy)
    saved, before = cache_contents(index, 0), index.meta.clone()
    with pytest.raises(CheckpointError, match=r"cache 0: saved row .* restore it with"):
        cache_restore(index, 0, replace(saved, **change(saved)))
    assert torch.equal(index.meta, before)
