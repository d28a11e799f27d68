"""What admitted chunks start from, where that is not zeros: the weights that they would have had.

Dot products of two rows that are both zeros have no gradient, so that tables whose rows all start
from zeros learn slowly at first (docs/pruned.md). Weights depend on (seed, table, row, column)
alone: the same on any sharding, and when a chunk comes again. Source: own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shardlab.codecs import rounding_key
from shardlab.ops.blocks import Blocks
from shardlab.ops.codecs import encode_rows
from shardlab.ops.init import InitStreams, init_pieces
from shardlab.ops.rounding import Rounding


@dataclass(frozen=True)
class InitialChunks:
    """Initial weights of the chunks of some shards.

    Attributes:
        starts: bool [blocks] on CPU: whose admitted chunks start from them.
        streams: of the blocks' tables.
        seed: of the run.
    """

    starts: Tensor
    streams: InitStreams
    seed: int

    def write(self, arena: Tensor, blocks: Blocks, index_blocks: Tensor, admitted: Tensor,
              rows: tuple[Tensor, Tensor]) -> None:
        """Writes the weights of admitted chunks to their places.

        Args:
            arena, blocks: where pools lie.
            index_blocks: `ChunkIndex.blocks`.
            admitted: int64 [a, 3] on CPU, as `ChunkIndex.offer` gives them.
            rows: int64 [m] ids of the offers and int64 [blocks + 1] where blocks begin in them,
                both on CPU.
        """
        ids, splits = rows
        block = torch.searchsorted(splits, admitted[:, 0].contiguous(), right=True) - 1
        stores = index_blocks[:, 0]
        for store in stores[self.starts].unique().tolist():
            some = (stores == store)[block]
            self._write_store(arena, blocks, index_blocks, block[some],
                              (ids[admitted[some, 0]], admitted[some, 1], admitted[some, 2]))

    def _write_store(self, arena: Tensor, blocks: Blocks, index_blocks: Tensor, block: Tensor,
                     chunks: tuple[Tensor, Tensor, Tensor]) -> None:
        """Chunks of one store: rows of their blocks, number in the row, places."""
        if not block.numel():
            return
        row, chunk, places = chunks
        _, row_start, first_chunk, table_chunks, key, *_ = index_blocks[block].unbind(1)
        numbers = (row + row_start) * table_chunks + first_chunk + chunk
        pool = int(block[0])
        encoding, width = blocks.encoding(pool), int(blocks.table[pool, 4])
        values = torch.empty(block.numel(), width)
        init_pieces(values, numbers, block, self.streams)
        payloads = blocks.payloads(arena, pool)
        encoded = torch.empty(block.numel(), payloads.shape[1], dtype=torch.uint8)
        encode_rows(values, encoding.codec, encoded, Rounding(
            encoding.stochastic, rounding_key(self.seed, 0), rows=numbers ^ key))
        payloads[places.to(arena.device)] = encoded.to(arena.device)
