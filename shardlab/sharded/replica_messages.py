"""Rows of several shards, sent to every replica: which they are, and fp32 numbers of each.

    head     int64 per shard: how many rows                     (one transfer)
    body     row numbers, in as few bytes as a shard needs;     (one transfer)
             filled up to a whole word; fp32 numbers, shard by shard
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from shardlab.comm import Groups, WireBytes, gather_parts
from shardlab.ops.id_bytes import pack_bytes, unpack_bytes
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

    def exchange(self, ids: Tensor, splits: Tensor, numbers: Tensor, columns: Sequence[int],
                 wire: WireBytes) -> list[Part]:
        """Every rank's rows, by rank; every rank calls it.

        Args:
            ids: int64 [n], rows of their shards, shard by shard.
            splits: int64 [shards + 1] on CPU: where shards begin.
            numbers: fp32, flat: ``columns[shard]`` of every row.
            columns: of every shard.
            wire: counts the bytes.
        """
        count, shards = self._groups.world_size, len(self._widths)
        mine = splits.diff()
        heads = torch.stack(gather_parts(mine.to(ids.device), [shards] * count, self._groups,
                                         _PHASE)).cpu()
        sizes = [self._sizes(head, columns) for head in heads]
        own = self._body(ids, splits, numbers, sizes[self._groups.rank][0])
        bodies = gather_parts(own, [sum(size) for size in sizes], self._groups, _PHASE)
        wire.sync_bytes += (count - 1) * (own.numel() + _INT64_BYTES * shards)
        parts = []
        for rank, (head, body, size) in enumerate(zip(heads, bodies, sizes, strict=True)):
            if rank == self._groups.rank:
                parts.append((splits, ids, numbers))
            else:
                parts.append(self._read(head, body, size[0]))
        return parts

    def _sizes(self, head: Tensor, columns: Sequence[int]) -> tuple[int, int]:
        """Bytes of the row numbers, filled up, and of what belongs to the rows."""
        return (cell_bytes(int((head * self._widths).sum()), 1),
                _FP32_BYTES * int((head * column(columns)).sum()))

    def _body(self, ids: Tensor, splits: Tensor, numbers: Tensor, id_size: int) -> Tensor:
        counts = splits.diff()
        bytes_of = counts * self._widths
        pieces = torch.stack([splits[:-1], counts, torch.zeros_like(counts),
                              bytes_of.cumsum(0) - bytes_of, self._widths], 1)
        packed = pack_bytes(ids.contiguous(), pieces, int(bytes_of.sum()))
        filling = packed.new_zeros(id_size - packed.numel())
        return torch.cat([packed, filling, numbers.view(torch.uint8)])

    def _read(self, head: Tensor, body: Tensor, id_size: int) -> Part:
        bytes_of = head * self._widths
        ends = head.cumsum(0)
        pieces = torch.stack([bytes_of.cumsum(0) - bytes_of, head, self._widths, ends - head], 1)
        ids = unpack_bytes(body[:id_size].contiguous(), pieces, int(head.sum()))
        splits = torch.cat([torch.zeros(1, dtype=torch.int64), ends])
        # A copy begins at a whole word, wherever the part lies.
        return splits, ids, body[id_size:].clone().view(torch.float32)
