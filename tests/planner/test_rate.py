"""What is predicted for a given plan: the planner's own figures, for any rectangles."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardlab.errors import PlanError
from shardlab.plan import ShardingPlan
from shardlab.planner import PlanSettings, plan
from shardlab.planner.rate import choose_exchanges, overfull, rate
from shardlab.planner.request import Request, build_request
from shardlab.planner.topology import Topology
from shardlab.specs import EmbeddingBagConfig, ExchangeKind, ShardingType
from shardlab.storage_bytes import TierBytes, tier_bytes
from shardlab.table_plan import Shard, TablePlan, WireDtypes, build_table_plan
from tests.planner.fleets import GIB, generated_fleet, machine, tiered


def request_of(tables: list[EmbeddingBagConfig], topology: Topology) -> Request:
    return build_request(tables, topology, 256, "row_wise_adagrad", PlanSettings())


@settings(max_examples=25, deadline=None)
@given(count=st.integers(1, 12), seed=st.integers(0, 5),
       name=st.sampled_from(["1xcpu", "2xcpu", "2x4xh100"]), hbm=st.sampled_from([1, 8, 64]),
       ddr=st.sampled_from([1, 256]))
def test_the_planner_s_own_plan_gets_its_own_figures(count: int, seed: int, name: str,
                                                     hbm: int, ddr: int) -> None:
    tables = generated_fleet(count, seed=seed, largest_rows=1e6)
    topology = tiered(name, hbm * GIB, ddr * GIB, 256 * GIB)
    made = plan(tables, topology, 256)
    rated = rate(made.plan, request_of(tables, topology))
    assert rated.plan == made.plan
    assert rated.ranks == made.ranks
    assert [table.phase_ms for table in rated.tables] == [table.phase_ms for table in made.tables]
    assert rated.solved is None
    assert rated.gap == 0
    assert overfull(rated) == []


TABLE = EmbeddingBagConfig(1000, 8, "t")


def two_on_one(rank: int) -> ShardingPlan:
    """Column blocks of unequal width, two of them on one rank, in another order."""
    shards = (Shard(rank, 0, 1000, 6, 8), Shard(1 - rank, 0, 1000, 4, 6),
              Shard(rank, 0, 1000, 0, 4))
    return ShardingPlan(2, (TablePlan("t", ShardingType.COLUMN_WISE, ExchangeKind.ROWS, shards),))


@pytest.mark.parametrize("rank", [0, 1])
def test_several_shards_of_a_table_on_a_rank_add_up(rank: int) -> None:
    rated = rate(two_on_one(rank), request_of([TABLE], machine("2xcpu")))
    spec = rated.tables[0].storage
    expected = tier_bytes(spec, 1000, 4, "row_wise_adagrad") + \
        tier_bytes(spec, 1000, 2, "row_wise_adagrad")
    assert rated.ranks[rank].held.total == expected
    assert [shard.col_start for shard in rated.plan.tables[0].shards] == [0, 4, 6]
    times = dict.fromkeys((0, 1), 0.0)
    for shard in rated.plan.tables[0].shards:
        times[shard.rank] += shard.ms
    busier, other = rated.ranks[rank], rated.ranks[1 - rank]
    assert busier.ms - other.ms == pytest.approx(times[rank] - times[1 - rank])


def test_bytes_of_a_shard_are_those_of_its_storage() -> None:
    rated = rate(two_on_one(0), request_of([TABLE], machine("2xcpu")))
    for shard in rated.plan.tables[0].shards:
        assert shard.bytes == TierBytes(hbm=1000 * (4 * shard.columns + 4))


@pytest.mark.parametrize(("ranks", "kind"), [(1, ExchangeKind.POOLED), (2, ExchangeKind.ROWS)])
def test_an_open_exchange_is_what_training_makes_of_it(ranks: int, kind: ExchangeKind) -> None:
    given_ = ShardingPlan(ranks, (build_table_plan(TABLE, ShardingType.TABLE_WISE, [0]),))
    rated = rate(given_, request_of([TABLE], machine(f"{ranks}xcpu")))
    assert rated.plan.tables[0].exchange is kind


@pytest.mark.parametrize(("pooling", "kind"), [(1.0, ExchangeKind.ROWS),
                                               (200.0, ExchangeKind.POOLED)])
def test_an_open_exchange_can_be_chosen(pooling: float, kind: ExchangeKind) -> None:
    table = EmbeddingBagConfig(10**6, 64, "t", pooling_factor=pooling)
    given_ = ShardingPlan(2, (build_table_plan(table, ShardingType.TABLE_WISE, [0]),))
    request = request_of([table], machine("2xcpu"))
    chosen = choose_exchanges(given_, request)
    assert chosen.tables[0].exchange is kind
    asked = replace(chosen, tables=(replace(chosen.tables[0], exchange=ExchangeKind.ROWS),))
    assert choose_exchanges(asked, request) == asked


def test_copies_exchange_rows_whatever_they_ask_for() -> None:
    given_ = ShardingPlan(2, (build_table_plan(TABLE, ShardingType.DATA_PARALLEL, [0, 1],
                                               exchange=ExchangeKind.POOLED),))
    rated = rate(given_, request_of([TABLE], machine("2xcpu")))
    assert rated.plan.tables[0].exchange is ExchangeKind.ROWS
    assert rated.ranks[0].held == rated.ranks[1].held


def test_the_plan_s_wire_counts() -> None:
    table = EmbeddingBagConfig(10**6, 64, "t")
    entry = build_table_plan(table, ShardingType.TABLE_WISE, [0], exchange=ExchangeKind.ROWS)
    request = request_of([table], machine("2xcpu"))
    wide, narrow = (rate(ShardingPlan(2, (replace(entry, wire=wire),)), request)
                    for wire in (WireDtypes(), WireDtypes("fp16", "fp16")))
    rows = 3
    assert narrow.settings.wire == WireDtypes("fp16", "fp16")
    assert narrow.ranks[0].phase_ms[rows] != wide.ranks[0].phase_ms[rows]


def test_what_does_not_fit_is_named_fullest_first() -> None:
    tables = [EmbeddingBagConfig(10**6, 64, "a"), EmbeddingBagConfig(10**5, 64, "b")]
    given_ = ShardingPlan(2, tuple(build_table_plan(table, ShardingType.TABLE_WISE, [rank])
                                   for rank, table in enumerate(tables)))
    lines = overfull(rate(given_, request_of(tables, machine("2xcpu", 10**7))))
    assert lines[0].startswith("rank 0: hbm holds")
    assert "too much" in lines[0]
    assert [line.split(":")[0] for line in lines] == ["rank 0", "rank 1"]


def test_a_plan_of_other_tables_or_ranks_is_refused_by_name() -> None:
    request = request_of([EmbeddingBagConfig(1000, 8, "u")], machine("4xcpu"))
    with pytest.raises(PlanError, match="plan is for 2 ranks, this job runs 4") as caught:
        rate(two_on_one(0), request)
    assert "table 'u' is not in the plan" in str(caught.value)
