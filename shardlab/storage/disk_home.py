"""The home of several shards on disk: a record file each, read ahead while a batch trains."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from shardlab.codecs import table_key
from shardlab.errors import StorageError
from shardlab.ops.blocks import Blocks
from shardlab.ops.moves import MoveEnd
from shardlab.ops.records import Records
from shardlab.storage.arena import BlockSpec, encoding_of
from shardlab.storage.levels import Clock
from shardlab.tiers import Disk, FileSpec, ReadTicket, RecordFile, RecordRequest

_WORD = 1 << 64


@dataclass
class _Ahead:
    """Records that were asked for ahead, by shard; rows ascend."""

    rows: dict[int, Tensor]
    records: dict[int, Tensor]
    ticket: ReadTicket


class DiskHome:
    """All rows of some shards on disk.

    Attributes:
        numbers: every shard is its own block.
        files: a file per shard.
        close: finishes what is under way and deletes the files; runs by itself at the end.

    Args:
        specs: the shards; payload and state of a row lie side by side.
        optimizer: kind of row optimiser.
        folder: where the files go; made if it is missing, and its files of an earlier run replaced.
        clock: for rounding what is written by range.
        disk: who reads and writes.

    Raises:
        StorageError: the folder is not writable, or the disk too small.
    """

    def __init__(self, specs: Sequence[BlockSpec], optimizer: str, folder: Path, clock: Clock,
                 disk: Disk) -> None:
        self.numbers = list(range(len(specs)))
        self.disk, self._clock = disk, clock
        self._encodings = [encoding_of(spec.local, spec.level, optimizer) for spec in specs]
        self._layouts = [spec.layout(optimizer) for spec in specs]
        self._columns = [spec.local.shard.columns for spec in specs]
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"table {specs[0].local.table.name!r}: cannot make the folder "
                               f"{folder} for its rows: {error.strerror}; give another ssd_dir "
                               "that this user can write to") from None
        self.files = [self._create(spec, number, folder) for number, spec in enumerate(specs)]
        self.close = weakref.finalize(self, _close, disk, self.files)
        #: Read ahead and perhaps not used yet: the batch that comes, and the one behind it.
        self._ahead: deque[_Ahead] = deque(maxlen=2)
        self._writes: list[RecordRequest] = []

    def _create(self, spec: BlockSpec, number: int, folder: Path) -> RecordFile:
        shard, name = spec.local.shard, spec.local.table.name
        salt = (table_key(name) * 31 + shard.row_start * 7 + shard.col_start) % _WORD
        path = folder / f"{name}-{shard.row_start}-{shard.col_start}.rows"
        record = self._layouts[number].record_bytes
        return RecordFile.create(self.disk, path, FileSpec(name, spec.rows, record, salt),
                                 replace=True)

    def _blocks(self, offsets: Tensor, counts: Tensor, numbers: Tensor) -> Blocks:
        """Blocks of a buffer that holds ``counts`` records of shards, from ``offsets`` on."""
        table = torch.zeros(len(self.numbers), 6, dtype=torch.int64)
        for offset, count, number in zip(offsets.tolist(), counts.tolist(), numbers.tolist(),
                                         strict=True):
            layout = self._layouts[number]
            table[number] = torch.tensor([
                offset, layout.record_bytes, offset + layout.payload_bytes, layout.record_bytes,
                self._columns[number], count])
        return Blocks.build(table, self._encodings)

    def _new_end(self, jobs: Tensor) -> tuple[MoveEnd, list[Tensor]]:
        """An empty buffer for jobs, and each job's records in it."""
        sizes = torch.tensor([layout.record_bytes for layout in self._layouts])
        lengths = sizes[jobs[:, 0]] * jobs[:, 2]
        offsets = lengths.cumsum(0) - lengths
        buffer = torch.empty(int(lengths.sum()), dtype=torch.uint8)
        parts = [buffer[offset:offset + length].view(count, -1) for offset, length, count in zip(
            offsets.tolist(), lengths.tolist(), jobs[:, 2].tolist(), strict=True)]
        places = torch.cat([torch.arange(count) for count in jobs[:, 2].tolist()])
        return MoveEnd(buffer, self._blocks(offsets, jobs[:, 2], jobs[:, 0]), places), parts

    # ------------------------------------------------------------------ level
    def source(self, jobs: Tensor, rows: Tensor) -> MoveEnd:
        """Reads records into a buffer: those that were read ahead from there, others now."""
        end, parts = self._new_end(jobs)
        for ahead in self._ahead:
            ahead.ticket.wait()
            ahead.ticket.refresh()
        requests, late = [], []
        for (number, start, count), part in zip(jobs.tolist(), parts, strict=True):
            wanted = rows[start:start + count]
            missing = self._take_ahead(number, wanted, part)
            records = part if missing is None else torch.empty(
                (missing.numel(), part.shape[1]), dtype=torch.uint8)
            if missing is not None:
                late.append((part, missing, records))
                wanted = wanted[missing]
            requests.append(RecordRequest(self.files[number], wanted, records))
        self.disk.read([request for request in requests if request.records.shape[0]])
        for part, missing, records in late:
            part[missing] = records
        return end

    def _take_ahead(self, number: int, wanted: Tensor, part: Tensor) -> Tensor | None:
        """Copies what was read ahead; returns positions that were not, None when nothing was."""
        missing = torch.ones(wanted.numel(), dtype=torch.bool)
        for ahead in self._ahead:
            if number not in ahead.rows:
                continue
            rows = ahead.rows[number]
            at = torch.searchsorted(rows, wanted).clamp(max=rows.numel() - 1)
            found = (rows[at] == wanted) & missing
            part[found] = ahead.records[number][at[found]]
            missing &= ~found
        return None if bool(missing.all()) else missing.nonzero()[:, 0]

    def target(self, jobs: Tensor, rows: Tensor) -> MoveEnd:
        """A buffer that `commit` writes."""
        end, parts = self._new_end(jobs)
        self._writes = [RecordRequest(self.files[number], rows[start:start + count], part)
                        for (number, start, count), part in zip(jobs.tolist(), parts, strict=True)]
        return end

    def commit(self) -> None:
        """Starts writing the buffer; reads that follow see it."""
        self.disk.start_write(self._writes)
        self._writes = []

    def prefetch(self, jobs: Tensor, rows: Tensor) -> None:
        """Starts reading rows; a later `source` takes them from memory."""
        ahead_rows, ahead_records, requests = {}, {}, []
        for number, start, count in jobs.tolist():
            unique = torch.unique(rows[start:start + count])
            records = torch.empty((unique.numel(), self._layouts[number].record_bytes),
                                  dtype=torch.uint8)
            ahead_rows[number], ahead_records[number] = unique, records
            requests.append(RecordRequest(self.files[number], unique, records))
        self._ahead.append(_Ahead(ahead_rows, ahead_records, self.disk.start_read(requests)))

    def flush(self) -> None:
        """Waits for all writes, and forgets what was read ahead."""
        self._ahead.clear()
        self.disk.drain()

    # ------------------------------------------------------------------ home
    def read_range(self, number: int, first: int, count: int) -> tuple[Tensor, Tensor]:
        """fp32 rows and states of a shard."""
        jobs = torch.tensor([[number, 0, count]])
        end, (part,) = self._new_end(jobs)
        self.disk.read([RecordRequest(self.files[number], range(first, first + count), part)])
        records = Records(end.arena, end.blocks, number, end.places)
        return records.read_rows(), records.read_states()

    def write_range(self, number: int, first: int, rows: Tensor | None,
                    state: Tensor | None) -> None:
        """Encodes fp32 rows, or states, or both, and writes them."""
        value = rows if rows is not None else state
        assert value is not None
        count = value.shape[0]
        span = range(first, first + count)
        end, (part,) = self._new_end(torch.tensor([[number, 0, count]]))
        file = self.files[number]
        if first < file.rows_written:
            self.disk.read([RecordRequest(file, span, part)])
        else:
            part.zero_()
        records = Records(end.arena, end.blocks, number, end.places)
        words = records.words(self._clock.key(0), torch.arange(first, first + count)
                              + self._encodings[number].row_start)
        if rows is not None:
            records.write_rows(rows, words)
        if state is not None:
            records.write_states(state, words)
        self.disk.write([RecordRequest(file, span, part)])

    @property
    def allocated_bytes(self) -> int:
        """Bytes that the file system holds."""
        return sum(file.allocated_bytes() for file in self.files)


def _close(disk: Disk, files: list[RecordFile]) -> None:
    """Finishes what is under way and deletes the files: checkpoints are what lasts."""
    disk.drain()
    for file in files:
        file.unlink()
    disk.close()
