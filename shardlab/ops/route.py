"""Routing of whole bags to the row blocks of their tables. Source: own."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shardlab.ops.registry import address, check_tensor, face_of, native
from shardlab.ops.unique import BOUNDS_CODE, OutOfBoundsError
from shardlab.specs import BoundsMode


@dataclass(frozen=True)
class RouteTables:
    """The tables whose bags are routed, fixed over the steps of a run.

    Attributes:
        table: int64 [T, 6] on CPU: (first feature, features, first block, blocks, rows, bounds).
        block_ends: int64 [K] on CPU: upper row bound of every row block, table by table.
    """

    table: Tensor
    block_ends: Tensor


@dataclass(frozen=True)
class RoutedBags:
    """Ids grouped by (table, row block), keeping bag order; ids count from their block's first row.

    Attributes:
        ids: int64 [n]; block k of a table whose ids start at position p begins at p + the counts
            of the blocks before it.
        counts: int64 [K] on CPU: ids per row block.
        positions: int64 [n]: where every id stood in the input; or None.
        lengths: int64 [sum over blocks of features * batch]: ids of every bag that fell into the
            block, block by block; or None.
    """

    ids: Tensor
    counts: Tensor
    positions: Tensor | None
    lengths: Tensor | None


def route_bags(ids: Tensor, offsets: Tensor | None, length: int, batch: int, tables: RouteTables,
               *, positions: bool, lengths: bool) -> RoutedBags:
    """Checks the bounds of every id and groups ids by row block.

    Args:
        ids: int64 [n], feature-major over the features of the tables.
        offsets: int64 [features * batch + 1], or None with a fixed length.
        length: ids in every bag, or -1 when offsets tell.
        batch: bags per feature.
        tables: the tables.
        positions: also return every id's position.
        lengths: also return the bags' lengths per block.

    Raises:
        OutOfBoundsError: an id outside its table where the mode is ``error``.
    """
    if face_of("route_bags", ids.device.type) != "native":
        return route_bags_reference(ids, offsets, length, batch, tables, positions=positions,
                                    lengths=lengths)
    check_tensor("ids", ids, torch.int64)
    out = torch.empty_like(ids)
    where = torch.empty_like(ids) if positions else None
    blocks = int((tables.table[:, 1] * tables.table[:, 3]).sum())
    sizes = torch.empty(blocks * batch, dtype=torch.int64) if lengths else None
    counts = torch.empty(tables.block_ends.numel(), dtype=torch.int64)
    status = native().route_bags(  # type: ignore[union-attr]
        address(ids), address(offsets), length, batch, address(tables.table),
        tables.table.shape[0], address(tables.block_ends), address(out), address(where),
        address(sizes), address(counts), torch.get_num_threads())
    if status < 0:
        raise OutOfBoundsError(-status - 1)
    return RoutedBags(out, counts, where, sizes)


def route_bags_reference(ids: Tensor, offsets: Tensor | None, length: int, batch: int,
                         tables: RouteTables, *, positions: bool, lengths: bool) -> RoutedBags:
    """Plain-torch face of `route_bags`."""
    device, last = ids.device, tables.table[:, :2].sum(1).max() if len(tables.table) else 0
    edges = length * torch.arange(int(last) * batch + 1, device=device) if offsets is None \
        else offsets
    out, where = torch.empty_like(ids), torch.empty_like(ids)
    counts, sizes = [], []
    for first, features, first_block, blocks, rows, bounds in tables.table.tolist():
        bags = edges[first * batch:(first + features) * batch + 1]
        begin, end = int(bags[0]), int(bags[-1])
        value, position = ids[begin:end], torch.arange(begin, end, device=device)
        bag = torch.repeat_interleave(torch.arange(features * batch, device=device),
                                      bags[1:] - bags[:-1])
        bad = (value < 0) | (value >= rows)
        if bounds == BOUNDS_CODE[BoundsMode.ERROR] and bool(bad.any()):
            raise OutOfBoundsError(int(position[bad][0]))
        value = torch.where(bad, 0, value)
        keep = ~bad if bounds == BOUNDS_CODE[BoundsMode.IGNORE] else torch.ones_like(bad)
        ends = tables.block_ends[first_block:first_block + blocks].to(device)
        block = torch.searchsorted(ends, value, right=True)
        at = begin
        for k in range(blocks):
            mine = keep & (block == k)
            taken = value[mine] - (ends[k - 1] if k else 0)
            out[at:at + taken.numel()] = taken
            where[at:at + taken.numel()] = position[mine]
            at += taken.numel()
            counts.append(taken.numel())
            sizes.append(torch.bincount(bag[mine], minlength=features * batch))
    joined = torch.cat(sizes) if lengths and sizes else torch.empty(0, dtype=torch.int64)
    return RoutedBags(out, torch.tensor(counts, dtype=torch.int64), where if positions else None,
                      joined.to(device) if lengths else None)
