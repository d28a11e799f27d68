"""Initial weights that depend on (seed, table, row, column) alone. Source: own; generator
splitmix64 (Steele et al. 2014) on a counter."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shardlab.codecs import GOLDEN, mix64, mixed, shift_right, signed
from shardlab.ops.registry import address, face_of, native
from shardlab.specs import EmbeddingBagConfig
from shardlab.table_plan import Shard


def table_seed(seed: int, table: str) -> int:
    """First counter of a table's stream: tables of any name start far apart."""
    return mix64(seed * 0x100000001 + zlib.crc32(table.encode()) + GOLDEN)


def init_uniform(rows: Tensor, table: EmbeddingBagConfig, shard: Shard, seed: int) -> None:
    """Writes a shard's part of the table's initial weights.

    Args:
        rows: fp32 [shard.rows, shard.columns], written in place.
        table: the table; its `init_range` bounds the weights.
        shard: which rectangle of the table this is.
        seed: of the run.
    """
    low, high = table.init_range
    start = table_seed(seed, table.name)
    if face_of("init_uniform", rows.device.type) == "native":
        native().init_uniform(  # type: ignore[union-attr]
            address(rows), rows.stride(0) * rows.element_size(), shard.rows,
            shard.columns, start, shard.row_start, shard.col_start, table.embedding_dim, low, high,
            torch.get_num_threads())
        return
    init_uniform_reference(rows, table, shard, seed)


def init_uniform_reference(rows: Tensor, table: EmbeddingBagConfig, shard: Shard,
                           seed: int) -> None:
    """Plain-torch face of `init_uniform`, a million elements at a time."""
    low, high = (torch.tensor(x, dtype=torch.float32) for x in table.init_range)
    start = signed(table_seed(seed, table.name))
    columns = shard.col_start + torch.arange(shard.columns)
    step = max(1, 1_000_000 // shard.columns)
    for first in range(0, shard.rows, step):
        number = torch.arange(first, min(first + step, shard.rows)) + shard.row_start
        counter = start + number[:, None] * table.embedding_dim + columns
        rows[first:first + number.numel()] = _weights(counter, low, high).to(rows.device)


@dataclass(frozen=True)
class InitStreams:
    """Where the initial weights of some tables come from.

    Attributes:
        seeds: int64 [T] on CPU: `table_seed`, as its bits.
        bounds: fp32 [T, 2] on CPU: `EmbeddingBagConfig.init_range`.
    """

    seeds: Tensor
    bounds: Tensor

    @classmethod
    def of(cls, tables: Sequence[EmbeddingBagConfig], seed: int) -> InitStreams:
        """Those of ``tables`` in a run with a seed."""
        return cls(torch.tensor([signed(table_seed(seed, table.name)) for table in tables],
                                dtype=torch.int64),
                   torch.tensor([table.init_range for table in tables],
                                dtype=torch.float32).view(-1, 2))


def init_pieces(values: Tensor, numbers: Tensor, tables: Tensor, streams: InitStreams) -> None:
    """Writes the initial weights of scattered pieces of rows.

    Args:
        values: fp32 [n, c] on CPU, contiguous, written in place.
        numbers: int64 [n]: pieces, counted over the rows of their whole tables, whose columns are
            a multiple of c.
        tables: int64 [n]: number in ``streams`` of the table of every piece.
        streams: of the tables.
    """
    if face_of("init_pieces", values.device.type) == "native":
        native().init_pieces(  # type: ignore[union-attr]
            address(values), *values.shape, address(numbers), address(tables),
            address(streams.seeds), address(streams.bounds), torch.get_num_threads())
        return
    columns = values.shape[1]
    counter = (streams.seeds[tables] + numbers * columns)[:, None] + torch.arange(columns)
    low, high = streams.bounds[tables, :, None].unbind(1)
    values.copy_(_weights(counter, low, high))


def _weights(counter: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """fp32 weights of a stream; the top 24 bits fill a float's fraction."""
    bits = mixed(counter + signed(GOLDEN))
    return low + (high - low) * (shift_right(bits, 40).float() * 2.0**-24)


def unit_uniform(start: int, counter: Tensor) -> Tensor:
    """fp64 in (0, 1), a multiple of 2^-53 plus half of one, for every counter of a stream.

    Args:
        start: first counter of the stream, of `table_seed`.
        counter: int64.
    """
    bits = mixed(signed(start) + counter + signed(GOLDEN))
    return (shift_right(bits, 11).double() + 0.5) * 2.0**-53
