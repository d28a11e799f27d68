"""The index of cache levels: which row of a shard is in which slot, and which row leaves.

A level holds some rows of a shard in ``sets`` sets of ``ways`` slots. `cache_place` finds slots for
a batch of rows and says what must be moved for it; moving bytes is the caller's part, as is the
level below. ``docs/cache.md`` tells the policies and how well they hit.

The index lies in host memory, 3 bytes a slot (5 where a set has 65535 rows or more to tell apart).

Source: own; write-back sets above a table of low precision as in arXiv 2010.11305, admission by
chance against the weakest row after "Randomized Admission Policy" (arXiv 1612.02962).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shardlab.cache_layout import CACHE_LINE, CacheLayout
from shardlab.ops.cache_index import ADMISSION_CODE, POLICY_CODE, CacheBlock, CacheIndex
from shardlab.ops.cache_reference import (
    clear_blocks,
    lookup_reference,
    place_reference,
    wrong_input,
)
from shardlab.ops.registry import address, check_tensor, face_of, native
from shardlab.ops.unique import OutOfBoundsError

#: Columns of `Placement.counters`.
COUNTERS = ("hits", "misses", "conflicts", "evictions", "refused", "staged")


@dataclass(frozen=True)
class Placement:
    """Where rows are, and what must be moved before they may be used.

    First write the evicted rows (the dirty ones) to the next level, then fill. Staging row j of a
    block is place ``slots`` + j: it holds a row for this batch only, so a caller that changes it
    must write it to the next level itself. Both lists go block by block, in the order of the ids;
    a block has ``counters[block, 1]`` fills and ``counters[block, 3]`` evictions.

    Attributes:
        places: int64 [n]; of every id; undefined where no segment covers it.
        fills: int64 [f, 3]: (block, row, place) of the rows to bring up, staging rows included.
        evictions: int64 [e, 4]: (block, slot, row, dirty) of the rows that left.
        counters: int64 [S, 6] on CPU; columns as in `COUNTERS`. misses: rows to bring up; hits: all
            other ids; conflicts: misses that evicted a row or found no slot although slots of
            other sets are free; refused: rows that admission kept out; staged: all rows without a
            slot, refused ones included.
    """

    places: Tensor
    fills: Tensor
    evictions: Tensor
    counters: Tensor


def build_cache_index(blocks: Sequence[CacheBlock], meta: Tensor | None = None) -> CacheIndex:
    """An index of empty caches.

    Args:
        blocks: the levels.
        meta: uint8 [sum of the layouts' metadata_bytes] on CPU to hold it, best in huge pages and
            at a multiple of 64 bytes; None allocates.

    Raises:
        ValueError: ``meta`` has another size or lies elsewhere.
    """
    offsets = _offsets([block.layout for block in blocks])
    total = sum(block.layout.metadata_bytes for block in blocks)
    if meta is None:
        meta = torch.empty(total, dtype=torch.uint8)
    check_tensor("meta", meta, torch.uint8)
    if meta.shape != (total,) or meta.device.type != "cpu":
        raise ValueError(f"meta: expected [{total}] on cpu for {len(blocks)} caches, found "
                         f"{tuple(meta.shape)} on {meta.device}")
    table = torch.tensor(
        [[offset, block.rows, block.layout.sets, block.layout.ways, block.layout.tag_bytes,
          block.layout.record_bytes, POLICY_CODE[block.policy], ADMISSION_CODE[block.admission],
          block.seed]
         for offset, block in zip(offsets, blocks, strict=True)], dtype=torch.int64).view(-1, 9)
    index = CacheIndex(tuple(blocks), meta, table, torch.zeros(len(blocks), dtype=torch.int64))
    meta.zero_()  # padding too: an index that is saved has no chance bytes
    clear_blocks(meta, table, range(len(blocks)))
    return index


def _offsets(layouts: list[CacheLayout]) -> list[int]:
    """Where each index starts: those of whole cache lines first, so that none straddles two."""
    offsets = [0] * len(layouts)
    end = 0
    for i in sorted(range(len(layouts)), key=lambda i: layouts[i].record_bytes % CACHE_LINE > 0):
        offsets[i] = end
        end += layouts[i].metadata_bytes
    return offsets


def cache_place(index: CacheIndex, segments: Tensor, ids: Tensor, step: int, *,
                touch: bool = True, write: bool = False) -> Placement:
    """Gives every row a slot or, where it gets none, a staging row.

    Rows that are there are found first, and no row of the call loses its slot to another: a batch
    larger than the cache fills it and stages the rest. The result depends on the arguments and the
    index alone, not on the number of threads.

    Args:
        index: changed in place.
        segments: int64 [K, 3] on CPU, ascending by block, each block once at most: (block, start,
            count); ids[start:start + count] are rows of the block.
        ids: int64 [n] on CPU; a row that occurs several times is placed at its first occurrence.
        step: number of the step; addresses the chances.
        touch: whether this counts as a use, for the policy.
        write: whether the rows will be changed; marks their slots dirty.

    Raises:
        OutOfBoundsError: an id is outside its block; nothing was changed.
    """
    inputs = _check(index, segments, ids)
    if inputs is None:
        return Placement(*place_reference(index, segments, ids, step, (touch, write)))
    n = ids.numel()
    places = torch.empty(n, dtype=torch.int64)
    fills = torch.empty((n, 3), dtype=torch.int64)
    evictions = torch.empty((n, 4), dtype=torch.int64)
    counters = torch.zeros((len(index.blocks), len(COUNTERS)), dtype=torch.int64)
    outputs = [address(t) for t in (places, fills, evictions, counters, index.occupied)]
    filled, evicted = native().cache_place(  # type: ignore[union-attr]
        inputs, step, touch, write, outputs, torch.get_num_threads())
    return Placement(places, fills[:filled], evictions[:evicted], counters)


def cache_lookup(index: CacheIndex, segments: Tensor, ids: Tensor) -> Tensor:
    """Slots of rows, -1 where a row has none; changes nothing. Arguments as `cache_place`.

    Returns:
        int64 [n]; undefined where no segment covers an id.

    Raises:
        OutOfBoundsError: an id is outside its block.
    """
    inputs = _check(index, segments, ids)
    if inputs is None:
        return lookup_reference(index.meta, index.table, segments, ids)
    places = torch.empty(ids.numel(), dtype=torch.int64)
    native().cache_lookup(  # type: ignore[union-attr]
        inputs, address(places), torch.get_num_threads())
    return places


def _check(index: CacheIndex, segments: Tensor, ids: Tensor
           ) -> tuple[int, int, int, int, int] | None:
    """What the native face takes, or None where the reference answers."""
    check_tensor("segments", segments, torch.int64)
    check_tensor("ids", ids, torch.int64)
    if ids.device.type != "cpu":
        raise ValueError(f"ids: the index of a cache lies on cpu, found ids on {ids.device}; "
                         "copy them first")
    count, n = segments.shape[0], ids.numel()
    inputs = None
    if face_of("cache_place", "cpu") == "native":
        inputs = (address(index.meta), address(index.table), address(segments), count,
                  address(ids))
        wrong = native().cache_check(inputs, len(index.blocks), n)  # type: ignore[union-attr]
    else:
        wrong = wrong_input(index.table, segments, ids)
    if wrong >= 0:
        raise OutOfBoundsError(wrong)
    if wrong < -1:
        number = -wrong - 2
        raise ValueError(
            f"segments: segment {number} is {segments[number].tolist()}, but segments ascend by "
            f"block, of which there are {len(index.blocks)}, and lie within the {n} ids")
    return inputs
