"""Quality of tensor-train tables: tables x ranks x initialisations, beside uncompressed and hashed.

    python tensor_train_quality.py ../examples/criteo_kaggle_dlrm.yaml --data criteo.parquet
    python tensor_train_quality.py ../examples/criteo_kaggle_dlrm.yaml --synthetic 400000
    python tensor_train_quality.py JOB --data FILE --tables 3 --ranks 8 --seeds 0 --out part.jsonl
    python tensor_train_quality.py --from first.jsonl part.jsonl --plot quality.png

The job's model and optimisers train once over the data, with tables of the full Criteo Kaggle
cardinalities. The largest 3, 5 or 7 of them become tensor trains in the factors of the paper; or
plain tables of fewer rows that take the same bytes, to which the reader hashes. Prints one JSON
line per run, then a table: means over seeds, and the differences to uncompressed runs of the same
seeds with their standard error. --plot draws it. Subsets may run apart and at the same time, each
with its own --out; --from trains nothing and makes the table of all their lines.
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
from shardlab.storage_specs import TENSOR_TRAIN_INITS, TensorTrainSpec
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


Key = tuple[str, str, int, int, str, float]


def key_of(one: dict) -> Key:
    """What the runs of all seeds have in common: data, kind, tables, rank, start, lr_scale."""
    return (one.get("data", "criteo"), *one["case"], one.get("lr_scale", 1.0))


def read_runs(paths: list[str]) -> dict[tuple[Key, int], dict]:
    """Runs by configuration and seed; a later line of the same run takes its place.

    Raises:
        SystemExit: a file that is not there.
    """
    runs = {}
    for path in paths:
        if not Path(path).is_file():
            raise SystemExit(f"--from {path}: no such file; expected JSON lines that --out wrote")
        for line in Path(path).read_text().splitlines():
            one = json.loads(line)
            runs[key_of(one), one["seed"]] = one
    return runs


def grouped(runs: dict[tuple[Key, int], dict]) -> dict[Key, dict[int, dict]]:
    """Runs of every configuration by seed, in the order of the table."""
    found: dict[Key, dict[int, dict]] = {}
    for key, seed in sorted(runs):
        found.setdefault(key, {})[seed] = runs[key, seed]
    return found


def describe(found: dict[Key, dict[int, dict]]) -> list[str]:
    """The table in Markdown; differences are those of the seeds that fp32 ran, too."""
    lines = ["| data | tables | rank | start | accuracy % | to fp32 | AUC | to fp32 | logloss | MB "
             "| seeds |", "|---" * 11 + "|"]
    for (data, kind, count, rank, init, lr_scale), runs in found.items():
        base = found.get((data, "fp32", 0, 0, "-", 1.0), {})
        start = init if kind == "tensor_train" else kind
        start += "" if lr_scale == 1.0 else f", lr x {lr_scale:g}"
        cells = [data, str(count or "-"), str(rank or "-"), start]
        for name, digits in (("accuracy", 3), ("auc", 4)):
            cells.append(f"{statistics.mean(one[name] for one in runs.values()):.{digits}f}")
            paired = [one[name] - base[seed][name] for seed, one in runs.items() if seed in base]
            error = statistics.stdev(paired) / len(paired)**0.5 if len(paired) > 1 else 0.0
            cells.append(f"{statistics.mean(paired):+.{digits}f} ± {error:.{digits}f}"
                         if paired and kind != "fp32" else "")
        first = next(iter(runs.values()))
        cells += [f"{statistics.mean(one['logloss'] for one in runs.values()):.4f}",
                  f"{first['bytes'] / 1e6:.1f}", str(len(runs))]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def plot(found: dict[Key, dict[int, dict]], path: str) -> None:
    """AUC over bytes, a picture with a panel for every data set and number of tables.

    Bars are standard errors over seeds, where there are several.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = sorted({(key[0], key[2]) for key in found if key[1] != "fp32"})
    kinds = sorted({line_name(key) for key in found if key[1] != "fp32"})
    figure, axes = pyplot.subplots(1, len(panels), figsize=(4.2 * len(panels) + 1.5, 4),
                                   squeeze=False, sharey=True)
    for (data, count), panel in zip(panels, axes[0], strict=True):
        for color, name in enumerate(kinds):
            chosen = sorted((next(iter(runs.values()))["bytes"] / 1e6, *mean_auc(runs))
                            for key, runs in found.items()
                            if key[0] == data and key[2] == count and line_name(key) == name)
            if chosen:
                x, y, error = zip(*chosen, strict=True)
                panel.errorbar(x, y, error, marker="o", markersize=4, capsize=2, label=name,
                               color=f"C{color}", linestyle="--" if name == "hashed" else "-")
        for key, runs in found.items():
            if key[0] == data and key[1] == "fp32":
                panel.axhline(mean_auc(runs)[0], color="grey", linestyle=":", label="fp32")
        panel.set(title=f"{data}, {count} largest tables", xscale="log",
                  xlabel="MB of all tables")
        panel.grid(alpha=0.3)
    axes[0, 0].set_ylabel("validation AUC")
    axes[0, -1].legend(fontsize="x-small", loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def line_name(key: Key) -> str:
    """Of a run, in a picture: how its tables start, or that they are hashed."""
    _, kind, _, _, init, lr_scale = key
    return (init if kind == "tensor_train" else kind) + \
        ("" if lr_scale == 1.0 else f", lr x {lr_scale:g}")


def mean_auc(runs: dict[int, dict]) -> tuple[float, float]:
    """Mean over seeds, and its standard error; 0 for one seed."""
    found = [one["auc"] for one in runs.values()]
    error = statistics.stdev(found) / len(found) ** 0.5 if len(found) > 1 else 0.0
    return statistics.mean(found), error


def train_missing(args: argparse.Namespace) -> dict[tuple[Key, int], dict]:
    """Trains what --out does not hold yet, and returns all that it holds."""
    path = Path(args.out)
    known = read_runs([args.out]) if path.is_file() else {}
    data = "synthetic" if args.synthetic else "criteo"
    for seed in args.seeds:
        for case in cases_of(args):
            lr_scale = args.lr_scale if case[0] == "tensor_train" else 1.0
            one = {"case": list(case), "seed": seed, "data": data, "lr_scale": lr_scale}
            if (key_of(one), seed) in known:
                continue
            one |= run(args, case, seed)
            known[key_of(one), seed] = one
            print(json.dumps(one), flush=True)
            with path.open("a") as file:
                file.write(json.dumps(one) + "\n")
    return known


def main() -> None:
    """Trains what is asked for, or reads what was trained, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", nargs="?")
    parser.add_argument("--data", default="")
    parser.add_argument("--synthetic", type=int, default=0, help="rows of the teacher's clicks")
    parser.add_argument("--tables", type=int, nargs="+", default=[3, 5, 7])
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--inits", nargs="+", default=list(TENSOR_TRAIN_INITS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--lr-scale", type=float, default=1.0, help="of the cores")
    parser.add_argument("--out", default="tensor_train_quality.jsonl", help="runs; read first")
    parser.add_argument("--plot", default="")
    parser.add_argument("--from", dest="files", nargs="+", default=[], help="runs; trains nothing")
    args = parser.parse_args()
    if not args.files and not (args.job and (args.data or args.synthetic)):
        parser.error("expected a job with --data FILE or --synthetic ROWS, or --from FILES")
    keep_freed_memory()
    found = grouped(read_runs(args.files) if args.files else train_missing(args))
    print("\n".join(describe(found)))
    if args.plot:
        plot(found, args.plot)


if __name__ == "__main__":
    main()
