"""Rows that travel before their batch's turn, and those that must wait for an update.

While batch i trains, an owner knows which rows batch i will change: those that anybody asked for.
Rows of batch i + 1 that are not among them travel at once (*early*); the others travel after the
update (*late*). Every row still travels once; one bit per row tells the asking rank which. Of the
ids of batch i, those that batch i + 1 asks for, too, are *urgent*: only their gradients must arrive
before batch i + 1 is looked up (`urgent`).
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


@dataclass(frozen=True)
class Asked:
    """A batch's ids at both ends, with a mark for each that the owners know and the askers need.

    Attributes:
        outgoing: what this rank asked for.
        incoming: what this rank was asked for.
        here: bool, for every id of ``incoming``.
        there: bool, for every id of ``outgoing``, slot by slot; None: not known yet.
    """

    outgoing: Outgoing
    incoming: Incoming
    here: Tensor
    there: Tensor | None = None

    def marked(self, wanted: bool) -> tuple[Outgoing, Incoming, Tensor]:
        """The ids with, or without a mark, of a batch without pooled bags.

        Returns:
            What was asked for, and of whom this rank was asked, with the counts of these ids; and
            for every id of the first its number among its slot's.
        """
        assert self.there is not None
        here, there = self.here == wanted, self.there == wanted
        counts, incoming = self.outgoing.counts, self.incoming
        starts = counts.cumsum(0) - counts
        number = _affine(counts, torch.zeros_like(starts), torch.ones_like(starts), there.device)
        came = _sums(here, incoming.counts.view(-1)).view_as(incoming.counts)
        return (replace(self.outgoing, counts=_sums(there, counts)),
                replace(incoming, ids=incoming.ids[here], counts=came), number[there])


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

    def split(self, outgoing: Outgoing, incoming: Incoming, in_flight: Sequence[Incoming],
              wire: WireBytes, in_front: tuple[Outgoing, Incoming] | None = None,
              ) -> tuple[Halves, Asked | None]:
        """Tells early rows from late ones; every rank calls it.

        Args:
            outgoing: what this rank asks for.
            incoming: what this rank is asked for.
            in_flight: of batches whose updates may come between now and this batch's turn.
            wire: counts the bytes.
            in_front: ids of the batch in front, where urgent ones are to be told.

        Returns:
            The two parts; and the ids of the batch in front, the urgent ones marked.
        """
        counts = incoming.counts.view(-1)
        late_here = torch.repeat_interleave(self._always, counts).to(incoming.ids.device)
        if in_flight:
            members = torch.cat([self.keys(other) for other in in_flight])
            if self.of_all_replicas is not None:
                members = self.of_all_replicas(members, wire)
            late_here |= mark_members(self.keys(incoming), members)
        marked = [Asked(outgoing, incoming, late_here)]
        if in_front is not None:
            marked.append(Asked(*in_front, mark_members(self.keys(in_front[1]),
                                                        self.keys(incoming))))
        late_there, *urgent_there = self._exchange_marks(marked, wire)
        late_in = _sums(late_here, counts).view_as(incoming.counts)
        late_out = _sums(late_there, outgoing.counts)
        ranks = len(self._layout.peers)
        nobody = replace(outgoing.batch, size=0)
        halves = Halves(
            replace(outgoing, batch=nobody, counts=outgoing.counts - late_out),
            replace(outgoing, counts=late_out),
            Incoming(incoming.ids[~late_here], incoming.counts - late_in, [0] * ranks, [0] * ranks,
                     [None] * ranks),
            replace(incoming, ids=incoming.ids[late_here], counts=late_in), late_there)
        return halves, replace(marked[1], there=urgent_there[0]) if urgent_there else None

    def _exchange_marks(self, marked: Sequence[Asked], wire: WireBytes) -> list[Tensor]:
        """bool, for each: marks of the owners, for every id that this rank asked for."""
        asked = [[int(part.sum()) for part in one.outgoing.counts.split(self._slots_of)]
                 for one in marked]
        parts = [one.here.split(one.incoming.counts.sum(1).tolist()) for one in marked]
        sent = [_pack(torch.cat(of_rank)) for of_rank in [*zip(*parts, strict=True)][:-1]]
        sent_bytes = self._by_rank([part.numel() for part in sent])
        sizes = [*zip(*asked, strict=True)][:-1]
        due = [-(-sum(of_rank) // _BITS) for of_rank in sizes]
        received = torch.empty(sum(due), dtype=torch.uint8, device=marked[0].here.device)
        source = torch.cat(sent) if sent else received
        all_to_all(received, source, self._by_rank(due), sent_bytes, self._groups, "ids").wait()
        wire.count(0, sent_bytes, self._groups)
        found = [_unpack(part, sum(of_rank)).split(list(of_rank))
                 for part, of_rank in zip(received.split(due), sizes, strict=True)]
        return [torch.cat([*(of_rank[i] for of_rank in found), own[-1]])
                for i, own in enumerate(parts)]

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
