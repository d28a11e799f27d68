"""Ids on the wire: what every rank asks of its owners, and what an owner got asked."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from shardlab.comm import Groups, WireBytes, all_to_all
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
        self._slots = [layout.slots_of(rank) for rank in self._peers]
        self._id_bytes = [column([slot.id_bytes for slot in slots]) for slots in self._slots]
        self._pooled = [[i for i, slot in enumerate(slots) if slot.feature >= 0]
                        for slots in self._slots]

    def exchange(self, outgoing: Outgoing) -> Incoming:
        """Every rank calls it once per step."""
        counts = outgoing.counts.split([len(slots) for slots in self._slots])
        if self.layout.world_size == 1:
            return self._at_home(outgoing, counts[-1])
        lengths = self._length_bytes(outgoing)
        heads = self._exchange_heads(outgoing, counts, lengths)
        sent = self._messages(outgoing, counts, lengths)
        sizes = [self._message_size(head) for head in heads]
        received = torch.empty(sum(sizes[:-1]), dtype=torch.uint8, device=self.groups.device)
        out_splits, in_splits = self._by_rank(sizes), self._by_rank([len(m) for m in sent])
        all_to_all(received, torch.cat(sent[:-1]), out_splits, in_splits, self.groups, "ids").wait()
        self.wire.count(0, in_splits, self.groups)
        self._count(outgoing, lengths)
        return self._read(torch.cat([received, sent[-1]]), sizes, heads)

    def _at_home(self, outgoing: Outgoing, counts: Tensor) -> Incoming:
        batch = outgoing.batch
        lengths = batch.length if outgoing.lengths is None else outgoing.lengths
        return Incoming(outgoing.ids, counts[None], [batch.size], [lengths], [outgoing.weights])

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

    def _exchange_heads(self, outgoing: Outgoing, counts: tuple[Tensor, ...],
                        length_bytes: int) -> list[Tensor]:
        """int64 heads of all asking ranks, on CPU, in slot order."""
        batch, device = outgoing.batch, self.groups.device
        length = batch.length if outgoing.lengths is None else -1
        head = torch.tensor([batch.size, length, length_bytes, batch.weights is not None])
        sent = [torch.cat([head, count]).to(torch.int32) for count in counts]
        width = HEAD_NUMBERS + len(self._slots[-1])
        received = torch.empty((len(self._peers) - 1) * width, dtype=torch.int32, device=device)
        splits = self._by_rank([len(part) for part in sent])
        all_to_all(received, torch.cat(sent[:-1]).to(device),
                   self._by_rank([width] * (len(self._peers) - 1)), splits, self.groups,
                   "ids").wait()
        self.wire.count(0, [HEAD_NUMBER_BYTES * size for size in splits], self.groups)
        return [*received.cpu().view(-1, width).long(), sent[-1].long()]

    def _messages(self, outgoing: Outgoing, counts: tuple[Tensor, ...],
                  length_bytes: int) -> list[Tensor]:
        """uint8 ids | lengths | weights for every rank, in slot order."""
        totals = [int((count * widths).sum())
                  for count, widths in zip(counts, self._id_bytes, strict=True)]
        messages: list[list[Tensor]] = [[part] for part in outgoing.ids.split(totals)]
        pooled = [len(slots) for slots in self._pooled]
        if outgoing.lengths is not None:
            for message, part in zip(messages, outgoing.lengths.split(pooled), strict=True):
                piece = torch.tensor([[0, part.numel(), 0, 0, length_bytes]])
                message.append(pack_bytes(part.reshape(-1), piece, part.numel() * length_bytes))
        if outgoing.weights is not None:
            entries = [int(count[slots].sum())
                       for count, slots in zip(counts, self._pooled, strict=True)]
            for message, part in zip(messages, outgoing.weights.split(entries), strict=True):
                message.append(part.contiguous().view(torch.uint8))
        return [torch.cat(message) for message in messages]

    def _message_size(self, head: Tensor) -> int:
        """Bytes of the message that a head announces."""
        size, _, length_bytes, weighted = head[:HEAD_NUMBERS].tolist()
        counts, pooled = head[HEAD_NUMBERS:], self._pooled[-1]
        return int((counts * self._id_bytes[-1]).sum()) + len(pooled) * size * length_bytes \
            + (_FP32_BYTES * int(counts[pooled].sum()) if weighted else 0)

    def _read(self, messages: Tensor, sizes: list[int], heads: list[Tensor]) -> Incoming:
        """What all ranks' messages, one behind the other, ask of this one."""
        counts = torch.stack([head[HEAD_NUMBERS:] for head in heads])
        widths, pooled = self._id_bytes[-1], self._pooled[-1]
        first = column([0, *accumulate(sizes)][:-1])
        bytes_of = counts * widths
        at = first[:, None] + bytes_of.cumsum(1) - bytes_of
        flat = counts.view(-1)
        pieces = torch.stack([at.view(-1), flat, widths.repeat(len(heads)),
                              flat.cumsum(0) - flat], 1)
        ids = unpack_bytes(messages, pieces, int(flat.sum()))
        lengths: list[int | Tensor] = []
        weights: list[Tensor | None] = []
        for head, end in zip(heads, (first + bytes_of.sum(1)).tolist(), strict=True):
            samples, length, length_bytes, weighted = head[:HEAD_NUMBERS].tolist()
            many = len(pooled) * samples
            lengths.append(length)
            if length < 0 and pooled:
                piece = torch.tensor([[end, many, length_bytes, 0]])
                lengths[-1] = unpack_bytes(messages, piece, many).view(len(pooled), samples)
                end += many * length_bytes
            tail = _FP32_BYTES * int(head[HEAD_NUMBERS:][pooled].sum())
            # A copy begins at a whole word, whatever lies in front of the weights.
            weights.append(messages[end:end + tail].clone().view(torch.float32)
                           if weighted and pooled else None)
        return Incoming(ids, counts, [int(head[0]) for head in heads], lengths, weights)
