"""Quality of tensor-train tables: tables x ranks x initialisations, beside uncompressed and hashed.

    python tensor_train_quality.py ../examples/criteo_kaggle_dlrm.yaml --data criteo.parquet
    python tensor_train_quality.py ../examples/criteo_kaggle_dlrm.yaml --synthetic 400000
    python tensor_train_quality.py JOB --data FILE --tables 3 --ranks 8 --seeds 0 --out part.jsonl
    python tensor_train_quality.py JOB --data FILE --tables 7 --ranks 8 --cached 1000 --warmup 50
    python tensor_train_quality.py JOB --data FILE --ranks 32 --optimizer adagrad --lr 0.05
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
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from tensor_train_report import describe, grouped, key_of, plot, read_runs

import shardlab as sl
from shardlab.comm import Groups
from shardlab.config import load_job
from shardlab.launch.building import build_job_model, build_row_optimizer, dense_optimizer
from shardlab.launch.readers import build_readers
from shardlab.ops.allocator import keep_freed_memory
from shardlab.ops.step_parameters import RULES
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


@dataclass(frozen=True)
class Variant:
    """What the cores of a run have beside rank and start.

    Attributes:
        lr_scale: of the cores.
        dtype: of the cores.
        cached: rows that every table caches at most.
        warmup: optimiser steps before rows are cached.
    """

    lr_scale: float = 1.0
    dtype: str = "fp32"
    cached: int = 0
    warmup: int = 0

    def name(self, kind: str) -> str:
        """In tables and keys; hashed tables have the bytes of it, and no rate."""
        parts = [self.dtype] if self.dtype != "fp32" else []
        if self.lr_scale != 1.0 and kind == "tensor_train":
            parts.append(f"lr x {self.lr_scale:g}")
        if self.cached:
            parts.append(f"{self.cached} cached" + (f" after {self.warmup}"
                                                    if kind == "tensor_train" else ""))
        return ", ".join(parts) if kind != "fp32" else ""

    def storage(self, rows: int, rank: int, init: str) -> dict:
        """Tensor train of one of the seven tables."""
        storage = {"kind": "tensor_train", "rank": rank, "row_factors": FACTORS[rows],
                   "column_factors": [2, 2, 4], "init": init, "lr_scale": self.lr_scale,
                   "dtype": self.dtype}
        if self.cached:
            storage |= {"cache_fraction": min(1.0, self.cached / rows),
                        "cache_warmup_steps": self.warmup}
        return storage


def tables_of(kind: str, count: int, rank: int, init: str, variant: Variant) -> list[dict]:
    """The 26 tables of a run as entries of a job file."""
    tables = []
    for feature, rows in zip(CRITEO_SPARSE_NAMES, CRITEO_KAGGLE_CARDINALITIES, strict=True):
        entry = {"name": f"t_{feature}", "num_embeddings": rows, "embedding_dim": DIM,
                 "feature_names": [feature]}
        if kind != "fp32" and rows in LARGEST[:count]:
            storage = variant.storage(rows, rank, init)
            if kind == "tensor_train":
                entry["storage"] = storage
            else:
                storage["init"] = "isometric"  # of no weight: hashed tables have its bytes alone
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
    if args.optimizer:
        data.setdefault("optimizer", {})["sparse"] = {"kind": args.optimizer, "lr": args.lr}
    if args.synthetic:
        data["data"] = {"kind": "synthetic_criteo", "train_rows": [0, args.synthetic],
                        "validation_rows": [args.synthetic, args.synthetic + 100_000]}
    else:
        given = {"train_rows": args.train_rows, "validation_rows": args.validation_rows}
        data["data"] |= {"path": args.data} | {key: rows for key, rows in given.items() if rows}
    path = Path(args.out).with_suffix(".job.yaml")
    path.write_text(yaml.safe_dump(data))
    return load_job(str(path))


def run(args: argparse.Namespace, case: tuple[str, int, int, str], seed: int) -> dict:
    """Trains one configuration; its metrics on the validation rows."""
    job = load(args, tables_of(*case, variant_of(args)), seed)
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
    return [case for case in cases if case[0] in args.kinds]


def variant_of(args: argparse.Namespace) -> Variant:
    """What the arguments say of the cores."""
    return Variant(args.lr_scale, args.dtype, args.cached, args.warmup)


def data_name(args: argparse.Namespace) -> str:
    """Of the rows that a run trains and judges on, and of the optimiser that is not the job's."""
    rule = f", {args.optimizer} {args.lr:g}" if args.optimizer else ""
    if args.synthetic:
        return "synthetic" + rule
    return "criteo" + "".join(f" {first}-{end}" for first, end in
                              filter(None, (args.train_rows, args.validation_rows))) + rule


def train_missing(args: argparse.Namespace) -> dict:
    """Trains what --out does not hold yet, and returns all that it holds."""
    path = Path(args.out)
    known = read_runs([args.out]) if path.is_file() else {}
    data, variant = data_name(args), variant_of(args)
    for seed in args.seeds:
        for case in cases_of(args):
            one = {"case": list(case), "seed": seed, "data": data,
                   "variant": variant.name(case[0])}
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
    parser.add_argument("--kinds", nargs="+", default=["fp32", "tensor_train", "hashed"])
    parser.add_argument("--lr-scale", type=float, default=1.0, help="of the cores")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32", help="of the cores")
    parser.add_argument("--cached", type=int, default=0, help="rows that every table caches")
    parser.add_argument("--warmup", type=int, default=50, help="steps before rows are cached")
    parser.add_argument("--optimizer", choices=list(RULES), help="of all tables; not the job's")
    parser.add_argument("--lr", type=float, default=0.05, help="with --optimizer")
    parser.add_argument("--train-rows", type=int, nargs=2, help="instead of the job's")
    parser.add_argument("--validation-rows", type=int, nargs=2, help="instead of the job's")
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
