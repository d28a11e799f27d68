"""Bytes that a storage takes, by tier: the arithmetic that planner and runtime share.

The runtime allocates by these functions, so that prediction and allocation cannot drift apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from shardlab.cache_layout import cache_layout
from shardlab.chunk_layout import LINE_BYTES, ChunkLayout, key_bytes
from shardlab.log_layout import log_layout
from shardlab.storage_specs import (
    DTYPES,
    LevelSpec,
    PrunedSpec,
    RowsSpec,
    StorageSpec,
    TensorTrainSpec,
    Tier,
)
from shardlab.tensor_train_shapes import hot_rows_shape

#: Optimiser state of one row: (elements per column, elements per row).
OPTIMIZER_STATE: dict[str, tuple[int, int]] = {
    "sgd": (0, 0),
    "adagrad": (1, 0),
    "row_wise_adagrad": (0, 1),
    "adam": (2, 0),
    "row_wise_adam": (1, 1),
}
#: Optimisers with state of whole rows: a step needs the squares of a gradient's whole row.
ROW_WISE_OPTIMIZERS = tuple(name for name, (_, per_row) in OPTIMIZER_STATE.items() if per_row)
_FP32_BYTES = 4


@dataclass(frozen=True)
class RecordLayout:
    """Bytes of one row of a shard: payload with its scale, then optimiser state.

    Attributes:
        payload_bytes: the row itself in its storage dtype.
        state_bytes: optimiser state.
        record_bytes: both together.
    """

    payload_bytes: int
    state_bytes: int

    @property
    def record_bytes(self) -> int:
        return self.payload_bytes + self.state_bytes


def payload_bytes(dtype: str, columns: int) -> int:
    """Bytes of a row of ``columns`` elements with its scale."""
    bits, scale = DTYPES[dtype]
    return -(-columns * bits // 8) + scale


def record_layout(level: LevelSpec, columns: int, optimizer: str,
                  state_dtype: str = "fp32") -> RecordLayout:
    """Layout of a record of ``columns`` elements under an optimiser of `OPTIMIZER_STATE`."""
    per_column, per_row = OPTIMIZER_STATE[optimizer]
    return RecordLayout(payload_bytes=payload_bytes(level.dtype, columns),
                        state_bytes=payload_bytes(state_dtype, per_column * columns + per_row))


@dataclass(frozen=True)
class TierBytes:
    """Bytes held on each tier."""

    hbm: int = 0
    ddr: int = 0
    ssd: int = 0

    def __add__(self, other: TierBytes) -> TierBytes:
        return TierBytes(self.hbm + other.hbm, self.ddr + other.ddr, self.ssd + other.ssd)

    @property
    def total(self) -> int:
        return self.hbm + self.ddr + self.ssd

    @staticmethod
    def on(tier: Tier | None, count: int) -> TierBytes:
        """``count`` bytes on one tier; None counts as hbm."""
        return TierBytes(**{(tier or Tier.HBM).value: count})


def tier_bytes(spec: StorageSpec, rows: int, columns: int, optimizer: str) -> TierBytes:
    """Bytes that a shard of ``rows`` x ``columns`` takes, optimiser state and tags included."""
    counter: Callable[..., TierBytes] = _BYTES[type(spec)]
    return counter(spec, rows, columns, optimizer)


def _rows_bytes(spec: RowsSpec, rows: int, columns: int, optimizer: str) -> TierBytes:
    record = record_layout(spec.home, columns, optimizer, spec.state_dtype).record_bytes
    if spec.home.tier is Tier.SSD:
        layout = log_layout(rows, record)
        total = TierBytes(ddr=layout.memory_bytes, ssd=layout.file_bytes)
    else:
        total = TierBytes.on(spec.home.tier, rows * record)
    for level in spec.levels[:-1]:
        total += TierBytes.on(level.tier, cache_bytes(level, rows, columns, optimizer,
                                                      spec.state_dtype))
    return total


def cache_bytes(level: LevelSpec, rows: int, columns: int, optimizer: str,
                state_dtype: str = "fp32") -> int:
    """Bytes of a cache level of a shard: slots with their state, tags and counters."""
    layout = cache_layout(rows, level.fraction, level.ways)
    record = record_layout(level, columns, optimizer, state_dtype).record_bytes
    return layout.slots * record + layout.metadata_bytes


def _tensor_train_bytes(spec: TensorTrainSpec, rows: int, columns: int,
                        optimizer: str) -> TierBytes:
    shape = spec.piece_shape(rows, columns)
    per_column, per_row = OPTIMIZER_STATE[optimizer]
    state = _FP32_BYTES * (per_column * shape.parameters + per_row * sum(shape.row_factors))
    total = payload_bytes(spec.dtype, shape.parameters) + state
    if spec.cache_fraction:
        hot = hot_rows_shape(rows, spec.cache_fraction)
        record = _FP32_BYTES * (columns * (1 + per_column) + per_row)
        total += hot.capacity * record + hot.index_bytes
    return TierBytes.on(spec.tier, total)


def _pruned_bytes(spec: PrunedSpec, rows: int, columns: int, optimizer: str) -> TierBytes:
    """The budget, which everything counts towards; or the most that a dense start takes.

    A store never holds more than its budget, and all but the last slab of it once it is full. A
    rank may take up to `PrunedSpec.slack` more, where other ranks hold that much less.
    """
    budget = spec.budget(rows, columns)
    if spec.is_full:
        layout = chunk_layout(spec, rows, columns, optimizer)
        return TierBytes.on(spec.tier, layout.full_bytes(rows))
    if spec.start == "dense":
        layout = chunk_layout(spec, rows, columns, optimizer, budget)
        budget = max(budget, layout.full_bytes(rows))
    return TierBytes.on(spec.tier, budget)


def chunk_layout(spec: PrunedSpec, rows: int, columns: int, optimizer: str,
                 budget: int = 0) -> ChunkLayout:
    """What a store of chunks of a table, or of a shard, is made of.

    Args:
        spec: the storage.
        rows: of all its shards.
        columns: of the shard.
        optimizer: a key of `OPTIMIZER_STATE`.
        budget: bytes that the sketch is sized by; 0: there is none.
    """
    per_column, per_row = OPTIMIZER_STATE[optimizer]
    width = spec.chunk_columns(columns)
    layout = ChunkLayout(max(1, columns // width), payload_bytes(spec.dtype, width),
                         payload_bytes("fp32", per_column * width + per_row),
                         key_bytes=key_bytes(rows))
    cells = spec.sketch * layout.likely_chunks(budget, spec.sketch) if budget else 0
    return replace(layout, sketch_lines=math.ceil(cells / LINE_BYTES),
                   shared=layout.chunks if spec.shares_absent else 0)


_BYTES: dict[type, Callable[..., TierBytes]] = {
    RowsSpec: _rows_bytes, TensorTrainSpec: _tensor_train_bytes, PrunedSpec: _pruned_bytes}
