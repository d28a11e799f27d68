"""A record file's life: allocation, header, lock, sync, and what is refused by name."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from shardlab.errors import StorageError
from shardlab.pages import PAGE_BYTES, file_bytes
from shardlab.tiers import Disk, FileSpec, RecordFile, RecordRequest
from tests.shardlab.tiers.disk_cases import SIZES, filled_file, random_records, read

SPEC = FileSpec("user", 300, 68, 7)


@pytest.fixture
def disk() -> Iterator[Disk]:
    with Disk(queue_depth=8) as opened:
        yield opened


@pytest.mark.parametrize("record_bytes", SIZES)
@pytest.mark.parametrize("rows", [0, 1, 1000])
def test_all_bytes_are_allocated_at_once(disk: Disk, tmp_path: Path, rows: int, record_bytes: int):
    file = RecordFile.create(disk, tmp_path / "f", FileSpec("user", rows, record_bytes, 7))
    found = os.stat(file.path)
    assert file.allocated_bytes() == found.st_blocks * 512 == found.st_size
    assert found.st_size == file_bytes(rows, record_bytes)
    file.write_records(range(rows), random_records(rows, record_bytes))
    file.sync()
    assert file.allocated_bytes() == os.stat(file.path).st_size == file_bytes(rows, record_bytes)


def test_synced_file_opens_again(tmp_path: Path):
    for engine in ("auto", "reference"):
        with Disk(engine) as disk:
            file, records = filled_file(disk, tmp_path / engine, 300)
            file.sync()
        for reader in ("auto", "reference"):
            with Disk(reader) as disk:
                file = RecordFile.open(disk, tmp_path / engine, SPEC)
                assert file.rows_written == 300
                assert torch.equal(read(file, range(300)), records)
                records[5] = 0
                file.write_records(range(5, 6), records[5:6])
                file.sync()


def test_rows_after_the_last_sync_are_not_there(disk: Disk, tmp_path: Path):
    file = RecordFile.create(disk, tmp_path / "f", SPEC)
    records = random_records(300, 68)
    file.write_records(range(100), records[:100])
    file.sync()
    file.write_records(range(100, 300), records[100:])
    file.close()
    file = RecordFile.open(disk, tmp_path / "f", SPEC)
    with pytest.raises(StorageError, match="read of row 100, but only the first 100 of 300 rows"):
        read(file, range(101))
    assert torch.equal(read(file, range(100)), records[:100])


@pytest.mark.parametrize(("spec", "text"), [
    (FileSpec("item", 300, 68, 7), r"table 'user' \(expected 'item'\)"),
    (FileSpec("user", 301, 68, 7), r"rows 300 \(expected 301\)"),
    (FileSpec("user", 300, 64, 7), r"record_bytes 68 \(expected 64\)"),
    (FileSpec("user", 300, 68, 8), r"salt 7 \(expected 8\)"),
    (FileSpec("user", 300, 68, 7, checksums=False), r"checksums True \(expected False\)"),
])
def test_other_contents_are_refused(disk: Disk, tmp_path: Path, spec: FileSpec, text: str):
    RecordFile.create(disk, tmp_path / "f", SPEC).close()
    with pytest.raises(StorageError, match=f"holds something else: {text}; give the right file"):
        RecordFile.open(disk, tmp_path / "f", spec)


def test_damaged_truncated_and_foreign_files_are_refused(disk: Disk, tmp_path: Path):
    path = tmp_path / "f"
    RecordFile.create(disk, path, SPEC).close()
    os.truncate(path, 3 * PAGE_BYTES)
    with pytest.raises(StorageError, match="has 12,288 bytes, expected 24,576: it was truncated"):
        RecordFile.open(disk, path, SPEC)
    with open(path, "r+b") as handle:
        handle.write(b"[")
    with pytest.raises(StorageError, match="is no record file, or its first page is damaged"):
        RecordFile.open(disk, path, SPEC)
    path.write_text("notes")
    for attempt in (lambda: RecordFile.open(disk, path, SPEC),
                    lambda: RecordFile.create(disk, path, SPEC, replace=True)):
        with pytest.raises(StorageError, match="is no record file"):
            attempt()
    assert path.read_text() == "notes"


def test_missing_places_are_refused(disk: Disk, tmp_path: Path):
    with pytest.raises(StorageError, match=r"table 'user', file .*: cannot open: No such file"):
        RecordFile.open(disk, tmp_path / "f", SPEC)
    with pytest.raises(StorageError, match="cannot open: No such file"):
        RecordFile.create(disk, tmp_path / "folder" / "f", SPEC)
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="cannot open: Not a directory"):
        RecordFile.create(disk, tmp_path / "file" / "f", SPEC)


def test_file_that_is_there_or_in_use_is_kept(disk: Disk, tmp_path: Path):
    file, records = filled_file(disk, tmp_path / "f", 300)
    with pytest.raises(StorageError, match="cannot open: File exists"):
        RecordFile.create(disk, tmp_path / "f", SPEC)
    for attempt in (lambda: RecordFile.open(disk, tmp_path / "f", SPEC),
                    lambda: RecordFile.create(disk, tmp_path / "f", SPEC, replace=True)):
        with pytest.raises(StorageError, match=r"in use by another job or rank .*file of its own"):
            attempt()
    assert torch.equal(read(file, range(300)), records)
    file.close()
    RecordFile.create(disk, tmp_path / "f", SPEC, replace=True).unlink()
    assert not (tmp_path / "f").exists()


def test_full_disk_is_found_at_the_start(disk: Disk, tmp_path: Path):
    free = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
    rows = 2 * free // PAGE_BYTES
    with pytest.raises(StorageError, match=r"[\d,]+ bytes asked for, [\d,]+ free: No space left .*"
                                           "free space, raise the quota"):
        RecordFile.create(disk, tmp_path / "f", FileSpec("user", rows, 4088, 7))
    assert not list(tmp_path.iterdir())


def test_limit_of_file_sizes_is_found_at_the_start(disk: Disk, tmp_path: Path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(StorageError, match=r"4,096,000 bytes asked for, .*: File too large"):
            RecordFile.create(disk, tmp_path / "f", FileSpec("user", 999, 4088, 7))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


def test_file_system_without_direct_io(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    real = fcntl.fcntl

    def refuse(fd: int, command: int, value: int = 0) -> int:
        if command == fcntl.F_SETFL and value & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(fd, command, value)

    monkeypatch.setattr(fcntl, "fcntl", refuse)
    with Disk("auto") as disk:
        file, records = filled_file(disk, tmp_path / "f", 300)
        assert not file.direct
        assert "through the page cache" in file.describe()
        assert torch.equal(read(file, range(300)), records)
    with Disk("auto", direct=True) as disk:
        if not disk.describe().startswith("reference"):
            with pytest.raises(StorageError, match="direct I/O asked for, the file system refuses"):
                RecordFile.create(disk, tmp_path / "g", SPEC)
            assert not (tmp_path / "g").exists()


def test_failed_sync_says_so(disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file, _ = filled_file(disk, tmp_path / "f", 300)

    def fail(fd: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fdatasync", fail)
    with pytest.raises(StorageError, match=r"sync failed: Input/output error .*dmesg"):
        file.sync()


def test_close_is_final_and_may_come_twice(disk: Disk, tmp_path: Path):
    with RecordFile.create(disk, tmp_path / "f", SPEC) as file:
        number = file.number
    file.close()
    assert number not in disk.files
    with pytest.raises(StorageError, match=r"table 'user', file .* is closed"):
        read(file, range(1))
    file.unlink()
    file.unlink()


def test_files_of_another_disk_are_refused(disk: Disk, tmp_path: Path):
    with Disk("reference") as other, RecordFile.create(other, tmp_path / "f", SPEC) as file, \
            RecordFile.create(disk, tmp_path / "g", SPEC) as mine:
        records = torch.zeros(1, SPEC.record_bytes, dtype=torch.uint8)
        with pytest.raises(StorageError, match=r"file .*/f is closed, or another disk's"):
            disk.write([RecordRequest(file, range(1), records)])
        assert mine.number == file.number
        assert mine.rows_written == 0


def test_long_table_names_are_refused(disk: Disk, tmp_path: Path):
    with pytest.raises(StorageError, match="the name is too long"):
        RecordFile.create(disk, tmp_path / "f", FileSpec("x" * 5000, 1, 68, 7))
    assert not list(tmp_path.iterdir())
