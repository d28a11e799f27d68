"""Bytes of a step on the wire: ShardLab by codec beside TorchRec, for the same plan and batches.

    python wire_bytes.py --ids zipf --sharding row_wise
    python wire_bytes.py --ids criteo --data criteo.parquet --sharding table_wise

26 tables of Criteo Kaggle's sizes, dim 64, 2048 samples per rank, 2 gloo ranks. ShardLab's bytes
are its own count. TorchRec's are counted at torch.distributed: what a rank gives away in
all_to_all_single, reduce_scatter and all_gather. The dense all-reduce is left out of both. Prints
one JSON line per case: mean bytes that a rank sends per step.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from dlrm_data import DlrmConfig, rank_batch

#: (framework, forward, backward).
CASES = [("shardlab", "fp32", "fp32"), ("shardlab", "fp16", "fp16"), ("shardlab", "fp16", "bf16"),
         ("shardlab", "int8", "int8"), ("shardlab", "int4", "int4"), ("torchrec", "fp32", "fp32"),
         ("torchrec", "fp16", "fp16")]


def real_batch(config: DlrmConfig, path: str, step: int, rank: int):
    """As `dlrm_data.rank_batch`, from a Criteo file, its ids taken modulo the tables' rows."""
    import numpy as np
    import pyarrow.parquet as pq

    names = [f"C{i + 1}" for i in range(len(config.rows))]
    table = pq.read_table(path, columns=names)
    first = (step * config.global_batch + rank * config.rank_batch) % \
        (table.num_rows - config.rank_batch)
    part = table.slice(first, config.rank_batch)
    ids = np.stack([np.asarray([value if isinstance(value, int) else int(value or "0", 16)
                                for value in part.column(name).to_pylist()]) % rows
                    for name, rows in zip(names, config.rows, strict=True)])
    dense, _, labels = rank_batch(config, 0, rank)
    return dense, ids, labels


# ---------------------------------------------------------------- ShardLab
def run_shardlab(args: argparse.Namespace, case: tuple[str, str, str], batches: list) -> dict:
    import shardlab as sl
    from shardlab.plan import ShardingPlan
    from shardlab.specs import EmbeddingBagConfig, ExchangeKind, ShardingType
    from shardlab.table_plan import WireDtypes, build_table_plan

    config, groups = args.config, sl.comm.build_groups()
    tables = [EmbeddingBagConfig(rows, config.dim, f"t{i}", (f"f{i}",))
              for i, rows in enumerate(config.rows)]
    kind = ShardingType(args.sharding)
    ranks = list(range(config.world))
    plan = ShardingPlan(config.world, tuple(build_table_plan(
        table, kind, ranks if kind is ShardingType.ROW_WISE else [i % config.world],
        exchange=ExchangeKind.ROWS) for i, table in enumerate(tables)))
    model, optimizer = sl.shard(sl.EmbeddingBagCollection(tables),
                                plan.with_wire(WireDtypes(*case[1:])), groups=groups)
    collection = model.collections()[""]
    for _, ids, _ in batches:
        optimizer.zero_grad()
        out = model(sl.KeyedJaggedTensor([f"f{i}" for i in range(len(tables))],
                                         torch.from_numpy(ids).reshape(-1), fixed_length=1))
        out.values().sum().backward()
        optimizer.step()
    wire, steps = collection.wire, len(batches)
    return {"ids": wire.ids_bytes / steps, "rows": wire.rows_bytes / steps,
            "gradients": wire.gradients_bytes / steps, "total": wire.total / steps}


# ---------------------------------------------------------------- TorchRec
class Counter:
    """Counts what this rank gives away in torch.distributed's collectives."""

    def __init__(self) -> None:
        self.bytes = {"all_to_all": 0, "reduce_scatter": 0, "all_gather": 0}
        self.world, self.rank = dist.get_world_size(), dist.get_rank()
        for name in ("all_to_all_single", "reduce_scatter_tensor", "reduce_scatter",
                     "all_gather_into_tensor", "all_gather"):
            setattr(dist, name, self._counting(name, getattr(dist, name)))

    def _counting(self, name, original):
        def call(*args, **kwargs):
            self._add(name, args, kwargs)
            return original(*args, **kwargs)
        return call

    def _add(self, name, args, kwargs) -> None:
        source = kwargs.get("input", kwargs.get("input_tensor", args[1] if len(args) > 1 else None))
        if name == "all_to_all_single":
            splits = kwargs.get("input_split_sizes", args[3] if len(args) > 3 else None)
            whole = source.numel() * source.element_size()
            kept = whole // self.world if splits is None else \
                whole * splits[self.rank] // max(1, sum(splits))
            self.bytes["all_to_all"] += whole - kept
        elif name.startswith("reduce_scatter"):
            parts = source if isinstance(source, list) else [source]
            whole = sum(part.numel() * part.element_size() for part in parts)
            self.bytes["reduce_scatter"] += whole * (self.world - 1) // self.world
        else:
            self.bytes["all_gather"] += source.numel() * source.element_size() * (self.world - 1)


def run_torchrec(args: argparse.Namespace, case: tuple[str, str, str], batches: list) -> dict:
    from dlrm_cases import DEFAULT_CASE
    from torchrec.datasets.utils import Batch
    from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
    from torchrec_dlrm import build_torchrec

    plan = "manual" if args.sharding == "row_wise" else "planner"
    settings = {**DEFAULT_CASE, "sharding": args.sharding, "qcomm": case[1], "plan": plan,
                "pipeline": "none"}
    step = build_torchrec(settings, args.config, dist.get_rank())
    counter = Counter()
    for dense, ids, labels in batches:
        sparse = KeyedJaggedTensor(
            keys=[f"f{i}" for i in range(len(args.config.rows))],
            values=torch.from_numpy(ids).reshape(-1),
            lengths=torch.ones(ids.size, dtype=torch.int32))
        step(Batch(torch.from_numpy(dense), sparse, torch.from_numpy(labels)))
    found = {name: size / len(batches) for name, size in counter.bytes.items()}
    return {**found, "total": sum(found.values())}


def run(rank: int, args: argparse.Namespace, case: tuple[str, str, str], meeting: str,
        results: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(args.config.world),
                      LOCAL_WORLD_SIZE=str(args.config.world))
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank,
                            world_size=args.config.world)
    batches = [rank_batch(args.config, step, rank) if args.ids == "zipf" else
               real_batch(args.config, args.data, step, rank) for step in range(args.steps)]
    found = (run_shardlab if case[0] == "shardlab" else run_torchrec)(args, case, batches)
    if rank == 0:
        with open(results, "w") as file:
            json.dump(found, file)
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ids", choices=["zipf", "criteo"], default="zipf")
    parser.add_argument("--data", help="Criteo as Parquet with columns C1 to C26")
    parser.add_argument("--sharding", choices=["row_wise", "table_wise"], default="row_wise")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--max-rows", type=int, default=2_000_000)
    parser.add_argument("--frameworks", nargs="+", default=["shardlab", "torchrec"])
    args = parser.parse_args()
    args.config = DlrmConfig(dim=64, rank_batch=2048, max_rows=args.max_rows)
    for case in (case for case in CASES if case[0] in args.frameworks):
        with tempfile.TemporaryDirectory() as folder:
            results = os.path.join(folder, "results.json")
            mp.spawn(run, (args, case, os.path.join(folder, "meeting"), results),
                     nprocs=args.config.world)
            with open(results) as file:
                found = json.load(file)
        print(json.dumps({"framework": case[0], "forward": case[1], "backward": case[2],
                          "ids_from": args.ids, "sharding": args.sharding,
                          **{name: round(size) for name, size in found.items()}}), flush=True)


if __name__ == "__main__":
    main()
