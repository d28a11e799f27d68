"""Options are what `build_table_plan` would lay out, each in every storage and exchange."""

from __future__ import annotations

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from shardlab.planner.enumerate import enumerate_options
from shardlab.planner.topology_file import read_topology
from shardlab.specs import EmbeddingBagConfig, ExchangeKind, ShardingType
from shardlab.storage_specs import PrunedSpec, Tier, describe_storage
from shardlab.table_plan import build_table_plan
from tests.planner.fleets import problem_for

KINDS = [None, *ShardingType]


@hypothesis.given(rows=st.integers(1, 100), columns=st.integers(1, 70),
                  kind=st.sampled_from(KINDS),
                  machine=st.sampled_from(["cpu", "3xcpu", "4x2xcpu", "2x8xh100", "5x1xh100"]))
@hypothesis.settings(max_examples=150)
def test_pieces_are_the_shards_of_the_plan(rows: int, columns: int, kind: ShardingType | None,
                                           machine: str) -> None:
    table = EmbeddingBagConfig(rows, columns, "t", sharding=kind, exchange="rows")
    topology = read_topology(machine)
    options = enumerate_options([table], topology)
    cuts = [options.cut(option) for option in range(len(options))]
    assert len(cuts) == len(set(cuts))
    for option, cut in enumerate(cuts):
        ranks = list(range(int(options.pieces[option])))
        plan = build_table_plan(table, cut.sharding, ranks, columns=cut.col_parts)
        assert len(plan.shards) == len(ranks) <= topology.world_size
        assert max(shard.rows for shard in plan.shards) == options.rows[option]
        assert max(shard.columns for shard in plan.shards) == options.columns[option]
        # The first piece of every column block is the one of the first rows.
        first = [shard.row_start for shard in plan.shards[::cut.row_parts]]
        assert set(first) == {0}
        if kind is not None:
            assert cut.sharding is kind
        if cut.group:
            assert len(ranks) % cut.group == 0
            assert cut.group <= topology.ranks_per_host


def test_every_cut_comes_in_every_storage_and_exchange() -> None:
    table = EmbeddingBagConfig(10**6, 16, "t", sharding="table_wise",
                               storage={"choose": ["fp32", "int8"]})
    options = enumerate_options([table], read_topology("8xh100"), (Tier.HBM, Tier.DDR))
    found = [(describe_storage(options.storage(option)), bool(options.pooled[option]),
              int(options.preference[option])) for option in range(len(options))]
    assert len(found) == len(set(found)) == 2 * 2 * 5
    assert {entry[:1] + entry[2:] for entry in found} == {
        (text.format(dtype), level) for level, dtype in enumerate(("fp32", "int8"))
        for text in ("{0} on hbm", "{0} on ddr", "{0} on ddr under {0} 0.01 on hbm",
                     "{0} on ddr under {0} 0.05 on hbm", "{0} on ddr under {0} 0.2 on hbm")}


def test_budgets_in_bytes_hold_for_parts() -> None:
    table = EmbeddingBagConfig(1000, 16, "t", storage={
        "kind": "pruned", "budget": {"bytes": 6400}, "chunks": 4})
    options = enumerate_options([table], read_topology("2xcpu"))
    specs = {options.storage(option) for option in range(len(options))}
    assert specs == {PrunedSpec(ratio=0.1, chunks=4, width=4, tier=Tier.HBM)}


def test_take_keeps_tables_apart() -> None:
    tables = [EmbeddingBagConfig(1000, 64, f"t{i}") for i in range(3)]
    options = enumerate_options(tables, read_topology("2xcpu"))
    some = options.take(np.flatnonzero(options.row_parts == 1))
    assert [list(np.unique(some.table[list(some.of_table(i))])) for i in range(3)] == [[0], [1],
                                                                                     [2]]
    assert (some.row_parts == 1).all()


def resolved(table: EmbeddingBagConfig, machine: str, batch: int) -> dict[str, bool]:
    """Whether each option on hbm, named by type and parts, pools at the owner."""
    problem = problem_for([table], read_topology(machine), batch)
    options = problem.options
    return {f"{cut.sharding.value} {cut.row_parts * cut.col_parts}": bool(options.pooled[option])
            for option in range(len(options)) for cut in [options.cut(option)]
            if describe_storage(options.storage(option)) == "fp32 on hbm"}


def test_auto_exchange_takes_less_work() -> None:
    # One id a bag: unique rows can only be fewer than bags.
    assert not any(resolved(EmbeddingBagConfig(10**6, 32, "t"), "4xcpu", 512).values())
    # Long bags of ids that hardly repeat: bags are fewer; not so when every row block answers all.
    long = resolved(EmbeddingBagConfig(10**8, 64, "t", pooling_factor=20.0), "16xh100", 512)
    assert long["table_wise 1"]
    assert long["column_wise 4"]
    assert not long["row_wise 16"]


def test_auto_exchange_on_one_rank_pools() -> None:
    assert resolved(EmbeddingBagConfig(10, 4, "t"), "cpu", 512) == {"table_wise 1": True}


@pytest.mark.parametrize("kind", ["rows", "pooled"])
def test_asked_exchange_is_kept(kind: str) -> None:
    table = EmbeddingBagConfig(10**5, 32, "t", exchange=ExchangeKind(kind), pooling_factor=9.0)
    assert set(resolved(table, "4xcpu", 64).values()) == {kind == "pooled"}


def test_copies_always_send_rows() -> None:
    table = EmbeddingBagConfig(10, 4, "t", sharding=ShardingType.DATA_PARALLEL,
                               exchange=ExchangeKind.POOLED, pooling_factor=50.0)
    assert resolved(table, "2xcpu", 64) == {"data_parallel 1": False}
