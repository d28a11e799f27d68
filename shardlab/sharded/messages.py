"""Ids on the wire: what every rank asks of its owners, and what an owner got asked."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shardlab.comm import Groups, WireBytes, all_to_all
from shardlab.sharded.layout import Layout
from shardlab.sharded.routes import Outgoing

#: Words in front of the counts: batch size, bag length (-1: lengths follow), weighted.
_HEAD = 3


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
        self._peers = layout.peers
        self._slots = [layout.slots_of(rank) for rank in self._peers]
        self._pooled = [[i for i, slot in enumerate(slots) if slot.feature >= 0]
                        for slots in self._slots]

    def exchange(self, outgoing: Outgoing) -> Incoming:
        """Every rank calls it once per step."""
        counts = outgoing.counts.split([len(slots) for slots in self._slots])
        if self.layout.world_size == 1:
            return self._at_home(outgoing, counts[-1])
        heads = self._exchange_heads(outgoing, counts)
        sent = self._messages(outgoing, counts)
        mine, pooled = self._slots[-1], self._pooled[-1]
        sizes = [self._message_size(head, len(mine), pooled) for head in heads]
        received = torch.empty(sum(sizes[:-1]), dtype=self.layout.wire_dtype,
                               device=self.groups.device)
        out_splits, in_splits = self._by_rank(sizes), self._by_rank([len(m) for m in sent])
        all_to_all(received, torch.cat(sent[:-1]), out_splits, in_splits, self.groups, "ids").wait()
        self.wire.ids_bytes += sum(in_splits) * received.element_size()
        parts = [*received.split(sizes[:-1]), sent[-1]]
        read = [self._read(part, head) for part, head in zip(parts, heads, strict=True)]
        return Incoming(
            torch.cat([ids for ids, _, _ in read]).long(), torch.stack([h[_HEAD:] for h in heads]),
            [int(head[0]) for head in heads], [lengths for _, lengths, _ in read],
            [weights for _, _, weights in read])

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

    def _exchange_heads(self, outgoing: Outgoing, counts: tuple[Tensor, ...]) -> list[Tensor]:
        """int64 heads of all asking ranks, on CPU, in slot order."""
        batch, device = outgoing.batch, self.groups.device
        length = batch.length if outgoing.lengths is None else -1
        head = torch.tensor([batch.size, length, batch.weights is not None])
        sent = [torch.cat([head, count]) for count in counts]
        width = _HEAD + len(self._slots[-1])
        received = torch.empty((len(self._peers) - 1) * width, dtype=torch.int64, device=device)
        splits = self._by_rank([len(part) for part in sent])
        all_to_all(received, torch.cat(sent[:-1]).to(device),
                   self._by_rank([width] * (len(self._peers) - 1)), splits, self.groups,
                   "ids").wait()
        self.wire.ids_bytes += sum(splits) * received.element_size()
        return [*received.cpu().view(-1, width), sent[-1]]

    def _messages(self, outgoing: Outgoing, counts: tuple[Tensor, ...]) -> list[Tensor]:
        """ids | lengths | weights for every rank, in slot order, in the wire dtype."""
        totals = [int(count.sum()) for count in counts]
        ids = outgoing.ids.split(totals)
        if outgoing.lengths is None and outgoing.weights is None:
            return list(ids)
        pooled = [len(slots) for slots in self._pooled]
        dtype = self.layout.wire_dtype
        messages: list[list[Tensor]] = [[part] for part in ids]
        if outgoing.lengths is not None:
            for message, part in zip(messages, outgoing.lengths.split(pooled), strict=True):
                message.append(part.reshape(-1).to(dtype))
        if outgoing.weights is not None:
            entries = [int(count[slots].sum())
                       for count, slots in zip(counts, self._pooled, strict=True)]
            for message, part in zip(messages, outgoing.weights.split(entries), strict=True):
                message.append(part.view(torch.int32).to(dtype))
        return [torch.cat(message) for message in messages]

    def _message_size(self, head: Tensor, slots: int, pooled: list[int]) -> int:
        size, length, weighted = head[:_HEAD].tolist()
        counts = head[_HEAD:_HEAD + slots]
        return int(counts.sum()) + (len(pooled) * size if length < 0 and pooled else 0) \
            + (int(counts[pooled].sum()) if weighted else 0)

    def _read(self, message: Tensor, head: Tensor) -> tuple[Tensor, int | Tensor, Tensor | None]:
        """(ids, bag lengths, weights) of one rank's message."""
        size, length, weighted = head[:_HEAD].tolist()
        pooled = self._pooled[-1]
        counts = head[_HEAD:]
        end = int(counts.sum())
        ids, lengths = message[:end], length
        if length < 0 and pooled:
            lengths = message[end:end + len(pooled) * size].long().view(len(pooled), size)
            end += len(pooled) * size
        weights = message[end:].to(torch.int32).view(torch.float32) if weighted and pooled else None
        return ids, lengths, weights
