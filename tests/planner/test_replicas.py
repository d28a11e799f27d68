"""Replica groups: a group's part of the machine, what syncing sends, and the report."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest

from shardlab.errors import ConfigError
from shardlab.plan import ShardingPlan
from shardlab.planner import PlanSettings, group_of, plan, read_topology
from shardlab.planner.problem import ShardLabModel
from shardlab.planner.rate import rate
from shardlab.planner.replicas import all_groups, sync_bytes
from shardlab.planner.report import print_report
from shardlab.planner.request import build_request
from shardlab.specs import EmbeddingBagConfig

TABLES = [EmbeddingBagConfig(name=name, num_embeddings=rows, embedding_dim=32)
          for name, rows in (("user", 2_000_000), ("item", 300_000), ("day", 31))]
MIXED = {"levels": [{"fraction": 0.05}, {"dtype": "int8"}]}


def _request(machine: str, replicas: int, sync: int = 1, storage: object = "fp32",
             optimizer: str = "adam"):
    group, groups = group_of(read_topology(machine), replicas, sync)
    tables = [replace(table, storage=storage) for table in TABLES]
    return build_request(tables, group, 1024, optimizer, PlanSettings(replicas=groups))


@pytest.mark.parametrize(("machine", "replicas", "hosts", "ranks", "per_host"), [
    ("4x8xh100", 1, 4, 8, 1), ("4x8xh100", 2, 2, 8, 1), ("4x8xh100", 4, 1, 8, 1),
    ("4x8xh100", 8, 1, 4, 2), ("4x8xh100", 32, 1, 1, 8)])
def test_a_group_has_its_part_of_the_machine(machine, replicas, hosts, ranks, per_host):
    whole = read_topology(machine)
    group, groups = group_of(whole, replicas)
    assert (group.hosts, group.ranks_per_host, groups.per_host) == (hosts, ranks, per_host)
    assert (group.ddr_bytes, group.hbm_bytes) == (whole.ddr_bytes // per_host, whole.hbm_bytes)
    assert group.ssd.capacity_bytes == whole.ssd.capacity_bytes // per_host
    back = all_groups(group, groups)
    assert (back.hosts, back.ranks_per_host) == (whole.hosts, whole.ranks_per_host)


@pytest.mark.parametrize(("machine", "replicas", "text"), [
    ("4x8xh100", 3, "32 ranks do not divide into 3 groups of equal size; choose one of 1, 2, 4"),
    ("4x6xh100", 3, "3 groups of 8 ranks do not fit hosts of 6; a group takes whole hosts")])
def test_groups_that_do_not_fit_are_refused(machine, replicas, text):
    with pytest.raises(ConfigError, match=text):
        group_of(read_topology(machine), replicas)


def test_bytes_between_groups_follow_the_formula():
    request = _request("2x4xh100", 2)
    work = ShardLabModel(request).pricer.work
    expected = sum(rows * (width + 4 * 32) for rows, width in
                   zip(work.access.unique(4 * 1024), (3, 3, 1), strict=True)) / 4
    assert sync_bytes(request, work) == pytest.approx(expected)
    three = _request("3x4xh100", 3)
    expected = sum(2 / 3 * (rows + every) * (width + 4 * 32) for rows, every, width in
                   zip(work.access.unique(4 * 1024), work.access.unique(12 * 1024), (3, 3, 1),
                       strict=True)) / 4
    assert sync_bytes(three, work) == pytest.approx(expected)
    averaged = _request("2x4xh100", 2, sync=10)
    expected = sum(rows * (width + 4 * 3 * 32) for rows, width in  # two moments
                   zip(work.access.unique(10 * 4 * 1024), (3, 3, 1), strict=True)) / 4 / 10
    assert sync_bytes(averaged, work) == pytest.approx(expected)
    assert sync_bytes(_request("2x4xh100", 1), work) == 0


def test_plan_names_its_groups_and_their_price():
    request = _request("2x4xh100", 2, sync=16)
    result = plan(request.tables, request.topology, 1024, "adam", request.settings)
    assert (result.plan.world_size, result.plan.replicas, result.plan.sync_every_steps) == (4, 2,
                                                                                            16)
    assert ShardingPlan.from_json(result.plan.to_json()) == result.plan
    assert result.samples_per_s == pytest.approx(8 * 1024 / result.step_ms * 1e3)
    text = io.StringIO()
    print_report(result, text, width=200)
    assert "2 groups of 4 ranks, placed alike, rows averaged every 16 steps" in text.getvalue()
    rated = rate(result.plan, request)
    assert rated.plan == result.plan
    assert rated.sync_bytes == result.sync_bytes > 0
    assert sum(rated.slowest.phase_ms) > sum(rate(
        replace(result.plan, replicas=1, sync_every_steps=1),
        replace(request, settings=PlanSettings())).slowest.phase_ms)


def test_tables_whose_copies_would_differ_are_refused():
    with pytest.raises(ConfigError, match=r"table .user.: .* rounds rows that leave"):
        _request("2x4xh100", 2, storage=MIXED)
    assert _request("2x4xh100", 2, sync=4, storage=MIXED).settings.replicas.groups == 2
