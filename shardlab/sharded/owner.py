"""Steps 3 and 4 at the owner: asked rows and bags are read, and encoded into the buffer."""

from __future__ import annotations

import torch
from torch import Tensor

from shardlab.ops.cells import select_columns
from shardlab.ops.unique import fill_affine
from shardlab.sharded.cells import Buffer, CellIndex
from shardlab.sharded.gradients import bag_offsets, entry_weights
from shardlab.sharded.layout import Layout, column
from shardlab.sharded.messages import Incoming
from shardlab.sharded.wire_watch import FORWARD, SAMPLE_ROWS, WireWatch
from shardlab.storage import Storage, read_codes

_FP32_BYTES = 4


class OwnerReads:
    """Reads what this rank was asked for.

    Args:
        layout: the compiled plan.
        cells: its cells.
        storage: this rank's shards.
        device: where rows are needed.
        direct: bags go straight to the output; everything is at home.
    """

    def __init__(self, layout: Layout, cells: CellIndex, storage: Storage, device: torch.device,
                 *, direct: bool) -> None:
        self.layout, self._cells, self.storage = layout, cells, storage
        self._device, self._direct = device, direct
        self._has_rows = any(slot.feature < 0 for slot in layout.slots)
        self._has_pooled = any(slot.feature >= 0 for slot in layout.slots)
        self._cell_blocks = cells.cell_blocks
        self._set_up_reads()

    def prefetch(self, incoming: Incoming) -> None:
        """Tells the storage what will be read."""
        self.storage.prefetch(torch.stack([self._cell_blocks, incoming.starts,
                                           incoming.counts.view(-1)], 1), incoming.ids)

    def _set_up_reads(self) -> None:
        mine = self._cells.mine
        ranks = range(len(self._cells.peers))
        gather = [(rank, i) for rank in ranks for i, slot in enumerate(mine)
                  if slot.feature < 0 and bool(self._cells.my_read[rank, i])]
        bags = [(rank, i) for rank in ranks for i, slot in enumerate(mine) if slot.feature >= 0]
        self._gather_cells = column([rank * len(mine) + i for rank, i in gather])
        self._bag_cells = column([rank * len(mine) + i for rank, i in bags])
        self._bag_ranks = column([rank for rank, _ in bags])
        jobs = [[mine[i].block, 0, mine[i].shard.columns, 0, 0, 0, -1, 0, 0,
                 mine[i].shard.columns, 0] for _, i in bags]
        self._bag_jobs = column(jobs).reshape(-1, 11)
        if self._direct:
            for job, (_, i) in zip(self._bag_jobs, bags, strict=True):
                job[8], job[9] = self.layout.first_column(mine[i]), self.layout.total_columns
                job[10] = self.layout.groups[mine[i].group].row_start > 0

    def read(self, incoming: Incoming, place: Buffer, rows: Tensor, watch: WireWatch, *,
             pooled: bool = True) -> None:
        """Every asked row or bag, encoded.

        Args:
            incoming: what was asked.
            place: of the buffer.
            rows: uint8 [place.total], the buffer.
            watch: samples errors.
            pooled: bags too.
        """
        codec = self._cells.forward_cells
        if self._has_rows:
            counts, starts, cells = incoming.counts.view(-1), incoming.starts, self._gather_cells
            if codec.is_plain:
                segments = select_columns([self._cell_blocks, starts, counts,
                                           place.cell_offsets // _FP32_BYTES], cells)
                self.storage.read(segments, incoming.ids, rows.view(torch.float32))
            else:
                pieces = torch.stack([starts[cells], counts[cells], torch.zeros_like(cells),
                                      torch.ones_like(cells)], 1)
                places = fill_affine(pieces, incoming.ids.numel(), rows.device)
                end = codec.coded_end(rows, place.cell_offsets, place.cell_vectors, places)
                segments = torch.stack([self._cell_blocks[cells], cells, starts[cells],
                                        counts[cells]], 1)
                read_codes(self.storage, segments, incoming.ids, end)
                self._watch_read(watch, incoming, segments)
        bags_too = self._has_pooled and pooled
        if codec.is_plain and bags_too:
            self.read_bags(incoming, place.cell_offsets // _FP32_BYTES, rows.view(torch.float32))
        if codec.is_plain:
            self._watch_cells(watch, rows.view(torch.float32), place.cell_offsets // _FP32_BYTES,
                              place.cell_vectors)
        elif bags_too:
            # Bags are summed in fp32 first: there are fewer of them than of rows.
            some = torch.where(self._cells.my_pooled.repeat(len(incoming.sizes)),
                               place.cell_vectors, 0)
            start = some * codec.columns
            start = start.cumsum(0) - start
            bags = torch.empty(int((some * codec.columns).sum()), device=rows.device)
            self.read_bags(incoming, start, bags)
            codec.encode(bags, start, some, (rows, place.cell_offsets))
            self._watch_cells(watch, bags, start, some)

    def _watch_cells(self, watch: WireWatch, values: Tensor, start: Tensor,
                     counts: Tensor) -> None:
        if watch.due:
            watch.look(FORWARD, self._cells.sent_rows, values, start, counts)

    def _watch_read(self, watch: WireWatch, incoming: Incoming, segments: Tensor) -> None:
        """Some of the rows once more, as fp32."""
        if not watch.due:
            return
        counts = torch.zeros(len(self._cells.sent_rows), dtype=torch.int64)
        counts[segments[:, 1]] = segments[:, 3].clamp(max=SAMPLE_ROWS)
        elements = counts * self._cells.forward_cells.columns
        start = elements.cumsum(0) - elements
        rows = torch.empty(int(elements.sum()), device=self._device)
        some = segments[:, [0, 2, 3, 3]].clone()
        some[:, 2], some[:, 3] = counts[segments[:, 1]], start[segments[:, 1]]
        self.storage.read(some, incoming.ids, rows)
        watch.look(FORWARD, self._cells.sent_rows, rows, start, counts)

    def read_bags(self, incoming: Incoming, cell_start: Tensor | None, out: Tensor) -> None:
        """Pools every asked bag to its cell's first element in ``out``, or to the output."""
        starts = incoming.starts[self._bag_cells]
        jobs = self._bag_jobs.clone()
        sizes = column(incoming.sizes)[self._bag_ranks]
        jobs[:, 3], jobs[:, 4] = sizes, starts
        if cell_start is not None:
            jobs[:, 8] = cell_start[self._bag_cells]
        offsets = None
        if all(isinstance(length, int) for length in incoming.bag_lengths):
            jobs[:, 6] = column(incoming.bag_lengths)[self._bag_ranks]  # type: ignore[arg-type]
        else:
            offsets = bag_offsets(incoming, starts, len(self._bag_cells) // len(incoming.sizes))
            first = sizes + 1
            jobs[:, 5] = first.cumsum(0) - first
        weights = entry_weights(incoming, self._cells)
        self.storage.read_pooled(self.storage.place_jobs(jobs), incoming.ids, offsets, weights,
                                 out.view(-1))
