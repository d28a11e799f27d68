"""The home of several shards on disk: logs of records, read ahead while a batch trains."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from shardlab.codecs import table_key
from shardlab.errors import ConfigError, StorageError
from shardlab.log_layout import log_layout
from shardlab.ops.blocks import Blocks
from shardlab.ops.records import MoveEnd, Records
from shardlab.storage.arena import BlockSpec, encoding_of
from shardlab.storage.levels import Clock
from shardlab.tiers import Disk, LogSpec, RecordLog

_WORD = 1 << 64


@dataclass(frozen=True)
class _Batch:
    """Records of one log in a buffer.

    Attributes:
        log: whose.
        keys: int64 [n], rows as the log counts them.
        records: uint8 [n, record bytes], a view of the buffer.
    """

    log: RecordLog
    keys: Tensor
    records: Tensor


class DiskHome:
    """All rows of some shards on disk.

    Attributes:
        numbers: every shard is its own block.
        logs: one for every size of records.
        close: finishes what is under way and deletes the files; runs by itself at the end.

    Args:
        specs: the shards; payload and state of a row lie side by side.
        optimizer: kind of row optimiser.
        folder: where the files go; made if it is missing, and its files of an earlier run replaced.
        clock: for rounding what is written by range.
        disk: who reads and writes.

    Raises:
        ConfigError: a row too long for a disk, or a shard of too many rows.
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
        logs = [self._log_spec(spec, number, folder) for number, spec in enumerate(specs)]
        sizes = np.array([log.layout.record_bytes for log in logs])
        self._record_bytes = torch.from_numpy(sizes)
        self.logs: list[RecordLog] = []
        self._log_of = [0] * len(specs)
        self._key_of = torch.zeros(len(specs), dtype=torch.int64)
        for size in np.unique(sizes):
            members = np.flatnonzero(sizes == size).tolist()
            log = RecordLog(disk, [logs[number] for number in members])
            for inside, number in enumerate(members):
                self._log_of[number] = len(self.logs)
                self._key_of[number] = int(log.starts[inside])
            self.logs.append(log)
        self.close = weakref.finalize(self, _close, disk, self.logs)
        self._writes: list[_Batch] = []

    def _log_spec(self, spec: BlockSpec, number: int, folder: Path) -> LogSpec:
        shard, name = spec.local.shard, spec.local.table.name
        salt = (table_key(name) * 31 + shard.row_start * 7 + shard.col_start) % _WORD
        try:
            layout = log_layout(spec.rows, self._layouts[number].record_bytes)
        except ConfigError as error:
            raise ConfigError(f"table {name!r}: {error}") from None
        return LogSpec(name, layout, salt,
                       folder / f"{name}-{shard.row_start}-{shard.col_start}.rows")

    def _new_end(self, jobs: Tensor, rows: Tensor) -> tuple[MoveEnd, list[_Batch]]:
        """An empty buffer for the records of jobs, and what of it belongs to which log."""
        number, counts = jobs[:, 0], jobs[:, 2]
        log_of = torch.tensor([self._log_of[n] for n in number.tolist()])
        order = torch.sort(log_of, stable=True).indices.tolist()
        offsets, at, batches = [0] * len(order), 0, []
        keys = rows + torch.repeat_interleave(self._key_of[number], counts)
        buffer = torch.empty(int((self._record_bytes[number] * counts).sum()), dtype=torch.uint8)
        for log in sorted(set(log_of.tolist())):
            size, first, pieces = self.logs[log].record_bytes, at, []
            for job in [job for job in order if int(log_of[job]) == log]:
                _, start, count = jobs[job].tolist()
                offsets[job] = at
                pieces.append(keys[start:start + count])
                at += size * count
            batches.append(_Batch(self.logs[log], torch.cat(pieces),
                                  buffer[first:at].view(-1, size)))
        places = torch.cat([torch.arange(count) for count in counts.tolist()])
        return MoveEnd(buffer, self._blocks(offsets, jobs), places), batches

    def _blocks(self, offsets: list[int], jobs: Tensor) -> Blocks:
        """Blocks of a buffer that holds the records of jobs, each from its offset on."""
        table = torch.zeros(len(self.numbers), 6, dtype=torch.int64)
        for offset, (number, _, count) in zip(offsets, jobs.tolist(), strict=True):
            size = int(self._record_bytes[number])
            table[number] = torch.tensor([
                offset, size, offset + self._layouts[number].payload_bytes, size,
                self._columns[number], count])
        return Blocks.build(table, self._encodings)

    # ------------------------------------------------------------------ level
    def source(self, jobs: Tensor, rows: Tensor) -> MoveEnd:
        """Reads records into a buffer: those that were read ahead from there, others now."""
        end, batches = self._new_end(jobs, rows)
        for batch in batches:
            batch.log.read(batch.keys.numpy(), batch.records.numpy())
        return end

    def target(self, jobs: Tensor, rows: Tensor) -> MoveEnd:
        """A buffer that `commit` writes."""
        end, self._writes = self._new_end(jobs, rows)
        return end

    def commit(self) -> None:
        """Takes the buffer's records; reads that follow see them."""
        for batch in self._writes:
            batch.log.write(batch.keys.numpy(), batch.records.numpy())
        self._writes = []

    def prefetch(self, jobs: Tensor, rows: Tensor) -> None:
        """Starts reading rows; a later `source` takes them from memory."""
        keys = rows + torch.repeat_interleave(self._key_of[jobs[:, 0]], jobs[:, 2])
        log_of = torch.tensor(self._log_of)[jobs[:, 0]].repeat_interleave(jobs[:, 2])
        for number, log in enumerate(self.logs):
            mine = keys if len(self.logs) == 1 else keys[log_of == number]
            if mine.numel():
                log.read_ahead(mine.numpy())

    def flush(self) -> None:
        """Waits for all writes, and forgets what was read ahead."""
        for log in self.logs:
            log.settle()

    # ------------------------------------------------------------------ home
    def read_range(self, number: int, first: int, count: int) -> tuple[Tensor, Tensor]:
        """fp32 rows and states of a shard."""
        end = self.source(*_range_job(number, first, count))
        records = Records(end.arena, end.blocks, number, end.places)
        return records.read_rows(), records.read_states()

    def write_range(self, number: int, first: int, rows: Tensor | None,
                    state: Tensor | None) -> None:
        """Encodes fp32 rows, or states, or both, and writes them."""
        value = rows if rows is not None else state
        assert value is not None
        job = _range_job(number, first, value.shape[0])
        whole = rows is not None and state is not None
        end, batches = self._new_end(*job)
        if whole:
            end.arena.zero_()
        else:
            for batch in batches:
                batch.log.read(batch.keys.numpy(), batch.records.numpy())
        records = Records(end.arena, end.blocks, number, end.places)
        words = records.words(self._clock.key(0), job[1] + self._encodings[number].row_start)
        if rows is not None:
            records.write_rows(rows, words)
        if state is not None:
            records.write_states(state, words)
        self._writes = batches
        self.commit()

    @property
    def allocated_bytes(self) -> int:
        """Bytes that the file system holds."""
        return sum(log.allocated_bytes for log in self.logs)

    @property
    def memory_bytes(self) -> int:
        """Bytes of indices and of records that wait to be written."""
        return sum(log.memory_bytes for log in self.logs)


def _range_job(number: int, first: int, count: int) -> tuple[Tensor, Tensor]:
    return torch.tensor([[number, 0, count]]), torch.arange(first, first + count)


def _close(disk: Disk, logs: list[RecordLog]) -> None:
    """Finishes what is under way and deletes the files: checkpoints are what lasts."""
    disk.drain()
    for log in logs:
        for file in log.files:
            file.unlink()
    disk.close()
