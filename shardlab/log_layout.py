"""How a shard's rows lie on disk as a log, and what its index costs: arithmetic without torch.

    file       [ header page | partition 0 | partition 1 | ... ]
    partition  [ segment 0 | segment 1 | ... ]       rows [p * partition_rows, (p + 1) * ...) only
    segment    whole units of records, written in one request and never changed
    record     [ payload | optimiser state | row of the shard, 4 B ]

Changed rows gather in memory until a segment of them is full; it is then written to a free place of
their partition. So a write costs a row its own bytes and not a page, and nothing is read for it.
What is left of older segments is written anew when space runs out; the spare segments decide how
often. Partitions keep rows that are near in the table near on disk: a checkpoint reads them in
order, one span after the other. Source: own; segments and their cleaning as in the log-structured
file system (Rosenblum and Ousterhout 1992).
"""

from __future__ import annotations

from dataclasses import dataclass

from shardlab.errors import ConfigError
from shardlab.pages import MAX_RECORD_BYTES, MAX_RECORD_PAGES, file_bytes, unit_layout

#: Of a record's row, behind it.
TAG_BYTES = 4
#: The largest request. Its write costs a row a twentieth of what a page of its own would.
_SEGMENT_PAGES = MAX_RECORD_PAGES
#: Smaller shards have shorter segments, so that cleaning has something to choose from.
_LEAST_SEGMENTS = 64
#: 32 MiB of rows in a partition: what memory must hold of it stays below 0.5 % of the rows.
_PARTITION_SEGMENTS = 512
#: A fifth of a file is free or stale.
_SPARE_SHARE = 4
#: Of rows that change evenly, those in the emptiest segments are 0.63 live when a fifth is stale
#: (u = (v - 1) / ln v): a row that is written makes 1.7 others move.
CLEANING = 2.7
_LEAST_SPARE = 4
#: Rows that are taken at a time; they may come on top of what waits in partitions.
_INTAKE_ROWS = 4096
_MAX_SLOTS = 2**31 - 1
#: In memory: of a row its place; of a waiting record its row, partition and place in the list of
#: free ones; of a segment its live rows, its age and its condition; of a partition four counts.
INDEX_BYTES, WAITING_BYTES, SEGMENT_BYTES, PARTITION_BYTES = 4, 20, 13, 32


@dataclass(frozen=True)
class LogLayout:
    """Shape of the log of one shard.

    Attributes:
        rows: of the shard.
        record_bytes: of a record on disk, its row included.
        segment_rows: records of a segment.
        partition_rows: rows of a partition; the last one may have fewer.
        partition_segments: segments of a partition, all of the same number.
        spare_segments: of these, beyond what the rows fill.
        partitions: how many there are.
        intake_rows: rows that are taken at a time.
    """

    rows: int
    record_bytes: int
    segment_rows: int
    partition_rows: int
    partition_segments: int
    spare_segments: int
    partitions: int
    intake_rows: int

    @property
    def segments(self) -> int:
        return self.partitions * self.partition_segments

    @property
    def slots(self) -> int:
        """Records that the file has room for."""
        return self.segments * self.segment_rows

    @property
    def file_bytes(self) -> int:
        return file_bytes(self.slots, self.record_bytes)

    @property
    def waiting_rows(self) -> int:
        """Room in memory for rows that wait: less than a segment of every partition, rows that
        came in, and those of a segment that is being cleaned."""
        return (self.partitions + 1) * self.segment_rows + self.intake_rows

    @property
    def memory_bytes(self) -> int:
        """Bytes of the index and of the rows that wait."""
        return (INDEX_BYTES * self.rows + SEGMENT_BYTES * self.segments
                + PARTITION_BYTES * self.partitions
                + self.waiting_rows * (self.record_bytes + WAITING_BYTES))


def log_layout(rows: int, record_bytes: int) -> LogLayout:
    """The log of ``rows`` records.

    Args:
        rows: at least 1.
        record_bytes: payload and optimiser state of a row.

    Raises:
        ConfigError: a record longer than the disk takes, or more rows than the index can number.
    """
    if not 1 <= record_bytes <= MAX_RECORD_BYTES - TAG_BYTES:
        raise ConfigError(
            f"a row on disk has 1 to {MAX_RECORD_BYTES - TAG_BYTES:,} bytes with its optimiser "
            f"state, asked for {record_bytes:,}; cut the table by columns")
    record = record_bytes + TAG_BYTES
    unit = unit_layout(record)
    most = max(1, _SEGMENT_PAGES // unit.pages)
    units = min(most, max(1, -(-rows // unit.records) // _LEAST_SEGMENTS))
    segment_rows = units * unit.records
    home = -(-rows // segment_rows)
    partitions = -(-home // _PARTITION_SEGMENTS)
    home = -(-home // partitions)
    spare = max(_LEAST_SPARE, -(-home // _SPARE_SHARE))
    layout = LogLayout(
        rows=rows, record_bytes=record, segment_rows=segment_rows,
        partition_rows=home * segment_rows,
        partition_segments=home + spare, spare_segments=spare,
        partitions=partitions, intake_rows=min(rows, _INTAKE_ROWS))
    if layout.slots > _MAX_SLOTS:
        raise ConfigError(f"a shard on disk has at most {_MAX_SLOTS:,} places for rows, {rows:,} "
                          f"rows need {layout.slots:,}; cut the table into more shards by rows")
    return layout
