"""Ids out, rows back: one all-to-all of ids, one of rows, one of gradients, for all tables.

The steps carry the numbers of docs/architecture.md: 1 de-duplicate and 2 route (`routes`), 3 read,
5 expand and pool, 6 sum gradients per unique id, 7 merge ranks' gradients and 8 update
(`gradients`, `row_updater`). Rows and gradients travel in the codecs of the plan; sums are fp32
everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from threading import Lock

import torch
from torch import Tensor

from shardlab.comm import Groups, WireBytes, Work
from shardlab.phases import WAIT
from shardlab.sharded.clock import PhaseClock
from shardlab.sharded.direct import DirectExchange, DirectLookup
from shardlab.sharded.early import EarlyRows, Splitter
from shardlab.sharded.gradient_exchange import GradientExchange
from shardlab.sharded.gradients import (
    PendingGradients,
    entry_bags,
    entry_weights,
    owner_chunks,
)
from shardlab.sharded.inputs import Batch, InputReader
from shardlab.sharded.layout import Layout, column
from shardlab.sharded.lookup import Lookup
from shardlab.sharded.messages import IdExchange
from shardlab.sharded.owner import OwnerReads
from shardlab.sharded.path import find_path
from shardlab.sharded.pooling import Pooler
from shardlab.sharded.routes import Router
from shardlab.sharded.urgent import Parting
from shardlab.sharded.wire_gradients import GradientSender
from shardlab.sharded.wire_watch import WireWatch
from shardlab.storage import Storage
from shardlab.storage_specs import RowsSpec

#: Late rows begin on a cache line of the buffer.
_ALIGN_BYTES = 64


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
        self._path = path = find_path(layout, groups, self.wire)
        self._cells = path.cells
        self._router = Router(path.asked, reader)
        self._pooler = Pooler(path.asked, path.asked_cells)
        self._ids = IdExchange(path.network, path.lane, self.wire)
        self._ids_ahead = IdExchange(path.network, path.ahead, WireBytes())
        self.splitter = Splitter(path.network, path.cells, path.ahead)
        one_level = all(isinstance(local.storage, RowsSpec) and len(local.storage.levels) == 1
                        for local in layout.local_shards)
        #: Held while rows are read or stepped: two threads do it, and caches are for one. Rows of
        #: one level need none: what one thread reads or steps, the other does not step.
        self.storage_lock: AbstractContextManager[object] = nullcontext() if one_level else Lock()
        self.watch = WireWatch()
        #: Of batches that come: two threads must not count in one.
        self._watch_ahead = WireWatch()
        # One host rounds alike on all its ranks; every replica by itself.
        sender = groups.job_rank if groups.stages is None else path.network.rank
        self.sender = GradientSender(path.network, path.cells, groups.device, (seed, sender),
                                     self.watch)
        self._gradients = GradientExchange(path, self.sender, clock, self.wire)
        pooled = any(slot.feature >= 0 for slot in layout.slots)
        rows = any(slot.feature < 0 for slot in layout.slots)
        # Everything at home and pooled: bags go from the rows to the output, nothing between.
        self._direct = layout.world_size == 1 and not rows
        self._same_length = (DirectExchange(layout, storage, self._router, groups.device,
                                             clock)
                             if self._direct else None)
        self._has_pooled = pooled
        self._reads = OwnerReads(path.network, path.cells, storage, groups.device,
                                 direct=self._direct)

    def watch_by(self, watch: WireWatch) -> None:
        """Errors are measured by this from now on; announced batches are not sampled for it."""
        self.watch = self.sender.watch = watch

    def wire_error(self, key: tuple[str, str, str]) -> float:
        """Largest error by (direction, table, codec), of all batches."""
        return max(watch.errors.get(key, 0.0) for watch in (self.watch, self._watch_ahead))

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
        lookup = self._ask(batch)
        self._clock.lap("ids")
        self._reads.prefetch(lookup.incoming)
        return lookup

    def look_ahead(self, batch: Batch, in_flight: Sequence[Lookup] | None,
                   lap: Callable[[str], None],
                   before_rows: Callable[[Parting | None, Lookup], None] = lambda *_: None,
                   in_front: Lookup | None = None) -> Lookup:
        """Exchanges a batch's ids, and its early rows, while other batches train.

        Every rank calls it, in the same order; the thread is not the one that trains.

        Args:
            batch: what will be looked up.
            in_flight: batches whose updates may come before this batch's turn; None: their rows
                may be stale, and all rows are early.
            lap: is told when a phase ends.
            before_rows: is called before early rows are sent, with how gradients of ``in_front``
                part, and what this will return.
            in_front: the batch in front, whose urgent gradients go first; None: of none.

        Returns:
            What `forward` takes.

        Raises:
            BoundsError: an id outside its table.
        """
        sent = WireBytes()  # counted apart: two threads must not add to one number
        lookup = self._ask(batch, sent)
        outgoing, incoming = lookup.outgoing, lookup.incoming
        lap("ids")
        self._watch_ahead.next_batch()
        with self.storage_lock:
            self._reads.prefetch(incoming)
        lap("prefetch")
        if in_flight is None:
            halves, late, marked = None, None, None
            asked, asking = outgoing, incoming
        else:
            halves, marked = self.splitter.split(
                outgoing, incoming, [other.incoming for other in in_flight], sent,
                None if in_front is None else (in_front.outgoing, in_front.incoming))
            asked, asking = halves.early_out, halves.early_in
            late = self._cells.forward(halves.late_out, halves.late_in)
            lap("ids")
        place = self._cells.forward(asked, asking)
        late_from = -(-place.total // _ALIGN_BYTES) * _ALIGN_BYTES
        rows = torch.empty(late_from + (late.total if late else 0), dtype=torch.uint8,
                           device=self.groups.device)
        with self.storage_lock:
            self._reads.read(asking, place, rows[:place.total], self._watch_ahead,
                       pooled=halves is None)
        lap("read")
        lookup = replace(lookup, early=EarlyRows(halves, place, late, rows, late_from), sent=sent)
        before_rows(None if marked is None else self._gradients.part(marked), lookup)
        lap(WAIT)
        self._path.send(rows, place, sent, owner_sends=True, ahead=True).wait()
        lap("rows")
        return lookup

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
        lookup = self._ask(batch) if ahead is None else replace(ahead, early=None, sent=None,
                                                                late=None)
        outgoing, incoming = lookup.outgoing, lookup.incoming
        self._clock.lap("ids")
        if self._direct:
            with self.storage_lock:
                self._reads.read_bags(incoming, None, out)
            return lookup
        if ahead is not None and ahead.early is not None:
            self._finish_early(ahead, ahead.early, out)
            return lookup
        place = self._cells.forward(outgoing, incoming)
        rows = torch.empty(place.total, dtype=torch.uint8, device=self.groups.device)
        with self.storage_lock:
            self._reads.read(incoming, place, rows, self.watch)
        self._clock.lap("read")
        self._path.send(rows, place, self.wire, owner_sends=True).wait()
        self._let_others_pass()
        self._clock.lap("rows")
        self._pool(lookup, EarlyRows(None, place, None, rows), out)
        return lookup

    def _ask(self, batch: Batch, ahead: WireBytes | None = None) -> Lookup:
        """Exchanges a batch's ids; of a batch that comes, counted in ``ahead``."""
        outgoing, inside = self._router.route(batch), None
        relay = self._path.relay
        if relay is not None:
            inside, outgoing = relay.unite(outgoing, ahead)
        ids = self._ids
        if ahead is not None:
            ids = self._ids_ahead
            ids.wire = ahead
        return Lookup(outgoing, ids.exchange(outgoing), inside=inside)

    def _pool(self, lookup: Lookup, came: EarlyRows, out: Tensor) -> None:
        """Step 5, once this rank has what it asked for."""
        if self._path.relay is not None:
            assert lookup.inside is not None
            came = self._path.relay.hand_out(lookup.inside, lookup.outgoing, came)
            self._clock.lap("rows")
        self._pooler.pool(lookup.own, came, out)

    def _finish_early(self, lookup: Lookup, early: EarlyRows, out: Tensor) -> None:
        """Fetches what had to wait for the last update; then step 5."""
        late = self.start_late(early) if lookup.late is None else lookup.late
        late.wait()
        self._clock.lap("rows")
        self._let_others_pass()
        self._pool(lookup, early, out)

    def start_late(self, early: EarlyRows) -> Work:
        """Reads late rows and starts to send them; every rank calls it."""
        if early.halves is None or early.late is None:
            return Work()
        late = early.rows[early.late_from:]
        with self.storage_lock:
            self._reads.read(early.halves.late_in, early.late, late, self.watch)
        self._clock.lap("read")
        return self._path.send(late, early.late, self.wire, owner_sends=True)

    def _let_others_pass(self) -> None:
        """This step's rows are here: rows of batches that come may have the link."""
        if self.groups.worker is not None:
            self.groups.worker.right_of_way.give()

    def _divide_means(self, batch: Batch, out: Tensor, *, pooled_only: bool) -> None:
        for feature, first, end, divisor in batch.mean_divisors:
            pooled = self.layout.kinds[self.layout.feature_table[feature]].value == "pooled"
            if pooled or not pooled_only:
                out[:, first:end] /= divisor

    # ------------------------------------------------------------------ backward
    def backward(self, lookup: Lookup | DirectLookup, grad: Tensor, *,
                 behind: bool = False, parting: Parting | None = None) -> PendingGradients:
        """Step 6: sums this rank's gradients per slot and starts sending them.

        Args:
            lookup: of the forward.
            grad: fp32 [size, total columns], gradient of the output.
            behind: the thread that looks ahead sends them, in its turn.
            parting: all but the urgent ones are sent by that thread, once the next batch has its
                rows; None: all are urgent.
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
        if not self._direct:
            return self._gradients.send(lookup, grad, behind=behind, parting=parting)
        incoming = lookup.incoming
        base = column([self.layout.first_column(slot) for slot in self._cells.mine])
        chunks = owner_chunks(self._cells, incoming, base, self.layout.total_columns)
        return PendingGradients(incoming.ids, chunks, entry_bags(incoming, self._cells),
                                entry_weights(incoming, self._cells), grad.view(-1), Work())
