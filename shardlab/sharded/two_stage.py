"""The stage inside a host: ids of its ranks are united, rows handed out, gradients merged.

    rank               rank of its host             rank of another host
      ids (inside) -->   unite               ids -->  read
      pool  <-- (inside)   hand out   <-- rows
      sums (inside) -->  merge, encode     grads -->  merge hosts, update

What several ranks of a host ask crosses once, and so does its gradient: the sum over the host's
ranks, in fp32 and in their order. Rows are copied as they came, in their codec. Bags that their
owner pools cannot be united; they pass one behind the other, rank by rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shardlab.comm import Stages, WireBytes, all_to_all
from shardlab.ops.blocks import Blocks
from shardlab.ops.id_bytes import pack_bytes
from shardlab.ops.moves import move_rows
from shardlab.ops.records import MoveEnd
from shardlab.ops.rows import pool_rows, sum_rows
from shardlab.ops.unique import (
    BOUNDS_CODE,
    Segments,
    Uniques,
    fill_affine,
    pack_ids,
    unique_segments,
)
from shardlab.sharded.cells import Buffer, CellIndex
from shardlab.sharded.early import EarlyRows, row_addresses
from shardlab.sharded.gradients import entry_weights, owner_chunks
from shardlab.sharded.inputs import Batch
from shardlab.sharded.layout import Layout, column
from shardlab.sharded.messages import IdExchange, Incoming
from shardlab.sharded.routes import Outgoing
from shardlab.sharded.transfer import Transfers
from shardlab.sharded.wire_gradients import SlotSums
from shardlab.specs import BoundsMode

_FP32_BYTES = 4
#: What ranks of a host tell each other of their gradients: two fp64.
_BOUND_BYTES = 16


@dataclass(frozen=True)
class Inside:
    """What the ranks of this host asked through this one.

    Attributes:
        own: what this rank asked, of all of its host.
        asked: what all of its host asked of this rank's column.
        uniques: their ids of unique rows, by slot; sources are elements of `gradients`.
        gradients: places of the fp32 gradients that will follow.
        first_sample: int64 [ranks in slot order] on CPU: where a rank's samples begin.
        samples: of all ranks.
    """

    own: Outgoing
    asked: Incoming
    uniques: Uniques
    gradients: Buffer
    first_sample: Tensor
    samples: int


class HostRelay:
    """What this rank does for its host.

    Args:
        inside: layout of the host.
        across: cells of the layout of the hosts.
        stages: the lanes.
        wire: counts the bytes.
    """

    def __init__(self, inside: Layout, across: CellIndex, stages: Stages,
                 wire: WireBytes) -> None:
        self.layout, self.across, self._stages, self._wire = inside, across, stages, wire
        self.cells = CellIndex(inside)
        self._ids = IdExchange(inside, stages.inside, wire)
        self._ids_ahead = IdExchange(inside, stages.inside_ahead, WireBytes())
        self._transfers = Transfers(self.cells)
        mine, ranks = self.cells.mine, len(self.cells.peers)
        self._segments = Segments(column([slot.shard.rows for slot in mine]),
                                  column([BOUNDS_CODE[BoundsMode.ERROR]] * len(mine)))
        self._widths = column([slot.id_bytes for slot in mine])
        self._row_starts = column([slot.shard.row_start for slot in mine])
        self.columns = self.cells.my_columns
        self._pooled = self.cells.my_pooled
        #: Slot and asking rank (in slot order) of every cell.
        self._cell_slot = torch.arange(len(mine)).repeat(ranks)
        self._cell_rank = torch.arange(ranks).repeat_interleave(len(mine))
        self._cell_pooled = self._pooled[self._cell_slot]
        order = self.cells.merge_order  # by slot, within a slot by rank
        self._rows_order = ~self._cell_pooled[order]
        self._bag_cells = order[self._cell_pooled[order]]
        self.rows_slots = (~self._pooled).nonzero()[:, 0]
        #: Ranks in slot order -> their turn, by number.
        self._turns = column(self.cells.peers)
        # Pieces of what is asked across: slots of unique rows, then cells of bags; by slot.
        slots = torch.cat([self.rows_slots, self._cell_slot[self._bag_cells]])
        self._piece_order = torch.argsort(slots, stable=True)
        self._piece_widths = self._widths[slots]

    # ------------------------------------------------------------------ ids
    def unite(self, own: Outgoing, ahead: WireBytes | None = None) -> tuple[Inside, Outgoing]:
        """Exchanges ids inside the host; every rank calls it.

        Args:
            own: what this rank asks.
            ahead: of a batch that comes, counted here.

        Returns:
            What was asked, and what this rank asks of the hosts.
        """
        ids = self._ids
        if ahead is not None:
            ids = self._ids_ahead
            ids.wire = ahead
        asked = ids.exchange(own)
        gradients = self.cells.backward(own, asked)
        chunks = owner_chunks(self.cells, asked, gradients.cell_offsets // _FP32_BYTES, None)
        uniques = unique_segments(asked.ids, chunks[self._rows_order].contiguous(),
                                  self._segments, inverse=True)
        sizes = column(asked.sizes)
        by_turn = torch.argsort(self._turns)
        first = torch.empty_like(sizes)
        first[by_turn] = sizes[by_turn].cumsum(0) - sizes[by_turn]
        inside = Inside(own, asked, uniques, gradients, first, int(sizes.sum()))
        return inside, self._across(inside)

    def _across(self, inside: Inside) -> Outgoing:
        """What this rank asks of the hosts."""
        asked, uniques = inside.asked, inside.uniques
        different = uniques.splits.diff()
        counts = torch.where(self._pooled, asked.counts.sum(0), different)
        flat = asked.counts.view(-1)
        first = flat.cumsum(0) - flat
        starts = torch.cat([uniques.splits[:-1][self.rows_slots],
                            first[self._bag_cells] + uniques.ids.numel()])
        sizes = torch.cat([different[self.rows_slots], flat[self._bag_cells]])
        pieces = torch.stack([starts, sizes, torch.zeros_like(starts), torch.zeros_like(starts),
                              self._piece_widths], 1)[self._piece_order]
        many = pieces[:, 1] * pieces[:, 4]
        pieces[:, 3] = many.cumsum(0) - many
        source = uniques.ids if not len(self._bag_cells) else torch.cat([uniques.ids, asked.ids])
        length, lengths = self._lengths(asked)
        weights = self._weights(asked, first)
        none = asked.ids[:0]
        batch = Batch(none, None, length, weights, inside.samples, self.across.layout)
        return Outgoing(batch, pack_bytes(source, pieces, int(many.sum())), counts,
                        uniques.splits[:-1], None, lengths, weights)

    def _lengths(self, asked: Incoming) -> tuple[int, Tensor | None]:
        """The one length of all bags, or lengths int64 [pooled slots, samples]."""
        if not len(self._bag_cells):
            return 0, None
        fixed = {length for length, size in zip(asked.bag_lengths, asked.sizes, strict=True)
                 if isinstance(length, int) and size}
        if len(fixed) < 2 and all(isinstance(length, int) for length in asked.bag_lengths):
            return next(iter(fixed), 1), None
        slots, parts = int(self._pooled.sum()), []
        for rank in torch.argsort(self._turns).tolist():
            length, size = asked.bag_lengths[rank], asked.sizes[rank]
            parts.append(length if isinstance(length, Tensor) else torch.full(
                (slots, size), length, device=asked.ids.device))
        return -1, torch.cat(parts, 1)

    def _weights(self, asked: Incoming, first: Tensor) -> Tensor | None:
        """Weights of the bags' entries, slot by slot, within a slot by rank."""
        full = entry_weights(asked, self.cells) if len(self._bag_cells) else None
        if full is None:
            return None
        counts = asked.counts.view(-1)
        return torch.cat([full[start:start + count] for start, count in
                          zip(first[self._bag_cells].tolist(), counts[self._bag_cells].tolist(),
                              strict=True)])

    # ------------------------------------------------------------------ rows
    def hand_out(self, inside: Inside, outgoing: Outgoing, came: EarlyRows) -> EarlyRows:
        """Copies every rank of the host the rows that it asked for; every rank calls it.

        Args:
            inside: of `unite`.
            outgoing: what this rank asked of the hosts.
            came: what they answered.

        Returns:
            What this rank asked for.
        """
        place = self.cells.forward(inside.own, inside.asked)
        rows = torch.empty(place.total, dtype=torch.uint8, device=came.rows.device)
        vectors = place.cell_vectors
        first = vectors.cumsum(0) - vectors
        pieces = torch.stack([first, vectors, torch.zeros_like(first), torch.ones_like(first)], 1)
        places = fill_affine(pieces, int(vectors.sum()), rows.device)
        target = self.cells.forward_cells.coded_end(rows, place.cell_offsets, vectors, places)
        segments = torch.stack([self._cell_slot, torch.arange(len(vectors)), first, vectors], 1)
        move_rows(self._answers(inside, outgoing, came, vectors), target, segments[vectors > 0])
        groups = self._stages.inside
        self._transfers.count(self._wire, place, groups, owner_sends=True)
        self._transfers.start(rows, place, groups, owner_sends=True).wait()
        return EarlyRows(None, place, None, rows)

    def _answers(self, inside: Inside, outgoing: Outgoing, came: EarlyRows,
                 vectors: Tensor) -> MoveEnd:
        """Where, in what came, the row or bag of every cell's every vector lies."""
        codec = self.across.forward_slots
        numbers = self._numbers(inside, outgoing, vectors, by_asked=came.halves is not None)
        at, steps, counts = came.early.slot_offsets, codec.vector_bytes, came.early.slot_vectors
        if came.halves is not None:
            assert came.late is not None
            # Rows lie in two halves, at addresses of their own; bags are late as a whole.
            addresses = row_addresses(outgoing, came, steps)
            rows = torch.repeat_interleave(~self._cell_pooled, vectors).to(numbers.device)
            numbers[rows] = addresses[numbers[rows]]
            at = torch.where(self._pooled, came.late.slot_offsets + came.late_from, 0)
            counts = torch.where(self._pooled, came.late.slot_vectors,
                                 (came.rows.numel() - steps + 1).clamp(min=0))
            steps = torch.where(self._pooled, steps, 1)
        table = torch.stack([at, steps, at, torch.zeros_like(at), codec.columns, counts], 1)
        return MoveEnd(came.rows, Blocks(table, codec.coded), numbers)

    def _numbers(self, inside: Inside, outgoing: Outgoing, vectors: Tensor, *,
                 by_asked: bool) -> Tensor:
        """int64: every vector's number among its slot's, or, of rows, among all ids asked."""
        asked, uniques = inside.asked, inside.uniques
        assert uniques.inverse is not None
        flat = asked.counts.view(-1)
        splits = uniques.splits[:-1]
        if by_asked:
            splits = splits - (outgoing.counts.cumsum(0) - outgoing.counts)
        starts = torch.where(self._cell_pooled,
                             asked.ids.numel() + inside.first_sample[self._cell_rank],
                             flat.cumsum(0) - flat)
        subtract = torch.where(self._cell_pooled, 0, splits[self._cell_slot])
        source = uniques.inverse
        if len(self._bag_cells):
            source = torch.cat([source, torch.arange(inside.samples, device=source.device)])
        return pack_ids(source, torch.stack(
            [starts, vectors, subtract, vectors.cumsum(0) - vectors], 1), torch.int64)

    # ------------------------------------------------------------------ gradients
    def write(self, inside: Inside, sums: SlotSums, *, scaled: bool) -> tuple[Tensor, float]:
        """This rank's gradients as they travel inside the host; counts their bytes.

        Args:
            inside: of `unite`.
            sums: of this rank.
            scaled: they are scaled before they leave the host.

        Returns:
            uint8, the buffer; and a bound of the sums where they are scaled.
        """
        place, groups = inside.gradients, self._stages.inside_grads
        buffer = torch.empty(place.total, dtype=torch.uint8, device=inside.asked.ids.device)
        sums.write(place.slot_offsets // _FP32_BYTES, 1.0, buffer.view(torch.float32))
        self._transfers.count(self._wire, place, groups, owner_sends=False)
        if not scaled:
            return buffer, 0.0
        self._wire.count(2, [_BOUND_BYTES * (rank != self._stages.place)
                             for rank in range(self._stages.ranks_per_host)], groups)
        return buffer, sums.largest()

    def collect(self, inside: Inside, buffer: Tensor, bound: float) -> HostSums:
        """Exchanges gradients inside the host; every rank calls it.

        Args:
            inside: of `unite`.
            buffer, bound: of `write`.

        Returns:
            Those of the host, for what this rank asked of the hosts.
        """
        self._transfers.start(buffer, inside.gradients, self._stages.inside_grads,
                              owner_sends=False).wait()
        return HostSums(self, inside, buffer.view(torch.float32), bound)

    def agree(self, own: float, rest: float) -> float:
        """Sum of ``own`` over the host's ranks, plus their largest ``rest``: the same on all."""
        groups, ranks = self._stages.inside_grads, self._stages.ranks_per_host
        mine = torch.tensor([own, rest], dtype=torch.float64, device=groups.device)
        found = torch.empty(2 * ranks, dtype=torch.float64, device=groups.device)
        all_to_all(found, mine.repeat(ranks), [2] * ranks, [2] * ranks, groups, "grads").wait()
        both = found.view(ranks, 2)
        return float(both[:, 0].sum() + both[:, 1].max())

    def table_rows(self, inside: Inside, slots: Tensor, counts: Tensor) -> Tensor:
        """int64, slot by slot: row of the table of every unique row, or number of every bag."""
        uniques = inside.uniques
        shift = torch.repeat_interleave(self._row_starts, uniques.splits.diff())
        rows = uniques.ids + shift.to(uniques.ids.device)
        source = torch.cat([rows, torch.arange(inside.samples, device=rows.device)])
        starts = torch.where(slots, rows.numel(), uniques.splits[:-1])
        return pack_ids(source, torch.stack([starts, counts, torch.zeros_like(counts),
                                             counts.cumsum(0) - counts], 1), torch.int64)

    def bag_jobs(self, inside: Inside, start: Tensor) -> Tensor:
        """Jobs of `pool_rows` that copy gradients of bags behind each other, rank by rank."""
        cells = self._bag_cells
        slots, ranks = self._cell_slot[cells], self._cell_rank[cells]
        columns = self.columns[slots]
        jobs = torch.zeros(cells.numel(), 11, dtype=torch.int64)
        jobs[:, 0], jobs[:, 1], jobs[:, 2] = \
            inside.gradients.cell_offsets[cells] // _FP32_BYTES, columns, columns
        jobs[:, 3], jobs[:, 6] = column(inside.asked.sizes)[ranks], 1
        jobs[:, 8] = start[slots] + inside.first_sample[ranks] * columns
        jobs[:, 9] = columns
        return jobs


class HostSums:
    """Gradients of a host for what one of its ranks asked of the hosts: a `SlotSums`.

    Args:
        relay: of the rank.
        inside: what was asked.
        grads: fp32, flat: gradients of all ranks of the host.
        bound: of this rank's own sums.
    """

    def __init__(self, relay: HostRelay, inside: Inside, grads: Tensor, bound: float) -> None:
        self._relay, self._inside, self._grads, self._bound = relay, inside, grads, bound

    def write(self, start: Tensor, scale: float, out: Tensor) -> None:
        """Adds up the ranks' gradients of every row, in their order."""
        relay, uniques = self._relay, self._inside.uniques
        slots = relay.rows_slots
        columns = relay.columns[slots]
        pieces = torch.stack([uniques.splits[:-1][slots], uniques.splits.diff()[slots], columns,
                              torch.zeros_like(columns), start[slots], columns], 1)
        sum_rows(self._grads, uniques, None, pieces, scale, out)
        jobs = relay.bag_jobs(self._inside, start)
        if len(jobs):
            source = self._grads if scale == 1.0 else self._grads * scale
            pool_rows(source, jobs, torch.arange(self._inside.samples, device=out.device), None,
                      None, out)

    def rows(self, place: Buffer) -> Tensor:
        """Rows of tables, or numbers of bags: random bits follow from them."""
        return self._relay.table_rows(self._inside, self._relay.across.pooled, place.slot_vectors)

    def largest(self, rests: Sequence[Tensor] = ()) -> float:
        """Bound of any sum; the same on all ranks of the host, as copies of a table must be."""
        rest = max((float(part.abs().max()) for part in rests if part.numel()), default=0.0)
        return self._relay.agree(self._bound, rest)
