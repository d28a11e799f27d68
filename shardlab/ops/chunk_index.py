"""What an index of chunks is: the calls that both of its faces take, and what these are given.

The faces: `shardlab.ops.chunks` (native) and `shardlab.ops.chunks_reference` (dictionaries).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from shardlab.chunk_layout import RESERVE, ChunkLayout
from shardlab.ops.chunk_marks import Losses, RowRange

#: The first of one part of the rows.
ALL_ROWS = (0, 1)


@dataclass(frozen=True)
class StoreShape:
    """What a store is built for.

    Attributes:
        layout: bytes of its parts.
        slab: chunks that its pool takes at a time.
        max_chunks: chunks that it has addresses for.
        max_rows: rows of all its shards, or as many as it has chunks.
        wide: holds one shard, whose rows may be any number below 2^63.
    """

    layout: ChunkLayout
    slab: int
    max_chunks: int
    max_rows: int
    wide: bool = False

    def in_slabs(self, chunks: int) -> int:
        """Chunks of the slabs that hold the first ones."""
        return min(-(-chunks // self.slab) * self.slab, self.max_chunks)

    def is_stuck(self, now: StoreNumbers) -> bool:
        """Whether new rows find no slot, though many places lie idle, or more than the stack of
        these could take when a row of several chunks makes way."""
        layout = self.layout
        if layout.chunks == 1 or not now.free or \
                layout.has_slot(now.rows, now.slots):
            return False
        deepest = layout.held_bytes(now.slots, now.committed, now.free + layout.chunks)
        return now.free * RESERVE > now.used or deepest > now.budget


@dataclass(frozen=True)
class StoreNumbers:
    """Where a store stands: bytes it may hold, slots, rows and chunks present, places handed out,
    chunks whose slabs are held, depth of the stack of free places, chunks that found no free room
    since the last decision."""

    budget: int
    slots: int
    rows: int
    used: int
    top: int
    committed: int
    free: int
    refused: int = 0


@dataclass(frozen=True)
class Offers:
    """Chunk norms of some rows' gradients, and how they count.

    Attributes:
        segments: int64 [K, 3] on CPU: (block, start, count) of ids.
        ids: int64 [n] on CPU.
        norms: fp32 [n, most chunks of a row] on CPU: norm times accesses, negative for none.
        weights: fp32 [blocks] on CPU: of this step; utilities are as of the last decision.
        thresholds: fp32 [blocks] on CPU: of admission.
        key: of the random bits of rounding.
        margins: fp32 [blocks] on CPU: how many times the utility of a chunk that it replaces.
        evicted: int64 [blocks] on CPU: chunks that were replaced are added.
    """

    segments: Tensor
    ids: Tensor
    norms: Tensor
    weights: Tensor
    thresholds: Tensor
    key: int
    margins: Tensor
    evicted: Tensor


@dataclass(frozen=True)
class ChunkRows:
    """Rows of a shard and their chunks.

    Attributes:
        rows: int64 [n], ascending.
        places: int32 [n, chunks], -1 where absent.
        utilities: int16 [n, chunks], the bits of bf16.
    """

    rows: Tensor
    places: Tensor
    utilities: Tensor


class ChunkIndex(Protocol):
    """The index of all stores of a rank; blocks are shards.

    Attributes:
        shapes: of the stores.
        blocks: int64 [B, 7] on CPU: (store, first row, first chunk, chunks of a row of the table,
            key of the table, place of what the first chunk reads as where it is absent, the others'
            behind it, -1 for zeros, rows of the blocks before it in its store).
        notes_losses: `offer` and `decide` note what `take_losses` gives.
        changes: how often rows may have moved.
    """

    shapes: Sequence[StoreShape]
    blocks: Tensor
    notes_losses: bool
    changes: int

    def numbers(self, store: int) -> StoreNumbers:
        """Where a store stands."""

    def set_budget(self, store: int, budget: int) -> None:
        """Bytes that a store may hold from now on; nothing is evicted."""

    def held_bytes(self, store: int) -> int:
        """Bytes that a store holds."""

    def places(self, segments: Tensor, ids: Tensor) -> Tensor:
        """int64 [most chunks, n] on CPU: place of every chunk of every row, -1 where absent."""

    def touch(self, offers: Offers) -> None:
        """Adds to the utilities of present chunks."""

    def offer(self, offers: Offers) -> Tensor:
        """Counts absent chunks, and admits those above the threshold: while there is room, then
        in place of the least useful chunk of `DRAWN` rows drawn by chance, if that is worth less.
        Others are drawn once a chunk was admitted, or `HELD_AGAINST` offers saw the same one. What
        chunks that went were worth is counted behind all offers.

        Returns:
            int64 [m, 3] on CPU: (position in ids, chunk, place) of every admitted chunk. What the
            places held before is still there until `ops.chunk_rows.step_admitted`.
        """

    def count(self, store: int, decay: float,
              part: tuple[int, int] = ALL_ROWS) -> tuple[Tensor, Tensor]:
        """Utilities and rows of a store, by block.

        Args:
            store: its number.
            decay: what is left of utilities.
            part: (n, m): of the n-th of m parts of the rows, which chance makes equal.

        Returns:
            int64 [B, BINS]: present chunks by utility; int64 [B, most chunks + 1]: rows by chunks.
        """

    def decide(self, store: int, decay: float, thresholds: Tensor, key: int) -> Tensor:
        """Decays utilities and evicts chunks below their block's threshold, fp32 [B].

        Returns:
            int64 [B]: evicted chunks.
        """

    def compact(self, store: int, *, tight: bool) -> Tensor:
        """Moves chunks to the lowest places and gives slabs back.

        Args:
            store: number of the store.
            tight: all empty slabs; else those that the budget has no room for.

        Returns:
            int64 [m, 2]: (from, to), for pools that the index does not reach.
        """

    def load(self, store: int, blocks: Tensor, rows: ChunkRows) -> None:
        """Replaces a store's rows; rows i is of block blocks[i], in any order."""

    def insert(self, block: int, rows: ChunkRows) -> Tensor:
        """Takes rows of a shard in, those chunks whose place is not negative, while there is room.

        Returns:
            int32 [n, chunks]: their places, -1 where a chunk is absent.
        """

    def list_rows(self, block: int) -> ChunkRows:
        """All rows of a shard with a chunk present."""

    def look_up(self, block: int, rows: Tensor) -> ChunkRows:
        """Some rows of a shard, int64 [n] on CPU in any order; utilities have marks."""

    def list_between(self, store: int, where: RowRange) -> Tensor:
        """int64 [n, 2]: (block, row) of some rows of a store, in any order."""

    def count_between(self, store: int, where: RowRange) -> int:
        """How many `list_between` would list."""

    def clear_marks(self, store: int) -> None:
        """From now on rows are marked that are stepped, admitted, or lose chunks to others; and
        lines of the sketch that count anything."""

    def changed_lines(self, store: int) -> Tensor:
        """int64 [n]: lines of the sketch that counted something since `clear_marks`."""

    def take_losses(self) -> Losses:
        """Rows that lost chunks since the last call, where ``notes_losses``."""

    def set_refused(self, store: int, refused: int) -> None:
        """How many chunks found no free room since the last decision."""

    def sketch(self, store: int) -> Tensor:
        """uint8 [lines * 64]: the cells of the sketch, which the caller may write."""
