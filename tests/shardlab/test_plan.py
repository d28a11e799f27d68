"""Plans as data: every sharding type tiles its table, JSON round trips, misfits are named."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardlab.errors import PlanError
from shardlab.plan import ShardingPlan
from shardlab.specs import EmbeddingBagConfig, ExchangeKind, ShardingType
from shardlab.storage_specs import LevelSpec, RowsSpec, Tier
from shardlab.table_plan import Shard, TablePlan, build_table_plan, even_splits

KINDS = list(ShardingType)


def _table(rows=10, columns=6, **changes):
    return EmbeddingBagConfig(num_embeddings=rows, embedding_dim=columns,
                              **({"name": "user"} | changes))


def _ranks_for(kind, world):
    return [world - 1] if kind is ShardingType.TABLE_WISE else list(range(world))


def _cells(plan):
    """Every (row, column) that the shards hold, with repetitions."""
    return sorted((row, column) for shard in plan.shards
                  for row in range(shard.row_start, shard.row_end)
                  for column in range(shard.col_start, shard.col_end))


@given(kind=st.sampled_from(KINDS), rows=st.integers(1, 9), columns=st.integers(1, 9),
       world=st.integers(1, 6), blocks=st.integers(1, 3))
def test_shards_hold_every_cell_exactly_once(kind, rows, columns, world, blocks):
    table, ranks = _table(rows, columns), _ranks_for(kind, world)
    by_column = {ShardingType.COLUMN_WISE, ShardingType.TABLE_COLUMN_WISE}
    groups = blocks if kind is ShardingType.GRID_SHARD else world if kind in by_column else 1
    if groups > columns or len(ranks) % groups:
        with pytest.raises(PlanError, match="table 'user'"):
            build_table_plan(table, kind, ranks, columns=blocks)
        return
    plan = build_table_plan(table, kind, ranks, columns=blocks)
    copies = world if kind is ShardingType.DATA_PARALLEL else 1
    whole = [(row, column) for row in range(rows) for column in range(columns)]
    assert _cells(plan) == sorted(whole * copies)
    assert {shard.rank for shard in plan.shards} <= set(ranks)
    assert all(shard.rows > 0 and shard.columns > 0 for shard in plan.shards)
    whole_plan = ShardingPlan(world, (plan,))
    whole_plan.check([table], world)
    assert ShardingPlan.from_json(whole_plan.to_json()) == whole_plan


@given(size=st.integers(1, 200), parts=st.integers(1, 20))
def test_even_splits_cover_the_range_in_nearly_equal_pieces(size, parts):
    pieces = even_splits(size, parts)
    assert len(pieces) == min(size, parts)
    assert [number for start, end in pieces for number in range(start, end)] == list(range(size))
    sizes = [end - start for start, end in pieces]
    assert max(sizes) - min(sizes) <= 1


def test_grid_cuts_columns_by_group_and_rows_inside_it():
    plan = build_table_plan(_table(10, 6), ShardingType.GRID_SHARD, [3, 1, 0, 2], columns=2)
    assert [(s.rank, s.row_start, s.row_end, s.col_start, s.col_end) for s in plan.shards] == [
        (3, 0, 5, 0, 3), (1, 5, 10, 0, 3), (0, 0, 5, 3, 6), (2, 5, 10, 3, 6)]


def test_table_with_fewer_rows_than_ranks_leaves_ranks_out():
    plan = build_table_plan(_table(2, 6), ShardingType.ROW_WISE, range(4))
    assert [(s.rank, s.row_start, s.row_end) for s in plan.shards] == [(0, 0, 1), (1, 1, 2)]


def test_exchange_and_tier_default_to_the_table():
    table = _table(exchange="pooled", storage={"tier": "ddr"})
    plan = build_table_plan(table, ShardingType.ROW_WISE, [0, 1])
    assert plan.exchange is ExchangeKind.POOLED
    assert plan.storage.home.tier is Tier.DDR
    plan = build_table_plan(table, ShardingType.ROW_WISE, [0], exchange=ExchangeKind.ROWS,
                            storage=RowsSpec((LevelSpec(tier=Tier.SSD),)))
    assert (plan.exchange, plan.storage.home.tier) == (ExchangeKind.ROWS, Tier.SSD)


@pytest.mark.parametrize(("kind", "ranks", "columns", "text"), [
    (ShardingType.TABLE_WISE, [0, 1], 1, r"table 'user', table_wise: wrong number of ranks: "
                                         r"\[0, 1\]"),
    (ShardingType.ROW_WISE, [], 1, r"table 'user', row_wise: wrong number of ranks: \[\]"),
    (ShardingType.GRID_SHARD, [0, 1, 2], 2, "grid_shard: 3 ranks do not divide into 2 groups"),
    (ShardingType.COLUMN_WISE, list(range(7)), 1, "column_wise: 7 column blocks asked, the table "
                                                  "has 6 columns"),
], ids=["two ranks", "no rank", "odd grid", "too narrow"])
def test_impossible_layout_is_an_error(kind, ranks, columns, text):
    with pytest.raises(PlanError, match=text):
        build_table_plan(_table(), kind, ranks, columns=columns)


def _row_wise(**changes):
    return build_table_plan(_table(**changes), ShardingType.ROW_WISE, [0, 1])


def _moved(plan, **changes):
    """The plan with its last shard changed."""
    *kept, last = plan.shards
    return dataclasses.replace(plan, shards=(*kept, dataclasses.replace(last, **changes)))


@pytest.mark.parametrize(("tables", "world", "text"), [
    ((_row_wise(),), 4, "plan is for 2 ranks, this job runs 4; plan again for this world size"),
    ((), 2, "table 'user' is not in the plan"),
    ((_row_wise(), _row_wise(name="item")), 2, "plan names table 'item', which the model does"),
    ((_row_wise(), _row_wise()), 2, "plan names a table twice"),
    ((_moved(_row_wise(), row_end=9),), 2, "table 'user': shards do not tile 10 rows x 6 columns "
                                           "exactly once"),
    ((_moved(_row_wise(), row_start=4),), 2, "do not tile"),
    ((_moved(_row_wise(), col_end=5),), 2, "do not tile"),
    ((_moved(_row_wise(), row_end=11),), 2, r"shard Shard\(rank=1.* lies outside 10 x 6 on 2 "),
    ((_moved(_row_wise(), rank=2),), 2, "lies outside 10 x 6 on 2 ranks"),
    ((dataclasses.replace(_row_wise(), shards=()),), 2, "do not tile"),
    ((build_table_plan(_table(), ShardingType.DATA_PARALLEL, [0, 0]),), 2,
     "table 'user': data_parallel needs one whole copy on each of 2 ranks"),
], ids=["world", "missing", "unknown", "twice", "short", "overlap", "narrow", "long", "rank",
        "empty", "copies"])
def test_plan_that_does_not_fit_is_named(tables, world, text):
    with pytest.raises(PlanError, match=text):
        ShardingPlan(2, tables).check([_table()], world)


def test_tables_lie_only_on_ranks_that_they_allow():
    plan = ShardingPlan(3, (_row_wise(),))
    plan.check([_table(ranks=[0, 1])], 3)
    with pytest.raises(PlanError, match=re.escape(
            "table 'user': has shards on ranks [0], the job allows ranks [1, 2]; plan again, or "
            "change the table's ranks")):
        plan.check([_table(ranks=[1, 2])], 3)


def test_every_misfit_is_listed():
    with pytest.raises(PlanError) as caught:
        ShardingPlan(2, (_moved(_row_wise(), row_end=9),)).check([_table(), _table(name="b")], 3)
    assert len(str(caught.value).splitlines()) == 3


@pytest.mark.parametrize(("change", "text"), [
    (lambda data: "no", "plan is malformed|schema version None"),
    (lambda data: {**data, "version": 99}, "plan has schema version 99, this ShardLab reads 2"),
    (lambda data: {key: data[key] for key in ("version", "tables")}, "malformed: .*world_size"),
    (lambda data: {**data, "tables": [{**data["tables"][0], "sharding": "wavy"}]},
     "malformed: .*wavy"),
    (lambda data: {**data, "tables": [{**data["tables"][0],
                                       "shards": [{"rank": 0}]}]},
     "malformed: .*row_start"),
], ids=["text", "version", "missing", "sharding", "shard"])
def test_json_that_is_no_plan_is_refused(change, text):
    data = json.loads(ShardingPlan(2, (_row_wise(),)).to_json())
    with pytest.raises(PlanError, match=text):
        ShardingPlan.from_json(json.dumps(change(data)))


def test_text_that_is_no_json_is_refused():
    with pytest.raises(PlanError, match="plan is not JSON: "):
        ShardingPlan.from_json("{")


@pytest.mark.parametrize("place", ["plan", "table", "shard"])
def test_unknown_field_is_refused(place):
    data = json.loads(ShardingPlan(2, (_row_wise(),)).to_json())
    target = {"plan": data, "table": data["tables"][0], "shard": data["tables"][0]["shards"][0]}
    target[place]["colour"] = "red"
    with pytest.raises(PlanError, match="colour"):
        ShardingPlan.from_json(json.dumps(data))


def test_plan_knows_which_tables_are_replicated():
    shard = Shard(0, 0, 10, 0, 6)
    copies = TablePlan("user", ShardingType.DATA_PARALLEL, ExchangeKind.ROWS, (shard,))
    assert copies.replicated
    assert not _row_wise().replicated
    assert (shard.rows, shard.columns) == (10, 6)
