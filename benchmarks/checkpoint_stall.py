"""What a checkpoint costs training: whole, in the background, and only what changed.

    python checkpoint_stall.py --dir /path/on/the/disk

    python checkpoint_stall.py --dir /path/on/the/disk --pruned 0.5 --period 20

DLRM on the 26 Criteo tables of at most 2M rows, one rank; with --pruned all of them pruned to that
share of the dense bytes, from a dense start. Reported:

* whole: seconds of a save that training waits for;
* behind: seconds that `CheckpointWriter` blocked training, and by how much the steps beside the
  writer were slower in sum (they share the cores with it);
* incremental: bytes and seconds after some steps, beside the rows these touched;
* the most resident memory while saving, over the most before the first save.

Prints JSON lines.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import threading
import time
from pathlib import Path

import torch
from benchlib import CRITEO_KAGGLE_ROWS, emit
from torch import nn

import shardlab as sl
from shardlab.comm import Groups
from shardlab.models.build import build_model
from shardlab.ops.allocator import keep_freed_memory
from shardlab.train import CheckpointWriter, SaveOptions

_PAGE = 4096


class ResidentMemory:
    """Samples this process's resident bytes; `peak` since the last `restart`."""

    def __init__(self) -> None:
        self.peak = 0
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            self.peak = max(self.peak, pages * _PAGE)
            time.sleep(0.002)

    def restart(self) -> None:
        """Forgets the peak."""
        time.sleep(0.02)
        self.peak = 0
        time.sleep(0.02)


class Training:
    """A model and batches that repeat; `step` takes one and returns its seconds."""

    def __init__(self, args: argparse.Namespace) -> None:
        names = [f"c{i}" for i in range(len(CRITEO_KAGGLE_ROWS))]
        rows = [min(count, args.max_rows) for count in CRITEO_KAGGLE_ROWS]
        storage = "fp32" if not args.pruned else {
            "kind": "pruned", "budget": {"ratio": args.pruned}, "chunks": args.chunks,
            "period": args.period, "start": "dense", "ramp": 0}
        tables = [sl.EmbeddingBagConfig(count, args.dim, name, feature_names=(name,),
                                        storage=storage)
                  for count, name in zip(rows, names, strict=True)]
        model = build_model("dlrm", sl.EmbeddingBagCollection(tables), 13,
                            bottom_mlp=[512, 256], top_mlp=[512, 256])
        self.model, self.optimizer = sl.shard(model, optimizer=sl.optim.RowWiseAdagrad(lr=0.01))
        generator = torch.Generator().manual_seed(0)
        self.batches = []
        for _ in range(args.batches):
            skewed = torch.rand(len(rows), args.batch, generator=generator).pow(6)
            ids = (skewed * torch.tensor(rows)[:, None]).long()
            self.batches.append((torch.rand(args.batch, 13, generator=generator),
                                 sl.KeyedJaggedTensor(names, ids.view(-1), fixed_length=1),
                                 torch.rand(args.batch, generator=generator).round()))
        self.loss, self.taken = nn.BCEWithLogitsLoss(), 0
        self.touched: list[torch.Tensor] = []

    def step(self) -> float:
        """Seconds of one training step."""
        dense, features, labels = self.batches[self.taken % len(self.batches)]
        self.taken += 1
        began = time.perf_counter()
        self.optimizer.zero_grad()
        self.loss(self.model(dense, features), labels).backward()
        self.optimizer.step()
        return time.perf_counter() - began

    def touched_rows(self, first: int, count: int) -> int:
        """Distinct rows that the batches of some steps name."""
        picked = [self.batches[number % len(self.batches)][1].values().view(26, -1)
                  for number in range(first, first + count)]
        return sum(torch.unique(torch.cat([ids[t] for ids in picked])).numel() for t in range(26))


def size_of(path: Path) -> int:
    """Bytes of a checkpoint's files."""
    return sum(file.stat().st_size for file in path.iterdir())


def save_whole(training: Training, folder: Path, repeat: int) -> float:
    """Median seconds of a save that training waits for."""
    seconds = []
    for number in range(repeat):
        writer = CheckpointWriter(training.model, training.optimizer, Groups())
        began = time.perf_counter()
        path = writer.save(folder / f"whole-{number}")
        seconds.append(time.perf_counter() - began)
        size = size_of(path)
        shutil.rmtree(path)
        for _ in range(5):
            training.step()
    emit(case="whole", seconds=statistics.median(seconds), bytes=size, all_seconds=seconds)
    return statistics.median(seconds)


def save_behind(training: Training, folder: Path, repeat: int, whole_s: float) -> None:
    """What a background save takes from training."""
    plain = statistics.median(training.step() for _ in range(40))
    blocked, slower, lasted = [], [], []
    for number in range(repeat):
        writer = CheckpointWriter(training.model, training.optimizer, Groups(),
                                  SaveOptions(background=True))
        began = time.perf_counter()
        path = writer.save(folder / f"behind-{number}")
        steps = []
        while not path.exists():
            steps.append(training.step())
        lasted.append(time.perf_counter() - began)
        writer.finish()
        blocked.append(writer.stalled_s)
        slower.append(sum(steps) - len(steps) * plain)
        shutil.rmtree(path)
    emit(case="behind", blocked_s=statistics.median(blocked), step_ms=1e3 * plain,
         blocked_of_whole=statistics.median(blocked) / whole_s,
         slower_s=statistics.median(slower), slower_of_whole=statistics.median(slower) / whole_s,
         lasted_s=statistics.median(lasted), steps_beside=len(steps))


def save_changes(training: Training, folder: Path) -> None:
    """Bytes of incremental saves beside the rows they hold."""
    writer = CheckpointWriter(training.model, training.optimizer, Groups(),
                              SaveOptions(incremental=True, full_every=100))
    full = size_of(writer.save(folder / "full"))
    first, taken = training.taken, 0
    for steps in (1, 3, 10, 30):
        while taken < steps:
            training.step()
            taken += 1
        began = time.perf_counter()
        path = writer.save(folder / f"changes-{steps}")
        seconds, size = time.perf_counter() - began, size_of(path)
        tables = sum(file.stat().st_size for file in path.glob("rows-*"))
        rows = training.touched_rows(first, taken)
        emit(case="incremental", steps=steps, rows=rows, bytes=size, table_bytes=tables,
             bytes_per_row=tables / rows, of_full=size / full, seconds=seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dir", required=True, help="folder for the checkpoints")
    parser.add_argument("--max-rows", type=int, default=2_000_000)
    parser.add_argument("--dim", type=int, default=16)
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--batches", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--pruned", type=float, help="share of the dense bytes that is held")
    parser.add_argument("--chunks", type=int, default=1)
    parser.add_argument("--period", type=int, default=20, help="steps from decision to decision")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_freed_memory()  # as the trainer does
    folder = Path(args.dir)
    folder.mkdir(parents=True)
    training, memory = Training(args), ResidentMemory()
    for _ in range(max(20, args.period)):
        training.step()
    memory.restart()
    for _ in range(max(20, args.period)):
        training.step()
    before = memory.peak
    memory.restart()
    try:
        whole_s = save_whole(training, folder, args.repeat)
        whole_peak = memory.peak
        memory.restart()
        save_behind(training, folder, args.repeat, whole_s)
        behind_peak = memory.peak
        memory.restart()
        save_changes(training, folder)
        emit(case="memory", training_bytes=before, whole=whole_peak / before,
             behind=behind_peak / before, incremental=memory.peak / before)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
