"""``hot_rows: auto`` relieves the busiest rank, and nobody where none is busier."""

from __future__ import annotations

import pytest

from shardlab.launch.hot_balance import HotCounts, relieving_rows
from shardlab.plan import ShardingPlan
from shardlab.specs import EmbeddingBagConfig, ExchangeKind, ShardingType
from shardlab.table_plan import WireDtypes, build_table_plan

ROWS = 800


def _plan(world, names="t", **wire):
    plan = ShardingPlan(world, tuple(build_table_plan(
        EmbeddingBagConfig(ROWS, 16, name), ShardingType.ROW_WISE, range(world),
        exchange=ExchangeKind.ROWS) for name in names))
    return plan.with_wire(WireDtypes(**wire))


def _counts(rows, ids=1000):
    return HotCounts(1000, sum(ids for _ in rows), tuple((row, ids) for row in rows))


def test_a_busy_rank_is_relieved_down_to_the_next():
    counts = {"t": _counts([*range(20), 200, 201, 400, 401, 600, 601])}
    assert relieving_rows(counts, _plan(4), 100) == {"t": [*range(19, 1, -1)]}


def test_rows_that_few_batches_hold_stay_where_they_are():
    assert relieving_rows({"t": _counts(range(20), ids=1)}, _plan(4), 100) == {"t": []}
    # 10 % of the batches hold them: copies pay from 20 ranks on.
    assert relieving_rows({"t": _counts(range(20), ids=1)}, _plan(32), 100) != {"t": []}


@pytest.mark.parametrize("rows", [range(0, ROWS, 4), []], ids=["even", "none"])
def test_even_ranks_get_no_copies(rows):
    assert relieving_rows({"t": _counts(rows)}, _plan(4), 100) == {"t": []}


def test_tables_that_level_each_other_get_no_copies():
    counts = {"a": _counts(range(20)), "b": _counts(range(200, 220)),
              "c": _counts(range(400, 420)), "d": _counts(range(600, 620))}
    assert not any(relieving_rows(counts, _plan(4, "abcd"), 100).values())


def test_narrow_codecs_make_rows_cheaper_than_their_copies():
    counts = {"t": _counts(range(20), ids=10)}
    assert relieving_rows(counts, _plan(4), 100) != {"t": []}
    assert relieving_rows(counts, _plan(4, forward="int8", backward="int8"), 100) == {"t": []}


def test_share_counts_ids():
    counts = HotCounts(1000, 1000, ((7, 100), (3, 70), (9, 69), (1, 5)))
    assert counts.share([7, 1]) == 0.105
