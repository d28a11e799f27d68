"""Shards of several kinds on one rank: each kind in a storage of its own, seen as one.

Blocks keep the numbers that the plan's layout gave them. A kind's shards that follow each other are
a run; uniques of a run are a view, so that nothing is copied.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from shardlab.ops.records import MoveEnd
from shardlab.ops.step_parameters import StepParameters
from shardlab.ops.unique import Uniques
from shardlab.storage.base import LocalShard, PlacedJobs, Storage, TableChunk, read_codes
from shardlab.storage.pruned import PrunedStorage
from shardlab.storage.tensor_train import TensorTrainStorage
from shardlab.storage_bytes import TierBytes


class MixedStorage:
    """Several storages as one.

    Args:
        shards: all of the rank, in the layout's order.
        parts: storages, and which of the shards each holds, ascending.
    """

    def __init__(self, shards: list[LocalShard], parts: Mapping[Storage, list[int]]) -> None:
        self.shards, self.parts = shards, list(parts)
        #: Numbers of every part's shards.
        self.blocks = list(parts.values())
        self._part = torch.empty(len(shards), dtype=torch.int64)
        self._number = torch.empty(len(shards), dtype=torch.int64)
        for part, blocks in enumerate(parts.values()):
            self._part[blocks] = part
            self._number[blocks] = torch.arange(len(blocks))
        self._runs = _runs(self._part.tolist())

    def _mine(self, table: Tensor, part: int) -> Tensor:
        """The rows of a table of jobs or segments whose first column is a block of this part."""
        some = table[self._part[table[:, 0]] == part].clone()
        some[:, 0] = self._number[some[:, 0]]
        return some

    def read(self, segments: Tensor, ids: Tensor, out: Tensor) -> None:
        """Every part decodes its rows into ``out``."""
        for number, part in enumerate(self.parts):
            part.read(self._mine(segments, number), ids, out)

    def read_codes(self, segments: Tensor, ids: Tensor, out: MoveEnd) -> None:
        """Every part encodes its rows (`storage.base.read_codes`)."""
        for number, part in enumerate(self.parts):
            if len(mine := self._mine(segments, number)):
                read_codes(part, mine, ids, out)

    def part_of(self, block: int) -> tuple[Storage, int]:
        """The storage that holds a shard, and the shard's number there."""
        return self.parts[int(self._part[block])], int(self._number[block])

    def place_jobs(self, jobs: Tensor) -> PlacedJobs:
        """Jobs as they are: the parts place theirs."""
        return PlacedJobs(jobs, jobs)

    def read_pooled(self, jobs: PlacedJobs, index: Tensor, offsets: Tensor | None,
                    weights: Tensor | None, out: Tensor) -> None:
        """Every part pools its bags."""
        for number, part in enumerate(self.parts):
            mine = part.place_jobs(self._mine(jobs.jobs, number))
            part.read_pooled(mine, index, offsets, weights, out)

    def _uniques(self, uniques: Uniques) -> Iterator[tuple[Storage, Uniques, slice]]:
        """(storage, its uniques, where they lie among all) of every run that has some."""
        edges = uniques.splits.tolist()
        for part, first, last in self._runs:
            start, end = edges[first], edges[last]
            if start == end:
                continue
            storage, number = self.parts[part], int(self._number[first])
            splits = torch.zeros(len(storage.shards) + 1, dtype=torch.int64)
            splits[number:number + last - first + 1] = uniques.splits[first:last + 1] - start
            splits[number + last - first:] = end - start
            yield storage, Uniques(uniques.ids[start:end], splits,
                                   uniques.starts[start:end + 1], uniques.sources,
                                   uniques.positions), slice(start, end)

    def read_scattered(self, uniques: Uniques, weights: Tensor | None, out: Tensor) -> None:
        """Every part copies its rows."""
        for part, mine, _ in self._uniques(uniques):
            part.read_scattered(mine, weights, out)

    def begin_step(self, step: int) -> None:
        """Tells all parts."""
        for part in self.parts:
            part.begin_step(step)

    def update(self, uniques: Uniques, weights: Tensor | None, grads: Tensor,
               step: StepParameters, row_squares: Tensor | None = None) -> None:
        """Every part steps its rows."""
        for part, mine, where in self._uniques(uniques):
            part.update(mine, weights, grads, step,
                        None if row_squares is None else row_squares[where])

    def prefetch(self, segments: Tensor, ids: Tensor) -> None:
        """Tells every part."""
        for number, part in enumerate(self.parts):
            part.prefetch(self._mine(segments, number), ids)

    def cache_counts(self, block: int) -> list[int]:
        """Of the part that holds the shard."""
        part, number = self.part_of(block)
        return part.cache_counts(number)

    def tier_bytes(self) -> TierBytes:
        """Of all parts."""
        return sum((part.tier_bytes() for part in self.parts), TierBytes())

    def chunks(self, max_bytes: int) -> Iterator[TableChunk]:
        """Those of all parts."""
        for part in self.parts:
            yield from part.chunks(max_bytes)

    def begin_load(self) -> None:
        """Tells all parts."""
        for part in self.parts:
            part.begin_load()

    def load_chunk(self, chunk: TableChunk) -> None:
        """Every part that has shards of the table takes what lies in them."""
        for part in self.parts:
            # A chunk may speak of 2^63 rows, which no other kind of storage could go through.
            if any(local.table.name == chunk.table for local in part.shards):
                part.load_chunk(chunk)

    def shared_gradients(self, block: int, out: Tensor) -> bool:
        """Of the part that holds the shard."""
        part, number = self.part_of(block)
        assert isinstance(part, TensorTrainStorage | PrunedStorage | MixedStorage)
        return part.shared_gradients(number, out)

    def step_shared(self, block: int, shared: Tensor, step: StepParameters) -> None:
        """Steps what several ranks share of a table."""
        part, number = self.part_of(block)
        assert isinstance(part, TensorTrainStorage | PrunedStorage | MixedStorage)
        part.step_shared(number, shared, step)

    def close(self) -> None:
        """Closes all parts."""
        for part in self.parts:
            part.close()


def _runs(parts: list[int]) -> list[tuple[int, int, int]]:
    """(part, first block, end block) of blocks of one part that follow each other."""
    runs: list[tuple[int, int, int]] = []
    for block, part in enumerate(parts):
        if runs and runs[-1][0] == part:
            runs[-1] = part, runs[-1][1], block + 1
        else:
            runs.append((part, block, block + 1))
    return runs
