"""Rows that travel before their batch's turn, and those that must wait for an update.

While batch i trains, an owner knows which rows batch i will change: those that anybody asked for.
Rows of batch i + 1 that are not among them travel at once (*early*); the others travel after the
update (*late*). Every row still travels once; one bit per row tells the asking rank which.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from shardlab.comm import Groups, WireBytes, all_to_all
from shardlab.ops.members import mark_members
from shardlab.ops.unique import fill_affine
from shardlab.sharded.cells import Buffer, CellIndex
from shardlab.sharded.layout import Layout, column
from shardlab.sharded.messages import Incoming
from shardlab.sharded.routes import Outgoing
from shardlab.storage_specs import RowsSpec

_BITS = 8


@dataclass(frozen=True)
class Halves:
    """One batch's rows in two parts.

    Attributes:
        early_out, late_out: what this rank asked for; only counts and sizes differ from the whole.
        early_in, late_in: what this rank was asked for.
        late: bool, for every id that this rank asked for, slot by slot.
    """

    early_out: Outgoing
    late_out: Outgoing
    early_in: Incoming
    late_in: Incoming
    late: Tensor


@dataclass(frozen=True)
class EarlyRows:
    """Rows that are here already, and the places of all.

    Attributes:
        halves: None: all rows are early.
        early, late: places; those of late rows count from ``late_from`` on.
        rows: uint8, flat: early rows in their codecs, then room for the late ones.
        late_from: first byte of the late rows.
    """

    halves: Halves | None
    early: Buffer
    late: Buffer | None
    rows: Tensor
    late_from: int = 0


class Splitter:
    """Tells early rows from late ones.

    Args:
        layout: the compiled plan.
        cells: its cells.
        groups: the ranks, with the lane for batches that come.
    """

    def __init__(self, layout: Layout, cells: CellIndex, groups: Groups) -> None:
        self._layout, self._groups = layout, groups
        #: Rows that all replicas of these shards may change, out of those that this one may.
        self.of_all_replicas: Callable[[Tensor, WireBytes], Tensor] | None = None
        self._slots_of = [len(layout.slots_of(rank)) for rank in layout.peers]
        shards = layout.local_shards
        rows = column([local.shard.rows for local in shards])
        block = column([slot.block for slot in cells.mine]).repeat(len(layout.peers))
        #: Keys are rows of this rank, counted over all its blocks.
        self._first_key = (rows.cumsum(0) - rows)[block] if block.numel() else block
        # Of a chain of levels, reading early would move other rows between levels than reading in
        # turn, and narrow levels round; other kinds change as a whole. Bags wait for all their ids.
        # Copies of hot rows change by what other ranks look up; they do not travel.
        always = column([bool(local.table_rows) or not (
            isinstance(local.storage, RowsSpec) and len(local.storage.levels) == 1)
            for local in shards]).bool()
        self._always = (always[block] if block.numel() else block.bool()) | \
            cells.my_pooled.repeat(len(layout.peers))

    def keys(self, incoming: Incoming) -> Tensor:
        """int64 [n]: the row of this rank behind every id that it was asked for."""
        device = incoming.ids.device
        first = torch.repeat_interleave(self._first_key, incoming.counts.view(-1))
        return incoming.ids + first.to(device)

    def split(self, outgoing: Outgoing, incoming: Incoming,
              in_flight: Sequence[Incoming], wire: WireBytes) -> Halves:
        """Tells early rows from late ones; every rank calls it.

        Args:
            outgoing: what this rank asks for.
            incoming: what this rank is asked for.
            in_flight: of batches whose updates may come between now and this batch's turn.
            wire: counts the bytes.
        """
        counts = incoming.counts.view(-1)
        late_here = torch.repeat_interleave(self._always, counts).to(incoming.ids.device)
        if in_flight:
            members = torch.cat([self.keys(other) for other in in_flight])
            if self.of_all_replicas is not None:
                members = self.of_all_replicas(members, wire)
            late_here |= mark_members(self.keys(incoming), members)
        late_there = self._exchange_marks(outgoing, incoming, late_here, wire)
        late_in = _sums(late_here, counts).view_as(incoming.counts)
        late_out = _sums(late_there, outgoing.counts)
        ranks = len(self._layout.peers)
        nobody = replace(outgoing.batch, size=0)
        return Halves(
            replace(outgoing, batch=nobody, counts=outgoing.counts - late_out),
            replace(outgoing, counts=late_out),
            Incoming(incoming.ids[~late_here], incoming.counts - late_in, [0] * ranks, [0] * ranks,
                     [None] * ranks),
            replace(incoming, ids=incoming.ids[late_here], counts=late_in), late_there)

    def _exchange_marks(self, outgoing: Outgoing, incoming: Incoming, late: Tensor,
                        wire: WireBytes) -> Tensor:
        """bool: ``late`` of the owners, for every id that this rank asked for."""
        asked = [int(part.sum()) for part in outgoing.counts.split(self._slots_of)]
        sizes = incoming.counts.sum(1).tolist()
        parts = late.split(sizes)
        sent = [_pack(part) for part in parts[:-1]]
        sent_bytes = self._by_rank([part.numel() for part in sent])
        due = [-(-n // _BITS) for n in asked[:-1]]
        received = torch.empty(sum(due), dtype=torch.uint8, device=late.device)
        source = torch.cat(sent) if sent else received
        all_to_all(received, source, self._by_rank(due), sent_bytes, self._groups, "ids").wait()
        wire.count(0, sent_bytes, self._groups)
        marks = [_unpack(part, n) for part, n in zip(received.split(due), asked[:-1], strict=True)]
        return torch.cat([*marks, parts[-1]])

    def _by_rank(self, per_peer: list[int]) -> list[int]:
        sizes = [0] * self._layout.world_size
        for peer, size in zip(self._layout.peers[:-1], per_peer, strict=True):
            sizes[peer] = size
        return sizes


def row_addresses(outgoing: Outgoing, early: EarlyRows, sizes: Tensor) -> Tensor:
    """int64: byte of ``early.rows`` where the row of every asked id begins, slot by slot.

    Args:
        outgoing: what was asked.
        early: what came, and comes.
        sizes: int64 [slots]: bytes of a row.
    """
    halves, device = early.halves, early.rows.device
    if halves is None or early.late is None:
        return _affine(outgoing.counts, early.early.slot_offsets, sizes, device)
    places = torch.empty(halves.late.numel(), dtype=torch.int64, device=device)
    places[~halves.late] = _affine(halves.early_out.counts, early.early.slot_offsets, sizes,
                                   device)
    places[halves.late] = early.late_from + _affine(
        halves.late_out.counts, early.late.slot_offsets, sizes, device)
    return places


def _affine(counts: Tensor, first: Tensor, step: Tensor, device: torch.device) -> Tensor:
    """Concatenates first[s] + step[s] * [0, counts[s]) over slots s."""
    starts = counts.cumsum(0) - counts
    return fill_affine(torch.stack([starts, counts, first, step], 1), int(counts.sum()), device)


def _sums(flags: Tensor, counts: Tensor) -> Tensor:
    """int64 on CPU: how many flags are set in every consecutive run of ``counts``."""
    running = torch.zeros(flags.numel() + 1, dtype=torch.int64)
    torch.cumsum(flags.cpu(), 0, out=running[1:])
    ends = counts.cumsum(0)
    return running[ends] - running[ends - counts]


def _weights(device: torch.device) -> Tensor:
    return torch.tensor([1 << bit for bit in range(_BITS)], dtype=torch.uint8, device=device)


def _pack(flags: Tensor) -> Tensor:
    """uint8 [ceil(n / 8)]: one bit a flag."""
    padded = torch.zeros(-(-flags.numel() // _BITS) * _BITS, dtype=torch.uint8,
                         device=flags.device)
    padded[:flags.numel()] = flags
    return (padded.view(-1, _BITS) * _weights(flags.device)).sum(1, dtype=torch.uint8)


def _unpack(packed: Tensor, count: int) -> Tensor:
    """bool [count]."""
    return ((packed[:, None] & _weights(packed.device)) != 0).view(-1)[:count]
