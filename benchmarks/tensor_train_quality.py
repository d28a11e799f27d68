"""Quality of tensor-train tables: tables x ranks x initialisations, beside uncompressed and hashed.

    python tensor_train_quality.py ../examples/criteo_kaggle_dlrm.yaml --data criteo.parquet
    python tensor_train_quality.py ../examples/criteo_kaggle_dlrm.yaml --synthetic 400000

The job's model and optimisers train once over the data, with tables of the full Criteo Kaggle
cardinalities. The largest 3, 5 or 7 of them become tensor trains in the factors of the paper; or
plain tables of fewer rows that take the same bytes, to which the reader hashes. Prints one JSON
line per run, then a table: means over seeds, and the differences to uncompressed runs of the same
seeds with their standard error. --plot draws it.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import torch
import yaml

import shardlab as sl
from shardlab.comm import Groups
from shardlab.config import load_job
from shardlab.launch.building import build_job_model, build_row_optimizer, dense_optimizer
from shardlab.launch.readers import build_readers
from shardlab.ops.allocator import keep_freed_memory
from shardlab.presets import CRITEO_KAGGLE_CARDINALITIES, CRITEO_SPARSE_NAMES
from shardlab.storage_bytes import tier_bytes
from shardlab.storage_specs import TensorTrainSpec
from shardlab.train.metrics import exact_auc

DIM = 16
#: The seven largest tables and their row factors (arXiv 2101.11714, table 2).
FACTORS = {10131227: [200, 220, 250], 8351593: [200, 200, 209], 7046547: [200, 200, 200],
           5461306: [166, 175, 188], 2202608: [125, 130, 136], 286181: [53, 72, 75],
           142572: [50, 52, 55]}
LARGEST = sorted(FACTORS, reverse=True)


def storage_of(rows: int, rank: int, init: str, lr_scale: float = 1.0) -> dict:
    """Tensor train of one of the seven tables."""
    return {"kind": "tensor_train", "rank": rank, "row_factors": FACTORS[rows],
            "column_factors": [2, 2, 4], "init": init, "lr_scale": lr_scale}


def tables_of(kind: str, count: int, rank: int, init: str, lr_scale: float) -> list[dict]:
    """The 26 tables of a run as entries of a job file."""
    tables = []
    for feature, rows in zip(CRITEO_SPARSE_NAMES, CRITEO_KAGGLE_CARDINALITIES, strict=True):
        entry = {"name": f"t_{feature}", "num_embeddings": rows, "embedding_dim": DIM,
                 "feature_names": [feature]}
        if kind != "fp32" and rows in LARGEST[:count]:
            storage = storage_of(rows, rank, init, lr_scale)
            if kind == "tensor_train":
                entry["storage"] = storage
            else:
                fields = {key: tuple(value) if isinstance(value, list) else value
                          for key, value in storage.items() if key != "kind"}
                held = tier_bytes(TensorTrainSpec(**fields), rows, DIM, "sgd").total
                entry["num_embeddings"] = max(1, held // (4 * DIM))
        tables.append(entry)
    return tables


def load(args: argparse.Namespace, tables: list[dict], seed: int):
    """The job with other tables, on one rank."""
    data = yaml.safe_load(Path(args.job).read_text())
    data |= {"tables": tables, "ranks": 1, "batch_size": args.batch}
    data["train"] = {**data.get("train", {}), "seed": seed}
    if args.synthetic:
        data["data"] = {"kind": "synthetic_criteo", "train_rows": [0, args.synthetic],
                        "validation_rows": [args.synthetic, args.synthetic + 100_000]}
    else:
        data["data"]["path"] = args.data
    path = Path(args.out).with_suffix(".job.yaml")
    path.write_text(yaml.safe_dump(data))
    return load_job(str(path))


def run(args: argparse.Namespace, case: tuple[str, int, int, str], seed: int) -> dict:
    """Trains one configuration; its metrics on the validation rows."""
    job = load(args, tables_of(*case, args.lr_scale), seed)
    torch.manual_seed(seed)
    train, validation = build_readers(job, Groups())
    model, optimizer = sl.shard(build_job_model(job), seed=seed,
                                optimizer=build_row_optimizer(job.optimizer.sparse),
                                dense_optimizer=dense_optimizer(job.optimizer.dense))
    loss_of = torch.nn.BCEWithLogitsLoss()
    for batch in train:
        optimizer.zero_grad()
        loss_of(model(batch.dense, batch.sparse).view(-1), batch.labels).backward()
        optimizer.step()
    model.eval()
    logits, labels = [], []
    with torch.no_grad():
        for batch in validation:
            logits.append(model(batch.dense, batch.sparse).view(-1))
            labels.append(batch.labels)
    logit, label = torch.cat(logits), torch.cat(labels)
    held = sum(tier_bytes(table.storage, table.num_embeddings, DIM, "sgd").total
               for table in job.table_configs())
    return {"accuracy": 100 * ((logit > 0) == (label > 0.5)).float().mean().item(),
            "auc": exact_auc(logit, label), "bytes": held,
            "logloss": torch.nn.functional.binary_cross_entropy_with_logits(logit, label).item()}


def cases_of(args: argparse.Namespace) -> list[tuple[str, int, int, str]]:
    """Configurations: kind, tables, rank, initialisation."""
    cases = [("fp32", 0, 0, "-")]
    for count in args.tables:
        for rank in args.ranks:
            cases += [("tensor_train", count, rank, init) for init in args.inits]
            cases.append(("hashed", count, rank, "-"))
    return cases


def describe(found: dict[tuple, list[dict]]) -> list[str]:
    """The table in Markdown."""
    base = found.get(("fp32", 0, 0, "-"), [])
    lines = ["| tables | rank | start | accuracy % | to fp32 | AUC | to fp32 | logloss | MB |",
             "|---|---|---|---|---|---|---|---|---|"]
    for (kind, count, rank, init), runs in found.items():
        start = init if kind == "tensor_train" else kind
        cells = [str(count or "-"), str(rank or "-"), start]
        for name, digits in (("accuracy", 3), ("auc", 4)):
            values = [one[name] for one in runs]
            cells.append(f"{statistics.mean(values):.{digits}f}")
            paired = [one[name] - other[name] for one, other in zip(runs, base, strict=False)]
            error = statistics.stdev(paired) / len(paired)**0.5 if len(paired) > 1 else 0.0
            cells.append(f"{statistics.mean(paired):+.{digits}f} ± {error:.{digits}f}"
                         if paired and kind != "fp32" else "")
        cells += [f"{statistics.mean(one['logloss'] for one in runs):.4f}",
                  f"{runs[0]['bytes'] / 1e6:.1f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def plot(found: dict[tuple, list[dict]], path: str) -> None:
    """AUC over bytes, as a picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    lines: dict[str, list[tuple[float, float]]] = {}
    for (kind, count, _, init), runs in found.items():
        name = kind if kind != "tensor_train" else f"tensor train, {init}"
        lines.setdefault(name if kind == "fp32" else f"{name}, {count} tables", []).append(
            (runs[0]["bytes"] / 1e6, statistics.mean(one["auc"] for one in runs)))
    for name, points in lines.items():
        axes.plot(*zip(*sorted(points), strict=True), marker="o", label=name)
    axes.set(xscale="log", xlabel="MB of all tables", ylabel="validation AUC")
    axes.legend(fontsize="small")
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    """Trains what is not in --out yet, and prints the table of all that is."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job")
    parser.add_argument("--data", default="")
    parser.add_argument("--synthetic", type=int, default=0, help="rows of the teacher's clicks")
    parser.add_argument("--tables", type=int, nargs="+", default=[3, 5, 7])
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--inits", nargs="+", default=["sampled_gaussian", "gaussian", "uniform"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--lr-scale", type=float, default=1.0, help="of the cores")
    parser.add_argument("--out", default="tensor_train_quality.jsonl", help="runs; read first")
    parser.add_argument("--plot", default="")
    args = parser.parse_args()
    keep_freed_memory()
    path, known = Path(args.out), {}
    for line in path.read_text().splitlines() if path.is_file() else []:
        one = json.loads(line)
        known[tuple(one["case"]), one["seed"]] = one
    for seed in args.seeds:
        for case in cases_of(args):
            if (case, seed) in known:
                continue
            one = {"case": list(case), "seed": seed, **run(args, case, seed)}
            known[case, seed] = one
            print(json.dumps(one), flush=True)
            with path.open("a") as file:
                file.write(json.dumps(one) + "\n")
    found: dict[tuple, list[dict]] = {}
    for (case, _), one in sorted(known.items(), key=lambda item: item[0][1]):
        found.setdefault(case, []).append(one)
    print("\n".join(describe(dict(sorted(found.items())))))
    if args.plot:
        plot(found, args.plot)


if __name__ == "__main__":
    main()
