"""Index of chunks: which chunks of which rows are present, where they lie, what they are worth.

A store holds the rows of several shards whose chunks have one size; `csrc/chunk_store.h` has the
data structure. The reference face (`chunks_reference`) keeps dictionaries and gives the same
decisions, utilities and byte counts. The index lies on the host, also where chunks do not.

Source: arXiv 2401.04408 (utility = accesses x norm of the gradient, decayed).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from shardlab.chunk_layout import (
    FEW_SLOTS,
    LINE_BYTES,
    PLACE_BYTES,
    in_pages,
    span_of,
    value_bytes,
)
from shardlab.codecs import mixed
from shardlab.ops.chunk_index import (
    ALL_ROWS,
    ChunkIndex,
    ChunkRows,
    Offers,
    StoreNumbers,
    StoreShape,
)
from shardlab.ops.chunk_marks import MARK, Losses, LossLog, RowRange
from shardlab.ops.chunk_numbers import BINS, SPARE, TAG_SHIFT, max_slots, mixed32
from shardlab.ops.registry import address, face_of, native


def build_chunk_index(shapes: Sequence[StoreShape], blocks: Tensor, memory: Tensor,
                      pools: Sequence[tuple[int, int]]) -> ChunkIndex:
    """An empty index.

    Args:
        shapes: of the stores.
        blocks: as in `ChunkIndex`.
        memory: uint8 [`index_span_bytes`] on CPU, zeros; pages that are not needed stay untouched.
        pools: addresses of every store's payloads and states; zeros where the caller clears and
            moves chunks itself.
    """
    if face_of("chunk_index", "cpu") == "native":
        return NativeChunkIndex(shapes, blocks, memory, pools)
    from shardlab.ops.chunks_reference import ReferenceChunkIndex

    return ReferenceChunkIndex(shapes, blocks)


#: Fields of `ChunkStore` in csrc/chunk_store.h, in its order, 8 B each.
_STATE = ("keys", "values", "payload", "state", "stack", "sketch", "chunks", "payload_bytes",
          "state_bytes", "slab", "max_chunks", "max_slots", "sketch_lines", "wide", "shared",
          "key_bytes", "key_stride", "value_stride", "load", "line_marks", "budget", "slots",
          "rows", "used", "top", "committed", "free", "refused")
_COLUMN = {name: column for column, name in enumerate(_STATE)}


class NativeChunkIndex:
    """The native face of `ChunkIndex`: arrays in one span of memory, in pages as they are needed.

    `ChunkIndex` says what methods do.

    Args:
        shapes, blocks, memory, pools: as `build_chunk_index` takes them.
    """

    def __init__(self, shapes: Sequence[StoreShape], blocks: Tensor, memory: Tensor,
                 pools: Sequence[tuple[int, int]]) -> None:
        self.shapes, self.blocks = list(shapes), blocks.contiguous()
        self._most = max((shape.layout.chunks for shape in shapes), default=1)
        self._state = torch.zeros(len(shapes), len(_STATE), dtype=torch.int64)
        sizes = [_spans(shape) for shape in shapes]
        self._memory = memory
        at = self._memory.data_ptr() if sizes else 0
        self._sketches: list[Tensor] = []
        self._line_marks: dict[int, Tensor] = {}
        offset = 0
        for row, shape, size, pool in zip(self._state, shapes, sizes, pools, strict=True):
            keys, values, stack, sketch = size
            layout = shape.layout
            cells = self._memory[offset + keys + values + stack:][:layout.sketch_lines * LINE_BYTES]
            self._sketches.append(cells)
            beside = keys if values else layout.key_bytes
            row[:_COLUMN["budget"]] = torch.tensor([
                at + offset, at + offset + beside, *pool, at + offset + keys + values,
                at + offset + keys + values + stack, layout.chunks, layout.payload_bytes,
                layout.state_bytes, shape.slab, shape.max_chunks, max_slots(shape),
                layout.sketch_lines, int(shape.wide), layout.shared, layout.key_bytes,
                *layout.strides, layout.load, 0])
            row[_COLUMN["slots"]] = FEW_SLOTS
            row[_COLUMN["top"]] = layout.shared
            row[_COLUMN["committed"]] = shape.in_slabs(layout.shared)
            offset += keys + values + stack + sketch
        self._admitted, self.changes = torch.empty(0, 3, dtype=torch.int64), 0
        self._call = (address(self._state), address(self.blocks), self.blocks.shape[0])
        self.notes_losses = False
        self._log = LossLog([self._chunks(block) for block in range(self.blocks.shape[0])])

    def call(self) -> tuple[int, int, int]:
        """What native kernels take."""
        return self._call

    def numbers(self, store: int) -> StoreNumbers:
        return StoreNumbers(*self._state[store, _COLUMN["budget"]:].tolist())

    def set_budget(self, store: int, budget: int) -> None:
        self._state[store, _COLUMN["budget"]] = budget

    def held_bytes(self, store: int) -> int:
        return int(native().chunk_held_bytes(address(self._state[store])))  # type: ignore[union-attr]

    def places(self, segments: Tensor, ids: Tensor) -> Tensor:
        out = torch.full((self._most, ids.numel()), -1, dtype=torch.int64)
        native().chunk_places(self._call, address(segments),  # type: ignore[union-attr]
                              segments.shape[0], address(ids), ids.numel(), address(out),
                              torch.get_num_threads())
        return out

    def touch(self, offers: Offers) -> None:
        native().chunk_touch(self._call, _offer_tuple(offers),  # type: ignore[union-attr]
                             torch.get_num_threads())

    def offer(self, offers: Offers) -> Tensor:
        self.changes += 1
        if self._admitted.shape[0] < offers.norms.numel():
            self._admitted = torch.empty(offers.norms.numel(), 3, dtype=torch.int64)
        log = self._log.room(offers.norms.numel() if self.notes_losses else 0)
        count = native().chunk_offer(self._call, _offer_tuple(offers),  # type: ignore[union-attr]
                                     address(self._admitted), log)
        self._log.keep()
        return self._admitted[:count].clone()

    def take_losses(self) -> Losses:
        return self._log.take()

    def count(self, store: int, decay: float,
              part: tuple[int, int] = ALL_ROWS) -> tuple[Tensor, Tensor]:
        bins = torch.zeros(self.blocks.shape[0], BINS, dtype=torch.int64)
        dims = torch.zeros(self.blocks.shape[0], self._most + 1, dtype=torch.int64)
        native().chunk_count(self._call, store, part, decay, address(bins),  # type: ignore[union-attr]
                             address(dims), dims.shape[1])
        return bins, dims

    def decide(self, store: int, decay: float, thresholds: Tensor, key: int) -> Tensor:
        self.changes += 1
        evicted = torch.zeros(self.blocks.shape[0], dtype=torch.int64)
        log = self._log.room(self.numbers(store).rows + 1 if self.notes_losses else 0)
        native().chunk_decide(self._call, store, decay,  # type: ignore[union-attr]
                              address(thresholds), key, address(evicted), log)
        self._log.keep()
        self.set_refused(store, 0)
        return evicted

    def set_refused(self, store: int, refused: int) -> None:
        self._state[store, _COLUMN["refused"]] = refused

    def compact(self, store: int, *, tight: bool) -> Tensor:
        self.changes += 1
        moves = torch.empty(self.numbers(store).free, 2, dtype=torch.int64)
        count = native().chunk_compact(  # type: ignore[union-attr]
            address(self._state[store]), tight, address(moves))
        return moves[:count]

    def load(self, store: int, blocks: Tensor, rows: ChunkRows) -> None:
        self.changes += 1
        shape = self.shapes[store]
        order, keys = self._sorted_keys(store, blocks, rows.rows)
        values = torch.cat([rows.places[order].contiguous().view(torch.uint8),
                            rows.utilities[order].contiguous().view(torch.uint8)], dim=1)
        native().chunk_load(address(self._state[store]), address(keys),  # type: ignore[union-attr]
                            address(values), keys.numel())
        used = int((rows.places >= 0).sum())
        top = int(rows.places.max()) + 1 if used else shape.layout.shared
        assert used + shape.layout.shared == top, "places of loaded rows leave no gap"
        self._state[store, _COLUMN["used"]:] = torch.tensor(
            [used, top, shape.in_slabs(top), 0, 0])

    def _sorted_keys(self, store: int, blocks: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Order of rows by their key, and keys in that order: int64 with the bits of uint64."""
        shape = self.shapes[store]
        if shape.layout.is_narrow:
            keys = mixed32(self.blocks[blocks, 6] + rows + 1)
        else:
            keys = mixed((rows if shape.wide else (blocks << TAG_SHIFT) | rows) + 1)
        order = torch.argsort(keys ^ torch.iinfo(torch.int64).min)
        return order, keys[order].contiguous()

    def insert(self, block: int, rows: ChunkRows) -> Tensor:
        self.changes += 1
        ids, places = rows.rows.contiguous(), rows.places.clone()
        utilities = rows.utilities.contiguous()
        native().chunk_insert(self._call, block, address(ids),  # type: ignore[union-attr]
                              ids.numel(), address(places), address(utilities))
        return places

    def list_rows(self, block: int) -> ChunkRows:
        chunks = self._chunks(block)
        count = native().chunk_list(self._call, block, 0, 0)  # type: ignore[union-attr]
        rows = torch.empty(count, dtype=torch.int64)
        values = torch.empty(count, value_bytes(chunks), dtype=torch.uint8)
        native().chunk_list(self._call, block, address(rows),  # type: ignore[union-attr]
                            address(values))
        rows, order = rows.sort()
        values = values[order]
        places, codes = values[:, :PLACE_BYTES * chunks], values[:, PLACE_BYTES * chunks:]
        return ChunkRows(rows, places.flatten().view(torch.int32).view(-1, chunks),
                         _unmarked(codes.flatten().view(torch.int16).view(-1, chunks)))

    def look_up(self, block: int, rows: Tensor) -> ChunkRows:
        rows, chunks = rows.contiguous(), self._chunks(block)
        places = torch.empty(rows.numel(), chunks, dtype=torch.int32)
        utilities = torch.empty(rows.numel(), chunks, dtype=torch.int16)
        native().chunk_get(self._call, block, address(rows),  # type: ignore[union-attr]
                           rows.numel(), address(places), address(utilities))
        return ChunkRows(rows, places, utilities)

    def list_between(self, store: int, where: RowRange) -> Tensor:
        # As long as the rows are: what is not written takes no memory.
        found = torch.empty(self.numbers(store).rows, 2, dtype=torch.int64)
        return found[:self._between(store, where, address(found))].clone()

    def count_between(self, store: int, where: RowRange) -> int:
        return self._between(store, where, 0)

    def _between(self, store: int, where: RowRange, found: int) -> int:
        return int(native().chunk_between(  # type: ignore[union-attr]
            self._call, store, [where.block, where.low, where.high, where.slice, where.slices,
                                int(where.marks)], found))

    def clear_marks(self, store: int) -> None:
        lines = self.shapes[store].layout.sketch_lines
        if lines and store not in self._line_marks:
            self._line_marks[store] = torch.zeros(lines, dtype=torch.bool)
            self._state[store, _COLUMN["line_marks"]] = address(self._line_marks[store])
        native().chunk_unmark(address(self._state[store]))  # type: ignore[union-attr]

    def changed_lines(self, store: int) -> Tensor:
        return self._line_marks[store].nonzero()[:, 0] if store in self._line_marks else \
            torch.arange(self.shapes[store].layout.sketch_lines)

    def _chunks(self, block: int) -> int:
        return self.shapes[int(self.blocks[block, 0])].layout.chunks

    def sketch(self, store: int) -> Tensor:
        return self._sketches[store]


def _unmarked(utilities: Tensor) -> Tensor:
    return utilities & (MARK - 1)


def _offer_tuple(offers: Offers) -> tuple[object, ...]:
    return (address(offers.segments), offers.segments.shape[0], address(offers.ids),
            address(offers.norms), offers.norms.shape[1], address(offers.weights),
            address(offers.thresholds), offers.key, address(offers.margins),
            address(offers.evicted))


def index_span_bytes(shapes: Sequence[StoreShape]) -> int:
    """Bytes of addresses that the native index needs; few of them are ever touched."""
    return sum(sum(_spans(shape)) for shape in shapes)


def index_used_spans(shapes: Sequence[StoreShape],
                     chunks: Sequence[int]) -> list[tuple[int, int]]:
    """Ranges [start, end) of the native index's memory that stores of some chunks touch throughout.

    Args:
        shapes: of the stores.
        chunks: that each of them will hold, or more.
    """
    found, offset = [], 0
    for shape, count in zip(shapes, chunks, strict=True):
        keys, values, stack, sketch = _spans(shape)
        slots = shape.layout.fitting_slots(count // shape.layout.chunks)
        key_stride, value_stride = shape.layout.strides
        found += [(offset, offset + key_stride * slots),
                  (offset + keys, offset + keys + (value_stride * slots if values else 0)),
                  (offset + keys + values + stack, offset + keys + values + stack + sketch)]
        offset += keys + values + stack + sketch
    return found


def _spans(shape: StoreShape) -> tuple[int, int, int, int]:
    """Bytes of addresses for keys, values, stack and sketch."""
    return (*shape.layout.index_bytes(span_of(SPARE * max_slots(shape))),
            in_pages(PLACE_BYTES * shape.max_chunks),
            in_pages(shape.layout.sketch_lines * LINE_BYTES))
