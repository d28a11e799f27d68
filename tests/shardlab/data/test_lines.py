"""Lines by index: every start, over blocks and files, and files that are no text."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from shardlab.data import lines as lines_module
from shardlab.data.lines import LineFiles
from shardlab.errors import DataError


def write(folder: Path, *contents: bytes) -> list[str]:
    paths = [folder / f"part{i}" for i in range(len(contents))]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    return [str(path) for path in paths]


def texts(files: LineFiles, first: int, last: int) -> list[bytes]:
    with closing(files.open()) as cursor:
        return [part.text(i) for part in cursor.read(first, last) for i in range(len(part.ends))]


@pytest.fixture
def tiny_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks shorter than most lines, and an index entry for every other one."""
    monkeypatch.setattr(lines_module, "BLOCK_BYTES", 5)
    monkeypatch.setattr(lines_module, "_INDEX_STRIDE", 2)


@pytest.mark.usefixtures("tiny_blocks")
@pytest.mark.parametrize("padding", [0, 16], ids=lambda p: f"padding={p}")
def test_every_range_over_blocks_and_files(tmp_path: Path, padding: int) -> None:
    paths = write(tmp_path, b"one\ntwo two two two\n\nfour\n", b"", b"five\r\nsix", b"\n",
                  b"eight\r\n")
    expected = [b"one", b"two two two two", b"", b"four", b"five", b"six", b"", b"eight"]
    files = LineFiles(paths, padding)
    assert files.num_lines() == len(expected)
    for first in range(len(expected) + 1):
        for last in range(first, len(expected) + 1):
            assert texts(files, first, last) == expected[first:last]


@pytest.mark.usefixtures("tiny_blocks")
def test_cursor_goes_on_with_gaps(tmp_path: Path) -> None:
    content = b"".join(b"line %d\n" % i for i in range(50))
    with closing(LineFiles(write(tmp_path, content, content), 16).open()) as cursor:
        for first in range(3, 96, 7):
            parts = cursor.read(first, first + 4)
            assert [part.text(i) for part in parts for i in range(len(part.ends))] == \
                [b"line %d" % (i % 50) for i in range(first, first + 4)]
            assert parts[0].first_line == first % 50 + 1


def test_padding_is_zero(tmp_path: Path) -> None:
    with closing(LineFiles(write(tmp_path, b"ab\ncd\n"), 16).open()) as cursor:
        (part,) = cursor.read(1, 2)
    assert part.data.tolist() == [0] * 16 + [*b"cd\n"] + [0] * 16
    assert np.array_equal(part.starts, [16])
    assert np.array_equal(part.ends, [18])


def test_refuses_an_endless_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines_module, "BLOCK_BYTES", 64)
    monkeypatch.setattr(lines_module, "MAX_LINE_BYTES", 100)
    files = LineFiles(write(tmp_path, b"short\n" + b"\0" * 1000))
    with pytest.raises(DataError, match="part0, line 2: longer than 100 bytes; is this a text"):
        texts(files, 0, 2)


def test_refuses_a_file_that_shrank(tmp_path: Path) -> None:
    paths = write(tmp_path, b"one\ntwo\nthree\n")
    files = LineFiles(paths)
    assert files.num_lines() == 3
    write(tmp_path, b"one\n")
    with pytest.raises(DataError, match="part0: ends after 1 lines, 3 were counted before"):
        texts(files, 0, 3)


def test_refuses_a_file_that_vanished(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="gone: cannot be read: No such file"):
        LineFiles([str(tmp_path / "gone")]).num_lines()
