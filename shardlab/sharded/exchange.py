"""Ids out, rows back: one all-to-all of ids, one of rows, one of gradients, for all tables.

The steps carry the numbers of docs/architecture.md: 1 de-duplicate and 2 route (`routes`), 3 read,
5 expand and pool, 6 sum gradients per unique id, 7 merge ranks' gradients and 8 update
(`gradients`). Rows and gradients travel in the codecs of the plan; sums are fp32 everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from threading import Lock

import torch
from torch import Tensor

from shardlab.codecs import CODECS
from shardlab.comm import Groups, WireBytes, Work, all_to_all
from shardlab.ops.unique import fill_affine
from shardlab.sharded.cells import Buffer, CellIndex
from shardlab.sharded.clock import PhaseClock
from shardlab.sharded.direct import DirectExchange, DirectLookup
from shardlab.sharded.early import EarlyRows, Splitter, row_addresses
from shardlab.sharded.gradients import (
    PendingGradients,
    bag_offsets,
    entry_bags,
    entry_weights,
    owner_chunks,
)
from shardlab.sharded.inputs import Batch, InputReader
from shardlab.sharded.layout import Layout, bag_slots, column
from shardlab.sharded.messages import IdExchange, Incoming
from shardlab.sharded.pooling import copy_jobs, pool_coded
from shardlab.sharded.routes import Outgoing, Router
from shardlab.sharded.wire_gradients import GradientSender
from shardlab.sharded.wire_watch import FORWARD, SAMPLE_ROWS, WireWatch
from shardlab.specs import PoolingType
from shardlab.storage import Storage, read_codes
from shardlab.storage_specs import RowsSpec

_FP32_BYTES = 4
#: Late rows begin on a cache line of the buffer.
_ALIGN_BYTES = 64


@dataclass(frozen=True)
class Lookup:
    """What a forward leaves for its backward, and `Exchange.look_ahead` for the forward."""

    outgoing: Outgoing
    incoming: Incoming
    early: EarlyRows | None = None
    sent: WireBytes | None = None

    @property
    def batch(self) -> Batch:
        """The batch that was looked up."""
        return self.outgoing.batch


class Exchange:
    """The sharded lookup and its gradient for all tables of a collection.

    Args:
        layout: the compiled plan.
        storage: this rank's shards.
        groups: the ranks.
        reader: names for errors.
        clock: is told when a phase ends.
        seed: of the run, for the random bits of gradients.
    """

    def __init__(self, layout: Layout, storage: Storage, groups: Groups,
                 reader: InputReader, clock: PhaseClock, seed: int = 0) -> None:
        self.layout, self.storage, self.groups = layout, storage, groups
        self._clock = clock
        self.wire = WireBytes()
        self._tables = [table.name for table in layout.tables]
        self.wire.add(0, self._tables, [0] * len(self._tables))
        self._ahead = groups.ahead()
        self._router = Router(layout, reader)
        self._cells = CellIndex(layout)
        self._ids = IdExchange(layout, groups, self.wire)
        self._ids_ahead = IdExchange(layout, self._ahead, WireBytes())
        self.splitter = Splitter(layout, self._cells, self._ahead)
        one_level = all(isinstance(local.storage, RowsSpec) and len(local.storage.levels) == 1
                        for local in layout.local_shards)
        #: Held while rows are read or stepped: two threads do it, and caches are for one. Rows of
        #: one level need none: early rows and rows that an update changes are never the same.
        self.storage_lock: AbstractContextManager[object] = nullcontext() if one_level else Lock()
        self.watch = WireWatch()
        #: Of batches that come: two threads must not count in one.
        self._watch_ahead = WireWatch()
        self.sender = GradientSender(layout, self._cells, groups, seed, self.watch)
        pooled = any(slot.feature >= 0 for slot in layout.slots)
        rows = any(slot.feature < 0 for slot in layout.slots)
        # Everything at home and pooled: bags go from the rows to the output, nothing between.
        self._direct = layout.world_size == 1 and not rows
        self._same_length = (DirectExchange(layout, storage, self._router, groups.device,
                                             clock)
                             if self._direct else None)
        self._has_rows, self._has_pooled = rows, pooled
        self._set_up_reads()
        self._set_up_rows_output()
        self._set_up_bags_output()

    def watch_by(self, watch: WireWatch) -> None:
        """Errors are measured by this from now on; announced batches are not sampled for it."""
        self.watch = self.sender.watch = watch

    def wire_error(self, key: tuple[str, str, str]) -> float:
        """Largest error by (direction, table, codec), of all batches."""
        return max(watch.errors.get(key, 0.0) for watch in (self.watch, self._watch_ahead))

    # ------------------------------------------------------------------ set-up
    def _set_up_reads(self) -> None:
        mine = self._cells.mine
        ranks = range(len(self._cells.peers))
        gather = [(rank, i) for rank in ranks for i, slot in enumerate(mine)
                  if slot.feature < 0 and bool(self._cells.my_read[rank, i])]
        bags = [(rank, i) for rank in ranks for i, slot in enumerate(mine) if slot.feature >= 0]
        self._gather_cells = column([rank * len(mine) + i for rank, i in gather])
        self._gather_blocks = column([mine[i].block for _, i in gather])
        self._bag_cells = column([rank * len(mine) + i for rank, i in bags])
        self._bag_ranks = column([rank for rank, _ in bags])
        jobs = [[mine[i].block, 0, mine[i].shard.columns, 0, 0, 0, -1, 0, 0,
                 mine[i].shard.columns, 0] for _, i in bags]
        self._bag_jobs = column(jobs).reshape(-1, 11)
        if self._direct:
            for job, (_, i) in zip(self._bag_jobs, bags, strict=True):
                job[8], job[9] = self.layout.first_column(mine[i]), self.layout.total_columns
                job[10] = self.layout.groups[mine[i].group].row_start > 0

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

    # ------------------------------------------------------------------ forward
    def read_ahead(self, batch: Batch) -> Lookup | None:
        """In a world of one: starts to bring a batch's rows up from the disk.

        Returns:
            What `forward` need not ask again; None where that is nothing.

        Raises:
            BoundsError: an id outside its table.
        """
        if self._same_length is not None and self._same_length.takes(batch):
            self._same_length.look_ahead(batch)
            return None
        outgoing = self._router.route(batch)
        incoming = self._ids.exchange(outgoing)
        self._clock.lap("ids")
        self._prefetch(incoming)
        return Lookup(outgoing, incoming)

    def _prefetch(self, incoming: Incoming) -> None:
        counts = incoming.counts.view(-1)
        blocks = column([slot.block for slot in self._cells.mine]).repeat(len(incoming.counts))
        self.storage.prefetch(torch.stack([blocks, counts.cumsum(0) - counts, counts], 1),
                              incoming.ids)

    def look_ahead(self, batch: Batch, in_flight: Sequence[Lookup] | None,
                   lap: Callable[[str], None]) -> Lookup:
        """Exchanges a batch's ids, and its early rows, while other batches train.

        Every rank calls it, in the same order; the thread is not the one that trains.

        Args:
            batch: what will be looked up.
            in_flight: batches whose updates may come before this batch's turn; None: their rows
                may be stale, and all rows are early.
            lap: is told when a phase ends.

        Returns:
            What `forward` takes.

        Raises:
            BoundsError: an id outside its table.
        """
        sent = WireBytes()  # counted apart: two threads must not add to one number
        outgoing = self._router.route(batch)
        self._ids_ahead.wire = sent
        incoming = self._ids_ahead.exchange(outgoing)
        lap("ids")
        self._watch_ahead.next_batch()
        with self.storage_lock:
            self._prefetch(incoming)
        lap("prefetch")
        if in_flight is None:
            halves, late = None, None
            asked, asking = outgoing, incoming
        else:
            halves = self.splitter.split(outgoing, incoming,
                                          [other.incoming for other in in_flight], sent)
            asked, asking = halves.early_out, halves.early_in
            late = self._cells.forward(halves.late_out, halves.late_in)
            lap("ids")
        place = self._cells.forward(asked, asking)
        late_from = -(-place.total // _ALIGN_BYTES) * _ALIGN_BYTES
        rows = torch.empty(late_from + (late.total if late else 0), dtype=torch.uint8,
                           device=self.groups.device)
        with self.storage_lock:
            self._read(asking, place, rows[:place.total], self._watch_ahead,
                       pooled=halves is None)
        lap("read")
        self._send(rows, place, owner_sends=True, ahead=sent).wait()
        lap("rows")
        return Lookup(outgoing, incoming, EarlyRows(halves, place, late, rows, late_from), sent)

    def forward(self, batch: Batch, *, training: bool,
                ahead: Lookup | None = None) -> tuple[Tensor, Lookup | DirectLookup]:
        """Looks a batch up.

        Args:
            batch: what to look up.
            training: a backward will follow.
            ahead: of `look_ahead` on this batch.

        Returns:
            fp32 [size, total columns], and what the backward needs.

        Raises:
            BoundsError: an id outside its table.
        """
        self._clock.lap("dense")
        self.watch.next_batch()
        out = torch.empty(batch.size, self.layout.total_columns, device=self.groups.device)
        lookup = self._forward(batch, out, training, ahead)
        if self._has_pooled:
            self._divide_means(batch, out, pooled_only=True)
        self._clock.lap("read" if self._direct else "pool")
        return out, lookup

    def _forward(self, batch: Batch, out: Tensor, training: bool,
                 ahead: Lookup | None) -> Lookup | DirectLookup:
        if self._same_length is not None and self._same_length.takes(batch):
            return self._same_length.forward(batch, out, training)
        if ahead is None:
            outgoing = self._router.route(batch)
            incoming = self._ids.exchange(outgoing)
        else:
            outgoing, incoming = ahead.outgoing, ahead.incoming
        self._clock.lap("ids")
        if self._direct:
            with self.storage_lock:
                self._read_bags(incoming, None, out)
            return Lookup(outgoing, incoming)
        if ahead is not None and ahead.early is not None:
            self._finish_early(outgoing, ahead.early, out)
            return Lookup(outgoing, incoming)
        place = self._cells.forward(outgoing, incoming)
        rows = torch.empty(place.total, dtype=torch.uint8, device=self.groups.device)
        with self.storage_lock:
            self._read(incoming, place, rows, self.watch)
        self._clock.lap("read")
        self._send(rows, place, owner_sends=True).wait()
        self._clock.lap("rows")
        self._pool(outgoing, EarlyRows(None, place, None, rows), out)
        return Lookup(outgoing, incoming)

    def _finish_early(self, outgoing: Outgoing, early: EarlyRows, out: Tensor) -> None:
        """Fetches what had to wait for the last update; then step 5."""
        if early.halves is not None and early.late is not None:
            late = early.rows[early.late_from:]
            with self.storage_lock:
                self._read(early.halves.late_in, early.late, late, self.watch)
            self._clock.lap("read")
            self._send(late, early.late, owner_sends=True).wait()
            self._clock.lap("rows")
        self._pool(outgoing, early, out)

    def _send(self, buffer: Tensor, place: Buffer, *, owner_sends: bool,
              ahead: WireBytes | None = None) -> Work:
        wire = self.wire if ahead is None else ahead
        arrives = buffer[place.travels:place.travels + place.arrives]
        splits = (place.slot_splits, place.cell_splits)
        if not owner_sends:
            splits = (place.cell_splits, place.slot_splits)
        self._count(wire, place, owner_sends=owner_sends)
        return all_to_all(arrives, buffer[:place.travels], *splits,
                          self.groups if ahead is None else self._ahead,
                          "rows" if owner_sends else "grads")

    def _count(self, wire: WireBytes, place: Buffer, *, owner_sends: bool) -> None:
        if owner_sends:
            wire.rows_bytes += place.travels
            sizes = self._cells.forward_cells.sizes(place.cell_vectors)
        else:
            wire.gradients_bytes += place.travels
            sizes = self._cells.backward_slots.sizes(place.slot_vectors)
        wire.add(1 if owner_sends else 2, self._tables,
                 self._cells.table_bytes(sizes, cells=owner_sends))

    def _read(self, incoming: Incoming, place: Buffer, rows: Tensor, watch: WireWatch, *,
              pooled: bool = True) -> None:
        """Steps 3 and 4: every asked row or bag, encoded into the buffer."""
        codec = self._cells.forward_cells
        if self._has_rows:
            counts = incoming.counts.view(-1)
            cells = self._gather_cells
            starts = (counts.cumsum(0) - counts)[cells]
            if codec.is_plain:
                segments = torch.stack([self._gather_blocks, starts, counts[cells],
                                        place.cell_offsets[cells] // _FP32_BYTES], 1)
                self.storage.read(segments, incoming.ids, rows.view(torch.float32))
            else:
                pieces = torch.stack([starts, counts[cells], torch.zeros_like(cells),
                                      torch.ones_like(cells)], 1)
                places = fill_affine(pieces, incoming.ids.numel(), rows.device)
                end = codec.coded_end(rows, place.cell_offsets, place.cell_vectors, places)
                segments = torch.stack([self._gather_blocks, cells, starts, counts[cells]], 1)
                read_codes(self.storage, segments, incoming.ids, end)
                self._watch_read(watch, incoming, segments)
        bags_too = self._has_pooled and pooled
        if codec.is_plain and bags_too:
            self._read_bags(incoming, place.cell_offsets // _FP32_BYTES, rows.view(torch.float32))
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
            self._read_bags(incoming, start, bags)
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
        rows = torch.empty(int(elements.sum()), device=self.groups.device)
        some = segments[:, [0, 2, 3, 3]].clone()
        some[:, 2], some[:, 3] = counts[segments[:, 1]], start[segments[:, 1]]
        self.storage.read(some, incoming.ids, rows)
        watch.look(FORWARD, self._cells.sent_rows, rows, start, counts)

    def _read_bags(self, incoming: Incoming, cell_start: Tensor | None, out: Tensor) -> None:
        """Pools every asked bag to its cell's first element in ``out``, or to the output."""
        counts = incoming.counts.view(-1)
        starts = (counts.cumsum(0) - counts)[self._bag_cells]
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

    def _pool(self, outgoing: Outgoing, came: EarlyRows, out: Tensor) -> None:
        """Step 5: what came back is decoded while it is pooled into the output."""
        batch, uniques, rows = outgoing.batch, outgoing.uniques, came.rows
        codec = self._cells.forward_slots
        # The kernels count in elements where all is fp32, else in bytes.
        unit = _FP32_BYTES if codec.is_plain else 1
        source = rows.view(torch.float32) if codec.is_plain else rows
        steps = codec.vector_bytes // unit
        if uniques is not None:
            assert uniques.inverse is not None
            for slots, jobs in self._passes:
                at = self._places(outgoing, came, slots, uniques.ids.numel()) // unit
                # What the inverse -1 of a dropped id points at.
                at[-1] = -1
                jobs = jobs.clone()
                jobs[:, 4] = batch.feature_starts[jobs[:, 5]]
                jobs[:, 3], jobs[:, 6] = batch.size, batch.length
                tables = self._feature_table[jobs[:, 5]]
                jobs[:, 5] *= batch.size
                pool_coded(source, jobs, self._table_codecs[tables], at[uniques.inverse],
                                 batch.offsets, batch.weights, out.view(-1))
        if self._has_pooled:
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

    def _places(self, outgoing: Outgoing, came: EarlyRows, slots: Tensor, count: int) -> Tensor:
        """int64 [count + 1]: byte where the row of every unique id begins, through these slots.

        The last element is nobody's.
        """
        starts, counts = outgoing.starts[slots], outgoing.counts[slots]
        sizes = self._cells.forward_slots.vector_bytes
        if came.halves is None:
            pieces = torch.stack([starts, counts, came.early.slot_offsets[slots],
                                  sizes[slots]], 1)
            at = fill_affine(pieces, count + 1, came.rows.device)
        else:
            places = row_addresses(outgoing, came, sizes)
            first = (outgoing.counts.cumsum(0) - outgoing.counts)[slots]
            pieces = torch.stack([starts, counts, first, torch.ones_like(first)], 1)
            asked = fill_affine(pieces, count + 1, came.rows.device)
            # Uniques that these slots leave out are undefined there, and read by no job.
            at = torch.zeros_like(asked) if not places.numel() else \
                places[asked.clamp_(0, places.numel() - 1)]
        return at

    def _divide_means(self, batch: Batch, out: Tensor, *, pooled_only: bool) -> None:
        for feature, first, end, divisor in batch.mean_divisors:
            pooled = self.layout.kinds[self.layout.feature_table[feature]].value == "pooled"
            if pooled or not pooled_only:
                out[:, first:end] /= divisor

    # ------------------------------------------------------------------ backward
    def backward(self, lookup: Lookup | DirectLookup, grad: Tensor, *,
                 behind: bool = False) -> PendingGradients:
        """Step 6: sums this rank's gradients per slot and starts sending them.

        Args:
            lookup: of the forward.
            grad: fp32 [size, total columns], gradient of the output.
            behind: the thread that looks ahead sends them, in its turn.
        """
        self._clock.lap("dense")
        batch = lookup.batch
        grad = grad.float().contiguous()
        if batch.mean_divisors:
            grad = grad.clone()
            self._divide_means(batch, grad, pooled_only=False)
        if isinstance(lookup, DirectLookup):
            assert self._same_length is not None
            return self._same_length.backward(lookup, grad)
        outgoing, incoming = lookup.outgoing, lookup.incoming
        bags, weights = entry_bags(incoming, self._cells), entry_weights(incoming, self._cells)
        if self._direct:
            base = column([self.layout.first_column(slot) for slot in self._cells.mine])
            chunks = owner_chunks(self._cells, incoming, base, self.layout.total_columns)
            return PendingGradients(incoming.ids, chunks, bags, weights, grad.view(-1), Work())
        place = self._cells.backward(outgoing, incoming)
        buffer = self.sender.encode(outgoing, place, grad)
        self._clock.lap("pool")
        work = self._send_behind(buffer, place) if behind else \
            self._send(buffer, place, owner_sends=False)
        grads, start, work = self.sender.receive(buffer, place, work)
        chunks = owner_chunks(self._cells, incoming, start, None)
        self._clock.lap("grads")
        return PendingGradients(incoming.ids, chunks, bags, weights, grads, work)

    def _send_behind(self, buffer: Tensor, place: Buffer) -> Work:
        self._count(self.wire, place, owner_sends=False)

        def send() -> None:
            lap = self._clock.other_thread().lap
            self._send(buffer, place, owner_sends=False, ahead=WireBytes()).wait()
            lap("grads")

        assert self.groups.worker is not None
        return Work(self.groups.worker.submit(send).result)
