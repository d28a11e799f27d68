"""Where every cell lies in the buffers of rows and of gradients: index arithmetic only.

A buffer is [what travels | what arrives | what stays]. In the forward direction the owner fills the
first part and the source reads the other two; gradients go the other way round.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shardlab.sharded.layout import Layout, column
from shardlab.sharded.messages import Incoming
from shardlab.sharded.routes import Outgoing


@dataclass(frozen=True)
class Buffer:
    """Element offsets of one direction's buffer.

    Attributes:
        total: elements.
        travels, arrives: elements sent to and received from other ranks.
        slot_offsets: int64 [slots] on CPU: this rank as the source.
        cell_offsets: int64 [ranks * own slots] on CPU: this rank as the owner.
        slot_splits, cell_splits: elements by rank, for the collective.
    """

    total: int
    travels: int
    arrives: int
    slot_offsets: Tensor
    cell_offsets: Tensor
    slot_splits: list[int]
    cell_splits: list[int]


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
        replicated = [layout.local_shards[slot.block].replicated for slot in self.mine]
        # A replica is read at home only; its gradients come from everywhere.
        self.my_read = torch.ones(len(self.peers), len(self.mine), dtype=torch.int64)
        self.my_read[:-1, column(replicated).bool()] = 0

        self._set_up_merge()

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
        slots, cells = self._elements(outgoing, incoming)
        return self._place(slots * self.read, cells * self.my_read.view(-1), owner_sends=True)

    def backward(self, outgoing: Outgoing, incoming: Incoming) -> Buffer:
        """Gradients: sources send, owners receive."""
        return self._place(*self._elements(outgoing, incoming), owner_sends=False)

    def _elements(self, outgoing: Outgoing, incoming: Incoming) -> tuple[Tensor, Tensor]:
        size = torch.tensor(outgoing.batch.size)
        slots = torch.where(self.pooled, size, outgoing.counts) * self.columns
        sizes = column(incoming.sizes)[:, None]
        cells = torch.where(self.my_pooled, sizes, incoming.counts) * self.my_columns
        return slots, cells.view(-1)

    def _place(self, slots: Tensor, cells: Tensor, *, owner_sends: bool) -> Buffer:
        slot_parts = [int(part.sum()) for part in slots.split(self._per_peer)]
        cell_parts = cells.view(len(self.peers), -1).sum(1).tolist()
        sent, received = (cell_parts, slot_parts) if owner_sends else (slot_parts, cell_parts)
        assert sent[-1] == received[-1], "source and owner see different cells at home"
        travels, arrives = sum(sent[:-1]), sum(received[:-1])
        sending, receiving = (cells, slots) if owner_sends else (slots, cells)
        receiving_at = travels + receiving.cumsum(0) - receiving
        sending_at = sending.cumsum(0) - sending
        home = len(self.mine) if owner_sends else self._per_peer[-1]
        if home:
            sending_at[-home:] += arrives
        slot_at, cell_at = (receiving_at, sending_at) if owner_sends else (sending_at, receiving_at)
        return Buffer(travels + arrives + sent[-1], travels, arrives, slot_at, cell_at,
                      self._by_rank(slot_parts), self._by_rank(cell_parts))

    def _by_rank(self, parts: list[int]) -> list[int]:
        sizes = [0] * len(self.peers)
        for peer, size in zip(self.peers[:-1], parts, strict=False):
            sizes[peer] = size
        return sizes
