"""Step 6: gradients summed per unique id, scaled, encoded and sent; decoded where they arrive."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from shardlab.comm import Work
from shardlab.comm.wire import Then, gradient_key, scale_for
from shardlab.sharded.cells import Buffer, CellIndex
from shardlab.sharded.error_feedback import ErrorFeedback
from shardlab.sharded.layout import Layout, column
from shardlab.sharded.wire_watch import BACKWARD, WireWatch

_FP32_BYTES = 4


class SlotSums(Protocol):
    """Gradients summed per slot."""

    def write(self, start: Tensor, scale: float, out: Tensor) -> None:
        """Writes the scaled sums.

        Args:
            start: int64 [slots] on CPU: element where a slot's first row begins, rows densely.
            scale: multiplies every sum.
            out: fp32, flat.
        """

    def rows(self, place: Buffer) -> Tensor:
        """int64, slot by slot: row of the table of every gradient, or its sample."""

    def largest(self, rests: Sequence[Tensor] = ()) -> float:
        """Bound of the magnitude of any sum, with these added to some."""


@dataclass(frozen=True)
class Part:
    """Some of the rows of every slot, in a message of their own.

    Attributes:
        buffer: uint8 [place.total].
        place: of the message.
        numbers: int64, slot by slot: number of every row among all of its slot's.
    """

    buffer: Tensor
    place: Buffer
    numbers: Tensor


class GradientSender:
    """Both ends of the gradients' wire.

    Args:
        layout: the compiled plan.
        cells: where cells lie.
        device: where gradients are.
        address: seed of the run and number of the sender: random bits follow from them.
        watch: samples errors.
    """

    def __init__(self, layout: Layout, cells: CellIndex, device: torch.device,
                 address: tuple[int, int], watch: WireWatch) -> None:
        self.layout, self._cells = layout, cells
        self._seed, self._rank = address
        self.watch = watch
        self.feedback = ErrorFeedback(layout, device)
        #: Optimiser steps taken, and backwards since: they address random bits.
        self.step, self._backwards = 0, 0

    def begin_step(self, step: int) -> None:
        """Tells how many optimiser steps were taken."""
        self.step, self._backwards = step, 0

    def encode(self, gradients: SlotSums, place: Buffer, buffer: Tensor) -> None:
        """Writes this rank's gradients, summed per slot and encoded.

        Args:
            gradients: the sums.
            place: of the gradients' buffer.
            buffer: uint8 [place.total].
        """
        device = buffer.device
        codec = self._cells.backward_slots
        if codec.is_plain:
            start, sums = place.slot_offsets // _FP32_BYTES, buffer.view(torch.float32)
            gradients.write(start, 1.0, sums)
            self._look(sums, start, place)
            return
        rows = gradients.rows(place)
        rests = self.feedback.take(rows, place.slot_vectors) if self.feedback.wanted else {}
        sums, start, scale = self._sums(gradients, place, rests, device)
        self._write_scale(buffer, place, scale)
        codec.encode(sums, start, place.slot_vectors, (buffer, place.slot_offsets),
                     (self._next_key(), rows))
        if rests:
            sent = torch.empty_like(sums)
            codec.decode(buffer, place.slot_offsets, place.slot_vectors, sent, start)
            left = (sums - sent) / scale
            self.feedback.keep(rows, place.slot_vectors, {
                i: left[first:first + rest.numel()].view_as(rest)
                for (i, rest), first in zip(rests.items(), start[[*rests]].tolist(), strict=True)})

    def encode_parts(self, gradients: SlotSums, whole: Buffer, parts: Sequence[Part]) -> None:
        """Writes this rank's gradients as several messages, with the bits that one would have.

        Args:
            gradients: the sums; nothing is fed back, and no bags are pooled at their owners.
            whole: place of all of them.
            parts: of the messages.
        """
        codec = self._cells.backward_slots
        device = parts[0].buffer.device
        sums, start, scale = self._sums(gradients, whole, {}, device)
        key, rows = (0, None) if codec.is_plain else (self._next_key(), gradients.rows(whole))
        first = whole.slot_vectors.cumsum(0) - whole.slot_vectors
        for part in parts:
            self._write_scale(part.buffer, part.place, scale)
            counts = part.place.slot_vectors
            if rows is not None:
                which = part.numbers + torch.repeat_interleave(first, counts).to(device)
                random = (key, rows[which])
            codec.encode(sums, start, counts, (part.buffer, part.place.slot_offsets),
                         (0, None) if rows is None else random,
                         (part.numbers, whole.slot_vectors))

    def _sums(self, gradients: SlotSums, place: Buffer, rests: dict[int, Tensor],
              device: torch.device) -> tuple[Tensor, Tensor, float]:
        """fp32 sums, scaled, slot by slot; the first element of every slot; and the scale."""
        scale = 1.0
        if place.slot_heads:
            assert self._cells.scale_limit is not None
            scale = scale_for(gradients.largest([*rests.values()]), self._cells.scale_limit)
        codec = self._cells.backward_slots
        elements = place.slot_vectors * codec.columns
        start = elements.cumsum(0) - elements
        sums = torch.empty(int(elements.sum()), device=device)
        gradients.write(start, scale, sums)
        if not place.slot_heads and not codec.is_plain:
            _show_infinities(sums)
        self._add(sums, rests, start, scale)
        self._look(sums, start, place)
        return sums, start, scale

    @staticmethod
    def _write_scale(buffer: Tensor, place: Buffer, scale: float) -> None:
        if place.slot_heads:
            heads = column(place.slot_heads) // _FP32_BYTES
            buffer.view(torch.float32)[heads.to(buffer.device)] = 1.0 / scale

    def _next_key(self) -> int:
        """Of the random bits of one backward."""
        key = gradient_key(self._seed, self.step, self._rank, self._backwards)
        self._backwards += 1
        return key

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


def _show_infinities(sums: Tensor) -> None:
    """Makes them NaN: bf16 has no scale that could tell, and rounds them to its largest number."""
    if sums.device.type != "cpu" or not math.isfinite(float(sums.sum())):
        sums.masked_fill_(sums.isinf(), math.nan)
