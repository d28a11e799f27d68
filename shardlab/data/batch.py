"""What a reader yields: one rank's part of a global batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shardlab.jagged import KeyedJaggedTensor


@dataclass(frozen=True)
class Batch:
    """Samples of one step on one rank; B may be 0.

    Attributes:
        dense: [B, num_dense] float32.
        sparse: bags of every feature over the B samples.
        labels: [B] float32, 0 or 1.
        position: global row index behind this global batch; a reader that starts there
            continues the stream.
    """

    dense: Tensor
    sparse: KeyedJaggedTensor
    labels: Tensor
    position: int

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The same batch on another device."""
        return Batch(self.dense.to(device, non_blocking=non_blocking),
                     self.sparse.to(device, non_blocking),
                     self.labels.to(device, non_blocking=non_blocking), self.position)

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory, from where copies overlap with work."""
        return Batch(self.dense.pin_memory(), self.sparse.pin_memory(),
                     self.labels.pin_memory(), self.position)

    def record_stream(self, stream: torch.Stream) -> None:
        """Keeps the memory until ``stream`` has used it."""
        self.dense.record_stream(stream)
        self.labels.record_stream(stream)
        self.sparse.record_stream(stream)
