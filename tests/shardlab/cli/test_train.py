"""``shardlab train`` chooses: work in this process, start ranks, or join those that exist."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest

from shardlab.cli.main import main
from shardlab.config import JobConfig, load_job

RANK_1 = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2",
          "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}

#: Number of ranks -> exit code of the stand-in that would start them.
EXIT_CODES = {3: 143}


@pytest.fixture
def jobs(monkeypatch) -> list[JobConfig]:
    """The jobs that were run in this process; running one only notes it."""
    seen: list[JobConfig] = []

    def run_job(job: JobConfig) -> int:
        seen.append(job)
        return 7

    stand_in = types.ModuleType("shardlab.launch.train")
    stand_in.run_job = run_job
    monkeypatch.setitem(sys.modules, "shardlab.launch.train", stand_in)
    monkeypatch.setattr("shardlab.launch.rank._end", sys.exit)  # a rank ends its process at once
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    return seen


@pytest.fixture
def started(monkeypatch) -> list[tuple[int, list[str], JobConfig]]:
    """What would have been started: ranks, command, and the job its file held."""
    seen: list[tuple[int, list[str], JobConfig]] = []
    def start(ranks: int, command: list[str]) -> int:
        seen.append((ranks, command, load_job(command[-1])))
        return EXIT_CODES.get(ranks, 0)

    monkeypatch.setattr("shardlab.launch.local.start_local_ranks", start)
    return seen


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(["train", *arguments])
    return int(stop.value.code or 0)


def test_one_rank_works_in_this_process(jobs, started):
    assert run("--demo", "--ranks", "1") == 7
    assert [job.ranks for job in jobs] == [1]
    assert not started


def test_several_ranks_are_started_with_the_resolved_job(jobs, started):
    assert run("--demo", "--set", "optimizer.dense.lr=0.5", "--resume", "never") == 0
    (ranks, command, job), = started
    assert ranks == 2
    assert command[:4] == [sys.executable, "-m", "shardlab.cli", "train"]
    assert job.optimizer.dense.lr == 0.5
    assert job.train.resume == "never"
    assert not Path(command[-1]).exists()  # a temporary file
    assert not jobs


def test_a_stopped_run_says_so_and_gives_the_signal_s_exit_code(jobs, started, capsys):
    assert run("--demo", "--ranks", "3") == 143
    assert capsys.readouterr().err == "stopped by SIGTERM\n"


def test_a_rank_of_torchrun_joins(jobs, started, monkeypatch):
    for name, value in RANK_1.items():
        monkeypatch.setenv(name, value)
    assert run("--demo") == 7
    assert len(jobs) == 1
    assert not started


def test_a_rank_of_srun_gets_torchrun_s_variables(jobs, monkeypatch):
    slurm = {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "0",
             "SLURM_NODEID": "1", "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_JOB_ID": "3",
             "SLURM_STEP_NODELIST": "n[1-2]"}
    for name in RANK_1:
        monkeypatch.setenv(name, "")  # so that the test's end removes what the command sets
        monkeypatch.delenv(name)
    for name, value in slurm.items():
        monkeypatch.setenv(name, value)
    assert run("--demo") == 7
    import os

    assert (os.environ["RANK"], os.environ["WORLD_SIZE"], os.environ["MASTER_ADDR"]) == \
        ("1", "2", "n1")


def test_other_ranks_than_torchrun_started_are_refused(jobs, capsys, monkeypatch):
    for name, value in RANK_1.items():
        monkeypatch.setenv(name, value)
    assert run("--demo", "--ranks", "4") == 2
    assert "--ranks 4 asked, but torchrun started 2 ranks; leave --ranks out" in \
        capsys.readouterr().err
    assert not jobs


def test_problems_of_the_job_are_listed_before_anything_starts(jobs, started, capsys):
    assert run("--demo", "--set", "modle=1", "--plan", "absent.json") == 2
    err = capsys.readouterr().err
    assert "error: the demo job has 2 problems:\n" in err
    assert "  plan: no file 'absent.json'" in err
    assert not jobs
    assert not started


def test_a_missing_job_file_is_named(jobs, capsys):
    assert run("absent.yaml") == 2
    assert "absent.yaml" in capsys.readouterr().err
