"""An `EmbeddingBagCollection` as it runs: sharded over all ranks."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from shardlab.comm import Groups, WireBytes
from shardlab.jagged import KeyedTensor
from shardlab.ops.cache import COUNTERS
from shardlab.ops.step_parameters import StepParameters
from shardlab.phases import WAIT
from shardlab.plan import ShardingPlan
from shardlab.sharded.announce import Announcements
from shardlab.sharded.clock import PhaseClock
from shardlab.sharded.exchange import Exchange
from shardlab.sharded.gradients import MergedRows, PendingGradients
from shardlab.sharded.hot_rows import HotRows
from shardlab.sharded.inputs import Batch, InputReader
from shardlab.sharded.layout import Layout, compile_layout
from shardlab.sharded.lookup import Lookup
from shardlab.sharded.pruning import PruningCouncil
from shardlab.sharded.replicas import Replicas, Replication
from shardlab.sharded.row_updater import RowUpdater
from shardlab.sharded.snapshots import Snapshots
from shardlab.sharded.urgent import can_part
from shardlab.sharded.wire_watch import BACKWARD, FORWARD, WireWatch
from shardlab.specs import EmbeddingBagConfig
from shardlab.storage import StorageOptions, TableChunk, build_storage
from shardlab.storage_bytes import TierBytes
from shardlab.storage_specs import RowsSpec, Tier, has_cache, home_tier

_CHUNK_BYTES = 64 << 20


class ShardedEmbeddingBagCollection(nn.Module):
    """The tables of a collection, in shards over all ranks.

    Args:
        tables: the tables.
        plan: where they go.
        groups: the ranks.
        optimizer: kind of row optimiser, which decides the state's bytes.
        seed: of the initial weights; the same on all ranks.
        clock: books the time of steps; collections of one model share one. None: one of its own.
        ssd_dir: folder for tables on disk; None: no table lies there.

    Raises:
        PlanError: the plan does not fit the tables or the world size.
    """

    def __init__(self, tables: Sequence[EmbeddingBagConfig], plan: ShardingPlan, groups: Groups,
                 optimizer: str, seed: int = 0, clock: PhaseClock | None = None,
                 ssd_dir: str | None = None) -> None:
        super().__init__()
        plan.check(tables, groups.world_size)
        self.tables, self.plan, self.groups = tuple(tables), plan, groups
        layout = compile_layout(self.tables, plan, groups.rank)
        options = StorageOptions(optimizer, seed, groups.device, _folder_of(ssd_dir, groups))
        #: What the plan puts here, and checkpoints hold; copies of hot rows are beside it.
        self.storage = build_storage(list(layout.local_shards[:layout.num_homes]), options)
        self._hot = HotRows(layout, self.storage, groups, options) \
            if any(layout.hot_rows) else None
        self._reader = InputReader(layout, groups.device, groups.job_rank)
        self.clock = clock or PhaseClock(groups.device)
        self._seed, self._optimizer = seed, optimizer
        self._exchange, self.updater = self._executors(layout)
        self.council = PruningCouncil(self.tables, plan, optimizer, self.storage, groups)
        self.pending: list[PendingGradients] = []
        #: Keeps copies of these shards alike; None: there are none.
        self.replicas: Replicas | None = None
        #: Batches of a world of several ranks that were announced or await their update.
        self.announcements = Announcements(self._exchange, self._reader, groups, self.clock,
                                           self._parts(layout))
        self._rest: PendingGradients | None = None
        self._spared: int | None = None
        #: Announced and not looked up yet: the batch that comes, and the one behind it.
        self._ahead: deque[_Ahead] = deque(maxlen=2)
        self.on_disk = any(home_tier(entry.storage) is Tier.SSD for entry in plan.tables)
        self._keys = list(layout.features)
        self._dims = [tables[t].embedding_dim for t in layout.feature_table]
        # Autograd calls a backward only if some input wants a gradient; no table is a tensor here.
        self._anchor = torch.zeros((), device=groups.device, requires_grad=True)

    def _executors(self, layout: Layout) -> tuple[Exchange, RowUpdater]:
        storage = self.storage if self._hot is None else self._hot.storage
        exchange = Exchange(layout, storage, self.groups, self._reader, self.clock, self._seed)
        return exchange, RowUpdater(layout, storage, self.groups, exchange.wire, self._hot)

    def _parts(self, layout: Layout) -> bool:
        """Whether gradients travel in parts where the next batch is announced."""
        return self.groups.stages is None and self.replicas is None and \
            can_part(layout, self._optimizer)

    def _refresh_hot_rows(self) -> None:
        if self._hot is not None:
            self._hot.refresh()

    def replicate(self, replication: Replication) -> None:
        """Makes this collection one of several copies; every rank calls it before the first batch.
        """
        self.replicas = Replicas(replication, self.storage)
        self.replicas.link(self._exchange.splitter, self.updater)
        self.announcements.parts = False  # copies agree on a step's rows, all at once

    @property
    def summed_ranks(self) -> int:
        """How many ranks' gradients an update adds up; it steps by their mean."""
        return self.groups.world_size * (1 if self.replicas is None else self.replicas.summed)

    def sync_replicas(self, step: int | None = None) -> None:
        """Makes copies of the rows alike where that is due; every rank calls it after every step.

        Args:
            step: optimiser steps taken; None: whatever the step, as before a checkpoint.
        """
        if self.replicas is not None and self.replicas.is_due(step):
            self.announcements.rows_changed()
            with self._exchange.storage_lock:
                self.replicas.average(self.updater.watches, self.wire)

    def forward(self, features: Any) -> KeyedTensor:
        """Looks features up by name and pools them.

        Args:
            features: a KeyedJaggedTensor or anything `as_kjt` takes.

        Returns:
            values fp32 [B, sum of dims], columns by feature in the tables' order.

        Raises:
            InputError: a feature is missing, unknown or malformed.
            BoundsError: an id outside its table.
        """
        self.clock.lap("dense")
        self._refresh_hot_rows()
        serial, batch, ahead = self._taken(features)
        if torch.is_grad_enabled() and self.training:
            values = _Lookup.apply(self._anchor, self, (serial, batch, ahead))
        else:
            values, _ = self._exchange.forward(batch, training=False, ahead=ahead)
        return KeyedTensor(self._keys, self._dims, values)

    def _taken(self, features: Any) -> tuple[int, Batch, Lookup | None]:
        """A batch's number, the batch, and what was found out when it was announced."""
        if self.groups.world_size > 1:
            return self.announcements.take(features)
        known = next((one for one in self._ahead if one.features is features), None)
        if known is None:
            return 0, self._reader.read(features), None
        self._ahead.remove(known)
        return 0, known.batch, known.lookup

    def prefetch(self, features: Any, staleness: int = 0) -> None:
        """Announces a batch that comes soon; every rank must call it, in the same order.

        With several ranks, its ids, the rows that caches lack, and its rows are exchanged in
        another thread. Rows that a batch in front of it may change are left for `forward`, unless
        they may be stale. A world of one reads ahead from the disk, where tables lie there.

        `forward` must then get the same object, in the order of announcements.

        Args:
            features: of the batch.
            staleness: 1: its rows may lack the update of the batch in front of it.

        Raises:
            InputError: (here or in `forward`) a feature is missing, unknown or malformed.
            BoundsError: (here or in `forward`) an id outside its table.
        """
        if self.groups.world_size > 1:
            self.clock.lap(WAIT)
            self._refresh_hot_rows()
            self.announcements.announce(features, stale=staleness > 0)
            self.clock.lap("overhead")
        elif self.on_disk:
            self.clock.lap(WAIT)  # what came before was the loader
            batch = self._reader.read(features)
            self._ahead.append(_Ahead(features, batch, self._exchange.read_ahead(batch)))
            self.clock.lap("prefetch")

    @property
    def wire(self) -> WireBytes:
        """Bytes that this rank has sent to others."""
        return self._exchange.wire

    def begin_step(self, step: int) -> None:
        """Tells how many optimiser steps were taken: random bits follow from it."""
        self.announcements.finish_update()
        with self._exchange.storage_lock:
            self._exchange.storage.begin_step(step)
        self._exchange.sender.begin_step(step)

    @property
    def updates_behind(self) -> bool:
        """Whether rows may be stepped in the thread that looks ahead.

        Shared cores, pruned tables and hot rows talk to other ranks when they are stepped, as the
        dense layers do; two threads must not do that at once.
        """
        return self.announcements.behind and self._hot is None and all(
            isinstance(entry.storage, RowsSpec) for entry in self.plan.tables)

    def update_behind(self, number: int, step: StepParameters) -> None:
        """As `update`, on the rows of all pending gradients, in the thread that looks ahead."""
        pending = [part for one in self.pending for part in one.parts()]
        self.pending.clear()
        self._exchange.sender.begin_step(number)
        self._step_behind(pending, (number, step), None)

    def set_apart(self, *, allowed: bool) -> None:
        """Before a step: what the next batch does not need waits for `update_rest`, if it may.

        Else it joins the pending gradients. Call it before announced batches hear of the update.
        """
        self._spared = self.announcements.sparing() if allowed and len(self.pending) == 1 else None
        parts = [one.parts() for one in self.pending]
        if self._spared is not None and parts[0][1:]:
            self.pending, self._rest = parts[0][:1], parts[0][1]
        else:
            self.pending, self._rest = [part for one in parts for part in one], None

    def update_rest(self, number: int, step: StepParameters) -> None:
        """As `update`, on what was set apart, in the thread that looks ahead."""
        if self._rest is not None:
            rest, self._rest = self._rest, None
            self._step_behind([rest], (number, step), self._spared)

    def send_late_rows(self) -> None:
        """After a step: rows that the next batch still lacks leave; every rank calls it."""
        self.announcements.send_late()

    def _step_behind(self, pending: list[PendingGradients], at: tuple[int, StepParameters],
                     spared: int | None) -> None:
        number, step = at

        def update() -> None:
            for one in pending:
                one.work.wait()
            merged = self.updater.merge_rows(pending)
            with self._exchange.storage_lock:
                self.storage.begin_step(number)
                self.updater.update(merged, step)

        if pending:
            self.announcements.update_behind(update, spared)

    def update(self, rows: MergedRows, step: StepParameters) -> None:
        """One optimiser step on rows with gradients."""
        with self._exchange.storage_lock:
            self.updater.update(rows, step)

    def after_step(self, step: int) -> None:
        """What pruned tables decide from time to time; every rank calls it after every step."""
        with self._exchange.storage_lock:
            self.council.after_step(step)

    def forget_gradients(self) -> None:
        """Drops all gradients, of this rank and on their way."""
        for pending in self.pending:
            for part in pending.parts():
                part.work.wait()
        self.pending.clear()
        self.announcements.forget_gradients()

    def forget_announced(self) -> None:
        """Drops announced batches that will not be looked up."""
        self._ahead.clear()
        self.announcements.forget()

    def wire_errors(self, table: str) -> tuple[float, float]:
        """Largest relative error of sampled rows and gradients that this rank sent."""
        entry = next(entry for entry in self.plan.tables if entry.table == table)
        return (self._exchange.wire_error((FORWARD, table, entry.wire.forward)),
                self._exchange.wire_error((BACKWARD, table, entry.wire.backward)))

    def change_wire(self, plan: ShardingPlan, watch: WireWatch | None = None) -> None:
        """Takes the codecs of another plan of the same placement; nothing may be pending.

        Args:
            plan: as this collection's, but for the codecs.
            watch: measures errors; None: a new one.
        """
        names = {table.name for table in self.tables}
        self.plan = ShardingPlan(plan.world_size, tuple(entry for entry in plan.tables
                                                        if entry.table in names))
        layout = compile_layout(self.tables, self.plan, self.groups.rank)
        watches = self.updater.watches
        self._exchange, self.updater = self._executors(layout)
        self.announcements.change_exchange(self._exchange, parts=self._parts(layout))
        if watch is not None:
            self._exchange.watch_by(watch)
        self.updater.watches = watches
        if self.replicas is not None:
            self.replicas.link(self._exchange.splitter, self.updater)

    def tier_bytes(self) -> TierBytes:
        """Bytes of this rank's shards, by tier."""
        held = self.storage.tier_bytes()
        return held if self._hot is None else held + self._hot.tier_bytes()

    def cache_counts(self) -> dict[str, list[int]]:
        """Of every table of the plan that has a cache, what this rank's shards counted so far.

        Returns:
            By table: the counters of `shardlab.ops.cache.COUNTERS`, then bytes moved.
        """
        counts = {entry.table: [0] * (len(COUNTERS) + 1) for entry in self.plan.tables
                  if has_cache(entry.storage)}
        for block, local in enumerate(self.storage.shards):
            if local.table.name in counts:
                found = self.storage.cache_counts(block)
                counts[local.table.name] = [a + b for a, b in zip(counts[local.table.name], found,
                                                                  strict=True)]
        return counts

    def chunks(self, max_bytes: int = _CHUNK_BYTES) -> Iterator[TableChunk]:
        """Streams this rank's rows and their optimiser state.

        What error feedback has kept is dropped, so that a run that resumes from these rows equals
        the one that goes on.
        """
        self._settle_rows()
        return self.storage.chunks(max_bytes)

    def _settle_rows(self) -> None:
        """Before rows are saved: nothing is under way, and they are where the plan puts them."""
        self.announcements.settle()
        self._exchange.sender.feedback.forget()
        if self._hot is not None:
            self._hot.write_down(self.updater.watches)

    @property
    def snapshots(self) -> Snapshots:
        """What checkpoints take while training goes on."""
        # Made anew: one that was kept would keep this collection, and files on disk, from being
        # freed with their last user.
        return Snapshots(self.storage, self._settle_rows, self.updater.watches)

    def begin_load(self) -> None:
        """Call once before the first `load_chunk` of a checkpoint."""
        self._rows_change()
        self._exchange.sender.feedback.forget()
        self.storage.begin_load()

    def load_chunk(self, chunk: TableChunk) -> None:
        """Writes the cells of the chunk that this rank holds.

        With hot rows, all ranks call `begin_load` before, or this for every chunk: they then bring
        their copies up to date together.
        """
        self._rows_change()
        self.storage.load_chunk(chunk)

    def _rows_change(self) -> None:
        self.announcements.rows_changed()
        if self._hot is not None:
            self._hot.rows_change(self.updater.watches)


def _folder_of(ssd_dir: str | None, groups: Groups) -> str | None:
    """A rank's own folder, so that ranks of a host do not meet."""
    return None if ssd_dir is None else os.path.join(ssd_dir, f"rank-{groups.job_rank:05d}")


@dataclass(frozen=True, eq=False)
class _Ahead:
    """A batch that was announced, and what is known of it."""

    features: Any
    batch: Batch
    lookup: Lookup | None


class _Lookup(torch.autograd.Function):
    """Forward: the exchange's lookup. Backward: sums and sends gradients, which wait for step()."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, collection: ShardedEmbeddingBagCollection,
                taken: tuple[int, Batch, Lookup | None]) -> Tensor:
        serial, batch, ahead = taken
        values, lookup = collection._exchange.forward(batch, training=True, ahead=ahead)
        if isinstance(lookup, Lookup):
            collection.announcements.opened(serial, lookup)
        ctx.collection, ctx.lookup, ctx.serial = collection, lookup, serial
        return values

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None]:  # type: ignore[override]
        collection: ShardedEmbeddingBagCollection = ctx.collection
        announcements, parting = collection.announcements, None
        behind = announcements.behind and isinstance(ctx.lookup, Lookup)
        if not behind:
            collection.clock.lap("dense")
            parting = announcements.parting(ctx.serial)
        collection.pending.append(collection._exchange.backward(ctx.lookup, grad, behind=behind,
                                                                parting=parting))
        collection.announcements.due(ctx.serial)
        return None, None, None
