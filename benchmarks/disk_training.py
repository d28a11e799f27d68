"""Training with a table on disk under a cache in memory, beside the same table in memory.

    python disk_training.py --dir /path/on/the/disk

One table, Zipf(1.05) ids, row-wise Adagrad, batches announced one early. The bound is the slower of
computing (the step with everything in memory) and the disk (rows missed a step over the random rows
a second that the same disk and file size give with a full queue, measured in the same run). Results
of both are asserted equal first. Prints JSON lines.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time

import numpy as np
import torch
from benchlib import sample_ids
from torch import nn

import shardlab as sl
from shardlab.ops.allocator import keep_freed_memory
from shardlab.sharded import simple_plan
from shardlab.tiers import Disk, FileSpec, RecordFile


class Lookup(nn.Module):
    """A table and nothing else, so that the exchange is what is measured."""

    def __init__(self, args: argparse.Namespace, storage: object) -> None:
        super().__init__()
        names = tuple(f"f{i}" for i in range(args.features))
        self.tables = sl.EmbeddingBagCollection([sl.EmbeddingBagConfig(
            args.rows, args.dim, "t", feature_names=names, storage=storage)])

    def forward(self, features: sl.KeyedJaggedTensor) -> torch.Tensor:
        return self.tables(features).values()


def build(args: argparse.Namespace, storage: object) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The sharded model of one rank."""
    model = Lookup(args, storage)
    return sl.shard(model, simple_plan(list(model.tables.tables), sl.comm.init()),
                    optimizer=sl.optim.RowWiseAdagrad(lr=0.01), ssd_dir=args.dir)


def batches(args: argparse.Namespace, count: int) -> list[sl.KeyedJaggedTensor]:
    """Seeded batches, one id a bag."""
    rng = np.random.default_rng(0)
    ids = sample_ids(args.rows, count * args.features * args.batch, "zipf:1.05", rng)
    names = [f"f{i}" for i in range(args.features)]
    return [sl.KeyedJaggedTensor(names, part, fixed_length=1)
            for part in torch.from_numpy(ids).view(count, -1)]


def train(args: argparse.Namespace, model: nn.Module, optimizer: torch.optim.Optimizer,
          data: list[sl.KeyedJaggedTensor]) -> list[float]:
    """Seconds of every step."""
    grad = torch.full((args.batch, args.features * args.dim), 1e-3)
    seconds, began = [], time.perf_counter()
    for features in sl.prefetching(data, model):
        model(features).backward(grad)
        optimizer.step()
        seconds.append(time.perf_counter() - began)
        began = time.perf_counter()
    return seconds


def random_rows_per_second(args: argparse.Namespace, record_bytes: int) -> float:
    """Random records of a file of the table's size, in batches as large as the misses of steps."""
    with Disk() as disk, tempfile.TemporaryDirectory(dir=args.dir) as folder:
        file = RecordFile.create(disk, f"{folder}/rows", FileSpec("t", args.rows, record_bytes, 1))
        block = torch.zeros(1 << 14, record_bytes, dtype=torch.uint8)
        for first in range(0, args.rows, 1 << 14):
            count = min(1 << 14, args.rows - first)
            file.write_records(range(first, first + count), block[:count])
        rows = torch.randint(args.rows, (1 << 16,))
        out = torch.empty(rows.numel(), record_bytes, dtype=torch.uint8)
        rates = []
        for part in torch.randperm(args.rows)[:5 << 16].split(1 << 16):
            began = time.perf_counter()
            file.read_records(part.sort().values, out[:part.numel()])
            rates.append(part.numel() / (time.perf_counter() - began))
        file.unlink()
    return statistics.median(rates)


def main() -> None:
    """Checks, then measures both."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", required=True, help="folder on the disk to measure")
    parser.add_argument("--rows", type=int, default=8_000_000)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--features", type=int, default=8)
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--share", type=float, default=0.1)
    parser.add_argument("--steps", type=int, default=120)
    args = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    data = batches(args, args.steps)
    chain = {"levels": [{"tier": "ddr", "fraction": args.share}, {"tier": "ssd"}]}
    memory, memory_optimizer = build(args, {"tier": "ddr"})
    in_memory = train(args, memory, memory_optimizer, data)
    expected = memory(data[0]).detach().clone()
    del memory, memory_optimizer
    disk, disk_optimizer = build(args, chain)
    (home,) = disk.collections()["tables"].storage.chains.disk_homes
    (cache,) = disk.collections()["tables"].storage.chains.caches
    half = args.steps // 2
    on_disk = train(args, disk, disk_optimizer, data[:half])
    before = cache.counters.clone()
    on_disk = train(args, disk, disk_optimizer, data[half:])
    hits, misses, _, evictions, *_ = (cache.counters - before).sum(0).tolist()
    assert torch.equal(disk(data[0]).detach(), expected), "disk and memory disagree"
    rate = random_rows_per_second(args, home.files[0].spec.record_bytes)
    missed = misses / (args.steps - half)
    compute, step = statistics.median(in_memory[half:]), statistics.median(on_disk)
    bound = max(compute, missed / rate)
    print(json.dumps({
        "disk": home.disk.describe(), "table_mib": args.rows * args.dim * 4 >> 20,
        "cache_mib": int(args.rows * args.share) * args.dim * 4 >> 20,
        "ids_per_step": args.features * args.batch, "hit_rate": hits / (hits + misses),
        "missed_rows_per_step": missed, "evictions_per_step": evictions / (args.steps - half),
        "disk_rows_per_s": rate, "memory_step_ms": compute * 1e3, "disk_step_ms": step * 1e3,
        "bound_ms": bound * 1e3, "over_bound": step / bound}))


if __name__ == "__main__":
    main()
