"""What a decision does to utilities and sketches, told from what they were: a function, no index.

The index decides in place (`ChunkIndex.decide`). The same from outside takes the decisions again
on rows of an old checkpoint: utilities decay, rounded by random bits that follow from the chunk's
place in its table, and chunks below the threshold go.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shardlab.ops.chunks import _CELL_BIAS, _CELL_SHIFT, BINS, mixed

#: Cells of a sketch at a time, so that what is reckoned in between stays small.
_PIECE = 1 << 20
_GOLDEN = -0x61C8864680B583EB
_LEAST_UTILITY = 2.0 ** -48
_WORD_BITS, _RANK_BITS, _LOW = 64, 24, (1 << 16) - 1


@dataclass(frozen=True)
class ChunkGrid:
    """Where chunks of some columns lie in their table, which random bits go by.

    Attributes:
        first: number of the first chunk of a row.
        of_row: chunks of a row of the table.
        key: of the table, `shardlab.codecs.table_key`.
    """

    first: int
    of_row: int
    key: int


def decide_utilities(codes: Tensor, rows: Tensor, grid: ChunkGrid, decay: Tensor, threshold: Tensor,
                     key: int) -> Tensor:
    """Utilities after a decision.

    Args:
        codes: int16 [n, chunks]: bits of bf16, -1 for absent chunks.
        rows: int64 [n], of the table.
        grid: which chunks of the rows.
        decay, threshold: fp32 [], of the decision.
        key: of its random bits.

    Returns:
        int16 [n, chunks]: -1 where a chunk is absent, or went.
    """
    chunks = torch.arange(codes.shape[1]) + grid.first
    at = (rows[:, None] * grid.of_row + chunks) * _GOLDEN
    value = (codes.int() << 16).view(torch.float32) * decay
    rank = _shifted(mixed(grid.key + at), _WORD_BITS - _RANK_BITS).float() * 2.0 ** -_RANK_BITS
    stays = (codes >= 0) & (torch.maximum(value, rank * _LEAST_UTILITY) >= threshold)
    random = (mixed((key ^ grid.key) + at) & _LOW).int()
    code = ((value.view(torch.int32) + random) >> 16).to(torch.int16)
    return torch.where(stays, code, -1).to(torch.int16)


def decay_sketch(cells: Tensor, decay: Tensor, key: int) -> Tensor:
    """Cells of a sketch after a decision.

    Args:
        cells: uint8 [n], all of a store.
        decay: fp32 [], of the decision.
        key: of its random bits.
    """
    found = torch.zeros_like(cells)
    for first in range(0, cells.numel(), _PIECE):
        at = cells[first:first + _PIECE].nonzero()[:, 0] + first
        random = (mixed(at * _GOLDEN + key) >> 16).int() & ((1 << _CELL_SHIFT) - 1)
        value = ((cells[at].int() + _CELL_BIAS) << _CELL_SHIFT).view(torch.float32) * decay
        code = ((value.view(torch.int32) + random) >> _CELL_SHIFT) - _CELL_BIAS
        found[at] = code.clamp_(0, BINS - 1).to(torch.uint8)
    return found


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Shifted right as unsigned numbers."""
    return (x >> bits) & ((1 << (_WORD_BITS - bits)) - 1)
