"""The SSD tier against the disk: random records per second beside what `limits.py` measures.

    python benchmarks/disk_rows.py --dir /path/on/the/disk

Per repetition, one after the other: the disk's random 4 KiB reads and writes (16 threads, direct
I/O, a file of the same size, as limits.py does it), then records through each engine. `fraction` is
records per second over what the disk allows: a read moves one page, a partial write reads and
writes one. Records are one to a page at most, unless the case says otherwise. One JSON line a case;
medians, but for the cost of checksums, which the least disturbed repetitions show best.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import statistics
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from benchlib import emit, machine
from limits import fill_file, i64, load_kernels, ptr

from shardlab.ops.registry import native
from shardlab.pages import PAGE_BYTES, records_per_page
from shardlab.tiers import Disk, FileSpec, RecordFile, RecordRequest

LIMIT_THREADS = 16
CHUNK_PAGES = 4096
ENGINES = (("io_uring", 16), ("io_uring", 32), ("io_uring", 64), ("threads", 64))


class Limit:
    """The disk itself, by the kernels of limits.py."""

    def __init__(self, path: Path, size: int, args: Namespace) -> None:
        self.path, self.size, self.seconds = path, size, args.seconds
        self.lib, self.latency = load_kernels(), np.zeros(2_000_000)
        fill_file(str(path), size, args)

    def per_second(self, write: bool) -> float:
        elapsed = ctypes.c_double()
        done = self.lib.block_io(str(self.path).encode(), 1, int(write), 0, i64(self.size),
                                 PAGE_BYTES, LIMIT_THREADS, ctypes.c_double(self.seconds),
                                 ptr(self.latency.ctypes.data), i64(len(self.latency)),
                                 ctypes.byref(elapsed))
        if done <= 0:
            raise SystemExit(f"{self.path}: the disk refuses direct I/O of {PAGE_BYTES} bytes")
        return done / elapsed.value


def stream(file: RecordFile, write: bool) -> float:
    """Bytes per second of going through all records, two chunks under way."""
    spec = file.spec
    chunk = CHUNK_PAGES * max(records_per_page(spec.record_bytes), 1)
    buffers = [torch.ones(chunk, spec.record_bytes, dtype=torch.uint8) for _ in range(2)]
    start_io = file.disk.start_write if write else file.disk.start_read
    tickets, begin = [], time.perf_counter()
    for index, first in enumerate(range(0, spec.rows, chunk)):
        rows = range(first, min(first + chunk, spec.rows))
        if index >= 2:
            tickets[index - 2].wait()
        tickets.append(start_io([RecordRequest(file, rows, buffers[index % 2][:len(rows)])]))
    for ticket in tickets:
        ticket.wait()
    return file.allocated_bytes() / (time.perf_counter() - begin)


def records_per_second(file: RecordFile, pages: int, write: bool, args: Namespace,
                       rng: np.random.Generator) -> tuple[float, float]:
    """(records per second, CPU seconds per second) on one record of random ones of these pages."""
    per_page = records_per_page(file.spec.record_bytes)
    chosen = np.sort(rng.choice(pages, min(args.rows, pages), replace=False)) * per_page
    rows = torch.from_numpy(chosen + rng.integers(0, per_page, len(chosen)))
    records = torch.zeros(len(rows), file.spec.record_bytes, dtype=torch.uint8)
    begin, cpu = time.perf_counter(), time.process_time()
    (file.write_records if write else file.read_records)(rows, records)
    took = time.perf_counter() - begin
    return len(rows) / took, (time.process_time() - cpu) / took


def run_random(folder: Path, limit: Limit, spec: FileSpec, args: Namespace) -> None:
    rng = np.random.default_rng(args.seed)
    pages = spec.rows // records_per_page(spec.record_bytes)
    found: dict[tuple[str, int, str], list[tuple[float, float, float]]] = {}
    for _ in range(args.reps):
        reads, writes = limit.per_second(write=False), limit.per_second(write=True)
        allowed = {"random_read": reads, "dense_read": reads,
                   "partial_write": 1 / (1 / reads + 1 / writes)}
        for engine, depth in ENGINES:
            with Disk(engine, depth) as disk:
                file = RecordFile.open(disk, folder / "records", spec)
                for case, most in allowed.items():
                    some = 5 * args.rows if case == "dense_read" else pages
                    rate, cpu = records_per_second(file, min(some, pages), case == "partial_write",
                                                   args, rng)
                    found.setdefault((engine, depth, case), []).append((rate, most, cpu))
    for (engine, depth, case), values in found.items():
        emit(section="disk_rows", case=case, engine=engine, queue_depth=depth,
             record_bytes=spec.record_bytes,
             rows_per_s=statistics.median(rate for rate, _, _ in values),
             limit_per_s=statistics.median(most for _, most, _ in values),
             fraction=statistics.median(rate / most for rate, most, _ in values),
             cores=statistics.median(cpu for _, _, cpu in values), reps=args.reps)


def run_checksums(folder: Path, args: Namespace) -> None:
    """A cycle of reads and partial writes with and without checksums, in turns."""
    page = np.random.default_rng(args.seed).integers(0, 256, PAGE_BYTES, dtype=np.uint8)
    address, calls = page.ctypes.data, 100_000
    plain = seconds(lambda: [native().processor_vendor() for _ in range(calls)])
    per_page = (seconds(lambda: [native().page_checksum(address, 1, 2)
                                 for _ in range(calls)]) - plain) / calls
    pages = args.rows * 10
    took: dict[bool, list[float]] = {True: [], False: []}
    with Disk() as disk:
        specs = {on: FileSpec(f"checksums_{on}", pages * records_per_page(args.record_bytes),
                              args.record_bytes, 1, on) for on in took}
        files = {on: RecordFile.create(disk, folder / spec.table, spec, replace=True)
                 for on, spec in specs.items()}
        for file in files.values():
            stream(file, write=True)
        for rep in range(2 * args.reps):
            for on in (rep % 2 == 0, rep % 2 == 1):
                rng = np.random.default_rng(rep)
                took[on].append(sum(1 / records_per_second(files[on], pages, write, args, rng)[0]
                                    for write in (False, True)))
        for file in files.values():
            file.unlink()
    with_us, without_us = (1e6 * min(took[on]) for on in (True, False))  # the least disturbed
    emit(section="disk_rows", case="checksums", ns_per_page=1e9 * per_page,
         gb_per_s=PAGE_BYTES / per_page / 1e9, cycle_us=with_us, cycle_without_us=without_us,
         measured_share=with_us / without_us - 1,
         computed_share=3 * 1e6 * per_page / with_us)  # read: check; partial write: check, seal


def seconds(work: Callable[[], object]) -> float:
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, required=True, help="a folder on the disk to measure")
    parser.add_argument("--gib", type=float, default=2.0, help="size of each file")
    parser.add_argument("--record-bytes", type=int, default=68)
    parser.add_argument("--rows", type=int, default=40_000, help="records per measurement")
    parser.add_argument("--seconds", type=float, default=1.0, help="per measurement of the limit")
    parser.add_argument("--reps", type=int, default=5)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    args.disk_gib = args.gib  # for the line of `fill_file`
    emit(section="machine", **machine())
    limit_path = args.dir / "disk_rows_limit.bin"
    size = int(args.gib * 2**30)
    rows = size // PAGE_BYTES * records_per_page(args.record_bytes)
    spec = FileSpec("records", rows, args.record_bytes, 1)
    try:
        limit = Limit(limit_path, size, args)
        with Disk() as disk:
            file = RecordFile.create(disk, args.dir / "records", spec, replace=True)
            for case, write in (("fill", True), ("overwrite", True), ("scan", False)):
                emit(section="disk_rows", case=case, engine=disk.describe(),
                     mb_per_s=stream(file, write) / 1e6)
            file.sync()
        run_random(args.dir, limit, spec, args)
        run_checksums(args.dir, args)
    finally:
        for path in (limit_path, args.dir / "records"):
            if path.exists():
                os.unlink(path)


if __name__ == "__main__":
    main()
