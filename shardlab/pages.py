"""Bytes of a record file: fixed-size records packed into pages. Plain arithmetic, no torch.

    file    [ header page | unit 0 | unit 1 | ... ]
    page    [ payload, 4088 B | trailer, 8 B: checksum over payload, page number and file salt ]

Records never straddle a page: a page holds as many whole records as fit its payload. A record that
is longer than a payload takes whole pages of its own and fills their payloads one after another.
The smallest span that holds whole records is a unit: one page of records, or the pages of one
record. Source: own.
"""

from __future__ import annotations

from dataclasses import dataclass

from shardlab.errors import ConfigError

#: What direct I/O is aligned to on every disk in use, and the unit that file systems allocate.
PAGE_BYTES = 4096
TRAILER_BYTES = 8
PAYLOAD_BYTES = PAGE_BYTES - TRAILER_BYTES
HEADER_PAGES = 1

#: A record is read and written in one request, and requests have buffers of this many pages.
MAX_RECORD_PAGES = 16
MAX_RECORD_BYTES = MAX_RECORD_PAGES * PAYLOAD_BYTES


@dataclass(frozen=True)
class UnitLayout:
    """The smallest span of a file that holds whole records; one of the two numbers is 1.

    Attributes:
        records: records in a unit.
        pages: pages of a unit.
    """

    records: int
    pages: int


def unit_layout(record_bytes: int) -> UnitLayout:
    """How records of this size lie in pages.

    Raises:
        ConfigError: no bytes, or more than `MAX_RECORD_BYTES`.
    """
    if not 1 <= record_bytes <= MAX_RECORD_BYTES:
        raise ConfigError(f"a record on disk has 1 to {MAX_RECORD_BYTES:,} bytes, asked for "
                          f"{record_bytes:,}; cut the table by columns")
    if record_bytes > PAYLOAD_BYTES:
        return UnitLayout(1, -(-record_bytes // PAYLOAD_BYTES))
    return UnitLayout(PAYLOAD_BYTES // record_bytes, 1)


def records_per_page(record_bytes: int) -> int:
    """Whole records in a page; 0 for a record that takes several pages."""
    layout = unit_layout(record_bytes)
    return layout.records if layout.pages == 1 else 0


def num_pages(rows: int, record_bytes: int) -> int:
    """Pages of a file with this many records, its header included."""
    if rows < 0:
        raise ConfigError(f"a record file has no negative number of rows, asked for {rows}")
    layout = unit_layout(record_bytes)
    return HEADER_PAGES + -(-rows // layout.records) * layout.pages


def file_bytes(rows: int, record_bytes: int) -> int:
    """Bytes of a file with this many records, all allocated when it is created."""
    return num_pages(rows, record_bytes) * PAGE_BYTES


def page_of_row(row: int, record_bytes: int) -> int:
    """The first page of this row's record."""
    layout = unit_layout(record_bytes)
    return HEADER_PAGES + row // layout.records * layout.pages


def rows_of_page(page: int, rows: int, record_bytes: int) -> range:
    """The rows whose records lie, in part or whole, on this page of a file of ``rows`` records."""
    layout = unit_layout(record_bytes)
    first = (page - HEADER_PAGES) // layout.pages * layout.records
    return range(first, min(first + layout.records, rows))
