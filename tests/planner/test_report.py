"""The terminal report: what it says, at every width, for few ranks and for many."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest

from shardlab.log_layout import CLEANING
from shardlab.phases import PHASES
from shardlab.planner import DenseModel, PlanSettings, plan
from shardlab.planner.html import plan_to_html
from shardlab.planner.rate import rate
from shardlab.planner.report import print_report
from shardlab.planner.report_text import (
    PHASE_LETTERS,
    compact,
    describe_shards,
    fill_bar,
    number,
    phase_bar,
    rate_text,
    storage_text,
)
from shardlab.planner.request import build_request
from shardlab.planner.result import PlanResult
from shardlab.specs import EmbeddingBagConfig, ShardingType
from shardlab.storage_specs import TensorTrainSpec, Tier
from shardlab.table_plan import WireDtypes
from tests.planner.fleets import GIB, generated_fleet, machine, tiered


@pytest.fixture(scope="module")
def small() -> PlanResult:
    tables = [EmbeddingBagConfig(10**6, 64, "user[bold]"), EmbeddingBagConfig(50, 8, "tiny"),
              EmbeddingBagConfig(10**5, 32, "asked", sharding=ShardingType.ROW_WISE)]
    return plan(tables, "2xcpu", 512)


@pytest.fixture(scope="module")
def fleet() -> PlanResult:
    return plan(generated_fleet(60), machine("4x8xh100"), 512)


@pytest.fixture(scope="module")
def tight() -> PlanResult:
    """Not everything fits as fp32; a table may be int8 instead, others go to ddr."""
    tables = [EmbeddingBagConfig(2 * 10**7, 64, "open", storage={"choose": [
        {"dtype": "fp32", "tier": "hbm"}, {"dtype": "int8", "tier": "hbm"}]}),
        EmbeddingBagConfig(2 * 10**7, 64, "large"), EmbeddingBagConfig(10**4, 64, "small")]
    return plan(tables, tiered("2xh100", 2 * GIB, 16 * GIB), 512)


@pytest.fixture(scope="module")
def written() -> PlanResult:
    """Records of 260 bytes on a disk, every one of them touched."""
    table = EmbeddingBagConfig(1500, 64, "cold", pooling_factor=2000.0,
                               storage={"dtype": "fp32", "tier": "ssd"})
    return plan([table], tiered("2xh100", GIB, GIB, 64 * GIB), 4096)


def test_what_the_disk_endures_is_said(written: PlanResult) -> None:
    disk = written.topology.ssd
    assert disk is not None
    assert disk.endurance_bytes is not None
    # Every row and its tag, and what cleaning writes again for it.
    size = sum(rank.written_bytes for rank in written.ranks)
    assert size == pytest.approx(1500 * CLEANING * (260 + 4), rel=0.01)
    per_s = size / written.step_ms * 1e3
    assert written.disk_bytes_per_s == pytest.approx(per_s)
    assert written.disk_life_s == pytest.approx(disk.endurance_bytes / per_s)
    days = f"{disk.endurance_bytes / per_s / 86_400:.3g} days"
    assert f"/s written: the disk is rated for {days} of it" in printed(written, 120)
    assert days in plan_to_html(written)


def test_disks_of_unknown_endurance_and_those_not_written(written: PlanResult,
                                                          small: PlanResult) -> None:
    disk = written.topology.ssd
    assert disk is not None
    unrated = replace(written, topology=replace(
        written.topology, ssd=replace(disk, endurance_bytes=None)))
    assert unrated.disk_life_s is None
    assert "/s written, endurance not known" in printed(unrated, 120)
    assert small.disk_life_s is None
    assert "written" not in printed(small, 120)


def printed(result: PlanResult, width: int, *, everything: bool = False) -> str:
    stream = io.StringIO()
    print_report(result, stream, width=width, everything=everything)
    return stream.getvalue()


@pytest.mark.parametrize("width", [80, 100, 140])
def test_report_shows_ranks_tables_and_proof(small: PlanResult, width: int) -> None:
    text = printed(small, width)
    assert "Plan of 3 tables for 2xcpu" in text
    assert "1 host x 2 ranks, batch 512 per rank, row_wise_adagrad" in text
    assert "samples/s" in text
    assert "Zipf's law, exponent 1.05" in text
    assert "user[bold]" in text
    assert "row_wise was" in text
    assert all(phase in text for phase, ms in zip(PHASES, small.slowest.phase_ms, strict=True)
               if ms)
    assert "…" not in text
    assert max(len(line.rstrip()) for line in text.splitlines()) <= width
    assert ("exchange" in text.split("Tables:")[1]) is (width >= 130)
    assert "every table is held as fp32 on hbm" in text


def test_the_bound_says_how_good_the_plan_is(small: PlanResult) -> None:
    optimal = replace(small, optimal=True)
    assert "proven optimal" in printed(optimal, 80)
    text = printed(replace(small, optimal=False, lower_bound_ms=0.9 * small.step_ms,
                           binding=("hbm", "ssd")), 80)
    assert "gap 11.1%; held by hbm, ssd" in text


def test_long_lists_are_cut_and_say_so(fleet: PlanResult) -> None:
    short, full = printed(fleet, 120), printed(fleet, 120, everything=True)
    assert "25 ranks are not shown (--all shows them); of all 32 (least / median / most):" in short
    for note in ("slowest", "fullest", "fastest"):
        assert note in short.split("Ranks:")[1]
    assert "40 tables of less work are not shown" in short
    assert "not shown" not in full
    assert all(entry.table in full for entry in fleet.tables)


def test_storages_and_what_they_cost(tight: PlanResult) -> None:
    text = printed(tight, 120)
    assert "Storages:" in text
    assert "1 of 1 tables that leave the storage open did not get their first choice:" in text
    assert "open: int8 on hbm instead of fp32 on hbm: saves " in text
    assert "on ddr" in text
    assert "host 0, the fullest" in text


def test_wire_and_prefetching_are_said(tight: PlanResult) -> None:
    settings = PlanSettings(dense=DenseModel(flops_per_sample=1e9),
                            wire=WireDtypes("fp16", "bf16"))
    tables = [EmbeddingBagConfig(3 * 10**7, 64, "large")]
    result = plan(tables, tiered("2xh100", 2 * GIB, 32 * GIB), 512, settings=settings)
    text = printed(result, 100)
    assert "wire fp16 / bf16" in text
    assert "of prefetching run beside the dense part" in " ".join(text.split())


def test_a_given_plan_that_does_not_fit_says_so(small: PlanResult) -> None:
    tables = [EmbeddingBagConfig(10**6, 64, "user[bold]"), EmbeddingBagConfig(50, 8, "tiny"),
              EmbeddingBagConfig(10**5, 32, "asked", sharding=ShardingType.ROW_WISE)]
    request = build_request(tables, machine("2xcpu", 10**6), 512, "row_wise_adagrad",
                            PlanSettings())
    text = printed(rate(small.plan, request), 100)
    assert "does not fit: rank 0: hbm holds" in text
    assert "none: the plan was given, not searched" in text


@pytest.mark.parametrize(("value", "text"), [
    (0.0, "0.00"), (0.0123, "0.012"), (1.234, "1.23"), (12.34, "12.3"), (1234.5, "1234")])
def test_numbers_have_no_exponent(value: float, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(("rate_", "text"), [
    (950.0, "950 samples/s"), (1.7e6, "1.7 M samples/s"), (2e9, "2 G samples/s")])
def test_rates_have_units(rate_: float, text: str) -> None:
    assert rate_text(rate_) == text


@pytest.mark.parametrize(("ranks", "text"), [
    ([3], "3"), ([2, 0, 1, 5], "0-2,5"), ([0, 2, 4, 6], "4 ranks"), ([1, 1, 2], "1-2")])
def test_ranks_are_written_short(ranks: list[int], text: str) -> None:
    assert compact(ranks) == text


def test_bars_have_the_width_they_are_asked_for() -> None:
    assert len(fill_bar(0.0, 8)) == len(fill_bar(1.7, 8)) == 8
    assert fill_bar(0.001, 8).plain == "█·······"
    times = [1.0] * len(PHASES)
    assert phase_bar(times, sum(times), 18).plain == "".join(
        2 * letter for letter in PHASE_LETTERS.values())
    assert phase_bar([0.0] * len(PHASES), 0.0, 18).plain == ""


def test_storages_name_their_tier() -> None:
    assert storage_text(TensorTrainSpec(16, tier=Tier.HBM)) == "tensor_train rank 16 on hbm"


def test_shards_are_counted_by_block(fleet: PlanResult) -> None:
    texts = {describe_shards(entry) for entry in fleet.plan.tables}
    assert "table_wise" in texts
