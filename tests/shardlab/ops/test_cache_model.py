"""A cache over a table of values against a dict: nothing is lost, nothing is in two places."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from shardlab.cache_layout import cache_layout
from shardlab.ops.cache import build_cache_index, cache_place
from shardlab.ops.cache_contents import cache_contents, cache_drop, cache_restore
from shardlab.ops.cache_index import CacheBlock, CacheIndex
from shardlab.ops.registry import native
from tests.shardlab.ops.test_cache import POLICIES

SEGMENT = st.lists(st.integers(0, 10**6), max_size=40)


class Model:
    """A table whose rows are numbers, and the values that its cache's slots hold."""

    def __init__(self, rows: int) -> None:
        self.truth = [0] * rows  # what a read must find
        self.home = [0] * rows
        self.slots: dict[int, tuple[int, int]] = {}  # slot -> (row, value)

    def evict(self, slot: int, row: int, dirty: int) -> None:
        held, value = self.slots.pop(slot)
        assert held == row
        if dirty:
            self.home[row] = value
        assert self.home[row] == self.truth[row]


class CacheMachine(RuleBasedStateMachine):
    """Places, writes, drops, flushes and restores at random."""

    face = "native"

    def __init__(self):
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.patch.setenv("SHARDLAB_FACE", self.face)

    def teardown(self):
        self.patch.undo()

    @initialize(shapes=st.lists(
        st.tuples(st.sampled_from([1, 3, 30, 200]), st.sampled_from([0.02, 0.3, 1.0]),
                  st.sampled_from([1, 2, 5, 21]), st.sampled_from(POLICIES)),
        min_size=1, max_size=3))
    def build(self, shapes):
        self.blocks = [
            CacheBlock(rows, cache_layout(rows, fraction, ways), *policy, seed=7)
            for rows, fraction, ways, policy in shapes]
        self.index: CacheIndex = build_cache_index(self.blocks)
        self.models = [Model(rows) for rows, *_ in shapes]
        self.step = 0

    @rule(parts=st.lists(st.one_of(st.none(), SEGMENT), min_size=3, max_size=3),
          touch=st.booleans(), write=st.booleans())
    def place(self, parts, touch, write):
        segments, ids = self.segments(parts)
        before = [set(model.slots) for model in self.models]
        found = cache_place(self.index, segments, ids, self.step, touch=touch, write=write)
        self.step += 1
        wanted = {(block, row) for block, start, count in segments.tolist()
                  for row in ids[start:start + count].tolist()}
        for block, slot, row, dirty in found.evictions.tolist():
            assert slot in before[block]
            assert (block, row) not in wanted  # nothing leaves that the call uses
            self.models[block].evict(slot, row, dirty)
        staging = self.fill(found.fills.tolist())
        for block, start, count in segments.tolist():
            for i in range(start, start + count):
                self.use(block, int(ids[i]), int(found.places[i]), staging, write)
        if write:
            for (block, _), (row, value) in staging.items():
                self.models[block].home[row] = value
        self.check_counters(found, segments)

    def segments(self, parts):
        rows, ids = [], []
        for number, (part, block) in enumerate(zip(parts, self.blocks, strict=False)):
            if part is not None:
                rows.append((number, len(ids), len(part)))
                ids += [value % block.rows for value in part]
        return (torch.tensor(rows, dtype=torch.int64).view(-1, 3),
                torch.tensor(ids, dtype=torch.int64))

    def fill(self, fills):
        """Brings rows up; returns the staging rows: (block, place) -> (row, value)."""
        staging: dict[tuple[int, int], tuple[int, int]] = {}
        for block, row, place in fills:
            model, slots = self.models[block], self.blocks[block].layout.slots
            if place >= slots:
                numbers = [other for owner, other in staging if owner == block]
                assert place == slots + len(numbers)
                staging[block, place] = row, model.home[row]
            else:
                assert place not in model.slots  # emptied before it is filled
                model.slots[place] = row, model.home[row]
        return staging

    def use(self, block, row, place, staging, write):
        model = self.models[block]
        staged = place >= self.blocks[block].layout.slots
        held, value = staging[block, place] if staged else model.slots[place]
        assert held == row
        if not write:
            assert value == model.truth[row]
            return
        model.truth[row] = value = self.step * 1000 + row
        if staged:
            staging[block, place] = row, value
        else:
            model.slots[place] = row, value

    def check_counters(self, found, segments):
        named = {block: count for block, _, count in segments.tolist()}
        for block in range(len(self.blocks)):
            hits, misses, conflicts, evictions, refused, staged = found.counters[block].tolist()
            own = found.fills[found.fills[:, 0] == block]
            assert hits + misses == named.get(block, 0)
            assert misses == own.shape[0]
            assert staged == int((own[:, 2] >= self.blocks[block].layout.slots).sum())
            assert evictions == int((found.evictions[:, 0] == block).sum())
            assert refused <= staged
            assert 0 <= conflicts <= staged - refused + evictions

    @rule(keep=st.booleans())
    def drop_all(self, keep):
        self.write_back(cache_drop(self.index, keep=keep), keep)
        if keep:
            for model in self.models:
                assert model.home == model.truth
        else:
            assert not any(model.slots for model in self.models)

    @rule(parts=st.lists(st.one_of(st.none(), SEGMENT), min_size=3, max_size=3),
          keep=st.booleans())
    def drop_some(self, parts, keep):
        segments, ids = self.segments(parts)
        self.write_back(cache_drop(self.index, segments, ids, keep=keep), keep)
        for block, start, count in segments.tolist():
            named = set(ids[start:start + count].tolist())
            assert keep or not named & {row for row, _ in self.models[block].slots.values()}

    def write_back(self, listed, keep):
        for block, slot, row, dirty in listed.tolist():
            model = self.models[block]
            if keep:
                assert dirty
                assert model.slots[slot][0] == row
                model.home[row] = model.slots[slot][1]
            else:
                model.evict(slot, row, dirty)

    @precondition(lambda self: self.step)
    @rule()
    def save_and_restore(self):
        fresh = build_cache_index(self.blocks)
        for number in range(len(self.blocks)):
            cache_restore(fresh, number, cache_contents(self.index, number))
        self.index = fresh

    @invariant()
    def index_holds_what_the_slots_hold(self):
        for number, model in enumerate(getattr(self, "models", [])):
            contents = cache_contents(self.index, number)
            held = dict(zip(contents.slots.tolist(), contents.rows.tolist(), strict=True))
            assert held == {slot: row for slot, (row, _) in model.slots.items()}
            assert len(set(held.values())) == len(held) == self.index.occupied[number]
            clean = set(contents.rows[~contents.dirty].tolist())
            for row in range(self.blocks[number].rows):
                if row in clean or row not in held.values():
                    assert model.home[row] == model.truth[row]


class ReferenceMachine(CacheMachine):
    """The same on the reference face."""

    face = "reference"


TestNative, TestReference = CacheMachine.TestCase, ReferenceMachine.TestCase
TestNative.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
TestReference.settings = settings(max_examples=15, stateful_step_count=15, deadline=None)
if native() is None:
    del TestNative
