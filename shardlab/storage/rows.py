"""The ``rows`` storage: fp32 records of payload and optimiser state, one level, in memory."""

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

#: Names of the state's parts in a checkpoint, element-wise parts first.
STATE_NAMES: dict[str, tuple[str, ...]] = {
    "sgd": (),
    "adagrad": ("sum",),
    "row_wise_adagrad": ("sum",),
    "adam": ("exp_avg", "exp_avg_sq"),
    "row_wise_adam": ("exp_avg", "exp_avg_sq"),
}


class RowsStorage:
    """All shards of a rank in one arena, a block of records per shard.

    Args:
        shards: what to hold.
        optimizer: kind of row optimiser.
        seed: of the initial weights.
        device: where the arena lies.
    """

    def __init__(self, shards: list[LocalShard], optimizer: str, seed: int,
                 device: torch.device) -> None:
        self.shards, self.optimizer = shards, optimizer
        table, offset = [], 0
        for local in shards:
            rows, columns = local.shard.rows, local.shard.columns
            layout = record_layout(local.table.storage.home, columns, optimizer)
            table.append([offset, layout.record_bytes, columns, rows])
            offset += rows * layout.record_bytes
        self.blocks = Blocks(torch.tensor(table, dtype=torch.int64).reshape(-1, 4))
        self.arena = allocate(offset, device)
        self._elements = self.arena.view(torch.float32)
        self._base = self.blocks.table[:, 0] // _FP32_BYTES
        self._step = self.blocks.table[:, 1] // _FP32_BYTES
        for block, local in enumerate(shards):
            init_uniform(self.blocks.rows(self.arena, block), local.table, local.shard, seed)

    def read(self, segments: Tensor, ids: Tensor, out: Tensor) -> None:
        """Copies rows into ``out`` (`ops.rows.gather_rows`)."""
        gather_rows(self.arena, self.blocks, segments, ids, out)

    def read_pooled(self, jobs: Tensor, index: Tensor, offsets: Tensor | None,
                    weights: Tensor | None, out: Tensor) -> None:
        """Pools bags straight from the records; ``jobs[:, 0]`` is the block's number."""
        jobs = jobs.clone()
        block = jobs[:, 0]
        jobs[:, 1] = self._step[block]
        jobs[:, 0] = self._base[block]
        pool_rows(self._elements, jobs, index, offsets, weights, out)

    def update(self, uniques: Uniques, weights: Tensor | None, grads: Tensor,
               step: StepParameters) -> None:
        """Steps every unique row once (`ops.rows.update_rows`)."""
        update_rows(self.arena, self.blocks, uniques, weights, grads, step)

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
        """Streams copies of all records, at most ``max_bytes`` (but a row at least) at a time."""
        for block, local in enumerate(self.shards):
            records, shard = self.blocks.rows(self.arena, block), local.shard
            step = max(1, max_bytes // int(self.blocks.table[block, 1]))
            for first in range(0, shard.rows, step):
                part = records[first:first + step]
                yield TableChunk(local.table.name, shard.row_start + first, shard.col_start,
                                 part[:, :shard.columns].to("cpu", copy=True),
                                 self._split_state(part[:, shard.columns:], shard.columns),
                                 local.replicated)

    def _split_state(self, state: Tensor, columns: int) -> dict[str, Tensor]:
        """State columns of records by name; see `STATE_NAMES`."""
        per_column, per_row = OPTIMIZER_STATE[self.optimizer]
        sizes = [columns] * per_column + [1] * per_row
        parts = state.to("cpu", copy=True).split(sizes, dim=1) if sizes else ()
        return {name: part.contiguous() if size > 1 or index < per_column else part[:, 0].clone()
                for index, (name, part, size) in enumerate(
                    zip(STATE_NAMES[self.optimizer], parts, sizes, strict=True))}

    def begin_load(self) -> None:
        """Clears the optimiser state: parts of a row's state add up as they come."""
        for block, local in enumerate(self.shards):
            self.blocks.rows(self.arena, block)[:, local.shard.columns:] = 0

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
            records = self.blocks.rows(self.arena, block)[top - shard.row_start:
                                                          bottom - shard.row_start]
            self._write(records, shard.columns, chunk,
                        (top - chunk.row_start, bottom - chunk.row_start,
                         left - shard.col_start, right - shard.col_start,
                         left - chunk.col_start))

    def _write(self, records: Tensor, columns: int, chunk: TableChunk,
               span: tuple[int, int, int, int, int]) -> None:
        top, bottom, left, right, source = span
        width, at = right - left, 0
        source_cells = (slice(top, bottom), slice(source, source + width))
        records[:, left:right] = chunk.weights[source_cells].to(records.device)
        for name in STATE_NAMES[self.optimizer] if chunk.state else ():
            value = chunk.state[name].to(records.device)
            at = columns if at == 0 else at
            if value.dim() == 2:
                records[:, at + left:at + right] = value[source_cells]
                at += columns
            else:
                records[:, at] += value[top:bottom] * (width / columns)
