"""The SSD tier: reads and writes of records in files, many at a time, while training goes on.

A `Disk` is one submission queue with a thread behind it that keeps the device busy; files are
`shardlab.tiers.record_file.RecordFile`. Source: own; io_uring as in io_uring(7).
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from shardlab.errors import ConfigError, StorageError
from shardlab.ops.registry import address, check_tensor, native
from shardlab.tiers.disk_failures import Failure, describe_failure
from shardlab.tiers.disk_tickets import POLL_S, OpenFile, ReadTicket, RecordRequest, WriteTicket

ENGINES = ("auto", "io_uring", "threads", "reference")

#: Where random reads stop getting faster on the disks that were measured.
DEFAULT_QUEUE_DEPTH = 64
_MAX_QUEUE_DEPTH = 4096


@dataclass(frozen=True)
class DiskCounters:
    """Requests to the device and their bytes, whole pages, since the disk was opened."""

    reads: int
    writes: int
    read_bytes: int
    written_bytes: int


@dataclass
class _Pending:
    """Keeps the memory of a submission in place until its job is done."""

    requests: Sequence[RecordRequest]
    job: Any = None


class Disk:
    """A queue of reads and writes on the files of one device, and the thread that works on it.

    Submissions take effect in the order they come in, from whichever thread: a read returns what
    was written by all submissions before it. They overlap on the device unless they touch the same
    page. Memory: 64 KiB per request in flight.

    Args:
        engine: ``io_uring``; ``threads`` with pread and pwrite; ``reference``, plain Python that
            does everything at once in the caller; ``auto``: the first of these that this system
            permits and this installation has.
        queue_depth: requests that the device gets at a time.
        direct: whether files bypass the page cache; None: those whose file system can.

    Raises:
        ConfigError: unknown engine or a depth out of range.
        StorageError: this system has no such engine.
    """

    def __init__(self, engine: str = "auto", queue_depth: int = DEFAULT_QUEUE_DEPTH,
                 direct: bool | None = None) -> None:
        if engine not in ENGINES:
            raise ConfigError(f"disk engine {engine!r} is unknown; known: {', '.join(ENGINES)}")
        if not 1 <= queue_depth <= _MAX_QUEUE_DEPTH:
            raise ConfigError(f"a disk's queue depth is 1 to {_MAX_QUEUE_DEPTH}, "
                              f"asked for {queue_depth}")
        self.queue_depth = queue_depth
        self.device = _open_device(engine, queue_depth)
        is_reference = self.device.engine_name().startswith("reference")
        self.direct = False if is_reference else direct
        self.files: dict[int, OpenFile] = {}
        self._pending: list[_Pending] = []
        self._lock = threading.Lock()

    def describe(self) -> str:
        """The engine and how files are opened, in a line."""
        direct = {True: "direct I/O", False: "through the page cache",
                  None: "direct I/O where the file system can"}[self.direct]
        return f"{self.device.engine_name()}, {self.queue_depth} requests in flight, {direct}"

    def start_read(self, requests: Sequence[RecordRequest]) -> ReadTicket:
        """Starts one read of records of several files.

        Args:
            requests: their memory must stay unused until the ticket's `wait` returns.

        Returns:
            The ticket; see there for what it reads when writes come in between.

        Raises:
            StorageError: a row that its file does not hold, or a file that lost a write; `wait`
                raises what shows later: I/O errors, truncated files, damaged pages.
        """
        return ReadTicket(self, self._submit(False, requests), requests)

    def start_write(self, requests: Sequence[RecordRequest]) -> WriteTicket:
        """Starts one write of records of several files.

        Pages are written whole: those of which some records stay are read first. The rows of a new
        file must first be given as ranges in ascending order, without a gap.

        Args:
            requests: their memory must stay unchanged until the ticket's `wait` returns.

        Raises:
            StorageError: as for `start_read`. A write that fails may have lost records, so from
                then on every file of its submission refuses reads and writes.
        """
        return WriteTicket(self, self._submit(True, requests), requests)

    def read(self, requests: Sequence[RecordRequest]) -> None:
        """`start_read` and `wait`."""
        self.start_read(requests).wait()

    def write(self, requests: Sequence[RecordRequest]) -> None:
        """`start_write` and `wait`."""
        self.start_write(requests).wait()

    def drain(self) -> None:
        """Returns when all submissions are done, whatever became of them."""
        while not self.device.drain(POLL_S):
            pass

    def counters(self) -> DiskCounters:
        """What the device was asked for so far."""
        return DiskCounters(*self.device.counters())

    def close(self) -> None:
        """Finishes what is under way and closes all files."""
        self.drain()
        for file in list(self.files.values()):
            file.close()

    def __enter__(self) -> Disk:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def inject_fault(self, *, write: bool, result: int, skip: int = 0) -> None:
        """For tests: makes a later request to the device fail.

        Args:
            write: which kind of request.
            result: what it reports instead: -errno, or fewer bytes than it moved.
            skip: how many requests of this kind pass before.
        """
        self.device.inject_fault(write, result, skip)

    def release_done(self) -> None:
        """Lets go of the memory of submissions that are done."""
        with self._lock:
            self._pending = [entry for entry in self._pending
                             if entry.job is None or not entry.job.wait(0.0)]

    def check(self, file: OpenFile) -> None:
        """Raises the StorageError of a write to this file that failed."""
        found = self.device.lost_write(file.number)
        if found is not None:
            raise StorageError(self._refusal(file, Failure(*found), {}))

    def raise_failure(self, job: Any, requests: Sequence[RecordRequest]) -> None:
        """Raises the StorageError of a submission that failed, in words."""
        found = job.failure()
        if found is None:
            return
        failure = Failure(*found)
        known = {request.file.number: request.file for request in requests}
        file = known[failure.file]
        if failure.kind != "lost_write":
            raise StorageError(describe_failure(failure, file.path, file.spec))
        first = Failure(*self.device.lost_write(failure.file))
        raise StorageError(self._refusal(file, first, known))

    def _refusal(self, file: OpenFile, first: Failure, known: dict[int, OpenFile]) -> str:
        culprit = {**self.files, **known}.get(first.file, file)
        return (f"table {file.spec.table!r}, file {file.path}: refused, because an earlier write "
                f"failed and rows may be lost: "
                f"{describe_failure(first, culprit.path, culprit.spec)}")

    def _submit(self, write: bool, requests: Sequence[RecordRequest]) -> Any:
        tuples = [_as_tuple(request, self.files) for request in requests]
        pending = _Pending(requests)
        self.release_done()
        with self._lock:
            self._pending.append(pending)
        pending.job = self.device.submit(write, tuples)
        if pending.job.wait(0.0):
            found = pending.job.failure()
            if found is not None and found[0] in ("row", "lost_write"):
                self.raise_failure(pending.job, requests)
        return pending.job


def _open_device(engine: str, queue_depth: int) -> Any:
    module = None if engine == "reference" else native()
    if module is None:
        if engine in ("io_uring", "threads"):
            raise StorageError(f"disk engine {engine!r} asked for, but this installation has no "
                               "native library; build it, or use engine 'auto'")
        from shardlab.tiers.disk_reference import ReferenceDisk

        return ReferenceDisk()
    device = module.Disk(engine != "threads", queue_depth)
    if engine == "io_uring" and device.engine_name() != "io_uring":
        raise StorageError(f"disk engine 'io_uring' asked for, found {device.engine_name()}; "
                           "permit io_uring, or use engine 'auto'")
    return device


def _as_tuple(request: RecordRequest,
              files: dict[int, OpenFile]) -> tuple[int, int, int, int, int]:
    """A request as devices take it; checks what would corrupt memory otherwise."""
    file, rows, records = request.file, request.rows, request.records
    check_tensor("records", records, torch.uint8)
    count, size = len(rows), file.spec.record_bytes
    if records.device.type != "cpu" or tuple(records.shape) != (count, size):
        raise ValueError(f"table {file.spec.table!r}: {count} rows of {size} B need records "
                         f"[{count}, {size}] on the CPU, found {list(records.shape)} on "
                         f"{records.device}")
    number = file.number
    if files.get(number) is not file:
        raise StorageError(f"table {file.spec.table!r}, file {file.path} is closed, or another "
                           "disk's; open it again")
    if isinstance(rows, range):
        if rows.step != 1:
            raise ValueError(f"rows: expected a range of step 1, found {rows}")
        return number, 0, rows.start, count, address(records)
    check_tensor("rows", rows, torch.int64)
    if rows.device.type != "cpu" or rows.dim() != 1:
        raise ValueError(f"rows: expected one dimension on the CPU, found {list(rows.shape)} on "
                         f"{rows.device}")
    return number, address(rows), 0, count, address(records)
