"""All chunks of a store present, with initial weights: how a dense start begins."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from shardlab.codecs import rounding_key, table_key
from shardlab.ops.chunk_index import ChunkRows
from shardlab.ops.chunk_rows import ChunkPools
from shardlab.ops.codecs import encode_rows
from shardlab.ops.init import init_uniform
from shardlab.ops.rounding import Rounding
from shardlab.storage.base import LocalShard
from shardlab.storage.chunk_stores import StorePlan
from shardlab.table_plan import Shard

_INIT_BYTES = 8 << 20
_FP32_BYTES = 4


def fill_dense(pools: ChunkPools, shards: Sequence[LocalShard], plan: StorePlan, store: int,
               seed: int) -> None:
    """Writes initial weights of every row of a store's shards, row after row.

    Args:
        pools: empty.
        shards: all of the rank.
        plan: of the store.
        store: its number.
        seed: of the run.
    """
    chunks, at = plan.shape.layout.chunks, plan.shape.layout.shared
    blocks, rows, places = [], [], []
    for block in plan.blocks:
        count = shards[block].shard.rows
        _write(pools, shards[block], block, at, seed)
        blocks.append(torch.full((count,), block))
        rows.append(torch.arange(count))
        places.append(torch.arange(at, at + count * chunks, dtype=torch.int32).view(-1, chunks))
        at += count * chunks
    every = torch.cat(places)
    pools.index.load(store, torch.cat(blocks), ChunkRows(
        torch.cat(rows), every, torch.zeros_like(every, dtype=torch.int16)))


def _write(pools: ChunkPools, local: LocalShard, block: int, at: int, seed: int) -> None:
    """Weights by (seed, table, row, column) into places from ``at`` on; states are zero already."""
    shard, encoding = local.shard, pools.blocks.encoding(block)
    chunks, width = pools.chunks(block), pools.width(block)
    payloads = pools.blocks.payloads(pools.arena, block)
    step = max(1, _INIT_BYTES // (shard.columns * _FP32_BYTES))
    key = rounding_key(seed, 0) ^ table_key(local.table.name)
    for first in range(0, shard.rows, step):
        count = min(step, shard.rows - first)
        values = torch.empty(count, shard.columns)
        init_uniform(values, local.table, Shard(
            shard.rank, shard.row_start + first, shard.row_start + first + count,
            shard.col_start, shard.col_end), seed)
        numbers = chunk_numbers(pools, block, torch.arange(first, first + count))
        out = payloads[at + first * chunks:at + (first + count) * chunks]
        encode_rows(values.view(-1, width).to(out.device), encoding.codec, out,
                    Rounding(encoding.stochastic, key, rows=numbers.to(out.device)))


def chunk_numbers(pools: ChunkPools, block: int, rows: torch.Tensor) -> torch.Tensor:
    """int64 [n * chunks]: number of every chunk in its table, which random bits go by."""
    _, row_start, first, table_chunks, *_ = pools.index.blocks[block].tolist()
    chunk = torch.arange(pools.chunks(block))
    return ((rows[:, None] + row_start) * table_chunks + first + chunk).view(-1)
