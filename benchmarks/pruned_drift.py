"""AUC before and after the popular ids change: pruned tables beside a static allocation.

    python benchmarks/pruned_drift.py --seeds 0 1 2

Ids follow a Zipf law; a teacher gives every id a weight, and the label of a sample follows from
the sum of its ids' weights. After ``--steps`` steps other ids become the popular ones. Both ways
hold the same bytes; AUC is that of fresh samples of the current law.

    dense     all rows
    pruned    this project, K = 1
    static    rows for the ids that are most popular at first; all others share one row a table
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import shardlab as sl
from shardlab.train.metrics import exact_auc

DIM, ROW_BYTES = 16, 4 * 16 + 4
METHODS = ("dense", "pruned", "static")
#: Steps after the change, in periods of decisions.
AFTER = (0, 1, 2, 4, 8, 16)


class Model(nn.Module):
    """Tables and a linear head."""

    def __init__(self, options: argparse.Namespace, rows: int, storage: Any) -> None:
        super().__init__()
        self.ebc = sl.EmbeddingBagCollection([
            sl.EmbeddingBagConfig(num_embeddings=rows, embedding_dim=DIM, name=f"t{i}",
                                  storage=storage, sharding="table_wise")
            for i in range(options.tables)])
        self.head = nn.Linear(options.tables * DIM, 1)

    def forward(self, features: Any) -> Tensor:
        return self.head(self.ebc(features).values()).squeeze(1)


class Clicks:
    """Samples of a seed: what is popular depends on ``changed``, the teacher does not."""

    def __init__(self, options: argparse.Namespace, seed: int) -> None:
        self._options, self._seed = options, seed
        generator = torch.Generator().manual_seed(seed)
        self._teacher = torch.randn(options.tables, options.rows, generator=generator)

    def sample(self, count: int, number: int, *, changed: bool) -> tuple[Tensor, Tensor]:
        """int64 [tables, count] ids and fp32 [count] labels."""
        options = self._options
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + number)
        uniform = torch.rand(options.tables, count, generator=generator, dtype=torch.float64)
        ranks = (options.rows ** uniform - 1).long()
        ids = (ranks + changed * options.rows // 2) % options.rows
        score = self._teacher.gather(1, ids).sum(0)
        labels = torch.rand(count, generator=generator) < torch.sigmoid(score)
        return ids, labels.float()


def build(name: str, options: argparse.Namespace) -> tuple[int, Any, Callable[[Tensor], Tensor]]:
    """Rows of a table, its storage, and what becomes of ids."""
    if name == "static":
        kept = int(options.ratio * options.rows * 4 * DIM / ROW_BYTES)
        return kept + 1, "fp32", lambda ids: torch.where(ids < kept, ids + 1, 0)
    storage: Any = "fp32"
    if name == "pruned":
        storage = {"kind": "pruned", "budget": {"ratio": options.ratio}, "chunks": 1,
                   "period": options.period, "gamma": options.gamma, **json.loads(options.storage)}
    return options.rows, storage, lambda ids: ids


def run(name: str, options: argparse.Namespace, seed: int) -> list[float]:
    """AUC before the change, and after it as `AFTER` says."""
    torch.manual_seed(seed)
    rows, storage, mapped = build(name, options)
    model, optimizer = sl.shard(Model(options, rows, storage), seed=seed,
                                optimizer=sl.optim.RowWiseAdagrad(lr=0.1))
    clicks, names = Clicks(options, seed), [f"t{i}" for i in range(options.tables)]

    def scores(ids: Tensor) -> Tensor:
        return model(sl.KeyedJaggedTensor(names, mapped(ids).reshape(-1), fixed_length=1))

    def auc(*, changed: bool) -> float:
        with torch.no_grad():
            ids, labels = clicks.sample(options.eval, -1, changed=changed)
            return exact_auc(scores(ids), labels)

    found = []
    for step in range(options.steps + max(AFTER) * options.period + 1):
        changed = step >= options.steps
        if step == options.steps:
            found.append(auc(changed=False))
        if changed and (step - options.steps) in [part * options.period for part in AFTER]:
            found.append(auc(changed=True))
        ids, labels = clicks.sample(options.batch, step, changed=changed)
        optimizer.zero_grad()
        nn.functional.binary_cross_entropy_with_logits(scores(ids), labels).backward()
        optimizer.step()
    return found


def main() -> None:
    """Runs all methods and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--tables", type=int, default=8)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--eval", type=int, default=20_000)
    parser.add_argument("--ratio", type=float, default=0.05)
    parser.add_argument("--period", type=int, default=25)
    parser.add_argument("--gamma", type=float, default=0.996)
    parser.add_argument("--storage", default="{}", help="more keys of the pruned storage, JSON")
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    options = parser.parse_args()
    print("| method | before | " + " | ".join(
        f"{part} periods after" for part in AFTER) + " |\n" + "|---" * (len(AFTER) + 2) + "|")
    for name in options.methods:
        runs = [run(name, options, seed) for seed in options.seeds]
        means = [statistics.mean(values) for values in zip(*runs, strict=True)]
        print(f"| {name} | " + " | ".join(f"{mean:.4f}" for mean in means) + " |", flush=True)


if __name__ == "__main__":
    main()
