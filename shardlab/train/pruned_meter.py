"""What became of the chunks of pruned tables: present, admitted, evicted, rows by dimension."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from shardlab.chunk_layout import PARTS
from shardlab.comm.collectives import all_reduce_
from shardlab.comm.groups import Groups
from shardlab.sharded.pruning import pruned_part

if TYPE_CHECKING:
    from shardlab.sharded import ShardedModel

_COUNTS = ("present", "admitted", "evicted")


class PrunedMeter:
    """Counts of the pruned tables of a model, over all ranks.

    Args:
        model: the sharded model; every rank lists the same tables.
        groups: the ranks.
    """

    def __init__(self, model: ShardedModel, groups: Groups) -> None:
        self._collections, self._groups = list(model.collections().values()), groups
        self.tables = [table for collection in self._collections
                       for contest in collection.council.contests for table in contest.tables]
        self._chunks = max((table.embedding_dim // contest.spec.width
                            for collection in self._collections
                            for contest in collection.council.contests
                            for table in collection.tables if table.name in contest.tables),
                           default=0)

    def take(self) -> dict[str, Any]:
        """What a record of metrics says; every rank must call it. Empty without pruned tables.

        Returns:
            Chunks ``present``, and ``admitted`` and ``evicted`` since the start, by table;
            ``bytes`` held, and ``part_bytes``: of which parts (`chunk_layout.PARTS`);
            ``rows_by_chunks``: rows of all tables with so many chunks, where a row that is cut by
            columns counts once for every piece.
        """
        if not self.tables:
            return {}
        counts, rest = self._own()
        both = torch.cat([counts.view(-1), rest]).to(self._groups.device)
        numbers = [int(number) for number in all_reduce_(both, self._groups).tolist()]
        record: dict[str, Any] = {}
        for i, name in enumerate(_COUNTS):
            part = numbers[i * len(self.tables):(i + 1) * len(self.tables)]
            record[name] = dict(zip(self.tables, part, strict=True))
        behind = len(_COUNTS) * len(self.tables)
        parts = dict(zip(PARTS, numbers[behind:], strict=False))
        rows = enumerate(numbers[behind + len(PARTS):])
        return {**record, "bytes": sum(parts.values()), "part_bytes": parts,
                "rows_by_chunks": {str(chunks): count for chunks, count in rows if chunks}}

    def _own(self) -> tuple[Tensor, Tensor]:
        """fp64 [3, tables] and fp64 [parts + 1 + most chunks] of this rank: bytes by part, rows by
        chunks.
        """
        counts = torch.zeros(len(_COUNTS), len(self.tables), dtype=torch.float64)
        rest = torch.zeros(len(PARTS) + 1 + self._chunks, dtype=torch.float64)
        for collection in self._collections:
            storage = pruned_part(collection.storage)
            for store in range(0 if storage is None else len(storage.stores)):
                assert storage is not None
                bins, rows = storage.index.count(store, 1.0)
                parts = storage.part_bytes(store)
                rest[:len(PARTS)] += torch.tensor([parts[part] for part in PARTS])
                for block in storage.stores[store].blocks:
                    name = storage.shards[block].table.name
                    if name not in self.tables:
                        continue
                    at = self.tables.index(name)
                    counts[:, at] += torch.stack([
                        bins[block].sum(), storage.admitted[block], storage.evicted[block]])
                    rest[len(PARTS):][:rows.shape[1]] += rows[block]
        return counts, rest


def effective_dimensions(model: ShardedModel, table: str) -> tuple[Tensor, Tensor]:
    """Rows of a pruned table that this rank holds chunks of, and how many columns each has.

    Args:
        model: the sharded model.
        table: its name.

    Returns:
        int64 [n] rows of the table (hashed ids where it is unbounded), int32 [n] columns.
    """
    rows, columns = [torch.empty(0, dtype=torch.int64)], [torch.empty(0, dtype=torch.int32)]
    for collection in model.collections().values():
        storage = pruned_part(collection.storage)
        for block, local in enumerate([] if storage is None else storage.shards):
            if local.table.name == table:
                assert storage is not None
                found = storage.index.list_rows(block)
                rows.append(found.rows + local.shard.row_start)
                width = storage.pools.width(block)
                columns.append(((found.places >= 0).sum(1) * width).to(torch.int32))
    return torch.cat(rows), torch.cat(columns)
