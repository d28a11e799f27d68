"""The exchange of a world of one whose bags all hold the same number of ids.

Nothing travels and no bag is cut, so everything but the ids follows from the shape of the batch:
pooling jobs and gradient chunks are made once per shape and kept. Steps and results are those of
`Exchange`; only index arithmetic is saved (200 us a step).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shardlab.comm import Work
from shardlab.ops.registry import face_of
from shardlab.ops.unique import BOUNDS_CODE, Segments, Uniques
from shardlab.sharded.clock import PhaseClock
from shardlab.sharded.gradients import PendingGradients
from shardlab.sharded.inputs import Batch, PerShape
from shardlab.sharded.layout import Layout, column
from shardlab.sharded.routes import Router
from shardlab.storage import PlacedJobs, Storage


@dataclass(frozen=True)
class Shape:
    """What follows from (batch size, bag length)."""

    jobs: PlacedJobs
    chunks: Tensor
    bags: Tensor | None
    num_ids: int


@dataclass(frozen=True)
class DirectLookup:
    """What a direct forward leaves for its backward."""

    batch: Batch
    ids: Tensor
    shape: Shape
    rows: Uniques | None


class DirectExchange:
    """Reads bags straight from the rows into the output.

    Args:
        layout: the compiled plan; of a world of one, every table pooled.
        storage: all shards.
        router: checks the ids.
        device: where the rows are.
        clock: is told when a phase ends.
    """

    def __init__(self, layout: Layout, storage: Storage, router: Router,
                 device: torch.device, clock: PhaseClock) -> None:
        self.layout, self.storage, self._router = layout, storage, router
        self._clock = clock
        self._shapes: PerShape[Shape] = PerShape()
        self._segments = Segments(
            column([local.shard.rows for local in layout.local_shards]),
            column([BOUNDS_CODE[local.table.bounds] for local in layout.local_shards]))
        self._sorted_reads = face_of("scatter_rows", device.type) == "native"

    def takes(self, batch: Batch) -> bool:
        """Whether this batch's bags are all of one length, and stay so."""
        return batch.length >= 0 and not self._router.needs_lengths(batch)

    def forward(self, batch: Batch, out: Tensor, training: bool) -> DirectLookup:
        """Pools every bag into ``out``, fp32 [size, total columns].

        Args:
            batch: what to look up.
            out: the output.
            training: a backward will follow.

        Raises:
            BoundsError: an id outside its table.
        """
        shape = self._shapes.of(batch, self._make_shape)
        if training and batch.length == 1 and self._sorted_reads:
            # The update needs the ids sorted anyway. Sorted first, each row is read once, in
            # ascending order, and the sort checks the ids.
            rows = self._router.unique(batch, shape.chunks, self._segments, shape.num_ids)
            self._clock.lap("ids")
            weights = None if batch.weights is None else batch.weights[rows.positions]
            self.storage.read_scattered(rows, weights, out.view(-1))
            return DirectLookup(batch, batch.values, shape, rows)
        ids = self._router.check(batch)
        self._clock.lap("ids")
        self.storage.read_pooled(shape.jobs, ids, None, batch.weights, out.view(-1))
        return DirectLookup(batch, ids, shape, None)

    def look_ahead(self, batch: Batch) -> None:
        """Starts to bring the batch's rows up.

        Raises:
            BoundsError: an id outside its table.
        """
        shape = self._shapes.of(batch, self._make_shape)
        self.storage.prefetch(shape.chunks[:, :3], self._router.check(batch))

    def backward(self, lookup: DirectLookup, grad: Tensor) -> PendingGradients:
        """Gradients stay where they are: in ``grad``, fp32 [size, total columns]."""
        shape = lookup.shape
        return PendingGradients(lookup.ids, shape.chunks, shape.bags, lookup.batch.weights,
                                grad.view(-1), Work(), lookup.rows)

    def _make_shape(self, batch: Batch) -> Shape:
        """One job and one chunk per slot: a feature and a column piece of its table."""
        size, length, total = batch.size, batch.length, self.layout.total_columns
        jobs, chunks = [], []
        for slot in self.layout.slots:
            first = slot.feature * size * length
            at = self.layout.feature_columns[slot.feature] + slot.shard.col_start
            jobs.append([slot.block, 0, slot.shard.columns, size, first, 0, length, 0, at, total,
                         0])
            chunks.append([slot.block, first, size * length, at, total])
        bags = batch.bags if length != 1 else None
        return Shape(self.storage.place_jobs(column(jobs).reshape(-1, 11)),
                     column(sorted(chunks)).reshape(-1, 5), bags,
                     len(chunks) * size * length)
