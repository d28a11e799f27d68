"""Validation AUC of a Criteo job over seeds: ShardLab's ranks beside plain PyTorch on one process.

    python criteo_quality.py JOB.yaml --data criteo.parquet --seeds 0 1 2 --ranks 2

Plain PyTorch reads the same global batches, with nn.EmbeddingBag tables, nn.Linear layers and the
same optimizers written out; only the initial weights differ. Prints one JSON line per run and a
summary with mean and standard error.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import nn

from shardlab.comm import Groups
from shardlab.config import load_job
from shardlab.launch.building import dense_optimizer
from shardlab.launch.readers import build_readers
from shardlab.train.metrics import ValidationMetrics


class PlainDLRM(nn.Module):
    """DLRM of arXiv 1906.00091 with torch modules only."""

    def __init__(self, job, tables):
        super().__init__()
        self.tables = nn.ModuleList(
            nn.EmbeddingBag(t.num_embeddings, t.embedding_dim, mode="sum", sparse=True)
            for t in tables)
        for table, bag in zip(tables, self.tables, strict=True):
            nn.init.uniform_(bag.weight, *table.init_range)
        dim, count = tables[0].embedding_dim, len(tables) + 1
        self.bottom = mlp([job.data.num_dense, *job.model.bottom_mlp, dim], last_relu=True)
        self.top = mlp([dim + count * (count - 1) // 2, *job.model.top_mlp, 1], last_relu=False)
        self.register_buffer("pairs", torch.triu_indices(count, count, 1), persistent=False)

    def forward(self, dense, sparse):
        lower = self.bottom(dense)
        bags = [bag(sparse[key].values(), sparse[key].offsets()[:-1])
                for key, bag in zip(sparse.keys(), self.tables, strict=True)]
        rows = torch.stack([lower, *bags], 1)
        dots = torch.bmm(rows, rows.transpose(1, 2))
        return self.top(torch.cat([lower, dots[:, self.pairs[0], self.pairs[1]]], 1)).squeeze(1)


def mlp(sizes, last_relu):
    layers = []
    for inputs, outputs in zip(sizes[:-1], sizes[1:], strict=True):
        linear = nn.Linear(inputs, outputs)
        nn.init.normal_(linear.weight, std=(2 / (inputs + outputs)) ** 0.5)
        nn.init.normal_(linear.bias, std=(1 / outputs) ** 0.5)
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*(layers if last_relu else layers[:-1]))


@torch.no_grad()
def row_wise_adagrad(bag, state, lr, eps=1e-10):
    """One step on the touched rows of a table with a sparse gradient."""
    grad = bag.weight.grad.coalesce()
    rows, values = grad.indices()[0], grad.values()
    state[rows] += values.square().mean(1)
    bag.weight[rows] -= lr * values / (state[rows].sqrt() + eps)[:, None]
    bag.weight.grad = None


def train_plain(path, overrides, seed):
    """Validation metrics of plain PyTorch after the job's epochs."""
    job = load_job(path, [*overrides, f"train.seed={seed}",
                          f"batch_size={load_job(path, overrides).batch_size}"])
    assert job.optimizer.sparse.kind == "row_wise_adagrad", "only row_wise_adagrad is written out"
    torch.manual_seed(seed)
    train, validation = build_readers(job, Groups())
    model = PlainDLRM(job, job.table_configs())
    parameters = [*model.bottom.parameters(), *model.top.parameters()]
    dense = dense_optimizer(job.optimizer.dense)(parameters)
    states = [torch.zeros(bag.num_embeddings) for bag in model.tables]
    loss_of = nn.BCEWithLogitsLoss()
    for batch in train:
        dense.zero_grad()
        loss_of(model(batch.dense, batch.sparse), batch.labels).backward()
        dense.step()
        for bag, state in zip(model.tables, states, strict=True):
            row_wise_adagrad(bag, state, job.optimizer.sparse.lr)
    metrics = ValidationMetrics(torch.device("cpu"), lambda tensor: tensor, 0, 1)
    model.eval()
    with torch.no_grad():
        for batch in validation:
            metrics.add(model(batch.dense, batch.sparse), batch.labels)
    return metrics.result().auc


def train_sharded(path, overrides, seed, ranks):
    """Validation AUC that `shardlab train` reports."""
    with tempfile.TemporaryDirectory() as folder:
        settings = [*overrides, f"train.seed={seed}", f"train.run_dir={folder}/run"]
        command = [sys.executable, "-m", "shardlab.cli", "train", path, "--ranks", str(ranks)]
        for setting in settings:
            command += ["--set", setting]
        subprocess.run(command, check=True, capture_output=True)
        summary = json.loads((Path(folder) / "run" / "summary.json").read_text())
    return summary["validation"]["auc"]


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job")
    parser.add_argument("--data", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    args = parser.parse_args()
    overrides = [f"data.path={args.data}", *args.overrides]
    found = {"shardlab": [], "plain": []}
    batch = load_job(args.job, overrides).batch_size
    for seed in args.seeds:
        whole = [*overrides, f"batch_size={batch * args.ranks}"]
        for name, auc in (("shardlab", train_sharded(args.job, overrides, seed, args.ranks)),
                          ("plain", train_plain(args.job, whole, seed))):
            found[name].append(auc)
            print(json.dumps({"framework": name, "seed": seed, "auc": round(auc, 5)}), flush=True)
    for name, values in found.items():
        error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
        print(json.dumps({"framework": name, "mean": round(statistics.mean(values), 5),
                          "standard_error": round(error, 5)}))


if __name__ == "__main__":
    main()
