"""Parquet files with named columns: a label, dense numbers, and categorical columns.

Files are read row group by row group and, within one, a bounded number of rows at a time.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from shardlab.data.arrow_ids import (
    Bools,
    IdRule,
    is_categorical,
    is_number,
    is_string,
    read_bags,
    read_numbers,
)
from shardlab.data.files import expand_paths
from shardlab.data.rows import RowBlock, concat_blocks, empty_block
from shardlab.errors import DataError, nearest_name
from shardlab.presets import CRITEO_DENSE_NAMES

#: Rows decoded at once: enough to spread the cost of a column's dictionary, 5 MB for Criteo.
CHUNK_ROWS = 8_192
_BUFFER_BYTES = 1 << 16
_SHOWN_COLUMNS = 12


@dataclass(frozen=True)
class ParquetColumns:
    """Which column is what, and how it is read.

    Attributes:
        label: column of the label, 0 or 1.
        dense: columns of the dense features, in order; null and NaN read as 0.
        sparse: feature name -> column; a feature that is not listed has its own name's column.
        log_dense: dense values x become log(max(x, 0) + 1), as DLRM takes counts.
        hex_strings: strings are Criteo's 8 hexadecimal digits; others are bad rows.
        raw_integers: integer columns hold rows of the tables, and are not hashed.
    """

    label: str = "label"
    dense: tuple[str, ...] = ()
    sparse: Mapping[str, str] | None = None
    log_dense: bool = False
    hex_strings: bool = False
    raw_integers: bool = False

    def column_of(self, feature: str) -> str:
        """The column that a feature reads."""
        return (self.sparse or {}).get(feature, feature)


#: The layout of Criteo as Parquet: ``label``, ``I1``..``I13``, ``C1``..``C26``.
CRITEO_PARQUET = ParquetColumns(dense=CRITEO_DENSE_NAMES, log_dense=True, hex_strings=True)


@dataclass(frozen=True)
class _Piece:
    """One row group: its first row counted over all files, and counted in its own file."""

    file: str
    group: int
    first_row: int
    file_row: int


class ParquetSource:
    """Rows of Parquet files.

    Args:
        path: file, pattern, or several of them.
        features: feature name -> rows of its table.
        columns: which column is what.
        on_bad_row: "error" raises; "skip" leaves out and counts rows with a label that is not
            0 or 1, an infinite number, or a string that is not hexadecimal where it has to be.

    Raises:
        DataError: no such file, not a Parquet file, a missing column, or one of a wrong type.
    """

    def __init__(self, path: str | os.PathLike[str] | Sequence[str], features: Mapping[str, int],
                 columns: ParquetColumns, on_bad_row: str = "error") -> None:
        self.features, self.columns = tuple(features), columns
        self.num_dense = len(columns.dense)
        self.skip_bad_rows = on_bad_row == "skip"
        self._rules = [IdRule(rows, columns.hex_strings, columns.raw_integers)
                      for rows in features.values()]
        self.pieces: list[_Piece] = []
        self._num_rows = 0
        self._strings: dict[str, list[str]] = {}  # string columns of each file
        for file in expand_paths(path):
            self._add(file)

    def num_rows(self) -> int:
        """Rows of all files."""
        return self._num_rows

    def open(self) -> ParquetCursor:
        """A cursor; its first read may begin at any row."""
        return ParquetCursor(self)

    def open_file(self, file: str) -> pq.ParquetFile:
        """Opens a file for `chunks`.

        Raises:
            DataError: the file cannot be opened any more.
        """
        try:
            # Strings stay dictionary-encoded: each distinct one is then hashed once a chunk.
            # Without a buffer a whole row group's bytes are read at once.
            return pq.ParquetFile(file, read_dictionary=self._strings[file],
                                  buffer_size=_BUFFER_BYTES)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{file}: not a readable Parquet file: {_reason(error)}") from error

    def chunks(self, file: pq.ParquetFile, piece: _Piece, row: int) -> Iterator[_Chunk]:
        """Converts a row group, `CHUNK_ROWS` rows at a time, from the chunk with ``row`` on.

        Raises:
            DataError: the row group cannot be decoded.
        """
        first = piece.first_row
        try:
            for columns in file.iter_batches(CHUNK_ROWS, [piece.group], self._names(),
                                             use_threads=False):
                if first + len(columns) > row:
                    rows, faults = self._convert(columns)
                    yield _Chunk(piece, first, columns, rows, faults)
                first += len(columns)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{piece.file}, row group {piece.group}: cannot be read: "
                            f"{_reason(error)}") from error

    def _convert(self, chunk: pa.RecordBatch) -> tuple[RowBlock, dict[str, Bools]]:
        columns, faults = self.columns, {}
        labels = read_numbers(chunk.column(columns.label), missing=-1)
        wrong = (labels != 0) & (labels != 1)
        if wrong.any():
            faults[columns.label] = wrong
        dense = np.zeros((len(chunk), len(columns.dense)), np.float32)
        for i, name in enumerate(columns.dense):
            numbers = read_numbers(chunk.column(name), missing=0)
            infinite = np.isinf(numbers)
            if infinite.any():
                faults[name] = infinite
            dense[:, i] = np.log(np.maximum(numbers, 0) + 1) if columns.log_dense else numbers
        bags = []
        for feature, rule in zip(self.features, self._rules, strict=True):
            name = columns.column_of(feature)
            found, bad = read_bags(chunk.column(name), rule)
            bags.append(found)
            if bad is not None:
                faults[name] = bad
        return RowBlock(labels, dense, bags), faults

    def _names(self) -> list[str]:
        sparse = [self.columns.column_of(feature) for feature in self.features]
        return list(dict.fromkeys([self.columns.label, *self.columns.dense, *sparse]))

    def _add(self, file: str) -> None:
        self._strings[file] = []
        with self.open_file(file) as opened:
            schema, metadata = opened.schema_arrow, opened.metadata
        self._check(file, schema)
        self._strings[file] = [name for name in self._names()
                               if is_string(schema.field(name).type)]
        file_row = 0
        for group in range(metadata.num_row_groups):
            self.pieces.append(_Piece(file, group, self._num_rows, file_row))
            rows = metadata.row_group(group).num_rows
            self._num_rows, file_row = self._num_rows + rows, file_row + rows

    def _check(self, file: str, schema: pa.Schema) -> None:
        for name in self._names():
            if schema.get_field_index(name) < 0:
                shown = ", ".join(schema.names[:_SHOWN_COLUMNS])
                more = ", ..." if len(schema.names) > _SHOWN_COLUMNS else ""
                raise DataError(f"{file}: no column {name!r}{nearest_name(name, schema.names)}; "
                                f"it has {len(schema.names)}: {shown}{more}")
        for name in (self.columns.label, *self.columns.dense):
            if not is_number(schema.field(name).type):
                raise DataError(f"{file}: column {name!r} must hold numbers, found "
                                f"{schema.field(name).type}")
        for feature in self.features:
            name = self.columns.column_of(feature)
            if not is_categorical(schema.field(name).type):
                raise DataError(f"{file}: column {name!r} of feature {feature!r} must hold "
                                "strings, integers or lists of them, found "
                                f"{schema.field(name).type}")


@dataclass(frozen=True)
class _Chunk:
    """Some rows of a row group, converted; a fault marks the rows whose column is bad."""

    piece: _Piece
    first_row: int  # counted over all files
    columns: pa.RecordBatch
    rows: RowBlock
    faults: dict[str, Bools]

    @property
    def end_row(self) -> int:
        return self.first_row + len(self.columns)


class ParquetCursor:
    """Reads rows of a `ParquetSource` in ascending order, holding one chunk of one row group."""

    def __init__(self, source: ParquetSource) -> None:
        self._source = source
        self._starts = [piece.first_row for piece in source.pieces]
        self._file: pq.ParquetFile | None = None
        self._chunks: Iterator[_Chunk] = iter(())
        self._chunk: _Chunk | None = None

    def read(self, first: int, last: int) -> RowBlock:
        """Rows [first, last), less the bad ones."""
        blocks = []
        while first < last:
            chunk = self._chunk_with(first)
            end = min(last, chunk.end_row)
            blocks.append(self._cut(chunk, first - chunk.first_row, end - chunk.first_row))
            first = end
        return concat_blocks(blocks) if blocks else \
            empty_block(self._source.num_dense, len(self._source.features))

    def close(self) -> None:
        """Closes the file that is open."""
        self._chunks, self._chunk = iter(()), None
        if self._file is not None:
            self._file.close()
            self._file = None

    def _chunk_with(self, row: int) -> _Chunk:
        while self._chunk is None or row >= self._chunk.end_row:
            piece = self._source.pieces[bisect_right(self._starts, row) - 1]
            if self._chunk is None or piece is not self._chunk.piece:
                if self._chunk is None or piece.file != self._chunk.piece.file:
                    self.close()
                self._file = self._file or self._source.open_file(piece.file)
                self._chunks = self._source.chunks(self._file, piece, row)
            self._chunk = next(self._chunks, None)
            if self._chunk is None:
                raise DataError(f"{piece.file}, row group {piece.group}: ends before row "
                                f"{row - piece.first_row}; has the file changed?")
        return self._chunk

    def _cut(self, chunk: _Chunk, low: int, high: int) -> RowBlock:
        rows = chunk.rows.slice(low, high)
        if not chunk.faults:
            return rows
        good = ~np.logical_or.reduce([bad[low:high] for bad in chunk.faults.values()])
        if not good.all() and not self._source.skip_bad_rows:
            raise DataError(_describe(chunk, low + int(np.argmin(good)), self._source.columns))
        return rows.keep(good)


def _describe(chunk: _Chunk, row: int, columns: ParquetColumns) -> str:
    """Text of the error for a bad row of a chunk."""
    name = next(name for name, bad in chunk.faults.items() if bad[row])
    wanted = "0 or 1" if name == columns.label else \
        "a finite number" if name in columns.dense else "8 hex digits"
    piece, of_group = chunk.piece, chunk.first_row + row - chunk.piece.first_row
    return (f"{piece.file}, row group {piece.group}, row {of_group} of it (row "
            f"{piece.file_row + of_group} of the file): column {name!r}: expected {wanted}, "
            f"found {chunk.columns.column(name)[row].as_py()!r}; correct the file, or set "
            "on_bad_row=skip to leave such rows out")


def _reason(error: Exception) -> str:
    return str(error).split("\n")[0] or type(error).__name__
