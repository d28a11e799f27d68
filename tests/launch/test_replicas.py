"""Jobs in replica groups: trained, resumed with the same plan, refused where nothing fits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from shardlab.config import load_job
from shardlab.errors import ConfigError, PlanError
from shardlab.launch.planning import job_request, plan_request, read_job_plan
from shardlab.plan import ShardingPlan
from shardlab.planner import read_topology
from tests.job_runs import train_on_pool

SETS = ["tables={preset: criteo_kaggle, embedding_dim: 8, max_rows: 2000}", "batch_size=64",
        "model={kind: dlrm, bottom_mlp: [16], top_mlp: [16]}",
        "data={kind: synthetic_criteo, train_rows: [0, 2560], validation_rows: [2560, 3000]}",
        "train={log_every: 5, checkpoint_every: 5}"]
JOB = Path(__file__).parents[2] / "shardlab" / "config" / "demo.yaml"


def _train_in_processes(folder: Path, *sets: str) -> dict:
    arguments = [word for value in (*SETS, f"train.run_dir={folder}", *sets)
                 for word in ("--set", value)]
    subprocess.run([sys.executable, "-m", "shardlab.cli", "train", str(JOB), "--ranks", "4",
                    *arguments], check=True, timeout=180, capture_output=True,
                   env={**os.environ, "OMP_NUM_THREADS": "1"})
    return json.loads((folder / "summary.json").read_text())


def _train(folder: Path, *sets: str) -> dict:
    return train_on_pool(JOB, 4, folder, [*SETS, *sets])


def _check_whole(whole: dict, folder: Path, every: int) -> None:
    plan = ShardingPlan.from_json((folder / "plan.json").read_text())
    assert (plan.world_size, plan.replicas, plan.sync_every_steps) == (2, 2, every)
    assert whole["wire_per_step"]["sync"] > 0
    assert whole["validation"]["rows"] == 440


def test_a_job_in_two_groups_trains(tmp_path):
    whole = _train_in_processes(tmp_path, "parallel.replicas=2", "train.max_steps=10")
    _check_whole(whole, tmp_path, 1)


def test_a_job_in_two_groups_goes_on_between_averages(tmp_path):
    groups = ["parallel.replicas=2", "parallel.sync_every_steps=4"]
    whole = _train(tmp_path / "whole", *groups, "train.max_steps=10")
    _check_whole(whole, tmp_path / "whole", 4)
    _train(tmp_path / "parts", *groups, "train.max_steps=5")
    parts = _train(tmp_path / "parts", *groups, "train.max_steps=10")
    assert parts["resumed_at"] == 5
    for key in ("auc", "logloss"):
        assert parts["validation"][key] == whole["validation"][key]


def _job(*sets: str):
    return load_job(JOB, [*SETS[:3], *sets])


def test_a_plan_with_other_groups_than_the_job_s_is_refused(tmp_path):
    job = _job("parallel.replicas=2")
    request = job_request(job, read_topology("4xcpu"))
    plan = plan_request(request).plan
    path = tmp_path / "plan.json"
    path.write_text(plan.to_json())
    assert read_job_plan(path, job, 4) == read_job_plan(path, _job(), 4) == plan
    with pytest.raises(PlanError, match="the job asks for replicas 4 and sync_every_steps 1, its "
                                        "plan has 2 and 1; leave parallel out, or plan again"):
        read_job_plan(path, _job("parallel.replicas=4"), 4)


def test_groups_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match=r"parallel\.sync_every_steps: 3 steps between averages "):
        _job("parallel.sync_every_steps=3")
    with pytest.raises(ConfigError, match="4 ranks do not divide into 3 groups"):
        job_request(_job("parallel.replicas=3"), read_topology("4xcpu"))
