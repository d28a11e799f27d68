"""Streams a table's rows and tells what is in them; what it keeps per row lies in a mapped file.

Columns may have been cut, so a row can come in several pieces: norms and products are summed over
them first, in a file of 4 bytes a row, and judged afterwards.
"""

from __future__ import annotations

import heapq
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shardlab.errors import CheckpointError
from shardlab.interop.whole import Rows, new_table, pieces, row_pieces
from shardlab.storage import TableChunk
from shardlab.train.checkpoint_reader import CheckpointReader
from shardlab.train.manifest import TableEntry

#: Called with rows done and rows in all; columns that were cut count once each.
Progress = Callable[[int, int], None]
#: Percentiles come from so many bins between the least and the greatest norm.
_FINE_BINS = 1 << 16
_BINS = 40
_PERCENTILES = (1, 10, 50, 90, 99)
#: A row without a gradient so far has zeros here.
_TRACE = ("sum", "exp_avg_sq")


@dataclass(frozen=True)
class Row:
    """A row: weights, and optimiser state by name (a list by element, a number by row)."""

    row: int
    norm: float
    weights: list[float] = field(default_factory=list)
    state: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Neighbor:
    """A row and its cosine with another one."""

    row: int
    cosine: float
    norm: float


@dataclass(frozen=True)
class Histogram:
    """Counts between edges: one edge more than counts."""

    edges: list[float]
    counts: list[int]


@dataclass(frozen=True)
class TableStats:
    """What a table's values are like.

    Attributes:
        mean, std, least, greatest: of finite elements.
        not_finite: elements that are NaN or infinite.
        zero_rows: rows of zeros.
        dead_rows: rows that never got a gradient; None where the optimiser leaves no trace.
        norm_percentiles: by percent, to 1 / 65,536 of the range.
        norms: histogram of rows' norms.
        state: by name: mean and greatest.
    """

    table: str
    rows: int
    columns: int
    mean: float
    std: float
    least: float
    greatest: float
    not_finite: int
    zero_rows: int
    dead_rows: int | None
    norm_percentiles: dict[int, float]
    norms: Histogram
    state: dict[str, dict[str, float]]


@dataclass
class _Moments:
    """Sums over elements that come in pieces."""

    count: int = 0
    total: float = 0.0
    squares: float = 0.0
    least: float = np.inf
    greatest: float = -np.inf
    not_finite: int = 0

    def add(self, values: Rows) -> None:
        """Takes a piece."""
        finite = np.isfinite(values)
        kept = values if finite.all() else values[finite]
        self.not_finite += values.size - kept.size
        if kept.size:
            self.count += kept.size
            self.total += float(kept.sum(dtype=np.float64))
            flat = kept.reshape(-1)
            self.squares += sum(float(np.dot(part, part)) for part in np.array_split(
                flat, max(1, flat.size >> 16)))
            self.least = min(self.least, float(kept.min()))
            self.greatest = max(self.greatest, float(kept.max()))

    @property
    def mean(self) -> float:
        """Of the elements so far."""
        return self.total / self.count if self.count else float("nan")

    @property
    def std(self) -> float:
        """Standard deviation of the elements so far."""
        if not self.count:
            return float("nan")
        return float(np.sqrt(max(0.0, self.squares / self.count - self.mean ** 2)))


def read_rows(reader: CheckpointReader, table: TableEntry, rows: Sequence[int]) -> list[Row]:
    """Some rows, whole, with their optimiser state.

    Raises:
        CheckpointError: a row that the table does not have, or a damaged file.
    """
    for row in rows:
        if not 0 <= row < table.rows:
            raise CheckpointError(f"table {table.name!r} has rows 0 to {table.rows - 1}, asked for "
                                  f"row {row}")
    return [_read_row(reader, table, row) for row in rows]


def _read_row(reader: CheckpointReader, table: TableEntry, row: int) -> Row:
    weights = np.zeros(table.columns, np.float32)
    state: dict[str, Any] = {}
    for chunk in pieces(reader, table, slice(row, row + 1)):
        at = row - chunk.row_start
        if not 0 <= at < len(chunk.weights):
            continue
        columns = slice(chunk.col_start, chunk.col_start + chunk.weights.shape[1])
        weights[columns] = chunk.weights[at].numpy()
        for name, value in chunk.state.items():
            if value.dim() == 1:
                share = chunk.weights.shape[1] / table.columns
                state[name] = state.get(name, 0.0) + float(value[at]) * share
            else:
                state.setdefault(name, [0.0] * table.columns)[columns] = value[at].tolist()
    return Row(row, float(np.linalg.norm(weights)), weights.tolist(), state)


def top_rows(reader: CheckpointReader, table: TableEntry, count: int,
             progress: Progress | None = None) -> list[Row]:
    """The rows of the greatest norms, greatest first; norms only."""
    with _summed(reader, table, _squares, progress) as squares:
        best = _greatest(squares, count)
    return [Row(row, float(np.sqrt(square))) for square, row in best]


def dead_rows(reader: CheckpointReader, table: TableEntry, limit: int,
              progress: Progress | None = None) -> tuple[int, list[int]]:
    """(how many rows never got a gradient, the first of them).

    Raises:
        CheckpointError: the optimiser leaves no trace by which to tell.
    """
    name = _trace_of(reader, table)
    if name is None:
        raise CheckpointError(f"table {table.name!r} was trained by {reader.manifest.optimizer}, "
                              "whose state does not tell which rows had a gradient")
    count, first = 0, []
    with _summed(reader, table, lambda chunk: _trace(chunk, name), progress) as traces:
        for start, piece in row_pieces(traces):
            at = (piece[:, 0] == 0).nonzero()[0]
            count += at.size
            first += (at[:max(0, limit - len(first))] + start).tolist()
    return count, first


def neighbors(reader: CheckpointReader, table: TableEntry, row: int, count: int,
              progress: Progress | None = None) -> list[Neighbor]:
    """The rows whose direction is nearest to a row's, by cosine, nearest first.

    Raises:
        CheckpointError: a row that the table does not have, or one of zeros.
    """
    (asked,) = read_rows(reader, table, [row])
    if asked.norm == 0:
        raise CheckpointError(f"row {row} of table {table.name!r} is all zeros; it has no "
                              "direction, and so no neighbours")
    query = torch.tensor(asked.weights)

    def product(chunk: TableChunk) -> Rows:
        columns = slice(chunk.col_start, chunk.col_start + chunk.weights.shape[1])
        return np.stack([(chunk.weights @ query[columns]).numpy(), _squares(chunk)[:, 0]], 1)

    best: list[tuple[float, int, float]] = []
    with _summed(reader, table, product, progress, wide=2) as sums:
        for start, piece in row_pieces(sums):
            norms = np.sqrt(piece[:, 1])
            cosines = piece[:, 0] / np.where(norms > 0, norms * np.float32(asked.norm), np.inf)
            picked = np.argsort(-cosines, kind="stable")[:count + 1]
            best += [(float(cosines[at]), start + int(at), float(norms[at])) for at in picked]
            best = heapq.nsmallest(count + 1, best, key=lambda one: (-one[0], one[1]))
    return [Neighbor(at, cosine, norm) for cosine, at, norm in best if at != row][:count]


def table_stats(reader: CheckpointReader, table: TableEntry,
                progress: Progress | None = None) -> TableStats:
    """Moments, norms, zeros, rows that never trained; one pass over the table."""
    moments, state = _Moments(), {}
    name = _trace_of(reader, table)

    def look(chunk: TableChunk) -> Rows:
        moments.add(chunk.weights.numpy())
        for field_name, value in chunk.state.items():
            state.setdefault(field_name, _Moments()).add(value.numpy())
        traces = np.ones((len(chunk.weights), 1), np.float32) if name is None else \
            _trace(chunk, name)
        return np.concatenate([_squares(chunk), traces], 1)

    with _summed(reader, table, look, progress, wide=2) as sums:
        zero = sum(int((piece[:, 0] == 0).sum()) for _, piece in row_pieces(sums))
        dead = sum(int((piece[:, 1] == 0).sum()) for _, piece in row_pieces(sums))
        fine = _norm_histogram(sums)
    return TableStats(
        table.name, table.rows, table.columns, moments.mean, moments.std, moments.least,
        moments.greatest, moments.not_finite, zero, None if name is None else dead,
        _percentiles(fine), _coarse(fine),
        {key: {"mean": value.mean, "greatest": value.greatest} for key, value in state.items()})


# ---------------------------------------------------------------- sums by row
@contextmanager
def _summed(reader: CheckpointReader, table: TableEntry, look: Callable[[TableChunk], Rows],
            progress: Progress | None, wide: int = 1) -> Iterator[Rows]:
    """fp32 [rows, wide]: what ``look`` says of every row, summed over the pieces of its columns."""
    with tempfile.TemporaryDirectory() as folder:
        sums = new_table(Path(folder) / "sums", table.rows, wide)
        done, whole = 0, table.rows * table.columns
        for chunk in pieces(reader, table):
            sums[chunk.row_start:chunk.row_start + len(chunk.weights)] += look(chunk)
            done += chunk.weights.numel()
            if progress is not None:
                progress(done // max(1, table.columns), whole // max(1, table.columns))
        yield sums


def _squares(chunk: TableChunk) -> Rows:
    """[n, 1]: a row's squares, those of numbers that are not finite as they come."""
    found: Rows = torch.linalg.vector_norm(chunk.weights, dim=1).square_()[:, None].numpy()
    return found


def _trace(chunk: TableChunk, name: str) -> Rows:
    value = chunk.state[name]
    found: Rows = (value if value.dim() == 1 else value.sum(1))[:, None].numpy()
    return found


def _trace_of(reader: CheckpointReader, table: TableEntry) -> str | None:
    for chunk in reader.table_chunks(table, slice(0, 1)):
        return next((name for name in _TRACE if name in chunk.state), None)
    return None


def _greatest(sums: Rows, count: int) -> list[tuple[float, int]]:
    best: list[tuple[float, int]] = []
    for start, piece in row_pieces(sums):
        picked = np.argsort(-piece[:, 0], kind="stable")[:count]
        best += [(float(piece[at, 0]), start + int(at)) for at in picked]
        best = heapq.nsmallest(count, best, key=lambda one: (-one[0], one[1]))
    return best


def _norm_histogram(sums: Rows) -> Histogram:
    low, high = np.inf, 0.0
    for _, piece in row_pieces(sums):
        norms = np.sqrt(piece[:, 0])
        norms = norms[np.isfinite(norms)]
        if norms.size:
            low, high = min(low, float(norms.min())), max(high, float(norms.max()))
    edges = np.linspace(min(low, high), high if high > low else high + 1.0, _FINE_BINS + 1)
    counts = np.zeros(_FINE_BINS, np.int64)
    for _, piece in row_pieces(sums):
        norms = np.sqrt(piece[:, 0])
        counts += np.histogram(norms[np.isfinite(norms)], edges)[0]
    return Histogram(edges.tolist(), counts.tolist())


def _percentiles(fine: Histogram) -> dict[int, float]:
    reached = np.cumsum(fine.counts)
    if reached[-1] == 0:
        return {}
    return {percent: fine.edges[int(np.searchsorted(reached, reached[-1] * percent / 100))]
            for percent in _PERCENTILES}


def _coarse(fine: Histogram) -> Histogram:
    ends = np.linspace(0, _FINE_BINS, _BINS + 1).astype(int)
    counts = [sum(fine.counts[low:high]) for low, high in pairwise(ends)]
    return Histogram([fine.edges[end] for end in ends], counts)
