"""Where the shards of an arena lie, and in what precision."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shardlab.codecs import CODECS
from shardlab.storage_bytes import payload_bytes

_FP32_BYTES = 4
#: Codec of every number.
NAMES = tuple(CODECS)


@dataclass(frozen=True)
class Encoding:
    """How one block holds its rows and their optimiser states.

    Attributes:
        codec: of the payload, a key of `shardlab.codecs.CODECS`.
        state_codec: of the state: fp32, fp16 or bf16.
        element_states: parts of a row's state with an element per column.
        row_states: elements of a row's state beside those, behind them.
        row_start, col_start: where the block lies in its table: random bits follow from that.
        table_key: `shardlab.codecs.table_key` of the table.
        stochastic: rounds stochastically, else to nearest.
    """

    codec: str = "fp32"
    state_codec: str = "fp32"
    element_states: int = 0
    row_states: int = 0
    row_start: int = 0
    col_start: int = 0
    table_key: int = 0
    stochastic: bool = True

    def numbers(self) -> list[int]:
        """The kernels' numbers, in their order."""
        return [CODECS[self.codec], CODECS[self.state_codec], self.element_states, self.row_states,
                self.row_start, self.col_start, self.table_key, int(self.stochastic)]

    @staticmethod
    def of(numbers: list[int]) -> Encoding:
        """The encoding that has these numbers."""
        codec, state_codec, elements, singles, row, column, key, stochastic = numbers
        return Encoding(NAMES[codec], NAMES[state_codec], elements, singles, row, column, key,
                        bool(stochastic))


@dataclass(frozen=True)
class Blocks:
    """Where the shards of an arena lie.

    Attributes:
        table: int64 [S, 6] on CPU: (row offset, row bytes, state offset, state bytes, columns,
            rows), offsets in bytes. Row i's payload lies at row offset + i * row bytes, its state
            at state offset + i * state bytes.
        encodings: int64 [S, 8] on CPU, `Encoding.numbers` of every block; None: all is fp32.
    """

    table: Tensor
    encodings: Tensor | None = None

    @staticmethod
    def build(table: Tensor, encodings: list[Encoding]) -> Blocks:
        """Blocks of these encodings."""
        numbers = torch.tensor([encoding.numbers() for encoding in encodings], dtype=torch.int64)
        return Blocks(table, numbers.view(-1, 8))

    def encoding(self, block: int) -> Encoding:
        """How a block holds its rows."""
        if self.encodings is not None:
            return Encoding.of(self.encodings[block].tolist())
        columns, states = int(self.table[block, 4]), int(self.table[block, 3]) // _FP32_BYTES
        return Encoding(element_states=states // columns, row_states=states % columns)

    def rows(self, arena: Tensor, block: int) -> Tensor:
        """The payloads of one fp32 block as an fp32 view [rows, columns]."""
        offset, row_bytes, _, _, _, rows = self.table[block].tolist()
        return _matrix(arena, offset, rows, row_bytes)

    def state(self, arena: Tensor, block: int) -> Tensor:
        """The states of one block as an fp32 view [rows, state_bytes / 4], where they are fp32."""
        _, _, offset, state_bytes, _, rows = self.table[block].tolist()
        return _matrix(arena, offset, rows, state_bytes)

    def payloads(self, arena: Tensor, block: int) -> Tensor:
        """The encoded payloads of one block: a uint8 view [rows, payload bytes]."""
        offset, step, _, _, columns, rows = self.table[block].tolist()
        width = payload_bytes(self.encoding(block).codec, columns)
        return arena.as_strided((rows, width), (step, 1), arena.storage_offset() + offset)

    def states(self, arena: Tensor, block: int) -> Tensor:
        """The encoded states of one block: a uint8 view [rows, bytes of a row's state]."""
        _, _, offset, step, columns, rows = self.table[block].tolist()
        encoding = self.encoding(block)
        elements = encoding.element_states * columns + encoding.row_states
        width = payload_bytes(encoding.state_codec, elements)
        return arena.as_strided((rows, width), (step, 1), arena.storage_offset() + offset)


def _matrix(arena: Tensor, offset: int, rows: int, row_bytes: int) -> Tensor:
    span = arena[offset:offset + rows * row_bytes]
    return span.view(torch.float32).view(rows, row_bytes // _FP32_BYTES)
