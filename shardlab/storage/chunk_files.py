"""Rows of pruned tables in checkpoints: only those that are present, with what they are worth.

A `TableChunk` of a pruned table lists the rows of a range that have chunks. Weights and state are
those that any storage takes (absent chunks are zeros, a per-row state is the mean of the row's
chunks). What only a pruned table takes lies beside them: which chunks are present, their utilities,
their own per-row states, and, in a shard's first chunk, the sketch.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from shardlab.codecs import rounding_key
from shardlab.errors import CheckpointError
from shardlab.ops.chunks import ChunkRows
from shardlab.ops.records import Records
from shardlab.storage.base import TableChunk
from shardlab.storage.chunk_start import chunk_numbers
from shardlab.storage.chunk_stores import NO_BUDGET
from shardlab.storage.rows import STATE_NAMES
from shardlab.storage_bytes import OPTIMIZER_STATE

if TYPE_CHECKING:
    from shardlab.storage.pruned import PrunedStorage

_FP32_BYTES = 4


class ChunkFiles:
    """Streams a storage's rows out and in.

    Args:
        storage: whose rows.
    """

    def __init__(self, storage: PrunedStorage) -> None:
        self._storage = storage
        self._loading = False

    def settle(self) -> None:
        """Ends a load: chunks are moved together, as they were when they were saved."""
        if self._loading:
            self._loading = False
            for store in range(len(self._storage.stores)):
                self._storage.compact(store)

    # ------------------------------------------------------------------ out
    def chunks(self, max_bytes: int) -> Iterator[TableChunk]:
        """Ranges of rows that tile every shard; see `Storage.chunks`."""
        storage = self._storage
        for store in range(len(storage.stores)):
            storage.compact(store)
        for block, local in enumerate(storage.shards):
            shard, found = local.shard, storage.index.list_rows(block)
            per_column, per_row = OPTIMIZER_STATE[storage.optimizer]
            row_bytes = _FP32_BYTES * ((1 + per_column) * shard.columns + per_row)
            step = max(1, max_bytes // row_bytes)
            starts = [0, *found.rows[step::step].tolist()]
            for i, first in enumerate(starts):
                last = starts[i + 1] if i + 1 < len(starts) else shard.rows
                part = slice(i * step, min((i + 1) * step, found.rows.numel()))
                yield self._chunk(block, (first, last), ChunkRows(
                    found.rows[part], found.places[part], found.utilities[part]))

    def _chunk(self, block: int, span: tuple[int, int], rows: ChunkRows) -> TableChunk:
        storage, local = self._storage, self._storage.shards[block]
        shard, width = local.shard, storage.pools.width(block)
        count, chunks = rows.places.shape
        at = rows.places.reshape(-1).long()
        records = Records(storage.pools.arena, storage.pools.blocks, block,
                          at.clamp(min=0).to(storage.pools.arena.device))
        here = (at >= 0)[:, None]
        weights = torch.where(here, records.read_rows().cpu(), 0.0).view(count, shard.columns)
        states = records.read_states().cpu()
        states = torch.where(here, states, 0.0).view(count, chunks, states.shape[1])
        extra = {"utilities": torch.where(rows.places >= 0, rows.utilities, -1).to(torch.int16)}
        store = int(storage.index.blocks[block, 0])
        extra["threshold"] = storage.thresholds[block:block + 1].clone()
        extra["decided_at"] = torch.tensor([storage.since[store]])
        state = self._split(states, width)
        per_column, per_row = OPTIMIZER_STATE[storage.optimizer]
        if per_row:
            extra["row_states"] = states[:, :, per_column * width:].reshape(
                count, chunks * per_row).contiguous()
        if span[0] == 0:
            extra["scale"] = storage.scale[block:block + 1].clone()
            extra["sketch"] = storage.index.sketch(store).clone()
            extra["sketch_of"] = torch.tensor([self._identity(store)])
            extra["budget"] = torch.tensor([storage.index.numbers(store).budget])
        return TableChunk(local.table.name, shard.row_start + span[0], shard.col_start, weights,
                          state, False, rows.rows - span[0], span[1] - span[0], extra)

    def _split(self, states: Tensor, width: int) -> dict[str, Tensor]:
        """States [n, chunks, elements] by name: [n, columns], or [n], means of present chunks."""
        storage, count = self._storage, states.shape[0]
        per_column, _ = OPTIMIZER_STATE[storage.optimizer]
        parts: dict[str, Tensor] = {}
        for number, name in enumerate(STATE_NAMES[storage.optimizer]):
            if number < per_column:
                part = states[:, :, number * width:(number + 1) * width]
                parts[name] = part.reshape(count, states.shape[1] * width).contiguous()
            else:
                part = states[:, :, per_column * width + number - per_column]
                parts[name] = part.sum(1) / (part != 0).sum(1).clamp(min=1)
        return parts

    def _identity(self, store: int) -> int:
        """A number for what a sketch counts: the store's shards and size."""
        storage = self._storage
        plan = storage.stores[store]
        parts = [(block, storage.shards[block].table.name, vars(storage.shards[block].shard))
                 for block in plan.blocks]
        return zlib.crc32(repr((parts, plan.shape.layout)).encode())

    # ------------------------------------------------------------------ in
    def begin_load(self) -> None:
        """Drops all chunks and what is known of absent ones."""
        storage = self._storage
        for store in range(len(storage.stores)):
            none = torch.full((len(storage.shards),), float("inf"))
            storage.index.decide(store, 0.0, none, 0)
            storage.index.compact(store, tight=True)
            storage.index.sketch(store).zero_()
        self._loading = True

    def load_chunk(self, chunk: TableChunk) -> None:
        """Writes the cells that lie in this storage's shards; see `Storage.load_chunk`.

        Raises:
            CheckpointError: the chunk's state is not this optimiser's.
        """
        wanted = STATE_NAMES[self._storage.optimizer]
        if chunk.state and set(chunk.state) != set(wanted):
            raise CheckpointError(f"table {chunk.table!r}: checkpoint holds optimiser state "
                                  f"{sorted(chunk.state)}, {self._storage.optimizer} needs "
                                  f"{sorted(wanted)}")
        for block, local in enumerate(self._storage.shards):
            shard = local.shard
            top = max(shard.row_start, chunk.row_start)
            bottom = min(shard.row_end, chunk.row_start + chunk.num_rows)
            left = max(shard.col_start, chunk.col_start)
            right = min(shard.col_end, chunk.col_start + chunk.weights.shape[1])
            if local.table.name == chunk.table and top < bottom and left < right:
                self._load(block, chunk, (top, bottom), (left, right))

    def _load(self, block: int, chunk: TableChunk, rows: tuple[int, int],
              columns: tuple[int, int]) -> None:
        """Takes in the chunks of a rectangle of the table."""
        storage, local = self._storage, self._storage.shards[block]
        width, shard = storage.pools.width(block), local.shard
        if columns[0] % width or columns[1] % width:
            raise CheckpointError(f"table {chunk.table!r}: the checkpoint cuts columns at "
                                  f"{columns}, which are no multiples of chunks of {width}")
        present = torch.arange(chunk.weights.shape[0]) if chunk.present is None else chunk.present
        some = ((present + chunk.row_start >= rows[0])
                & (present + chunk.row_start < rows[1])).nonzero().flatten()
        first = (columns[0] - shard.col_start) // width
        count = (columns[1] - columns[0]) // width
        source = slice(columns[0] - chunk.col_start, columns[1] - chunk.col_start)
        weights = chunk.weights[some, source].reshape(-1, width)
        utilities, here = self._utilities(chunk, some, source, weights.view(some.numel(), count,
                                                                            width))
        places = torch.full((some.numel(), storage.pools.chunks(block)), -1, dtype=torch.int32)
        places[:, first:first + count] = here.to(torch.int32) - 1
        codes = torch.zeros_like(places, dtype=torch.int16)
        codes[:, first:first + count] = utilities
        ids = present[some] + chunk.row_start - shard.row_start
        taken = self._insert(block, ids, places, codes, exact="utilities" in chunk.extra)
        at = taken[:, first:first + count].reshape(-1).long()
        kept = (at >= 0).nonzero().flatten()
        states = self._states(chunk, some, source, width).flatten(0, 1)
        self._write(block, ids, (first, count), kept, (at, weights, states))
        self._take_store(block, chunk)

    def _utilities(self, chunk: TableChunk, some: Tensor, source: slice,
                   weights: Tensor) -> tuple[Tensor, Tensor]:
        """(codes int16 [n, chunks], which are present) of some rows and columns."""
        count, width = weights.shape[1:]
        saved = chunk.extra.get("utilities")
        grain = None if saved is None else chunk.weights.shape[1] // saved.shape[1]
        if saved is not None and grain == width:
            codes = saved[some, source.start // width:source.stop // width]
            return codes.clamp(min=0), codes >= 0
        return torch.zeros(weights.shape[0], count, dtype=torch.int16), weights.abs().sum(2) > 0

    def _insert(self, block: int, ids: Tensor, places: Tensor, codes: Tensor, *,
                exact: bool) -> Tensor:
        """Places; a pruned checkpoint's chunks all come in, others while there is room."""
        index, store = self._storage.index, int(self._storage.index.blocks[block, 0])
        budget = index.numbers(store).budget
        if exact:
            index.set_budget(store, NO_BUDGET)
        taken = index.insert(block, ChunkRows(ids, places, codes))
        index.set_budget(store, budget)
        return taken

    def _states(self, chunk: TableChunk, some: Tensor, source: slice, width: int) -> Tensor:
        """fp32 [n, chunks, elements]: states of some rows and columns; zeros where unknown."""
        storage, count = self._storage, (source.stop - source.start) // width
        per_column, per_row = OPTIMIZER_STATE[storage.optimizer]
        states = torch.zeros(some.numel(), count, per_column * width + per_row)
        for number, name in enumerate(STATE_NAMES[storage.optimizer] if chunk.state else ()):
            value = chunk.state[name]
            if number < per_column:
                states[:, :, number * width:(number + 1) * width] = \
                    value[some, source].reshape(-1, count, width)
            else:
                states[:, :, per_column * width + number - per_column] = value[some, None]
        saved = chunk.extra.get("row_states")
        if saved is not None and per_row and chunk.extra["utilities"].shape[1] * width \
                == chunk.weights.shape[1]:
            each = saved.view(saved.shape[0], saved.shape[1] // per_row, per_row)
            states[:, :, per_column * width:] = \
                each[some, source.start // width:source.stop // width]
        return states

    def _write(self, block: int, ids: Tensor, across: tuple[int, int], kept: Tensor,
               values: tuple[Tensor, Tensor, Tensor]) -> None:
        """Encodes weights and states of the chunks ``kept`` into their places."""
        pools, (first, count) = self._storage.pools, across
        at, weights, states = values
        if not kept.numel():
            return
        device = pools.arena.device
        records = Records(pools.arena, pools.blocks, block, at[kept].to(device))
        numbers = chunk_numbers(pools, block, ids).view(ids.numel(), -1)
        mine = numbers[:, first:first + count].reshape(-1)[kept].to(device)
        words = records.words(rounding_key(self._storage.clock.seed, self._storage.clock.step),
                              mine)
        records.write_rows(weights[kept].to(device), words)
        if states.shape[1]:
            records.write_states(states[kept].to(device), words)

    def _take_store(self, block: int, chunk: TableChunk) -> None:
        """Takes over what decisions left; sketch and budget only if made for the same shards."""
        storage, extra = self._storage, chunk.extra
        store = int(storage.index.blocks[block, 0])
        if "threshold" in extra:
            storage.thresholds[block] = extra["threshold"][0]
            storage.since[store] = int(extra["decided_at"])
        if "sketch" in extra and int(extra["sketch_of"]) == self._identity(store):
            storage.scale[block] = extra["scale"][0]
            storage.index.sketch(store).copy_(extra["sketch"])
            storage.index.set_budget(store, int(extra["budget"]))
