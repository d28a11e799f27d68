"""A long random history of a tiered storage against plain arrays: every row, every time.

    python storage_stress.py --dir /path/on/the/disk                # a million operations

Three tables in chains of up to three tiers with caches of a tenth and less, so that most of what is
touched moves: reads, optimiser steps, prefetches of batches that come (before the step of the one
that is there) and of batches that never come, flushes, reads and writes of whole tables. Batches
have up to 60 skewed ids a table, some more than the caches hold. Weights and gradients are small
integers and the learning rate is 1, so that sums are exact in any order. Any difference ends the
run; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time

import numpy as np
import torch

from shardlab.ops.step_parameters import StepParameters
from shardlab.ops.unique import Segments, Uniques, unique_segments
from shardlab.specs import EmbeddingBagConfig
from shardlab.storage import LocalShard, StorageOptions, TableChunk
from shardlab.storage.rows import RowsStorage
from shardlab.storage_text import parse_storage
from shardlab.table_plan import Shard

SIZES = ((800, 16), (150, 4), (31, 33))
CHAINS = (
    {"levels": [{"tier": "hbm", "fraction": 0.02, "ways": 4},
                {"tier": "ddr", "fraction": 0.1, "policy": "lru"}, {"tier": "ssd"}]},
    {"levels": [{"tier": "ddr", "fraction": 0.1, "admission": "always"}, {"tier": "ssd"}]},
    {"levels": [{"tier": "hbm", "fraction": 0.05, "ways": 2}, {"tier": "ddr"}]},
)
#: Shares of operations.
_READ, _STEP, _PREFETCH, _FLUSH, _WHOLE = 0.4, 0.35, 0.248, 0.0015, 0.0005
_MOST_IDS = 60
_REPORT = 20_000


class Stress:
    """The storage and what it must hold."""

    def __init__(self, folder: str, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        shards = [LocalShard(EmbeddingBagConfig(rows, columns, f"t{i}"),
                             Shard(0, 0, rows, 0, columns), parse_storage(chain, "here"), False)
                  for i, ((rows, columns), chain) in enumerate(zip(SIZES, CHAINS, strict=True))]
        self.storage = RowsStorage(shards, StorageOptions("sgd", 0, torch.device("cpu"), folder))
        self.truth = [self.random.integers(-9, 10, size).astype(np.float32) for size in SIZES]
        self.steps = 0
        self.counts: dict[str, int] = {}
        self.load()
        self.batch = self.draw()

    def draw(self) -> tuple[Uniques, int]:
        """Skewed ids of all tables, with repetitions; and how many gradients they get."""
        ids, chunks, at, offset = [], [], 0, 0
        for block, (rows, columns) in enumerate(SIZES):
            count = int(self.random.integers(_MOST_IDS)) if self.random.random() < 0.7 else 1
            skew = self.random.choice([1, 3, 8])
            ids.append((self.random.random(count) ** skew * rows).astype(np.int64))
            chunks.append([block, at, count, offset, columns])
            at, offset = at + count, offset + count * columns
        limits = torch.tensor([rows for rows, _ in SIZES])
        return unique_segments(torch.from_numpy(np.concatenate(ids)), torch.tensor(chunks),
                               Segments(limits, torch.zeros_like(limits))), offset

    def spans(self, batch: Uniques) -> list[tuple[int, int, int]]:
        """(table, start, end) of the batch's rows."""
        splits = batch.splits.tolist()
        return [(block, splits[block], splits[block + 1]) for block in range(len(SIZES))]

    def read(self) -> None:
        """Rows of the batch that is there."""
        batch, _ = self.batch
        segments, at, spans = [], 0, self.spans(batch)
        for block, start, end in spans:
            segments.append([block, start, end - start, at])
            at += (end - start) * SIZES[block][1]
        out = torch.full((at,), torch.nan)
        self.storage.read(torch.tensor(segments), batch.ids, out)
        expected = np.concatenate([self.truth[block][batch.ids[start:end].numpy()].ravel()
                                   for block, start, end in spans])
        assert np.array_equal(out.numpy(), expected), f"read after {self.steps} steps differs"

    def step(self) -> None:
        """Steps the rows of the batch; then another one is there."""
        batch, width = self.batch
        grads = self.random.integers(-3, 4, width).astype(np.float32)
        self.steps += 1
        self.storage.begin_step(self.steps)
        self.storage.update(batch, None, torch.from_numpy(grads), StepParameters("sgd", lr=1.0))
        starts, sources = batch.starts.numpy(), batch.sources.numpy()
        for block, start, end in self.spans(batch):
            entries = slice(starts[start], starts[end])
            rows = np.repeat(batch.ids[start:end].numpy(), np.diff(starts[start:end + 1]))
            columns = sources[entries, None] + np.arange(SIZES[block][1])
            np.subtract.at(self.truth[block], rows, grads[columns])
        self.batch = self.draw()

    def prefetch(self) -> None:
        """Of the batch that is there, or of one that never comes."""
        batch, _ = self.batch if self.random.random() < 0.6 else self.draw()
        segments = [[block, start, end - start] for block, start, end in self.spans(batch)]
        self.storage.prefetch(torch.tensor(segments), batch.ids)

    def flush(self) -> None:
        """Empties all caches."""
        self.storage.flush()

    def whole(self) -> None:
        """Everything at once; sometimes everything is written anew."""
        for chunk in self.storage.chunks(1 << 16):
            rows = self.truth[int(chunk.table[1:])][chunk.row_start:][:chunk.weights.shape[0]]
            assert np.array_equal(chunk.weights.numpy(), rows), f"{chunk.table} differs"
        if self.random.random() < 0.3:
            self.load()

    def load(self) -> None:
        """Writes all tables from the arrays."""
        self.storage.begin_load()
        for block, rows in enumerate(self.truth):
            self.storage.load_chunk(TableChunk(f"t{block}", 0, 0, torch.from_numpy(rows.copy()), {},
                                               False))

    def run(self, operations: int) -> None:
        """Random operations."""
        names = ("read", "step", "prefetch", "flush", "whole")
        drawn = self.random.choice(len(names), operations,
                                   p=[_READ, _STEP, _PREFETCH, _FLUSH, _WHOLE])
        for number, name in enumerate(names[i] for i in drawn):
            if number % _REPORT == 0:
                print(f"{number:,} operations", file=sys.stderr, flush=True)
            self.counts[name] = self.counts.get(name, 0) + 1
            getattr(self, name)()
        self.whole()


def main() -> None:
    """Runs until something differs or all operations are done."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", required=True, help="folder on a disk")
    parser.add_argument("--operations", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        stress = Stress(folder, args.seed)
        stress.run(args.operations)
        caches = [*stress.storage.chains.caches, *stress.storage.chains.below]
        moved = sum(int(cache.moved.sum()) for cache in caches)
        written = sum(home.disk.counters().written_bytes
                      for home in stress.storage.chains.disk_homes)
        stress.storage.close()
    print(json.dumps({"operations": args.operations, "seed": args.seed, **stress.counts,
                      "rows_moved": moved, "written_mib": written >> 20, "mismatches": 0,
                      "seconds": round(time.monotonic() - began)}))


if __name__ == "__main__":
    main()
