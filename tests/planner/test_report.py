"""The terminal report and the JSON of a plan."""

from __future__ import annotations

import io
import json

import pytest

from shardlab.plan import ShardingPlan
from shardlab.planner import plan
from shardlab.planner.estimate import PHASES
from shardlab.planner.report import plan_to_json, print_report
from shardlab.planner.result import PlanResult
from shardlab.specs import EmbeddingBagConfig, ShardingType
from tests.planner.fleets import generated_fleet, machine


@pytest.fixture(scope="module")
def small() -> PlanResult:
    tables = [EmbeddingBagConfig(10**6, 64, "user[bold]"), EmbeddingBagConfig(50, 8, "tiny"),
              EmbeddingBagConfig(10**5, 32, "asked", sharding=ShardingType.ROW_WISE)]
    return plan(tables, "2xcpu", 512)


@pytest.fixture(scope="module")
def fleet() -> PlanResult:
    return plan(generated_fleet(60), machine("4x8xh100"), 512)


def printed(result: PlanResult, width: int, *, everything: bool = False) -> str:
    stream = io.StringIO()
    print_report(result, stream, width=width, everything=everything)
    return stream.getvalue()


@pytest.mark.parametrize("width", [80, 100, 140])
def test_report_shows_ranks_tables_and_proof(small: PlanResult, width: int) -> None:
    text = printed(small, width)
    assert "Plan of 3 tables for 2xcpu" in text
    assert "proven optimal" in text
    assert "Zipf(1.05)" in text
    assert "user[bold]" in text
    assert "row_wise was" in text
    assert all(phase in text for phase in PHASES)
    assert "…" not in text
    assert max(len(line.rstrip()) for line in text.splitlines()) <= width
    assert ("exchange" in text.split("Tables:")[1]) is (width >= 100)


def test_long_lists_are_cut_and_say_so(fleet: PlanResult) -> None:
    short, full = printed(fleet, 120), printed(fleet, 120, everything=True)
    assert "not shown: 16 ranks between the slowest and the fastest, 30 tables of less" in short
    assert "not shown" not in full
    assert all(entry.table in full for entry in fleet.tables)
    assert "lower bound" in short
    assert "gap" in short


def test_json_is_a_plan_with_predictions(fleet: PlanResult) -> None:
    text = plan_to_json(fleet)
    assert ShardingPlan.from_json(text) == fleet.plan
    predicted = json.loads(text)["predicted"]
    assert predicted["step_ms"] == fleet.step_ms
    assert predicted["phases"] == list(PHASES)
    assert len(predicted["ranks"]) == 32
    for entry, table in zip(predicted["tables"], fleet.plan.tables, strict=True):
        assert entry["table"] == table.table
        assert len(entry["shard_ms"]) == len(entry["shard_bytes"]) == len(table.shards)
