"""Where cores lie: all that are stepped alike in one memory, so that one call steps them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from shardlab.ops.blocks import Blocks, Encoding
from shardlab.ops.rows import update_rows
from shardlab.ops.step_parameters import StepParameters
from shardlab.ops.tensor_train import SliceGradients
from shardlab.ops.unique import Uniques
from shardlab.storage.levels import Clock
from shardlab.storage_bytes import payload_bytes
from shardlab.tiers import allocate

_FP32_BYTES = 4


@dataclass(frozen=True)
class CoreKind:
    """What the cores of a memory have in common.

    Attributes:
        dtype: of the cores.
        lr_multiple: their learning rate as a multiple of the rows'.
        is_shared: other ranks hold the same cores, and their gradients are waited for.
    """

    dtype: str
    lr_multiple: float
    is_shared: bool


@dataclass(frozen=True)
class CorePart:
    """One core of one shard.

    Attributes:
        owner: (number of the shard, number of the core).
        slices: of the core.
        elements: of a slice.
        encoding: how slices and their states are held.
    """

    owner: tuple[int, int]
    slices: int
    elements: int
    encoding: Encoding


class CoreMemory:
    """Cores, slice after slice, behind their optimiser state.

    Args:
        kind: what they have in common.
        parts: the cores; block b of the memory is part b.
        device: where they lie.
        clock: for the random bits of rounding.
    """

    def __init__(self, kind: CoreKind, parts: list[CorePart], device: torch.device,
                 clock: Clock) -> None:
        self.kind, self.owners, self._clock = kind, [part.owner for part in parts], clock
        table, offset = torch.zeros(len(parts), 6, dtype=torch.int64), 0
        for block, part in enumerate(parts):
            size, code = payload_bytes(kind.dtype, part.elements), part.encoding
            state = _FP32_BYTES * (code.element_states * part.elements + code.row_states)
            table[block] = torch.tensor([0, size, offset, state, part.elements, part.slices])
            offset += part.slices * state
        for block in range(len(parts)):  # behind the states, which are aligned that way
            table[block, 0] = offset
            offset += int(table[block, 1] * table[block, 5])
        self.data = allocate(offset, device)
        self.blocks = Blocks(table) if kind.dtype == "fp32" else \
            Blocks.build(table, [part.encoding for part in parts])
        self._starts = torch.arange(0)

    def step(self, grads: SliceGradients, first: int, step: StepParameters,
             row_squares: Tensor | None = None) -> None:
        """One optimiser step on slices.

        Args:
            grads: the memory's cores are [first, first + blocks) of them.
            first: see ``grads``.
            step: gradients are scaled and clipped already.
            row_squares: fp32 [slices]: mean square of every slice's gradient, -1 where the memory
                holds the whole slice; or None.
        """
        splits = grads.splits[first:first + len(self.owners) + 1]
        begin, end = splits[[0, -1]].tolist()
        if begin == end:
            return
        if self._starts.numel() < end - begin + 1 or self._starts.device != grads.ids.device:
            self._starts = torch.arange(2 * (end - begin) + 1, device=grads.ids.device)
        uniques = Uniques(grads.ids[begin:end], splits - begin if begin else splits,
                          self._starts[:end - begin + 1], grads.sources[begin:end])
        update_rows(self.data, self.blocks, uniques, None, grads.grads, replace(
            step, lr=step.lr * self.kind.lr_multiple, scale=1.0, clip_value=0.0,
            key=self._clock.key(0), rows=None), row_squares)
