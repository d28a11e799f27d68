"""A plan with its predictions as JSON: round trip, and files that are none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shardlab.errors import PlanError
from shardlab.phases import PHASES
from shardlab.plan import ShardingPlan
from shardlab.planner import plan
from shardlab.planner.plan_file import plan_to_json, prediction_of, read_plan_file
from shardlab.planner.result import PlanResult
from tests.planner.fleets import GIB, generated_fleet, tiered


@pytest.fixture(scope="module")
def result() -> PlanResult:
    return plan(generated_fleet(12), tiered("2x2xh100", 3 * GIB, 64 * GIB), 256)


def test_a_plan_comes_back_with_what_was_predicted(result: PlanResult, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(plan_to_json(result))
    found, prediction = read_plan_file(path)
    assert found == result.plan
    assert prediction == prediction_of(result)
    assert prediction.step_ms == pytest.approx(result.step_ms)
    assert [size.total for size in prediction.tables] == \
        [rank.table_bytes for rank in result.ranks]


def test_every_shard_says_its_bytes_and_time(result: PlanResult) -> None:
    data = json.loads(plan_to_json(result))
    shard = data["tables"][0]["shards"][0]
    assert set(shard["bytes"]) == {"hbm", "ddr", "ssd"}
    assert shard["ms"] > 0
    predicted = data["predicted"]
    assert predicted["phases"] == list(PHASES)
    assert predicted["step_ms"] == result.step_ms
    assert len(predicted["ranks"]) == 4
    assert [entry["table"] for entry in predicted["tables"]] == \
        [entry.table for entry in result.plan.tables]


def test_a_plan_without_predictions_is_a_plan(result: PlanResult, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(result.plan.to_json())
    assert read_plan_file(path) == (result.plan, None)


@pytest.mark.parametrize(("text", "message"), [
    (None, "cannot be read: No such file"),
    ("{", "plan is not JSON"),
    (ShardingPlan(1, ()).to_json({"phases": ["ids"]}), "'predicted' is malformed .*plan again"),
    (ShardingPlan(1, ()).to_json({}), "'predicted' is malformed .KeyError: 'phases'"),
])
def test_files_that_are_no_plan_are_named(tmp_path: Path, text: str | None,
                                          message: str) -> None:
    path = tmp_path / "plan.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(PlanError, match=rf"plan .*plan\.json: {message}"):
        read_plan_file(path)
