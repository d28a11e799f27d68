"""The ``tensor_train`` storage: tables as products of small cores, trained exactly.

    read      rows of unique ids, the leading products once per distinct prefix
    update    gradients of all cores, then one optimiser step on every slice of every core

A step takes the whole cores, as an optimiser of dense parameters would: where the rule moves what
got no gradient (Adam, weight decay), every slice moves; elsewhere those without a gradient would
not change and are left out. A step in which no id of the table occurs leaves the table as it is.

A rectangle of the table is a part of the first core and all of the others. Where several ranks hold
parts of one table, `shardlab.sharded.shared_cores` adds up the gradients of what they share.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import accumulate

import torch
from torch import Tensor

from shardlab.ops.blocks import Blocks
from shardlab.ops.cache import COUNTERS
from shardlab.ops.rows import pool_rows, sum_rows
from shardlab.ops.scatter import scatter_rows
from shardlab.ops.step_parameters import ROW_WISE, StepParameters
from shardlab.ops.tensor_train_batch import all_slices, moves_every_slice
from shardlab.ops.tensor_train_types import CoreGradients
from shardlab.ops.unique import (
    BOUNDS_CODE,
    Segments,
    Uniques,
    fill_affine,
    unique_segments,
)
from shardlab.specs import BoundsMode
from shardlab.storage.base import LocalShard, PlacedJobs, StorageOptions, TableChunk
from shardlab.storage.levels import Clock
from shardlab.storage.tensor_train_batch import TrainBatch
from shardlab.storage.tensor_train_cores import build_cores
from shardlab.storage.tensor_train_files import load_train, save_train
from shardlab.storage.tensor_train_shard import TensorTrainShard
from shardlab.storage_bytes import TierBytes, tier_bytes

_FP32_BYTES = 4


class TensorTrainStorage:
    """All shards of a rank that are held as tensor trains.

    Args:
        shards: what to hold.
        options: optimiser, seed, device.

    Raises:
        ConfigError: factors that do not fit a table.
    """

    def __init__(self, shards: list[LocalShard], options: StorageOptions) -> None:
        self.shards, self.optimizer = shards, options.optimizer
        self.clock = Clock(options.seed)
        arenas, self.memories = build_cores(shards, options, self.clock)
        self.trains = [TensorTrainShard(local, options, cores)
                       for local, cores in zip(shards, arenas, strict=True)]
        self._batch = TrainBatch(self.trains, self.memories)
        limits = torch.tensor([local.shard.rows for local in shards], dtype=torch.int64)
        # Ids were checked; those that a bounds mode dropped are -1.
        modes = torch.full_like(limits, BOUNDS_CODE[BoundsMode.IGNORE])
        self._segments = Segments(limits, modes)

    # ------------------------------------------------------------------ verbs
    def read(self, segments: Tensor, ids: Tensor, out: Tensor) -> None:
        """Computes rows into ``out`` (`ops.rows.gather_rows`), rows of several ranks once."""
        columns = torch.tensor([train.columns for train in self.trains], dtype=torch.int64)
        order = torch.argsort(segments[:, 0], stable=True)
        chunks = torch.cat([segments[order], columns[segments[order, 0], None]], 1)
        self.read_scattered(unique_segments(ids, chunks, self._segments), None, out)

    def read_scattered(self, uniques: Uniques, weights: Tensor | None, out: Tensor) -> None:
        """Copies every row to its entries' places (`ops.scatter.scatter_rows`)."""
        rows, starts = self._batch.rows(uniques.ids, uniques.splits.tolist())
        counts = uniques.splits.diff().tolist()
        table = torch.tensor([[_FP32_BYTES * start, _FP32_BYTES * train.columns, 0, 0,
                               train.columns, count]
                              for train, start, count in zip(self.trains, starts, counts,
                                                             strict=True)])
        pieces = torch.tensor([[start, count, 0, 1] for start, count in zip(
            uniques.splits.tolist(), counts, strict=False)])
        places = fill_affine(pieces, uniques.ids.numel(), uniques.ids.device)
        scatter_rows(rows.view(torch.uint8), Blocks(table), replace(uniques, ids=places), weights,
                     out)

    def place_jobs(self, jobs: Tensor) -> PlacedJobs:
        """Jobs as they are: rows get their places when they are read."""
        return PlacedJobs(jobs, jobs)

    def read_pooled(self, jobs: PlacedJobs, index: Tensor, offsets: Tensor | None,
                    weights: Tensor | None, out: Tensor) -> None:
        """Pools bags of rows; every row is computed once."""
        chunks = _job_chunks(jobs.jobs, offsets)
        uniques = unique_segments(index, chunks, self._segments, inverse=True)
        assert uniques.inverse is not None
        rows, starts = self._batch.rows(uniques.ids, uniques.splits.tolist())
        placed = jobs.jobs.clone()
        width = torch.tensor([train.columns for train in self.trains], dtype=torch.int64)
        base = torch.tensor(starts, dtype=torch.int64) - uniques.splits[:-1] * width
        placed[:, 0], placed[:, 1] = base[jobs.jobs[:, 0]], width[jobs.jobs[:, 0]]
        pool_rows(rows, placed, uniques.inverse, offsets, weights, out)

    def begin_step(self, step: int) -> None:
        """Tells how many optimiser steps were taken, this one included."""
        self.clock.step = step

    def update(self, uniques: Uniques, weights: Tensor | None, grads: Tensor,
               step: StepParameters, row_squares: Tensor | None = None) -> None:
        """One step on the cores of every table that ids touched.

        Cores that several ranks share wait for `step_shared`. Row-wise rules take the squares of
        slices; ``row_squares`` are for cached rows of which this shard has some columns.
        """
        edges = uniques.splits.tolist()
        touched = [number for number in range(len(self.trains))
                   if edges[number + 1] > edges[number]]
        if not touched:
            return
        summed = self._summed(uniques, weights, grads, edges, step)
        ids, cores_edges, summed = self._learn_hot(uniques, summed, edges, step, row_squares)
        waiting = self._batch.shared_gradients(ids, cores_edges, summed)
        self._batch.step(ids, cores_edges, summed, replace(step, key=self.clock.key(0)))
        self._batch.forget()
        for number in touched:
            if self.trains[number].is_shared:
                self.trains[number].waiting = waiting[number]
            else:
                self.trains[number].choose_hot_rows(self.clock.step)

    def _summed(self, uniques: Uniques, weights: Tensor | None, grads: Tensor, edges: list[int],
                step: StepParameters) -> Tensor:
        """fp32, flat: summed, scaled and clipped gradients of all rows."""
        pieces, at = [], 0
        for number, train in enumerate(self.trains):
            count = edges[number + 1] - edges[number]
            pieces.append([edges[number], count, train.columns, 0, at, train.columns])
            at += count * train.columns
        summed = self._batch.workspace.take("summed", at, grads)
        sum_rows(grads, uniques, weights, torch.tensor(pieces), step.scale, summed)
        if step.clip_value > 0:
            summed.clamp_(-step.clip_value, step.clip_value)
        return summed

    def _learn_hot(self, uniques: Uniques, summed: Tensor, edges: list[int], step: StepParameters,
                   row_squares: Tensor | None) -> tuple[Tensor, list[int], Tensor]:
        """Steps the cached rows; ids, edges and gradients of those that the cores make."""
        if all(train.hot is None for train in self.trains):
            return uniques.ids, edges, summed
        ids, parts, at = [], [], 0
        for number, train in enumerate(self.trains):
            rows = slice(edges[number], edges[number + 1])
            size = (rows.stop - rows.start) * train.columns
            part = uniques.ids[rows], summed[at:at + size].view(-1, train.columns)
            at += size
            if train.hot is not None and size:
                uses = uniques.starts[rows.start:rows.stop + 1].diff()
                part = train.learn_hot(*part, uses, step,
                                       None if row_squares is None else row_squares[rows])
            ids.append(part[0])
            parts.append(part[1].reshape(-1))
        return (torch.cat(ids), [0, *accumulate(part.numel() for part in ids)],
                torch.cat(parts))

    def prefetch(self, segments: Tensor, ids: Tensor) -> None:
        """Nothing: cores are small and near."""

    def cache_counts(self, block: int) -> list[int]:
        """Unique rows that reads found cached, and not, since the start; nothing is moved."""
        hot = self.trains[block].hot
        counts = [0] * (len(COUNTERS) + 1)
        if hot is not None:
            counts[:2] = hot.hits, hot.misses
        return counts

    def tier_bytes(self) -> TierBytes:
        """Bytes by tier, counted by the planner's arithmetic for every shard."""
        return sum((tier_bytes(local.storage, local.shard.rows, local.shard.columns,
                               self.optimizer) for local in self.shards), TierBytes())

    # ------------------------------------------------------------------ cores that ranks share
    def shared_gradients(self, block: int, out: Tensor) -> bool:
        """Adds what a shard knows of the gradients of all cores but the first.

        Args:
            block: number of the shard.
            out: fp32, zeros: the cores' gradients, slice by slice, core by core; then, where the
                table is cut by columns, the sums of squares of all slices of its first core.

        Returns:
            Whether ids touched the shard.
        """
        train = self.trains[block]
        waiting, shape = train.waiting, train.cores.shape
        if waiting is None:
            return False
        at = 0
        for core, (touched, grads) in enumerate(zip(waiting.touched, waiting.grads, strict=True)):
            if core:
                size = shape.row_factors[core] * grads.shape[1]
                out[at:at + size].view(-1, grads.shape[1])[touched] = grads
                at += size
        if at < out.numel():
            slices = waiting.touched[0] + train.cores.place.first_slice
            out[at + slices] = waiting.grads[0].square().sum(1)
        return True

    def step_shared(self, block: int, shared: Tensor, step: StepParameters) -> None:
        """One step on all cores of a shard.

        Args:
            block: number of the shard.
            shared: the sum of what all ranks gave to `shared_gradients`.
            step: hyper-parameters.
        """
        train = self.trains[block]
        cores, shape = train.cores, train.cores.shape
        own = train.waiting
        if own is None:
            empty = shared.new_empty(0, cores.size(0)[1])
            own = CoreGradients((torch.empty(0, dtype=torch.int64, device=shared.device),),
                                (empty,))
        slices, first = own.touched[0], own.grads[0]
        if moves_every_slice(step):
            slices, first = all_slices(shape.row_factors[0], slices, first)
        touched, grads, at = [slices], [first], 0
        for core in range(1, len(shape.row_factors)):
            count, elements = cores.size(core)
            touched.append(torch.arange(count, device=shared.device))
            grads.append(shared[at:at + count * elements].view(-1, elements))
            at += count * elements
        squares = None
        if step.kind in ROW_WISE and at < shared.numel():
            width = cores.place.whole.column_factors[0] * shape.ranks[1]
            squares = shared[at + cores.place.first_slice + slices] / width
        cores.step(CoreGradients(tuple(touched), tuple(grads)), step, squares)
        train.waiting = None
        self._batch.forget()
        train.choose_hot_rows(self.clock.step)

    # ------------------------------------------------------------------ checkpoints
    def chunks(self, max_bytes: int) -> Iterator[TableChunk]:
        """One chunk per shard: its cores and their state."""
        for train in self.trains:
            yield save_train(train)

    def begin_load(self) -> None:
        """Clears the optimiser state."""
        self._batch.forget()
        for train in self.trains:
            train.collected = None
            train.clear_hot_rows()
            for core in range(len(train.cores.shape.row_factors)):
                state = train.cores.read_state(core)
                train.cores.write_state(core, torch.zeros_like(state))

    def load_chunk(self, chunk: TableChunk) -> None:
        """Takes what of the chunk lies in this storage's shards."""
        self._batch.forget()
        for train in self.trains:
            if train.local.table.name == chunk.table:
                load_train(train, chunk)

    def close(self) -> None:
        """Nothing: all is memory."""


def _job_chunks(jobs: Tensor, offsets: Tensor | None) -> Tensor:
    """The ids of pooling jobs as chunks of `unique_segments`, sorted by block."""
    chunks = []
    for block, _, _, bags, first, first_bag, length, *_ in jobs.tolist():
        start, count = first, bags * length
        if length < 0:
            assert offsets is not None
            start = int(offsets[first_bag])
            count = int(offsets[first_bag + bags]) - start
        chunks.append([block, start, count, 0, 0])
    return torch.tensor(sorted(chunks), dtype=torch.int64).reshape(-1, 5)
