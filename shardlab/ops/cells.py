"""Index arithmetic of the exchange on the CPU: where cells lie in a buffer, what ranks ask for.

A step does it several times over all shards of all ranks; as tensor operations it is two hundred
of a few microseconds each. A part is what belongs to one rank; parts stand in slot order, this
rank's own last. Source: own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from shardlab.ops.registry import address, face_of, native
from shardlab.wire_bytes import FP32_BYTES, HEAD_NUMBERS, WORD_BYTES


@dataclass(frozen=True)
class CellEnd:
    """What does not change about the cells of one end of the wire.

    Attributes:
        table: int64 [cells, 3] on CPU: (whether pooled, whether its vectors travel at all, bytes of
            a vector).
        cells_of: cells of every part.
    """

    table: Tensor
    cells_of: list[int]

    def __post_init__(self) -> None:
        assert self.table.shape == (sum(self.cells_of), 3), "a row per cell"


@dataclass(frozen=True)
class Placed:
    """Cells of one end in a buffer.

    Attributes:
        vectors: int64 [cells] on CPU: rows or bags of every cell.
        bytes: int64 [cells] on CPU, whole words.
        at: int64 [cells] on CPU: first byte in the buffer.
        parts: bytes of every part.
    """

    vectors: Tensor
    bytes: Tensor
    at: Tensor
    parts: list[int]


def place_cells(ends: tuple[CellEnd, CellEnd], counts: tuple[Tensor, Tensor],
                samples: tuple[Sequence[int], Sequence[int]], head: int,
                cells_send: bool) -> tuple[Placed, Placed]:
    """Lays out [what travels | what arrives | what stays] for slots and cells.

    Args:
        ends: slots, of the source, and cells, of the owner.
        counts: int64 [slots] and [cells] on CPU: ids of each.
        samples: of every part, which are the vectors of its pooled slots and cells.
        head: bytes in front of every part.
        cells_send: the owner sends; else the source does.

    Returns:
        Both ends. The sender's parts but the last travel, the receiver's arrive, both last ones are
        what stays.
    """
    if face_of("place_cells", "cpu") != "native":
        return place_cells_reference(ends, counts, samples, head, cells_send)
    rooms = [torch.empty(3, end.table.shape[0], dtype=torch.int64) for end in ends]
    counts = (counts[0].contiguous(), counts[1].contiguous())
    given = []
    for end, count, room, size in zip(ends, counts, rooms, samples, strict=True):
        first, row_bytes = room.data_ptr(), room.stride(0) * room.element_size()
        given += [[address(end.table), address(count), first, first + row_bytes,
                   first + 2 * row_bytes], end.cells_of, list(size)]
    parts = native().place_cells(*given, head, cells_send)  # type: ignore[union-attr]
    slots, cells = (Placed(*room.unbind(), part)
                    for room, part in zip(rooms, parts, strict=True))
    return slots, cells


def place_cells_reference(ends: tuple[CellEnd, CellEnd], counts: tuple[Tensor, Tensor],
                          samples: tuple[Sequence[int], Sequence[int]], head: int,
                          cells_send: bool) -> tuple[Placed, Placed]:
    """Plain-torch face of `place_cells`."""
    found = []
    for end, count, size in zip(ends, counts, samples, strict=True):
        pooled, travels, vector_bytes = end.table.unbind(1)
        per_cell = _column(size).repeat_interleave(_column(end.cells_of))
        vectors = torch.where(pooled.bool(), per_cell, count.reshape(-1)) * travels
        sizes = -(-vectors * vector_bytes // WORD_BYTES) * WORD_BYTES
        found.append((vectors, sizes, [head + int(part.sum())
                                       for part in sizes.split(end.cells_of)]))
    gone = [sum(parts[:-1]) for _, _, parts in found]
    placed = []
    for index, (end, (vectors, sizes, parts)) in enumerate(zip(ends, found, strict=True)):
        sends = (index == 1) == cells_send
        first = [0 if sends else gone[1 - index], *parts[:-1]]
        starts = [*[*accumulate(first)][:-1], sum(gone)]
        inside = torch.cat([part.cumsum(0) - part for part in sizes.split(end.cells_of)])
        shift = _column([start + head for start in starts])
        at = inside + shift.repeat_interleave(_column(end.cells_of))
        placed.append(Placed(vectors, sizes, at, parts))
    return placed[0], placed[1]


def route_slots(table: Tensor, starts: Tensor,
                counts: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
    """What every slot asks for.

    Args:
        table: int64 [slots, 4] on CPU: (group, whether this rank asks, first row, bytes of an id).
        starts, counts: int64 [groups] on CPU: ids of every group.

    Returns:
        int64 [slots, 5] on CPU, pieces of `pack_bytes`; int64 [slots] on CPU: ids of every slot,
        and where they start; bytes of all pieces.
    """
    if face_of("route_slots", "cpu") == "native":
        slots, starts, counts = table.shape[0], starts.contiguous(), counts.contiguous()
        pieces = torch.empty(slots, 5, dtype=torch.int64)
        slot_counts, slot_starts = torch.empty(2, slots, dtype=torch.int64).unbind()
        total = native().route_slots(  # type: ignore[union-attr]
            address(table), slots, address(starts), address(counts), address(pieces),
            address(slot_counts), address(slot_starts))
        return pieces, slot_counts, slot_starts, total
    group, asks, first_row, width = table.unbind(1)
    slot_counts, slot_starts = counts[group] * asks, starts[group]
    sizes = slot_counts * width
    pieces = torch.stack([slot_starts, slot_counts, first_row, sizes.cumsum(0) - sizes, width], 1)
    return pieces, slot_counts, slot_starts, int(sizes.sum())


def read_heads(heads: Tensor, table: Tensor) -> tuple[Tensor, Tensor, list[int]]:
    """What the heads of messages announce.

    Args:
        heads: int32 [parts, 4 + slots] on CPU: (samples, bag length, bytes of a bag's length,
            whether weights follow, ids of every slot).
        table: int64 [slots, 2] on CPU: (bytes of an id, whether pooled).

    Returns:
        int64 [parts, slots] on CPU: ids; int64 [parts * slots, 4] on CPU: pieces of `unpack_bytes`
        for messages one behind the other; bytes of every message.
    """
    parts, slots = heads.shape[0], table.shape[0]
    if face_of("read_heads", "cpu") == "native":
        heads = heads.contiguous()
        counts = torch.empty(parts, slots, dtype=torch.int64)
        pieces = torch.empty(parts * slots, 4, dtype=torch.int64)
        sizes: list[int] = native().read_heads(  # type: ignore[union-attr]
            address(heads), parts, slots, address(table), address(counts), address(pieces))
        return counts, pieces, sizes
    counts, (widths, pooled) = heads[:, HEAD_NUMBERS:].long(), table.unbind(1)
    samples, _, length_bytes, weighted = heads[:, :HEAD_NUMBERS].long().unbind(1)
    ids = counts * widths
    lengths = int(pooled.sum()) * samples * length_bytes
    sizes = (ids.sum(1) + lengths + FP32_BYTES * weighted * (counts * pooled).sum(1)).tolist()
    first = _column([0, *accumulate(sizes)][:-1])[:, None]
    flat = counts.view(-1)
    pieces = torch.stack([(first + ids.cumsum(1) - ids).view(-1), flat, widths.repeat(parts),
                          flat.cumsum(0) - flat], 1)
    return counts, pieces, sizes


def select_columns(columns: Sequence[Tensor], index: Tensor) -> Tensor:
    """Rows of a matrix whose columns lie apart.

    Args:
        columns: int64 [n] on CPU each.
        index: int64 [k] on CPU, in [0, n).

    Returns:
        int64 [k, columns] on CPU.
    """
    if face_of("select_columns", "cpu") == "native":
        whole = [column.contiguous() for column in columns]
        out = torch.empty(index.numel(), len(whole), dtype=torch.int64)
        native().select_columns([*map(address, whole)],  # type: ignore[union-attr]
                                address(index), index.numel(), address(out))
        return out
    return torch.stack([column[index] for column in columns], 1)


def sum_parts(counts: Tensor, factors: Tensor, cells_of: list[int]) -> list[int]:
    """Sums of counts * factors over consecutive parts.

    Args:
        counts, factors: int64 [cells] on CPU.
        cells_of: cells of every part.
    """
    if face_of("sum_parts", "cpu") == "native":
        counts = counts.contiguous()
        sums: list[int] = native().sum_parts(  # type: ignore[union-attr]
            address(counts), address(factors), cells_of)
        return sums
    return [int(part.sum()) for part in (counts * factors).split(cells_of)]


def sum_by_key(values: Tensor, keys: Tensor, num_keys: int) -> list[int]:
    """Sums of values by key.

    Args:
        values: int64 [n or more] on CPU.
        keys: int64 [n] on CPU, in [0, num_keys).
        num_keys: how many keys there are.
    """
    if face_of("sum_by_key", "cpu") == "native":
        values = values.contiguous()
        sums: list[int] = native().sum_by_key(  # type: ignore[union-attr]
            address(values), address(keys), keys.numel(), num_keys)
        return sums
    total = torch.zeros(num_keys, dtype=torch.int64)
    found: list[int] = total.index_add_(0, keys, values[:keys.numel()]).tolist()
    return found


def _column(values: Sequence[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)
