"""The contract of a storage: it holds all shards of its kind on one rank, one block per shard."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from shardlab.ops.blocks import Blocks, Encoding
from shardlab.ops.moves import move_rows
from shardlab.ops.records import MoveEnd
from shardlab.ops.step_parameters import StepParameters
from shardlab.ops.tensor_train import materialise
from shardlab.ops.tensor_train_types import train_of
from shardlab.ops.unique import Uniques, fill_affine
from shardlab.specs import EmbeddingBagConfig
from shardlab.storage.kept_room import KeptRoom
from shardlab.storage_bytes import TierBytes
from shardlab.storage_specs import RowsSpec, StorageSpec
from shardlab.table_plan import Shard

_FP32_BYTES = 4


@dataclass(frozen=True)
class LocalShard:
    """One rectangle of a table that this rank holds.

    Attributes:
        storage: of the plan: every level names its tier.
        replicated: every rank holds the same cells.
        table_rows: rows of the table that the shard's rows are, where they are no range: copies of
            hot rows. Empty: those of ``shard``.
    """

    table: EmbeddingBagConfig
    shard: Shard
    storage: StorageSpec
    replicated: bool
    table_rows: tuple[int, ...] = ()

    @property
    def chain(self) -> RowsSpec:
        """The storage of a shard that is held as rows."""
        assert isinstance(self.storage, RowsSpec)
        return self.storage


@dataclass(frozen=True)
class StorageOptions:
    """What all storages of a rank share.

    Attributes:
        optimizer: kind of row optimiser, which decides the state's bytes.
        seed: of the initial weights and of random rounding.
        device: where rows are read to and updated from.
        ssd_dir: folder for levels on disk, one of this rank's own; None: there are none.
    """

    optimizer: str
    seed: int
    device: torch.device
    ssd_dir: str | None = None


@dataclass(frozen=True)
class PlacedJobs:
    """Pooling jobs of a storage.

    Attributes:
        jobs: int64 [J, 11] on CPU, as the caller made them: first column the block's number.
        kernel: int64 on CPU, as the kernels take them.
    """

    jobs: Tensor
    kernel: Tensor


@dataclass(frozen=True)
class TableChunk:
    """Some rows of a rectangle of a table, with their optimiser state: the unit of checkpoints.

    Attributes:
        weights: fp32 [n, d]; row i, column j is cell (row_start + i, col_start + j) of the table.
        state: by name, fp32 [n, d] per element or [n] per row.
        replicated: every rank holds the same cells.
        present: int64 [n], ascending: the rows that ``weights`` are, counted from row_start, where
            not all rows of a range are there; the others are zeros, or the row ``absent`` of
            ``extra``. None: all are.
        span: rows of the range, where ``present`` is given.
        extra: what only a storage of the same kind takes, by name.
    """

    table: str
    row_start: int
    col_start: int
    weights: Tensor
    state: dict[str, Tensor]
    replicated: bool = False
    present: Tensor | None = None
    span: int = 0
    extra: dict[str, Tensor] = field(default_factory=dict)

    @property
    def num_rows(self) -> int:
        """Rows of the table that the chunk speaks of."""
        return self.weights.shape[0] if self.present is None else self.span

    def dense(self, max_rows: int) -> Iterator[TableChunk]:
        """The same with all rows, absent ones as they read, at most ``max_rows`` at a time.

        Of a tensor train, its cached rows and those that its cores make.
        """
        if "tensor_train" in self.extra:
            train = train_of(self.extra["tensor_train"].tolist(), self.extra)
            for first in range(0, self.span, max_rows):
                rows = torch.arange(first, min(first + max_rows, self.span))
                made = materialise(train, rows)
                if "hot/ids" in self.extra:
                    at = self.extra["hot/ids"] - self.row_start - first
                    inside = (at >= 0) & (at < made.shape[0])
                    made[at[inside]] = self.extra["hot/rows"][inside]
                yield TableChunk(self.table, self.row_start + first, self.col_start, made, {},
                                 self.replicated)
            return
        if self.present is None:
            yield self
            return
        for first in range(0, self.span, max_rows):
            count = min(max_rows, self.span - first)
            low, high = torch.searchsorted(self.present, torch.tensor([first, first + count]))
            at, some = self.present[low:high] - first, slice(int(low), int(high))
            parts = {}
            for name, value in {"": self.weights, **self.state}.items():
                parts[name] = torch.zeros(count, *value.shape[1:])
                parts[name][at] = value[some]
            weights = parts.pop("")
            if "absent" in self.extra:
                others = torch.ones(count, dtype=torch.bool)
                others[at] = False
                weights[others] = self.extra["absent"]
            yield TableChunk(self.table, self.row_start + first, self.col_start, weights, parts,
                             self.replicated)


@runtime_checkable
class EncodesReads(Protocol):
    """A storage that encodes rows while it reads them, without an fp32 copy."""

    def read_codes(self, segments: Tensor, ids: Tensor, out: MoveEnd) -> None:
        """Arguments as those of the function `read_codes`."""


def read_codes(storage: Storage, segments: Tensor, ids: Tensor, out: MoveEnd) -> None:
    """Reads rows in the codecs of ``out``: in one pass where the storage can, else through fp32.

    Args:
        storage: of the blocks.
        segments: int64 [K, 4] on CPU: (block, block of ``out``, start, count): rows
            ids[start:start + count] go to the places of the same range.
        ids: int64.
        out: where encoded rows go, `shardlab.ops.moves.MoveEnd`.
    """
    if isinstance(storage, EncodesReads):
        storage.read_codes(segments, ids, out)
        return
    columns, counts = out.blocks.table[segments[:, 1], 4], segments[:, 3]
    sizes = columns * counts
    start = sizes.cumsum(0) - sizes
    rows = torch.empty(int(sizes.sum()), device=ids.device)
    storage.read(torch.stack([segments[:, 0], segments[:, 2], counts, start], 1), ids, rows)
    zeros = torch.zeros_like(start)
    # A row's number in its range becomes its place: ranges begin at their first row.
    table = torch.stack([_FP32_BYTES * start, _FP32_BYTES * columns, zeros, zeros, columns,
                         counts], 1)
    source = Blocks.build(table, [Encoding()] * len(segments))
    moves = segments.clone()
    moves[:, 0] = torch.arange(len(segments))
    pieces = torch.stack([segments[:, 2], counts, zeros, torch.ones_like(start)], 1)
    places = fill_affine(pieces, ids.numel(), ids.device)
    move_rows(MoveEnd(rows.view(torch.uint8), source, places), out, moves)


class Storage(Protocol):
    """Two verbs on rows, and what planning and checkpoints need. Block s is shards[s]."""

    shards: list[LocalShard]

    def read(self, segments: Tensor, ids: Tensor, out: Tensor) -> None:
        """Decodes rows into ``out``; arguments as in `ops.rows.gather_rows`."""

    def read_pooled(self, jobs: PlacedJobs, index: Tensor, offsets: Tensor | None,
                    weights: Tensor | None, out: Tensor) -> None:
        """Pools bags straight from the rows; as `ops.rows.pool_rows`, with placed jobs."""

    def read_scattered(self, uniques: Uniques, weights: Tensor | None, out: Tensor) -> None:
        """Copies every row to its entries' places; arguments as in `ops.scatter.scatter_rows`."""

    def place_jobs(self, jobs: Tensor) -> PlacedJobs:
        """Pooling jobs of this storage, out of jobs with the block's number in column ``base``."""

    def begin_step(self, step: int) -> None:
        """Tells how many optimiser steps were taken, this one included: it addresses rounding."""

    def update(self, uniques: Uniques, weights: Tensor | None, grads: Tensor,
               step: StepParameters, row_squares: Tensor | None = None) -> None:
        """One optimiser step per unique row; arguments as in `ops.rows.update_rows`."""

    def prefetch(self, segments: Tensor, ids: Tensor) -> None:
        """Tells which rows the next read asks for: int64 [K, 3] (block, start, count) of ids."""

    def cache_counts(self, block: int) -> list[int]:
        """Counts of a shard's nearest cache since the start: `ops.cache.COUNTERS`, bytes moved."""

    def tier_bytes(self) -> TierBytes:
        """Bytes that this storage holds, by tier."""

    def chunks(self, max_bytes: int) -> Iterator[TableChunk]:
        """Streams all rows and their state, ``max_bytes`` at a time."""

    def begin_load(self) -> None:
        """Clears the optimiser state before a checkpoint's chunks come."""

    def load_chunk(self, chunk: TableChunk) -> None:
        """Writes the cells of the chunk that lie in this storage's shards."""

    def close(self) -> None:
        """Gives back what is not memory."""


@runtime_checkable
class RowReads(Protocol):
    """What a storage may offer besides: rows that can be copied while it trains.

    After `flush` the homes hold every row's value, and go on holding it until the row is stepped.
    Storages without it are copied or written before training goes on.
    """

    def flush(self) -> None:
        """Writes everything that is cached to the homes."""

    def row_elements(self, block: int) -> int:
        """fp32 elements of a row and its state."""

    def read_range(self, block: int, first: int, count: int) -> tuple[Tensor, Tensor]:
        """Copies of fp32 weights [count, columns] and states [count, elements] of rows of a shard,
        as its home holds them. Any thread may call this."""

    def read_rows(self, block: int, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The same of single rows: int64, ascending, on CPU. Any thread may call this."""

    def named_state(self, block: int, state: Tensor) -> dict[str, Tensor]:
        """States [n, elements] by name, as chunks hold them."""


class StorageChanges(Protocol):
    """What changed in a storage since the last `clear`."""

    @property
    def is_known(self) -> bool:
        """Whether it is still known; if not, everything may have changed."""

    def clear(self) -> None:
        """Forgets everything."""

    def count(self) -> int:
        """How many rows changed."""

    def num_rows(self) -> int:
        """How many rows there are."""


class StorageSnapshot(Protocol):
    """A storage at one moment."""

    @property
    def num_rows(self) -> int:
        """Rows that are not written yet."""

    def chunks(self) -> Iterator[tuple[TableChunk, bool]]:
        """Streams (chunk, whether it holds changed rows only), in the writer's thread."""

    def close(self) -> None:
        """Keeps nothing any more."""


@runtime_checkable
class KeepsItself(Protocol):
    """What a storage may offer instead of `RowReads`: it keeps what changes while it is written."""

    def snapshot(self, changes: Any, room: KeptRoom) -> StorageSnapshot:
        """The storage at this moment.

        Args:
            changes: hold only these, which `watch_changes` gave; None: everything.
            room: for what is kept; steps wait where it is full.
        """

    def watch_changes(self) -> StorageChanges:
        """From now on, what changes."""


@runtime_checkable
class RowWrites(RowReads, Protocol):
    """What a storage may offer besides: rows that can be replaced between two steps."""

    shards: list[LocalShard]

    def write_rows(self, block: int, rows: Tensor, weights: Tensor, state: Tensor) -> None:
        """Replaces what `read_rows` gives of rows of a shard, after a `flush`."""
