"""The ``rows`` storage: every shard a chain of levels, from the kernels' arena to its home.

Shards of one level lie in the near arena themselves; of the others it holds the slots of the
nearest cache. So one kernel call reads or steps all of them, in whatever precision, and only the
rows of cached shards have to be looked up first.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from shardlab.errors import CheckpointError
from shardlab.ops.blocks import Blocks, Encoding
from shardlab.ops.cache import COUNTERS
from shardlab.ops.init import init_uniform
from shardlab.ops.moves import move_rows
from shardlab.ops.records import MoveEnd, Records
from shardlab.ops.rows import gather_rows, job_spans, pool_blocks, pool_rows, update_rows
from shardlab.ops.scatter import scatter_rows
from shardlab.ops.step_parameters import StepParameters
from shardlab.ops.unique import Uniques
from shardlab.storage.base import LocalShard, PlacedJobs, StorageOptions, TableChunk
from shardlab.storage.cache_level import CacheLevel
from shardlab.storage.chains import build_chains
from shardlab.storage.levels import Clock
from shardlab.storage_bytes import OPTIMIZER_STATE, TierBytes, tier_bytes
from shardlab.table_plan import Shard

_FP32_BYTES = 4
_INIT_BYTES = 1 << 20
#: Stream of the random bits of rows that are replaced: no update or cache level draws from it.
_REPLACED = 1 << 16

#: Names of the state's parts in a checkpoint, element-wise parts first.
STATE_NAMES: dict[str, tuple[str, ...]] = {
    "sgd": (),
    "adagrad": ("sum",),
    "row_wise_adagrad": ("sum",),
    "adam": ("exp_avg", "exp_avg_sq"),
    "row_wise_adam": ("exp_avg", "exp_avg_sq"),
}


class RowsStorage:
    """All shards of a rank that are held as rows.

    Args:
        shards: what to hold.
        options: optimiser, seed, device, folder on disk.

    Raises:
        ConfigError: a chain that cannot be built here.
        StorageError: the disk is not writable or too small.
    """

    def __init__(self, shards: list[LocalShard], options: StorageOptions) -> None:
        self.shards, self.optimizer = shards, options.optimizer
        self.clock = Clock(options.seed)
        self.chains = build_chains(shards, options, self.clock)
        near = self.chains.near
        self.arena = near.data
        plain = all((local.chain.levels[0].dtype, local.chain.state_dtype) == ("fp32", "fp32")
                    for local in shards)
        self.is_plain = plain
        self.blocks = Blocks(near.blocks.table) if plain else near.blocks
        self._owner: dict[int, tuple[CacheLevel, int]] = {
            block: (cache, number) for cache in self.chains.caches
            for number, block in enumerate(cache.numbers)}
        unit = _FP32_BYTES if plain else 1
        self._elements = self.arena.view(torch.float32) if plain else self.arena
        self._base, self._step = near.blocks.table[:, 0] // unit, near.blocks.table[:, 1] // unit
        self._codecs = None if plain or near.blocks.encodings is None else \
            near.blocks.encodings[:, 0]
        self._payloads = _payloads_of(self.blocks)
        self._scattered = _scattered_rows(shards, self.arena.device)
        for block, local in enumerate(shards):
            self._initialise(block, local, options.seed)

    def _initialise(self, block: int, local: LocalShard, seed: int) -> None:
        """Weights by (seed, table, row, column), state zero; both written now, so that a fresh
        arena's page faults do not fall into the first steps."""
        home, number = self.chains.homes[block]
        shard = local.shard
        step = max(1, _INIT_BYTES // (shard.columns * _FP32_BYTES))
        elements = self._state_elements(shard.columns)
        for first in range(0, shard.rows, step):
            count = min(step, shard.rows - first)
            part = Shard(shard.rank, shard.row_start + first, shard.row_start + first + count,
                         shard.col_start, shard.col_end)
            values = torch.empty(count, shard.columns)
            init_uniform(values, local.table, part, seed)
            home.write_range(number, first, values, torch.zeros(count, elements))

    def _state_elements(self, columns: int) -> int:
        per_column, per_row = OPTIMIZER_STATE[self.optimizer]
        return per_column * columns + per_row

    # ------------------------------------------------------------------ places
    def _places(self, spans: list[tuple[int, int, int]], ids: Tensor, *,
                write: bool = False) -> Tensor:
        """Rows of shards as places of their near blocks.

        Args:
            spans: (block, start, count) of ids; a block may come several times.
            ids: int64, rows of their blocks.
            write: the rows will be stepped; `settle` follows.
        """
        if not self._owner:
            return ids
        places = ids.clone()
        for cache in self.chains.caches:
            mine: dict[int, list[tuple[int, int]]] = {}
            for block, start, count in spans:
                owner = self._owner.get(block)
                if count and owner is not None and owner[0] is cache:
                    mine.setdefault(owner[1], []).append((start, count))
            pieces = [piece for number in sorted(mine) for piece in mine[number]]
            if not pieces:
                continue
            jobs, at = [], 0
            for number in sorted(mine):
                size = sum(count for _, count in mine[number])
                jobs.append([number, at, size])
                at += size
            rows = torch.cat([ids[start:start + count] for start, count in pieces]).cpu()
            found = cache.place(torch.tensor(jobs), rows, write=write, touch=not write)
            at = 0
            for start, count in pieces:
                places[start:start + count] = found[at:at + count].to(places.device)
                at += count
        return places

    # ------------------------------------------------------------------ verbs
    def read(self, segments: Tensor, ids: Tensor, out: Tensor) -> None:
        """Decodes rows into ``out`` (`ops.rows.gather_rows`)."""
        places = self._places([(b, s, n) for b, s, n, _ in segments.tolist()], ids) \
            if self._owner else ids
        gather_rows(self.arena, self.blocks, segments, places, out)

    def read_codes(self, segments: Tensor, ids: Tensor, out: MoveEnd) -> None:
        """Encodes rows while they are read (`storage.base.read_codes`); equal codecs are copied."""
        places = self._places([(b, s, n) for b, _, s, n in segments.tolist()], ids) \
            if self._owner else ids
        move_rows(MoveEnd(self.arena, self._payloads, places), out, segments)

    def read_pooled(self, jobs: PlacedJobs, index: Tensor, offsets: Tensor | None,
                    weights: Tensor | None, out: Tensor) -> None:
        """Pools bags straight from the rows; jobs come from `place_jobs`."""
        if self._owner:
            index = self._places(job_spans(jobs.jobs, offsets), index)
        if self.is_plain:
            pool_rows(self._elements, jobs.kernel, index, offsets, weights, out)
        else:
            pool_blocks(self.arena, jobs.kernel, index, offsets, weights, out)

    def read_scattered(self, uniques: Uniques, weights: Tensor | None, out: Tensor) -> None:
        """Copies every row to its entries' places (`ops.scatter.scatter_rows`)."""
        scatter_rows(self.arena, self.blocks, self._placed(uniques, write=False), weights, out)

    def _placed(self, uniques: Uniques, *, write: bool) -> Uniques:
        """The same uniques with places for ids."""
        if not self._owner:
            return uniques
        splits = uniques.splits.tolist()
        spans = [(block, splits[block], splits[block + 1] - splits[block])
                 for block in range(len(self.shards))]
        return replace(uniques, ids=self._places(spans, uniques.ids, write=write))

    def place_jobs(self, jobs: Tensor) -> PlacedJobs:
        """Fills base and step of pooling jobs whose first column is the block's number."""
        kernel, block = jobs.clone(), jobs[:, 0]
        kernel[:, 0], kernel[:, 1] = self._base[block], self._step[block]
        if self._codecs is not None:
            kernel = torch.cat([kernel, self._codecs[block, None]], 1)
        return PlacedJobs(jobs, kernel)

    def begin_step(self, step: int) -> None:
        """Tells how many optimiser steps were taken, this one included."""
        self.clock.step = step

    def update(self, uniques: Uniques, weights: Tensor | None, grads: Tensor,
               step: StepParameters, row_squares: Tensor | None = None) -> None:
        """Steps every unique row once (`ops.rows.update_rows`)."""
        placed = self._placed(uniques, write=True)
        if not self.is_plain:
            moved = bool(self._owner) or self._scattered is not None
            step = replace(step, key=self.clock.key(0),
                           rows=self._table_rows(uniques) if moved else None)
        update_rows(self.arena, self.blocks, placed, weights, grads, step, row_squares)
        for cache in self.chains.caches:
            cache.settle()

    def _table_rows(self, uniques: Uniques) -> Tensor:
        if self._scattered is not None:
            rows, first = self._scattered
            shift = torch.repeat_interleave(first, uniques.splits.diff())
            return rows[uniques.ids + shift.to(rows.device)]
        starts = torch.tensor([local.shard.row_start for local in self.shards])
        shift = torch.repeat_interleave(starts, uniques.splits.diff())
        return uniques.ids + shift.to(uniques.ids.device)

    def prefetch(self, segments: Tensor, ids: Tensor) -> None:
        """Starts to bring up rows that the next read will ask for.

        Args:
            segments: int64 [K, 3] on CPU: (block, start, count).
            ids: int64.
        """
        for cache in self.chains.caches:
            parts: dict[int, list[Tensor]] = {}
            for block, start, count in segments.tolist():
                owner = self._owner.get(block)
                if count and owner is not None and owner[0] is cache:
                    parts.setdefault(owner[1], []).append(ids[start:start + count].cpu())
            rows = [torch.unique(torch.cat(parts[number])) for number in sorted(parts)]
            if rows:
                counts = torch.tensor([part.numel() for part in rows])
                jobs = torch.stack([torch.tensor(sorted(parts)), counts.cumsum(0) - counts,
                                    counts], 1)
                cache.prefetch(jobs, torch.cat(rows))

    # ------------------------------------------------------------------ bytes
    def tier_bytes(self) -> TierBytes:
        """Bytes by tier, counted by the planner's arithmetic for every shard."""
        total = TierBytes()
        for local in self.shards:
            total = total + tier_bytes(local.storage, local.shard.rows, local.shard.columns,
                                       self.optimizer)
        return total

    def cache_counts(self, block: int) -> list[int]:
        """Counts of a shard's nearest cache since the start: `COUNTERS`, then bytes moved."""
        if block not in self._owner:
            return [0] * (len(COUNTERS) + 1)
        cache, number = self._owner[block]
        _, row_bytes, _, state_bytes, _, _ = self.blocks.table[block].tolist()
        return [*cache.counters[number].tolist(),
                int(cache.moved[number]) * (row_bytes + state_bytes)]

    # ------------------------------------------------------------------ checkpoints
    def flush(self) -> None:
        """Writes all cached rows to their homes and empties the caches."""
        for cache in self.chains.caches:
            cache.flush()

    def chunks(self, max_bytes: int) -> Iterator[TableChunk]:
        """Streams copies of all rows, at most ``max_bytes`` (but a row at least) at a time.

        Caches are emptied first: what a checkpoint holds and what the run goes on with are then
        the same, and so a resumed run is bit-identical to one that was not stopped.
        """
        self.flush()
        for block, local in enumerate(self.shards):
            home, number = self.chains.homes[block]
            shard = local.shard
            row_bytes = _FP32_BYTES * (shard.columns + self._state_elements(shard.columns))
            step = max(1, max_bytes // row_bytes)
            for first in range(0, shard.rows, step):
                rows, state = home.read_range(number, first, min(step, shard.rows - first))
                yield TableChunk(local.table.name, shard.row_start + first, shard.col_start, rows,
                                 self._split_state(state, shard.columns), local.replicated)

    def _split_state(self, state: Tensor, columns: int) -> dict[str, Tensor]:
        """Columns of the state by name; see `STATE_NAMES`."""
        per_column, per_row = OPTIMIZER_STATE[self.optimizer]
        sizes = [columns] * per_column + [1] * per_row
        parts = torch.split(state, sizes, dim=1) if sizes else ()
        return {name: part.contiguous() if size > 1 or index < per_column else part[:, 0].clone()
                for index, (name, part, size) in enumerate(
                    zip(STATE_NAMES[self.optimizer], parts, sizes, strict=True))}

    def begin_load(self) -> None:
        """Clears the optimiser state: parts of a row's state add up as they come."""
        self.flush()
        for block, local in enumerate(self.shards):
            home, number = self.chains.homes[block]
            elements = self._state_elements(local.shard.columns)
            if not elements:
                continue
            step = max(1, _INIT_BYTES // (elements * _FP32_BYTES))
            for first in range(0, local.shard.rows, step):
                count = min(step, local.shard.rows - first)
                home.write_range(number, first, None, torch.zeros(count, elements))

    def load_chunk(self, chunk: TableChunk) -> None:
        """Writes the cells that lie in this storage's shards.

        A per-row state is a mean over the columns it was kept for: a shard that is covered by
        several chunks gets the mean of theirs, weighted by columns.

        Raises:
            CheckpointError: the chunk's state is not this optimiser's.
        """
        wanted = STATE_NAMES[self.optimizer]
        if chunk.state and set(chunk.state) != set(wanted):
            raise CheckpointError(f"table {chunk.table!r}: checkpoint holds optimiser state "
                                  f"{sorted(chunk.state)}, {self.optimizer} needs {sorted(wanted)}")
        for part in chunk.dense(max(1, _INIT_BYTES // (_FP32_BYTES * chunk.weights.shape[1]))):
            self._load_dense(part)

    def _load_dense(self, chunk: TableChunk) -> None:
        rows, columns = chunk.weights.shape
        for block, local in enumerate(self.shards):
            shard = local.shard
            top = max(shard.row_start, chunk.row_start)
            bottom = min(shard.row_end, chunk.row_start + rows)
            left = max(shard.col_start, chunk.col_start)
            right = min(shard.col_end, chunk.col_start + columns)
            if local.table.name != chunk.table or top >= bottom or left >= right:
                continue
            inside = slice(top - shard.row_start, bottom - shard.row_start)
            target = (inside, slice(left - shard.col_start, right - shard.col_start))
            source = (slice(top - chunk.row_start, bottom - chunk.row_start),
                      slice(left - chunk.col_start, right - chunk.col_start))
            self._write(block, chunk, target, source)

    def _write(self, block: int, chunk: TableChunk, target: tuple[slice, slice],
               source: tuple[slice, slice]) -> None:
        """Copies the ``source`` cells of a chunk to the ``target`` cells of a block."""
        home, number = self.chains.homes[block]
        (inside, across), columns = target, self.shards[block].shard.columns
        rows, state = home.read_range(number, inside.start, inside.stop - inside.start)
        rows[:, across] = chunk.weights[source]
        at, share = 0, (across.stop - across.start) / columns
        for name in STATE_NAMES[self.optimizer] if chunk.state else ():
            value = chunk.state[name]
            if value.dim() == 2:
                state[:, at + across.start:at + across.stop] = value[source]
                at += columns
            else:
                state[:, at] += value[source[0]] * share
                at += 1
        home.write_range(number, inside.start, rows, state)

    def row_elements(self, block: int) -> int:
        """fp32 elements of a row and its state."""
        columns = self.shards[block].shard.columns
        return columns + self._state_elements(columns)

    def read_range(self, block: int, first: int, count: int) -> tuple[Tensor, Tensor]:
        """Copies of fp32 weights and states of rows, as their home holds them; any thread."""
        home, number = self.chains.homes[block]
        return home.read_range(number, first, count)

    def read_rows(self, block: int, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The same of single rows; any thread."""
        home, number = self.chains.homes[block]
        end = home.source(torch.tensor([[number, 0, rows.numel()]]), rows)
        records = Records(end.arena, end.blocks, home.numbers[number], end.places)
        return records.read_rows().cpu(), records.read_states().cpu()

    def write_rows(self, block: int, rows: Tensor, weights: Tensor, state: Tensor) -> None:
        """Replaces single rows and their states in their home, after a `flush`.

        Args:
            block: the shard.
            rows: int64, ascending, on CPU.
            weights, state: fp32, as `read_rows` gives them.
        """
        home, number = self.chains.homes[block]
        count, columns = weights.shape
        end = home.target(torch.tensor([[number, 0, count]]), rows)
        device, step = end.arena.device, _FP32_BYTES * (columns + state.shape[1])
        plain = Blocks.build(
            torch.tensor([[0, step, _FP32_BYTES * columns, step, columns, count]]),
            [Encoding("fp32", "fp32", *OPTIMIZER_STATE[self.optimizer])])
        given = torch.cat([weights, state], 1).view(-1).view(torch.uint8).to(device)
        move_rows(MoveEnd(given, plain, torch.arange(count, device=device)), end,
                  torch.tensor([[0, home.numbers[number], 0, count]]),
                  self.clock.key(_REPLACED),
                  (rows + self.shards[block].shard.row_start).to(device))
        home.commit()

    def named_state(self, block: int, state: Tensor) -> dict[str, Tensor]:
        """States [n, elements] by name."""
        return self._split_state(state, self.shards[block].shard.columns)

    def close(self) -> None:
        """Gives back what is not memory: files on disk."""
        for home in self.chains.disk_homes:
            home.close()


def _scattered_rows(shards: list[LocalShard],
                    device: torch.device) -> tuple[Tensor, Tensor] | None:
    """(table rows of all shards' rows, first of every shard) where they are no ranges."""
    if not any(local.table_rows for local in shards):
        return None
    counts = torch.tensor([len(local.table_rows) for local in shards])
    rows = [row for local in shards for row in local.table_rows]
    return torch.tensor(rows, device=device), counts.cumsum(0) - counts


def _payloads_of(blocks: Blocks) -> Blocks:
    """The same blocks without their states, for moves of rows alone."""
    table, encodings = blocks.table.clone(), blocks.encodings
    table[:, 2], table[:, 3] = table[:, 0], 0
    if encodings is None:
        return Blocks.build(table, [Encoding()] * len(table))
    encodings = encodings.clone()
    encodings[:, 1:4] = 0  # fp32 states of no elements
    return Blocks(table, encodings)
