"""Plans compiled for ranks: all ranks must agree on who serves what, without running any."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shardlab.errors import PlanError
from shardlab.plan import ShardingPlan
from shardlab.sharded.layout import compile_layout
from shardlab.specs import EmbeddingBagConfig, ExchangeKind, ShardingType
from shardlab.table_plan import Shard, TablePlan
from tests.sharded_runs import EXCHANGES, table_plan


@st.composite
def _plans(draw):
    world = draw(st.integers(1, 6))
    tables = tuple(EmbeddingBagConfig(
        num_embeddings=draw(st.integers(1, 30)), embedding_dim=draw(st.integers(1, 12)),
        name=f"t{i}", feature_names=[f"t{i}_{k}" for k in range(draw(st.integers(1, 3)))])
        for i in range(draw(st.integers(1, 4))))
    plans = tuple(table_plan(table, draw(st.sampled_from(list(ShardingType))), world,
                             exchange=draw(st.sampled_from(EXCHANGES)),
                             first=draw(st.integers(0, world - 1))) for table in tables)
    return tables, ShardingPlan(world, plans)


def _layouts(tables, plan):
    return [compile_layout(tables, plan, rank) for rank in range(plan.world_size)]


@settings(max_examples=60)
@given(case=_plans())
def test_asker_and_owner_list_the_same_slots(case):
    """What a rank sends to an owner, slot by slot, is what that owner reads as its own."""
    layouts = _layouts(*case)
    for asker in layouts:
        assert asker.peers[-1] == asker.rank
        assert sorted(asker.peers) == list(range(asker.world_size))
        for owner in layouts:
            sent = asker.slots_of(owner.rank)
            own = owner.slots_of(owner.rank)
            assert [dataclasses.replace(slot, read=True) for slot in sent] == \
                [dataclasses.replace(slot, read=True) for slot in own]
            assert [owner.local_shards[slot.block].shard for slot in sent] == \
                [slot.shard for slot in sent]


@settings(max_examples=60)
@given(case=_plans())
def test_slots_that_are_read_cover_every_cell_of_every_feature_once(case):
    tables, plan = case
    for layout in _layouts(tables, plan):
        for number, table in enumerate(tables):
            pooled = layout.kinds[number] is ExchangeKind.POOLED
            readers = layout.features_of(number) if pooled else [-1]
            for feature in readers:
                covered = torch.zeros(table.num_embeddings, table.embedding_dim)
                for slot in layout.slots:
                    if (slot.table, slot.feature, slot.read) == (number, feature, True):
                        group = layout.groups[slot.group]
                        covered[group.row_start:group.row_end,
                                slot.shard.col_start:slot.shard.col_end] += 1
                assert bool((covered == 1).all())


def test_outputs_lie_side_by_side_in_the_order_of_the_tables():
    tables = tuple(EmbeddingBagConfig(num_embeddings=9, embedding_dim=dim, name=name,
                                      feature_names=features)
                   for name, dim, features in (("b", 3, ("z", "a")), ("a", 5, ("m",))))
    plan = ShardingPlan(1, tuple(table_plan(table, ShardingType.TABLE_WISE, 1)
                                 for table in tables))
    layout = compile_layout(tables, plan, 0)
    assert (layout.features, layout.feature_table) == (("z", "a", "m"), (0, 0, 1))
    assert (layout.feature_columns, layout.total_columns) == ((0, 3, 6), 11)


@pytest.mark.parametrize(("rows", "width"), [
    (2, 1), (512, 1), (514, 2), (2 ** 17, 2), (2 ** 17 + 2, 3), (2 ** 25, 3), (2 ** 32, 4),
    (2 ** 33 + 2, 5)], ids=str)
def test_ids_take_the_bytes_that_their_shard_needs(rows, width):
    """Ids count from a shard's first row."""
    table = EmbeddingBagConfig(num_embeddings=rows, embedding_dim=4, name="t")
    plan = ShardingPlan(2, (table_plan(table, ShardingType.ROW_WISE, 2),))
    layout = compile_layout((table,), plan, 0)
    assert {slot.id_bytes for slot in layout.slots} == {width}
    assert max(slot.shard.rows for slot in layout.slots) <= 256 ** width


@pytest.mark.parametrize(("kind", "world", "found"), [
    (ShardingType.ROW_WISE, 1, ExchangeKind.POOLED), (ShardingType.ROW_WISE, 2, ExchangeKind.ROWS),
    (ShardingType.DATA_PARALLEL, 2, ExchangeKind.ROWS)], ids=str)
def test_exchange_left_open_is_settled_here(kind, world, found):
    table = EmbeddingBagConfig(num_embeddings=8, embedding_dim=4, name="t")
    plan = ShardingPlan(world, (table_plan(table, kind, world, exchange=ExchangeKind.AUTO),))
    assert compile_layout((table,), plan, 0).kinds == (found,)


def test_row_blocks_with_other_column_cuts_are_refused():
    table = EmbeddingBagConfig(num_embeddings=4, embedding_dim=4, name="t")
    shards = (Shard(0, 0, 2, 0, 4), Shard(0, 2, 4, 0, 1), Shard(1, 2, 4, 1, 4))
    plan = ShardingPlan(2, (TablePlan("t", ShardingType.GRID_SHARD, ExchangeKind.ROWS, shards),))
    with pytest.raises(PlanError, match="table 't': every row block must be cut at the same"):
        compile_layout((table,), plan, 0)
