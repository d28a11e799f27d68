"""Predicted beside measured: trains several plans of the Criteo job on this machine.

    python benchmarks/planner_truth.py criteo.parquet --out truth        # probes, then trains
    python benchmarks/planner_truth.py criteo.parquet --out truth --topology machine.yaml

Run it while nothing else runs. Measures the machine (`shardlab probe`) and the ids (`shardlab
stats`), then trains every plan with every dense model and compares the bytes of every rank and
tier, and the step without waiting for data. The ratio is measured over predicted. Exit code 1:
fewer than five plans of a dense model are within 25 %, or bytes are not within 5 %.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from shardlab.phases import PHASES
from shardlab.planner.compare import Measured, read_run
from shardlab.planner.plan_file import Prediction, read_plan_file

#: Name -> sharding that all tables are asked for.
PLANS = {"planned": "auto", "table_wise": "table_wise", "row_wise": "row_wise",
         "column_wise": "column_wise", "data_parallel": "data_parallel",
         "grid_shard": "grid_shard", "table or row_wise": "[table_wise, row_wise]"}
MODELS = {"usual": "{kind: dlrm, bottom_mlp: [512, 256], top_mlp: [512, 256]}",
          "small": "{kind: dlrm, bottom_mlp: [64], top_mlp: [128, 64]}",
          "tiny": "{kind: dlrm, bottom_mlp: [16], top_mlp: [16]}"}
_STEP_WITHIN, _BYTES_WITHIN, _ENOUGH = 0.25, 0.05, 5
_TIERS = ("hbm", "ddr", "ssd")


@dataclass(frozen=True)
class Truth:
    """One plan's prediction and measurement."""

    model: str
    plan: str
    predicted: Prediction
    measured: Measured

    @property
    def ratio(self) -> float:
        return self.measured.work_ms / self.predicted.step_ms

    @property
    def bytes_off(self) -> float:
        """Largest relative error of a rank's tier."""
        pairs = [(getattr(old, tier), getattr(new, tier)) for old, new in
                 zip(self.predicted.tables, self.measured.tables, strict=True) for tier in _TIERS]
        return max(abs(new / old - 1) if old else float(new > 0) for old, new in pairs)

    @property
    def holds(self) -> bool:
        return abs(self.ratio - 1) <= _STEP_WITHIN

    def phase_ratios(self) -> str:
        """Measured over predicted of the phases that matter, on the rank that waits least."""
        rank, found = self.measured.longest, []
        for index, phase in enumerate(PHASES):
            old, new = self.predicted.phase_ms[rank][index], self.measured.phase_ms[rank][phase]
            if max(old, new) > 0.05 * self.predicted.step_ms:
                found.append(f"{phase} {new:.2g}/{old:.2g}")
        return ", ".join(found)


def shardlab(*arguments: str) -> None:
    """Runs the command line; its last words where it fails."""
    command = [sys.executable, "-m", "shardlab.cli", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        words = (done.stdout + done.stderr).strip().splitlines()[-5:]
        sys.exit(f"shardlab {' '.join(arguments)}:\n" + "\n".join(words))


def write_job(folder: Path, data: str, options: argparse.Namespace) -> Path:
    """The job that all plans share."""
    import pyarrow.parquet as pq

    rows = pq.ParquetFile(data).metadata.num_rows
    steps_a_pass = max(rows // (options.batch * options.ranks), 1)
    job = {"batch_size": options.batch, "ranks": options.ranks,
           "tables": {"preset": "criteo_kaggle", "embedding_dim": options.dim,
                      "max_rows": options.max_rows},
           "data": {"kind": "criteo_parquet", "path": str(Path(data).resolve()),
                    "train_rows": [0, rows]},
           "train": {"epochs": -(-options.steps // steps_a_pass), "max_steps": options.steps,
                     "log_every": max(options.steps // 4, 1),
                     "time_phases": True}}
    path = folder / "job.yaml"
    path.write_text(json.dumps(job, indent=1), encoding="utf-8")  # JSON is YAML
    return path


def train(folder: Path, job: Path, model: str, plan: str, topology: Path) -> Truth:
    """Trains one plan."""
    run = folder / f"{model}-{plan.replace(' ', '_')}"
    shutil.rmtree(run, ignore_errors=True)
    shardlab("train", str(job), *(part for value in (
        f"topology={topology}", f"statistics={folder / 'ids.json'}", f"model={MODELS[model]}",
        f"tables.sharding={PLANS[plan]}", f"train.run_dir={run}")
        for part in ("--set", value)))
    predicted = read_plan_file(run / "plan.json")[1]
    assert predicted is not None
    return Truth(model, plan, predicted, read_run(run))


def report(found: list[Truth]) -> str:
    """A row for every plan."""
    heading = ("dense model", "plan", "predicted ms", "measured ms", "ratio", "bytes off",
               "phases, measured/predicted ms")
    rows = [(one.model, one.plan, f"{one.predicted.step_ms:.2f}", f"{one.measured.work_ms:.2f}",
             f"{one.ratio:.2f}", f"{one.bytes_off:.2%}", one.phase_ratios()) for one in found]
    return "\n".join(f"| {' | '.join(row)} |" for row in (heading, ("---",) * len(heading), *rows))


def verdict(found: list[Truth]) -> int:
    """Prints what holds; the exit code."""
    failed = False
    for model in dict.fromkeys(one.model for one in found):
        of = [one for one in found if one.model == model]
        close = sum(one.holds for one in of)
        off = max(one.bytes_off for one in of)
        print(f"{model}: {close} of {len(of)} plans within {_STEP_WITHIN:.0%}; bytes within "
              f"{off:.2%}")
        failed |= close < min(_ENOUGH, len(of)) or off > _BYTES_WITHIN
    return int(failed)


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="Criteo as Parquet")
    parser.add_argument("--out", required=True, type=Path, help="folder of runs, created")
    parser.add_argument("--topology", type=Path, help="what `shardlab probe` wrote; default: probe")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--batch", type=int, default=2048, help="samples of a rank")
    parser.add_argument("--dim", type=int, default=16, help="columns of the tables")
    parser.add_argument("--max-rows", type=int, default=2_000_000, help="of a table")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--plans", nargs="+", choices=PLANS, default=list(PLANS))
    options = parser.parse_args(arguments)
    folder = options.out.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    topology = options.topology or folder / "machine.yaml"
    if options.topology is None:
        shardlab("probe", "-o", str(topology), "--ranks", str(options.ranks))
    job = write_job(folder, options.data, options)
    shardlab("stats", str(job), "-o", str(folder / "ids.json"))
    found = []
    for model in options.models:
        for plan in options.plans:
            found.append(train(folder, job, model, plan, topology.resolve()))
            print(f"{model}, {plan}: {found[-1].ratio:.2f}", file=sys.stderr, flush=True)
    print(report(found))
    return verdict(found)


if __name__ == "__main__":
    sys.exit(main())
