"""Chunks that the absent ones of a table share: what these read as, and how they are trained.

A shared row tells a model that an id is rare, where zeros tell it nothing. Its gradient is the sum
of those of the absent chunks, so that it learns as if their ids were one row of the table: a table
whose present rows stay the same ones trains as one in which all other ids were replaced by one
(`tests/shardlab/storage/test_chunk_absent.py`). Every shard holds the chunks of its columns, in the
first places of its pool; row blocks of one table add their sums up (`sharded/shared_cores.py`) and
step alike.

Source: own; frequency filters with a common row for what is filtered out are common practice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from shardlab.codecs import rounding_key
from shardlab.ops.chunk_rows import ChunkPools
from shardlab.ops.records import Records
from shardlab.ops.rows import update_rows
from shardlab.ops.step_parameters import StepParameters
from shardlab.ops.unique import Uniques
from shardlab.storage.base import LocalShard

#: Number of a row that no bounded table has, for random bits: the same ones on every shard.
_BEHIND_ROWS = 1 << 52


class SharedChunks:
    """The shared chunks of a rank's shards, and what waits to be learnt.

    Args:
        pools: of all shards.
        shards: those with absent chunks that are zeros do not count.

    Attributes:
        sums: fp32 [shards, most columns + chunks], what `UtilityStep.absent` takes; None: no
            absent chunk is shared.
    """

    def __init__(self, pools: ChunkPools, shards: Sequence[LocalShard]) -> None:
        self._pools, self._shards = pools, shards
        self.sums: Tensor | None = None
        mine = [block for block in range(len(shards)) if pools.shared(block) >= 0]
        if not mine:
            return
        width = max(shards[block].shard.columns + pools.chunks(block) for block in mine)
        self.sums = torch.zeros(len(shards), width, device=pools.arena.device)
        #: By chunk: block, place, number in the table, first column and count in ``sums``.
        self._chunks = torch.cat([self._table(block, width) for block in mine])
        alone = torch.tensor([local.shard.rows == local.table.num_embeddings for local in shards])
        self._alone = self._chunks[alone[self._chunks[:, 0]]]

    def _table(self, block: int, stride: int) -> Tensor:
        """int64 [chunks, 5] of a shard."""
        pools, chunks = self._pools, torch.arange(self._pools.chunks(block))
        _, _, first, table_chunks, _, shared, _ = pools.index.blocks[block].tolist()
        start = block * stride
        columns = self._shards[block].shard.columns
        return torch.stack([
            torch.full_like(chunks, block), shared + chunks,
            _BEHIND_ROWS * table_chunks + first + chunks, start + chunks * pools.width(block),
            start + columns + chunks], 1)

    def step(self, step: StepParameters) -> None:
        """Steps the chunks of shards that have all rows of their table; others wait."""
        if self.sums is not None and self._alone.shape[0]:
            self._step(self._alone, step)

    def gradients(self, block: int, out: Tensor) -> bool:
        """Adds what a shard knows of a table's shared chunks: `SharesCores.shared_gradients`.

        Args:
            block: number of the shard.
            out: fp32 [columns + chunks of the table]: sums of gradients, then counts of chunks.
        """
        assert self.sums is not None
        columns, chunks = self._shards[block].shard.columns, self._pools.chunks(block)
        mine, parts = self.sums[block], self._parts(block)
        out[parts[0]] += mine[:columns]
        out[parts[1]] += mine[columns:columns + chunks]
        return bool((mine[columns:columns + chunks] > 0).any())

    def step_shared(self, block: int, shared: Tensor, step: StepParameters) -> None:
        """One step on a shard's chunks by the sum of what all row blocks gave to `gradients`."""
        assert self.sums is not None
        columns, chunks = self._shards[block].shard.columns, self._pools.chunks(block)
        parts = self._parts(block)
        self.sums[block, :columns] = shared[parts[0]]
        self.sums[block, columns:columns + chunks] = shared[parts[1]]
        self._step(self._chunks[self._chunks[:, 0] == block], step)

    def _parts(self, block: int) -> tuple[slice, slice]:
        """Columns and counts of a shard among those of its table."""
        local = self._shards[block]
        _, _, first, *_ = self._pools.index.blocks[block].tolist()
        start = local.table.embedding_dim + first
        return (slice(local.shard.col_start, local.shard.col_end),
                slice(start, start + self._pools.chunks(block)))

    def _step(self, chunks: Tensor, step: StepParameters) -> None:
        """One optimiser step on the chunks that ids asked for; their sums are forgotten.

        Row-wise rules take the mean square of the chunk, so that cuts by columns change nothing.
        """
        assert self.sums is not None
        device, flat = self.sums.device, self.sums.view(-1)
        asked = chunks[(flat[chunks[:, 4].to(device)] > 0).cpu()]
        blocks, places, numbers, sources, _ = asked.unbind(1)
        if asked.shape[0]:
            splits = torch.searchsorted(blocks.contiguous(), torch.arange(len(self._shards) + 1))
            uniques = Uniques(places.contiguous().to(device), splits,
                              torch.arange(asked.shape[0] + 1, device=device),
                              sources.contiguous().to(device))
            update_rows(self._pools.arena, self._pools.blocks, uniques, None, flat,
                        replace(step, scale=1.0, rows=numbers.contiguous().to(device)))
        self.sums[chunks[:, 0].unique().to(device)] = 0

    # ------------------------------------------------------------------ checkpoints
    def records(self, block: int) -> Records | None:
        """The shared chunks of a shard; None where absent chunks are zeros."""
        pools, shared = self._pools, self._pools.shared(block)
        if shared < 0:
            return None
        places = torch.arange(shared, shared + pools.chunks(block), device=pools.arena.device)
        return Records(pools.arena, pools.blocks, block, places)

    def write(self, block: int, seed: int, first: int, values: Tensor, states: Tensor) -> None:
        """Replaces some of a shard's shared chunks.

        Args:
            block: number of the shard.
            seed: of the run.
            first: the first of them.
            values: fp32 [n, columns of a chunk].
            states: fp32 [n, elements].
        """
        pools = self._pools
        device, count = pools.arena.device, values.shape[0]
        places = torch.arange(count, device=device) + pools.shared(block) + first
        records = Records(pools.arena, pools.blocks, block, places)
        words = records.words(rounding_key(seed, 0), places)
        records.write_rows(values.to(device), words)
        if states.shape[1]:
            records.write_states(states.to(device), words)
