"""What an index of chunks tells of its rows: which changed, and what lost chunks, as it was."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from shardlab.chunk_layout import value_bytes
from shardlab.ops.registry import address

#: Bit of a utility that marks its row as changed; see `ChunkIndex.clear_marks`.
MARK = 1 << 15
_NUMBERS = 3  # of a row in the log, before its value


class Marks(IntEnum):
    """Which rows `ChunkIndex.list_between` lists."""

    ANY = 0
    SET = 1
    CLEAR = 2


@dataclass(frozen=True)
class RowRange:
    """Rows to list.

    Attributes:
        low, high: rows [low, high).
        block: of this shard; -1: of all.
        slice, slices: those in a part of the index, so that nobody is kept from it for long.
        marks: those that changed, or did not.
    """

    low: int = 0
    high: int = (1 << 63) - 1
    block: int = -1
    slice: int = 0
    slices: int = 1
    marks: Marks = Marks.ANY


@dataclass(frozen=True)
class Losses:
    """Rows that lost chunks, as they were; a row may come more than once, the oldest first.

    Attributes:
        blocks, rows: int64 [n].
        left: int64 [n]: chunks that the row kept.
        places: int32 [n, most chunks], -1 where absent.
        utilities: int16 [n, most chunks]: bits of bf16, with marks.
    """

    blocks: Tensor
    rows: Tensor
    left: Tensor
    places: Tensor
    utilities: Tensor


class LossLog:
    """Where the native index notes rows that lose chunks: (block, row, chunks left, value).

    Args:
        chunks: of a row, by block.
    """

    def __init__(self, chunks: Sequence[int]) -> None:
        self._chunks, self._most = list(chunks), max(chunks, default=1)
        self._words = _NUMBERS + -(-value_bytes(self._most) // 8)
        self._found: list[Tensor] = []
        self._count = torch.zeros(1, dtype=torch.int64)
        self._log = torch.empty(0, self._words, dtype=torch.int64)

    def room(self, rows: int) -> tuple[int, int, int]:
        """What a native function takes that notes ``rows`` at most; 0: it notes nothing."""
        if not rows:
            return 0, self._words, 0
        self._log = torch.empty(rows, self._words, dtype=torch.int64)
        return address(self._log), self._words, address(self._count)

    def keep(self) -> None:
        """Takes what was noted."""
        if count := int(self._count):
            self._found.append(self._log[:count].clone())
            self._count.zero_()

    def take(self) -> Losses:
        """All since the last call."""
        log = torch.cat([torch.empty(0, self._words, dtype=torch.int64), *self._found])
        self._found.clear()
        values = log[:, _NUMBERS:].contiguous().view(torch.uint8)
        places = torch.full((len(log), self._most), -1, dtype=torch.int32)
        utilities = torch.zeros(len(log), self._most, dtype=torch.int16)
        chunks = torch.tensor(self._chunks)[log[:, 0]]
        for count in set(chunks.tolist()):
            some, places_end, end = (chunks == count).nonzero()[:, 0], 4 * count, 6 * count
            mine = values[some]
            places[some, :count] = mine[:, :places_end].contiguous().view(torch.int32)
            utilities[some, :count] = mine[:, places_end:end].contiguous().view(torch.int16)
        return Losses(log[:, 0].clone(), log[:, 1].clone(), log[:, 2].clone(), places, utilities)
