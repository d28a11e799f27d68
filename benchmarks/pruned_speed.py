"""Steps of pruned tables beside the dense fp32 table, in one process, taking turns.

    python benchmarks/pruned_speed.py --rows 4000000 --dim 64

Every case trains the same batches on its own model of one feature per table and a linear head. A
case with S % pruned starts dense and loses that share of its chunks by a decision, then trains with
its budget in force. Times are medians of thread CPU time and of wall time over rounds in which all
cases take turns; the ratio is to the dense table of the same run.
"""

from __future__ import annotations

import argparse
import time
from statistics import median
from typing import Any

import torch
from torch import nn

import shardlab as sl
from shardlab.storage.pruned import PrunedStorage


class Model(nn.Module):
    """Tables and a sum: what is not the tables costs next to nothing."""

    def __init__(self, rows: int, dim: int, tables: int, storage: Any) -> None:
        super().__init__()
        self.ebc = sl.EmbeddingBagCollection([
            sl.EmbeddingBagConfig(num_embeddings=rows, embedding_dim=dim, name=f"t{i}",
                                  storage=storage, sharding="table_wise") for i in range(tables)])

    def forward(self, features: Any) -> torch.Tensor:
        return self.ebc(features).values()


class Case:
    """One storage under test."""

    def __init__(self, options: argparse.Namespace, name: str, storage: Any,
                 keep: float = 1.0) -> None:
        self.name, self.walls, self.cpus = name, [], []
        self.model, self.optimizer = sl.shard(
            Model(options.rows, options.dim, options.tables, storage),
            optimizer=sl.optim.RowWiseAdagrad(lr=0.05))
        self.storage = self.model.collections()["ebc"].storage
        if keep < 1.0:
            assert isinstance(self.storage, PrunedStorage)
            self._warm(options)
            self._keep(keep)

    def _warm(self, options: argparse.Namespace) -> None:
        """Utilities first, so that the rows that come often are those that stay."""
        for number in range(options.warm):
            self._train(batch(options, 10_000 + number))

    def _keep(self, share: float) -> None:
        present = self.storage.utility_counts(0)
        counts = present.double().sum(0)
        above = counts.flip(0).cumsum(0).flip(0)
        wanted = share * float(counts.sum())
        from shardlab.storage.chunk_budget import at_least
        low, high = 0.0, 1e6
        for _ in range(200):
            middle = (low * high) ** 0.5 if low else 1e-30 if high > 1e-30 else high / 2
            some = float(at_least(counts[None], torch.tensor([[middle]], dtype=torch.float64)))
            low, high = (middle, high) if some > wanted else (low, middle)
        assert float(above[0]) > 0
        blocks = len(self.storage.shards)
        self.storage.decide(0, torch.full((blocks,), high), 1 << 60)
        self.storage.compact(0)
        self.storage.index.set_budget(0, self.storage.held_bytes(0))

    def _train(self, features: Any) -> None:
        self.optimizer.zero_grad()
        self.model(features).sum().backward()
        self.optimizer.step()

    def time(self, features: Any, warm: bool) -> None:
        """One step."""
        cpu, wall = time.thread_time(), time.perf_counter()
        self._train(features)
        if not warm:
            self.cpus.append(time.thread_time() - cpu)
            self.walls.append(time.perf_counter() - wall)

    def present(self) -> float:
        """Share of the chunks that are present."""
        if not isinstance(self.storage, PrunedStorage):
            return 1.0
        plan = self.storage.stores[0]
        total = sum(self.storage.shards[b].shard.rows for b in plan.blocks) \
            * plan.shape.layout.chunks
        return self.storage.index.numbers(0).used / total


def batch(options: argparse.Namespace, seed: int) -> sl.KeyedJaggedTensor:
    """Zipf-like ids: row rank^-exponent of the tables, spread over the rows."""
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(options.tables * options.batch, generator=generator, dtype=torch.float64)
    ranks = (options.rows ** uniform - 1).long() if options.exponent == 1 else \
        (uniform * options.rows).long()
    ids = (ranks * 2_654_435_761) % options.rows
    names = [f"t{i}" for i in range(options.tables)]
    return sl.KeyedJaggedTensor(names, ids, fixed_length=1)


def cases(options: argparse.Namespace) -> list[Case]:
    """The dense table, and pruned ones."""
    def pruned(chunks: int, **more: Any) -> dict[str, Any]:
        return {"kind": "pruned", "budget": {"ratio": 0.5}, "start": "dense", "chunks": chunks,
                "warmup": 1 << 30, **more}

    found = [Case(options, "dense fp32", "fp32")]
    for share in options.pruned:
        for chunks in options.chunks if share == 0.9 else options.chunks[:1]:
            found.append(Case(options, f"{share:.0%} pruned, K={chunks}", pruned(chunks),
                              keep=1 - share))
    return found


def main() -> None:
    """Runs and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--tables", type=int, default=4)
    parser.add_argument("--batch", type=int, default=8192)
    parser.add_argument("--exponent", type=int, default=1, help="1: Zipf; 0: uniform")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--warm", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--pruned", type=float, nargs="*", default=[0.5, 0.9, 0.99])
    parser.add_argument("--chunks", type=int, nargs="*", default=[4, 1, 2, 8, 16])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found = cases(options)
    for number in range(options.rounds + 3):
        features = batch(options, number)
        for case in found:
            case.time(features, warm=number < 3)
    base = median(found[0].cpus)
    print("| case | present | MiB held | CPU ms a step | of dense | wall ms |")
    print("|---|---|---|---|---|---|")
    for case in found:
        held = case.model.collections()["ebc"].tier_bytes().total / 2**20
        cpu = median(case.cpus)
        print(f"| {case.name} | {case.present():.3f} | {held:.0f} | {cpu * 1e3:.2f} "
              f"| {cpu / base:.2f} | {median(case.walls) * 1e3:.2f} |")


if __name__ == "__main__":
    main()
