"""Predicted beside measured, and one plan beside another."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from shardlab.errors import PlanError
from shardlab.phases import MEASURED_PHASES, PHASES
from shardlab.planner import plan
from shardlab.planner.compare import print_measured, print_plans, read_run
from shardlab.planner.plan_file import Prediction, prediction_of
from shardlab.planner.result import PlanResult
from shardlab.storage_bytes import TierBytes
from tests.planner.fleets import generated_fleet, machine


@pytest.fixture(scope="module")
def result() -> PlanResult:
    return plan(generated_fleet(4, largest_rows=1e5), machine("2xcpu"), 256)


def write_run(folder: Path, predicted: Prediction, **changes: Any) -> Path:
    """A run that took twice as long as predicted and holds what was predicted."""
    phases = [{**{phase: 2 * ms for phase, ms in zip(PHASES, rank, strict=True)}, "wait": 0.25}
              for rank in predicted.phase_ms]
    phases[1]["rows"] += 1.0  # waits for rank 0
    data = {"phase_ms": phases, "pace": {"step_ms_p50": 9.0},
            "tables": [{"hbm": size.hbm, "ddr": size.ddr, "ssd": size.ssd}
                       for size in predicted.tables], **changes}
    (folder / "summary.json").write_text(json.dumps(data))
    return folder


def printed(predicted: Prediction, folder: Path) -> str:
    stream = io.StringIO()
    print_measured(Console(file=stream, width=100, markup=False, highlight=False), predicted,
                   read_run(folder))
    return stream.getvalue()


def test_ratios_are_measured_over_predicted(result: PlanResult, tmp_path: Path) -> None:
    predicted = prediction_of(result)
    measured = read_run(write_run(tmp_path, predicted))
    assert measured.longest == 0
    assert measured.tables == predicted.tables
    assert measured.work_ms == pytest.approx(sum(predicted.rank_ms) + 0.5)
    text = printed(predicted, tmp_path)
    assert "machine  2xcpu, 2 ranks, batch 256 per rank" in text
    assert "The step of rank 0, which waits least for others" in text
    lines = {line.split()[0]: line for line in text.splitlines() if line.split()}
    assert "2.00" in lines["update"]
    assert "prefetch" not in lines
    assert "besides 0.25 ms of waiting for data" in text
    assert "1.00" in lines["0"]


def test_a_tier_that_only_one_side_names_is_shown(result: PlanResult, tmp_path: Path) -> None:
    held = [{"hbm": 0, "ddr": 7, "ssd": 0}] * 2
    text = printed(prediction_of(result), write_run(tmp_path, prediction_of(result), tables=held))
    assert "7 B       -" in text


@pytest.mark.parametrize(("text", "message"), [
    (None, "summary.json cannot be read: No such file .*; name the folder of a run that has"),
    ("[]", "summary.json is not that of a run .TypeError"),
    ("{", "summary.json is not that of a run .JSONDecodeError"),
    (json.dumps({"phase_ms": [{}], "tables": [], "pace": {"step_ms_p50": 1}}),
     "its phases were not timed; on GPUs train with --set train.time_phases=true"),
    (json.dumps({"phase_ms": [], "tables": [], "pace": {"step_ms_p50": 1}}), "were not timed"),
])
def test_folders_without_figures_are_refused(tmp_path: Path, text: str | None,
                                             message: str) -> None:
    if text is not None:
        (tmp_path / "summary.json").write_text(text)
    with pytest.raises(PlanError, match=message):
        read_run(tmp_path)


def test_a_run_of_other_ranks_is_refused(result: PlanResult, tmp_path: Path) -> None:
    phases = dict.fromkeys(MEASURED_PHASES, 1.0)
    folder = write_run(tmp_path, prediction_of(result), phase_ms=[phases],
                       tables=[{"hbm": 1, "ddr": 0, "ssd": 0}])
    with pytest.raises(PlanError, match="1 ranks, its plan has 2"):
        printed(prediction_of(result), folder)


def test_two_plans_stand_side_by_side(result: PlanResult) -> None:
    other = plan(generated_fleet(4, largest_rows=1e5), machine("4xcpu"), 256)
    stream = io.StringIO()
    print_plans(Console(file=stream, width=100, markup=False, highlight=False), result, other,
                "other.json")
    text = stream.getvalue()
    assert "Two plans" in text
    assert "this plan" in text
    assert "other.json" in text


def test_bytes_are_those_of_the_shards(result: PlanResult) -> None:
    assert prediction_of(result).tables == tuple(
        sum((shard.bytes for entry in result.plan.tables for shard in entry.shards
             if shard.rank == rank), TierBytes()) for rank in range(2))
