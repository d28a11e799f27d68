"""Rows and states of encoded blocks as fp32, in plain torch: what the references read and write."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shardlab.codecs import PART_BITS, decode, encode, row_words
from shardlab.ops.blocks import Blocks, Encoding


@dataclass(frozen=True)
class Records:
    """Records of one block.

    Attributes:
        arena: uint8.
        blocks: where the shards lie.
        block: number of the block.
        places: int64 [n] in the arena's device: numbers of the rows in the block.
    """

    arena: Tensor
    blocks: Blocks
    block: int
    places: Tensor

    @property
    def encoding(self) -> Encoding:
        """How the block holds its rows."""
        return self.blocks.encoding(self.block)

    @property
    def columns(self) -> int:
        """Columns of the block."""
        return int(self.blocks.table[self.block, 4])

    def words(self, key: int, rows: Tensor | None) -> Tensor | None:
        """Row words of the random bits; None where the block rounds to nearest.

        Args:
            key: of the seed and the step.
            rows: int64 [n], rows of the whole table; None: the block's first row + place.
        """
        encoding = self.encoding
        if not encoding.stochastic:
            return None
        number = self.places + encoding.row_start if rows is None else rows
        return row_words(key ^ encoding.table_key, number)

    def read_rows(self) -> Tensor:
        """fp32 [n, columns]."""
        # On bytes, twenty times as fast as indexing.
        payloads = self.blocks.payloads(self.arena, self.block).index_select(0, self.places)
        return decode(payloads, self.encoding.codec, self.columns)

    def read_states(self) -> Tensor:
        """fp32 [n, elements of a row's state]."""
        encoding = self.encoding
        elements = encoding.element_states * self.columns + encoding.row_states
        states = self.blocks.states(self.arena, self.block).index_select(0, self.places)
        return decode(states, encoding.state_codec, elements)

    def write_rows(self, values: Tensor, words: Tensor | None) -> None:
        """Encodes fp32 [n, columns] into the payloads."""
        encoding = self.encoding
        payloads = self.blocks.payloads(self.arena, self.block)
        payloads[self.places] = encode(values, encoding.codec, words, encoding.col_start)

    def write_states(self, values: Tensor, words: Tensor | None) -> None:
        """Encodes fp32 [n, elements] into the states, each part with counters of its own."""
        encoding, columns, parts = self.encoding, self.columns, []
        for part in range(encoding.element_states):
            first = ((part + 1) << PART_BITS) + encoding.col_start
            parts.append(encode(values[:, part * columns:(part + 1) * columns],
                                encoding.state_codec, words, first))
        if encoding.row_states:  # a row's single elements have no column
            first = (encoding.element_states + 1) << PART_BITS
            parts.append(encode(values[:, encoding.element_states * columns:],
                                encoding.state_codec, words, first))
        if parts:
            self.blocks.states(self.arena, self.block)[self.places] = torch.cat(parts, 1)


@dataclass(frozen=True)
class MoveEnd:
    """One end of a move.

    Attributes:
        arena: uint8.
        blocks: where its shards lie, with encodings.
        places: int64 [n]: number in its block of every record that moves.
    """

    arena: Tensor
    blocks: Blocks
    places: Tensor

    def part(self, block: int, start: int, count: int) -> Records:
        """Some records of one block."""
        return Records(self.arena, self.blocks, block, self.places[start:start + count])
