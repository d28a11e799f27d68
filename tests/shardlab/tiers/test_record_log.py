"""Logs on disk: the newest record of every row, whatever was written, moved and read ahead."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardlab.errors import StorageError
from shardlab.log_layout import TAG_BYTES, log_layout
from shardlab.pages import PAGE_BYTES
from shardlab.tiers import Disk, LogSpec, RecordLog
from tests.shardlab.tiers.disk_cases import ENGINES

ROWS = (700, 1, 45)


class Shadow:
    """A log of three shards, and a dict that says what it must hold."""

    def __init__(self, folder: Path, engine: str, record_bytes: int, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self.disk = Disk(engine, queue_depth=1 + seed % 9)
        specs = [LogSpec(f"t{i}", log_layout(rows, record_bytes), i, folder / f"t{i}")
                 for i, rows in enumerate(ROWS)]
        self.log = RecordLog(self.disk, specs)
        self.truth: dict[int, bytes] = {}
        for start in range(0, sum(ROWS), 100):
            self.write(np.arange(start, min(sum(ROWS), start + 100)))

    def some(self, share: float = 0.1) -> np.ndarray:
        """Rows, the first ones more often, with repetitions."""
        count = 1 + int(self.random.integers(int(sum(ROWS) * share)))
        return (self.random.random(count) ** 3 * sum(ROWS)).astype(np.int64)

    def write(self, keys: np.ndarray) -> None:
        keys = self.random.permutation(np.unique(keys))
        size = self.log.record_bytes
        records = self.random.integers(0, 256, (keys.size, size)).astype(np.uint8)
        self.truth.update({key: record[:-TAG_BYTES].tobytes()
                           for key, record in zip(keys.tolist(), records, strict=True)})
        self.log.write(keys, records)
        records[:] = 0  # the log keeps nothing of its caller's memory

    def check(self, keys: np.ndarray) -> None:
        out = np.full((keys.size, self.log.record_bytes), 165, np.uint8)
        self.log.read(keys, out)
        for key, record in zip(keys.tolist(), out, strict=True):
            assert record[:-TAG_BYTES].tobytes() == self.truth[key], key

    def run(self, actions: list[str]) -> None:
        for action in actions:
            if action == "write":
                self.write(self.some())
            elif action == "hot":
                self.write(self.some(0.01))
            elif action == "ahead":
                self.log.read_ahead(self.some())
            elif action == "settle":
                self.log.settle()
            else:
                self.check(self.some())
        self.check(np.arange(sum(ROWS)))
        self.disk.close()


ACTIONS = st.sampled_from(["write", "write", "hot", "ahead", "read", "read", "settle"])


@pytest.mark.parametrize("engine", ENGINES)
@settings(max_examples=15, deadline=None)
@given(actions=st.lists(ACTIONS, max_size=60), seed=st.integers(0, 99),
       record=st.sampled_from([1, 68, 260, 2040, 5000]))
def test_reads_are_what_was_written_last(engine, actions, seed, record):
    folder = Path(tempfile.mkdtemp())
    try:
        Shadow(folder, engine, record, seed).run(actions)
    finally:
        shutil.rmtree(folder)


@pytest.mark.parametrize("engine", ENGINES)
def test_segments_are_cleaned_for_as_long_as_it_takes(engine, tmp_path):
    shadow = Shadow(tmp_path, engine, 260, 1)
    for step in range(150):
        ahead = shadow.some(0.3)
        shadow.log.read_ahead(ahead)
        shadow.write(shadow.some(0.3))
        shadow.check(ahead if step % 2 else shadow.some())
    written = shadow.disk.counters().written_bytes
    assert written > 5 * sum(file.spec.rows * 264 for file in shadow.log.files)
    shadow.run([])


def test_writes_cost_their_bytes_and_no_reads(tmp_path):
    with Disk() as disk:
        layout = log_layout(100_000, 260)
        log = RecordLog(disk, [LogSpec("t", layout, 0, tmp_path / "t")])
        for start in range(0, 100_000, 10_000):
            log.write(np.arange(start, start + 10_000), np.zeros((10_000, 264), np.uint8))
        log.settle()
        found = disk.counters()
        assert found.reads == 0
        assert found.written_bytes <= -(-100_000 // 15) * PAGE_BYTES
        assert found.written_bytes >= 16 * PAGE_BYTES * found.writes
        assert log.memory_bytes == layout.memory_bytes
        assert log.allocated_bytes == layout.file_bytes


def test_row_that_was_read_ahead_and_rewritten_is_not_read_again(tmp_path):
    """The disk is asked once; what was written in between comes from memory."""
    shadow = Shadow(tmp_path, "auto", 68, 3)
    shadow.log.settle()
    rows = np.arange(400)
    shadow.log.read_ahead(rows)
    shadow.disk.drain()
    before = shadow.disk.counters().reads
    shadow.write(np.arange(100, 300))
    shadow.disk.drain()
    cleaned = shadow.disk.counters().reads - before
    shadow.check(rows)
    assert shadow.disk.counters().reads == before + cleaned
    shadow.disk.close()


def test_row_that_was_never_written_is_refused(tmp_path):
    with Disk() as disk:
        log = RecordLog(disk, [LogSpec("t", log_layout(50, 60), 0, tmp_path / "t")])
        log.write(np.arange(10), np.zeros((10, 64), np.uint8))
        with pytest.raises(StorageError, match=r"table 't', file .*: read of row 10, which was "
                                               "never written; write all rows first"):
            log.read(np.arange(12), np.zeros((12, 64), np.uint8))


@pytest.mark.parametrize("engine", ENGINES)
def test_damaged_page_is_refused_by_place(engine, tmp_path):
    shadow = Shadow(tmp_path, engine, 260, 1)
    shadow.log.settle()
    path = shadow.log.files[0].path
    with open(path, "r+b", buffering=0) as handle:
        handle.seek(3 * PAGE_BYTES + 17)
        handle.write(b"\xa5\x5a\xa5")
        os.fsync(handle.fileno())
    with pytest.raises(StorageError, match=r"table 't0', file .*: page 3 \(places 30 to 44\): the "
                                           "page does not match its checksum"):
        shadow.check(np.arange(700))
    shadow.disk.close()


@pytest.mark.parametrize("engine", ENGINES[:-1])
def test_failed_write_refuses_the_file_from_then_on(engine, tmp_path):
    shadow = Shadow(tmp_path, engine, 260, 1)
    shadow.log.settle()
    shadow.disk.inject_fault(write=True, result=-errno.EIO)
    with pytest.raises(StorageError, match=r"table 't0', file .*write failed: .*failing"):
        shadow.run(["write", "hot"] * 20 + ["settle"])
    with pytest.raises(StorageError, match="refused, because an earlier write failed and rows may"):
        shadow.check(np.arange(700))
    shadow.disk.close()


def test_record_of_another_row_is_refused(tmp_path):
    """Checksums hold, but the index points elsewhere: memory was damaged."""
    shadow = Shadow(tmp_path, "auto", 260, 1)
    shadow.log.settle()
    filed = np.flatnonzero(shadow.log._index[:700] >= 0)[:2]
    shadow.log._index[filed] = shadow.log._index[filed[::-1]]
    with pytest.raises(StorageError, match=rf"table 't0', file .*: read row {filed[0]}, found row "
                                           rf"{filed[1]} in its place"):
        shadow.check(filed)
    shadow.disk.close()
