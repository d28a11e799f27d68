"""torchrun over two hosts, one of which is lost: the job goes on where its last checkpoint was."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shardlab.train import latest
from tests.hosts import Hosts, refusal

JOB = ["tables={preset: criteo_kaggle, embedding_dim: 4, max_rows: 500}", "batch_size=16",
       "model={kind: dlrm, bottom_mlp: [16], top_mlp: [16]}", "train.log_every=5",
       "train.checkpoint_every=20", "train.elastic=true", "exchange.timeout_s=8"]
#: torchrun's patience is made for clusters: 30 s for latecomers, 15 s for a silent agent.
RENDEZVOUS = "last_call_timeout=3,keep_alive_interval=1,keep_alive_max_attempt=3"
LIMIT_S = 120.0


def start(hosts: Hosts, run: Path) -> list[subprocess.Popen[str]]:
    sets = [argument for entry in (*JOB, "data.train_rows=[0, 32000]", f"train.run_dir={run}")
            for argument in ("--set", entry)]
    return [hosts.start(host, [
        sys.executable, "-m", "torch.distributed.run", "--nnodes", "1:2", "--nproc-per-node", "1",
        "--rdzv-backend", "c10d", "--rdzv-endpoint", f"{hosts.address(0)}:29575", "--rdzv-id",
        "lost-host", "--rdzv-conf", f"is_host={int(not host)},{RENDEZVOUS}",
        "--local-addr", hosts.address(host), "--max-restarts", "3",
        "-m", "shardlab.cli", "train", "--demo", *sets])
        for host in range(2)]


def steps_of(run: Path) -> list[int]:
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [record["step"] for record in map(json.loads, lines) if record["kind"] == "train"]


def worlds_of(run: Path) -> tuple[int, int]:
    """World size of the newest checkpoint and of the plan."""
    newest = latest(run / "checkpoints")
    assert newest is not None
    manifest = json.loads((newest / "manifest.json").read_text())["content"]
    return manifest["world_size"], json.loads((run / "plan.json").read_text())["world_size"]


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("SHARDLAB_LOST_HOST") != "1",
                    reason="takes a minute: SHARDLAB_LOST_HOST=1 runs it")
def test_one_of_two_hosts_is_lost_and_the_other_goes_on_alone(tmp_path: Path) -> None:
    if reason := refusal():
        pytest.skip(reason)
    run = tmp_path / "run"
    with Hosts(2) as hosts:
        agents = start(hosts, run)
        deadline = time.monotonic() + LIMIT_S
        while len(steps_of(run)) < 5 or latest(run / "checkpoints") is None:
            assert time.monotonic() < deadline, "the job did not begin"
            assert agents[0].poll() is None, agents[0].communicate()[0]
            time.sleep(0.1)
        assert worlds_of(run) == (2, 2)
        hosts.cut(1)  # its link and its processes are gone at once
        os.killpg(agents[1].pid, signal.SIGKILL)
        lost, at = time.monotonic(), steps_of(run)[-1]
        saved = latest(run / "checkpoints")
        assert saved is not None
        while worlds_of(run)[1] == 2 and agents[0].poll() is None:
            time.sleep(0.1)
        planned = time.monotonic()
        output, _ = agents[0].communicate(timeout=LIMIT_S)
    assert agents[0].returncode == 0, output
    assert worlds_of(run) == (1, 1)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["resumed_at"] == int(saved.name.removeprefix("step-"))
    # Half the rows are left to a rank that takes half as many a step: none is left out.
    left = 32_000 - 32 * summary["resumed_at"]
    assert summary["steps"] == summary["resumed_at"] + -(-left // 16)
    print(f"lost at step {at}, resumed at {summary['resumed_at']}, {planned - lost:.1f} s later")
