"""Bytes and time of an exchange in two stages, as predicted."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import shardlab as sl
from shardlab.plan import ShardingPlan
from shardlab.planner import PlanSettings, read_topology
from shardlab.planner.hierarchy import compare_hierarchies
from shardlab.planner.request import build_request
from shardlab.planner.topology import Link
from shardlab.planner.zipf import ZIPF_EXPONENT
from shardlab.specs import EmbeddingBagConfig, ExchangeKind, ShardingType
from shardlab.table_plan import WireDtypes, build_table_plan
from tests.harness import run_ranks
from tests.sharded_runs import Bare, in_stages

BATCH = 512
TABLES = tuple(EmbeddingBagConfig(rows, 16, f"t{i}") for i, rows in enumerate((50, 3000, 40_000)))


def _plan(kind=ShardingType.ROW_WISE, exchange=ExchangeKind.ROWS):
    plan = ShardingPlan(4, tuple(build_table_plan(
        table, kind, [i % 4] if kind is ShardingType.TABLE_WISE else range(4), exchange=exchange)
        for i, table in enumerate(TABLES)))
    return plan.with_wire(WireDtypes("fp16", "int8"))


def _compare(plan, inter=1e9, intra=1e10, name="2x2xcpu"):
    machine = replace(read_topology(name), inter_host=Link(inter, 1e-6),
                      intra_host=Link(intra, 1e-6))
    return compare_hierarchies(plan, build_request(TABLES, machine, BATCH, "sgd", PlanSettings()))


def _sent(groups, plan, stages):
    """Bytes across hosts and inside, of one step of Zipf's ids."""
    groups = in_stages(groups) if stages else sl.comm.build_groups(groups.process_group, 2)
    model, optimizer = sl.shard(Bare(TABLES), plan, groups=groups, optimizer=sl.optim.SGD(lr=0.1))
    generator = torch.Generator().manual_seed(groups.rank)
    ids = [torch.multinomial(torch.arange(1, table.num_embeddings + 1).double()
                             ** -ZIPF_EXPONENT, BATCH, replacement=True, generator=generator)
           for table in TABLES]
    features = sl.KeyedJaggedTensor([table.name for table in TABLES], torch.cat(ids),
                                    fixed_length=1)
    model(features).values().sum().backward()
    optimizer.step()
    wire = model.collections()["ebc"].wire
    return wire.across_bytes, wire.inside_bytes


@pytest.mark.parametrize(("kind", "exchange"), [
    (ShardingType.ROW_WISE, ExchangeKind.ROWS), (ShardingType.TABLE_WISE, ExchangeKind.ROWS),
    (ShardingType.COLUMN_WISE, ExchangeKind.ROWS),
    (ShardingType.DATA_PARALLEL, ExchangeKind.ROWS),
    (ShardingType.TABLE_WISE, ExchangeKind.POOLED)],
    ids=lambda value: value.value)
def test_predicted_bytes_are_those_sent(kind, exchange):
    """Within what one draw of ids differs by; heads of messages are not predicted."""
    plan = _plan(kind, exchange)
    costs = _compare(plan)
    for stages, predicted in ((False, costs.flat), (True, costs.two_stage)):
        across, inside = map(sum, zip(*run_ranks(4, _sent, plan, stages), strict=True))
        assert across == pytest.approx(predicted.across_bytes, rel=0.06)
        assert inside == pytest.approx(predicted.inside_bytes, rel=0.06)


def test_two_stages_pay_over_slow_links_only():
    slow, fast = _compare(_plan(), inter=5e5), _compare(_plan(), inter=1e10)
    assert slow.two_stage_pays
    assert not fast.two_stage_pays
    assert slow.flat.across_bytes == fast.flat.across_bytes
    assert slow.two_stage.across_bytes < slow.flat.across_bytes
    assert slow.two_stage.inside_bytes > slow.flat.inside_bytes


def test_bags_are_not_united():
    costs = _compare(_plan(ShardingType.TABLE_WISE, ExchangeKind.POOLED), inter=10e6)
    assert costs.two_stage.across_bytes == pytest.approx(costs.flat.across_bytes)
    assert not costs.two_stage_pays
