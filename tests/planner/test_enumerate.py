"""Options are exactly what `build_table_plan` would lay out."""

from __future__ import annotations

import hypothesis
import hypothesis.strategies as st
import pytest

from shardlab.plan import build_table_plan
from shardlab.planner.enumerate import MAX_COPIED_BYTES, enumerate_options, table_cuts
from shardlab.planner.topology import read_topology
from shardlab.planner.workload import build_workload
from shardlab.specs import EmbeddingBagConfig, ExchangeKind, ShardingType

KINDS = [None, *ShardingType]


@hypothesis.given(rows=st.integers(1, 100), columns=st.integers(1, 70),
                  kind=st.sampled_from(KINDS),
                  machine=st.sampled_from(["cpu", "3xcpu", "4x2xcpu", "2x8xh100", "5x1xh100"]))
@hypothesis.settings(max_examples=150)
def test_pieces_are_the_shards_of_the_plan(rows: int, columns: int, kind: ShardingType | None,
                                           machine: str) -> None:
    table = EmbeddingBagConfig(rows, columns, "t", sharding=kind)
    topology = read_topology(machine)
    options = enumerate_options([table], topology, build_workload([table], topology.world_size, 8))
    assert len(options.cuts) == len(set(options.cuts))
    for option, cut in enumerate(options.cuts):
        pieces = options.pieces(option)
        ranks = list(range(pieces.stop - pieces.start))
        plan = build_table_plan(table, cut.sharding, ranks, columns=cut.col_parts)
        assert [(s.rows, s.columns) for s in plan.shards] == \
            list(zip(options.rows[pieces].tolist(), options.columns[pieces].tolist(), strict=True))
        assert len(ranks) <= topology.world_size
        if kind is not None:
            assert cut.sharding is kind
        if cut.group:
            assert len(ranks) % cut.group == 0
            assert cut.group <= topology.ranks_per_host


def test_cuts_on_one_rank() -> None:
    table = EmbeddingBagConfig(10, 64, "t")
    assert [cut.sharding for cut in table_cuts(table, read_topology("cpu"))] == [
        ShardingType.TABLE_WISE]


def test_cuts_of_a_free_table() -> None:
    cuts = table_cuts(EmbeddingBagConfig(10**6, 64, "t"), read_topology("2x8xh100"))
    found = [(cut.sharding.value, cut.row_parts, cut.col_parts) for cut in cuts]
    assert found == [("table_wise", 1, 1),
                     *[("row_wise", parts, 1) for parts in (2, 3, 4, 5, 6, 7, 8, 16)],
                     *[("column_wise", 1, parts) for parts in (2, 4)]]


def test_column_blocks_are_equal_where_they_can_be() -> None:
    parts = [cut.col_parts for cut in table_cuts(EmbeddingBagConfig(10**6, 96, "t"),
                                                 read_topology("8xh100"))
             if cut.sharding is ShardingType.COLUMN_WISE]
    assert parts == [2, 3, 4, 6]


@pytest.mark.parametrize(("rows", "exchange", "copied"), [
    (MAX_COPIED_BYTES // 4, "auto", True), (MAX_COPIED_BYTES // 4 + 1, "auto", False),
    (10, "pooled", False), (10, "rows", True)])
def test_only_small_tables_are_copied(rows: int, exchange: str, copied: bool) -> None:
    table = EmbeddingBagConfig(rows, 1, "t", exchange=ExchangeKind(exchange))
    kinds = [cut.sharding for cut in table_cuts(table, read_topology("2xcpu"))]
    assert (ShardingType.DATA_PARALLEL in kinds) is copied


@pytest.mark.parametrize(("kind", "found"), [
    ("table_row_wise", [(8, 1, 8)]), ("table_column_wise", [(1, p, p) for p in (2, 4, 8)]),
    ("data_parallel", [(1, 1, 0)]), ("table_wise", [(1, 1, 0)])])
def test_asked_cuts(kind: str, found: list[tuple[int, int, int]]) -> None:
    table = EmbeddingBagConfig(1000, 64, "t", sharding=ShardingType(kind))
    cuts = table_cuts(table, read_topology("2x8xh100"))
    assert [(cut.row_parts, cut.col_parts, cut.group) for cut in cuts] == found


def test_grid_cuts_both_ways_where_it_can() -> None:
    table = EmbeddingBagConfig(1000, 64, "t", sharding=ShardingType.GRID_SHARD)
    cuts = table_cuts(table, read_topology("2x8xh100"))
    assert all(cut.row_parts > 1 and cut.col_parts > 1 for cut in cuts)
    assert {(cut.row_parts, cut.col_parts) for cut in cuts} >= {(8, 2), (4, 4), (2, 8)}


def resolved(table: EmbeddingBagConfig, machine: str, batch: int) -> dict[str, bool]:
    """Whether each option, named by type and parts, pools at the owner."""
    topology = read_topology(machine)
    options = enumerate_options([table], topology,
                                build_workload([table], topology.world_size, batch))
    return {f"{cut.sharding.value} {cut.row_parts * cut.col_parts}": bool(pooled)
            for cut, pooled in zip(options.cuts, options.pooled, strict=True)}


def test_auto_exchange_takes_fewer_bytes() -> None:
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
