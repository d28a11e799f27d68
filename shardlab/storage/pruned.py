"""The ``pruned`` storage: chunks of important rows are present, others are not.

    read      index -> places -> chunks; zeros where there is none, or a chunk that the absent
              ones of a table share and train (`chunk_absent`)
    update    present chunks: one optimiser step, utility += accesses x norm of the gradient
              absent chunks: the same into the sketch; above the threshold they are admitted,
              where there is no room in place of one worth less, with zero values and fresh
              state, and step at once
    decide    every period (`shardlab.sharded.pruning` tells the thresholds): utilities decay,
              chunks below the threshold leave, and slabs go back to the system

Utilities are kept as of the last decision: a step's share is multiplied by gamma^-(steps since), so
that nothing decays in between, but where a thousandth of them is left. Source: arXiv 2401.04408;
normalisation by the 95th percentile as in AdaEmbed (OSDI 2023).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from shardlab.chunk_layout import PAGE_BYTES, RESERVE, in_pages
from shardlab.codecs import rounding_key
from shardlab.ops.cache import COUNTERS
from shardlab.ops.chunk_index import Offers
from shardlab.ops.chunk_rows import (
    UtilityStep,
    block_segments,
    chunk_squares,
    pool_chunks,
    read_chunks,
    scatter_chunks,
    step_admitted,
    summed_gradients,
    update_chunks,
)
from shardlab.ops.step_parameters import StepParameters
from shardlab.ops.unique import Uniques
from shardlab.storage.base import LocalShard, PlacedJobs, StorageOptions, TableChunk
from shardlab.storage.chunk_budget import common_unit
from shardlab.storage.chunk_changes import ChunkChanges
from shardlab.storage.chunk_files import ChunkFiles
from shardlab.storage.chunk_snapshot import ChunkSnapshot
from shardlab.storage.chunk_start import fill_dense
from shardlab.storage.chunk_stores import pruned_spec
from shardlab.storage.chunk_watch import ChunkWatch
from shardlab.storage.kept_room import KeptRoom
from shardlab.storage.pruned_state import PrunedState
from shardlab.storage_bytes import TierBytes
from shardlab.storage_specs import TOGETHER

#: Pages at the ends of keys, values, stack, payloads and states, part full each, and few slots.
_PART_PAGES = 4 * PAGE_BYTES
#: Streams of random bits beside those of rows (0 to 2): utilities of updates, of decisions, and of
#: what decays in between.
_TOUCH, _DECIDE, _REFRESH = 16, 17, 18
#: Utilities decay at a decision, or when less than this is left of them.
_STALE = 2.0 ** -10
#: Rows of a table whose gradients tell its unit, and the share of them that lie below it.
_SAMPLE, _PERCENTILE = 256, 0.95
#: What is tried next where a threshold leaves more than the budget, and the least of all.
_RAISE, _LEAST = 1.05, 2.0 ** -49
#: Rows whose utilities tell a decision its threshold, at least.
_COUNTED = 1 << 16
#: The least share of absent rows that count in a step.
_LEAST_SHARE = 2.0 ** -10
#: Free places, as a share of the chunks, from which a decision gives their slabs back: rows whose
#: chunks are few leave places that only slots of the index, for which there is no room, would fill.
_IDLE = 1 / RESERVE


@dataclass(frozen=True)
class _Found:
    """What a read looked up: the rows, `block_segments` of them, their slots in the index if known,
    and how often that had changed."""

    uniques: Uniques
    segments: Tensor
    slots: Tensor | None
    changes: int


class PrunedStorage(PrunedState):
    """All shards of a rank that are pruned.

    Args:
        shards: what to hold.
        options: optimiser, seed, device.

    Raises:
        ConfigError: shards that cannot be pruned here.
    """

    def __init__(self, shards: list[LocalShard], options: StorageOptions) -> None:
        super().__init__(shards, options)
        self._store_of = self.index.blocks[:, 0].numpy()
        #: By shard: how many times the utility of a chunk that it replaces a newcomer needs.
        self._margins = torch.tensor([1 + pruned_spec(local).hysteresis for local in shards])
        self._evidence = np.array([
            spec.evidence if spec.evidence and spec.normalize else math.inf
            for spec in map(pruned_spec, shards)], dtype=np.float32)
        #: Stores whose rows may make way for rows of fewer chunks.
        self._may_be_stuck = [store for store, plan in enumerate(self.stores)
                              if plan.shape.layout.chunks > 1]
        self._found: _Found | None = None
        self.files = ChunkFiles(self)
        self.watch = ChunkWatch(self.files)
        for number, plan in enumerate(self.stores):
            if plan.spec.is_full or plan.spec.start == "dense":
                fill_dense(self.pools, shards, plan, number, options.seed)

    # ------------------------------------------------------------------ verbs
    def read(self, segments: Tensor, ids: Tensor, out: Tensor) -> None:
        """Decodes rows into ``out`` (`ops.chunk_rows.read_chunks`)."""
        self.files.settle()
        read_chunks(self.pools, segments, ids, out)

    def read_pooled(self, jobs: PlacedJobs, index: Tensor, offsets: Tensor | None,
                    weights: Tensor | None, out: Tensor) -> None:
        """Pools bags straight from the chunks."""
        self.files.settle()
        pool_chunks(self.pools, jobs.jobs, index, offsets, weights, out)

    def read_scattered(self, uniques: Uniques, weights: Tensor | None, out: Tensor) -> None:
        """Copies every row to its entries' places."""
        self.files.settle()
        segments = block_segments(uniques)
        slots = scatter_chunks(self.pools, uniques, segments, weights, out)
        self._found = _Found(uniques, segments, slots, self.index.changes)

    def place_jobs(self, jobs: Tensor) -> PlacedJobs:
        """Jobs as they are: chunks are found when they are read."""
        return PlacedJobs(jobs, jobs)

    def begin_step(self, step: int) -> None:
        """Tells how many optimiser steps were taken, this one included."""
        self.clock.step = step

    def update(self, uniques: Uniques, weights: Tensor | None, grads: Tensor,
               step: StepParameters, row_squares: Tensor | None = None) -> None:
        """Steps present chunks, counts absent ones, and admits what is worth it."""
        self.files.settle()
        if stale := [store for store in range(len(self.stores)) if self.decay(store) < _STALE]:
            self._refresh(stale)
        with self.lock:
            self.watch.before_update(uniques)
            self._update(uniques, weights, grads, step, row_squares)
        self.watch.wait()

    def _update(self, uniques: Uniques, weights: Tensor | None, grads: Tensor,
                step: StepParameters, row_squares: Tensor | None) -> None:
        step = replace(step, key=self.clock.key(0))
        key = rounding_key(self.clock.seed, self.clock.step, _TOUCH)
        self._measure(uniques, weights, grads, step)
        now, found = self._weights(), self._look_up(uniques)
        norms = update_chunks(self.pools, uniques, weights, grads, step, row_squares,
                              UtilityStep(now, key, self._shares(), self.absent.sums,
                                          found.slots))
        offers = Offers(found.segments, uniques.ids.cpu(), norms, now,
                        self.thresholds * self.scale, key, self._margins, self.evicted)
        admitted = self.index.offer(offers)
        self.watch.after_offer()
        if admitted.shape[0]:
            edges = torch.searchsorted(admitted[:, 0].contiguous(), uniques.splits)
            self.admitted += edges.diff()
            step_admitted(self.pools, admitted, uniques, weights, grads, step, row_squares)
            self._make_slots()
        self.absent.step(step)

    def _refresh(self, stores: Sequence[int]) -> None:
        """Utilities as of now, where the last decision lies far back: a step's share would outgrow
        cells of the sketch, and then fp32. Nothing is evicted."""
        self.watch.wait_to_decide(stores)
        with self.lock:
            key = rounding_key(self.clock.seed, self.clock.step, _REFRESH)
            for store in stores:
                refused = self.index.numbers(store).refused
                self.watch.decide(store, self.decay(store), torch.zeros(len(self.shards)), key)
                self.index.set_refused(store, refused)
                self.since[store] = self.clock.step
        self.watch.wait()

    def _make_slots(self) -> None:
        """Turns idle places into slots, where new rows would find none until a decision."""
        for store in self._may_be_stuck:
            if self.stores[store].shape.is_stuck(self.index.numbers(store)):
                self.compact(store)

    def _measure(self, uniques: Uniques, weights: Tensor | None, grads: Tensor,
                 step: StepParameters) -> None:
        """The 95th percentile of a table's gradient norms, from a sample, before a decision."""
        due = {block for block, scale in enumerate(self.scale.tolist()) if not scale}
        for plan in self.stores:
            if self.clock.step % plan.spec.period == 0 and plan.spec.normalize:
                due.update(plan.blocks)
        if not due:
            return
        for block, start, count in block_segments(uniques).tolist():
            if block not in due:
                continue
            some = torch.arange(start, start + count, -(-count // _SAMPLE))
            rows = summed_gradients(self.pools, block, (uniques, weights, grads, step), some)
            norms = chunk_squares(rows, self.pools.chunks(block)).sqrt().flatten()
            self.measured[block] = float(norms.quantile(_PERCENTILE))
        first = self.measured.clone()
        for schedule in {plan.spec.schedule for plan in self.stores
                         if plan.spec.normalize == TOGETHER}:
            blocks = [block for plan in self.stores if plan.spec.schedule == schedule
                      for block in plan.blocks]
            first[blocks] = common_unit(self.measured[blocks])
        self.scale = torch.where(self.scale > 0, self.scale, first)

    def _look_up(self, uniques: Uniques) -> _Found:
        """What the last read found, if it was of the same rows, and in the same index."""
        found, self._found = self._found, None
        if found is None or found.uniques is not uniques:
            return _Found(uniques, block_segments(uniques), None, self.index.changes)
        return found if found.changes == self.index.changes else replace(found, slots=None)

    def _weights(self) -> Tensor:
        """fp32 [shards]: what a norm counts as of the last decision; 1 before units are
        known.
        """
        decays = np.array([self.decay(store) for store in range(len(self.stores))])
        units = self.scale.numpy()
        weights = np.ones(len(units))
        np.divide(1.0, decays[self._store_of] * units, out=weights, where=units > 0)
        return torch.from_numpy(weights.astype(np.float32))

    def _shares(self) -> Tensor:
        """fp32 [shards]: of absent rows, which count in a step: thresholds are in units of one
        access."""
        with np.errstate(divide="ignore"):
            shares = self._evidence / self.thresholds.numpy()
        return torch.from_numpy(shares.clip(_LEAST_SHARE, 1.0, out=shares))

    def shared_gradients(self, block: int, out: Tensor) -> bool:
        """What a shard knows of the chunks that its table's absent ones share."""
        return self.absent.gradients(block, out)

    def step_shared(self, block: int, shared: Tensor, step: StepParameters) -> None:
        """Steps them by the sum over the table's row blocks."""
        self.absent.step_shared(block, shared, replace(step, key=self.clock.key(0)))

    def prefetch(self, segments: Tensor, ids: Tensor) -> None:
        """Nothing: chunks are in memory."""

    def cache_counts(self, block: int) -> list[int]:
        """There is no cache."""
        return [0] * (len(COUNTERS) + 1)

    # ------------------------------------------------------------------ decisions
    def decay(self, store: int) -> float:
        """What is left of the utilities of a store since its last decision."""
        return float(self.stores[store].spec.gamma ** (self.clock.step - self.since[store]))

    def utility_counts(self, store: int) -> Tensor:
        """fp64 [shards, BINS]: present chunks by utility; of many rows, as a sample tells.

        Keys are hashes, so that a part of the index is a sample. A quantile of 65,536 rows is 0.2 %
        of them off (one standard deviation), where a decision leaves 1 % of the budget free.
        """
        self.files.settle()
        numbers = self.index.numbers(store)
        parts = max(1, numbers.rows // _COUNTED)
        part = self.clock.step // self.stores[store].spec.period % parts, parts
        counts = self.index.count(store, self.decay(store), part)[0].double()
        return counts * (numbers.used / max(1.0, float(counts.sum())))

    def chunk_cost(self, store: int) -> float:
        """Bytes that one more chunk of a store takes, with its part of the index."""
        layout, numbers = self.stores[store].shape.layout, self.index.numbers(store)
        if not numbers.used:
            return layout.likely_bytes
        return layout.record_bytes + layout.slot_bytes * numbers.rows / numbers.used

    def fixed_bytes(self, store: int) -> int:
        """Bytes of a store whatever chunks it has: the sketch, pages that are not full."""
        layout = self.stores[store].shape.layout
        return in_pages(64 * layout.sketch_lines) + layout.shared * layout.record_bytes \
            + _PART_PAGES

    def is_full(self, store: int) -> bool:
        """Whether a chunk that was worth it found no free room since the last decision."""
        return self.index.numbers(store).refused > 0

    def decide(self, store: int, thresholds: Tensor, budget: int) -> None:
        """`decide_together` of one store."""
        self.decide_together([store], thresholds, budget)

    def decide_together(self, stores: Sequence[int], thresholds: Tensor, budget: int) -> None:
        """Evicts what is below the thresholds, and sets what stores may hold from now on.

        Args:
            stores: their numbers.
            thresholds: fp32 [shards]; those of other stores' shards are not read.
            budget: bytes of all of them; each gets a part as it keeps chunks.
        """
        self.watch.wait_to_decide(stores)
        with self.lock:
            self._decide(stores, thresholds, budget)
        self.watch.wait()

    def _decide(self, stores: Sequence[int], thresholds: Tensor, budget: int) -> None:
        key = rounding_key(self.clock.seed, self.clock.step, _DECIDE)
        for store in stores:
            spec, blocks = self.stores[store].spec, list(self.stores[store].blocks)
            self.evicted += self.watch.decide(store, self.decay(store), thresholds, key)
            self.thresholds[blocks] = thresholds[blocks] * (1 + spec.hysteresis)
            self.since[store] = self.clock.step
            numbers = self.index.numbers(store)
            if numbers.free > _IDLE * numbers.used:
                self.compact(store)
        # Thresholds come from bins a fifth apart, and pages are whole: a little may be left over.
        while self._share(stores, budget) > budget:
            for store in stores:
                self.compact(store, tight=False)
            used = sum(self.index.numbers(store).used for store in stores)
            if self._share(stores, budget) <= budget or not used:
                break
            thresholds = (thresholds * _RAISE).clamp(min=_LEAST)
            for store in stores:
                self.evicted += self.watch.decide(store, 1.0, thresholds, key)

    def _share(self, stores: Sequence[int], budget: int) -> int:
        """Bytes that stores hold; their parts of the budget go by that."""
        held = [self.index.held_bytes(store) for store in stores]
        for store, mine in zip(stores, held, strict=True):
            self.index.set_budget(store, budget * mine // max(1, sum(held)))
        return sum(held)

    def measure_by(self, units: dict[int, float]) -> None:
        """Sets what gradient norms of some shards are divided by from now on."""
        for block, unit in units.items():
            self.scale[block] = unit
        self.measured.zero_()

    # ------------------------------------------------------------------ bytes
    def held_bytes(self, store: int) -> int:
        """Bytes that a store holds, everything counted, in whole pages."""
        return self.index.held_bytes(store)

    def part_bytes(self, store: int) -> dict[str, int]:
        """The same by part (`chunk_layout.PARTS`)."""
        numbers = self.index.numbers(store)
        return self.stores[store].shape.layout.part_bytes(numbers.slots, numbers.committed,
                                                          numbers.free)

    def tier_bytes(self) -> TierBytes:
        """Bytes that are held now, by tier: pools, index, utilities, sketch, free places."""
        self.files.settle()
        total = TierBytes()
        for store, plan in enumerate(self.stores):
            total = total + TierBytes.on(plan.spec.tier, self.index.held_bytes(store))
        return total

    # ------------------------------------------------------------------ checkpoints
    def chunks(self, max_bytes: int) -> Iterator[TableChunk]:
        """Streams the rows that have chunks, with state and utilities.

        Chunks are moved together first, as a resumed run will have them: what is held then, and
        so what is admitted next, is the same in both.
        """
        self.files.settle()
        return self.files.chunks(max_bytes)

    def snapshot(self, changes: ChunkChanges | None, room: KeptRoom) -> ChunkSnapshot:
        """The rows at this moment, to be written while training goes on; see `KeepsItself`."""
        self.files.settle()
        return self.watch.snapshot(changes, room)

    def watch_changes(self) -> ChunkChanges:
        """From now on, what changes."""
        return self.watch.watch_changes()

    def begin_load(self) -> None:
        """Drops all chunks."""
        self.files.begin_load()

    def load_chunk(self, chunk: TableChunk) -> None:
        """Takes the chunk's rows in; of rows of another storage, those that there is room for."""
        self.files.load_chunk(chunk)

    def close(self) -> None:
        """Nothing: all is memory."""
