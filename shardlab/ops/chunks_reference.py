"""Reference face of `shardlab.ops.chunk_index.ChunkIndex`: dictionaries, one row after the other.

It decides, rounds and counts bytes as the native face does, chunk by chunk, and so judges it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from shardlab.chunk_layout import LINE_BYTES
from shardlab.codecs import GOLDEN, mix32, mix64
from shardlab.ops.chunk_index import ALL_ROWS, ChunkRows, Offers, StoreNumbers, StoreShape
from shardlab.ops.chunk_marks import MARK, Losses, Marks, RowRange
from shardlab.ops.chunk_numbers import (
    BINS,
    CELL_SHIFT,
    DRAWN,
    HELD_AGAINST,
    LEAST_UTILITY,
    TAG_SHIFT,
    cell_code,
    cell_value,
    utility_code,
    utility_value,
)
from shardlab.ops.chunk_reference_store import ReferenceRow, ReferenceStore

_WORD = (1 << 64) - 1


class ReferenceChunkIndex:
    """Plain face of `ChunkIndex`, which says what methods do.

    Args:
        shapes, blocks: as `build_chunk_index` takes them.
    """

    def __init__(self, shapes: Sequence[StoreShape], blocks: Tensor) -> None:
        self.shapes, self.blocks, self.changes = list(shapes), blocks, 0
        self._blocks = blocks.tolist()
        self._most = max((shape.layout.chunks for shape in shapes), default=1)
        self.notes_losses = False
        self._losses: list[tuple[int, int, int, list[int], list[int]]] = []
        self._gone: list[tuple[ReferenceStore, tuple[int, int, int], np.float32]] = []
        self._stores = [ReferenceStore(shape, torch.zeros(shape.layout.sketch_lines * LINE_BYTES,
                                                  dtype=torch.uint8)) for shape in shapes]

    def numbers(self, store: int) -> StoreNumbers:
        one = self._stores[store]
        return StoreNumbers(one.budget, one.slots, len(one.rows), one.used, one.top,
                            one.committed, len(one.stack), one.refused)

    def set_budget(self, store: int, budget: int) -> None:
        self._stores[store].budget = budget

    def held_bytes(self, store: int) -> int:
        return self._stores[store].held()

    def _store_of(self, block: int) -> ReferenceStore:
        return self._stores[self._blocks[block][0]]

    def _key(self, block: int, row: int) -> int:
        if self._store_of(block).shape.layout.is_narrow:
            return mix32(self._blocks[block][6] + row + 1)
        return self._hash(block, row)

    def _hash(self, block: int, row: int) -> int:
        """What cells of the sketch and draws go by."""
        wide = self._store_of(block).shape.wide
        return mix64((row if wide else block << TAG_SHIFT | row) + 1)

    def _word(self, block: int, key: int, row: int, chunk: int) -> int:
        _, row_start, first, chunks, table_key, *_ = self._blocks[block]
        at = (row_start + row) * chunks + first + chunk
        return mix64(((key ^ table_key) & _WORD) + at * GOLDEN)

    def _ids(self, segments: Tensor, ids: Tensor) -> Iterator[tuple[int, int, int]]:
        """(block, position, row) of every id."""
        for block, start, count in segments.tolist():
            for i, row in enumerate(ids[start:start + count].tolist(), start):
                yield block, i, row

    def places(self, segments: Tensor, ids: Tensor) -> Tensor:
        out = torch.full((self._most, ids.numel()), -1, dtype=torch.int64)
        for block, i, row in self._ids(segments, ids):
            found = self._store_of(block).rows.get(self._key(block, row))
            if found is not None:
                out[:len(found[2].places), i] = torch.tensor(found[2].places)
        return out

    def touch(self, offers: Offers) -> None:
        weights, norms = offers.weights.numpy(), offers.norms.numpy()
        for block, i, row in self._ids(offers.segments, offers.ids):
            found = self._store_of(block).rows.get(self._key(block, row))
            if found is None:
                continue
            chunks = found[2]
            for k, place in enumerate(chunks.places):
                if place >= 0 and norms[i, k] >= 0:
                    chunks.utilities[k] |= MARK
                if place >= 0 and norms[i, k] > 0:
                    utility = utility_value(chunks.utilities[k]) + norms[i, k] * weights[block]
                    chunks.utilities[k] = MARK | utility_code(
                        utility, self._word(block, offers.key, row, k))

    def offer(self, offers: Offers) -> Tensor:
        weights, norms = offers.weights.numpy(), offers.norms.numpy()
        admitted: list[tuple[int, int, int]] = []
        for store in self._stores:
            store.draws = 0
            store.forget_drawn()
        for block, i, row in self._ids(offers.segments, offers.ids):
            store = self._store_of(block)
            threshold = np.float32(float(offers.thresholds[block])) * weights[block]
            for k in range(store.shape.layout.chunks):
                if norms[i, k] > 0:
                    place = self._offer_chunk(store, (block, row, k),
                                              norms[i, k] * weights[block],
                                              threshold, offers)
                    if place is not None:
                        admitted.append((i, k, place))
        for gone in self._gone:
            self._count_gone(*gone)
        self._gone.clear()
        owner = {i: self._key(block, row) for block, i, row in self._ids(offers.segments,
                                                                         offers.ids)}
        stores = {i: self._store_of(block) for block, i, _ in self._ids(offers.segments,
                                                                        offers.ids)}
        kept = [(i, k, place) for i, k, place in admitted
                if owner[i] in stores[i].rows and stores[i].rows[owner[i]][2].places[k] == place]
        return torch.tensor(kept, dtype=torch.int64).view(-1, 3)

    def _offer_chunk(self, store: ReferenceStore, at: tuple[int, int, int], gain: np.float32,
                     threshold: np.float32, offers: Offers) -> int | None:
        """The place of a chunk that was admitted."""
        block, row, k = at
        key = self._key(block, row)
        found = store.rows.get(key)
        if found is not None and found[2].places[k] >= 0:
            return None
        word = self._word(block, offers.key, row, k)
        cells = self._cells(store, self._hash(block, row), k)
        utility = gain + (cell_value(int(store.cells[cells].min())) if cells
                          else np.float32(0))
        if utility >= threshold and self._make_room(store, at, utility, offers):
            store.forget_drawn()
            if found is None:
                chunks = store.shape.layout.chunks
                found = store.rows[key] = (block, row, ReferenceRow([-1] * chunks, [0] * chunks))
            place = found[2].places[k] = store.take_place()
            found[2].utilities[k] = MARK | utility_code(utility, word)
            return place
        if cells:
            code = cell_code(utility, (word >> 16) & ((1 << CELL_SHIFT) - 1))
            _raise(store, cells, code)
        return None

    def _make_room(self, store: ReferenceStore, at: tuple[int, int, int], utility: np.float32,
                   offers: Offers) -> bool:
        """Room for one more chunk of a row: free room, or that of a chunk worth less."""
        block, key = at[0], self._key(*at[:2])
        slot = key in store.rows or store.has_slot()
        if slot and store.has_place():
            return True
        store.refused += 1
        found = self._victim(store, key, offers.key, not slot)
        if found is None:
            return False
        worth, victim, chunk = found
        if utility < worth * np.float32(float(offers.margins[block])):
            return False
        owner, row, chunks = store.rows[victim]
        before = list(chunks.places), list(chunks.utilities)
        for k, place in enumerate(chunks.places):
            if place >= 0 and chunk in (-1, k):
                self._gone.append((store, (owner, row, k), utility_value(chunks.utilities[k])))
                self._leave(store, victim, k)
                offers.evicted[owner] += 1
        chunks.mark()
        self._note(owner, row, chunks, before)
        if max(chunks.places) < 0:
            del store.rows[victim]
        return True

    def _victim(self, store: ReferenceStore, own: int, key: int,
                whole: bool) -> tuple[np.float32, int, int] | None:
        """The least of what was drawn last, while few offers were held against it, or drawn now."""
        least = min(store.drawn, key=lambda one: one[0], default=None)
        if store.offers == HELD_AGAINST or store.whole != whole or (least and least[1] == own):
            start = mix64((key + store.draws * GOLDEN) & _WORD)
            store.drawn = self._draw(store, own, start >> (64 - 8 * store.shape.layout.key_bytes),
                                     whole)
            store.draws, store.whole, store.offers = store.draws + 1, whole, 0
            least = min(store.drawn, key=lambda one: one[0], default=None)
        store.offers += 1
        return least

    @staticmethod
    def _draw(store: ReferenceStore, own: int, start: int,
              whole: bool) -> list[tuple[np.float32, int, int]]:
        """(worth, key, chunk) of the chunks of the rows that follow a hash, but for one row.

        Whole rows, of which the best chunk counts, where slots are short: their chunk is -1.
        """
        keys = sorted(store.rows)
        first, drawn = bisect_left(keys, start), []
        most = store.shape.layout.chunks
        if whole and store.held(most) > store.budget:
            most = 1
        for i in range(min(DRAWN, len(keys))):
            key = keys[(first + i) % len(keys)]
            chunks = store.rows[key][2]
            here = [(utility_value(chunks.utilities[k]), key, k)
                    for k, place in enumerate(chunks.places) if place >= 0]
            if key == own:
                continue
            if not whole:
                drawn += here
            elif len(here) <= most:
                drawn.append((max(here)[0], key, -1))
        return drawn

    def _note(self, block: int, row: int, chunks: ReferenceRow,
              before: tuple[list[int], list[int]]) -> None:
        if self.notes_losses and chunks.places != before[0]:
            left = sum(place >= 0 for place in chunks.places)
            self._losses.append((block, row, left, *before))

    def take_losses(self) -> Losses:
        noted, self._losses = self._losses, []
        places = torch.full((len(noted), self._most), -1, dtype=torch.int32)
        utilities = torch.zeros(len(noted), self._most, dtype=torch.int16)
        for i, (_, _, _, at, codes) in enumerate(noted):
            places[i, :len(at)] = torch.tensor(at, dtype=torch.int32)
            utilities[i, :len(at)] = _int16(torch.tensor(codes, dtype=torch.int32))
        numbers = torch.tensor([one[:3] for one in noted], dtype=torch.int64).view(-1, 3)
        return Losses(*numbers.unbind(1), places, utilities)

    def set_refused(self, store: int, refused: int) -> None:
        self._stores[store].refused = refused

    def _count_gone(self, store: ReferenceStore, at: tuple[int, int, int],
                    utility: np.float32) -> None:
        """The utility of a chunk that went is counted in the sketch."""
        cells = self._cells(store, self._hash(*at[:2]), at[2])
        if cells:
            _raise(store, cells, cell_code(utility, 0))

    @staticmethod
    def _leave(store: ReferenceStore, key: int, chunk: int) -> None:
        """A chunk goes: its place is free."""
        chunks = store.rows[key][2]
        store.stack.append(chunks.places[chunk])
        chunks.places[chunk], chunks.utilities[chunk] = -1, 0
        store.used -= 1

    @staticmethod
    def _cells(store: ReferenceStore, hashed: int, chunk: int) -> list[int]:
        """The chunk's two cells of the sketch; none where there is no sketch."""
        lines = store.shape.layout.sketch_lines
        if not lines:
            return []
        turned = (hashed << 32 | hashed >> 32) & _WORD
        line = (turned * lines) >> 64
        word = mix64(hashed + (chunk + 1) * GOLDEN)
        first = word % LINE_BYTES
        second = (first + 1 + word // LINE_BYTES % (LINE_BYTES - 1)) % LINE_BYTES
        return [line * LINE_BYTES + first, line * LINE_BYTES + second]

    def _ranked(self, block: int, row: int, chunk: int, utility: np.float32) -> np.float32:
        word = self._word(block, 0, row, chunk)
        drawn = np.float32(word >> 40) * np.float32(2.0 ** -24)  # in [0, 1)
        return max(utility, drawn * np.float32(LEAST_UTILITY))

    def count(self, store: int, decay: float,
              part: tuple[int, int] = ALL_ROWS) -> tuple[Tensor, Tensor]:
        bins = torch.zeros(len(self._blocks), BINS, dtype=torch.int64)
        dims = torch.zeros(len(self._blocks), self._most + 1, dtype=torch.int64)
        for _, block, row, chunks in self._stores[store].in_order(part):
            present = 0
            for k, place in enumerate(chunks.places):
                if place >= 0:
                    utility = utility_value(chunks.utilities[k]) * np.float32(decay)
                    bins[block, cell_code(self._ranked(block, row, k, utility), 0)] += 1
                    present += 1
            dims[block, present] += 1
        return bins, dims

    def decide(self, store: int, decay: float, thresholds: Tensor, key: int) -> Tensor:
        one, factor = self._stores[store], np.float32(decay)
        evicted = torch.zeros(len(self._blocks), dtype=torch.int64)
        for c in one.cells.nonzero().flatten().tolist():
            word = mix64((key & _WORD) + c * GOLDEN)
            one.cells[c] = cell_code(cell_value(int(one.cells[c])) * factor,
                                     (word >> 16) & ((1 << CELL_SHIFT) - 1))
        before, one.refused = len(one.rows), 0
        for slot_key, block, row, chunks in list(one.in_order()):
            was = list(chunks.places), list(chunks.utilities)
            for k, place in enumerate(chunks.places):
                if place < 0:
                    continue
                utility = utility_value(chunks.utilities[k]) * factor
                if self._ranked(block, row, k, utility) >= np.float32(float(thresholds[block])):
                    chunks.utilities[k] = chunks.utilities[k] & MARK | utility_code(
                        utility, self._word(block, key, row, k))
                    continue
                self._count_gone(one, (block, row, k), utility)
                self._leave(one, slot_key, k)
                evicted[block] += 1
            self._note(block, row, chunks, was)
            if max(chunks.places) < 0:
                del one.rows[slot_key]
        if len(one.rows) < before and len(one.rows) * 2 < one.slots:
            one.slots = one.fit()
        return evicted

    def compact(self, store: int, *, tight: bool) -> Tensor:
        one, moves = self._stores[store], []
        taken = one.shape.layout.shared + one.used
        holes = sorted(place for place in one.stack if place < taken)
        for _, _, _, chunks in one.in_order():
            for k, place in enumerate(chunks.places):
                if place >= taken:
                    chunks.places[k] = holes[len(moves)]
                    moves.append((place, holes[len(moves)]))
        before, slots = one.committed, one.slots
        self._settle(one)
        if not tight:
            one.slots = min(one.slots, slots)
        while not tight and one.committed < before:
            more = min(one.committed + one.shape.slab, before)
            if one.grown(one.slots, more) > one.budget:
                break
            one.committed = more
        return torch.tensor(moves, dtype=torch.int64).view(-1, 2)

    def _settle(self, one: ReferenceStore) -> None:
        one.stack, one.top, one.slots = [], one.shape.layout.shared + one.used, one.fit()
        one.committed = one.shape.in_slabs(one.top)

    def load(self, store: int, blocks: Tensor, rows: ChunkRows) -> None:
        one = self._stores[store]
        one.rows = {self._key(block, row): (block, row, ReferenceRow(places, [
            code & 0xFFFF for code in utilities])) for block, row, places, utilities in zip(
                blocks.tolist(), rows.rows.tolist(), rows.places.tolist(),
                rows.utilities.tolist(), strict=True)}
        one.used, one.refused = int((rows.places >= 0).sum()), 0
        self._settle(one)

    def insert(self, block: int, rows: ChunkRows) -> Tensor:
        store, out = self._store_of(block), rows.places.clone()
        for i, (row, wanted, codes) in enumerate(zip(
                rows.rows.tolist(), rows.places.tolist(), rows.utilities.tolist(), strict=True)):
            key = self._key(block, row)
            for k in range(len(wanted)):
                if wanted[k] < 0:
                    continue
                known = key in store.rows
                if not store.has_place() or not (known or store.has_slot()):
                    out[i, k] = -1
                    continue
                chunks = store.rows.setdefault(key, (block, row, ReferenceRow(
                    [-1] * len(wanted), [0] * len(wanted))))[2]
                chunks.places[k] = place = store.take_place()
                chunks.utilities[k] = codes[k] & 0xFFFF
                out[i, k] = place
        return out

    def list_rows(self, block: int) -> ChunkRows:
        store = self._store_of(block)
        found = sorted((row, chunks.places, chunks.utilities)
                       for owner, row, chunks in store.rows.values() if owner == block)
        chunks = store.shape.layout.chunks
        codes = torch.tensor([utilities for _, _, utilities in found],
                             dtype=torch.int32).view(-1, chunks) & (MARK - 1)
        return ChunkRows(
            torch.tensor([row for row, _, _ in found], dtype=torch.int64),
            torch.tensor([places for _, places, _ in found], dtype=torch.int32).view(-1, chunks),
            codes.to(torch.int16))

    def look_up(self, block: int, rows: Tensor) -> ChunkRows:
        store = self._store_of(block)
        none = ReferenceRow([-1] * store.shape.layout.chunks, [0] * store.shape.layout.chunks)
        found = [store.rows.get(self._key(block, row), (block, row, none))[2]
                 for row in rows.tolist()]
        shape = (rows.numel(), store.shape.layout.chunks)
        codes = torch.tensor([one.utilities for one in found], dtype=torch.int32).view(shape)
        return ChunkRows(rows, torch.tensor([one.places for one in found],
                                            dtype=torch.int32).view(shape), _int16(codes))

    def list_between(self, store: int, where: RowRange) -> Tensor:
        part = where.slice, where.slices
        found = [(block, row) for _, block, row, chunks in self._stores[store].in_order(part)
                 if where.low <= row < where.high and where.block in (-1, block)
                 and (where.marks == Marks.ANY
                      or chunks.is_marked() == (where.marks == Marks.SET))]
        return torch.tensor(found, dtype=torch.int64).view(-1, 2)

    def count_between(self, store: int, where: RowRange) -> int:
        return len(self.list_between(store, where))

    def clear_marks(self, store: int) -> None:
        for _, _, chunks in self._stores[store].rows.values():
            chunks.mark(marked=False)
        self._stores[store].lines = set()

    def changed_lines(self, store: int) -> Tensor:
        one = self._stores[store]
        return torch.arange(one.shape.layout.sketch_lines) if one.lines is None else \
            torch.tensor(sorted(one.lines), dtype=torch.int64)

    def sketch(self, store: int) -> Tensor:
        return self._stores[store].cells


def _raise(store: ReferenceStore, at: list[int], code: int) -> None:
    store.cells[at] = store.cells[at].clamp(min=code)
    if store.lines is not None:
        store.lines.add(at[0] // LINE_BYTES)


def _int16(codes: Tensor) -> Tensor:
    return torch.where(codes >= MARK, codes - (1 << 16), codes).to(torch.int16)
