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

from shardlab.comm import Groups, ReplicaGroups, WireBytes
from shardlab.ops.unique import BOUNDS_CODE, Segments, Uniques, unique_segments
from shardlab.sharded.early import Splitter
from shardlab.sharded.gradients import MergedRows
from shardlab.sharded.layout import column
from shardlab.sharded.replica_messages import Part, RowMessages
from shardlab.sharded.row_updater import RowUpdater
from shardlab.sharded.row_watch import RowWatch
from shardlab.specs import BoundsMode
from shardlab.storage import LocalShard, RowWrites, Storage


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
        elif self._average is not None and self._average not in updater.watches:
            updater.watches.append(self._average)

    def is_due(self, step: int | None) -> bool:
        """Whether rows are to be averaged after this step; None: whatever the step."""
        return self._average is not None and \
            (step is None or step % self.replication.sync_every_steps == 0)

    def average(self, watches: Sequence[RowWatch], wire: WireBytes) -> None:
        """Averages rows; every rank of the job calls it, and no update is under way."""
        assert self._average is not None
        self._average.apply(watches, wire)


class RowSums:
    """Adds up numbers of rows over the replicas; all get the same bits.

    Two replicas send each other all their rows. Of more, each merges a range of every shard and
    sends the sums to all: rows that several have touched then travel fewer times, and the bits are
    the same, since sums are in the order of replicas either way.

    Args:
        rows: of every shard.
        columns: numbers of a row, int64 [shards] on CPU.
        copies: the ranks that hold the same shards.
        ranges: whether each merges a range; None: of more than two replicas.
    """

    def __init__(self, rows: Sequence[int], columns: Tensor, copies: Groups,
                 ranges: bool | None = None) -> None:
        self._ranges = copies.world_size > 2 if ranges is None else ranges
        self._columns = columns
        self._messages = RowMessages(rows, copies)
        self._segments = Segments(column(rows), column([BOUNDS_CODE[BoundsMode.ERROR]] * len(rows)))

    def merge(self, rows: MergedRows, wire: WireBytes) -> MergedRows:
        """The rows of all replicas, with their numbers, or sums of these, as entries.

        Args:
            rows: of this replica.
            wire: counts the bytes.
        """
        if self._ranges:
            rows = self._joined(self._messages.scatter(*self._sent(rows), wire))
        return self._joined(self._messages.gather(*self._sent(rows), wire))

    def _sent(self, rows: MergedRows) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return (rows.uniques.ids, rows.uniques.splits, rows.summed(self._columns), self._columns)

    def _joined(self, parts: list[Part]) -> MergedRows:
        """Rows of several replicas; the entries of a row are in their order."""
        chunks, ids_before, numbers_before = [], 0, 0
        columns = self._columns.tolist()
        for splits, _, _ in parts:
            edges = splits.tolist()
            for block, (first, last) in enumerate(pairwise(edges)):
                chunks.append([block, ids_before + first, last - first, numbers_before,
                               columns[block]])
                numbers_before += (last - first) * columns[block]
            ids_before += edges[-1]
        chunks.sort(key=lambda chunk: chunk[0])  # stable: replicas stay in order
        ids = torch.cat([ids for _, ids, _ in parts])
        numbers = torch.cat([numbers for _, _, numbers in parts])
        found = unique_segments(ids, column(chunks).reshape(-1, 5), self._segments)
        return MergedRows(found, None, numbers)


class GradientSync:
    """Merges a step's gradients over the replicas, so that all take the same step.

    Args:
        shards: of this rank.
        groups: the ranks that hold the same shards.
    """

    def __init__(self, shards: Sequence[LocalShard], groups: ReplicaGroups) -> None:
        rows = [local.shard.rows for local in shards]
        columns = column([local.shard.columns for local in shards])
        self._sums = RowSums(rows, columns, groups.copies)
        self._keys = RowMessages([max(1, sum(rows))], groups.copies.ahead())

    def merge(self, rows: MergedRows, wire: WireBytes) -> MergedRows:
        """The rows that any replica touched, with their gradients as entries.

        Args:
            rows: of this replica.
            wire: counts the bytes.
        """
        return self._sums.merge(rows, wire)

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

    What a row was before its first change is kept. Each replica sends by how much it has changed
    its rows; the mean is what the row was, and the sum of all changes over their number. So only
    rows that a replica has changed travel, and those that it has not are known to it.

    Args:
        storage: this rank's shards.
        groups: the ranks that hold the same shards.
    """

    def __init__(self, storage: RowWrites, groups: ReplicaGroups) -> None:
        self._storage, self._copies = storage, groups.copies
        rows = [local.shard.rows for local in storage.shards]
        self._sizes = [storage.row_elements(block) for block in range(len(rows))]
        self._sums = RowSums(rows, column(self._sizes), groups.copies)
        self._changed = [torch.zeros(count, dtype=torch.bool) for count in rows]
        self._kept: list[list[tuple[Tensor, Tensor]]] = [[] for _ in rows]

    def before_update(self, uniques: Uniques) -> None:
        """Keeps rows that are about to change for the first time."""
        ids, splits = uniques.ids.cpu(), uniques.splits.tolist()
        for block, changed in enumerate(self._changed):
            rows = ids[splits[block]:splits[block + 1]]
            rows = rows[~changed[rows]]
            if rows.numel():
                self._kept[block].append((rows, self._read(block, rows)))
                changed[rows] = True

    def apply(self, watches: Sequence[RowWatch], wire: WireBytes) -> None:
        """Averages; every rank of the job calls it, and no update is under way.

        Args:
            watches: are told which rows change.
            wire: counts the bytes.
        """
        self._storage.flush()
        before = [self._take(block) for block in range(len(self._sizes))]
        merged = self._sums.merge(self._changes(before), wire)
        for watch in watches:
            if watch is not self:
                watch.before_update(merged.uniques)
        ids, splits = merged.uniques.ids.cpu(), merged.uniques.splits.tolist()
        sums, at = merged.summed(column(self._sizes)).cpu(), 0
        for block, size in enumerate(self._sizes):
            rows = ids[splits[block]:splits[block + 1]]
            change = sums[at:at + rows.numel() * size].view(-1, size)
            at += change.numel()
            if rows.numel():
                self._write(block, rows, before[block], change)

    def _read(self, block: int, rows: Tensor) -> Tensor:
        """fp32 [n, columns and state], as the home holds them."""
        return torch.cat(self._storage.read_rows(block, rows), 1)

    def _take(self, block: int) -> tuple[Tensor, Tensor]:
        """The rows that this replica has changed, ascending, and what they were; forgets them."""
        parts, self._kept[block] = self._kept[block], []
        self._changed[block].zero_()
        rows = torch.cat([column([]), *(rows for rows, _ in parts)])
        values = torch.cat([torch.empty(0, self._sizes[block]), *(old for _, old in parts)])
        rows, order = rows.sort()
        return rows, values[order]

    def _changes(self, before: list[tuple[Tensor, Tensor]]) -> MergedRows:
        """By how much this replica has changed its rows."""
        device = self._copies.device
        changes = [(self._read(block, rows) - old).view(-1) if rows.numel() else old.view(-1)
                   for block, (rows, old) in enumerate(before)]
        counts = column([rows.numel() for rows, _ in before])
        sizes = torch.repeat_interleave(column(self._sizes), counts)
        splits = torch.cat([column([0]), counts.cumsum(0)])
        ids = torch.cat([column([]), *(rows for rows, _ in before)]).to(device)
        uniques = Uniques(ids, splits, torch.arange(ids.numel() + 1, device=device),
                          (sizes.cumsum(0) - sizes).to(device))
        return MergedRows(uniques, None, torch.cat([torch.empty(0), *changes]).to(device))

    def _write(self, block: int, rows: Tensor, before: tuple[Tensor, Tensor],
               change: Tensor) -> None:
        """What rows were, and the mean change."""
        values = self._read(block, rows)
        mine, old = before
        values[torch.searchsorted(rows, mine)] = old
        values += change / self._copies.world_size
        columns = self._storage.shards[block].shard.columns
        self._storage.write_rows(block, rows, values[:, :columns], values[:, columns:])
