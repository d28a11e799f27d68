"""Counts of how often rows are used: which rows are hot, without a counter for every row.

Uses are noted as they come and, when the notes are full, added to the counts of the rows that are
tracked; then the most used of them stay tracked. A row that is seldom used may so be forgotten in
between; one that is hot in every stretch of notes is counted exactly. Ties go to the lower row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shardlab.tensor_train_shapes import HotRowsShape

_MAX_COUNT = (1 << 31) - 1


class UseCounts:
    """Counts of a shard's rows, on CPU.

    Args:
        shape: how many rows are tracked, and how many uses are noted.

    Attributes:
        ids: int64 [tracked + pending]; ``tracked`` rows ascending, then notes.
        counts: int32, uses of each.
        squares: fp32, sums of the mean squares of each row's gradients.
        sizes: tracked rows and notes that are in use.
    """

    def __init__(self, shape: HotRowsShape) -> None:
        self._shape = shape
        total = shape.tracked + shape.pending
        self.ids = torch.zeros(total, dtype=torch.int64)
        self.counts = torch.zeros(total, dtype=torch.int32)
        self.squares = torch.zeros(total)
        self.sizes = [0, 0]

    def note(self, ids: Tensor, counts: Tensor, squares: Tensor) -> None:
        """Notes uses of rows that differ.

        Args:
            ids: int64 [n].
            counts: int64 [n], uses of each.
            squares: fp32 [n], mean square of each row's gradient.
        """
        for first in range(0, ids.numel(), self._shape.pending):
            part = slice(first, first + self._shape.pending)
            size = ids[part].numel()
            if self.sizes[1] + size > self._shape.pending:
                self._merge()
            at = self._shape.tracked + self.sizes[1]
            self.ids[at:at + size] = ids[part]
            self.counts[at:at + size] = counts[part].clamp(max=_MAX_COUNT).int()
            self.squares[at:at + size] = squares[part]
            self.sizes[1] += size

    def hottest(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """(ids ascending, counts, squares) of the most used rows, at most ``count``."""
        self._merge()
        size = self.sizes[0]
        order = torch.argsort(self.counts[:size], descending=True, stable=True)[:count]
        chosen = order.sort().values
        return self.ids[chosen], self.counts[chosen], self.squares[chosen]

    def halve(self) -> None:
        """Halves all counts, so that the past fades."""
        self._merge()
        self.counts[:self.sizes[0]] //= 2

    def _merge(self) -> None:
        """Adds the notes to the counts, and keeps the most used rows."""
        tracked, noted = self.sizes
        if not noted:
            return
        first = self._shape.tracked
        used = torch.cat([torch.arange(tracked), torch.arange(first, first + noted)])
        order = used[torch.argsort(self.ids[used], stable=True)]
        ids, lengths = torch.unique_consecutive(self.ids[order], return_counts=True)
        counts = torch.segment_reduce(self.counts[order].double(), "sum", lengths=lengths)
        squares = torch.segment_reduce(self.squares[order].double(), "sum", lengths=lengths)
        keep = torch.argsort(counts, descending=True, stable=True)[:self._shape.tracked]
        keep = keep.sort().values
        size = keep.numel()
        self.ids[:size] = ids[keep]
        self.counts[:size] = counts[keep].clamp(max=_MAX_COUNT).int()
        self.squares[:size] = squares[keep].float()
        self.sizes = [size, 0]

    def saved(self) -> dict[str, Tensor]:
        """All that is in use, by name."""
        tracked, noted = self.sizes
        first = self._shape.tracked
        used = torch.cat([torch.arange(tracked), torch.arange(first, first + noted)])
        return {"ids": self.ids[used], "counts": self.counts[used], "squares": self.squares[used],
                "tracked": torch.tensor(tracked)}

    def load(self, saved: dict[str, Tensor]) -> None:
        """Takes what `saved` gave; beside what is there already, as notes."""
        tracked = int(saved["tracked"])
        if self.sizes == [0, 0] and tracked <= self._shape.tracked and \
                saved["ids"].numel() - tracked <= self._shape.pending:
            self.sizes = [tracked, saved["ids"].numel() - tracked]
            first = self._shape.tracked
            for name, held in (("ids", self.ids), ("counts", self.counts),
                               ("squares", self.squares)):
                held[:tracked] = saved[name][:tracked]
                held[first:first + self.sizes[1]] = saved[name][tracked:]
        else:
            self.note(saved["ids"], saved["counts"].long(), saved["squares"])
