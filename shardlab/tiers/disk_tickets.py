"""What is asked of a disk, and the handles on what is under way. Source: own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from shardlab.errors import StorageError
from shardlab.ops.registry import address
from shardlab.tiers.disk_failures import FileSpec

#: How often a wait looks for signals.
POLL_S = 0.1


class OpenFile(Protocol):
    """A `RecordFile`, as its disk needs to know it."""

    number: int
    path: str
    spec: FileSpec

    def close(self) -> None:
        """Waits for what is under way and closes the file."""


@dataclass(frozen=True)
class RecordRequest:
    """Records of one file, to read or to write.

    Attributes:
        file: where.
        rows: int64 [n] on CPU, in any order and with repetitions, or a range of step 1. Ascending
            rows spare a sort.
        records: uint8 [n, record_bytes] on CPU, contiguous: filled by a read; taken by a write,
            where of a row that comes twice the last record stays.
    """

    file: OpenFile
    rows: Tensor | range
    records: Tensor


class Queue(Protocol):
    """A `Disk`, as its tickets need to know it."""

    def read(self, requests: Sequence[RecordRequest]) -> None:
        """Reads records."""

    def release_done(self) -> None:
        """Lets go of the memory of submissions that are done."""

    def raise_failure(self, job: Any, requests: Sequence[RecordRequest]) -> None:
        """Raises the StorageError of a submission that failed."""


class WriteTicket:
    """A write under way. Its rows and records must not change until `wait` returns."""

    def __init__(self, disk: Queue, job: Any, requests: Sequence[RecordRequest]) -> None:
        self._disk, self._job, self.requests = disk, job, list(requests)

    def done(self) -> bool:
        """Whether `wait` would return at once."""
        return bool(self._job.wait(0.0))

    def wait(self) -> None:
        """Returns when all is on the device (`RecordFile.sync` makes it survive a power cut).

        Raises:
            StorageError: something failed; see `Disk.start_write`.
        """
        while not self._job.wait(POLL_S):
            pass
        self._disk.release_done()
        self._disk.raise_failure(self._job, self.requests)


class ReadTicket(WriteTicket):
    """A read under way, and the guard against using old bytes afterwards.

    The rule: after `wait`, the records are those of all writes that were submitted to the disk
    before `Disk.start_read`, and of none submitted later. A later write to some of the ticket's
    rows, to be done by then or not, marks these records stale at the moment `Disk.start_write` is
    called, as long as somebody holds the ticket. `take_stale` hands the marks over; `refresh` reads
    the marked records again. So whoever puts a ticket's records to use does this, with no write in
    between:

        ticket.wait(); ticket.refresh(); use ticket.requests[i].records

    Rows that changed somewhere nearer than the disk, and are not written to it yet, carry no mark:
    they are for the owner of that nearer level to know.
    """

    def take_stale(self) -> list[Tensor]:
        """Returns bool [n] per request: written since they were read; clears the marks."""
        marks = [torch.empty(len(request.rows), dtype=torch.uint8) for request in self.requests]
        for part, mark in enumerate(marks):
            self._job.take_stale(part, address(mark))
        return [mark.bool() for mark in marks]

    def refresh(self) -> int:
        """Reads stale records again; returns how many there were.

        Raises:
            StorageError: the read failed; the records stay marked.
        """
        self.wait()
        marks = self.take_stale()
        again = [RecordRequest(request.file, _rows_at(request.rows, mark), request.records[mark])
                 for request, mark in zip(self.requests, marks, strict=True)]
        try:
            self._disk.read([request for request in again if len(request.rows)])
        except StorageError:
            for part, mark in enumerate(marks):
                self._job.mark(part, address(mark.view(torch.uint8)))
            raise
        for request, fresh, mark in zip(self.requests, again, marks, strict=True):
            request.records[mark] = fresh.records
        return sum(len(request.rows) for request in again)


def _rows_at(rows: Tensor | range, mark: Tensor) -> Tensor:
    if isinstance(rows, range):
        return mark.nonzero()[:, 0] + rows.start
    return rows[mark]
