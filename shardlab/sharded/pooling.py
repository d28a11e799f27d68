"""Step 5 at the source: what came back is pooled, decoded on the way."""

from __future__ import annotations

import torch
from torch import Tensor

from shardlab.codecs import CODECS
from shardlab.ops.rows import pool_blocks, pool_rows
from shardlab.ops.unique import fill_affine, take_affine
from shardlab.sharded.cells import CellIndex
from shardlab.sharded.early import EarlyRows, row_addresses
from shardlab.sharded.inputs import Batch, PerShape
from shardlab.sharded.layout import Layout, bag_slots, column
from shardlab.sharded.routes import Outgoing
from shardlab.specs import PoolingType

_FP32_BYTES = 4


def pool_coded(source: Tensor, jobs: Tensor, codecs: Tensor, index: Tensor,
               offsets: Tensor | None, weights: Tensor | None, out: Tensor) -> None:
    """Pooling jobs over fp32 elements, or over bytes of these codecs.

    Args:
        source: fp32, or uint8 where rows are encoded.
        jobs: int64 [J, 11], as of `pool_rows`; in bytes where ``source`` is.
        codecs: int64 [J]: number of every job's codec.
        index, offsets, weights, out: as of `pool_rows`.
    """
    if source.dtype == torch.float32:
        pool_rows(source, jobs, index, offsets, weights, out)
    else:
        pool_blocks(source, torch.cat([jobs, codecs[:, None]], 1), index, offsets, weights, out)


def copy_jobs(start: Tensor, step: Tensor, columns: Tensor, size: int) -> Tensor:
    """Pooling jobs that copy [size, columns] matrices: every bag is one row."""
    jobs = torch.zeros(start.numel(), 11, dtype=torch.int64)
    jobs[:, 0], jobs[:, 1], jobs[:, 2], jobs[:, 3], jobs[:, 6] = start, step, columns, size, 1
    return jobs


class Pooler:
    """Pools what came back into the output.

    Args:
        layout: the compiled plan.
        cells: its cells.
    """

    def __init__(self, layout: Layout, cells: CellIndex) -> None:
        self.layout, self._cells = layout, cells
        self._set_up_rows_output()
        self._set_up_bags_output()
        self._jobs: PerShape[list[tuple[Tensor, Tensor]]] = PerShape()

    def _set_up_rows_output(self) -> None:
        """Per column piece c of the ``rows`` tables: its slots, and the pooling jobs."""
        layout = self.layout
        self._passes = []
        slots = [(i, slot) for i, slot in enumerate(layout.slots) if slot.feature < 0 and slot.read]
        for chunk in sorted({slot.chunk for _, slot in slots}):
            found = [(i, slot) for i, slot in slots if slot.chunk == chunk]
            shards = {slot.table: slot.shard for _, slot in found}
            jobs = [[0, 1, shards[t].columns, 0, 0, f, 0,
                     layout.tables[t].pooling is PoolingType.MEAN,
                     layout.feature_columns[f] + shards[t].col_start, layout.total_columns, 0]
                    for t in shards for f in layout.features_of(t)]
            self._passes.append((column([i for i, _ in found]), column(jobs)))
        self._feature_table = column(layout.feature_table)
        self._table_codecs = column([CODECS[wire.forward] for wire in layout.wires])

    def _set_up_bags_output(self) -> None:
        """Pooled slots in the order of their rows, so that the first block of a bag overwrites."""
        slots = bag_slots(self.layout)
        self._bag_slots = column([i for i, _ in slots])
        self._bag_columns = column([self.layout.first_column(slot) for _, slot in slots])
        self._bag_adds = column([self.layout.groups[slot.group].row_start > 0 for _, slot in slots])

    def pool(self, outgoing: Outgoing, came: EarlyRows, out: Tensor) -> None:
        """Pools into the output.

        Args:
            outgoing: what was asked.
            came: the rows.
            out: fp32 [size, total columns]; means are not divided yet where bags came.
        """
        batch, uniques, rows = outgoing.batch, outgoing.uniques, came.rows
        codec = self._cells.forward_slots
        # The kernels count in elements where all is fp32, else in bytes.
        unit = _FP32_BYTES if codec.is_plain else 1
        source = rows.view(torch.float32) if codec.is_plain else rows
        steps = codec.vector_bytes // unit
        if uniques is not None:
            made = self._jobs.of(batch, self._make_jobs)
            for (slots, _), (jobs, codecs) in zip(self._passes, made, strict=True):
                index = self._index(outgoing, came, slots, unit)
                pool_coded(source, jobs, codecs, index, batch.offsets, batch.weights, out.view(-1))
        if self._bag_slots.numel():
            slots = self._bag_slots
            starts = came.early.slot_offsets if came.late is None else \
                came.late.slot_offsets + came.late_from
            jobs = copy_jobs(starts[slots] // unit, steps[slots],
                             self._cells.columns[slots], batch.size)
            jobs[:, 8], jobs[:, 9] = self._bag_columns, self.layout.total_columns
            jobs[:, 10] = self._bag_adds
            pool_coded(source, jobs, codec.numbers[slots],
                             torch.arange(batch.size, device=rows.device), None, None,
                             out.view(-1))

    def _make_jobs(self, batch: Batch) -> list[tuple[Tensor, Tensor]]:
        """Pooling jobs of every pass, and their codecs."""
        made = []
        for _, template in self._passes:
            jobs, features = template.clone(), template[:, 5]
            jobs[:, 3], jobs[:, 6] = batch.size, batch.length
            jobs[:, 4], jobs[:, 5] = batch.feature_starts[features], features * batch.size
            made.append((jobs, self._table_codecs[self._feature_table[features]]))
        return made

    def _index(self, outgoing: Outgoing, came: EarlyRows, slots: Tensor, unit: int) -> Tensor:
        """int64 [n]: where the row of every id of the batch begins, through these slots.

        In units of so many bytes; -1 where the id was dropped. Uniques that these slots leave out
        are undefined there, and read by no job.
        """
        uniques = outgoing.uniques
        assert uniques is not None
        assert uniques.inverse is not None
        count, sizes = uniques.ids.numel(), self._cells.forward_slots.vector_bytes
        starts, counts = outgoing.starts[slots], outgoing.counts[slots]
        if came.halves is None:
            pieces = torch.stack([starts, counts, came.early.slot_offsets[slots] // unit,
                                  sizes[slots] // unit], 1)
            return take_affine(pieces, count, uniques.inverse)
        places = row_addresses(outgoing, came, sizes)
        if not places.numel():
            return torch.full_like(uniques.inverse, -1)
        first = (outgoing.counts.cumsum(0) - outgoing.counts)[slots]
        asked = fill_affine(torch.stack([starts, counts, first, torch.ones_like(first)], 1),
                            count + 1, came.rows.device)
        at = places[asked.clamp_(0, places.numel() - 1)] // unit
        at[-1] = -1  # what the inverse -1 of a dropped id points at
        return at[uniques.inverse]
