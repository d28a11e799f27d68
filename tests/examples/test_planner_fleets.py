"""The fleets of the paper are planned: they fit, in seconds, at a rate like the published one."""

from __future__ import annotations

from pathlib import Path

import pytest

from shardlab.config import load_job
from shardlab.launch.dense_model import dense_model
from shardlab.planner import PlanSettings, plan
from shardlab.planner.result import PlanResult

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def planned(name: str) -> PlanResult:
    job = load_job(EXAMPLES / f"{name}.yaml", [])
    assert job.topology is not None
    return plan(job.table_configs(), job.topology, job.batch_size, job.optimizer.sparse.kind,
                PlanSettings(dense=dense_model(job)))


def parameters(result: PlanResult) -> float:
    return sum((shard.rows * shard.columns for entry in result.plan.tables
                for shard in entry.shards), 0)


@pytest.mark.parametrize(("name", "wanted", "published", "within"), [
    ("planner_model_f_12t", 12e12, 1.7e6, 1.5), ("planner_model_a_793b", 793e9, 1.2e6, 3.0)])
def test_fleets_of_the_paper(name: str, wanted: float, published: float, within: float) -> None:
    result = planned(name)
    assert parameters(result) == pytest.approx(wanted, rel=0.01)
    assert result.topology.world_size == 128
    assert max(rank.bytes.hbm for rank in result.ranks) <= result.capacity + \
        result.settings.dense.bytes
    assert max(host.ddr for host in result.hosts) <= result.host_capacity.ddr
    assert max(host.ssd for host in result.hosts) <= result.host_capacity.ssd
    assert published / within < result.samples_per_s < published * within
    assert result.cpu_seconds < 30
