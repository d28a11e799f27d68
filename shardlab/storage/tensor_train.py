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

import torch
from torch import Tensor

from shardlab.ops.blocks import Blocks
from shardlab.ops.cache import COUNTERS
from shardlab.ops.rows import ROW_WISE, StepParameters, pool_rows, sum_rows
from shardlab.ops.scatter import scatter_rows
from shardlab.ops.tensor_train import CoreGradients, Workspace
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
from shardlab.storage.tensor_train_files import load_train, save_train
from shardlab.storage.tensor_train_shard import TensorTrainShard, moves_every_slice
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
        self.trains = [TensorTrainShard(local, options, self.clock) for local in shards]
        limits = torch.tensor([local.shard.rows for local in shards], dtype=torch.int64)
        # Ids were checked; those that a bounds mode dropped are -1.
        modes = torch.full_like(limits, BOUNDS_CODE[BoundsMode.IGNORE])
        self._segments = Segments(limits, modes)
        self._workspace = Workspace()

    # ------------------------------------------------------------------ verbs
    def read(self, segments: Tensor, ids: Tensor, out: Tensor) -> None:
        """Computes rows into ``out`` (`ops.rows.gather_rows`), rows of several ranks once."""
        columns = torch.tensor([train.columns for train in self.trains], dtype=torch.int64)
        order = torch.argsort(segments[:, 0], stable=True)
        chunks = torch.cat([segments[order], columns[segments[order, 0], None]], 1)
        self.read_scattered(unique_segments(ids, chunks, self._segments), None, out)

    def read_scattered(self, uniques: Uniques, weights: Tensor | None, out: Tensor) -> None:
        """Copies every row to its entries' places (`ops.scatter.scatter_rows`)."""
        rows, starts = self._rows(uniques)
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
        rows, starts = self._rows(uniques)
        placed = jobs.jobs.clone()
        width = torch.tensor([train.columns for train in self.trains], dtype=torch.int64)
        base = torch.tensor(starts, dtype=torch.int64) - uniques.splits[:-1] * width
        placed[:, 0], placed[:, 1] = base[jobs.jobs[:, 0]], width[jobs.jobs[:, 0]]
        pool_rows(rows, placed, uniques.inverse, offsets, weights, out)

    def _rows(self, uniques: Uniques) -> tuple[Tensor, list[int]]:
        """Rows of all uniques behind each other, flat, and where each block's begin."""
        edges = uniques.splits.tolist()
        sizes = [(edges[block + 1] - edges[block]) * train.columns
                 for block, train in enumerate(self.trains)]
        flat = self._workspace.take("rows", sum(sizes),
                                    torch.empty(0, device=uniques.ids.device))
        starts, at = [], 0
        for block, (train, size) in enumerate(zip(self.trains, sizes, strict=True)):
            starts.append(at)
            if size:
                ids = uniques.ids[edges[block]:edges[block + 1]]
                train.rows(ids, flat[at:at + size].view(-1, train.columns))
            at += size
        return flat, starts

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
        for block, train in enumerate(self.trains):
            start, count = edges[block], edges[block + 1] - edges[block]
            if not count:
                continue
            summed = self._summed(uniques, weights, grads, (start, count, train.columns), step)
            uses = uniques.starts[start:start + count + 1].diff()
            squares = None if row_squares is None else row_squares[start:start + count]
            found = train.learn(uniques.ids[start:start + count], summed, uses, step, squares)
            if train.is_shared:
                train.waiting = found
            else:
                train.step(found, step)
                train.choose_hot_rows(self.clock.step)

    def _summed(self, uniques: Uniques, weights: Tensor | None, grads: Tensor,
                span: tuple[int, int, int], step: StepParameters) -> Tensor:
        """fp32 [n, columns]: summed, scaled and clipped gradients of a block's rows."""
        start, count, columns = span
        summed = self._workspace.take("summed", count * columns, grads)
        piece = torch.tensor([[start, count, columns, 0, 0, columns]])
        sum_rows(grads, uniques, weights, piece, step.scale, summed)
        if step.clip_value > 0:
            summed.clamp_(-step.clip_value, step.clip_value)
        return summed.view(count, columns)

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
            empty = shared.new_empty(0, int(cores.blocks.table[0, 4]))
            own = CoreGradients((torch.empty(0, dtype=torch.int64, device=shared.device),),
                                (empty,))
        first = CoreGradients(own.touched[:1], own.grads[:1])
        if moves_every_slice(step):
            first = cores.all_slices(first)
        touched, grads, at = list(first.touched), list(first.grads), 0
        for core in range(1, len(shape.row_factors)):
            elements = int(cores.blocks.table[core, 4])
            size = shape.row_factors[core] * elements
            touched.append(torch.arange(shape.row_factors[core], device=shared.device))
            grads.append(shared[at:at + size].view(-1, elements))
            at += size
        squares = None
        if step.kind in ROW_WISE and at < shared.numel():
            width = cores.place.whole.column_factors[0] * shape.ranks[1]
            squares = {0: shared[at + cores.place.first_slice + first.touched[0]] / width}
        cores.step(CoreGradients(tuple(touched), tuple(grads)), train.core_step(step),
                   range(len(grads)), squares)
        train.waiting = None
        train.forget_products()
        train.choose_hot_rows(self.clock.step)

    # ------------------------------------------------------------------ checkpoints
    def chunks(self, max_bytes: int) -> Iterator[TableChunk]:
        """One chunk per shard: its cores and their state."""
        for train in self.trains:
            yield save_train(train)

    def begin_load(self) -> None:
        """Clears the optimiser state."""
        for train in self.trains:
            train.collected = None
            train.clear_hot_rows()
            for core in range(len(train.cores.shape.row_factors)):
                state = train.cores.read_state(core)
                train.cores.write_state(core, torch.zeros_like(state))

    def load_chunk(self, chunk: TableChunk) -> None:
        """Takes what of the chunk lies in this storage's shards."""
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
