"""A job on two nodes of a real Slurm: preempted, requeued, and in the end as if it had not been."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests import slurm

JOB = """
batch_size: 16
tables: {preset: criteo_kaggle, embedding_dim: 4, max_rows: 500}
model: {kind: dlrm, bottom_mlp: [16], top_mlp: [16]}
data: {train_rows: [0, 12800], validation_rows: [12800, 12928]}
optimizer: {schedule: {kind: cosine, warmup_steps: 5, steps: 400}}
train: {log_every: 10, checkpoint_every: 100}
"""
LAST = 400
WAIT_S = 300.0
pytestmark = pytest.mark.skipif(slurm.missing() is not None,
                                reason=f"no Slurm here: {slurm.missing()}")


@pytest.fixture(scope="module")
def environ() -> Iterator[dict[str, str]]:
    with slurm.cluster() as variables:
        yield variables


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("job") / "job.yaml"
    path.write_text(JOB)
    return path


@pytest.fixture(scope="module")
def undisturbed(job: Path, environ: dict[str, str]) -> dict[str, bytes]:
    """Files of the last checkpoint of a run that was left alone."""
    run_dir = job.parent / "whole"
    output(launch(job, run_dir, environ))
    return weights(run_dir)


def launch(job: Path, run_dir: Path, environ: dict[str, str],
           *options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "shardlab.cli", "launch", "slurm", str(job), "--nodes", "2",
         "--time", "5:00", "--interface", "lo", "--assume-shared", "--set",
         f"train.run_dir={run_dir}", *options],
        env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def stop_in_training(run_dir: Path, process: subprocess.Popen[str],
                     environ: dict[str, str]) -> str:
    """Holds the ranks in mid-training, so that they do not end before a test goes on; the job."""
    end = time.monotonic() + WAIT_S
    metrics = run_dir / "metrics.jsonl"
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 3:
        assert time.monotonic() < end
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    job_id = re.search(r"slurm-(\d+)\.", next((run_dir / "slurm").glob("*.log")).name)
    assert job_id is not None
    signal_ranks("STOP", job_id[1], environ)
    return job_id[1]


def signal_ranks(name: str, job_id: str, environ: dict[str, str]) -> None:
    subprocess.run(["scancel", f"--signal={name}", job_id], env=environ, check=True)


def output(process: subprocess.Popen[str]) -> str:
    """What a job that ends well has said."""
    out, _ = process.communicate(timeout=WAIT_S)
    assert process.returncode == 0, out
    return out


def weights(run_dir: Path) -> dict[str, bytes]:
    folder = run_dir / "checkpoints" / f"step-{LAST}"
    found = {path.name: path.read_bytes() for path in folder.rglob("*.safetensors")}
    assert found
    return found


def resumed_at(run_dir: Path) -> int:
    return json.loads((run_dir / "summary.json").read_text())["resumed_at"]


def test_a_preempted_job_ends_as_one_that_was_not(tmp_path, job, environ, undisturbed):
    run_dir = tmp_path / "run"
    process = launch(job, run_dir, environ, "--requeue", "--partition", "low")
    stop_in_training(run_dir, process, environ)
    subprocess.run(["sbatch", "-p", "high", "-N", "2", "--exclusive", "--wrap", "true", "-o",
                    os.devnull], env=environ, capture_output=True, check=True)
    out = output(process)  # what is preempted gets SIGCONT, then SIGTERM
    assert "ranks ended with exit code 143" in out
    assert "requeued after a checkpoint" in out
    assert ", start 1, on node[1-2]" in out
    assert 0 < resumed_at(run_dir) < LAST
    assert weights(run_dir) == undisturbed


def test_the_warning_of_the_time_limit_requeues(tmp_path, job, environ, undisturbed):
    run_dir = tmp_path / "run"
    process = launch(job, run_dir, environ, "--requeue")
    job_id = stop_in_training(run_dir, process, environ)
    for name in ("USR1", "CONT"):
        signal_ranks(name, job_id, environ)
    out = output(process)
    assert "ranks ended with exit code 75" in out
    assert 0 < resumed_at(run_dir) < LAST
    assert weights(run_dir) == undisturbed


def test_a_failing_rank_s_exit_code_is_the_job_s(tmp_path, job, environ):
    process = launch(job, tmp_path / "run", environ, "--requeue", "--set",
                     "optimizer.dense.lr=1e30", "--set", "optimizer.sparse.lr=1e30")
    out, _ = process.communicate(timeout=WAIT_S)
    assert process.returncode == 4, out
    assert "ranks ended with exit code 4" in out
    assert "requeued" not in out


def test_a_cluster_ends_with_the_process_that_asked_for_it():
    script = "from tests import slurm\nwith slurm.cluster() as environ:\n" \
        "    print(environ['SLURM_CONF'], flush=True)\n    input()\n"
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, text=True) as asked:
        folder = str(Path(asked.stdout.readline().strip()).parent)
        assert len(processes(folder)) >= 5  # the keeper and four daemons
        asked.kill()
    end = time.monotonic() + WAIT_S
    while processes(folder) or Path(folder).exists():
        assert time.monotonic() < end, processes(folder)
        time.sleep(0.05)


def processes(folder: str) -> list[bytes]:
    """Command lines of processes that a cluster's folder is known to, by argument or variable."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has just ended
            command = (process / "cmdline").read_bytes()
            if folder.encode() in command + (process / "environ").read_bytes():
                found.append(command)
    return found
