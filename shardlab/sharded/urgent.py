"""Urgent gradients first: only those of rows that the next batch asks for must arrive before it.

    backward of batch i       urgent gradients leave; owners step their rows in `optimizer.step`
    batch i + 1 is looked up  early rows are here, late rows have been stepped
    batch i + 1 trains        the rest leaves in the thread that looks ahead, which steps its rows,
                              and then exchanges batch i + 2

The owners mark urgent ids when batch i + 1 is announced (`early`). Every row is stepped once, by
the same sum in the same order of ranks, with the same step number: the bits are those of one
message and one update. It needs no lock: rows of the rest are in batch i and not in batch i + 1, so
that nothing touches them before the next update, which waits; whoever else reads rows waits, too
(`Announcements.settle`).

Source: own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from shardlab.comm import Work
from shardlab.ops.rows import ROW_WISE
from shardlab.sharded.cells import Buffer, CellIndex
from shardlab.sharded.early import Asked
from shardlab.sharded.gradients import PendingGradients, owner_chunks
from shardlab.sharded.layout import Layout
from shardlab.sharded.messages import Incoming
from shardlab.sharded.wire_gradients import GradientSender, Part, SlotSums
from shardlab.storage_specs import RowsSpec

Send = Callable[[Tensor, Buffer], Work]


def can_part(layout: Layout, optimizer: str) -> bool:
    """Whether gradients of these tables may travel in two parts; the same on every rank.

    All rows must be exchanged as unique rows and lie in one level: caches move other rows when
    they are read, bags are sums over both parts, and other kinds step as a whole. Copies of hot
    rows, and row-wise states of rows that are cut by columns, need all ranks at every update. Rests
    of rounding are kept backward by backward.

    Args:
        layout: the compiled plan.
        optimizer: kind of row optimiser.
    """
    storages = [plan.storage for plan in layout.plans]
    cut = any(slot.shard.columns < layout.tables[slot.table].embedding_dim
              for slot in layout.slots)
    return (all(isinstance(spec, RowsSpec) and len(spec.levels) == 1 for spec in storages)
            and all(slot.feature < 0 for slot in layout.slots)
            and not any(layout.hot_rows)
            and not any(wire.error_feedback for wire in layout.wires)
            and not (cut and optimizer in ROW_WISE))


@dataclass(frozen=True)
class Parting:
    """How a batch's gradients part, at both ends.

    Attributes:
        whole: place of all of them.
        parts: the urgent ones, and the rest: place; number of every row among all of its slot's;
            and what this rank was asked for.
    """

    whole: Buffer
    parts: tuple[tuple[Buffer, Tensor, Incoming], ...]


class PartedSender:
    """Sends a backward's gradients in two parts.

    Args:
        cells: where cells lie.
        sender: encodes and decodes.
        lap: is told when a phase ends.
    """

    def __init__(self, cells: CellIndex, sender: GradientSender,
                 lap: Callable[[str], None]) -> None:
        self._cells, self._sender, self._lap = cells, sender, lap

    def plan(self, asked: Asked) -> Parting:
        """How the gradients of a batch part whose urgent ids are marked; from any thread."""
        parts = []
        for urgent in (True, False):
            outgoing, incoming, numbers = asked.marked(urgent)
            parts.append((self._cells.backward(outgoing, incoming), numbers, incoming))
        return Parting(self._cells.backward(asked.outgoing, asked.incoming), tuple(parts))

    def send(self, parting: Parting, sums: SlotSums, device: torch.device,
             ways: tuple[Send, Send]) -> PendingGradients:
        """Starts to send them.

        Args:
            parting: of the batch.
            sums: of this rank.
            device: where gradients are.
            ways: of the urgent part, and of the rest; they start to send.

        Returns:
            The urgent ones; the others are their ``rest``.
        """
        parts = [Part(torch.empty(place.total, dtype=torch.uint8, device=device), place, numbers)
                 for place, numbers, _ in parting.parts]
        self._sender.encode_parts(sums, parting.whole, parts)
        self._lap("pool")
        urgent, rest = (self._pending(part, incoming, way(part.buffer, part.place))
                        for part, (_, _, incoming), way in zip(parts, parting.parts, ways,
                                                               strict=True))
        return replace(urgent, rest=rest)

    def _pending(self, part: Part, incoming: Incoming, work: Work) -> PendingGradients:
        grads, start, work = self._sender.receive(part.buffer, part.place, work)
        chunks = owner_chunks(self._cells, incoming, start, None)
        return PendingGradients(incoming.ids, chunks, None, None, grads, work)
