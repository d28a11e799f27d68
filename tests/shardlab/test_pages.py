"""Record files' arithmetic, against counting one record after another."""

from __future__ import annotations

import pytest

from shardlab.errors import ConfigError
from shardlab.pages import (
    MAX_RECORD_BYTES,
    PAGE_BYTES,
    PAYLOAD_BYTES,
    file_bytes,
    num_pages,
    page_of_row,
    records_per_page,
    rows_of_page,
    unit_layout,
)

SIZES = [1, 2, 68, 1362, 1363, 2044, 2045, 4087, 4088, 4089, 8176, 8177, MAX_RECORD_BYTES]


@pytest.mark.parametrize("record_bytes", SIZES)
@pytest.mark.parametrize("rows", [0, 1, 2, 59, 60, 61, 1000])
def test_pages_match_packing_one_by_one(rows: int, record_bytes: int):
    pages, room, place = 1, 0, []
    for _ in range(rows):
        if record_bytes > PAYLOAD_BYTES:
            place.append(pages)
            pages += -(-record_bytes // PAYLOAD_BYTES)
        else:
            if room < record_bytes:
                pages, room = pages + 1, PAYLOAD_BYTES
            place.append(pages - 1)
            room -= record_bytes
    assert num_pages(rows, record_bytes) == pages
    assert file_bytes(rows, record_bytes) == pages * PAGE_BYTES
    assert [page_of_row(row, record_bytes) for row in range(rows)] == place


@pytest.mark.parametrize("record_bytes", SIZES)
def test_rows_of_page_inverts_page_of_row(record_bytes: int):
    rows = 137
    found = [row for page in range(1, num_pages(rows, record_bytes))
             for row in rows_of_page(page, rows, record_bytes)
             if page_of_row(row, record_bytes) == page]
    assert found == list(range(rows))


def test_rows_of_page_covers_all_pages_of_a_long_record():
    found = [rows_of_page(page, 2, 8177) for page in range(1, 7)]
    assert found == [range(1)] * 3 + [range(1, 2)] * 3


def test_records_per_page():
    assert [records_per_page(size) for size in (1, 68, 2044, 2045, 4088, 4089)] == \
        [4088, 60, 2, 1, 1, 0]
    assert unit_layout(MAX_RECORD_BYTES).pages == 16


@pytest.mark.parametrize("record_bytes", [0, -1, MAX_RECORD_BYTES + 1])
def test_impossible_records_are_refused(record_bytes: int):
    with pytest.raises(ConfigError, match="a record on disk has 1 to 65,408 bytes"):
        file_bytes(1, record_bytes)


def test_negative_rows_are_refused():
    with pytest.raises(ConfigError, match="no negative number of rows, asked for -1"):
        file_bytes(-1, 4)
