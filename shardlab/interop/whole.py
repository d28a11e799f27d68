"""Whole tables in files that are mapped into memory: any order of chunks in, rows out.

A checkpoint's chunks come in whatever rectangles its plan had. What wants whole rows, or rows in
order, lays them out in a file first; its pages are the file system's, not this process's.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shardlab.errors import CheckpointError
from shardlab.storage import TableChunk
from shardlab.train.checkpoint_reader import CheckpointReader
from shardlab.train.manifest import TableEntry

#: Rows of a table that are worked on at a time hold about this many bytes.
PIECE_BYTES = 8 << 20

Rows = NDArray[np.float32]


def new_table(path: Path, rows: int, columns: int) -> Rows:
    """An fp32 array [rows, columns] of zeros in a new file, mapped."""
    if rows * columns == 0:
        return np.zeros((rows, columns), np.float32)
    return np.memmap(path, np.float32, "w+", shape=(rows, columns))


def lay_out(reader: CheckpointReader, table: TableEntry, out: Rows) -> None:
    """Writes a table's weights into an array [rows, columns] of fp32.

    Raises:
        CheckpointError: a file is damaged.
    """
    for chunk in pieces(reader, table):
        part = chunk.weights.numpy()
        out[chunk.row_start:chunk.row_start + len(part),
            chunk.col_start:chunk.col_start + part.shape[1]] = part


def pieces(reader: CheckpointReader, table: TableEntry,
           rows: slice | None = None) -> Iterator[TableChunk]:
    """Chunks of a table whose rows are all there; absent ones as zeros."""
    step = max(1, PIECE_BYTES // (4 * table.columns))
    for chunk in reader.table_chunks(table, rows):
        yield from chunk.dense(step)


def row_pieces(table: Rows) -> Iterator[tuple[int, Rows]]:
    """(first row, rows) of a table, about `PIECE_BYTES` at a time."""
    step = max(1, PIECE_BYTES // (4 * max(1, table.shape[1])))
    for first in range(0, table.shape[0], step):
        yield first, table[first:first + step]


def chosen_tables(reader: CheckpointReader, names: tuple[str, ...]) -> list[TableEntry]:
    """The tables of these names; all of them where none is named.

    Raises:
        CheckpointError: unknown names, or two tables of one name.
    """
    chosen = [reader.table(name) for name in names] if names else list(reader.tables)
    if len({table.name for table in chosen}) < len(chosen):
        raise CheckpointError(f"{reader.path}: tables of different collections share a name; "
                              "name them one by one as collection/table")
    return chosen
