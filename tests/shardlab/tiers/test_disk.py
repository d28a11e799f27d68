"""Reads and writes of records on every engine: shapes, orders, tickets and their rule."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from shardlab.errors import ConfigError, StorageError
from shardlab.tiers import Disk, FileSpec, RecordFile, RecordRequest
from tests.shardlab.tiers.disk_cases import (
    ENGINES,
    SIZES,
    as_index,
    filled_file,
    random_records,
    read,
)


@pytest.fixture(params=ENGINES)
def disk(request: pytest.FixtureRequest) -> Iterator[Disk]:
    with Disk(request.param, queue_depth=8) as opened:
        yield opened


@pytest.mark.parametrize("record_bytes", SIZES)
@pytest.mark.parametrize("checksums", [True, False])
def test_records_come_back(disk: Disk, tmp_path: Path, record_bytes: int, checksums: bool):
    file, records = filled_file(disk, tmp_path / "f", 301, record_bytes, checksums=checksums)
    assert torch.equal(read(file, range(301)), records)
    assert torch.equal(read(file, range(17, 250)), records[17:250])
    rows = torch.randint(0, 301, (500,))
    rows[:3] = torch.tensor([300, 0, 300])
    assert torch.equal(read(file, rows), records[rows])
    assert torch.equal(read(file, rows.sort().values), records[rows.sort().values])


@pytest.mark.parametrize("record_bytes", SIZES)
def test_written_rows_change_and_neighbours_stay(disk: Disk, tmp_path: Path, record_bytes: int):
    file, records = filled_file(disk, tmp_path / "f", 301, record_bytes)
    for rows in (torch.tensor([300]), torch.randperm(301)[:40], torch.arange(60, 180),
                 range(59, 62), range(5, 301), range(301)):
        fresh = random_records(len(rows), record_bytes)
        file.write_records(rows, fresh)
        records[as_index(rows)] = fresh
        assert torch.equal(read(file, range(301)), records)


def test_last_of_equal_rows_stays(disk: Disk, tmp_path: Path):
    file, records = filled_file(disk, tmp_path / "f", 100)
    rows = torch.tensor([7, 99, 7, 8, 7])
    fresh = random_records(5, 68)
    file.write_records(rows, fresh)
    records[7], records[8], records[99] = fresh[4], fresh[3], fresh[1]
    assert torch.equal(read(file, range(100)), records)


def test_empty_requests_and_files(disk: Disk, tmp_path: Path):
    file, _ = filled_file(disk, tmp_path / "f", 10)
    nothing = torch.empty(0, 68, dtype=torch.uint8)
    file.read_records(range(0), nothing)
    file.write_records(torch.empty(0, dtype=torch.int64), nothing)
    disk.start_read([]).wait()
    empty, _ = filled_file(disk, tmp_path / "empty", 0)
    assert empty.rows_written == 0
    assert empty.allocated_bytes() == 4096


def test_file_fills_range_by_range(disk: Disk, tmp_path: Path):
    file = RecordFile.create(disk, tmp_path / "f", FileSpec("user", 500, 68, 1))
    records = random_records(500, 68)
    for start, stop in ((0, 1), (1, 61), (61, 123), (100, 300), (300, 500)):
        file.write_records(range(start, stop), records[start:stop])
        assert file.rows_written == stop
        assert torch.equal(read(file, range(stop)), records[:stop])


def test_one_submission_over_several_files(disk: Disk, tmp_path: Path):
    files = [filled_file(disk, tmp_path / str(i), 200, size, salt=i)
             for i, size in enumerate((4, 68, 5000))]
    rows = [torch.randperm(200)[:50], range(3, 190), torch.tensor([199])]
    fresh = [random_records(len(r), f.spec.record_bytes)
             for r, (f, _) in zip(rows, files, strict=True)]
    write = disk.start_write([RecordRequest(f, r, new) for (f, _), r, new
                              in zip(files, rows, fresh, strict=True)])
    out = [torch.empty_like(records) for _, records in files]
    ticket = disk.start_read([RecordRequest(f, range(200), o)
                              for (f, _), o in zip(files, out, strict=True)])
    ticket.wait()
    assert write.done()
    write.wait()
    for (_, records), r, new, o in zip(files, rows, fresh, out, strict=True):
        records[as_index(r)] = new
        assert torch.equal(o, records)


def test_same_file_twice_in_one_submission(disk: Disk, tmp_path: Path):
    file = RecordFile.create(disk, tmp_path / "f", FileSpec("user", 90, 68, 1))
    records, again = random_records(90, 68), random_records(20, 68)
    disk.write([RecordRequest(file, range(33), records[:33]),
                RecordRequest(file, range(33, 90), records[33:]),
                RecordRequest(file, range(25, 45), again)])
    records[25:45] = again
    assert torch.equal(read(file, range(90)), records)


def test_neighbouring_pages_share_a_request(tmp_path: Path):
    for engine in ENGINES[:-1]:  # the reference asks page by page
        with Disk(engine) as disk:
            file, _ = filled_file(disk, tmp_path / engine, 60 * 40)
            before = disk.counters()
            read(file, torch.tensor([0, 61, 122, 60 * 8, 60 * 39]))  # pages 0 1 2, 8, 39
            after = disk.counters()
            assert after.reads - before.reads == 3
            assert after.read_bytes - before.read_bytes == 5 * 4096
            read(file, torch.tensor([0, 60 * 5]))  # four pages between cost less than a request
            assert disk.counters().read_bytes - after.read_bytes == 6 * 4096


def test_read_ticket_shows_what_was_written_before_it(disk: Disk, tmp_path: Path):
    file, records = filled_file(disk, tmp_path / "f", 3000)
    held = []
    for _ in range(12):
        rows = torch.randint(0, 3000, (400,))
        fresh = random_records(400, 68)
        held.append(disk.start_write([RecordRequest(file, rows, fresh)]))
        records[rows.flip(0)] = fresh.flip(0)
        records[rows] = torch.stack([fresh[(rows == row).nonzero()[-1, 0]] for row in rows])
        out = torch.empty(3000, 68, dtype=torch.uint8)
        held.append((disk.start_read([RecordRequest(file, range(3000), out)]), out,
                     records.clone()))
    for entry in held:
        if isinstance(entry, tuple):
            entry[0].wait()
            assert torch.equal(entry[1], entry[2])
        else:
            entry.wait()


@pytest.mark.parametrize("as_range", [True, False], ids=["range", "list"])
def test_later_writes_mark_records_stale(disk: Disk, tmp_path: Path, as_range: bool):
    file, records = filled_file(disk, tmp_path / "f", 500)
    other, _ = filled_file(disk, tmp_path / "other", 500)
    rows = range(100, 200) if as_range else torch.tensor([150, 499, 120, 150, 7])
    out = random_records(len(rows), 68)
    ticket = disk.start_read([RecordRequest(other, range(3), random_records(3, 68)),
                              RecordRequest(file, rows, out)])
    written = [torch.tensor([201, 150, 99]), range(118, 122), torch.arange(200, 499)]
    for changed in written:
        fresh = random_records(len(changed), 68)
        file.write_records(changed, fresh)
        records[as_index(changed)] = fresh
    touched = torch.cat([as_index(changed) for changed in written])
    expected = torch.isin(as_index(rows), touched)
    assert expected.any()
    marks = ticket.take_stale()
    assert not marks[0].any()
    assert torch.equal(marks[1], expected)
    assert not any(mark.any() for mark in ticket.take_stale()), "the marks were handed over"


def test_refresh_reads_stale_records_again(disk: Disk, tmp_path: Path):
    file, records = filled_file(disk, tmp_path / "f", 500)
    rows = torch.randint(0, 500, (300,))
    out = torch.empty(300, 68, dtype=torch.uint8)
    ticket = disk.start_read([RecordRequest(file, rows, out)])
    assert ticket.refresh() == 0
    assert torch.equal(out, records[rows])
    changed = torch.arange(0, 500, 3)
    fresh = random_records(len(changed), 68)
    disk.start_write([RecordRequest(file, changed, fresh)])
    records[changed] = fresh
    assert not torch.equal(out, records[rows])
    assert ticket.refresh() == int((rows % 3 == 0).sum())
    assert torch.equal(out, records[rows])
    assert ticket.refresh() == 0


def test_dropped_tickets_still_write(disk: Disk, tmp_path: Path):
    file, records = filled_file(disk, tmp_path / "f", 2000)
    for first in range(0, 2000, 100):
        fresh = random_records(100, 68)
        disk.start_write([RecordRequest(file, range(first, first + 100), fresh.clone())])
        records[first:first + 100] = fresh
    assert torch.equal(read(file, range(2000)), records)


@pytest.mark.parametrize(("write", "rows", "text"), [
    (False, torch.tensor([3, 100]), "read of row 100, the file has rows 0 to 99"),
    (False, torch.tensor([5, -1, 3]), "read of row -1, the file has rows 0 to 99"),
    (False, range(98, 102), "read of row 101, the file has rows 0 to 99"),
    (True, range(40, 102), "write to row 101, the file has rows 0 to 99"),
    (True, torch.tensor([100]), "write to row 100, the file has rows 0 to 99"),
    (False, range(40, 51), "read of row 50, but only the first 50 of 100 rows have been given"),
    (True, torch.tensor([50]), "write to row 50, but only the first 50 of 100 rows"),
    (True, range(51, 60), "write to row 51, but only the first 50 of 100 rows"),
])
def test_rows_that_are_not_there_are_refused(disk: Disk, tmp_path: Path, write: bool,
                                             rows: torch.Tensor | range, text: str):
    file = RecordFile.create(disk, tmp_path / "f", FileSpec("user", 100, 68, 1))
    records = random_records(50, 68)
    file.write_records(range(50), records)
    requests = [RecordRequest(file, range(50), records),
                RecordRequest(file, rows, torch.empty(len(rows), 68, dtype=torch.uint8))]
    with pytest.raises(StorageError, match=f"table 'user', file .*: {text}"):
        (disk.start_write if write else disk.start_read)(requests)
    assert file.rows_written == 50
    assert torch.equal(read(file, range(50)), records)


def test_requests_that_do_not_fit_are_refused(disk: Disk, tmp_path: Path):
    file, records = filled_file(disk, tmp_path / "f", 10)
    with pytest.raises(ValueError, match=r"table 'user': 2 rows of 68 B need records \[2, 68\]"):
        file.read_records(range(2), records)
    with pytest.raises(TypeError, match=r"records: expected a contiguous torch.uint8"):
        file.read_records(range(10), records.float())
    with pytest.raises(TypeError, match=r"rows: expected a contiguous torch.int64"):
        file.read_records(torch.zeros(10, dtype=torch.int32), records)
    with pytest.raises(ValueError, match="expected a range of step 1"):
        file.read_records(range(0, 10, 2), records[:5])
    with pytest.raises(ValueError, match="rows: expected one dimension"):
        file.read_records(torch.zeros(10, 1, dtype=torch.int64), records)


@pytest.mark.parametrize("direct", [True, False])
def test_direct_and_buffered_files_are_alike(tmp_path: Path, direct: bool):
    for engine in ENGINES[:-1]:
        with Disk(engine, direct=direct) as disk:
            file, records = filled_file(disk, tmp_path / engine, 400)
            assert file.direct is direct
            assert ("direct I/O" if direct else "page cache") in file.describe()
            assert torch.equal(read(file, range(400)), records)


def test_describe_names_engine_and_depth():
    for engine in ENGINES:
        text = Disk(engine, queue_depth=3).describe()
        assert "3 requests in flight" in text
        assert text.startswith({"io_uring": "io_uring,", "threads": "3 threads (io_uring: switched",
                                "reference": "reference (plain Python),"}[engine])


def test_unknown_engine_and_depth_are_refused():
    with pytest.raises(ConfigError, match="disk engine 'aio' is unknown; known: auto, io_uring"):
        Disk("aio")
    with pytest.raises(ConfigError, match="queue depth is 1 to 4096, asked for 0"):
        Disk(queue_depth=0)


def test_engines_that_this_installation_lacks_are_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("shardlab.tiers.disk.native", lambda: None)
    assert Disk("auto").describe().startswith("reference")
    with pytest.raises(StorageError, match="'threads' asked for, but this installation has no nat"):
        Disk("threads")
