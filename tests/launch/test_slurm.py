"""The batch script says what was asked, bash can read it, and following ends when the job does."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from shardlab.errors import LaunchError
from shardlab.launch import slurm
from shardlab.launch.slurm import SlurmJob, batch_script, follow, submit


def job(folder: Path, **changes: object) -> SlurmJob:
    values = {"name": "ctr", "command": ["python", "-m", "shardlab.cli", "train", "a b.yaml"],
              "folder": folder, "nodes": "2", "ranks_per_node": 4, **changes}
    return SlurmJob(**values)  # type: ignore[arg-type]


def test_a_script_holds_what_was_asked(tmp_path):
    script = batch_script(job(
        tmp_path, gpus_per_node=4, cpus_per_task=8, time="24:00:00", partition="gpu",
        account="ads", qos="high", requeue=True, warn_s=300, interface="ib0",
        extra=("--exclusive",), setup="module load cuda"))
    for line in ("#SBATCH --job-name=ctr", "#SBATCH --nodes=2", "#SBATCH --ntasks-per-node=4",
                 "#SBATCH --requeue", "#SBATCH --signal=USR1@300", "#SBATCH --gpus-per-node=4",
                 "#SBATCH --cpus-per-task=8", "#SBATCH --time=24:00:00",
                 "#SBATCH --partition=gpu", "#SBATCH --account=ads", "#SBATCH --qos=high",
                 "#SBATCH --exclusive", "module load cuda",
                 "export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0",
                 "  python -m shardlab.cli train 'a b.yaml' &"):
        assert line in script.splitlines()
    assert 'scontrol requeue "$SLURM_JOB_ID"' in script


def test_what_was_not_asked_is_left_to_the_cluster(tmp_path):
    script = batch_script(job(tmp_path))
    for word in ("--gpus", "--time", "--partition", "--account", "SOCKET_IFNAME", "requeue \""):
        assert word not in script
    assert "#SBATCH --no-requeue" in script


#: Stand-ins for Slurm's commands, which note what they are asked.
_FAKES = {
    "scontrol": 'echo "$@" >> calls\n[ "$1" = show ] && echo "NodeAddr=10.0.0.7 x"\n'
                'exit 0',
    "srun": "exit $CODE",
    "squeue": "echo $STATE",
}


@pytest.mark.parametrize(("code", "state", "requeued"), [
    (0, "RUNNING", False), (75, "RUNNING", True), (143, "RUNNING", True),
    (143, "COMPLETING", False), (1, "RUNNING", False), (4, "RUNNING", False)])
def test_only_an_orderly_stop_is_requeued(tmp_path, code, state, requeued):
    for name, body in _FAKES.items():
        path = tmp_path / name
        path.write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(0o755)
    script = tmp_path / "job.sbatch"
    script.write_text(batch_script(job(tmp_path, requeue=True)))
    done = subprocess.run(
        ["bash", str(script)], cwd=tmp_path, capture_output=True, text=True, timeout=30,
        check=False, env={"PATH": f"{tmp_path}:/usr/bin:/bin", "CODE": str(code), "STATE": state,
                          "SLURM_JOB_ID": "12", "SLURM_JOB_NODELIST": "n[1-2]"})
    assert f"ranks ended with exit code {code}\n" in done.stdout, done.stderr
    assert ("requeue 12" in (tmp_path / "calls").read_text()) == requeued
    if not requeued:
        assert done.returncode == code


@pytest.mark.parametrize("nodes", ["0", "x", "4-2", "2-", "-1", "1,2"])
def test_a_wrong_number_of_nodes_is_refused(tmp_path, nodes):
    with pytest.raises(LaunchError, match=f"--nodes {nodes}: expected a number"):
        job(tmp_path, nodes=nodes)


def test_without_slurm_the_way_out_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LaunchError, match=r"sbatch is not installed here; .* --dry-run"):
        submit(job(tmp_path))


def test_following_shows_whole_lines_and_the_ranks_code(tmp_path, monkeypatch):
    asked = job(tmp_path)
    states = iter(["PENDING", "RUNNING", "REQUEUED", "FAILED"])
    texts = iter(["", "rank 0: begun\nhalf", " a line\n", "ranks ended with exit code 4\n"])

    def state(_: str) -> str:
        with open(asked.log("7"), "a") as log:
            log.write(next(texts))
        return next(states)

    monkeypatch.setattr(slurm, "_state", state)
    monkeypatch.setattr(slurm, "_POLL_S", 0.0)
    said: list[str] = []
    assert follow(asked, "7", said.append) == 4
    assert "".join(said) == ("job 7: PENDING\nrank 0: begun\njob 7: RUNNING\nhalf a line\n"
                             "job 7: REQUEUED\nranks ended with exit code 4\n")
