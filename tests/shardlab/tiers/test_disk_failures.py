"""Damaged, truncated and failing files: an error that says so, and never a wrong record."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from shardlab.errors import ConfigError, StorageError
from shardlab.pages import PAGE_BYTES
from shardlab.tiers import Disk, FileSpec, RecordFile, RecordRequest
from tests.shardlab.tiers.disk_cases import ENGINES, filled_file, random_records, read

NATIVE = ENGINES[:-1]
PER_PAGE = 60  # records of 68 B


@pytest.fixture(params=ENGINES)
def disk(request: pytest.FixtureRequest) -> Iterator[Disk]:
    with Disk(request.param, queue_depth=8) as opened:
        yield opened


def patch(path: str, offset: int, data: bytes) -> None:
    """Writes behind the disk's back."""
    with open(path, "r+b", buffering=0) as handle:
        handle.seek(offset)
        handle.write(data)
        os.fsync(handle.fileno())


def page_of(path: str, page: int) -> bytes:
    with open(path, "rb") as handle:
        handle.seek(page * PAGE_BYTES)
        return handle.read(PAGE_BYTES)


@pytest.mark.parametrize("offset", [0, 68, 4079, 4080, 4087, 4088, 4095],
                         ids="byte {}".format)
def test_flipped_bit_is_found(disk: Disk, tmp_path: Path, offset: int):
    file, records = filled_file(disk, tmp_path / "f", 1000)
    patch(file.path, 3 * PAGE_BYTES + offset, bytes([page_of(file.path, 3)[offset] ^ 16]))
    text = (rf"table 'user', file {file.path}: page 3 \(rows 120 to 179\): the page does not match "
            "its checksum: .*damaged or belongs to another file, and was not used; check the disk")
    for rows in (range(1000), torch.tensor([130]), torch.tensor([179, 5, 120])):
        with pytest.raises(StorageError, match=text):
            read(file, rows)
    rest = torch.cat([torch.arange(120), torch.arange(180, 1000)])
    assert torch.equal(read(file, rest), records[rest]), "the other pages are as they were"


def test_pages_from_elsewhere_are_refused(disk: Disk, tmp_path: Path):
    file, records = filled_file(disk, tmp_path / "f", 1000, salt=1)
    other, _ = filled_file(disk, tmp_path / "other", 1000, salt=2)
    right = page_of(file.path, 4)
    for stranger in (page_of(file.path, 5), page_of(other.path, 4)):
        patch(file.path, 4 * PAGE_BYTES, stranger)
        with pytest.raises(StorageError, match=r"page 4 .* belongs to another file"):
            read(file, range(200))
    patch(file.path, 4 * PAGE_BYTES, right)
    assert torch.equal(read(file, range(1000)), records)


def test_zeroed_page_is_refused(disk: Disk, tmp_path: Path):
    file, _ = filled_file(disk, tmp_path / "f", 1000)
    patch(file.path, 2 * PAGE_BYTES, bytes(PAGE_BYTES))
    with pytest.raises(StorageError, match=r"page 2 \(rows 60 to 119\): the page has no checksum"):
        read(file, range(1000))


@pytest.mark.parametrize("size", [7 * PAGE_BYTES + 100, 7 * PAGE_BYTES, PAGE_BYTES, 0])
def test_truncated_file_is_found(disk: Disk, tmp_path: Path, size: int):
    file, records = filled_file(disk, tmp_path / "f", 1000)
    os.truncate(file.path, size)
    page = max(size // PAGE_BYTES, 1)
    text = rf"page \d+ \(rows .*\): the file ends before this page, at {size:,} bytes: something"
    for rows in (range(1000), torch.tensor([(page - 1) * PER_PAGE]), torch.tensor([999])):
        with pytest.raises(StorageError, match=text):
            read(file, rows)
    whole = range((page - 1) * PER_PAGE)
    assert torch.equal(read(file, whole), records[:len(whole)])


def test_truncation_is_found_without_checksums(disk: Disk, tmp_path: Path):
    file, _ = filled_file(disk, tmp_path / "f", 1000, checksums=False)
    os.truncate(file.path, 5 * PAGE_BYTES)
    with pytest.raises(StorageError, match="the file ends before this page"):
        read(file, range(1000))


def test_damaged_page_is_not_patched(disk: Disk, tmp_path: Path):
    file, _ = filled_file(disk, tmp_path / "f", 1000)
    patch(file.path, 3 * PAGE_BYTES, b"damage")
    with pytest.raises(StorageError, match=r"page 3 .* does not match its checksum"):
        file.write_records(torch.tensor([121]), random_records(1, 68))
    assert page_of(file.path, 3).startswith(b"damage")


def test_damaged_page_can_be_written_whole(disk: Disk, tmp_path: Path):
    file, records = filled_file(disk, tmp_path / "f", 1000)
    patch(file.path, 3 * PAGE_BYTES, b"damage")
    file.write_records(range(120, 180), records[120:180])
    assert torch.equal(read(file, range(1000)), records)


@pytest.mark.parametrize("number", [errno.EIO, errno.ENODEV])
def test_failed_read_says_what_and_where(disk: Disk, tmp_path: Path, number: int):
    file, records = filled_file(disk, tmp_path / "f", 1000)
    disk.inject_fault(write=False, result=-number)
    text = rf"table 'user', file {file.path}: .*1.* read failed: {os.strerror(number)} .errno"
    with pytest.raises(StorageError, match=text):
        read(file, torch.tensor([3]))
    assert torch.equal(read(file, range(1000)), records), "a read that failed harms nothing"


@pytest.mark.parametrize(("number", "advice"), [
    (errno.ENOSPC, "free space, raise the quota"), (errno.EIO, "dmesg"),
    (errno.EPERM, "check the disk")])
def test_failed_write_says_what_and_shuts_the_file(disk: Disk, tmp_path: Path, number: int,
                                                   advice: str):
    file, records = filled_file(disk, tmp_path / "f", 1000)
    healthy, _ = filled_file(disk, tmp_path / "g", 10, table="healthy")
    disk.inject_fault(write=True, result=-number)
    text = (rf"page 1 \(rows 0 to 59\): write failed: {os.strerror(number)} .errno {number}.: "
            f".*{advice}")
    with pytest.raises(StorageError, match=text):
        file.write_records(range(3, 5), records[3:5])
    refused = f"refused, because an earlier write failed and rows may be lost: .*{text}"
    with pytest.raises(StorageError, match=refused):
        read(file, torch.tensor([999]))
    with pytest.raises(StorageError, match=refused):
        file.write_records(range(3, 5), records[3:5])
    with pytest.raises(StorageError, match=refused):
        file.sync()
    read(healthy, range(10))


def test_failed_write_shuts_all_files_of_its_submission(disk: Disk, tmp_path: Path):
    files = [filled_file(disk, tmp_path / name, 100, table=name)[0] for name in ("a", "b", "c")]
    disk.inject_fault(write=True, result=-errno.EIO)
    disk.start_write([RecordRequest(file, range(100), random_records(100, 68))
                      for file in files[:2]])
    disk.drain()  # nobody waits for the ticket
    for file in files[:2]:
        text = f"table '{file.spec.table}'.*: refused, because .* table '[ab]'"
        with pytest.raises(StorageError, match=text):
            read(file, range(1))
    read(files[2], range(100))


def test_reads_queued_behind_a_failing_write_fail(disk: Disk, tmp_path: Path):
    file, records = filled_file(disk, tmp_path / "f", 6000)
    disk.inject_fault(write=True, result=-errno.EIO, skip=2)
    write = disk.start_write([RecordRequest(file, range(6000), records)])
    out = torch.empty(6000, 68, dtype=torch.uint8)
    with pytest.raises(StorageError, match="an earlier write failed"):  # at the start, or later
        disk.start_read([RecordRequest(file, range(6000), out)]).wait()
    with pytest.raises(StorageError, match="write failed"):
        write.wait()


def test_failed_refresh_keeps_the_marks(disk: Disk, tmp_path: Path):
    file, records = filled_file(disk, tmp_path / "f", 100)
    out = torch.empty(100, 68, dtype=torch.uint8)
    ticket = disk.start_read([RecordRequest(file, range(100), out)])
    ticket.wait()
    records[4:6] = random_records(2, 68)
    file.write_records(range(4, 6), records[4:6])
    disk.inject_fault(write=False, result=-errno.EIO)
    with pytest.raises(StorageError, match="read failed"):
        ticket.refresh()
    assert ticket.refresh() == 2
    assert torch.equal(out, records)


@pytest.mark.parametrize("engine", NATIVE)
@pytest.mark.parametrize("result", [-errno.EINTR, -errno.EAGAIN, PAGE_BYTES, 2 * PAGE_BYTES])
@pytest.mark.parametrize("write", [False, True])
def test_interrupted_requests_go_on(tmp_path: Path, engine: str, result: int, write: bool):
    with Disk(engine) as disk:
        file, records = filled_file(disk, tmp_path / "f", 600)
        disk.inject_fault(write=write, result=result)
        records[:400] = random_records(400, 68)
        before = disk.counters()
        file.write_records(range(400), records[:400])
        assert torch.equal(read(file, range(600)), records)
        after = disk.counters()
        assert (after.reads - before.reads, after.writes - before.writes) == \
            ((2, 2) if write else (3, 1)), "a request was asked again"


def test_impossible_specs_are_refused():
    with pytest.raises(ConfigError, match=r"table 'user': a file's salt is 0 to .*, found -1"):
        FileSpec("user", 10, 68, -1)
    with pytest.raises(ConfigError, match="1 to 65,408 bytes, asked for 65,409; cut the table"):
        FileSpec("user", 10, 65409, 1)


def test_failures_outlive_their_file(disk: Disk, tmp_path: Path):
    file = RecordFile.create(disk, tmp_path / "f", FileSpec("user", 100, 68, 1))
    disk.inject_fault(write=True, result=-errno.EIO)
    ticket = None
    try:
        ticket = disk.start_write([RecordRequest(file, range(100), random_records(100, 68))])
    finally:
        file.close()
    with pytest.raises(StorageError, match=r"page.*\(rows 0 to .*\): write failed"):
        ticket.wait()
