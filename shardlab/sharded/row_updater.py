"""Gradients at the owner: merged per row over all ranks, clipped, and stepped exactly once."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from shardlab.comm import Groups, WireBytes, all_reduce_
from shardlab.ops.rows import sum_rows
from shardlab.ops.step_parameters import ROW_WISE, StepParameters
from shardlab.ops.unique import BOUNDS_CODE, Segments, unique_segments
from shardlab.sharded.gradients import MergedRows, PendingGradients, merge
from shardlab.sharded.hot_rows import HotRows
from shardlab.sharded.layout import Layout, column
from shardlab.sharded.row_squares import RowSquares
from shardlab.sharded.row_watch import RowWatch
from shardlab.sharded.shared_cores import SharedCores
from shardlab.specs import BoundsMode
from shardlab.storage import Storage


class RowMerge(Protocol):
    """Merges gradients with other replicas of these shards."""

    def merge(self, rows: MergedRows, wire: WireBytes) -> MergedRows:
        """What all replicas found, alike on each of them; counted in ``wire``."""


class RowUpdater:
    """Merges gradients of all shards of this rank by row and steps the rows.

    Steps 7 and 8 of docs/architecture.md, section 2.

    Args:
        layout: the compiled plan.
        storage: this rank's shards.
        groups: the ranks, for the norm of clipping.
        wire: counts the bytes.
        hot: the copies among the shards; None: there are none.
    """

    def __init__(self, layout: Layout, storage: Storage, groups: Groups,
                 wire: WireBytes, hot: HotRows | None = None) -> None:
        self.layout, self.storage, self.groups = layout, storage, groups
        self._hot, self._wire = hot, wire
        #: Merges gradients with other replicas of these shards; None: nobody does.
        self.replicas: RowMerge | None = None
        self._squares = RowSquares(layout, groups, wire)
        self._shared = SharedCores(layout, groups)
        #: Told which rows are about to change: what checkpoints and averages need.
        self.watches: list[RowWatch] = []
        rows = [local.shard.rows for local in layout.local_shards]
        errors = [BOUNDS_CODE[BoundsMode.ERROR]] * len(rows)
        self._segments = Segments(column(rows), column(errors))

    def merge_rows(self, pending: list[PendingGradients]) -> MergedRows:
        """Groups everything pending by row, of all replicas; entries of a row keep rank order.

        With hot rows every rank must call it, in the same order as other exchanges.
        """
        one = merge(pending)
        if self._hot is not None:
            one = self._hot.add_up(one, self._wire)
        uniques = one.rows
        if uniques is None:
            uniques = unique_segments(one.ids, one.chunks, self._segments, one.bags,
                                      positions=one.weights is not None)
        weights = None if one.weights is None else one.weights[uniques.positions]
        merged = MergedRows(uniques, weights, one.grads)
        if self.replicas is None:
            return merged
        return self.replicas.merge(merged, self._wire)

    def squared_norm(self, rows: MergedRows, scale: float) -> Tensor:
        """fp64 []: squared norm of all tables' summed, scaled gradients, over all ranks."""
        total = torch.zeros((), dtype=torch.float64, device=self.groups.device)
        for block, local in enumerate(self.layout.local_shards):
            if not local.replicated or self.groups.rank == 0:
                total += self._summed(rows, block, scale).double().square().sum()
        return all_reduce_(total, self.groups)

    def _summed(self, rows: MergedRows, block: int, scale: float) -> Tensor:
        """fp32 [rows of the block, columns]: summed and scaled gradients."""
        start, end = rows.uniques.splits[block:block + 2].tolist()
        columns = self.layout.local_shards[block].shard.columns
        summed = torch.empty(end - start, columns, device=self.groups.device)
        piece = torch.tensor([[start, end - start, columns, 0, 0, columns]])
        sum_rows(rows.grads, rows.uniques, rows.weights, piece, scale, summed.view(-1))
        return summed

    def update(self, rows: MergedRows, step: StepParameters) -> None:
        """One optimiser step on every row."""
        squares = None
        if step.kind in ROW_WISE and self._squares.needed:
            partial = {}
            for block in self._squares.blocks:
                summed = self._summed(rows, block, step.scale)
                if step.clip_value > 0:
                    summed.clamp_(-step.clip_value, step.clip_value)
                partial[block] = summed.square().sum(1)
            squares = self._squares.complete(rows.uniques, partial)
        for watch in tuple(self.watches):  # the thread that trains may end one meanwhile
            watch.before_update(rows.uniques)
        self.storage.update(rows.uniques, rows.weights, rows.grads, step, squares)
        if self._shared.needed:
            self._shared.step(self.storage, step)  # type: ignore[arg-type]
