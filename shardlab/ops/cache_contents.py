"""What a cache holds: written back, dropped, saved and restored. Plain torch, set by set.

Source: own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from shardlab.errors import CheckpointError
from shardlab.ops.cache import cache_lookup
from shardlab.ops.cache_index import CacheIndex
from shardlab.ops.cache_reference import clear_blocks, locate, records, rows_of, tags_of

#: Sets looked at together, so that a large cache takes little memory beside it.
_CHUNK_SETS = 1 << 16
_DIRTY = 1
#: Beyond every LRU rank.
_LAST = 64


@dataclass(frozen=True)
class CacheContents:
    """The rows of one cache, ascending by slot.

    Attributes:
        slots: int64 [m].
        rows: int64 [m].
        counters: uint8 [m]; LRU rank in the set (0 = used last) or LFU count.
        dirty: bool [m]; whether the next level holds an older value.
    """

    slots: Tensor
    rows: Tensor
    counters: Tensor
    dirty: Tensor


def cache_drop(index: CacheIndex, segments: Tensor | None = None, ids: Tensor | None = None, *,
               keep: bool = False) -> Tensor:
    """Lists rows to write back, and takes them out of their slots or marks them clean.

    Args:
        index: changed in place.
        segments: int64 [K, 3] on CPU: (block, start, count); None for all rows of all blocks.
        ids: int64 [n] on CPU; rows without a slot are passed over.
        keep: leave the rows in their slots, clean; only dirty ones are listed.

    Returns:
        int64 [e, 4]: (block, slot, row, dirty), ascending by block and slot. Write the dirty ones
        to the next level.

    Raises:
        OutOfBoundsError: an id is outside its block.
    """
    if segments is None or ids is None:
        dropped = [_drop_all(index, block, keep) for block in range(len(index.blocks))]
    else:
        slots = cache_lookup(index, segments, ids)
        dropped = [_drop_slots(index, block, slots[start:start + count], keep)
                   for block, start, count in segments.tolist()]
    return torch.cat([torch.empty((0, 4), dtype=torch.int64), *dropped])


def _drop_all(index: CacheIndex, block: int, keep: bool) -> Tensor:
    contents = cache_contents(index, block)
    listed = torch.stack([torch.full_like(contents.slots, block), contents.slots, contents.rows,
                          contents.dirty.long()], 1)
    if not keep:
        clear_blocks(index.meta, index.table, [block])
        index.occupied[block] = 0
        return listed
    layout = index.blocks[block].layout
    records(index.meta, index.table, block)[:, layout.ways * layout.tag_bytes:] &= ~_DIRTY & 255
    return listed[contents.dirty]


def _drop_slots(index: CacheIndex, block: int, slots: Tensor, keep: bool) -> Tensor:
    layout = index.blocks[block].layout
    view, tag_end = records(index.meta, index.table, block), layout.ways * layout.tag_bytes
    slots = torch.unique(slots[slots >= 0])
    numbers, inverse = torch.unique(slots // layout.ways, return_inverse=True)
    way = slots % layout.ways
    part = view[numbers]
    states = part[:, tag_end:]
    dirty = states[inverse, way] & _DIRTY
    rows = rows_of(slots // layout.ways,
                   tags_of(part, layout.ways, layout.tag_bytes)[inverse, way], layout.sets)
    listed = torch.stack([torch.full_like(slots, block), slots, rows, dirty.long()], 1)
    if keep:
        states[inverse, way] &= ~_DIRTY & 255
        listed = listed[dirty.bool()]
    else:
        leaves = torch.zeros_like(states, dtype=torch.bool)
        leaves[inverse, way] = True
        part[:, :tag_end].view(-1, layout.ways, layout.tag_bytes)[leaves] = 255
        if index.blocks[block].policy == "lru":
            states.copy_(_rank_again(states, leaves))
        else:
            states[leaves] = 0
        index.occupied[block] -= slots.numel()
    view[numbers] = part
    return listed


def _rank_again(states: Tensor, leaves: Tensor) -> Tensor:
    """LRU states of sets [m, ways] after slots have left: those have the last ranks."""
    behind = (states >> 1).long() + _LAST * leaves
    return _states_of(behind) | torch.where(leaves, 0, states & _DIRTY)


def _states_of(order: Tensor) -> Tensor:
    """Clean LRU states [m, ways] whose ranks follow these numbers."""
    ranks = torch.argsort(torch.argsort(order, dim=1, stable=True), dim=1)
    return (2 * ranks).to(torch.uint8)


def cache_contents(index: CacheIndex, block: int) -> CacheContents:
    """The rows that a block holds."""
    found = list(_chunks(index, block))
    slots, rows, states = (torch.cat(parts) for parts in zip(*found, strict=True))
    return CacheContents(slots, rows, states >> 1, (states & _DIRTY).bool())


def _chunks(index: CacheIndex, block: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(slots, rows, states) of the occupied slots, some sets at a time."""
    layout = index.blocks[block].layout
    view = records(index.meta, index.table, block)
    for first in range(0, layout.sets, _CHUNK_SETS):
        part = view[first:first + _CHUNK_SETS]
        tags = tags_of(part, layout.ways, layout.tag_bytes)
        number, way = (tags >= 0).nonzero(as_tuple=True)
        rows = rows_of(number + first, tags[number, way], layout.sets)
        yield ((number + first) * layout.ways + way, rows,
               part[:, layout.ways * layout.tag_bytes:][number, way])


def cache_restore(index: CacheIndex, block: int, contents: CacheContents) -> None:
    """Makes a block hold exactly this: `cache_contents` of a cache of the same layout and policy.

    Args:
        index: changed in place; what the block held is forgotten.
        block: number of the block.
        contents: slots ascending.

    Raises:
        CheckpointError: a slot that the cache does not have or that its row cannot be in, slots
            out of order, or counters that the policy cannot have.
    """
    spec = index.blocks[block]
    layout = spec.layout
    slots, rows = contents.slots, contents.rows
    number, tag = locate(rows, layout.sets)
    wrong = ((rows < 0) | (rows >= spec.rows) | (slots < 0) | (slots // layout.ways != number)
             | (contents.counters > (127 if spec.policy == "lfu" else layout.ways - 1)))
    wrong[1:] |= slots[1:] <= slots[:-1]
    if bool(wrong.any()):
        at = int(wrong.nonzero()[0])
        raise CheckpointError(
            f"cache {block}: saved row {int(rows[at])} in slot {int(slots[at])} with counter "
            f"{int(contents.counters[at])} does not fit a cache of {spec.rows} rows, {layout.sets} "
            f"sets, {layout.ways} ways, policy {spec.policy}; start it empty, or restore it with "
            "the fraction, ways and policy that it was saved with")
    clear_blocks(index.meta, index.table, [block])
    view, tag_end = records(index.meta, index.table, block), layout.ways * layout.tag_bytes
    way = slots % layout.ways
    for byte in range(layout.tag_bytes):
        view[number, way * layout.tag_bytes + byte] = (tag >> 8 * byte & 255).to(torch.uint8)
    if spec.policy == "lru":
        _restore_ranks(view[:, tag_end:], number, way, contents.counters)
    else:
        view[number, tag_end + way] = contents.counters * 2
    view[number, tag_end + way] |= contents.dirty.to(torch.uint8)
    index.occupied[block] = slots.numel()


def _restore_ranks(states: Tensor, number: Tensor, way: Tensor, ranks: Tensor) -> None:
    """Gives occupied slots their ranks and the empty ones of their sets those that remain."""
    sets, inverse = torch.unique(number, return_inverse=True)
    part = torch.full((sets.numel(), states.shape[1]), _LAST)
    part[inverse, way] = ranks.long()
    states[sets] = _states_of(part)
