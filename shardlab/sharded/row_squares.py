"""Row-wise optimisers on column-wise shards: the squares of a whole row's gradient.

A row-wise state is the mean over all columns of a row. Owners of its column pieces hold the same
rows (they get the same ids), so each sends its partial sums of squares to the others: 4 bytes per
row and peer, with sizes that both sides know.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shardlab.comm import Groups, WireBytes, all_to_all
from shardlab.ops.unique import Uniques
from shardlab.sharded.layout import Layout
from shardlab.storage_specs import TensorTrainSpec
from shardlab.table_plan import Shard

_FP32_BYTES = 4


class RowSquares:
    """Exchanges partial sums of squares between the column shards of the same rows.

    Args:
        layout: the compiled plan.
        groups: the ranks.
        wire: counts the bytes.
    """

    def __init__(self, layout: Layout, groups: Groups, wire: WireBytes) -> None:
        self.layout, self.groups, self.wire = layout, groups, wire
        owned = {rank: _owned(layout, rank) for rank in range(layout.world_size)}
        mine = owned[layout.rank]
        #: Blocks whose rows have columns elsewhere, or in another block here.
        self.blocks = [block for block, (table, shard) in enumerate(mine)
                       if _is_cut(layout, table, shard)]
        #: By rank: the blocks here of whose rows it has other columns.
        self._send = {r: [b for b in self.blocks if _shares(mine[b], theirs)]
                      for r, theirs in owned.items()}
        # What a rank sends here, as (its shard, a block of the same rows here for the size).
        self._receive = {r: [(shard, next(b for b in self.blocks if _same_rows(mine[b], shard)))
                             for shard in theirs if any(_same_rows(mine[b], shard)
                                                        for b in self.blocks)]
                         for r, theirs in owned.items()}
        self._mine = mine
        # Gathering is collective: all ranks take part as soon as any table is cut by columns.
        self.needed = any(_is_cut(layout, t, shard)
                          for found in owned.values() for t, shard in found)

    def complete(self, uniques: Uniques, partial: dict[int, Tensor]) -> Tensor:
        """Means of squares over whole rows.

        Args:
            uniques: rows by block.
            partial: for each of `blocks`, fp32 [its rows in ``uniques``]: sums of squares over
                the columns that lie here.

        Returns:
            fp32 [rows in ``uniques``]; -1 for rows of other blocks, whose mean is the block's own.
        """
        received = self._exchange(uniques, partial)
        means = torch.full((uniques.ids.numel(),), -1.0, device=uniques.ids.device)
        splits = uniques.splits.tolist()
        for block in self.blocks:
            table, _ = self._mine[block]
            parts = [(self._mine[b][1].col_start, partial[b]) for b in self.blocks
                     if _same_rows(self._mine[b], self._mine[block])]
            parts += [(s.col_start, values) for (t, s), values in received
                      if _same_rows((t, s), self._mine[block])]
            total = torch.stack([values for _, values in sorted(parts, key=lambda p: p[0])]).sum(0)
            means[splits[block]:splits[block + 1]] = \
                total / self.layout.tables[table].embedding_dim
        return means

    def _exchange(self, uniques: Uniques,
                  partial: dict[int, Tensor]) -> list[tuple[tuple[int, Shard], Tensor]]:
        """What the other ranks sent, shard by shard."""
        if self.layout.world_size == 1:
            return []
        splits = uniques.splits.tolist()
        sizes = [[splits[b + 1] - splits[b] for _, b in self._receive[r]] if r != self.layout.rank
                 else [] for r in range(self.layout.world_size)]
        sent = [[partial[b] for b in self._send[r]] if r != self.layout.rank else []
                for r in range(self.layout.world_size)]
        flat = [part for parts in sent for part in parts]
        device = uniques.ids.device
        source = torch.cat(flat) if flat else torch.empty(0, device=device)
        out = torch.empty(sum(map(sum, sizes)), device=device)
        source_splits = [sum(part.numel() for part in parts) for parts in sent]
        all_to_all(out, source, [sum(part) for part in sizes], source_splits, self.groups,
                   "update").wait()
        self.wire.count(2, [_FP32_BYTES * size for size in source_splits], self.groups)
        shards = [shard for r in range(self.layout.world_size) if r != self.layout.rank
                  for shard, _ in self._receive[r]]
        every = [size for part in sizes for size in part]
        return list(zip(shards, out.split(every), strict=True)) if every else []


def _is_cut(layout: Layout, table: int, shard: Shard) -> bool:
    """Whether a row's state needs columns of other shards; of tensor trains, only cached rows."""
    storage = layout.plans[table].storage
    has_rows = not isinstance(storage, TensorTrainSpec) or storage.cache_fraction > 0
    return shard.columns < layout.tables[table].embedding_dim and has_rows


def _owned(layout: Layout, rank: int) -> list[tuple[int, Shard]]:
    """(table, shard) of every block of a rank, in order."""
    found: dict[int, tuple[int, Shard]] = {}
    for slot in layout.slots:
        if slot.rank == rank:
            found[slot.block] = (slot.table, slot.shard)
    return [found[block] for block in sorted(found)]


def _same_rows(one: tuple[int, Shard], other: tuple[int, Shard]) -> bool:
    (t, a), (u, b) = one, other
    return t == u and (a.row_start, a.row_end) == (b.row_start, b.row_end)


def _shares(one: tuple[int, Shard], others: list[tuple[int, Shard]]) -> bool:
    return any(_same_rows(one, other) for other in others)
