"""Numbers of chunk stores: utilities and cells of sketches as bits, hashes of rows, sizes."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from shardlab.codecs import mixed, row_words, shift_right
from shardlab.ops.chunk_index import StoreShape
from shardlab.ops.chunk_marks import MARK

#: Bins of utilities: bin c begins at `bin_edges()[c]`.
BINS = 256
#: A cell of a sketch counts the fp32 with bits (cell + bias) << shift; 0 counts nothing.
CELL_SHIFT, CELL_BIAS = 21, 316
#: The least utility that a cell counts; below it chunks that nobody asked for differ by chance.
LEAST_UTILITY = 2.0 ** -48
#: Rows from which a chunk that is replaced is chosen.
DRAWN = 8
#: Offers that what was drawn is held against, before other rows are drawn.
HELD_AGAINST = 8
#: The array may grow beyond what its rows need, where a run of slots reaches its end.
SPARE = 2
#: Rows of keys of 64 bits lie below the number of their block.
TAG_SHIFT = 44
_NARROW = (1 << 32) - 1


def bin_edges() -> Tensor:
    """fp64 [BINS + 1]: where bins of utilities begin: 0, then four to an octave from 2^-48 on."""
    codes = torch.arange(BINS, dtype=torch.int32) + CELL_BIAS
    edges = (codes << CELL_SHIFT).view(torch.float32).double()
    edges[0] = 0.0
    return torch.cat([edges, torch.tensor([2.0 ** 16], dtype=torch.float64)])


def max_slots(shape: StoreShape) -> int:
    """Most slots that a store may have."""
    return SPARE * shape.layout.fitting_slots(shape.max_rows)


def spread_ids(ids: Tensor, rows: int) -> Tensor:
    """Rows of an unbounded table, int64 in [0, rows), of any int64 ids; rows is 2^63 - 1."""
    found = mixed(ids) & rows
    return torch.where(found == rows, 0, found)


def mixed32(x: Tensor) -> Tensor:
    """A mixer of 32 bits (`csrc/chunk_slots.h`) of int64 in [0, 2^32), a bijection."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _NARROW
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _NARROW
    return x ^ (x >> 16)


def counting_rows(block: Tensor, key: int, rows: Tensor, share: Tensor) -> Tensor:
    """bool [n]: whether absent chunks of rows count in a step of which a share of the rows does.

    Args:
        block: int64 [7], of `ChunkIndex.blocks`.
        key: of the step.
        rows: int64 [n] on CPU, of the block.
        share: fp32 scalar.
    """
    _, row_start, _, table_chunks, table_key, *_ = block.tolist()
    words = row_words(key ^ table_key, (rows + row_start) * table_chunks)
    return (shift_right(words, 40).float() * 2.0 ** -24 < share) | (share >= 1)


def _bits(x: np.float32) -> int:
    return int(np.float32(x).view(np.uint32))


def utility_value(code: int) -> np.float32:
    """A utility from the bits of bf16, and a mark."""
    return np.uint32((code & (MARK - 1)) << 16).view(np.float32)


def utility_code(utility: np.float32, word: int) -> int:
    """The bits of bf16 for a utility, rounded stochastically with 16 random bits."""
    return ((_bits(utility) + (word & 0xFFFF)) & 0xFFFFFFFF) >> 16


def cell_value(code: int) -> np.float32:
    """What a cell of the sketch counts."""
    return np.uint32((code + CELL_BIAS) << CELL_SHIFT if code else 0).view(np.float32)


def cell_code(utility: np.float32, random: int) -> int:
    """The cell for a utility, rounded down, or stochastically with 21 random bits."""
    return min(max(((_bits(utility) + random) >> CELL_SHIFT) - CELL_BIAS, 0), BINS - 1)
