"""The worst relative error of what travels, measured on samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from shardlab.codecs import rounding_key
from shardlab.comm.wire import CellKind, gradient_scale
from shardlab.ops.codecs import decode_rows, encode_rows
from shardlab.ops.rounding import Rounding
from shardlab.storage_bytes import payload_bytes
from shardlab.wire_bytes import SCALED_GRADIENTS

#: Lookups between two that are sampled, and rows of a cell that are looked at.
EVERY, SAMPLE_ROWS = 100, 256
FORWARD, BACKWARD = "forward", "backward"


@dataclass
class WireWatch:
    """Largest relative error (L2 of a row) by direction, table and codec.

    Attributes:
        candidates: codecs that are tried on every sample; empty: the table's own.
        always: sample every lookup.
        errors: (direction, table, codec) -> largest error so far.
    """

    candidates: Sequence[str] = ()
    always: bool = False
    errors: dict[tuple[str, str, str], float] = field(default_factory=dict)
    _lookups: int = 0
    _due: bool = False

    @property
    def due(self) -> bool:
        """Whether the batch under way is sampled."""
        return self._due

    def next_batch(self) -> None:
        """Another batch is looked up."""
        self._due = self.always or self._lookups % EVERY == 0
        self._lookups += 1

    def look(self, direction: str, cells: Sequence[tuple[str, CellKind]], values: Tensor,
             start: Tensor, counts: Tensor) -> None:
        """Encodes and decodes the first rows of every cell.

        Args:
            direction: `FORWARD` or `BACKWARD`.
            cells: (table, kind) of every cell.
            values: fp32, flat.
            start, counts: int64 [cells] on CPU: first element and rows of every cell.
        """
        for (table, kind), first, count in zip(cells, start.tolist(), counts.tolist(),
                                               strict=True):
            if not count:
                continue
            size = min(count, SAMPLE_ROWS)
            rows = values[first:first + size * kind.columns].view(size, kind.columns)
            for codec in self.candidates or (kind.codec,):
                key = (direction, table, codec)
                error = relative_error(rows, codec, gradients=direction == BACKWARD,
                                       stochastic=kind.stochastic)
                self.errors[key] = max(self.errors.get(key, 0.0), error)


def relative_error(rows: Tensor, codec: str, *, gradients: bool, stochastic: bool) -> float:
    """Largest |decoded - row| / |row| (L2) of rows fp32 [n, c] that are not zero.

    Args:
        rows: what travels.
        codec: how.
        gradients: they are scaled first, as on the wire.
        stochastic: how they are rounded.
    """
    if codec == "fp32":
        return 0.0
    scale = 1.0
    if gradients and codec in SCALED_GRADIENTS:
        scale = gradient_scale(rows, 1.0, SCALED_GRADIENTS[codec])
    scaled = (rows * scale).contiguous()
    records = torch.empty(rows.shape[0], payload_bytes(codec, rows.shape[1]), dtype=torch.uint8,
                          device=rows.device)
    encode_rows(scaled, codec, records, Rounding(stochastic, rounding_key(0, 0)))
    back = torch.empty_like(scaled)
    decode_rows(records, codec, back)
    norms = scaled.norm(dim=1)
    errors = (back - scaled).norm(dim=1)[norms > 0] / norms[norms > 0]
    return float(errors.max()) if errors.numel() else 0.0
