"""Whole jobs on the ranks of the pool, which have imported torch already."""

from __future__ import annotations

import json
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import torch

from shardlab import comm
from shardlab.comm import Groups
from shardlab.config import load_job
from shardlab.launch.train import run_job
from tests.harness import run_ranks


def train_on_pool(job: Path | None, ranks: int, folder: Path, sets: list[str]) -> dict:
    """Runs a job, None being the demo, in a run folder; returns the summary it leaves there."""
    sets = [*sets, f"train.run_dir={folder}", f"ranks={ranks}"]
    assert run_ranks(ranks, _train, job and str(job), sets) == [0] * ranks
    return json.loads((folder / "summary.json").read_text())


def _train(_: Groups, job: str | None, sets: list[str]) -> int:
    """On a rank, to whom the process group belongs: the job must not end it."""
    before, comm.shutdown = comm.shutdown, lambda: None
    try:
        with redirect_stdout(StringIO()):
            return run_job(load_job(job and Path(job), sets))
    finally:
        comm.shutdown = before
        torch.set_deterministic_debug_mode("default")
