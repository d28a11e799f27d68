"""Exact bytes of a batch on the wire, under the names and by the arithmetic of the runtime.

`estimate` prices expected batches; this counts a given one, so that a prediction can be held
against what a run measured (``wire_by_table`` of its metrics) to the byte.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace

import numpy as np
from numpy.typing import NDArray

from shardlab.plan import ShardingPlan
from shardlab.specs import ExchangeKind
from shardlab.storage_bytes import payload_bytes
from shardlab.table_plan import Shard, TablePlan
from shardlab.wire_bytes import (
    FP32_BYTES,
    HEAD_NUMBER_BYTES,
    HEAD_NUMBERS,
    HOT_MARKS,
    SCALE_BYTES,
    SCALED_GRADIENTS,
    cell_bytes,
    id_bytes,
)

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class ExchangeBytes:
    """Bytes that all ranks send to others."""

    ids: int = 0
    rows: int = 0
    gradients: int = 0

    def __add__(self, other: ExchangeBytes) -> ExchangeBytes:
        return ExchangeBytes(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


@dataclass(frozen=True)
class RankBatch:
    """What one rank looks up in one table.

    Attributes:
        features: the ids of every feature that reads the table.
        bags: samples.
        length_bytes: bytes of a bag's length where pooled bags vary or are cut; else 0.
    """

    features: Sequence[Ints]
    bags: int
    length_bytes: int = 0


def table_bytes(entry: TablePlan, batches: Sequence[RankBatch]) -> ExchangeBytes:
    """Bytes of one table in one step with one backward.

    Args:
        entry: where the table lies.
        batches: by rank.
    """
    total = ExchangeBytes()
    if entry.hot_rows and len(batches) > 1:
        total = _copies(entry, len(batches))
        batches = [replace(batch, features=[ids[~np.isin(ids, entry.hot_rows)]
                                            for ids in batch.features]) for batch in batches]
    for source, batch in enumerate(batches):
        for shard in entry.shards:
            if shard.rank != source:
                total += _cell(entry, shard, batch)
    return total


def head_bytes(plan: ShardingPlan) -> ExchangeBytes:
    """Bytes of a step that belong to no table: heads of messages."""
    pairs = plan.world_size * (plan.world_size - 1)
    scaled = any(entry.wire.backward in SCALED_GRADIENTS for entry in plan.tables)
    return ExchangeBytes(pairs * HEAD_NUMBERS * HEAD_NUMBER_BYTES, 0,
                         pairs * SCALE_BYTES * scaled)


def _copies(entry: TablePlan, world_size: int) -> ExchangeBytes:
    """Of hot rows: a count of ids, none, for every other rank's copy; the sum of gradients."""
    others, rows = world_size - 1, len(entry.hot_rows)
    summed = FP32_BYTES * rows * (entry.shards[0].columns + HOT_MARKS)
    return ExchangeBytes(world_size * others * HEAD_NUMBER_BYTES, 0, 2 * others * summed)


def _cell(entry: TablePlan, shard: Shard, batch: RankBatch) -> ExchangeBytes:
    """One rank's exchange with one shard elsewhere."""
    width = id_bytes(shard.rows)
    forward = payload_bytes(entry.wire.forward, shard.columns)
    backward = payload_bytes(entry.wire.backward, shard.columns)
    if entry.exchange is ExchangeKind.POOLED and not entry.replicated:
        asked = [_inside(ids, shard) for ids in batch.features]
        sent = sum(len(ids) * width + HEAD_NUMBER_BYTES + batch.bags * batch.length_bytes
                   for ids in asked)
        return ExchangeBytes(sent, len(asked) * cell_bytes(batch.bags, forward),
                             len(asked) * cell_bytes(batch.bags, backward))
    unique = len(np.unique(_inside(np.concatenate(batch.features), shard)))
    rows = 0 if entry.replicated else cell_bytes(unique, forward)
    return ExchangeBytes(unique * width + HEAD_NUMBER_BYTES, rows, cell_bytes(unique, backward))


def _inside(ids: Ints, shard: Shard) -> Ints:
    return ids[(ids >= shard.row_start) & (ids < shard.row_end)]
