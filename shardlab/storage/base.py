"""The contract of a storage: it holds all shards of its kind on one rank, one block per shard."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from shardlab.ops.rows import StepParameters
from shardlab.ops.unique import Uniques
from shardlab.plan import Shard
from shardlab.specs import EmbeddingBagConfig, TierBytes


@dataclass(frozen=True)
class LocalShard:
    """One rectangle of a table that this rank holds."""

    table: EmbeddingBagConfig
    shard: Shard
    replicated: bool


@dataclass(frozen=True)
class TableChunk:
    """Some rows of a rectangle of a table, with their optimiser state: the unit of checkpoints.

    Attributes:
        weights: fp32 [n, d]; row i, column j is cell (row_start + i, col_start + j) of the table.
        state: by name, fp32 [n, d] per element or [n] per row.
        replicated: every rank holds the same cells.
    """

    table: str
    row_start: int
    col_start: int
    weights: Tensor
    state: dict[str, Tensor]
    replicated: bool = False


class Storage(Protocol):
    """Two verbs on rows, and what planning and checkpoints need. Block s is shards[s]."""

    shards: list[LocalShard]

    def read(self, segments: Tensor, ids: Tensor, out: Tensor) -> None:
        """Decodes rows into ``out``; arguments as in `ops.rows.gather_rows`."""

    def read_pooled(self, jobs: Tensor, index: Tensor, offsets: Tensor | None,
                    weights: Tensor | None, out: Tensor) -> None:
        """Pools bags straight from the rows; as `ops.rows.pool_rows`, with placed jobs."""

    def place_jobs(self, jobs: Tensor) -> Tensor:
        """Pooling jobs of this storage, out of jobs with the block's number in column ``base``."""

    def update(self, uniques: Uniques, weights: Tensor | None, grads: Tensor,
               step: StepParameters, row_squares: Tensor | None = None) -> None:
        """One optimiser step per unique row; arguments as in `ops.rows.update_rows`."""

    def prefetch(self, ids: Tensor) -> None:
        """Tells which rows the next read will touch."""

    def tier_bytes(self) -> TierBytes:
        """Bytes that this storage holds, by tier."""

    def chunks(self, max_bytes: int) -> Iterator[TableChunk]:
        """Streams all rows and their state, ``max_bytes`` at a time."""

    def begin_load(self) -> None:
        """Clears the optimiser state before a checkpoint's chunks come."""

    def load_chunk(self, chunk: TableChunk) -> None:
        """Writes the cells of the chunk that lie in this storage's shards."""
