"""Pruned tables at one moment, written while they train.

A row that is about to change or to go, and is not written yet, is kept as it was; the writer takes
kept rows, and reads the others when it comes to them:

    training   rows of a step, and rows that lost chunks in it: keep them (places of replaced
               chunks are not cleared before)
               a decision decays all utilities: keep those, 2 bytes a chunk and 8 a row
    writer     the next rows in order: unmarked rows of the index, and kept ones
               a stripe of them: read, replaced by kept ones, done

In a snapshot of all rows the marks of the index, cleared when it begins, tell which rows changed
since; in one of changed rows, a list of these does. Source: own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shardlab.chunk_layout import LINE_BYTES
from shardlab.ops.chunk_marks import MARK, Losses, Marks, RowRange
from shardlab.ops.unique import Uniques
from shardlab.storage.base import TableChunk
from shardlab.storage.chunk_changes import SLICE_ROWS, ChunkChanges, listed_rows
from shardlab.storage.chunk_files import ChunkFiles, RowContent
from shardlab.storage.kept_room import KeptRoom

#: fp32 elements of weights and state of a chunk of a table, and of what is read under the lock.
_STRIPE_ELEMENTS, _READ_ELEMENTS = 1 << 20, 1 << 18
#: Row numbers that are listed at a time: so many, or a part of all.
_LISTED_ROWS, _LISTED_PART = 1 << 16, 16
_ROW_BYTES, _CODE_BYTES = 8, 2
#: A sketch is written whole rather than that readers take more decisions on it.
_MOST_REPLAYED = 16


@dataclass
class _Kept:
    """Rows as they were, ascending, and what they count while some are left."""

    rows: Tensor
    content: RowContent
    num_bytes: int


class ChunkSnapshot:
    """The rows of pruned shards at the moment this is made; the caller holds their lock.

    Args:
        files: of the shards, whose chunks are compact by now.
        changes: hold only what changed; None: all rows.
        room: for what is kept.
        end: called once nothing is kept any more.

    Attributes:
        room: for what is kept.
    """

    def __init__(self, files: ChunkFiles, changes: ChunkChanges | None, room: KeptRoom,
                 end: Callable[[ChunkSnapshot], None]) -> None:
        pruned = self._pruned = files.pruned
        self._files, self.room, self._end = files, room, end
        blocks = range(len(pruned.shards))
        counts = [pruned.index.count(store, 1.0)[1].sum(1) for store in range(len(pruned.stores))]
        #: Rows that are not written yet, by shard.
        self._left = [int(counts[store][block])
                      for block, store in enumerate(pruned.index.blocks[:, 0].tolist())]
        self._num_rows = list(self._left)
        self._heads = [files.head(block) for block in blocks]
        self._done = [0 for _ in blocks]
        self._kept: list[list[_Kept]] = [[] for _ in blocks]
        self._held: dict[int, tuple[Tensor, Tensor]] = {}
        self._decided: set[int] = set()
        self._wanted: dict[int, Tensor] | None = None
        if changes is not None:
            self._wanted = changes.rows()
            self._is_kept = {block: torch.zeros(rows.numel(), dtype=torch.bool)
                             for block, rows in self._wanted.items()}
            self._left = [self._wanted[block].numel() for block in blocks]
            for block in blocks:
                store = int(pruned.index.blocks[block, 0])
                self._heads[block] |= _told(changes, block, store)
                if "sketch" in self._heads[block]:
                    self._shorten(self._heads[block], store)

    def _shorten(self, head: dict[str, Tensor], store: int) -> None:
        """Lines of the sketch that changed, in place of all, where these are few."""
        lines = self._pruned.index.changed_lines(store)
        cells = head["sketch"].view(-1, LINE_BYTES)
        if 2 * len(lines) <= len(cells) and len(head["keys"]) <= _MOST_REPLAYED:
            del head["sketch"]
            head |= {"sketch_lines": lines, "sketch_cells": cells[lines]}

    @property
    def num_rows(self) -> int:
        """Rows that are not written yet."""
        return sum(self._left)

    def close(self) -> None:
        """Keeps nothing any more."""
        self._end(self)

    # ------------------------------------------------------------------ the training thread
    def keep(self, uniques: Uniques) -> None:
        """Keeps rows that are about to be stepped."""
        ids, splits = uniques.ids.cpu(), uniques.splits.tolist()
        for block, done in enumerate(self._done):
            rows = ids[splits[block]:splits[block + 1]]
            rows = rows[rows >= done].sort().values
            if self._wanted is not None:
                rows = rows[self._unkept(block, rows)]
            if not rows.numel():
                continue
            found = self._pruned.index.look_up(block, rows)
            if self._wanted is None:
                fresh = (found.places >= 0).any(1) & (found.utilities >= 0).all(1)
                self._keep(block, rows[fresh], found.places[fresh], found.utilities[fresh])
            else:
                self._keep(block, rows, found.places, found.utilities)

    def keep_losses(self, losses: Losses) -> None:
        """Keeps rows that lost chunks; their places hold what they held."""
        for block in torch.unique(losses.blocks).tolist():
            some = (losses.blocks == block) & (losses.rows >= self._done[block])
            if self._wanted is None:
                some &= (losses.utilities >= 0).all(1)
            at = _first(losses.rows, some.nonzero()[:, 0])
            if self._wanted is not None:
                at = at[self._unkept(block, losses.rows[at])]
            chunks = self._pruned.pools.chunks(block)
            self._keep(block, losses.rows[at], losses.places[at, :chunks],
                       losses.utilities[at, :chunks])

    def _unkept(self, block: int, rows: Tensor) -> Tensor:
        """bool [n]: which of some rows, each there once, are wanted, and are kept from now on."""
        assert self._wanted is not None
        wanted, is_kept = self._wanted[block], self._is_kept[block]
        if not wanted.numel():
            return torch.zeros(rows.numel(), dtype=torch.bool)
        at = torch.searchsorted(wanted, rows).clamp_(max=wanted.numel() - 1)
        fresh = (wanted[at] == rows) & ~is_kept[at]
        is_kept[at[fresh]] = True
        return fresh

    def _keep(self, block: int, rows: Tensor, places: Tensor, utilities: Tensor) -> None:
        if not rows.numel():
            return
        content = self._files.read(block, places, utilities)
        num_bytes = rows.nbytes + content.num_bytes
        self._kept[block].append(_Kept(rows, content, num_bytes))
        self.room.take(num_bytes)

    def decision_bytes(self, stores: Sequence[int]) -> int:
        """What `hold` would keep now, at most; rows that go come on top."""
        return sum(self._left[block] * self._held_bytes(block) for store in stores
                   if store not in self._decided for block in self._pruned.stores[store].blocks)

    def _held_bytes(self, block: int) -> int:
        return _ROW_BYTES + _CODE_BYTES * self._pruned.pools.chunks(block)

    def hold(self, store: int) -> None:
        """Keeps the utilities of a store's rows, which a decision is about to change."""
        if store in self._decided:
            return  # rows that are not kept or written have theirs kept from the first decision
        self._decided.add(store)
        index = self._pruned.index
        if self._wanted is None:
            listed = listed_rows(self._pruned, store, Marks.CLEAR, self._done)
        else:
            listed = {block: self._wanted[block][~self._is_kept[block]]
                      for block in self._pruned.stores[store].blocks}
        for block in list(listed):
            rows = listed.pop(block)
            rows = rows[int(torch.searchsorted(rows, self._done[block])):].clone()
            if rows.numel():
                found = (index.look_up(block, part) for part in rows.split(_LISTED_ROWS))
                self._held[block] = rows, torch.cat([_codes(one.places, one.utilities)
                                                     for one in found])
                self.room.take(rows.numel() * self._held_bytes(block))

    # ------------------------------------------------------------------ the writer's thread
    def chunks(self) -> Iterator[tuple[TableChunk, bool]]:
        """Streams (chunk, whether it holds changed rows only), shard by shard, in order of rows."""
        for block in range(len(self._pruned.shards)):
            yield from self._block(block)
            with self._pruned.lock:
                held = self._held.pop(block, None)
                self._done[block], self._left[block] = self._pruned.shards[block].shard.rows, 0
            self.room.give(0 if held is None else held[0].numel() * self._held_bytes(block))

    def _block(self, block: int) -> Iterator[tuple[TableChunk, bool]]:
        files, changed = self._files, self._wanted is not None
        if changed:
            none = torch.empty(0, dtype=torch.int64)
            span = 0, self._pruned.shards[block].shard.rows
            yield files.chunk(block, span, none, self._read(block, none, 0),
                              self._heads[block]), True
        step = max(1, _STRIPE_ELEMENTS // files.elements(block))
        for low, rows, high in self._lists(block):
            parts = list(rows.split(step)) if rows.numel() or changed else [rows]
            edges = [int(part[0]) for part in parts[1:]]
            for part, first, last in zip(parts, [low, *edges], [*edges, high], strict=True):
                if changed:
                    if not part.numel():
                        continue
                    first, last = int(part[0]), int(part[-1]) + 1
                content = self._read_stripe(block, part, last)
                head = self._heads[block] if first == 0 and not changed else \
                    files.note(self._heads[block])
                yield files.chunk(block, (first, last), part, content, head), changed
        self._heads[block] = {}

    def _lists(self, block: int) -> Iterator[tuple[int, Tensor, int]]:
        """(first row, rows, row behind) of ranges that tile the shard."""
        end = self._pruned.shards[block].shard.rows
        if self._wanted is not None:
            yield 0, self._wanted[block], end
            return
        most = max(_LISTED_ROWS, self._num_rows[block] // _LISTED_PART)
        low, high = 0, -1
        while high != end:
            rows, truncated = self._list(block, low, most)
            high = int(rows[-1]) + 1 if truncated else end
            yield low, rows, high
            low = high

    def _list(self, block: int, low: int, most: int) -> tuple[Tensor, bool]:
        """The first ``most`` rows from ``low`` on, ascending, and whether there may be more."""
        index, store = self._pruned.index, int(self._pruned.index.blocks[block, 0])
        slices = max(1, index.numbers(store).rows // SLICE_ROWS)
        high, found = self._pruned.shards[block].shard.rows, torch.empty(0, dtype=torch.int64)
        more = False
        for part in range(slices):
            with self._pruned.lock:
                pairs = index.list_between(store, RowRange(low, high, block, part, slices,
                                                           Marks.CLEAR))
            found = torch.cat([found, pairs[:, 1]])
            if found.numel() > 2 * most or (part + 1 == slices and found.numel() > most):
                found, more = found.sort().values[:most], True
                high = int(found[-1]) + 1
        with self._pruned.lock:
            kept = [one.rows[(one.rows >= low) & (one.rows < high)] for one in self._kept[block]]
        found = torch.cat([found, *kept]).unique()
        return found[:most], more or found.numel() > most

    def _read_stripe(self, block: int, rows: Tensor, last: int) -> RowContent:
        """Some rows as they were; with them all rows before ``last`` are written."""
        step = max(1, _READ_ELEMENTS // self._files.elements(block))
        parts = list(rows.split(step))
        edges = [*(int(part[0]) for part in parts[1:]), last]
        return RowContent.cat([self._read(block, part, edge)
                               for part, edge in zip(parts, edges, strict=True)])

    def _read(self, block: int, rows: Tensor, last: int) -> RowContent:
        index, files, given = self._pruned.index, self._files, 0
        with self._pruned.lock:
            kept, given = self._take(block, last)
            there = torch.ones(rows.numel(), dtype=torch.bool)
            if kept is not None:
                there[torch.searchsorted(rows, kept.rows)] = False
            found = index.look_up(block, rows[there])
            read = files.read(block, found.places, found.utilities)
            self._done[block] = max(self._done[block], last)
            self._left[block] -= rows.numel()
        self.room.give(given)
        if kept is not None:
            order = torch.cat([rows[there], kept.rows]).argsort()
            read = RowContent.cat([read, kept.content]).pick(order)
        if block in self._held:
            held, codes = self._held[block]
            at = torch.searchsorted(held, rows).clamp(max=held.numel() - 1)
            same = held[at] == rows
            read.codes[same] = codes[at[same]]
        return read

    def _take(self, block: int, last: int) -> tuple[_Kept | None, int]:
        """Kept rows before ``last``, and bytes that are not kept any more."""
        given, taken, left = 0, [], []
        for one in self._kept[block]:
            cut = int(torch.searchsorted(one.rows, last))
            if cut:
                taken.append(_Kept(one.rows[:cut], one.content.pick(slice(0, cut)), 0))
            if cut < one.rows.numel():
                left.append(_Kept(one.rows[cut:], one.content.pick(slice(cut, None)),
                                  one.num_bytes))
            else:
                given += one.num_bytes
        self._kept[block] = left
        if not taken:
            return None, given
        rows = torch.cat([one.rows for one in taken])
        content = RowContent.cat([one.content for one in taken])
        at = _first(rows, torch.arange(rows.numel()))
        return _Kept(rows[at], content.pick(at), 0), given


def _codes(places: Tensor, utilities: Tensor) -> Tensor:
    """int16: bits of utilities without marks, -1 for absent chunks."""
    return torch.where(places >= 0, utilities & (MARK - 1), -1).to(torch.int16)


def _first(rows: Tensor, some: Tensor) -> Tensor:
    """Of positions ``some``, by ascending row: the first of every row."""
    values, order = rows[some].sort(stable=True)
    new = torch.ones(values.numel(), dtype=torch.bool)
    new[1:] = values[1:] != values[:-1]
    return some[order[new]]


def _told(changes: ChunkChanges, block: int, store: int) -> dict[str, Tensor]:
    """What a reader needs of a shard besides rows that changed."""
    decisions = changes.decisions[store]
    return {"gone": changes.gone(block),
            "decays": torch.tensor([one.decay for one in decisions], dtype=torch.float32),
            "limits": torch.tensor([float(one.thresholds[block]) for one in decisions]),
            "keys": torch.tensor([one.key for one in decisions], dtype=torch.int64)}
