"""Validation AUC of a Criteo job by codec of the wire, over seeds; 2 ranks, row-wise tables.

    python wire_quality.py --data criteo.parquet --seeds 0 1 2 3 4

Prints one JSON line per run, and per codec: mean AUC, standard error, and the mean difference to
fp32 of the same seed with its standard error. Seeds change weights, not data.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

#: Name -> what ``wire:`` says.
WIRES = {"fp32": "fp32", "fp16 + bf16": "{forward: fp16, backward: bf16}", "int8": "int8",
         "fp8 + fp8_e5m2": "{forward: fp8, backward: fp8_e5m2}", "int4": "int4",
         "dense fp16": "{dense: fp16}", "dense bf16": "{dense: bf16}",
         "dense int8": "{dense: int8}", "dense int4": "{dense: int4}",
         "all fp16": "{forward: fp16, backward: fp16, dense: fp16}",
         "all int8": "{forward: int8, backward: int8, dense: int8}"}


def job_text(args: argparse.Namespace) -> str:
    return f"""
batch_size: {args.batch}
ranks: 2
tables: {{preset: criteo_kaggle, embedding_dim: {args.dim}, max_rows: 200000, sharding: row_wise,
          exchange: rows}}
data: {{kind: criteo_parquet, path: {args.data}, validation_fraction: 0.2}}
model: {{kind: dlrm, bottom_mlp: [64, 32], top_mlp: [64, 32]}}
optimizer: {{sparse: {{kind: row_wise_adagrad, lr: 0.05}}, dense: {{kind: adam, lr: 0.001}}}}
train: {{epochs: 1, log_every: 1000, resume: never}}
"""


def run(args: argparse.Namespace, wire: str, seed: int) -> dict:
    """The summary of one run."""
    with tempfile.TemporaryDirectory() as folder:
        job = Path(folder) / "job.yaml"
        job.write_text(job_text(args))
        subprocess.run([sys.executable, "-m", "shardlab.cli", "train", str(job), "--set",
                        f"wire={WIRES[wire]}", "--set", f"train.seed={seed}", "--set",
                        f"train.run_dir={folder}/run"], check=True, capture_output=True)
        return json.loads((Path(folder) / "run" / "summary.json").read_text())


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean and standard error; one seed has none."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return statistics.mean(values), error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--wires", nargs="+", choices=list(WIRES), default=list(WIRES))
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--dim", type=int, default=16)
    args = parser.parse_args()
    found: dict[str, dict[int, float]] = {wire: {} for wire in args.wires}
    for seed in args.seeds:
        for wire in args.wires:
            summary = run(args, wire, seed)
            found[wire][seed] = summary["validation"]["auc"]
            sent = summary["wire_per_step"]
            print(json.dumps({"wire": wire, "seed": seed, "auc": found[wire][seed],
                              "rows": sent["rows"], "gradients": sent["gradients"],
                              "dense": sent["dense_all_reduce"]}), flush=True)
    for wire, by_seed in found.items():
        mean, error = mean_and_error(list(by_seed.values()))
        change, spread = mean_and_error([auc - found["fp32"][seed]
                                         for seed, auc in by_seed.items()])
        print(json.dumps({"wire": wire, "auc": round(mean, 5), "standard_error": round(error, 5),
                          "to_fp32": round(change, 5), "its_error": round(spread, 5)}))


if __name__ == "__main__":
    main()
