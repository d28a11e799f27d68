"""Gradients at the owner: merged per row over all ranks, clipped, and stepped exactly once."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from shardlab.comm import Groups, WireBytes, Work, all_reduce_
from shardlab.ops.rows import sum_rows
from shardlab.ops.step_parameters import ROW_WISE, StepParameters
from shardlab.ops.unique import BOUNDS_CODE, Segments, Uniques, unique_segments
from shardlab.sharded.cells import CellIndex
from shardlab.sharded.layout import Layout, column
from shardlab.sharded.messages import Incoming
from shardlab.sharded.row_squares import RowSquares
from shardlab.sharded.row_watch import RowWatch
from shardlab.sharded.shared_cores import SharedCores
from shardlab.specs import BoundsMode
from shardlab.storage import Storage

if TYPE_CHECKING:
    from shardlab.sharded.hot_rows import HotRows
    from shardlab.sharded.replicas import GradientSync


@dataclass(frozen=True)
class PendingGradients:
    """Gradient rows on their way to this owner.

    Attributes:
        ids: int64 [n]: row of its shard for every entry.
        chunks: int64 [C, 5] on CPU, as `unique_segments` takes them; segments are blocks.
        bags: int64 [n], or None.
        weights: fp32 [n], or None.
        grads: fp32, flat: what the chunks' source offsets point into, once ``work`` is done.
        work: the collective that fills ``grads``.
        rows: the entries by row, where the forward has found them already; or None.
        rest: gradients of the same backward's other rows, which may arrive later (`urgent`); None:
            these are all.
    """

    ids: Tensor
    chunks: Tensor
    bags: Tensor | None
    weights: Tensor | None
    grads: Tensor
    work: Work
    rows: Uniques | None = None
    rest: PendingGradients | None = None

    def parts(self) -> list[PendingGradients]:
        """These, and the rest."""
        return [replace(self, rest=None), *(() if self.rest is None else (self.rest,))]


def owner_chunks(cells: CellIndex, incoming: Incoming, base: Tensor, step: int | None) -> Tensor:
    """Chunks of everything asked, sorted by block, within a block by rank.

    Args:
        cells: the owner's cells.
        incoming: what was asked.
        base: int64, source offset of every cell's first gradient row.
        step: elements between gradient rows; None: the cell's columns.
    """
    counts = incoming.counts.reshape(-1)
    order, chunks = cells.merge_order, cells.merge_chunks.clone()
    chunks[:, 1] = (counts.cumsum(0) - counts)[order]
    chunks[:, 2] = counts[order]
    chunks[:, 3] = base[order]
    if step is not None:
        chunks[:, 4] = step
    return chunks


def bag_offsets(incoming: Incoming, starts: Tensor, slots: int) -> Tensor:
    """Positions where bags begin, cell by cell, size + 1 each.

    Args:
        incoming: what was asked.
        starts: int64 [ranks * slots] on CPU: first entry of every pooled cell.
        slots: pooled slots of this owner.
    """
    parts = []
    for rank, (size, length) in enumerate(zip(incoming.sizes, incoming.bag_lengths, strict=True)):
        if isinstance(length, int):
            length = torch.full((slots, size), length, device=incoming.ids.device)
        edges = torch.zeros(slots, size + 1, dtype=torch.int64, device=length.device)
        torch.cumsum(length, 1, out=edges[:, 1:])
        first = starts[rank * slots:(rank + 1) * slots].to(length.device)
        parts.append((edges + first[:, None]).view(-1))
    return torch.cat(parts)


def entry_bags(incoming: Incoming, cells: CellIndex) -> Tensor | None:
    """Sample of every entry; None when entry i of every cell is sample (or unique) i."""
    if not bool(cells.my_pooled.any()):
        return None
    if all(isinstance(length, int) and length == 1 for length in incoming.bag_lengths):
        return None
    device = incoming.ids.device
    parts = []
    for rank, (size, lengths) in enumerate(zip(incoming.sizes, incoming.bag_lengths, strict=True)):
        samples, pooled = torch.arange(size, device=device), 0
        for slot, count in zip(cells.mine, incoming.counts[rank].tolist(), strict=True):
            if slot.feature < 0:
                parts.append(torch.arange(count, device=device))
                continue
            length = lengths if isinstance(lengths, int) else lengths[pooled]
            parts.append(torch.repeat_interleave(samples, length))
            pooled += 1
    return torch.cat(parts)


def entry_weights(incoming: Incoming, cells: CellIndex) -> Tensor | None:
    """Per-sample weight of every entry; entries of ``rows`` cells are weighted at their source."""
    if all(weights is None for weights in incoming.weights):
        return None
    full = torch.ones(incoming.ids.numel(), device=incoming.ids.device)
    at = 0
    for weights, counts in zip(incoming.weights, incoming.counts.tolist(), strict=True):
        taken = 0
        for slot, count in zip(cells.mine, counts, strict=True):
            if slot.feature >= 0 and weights is not None:
                full[at:at + count] = weights[taken:taken + count]
                taken += count
            at += count
    return full


def merge(pending: list[PendingGradients]) -> PendingGradients:
    """Several backwards' gradients as one (gradient accumulation); waits for all of them."""
    for one in pending:
        one.work.wait()
    if len(pending) == 1:
        return pending[0]
    chunks, ids_before, grads_before = [], 0, 0
    for one in pending:
        shifted = one.chunks.clone()
        shifted[:, 1] += ids_before
        shifted[:, 3] += grads_before
        chunks.append(shifted)
        ids_before += one.ids.numel()
        grads_before += one.grads.numel()
    joined = torch.cat(chunks)
    joined = joined[torch.argsort(joined[:, 0], stable=True)]
    bags = weights = None
    if any(one.bags is not None for one in pending):
        bags = torch.cat([_entries_as_bags(one) if one.bags is None else one.bags
                          for one in pending])
    if any(one.weights is not None for one in pending):
        weights = torch.cat([torch.ones_like(one.ids, dtype=torch.float32)
                             if one.weights is None else one.weights for one in pending])
    return PendingGradients(torch.cat([one.ids for one in pending]), joined, bags, weights,
                            torch.cat([one.grads for one in pending]), Work())


def _entries_as_bags(one: PendingGradients) -> Tensor:
    bags = torch.empty_like(one.ids)
    for _, start, count, _, _ in one.chunks.tolist():
        bags[start:start + count] = torch.arange(count, device=bags.device)
    return bags


class RowUpdater:
    """Steps 7 and 8 for all shards of this rank.

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
        self.replicas: GradientSync | None = None
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


@dataclass(frozen=True)
class MergedRows:
    """Every row that got gradients, with its entries."""

    uniques: Uniques
    weights: Tensor | None
    grads: Tensor

    def summed(self, columns: Tensor) -> Tensor:
        """fp32, flat: every row's summed gradient, block by block.

        Args:
            columns: int64 [blocks] on CPU.
        """
        splits = self.uniques.splits
        counts, zeros = splits.diff(), torch.zeros_like(columns)
        ends = (counts * columns).cumsum(0)
        out = torch.empty(int(ends[-1]) if len(ends) else 0, device=self.grads.device)
        pieces = torch.stack([splits[:-1], counts, columns, zeros, ends - counts * columns,
                              columns], 1)
        sum_rows(self.grads, self.uniques, self.weights, pieces, 1.0, out)
        return out
