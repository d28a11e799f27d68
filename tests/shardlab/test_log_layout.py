"""Shapes of logs: room for every row and to clean, memory in proportion, limits in words."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardlab.errors import ConfigError
from shardlab.log_layout import log_layout
from shardlab.pages import MAX_RECORD_BYTES, PAGE_BYTES, unit_layout

ROWS = st.one_of(st.integers(1, 300), st.integers(1, 50_000_000))
RECORDS = st.one_of(st.integers(1, 600), st.integers(1, MAX_RECORD_BYTES - 4))


@given(rows=ROWS, record=RECORDS)
def test_partitions_hold_all_rows_and_leave_some_free(rows, record):
    try:
        layout = log_layout(rows, record)
    except ConfigError:
        assert rows * 5 // 4 + 2**20 > 2**31 or record * rows > 2**31
        return
    assert (layout.partitions - 1) * layout.partition_rows < rows
    assert rows <= layout.partitions * layout.partition_rows
    room = layout.partition_segments * layout.segment_rows
    # Even when everything but the fullest segments is live, one that is not can be cleaned.
    assert room - layout.partition_rows >= 4 * layout.segment_rows
    unit = unit_layout(layout.record_bytes)
    assert layout.segment_rows % unit.records == 0
    assert layout.segment_rows // unit.records * unit.pages <= 16
    assert layout.file_bytes % PAGE_BYTES == 0


def test_large_shard_costs_a_quarter_more_on_disk_and_little_memory():
    layout = log_layout(8_000_000, 260)
    assert layout.file_bytes < 1.28 * 8_000_000 * 4096 / 15
    assert layout.memory_bytes < 8_000_000 * 4 + 0.005 * 8_000_000 * 264


@pytest.mark.parametrize(("rows", "record", "text"), [
    (10, 0, "a row on disk has 1 to 65,404 bytes with its optimiser state, asked for 0"),
    (10, 65_405, "a row on disk has 1 to 65,404 bytes .* cut the table by columns"),
    (2_000_000_000, 20, r"at most 2,147,483,647 places for rows, 2,000,000,000 rows need .*; cut "
                        "the table into more shards by rows"),
], ids=["empty", "long", "many"])
def test_sizes_beyond_a_log_are_refused(rows, record, text):
    with pytest.raises(ConfigError, match=text):
        log_layout(rows, record)
