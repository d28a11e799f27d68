"""Step 6 at the source: gradients summed per unique id, bags' gradients as they are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from shardlab.comm.wire import gradient_bound
from shardlab.ops.cells import select_columns
from shardlab.ops.rows import pool_rows, sum_rows
from shardlab.ops.unique import pack_ids
from shardlab.sharded.cells import Buffer, CellIndex
from shardlab.sharded.hot_ids import HotIds
from shardlab.sharded.layout import Layout, bag_slots, column
from shardlab.sharded.routes import Outgoing


class SourceSlots:
    """What does not change about the slots of a source.

    Args:
        layout: the compiled plan.
        cells: its cells.
    """

    def __init__(self, layout: Layout, cells: CellIndex) -> None:
        self.cells, self.hot = cells, HotIds(layout)
        self.rows_slots = column([i for i, slot in enumerate(layout.slots) if slot.feature < 0])
        self.first_columns = column([slot.shard.col_start for slot in layout.slots])
        bags = bag_slots(layout)
        self.bag_slots = column([i for i, _ in bags])
        self.bag_columns = column([layout.first_column(slot) for _, slot in bags])


class SourceSums:
    """This rank's gradients: a `SlotSums`.

    Args:
        slots: of the layout.
        outgoing: what was asked.
        grad: fp32 [size, total columns].
    """

    def __init__(self, slots: SourceSlots, outgoing: Outgoing, grad: Tensor) -> None:
        self._slots, self._outgoing, self._grad = slots, outgoing, grad

    def largest(self, rests: Sequence[Tensor] = ()) -> float:
        """Bound of the magnitude of any sum, with these added to some."""
        return gradient_bound(self._grad, _most(self._outgoing), rests)

    def rows(self, place: Buffer) -> Tensor:
        """int64, slot by slot: row of the table of every gradient, or its sample."""
        outgoing = self._outgoing
        device = outgoing.ids.device
        samples = torch.arange(outgoing.batch.size, device=device)
        unique = samples if outgoing.uniques is None else \
            torch.cat([self._slots.hot.table_rows(outgoing.uniques), samples])
        first = unique.numel() - samples.numel()
        counts = place.slot_vectors
        starts = torch.where(self._slots.cells.pooled, first, outgoing.starts)
        pieces = torch.stack([starts, counts, torch.zeros_like(counts),
                              counts.cumsum(0) - counts], 1)
        return pack_ids(unique, pieces, torch.int64)

    def write(self, start: Tensor, scale: float, out: Tensor) -> None:
        """Sums per unique id, and copies of bags' gradients, to the slots' first elements."""
        outgoing, grad, cells = self._outgoing, self._grad, self._slots.cells
        batch, uniques = outgoing.batch, outgoing.uniques
        if uniques is not None:
            weights = None if batch.weights is None else batch.weights[uniques.positions]
            columns = cells.columns
            pieces = select_columns([outgoing.starts, outgoing.counts, columns,
                                     self._slots.first_columns, start, columns],
                                    self._slots.rows_slots)
            sum_rows(grad.view(-1), uniques, weights, pieces, scale, out)
        if len(self._slots.bag_slots):
            slots = self._slots.bag_slots
            columns = cells.columns[slots]
            jobs = torch.zeros(slots.numel(), 11, dtype=torch.int64)
            jobs[:, 0], jobs[:, 1], jobs[:, 2] = self._slots.bag_columns, grad.shape[1], columns
            jobs[:, 3], jobs[:, 6] = batch.size, 1
            jobs[:, 8], jobs[:, 9] = start[slots], columns
            source = grad if scale == 1.0 else grad * scale
            pool_rows(source.view(-1), jobs, torch.arange(batch.size, device=grad.device), None,
                      None, out)


def _most(outgoing: Outgoing) -> Tensor | float:
    """Bound of the sum of weights over the entries of any one row, at least 1."""
    uniques, weights = outgoing.uniques, outgoing.batch.weights
    if uniques is None or uniques.sources.numel() == 0:
        return 1.0
    most = uniques.starts.diff().max().clamp(min=1)
    return most if weights is None else most * weights.abs().max().clamp(min=1)
