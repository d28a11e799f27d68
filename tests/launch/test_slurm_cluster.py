"""A job on two nodes of a real Slurm: preempted, requeued, and in the end as if it had not been."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import slurm

JOB = """
batch_size: 16
tables: {preset: criteo_kaggle, embedding_dim: 4, max_rows: 500}
model: {kind: dlrm, bottom_mlp: [16], top_mlp: [16]}
data: {train_rows: [0, 48000], validation_rows: [48000, 48128]}
optimizer: {schedule: {kind: cosine, warmup_steps: 5, steps: 1500}}
train: {log_every: 10, checkpoint_every: 100}
"""
LAST = 1500
pytestmark = pytest.mark.skipif(slurm.missing() is not None,
                                reason=f"no Slurm here: {slurm.missing()}")


@pytest.fixture(scope="module")
def environ() -> Iterator[dict[str, str]]:
    with slurm.cluster() as variables:
        yield variables


@pytest.fixture
def job(tmp_path: Path) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text(JOB)
    return path


def launch(job: Path, run_dir: Path, environ: dict[str, str],
           *options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "shardlab.cli", "launch", "slurm", str(job), "--nodes", "2",
         "--time", "5:00", "--interface", "lo", "--assume-shared", "--set",
         f"train.run_dir={run_dir}", *options],
        env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for_steps(run_dir: Path, process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 120
    metrics = run_dir / "metrics.jsonl"
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 3:
        assert time.monotonic() < end
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)


def weights(run_dir: Path) -> dict[str, bytes]:
    folder = run_dir / "checkpoints" / f"step-{LAST}"
    found = {path.name: path.read_bytes() for path in folder.rglob("*.safetensors")}
    assert found
    return found


def test_a_preempted_job_ends_as_one_that_was_not(tmp_path, job, environ):
    run_dir, whole = tmp_path / "run", tmp_path / "whole"
    process = launch(job, run_dir, environ, "--requeue", "--partition", "low")
    wait_for_steps(run_dir, process)
    urgent = subprocess.run(["sbatch", "--parsable", "-p", "high", "-N", "2", "--exclusive",
                             "--wrap", "sleep 1", "-o", os.devnull], env=environ,
                            capture_output=True, text=True, check=True)
    assert urgent.stdout.strip()
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    assert "ranks ended with exit code 143" in out
    assert "requeued after a checkpoint" in out
    assert ", start 1, on node[1-2]" in out
    resumed = json.loads((run_dir / "summary.json").read_text())
    assert 0 < resumed["resumed_at"] < LAST
    assert (run_dir / "slurm").is_dir()
    process = launch(job, whole, environ)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    assert weights(run_dir) == weights(whole)


def test_the_warning_of_the_time_limit_requeues(tmp_path, job, environ):
    run_dir = tmp_path / "run"
    process = launch(job, run_dir, environ, "--requeue")
    wait_for_steps(run_dir, process)
    subprocess.run(["scancel", "--signal=USR1", "--user=root"], env=environ, check=True)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    assert "ranks ended with exit code 75" in out
    assert json.loads((run_dir / "summary.json").read_text())["resumed_at"] > 0


def test_a_failing_rank_s_exit_code_is_the_job_s(tmp_path, job, environ):
    process = launch(job, tmp_path / "run", environ, "--set", "train.resume=/absent")
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 2, out
    assert "/absent is not a checkpoint folder" in out
