"""A file of fixed-size records on the SSD tier: its header, allocation, lock and life.

`shardlab/pages.py` has the layout. Page 0 is the header: JSON, padded with zeros, and a checksum
without salt, so that a file with another salt can be told from a damaged one.
"""

from __future__ import annotations

import errno
import fcntl
import json
import mmap
import os
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
from torch import Tensor

from shardlab.errors import StorageError
from shardlab.pages import PAGE_BYTES, PAYLOAD_BYTES, file_bytes
from shardlab.tiers.disk import Disk
from shardlab.tiers.disk_failures import FileSpec, system_reason
from shardlab.tiers.disk_tickets import RecordRequest
from shardlab.tiers.page_checksum import page_checksums

_FORMAT = "shardlab record file 1"
_MODE = 0o644


class RecordFile:
    """Fixed-size records in a file, all of its bytes allocated when it is created.

    Use `create` or `open`. Files are working memory of a job: after a crash a file may hold a
    mixture of old and new records, each of them whole, and what counts is the checkpoint.

    Attributes:
        path: where.
        spec: what it holds.
        number: the file on its disk.
        direct: whether the page cache is bypassed.
    """

    def __init__(self, disk: Disk, path: str, spec: FileSpec, fd: int, direct: bool) -> None:
        self.disk, self.path, self.spec, self.direct = disk, path, spec, direct
        self._fd = fd
        self._closed = False
        self.number = -1

    @classmethod
    def create(cls, disk: Disk, path: str | os.PathLike[str], spec: FileSpec,
               replace: bool = False) -> RecordFile:
        """Makes a file with room for all rows, and none of them written yet.

        Args:
            disk: who reads and writes it.
            path: in a directory that exists.
            spec: what it will hold.
            replace: whether a record file that is there, and that nobody uses, is discarded.

        Raises:
            StorageError: path not writable or taken, or not enough space for all of it.
        """
        path = os.fspath(path)
        num_bytes = file_bytes(spec.rows, spec.record_bytes)
        where = f"table {spec.table!r}, file {path}"
        if replace and os.path.exists(path):
            _discard(path, where)
        fd = _open_fd(path, where, os.O_CREAT | os.O_EXCL)
        try:
            _lock(fd, where)
            _allocate(fd, num_bytes, where)
            file = cls(disk, path, spec, fd, _set_direct(fd, disk.direct, where))
            file._write_header(0)
        except BaseException:
            os.close(fd)
            os.unlink(path)
            raise
        file._register(0 if spec.in_order else spec.rows)
        return file

    @classmethod
    def open(cls, disk: Disk, path: str | os.PathLike[str], spec: FileSpec) -> RecordFile:
        """Opens a file that was created, written and synced before.

        Raises:
            StorageError: no such file, in use, damaged, truncated, or with another spec or salt.
        """
        path = os.fspath(path)
        where = f"table {spec.table!r}, file {path}"
        fd = _open_fd(path, where, 0)
        try:
            _lock(fd, where)
            found = _read_header(fd, where)
            written = int(found.pop("rows_written"))
            wrong = [f"{key} {found.get(key)!r} (expected {value!r})"
                     for key, value in asdict(spec).items() if found.get(key) != value]
            if wrong:
                raise StorageError(f"{where}: holds something else: {', '.join(wrong)}; give the "
                                   "right file, or delete this one")
            size, expected = os.fstat(fd).st_size, file_bytes(spec.rows, spec.record_bytes)
            if size != expected:
                raise StorageError(f"{where}: has {size:,} bytes, expected {expected:,}: it was "
                                   "truncated; delete it and restart from the last checkpoint")
            file = cls(disk, path, spec, fd, _set_direct(fd, disk.direct, where))
        except BaseException:
            os.close(fd)
            raise
        file._register(written)
        return file

    def _register(self, written: int) -> None:
        spec = self.spec
        self.number = self.disk.device.add_file(self._fd, spec.rows, spec.record_bytes, spec.salt,
                                                spec.checksums, written)
        self.disk.files[self.number] = self

    def read_records(self, rows: Tensor | range, out: Tensor) -> None:
        """Reads records; `RecordRequest` says which rows and which memory."""
        self.disk.read([RecordRequest(self, rows, out)])

    def write_records(self, rows: Tensor | range, records: Tensor) -> None:
        """Writes records; a range may go on where the rows written so far end."""
        self.disk.write([RecordRequest(self, rows, records)])

    @property
    def rows_written(self) -> int:
        """How many rows, from the first on, have been given."""
        return int(self.disk.device.rows_written(self.number))

    def allocated_bytes(self) -> int:
        """Bytes that the file system holds for this file.

        They equal `pages.file_bytes`, except where the file lies in so many pieces that the file
        system needs blocks to list them (ext4: a block for every 340 pieces beyond the first four).
        """
        block = 512  # the unit of st_blocks, whatever the file system's own (stat(2))
        return os.fstat(self._fd).st_blocks * block

    def sync(self) -> None:
        """Waits for all writes and makes them survive a power cut; only then can `open` follow.

        Raises:
            StorageError: a write failed, or the device cannot keep what it took.
        """
        self.disk.drain()
        self.disk.check(self)
        where = f"table {self.spec.table!r}, file {self.path}"
        try:
            self._write_header(self.rows_written)
            os.fdatasync(self._fd)
        except OSError as error:
            raise StorageError(f"{where}: sync failed: {system_reason(error.errno)}") from None

    def describe(self) -> str:
        """How this file is read and written, in a line."""
        how = "direct I/O" if self.direct else "through the page cache"
        checks = "checksums" if self.spec.checksums else "no checksums"
        return f"{self.path}: {self.disk.device.engine_name()}, {how}, {checks}"

    def close(self) -> None:
        """Waits for what is under way and closes the file; what was not synced cannot be opened."""
        if self._closed:
            return
        self._closed = True
        self.disk.drain()
        self.disk.device.remove_file(self.number)
        del self.disk.files[self.number]
        os.close(self._fd)

    def unlink(self) -> None:
        """Closes and deletes the file; it may be gone already."""
        self.close()
        if os.path.exists(self.path):
            os.unlink(self.path)

    def __enter__(self) -> RecordFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _write_header(self, rows_written: int) -> None:
        fields = {"format": _FORMAT, **asdict(self.spec), "rows_written": rows_written}
        text = json.dumps(fields).encode()
        if len(text) > PAYLOAD_BYTES:
            raise StorageError(f"table {self.spec.table!r}: the name is too long for a file header")
        page = np.zeros((1, PAGE_BYTES), np.uint8)
        page[0, :len(text)] = np.frombuffer(text, np.uint8)
        page[0, PAYLOAD_BYTES:] = page_checksums(page, np.zeros(1, np.uint64), 0).view(np.uint8)
        _with_page(lambda buffer: (buffer.write(page.tobytes()), os.pwrite(self._fd, buffer, 0)))


def _with_page(use: Callable[[mmap.mmap], Any]) -> bytes:
    """Runs ``use`` on a page of memory that direct I/O can reach; returns its bytes."""
    with mmap.mmap(-1, PAGE_BYTES) as buffer:
        use(buffer)
        return buffer[:]


def _open_fd(path: str, where: str, flags: int) -> int:
    try:
        return os.open(path, flags | os.O_RDWR | os.O_CLOEXEC, _MODE)
    except OSError as error:
        raise StorageError(f"{where}: cannot open: {system_reason(error.errno)}") from None


def _allocate(fd: int, num_bytes: int, where: str) -> None:
    """Takes all blocks now: a full disk is found here, not in the middle of a job."""
    disk = os.fstatvfs(fd)
    free = disk.f_bavail * disk.f_frsize
    try:
        if free < num_bytes:  # filling the disk to find that out would hurt everybody on it
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.posix_fallocate(fd, 0, num_bytes)
    except OSError as error:
        raise StorageError(f"{where}: {num_bytes:,} bytes asked for, {free:,} free: "
                           f"{system_reason(error.errno)}") from None


def _set_direct(fd: int, wanted: bool | None, where: str) -> bool:
    """Takes the file around the page cache, if that is wanted and the file system can."""
    if wanted is False:
        return False
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_DIRECT)
    except OSError as error:
        if wanted or error.errno != errno.EINVAL:
            raise StorageError(f"{where}: direct I/O asked for, the file system refuses it "
                               f"({error.strerror}); leave direct unset, or put the SSD "
                               "tier on a disk") from None
        return False
    return True


def _lock(fd: int, where: str) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise StorageError(f"{where}: in use by another job or rank ({error.strerror}); "
                           "give every rank a file of its own") from None


def _read_header(fd: int, where: str) -> dict[str, Any]:
    raw = _with_page(lambda buffer: os.preadv(fd, [buffer], 0))
    page = np.frombuffer(raw, np.uint8)[None]
    if page_checksums(page, np.zeros(1, np.uint64), 0).tobytes() != raw[PAYLOAD_BYTES:]:
        raise StorageError(f"{where}: is no record file, or its first page is damaged; give the "
                           "right file, or delete this one")
    fields: dict[str, Any] = json.loads(raw[:PAYLOAD_BYTES].rstrip(b"\0"))
    if fields.pop("format") != _FORMAT:
        raise StorageError(f"{where}: was written by another version; delete it")
    return fields


def _discard(path: str, where: str) -> None:
    """Deletes a record file that nobody uses, and nothing else."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise StorageError(f"{where}: cannot open: {system_reason(error.errno)}") from None
    try:
        _lock(fd, where)
        _read_header(fd, where)
        os.unlink(path)
    finally:
        os.close(fd)
