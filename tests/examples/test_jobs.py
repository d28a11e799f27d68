"""Every example job is valid, can be planned, and trains; the Criteo one to the quality it says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml

from shardlab.config import DEMO_JOB, load_job
from shardlab.launch.train import run_job
from shardlab.planner import local_cpu, plan

EXAMPLES = sorted((Path(__file__).resolve().parents[2] / "examples").glob("*.yaml"))
#: Jobs on paper, for machines that we do not have: `test_planner_fleets.py` plans them.
JOBS = [path for path in EXAMPLES if not path.stem.startswith("planner_")
        and "batch_size" in yaml.safe_load(path.read_text())]
#: Validation AUC that one pass over the sample has to reach, from a plain-PyTorch DLRM's 0.7608.
WANTED_AUC = 0.760


@pytest.fixture(autouse=True)
def _torch_as_before() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    yield
    torch.use_deterministic_algorithms(before)


def overrides(path: Path, shared_data: Path) -> list[str]:
    """Points a job to its file in the folder of real data, where it needs one."""
    data = yaml.safe_load(path.read_text())["data"]
    return [f"data.path={shared_data / data['path']}"] if "path" in data else []


def test_there_are_examples():
    assert len(JOBS) >= 5


@pytest.mark.parametrize("path", [DEMO_JOB, *JOBS], ids=lambda path: path.stem)
def test_example_can_be_planned(path, tmp_path):
    stand_in = tmp_path / "clicks"
    stand_in.write_text("")
    needs_file = "path" in yaml.safe_load(path.read_text())["data"]
    job = load_job(path, [f"data.path={stand_in}"] if needs_file else [])
    result = plan(job.table_configs(), local_cpu(job.ranks), job.batch_size,
                  job.optimizer.sparse.kind)
    result.plan.check(job.table_configs(), job.ranks)


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_example_trains(path, tmp_path, request):
    needs_file = "path" in yaml.safe_load(path.read_text())["data"]
    files = overrides(path, request.getfixturevalue("shared_data")) if needs_file else []
    job = load_job(path, [*files, f"train.run_dir={tmp_path}", "train.max_steps=2", "ranks=1",
                          "batch_size=8", "data.train_rows=[0, 16]",
                          "data.validation_rows=[16, 24]"])
    assert run_job(job) == 0


def test_criteo_job_reaches_its_quality_on_two_ranks(tmp_path, shared_data):
    path = next(path for path in JOBS if path.stem == "criteo_kaggle_dlrm")
    sets = [*overrides(path, shared_data), f"train.run_dir={tmp_path / 'run'}"]
    subprocess.run([sys.executable, "-m", "shardlab.cli", "train", str(path),
                    *(word for value in sets for word in ("--set", value))],
                   check=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["validation"]["rows"] == 13714
    assert summary["validation"]["auc"] >= WANTED_AUC
