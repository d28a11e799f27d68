"""What a decision does to utilities and sketches, told from what they were: a function, no index.

The index decides in place (`ChunkIndex.decide`). The same from outside takes the decisions again
on rows of an old checkpoint: utilities decay, rounded by random bits that follow from the chunk's
place in its table, and chunks below the threshold go.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shardlab.codecs import row_words, shift_right
from shardlab.ops.chunk_numbers import BINS, CELL_BIAS, CELL_SHIFT, LEAST_UTILITY
from shardlab.ops.registry import address, face_of, native

#: Cells of a sketch at a time, so that what is reckoned in between stays small.
_PIECE = 1 << 20
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


@dataclass(frozen=True)
class Decisions:
    """Decisions in their order.

    Attributes:
        decays: fp32 [d] on CPU.
        thresholds: fp32 [d] on CPU, of one shard.
        keys: int64 [d] on CPU, of the random bits.
    """

    decays: Tensor
    thresholds: Tensor
    keys: Tensor

    def addresses(self) -> tuple[int, int, int, int]:
        """What native functions take."""
        return (address(self.decays), address(self.thresholds), address(self.keys),
                self.keys.numel())


def redecide(codes: Tensor, rows: Tensor, grid: ChunkGrid, decisions: Decisions) -> Tensor:
    """Utilities after decisions.

    Args:
        codes: int16 [n, chunks] on CPU: bits of bf16, -1 for absent chunks.
        rows: int64 [n] on CPU, of the table.
        grid: which chunks of the rows.
        decisions: to take.

    Returns:
        int16 [n, chunks]: -1 where a chunk is absent, or went.
    """
    if face_of("redecide", "cpu") == "native":
        codes, rows = codes.clone(memory_format=torch.contiguous_format), rows.contiguous()
        native().chunk_redecide(  # type: ignore[union-attr]
            decisions.addresses(), [grid.first, grid.of_row, grid.key], address(rows),
            rows.numel(), codes.shape[1], address(codes), torch.get_num_threads())
        return codes
    for decay, threshold, key in zip(decisions.decays, decisions.thresholds,
                                     decisions.keys.tolist(), strict=True):
        codes = _decide(codes, rows, grid, (decay, threshold, key))
    return codes


def redecay(cells: Tensor, decisions: Decisions) -> Tensor:
    """Cells of a sketch after decisions, but for what these evict.

    Args:
        cells: uint8 [n] on CPU, all of a store.
        decisions: to take.
    """
    if face_of("redecide", "cpu") == "native":
        cells = cells.clone()
        native().chunk_redecay(decisions.addresses(), cells.numel(),  # type: ignore[union-attr]
                               address(cells), torch.get_num_threads())
        return cells
    for decay, key in zip(decisions.decays, decisions.keys.tolist(), strict=True):
        cells = _decay(cells, decay, key)
    return cells


def _decide(codes: Tensor, rows: Tensor, grid: ChunkGrid,
            decision: tuple[Tensor, Tensor, int]) -> Tensor:
    decay, threshold, key = decision
    chunks = torch.arange(codes.shape[1]) + grid.first
    at = rows[:, None] * grid.of_row + chunks
    value = (codes.int() << 16).view(torch.float32) * decay
    words = row_words(grid.key, at)
    rank = shift_right(words, _WORD_BITS - _RANK_BITS).float() * 2.0 ** -_RANK_BITS
    stays = (codes >= 0) & (torch.maximum(value, rank * LEAST_UTILITY) >= threshold)
    random = (row_words(key ^ grid.key, at) & _LOW).int()
    code = ((value.view(torch.int32) + random) >> 16).to(torch.int16)
    return torch.where(stays, code, -1).to(torch.int16)


def _decay(cells: Tensor, decay: Tensor, key: int) -> Tensor:
    found = torch.zeros_like(cells)
    for first in range(0, cells.numel(), _PIECE):
        at = cells[first:first + _PIECE].nonzero()[:, 0] + first
        random = (row_words(key, at) >> 16).int() & ((1 << CELL_SHIFT) - 1)
        value = ((cells[at].int() + CELL_BIAS) << CELL_SHIFT).view(torch.float32) * decay
        code = ((value.view(torch.int32) + random) >> CELL_SHIFT) - CELL_BIAS
        found[at] = code.clamp_(0, BINS - 1).to(torch.uint8)
    return found
