"""What checkpoints need to know of steps: which rows changed, and what they were before.

A snapshot is the tables at one moment, written while training goes on. Nothing is copied when it
begins: a row that is about to change, and is not written yet, is kept as it was; the writer takes
kept rows instead of those in the table. A row is thus copied at most once, and rows that no step
touches never are.

    writer   read a stripe from the table          (no lock: what changes meanwhile is kept)
             lay kept rows over it, mark it clean   (lock)
    step     rows that are not clean yet: copy      (lock), then change them

Source: own; the incremental part as in Check-N-Run (arXiv 2010.08679).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from shardlab.ops.unique import Uniques
from shardlab.storage import KeptRoom, RowBlock, StorageChanges, StorageSnapshot, TableChunk

#: fp32 elements of weights and state that a stripe holds: 4 MiB.
_STRIPE_ELEMENTS = 1 << 20


class RowWatch(Protocol):
    """Whoever wants to know which rows are about to change."""

    def before_update(self, uniques: Uniques) -> None:
        """These rows are about to change, and have not changed yet."""


class ChangedRows:
    """The rows of shards that were stepped since `clear`: one byte of memory a row.

    Args:
        blocks: the shards, by number.
        others: what changed in storages that know it themselves.

    Attributes:
        marks: bool [rows], by number of the shard.
        others: as given.
    """

    def __init__(self, blocks: Mapping[int, RowBlock],
                 others: Sequence[StorageChanges] = ()) -> None:
        self.others = list(others)
        self.marks = {number: torch.zeros(block.local.shard.rows, dtype=torch.bool)
                      for number, block in blocks.items()}

    def before_update(self, uniques: Uniques) -> None:
        """Marks the rows."""
        ids, splits = uniques.ids.cpu(), uniques.splits.tolist()
        for block, mark in self.marks.items():
            first, last = splits[block:block + 2]
            if first < last:
                mark.index_fill_(0, ids[first:last], True)

    def clear(self) -> None:
        """Forgets everything."""
        for mark in self.marks.values():
            mark.zero_()
        for other in self.others:
            other.clear()

    @property
    def is_known(self) -> bool:
        """Whether all that changed is known."""
        return all(other.is_known for other in self.others)

    def count(self) -> int:
        """How many rows changed."""
        return sum(int(mark.sum()) for mark in self.marks.values()) \
            + sum(other.count() for other in self.others)

    def num_rows(self) -> int:
        """How many rows there are."""
        return sum(mark.numel() for mark in self.marks.values()) \
            + sum(other.num_rows() for other in self.others)


@dataclass
class _Stripes:
    """How a block is cut for the writer.

    Attributes:
        edges: int64 [stripes + 1]: first row of every stripe; the last is the end.
        rows: int64 per stripe: the rows of it that the snapshot holds; None: all of them.
        kept: rows, weights and state that were kept, by stripe.
        done: stripes written.
    """

    edges: Tensor
    rows: list[Tensor] | None
    kept: dict[int, list[tuple[Tensor, Tensor, Tensor]]]
    done: int = 0


class Snapshot:
    """The rows of one rank at the moment this is made.

    Args:
        blocks: the shards to hold, by number; their storages are flushed by now.
        changed: marks of the rows to hold, by number of the shard; None: all rows.
        room: for kept rows; a step that needs more waits until the writer has caught up.
        others: snapshots of storages that keep what changes themselves, in the same room.

    Attributes:
        room: as given.
    """

    def __init__(self, blocks: Mapping[int, RowBlock], changed: Mapping[int, Tensor] | None,
                 room: KeptRoom, others: Sequence[StorageSnapshot] = ()) -> None:
        self.room, self._others = room, list(others)
        self._lock = threading.Lock()
        self._blocks = dict(blocks)
        self._clean: dict[int, Tensor] = {}
        self._cuts: dict[int, _Stripes] = {}
        for number, block in self._blocks.items():
            wanted = None if changed is None else changed[number].nonzero()[:, 0]
            rows = block.local.shard.rows
            self._cuts[number] = _cut(rows, block.elements, wanted)
            self._clean[number] = torch.zeros(rows, dtype=torch.bool) if changed is None \
                else ~changed[number]

    @property
    def num_rows(self) -> int:
        """Rows that it holds."""
        return sum(int((~clean).sum()) for clean in self._clean.values()) \
            + sum(other.num_rows for other in self._others)

    # ------------------------------------------------------------------ the training thread
    def before_update(self, uniques: Uniques) -> None:
        """Keeps the rows that are not written yet as they are now."""
        if self.room.is_over:
            return
        ids, splits = uniques.ids.cpu(), uniques.splits.tolist()
        for block, clean in self._clean.items():
            first, last = splits[block:block + 2]
            if first == last:
                continue
            mine = ids[first:last]
            mine = mine[~clean[mine]]
            if mine.numel():
                self._keep(block, mine.sort().values)
        self.room.wait()

    def _keep(self, block: int, rows: Tensor) -> None:
        weights, state = self._blocks[block].read_rows(rows)
        cut = self._cuts[block]
        with self._lock:
            ends = torch.searchsorted(rows, cut.edges[cut.done:]).tolist()
            for stripe, (low, high) in enumerate(pairwise(ends), cut.done):
                if low == high:
                    continue
                part = slice(low, high)
                kept = (rows[part].clone(), weights[part].clone(), state[part].clone())
                cut.kept.setdefault(stripe, []).append(kept)
                self.room.take(sum(tensor.nbytes for tensor in kept))
            self._clean[block][rows] = True

    # ------------------------------------------------------------------ the writer's thread
    def chunks(self) -> Iterator[tuple[TableChunk, bool]]:
        """Streams (chunk, whether it holds changed rows only): these have ``present`` set.

        What is kept by storages comes first: a decision over all their rows may wait for it.
        """
        for other in self._others:
            yield from other.chunks()
        for block, cut in self._cuts.items():
            for stripe in range(cut.edges.numel() - 1):
                yield self._read(block, stripe)

    def close(self) -> None:
        """Keeps nothing any more; whoever waits goes on."""
        self.room.close()
        for other in self._others:
            other.close()
        with self._lock:
            for cut in self._cuts.values():
                cut.kept.clear()

    def _read(self, block: int, stripe: int) -> tuple[TableChunk, bool]:
        cut, source = self._cuts[block], self._blocks[block]
        local = source.local
        first, last = cut.edges[stripe:stripe + 2].tolist()
        held = None
        if cut.rows is None:
            weights, state = source.read_range(first, last - first)
        else:
            held = cut.rows[stripe] - first
            weights, state = source.read_rows(cut.rows[stripe])
        given = 0
        with self._lock:
            for rows, old_weights, old_state in cut.kept.pop(stripe, []):
                at = rows - first if held is None else torch.searchsorted(held, rows - first)
                weights[at], state[at] = old_weights, old_state
                given += rows.nbytes + old_weights.nbytes + old_state.nbytes
            self._clean[block][first:last] = True
            cut.done = stripe + 1
        self.room.give(given)
        chunk = TableChunk(
            local.table.name, local.shard.row_start + first, local.shard.col_start, weights,
            source.named_state(state), local.replicated)
        if held is None:
            return chunk, False
        return replace(chunk, present=held, span=last - first), True


def _cut(rows: int, elements: int, wanted: Tensor | None) -> _Stripes:
    """Stripes of about `_STRIPE_ELEMENTS`, over all rows or over the wanted ones."""
    step = max(1, _STRIPE_ELEMENTS // elements)
    if wanted is None:
        edges = [*range(0, rows, step), rows]
        return _Stripes(torch.tensor(edges), None, {})
    parts = list(wanted.split(step))
    end = int(wanted[-1]) + 1 if wanted.numel() else 0
    edges = [int(part[0]) for part in parts if part.numel()]
    return _Stripes(torch.tensor([*edges, end]), parts, {})
