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
        self.read = column([slot.read for slot in layout.slots])
        self.my_columns = column([slot.shard.columns for slot in self.mine])
        self.my_pooled = column([slot.feature >= 0 for slot in self.mine]).bool()
        replicated = [layout.plans[slot.table].replicated for slot in self.mine]
        # A replica is read at home only; its gradients come from everywhere.
        self.my_read = torch.ones(len(self.peers), len(self.mine), dtype=torch.int64)
        self.my_read[:-1, column(replicated).bool()] = 0
        self.my_read[-1] = column([slot.read for slot in self.mine])

        self._set_up_codecs()
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
        self._slot_tables = column([slot.table for slot in slots])
        self._cell_tables = column([slot.table for slot in mine] * ranks)
        # All ranks must agree whether messages of gradients have a head.
        self.scale_limit = scale_limit([wire.backward for wire in layout.wires])

    def _set_up_merge(self) -> None:
        """Order in which an owner merges its cells, and the static columns of their chunks."""
        slots = len(self.mine)
        by_rank = sorted(range(len(self.peers)), key=self.peers.__getitem__)
        cells = sorted(range(slots * len(self.peers)),
                       key=lambda cell: (self.mine[cell % slots].block,
                                         cell % slots, by_rank.index(cell // slots)))
        self.merge_order = column(cells)
        self.merge_chunks = column([[self.mine[cell % slots].block, 0, 0, 0,
                                     self.mine[cell % slots].shard.columns]
                                    for cell in cells]).reshape(-1, 5)

    def forward(self, outgoing: Outgoing, incoming: Incoming) -> Buffer:
        """Rows: owners send, sources receive."""
        slots, cells = self._vectors(outgoing, incoming)
        return self._place(slots * self.read, cells * self.my_read.view(-1), owner_sends=True)

    def backward(self, outgoing: Outgoing, incoming: Incoming) -> Buffer:
        """Gradients: sources send, owners receive."""
        return self._place(*self._vectors(outgoing, incoming), owner_sends=False)

    def table_bytes(self, sizes: Tensor, *, cells: bool) -> list[int]:
        """Bytes by table of what leaves this rank.

        Args:
            sizes: int64 bytes of every slot, or of every cell.
            cells: they are of cells.
        """
        tables = self._cell_tables if cells else self._slot_tables
        away = sizes.numel() - (len(self.mine) if cells else self._per_peer[-1])
        total = torch.zeros(len(self.layout.tables), dtype=torch.int64)
        found: list[int] = total.index_add_(0, tables[:away], sizes[:away]).tolist()
        return found

    def _vectors(self, outgoing: Outgoing, incoming: Incoming) -> tuple[Tensor, Tensor]:
        """Rows or bags of every slot and of every cell."""
        size = torch.tensor(outgoing.batch.size)
        slots = torch.where(self.pooled, size, outgoing.counts)
        sizes = column(incoming.sizes)[:, None]
        return slots, torch.where(self.my_pooled, sizes, incoming.counts).view(-1)

    def _place(self, slot_vectors: Tensor, cell_vectors: Tensor, *, owner_sends: bool) -> Buffer:
        if owner_sends:
            slots, cells, head = (self.forward_slots.sizes(slot_vectors),
                                  self.forward_cells.sizes(cell_vectors), 0)
        else:
            slots, cells, head = (self.backward_slots.sizes(slot_vectors),
                                  self.backward_cells.sizes(cell_vectors),
                                  SCALE_BYTES if self.scale_limit is not None else 0)
        slot_parts = [int(part.sum()) + head for part in slots.split(self._per_peer)]
        cell_parts = (cells.view(len(self.peers), -1).sum(1) + head).tolist()
        sent, received = (cell_parts, slot_parts) if owner_sends else (slot_parts, cell_parts)
        assert sent[-1] == received[-1], "source and owner see different cells at home"
        travels, arrives = sum(sent[:-1]), sum(received[:-1])
        slot_heads = _starts(slot_parts, home=travels + arrives, before=travels * owner_sends)
        cell_heads = _starts(cell_parts, home=travels + arrives,
                             before=travels * (not owner_sends))
        slot_at = slots.cumsum(0) - slots
        cell_at = cells.cumsum(0) - cells
        # Offsets inside the parts become offsets in the buffer.
        slot_at += _shifts(slots, self._per_peer, slot_heads, head)
        cell_at += _shifts(cells, [len(self.mine)] * len(self.peers), cell_heads, head)
        return Buffer(travels + arrives + sent[-1], travels, arrives, slot_at, cell_at,
                      self._by_rank(slot_parts), self._by_rank(cell_parts), slot_vectors,
                      cell_vectors, slot_heads if head else [], cell_heads if head else [])

    def _by_rank(self, parts: list[int]) -> list[int]:
        sizes = [0] * len(self.peers)
        for peer, size in zip(self.peers[:-1], parts, strict=False):
            sizes[peer] = size
        return sizes


def _starts(parts: list[int], home: int, before: int) -> list[int]:
    """Where every rank's part begins: one behind the other from ``before``, the last at home."""
    edges = [0, *accumulate(parts)]
    return [*(before + edge for edge in edges[:len(parts) - 1]), home]


def _shifts(sizes: Tensor, per_part: list[int], starts: list[int], head: int) -> Tensor:
    """What turns sums of ``sizes`` over all parts into places in parts that begin at ``starts``."""
    summed = [int(part.sum()) for part in sizes.split(per_part)]
    before = [0, *accumulate(summed)][:len(summed)]
    shift = column([start + head - first for start, first in zip(starts, before, strict=True)])
    return shift.repeat_interleave(column(per_part))


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
