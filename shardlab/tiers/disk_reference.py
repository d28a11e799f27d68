"""The plain face of the disk: the same files and rules in Python, everything at once in the caller.

It judges the native face, and answers where there is none. One page at a time through the page
cache: for small tables and tests. Source: own.
"""

from __future__ import annotations

import ctypes
import os
import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from shardlab.pages import HEADER_PAGES, PAGE_BYTES, PAYLOAD_BYTES, UnitLayout, unit_layout
from shardlab.tiers.page_checksum import Pages, page_checksums

Rows = npt.NDArray[np.int64]

Failure = tuple[str, int, bool, int, int, int]


class _FaultError(Exception):
    """Carries a failure out of a submission."""

    def __init__(self, kind: str, write: bool, page: int, error: int = 0) -> None:
        super().__init__(kind)
        self.kind, self.write, self.page, self.error = kind, write, page, error


@dataclass
class _File:
    fd: int
    rows: int
    record_bytes: int
    salt: int
    checksums: bool
    written: int
    lost: Failure | None = None

    @property
    def layout(self) -> UnitLayout:
        return unit_layout(self.record_bytes)


@dataclass
class _Part:
    number: int
    file: _File
    rows: Rows
    records: Pages
    is_range: bool
    stale: npt.NDArray[np.bool_]
    written: int = 0  # rows of the file that had been given when the submission came


class ReferenceJob:
    """A submission, always done."""

    def __init__(self, parts: list[_Part]) -> None:
        self.parts = parts
        self._failure: Failure | None = None

    def wait(self, seconds: float) -> bool:
        """True: there is nothing to wait for."""
        return True

    def failure(self) -> Failure | None:
        """What went wrong: (kind, file, write, first, count, errno)."""
        return self._failure

    def fail(self, failure: Failure) -> None:
        """Sets what went wrong."""
        self._failure = failure

    def take_stale(self, part: int, out: int) -> None:
        """Writes a part's marks to the address and clears them."""
        stale = self.parts[part].stale
        _memory(out, len(stale), 1)[:, 0] = stale
        stale[:] = False

    def mark(self, part: int, marks: int) -> None:
        """Adds marks."""
        stale = self.parts[part].stale
        stale |= _memory(marks, len(stale), 1)[:, 0].astype(bool)


class ReferenceDisk:
    """Has the methods of the native ``Disk``."""

    def __init__(self) -> None:
        self._files: dict[int, _File] = {}
        self._next = 0
        self._readers: list[weakref.ref[ReferenceJob]] = []
        self._counts = [0, 0, 0, 0]
        self._fault: tuple[bool, int, int] | None = None
        self._lock = threading.Lock()

    def engine_name(self) -> str:
        """What `Disk.describe` says."""
        return "reference (plain Python)"

    def add_file(self, fd: int, rows: int, record_bytes: int, salt: int, checksums: bool,
                 written: int) -> int:
        """Takes an open file; returns its number."""
        self._files[self._next] = _File(fd, rows, record_bytes, salt, checksums, written)
        self._next += 1
        return self._next - 1

    def remove_file(self, number: int) -> None:
        """Forgets a file."""
        del self._files[number]

    def rows_written(self, number: int) -> int:
        """How many rows have been given."""
        return self._files[number].written

    def lost_write(self, number: int) -> Failure | None:
        """The failure of a write to this file."""
        return self._files[number].lost

    def drain(self, seconds: float) -> bool:
        """True: nothing is ever under way."""
        return True

    def counters(self) -> list[int]:
        """Reads, writes, bytes read, bytes written."""
        return self._counts

    def inject_fault(self, write: bool, result: int, skip: int) -> None:
        """As `shardlab.tiers.disk.Disk.inject_fault`."""
        self._fault = (write, result, skip)

    def submit(self, write: bool, requests: list[tuple[int, int, int, int, int]]) -> ReferenceJob:
        """Does all of it; requests as the native face takes them."""
        job = ReferenceJob([self._part(*request) for request in requests])
        with self._lock:
            refusal = self._refusal(write, job.parts)
            if refusal is not None:
                job.fail(refusal)
                return job
            self._readers = [reader for reader in self._readers if reader() is not None]
            if not write:
                self._readers.append(weakref.ref(job))
            for part in job.parts:
                try:
                    if write:
                        self._mark_readers(part)
                        self._write(part)
                    else:
                        self._read(part)
                except _FaultError as fault:
                    job.fail((fault.kind, part.number, fault.write, fault.page, 1, fault.error))
                    for other in job.parts if write else ():
                        other.file.lost = other.file.lost or job.failure()
                    break
        return job

    def _part(self, number: int, rows: int, start: int, count: int, records: int) -> _Part:
        file = self._files[number]
        ids = np.arange(start, start + count) if rows == 0 else \
            _memory(rows, count, 8).view(np.int64)[:, 0].copy()
        return _Part(number, file, ids, _memory(records, count, file.record_bytes), rows == 0,
                     np.zeros(count, bool))

    def _refusal(self, write: bool, parts: list[_Part]) -> Failure | None:
        written = {part.number: part.file.written for part in parts}
        for part in parts:
            part.written = given = written[part.number]
            if part.file.lost is not None:
                return ("lost_write", part.number, write, 0, 0, 0)
            if len(part.rows) == 0:
                continue
            least, largest = int(part.rows.min()), int(part.rows.max())
            grows = write and part.is_range
            if least < 0:
                return ("row", part.number, write, least, 0, 0)
            if grows and least > given:
                return ("row", part.number, write, least, given, 0)
            if largest >= (part.file.rows if grows else given):
                return ("row", part.number, write, largest, given, 0)
            written[part.number] = max(given, largest + 1)
        for part in parts:
            part.file.written = written[part.number]
        return None

    def _mark_readers(self, written: _Part) -> None:
        for reader in self._readers:
            job = reader()
            for part in job.parts if job is not None else ():
                if part.file is written.file:
                    part.stale |= np.isin(part.rows, written.rows)

    def _read(self, part: _Part) -> None:
        for unit, at, slots in _by_unit(part):
            part.records[at] = self._load(part.file, unit)[slots]

    def _write(self, part: _Part) -> None:
        file, layout = part.file, part.file.layout
        for unit, at, slots in _by_unit(part):
            before = min(max(part.written - unit * layout.records, 0), layout.records)
            if len(np.unique(slots[slots < before])) < before:  # records that have to stay
                records = self._load(file, unit)
            else:
                records = np.zeros((layout.records, file.record_bytes), np.uint8)
            for entry, slot in zip(at, slots, strict=True):  # the last of equal rows stays
                records[slot] = part.records[entry]
            self._store(file, unit, records)

    def _load(self, file: _File, unit: int) -> Pages:
        layout, first = file.layout, HEADER_PAGES + unit * file.layout.pages
        raw = self._transfer(file.fd, first, layout.pages, None)
        pages = np.frombuffer(raw, np.uint8).reshape(layout.pages, PAGE_BYTES)
        trailers = pages[:, PAYLOAD_BYTES:].copy().view(np.uint64)[:, 0]
        numbers = np.arange(first, first + layout.pages).astype(np.uint64)
        bad = (trailers != page_checksums(pages, numbers, file.salt)).nonzero()[0]
        if file.checksums and len(bad):
            kind = "unwritten" if trailers[bad[0]] == 0 else "checksum"
            raise _FaultError(kind, False, first + int(bad[0]))
        payload = pages[:, :PAYLOAD_BYTES].reshape(-1)
        size = layout.records * file.record_bytes
        return payload[:size].reshape(layout.records, file.record_bytes).copy()

    def _store(self, file: _File, unit: int, records: Pages) -> None:
        layout, first = file.layout, HEADER_PAGES + unit * file.layout.pages
        payload = np.zeros(layout.pages * PAYLOAD_BYTES, np.uint8)
        payload[:records.size] = records.reshape(-1)
        pages = np.zeros((layout.pages, PAGE_BYTES), np.uint8)
        pages[:, :PAYLOAD_BYTES] = payload.reshape(layout.pages, PAYLOAD_BYTES)
        if file.checksums:
            numbers = np.arange(first, first + layout.pages).astype(np.uint64)
            sums = page_checksums(pages, numbers, file.salt)
            pages[:, PAYLOAD_BYTES:] = sums.view(np.uint8).reshape(-1, 8)
        self._transfer(file.fd, first, layout.pages, pages.tobytes())

    def _transfer(self, fd: int, first: int, pages: int, data: bytes | None) -> bytes:
        write, size, offset = data is not None, pages * PAGE_BYTES, first * PAGE_BYTES
        self._counts[write] += 1
        self._counts[2 + write] += size
        try:
            moved: Any = os.pread(fd, size, offset) if data is None else os.pwrite(fd, data, offset)
        except OSError as error:
            raise _FaultError("io", write, first, error.errno or 0) from None
        count = self._faulty(write, moved if write else len(moved))
        if count < 0:
            raise _FaultError("io", write, first, -count)
        if count < size:
            raise _FaultError("short", write, first + count // PAGE_BYTES)
        return b"" if write else bytes(moved)

    def _faulty(self, write: bool, result: int) -> int:
        if self._fault is None or self._fault[0] != write:
            return result
        kind, wanted, skip = self._fault
        self._fault = None if skip == 0 else (kind, wanted, skip - 1)
        return wanted if skip == 0 else result


def _by_unit(part: _Part) -> Iterator[tuple[int, Rows, Rows]]:
    """(unit, places in the request, places in the unit) of every unit that the rows touch."""
    records = part.file.layout.records
    order = np.argsort(part.rows, kind="stable")
    units = part.rows[order] // records
    starts = np.flatnonzero(np.diff(units, prepend=-1))
    for at in np.split(order, starts[1:]) if len(order) else []:
        unit = int(part.rows[at[0]]) // records
        yield unit, at, part.rows[at] - unit * records


def _memory(start: int, count: int, width: int) -> Pages:
    """Memory at an address as uint8 [count, width]."""
    if count == 0:
        return np.empty((0, width), np.uint8)
    span = (ctypes.c_uint8 * (count * width)).from_address(start)
    return np.frombuffer(memoryview(span), np.uint8).reshape(count, width)
