"""Unique ids of many segments at once, and who contributed to each. Source: own."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shardlab.ops.registry import address, check_tensor, face_of, native
from shardlab.specs import BoundsMode

BOUNDS_CODE = {BoundsMode.ERROR: 0, BoundsMode.CLAMP_TO_ZERO: 1, BoundsMode.IGNORE: 2}


class OutOfBoundsError(Exception):
    """An id lies outside its segment; the caller knows the names and raises a BoundsError.

    Args:
        position: index of the first such id in the ids that were passed.
    """

    def __init__(self, position: int) -> None:
        self.position = position
        super().__init__(f"id at position {position} is out of bounds")


@dataclass(frozen=True)
class Segments:
    """What the segments of a `unique_segments` call are; fixed over the steps of a run.

    Attributes:
        limits: int64 [S] on CPU; valid ids of segment s are [0, limits[s]).
        bounds: int64 [S] on CPU; a code of `BOUNDS_CODE`.
    """

    limits: Tensor
    bounds: Tensor

    def __len__(self) -> int:
        return self.limits.numel()


@dataclass(frozen=True)
class Uniques:
    """Sorted unique ids per segment, with the entries of each in entry order (CSR).

    Attributes:
        ids: int64 [m]; segment s is ids[splits[s]:splits[s + 1]], ascending.
        splits: int64 [S + 1] on CPU.
        starts: int64 [m + 1]; entries of unique u are [starts[u], starts[u + 1]).
        sources: int64 [k]; element offset of every entry's gradient.
        positions: int64 [k]; every entry's position in the input ids, or None.
        inverse: int64 [n]; unique of every input position, -1 where dropped; or None.
    """

    ids: Tensor
    splits: Tensor
    starts: Tensor
    sources: Tensor
    positions: Tensor | None = None
    inverse: Tensor | None = None


def unique_segments(ids: Tensor, chunks: Tensor, segments: Segments, bags: Tensor | None = None, *,
                    positions: bool = False, inverse: bool = False,
                    num_ids: int | None = None) -> Uniques:
    """Finds the unique ids of every segment.

    Args:
        ids: int32 or int64 [n].
        chunks: int64 [C, 5] on CPU, sorted by segment: (segment, start, count, base, step). Entry i
            of a chunk is ids[start + i]; its source offset is base + bag * step, where bag is
            bags[start + i], or i without bags. A segment's entries are ordered chunk by chunk.
        segments: limits and bounds modes.
        bags: int64 [n], or None.
        positions: also return every entry's position.
        inverse: also return every position's unique.
        num_ids: ids of all chunks together, where the caller knows.

    Raises:
        OutOfBoundsError: an id outside its segment where the mode is ``error``.
    """
    if ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"ids: expected int32 or int64, found {ids.dtype}")
    if face_of("unique_segments", ids.device.type) == "native":
        if num_ids is None:
            num_ids = int(chunks[:, 2].sum())
        return _native(ids, chunks, segments, bags,
                       (num_ids, num_ids if positions else None,
                        ids.numel() if inverse else None))
    return unique_segments_reference(ids, chunks, segments, bags, positions=positions,
                                     inverse=inverse)


def _native(ids: Tensor, chunks: Tensor, segments: Segments, bags: Tensor | None,
            sizes: tuple[int, int | None, int | None]) -> Uniques:
    """The native face; ``sizes``: ids, and positions and inverse where they are wanted."""
    check_tensor("ids", ids, ids.dtype)
    check_tensor("chunks", chunks, torch.int64)
    if bags is not None:
        check_tensor("bags", bags, torch.int64)
    n, positions, inverse = sizes
    unique, splits = _int64(n), _int64(len(segments) + 1)
    starts, sources = _int64(n + 1), _int64(n)
    where = None if positions is None else _int64(positions)
    back = None if inverse is None else _int64(inverse)
    if back is not None and n < back.numel():
        back.fill_(-1)  # the kernel writes the positions of the chunks only
    outputs = [address(t) for t in (unique, splits, starts, sources, where, back)]
    count, kept = native().unique_segments(  # type: ignore[union-attr]
        address(ids), ids.element_size(), address(chunks), chunks.shape[0], len(segments),
        address(segments.limits), address(segments.bounds), address(bags), outputs,
        torch.get_num_threads())
    if count < 0:
        raise OutOfBoundsError(-count - 1)
    return Uniques(unique[:count], splits, starts[:count + 1], sources[:kept],
                   None if where is None else where[:kept], back)


def _int64(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.int64)


def unique_segments_reference(ids: Tensor, chunks: Tensor, segments: Segments,
                              bags: Tensor | None = None, *, positions: bool = False,
                              inverse: bool = False) -> Uniques:
    """Plain-torch face of `unique_segments`: one stable sort of (segment, id) over all entries."""
    device = ids.device
    counts = chunks[:, 2]
    chunk = torch.repeat_interleave(torch.arange(chunks.shape[0]), counts)
    within = torch.arange(chunk.numel()) - (counts.cumsum(0) - counts)[chunk]
    segment, where = chunks[chunk, 0].to(device), (chunks[chunk, 1] + within).to(device)
    bag = within.to(device) if bags is None else bags[where]
    source = chunks[chunk, 3].to(device) + bag * chunks[chunk, 4].to(device)
    value = ids[where].long()
    limit, mode = segments.limits.to(device)[segment], segments.bounds.to(device)[segment]
    bad = (value < 0) | (value >= limit)
    failed = bad & (mode == BOUNDS_CODE[BoundsMode.ERROR])
    if bool(failed.any()):
        raise OutOfBoundsError(int(where[failed].min()))
    value = torch.where(bad, 0, value)
    kept = (~(bad & (mode == BOUNDS_CODE[BoundsMode.IGNORE]))).nonzero().squeeze(1)
    by_value = torch.argsort(value[kept], stable=True)
    by_both = by_value[torch.argsort(segment[kept][by_value], stable=True)]
    order = kept[by_both]
    pairs = torch.stack([segment[order], value[order]])
    unique, group, group_counts = torch.unique_consecutive(
        pairs, dim=1, return_inverse=True, return_counts=True)
    starts = torch.zeros(unique.shape[1] + 1, dtype=torch.int64, device=device)
    torch.cumsum(group_counts, 0, out=starts[1:])
    splits = torch.searchsorted(unique[0].contiguous(),
                                torch.arange(len(segments) + 1, device=device))
    back = None
    if inverse:
        back = torch.full((ids.numel(),), -1, dtype=torch.int64, device=device)
        back[where[order]] = group
    return Uniques(unique[1].contiguous(), splits.cpu(), starts, source[order],
                   where[order] if positions else None, back)


def split_sorted(ids: Tensor, splits: Tensor, queries: Tensor) -> Tensor:
    """Where rows would be inserted among the sorted unique ids of their segments.

    Args:
        ids: int64 [m], sorted within every segment.
        splits: int64 [S + 1] on CPU.
        queries: int64 [Q, 2] on CPU: (segment, row).

    Returns:
        int64 [Q] on CPU: index into ids of the segment's first id that is >= row.
    """
    index = torch.empty(queries.shape[0], dtype=torch.int64)
    if face_of("split_sorted", ids.device.type) == "native":
        native().split_sorted(address(ids), address(splits),  # type: ignore[union-attr]
                              address(queries), queries.shape[0], address(index))
        return index
    edges = splits.tolist()
    for query, (segment, row) in enumerate(queries.tolist()):
        part = ids[edges[segment]:edges[segment + 1]]
        row_tensor = torch.tensor(row, dtype=torch.int64, device=ids.device)
        index[query] = edges[segment] + int(torch.searchsorted(part, row_tensor))
    return index


def pack_ids(ids: Tensor, pieces: Tensor, dtype: torch.dtype) -> Tensor:
    """Copies pieces of ids one behind the other, as rows of their shards.

    Args:
        ids: int64 [m].
        pieces: int64 [K, 4] on CPU: (start, count, subtract, out start); they tile the output.
        dtype: int32 or int64.

    Returns:
        dtype [sum of counts].
    """
    total = int(pieces[:, 1].sum())
    if face_of("pack_ids", ids.device.type) == "native":
        out = torch.empty(total, dtype=dtype)
        native().pack_ids(address(ids), address(pieces),  # type: ignore[union-attr]
                          pieces.shape[0], address(out), out.element_size())
        return out
    out = torch.empty(total, dtype=dtype, device=ids.device)
    for start, count, subtract, target in pieces.tolist():
        out[target:target + count] = (ids[start:start + count] - subtract).to(dtype)
    return out


def fill_affine(pieces: Tensor, total: int, device: torch.device) -> Tensor:
    """out[start + i] = base + i * step for every piece (start, count, base, step).

    Args:
        pieces: int64 [K, 4] on CPU; elements that no piece covers are left undefined.
        total: length of the output.
        device: where the output lies.

    Returns:
        int64 [total].
    """
    if face_of("fill_affine", device.type) == "native":
        out = torch.empty(total, dtype=torch.int64)
        native().fill_affine(address(pieces), pieces.shape[0],  # type: ignore[union-attr]
                             address(out))
        return out
    out = torch.empty(total, dtype=torch.int64, device=device)
    for start, count, base, step in pieces.tolist():
        out[start:start + count] = base + step * torch.arange(count, device=device)
    return out


def take_affine(pieces: Tensor, total: int, inverse: Tensor) -> Tensor:
    """What `fill_affine` gives, at these places.

    Args:
        pieces: int64 [K, 4] on CPU, as of `fill_affine`.
        total: places there are.
        inverse: int64 [n], in [0, total) where pieces lie, or -1.

    Returns:
        int64 [n]; -1 where ``inverse`` is.
    """
    if face_of("take_affine", inverse.device.type) == "native":
        out = torch.empty_like(inverse)
        native().take_affine(address(pieces), pieces.shape[0], total,  # type: ignore[union-attr]
                             address(inverse), inverse.numel(), address(out))
        return out
    values = fill_affine(pieces, total + 1, inverse.device)
    values[-1] = -1
    return values[inverse]
