"""The raw Criteo click log: label, 13 integers, 26 hexadecimal strings, tab separated.

An empty field is a missing value. Fields are found and parsed for all lines of a block at once.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from shardlab.data.digits import HEX_DIGITS, MAX_DECIMAL_DIGITS, PADDING, parse_decimal, parse_hex
from shardlab.data.files import expand_paths
from shardlab.data.hashing import MISSING_ID, rows_of, splitmix64, unaligned_words
from shardlab.data.lines import LineCursor, LineFiles, Lines
from shardlab.data.rows import Bags, RowBlock, concat_blocks, empty_block
from shardlab.errors import DataError, nearest_name
from shardlab.presets import CRITEO_DENSE_NAMES, CRITEO_SPARSE_NAMES

_COLUMNS = ("label", *CRITEO_DENSE_NAMES, *CRITEO_SPARSE_NAMES)
_FIRST_DENSE = 1
_FIRST_SPARSE = _FIRST_DENSE + len(CRITEO_DENSE_NAMES)
_TAB = 9
_SHOWN_CHARACTERS = 24


class CriteoTsvSource:
    """Rows of raw Criteo files.

    A bad row (wrong number of fields, a label that is not 0 or 1, a field that does not parse)
    keeps its place in the numbering of rows, so that every rank can skip it alone.

    Args:
        path: file, pattern, or several of them.
        features: feature name -> rows of its table.
        columns: feature name -> column C1..C26; absent: the column of its own name.
        on_bad_row: "error" raises, "skip" leaves the row out and counts it.

    Raises:
        DataError: no such file, or a feature whose column is not one of C1..C26.
    """

    num_dense = len(CRITEO_DENSE_NAMES)

    def __init__(self, path: str | os.PathLike[str] | Sequence[str], features: Mapping[str, int],
                 columns: Mapping[str, str] | None = None, on_bad_row: str = "error") -> None:
        self.features = tuple(features)
        self._rows = list(features.values())
        self._fields = [_field_of(name, (columns or {}).get(name, name)) for name in features]
        self._skip = on_bad_row == "skip"
        self._lines = LineFiles(expand_paths(path), PADDING)

    def num_rows(self) -> int:
        """Lines of all files."""
        return self._lines.num_lines()

    def open(self) -> CriteoTsvCursor:
        """A cursor; its first read may begin at any row."""
        return CriteoTsvCursor(self, self._lines.open())

    def parse(self, lines: Lines) -> RowBlock:
        """Turns lines into rows.

        Raises:
            DataError: a bad row, unless they are to be skipped; names file, line and field.
        """
        starts, ends, whole = _split(lines)
        labels, good = _parse_labels(lines.data, starts[0], ends[0])
        dense = slice(_FIRST_DENSE, _FIRST_SPARSE)
        counts, valid = parse_decimal(lines.data, starts[dense], ends[dense])
        good &= valid.all(axis=0)
        sparse = slice(_FIRST_SPARSE, None)
        hashes, missing, valid = _parse_sparse(lines.data, starts[sparse], ends[sparse])
        good &= valid.all(axis=0)
        kept = np.zeros(len(whole), np.bool_)
        kept[whole] = good
        if not self._skip and not kept.all():
            bad = int(np.argmin(kept))
            raise DataError(f"{lines.file}, line {lines.first_line + bad}: "
                            f"{describe_bad_line(lines.text(bad))}; correct the line, or set "
                            "on_bad_row=skip to leave such rows out")
        bags = []
        for field, rows in zip(self._fields, self._rows, strict=True):
            ids = rows_of(hashes[field], rows)
            ids[missing[field]] = MISSING_ID
            bags.append(Bags(ids))
        block = RowBlock(labels, log_counts(counts), bags, int((~whole).sum()))
        return block.keep(good)


class CriteoTsvCursor:
    """Reads rows of a `CriteoTsvSource` in ascending order."""

    def __init__(self, source: CriteoTsvSource, lines: LineCursor) -> None:
        self._source, self._lines = source, lines

    def read(self, first: int, last: int) -> RowBlock:
        """Rows [first, last), less the bad ones."""
        blocks = [self._source.parse(lines) for lines in self._lines.read(first, last)]
        return concat_blocks(blocks) if blocks else \
            empty_block(self._source.num_dense, len(self._source.features))

    def close(self) -> None:
        """Closes the file that is open."""
        self._lines.close()


def log_counts(counts: NDArray[np.int64]) -> NDArray[np.float32]:
    """log(x + 1), as DLRM takes the counts; below 0 reads as 0, and so does a missing one.

    Args:
        counts: [num_dense, n].

    Returns:
        [n, num_dense] float32, contiguous.
    """
    shifted = np.maximum(counts, 0).astype(np.float32)
    shifted += 1
    return np.ascontiguousarray(np.log(shifted).T)


def describe_bad_line(line: bytes) -> str:
    """Why a line is bad, in words; checks field by field, so it is for the one line to report."""
    fields = line.split(b"\t")
    if len(fields) != len(_COLUMNS):
        return (f"expected {len(_COLUMNS)} tab-separated fields, found {len(fields)} in "
                f"{_shown(line)}")
    if fields[0] not in (b"0", b"1"):
        return f"label: expected 0 or 1, found {_shown(fields[0])}"
    for name, value in zip(_COLUMNS[_FIRST_DENSE:], fields[_FIRST_DENSE:], strict=True):
        if name in CRITEO_DENSE_NAMES:
            digits = value.removeprefix(b"-")
            if value and not (digits.isdigit() and len(digits) <= MAX_DECIMAL_DIGITS):
                return (f"{name}: expected an integer of at most {MAX_DECIMAL_DIGITS} digits or "
                        f"nothing, found {_shown(value)}")
        elif value and (len(value) != HEX_DIGITS or
                        value.strip(b"0123456789abcdefABCDEF")):
            return f"{name}: expected {HEX_DIGITS} hex digits or nothing, found {_shown(value)}"
    raise AssertionError(f"no fault found in {line!r}")


def _shown(value: bytes) -> str:
    text = value[:_SHOWN_CHARACTERS].decode("ascii", "backslashreplace")
    return repr(text) + ("..." if len(value) > _SHOWN_CHARACTERS else "")


def _field_of(feature: str, column: str) -> int:
    if column not in CRITEO_SPARSE_NAMES:
        raise DataError(f"feature {feature!r} asks for column {column!r}; raw Criteo files have "
                        f"C1 to C26{nearest_name(column, list(CRITEO_SPARSE_NAMES))}")
    return CRITEO_SPARSE_NAMES.index(column)


def _split(lines: Lines) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
    """Finds the fields: [40, n] starts and ends of the whole lines, [lines] which are whole."""
    tabs = np.flatnonzero(lines.data == _TAB)
    behind = np.searchsorted(tabs, lines.ends)
    found = np.diff(behind, prepend=0)
    whole = found == len(_COLUMNS) - 1
    line_starts, line_ends = lines.starts, lines.ends
    if not whole.all():
        tabs = tabs[np.repeat(whole, found)]
        line_starts, line_ends = line_starts[whole], line_ends[whole]
    tabs = tabs.reshape(len(line_starts), len(_COLUMNS) - 1).T
    starts = np.empty((len(_COLUMNS), len(line_starts)), np.int64)
    ends = np.empty_like(starts)
    starts[0], ends[-1] = line_starts, line_ends
    ends[:-1] = tabs
    np.add(tabs, 1, out=starts[1:])
    return starts, ends, whole


def _parse_labels(data: NDArray[np.uint8], starts: NDArray[np.int64],
                  ends: NDArray[np.int64]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    labels = data[starts] - np.uint8(ord("0"))  # other characters wrap around to above 1
    return labels.astype(np.float32), (labels <= 1) & (ends - starts == 1)


def _parse_sparse(data: NDArray[np.uint8], starts: NDArray[np.int64], ends: NDArray[np.int64],
                  ) -> tuple[NDArray[np.uint64], NDArray[np.bool_], NDArray[np.bool_]]:
    """Hashes of [26, n] fields, which are missing, and which are sound."""
    values, valid = parse_hex(unaligned_words(data)[starts])
    sizes = ends - starts
    missing = sizes == 0
    valid &= sizes == HEX_DIGITS
    valid |= missing
    return splitmix64(values), missing, valid
