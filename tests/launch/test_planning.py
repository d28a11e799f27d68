"""Which plan a run executes: the job's, its own former one, or a new one; the same on all ranks."""

from __future__ import annotations

from pathlib import Path

import pytest

from shardlab.comm import Groups
from shardlab.config import JobConfig, load_job
from shardlab.errors import LaunchError, PlanError, ShardLabError
from shardlab.launch.planning import choose_plan, job_topology
from shardlab.plan import ShardingPlan, build_table_plan
from shardlab.specs import ShardingType
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
    plan = choose_plan(job, Groups(), previous=None)
    plan.check(job.table_configs(), 1)


def test_the_plan_of_the_job_is_executed(tmp_path):
    wanted = table_wise(job_of(), 1)
    job = job_of(f"plan={write(tmp_path, wanted)}")
    assert choose_plan(job, Groups(), previous=None) == wanted


def test_a_continued_run_keeps_its_plan(tmp_path):
    former = table_wise(job_of(), 1)
    assert choose_plan(job_of(), Groups(), previous=write(tmp_path, former)) == former


def test_a_run_continued_on_other_ranks_is_planned_anew(tmp_path):
    former = table_wise(job_of(), 2)
    assert choose_plan(job_of(), Groups(), previous=write(tmp_path, former)).world_size == 1


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
        return choose_plan(job_of(*overrides), groups, previous=None).to_json()
    except ShardLabError as error:
        return f"{type(error).__name__}: {error}"


def test_all_ranks_get_the_plan_of_rank_0():
    first, second = run_ranks(2, plan_or_error, [])
    assert first == second
    assert ShardingPlan.from_json(first).world_size == 2


def test_all_ranks_end_where_rank_0_finds_no_plan():
    first, second = run_ranks(2, plan_or_error, ["topology=8xh100"])
    assert first.startswith("PlanError: topology: 8xh100 has 8 ranks, this run has 2")
    assert second == f"{LaunchError.__name__}: rank 0 found no plan; see its message"
