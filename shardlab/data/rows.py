"""Consecutive rows of a source, and what a source of rows is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from shardlab.data.batch import Batch
from shardlab.jagged import KeyedJaggedTensor


@dataclass(frozen=True)
class Bags:
    """The bags of one feature over n rows.

    Attributes:
        values: [N] int64 ids.
        lengths: [n] int64 sizes of the bags; None: one id each.
    """

    values: NDArray[np.int64]
    lengths: NDArray[np.int64] | None = None

    def keep(self, kept: NDArray[np.bool_]) -> Bags:
        """The bags of the rows marked in ``kept``."""
        if self.lengths is None:
            return Bags(self.values[kept])
        return Bags(self.values[np.repeat(kept, self.lengths)], self.lengths[kept])

    def slice(self, low: int, high: int) -> Bags:
        """The bags of rows [low, high) (views)."""
        if self.lengths is None:
            return Bags(self.values[low:high])
        first = int(self.lengths[:low].sum())
        lengths = self.lengths[low:high]
        return Bags(self.values[first:first + int(lengths.sum())], lengths)

    def sizes(self) -> NDArray[np.int64]:
        """[n] sizes of the bags."""
        return np.ones(len(self.values), np.int64) if self.lengths is None else self.lengths


@dataclass(frozen=True)
class RowBlock:
    """n rows in columns; rows that were left out are counted, not held.

    Attributes:
        labels: [n] float32.
        dense: [n, num_dense] float32.
        bags: one entry per feature, in the source's order.
        skipped: bad rows left out.
    """

    labels: NDArray[np.float32]
    dense: NDArray[np.float32]
    bags: list[Bags]
    skipped: int = 0

    def slice(self, low: int, high: int) -> RowBlock:
        """Rows [low, high) of a block from which none was left out (views)."""
        return RowBlock(self.labels[low:high], self.dense[low:high],
                        [bags.slice(low, high) for bags in self.bags])

    def keep(self, kept: NDArray[np.bool_]) -> RowBlock:
        """The rows marked in ``kept``; the others count as skipped."""
        dropped = len(kept) - int(kept.sum())
        if not dropped:
            return self
        return RowBlock(self.labels[kept], self.dense[kept],
                        [bags.keep(kept) for bags in self.bags], self.skipped + dropped)

    def to_batch(self, keys: Sequence[str], position: int) -> Batch:
        """These rows as tensors."""
        values = _concat([bags.values for bags in self.bags], np.int64)
        sizes, stride = {}, len(self.labels)
        if all(bags.lengths is None for bags in self.bags):
            sizes["fixed_length"] = 1
        else:
            sizes["lengths"] = torch.from_numpy(np.concatenate([b.sizes() for b in self.bags]))
        sparse = KeyedJaggedTensor(keys, torch.from_numpy(values), stride=stride, **sizes)
        return Batch(torch.from_numpy(self.dense), sparse, torch.from_numpy(self.labels), position)


def concat_blocks(blocks: Sequence[RowBlock]) -> RowBlock:
    """Rows of several blocks, in order; at least one block."""
    if len(blocks) == 1:
        return blocks[0]
    bags = []
    for parts in zip(*(block.bags for block in blocks), strict=True):
        values = np.concatenate([part.values for part in parts])
        single = all(part.lengths is None for part in parts)
        bags.append(Bags(values, None if single else
                         np.concatenate([part.sizes() for part in parts])))
    return RowBlock(np.concatenate([block.labels for block in blocks]),
                    np.concatenate([block.dense for block in blocks]), bags,
                    sum(block.skipped for block in blocks))


def empty_block(num_dense: int, num_features: int) -> RowBlock:
    """No row."""
    return RowBlock(np.empty(0, np.float32), np.empty((0, num_dense), np.float32),
                    [Bags(np.empty(0, np.int64)) for _ in range(num_features)])


def _concat(parts: Sequence[NDArray], dtype: type) -> NDArray:
    return np.concatenate(parts) if parts else np.empty(0, dtype)


class RowCursor(Protocol):
    """Reads rows in ascending order; keeps only the piece it reads from in memory."""

    def read(self, first: int, last: int) -> RowBlock:
        """Rows [first, last), less the bad ones; ``first`` never goes back.

        Raises:
            DataError: names file and line or row group.
        """

    def close(self) -> None:
        """Closes the files."""


class RowSource(Protocol):
    """Rows with a global index, that can be read from any index on."""

    features: tuple[str, ...]
    num_dense: int

    def num_rows(self) -> int | None:
        """All rows, bad ones included; None: endless."""

    def open(self) -> RowCursor:
        """A cursor; its first read may begin at any row."""
