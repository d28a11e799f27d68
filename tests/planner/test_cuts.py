"""Every way to cut a table, as far as it allows."""

from __future__ import annotations

import pytest

from shardlab.planner.cuts import MAX_COPIED_BYTES, table_cuts
from shardlab.planner.topology_file import read_topology
from shardlab.specs import EmbeddingBagConfig, ExchangeKind, ShardingType


def test_cuts_on_one_rank() -> None:
    table = EmbeddingBagConfig(10, 64, "t")
    assert [cut.sharding for cut in table_cuts(table, read_topology("cpu"))] == [
        ShardingType.TABLE_WISE]


def test_cuts_of_a_free_table() -> None:
    cuts = table_cuts(EmbeddingBagConfig(10**6, 64, "t"), read_topology("8xh100"))
    found = [(cut.sharding.value, cut.row_parts, cut.col_parts) for cut in cuts]
    assert found == [("table_wise", 1, 1),
                     *[("row_wise", parts, 1) for parts in (2, 3, 4, 5, 6, 7, 8)],
                     *[("column_wise", 1, parts) for parts in (2, 4)]]


def test_grids_where_columns_do_not_reach_every_rank() -> None:
    cuts = table_cuts(EmbeddingBagConfig(10**6, 64, "t"), read_topology("2x8xh100"))
    grids = [(cut.row_parts, cut.col_parts, cut.group) for cut in cuts
             if cut.sharding is ShardingType.GRID_SHARD]
    assert grids == [(2, 4, 2), (3, 4, 3), (4, 4, 4)]


def test_column_blocks_are_equal_where_they_can_be() -> None:
    parts = [cut.col_parts for cut in table_cuts(EmbeddingBagConfig(10**6, 96, "t"),
                                                 read_topology("8xh100"))
             if cut.sharding is ShardingType.COLUMN_WISE]
    assert parts == [2, 3, 4, 6]


def test_blocks_of_int4_have_an_even_width() -> None:
    table = EmbeddingBagConfig(1000, 18, "t", sharding="column_wise", storage="int4")
    assert [cut.col_parts for cut in table_cuts(table, read_topology("16xh100"))] == [3, 9]


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


def test_several_types_are_all_tried_and_no_others() -> None:
    table = EmbeddingBagConfig(1000, 64, "t", sharding=("table_wise", "column_wise"))
    cuts = table_cuts(table, read_topology("4xh100"))
    assert [(cut.sharding.value, cut.col_parts) for cut in cuts] == [
        ("table_wise", 1), ("column_wise", 2), ("column_wise", 4)]


def test_column_splits_are_limited() -> None:
    topology = read_topology("8xh100")
    free = table_cuts(EmbeddingBagConfig(1000, 128, "t", max_column_splits=2), topology)
    assert max(cut.col_parts for cut in free) == 2
    none = table_cuts(EmbeddingBagConfig(1000, 128, "t", max_column_splits=1,
                                         sharding="column_wise"), topology)
    assert [cut.col_parts for cut in none] == [1]


def test_blocks_are_no_more_than_the_ranks_allowed() -> None:
    table = EmbeddingBagConfig(1000, 128, "t", ranks=(0, 3, 5))
    cuts = table_cuts(table, read_topology("8xh100"))
    assert max(cut.row_parts * cut.col_parts for cut in cuts) == 3
    assert ShardingType.DATA_PARALLEL not in [cut.sharding for cut in cuts]
