"""Scenarios: read, planned, and laid beside the plan as it is."""

from __future__ import annotations

import io
import re
from dataclasses import replace

import pytest
from rich.console import Console

from shardlab.errors import ConfigError
from shardlab.planner import PlanSettings, plan
from shardlab.planner.request import Request, build_request
from shardlab.planner.result import PlanResult
from shardlab.planner.what_if import (
    Outcome,
    describe_moves,
    print_outcomes,
    run_scenario,
)
from tests.planner.fleets import GIB, generated_fleet, tiered

TABLES = generated_fleet(8, largest_rows=1e6)


def request_with(batch_size: int = 256) -> Request:
    return build_request(TABLES, tiered("2x2xh100", 4 * GIB, 64 * GIB, 1e12), batch_size,
                         "row_wise_adagrad", PlanSettings())


def rebuild(overrides: list[str]) -> Request:
    """A job that knows one key."""
    assert overrides == ["batch_size=1024"]
    return request_with(1024)


def run(scenario: str) -> PlanResult:
    outcome = run_scenario(scenario, request_with(), rebuild)
    assert outcome.scenario == scenario
    assert outcome.result is not None, outcome.problem
    return outcome.result


@pytest.mark.parametrize(("scenario", "field", "value"), [
    ("hosts=+1", "hosts", 3), ("hosts=5", "hosts", 5), ("hosts=x2", "hosts", 4),
    ("hosts=-1", "hosts", 1), ("hbm=x2", "hbm_bytes", 8 * GIB),
    ("hbm_bytes=+4 GiB", "hbm_bytes", 8 * GIB), ("ddr=16GiB", "ddr_bytes", 16 * GIB),
    ("no ddr", "ddr_bytes", 0), ("no   ssd", "ssd", None), ("ssd=none", "ssd", None),
    ("hosts=x2 no ssd hosts=+1", "hosts", 5), ("hosts=x2, no ssd,hosts=+1", "hosts", 5)])
def test_fields_of_the_machine(scenario: str, field: str, value: object) -> None:
    assert getattr(run(scenario).topology, field) == value


def test_fields_inside_fields() -> None:
    topology = run("ssd.read_iops=/2 inter_host.latency_s=10us intra_host.bytes_per_s=x2").topology
    before = request_with().topology
    assert topology.ssd.read_iops == before.ssd.read_iops / 2
    assert topology.inter_host.latency_s == pytest.approx(1e-5)
    assert topology.intra_host.bytes_per_s == 2 * before.intra_host.bytes_per_s
    assert [size for size, _ in topology.intra_host.curve] == \
        [size for size, _ in before.intra_host.curve]


def test_another_machine_another_wire_and_the_job() -> None:
    assert run("topology=4xh200").topology.name == "4xh200"
    wire = run("wire=bf16 wire.backward=fp16").settings.wire
    assert (wire.forward, wire.backward) == ("bf16", "fp16")
    assert run("batch_size=1024").batch_size == 1024
    both = run("batch_size=1024 hosts=1")
    assert (both.batch_size, both.topology.hosts) == (1024, 1)


@pytest.mark.parametrize(("scenario", "message"), [
    ("ssdless", "--what-if 'ssdless': 'ssdless' is no change; write key=value, or no ssd or no"),
    ("wire.forwards=bf16", r"wire\.forwards: a wire has forward and backward"),
    ("wire=int7", "wire.forward: unknown dtype 'int7'"),
    ("hosts=+many", r"hosts: expected a number behind '\+', found 'many'"),
    ("hosts=/0", "hosts: expected a number behind '/', found '0'"),
    ("hosts=1.5", "field 'hosts': expected a whole number, found '1.5'"),
    ("hosts=0", "hosts must be at least 1, found 0"),
    ("ssd.read_iop=5", "'ssd.read_iop'.*did you mean 'read_iops'"),
    ("ssd.read_iop=x2", r"there is no 'read_iop' \(did you mean 'read_iops'\?\)"),
    ("ssd=x2", "ssd: is no number that could be moved"),
    ("topology=h1000", "unknown topology 'h1000'"),
])
def test_changes_that_cannot_be_read_are_named(scenario: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run_scenario(scenario, request_with(), rebuild)


@pytest.fixture(scope="module")
def before() -> PlanResult:
    return plan(TABLES, tiered("2x2xh100", 4 * GIB, 64 * GIB, 1e12), 256)


def printed(before: PlanResult, outcomes: list[Outcome], width: int = 120) -> str:
    stream = io.StringIO()
    print_outcomes(Console(file=stream, width=width, markup=False, highlight=False), before,
                   outcomes)
    return stream.getvalue()


def test_old_new_and_difference_stand_side_by_side(before: PlanResult) -> None:
    outcomes = [run_scenario(scenario, request_with(), rebuild)
                for scenario in ("hosts=+1", "batch_size=1024")]
    text = printed(before, outcomes)
    assert "hosts=+1" in text
    assert "6 (+50.0%)" in text
    assert "4 (=)" in text
    assert "tables change" in text
    assert "samples/s" in text
    assert "  update" in text


def test_a_scenario_that_does_not_fit_says_why(before: PlanResult) -> None:
    outcome = run_scenario("hbm_bytes=1MiB no ddr no ssd", request_with(), rebuild)
    assert outcome.result is None
    text = printed(before, [outcome])
    assert "does not fit" in text
    assert "hbm_bytes=1MiB no ddr no ssd: " in text


def test_moves_are_named(before: PlanResult) -> None:
    assert describe_moves(before, before) == "every table keeps its choice"
    other = plan(TABLES, tiered("1x1xh100", 40 * GIB, 64 * GIB), 16384)
    words = describe_moves(before, other)
    assert re.match(r"\d of 8 tables change: table_\d", words)
    every = replace(before, tables=tuple(replace(entry, table=f"new_{entry.table}")
                                         for entry in before.tables))
    assert describe_moves(before, every).endswith("new_table_4 and 3 more")
