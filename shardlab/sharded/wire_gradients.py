"""Step 6: gradients summed per unique id, scaled, encoded and sent; decoded where they arrive."""

from __future__ import annotations

import torch
from torch import Tensor

from shardlab.comm import Groups, Work
from shardlab.comm.wire import Then, gradient_key, gradient_scale
from shardlab.ops.rows import pool_rows, sum_rows
from shardlab.ops.unique import pack_ids
from shardlab.sharded.cells import Buffer, CellIndex
from shardlab.sharded.error_feedback import ErrorFeedback
from shardlab.sharded.layout import Layout, bag_slots, column
from shardlab.sharded.routes import Outgoing
from shardlab.sharded.wire_watch import BACKWARD, WireWatch

_FP32_BYTES = 4


class GradientSender:
    """Both ends of the gradients' wire.

    Args:
        layout: the compiled plan.
        cells: where cells lie.
        groups: the ranks.
        seed: of the run, for random bits.
        watch: samples errors.
    """

    def __init__(self, layout: Layout, cells: CellIndex, groups: Groups, seed: int,
                 watch: WireWatch) -> None:
        self.layout, self._cells, self._rank, self._seed = layout, cells, groups.job_rank, seed
        self.watch = watch
        self.feedback = ErrorFeedback(layout, groups.device)
        #: Optimiser steps taken, and backwards since: they address random bits.
        self.step, self._backwards = 0, 0
        every = [i for i, slot in enumerate(layout.slots) if slot.feature < 0]
        self._rows_slots = column(every)
        self._rows_shift = column([layout.slots[i].shard.col_start for i in every])
        bags = bag_slots(layout)
        self._bag_slots = column([i for i, _ in bags])
        self._bag_columns = column([layout.first_column(slot) for _, slot in bags])
        self._in_order = torch.arange(len(layout.slots))

    def begin_step(self, step: int) -> None:
        """Tells how many optimiser steps were taken."""
        self.step, self._backwards = step, 0

    def encode(self, outgoing: Outgoing, place: Buffer, grad: Tensor) -> Tensor:
        """This rank's gradients, summed per slot and encoded: uint8 [place.total].

        Args:
            outgoing: what was asked.
            place: of the gradients' buffer.
            grad: fp32 [size, total columns].
        """
        buffer = torch.empty(place.total, dtype=torch.uint8, device=grad.device)
        codec = self._cells.backward_slots
        if codec.is_plain:
            start, sums = place.slot_offsets // _FP32_BYTES, buffer.view(torch.float32)
            self._sum(outgoing, start, grad, 1.0, sums)
            self._look(sums, start, place)
            return buffer
        rows = self._table_rows(outgoing, place)
        rests = self.feedback.take(rows, place.slot_vectors) if self.feedback.wanted else {}
        scale = 1.0
        if place.slot_heads:
            assert self._cells.scale_limit is not None
            scale = gradient_scale(grad, _most(outgoing), self._cells.scale_limit,
                                   beside=[*rests.values()])
            heads = column(place.slot_heads) // _FP32_BYTES
            buffer.view(torch.float32)[heads.to(grad.device)] = 1.0 / scale
        elements = place.slot_vectors * codec.columns
        start = elements.cumsum(0) - elements
        sums = torch.empty(int(elements.sum()), device=grad.device)
        self._sum(outgoing, start, grad, scale, sums)
        self._add(sums, rests, start, scale)
        self._look(sums, start, place)
        key = gradient_key(self._seed, self.step, self._rank, self._backwards)
        self._backwards += 1
        codec.encode(sums, start, place.slot_vectors, (buffer, place.slot_offsets),
                     (key, rows))
        if rests:
            sent = torch.empty_like(sums)
            codec.decode(buffer, place.slot_offsets, place.slot_vectors, sent, start)
            left = (sums - sent) / scale
            self.feedback.keep(rows, place.slot_vectors, {
                i: left[first:first + rest.numel()].view_as(rest)
                for (i, rest), first in zip(rests.items(), start[[*rests]].tolist(), strict=True)})
        return buffer

    @staticmethod
    def _add(sums: Tensor, rests: dict[int, Tensor], start: Tensor, scale: float) -> None:
        for i, rest in rests.items():
            first = int(start[i])
            sums[first:first + rest.numel()] += (rest * scale).view(-1)

    def _look(self, sums: Tensor, start: Tensor, place: Buffer) -> None:
        if self.watch.due:
            self.watch.look(BACKWARD, self._cells.sent_gradients, sums, start,
                             place.slot_vectors)

    def receive(self, buffer: Tensor, place: Buffer,
                work: Work) -> tuple[Tensor, Tensor, Work]:
        """What the owner will find once the collective is done.

        Args:
            buffer: of `encode`; ``work`` fills its middle.
            place: of the buffer.
            work: the collective.

        Returns:
            fp32 gradients, flat; int64 [cells]: element where every cell begins; what to wait for.
        """
        codec = self._cells.backward_cells
        if codec.is_plain:
            return buffer.view(torch.float32), place.cell_offsets // _FP32_BYTES, work
        elements = place.cell_vectors * codec.columns
        start = elements.cumsum(0) - elements
        grads = torch.empty(int(elements.sum()), device=buffer.device)

        def decode() -> None:
            codec.decode(buffer, place.cell_offsets, place.cell_vectors, grads, start)
            self._unscale(buffer, place, grads, elements)

        return grads, start, Then(work, decode)

    @staticmethod
    def _unscale(buffer: Tensor, place: Buffer, grads: Tensor, elements: Tensor) -> None:
        if not place.cell_heads:
            return
        scales = buffer.view(torch.float32)[column(place.cell_heads).to(buffer.device)
                                            // _FP32_BYTES]
        parts = elements.view(len(place.cell_heads), -1).sum(1).tolist()
        for part, scale in zip(grads.split(parts), scales, strict=True):
            part *= scale

    def _table_rows(self, outgoing: Outgoing, place: Buffer) -> Tensor:
        """int64, slot by slot: row of the table of every gradient, or its sample."""
        device = outgoing.ids.device
        samples = torch.arange(outgoing.batch.size, device=device)
        unique = samples if outgoing.uniques is None else \
            torch.cat([outgoing.uniques.ids, samples])
        first = unique.numel() - samples.numel()
        counts = place.slot_vectors
        starts = torch.where(self._cells.pooled, first, outgoing.starts)
        pieces = torch.stack([starts, counts, torch.zeros_like(counts),
                              counts.cumsum(0) - counts], 1)
        return pack_ids(unique, pieces, torch.int64)

    def _sum(self, outgoing: Outgoing, start: Tensor, grad: Tensor, scale: float,
             out: Tensor) -> None:
        """Sums per unique id, and copies of bags' gradients, to the slots' first elements."""
        batch, uniques = outgoing.batch, outgoing.uniques
        if uniques is not None:
            weights = None if batch.weights is None else batch.weights[uniques.positions]
            slots = self._rows_slots
            columns = self._cells.columns[slots]
            pieces = torch.stack([outgoing.starts[slots], outgoing.counts[slots], columns,
                                  self._rows_shift, start[slots], columns], 1)
            sum_rows(grad.view(-1), uniques, weights, pieces, scale, out)
        if len(self._bag_slots):
            slots = self._bag_slots
            columns = self._cells.columns[slots]
            jobs = torch.zeros(slots.numel(), 11, dtype=torch.int64)
            jobs[:, 0], jobs[:, 1], jobs[:, 2] = self._bag_columns, grad.shape[1], columns
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
