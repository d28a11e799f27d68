"""Tensor-train steps on CPU: ShardLab beside plain PyTorch, and a DLRM with and without them.

    python tensor_train.py                  # read + gradient + update of one table, JSON lines
    python tensor_train.py --dlrm           # whole DLRM steps, 7 largest Kaggle tables compressed

All columns of a case take turns of a few steps in one process, so that other work on the machine
meets them alike; medians of CPU time on one thread.

  plain     gather the core slices of every id, two bmm, autograd, SGD on dense core gradients
  dedup     the same over distinct ids, and the first product over distinct (i1, i2) pairs
  shardlab  a sharded collection: input checks, de-duplication, autograd, exact SGD
  kernels   rows of distinct ids, gradients and step alone; its GFLOP/s count 3 x the forward's
            arithmetic after de-duplication and reuse of prefixes
  bmm       torch.bmm of 2048 products (q x r) (r x q r): what the machine gives small products

Before anything is timed, ShardLab's rows and a step are compared with the plain columns.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable

import numpy as np
import torch
from benchlib import emit, sample_ids

import shardlab as sl
from shardlab.ops.allocator import keep_freed_memory
from shardlab.ops.step_parameters import StepParameters
from shardlab.ops.tensor_train import logical_cores
from shardlab.ops.tensor_train_batch import batch_rows, batch_steps
from shardlab.ops.tensor_train_types import Workspace
from shardlab.presets import CRITEO_KAGGLE_CARDINALITIES, criteo_kaggle_tables

ROWS, COLUMNS = (200, 220, 250), {16: (2, 2, 4), 64: (4, 4, 4)}
NUM_ROWS = math.prod(ROWS)
LEARNING_RATE = 0.01
_TABLES_COMPRESSED = 7
#: Steps that a column takes in a row.
_BURST = 6


# ---------------------------------------------------------------- one table
def plain_rows(cores: list, digits: tuple, pair_of: torch.Tensor | None = None) -> torch.Tensor:
    """Rows by two bmm; with pair_of, the first two digits are those of distinct pairs."""
    first, second, third = (core.index_select(0, digit)
                            for core, digit in zip(cores, digits, strict=True))
    left = first.flatten(0, 1).view(len(first), *first.shape[2:]).bmm(second.flatten(2))
    left = left.view(len(left), -1, second.shape[3])
    left = left if pair_of is None else left.index_select(0, pair_of)
    return left.bmm(third.flatten(2)).flatten(1)


def plain_step(cores: list, grad: torch.Tensor, *, dedup: bool) -> Callable:
    """A training step of plain PyTorch on cores [p, r, q, r]."""
    optimizer = torch.optim.SGD(cores, lr=LEARNING_RATE)

    def step(ids: torch.Tensor) -> None:
        if dedup:
            distinct, place = torch.unique(ids, return_inverse=True)
            pairs, pair_of = torch.unique_consecutive(distinct // ROWS[2], return_inverse=True)
            digits = pairs // ROWS[1], pairs % ROWS[1], distinct % ROWS[2]
            rows = plain_rows(cores, digits, pair_of).index_select(0, place)
        else:
            digits = ids // (ROWS[1] * ROWS[2]), ids // ROWS[2] % ROWS[1], ids % ROWS[2]
            rows = plain_rows(cores, digits)
        rows.backward(grad)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


class OurTable:
    """One table as a sharded collection in a world of one."""

    def __init__(self, dim: int, rank: int, grad: torch.Tensor):
        table = sl.EmbeddingBagConfig(NUM_ROWS, dim, "t", storage={
            "kind": "tensor_train", "rank": rank, "row_factors": list(ROWS),
            "column_factors": list(COLUMNS[dim])})
        self.model, self.optimizer = sl.shard(sl.EmbeddingBagCollection([table]),
                                              optimizer=sl.optim.SGD(lr=LEARNING_RATE))
        storage = next(iter(self.model.collections().values())).storage
        self.train, self.slices = storage.trains[0], [one.slices for one in storage.memories]
        self.grad, self.workspace = grad, Workspace()

    def cores(self) -> list[torch.nn.Parameter]:
        """Copies of the cores, as the plain columns want them."""
        return [torch.nn.Parameter(core.clone()) for core in logical_cores(
            self.train.cores.train(self.workspace))]

    def step(self, ids: torch.Tensor) -> None:
        """Read, gradient and update through the whole framework."""
        features = sl.KeyedJaggedTensor(["t"], ids, fixed_length=1)
        self.model(features).values().backward(self.grad)
        self.optimizer.step()

    def kernels(self, ids: torch.Tensor) -> None:
        """Rows of distinct ids, gradients and step."""
        trains, edges = [self.train.cores.train(self.workspace)], [0, ids.numel()]
        rows = self.workspace.take("bench", ids.numel() * self.grad.shape[1], self.grad)
        batch_rows(trains, ids, edges, rows, self.workspace)
        rows.mul_(LEARNING_RATE)  # gradients of a size that keeps cores finite
        batch_steps(trains, ids, edges, rows, self.slices, StepParameters("sgd", LEARNING_RATE),
                    self.workspace)


def flops(dim: int, rank: int, ids: torch.Tensor) -> int:
    """Arithmetic of a step over distinct ids: three times the forward's."""
    q, prefixes = COLUMNS[dim], torch.unique_consecutive(ids // ROWS[2]).numel()
    return 3 * (prefixes * 2 * q[0] * rank * q[1] * rank
                + ids.numel() * 2 * q[0] * q[1] * rank * q[2])


def check(dim: int, rank: int, ids: torch.Tensor, grad: torch.Tensor) -> None:
    """A step of ours against a step of plain PyTorch."""
    ours = OurTable(dim, rank, grad)
    for core in range(3):
        values = ours.train.cores.read_core(core)
        values.copy_(torch.randn(values.shape, generator=torch.Generator().manual_seed(core)))
    cores = ours.cores()
    before = [core.detach().clone() for core in cores]
    plain_step(cores, grad, dedup=True)(ids)
    ours.step(ids)
    for mine, theirs, start in zip(ours.cores(), cores, before, strict=True):
        moved = (theirs - start).abs().max()
        assert (mine - theirs).abs().max() < 1e-4 * moved + 1e-6, "ShardLab is not plain PyTorch"


def small_products(dim: int, rank: int, batch: int) -> Callable:
    """The small products that torch.bmm is timed on."""
    q = COLUMNS[dim]
    a, b = torch.randn(batch, q[0], rank), torch.randn(batch, rank, q[1] * rank)
    out = torch.empty(batch, q[0], q[1] * rank)
    return lambda ids: torch.bmm(a, b, out=out)


def run_table(args: argparse.Namespace, dim: int, rank: int) -> None:
    """All columns of one case."""
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(args.batch, dim, generator=generator) * 1e-2
    ids = torch.from_numpy(sample_ids(10_000_000, 64 * args.batch, args.dist,
                                      np.random.default_rng(3))).view(64, -1)
    check(dim, rank, ids[0], grad)
    ours = OurTable(dim, rank, grad)
    columns = {"plain": plain_step(ours.cores(), grad, dedup=False),
               "dedup": plain_step(ours.cores(), grad, dedup=True),
               "shardlab": ours.step, "kernels": ours.kernels,
               "bmm": small_products(dim, rank, args.batch)}
    times: dict[str, list[float]] = {name: [] for name in columns}
    for turn in range(args.turns):
        for name, step in columns.items():
            for number in range(_BURST):
                batch = ids[(turn * _BURST + number) % len(ids)]
                given = torch.unique(batch) if name == "kernels" else batch
                start = time.thread_time()
                step(given)
                if number:  # the first step finds another column's data in the caches
                    times[name].append(time.thread_time() - start)
    counted = float(np.mean([flops(dim, rank, torch.unique(one)) for one in ids]))
    ms = {name: 1e3 * float(np.median(values)) for name, values in times.items()}
    fast = {name: 1e3 * float(np.quantile(values, 0.1)) for name, values in times.items()}
    q = COLUMNS[dim]
    emit(case="table", dim=dim, rank=rank, batch=args.batch, dist=args.dist,
         **{f"{name}_ms": value for name, value in ms.items()},
         **{f"{name}_fast_ms": value for name, value in fast.items()},
         speedup_fast=fast["plain"] / fast["shardlab"],
         gflops_fast=counted / fast["kernels"] / 1e6,
         speedup=ms["plain"] / ms["shardlab"], speedup_dedup=ms["dedup"] / ms["shardlab"],
         gflops=counted / ms["kernels"] / 1e6,
         bmm_gflops=args.batch * 2 * q[0] * rank * q[1] * rank / ms["bmm"] / 1e6)


# ---------------------------------------------------------------- a whole model
def build_dlrm(rank: int | None) -> Callable:
    """step(dense, features, labels) of a DLRM over the Kaggle tables."""
    torch.manual_seed(0)
    tables = criteo_kaggle_tables(16)
    largest = sorted(CRITEO_KAGGLE_CARDINALITIES, reverse=True)[:_TABLES_COMPRESSED]
    if rank is not None:
        tables = [table if table.num_embeddings not in largest else sl.EmbeddingBagConfig(
            table.num_embeddings, 16, table.name, table.feature_names,
            storage={"kind": "tensor_train", "rank": rank}) for table in tables]
    dlrm = sl.models.DLRM(sl.EmbeddingBagCollection(tables), 13, [512, 256, 16], [512, 256])
    model, optimizer = sl.shard(dlrm, optimizer=sl.optim.RowWiseAdagrad(lr=0.05))
    loss_of = torch.nn.BCEWithLogitsLoss()

    def step(dense: torch.Tensor, features: object, labels: torch.Tensor) -> None:
        optimizer.zero_grad()
        loss_of(model(dense, features).view(-1), labels).backward()
        optimizer.step()

    return step


def run_dlrm(args: argparse.Namespace) -> None:
    """Uncompressed and compressed models take turns."""
    columns = {"fp32": build_dlrm(None)} | {f"rank{rank}": build_dlrm(rank) for rank in args.ranks}
    rng = np.random.default_rng(5)
    names = [f"C{i}" for i in range(1, 27)]
    times: dict[str, list[float]] = {name: [] for name in columns}
    for _ in range(args.turns):
        batches = [_kaggle_batch(args, names, rng) for _ in range(_BURST)]
        for name, step in columns.items():
            for number, batch in enumerate(batches):
                start = time.thread_time()
                step(*batch)
                if number:
                    times[name].append(time.thread_time() - start)
    for name, values in times.items():
        ratios = [a / b for a, b in zip(values, times["fp32"], strict=True)]
        emit(case="dlrm", storage=name, batch=args.batch, dist=args.dist,
             step_ms=1e3 * float(np.median(values)),
             overhead=float(np.median(values) / np.median(times["fp32"])) - 1,
             overhead_of_same_batches=float(np.median(ratios)) - 1)


def _kaggle_batch(args: argparse.Namespace, names: list[str], rng: np.random.Generator) -> tuple:
    ids = np.concatenate([sample_ids(rows, args.batch, args.dist, rng)
                          for rows in CRITEO_KAGGLE_CARDINALITIES])
    features = sl.KeyedJaggedTensor(names, torch.from_numpy(ids), fixed_length=1)
    return torch.randn(args.batch, 13), features, (torch.rand(args.batch) < 0.25).float()


def main() -> None:
    """Runs what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dims", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 32, 64])
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--dist", default="zipf:1.05")
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--dlrm", action="store_true")
    args = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(1)
    if args.dlrm:
        run_dlrm(args)
        return
    for dim in args.dims:
        for rank in args.ranks:
            run_table(args, dim, rank)


if __name__ == "__main__":
    main()
