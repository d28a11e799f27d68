"""What went wrong on a disk, in words: table, file, page, rows, the system's reason, what to do."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass

from shardlab.errors import ConfigError
from shardlab.pages import file_bytes, rows_of_page

_RESTART = "delete the file and restart from the last checkpoint"
_SALTS = 2**64
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class FileSpec:
    """What a record file holds.

    Attributes:
        table: name of the table, for messages.
        rows: records.
        record_bytes: of every record.
        salt: goes into every checksum, so that a page of another file is refused; give each shard
            of a job another one. 0 <= salt < 2^64.
        checksums: whether pages carry and check them.
        in_order: rows lie in order and are first written so. Else (a log) ``rows`` are places,
            whole pages of them are first written in any order, and messages call them places.

    Raises:
        ConfigError: a size that no file can have, or a salt out of range.
    """

    table: str
    rows: int
    record_bytes: int
    salt: int
    checksums: bool = True
    in_order: bool = True

    def __post_init__(self) -> None:
        file_bytes(self.rows, self.record_bytes)  # refuses sizes that no file can have
        if not 0 <= self.salt < _SALTS:
            raise ConfigError(f"table {self.table!r}: a file's salt is 0 to {_SALTS - 1}, found "
                              f"{self.salt}")


@dataclass(frozen=True)
class Failure:
    """A failure as the disk reports it.

    Attributes:
        kind: io, short, checksum, unwritten, row or lost_write.
        file: the file's number on its disk.
        write: whether a write failed.
        first: the first page; for ``row`` the row.
        count: pages; for ``row`` how many rows have been written so far.
        error: errno, for ``io``.
    """

    kind: str
    file: int
    write: bool
    first: int
    count: int
    error: int


def system_reason(error: int | None) -> str:
    """The system's words for an errno, and what a user can do about it."""
    error = error or 0
    if error in _NO_SPACE:
        advice = ("free space, raise the quota or the limit of file sizes, or put the SSD tier "
                  "elsewhere")
    elif error == errno.EIO:
        advice = "the disk or the way to it is failing; the kernel's log (dmesg) says more"
    else:
        advice = "check the disk and the file's permissions"
    return f"{os.strerror(error)} (errno {error}): {advice}"


def describe_failure(failure: Failure, path: str, spec: FileSpec) -> str:
    """The message of a `StorageError` for a failure on this file (all kinds but lost_write)."""
    where = f"table {spec.table!r}, file {path}"
    if failure.kind == "row":
        return f"{where}: {_row_problem(failure, spec)}"
    last = failure.first + failure.count - 1
    rows = range(rows_of_page(failure.first, spec.rows, spec.record_bytes).start,
                 rows_of_page(last, spec.rows, spec.record_bytes).stop)
    pages = f"page {last}" if failure.count == 1 else f"pages {failure.first} to {last}"
    noun = "rows" if spec.in_order else "places"
    place = f"{where}: {pages} ({noun} {rows.start} to {rows.stop - 1})"
    if failure.kind == "io":
        verb = "write" if failure.write else "read"
        return (f"{place}: {verb} failed: {system_reason(failure.error)}; then restart from the "
                "last checkpoint")
    if failure.kind == "short":
        found = os.stat(path).st_size if os.path.exists(path) else 0
        return (f"{place}: the file ends before this page, at {found:,} bytes: something truncated "
                f"or deleted it; {_RESTART}")
    if failure.kind == "unwritten":
        return (f"{place}: the page has no checksum: it was never written, or something zeroed it; "
                f"{_RESTART}")
    return (f"{place}: the page does not match its checksum: it is damaged or belongs to another "
            f"file, and was not used; check the disk, {_RESTART}")


def _row_problem(failure: Failure, spec: FileSpec) -> str:
    row, written = failure.first, failure.count
    verb = "write to" if failure.write else "read of"
    if not 0 <= row < spec.rows:
        return f"{verb} row {row}, the file has rows 0 to {spec.rows - 1}"
    return (f"{verb} row {row}, but only the first {written} of {spec.rows} rows have been given; "
            "fill the file with ranges in ascending order first")
