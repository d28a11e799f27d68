"""Which plan a run executes: the job's, its own former one, or a new one; the same on all ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shardlab.comm import Groups
from shardlab.config import JobConfig, load_job
from shardlab.errors import ConfigError, LaunchError, PlanError, ShardLabError
from shardlab.launch.dense_model import dense_model
from shardlab.launch.planning import choose_plan, job_request, job_topology
from shardlab.plan import ShardingPlan
from shardlab.planner import read_topology
from shardlab.specs import ShardingType
from shardlab.table_plan import WireDtypes, build_table_plan
from tests.harness import run_ranks

SMALL = ["tables={preset: criteo_kaggle, embedding_dim: 4, max_rows: 50}"]


def job_of(*overrides: str) -> JobConfig:
    return load_job(None, [*SMALL, *overrides])


def table_wise(job: JobConfig, world_size: int) -> ShardingPlan:
    """Not what the planner would choose: every table whole on the last rank."""
    return ShardingPlan(world_size, tuple(
        build_table_plan(table, ShardingType.TABLE_WISE, [world_size - 1])
        for table in job.table_configs()))


def write(folder: Path, plan: ShardingPlan) -> Path:
    path = folder / "plan.json"
    path.write_text(plan.to_json())
    return path


def test_a_new_run_is_planned():
    job = job_of()
    chosen = choose_plan(job, Groups(), previous=None)
    chosen.plan.check(job.table_configs(), 1)
    predicted = json.loads(chosen.text)["predicted"]
    assert predicted["step_ms"] > 0
    assert predicted["dense"]["parameters"] == dense_model(job).parameters


def test_the_plan_of_the_job_is_executed(tmp_path):
    wanted = table_wise(job_of(), 1)
    job = job_of(f"plan={write(tmp_path, wanted)}")
    chosen = choose_plan(job, Groups(), previous=None)
    assert chosen.plan == wanted
    assert json.loads(chosen.text)["predicted"]["start"] == "given"


def test_a_given_plan_for_another_machine_has_no_predictions(tmp_path):
    wanted = table_wise(job_of(), 1)
    job = job_of(f"plan={write(tmp_path, wanted)}", "topology=8xh100")
    chosen = choose_plan(job, Groups(), previous=None)
    assert chosen.plan == wanted
    assert "predicted" not in json.loads(chosen.text)


def test_statistics_of_the_job_are_planned_with(tmp_path):
    path = tmp_path / "stats.json"
    with pytest.raises(ConfigError, match=r"stats\.json"):
        choose_plan(job_of(f"statistics={path}"), Groups(), previous=None)


def test_a_request_takes_the_job_s_wire_and_time_limit():
    request = job_request(job_of("dense_dtype=bf16"), read_topology("2xcpu"), 1.5)
    assert request.settings.time_limit == 1.5
    assert request.settings.dense.dtype == "bf16"
    assert request.settings.wire == WireDtypes()


def test_a_continued_run_keeps_its_plan(tmp_path):
    former = table_wise(job_of(), 1)
    assert choose_plan(job_of(), Groups(), previous=write(tmp_path, former)).plan == former


def test_a_run_continued_on_other_ranks_is_planned_anew(tmp_path):
    former = table_wise(job_of(), 2)
    chosen = choose_plan(job_of(), Groups(), previous=write(tmp_path, former))
    assert chosen.plan.world_size == 1


@pytest.mark.parametrize(("text", "message"), [
    ("{}", r"plan\.json: plan has schema version None"),
    (table_wise(job_of(), 2).to_json(), r"plan\.json: plan is for 2 ranks, this job runs 1"),
    (ShardingPlan(1, ()).to_json(), r"plan\.json: table 't_C1' is not in the plan"),
], ids=["not a plan", "other ranks", "other tables"])
def test_a_plan_that_does_not_fit_is_refused_by_file(tmp_path, text, message):
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(PlanError, match=message):
        choose_plan(job_of(f"plan={path}"), Groups(), previous=None)


def test_a_topology_of_other_size_is_refused():
    with pytest.raises(PlanError, match=r"topology: 8xh100 has 8 ranks, this run has 1; leave "):
        choose_plan(job_of("topology=8xh100"), Groups(), previous=None)


def test_the_topology_of_the_job_is_read():
    assert job_topology(job_of("topology=2x8xh100"), Groups()).world_size == 16


def test_hosts_follow_from_the_ranks():
    topology = job_topology(job_of(), Groups(world_size=6, local_world_size=2))
    assert (topology.hosts, topology.ranks_per_host) == (3, 2)


def plan_or_error(groups: Groups, overrides: list[str]) -> str:
    try:
        return choose_plan(job_of(*overrides), groups, previous=None).text
    except ShardLabError as error:
        return f"{type(error).__name__}: {error}"


def test_all_ranks_get_the_plan_of_rank_0():
    first, second = run_ranks(2, plan_or_error, [])
    assert first == second
    assert ShardingPlan.from_json(first).world_size == 2


def test_all_ranks_end_where_rank_0_finds_no_plan():
    first, second = run_ranks(2, plan_or_error, ["topology=8xh100"])
    assert first.startswith("PlanError: topology: 8xh100 has 8 ranks, this run has 2")
    reason = first.removeprefix("PlanError: ")
    assert second == f"{LaunchError.__name__}: rank 0 found no plan: {reason}"
