"""What a rank sends as ranks are added: measured with 1 to 8 processes, predicted up to 1,024.

    python benchmarks/growth.py [--ranks 1 2 3 4 6 8] [--svg docs/img/growth.svg]

The batch of a rank stays as it is: 512 samples of 26 tables (Criteo Kaggle's sizes, at most 20,000
rows, dim 16), Zipf(1.05) ids that are spread over the rows. Measured: what the runtime counts, and
messages as calls of the transport with something to send, per rank and step, mean and busiest rank.
Predicted: the planner's workload (`planner.workload`) and the formulas of `planner.estimate`, for
the mean rank. Prints one JSON line per world size and a Markdown table; draws both.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
import tempfile
from pathlib import Path

import torch
import torch.multiprocessing as mp

sys.path.insert(0, str(Path(__file__).resolve().parent))
from dlrm_data import DlrmConfig, rank_batch

import shardlab as sl
from shardlab import comm
from shardlab.plan import ShardingPlan
from shardlab.planner.workload import build_workload
from shardlab.specs import EmbeddingBagConfig, ExchangeKind, ShardingType
from shardlab.table_plan import build_table_plan
from shardlab.wire_bytes import HEAD_NUMBER_BYTES, HEAD_NUMBERS, id_bytes

FP32_BYTES = 4
BATCH, DIM, MAX_ROWS = 512, 16, 20_000
KINDS = (ShardingType.ROW_WISE, ShardingType.TABLE_WISE)
#: Collectives of a step: counts, ids, rows, gradients.
COLLECTIVES = 4
PREDICTED = [2 ** power for power in range(11)]


def config_of(world: int) -> DlrmConfig:
    return DlrmConfig(dim=DIM, rank_batch=BATCH, max_rows=MAX_ROWS, world=world)


def tables_of(config: DlrmConfig) -> list[EmbeddingBagConfig]:
    return [EmbeddingBagConfig(rows, config.dim, f"t{i}", (f"f{i}",))
            for i, rows in enumerate(config.rows)]


# ---------------------------------------------------------------- measured
class Counted:
    """A lane that counts the messages it is given."""

    def __init__(self, lane: object) -> None:
        self.lane, self.messages = lane, 0

    def all_to_all(self, out: torch.Tensor, source: torch.Tensor, out_splits: list[int],
                   source_splits: list[int]) -> object:
        self.messages += sum(size > 0 for size in source_splits)
        return self.lane.all_to_all(out, source, out_splits, source_splits)


def measure(groups: comm.Groups, kind: ShardingType, steps: int) -> dict[str, float]:
    """This rank's bytes and messages per step."""
    config = config_of(groups.world_size)
    tables, ranks = tables_of(config), range(groups.world_size)
    plan = ShardingPlan(groups.world_size, tuple(build_table_plan(
        table, kind, ranks if kind is ShardingType.ROW_WISE else [i % groups.world_size],
        exchange=ExchangeKind.ROWS) for i, table in enumerate(tables)))
    model, optimizer = sl.shard(sl.EmbeddingBagCollection(tables), plan, groups=groups)
    lane = Counted(groups.exchange)
    if groups.exchange is not None:
        object.__setattr__(groups, "exchange", lane)
    for step in range(steps):
        ids = torch.from_numpy(rank_batch(config, step, groups.rank)[1])
        features = sl.KeyedJaggedTensor([f"f{i}" for i in range(len(tables))], ids.reshape(-1),
                                        fixed_length=1)
        optimizer.zero_grad()
        model(features).values().sum().backward()
        optimizer.step()
    if groups.exchange is not None:
        object.__setattr__(groups, "exchange", lane.lane)
    wire = model.collections()[""].wire
    return {"ids": wire.ids_bytes / steps, "rows": wire.rows_bytes / steps,
            "gradients": wire.gradients_bytes / steps, "messages": lane.messages / steps}


def run_rank(rank: int, world: int, steps: int, results: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world))
    groups = comm.init() if world > 1 else comm.build_groups()
    for kind in KINDS:
        found = comm.gather_objects_json(measure(groups, kind, steps), groups)
        if rank == 0:
            with open(results, "a", encoding="utf-8") as file:
                file.write(json.dumps(summary(kind, world, found)) + "\n")
    comm.shutdown()


def summary(kind: ShardingType, world: int, found: list[dict[str, float]]) -> dict[str, object]:
    sent = [one["ids"] + one["rows"] + one["gradients"] for one in found]
    return {"sharding": kind.value, "ranks": world,
            **{key: round(sum(one[key] for one in found) / world, 1) for key in found[0]},
            "sent": round(sum(sent) / world), "busiest": round(max(sent))}


# ---------------------------------------------------------------- predicted
def predict(kind: ShardingType, world: int) -> dict[str, float]:
    """Bytes and messages of the mean rank."""
    config = config_of(world)
    tables = tables_of(config)
    unique = build_workload(tables, world, BATCH).unique
    away = (world - 1) / world
    ids = (world - 1) * HEAD_NUMBERS * HEAD_NUMBER_BYTES
    for table, count in zip(tables, unique.tolist(), strict=True):
        blocks = min(world, table.num_embeddings) if kind is ShardingType.ROW_WISE else 1
        ids += count * away * id_bytes(-(-table.num_embeddings // blocks)) + \
            HEAD_NUMBER_BYTES * blocks * away
    rows = float(unique.sum()) * away * config.dim * FP32_BYTES
    peers = world - 1 if kind is ShardingType.ROW_WISE else min(world - 1, len(tables) * away)
    return {"ids": ids, "rows": rows, "gradients": rows, "sent": ids + 2 * rows,
            "messages": COLLECTIVES * peers if kind is ShardingType.ROW_WISE
            else (world - 1) + (COLLECTIVES - 1) * peers}


def partial_sums(world: int) -> float:
    """Row-wise with partial bags for all samples of all ranks (reduce-scatter, all-gather)."""
    config = config_of(world)
    return 2.0 * (world - 1) * BATCH * config.dim * FP32_BYTES * len(config.rows)


# ---------------------------------------------------------------- report
def table_lines(measured: list[dict], predicted: dict[tuple[str, int], dict]) -> list[str]:
    lines = ["| ranks | sharding | ids | rows | gradients | sent | predicted | busiest rank | "
             "messages | predicted |", "|---|---|---|---|---|---|---|---|---|---|"]
    for one in sorted(measured, key=lambda entry: (entry["sharding"], entry["ranks"])):
        model = predicted[one["sharding"], one["ranks"]]
        numbers = [one["ids"], one["rows"], one["gradients"], one["sent"], model["sent"],
                   one["busiest"]]
        lines.append(f"| {one['ranks']} | {one['sharding']} | "
                     + " | ".join(f"{number:,.0f}" for number in numbers)
                     + f" | {one['messages']:.0f} | {model['messages']:.0f} |")
    return lines


def draw(measured: list[dict], path: str) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "growth", "svg.fonttype": "none", "font.size": 9})
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    worlds = PREDICTED[1:]
    for kind, color in zip(KINDS, ("tab:blue", "tab:orange"), strict=True):
        models = [predict(kind, world) for world in worlds]
        found = [one for one in measured if one["sharding"] == kind.value and one["ranks"] > 1]
        for axes, key, unit in ((left, "sent", 1e6), (right, "messages", 1.0)):
            axes.plot(worlds, [model[key] / unit for model in models], color=color,
                      label=f"{kind.value}, predicted")
            axes.plot([one["ranks"] for one in found], [one[key] / unit for one in found], "o",
                      color=color, label=f"{kind.value}, measured")
    left.plot(worlds, [partial_sums(world) / 1e6 for world in worlds], color="gray",
              linestyle="--", label="partial bags by reduce-scatter")
    left.set_title("MB that a rank sends per step")
    right.set_title("messages that a rank sends per step")
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("ranks")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    figure.savefig(path, format="svg", metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="*", default=[1, 2, 3, 4, 6, 8])
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--svg", help="draw into this file")
    parser.add_argument("--results", help="JSON lines of an earlier run, to report with this one's")
    options = parser.parse_args()
    measured = []
    if options.results:
        measured = [json.loads(line) for line in
                    Path(options.results).read_text(encoding="utf-8").splitlines()
                    if line.startswith("{")]
    for world in options.ranks:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
        with tempfile.TemporaryDirectory() as folder:
            results = Path(folder) / "results.jsonl"
            mp.spawn(run_rank, (world, options.steps, str(results)), world)
            for line in results.read_text(encoding="utf-8").splitlines():
                measured.append(json.loads(line))
                print(line, flush=True)
    predicted = {(kind.value, world): predict(kind, world) for kind in KINDS
                 for world in {*PREDICTED, *(one["ranks"] for one in measured)}}
    print("\n".join(table_lines(measured, predicted)))
    for kind in KINDS:
        print(kind.value, *(f"{world}: {predicted[kind.value, world]['sent']:,.0f} B, "
                            f"{predicted[kind.value, world]['messages']:,.0f} messages;"
                            for world in PREDICTED))
    if options.svg:
        draw(measured, options.svg)


if __name__ == "__main__":
    main()
