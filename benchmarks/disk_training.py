"""Training with a table on disk under a cache in memory, beside the same table in memory.

    python disk_training.py --dir /path/on/the/disk

One table, Zipf(1.05) ids, row-wise Adagrad, batches announced one early. The cache is full before
the clock starts, so that what comes in pushes as much out. The bound is the slower of computing
(the step with everything in memory) and the disk (rows missed a step over the random rows a second
that the same disk gives a file of the table's size, asked for as many rows at a time as a step
misses; measured in the same run, like what `limits.py` does with single reads). Losses of both are
equal bit for bit. Memory is what the process took on top of what it had before the table was made,
at its peak, beside `tier_bytes`. Prints a JSON line.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from benchlib import sample_ids
from torch import nn

import shardlab as sl
from shardlab.ops.allocator import keep_freed_memory
from shardlab.sharded import simple_plan
from shardlab.tiers import Disk, FileSpec, RecordFile

#: Reads that the disk's rate is the median of.
_RATE_REPEATS = 15
#: The disk's rate is measured between parts of the run: others may use the disk, too.
_PARTS = 5
_FIRST_USE_ROWS = 1000
_FP32_BYTES = 4


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


class RowRate:
    """Random records a second of a file of the table's size, ``at_once`` at a time, ascending."""

    def __init__(self, args: argparse.Namespace, record_bytes: int) -> None:
        self.rows, self.disk = args.rows, Disk()
        self.folder = tempfile.TemporaryDirectory(dir=args.dir)
        self.file = RecordFile.create(self.disk, f"{self.folder.name}/rows",
                                      FileSpec("t", args.rows, record_bytes, 1))
        block = torch.zeros(1 << 14, record_bytes, dtype=torch.uint8)
        for first in range(0, args.rows, 1 << 14):
            count = min(1 << 14, args.rows - first)
            self.file.write_records(range(first, first + count), block[:count])

    def measure(self, at_once: int) -> float:
        """Median of some reads."""
        out = torch.empty(at_once, self.file.spec.record_bytes, dtype=torch.uint8)
        rates = []
        for _ in range(_RATE_REPEATS):
            rows = torch.randint(self.rows, (at_once,)).sort().values
            began = time.perf_counter()
            self.file.read_records(rows, out)
            rates.append(at_once / (time.perf_counter() - began))
        return statistics.median(rates)

    def close(self) -> None:
        """Deletes the file."""
        self.disk.close()
        self.folder.cleanup()


def resident_bytes(peak: bool) -> int:
    """Memory of this process now, or at its peak since `forget_peak`."""
    name = "VmHWM" if peak else "VmRSS"
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{name}:\s+(\d+) kB", status)[1]) << 10


def forget_peak() -> None:
    """Starts the peak anew (proc(5), clear_refs)."""
    Path("/proc/self/clear_refs").write_text("5")


def train_on_disk(args: argparse.Namespace, data: list[sl.KeyedJaggedTensor]) -> dict[str, object]:
    """Warms the cache, measures the rest; what the last read saw is in ``rows``."""
    chain = {"levels": [{"tier": "ddr", "fraction": args.share}, {"tier": "ssd"}]}
    small = argparse.Namespace(**{**vars(args), "rows": _FIRST_USE_ROWS})
    model, optimizer = build(small, chain)  # what is loaded on first use is not the table's
    train(small, model, optimizer, batches(small, 2))
    model.collections()["tables"].storage.close()
    forget_peak()
    before = resident_bytes(peak=False)
    model, optimizer = build(args, chain)
    storage = model.collections()["tables"].storage
    (cache,), (home,) = storage.chains.caches, storage.chains.disk_homes
    train(args, model, optimizer, data[:args.warm_up])
    peak = resident_bytes(peak=True) - before
    rate = RowRate(args, home.logs[0].record_bytes)
    counted, moved = cache.counters.clone(), home.disk.counters()
    parts = []
    for first in range(args.warm_up, len(data), args.steps // _PARTS):
        seen = cache.counters.clone()
        steps = train(args, model, optimizer, data[first:first + args.steps // _PARTS])
        missed = int((cache.counters - seen)[:, 1].sum()) / len(steps)
        parts.append((statistics.median(steps), missed, rate.measure(round(missed))))
    hits, misses, _, evictions, *_ = (cache.counters - counted).sum(0).tolist()
    after, steps = home.disk.counters(), len(data) - args.warm_up
    budget = storage.tier_bytes()
    table = args.rows * args.dim * _FP32_BYTES
    found = {
        "disk": home.disk.describe(), "table_mib": table >> 20, "file_mib": budget.ssd >> 20,
        "cache_and_index_mib": budget.ddr + budget.hbm >> 20, "peak_rss_mib": peak >> 20,
        "peak_over_tier_bytes": peak / (budget.ddr + budget.hbm),
        "peak_over_quarter_of_table": peak / (table / 4), "hit_rate": hits / (hits + misses),
        "missed_rows_per_step": misses / steps, "evictions_per_step": evictions / steps,
        "reads_per_step": (after.reads - moved.reads) / steps,
        "writes_per_step": (after.writes - moved.writes) / steps,
        "read_mib_per_step": (after.read_bytes - moved.read_bytes) / steps / 2**20,
        "written_mib_per_step": (after.written_bytes - moved.written_bytes) / steps / 2**20,
        "parts": parts, "rows": model(data[0]).detach().clone()}
    rate.close()
    home.close()
    return found


def main() -> None:
    """Checks, then measures both."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", required=True, help="folder on the disk to measure")
    parser.add_argument("--rows", type=int, default=4_000_000)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--features", type=int, default=8)
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--share", type=float, default=0.1)
    parser.add_argument("--warm-up", type=int, default=240, help="steps that fill the cache")
    parser.add_argument("--steps", type=int, default=100, help="steps that are measured")
    args = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    data = batches(args, args.warm_up + args.steps)
    found = train_on_disk(args, data)
    memory, memory_optimizer = build(args, {"tier": "ddr"})
    in_memory = train(args, memory, memory_optimizer, data)
    assert torch.equal(memory(data[0]).detach(), found.pop("rows")), "disk and memory disagree"
    compute = statistics.median(in_memory[args.warm_up:])
    parts = found.pop("parts")
    over = [step / max(compute, missed / rate) for step, missed, rate in parts]
    step, _, rate = (statistics.median(values) for values in zip(*parts, strict=True))
    print(json.dumps({
        "ids_per_step": args.features * args.batch, **found, "disk_rows_per_s": rate,
        "memory_step_ms": compute * 1e3, "disk_step_ms": step * 1e3,
        "over_bound": statistics.median(over), "over_bound_of_parts": over}))


if __name__ == "__main__":
    main()
