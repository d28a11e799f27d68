"""Lines of text files by global line index, block by block."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from shardlab.errors import DataError

_NEWLINE = 10
_CARRIAGE_RETURN = 13
#: Bytes read at once: large against a line, small against the caches and memory.
BLOCK_BYTES = 1 << 20
#: A longer line means that the file is no text table.
MAX_LINE_BYTES = 1 << 20
#: Blocks between two entries of the index, which keeps a terabyte's index in a few MB.
_INDEX_STRIDE = 8


@dataclass(frozen=True)
class Lines:
    """Consecutive lines of one file.

    Attributes:
        data: bytes of the lines, line ends included, with ``padding`` zeros on both sides.
        starts: [n] where each line begins in ``data``.
        ends: [n] where each line's text ends.
        file: name of the file.
        first_line: number of the first line in its file, from 1.
    """

    data: NDArray[np.uint8]
    starts: NDArray[np.int64]
    ends: NDArray[np.int64]
    file: str
    first_line: int

    def text(self, index: int) -> bytes:
        """One line without its end."""
        return self.data[self.starts[index]:self.ends[index]].tobytes()


@dataclass
class _FileIndex:
    """Where some lines of a file begin: line lines[i] at byte offsets[i]."""

    num_lines: int = 0
    lines: list[int] = field(default_factory=lambda: [0])
    offsets: list[int] = field(default_factory=lambda: [0])


class LineFiles:
    """The lines of several files, one after the other, under one index from 0.

    Args:
        files: names, in order.
        padding: zeros that `Lines.data` carries on both sides.
    """

    def __init__(self, files: Sequence[str], padding: int = 0) -> None:
        self.files, self.padding = list(files), padding
        self._indices: list[_FileIndex] | None = None

    def indices(self) -> list[_FileIndex]:
        """Counts the lines of every file, in one pass that is made once.

        Raises:
            DataError: a file cannot be read.
        """
        if self._indices is None:
            self._indices = [_count_lines(file) for file in self.files]
        return self._indices

    def num_lines(self) -> int:
        """Lines of all files; a last line needs no line end."""
        return sum(index.num_lines for index in self.indices())

    def open(self) -> LineCursor:
        """A cursor; it enters the files near the first line that it is asked for."""
        return LineCursor(self)


class LineCursor:
    """Reads lines in ascending order, holding one block of one file.

    Args:
        source: the files.
    """

    def __init__(self, source: LineFiles) -> None:
        self._source = source
        self._file_number = -1  # before the first file
        self._file: BinaryIO | None = None
        self._file_start = 0  # global index of the open file's first line
        self._data = b""
        self._ends: NDArray[np.int64] = np.empty(0, np.int64)  # of the block's whole lines
        self._line = 0  # global index of the block's first line

    def read(self, first: int, last: int) -> list[Lines]:
        """Lines [first, last), one entry per block that they lie in.

        Raises:
            DataError: a file cannot be read, or holds an endless line.
        """
        found = []
        while first < last:
            while first >= self._line + len(self._ends):
                self._next_block(first)
            low = first - self._line
            high = min(last - self._line, len(self._ends))
            found.append(self._cut(low, high))
            first = self._line + high
        return found

    def close(self) -> None:
        """Closes the file that is open."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _cut(self, low: int, high: int) -> Lines:
        pad = self._source.padding
        begin = int(self._ends[low - 1]) + 1 if low else 0
        end = int(self._ends[high - 1]) + 1
        data = np.zeros(end - begin + 2 * pad, np.uint8)
        data[pad:len(data) - pad] = np.frombuffer(self._data, np.uint8, end - begin, begin)
        ends = self._ends[low:high] + (pad - begin)
        starts = np.concatenate(([pad], ends[:-1] + 1))
        ends -= (data[ends - 1] == _CARRIAGE_RETURN) & (ends > starts)
        return Lines(data, starts, ends, self._source.files[self._file_number],
                     self._line + low - self._file_start + 1)

    def _next_block(self, wanted: int) -> None:
        """Moves to the block behind this one, or straight to the file that holds ``wanted``."""
        index = self._source.indices()
        while self._file is None or \
                wanted >= self._file_start + index[self._file_number].num_lines:
            self._enter_next_file(wanted)
        assert self._file is not None
        name = self._source.files[self._file_number]
        held = len(self._ends)
        rest = self._data[int(self._ends[-1]) + 1:] if held else self._data
        self._line += held
        if len(rest) > MAX_LINE_BYTES:
            number = self._line - self._file_start + 1
            raise DataError(f"{name}, line {number}: longer than {MAX_LINE_BYTES} bytes; "
                            "is this a text file?")
        block = _read(self._file, name)
        if not block:
            if not rest:
                raise DataError(f"{name}: ends after {self._line - self._file_start} lines, "
                                f"{index[self._file_number].num_lines} were counted before; "
                                "has the file changed?")
            block = b"\n"  # a last line without an end
        self._data = rest + block
        self._ends = np.flatnonzero(np.frombuffer(self._data, np.uint8) == _NEWLINE)

    def _enter_next_file(self, wanted: int) -> None:
        self.close()
        index = self._source.indices()
        if self._file_number >= 0:
            self._file_start += index[self._file_number].num_lines
        self._file_number += 1
        name, entries = self._source.files[self._file_number], index[self._file_number]
        place = max(bisect_right(entries.lines, wanted - self._file_start) - 1, 0)
        try:
            self._file = open(name, "rb", buffering=0)  # noqa: SIM115 - closed in close()
            self._file.seek(entries.offsets[place])
        except OSError as error:
            raise DataError(f"{name}: cannot be read: {error.strerror}") from error
        self._data, self._ends = b"", np.empty(0, np.int64)
        self._line = self._file_start + entries.lines[place]


def _count_lines(name: str) -> _FileIndex:
    index, offset, blocks, last = _FileIndex(), 0, 0, b"\n"
    try:
        with open(name, "rb", buffering=0) as file:
            while block := _read(file, name):
                if blocks and blocks % _INDEX_STRIDE == 0 and (at := block.find(b"\n")) >= 0:
                    index.lines.append(index.num_lines + 1)
                    index.offsets.append(offset + at + 1)
                index.num_lines += block.count(b"\n")
                offset, blocks, last = offset + len(block), blocks + 1, block[-1:]
    except OSError as error:
        raise DataError(f"{name}: cannot be read: {error.strerror}") from error
    if last != b"\n":
        index.num_lines += 1
    return index


def _read(file: BinaryIO, name: str) -> bytes:
    try:
        return file.read(BLOCK_BYTES)
    except OSError as error:
        raise DataError(f"{name}: cannot be read at byte {file.tell()}: "
                        f"{os.strerror(error.errno or 0)}") from error
