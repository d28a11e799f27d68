"""Validation AUC of a job under several storages, over seeds, against fp32.

    python storage_quality.py JOB.yaml --data criteo.parquet --seeds 0 1 2 3 4
    python storage_quality.py ../examples/criteo.yaml --set tables.max_rows=   # generated clicks

Each storage trains through `shardlab train`, in a process of its own. Prints one JSON line per run,
then a table with mean, standard error, the mean difference to fp32 of the same seeds with its
standard error, and the tables' bytes without optimiser state.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from shardlab.config import load_job
from shardlab.storage_bytes import tier_bytes

NEAREST = ", rounding: nearest"
CACHE = "{{levels: [{{fraction: {share}}}, {{dtype: {dtype}}}]{rest}}}".format
STORAGES = {
    "fp32": "fp32",
    "fp16, stochastic": "fp16",
    "bf16, stochastic": "bf16",
    "int8 + 5 % cache, stochastic": CACHE(share=0.05, dtype="int8", rest=""),
    "int4 + 1 % cache, stochastic": CACHE(share=0.01, dtype="int4", rest=""),
    "int8, stochastic": "int8",
    "int4, stochastic": "int4",
    "fp16, nearest": f"{{dtype: fp16{NEAREST}}}",
    "bf16, nearest": f"{{dtype: bf16{NEAREST}}}",
    "int8, nearest": f"{{dtype: int8{NEAREST}}}",
    "int4, nearest": f"{{dtype: int4{NEAREST}}}",
    "int8 + 5 % cache, nearest": CACHE(share=0.05, dtype="int8", rest=NEAREST),
    "int4 + 1 % cache, nearest": CACHE(share=0.01, dtype="int4", rest=NEAREST),
}


def train(args: argparse.Namespace, storage: str, seed: int) -> float:
    """Validation AUC that `shardlab train` reports."""
    with tempfile.TemporaryDirectory() as folder:
        settings = [*settings_of(args, storage), f"train.seed={seed}",
                    f"train.run_dir={folder}/run"]
        command = [sys.executable, "-m", "shardlab.cli", "train", args.job, "--ranks",
                   str(args.ranks)]
        for setting in settings:
            command += ["--set", setting]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{storage}, seed {seed}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
        summary = json.loads((Path(folder) / "run" / "summary.json").read_text())
    return float(summary["validation"]["auc"])


def settings_of(args: argparse.Namespace, storage: str) -> list[str]:
    """What a job is told."""
    data = [f"data.path={args.data}"] if args.data else []
    return [*args.overrides, *data, f"tables.storage={storage}"]


def table_bytes(args: argparse.Namespace, storage: str) -> int:
    """Bytes of all tables on one rank, without optimiser state."""
    job = load_job(args.job, settings_of(args, storage))
    return sum(tier_bytes(table.storage, table.num_embeddings, table.embedding_dim, "sgd").total
               for table in job.table_configs())


def error_of(values: list[float]) -> float:
    """Standard error of the mean."""
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")


def main() -> None:
    """Trains all and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job")
    parser.add_argument("--data", help="file with the data; none: the job's")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--storages", nargs="+", default=list(STORAGES), choices=list(STORAGES))
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    args = parser.parse_args()
    found: dict[str, list[float]] = {name: [] for name in args.storages}
    for seed in args.seeds:
        for name in args.storages:
            auc = train(args, STORAGES[name], seed)
            found[name].append(auc)
            print(json.dumps({"storage": name, "seed": seed, "auc": round(auc, 5)}), flush=True)
    base = found.get("fp32")
    plain = table_bytes(args, "fp32")
    print("| storage | AUC | difference to fp32 | bytes of the tables | smaller |")
    print("|---|---|---|---|---|")
    for name, values in found.items():
        difference = ""
        if base is not None and name != "fp32":
            deltas = [a - b for a, b in zip(values, base, strict=True)]
            difference = f"{statistics.mean(deltas):+.5f} ± {error_of(deltas):.5f}"
        size = table_bytes(args, STORAGES[name])
        print(f"| {name} | {statistics.mean(values):.5f} ± {error_of(values):.5f} | {difference} | "
              f"{size / 1e6:.1f} MB | {plain / size:.2f}x |")


if __name__ == "__main__":
    main()
