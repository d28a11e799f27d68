"""What changed in pruned tables since a full checkpoint, in few bytes.

Rows that steps changed are marked in the index. Besides these, rows vanished, and decisions decayed
the utilities of all. A decision is a function of a row's utilities and of a few numbers
(`shardlab.ops.chunk_decay`), so the numbers are kept: a reader takes the same decisions on rows of
the base. Only rows whose going they would not tell are listed one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shardlab.ops.chunk_marks import Losses, Marks, RowRange
from shardlab.storage.pruned_state import PrunedState

#: Rows of the index that are looked through at a time.
SLICE_ROWS = 1 << 18
#: Rows that vanished are looked through for doubles when so many more are listed.
_PENDING_ROWS = 1 << 18


def listed_rows(pruned: PrunedState, store: int, marks: Marks,
                first: Sequence[int] | None = None) -> dict[int, Tensor]:
    """int64 [n], ascending, by shard of a store: rows there, as they are marked.

    Args:
        pruned: that holds them.
        store: number of the store.
        marks: which rows.
        first: by shard: rows from there on; None: all.
    """
    slices = max(1, pruned.index.numbers(store).rows // SLICE_ROWS)
    found: dict[int, list[Tensor]] = {block: [] for block in pruned.stores[store].blocks}
    for part in range(slices):
        pairs = pruned.index.list_between(store, RowRange(slice=part, slices=slices, marks=marks))
        for block, rows in found.items():
            mine = pairs[pairs[:, 0] == block, 1]
            rows.append(mine if first is None else mine[mine >= first[block]])
    return {block: in_order(found.pop(block)) for block in list(found)}


def in_order(rows: list[Tensor]) -> Tensor:
    """All of them, ascending; without the numbers that torch's sort makes besides."""
    joined = torch.cat(rows)
    rows.clear()
    joined.numpy().sort()
    return joined


@dataclass(frozen=True)
class Decision:
    """One pass of decay and eviction over a store.

    Attributes:
        decay: of utilities.
        thresholds: fp32 [shards].
        key: of the random bits of rounding.
    """

    decay: float
    thresholds: Tensor
    key: int


class ChunkChanges:
    """What changed in a storage since `clear`.

    Args:
        pruned: what to watch; its storage tells what goes.
    """

    def __init__(self, pruned: PrunedState) -> None:
        self._pruned = pruned
        self.clear()

    def clear(self) -> None:
        """Forgets everything: a snapshot of all rows was taken just now."""
        self._generation = self._pruned.generation
        self._gone: list[list[Tensor]] = [[] for _ in self._pruned.shards]
        self._pending, self._num_gone = 0, 0
        #: By store, in their order.
        self.decisions: list[list[Decision]] = [[] for _ in self._pruned.stores]

    @property
    def is_known(self) -> bool:
        """Whether marks are still those since `clear`: nobody else took a snapshot of all rows, or
        loaded any, and not more rows vanished than there are."""
        return self._generation == self._pruned.generation

    def note(self, losses: Losses, *, decided: bool) -> None:
        """Takes rows that lost chunks.

        Args:
            losses: as the index tells them.
            decided: in a decision; that tells of rows that had not changed before.
        """
        gone = losses.left == 0
        if decided:
            gone &= (losses.utilities < 0).any(1)
        for block in torch.unique(losses.blocks[gone]).tolist():
            rows = losses.rows[gone & (losses.blocks == block)]
            self._gone[block].append(rows)
            self._pending += rows.numel()
        if self._pending > max(_PENDING_ROWS, self._num_gone):
            self._pending = 0
            self._num_gone = sum(self.gone(block).numel() for block in range(len(self._gone)))
            if self._num_gone > max(_PENDING_ROWS, self.num_rows()):
                self._gone = [[] for _ in self._gone]
                self._generation = -1

    def gone(self, block: int) -> Tensor:
        """int64 [n], ascending: rows of a shard that vanished, some of which are there again."""
        found = torch.cat([torch.empty(0, dtype=torch.int64), *self._gone[block]]).unique()
        self._gone[block] = [found]
        return found

    def rows(self) -> dict[int, Tensor]:
        """int64 [n], ascending, by shard: rows there that changed."""
        return {block: rows for store in range(len(self._pruned.stores))
                for block, rows in listed_rows(self._pruned, store, Marks.SET).items()}

    def count(self) -> int:
        """Rows that changed or vanished."""
        index = self._pruned.index
        marked = sum(index.count_between(store, RowRange(marks=Marks.SET))
                     for store in range(len(self._pruned.stores)))
        return marked + sum(self.gone(block).numel() for block in range(len(self._gone)))

    def num_rows(self) -> int:
        """Rows there are."""
        return sum(self._pruned.index.numbers(store).rows
                   for store in range(len(self._pruned.stores)))
