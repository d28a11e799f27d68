"""Rows of several shards, sent to replicas: which they are, and fp32 numbers of each.

    head     int64 per shard: how many rows                     (one transfer)
    body     row numbers, in as few bytes as a shard needs;     (one transfer)
             filled up to a whole word; fp32 numbers, shard by shard
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from shardlab.comm import Groups, WireBytes, gather_parts, send_parts
from shardlab.ops.id_bytes import pack_bytes, unpack_bytes
from shardlab.ops.unique import split_sorted
from shardlab.sharded.layout import column
from shardlab.wire_bytes import cell_bytes, id_bytes

_FP32_BYTES, _INT64_BYTES = 4, 8
_PHASE = "sync"

#: Splits int64 [shards + 1] on CPU, rows int64 [n], numbers fp32, flat.
Part = tuple[Tensor, Tensor, Tensor]


class RowMessages:
    """Exchanges rows with the ranks that hold the same shards.

    Args:
        rows: of every shard.
        groups: these ranks; uses their `exchange` lane.
    """

    def __init__(self, rows: Sequence[int], groups: Groups) -> None:
        self._groups = groups
        self._widths = column([id_bytes(count) for count in rows])
        count = groups.world_size
        cuts = [[shard, size * cut // count] for shard, size in enumerate(rows)
                for cut in range(1, count)]
        self._cuts = column(cuts).reshape(-1, 2)

    def gather(self, ids: Tensor, splits: Tensor, numbers: Tensor, columns: Tensor,
               wire: WireBytes) -> list[Part]:
        """Every rank's rows, by rank; every rank calls it.

        Args:
            ids: int64 [n], rows of their shards, shard by shard.
            splits: int64 [shards + 1] on CPU: where shards begin.
            numbers: fp32, flat: ``columns[shard]`` of every row.
            columns: int64 [shards] on CPU.
            wire: counts the bytes.
        """
        groups, own = self._groups, self._groups.rank
        shards = len(self._widths)
        heads = torch.stack(gather_parts(splits.diff().to(ids.device),
                                         [shards] * groups.world_size, groups, _PHASE)).cpu()
        sizes = [self._sizes(head, columns) for head in heads]
        body = self._body((splits, ids, numbers))
        bodies = gather_parts(body, [sum(size) for size in sizes], groups, _PHASE)
        self._count(wire, [body] * groups.world_size)
        return [(splits, ids, numbers) if rank == own else self._read(heads[rank], found, size[0])
                for rank, (found, size) in enumerate(zip(bodies, sizes, strict=True))]

    def scatter(self, ids: Tensor, splits: Tensor, numbers: Tensor, columns: Tensor,
                wire: WireBytes) -> list[Part]:
        """By rank, its rows in this rank's range of every shard; every rank calls it.

        Ranges are equal; which is whose goes round from shard to shard, so that a range that is
        touched more than others is not always the same rank's. Arguments as for `gather`; ids
        ascend within their shards.
        """
        groups, own = self._groups, self._groups.rank
        mine = self._by_range(ids, splits, numbers, columns)
        counts = [part[0].diff().to(ids.device) for part in mine]
        shards = len(self._widths)
        heads = torch.stack(send_parts(counts, [shards] * groups.world_size, groups,
                                       _PHASE)).cpu()
        sizes = [self._sizes(head, columns) for head in heads]
        bodies = [self._body(part) for part in mine]
        found = send_parts(bodies, [sum(size) for size in sizes], groups, _PHASE)
        self._count(wire, bodies)
        return [mine[own] if rank == own else self._read(heads[rank], body, size[0])
                for rank, (body, size) in enumerate(zip(found, sizes, strict=True))]

    def _count(self, wire: WireBytes, bodies: list[Tensor]) -> None:
        """Bodies by rank, and the heads before them."""
        head = _INT64_BYTES * len(self._widths)
        wire.count(3, [(body.numel() + head) * (rank != self._groups.rank)
                       for rank, body in enumerate(bodies)], self._groups)

    def _by_range(self, ids: Tensor, splits: Tensor, numbers: Tensor,
                  columns: Tensor) -> list[Part]:
        """The rows in every rank's ranges, by rank."""
        count, shards = self._groups.world_size, len(self._widths)
        cuts = split_sorted(ids, splits, self._cuts).view(shards, count - 1)
        edges = torch.cat([splits[:-1, None], cuts, splits[1:, None]], 1).tolist()
        first, parts = (splits.diff() * columns).cumsum(0) - splits.diff() * columns, []
        widths, begins = columns.tolist(), first.tolist()
        for rank in range(count):
            spans = [edges[shard][(rank - shard) % count:][:2] for shard in range(shards)]
            found = [ids[low:high] for low, high in spans]
            values = [numbers[begin + (low - edge[0]) * width:begin + (high - edge[0]) * width]
                      for (low, high), edge, begin, width in zip(spans, edges, begins, widths,
                                                                 strict=True)]
            ends = column([0, *(high - low for low, high in spans)]).cumsum(0)
            parts.append((ends, torch.cat([ids[:0], *found]), torch.cat([numbers[:0], *values])))
        return parts

    def _sizes(self, head: Tensor, columns: Tensor) -> tuple[int, int]:
        """Bytes of the row numbers, filled up, and of what belongs to the rows."""
        return (cell_bytes(int((head * self._widths).sum()), 1),
                _FP32_BYTES * int((head * columns).sum()))

    def _body(self, part: Part) -> Tensor:
        splits, ids, numbers = part
        counts = splits.diff()
        bytes_of = counts * self._widths
        pieces = torch.stack([splits[:-1], counts, torch.zeros_like(counts),
                              bytes_of.cumsum(0) - bytes_of, self._widths], 1)
        total = int(bytes_of.sum())
        packed = pack_bytes(ids.contiguous(), pieces, total)
        filling = packed.new_zeros(cell_bytes(total, 1) - total)
        return torch.cat([packed, filling, numbers.view(torch.uint8)])

    def _read(self, head: Tensor, body: Tensor, id_size: int) -> Part:
        bytes_of = head * self._widths
        ends = head.cumsum(0)
        pieces = torch.stack([bytes_of.cumsum(0) - bytes_of, head, self._widths, ends - head], 1)
        ids = unpack_bytes(body[:id_size].contiguous(), pieces, int(head.sum()))
        splits = torch.cat([torch.zeros(1, dtype=torch.int64), ends])
        # A copy begins at a whole word, wherever the part lies.
        return splits, ids, body[id_size:].clone().view(torch.float32)
