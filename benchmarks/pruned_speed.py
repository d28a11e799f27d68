"""Steps of pruned tables beside the dense fp32 table, in one process, taking turns.

    python benchmarks/pruned_speed.py
    python benchmarks/pruned_speed.py --pruned 0.9 --chunks 1 2 4 8 --periods 10 100 1000

Every case trains the same batches on a model of its own: one feature per table, a linear head and
labels of a noisy teacher, so that gradients differ from sample to sample and shrink as the model
learns. Pruned tables start empty and train with decisions for ``--warm`` steps, until admissions
are those of a full store in use. Times are CPU time of the calling thread over rounds in which all
cases take turns: the median step, and the mean, which has the decisions in it. Ratios are to the
dense table of the same run.

``--alike`` is the worst case: all gradients alike, and a store full of chunks that nobody has asked
for yet, so that every absent row that comes replaces one.
"""

from __future__ import annotations

import argparse
import time
from itertools import product
from statistics import mean, median
from typing import Any

import torch
from torch import nn

import shardlab as sl
from shardlab.ops.allocator import keep_freed_memory
from shardlab.storage.chunk_budget import at_least
from shardlab.storage.pruned import PrunedStorage
from shardlab.storage_bytes import chunk_layout
from shardlab.storage_specs import PrunedSpec

_TEACHER, _SPREAD = 40_503, 997


class Model(nn.Module):
    """Tables and a fixed linear head: what is not the tables costs next to nothing."""

    def __init__(self, options: argparse.Namespace, storage: Any) -> None:
        super().__init__()
        self.ebc = sl.EmbeddingBagCollection([
            sl.EmbeddingBagConfig(num_embeddings=options.rows, embedding_dim=options.dim,
                                  name=f"t{i}", storage=storage, sharding="table_wise")
            for i in range(options.tables)])
        generator = torch.Generator().manual_seed(0)
        width = options.tables * options.dim
        self.register_buffer("head", torch.ones(width) if options.alike
                             else torch.randn(width, generator=generator))

    def forward(self, features: Any) -> torch.Tensor:
        return self.ebc(features).values() @ self.head


class Case:
    """One storage under test."""

    def __init__(self, options: argparse.Namespace, name: str, storage: Any) -> None:
        self.name, self.walls, self.cpus = name, [], []
        self._alike = options.alike
        self.model, self.optimizer = sl.shard(Model(options, storage),
                                              optimizer=sl.optim.RowWiseAdagrad(lr=0.02))
        self.storage = self.model.collections()["ebc"].storage
        self._counts = self._changes()

    def train(self, some: tuple[Any, torch.Tensor]) -> None:
        """One step."""
        features, labels = some
        self.optimizer.zero_grad()
        logits = self.model(features)
        loss = logits.sum() if self._alike else \
            nn.functional.binary_cross_entropy_with_logits(logits, labels)
        loss.backward()
        self.optimizer.step()

    def time(self, some: tuple[Any, torch.Tensor]) -> None:
        """One step, timed."""
        cpu, wall = time.thread_time(), time.perf_counter()
        self.train(some)
        self.cpus.append(time.thread_time() - cpu)
        self.walls.append(time.perf_counter() - wall)

    def _changes(self) -> tuple[int, int]:
        if not isinstance(self.storage, PrunedStorage):
            return 0, 0
        return int(self.storage.admitted.sum()), int(self.storage.evicted.sum())

    def begin(self) -> None:
        """Counts admissions from here on."""
        self._counts = self._changes()

    def churn(self) -> tuple[float, float]:
        """Chunks admitted and evicted a timed step."""
        before, now = self._counts, self._changes()
        steps = max(1, len(self.cpus))
        return (now[0] - before[0]) / steps, (now[1] - before[1]) / steps

    def present(self) -> float:
        """Share of the chunks that are present."""
        if not isinstance(self.storage, PrunedStorage):
            return 1.0
        plan = self.storage.stores[0]
        total = sum(self.storage.shards[b].shard.rows for b in plan.blocks) \
            * plan.shape.layout.chunks
        return self.storage.index.numbers(0).used / total


def batch(options: argparse.Namespace, seed: int) -> tuple[Any, torch.Tensor]:
    """Zipf ids (row of rank r with a probability of 1 / r), spread over the rows; labels."""
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(options.tables * options.batch, generator=generator, dtype=torch.float64)
    ranks = (options.rows ** uniform - 1).long() if options.exponent == 1 else \
        (uniform * options.rows).long()
    ids = (ranks * 2_654_435_761) % options.rows
    score = (ids * _TEACHER % _SPREAD).float().div(_SPREAD).sub(0.5).view(options.tables, -1)
    chance = torch.sigmoid(4 * score.sum(0))
    labels = (torch.rand(options.batch, generator=generator) < chance).float()
    names = [f"t{i}" for i in range(options.tables)]
    return sl.KeyedJaggedTensor(names, ids, fixed_length=1), labels


def pruned(options: argparse.Namespace, share: float, chunks: int,
           period: int, dtype: str) -> dict[str, Any]:
    """The storage that leaves ``share`` of the chunks, by a budget that counts everything."""
    spec = PrunedSpec(ratio=0.5, chunks=chunks, dtype=dtype)
    layout = chunk_layout(spec, options.rows * options.tables, options.dim, "row_wise_adagrad")
    ratio = share * (layout.likely_bytes + spec.sketch) * chunks / (4 * options.dim)
    more = {"start": "dense", "warmup": 1 << 30} if options.alike else {}
    return {"kind": "pruned", "budget": {"ratio": ratio / (1 - spec.headroom)}, "chunks": chunks,
            "period": period, "gamma": options.gamma, "dtype": dtype, **more}


def prune_by_chance(case: Case, share: float) -> None:
    """Leaves ``share`` of a dense start's chunks, which nobody has asked for yet."""
    counts = case.storage.utility_counts(0).sum(0, keepdim=True)
    low, high = 0.0, 2.0 ** -48
    for _ in range(50):
        middle = (low + high) / 2
        some = float(at_least(counts, torch.tensor([[middle]], dtype=torch.float64)))
        low, high = (middle, high) if some > share * float(counts.sum()) else (low, middle)
    case.storage.decide(0, torch.full((len(case.storage.shards),), high), 1 << 60)
    case.storage.compact(0)
    case.storage.index.set_budget(0, case.storage.held_bytes(0))


def build_cases(options: argparse.Namespace) -> list[Case]:
    """The dense table, and pruned ones."""
    found = [Case(options, "dense fp32", "fp32")]
    for share in options.pruned:
        for chunks in options.chunks:
            for period, dtype in product(options.periods, options.dtypes):
                name = f"{share:.0%} pruned, {dtype}, K={chunks}, period {period}"
                storage = pruned(options, 1 - share, chunks, period, dtype)
                found.append(Case(options, name, storage))
                if options.alike:
                    prune_by_chance(found[-1], 1 - share)
    return found


def main() -> None:
    """Runs and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=500_000)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--tables", type=int, default=4)
    parser.add_argument("--batch", type=int, default=8192)
    parser.add_argument("--exponent", type=int, default=1, help="1: Zipf; 0: uniform")
    parser.add_argument("--rounds", type=int, default=100, help="timed steps")
    parser.add_argument("--warm", type=int, default=1000, help="steps before them")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--pruned", type=float, nargs="*", default=[0.5, 0.9, 0.99])
    parser.add_argument("--chunks", type=int, nargs="*", default=[4, 1])
    parser.add_argument("--dtypes", nargs="*", default=["fp32"],
                        choices=["fp32", "fp16", "int8"], help="of the pruned tables' chunks")
    parser.add_argument("--periods", type=int, nargs="*", default=[100])
    parser.add_argument("--gamma", type=float, default=PrunedSpec().gamma)
    parser.add_argument("--alike", action="store_true", help="the worst case")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()  # as the trainer does
    found = build_cases(options)
    for number in range(options.warm + options.rounds):
        some = batch(options, number)
        if number == options.warm:
            for case in found:
                case.begin()
        for case in found:
            case.train(some) if number < options.warm else case.time(some)
    report(found)


def report(found: list[Case]) -> None:
    """Prints the table."""
    print("| case | present | MiB held | admitted a step | CPU ms: median | mean | of dense | mean "
          "| wall ms |\n|---|---|---|---|---|---|---|---|---|")
    for case in found:
        held = case.model.collections()["ebc"].tier_bytes().total / 2**20
        middle, average = (what(case.cpus) / what(found[0].cpus) for what in (median, mean))
        print(f"| {case.name} | {case.present():.3f} | {held:.0f} | {case.churn()[0]:.0f} "
              f"| {median(case.cpus) * 1e3:.2f} | {mean(case.cpus) * 1e3:.2f} | {middle:.2f} "
              f"| {average:.2f} | {median(case.walls) * 1e3:.2f} |")


if __name__ == "__main__":
    main()
