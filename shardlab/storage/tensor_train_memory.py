"""Where cores lie: all that are stepped alike in one memory, so that one call steps them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from shardlab.ops.blocks import Blocks, Encoding
from shardlab.ops.step_parameters import StepParameters
from shardlab.ops.tensor_train_batch import CoreSlices, step_slices
from shardlab.ops.tensor_train_types import SliceGradients
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
        self.kind, self._clock = kind, clock
        table, offset = torch.zeros(len(parts), 6, dtype=torch.int64), 0
        for block, part in enumerate(parts):
            size, code = payload_bytes(kind.dtype, part.elements), part.encoding
            state = _FP32_BYTES * (code.element_states * part.elements + code.row_states)
            table[block] = torch.tensor([0, size, offset, state, part.elements, part.slices])
            offset += part.slices * state
        for block in range(len(parts)):  # behind the states, which are aligned that way
            table[block, 0] = offset
            offset += int(table[block, 1] * table[block, 5])
        blocks = Blocks(table) if kind.dtype == "fp32" else \
            Blocks.build(table, [part.encoding for part in parts])
        self.slices = CoreSlices(allocate(offset, device), blocks,
                                 [part.owner for part in parts], kind.lr_multiple)

    @property
    def data(self) -> Tensor:
        """uint8: states and slices."""
        return self.slices.arena

    @property
    def blocks(self) -> Blocks:
        """Where each core lies in ``data``."""
        return self.slices.blocks

    @property
    def owners(self) -> list[tuple[int, int]]:
        """(number of the shard, number of the core) of every block."""
        return self.slices.owners

    def step(self, grads: SliceGradients, step: StepParameters, row_squares: Tensor | None) -> None:
        """One optimiser step on slices (`shardlab.ops.tensor_train_batch.step_slices`)."""
        step_slices(self.slices, grads, 0, replace(step, key=self._clock.key(0)), row_squares)
