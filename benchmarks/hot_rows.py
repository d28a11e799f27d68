"""What hot rows do to the load of ranks: bytes and rows by rank, with and without copies.

    python benchmarks/hot_rows.py [--ranks 4] [--hot 0 64 256 1024 auto]
    python benchmarks/hot_rows.py --count --ranks 64        # rows and gradients, without processes

26 tables of Criteo Kaggle's sizes (at most 200,000 rows), dim 64, row-wise, 2,048 samples per rank
and step with one id a feature, Zipf ids, rows by frequency: the first block holds the hottest, as
in a vocabulary that was sorted by counts. Hot rows are those of batches before the measured ones.
Prints one JSON line per case: what ranks send per step, how much of it the busiest one, and the CPU
time of a step of lookup, backward and update (of the training thread; median of steps).
Training with hot rows is checked against training without: same rows, bit by bit.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.multiprocessing as mp

sys.path.insert(0, str(Path(__file__).resolve().parent))
from benchlib import zipf_ranks
from dlrm_data import DlrmConfig

import shardlab as sl
from shardlab import comm
from shardlab.launch.hot_balance import HotCounts, relieving_rows
from shardlab.plan import ShardingPlan
from shardlab.specs import EmbeddingBagConfig, ExchangeKind, ShardingType
from shardlab.table_plan import build_table_plan, even_splits
from shardlab.wire_bytes import FP32_BYTES, HOT_MARKS

LOOKED_AT, WARM_UP = 16, 2


def rank_ids(config: DlrmConfig, step: int, rank: int) -> np.ndarray:
    """int64 [tables, samples]: row r is the r-th most frequent one."""
    rng = np.random.default_rng([config.seed, step, rank])
    return np.stack([zipf_ranks(rows, config.rank_batch, float(config.dist.partition(":")[2]), rng)
                     for rows in config.rows])


def config_of(options: argparse.Namespace) -> DlrmConfig:
    return DlrmConfig(dim=64, rank_batch=2048, world=options.ranks, max_rows=200_000,
                      dist=f"zipf:{options.alpha}")


def hottest(config: DlrmConfig, wish: str, plan: ShardingPlan) -> dict[str, list[int]]:
    """Rows by table, from batches that are not trained."""
    if wish == "0":
        return {}
    batches = [rank_ids(config, 1000 + step, rank)
               for step in range(LOOKED_AT // config.world + 1) for rank in range(config.world)]
    samples, counts_of = len(batches) * config.rank_batch, {}
    for t in range(len(config.rows)):
        rows, counts = np.unique(np.concatenate([ids[t] for ids in batches]), return_counts=True)
        order = np.lexsort((rows, -counts))
        counts_of[f"t{t}"] = HotCounts(samples, samples, tuple(zip(
            rows[order].tolist(), counts[order].tolist(), strict=True)))
    if wish == "auto":
        return relieving_rows(counts_of, plan, config.rank_batch)
    return {name: [row for row, _ in found.rows[:int(wish)]] for name, found in counts_of.items()}


def build_plan(config: DlrmConfig) -> tuple[list[EmbeddingBagConfig], ShardingPlan]:
    tables = [EmbeddingBagConfig(rows, config.dim, f"t{i}", (f"f{i}",))
              for i, rows in enumerate(config.rows)]
    return tables, ShardingPlan(config.world, tuple(
        build_table_plan(table, ShardingType.ROW_WISE, range(config.world),
                         exchange=ExchangeKind.ROWS) for table in tables))


def run_case(groups: comm.Groups, tables: list[EmbeddingBagConfig], plan: ShardingPlan,
             batches: list[sl.KeyedJaggedTensor]) -> tuple[dict, torch.Tensor]:
    """This rank's figures, and a sum over its rows in the end."""
    model, optimizer = sl.shard(sl.EmbeddingBagCollection(tables), plan, groups=groups)
    collection = model.collections()[""]
    marks, sent = [], []
    for features in batches:
        wire = collection.wire
        sent.append((wire.ids_bytes, wire.rows_bytes, wire.gradients_bytes))
        marks.append(time.thread_time())
        optimizer.zero_grad()
        model(features).values().square().mean().backward()
        optimizer.step()
        comm.barrier(groups)
    marks.append(time.thread_time())
    wire = collection.wire
    sent.append((wire.ids_bytes, wire.rows_bytes, wire.gradients_bytes))
    steps = len(batches) - WARM_UP
    ids, rows, gradients = ((last - first) / steps for first, last in
                            zip(sent[WARM_UP], sent[-1], strict=True))
    times = sorted(end - start for start, end in pairwise(marks[WARM_UP:]))
    total = torch.stack([chunk.weights.double().sum() for chunk in collection.chunks()]).sum()
    return {"ids": ids, "rows": rows, "gradients": gradients,
            "cpu_ms": times[len(times) // 2] * 1e3}, total


def run_rank(rank: int, options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(options.ranks))
    groups = comm.init()
    config = config_of(options)
    names = [f"f{i}" for i in range(len(config.rows))]
    ids = [torch.from_numpy(rank_ids(config, step, rank)) for step in
           range(options.steps + WARM_UP)]
    batches = [sl.KeyedJaggedTensor(names, part.reshape(-1), fixed_length=1) for part in ids]
    expected = None
    for wish in options.hot:
        tables, plan = build_plan(config)
        hot = hottest(config, wish, plan)
        mine, total = run_case(groups, tables, plan.with_hot_rows(hot), batches)
        assert expected is None or torch.equal(total, expected), "hot rows changed the training"
        expected = total
        found = comm.gather_objects_json(mine, groups)
        if rank == 0:
            print(json.dumps({"hot_rows": wish, "copies": sum(map(len, hot.values())),
                              **summary(found)}), flush=True)
    comm.shutdown()


# ---------------------------------------------------------------- more ranks than there are cores
def count(config: DlrmConfig, hot: dict[str, list[int]]) -> list[dict]:
    """What every rank of a step would send: rows it owns, gradients of rows that others own."""
    world, row_bytes = config.world, FP32_BYTES * config.dim
    rows, gradients = np.zeros(world), np.zeros(world)
    for source in range(world):
        ids = rank_ids(config, 0, source)
        for t, size in enumerate(config.rows):
            found = np.setdiff1d(ids[t], hot.get(f"t{t}", []))
            starts = np.array([start for start, _ in even_splits(size, world)])
            owners = np.bincount(np.searchsorted(starts, found, side="right") - 1,
                                 minlength=world)
            owners[source] = 0
            rows += owners * row_bytes
            gradients[source] += owners.sum() * row_bytes
    copies = sum(map(len, hot.values()))
    gradients += 2 * (world - 1) / world * copies * (row_bytes + FP32_BYTES * HOT_MARKS)
    return [{"ids": 0.0, "rows": one, "gradients": two, "cpu_ms": 0.0}
            for one, two in zip(rows.tolist(), gradients.tolist(), strict=True)]


def summary(found: list[dict]) -> dict[str, float]:
    """Means over ranks, and the busiest rank's share of what all send."""
    kinds = ("ids", "rows", "gradients")
    totals = [sum(one[kind] for kind in kinds) for one in found]
    rows = [one["rows"] for one in found]
    return {**{kind: round(sum(one[kind] for one in found) / len(found)) for kind in kinds},
            "sent": round(sum(totals) / len(found)), "busiest_sent": round(max(totals)),
            "busiest_share": round(max(totals) / sum(totals), 3),
            "busiest_share_of_rows": round(max(rows) / max(sum(rows), 1), 3),
            "busiest_cpu_ms": round(max(one["cpu_ms"] for one in found), 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--alpha", type=float, default=1.05)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--hot", nargs="+", default=["0", "64", "256", "1024", "auto"])
    parser.add_argument("--count", action="store_true", help="count a step, run none")
    options = parser.parse_args()
    if options.count:
        config = config_of(options)
        for wish in options.hot:
            hot = hottest(config, wish, build_plan(config)[1])
            print(json.dumps({"hot_rows": wish, "copies": sum(map(len, hot.values())),
                              **summary(count(config, hot))}), flush=True)
        return
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    mp.spawn(run_rank, (options,), options.ranks)


if __name__ == "__main__":
    main()
