"""Gradients on their way to the owner, and there: joined over backwards, merged per row."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from shardlab.comm import Work
from shardlab.ops.cells import select_columns
from shardlab.ops.rows import sum_rows
from shardlab.ops.unique import Uniques
from shardlab.sharded.cells import CellIndex
from shardlab.sharded.messages import Incoming


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
    steps = cells.cell_columns if step is None else torch.full_like(cells.cell_columns, step)
    return select_columns([cells.cell_blocks, incoming.starts, incoming.counts.view(-1), base,
                           steps], cells.merge_order)


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
    if not cells.any_pooled:
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
