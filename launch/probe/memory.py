"""Speed of one rank's memory, through the framework's own storage and ops."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle

import numpy as np
import torch
from torch import Tensor

from shardlab.launch.probe.timing import median_seconds
from shardlab.ops.step_parameters import StepParameters
from shardlab.ops.unique import Segments, Uniques, unique_segments
from shardlab.specs import EmbeddingBagConfig, ShardingType
from shardlab.storage import LocalShard, StorageOptions, build_storage
from shardlab.storage_bytes import record_layout
from shardlab.storage_specs import RowsSpec
from shardlab.table_plan import build_table_plan

ROW_BYTES = (64, 128, 256, 512)
OPTIMIZER = "row_wise_adagrad"
_FP32_BYTES = 4
#: Rows of one read: about what a step asks of a rank.
_ROWS_READ = 1 << 16
#: Bytes that other reads touch before the same rows come again: more than any cache holds.
_FORGOTTEN_BYTES = 512 << 20
_MOST_READS = 128
_LINE_BYTES = 64
#: Ids of a step of 26 features in batches of 2,048.
_SEGMENTS, _SEGMENT_IDS, _SEGMENT_ROWS = 26, 2048, 1_000_000
#: A row cannot take less than this share of what was measured when the copy's time is taken off.
_LEAST_SHARE = 0.4


@dataclass(frozen=True)
class RowSpeed:
    """Times of one row out of many, rows in ascending order.

    Attributes:
        row_bytes: bytes of a row.
        read_s: to read a row, without the copy that is written.
        update_s: to step a row, without the gradient that is read.
    """

    row_bytes: int
    read_s: float
    update_s: float


def stream_bytes_per_s(device: torch.device, size: int, seconds: float) -> float:
    """Bytes read and written per second by a copy of ``size`` bytes."""
    source = torch.ones(size // _FP32_BYTES, device=device)
    target = torch.empty_like(source)
    return 2 * size / median_seconds(lambda: target.copy_(source), seconds, device)


def row_speed(device: torch.device, row_bytes: int, arena_bytes: int,
              seconds: float) -> RowSpeed:
    """Times of random rows of an arena.

    Args:
        device: where it lies.
        row_bytes: bytes of a row, whole fp32 elements.
        arena_bytes: bytes of all rows.
        seconds: how long each of the two measurements repeats.
    """
    rows, columns = max(arena_bytes // row_bytes, 2), row_bytes // _FP32_BYTES
    table = EmbeddingBagConfig(rows, columns, "probe")
    plan = build_table_plan(table, ShardingType.TABLE_WISE, [0])
    local = LocalShard(table, plan.shards[0], plan.storage, False)
    storage = build_storage([local], StorageOptions(OPTIMIZER, 0, device))
    count = min(_ROWS_READ, rows // 2)
    batches = cycle(list(_random_rows(rows, count, row_bytes, device)))
    out = torch.ones(count * columns, device=device)
    # A copy reads and writes, a row is written only; measured next to the rows, so that whatever
    # slows these down slows it down too.
    spare = torch.ones_like(out)
    copied = median_seconds(lambda: spare.copy_(out), seconds / 4, device) / 2
    segments = torch.tensor([[0, 0, count, 0]])
    read = median_seconds(lambda: storage.read(segments, next(batches).ids, out), seconds, device)
    step = StepParameters(OPTIMIZER, lr=0.01, eps=1e-8)
    update = median_seconds(lambda: storage.update(_entries(next(batches), columns), None, out,
                                                   step), seconds, device)
    return RowSpeed(row_bytes, *(max(total - copied, _LEAST_SHARE * total) / count
                                 for total in (read, update)))


def _random_rows(rows: int, count: int, row_bytes: int,
                 device: torch.device) -> Iterator[Uniques]:
    """Sets of different random rows, ascending, each with one entry.

    One set, moved on by a random number of rows each time: in so many sets that no cache still
    holds a row when it comes again.
    """
    rng = np.random.default_rng(0)
    chosen = np.unique(rng.integers(0, rows, 2 * count))
    chosen = rng.permutation(chosen)[:count] if len(chosen) >= count else np.arange(count)
    touched = count * -(-row_bytes // _LINE_BYTES) * _LINE_BYTES
    for _ in range(min(1 + _FORGOTTEN_BYTES // touched, _MOST_READS)):
        moved = np.sort((chosen + rng.integers(rows)) % rows)
        yield Uniques(torch.from_numpy(moved).to(device), torch.tensor([0, count]),
                      torch.arange(count + 1, device=device), torch.arange(count, device=device))


def _entries(uniques: Uniques, columns: int) -> Uniques:
    """The same rows with gradients of ``columns`` elements behind one another."""
    return Uniques(uniques.ids, uniques.splits, uniques.starts, uniques.sources * columns)


@dataclass(frozen=True)
class RowFit:
    """`planner.topology.Memory`'s line through measured rows.

    Attributes:
        rows_per_s, row_bytes_per_s: a row of b bytes takes 1 / rows_per_s + b / row_bytes_per_s.
        rewrite_factor: median of updates over reads of a record.
        error: largest relative error of the line.
    """

    rows_per_s: float
    row_bytes_per_s: float
    rewrite_factor: float
    error: float


def fit_rows(speeds: Sequence[RowSpeed]) -> RowFit:
    """Fits the line of least relative squares; neither of its parts is negative."""
    size = np.array([speed.row_bytes for speed in speeds], dtype=np.float64)
    time = np.array([speed.read_s for speed in speeds])
    matrix = np.stack([1 / time, size / time], axis=1)
    fixed, per_byte = np.linalg.lstsq(matrix, np.ones(len(size)), rcond=None)[0]
    least = 1e-3 * time.min()
    if fixed < least:  # bandwidth alone
        fixed, per_byte = least, float((size / time).sum() / (size / time).dot(size / time))
    elif per_byte * size.max() < least:  # latency alone
        fixed, per_byte = float((1 / time).sum() / (1 / time).dot(1 / time)), least / size.max()
    line = fixed + per_byte * size
    state = record_layout_bytes(speeds)
    factor = np.median(np.array([speed.update_s for speed in speeds])
                       / (fixed + per_byte * (size + state)))
    return RowFit(1 / fixed, 1 / per_byte, max(float(factor), 1.0),
                  float(np.abs(line / time - 1).max()))


def record_layout_bytes(speeds: Sequence[RowSpeed]) -> int:
    """Bytes of optimiser state behind every row that was measured."""
    return record_layout(RowsSpec().home, speeds[0].row_bytes // _FP32_BYTES, OPTIMIZER).state_bytes


def ids_per_s(device: torch.device, seconds: float) -> float:
    """Ids de-duplicated per second, in a step's worth of features."""
    count = _SEGMENTS * _SEGMENT_IDS
    ids = torch.from_numpy(np.random.default_rng(0).zipf(1.05, count) % _SEGMENT_ROWS).to(device)
    chunks: Tensor = torch.tensor([[s, s * _SEGMENT_IDS, _SEGMENT_IDS, 0, 1]
                                   for s in range(_SEGMENTS)])
    segments = Segments(torch.full((_SEGMENTS,), _SEGMENT_ROWS), torch.zeros(_SEGMENTS).long())
    return count / median_seconds(lambda: unique_segments(ids, chunks, segments, inverse=True),
                                  seconds, device)
