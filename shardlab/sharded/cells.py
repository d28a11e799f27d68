"""Where every cell lies in the buffers of rows and of gradients: index arithmetic only.

A buffer is [what travels | what arrives | what stays]. In the forward direction the owner fills the
first part and the source reads the other two; gradients go the other way round.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from shardlab.codecs import table_key
from shardlab.comm.wire import CellKind, WireCodec, scale_limit
from shardlab.ops.cells import CellEnd, place_cells, sum_by_key
from shardlab.sharded.layout import Layout, Slot, column
from shardlab.sharded.messages import Incoming
from shardlab.sharded.routes import Outgoing
from shardlab.wire_bytes import SCALE_BYTES


@dataclass(frozen=True)
class Buffer:
    """Byte offsets of one direction's buffer.

    Attributes:
        total: bytes.
        travels, arrives: bytes sent to and received from other ranks.
        slot_offsets: int64 [slots] on CPU: this rank as the source.
        cell_offsets: int64 [ranks * own slots] on CPU: this rank as the owner.
        slot_splits, cell_splits: bytes by rank, for the collective.
        slot_vectors: int64 [slots] on CPU: rows of every slot; 0 where none come.
        cell_vectors: int64 [ranks * own slots] on CPU: rows of every cell.
        sent_bytes: int64 on CPU: bytes of every slot, or of every cell, where the owner sends.
        slot_heads, cell_heads: first byte of every rank's message, ranks in slot order; empty
            where messages have no head.
    """

    total: int
    travels: int
    arrives: int
    slot_offsets: Tensor
    cell_offsets: Tensor
    slot_splits: list[int]
    cell_splits: list[int]
    slot_vectors: Tensor
    cell_vectors: Tensor
    sent_bytes: Tensor
    slot_heads: list[int]
    cell_heads: list[int]


class CellIndex:
    """Static columns of slots (source side) and cells (owner side), and their sizes per step.

    Args:
        layout: the compiled plan.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.peers = layout.peers
        self._per_peer = [len(layout.slots_of(rank)) for rank in self.peers]
        self.mine = layout.slots_of(layout.rank)
        self.columns = column([slot.shard.columns for slot in layout.slots])
        self.pooled = column([slot.feature >= 0 for slot in layout.slots]).bool()
        self.my_columns = column([slot.shard.columns for slot in self.mine])
        self.my_pooled = column([slot.feature >= 0 for slot in self.mine]).bool()
        self.any_pooled = any(slot.feature >= 0 for slot in self.mine)
        replicated = [layout.plans[slot.table].replicated for slot in self.mine]
        # A replica is read at home only; its gradients come from everywhere.
        self.my_read = torch.ones(len(self.peers), len(self.mine), dtype=torch.int64)
        self.my_read[:-1, column(replicated).bool()] = 0
        self.my_read[-1] = column([slot.read for slot in self.mine])
        self._set_up_codecs()
        self._set_up_ends()
        self._set_up_merge()

    def _set_up_codecs(self) -> None:
        """Codecs of slots (this rank as the source) and of cells (as the owner)."""
        layout, ranks = self.layout, len(self.peers)
        slots, mine = layout.slots, self.mine
        #: (table, kind) of every owner's cell forward, of every slot backward.
        self.sent_rows = [(layout.tables[slot.table].name, _forward(layout, slot))
                          for _ in range(ranks) for slot in mine]
        self.sent_gradients = [(layout.tables[slot.table].name, _backward(layout, slot))
                               for slot in slots]
        self.forward_slots = WireCodec([_forward(layout, slot) for slot in slots])
        self.forward_cells = WireCodec([_forward(layout, slot) for slot in mine] * ranks)
        self.backward_slots = WireCodec([_backward(layout, slot) for slot in slots])
        self.backward_cells = WireCodec([_backward(layout, slot) for slot in mine] * ranks)
        #: Tables of what leaves this rank: slots of other ranks, cells of other ranks.
        self._slots_away = column([slot.table for slot in slots[:len(slots) - len(mine)]])
        self._cells_away = column([slot.table for slot in mine] * (ranks - 1))
        # All ranks must agree whether messages of gradients have a head.
        self.scale_limit = scale_limit([wire.backward for wire in layout.wires])

    def _set_up_ends(self) -> None:
        """Both ends of either direction, for `place_cells`."""
        ranks = len(self.peers)
        slots, cells = self.pooled.long(), self.my_pooled.long().repeat(ranks)
        cells_of = [len(self.mine)] * ranks

        def ends(read: tuple[Tensor, Tensor], codecs: tuple[WireCodec, WireCodec],
                 ) -> tuple[CellEnd, CellEnd]:
            tables = [torch.stack([pooled, travels, codec.vector_bytes], 1) for pooled, travels,
                      codec in zip((slots, cells), read, codecs, strict=True)]
            return CellEnd(tables[0], self._per_peer), CellEnd(tables[1], cells_of)

        read = column([slot.read for slot in self.layout.slots])
        self._forward_ends = ends((read, self.my_read.view(-1)),
                                  (self.forward_slots, self.forward_cells))
        self._backward_ends = ends((torch.ones_like(slots), torch.ones_like(cells)),
                                   (self.backward_slots, self.backward_cells))

    def _set_up_merge(self) -> None:
        """Order in which an owner merges its cells, and what its chunks hold of them."""
        slots = len(self.mine)
        by_rank = sorted(range(len(self.peers)), key=self.peers.__getitem__)
        cells = sorted(range(slots * len(self.peers)),
                       key=lambda cell: (self.mine[cell % slots].block,
                                         cell % slots, by_rank.index(cell // slots)))
        self.merge_order = column(cells)
        self.cell_blocks = column([slot.block for slot in self.mine] * len(self.peers))
        self.cell_columns = self.my_columns.repeat(len(self.peers))

    def forward(self, outgoing: Outgoing, incoming: Incoming) -> Buffer:
        """Rows: owners send, sources receive."""
        return self._place(outgoing, incoming, owner_sends=True)

    def backward(self, outgoing: Outgoing, incoming: Incoming) -> Buffer:
        """Gradients: sources send, owners receive."""
        return self._place(outgoing, incoming, owner_sends=False)

    def table_bytes(self, place: Buffer, *, cells: bool) -> list[int]:
        """Bytes by table of what leaves this rank.

        Args:
            place: of the buffer.
            cells: the owner sends.
        """
        away = self._cells_away if cells else self._slots_away
        return sum_by_key(place.sent_bytes, away, len(self.layout.tables))

    def _place(self, outgoing: Outgoing, incoming: Incoming, *, owner_sends: bool) -> Buffer:
        scaled = self.scale_limit is not None and not owner_sends
        slots, cells = place_cells(
            self._forward_ends if owner_sends else self._backward_ends,
            (outgoing.counts, incoming.counts),
            ([outgoing.batch.size] * len(self.peers), incoming.sizes),
            SCALE_BYTES if scaled else 0, owner_sends)
        sender, receiver = (cells, slots) if owner_sends else (slots, cells)
        assert sender.parts[-1] == receiver.parts[-1], "both ends see one home"
        travels, arrives = sum(sender.parts[:-1]), sum(receiver.parts[:-1])
        heads: tuple[list[int], list[int]] = ([], [])
        if scaled:
            home = travels + arrives
            heads = (_starts(slots.parts, home, before=0),
                     _starts(cells.parts, home, before=travels))
        return Buffer(travels + arrives + sender.parts[-1], travels, arrives, slots.at, cells.at,
                      self._by_rank(slots.parts), self._by_rank(cells.parts), slots.vectors,
                      cells.vectors, sender.bytes, *heads)

    def _by_rank(self, parts: list[int]) -> list[int]:
        sizes = [0] * len(self.peers)
        for peer, size in zip(self.peers[:-1], parts, strict=False):
            sizes[peer] = size
        return sizes


def _starts(parts: list[int], home: int, before: int) -> list[int]:
    """Where every rank's part begins: one behind the other from ``before``, the last at home."""
    edges = [0, *accumulate(parts)]
    return [*(before + edge for edge in edges[:len(parts) - 1]), home]


def _forward(layout: Layout, slot: Slot) -> CellKind:
    return CellKind(layout.wires[slot.table].forward, slot.shard.columns)


def _backward(layout: Layout, slot: Slot) -> CellKind:
    """Random bits of pooled gradients follow from the feature and the sample, not from a row."""
    name = layout.tables[slot.table].name if slot.feature < 0 else layout.features[slot.feature]
    wire = layout.wires[slot.table]
    if slot.hot:  # stays at home; what it is added to over the ranks is fp32
        return CellKind("fp32", slot.shard.columns)
    return CellKind(wire.backward, slot.shard.columns, table_key(name), slot.shard.col_start,
                    wire.rounding == "stochastic")
