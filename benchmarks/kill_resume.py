"""Kills a training job by SIGKILL again and again, resumes it, and compares it with one left alone.

    python kill_resume.py --dir /a/folder [--kills 20] [--ranks 2] [--seed 0]

A small DLRM on generated Criteo clicks, tables with caches above fp16 rows, checkpoints in the
background, three of four incremental. Kills hit, in turn,

* training: one to all ranks, at a random instant after a checkpoint was completed;
* a checkpoint: one to all ranks, while its staging folder exists;
* a compaction: of the newest incremental checkpoint, after the job was killed.

Every time the newest checkpoint is verified, and the job resumed. In the end all rows, optimiser
states, dense parameters and positions must equal the undisturbed job's, bit for bit. Prints JSON
lines; exit code 1 where they differ.
"""

from __future__ import annotations

import argparse
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch
import yaml
from benchlib import emit

from shardlab.errors import CheckpointError
from shardlab.train import CheckpointReader, latest, verify

_WAIT_S = 180.0
_POLL_S = 0.002
_ENDS_S = 120.0


def write_job(args: argparse.Namespace, folder: Path) -> Path:
    """The job file of a run."""
    storage = {"levels": [{"fraction": 0.1}, {"dtype": "fp16"}]}
    job = {
        "batch_size": 256, "ranks": args.ranks,
        "tables": [{"name": f"C{i + 1}", "num_embeddings": 20_000, "embedding_dim": 8,
                    "feature_names": [f"C{i + 1}"], "storage": storage} for i in range(26)],
        "model": {"kind": "dlrm", "bottom_mlp": [32], "top_mlp": [32]},
        "data": {"kind": "synthetic_criteo",
                 "train_rows": [0, 256 * args.ranks * args.steps]},
        "optimizer": {"sparse": {"kind": "row_wise_adagrad", "lr": 0.05},
                      "dense": {"kind": "adam", "lr": 0.001}},
        "train": {"log_every": 10, "checkpoint_every": args.every, "checkpoint_keep": 3,
                  "checkpoint_background": True, "checkpoint_incremental": True,
                  "checkpoint_full_every": 4, "run_dir": str(folder)}}
    path = folder.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(job))
    return path


def start(job: Path, log: Path) -> subprocess.Popen[bytes]:
    """Starts the job's ranks, or what is left of them to do."""
    with open(log, "ab") as out:
        return subprocess.Popen([sys.executable, "-m", "shardlab.cli", "train", str(job)],
                                stdout=out, stderr=subprocess.STDOUT)


def ranks_of(job: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """The processes of the job's ranks."""
    found = []
    for process in psutil.Process(job.pid).children(recursive=True):
        try:
            if "RANK" in process.environ() and process.name().startswith("python"):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def wait(what: str, ready: Callable[[], bool], job: subprocess.Popen[bytes]) -> bool:
    """Waits until something holds; False where the job ended first."""
    deadline = time.monotonic() + _WAIT_S
    while not ready():
        if job.poll() is not None:
            return False
        if time.monotonic() > deadline:
            raise TimeoutError(f"no {what} within {_WAIT_S} s")
        time.sleep(_POLL_S)
    return True


def kill_ranks(job: subprocess.Popen[bytes], chance: random.Random) -> int:
    """Kills one to all ranks, and waits until the launcher has ended the others; how many."""
    ranks = ranks_of(job)
    victims = chance.sample(ranks, chance.randint(1, len(ranks))) if ranks else []
    for victim in victims:
        victim.send_signal(signal.SIGKILL)
    job.wait(_ENDS_S)
    return len(victims)


def is_incremental(path: Path | None) -> bool:
    """Whether it needs another one; False also where it has just been pruned."""
    try:
        return path is not None and CheckpointReader(path).base is not None
    except CheckpointError:
        return False


def disturb(kind: str, job: subprocess.Popen[bytes], folder: Path, chance: random.Random,
            log: Path) -> dict[str, object] | None:
    """One kill of a kind; None where the job ended before it."""
    checkpoints, before = folder / "checkpoints", latest(folder / "checkpoints")
    if kind == "checkpoint":
        if not wait("checkpoint under way", lambda: any(checkpoints.glob(".tmp-step-*")), job):
            return None
        time.sleep(chance.uniform(0, 0.15))
    elif kind == "compaction":
        if not wait("incremental checkpoint", lambda: is_incremental(latest(checkpoints)), job):
            return None
    else:
        if not wait("checkpoint", lambda: latest(checkpoints) != before, job):
            return None
        time.sleep(chance.uniform(0, 0.6))
    if job.poll() is not None:
        return None
    under_way = any(checkpoints.glob(".tmp-step-*"))
    killed = kill_ranks(job, chance)
    found: dict[str, object] = {"ranks_killed": killed, "in_checkpoint": under_way}
    newest = latest(checkpoints)
    if kind == "compaction" and newest is not None:
        found["incremental"] = CheckpointReader(newest).base is not None
        with open(log, "ab") as out:
            merge = subprocess.Popen([sys.executable, "-m", "shardlab.cli", "compact",
                                      str(newest)], stdout=out, stderr=subprocess.STDOUT)
        while merge.poll() is None and not any(newest.glob("whole-*")):
            time.sleep(_POLL_S / 4)
        time.sleep(chance.uniform(0, 0.02))
        merge.kill()
        found["compaction_killed"] = merge.wait() == -signal.SIGKILL
    return found


def contents(path: Path) -> dict[str, torch.Tensor | str]:
    """Everything of a checkpoint that a run goes on with."""
    reader = CheckpointReader(path)
    found: dict[str, torch.Tensor | str] = dict(reader.dense())
    for table in reader.tables:
        for chunk in reader.table_chunks(table):
            for name, value in {"weights": chunk.weights, **chunk.state}.items():
                found[f"{table.name}.{chunk.row_start}.{chunk.col_start}.{name}"] = value.clone()
    shared = reader.state("shared")
    found["position"] = str(shared["extra"]["position"])
    found["optimizer"] = str(shared["optimizer"])
    return found


def same(left: dict[str, torch.Tensor | str], right: dict[str, torch.Tensor | str]) -> bool:
    """Equal to the bit."""
    return left.keys() == right.keys() and all(
        torch.equal(value, right[name]) if isinstance(value, torch.Tensor)  # type: ignore[arg-type]
        else value == right[name] for name, value in left.items())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dir", required=True, type=Path)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--every", type=int, default=40)
    args = parser.parse_args()
    args.dir.mkdir(parents=True, exist_ok=True)
    log, chance = args.dir / "log", random.Random(args.seed)
    alone, killed = args.dir / "alone", args.dir / "killed"
    if not (alone / "summary.json").exists() and start(write_job(args, alone), log).wait() != 0:
        raise SystemExit(f"the undisturbed job failed; see {log}")
    job_file, done, kinds = write_job(args, killed), 0, ("training", "checkpoint", "compaction")
    while True:
        job = start(job_file, log)
        kind = kinds[done % len(kinds)]
        found = disturb(kind, job, killed, chance, log) if done < args.kills else None
        if found is None:
            if job.wait() != 0:
                raise SystemExit(f"the resumed job failed; see {log}")
            break
        done += 1
        newest = latest(killed / "checkpoints")
        emit(kill=done, kind=kind, newest=None if newest is None else newest.name,
             verified=0 if newest is None else verify(newest), **found)
    first, second = (latest(folder / "checkpoints") for folder in (alone, killed))
    assert first is not None
    assert second is not None
    equal = first.name == second.name and same(contents(first), contents(second))
    emit(kills=done, steps=args.steps, ranks=args.ranks, final=second.name, equal=equal)
    return int(not equal or done < args.kills)


if __name__ == "__main__":
    sys.exit(main())
