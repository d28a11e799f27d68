"""Copies of hot rows: on every rank, read at home, stepped by gradients added up over all ranks.

The rows themselves stay where the plan puts them, and are what checkpoints know; while a run
trains, the copies are newer. Copies begin as their rows (`refresh`), and are written to these
(`write_down`) before anything reads them. A copy is held in its table's dtype and rounded by the
random bits of its row, so that a run with hot rows equals one without.

Gradients of all hot rows of a collection are added up in one buffer, fp32, in the order of ranks:

    [table: gradients K x D | how many ranks touched each of K rows] [next table ...]

Bytes that a rank sends per step: 2 (W - 1) / W x 4 K (D + 1), whatever the batch holds; so those
rows pay that most batches hold. Rows that no rank touched keep still.

Source: own; replicated hot rows as in FAE (arXiv 2103.00686), there for GPUs in front of a host.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from shardlab.comm import Groups, WireBytes, all_reduce_
from shardlab.comm.ordered_sum import ordered_sum_, piece_edges
from shardlab.ops.unique import Uniques
from shardlab.sharded.gradients import PendingGradients
from shardlab.sharded.layout import Layout
from shardlab.sharded.row_watch import ChangedRows, Snapshot
from shardlab.storage import (
    MixedStorage,
    RowsStorage,
    Storage,
    StorageOptions,
    build_storage,
)
from shardlab.storage_bytes import TierBytes
from shardlab.wire_bytes import FP32_BYTES, HOT_MARKS


@dataclass(frozen=True)
class _Home:
    """The hot rows of a table that one shard of this rank is the home of.

    Attributes:
        block: of the shard.
        places: int64 [n], ascending: which of the table's hot rows.
        rows: int64 [n], ascending: the same as rows of the shard.
    """

    block: int
    places: Tensor
    rows: Tensor


@dataclass(frozen=True)
class _Table:
    """A table with hot rows.

    Attributes:
        name: of the table.
        block: of the copies among all blocks; ``number`` in the copies' own storage.
        count, columns: of the copies.
        first: element of the gradients' buffer where the table begins.
        homes: of the rows.
    """

    name: str
    block: int
    number: int
    count: int
    columns: int
    first: int
    homes: tuple[_Home, ...]

    @property
    def elements(self) -> int:
        """Elements of its gradients and of the marks behind them."""
        return self.count * (self.columns + HOT_MARKS)


class HotRows:
    """The copies that this rank holds.

    Args:
        layout: the compiled plan.
        home: the storage of all other shards.
        groups: the ranks.
        options: of the storages.

    Attributes:
        storage: all blocks of the layout as one storage.
    """

    def __init__(self, layout: Layout, home: Storage, groups: Groups,
                 options: StorageOptions) -> None:
        self._groups, self._home, self._num_homes = groups, home, layout.num_homes
        shards = list(layout.local_shards)
        self._copies = build_storage(shards[self._num_homes:], options)
        blocks = list(range(len(shards)))
        self.storage: Storage = MixedStorage(shards, {
            home: blocks[:self._num_homes], self._copies: blocks[self._num_homes:]})
        self._tables = _tables_of(layout)
        self._size = sum(table.elements for table in self._tables)
        #: bool [K] by table: copies that were stepped since they were written down.
        self._stepped = [torch.zeros(table.count, dtype=torch.bool) for table in self._tables]
        self._fresh = False

    # ------------------------------------------------------------------ values
    def rows_change(self, watches: Sequence[ChangedRows | Snapshot]) -> None:
        """Rows are about to change other than by steps, on every rank: the copies end here."""
        self.write_down(watches)
        self._fresh = False

    def refresh(self) -> None:
        """Makes the copies equal to their rows, where these changed; every rank must call it."""
        if self._fresh:
            return
        for table in self._tables:
            width = self._rows_of(table.block)[0].row_elements(table.number)
            values = torch.zeros(table.count, width, device=self._groups.device)
            for home in table.homes:
                storage, number = self._rows_of(home.block)
                parts = torch.cat(storage.read_rows(number, home.rows), 1)
                values[home.places.to(values.device)] = parts.to(values.device)
            # All but the homes add zeros, as bits: also -0.0 arrives as it is.
            all_reduce_(values.view(torch.int32), self._groups)
            storage, number = self._rows_of(table.block)
            storage.write_rows(number, torch.arange(table.count), values[:, :table.columns],
                               values[:, table.columns:])
        self._fresh = True

    def write_down(self, watches: Sequence[ChangedRows | Snapshot]) -> None:
        """Writes copies that were stepped to the rows that lie here.

        Args:
            watches: are told which rows change.
        """
        for table, stepped in zip(self._tables, self._stepped, strict=True):
            copies, number = self._rows_of(table.block)
            for home in table.homes:
                some = stepped[home.places]
                if not bool(some.any()):
                    continue
                for watch in watches:
                    watch.before_update(self._only(home.block, home.rows[some]))
                storage, block = self._rows_of(home.block)
                storage.write_rows(block, home.rows[some],
                                   *copies.read_rows(number, home.places[some]))
            stepped.zero_()

    def _only(self, block: int, rows: Tensor) -> Uniques:
        """Uniques of one block, without entries."""
        splits = torch.zeros(self._num_homes + 1, dtype=torch.int64)
        splits[block + 1:] = rows.numel()
        none = torch.empty(0, dtype=torch.int64)
        return Uniques(rows, splits, none, none)

    def _rows_of(self, block: int) -> tuple[RowsStorage, int]:
        """The storage of rows that holds a block, and its number there."""
        storage: Storage = self.storage
        while isinstance(storage, MixedStorage):
            storage, block = storage.part_of(block)
        assert isinstance(storage, RowsStorage)
        return storage, block

    def tier_bytes(self) -> TierBytes:
        """Bytes of the copies."""
        return self._copies.tier_bytes()

    # ------------------------------------------------------------------ gradients
    def add_up(self, mine: PendingGradients, wire: WireBytes) -> PendingGradients:
        """Gradients of the copies over all ranks in the place of this rank's; all must call it.

        Args:
            mine: what has arrived here; of the copies, this rank's own.
            wire: counts the bytes.

        Returns:
            One entry for every copy that any rank touched, the other blocks as they were.
        """
        chunks, first = mine.chunks, self._num_homes
        buffer = torch.zeros(self._size, device=self._groups.device)
        blocks = {table.block: table for table in self._tables}
        for block, start, count, source, step in chunks[chunks[:, 0] >= first].tolist():
            table, ids = blocks[block], mine.ids[start:start + count]
            rows, marks = self._parts(buffer, table)
            # Within a chunk, rows are different: nothing is added twice, in whatever order.
            rows[ids] += mine.grads[source:source + count * step].view(count, step)
            marks[ids] += 1
        ordered_sum_(buffer, self._groups, "update")
        self._count(wire)
        ids, added, at = [mine.ids], [], mine.ids.numel()
        for table, stepped in zip(self._tables, self._stepped, strict=True):
            _, marks = self._parts(buffer, table)
            touched = marks.nonzero()[:, 0]
            stepped[touched.cpu()] = True
            ids.append(touched)
            added.append([table.block, at, touched.numel(), 0, table.columns])
            at += touched.numel()
        return self._joined(mine, buffer, torch.cat(ids), added)

    def _joined(self, mine: PendingGradients, buffer: Tensor, ids: Tensor,
                added: list[list[int]]) -> PendingGradients:
        """This rank's other blocks, and the chunks of the copies with their gradients."""
        grads, at = [mine.grads], mine.grads.numel()
        for table, chunk in zip(self._tables, added, strict=True):
            chunk[3] = at
            touched = ids[chunk[1]:chunk[1] + chunk[2]]
            grads.append(self._parts(buffer, table)[0][touched].view(-1))
            at += grads[-1].numel()
        kept = mine.chunks[mine.chunks[:, 0] < self._num_homes]
        new = ids.numel() - mine.ids.numel()
        bags, weights = mine.bags, mine.weights
        if bags is not None:
            bags = torch.cat([bags, *(torch.arange(chunk[2], device=bags.device)
                                      for chunk in added)])
        if weights is not None:
            weights = torch.cat([weights, weights.new_ones(new)])
        return replace(mine, ids=ids, chunks=torch.cat([kept, torch.tensor(added)]), bags=bags,
                       weights=weights, grads=torch.cat(grads))

    @staticmethod
    def _parts(buffer: Tensor, table: _Table) -> tuple[Tensor, Tensor]:
        """A table's gradients [K, D] and marks [K] in the buffer."""
        end = table.first + table.count * table.columns
        return (buffer[table.first:end].view(table.count, table.columns),
                buffer[end:end + table.count])

    def _count(self, wire: WireBytes) -> None:
        """Books what the sum has sent: the pieces of others, then its own piece to each of them."""
        world, rank = self._groups.world_size, self._groups.rank
        low, high = piece_edges(self._size, world)[rank:rank + 2]
        sizes = []
        for table in self._tables:
            own = max(0, min(high, table.first + table.elements) - max(low, table.first))
            sizes.append(FP32_BYTES * (table.elements - own + (world - 1) * own))
        wire.gradients_bytes += sum(sizes)
        wire.add(2, [table.name for table in self._tables], sizes)


def _tables_of(layout: Layout) -> list[_Table]:
    """The tables with hot rows, in the order of their blocks."""
    found: list[_Table] = []
    first = 0
    for number, local in enumerate(layout.local_shards[layout.num_homes:]):
        rows = torch.tensor(local.table_rows)
        homes = []
        for block, other in enumerate(layout.local_shards[:layout.num_homes]):
            if other.table.name == local.table.name:
                edges = torch.tensor([other.shard.row_start, other.shard.row_end])
                low, high = torch.searchsorted(rows, edges).tolist()
                homes.append(_Home(block, torch.arange(low, high),
                                   rows[low:high] - other.shard.row_start))
        table = _Table(local.table.name, layout.num_homes + number, number, local.shard.rows,
                       local.shard.columns, first, tuple(homes))
        found.append(table)
        first += table.elements
    return found
