"""Embedding train steps by storage dtype, beyond the last-level cache, beside FBGEMM's.

    python precision_speed.py                                  # 1 thread, dims 64 and 128
    python precision_speed.py --dims 64 --optimizers sgd --no-fbgemm

One table, uniform ids, one id a bag: read the rows, then sum gradients and step every row once. A
turn runs a step of every dtype, in another order each time, so that what else the machine does
falls on all alike; times are CPU time of one thread, the ratio to fp32 is the median of the turns'.
Each dtype is first proven right on a small table: a step moves every row to where fp32 arithmetic
moves it, within a step of the format, and the mean over seeds of what stochastic rounding gives is
what fp32 gives. Prints a JSON line per case.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable, Iterator

import torch
from tbe_cases import Case
from tbe_peers import build_fbgemm

import shardlab as sl
from shardlab.ops.allocator import keep_freed_memory
from shardlab.sharded import ShardedEmbeddingBagCollection, ShardedOptimizer, simple_plan

_LEARNING_RATE, _EPS, _RANGE = 0.01, 1e-8, 0.01
_DTYPES = {"fp32": "fp32", "fp16": "fp16", "bf16": "bf16", "int8": "int8", "int4": "int4",
           "fp16, nearest": {"dtype": "fp16", "rounding": "nearest"}}
#: Largest distance between neighbouring numbers of a format, as a share of the largest weight.
_STEPS = {"fp16": 2.0**-10, "bf16": 2.0**-7, "int8": 1 / 127 * 9 / 8, "int4": 1 / 7 * 9 / 8}
_FBGEMM = {"sgd": "sgd", "row_wise_adagrad": "rowwise_adagrad"}
_CHECK_ROWS, _CHECK_SEEDS = 200, 64


class Ours:
    """A sharded collection in a world of one: checks, routing, autograd and optimiser in."""

    def __init__(self, rows: int, dim: int, storage: object, kind: str, seed: int = 0) -> None:
        rule = {"sgd": sl.optim.SGD(lr=_LEARNING_RATE),
                "row_wise_adagrad": sl.optim.RowWiseAdagrad(lr=_LEARNING_RATE, eps=_EPS)}[kind]
        table = sl.EmbeddingBagConfig(rows, dim, "t", weight_init_min=-_RANGE,
                                      weight_init_max=_RANGE, storage=storage)
        groups = sl.comm.init()
        self.table = ShardedEmbeddingBagCollection([table], simple_plan([table], groups), groups,
                                                   rule.kind, seed)
        self.optimizer = ShardedOptimizer([self.table], rule, None, groups)

    def step(self, ids: torch.Tensor, grad: torch.Tensor) -> None:
        """Reads and steps."""
        features = sl.KeyedJaggedTensor(["t"], ids, fixed_length=1)
        self.table(features).values().backward(grad)
        self.optimizer.step()

    def weights(self) -> torch.Tensor:
        """The table."""
        return torch.cat([chunk.weights for chunk in self.table.chunks()])


class Fbgemm:
    """FBGEMM's table batched embedding on CPU."""

    def __init__(self, rows: int, dim: int, dtype: str, kind: str) -> None:
        self.table = build_fbgemm(Case((rows,), dim, 0, 1), dtype, _FBGEMM[kind],
                                  stochastic=dtype == "fp16")
        for weight in self.table.split_embedding_weights():
            weight.uniform_(-_RANGE, _RANGE)

    def step(self, ids: torch.Tensor, grad: torch.Tensor) -> None:
        """Reads and steps."""
        self.table(ids, torch.arange(ids.numel() + 1)).backward(grad)


def assert_right(kind: str) -> None:
    """One step of a small table from the same weights."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(_CHECK_ROWS, (300,), generator=generator)
    grad = torch.randn(300, 64, generator=generator) * 1e-3
    for name, storage in _DTYPES.items():
        moved, largest = [], 0.0
        for seed in range(_CHECK_SEEDS if name in _STEPS else 1):
            low, full = (Ours(_CHECK_ROWS, 64, spec, kind, seed) for spec in (storage, "fp32"))
            start = low.weights()
            for chunk in low.table.chunks():
                full.table.load_chunk(chunk)
            for table in (low, full):
                table.step(ids, grad)
            moved.append(low.weights() - full.weights())
            largest = max(largest, float(full.weights().abs().max()))
            assert not torch.equal(low.weights(), start)
        step = _STEPS.get(name.split(",")[0], 0.0) * largest
        assert max(float(error.abs().max()) for error in moved) <= step, name
        if name in _STEPS:  # the mean over seeds: 5 standard errors of noise below a step's width
            mean = torch.stack(moved).mean()
            assert abs(float(mean)) < 5 * step / (len(moved) * moved[0].numel()) ** 0.5, name


def steps(tables: dict[str, Ours | Fbgemm], args: argparse.Namespace,
          dim: int) -> Iterator[dict[str, float]]:
    """CPU seconds of a step of every table, turn by turn."""
    grad = torch.randn(args.batch, dim) * 1e-3
    order = list(tables)
    for _ in range(args.turns):
        random.shuffle(order)
        ids = torch.randint(args.table_bytes // (4 * dim), (args.batch,))
        found = {}
        for name in order:
            grad.mul_(1.0)  # as warm for one as for the other
            found[name] = thread_seconds(lambda table=tables[name]: table.step(ids, grad))
        yield found


def thread_seconds(work: Callable[[], None]) -> float:
    """CPU time that this process takes for some work, all threads together."""
    began = time.process_time()
    work()
    return time.process_time() - began


def main() -> None:
    """Checks, then measures."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dims", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--optimizers", nargs="+", default=["row_wise_adagrad", "sgd"])
    parser.add_argument("--table-bytes", type=int, default=1 << 30, help="of the fp32 table")
    parser.add_argument("--batch", type=int, default=16384, help="ids of a step")
    parser.add_argument("--turns", type=int, default=60)
    parser.add_argument("--no-fbgemm", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    for kind in args.optimizers:
        assert_right(kind)
        for dim in args.dims:
            rows = args.table_bytes // (4 * dim)
            tables: dict[str, Ours | Fbgemm] = {
                name: Ours(rows, dim, storage, kind) for name, storage in _DTYPES.items()}
            if not args.no_fbgemm:
                tables |= {f"fbgemm {dtype}": Fbgemm(rows, dim, dtype, kind)
                           for dtype in ("fp32", "fp16")}
            turns = list(steps(tables, args, dim))[args.turns // 6:]
            for name in tables:
                print(json.dumps({
                    "optimizer": kind, "dim": dim, "rows": rows, "dtype": name,
                    "rows_per_s": args.batch / statistics.median(t[name] for t in turns),
                    "over_fp32": statistics.median(t["fp32"] / t[name] for t in turns)}))


if __name__ == "__main__":
    main()
