"""Speed of a disk, through the framework's own SSD tier."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from shardlab.errors import LaunchError
from shardlab.pages import PAGE_BYTES, PAYLOAD_BYTES
from shardlab.tiers import Disk, FileSpec, RecordFile, RecordRequest

QUEUE_DEPTHS = (1, 8, 64)
#: Pages of one submission: many times the deepest queue.
_PAGES_READ = 2048
#: Records of a page each, written and read in long runs.
_RUN_PAGES = 8192
_LEAST_ROUNDS = 2


@dataclass(frozen=True)
class DiskSpeed:
    """What a directory's disk does.

    Attributes:
        engine: how the tier reads and writes it, in words.
        free_bytes: free space of its file system.
        read_iops: (requests in flight, random page reads per second).
        write_iops: random page writes per second, at the deepest queue.
        read_bytes_per_s: reading long runs.
        write_bytes_per_s: writing long runs, with the time to make them last.
    """

    engine: str
    free_bytes: int
    read_iops: list[tuple[int, float]]
    write_iops: float
    read_bytes_per_s: float
    write_bytes_per_s: float


def disk_speed(folder: str, file_bytes: int, seconds: float) -> DiskSpeed:
    """Measures the disk that ``folder`` lies on with a file of its own, which is deleted.

    Args:
        folder: a directory that exists and may be written.
        file_bytes: bytes of the file.
        seconds: how long each measurement repeats.

    Raises:
        LaunchError: no such directory, or not enough space.
        StorageError: the disk refuses reads or writes.
    """
    if not Path(folder).is_dir():
        raise LaunchError(f"--ssd {folder}: no such directory; name one on the disk to measure")
    free = shutil.disk_usage(folder).free
    if free < 2 * file_bytes:
        raise LaunchError(f"--ssd {folder}: {free / 1e9:.2f} GB free, measuring takes a file of "
                          f"{file_bytes / 1e9:.2f} GB; free some space, or use --quick")
    pages = max(file_bytes // PAGE_BYTES, _RUN_PAGES)
    with tempfile.TemporaryDirectory(prefix="shardlab-probe-", dir=folder) as place:
        path = os.path.join(place, "records")
        spec = FileSpec("probe", pages, PAYLOAD_BYTES, 0)
        disk = Disk(queue_depth=QUEUE_DEPTHS[-1])
        try:
            file = RecordFile.create(disk, path, spec)
            write = _fill(file, pages)
            run = _runs(file, pages, seconds)
            writes = _random(disk, file, pages, seconds, write=True)
            file.sync()
        finally:
            disk.close()
        reads = [(depth, _reads(path, spec, depth, seconds)) for depth in QUEUE_DEPTHS]
    return DiskSpeed(disk.describe(), free, reads, writes, run, write)


def _buffer(pages: int) -> Tensor:
    return torch.full((pages, PAYLOAD_BYTES), 7, dtype=torch.uint8)


def _fill(file: RecordFile, pages: int) -> float:
    """Writes the whole file; bytes per second."""
    records, start = _buffer(_RUN_PAGES), time.perf_counter()
    for low in range(0, pages, _RUN_PAGES):
        high = min(low + _RUN_PAGES, pages)
        file.write_records(range(low, high), records[:high - low])
    file.sync()
    return pages * PAGE_BYTES / (time.perf_counter() - start)


def _runs(file: RecordFile, pages: int, seconds: float) -> float:
    """Reads long runs; bytes per second."""
    records, moved, start = _buffer(_RUN_PAGES), 0, time.perf_counter()
    while moved < _LEAST_ROUNDS or time.perf_counter() - start < seconds:
        low = moved * _RUN_PAGES % (pages - _RUN_PAGES + 1)
        file.read_records(range(low, low + _RUN_PAGES), records)
        moved += 1
    return moved * _RUN_PAGES * PAGE_BYTES / (time.perf_counter() - start)


def _reads(path: str, spec: FileSpec, depth: int, seconds: float) -> float:
    disk = Disk(queue_depth=depth)
    try:
        return _random(disk, RecordFile.open(disk, path, spec), spec.rows, seconds, write=False)
    finally:
        disk.close()


def _random(disk: Disk, file: RecordFile, pages: int, seconds: float, write: bool) -> float:
    """Random pages per second."""
    rng, records = np.random.default_rng(0), _buffer(_PAGES_READ)
    rounds, start = 0, time.perf_counter()
    while rounds < _LEAST_ROUNDS or time.perf_counter() - start < seconds:
        rows = torch.from_numpy(np.unique(rng.integers(0, pages, _PAGES_READ)))
        request = [RecordRequest(file, rows, records[:len(rows)])]
        disk.write(request) if write else disk.read(request)
        rounds += 1
    return rounds * _PAGES_READ / (time.perf_counter() - start)
