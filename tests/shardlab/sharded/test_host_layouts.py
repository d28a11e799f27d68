"""Plans seen in two stages: what a rank is asked inside its host is what it asks across hosts."""

from __future__ import annotations

import dataclasses

from hypothesis import given, settings
from hypothesis import strategies as st

from shardlab.comm import Groups, Stages
from shardlab.plan import ShardingPlan
from shardlab.sharded.host_layouts import across_layout, inside_layout
from shardlab.sharded.layout import compile_layout
from shardlab.specs import EmbeddingBagConfig, ExchangeKind, ShardingType
from tests.sharded_runs import table_plan


def _stages(rank, hosts, size):
    host, place = divmod(rank, size)
    none = Groups()
    return Stages(host, hosts, place, size, none, none, none, none, none, none, None, "")


@settings(max_examples=40)
@given(hosts=st.integers(2, 4), size=st.integers(2, 4), data=st.data())
def test_both_stages_list_the_same_slots(hosts, size, data):
    tables = tuple(EmbeddingBagConfig(rows, 4, f"t{i}") for i, rows in enumerate((3, 40)))
    plan = ShardingPlan(hosts * size, tuple(table_plan(
        table, data.draw(st.sampled_from(list(ShardingType))), hosts * size,
        exchange=data.draw(st.sampled_from(list(ExchangeKind)[:2]))) for table in tables))
    whole = [compile_layout(tables, plan, rank) for rank in range(hosts * size)]
    inside = [inside_layout(layout, _stages(layout.rank, hosts, size)) for layout in whole]
    across = [across_layout(layout, _stages(layout.rank, hosts, size)) for layout in whole]
    for rank, layout in enumerate(whole):
        host, place = divmod(rank, size)
        assert [slot.shard for slot in inside[rank].slots_of(place)] == \
            [slot.shard for slot in across[rank].slots]
        assert [slot.shard for slot in across[rank].slots_of(host)] == \
            [slot.shard for slot in layout.slots_of(rank)]
        assert sorted(slot.shard.rank for slot in inside[rank].slots) == \
            sorted(slot.shard.rank for slot in layout.slots)
        for mate in range(host * size, host * size + size):
            theirs = inside[mate].slots_of(place)
            assert [dataclasses.replace(slot, read=True) for slot in theirs] == \
                [dataclasses.replace(slot, read=True) for slot in inside[rank].slots_of(place)]
        for peer in range(place, hosts * size, size):
            assert [slot.shard for slot in across[peer].slots_of(host)] == \
                [slot.shard for slot in across[rank].slots_of(host)]
