"""``shardlab launch``: what its options come to, and what it refuses."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from shardlab.cli.main import main
from shardlab.config import load_job

JOB = "tables: {preset: criteo_kaggle, embedding_dim: 4, max_rows: 500}\n"


@pytest.fixture
def job(tmp_path: Path) -> Path:
    path = tmp_path / "ctr.yaml"
    path.write_text(JOB + f"train: {{run_dir: {tmp_path / 'run'}}}\n")
    return path


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(["launch", *arguments])
    return int(stop.value.code or 0)


def test_a_dry_run_shows_the_script_and_writes_nothing(job, tmp_path, capsys):
    assert run("slurm", str(job), "--nodes", "2", "--ranks-per-node", "3", "--assume-shared",
               "--requeue", "--dry-run") == 0
    out, err = capsys.readouterr()
    assert out.startswith("#!/usr/bin/env bash\n#SBATCH --job-name=ctr\n#SBATCH --nodes=2\n"
                          "#SBATCH --ntasks-per-node=3\n")
    assert "plan      fits 6 ranks" in err
    assert not (tmp_path / "run").exists()


def test_a_job_is_submitted_as_it_was_resolved(job, tmp_path, capsys, monkeypatch):
    sbatch = tmp_path / "sbatch"
    sbatch.write_text("#!/bin/bash\necho '41;cluster'\n")
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert run("slurm", str(job), "--nodes", "1", "--set", "batch_size=32", "--no-follow") == 0
    assert capsys.readouterr().out == "41\n"
    assert load_job(tmp_path / "run" / "slurm" / "job.yaml").batch_size == 32
    assert "--ntasks-per-node=1" in (tmp_path / "run" / "slurm" / "job.sbatch").read_text()


def test_a_range_of_nodes_needs_an_elastic_job(job, capsys):
    assert run("slurm", str(job), "--nodes", "1-2", "--dry-run") == 2
    assert "allow it with --set train.elastic=true" in capsys.readouterr().err
    assert run("slurm", str(job), "--nodes", "1-2", "--dry-run", "--set",
               "train.elastic=true") == 0
    assert "#SBATCH --nodes=1-2" in capsys.readouterr().out


def test_local_passes_ranks_and_restarts_on(job, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr("shardlab.launch.elastic.supervise",
                        lambda config, *rest: seen.append((config.ranks, *rest[:2])) or 0)
    assert run("local", str(job), "--ranks", "4", "--min-ranks", "2", "--restarts", "5") == 0
    assert run("local", str(job), "--ranks", "2") == 0
    assert seen == [(4, 2, 5), (2, 2, 3)]
    assert run("local", str(job), "--ranks", "2", "--min-ranks", "3") == 2
    assert "--min-ranks 3 is more than --ranks 2" in capsys.readouterr().err
