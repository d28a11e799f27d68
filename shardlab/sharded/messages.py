"""Ids on the wire: what every rank asks of its owners, and what an owner got asked."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from shardlab.comm import Groups, WireBytes, all_to_all
from shardlab.ops.cells import read_heads, sum_parts
from shardlab.ops.id_bytes import pack_bytes, unpack_bytes
from shardlab.sharded.layout import Layout, column
from shardlab.sharded.routes import Outgoing
from shardlab.wire_bytes import HEAD_NUMBER_BYTES, HEAD_NUMBERS, id_bytes

_FP32_BYTES = 4


@dataclass(frozen=True)
class Incoming:
    """What this rank got asked, cell by cell: asking ranks in slot order, its own slots in order.

    Attributes:
        ids: int64 [sum of counts], rows of the shards.
        counts: int64 [ranks, slots] on CPU.
        sizes: samples of every asking rank, in slot order of ranks.
        bag_lengths: per asking rank: a fixed bag length, or int64 [pooled slots, size].
        weights: per asking rank fp32, entries of the pooled slots; or None.
    """

    ids: Tensor
    counts: Tensor
    sizes: list[int]
    bag_lengths: list[int | Tensor]
    weights: list[Tensor | None]

    @cached_property
    def starts(self) -> Tensor:
        """int64 [ranks * slots] on CPU: first id of every cell."""
        counts = self.counts.view(-1)
        return counts.cumsum(0) - counts


class IdExchange:
    """Sends every rank's `Outgoing` to the owners: one all-to-all of counts, one of ids.

    Counts travel ahead of the ids since gloo and NCCL both need to know what they receive.

    Args:
        layout: the compiled plan.
        groups: the ranks.
        wire: counts the bytes.
    """

    def __init__(self, layout: Layout, groups: Groups, wire: WireBytes) -> None:
        self.layout, self.groups, self.wire = layout, groups, wire
        self._widths = column([slot.id_bytes for slot in layout.slots])
        self._is_pooled = column([int(slot.feature >= 0) for slot in layout.slots])
        self._away = [slot.table for slot in layout.slots if slot.rank != layout.rank]
        self._peers = layout.peers
        slots = [layout.slots_of(rank) for rank in self._peers]
        self._slots_of = [len(part) for part in slots]
        self._pooled = [[i for i, slot in enumerate(part) if slot.feature >= 0] for part in slots]
        #: Of this rank's own slots: (bytes of an id, whether pooled).
        self._mine = column([[slot.id_bytes, int(slot.feature >= 0)]
                             for slot in slots[-1]]).view(-1, 2)

    def exchange(self, outgoing: Outgoing) -> Incoming:
        """Every rank calls it once per step."""
        if self.layout.world_size == 1:
            return self._at_home(outgoing)
        lengths = self._length_bytes(outgoing)
        heads = self._exchange_heads(outgoing, lengths)
        sent, sent_sizes = self._messages(outgoing, lengths)
        counts, pieces, sizes = read_heads(heads, self._mine)
        received = torch.empty(sum(sizes), dtype=torch.uint8, device=self.groups.device)
        away, sent_away = sum(sizes[:-1]), sum(sent_sizes[:-1])
        in_splits = self._by_rank(sent_sizes)
        work = all_to_all(received[:away], sent[:sent_away], self._by_rank(sizes), in_splits,
                          self.groups, "ids")
        received[away:] = sent[sent_away:]
        self.wire.count(0, in_splits, self.groups)
        self._count(outgoing, lengths)
        work.wait()
        ids = unpack_bytes(received, pieces, int(counts.sum()))
        return Incoming(ids, counts, *self._extras(received, counts, heads))

    @staticmethod
    def _at_home(outgoing: Outgoing) -> Incoming:
        batch = outgoing.batch
        lengths = batch.length if outgoing.lengths is None else outgoing.lengths
        return Incoming(outgoing.ids, outgoing.counts[None], [batch.size], [lengths],
                        [outgoing.weights])

    def _by_rank(self, per_peer: list[int]) -> list[int]:
        """Sizes by rank out of sizes in slot order; nothing goes to this rank itself."""
        sizes = [0] * self.layout.world_size
        for peer, size in zip(self._peers[:-1], per_peer, strict=False):
            sizes[peer] = size
        return sizes

    def _count(self, outgoing: Outgoing, length_bytes: int) -> None:
        """Counts ids, their number and lengths of bags by table."""
        sizes = outgoing.counts * self._widths + HEAD_NUMBER_BYTES
        sizes = sizes + self._is_pooled * (outgoing.batch.size * length_bytes)
        if outgoing.weights is not None:
            sizes = sizes + self._is_pooled * outgoing.counts * _FP32_BYTES
        names = [self.layout.tables[table].name for table in self._away]
        self.wire.add(0, names, sizes.tolist()[:len(names)])

    @staticmethod
    def _length_bytes(outgoing: Outgoing) -> int:
        """Bytes that the lengths of this rank's bags need; 0 where all have one length."""
        lengths = outgoing.lengths
        if lengths is None:
            return 0
        return id_bytes(int(lengths.max()) + 1 if lengths.numel() else 1)

    def _exchange_heads(self, outgoing: Outgoing, length_bytes: int) -> Tensor:
        """int32 [ranks, 4 + own slots]: heads of all asking ranks, on CPU, in slot order."""
        batch, device = outgoing.batch, self.groups.device
        length = batch.length if outgoing.lengths is None else -1
        head = torch.tensor([batch.size, length, length_bytes, batch.weights is not None])
        parts = [part for counts in outgoing.counts.split(self._slots_of)
                 for part in (head, counts)]
        sent = torch.cat(parts).to(device, torch.int32)
        ranks, width = len(self._peers), HEAD_NUMBERS + self._slots_of[-1]
        heads = torch.empty(ranks, width, dtype=torch.int32, device=device)
        away = sent.numel() - width
        splits = self._by_rank([HEAD_NUMBERS + count for count in self._slots_of])
        work = all_to_all(heads[:-1].view(-1), sent[:away], self._by_rank([width] * ranks), splits,
                          self.groups, "ids")
        heads[-1] = sent[away:]
        self.wire.count(0, [HEAD_NUMBER_BYTES * size for size in splits], self.groups)
        work.wait()
        return heads.cpu()

    def _messages(self, outgoing: Outgoing, length_bytes: int) -> tuple[Tensor, list[int]]:
        """uint8 ids | lengths | weights for every rank, in slot order, and the bytes of each."""
        totals = sum_parts(outgoing.counts, self._widths, self._slots_of)
        if outgoing.lengths is None and outgoing.weights is None:
            return outgoing.ids, totals
        messages: list[list[Tensor]] = [[part] for part in outgoing.ids.split(totals)]
        pooled = [len(slots) for slots in self._pooled]
        if outgoing.lengths is not None:
            for message, part in zip(messages, outgoing.lengths.split(pooled), strict=True):
                piece = torch.tensor([[0, part.numel(), 0, 0, length_bytes]])
                message.append(pack_bytes(part.reshape(-1), piece, part.numel() * length_bytes))
        if outgoing.weights is not None:
            entries = sum_parts(outgoing.counts, self._is_pooled, self._slots_of)
            for message, part in zip(messages, outgoing.weights.split(entries), strict=True):
                message.append(part.contiguous().view(torch.uint8))
        joined = [torch.cat(message) for message in messages]
        return torch.cat(joined), [len(message) for message in joined]

    def _extras(self, messages: Tensor, counts: Tensor, heads: Tensor,
                ) -> tuple[list[int], list[int | Tensor], list[Tensor | None]]:
        """(samples, lengths of bags, weights) by asking rank, out of what follows the ids."""
        pooled, numbers = self._pooled[-1], heads[:, :HEAD_NUMBERS].tolist()
        lengths: list[int | Tensor] = [length for _, length, _, _ in numbers]
        weights: list[Tensor | None] = [None] * len(numbers)
        samples = [size for size, _, _, _ in numbers]
        if not pooled:
            return samples, lengths, weights
        ids, end = (counts * self._mine[:, 0]).sum(1).tolist(), 0
        for rank, (size, length, length_bytes, weighted) in enumerate(numbers):
            end += ids[rank]
            many = len(pooled) * size
            if length < 0:
                piece = torch.tensor([[end, many, length_bytes, 0]])
                lengths[rank] = unpack_bytes(messages, piece, many).view(len(pooled), size)
                end += many * length_bytes
            if weighted:
                tail = _FP32_BYTES * int(counts[rank][pooled].sum())
                # A copy begins at a whole word, whatever lies in front of the weights.
                weights[rank] = messages[end:end + tail].clone().view(torch.float32)
                end += tail
        return samples, lengths, weights
