"""What it costs to read and update a row by where and how it is held.

Of a piece, t different rows are touched in a step. Every one is read from the nearest level, and
rewritten there; of a cache, m rows are not there and come from the level below, and as many leave
it for there. With row(b) of the level's memory, records of r bytes, payloads of p, x the memory's
`rewrite_factor`:

    held                 a row read             a row updated          a missed row fetched
    hbm                  row(p)                 x row(r)
    ddr                  row(p)                 x row(r)               4 row(r)
    ddr behind a link    row(p) + p link        2 row(r) + r link      4 row(r) + r link
    ssd                  a page read            a page written         a page read, c r moved
    tensor_train         its products, cores    three times that
    pruned               an index, the rest     an index, the rest

A missed row is read below and written above while another goes the other way, both at once over a
link. Rows that are written back go to a log in large requests; c = `log_layout.CLEANING` counts
how often a row is read and written there until it stays. Rows share pages: m rows of a file of N
pages take N (1 - e^(-m / N)) pages. Narrower dtypes are decoded when read, decoded and encoded when
updated.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from shardlab.errors import ConfigError
from shardlab.log_layout import CLEANING, TAG_BYTES
from shardlab.pages import MAX_RECORD_BYTES, PAGE_BYTES, UnitLayout, unit_layout
from shardlab.planner.speeds import Speeds
from shardlab.storage_bytes import payload_bytes, record_layout
from shardlab.storage_specs import (
    LevelSpec,
    PrunedSpec,
    RowsSpec,
    StorageSpec,
    TensorTrainSpec,
    Tier,
)

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_FP32_BYTES = 4
_INDEX_BYTES = 8
# The backward pass of a product makes two products of the same size.
_BACKWARD = 2


@dataclass(frozen=True)
class Fetch:
    """The way from one level of a chain to the next.

    Attributes:
        fraction: share of the rows that the nearer level holds.
        row_ms: a missed row.
        page_ms: a page of missed rows, where the level below is a disk.
        records: records of such a page; 0 where the level below is memory.
        written_bytes: what a missed row writes to the disk, as the one that leaves has changed.
    """

    fraction: float
    row_ms: float
    page_ms: float = 0.0
    records: int = 0
    written_bytes: float = 0.0


@dataclass(frozen=True)
class Holding:
    """Costs of rows of one width in one storage, in ms.

    Attributes:
        read_ms: a touched row, read.
        update_ms: a touched row, updated.
        page_read_ms: a page of touched rows, where the home is a disk without a cache.
        page_write_ms: the same, updated.
        records: records of such a page.
        written_bytes: what an updated row writes to the disk.
        fetches: between levels, from near to far.
    """

    read_ms: float
    update_ms: float
    page_read_ms: float = 0.0
    page_write_ms: float = 0.0
    records: int = 0
    written_bytes: float = 0.0
    fetches: tuple[Fetch, ...] = field(default=())


def holding(spec: StorageSpec, rows: int, columns: int, optimizer: str,
            speeds: Speeds) -> Holding:
    """Costs of a piece of ``rows`` x ``columns``; all but a tensor train's depend on its width."""
    if isinstance(spec, RowsSpec):
        return _rows(spec, columns, optimizer, speeds)
    if isinstance(spec, PrunedSpec):
        return _pruned(spec, rows, columns, optimizer, speeds)
    return _tensor_train(spec, rows, columns, speeds)


def _rows(spec: RowsSpec, columns: int, optimizer: str, speeds: Speeds) -> Holding:
    nearest = spec.levels[0]
    record = record_layout(nearest, columns, optimizer, spec.state_dtype)
    coded = 0.0 if nearest.dtype == "fp32" else _FP32_BYTES * columns
    decode, encode = speeds.decode * coded, speeds.encode * coded
    fetches = tuple(_fetch(near, far, columns, optimizer, spec.state_dtype, speeds)
                    for near, far in zip(spec.levels, spec.levels[1:], strict=False))
    tier = nearest.tier or Tier.HBM
    if tier is Tier.SSD:
        layout = _layout(record.record_bytes)
        return Holding(decode, decode + encode, _page_ms(layout, speeds.page_read,
                                                         speeds.page_byte[0]),
                       _page_ms(layout, speeds.page_write, speeds.page_byte[1]), layout.records,
                       CLEANING * (record.record_bytes + TAG_BYTES))
    payload, whole = record.payload_bytes, record.record_bytes
    read = float(speeds.row(tier, payload))
    update = float(speeds.row(tier, whole))
    if tier is Tier.DDR and speeds.behind_link:
        read += payload * speeds.link_byte
        update = 2 * update + whole * speeds.link_byte
    else:
        update *= speeds.memory[tier].rewrite_factor
    return Holding(read + decode, update + decode + encode, fetches=fetches)


def _fetch(near: LevelSpec, far: LevelSpec, columns: int, optimizer: str, state_dtype: str,
           speeds: Speeds) -> Fetch:
    above = record_layout(near, columns, optimizer, state_dtype).record_bytes
    below = record_layout(far, columns, optimizer, state_dtype).record_bytes
    row = 2 * float(speeds.row(near.tier or Tier.HBM, above))
    if far.tier is Tier.SSD:
        layout = _layout(below + TAG_BYTES)
        page = _page_ms(layout, speeds.page_read, speeds.page_byte[0])
        written = CLEANING * (below + TAG_BYTES)
        row += written * sum(speeds.page_byte)
        if near.tier is not Tier.DDR and speeds.behind_link:
            row += below * speeds.link_byte
        return Fetch(near.fraction, row, page, layout.records, written)
    row += 2 * float(speeds.row(far.tier or Tier.HBM, below))
    if far.tier is Tier.DDR and near.tier is not Tier.DDR and speeds.behind_link:
        row += below * speeds.link_byte
    return Fetch(near.fraction, row)


def _layout(record: int) -> UnitLayout:
    """Of records too long for a disk that of the longest; such options are never taken."""
    return unit_layout(min(record, MAX_RECORD_BYTES))


def _page_ms(layout: UnitLayout, page: float, byte: float) -> float:
    """A unit of records in one request."""
    return max(page, layout.pages * PAGE_BYTES * byte)


def _pruned(spec: PrunedSpec, rows: int, columns: int, optimizer: str,
            speeds: Speeds) -> Holding:
    tier = spec.tier or Tier.HBM
    share = spec.budget(rows, columns) / (rows * columns * _FP32_BYTES)
    level = LevelSpec(spec.dtype, tier)
    record = record_layout(level, columns, optimizer)
    index = float(speeds.row(tier, _INDEX_BYTES))
    coded = 0.0 if spec.dtype == "fp32" else _FP32_BYTES * columns
    read = index + float(speeds.row(tier, share * record.payload_bytes)) + speeds.decode * coded
    update = index + speeds.memory[tier].rewrite_factor * float(
        speeds.row(tier, share * record.record_bytes)) + (speeds.decode + speeds.encode) * coded
    if tier is Tier.DDR and speeds.behind_link:
        read += share * record.payload_bytes * speeds.link_byte
        update += share * record.record_bytes * speeds.link_byte
    return Holding(read, update)


def _tensor_train(spec: TensorTrainSpec, rows: int, columns: int, speeds: Speeds) -> Holding:
    """Products of slices of cores, left to right; cores are small and stay near."""
    try:
        shape = spec.piece_shape(rows, columns)
    except ConfigError:
        return Holding(0.0, 0.0)  # never taken: `sizes.piece_bytes` calls it impossible
    flops, width, elements = 0.0, 1, 0
    for left, _, factor, right in shape.core_shapes:
        flops += 2.0 * width * left * factor * right if width > 1 else 0.0
        elements += left * factor * right
        width *= factor
    tier = spec.tier or Tier.HBM
    cores = float(speeds.row(tier, payload_bytes(spec.dtype, elements)))
    forward = flops * speeds.flop + cores
    if not spec.cache_fraction:
        return Holding(forward, (1 + _BACKWARD) * forward)
    near = float(speeds.row(tier, _FP32_BYTES * columns))
    return Holding(near, speeds.memory[tier].rewrite_factor * near,
                   fetches=(Fetch(spec.cache_fraction, (2 + _BACKWARD) * forward),))
