"""The ``rows`` storage: fp32 rows and their optimiser state, one level, in memory.

A level in memory keeps payloads together and states together: a row of 64 B is then one cache line
to read, where a record of 68 B is two (measured: pooling 10 to 15 % faster). A level on a block
device wants both side by side, in one I/O; the bytes are the same.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from shardlab.errors import CheckpointError
from shardlab.ops.init import init_uniform
from shardlab.ops.rows import Blocks, StepParameters, gather_rows, pool_rows, update_rows
from shardlab.ops.unique import Uniques
from shardlab.specs import OPTIMIZER_STATE, TierBytes, record_layout, tier_bytes
from shardlab.storage.base import LocalShard, TableChunk
from shardlab.tiers import allocate

_FP32_BYTES = 4
_LINE_BYTES = 64

#: Names of the state's parts in a checkpoint, element-wise parts first.
STATE_NAMES: dict[str, tuple[str, ...]] = {
    "sgd": (),
    "adagrad": ("sum",),
    "row_wise_adagrad": ("sum",),
    "adam": ("exp_avg", "exp_avg_sq"),
    "row_wise_adam": ("exp_avg", "exp_avg_sq"),
}


class RowsStorage:
    """All shards of a rank in one arena, a block per shard.

    Args:
        shards: what to hold.
        optimizer: kind of row optimiser.
        seed: of the initial weights.
        device: where the arena lies.
    """

    def __init__(self, shards: list[LocalShard], optimizer: str, seed: int,
                 device: torch.device) -> None:
        self.shards, self.optimizer = shards, optimizer
        self.blocks, total = _place(shards, optimizer)
        self.arena = allocate(total, device)
        self._elements = self.arena.view(torch.float32)
        self._base = self.blocks.table[:, 0] // _FP32_BYTES
        self._step = self.blocks.table[:, 1] // _FP32_BYTES
        for block, local in enumerate(shards):
            init_uniform(self.blocks.rows(self.arena, block), local.table, local.shard, seed)
        # A fresh arena reads as zero, but writing it now spares the first steps its page faults.
        self.begin_load()

    def read(self, segments: Tensor, ids: Tensor, out: Tensor) -> None:
        """Copies rows into ``out`` (`ops.rows.gather_rows`)."""
        gather_rows(self.arena, self.blocks, segments, ids, out)

    def read_pooled(self, jobs: Tensor, index: Tensor, offsets: Tensor | None,
                    weights: Tensor | None, out: Tensor) -> None:
        """Pools bags straight from the rows; jobs come from `place_jobs`."""
        pool_rows(self._elements, jobs, index, offsets, weights, out)

    def place_jobs(self, jobs: Tensor) -> Tensor:
        """Fills base and step of pooling jobs whose first column is the block's number."""
        jobs, block = jobs.clone(), jobs[:, 0]
        jobs[:, 0], jobs[:, 1] = self._base[block], self._step[block]
        return jobs

    def update(self, uniques: Uniques, weights: Tensor | None, grads: Tensor,
               step: StepParameters, row_squares: Tensor | None = None) -> None:
        """Steps every unique row once (`ops.rows.update_rows`)."""
        update_rows(self.arena, self.blocks, uniques, weights, grads, step, row_squares)

    def prefetch(self, ids: Tensor) -> None:
        """Nothing to bring nearer: there is one level."""

    def tier_bytes(self) -> TierBytes:
        """Bytes of the arena, counted by the planner's arithmetic for every shard."""
        total = TierBytes()
        for local in self.shards:
            total = total + tier_bytes(local.table.storage, local.shard.tier, local.shard.rows,
                                       local.shard.columns, self.optimizer)
        assert total.total == self.arena.numel(), "the planner and the arena count differently"
        return total

    def chunks(self, max_bytes: int) -> Iterator[TableChunk]:
        """Streams copies of all rows, at most ``max_bytes`` (but a row at least) at a time."""
        for block, local in enumerate(self.shards):
            rows, state = self.blocks.rows(self.arena, block), self.blocks.state(self.arena, block)
            shard = local.shard
            row_bytes = int(self.blocks.table[block, 1] + self.blocks.table[block, 3])
            step = max(1, max_bytes // row_bytes)
            for first in range(0, shard.rows, step):
                yield TableChunk(local.table.name, shard.row_start + first, shard.col_start,
                                 rows[first:first + step].to("cpu", copy=True),
                                 self._split_state(state[first:first + step], shard.columns),
                                 local.replicated)

    def _split_state(self, state: Tensor, columns: int) -> dict[str, Tensor]:
        """Columns of the state by name; see `STATE_NAMES`."""
        per_column, per_row = OPTIMIZER_STATE[self.optimizer]
        sizes = [columns] * per_column + [1] * per_row
        parts = state.to("cpu", copy=True).split(sizes, dim=1) if sizes else ()
        return {name: part.contiguous() if size > 1 or index < per_column else part[:, 0].clone()
                for index, (name, part, size) in enumerate(
                    zip(STATE_NAMES[self.optimizer], parts, sizes, strict=True))}

    def begin_load(self) -> None:
        """Clears the optimiser state: parts of a row's state add up as they come."""
        for block in range(len(self.shards)):
            self.blocks.state(self.arena, block).zero_()

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
        rows, state = self.blocks.rows(self.arena, block), self.blocks.state(self.arena, block)
        rows[target] = chunk.weights[source].to(rows.device)
        columns, at = rows.shape[1], 0
        (inside, across), share = target, (target[1].stop - target[1].start) / rows.shape[1]
        for name in STATE_NAMES[self.optimizer] if chunk.state else ():
            value = chunk.state[name].to(rows.device)
            if value.dim() == 2:
                state[inside, at + across.start:at + across.stop] = value[source]
                at += columns
            else:
                state[inside, at] += value[source[0]] * share
                at += 1


def _place(shards: list[LocalShard], optimizer: str) -> tuple[Blocks, int]:
    """Lays payloads, then states, one behind the other; returns the blocks and the total bytes.

    Payloads of whole cache lines come first, so that no row of theirs straddles a line more.
    """
    layouts = [record_layout(local.table.storage.home, local.shard.columns, optimizer)
               for local in shards]
    table, offset = torch.zeros(len(shards), 6, dtype=torch.int64), 0
    order = sorted(range(len(shards)), key=lambda s: layouts[s].payload_bytes % _LINE_BYTES != 0)
    for block in order:
        rows, layout = shards[block].shard.rows, layouts[block]
        table[block, 0], table[block, 1] = offset, layout.payload_bytes
        table[block, 4], table[block, 5] = shards[block].shard.columns, rows
        offset += rows * layout.payload_bytes
    for block in order:
        table[block, 2], table[block, 3] = offset, layouts[block].state_bytes
        offset += shards[block].shard.rows * layouts[block].state_bytes
    return Blocks(table), offset
