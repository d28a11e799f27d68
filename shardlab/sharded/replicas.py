"""Replica groups of the tables (2D parallelism): what keeps their copies of a shard alike.

W ranks are R groups of S. Each group holds all tables, in shards over its S ranks, and exchanges
ids, rows and gradients among these alone. Ranks that hold the same shards then agree:

* `every step`: they send each other the summed gradients of the rows that this step touched, and
  all take the same optimiser step by the sum in the order of groups. Training is that of W ranks
  without groups, and copies have the same bits.
* `every N steps` (local steps, averaged): each group steps by its own gradients, their mean over
  its S ranks. Every N steps, rows that any group has touched get the mean over the groups of
  weights and of optimiser state. Copies differ in between.

The mean of state is that of Adagrad's sums and of Adam's moments. Sums and second moments so stay
those of a group's gradients, by which a group's next steps are scaled, and none shrinks; where the
groups agree, nothing changes.

Source: own; periodic averaging as in local SGD (arXiv 1805.09767), groups of tables as TorchRec's
2D parallelism, which averages whole tables.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from shardlab.comm import ReplicaGroups, WireBytes, sum_in_order_
from shardlab.ops.unique import BOUNDS_CODE, Segments, Uniques, unique_segments
from shardlab.sharded.early import Splitter
from shardlab.sharded.gradients import MergedRows, RowUpdater
from shardlab.sharded.layout import column
from shardlab.sharded.replica_messages import Part, RowMessages
from shardlab.sharded.row_watch import ChangedRows, Snapshot
from shardlab.specs import BoundsMode
from shardlab.storage import LocalShard, RowWrites, Storage

#: fp32 elements of weights and state that are averaged at a time: 16 MiB.
_STRIPE_ELEMENTS = 4 << 20
_FP32_BYTES = 4
_PHASE = "sync"


@dataclass(frozen=True)
class Replication:
    """How many groups hold the tables, and when their copies are made alike.

    Attributes:
        groups: this rank's two neighbourhoods.
        sync_every_steps: 1: gradients are merged in every step; N: rows are averaged.
    """

    groups: ReplicaGroups
    sync_every_steps: int = 1

    @property
    def exact(self) -> bool:
        """Whether copies always have the same bits."""
        return self.sync_every_steps == 1


class Replicas:
    """Keeps the copies of one collection's shards alike.

    Args:
        replication: how many groups there are, and when their copies are made alike.
        storage: of this rank; `ShardingPlan.check` accepted its tables.
    """

    def __init__(self, replication: Replication, storage: Storage) -> None:
        self.replication = replication
        self._gradients = self._average = None
        if replication.exact:
            self._gradients = GradientSync(storage.shards, replication.groups)
        else:
            assert isinstance(storage, RowWrites)  # all tables are rows
            self._average = RowAverage(storage, replication.groups)

    @property
    def count(self) -> int:
        """Groups, and so copies of every shard."""
        return self.replication.groups.copies.world_size

    @property
    def number(self) -> int:
        """Which of the groups this rank is in."""
        return self.replication.groups.copies.rank

    @property
    def summed(self) -> int:
        """How many groups' gradients an update adds up."""
        return self.count if self.replication.exact else 1

    def link(self, splitter: Splitter, updater: RowUpdater) -> None:
        """Takes part in what an exchange does from now on."""
        if self._gradients is not None:
            splitter.of_all_replicas = self._gradients.keys_of_all
            updater.replicas = self._gradients
        elif self._average is not None and self._average.changed not in updater.watches:
            updater.watches.append(self._average.changed)

    def is_due(self, step: int | None) -> bool:
        """Whether rows are to be averaged after this step; None: whatever the step."""
        return self._average is not None and \
            (step is None or step % self.replication.sync_every_steps == 0)

    def average(self, watches: Sequence[ChangedRows | Snapshot], wire: WireBytes) -> None:
        """Averages rows; every rank of the job calls it, and no update is under way."""
        assert self._average is not None
        self._average.apply(watches, wire)


class GradientSync:
    """Merges a step's gradients over the replicas, so that all take the same step.

    Two replicas send each other all their rows. Of more, each merges a range of every shard and
    sends the sums to all: rows that several have touched then travel fewer times, and the bits are
    the same, since sums are in the order of replicas either way.

    Args:
        shards: of this rank.
        groups: the ranks that hold the same shards.
        ranges: whether each merges a range; None: of more than two replicas.
    """

    def __init__(self, shards: Sequence[LocalShard], groups: ReplicaGroups,
                 ranges: bool | None = None) -> None:
        rows = [local.shard.rows for local in shards]
        self._ranges = groups.copies.world_size > 2 if ranges is None else ranges
        self._columns = column([local.shard.columns for local in shards])
        self._step = RowMessages(rows, groups.copies)
        self._keys = RowMessages([max(1, sum(rows))], groups.copies.ahead())
        self._segments = Segments(column(rows), column([BOUNDS_CODE[BoundsMode.ERROR]] * len(rows)))

    def merge(self, rows: MergedRows, wire: WireBytes) -> MergedRows:
        """The rows that any replica touched, with their gradients' sums as entries.

        Args:
            rows: of this replica.
            wire: counts the bytes.
        """
        if self._ranges:
            mine = rows.uniques
            parts = self._step.scatter(mine.ids, mine.splits, rows.summed(self._columns),
                                       self._columns, wire)
            rows = self._joined(parts)
        mine = rows.uniques
        return self._joined(self._step.gather(mine.ids, mine.splits, rows.summed(self._columns),
                                              self._columns, wire))

    def _joined(self, parts: list[Part]) -> MergedRows:
        """Rows of several replicas; the entries of a row are in their order."""
        chunks, ids_before, grads_before = [], 0, 0
        columns = self._columns.tolist()
        for splits, _, _ in parts:
            edges = splits.tolist()
            for block, (first, last) in enumerate(pairwise(edges)):
                chunks.append([block, ids_before + first, last - first, grads_before,
                               columns[block]])
                grads_before += (last - first) * columns[block]
            ids_before += edges[-1]
        chunks.sort(key=lambda chunk: chunk[0])  # stable: replicas stay in order
        ids = torch.cat([ids for _, ids, _ in parts])
        grads = torch.cat([grads for _, _, grads in parts])
        found = unique_segments(ids, column(chunks).reshape(-1, 5), self._segments)
        return MergedRows(found, None, grads)

    def keys_of_all(self, keys: Tensor, wire: WireBytes) -> Tensor:
        """int64: rows that batches of any replica may change, of those that this one's may.

        For the thread that looks ahead, on a lane of its own.

        Args:
            keys: int64 [n], rows of this rank counted over its blocks; may repeat.
            wire: counts the bytes.
        """
        mine = torch.unique(keys)
        splits = torch.tensor([0, mine.numel()])
        nothing = torch.empty(0, device=mine.device)
        parts = self._keys.gather(mine, splits, nothing, column([0]), wire)
        return torch.cat([ids for _, ids, _ in parts])


class RowAverage:
    """Gives rows that steps have changed since the last time the mean over the replicas.

    Args:
        storage: this rank's shards.
        groups: the ranks that hold the same shards.

    Attributes:
        changed: the rows that this replica has stepped; a watch of the updates.
    """

    def __init__(self, storage: RowWrites, groups: ReplicaGroups) -> None:
        self._storage, self._copies = storage, groups.copies
        self._messages = RowMessages([local.shard.rows for local in storage.shards], groups.copies)
        self.changed = ChangedRows(storage.shards)

    def apply(self, watches: Sequence[ChangedRows | Snapshot], wire: WireBytes) -> None:
        """Averages; every rank of the job calls it, and no update is under way.

        Args:
            watches: are told which rows change.
            wire: counts the bytes.
        """
        uniques = self._touched(wire)
        self._storage.flush()
        for watch in watches:
            if watch is not self.changed:
                watch.before_update(uniques)
        splits = uniques.splits.tolist()
        for block in range(len(self._storage.shards)):
            rows = uniques.ids[splits[block]:splits[block + 1]]
            stripe = max(1, _STRIPE_ELEMENTS // self._storage.row_elements(block))
            for part in rows.split(stripe) if rows.numel() else ():
                self._average(block, part, wire)
        self.changed.clear()

    def _touched(self, wire: WireBytes) -> Uniques:
        """The rows that any replica has changed, by block, ascending."""
        found = [mark.nonzero()[:, 0] for mark in self.changed.marks]
        device = self._copies.device
        mine = torch.cat(found).to(device) if found else torch.empty(0, dtype=torch.int64,
                                                                    device=device)
        splits = column([0, *(rows.numel() for rows in found)]).cumsum(0)
        nothing = torch.empty(0, device=device)
        none = column([0] * len(found))
        parts = self._messages.gather(mine, splits, nothing, none, wire)
        for splits, ids, _ in parts:
            edges, ids = splits.tolist(), ids.cpu()
            for block, mark in enumerate(self.changed.marks):
                mark[ids[edges[block]:edges[block + 1]]] = True
        union = [mark.nonzero()[:, 0] for mark in self.changed.marks]
        edges = column([0, *(rows.numel() for rows in union)]).cumsum(0)
        ids = torch.cat(union) if union else torch.empty(0, dtype=torch.int64)
        return Uniques(ids, edges, torch.arange(ids.numel() + 1), torch.zeros_like(ids))

    def _average(self, block: int, rows: Tensor, wire: WireBytes) -> None:
        weights, state = self._storage.read_rows(block, rows)
        flat = torch.cat([weights, state], 1).to(self._copies.device)
        count = self._copies.world_size
        wire.sync_bytes += 2 * (count - 1) * flat.numel() * _FP32_BYTES // count
        sum_in_order_(flat.view(-1), self._copies, _PHASE)
        flat /= count
        weights, state = flat.cpu().split([weights.shape[1], state.shape[1]], 1)
        self._storage.write_rows(block, rows, weights, state)
