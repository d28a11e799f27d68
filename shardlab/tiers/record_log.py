"""Records of shards on disk as logs: changed rows wait in memory and are written in segments.

`shardlab/log_layout.py` has the layout. A row's newest record is

    waiting in memory   index[row] < 0: at ~index[row]
    in the file         index[row] = place

and a record that is neither is stale. A partition of which a segment's worth of rows waits is
written to one of its free segments, in one request and without a read. When few are free, those
with the fewest records that still count are read, and these records join the rows that wait.
Source: own.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from shardlab.errors import StorageError
from shardlab.log_layout import TAG_BYTES, LogLayout
from shardlab.tiers.disk import Disk
from shardlab.tiers.disk_failures import FileSpec
from shardlab.tiers.disk_tickets import ReadTicket, RecordRequest, WriteTicket
from shardlab.tiers.log_ahead import ReadAhead, RecentWrites
from shardlab.tiers.log_segments import Ints, LogSegments
from shardlab.tiers.record_file import RecordFile

Bytes = NDArray[np.uint8]
_NEVER_WRITTEN = -(2**31)
#: Bytes that writes under way may hold: a disk that cannot keep up slows its caller down.
_MOST_UNDER_WAY = 8 << 20


@dataclass(frozen=True)
class LogSpec:
    """A shard of a log.

    Attributes:
        table: name, for messages.
        layout: shape of its log.
        salt: `FileSpec.salt`.
        path: its file; an older one that nobody uses is replaced.
    """

    table: str
    layout: LogLayout
    salt: int
    path: Path


@dataclass(frozen=True, eq=False)
class _Victim:
    """A segment that is being cleaned; `start` is its first place in the shard's file."""

    segment: int
    part: int
    shard: int
    start: int
    records: Bytes
    ticket: ReadTicket


class RecordLog:
    """Records of one size of some shards, a file each.

    Rows are addressed by keys: `starts[shard] + row`. Used from one thread.

    Args:
        disk: who reads and writes.
        specs: the shards; their layouts have one record size.

    Attributes:
        starts: int64 [shards + 1], key of every shard's row 0.
        files: of the shards.
        record_bytes: of a record and its row.

    Raises:
        StorageError: a folder that is not writable, or a disk too small.
    """

    def __init__(self, disk: Disk, specs: Sequence[LogSpec]) -> None:
        self.disk = disk
        layouts = [spec.layout for spec in specs]
        (self.record_bytes,) = {layout.record_bytes for layout in layouts}
        self.starts = np.concatenate([[0], np.cumsum([layout.rows for layout in layouts])])
        self.segments = LogSegments(layouts)
        self.files = [RecordFile.create(disk, spec.path, FileSpec(
            spec.table, spec.layout.slots, self.record_bytes, spec.salt, in_order=False),
            replace=True) for spec in specs]
        #: By key: place in the file, or ~place in memory.
        self._index = np.full(int(self.starts[-1]), _NEVER_WRITTEN, dtype=np.int32)
        room = sum(layout.waiting_rows for layout in layouts)
        #: Rows that wait, by place: [room, record_bytes], and their key and partition (-1: free).
        self._waiting = np.zeros((room, self.record_bytes), dtype=np.uint8)
        self._waiting_key = np.zeros(room, dtype=np.int64)
        self._waiting_part = np.full(room, -1, dtype=np.int32)
        #: A stack of free places, of which the first `_num_free` count.
        self._free_places = np.arange(room - 1, -1, -1)
        self._num_free = room
        #: Rows that are let in at a time: so many find room whatever waits.
        self._intake = sum(layout.intake_rows for layout in layouts)
        most = max(layout.segment_rows for layout in layouts)
        self._room_for_cleaned = max(self._intake, most)
        #: Rows that wait, by partition.
        self._counts = np.zeros(len(self.segments.free), dtype=np.int64)
        self._victims: list[_Victim] = []
        #: Grows with every write: what was read ahead knows what was written since.
        self._moment = 0
        #: Writes under way with their bytes, oldest first.
        self._writes: deque[tuple[WriteTicket, int]] = deque()
        self._ahead = ReadAhead()
        self._recent = RecentWrites()

    @property
    def memory_bytes(self) -> int:
        """Bytes of the index and of the rows that wait; `LogLayout.memory_bytes` of all shards."""
        return int(self._index.nbytes + self._waiting.nbytes + self._waiting_key.nbytes
                   + self._waiting_part.nbytes + self._free_places.nbytes + self._counts.nbytes
                   + self.segments.memory_bytes)

    def shards_of(self, keys: Ints) -> Ints:
        """Shard of every key."""
        return np.asarray(np.searchsorted(self.starts, keys, side="right") - 1, dtype=np.int64)

    # ------------------------------------------------------------------ read
    def read(self, keys: Ints, out: Bytes) -> None:
        """Newest records of rows.

        Args:
            keys: int64 [n], in any order, with repetitions.
            out: uint8 [n, record_bytes].

        Raises:
            StorageError: a row that was never written, or what `Disk.read` raises.
        """
        places = self._index[keys].astype(np.int64)
        self._refuse_unwritten(keys, places)
        waits = np.flatnonzero(places < 0)
        out[waits] = self._waiting[~places[waits]]
        missing = np.flatnonzero(places >= 0)
        if missing.size and self._ahead:
            missing = missing[~self._ahead.take(keys, places, missing, out, self._unchanged)]
            missing = missing[~self._recent.take(keys, missing, out)]
        if missing.size:
            whole = missing.size == keys.size
            target = out if whole else np.empty((missing.size, self.record_bytes), np.uint8)
            self.disk.read(self._requests(keys[missing], places[missing], target))
            if not whole:
                out[missing] = target
        self._check_rows(keys, out)

    def read_ahead(self, keys: Ints) -> None:
        """Starts reading rows that a later `read` asks for: the batch that comes, or the next."""
        keys = np.unique(keys)
        places = self._index[keys].astype(np.int64)
        wanted = places >= 0
        wanted[wanted] = ~self._ahead.has(keys[wanted], places[wanted], self._unchanged)
        keys, places = keys[wanted], places[wanted]
        records = np.empty((keys.size, self.record_bytes), np.uint8)
        ticket = self.disk.start_read(self._requests(keys, places, records))
        self._ahead.add(keys, places, records, ticket, self._moment)
        self._recent.forget(self._ahead.oldest)

    def settle(self) -> None:
        """Waits for all writes, and forgets what was read ahead.

        Raises:
            StorageError: a write failed.
        """
        self._ahead.clear()
        self._recent.forget(self._moment)
        self._writes.clear()
        self.disk.drain()
        for file in self.files:
            self.disk.check(file)

    def _unchanged(self, keys: Ints, places: Ints, moment: int) -> NDArray[np.bool_]:
        """Whether rows still lie where they lay at a moment, and were not written since."""
        segments = self.segments.of_places(self.shards_of(keys), places)
        return (self._index[keys] == places) & self.segments.written_by(segments, moment)

    def _requests(self, keys: Ints, places: Ints, records: Bytes) -> list[RecordRequest]:
        """Reads of places, in runs of one shard."""
        shards = self.shards_of(keys)
        cuts = np.flatnonzero(np.diff(shards)) + 1
        bounds = [0, *cuts.tolist(), keys.size] if keys.size else []
        return [RecordRequest(self.files[int(shards[a])], torch.from_numpy(places[a:b]),
                              torch.from_numpy(records[a:b]))
                for a, b in pairwise(bounds)]

    def _refuse_unwritten(self, keys: Ints, places: Ints) -> None:
        if places.size and int(places.min()) == _NEVER_WRITTEN:
            key = int(keys[int(places.argmin())])
            shard = int(self.shards_of(np.array([key]))[0])
            file = self.files[shard]
            raise StorageError(f"table {file.spec.table!r}, file {file.path}: read of row "
                               f"{key - int(self.starts[shard])}, which was never written; write "
                               "all rows first")

    def _check_rows(self, keys: Ints, records: Bytes) -> None:
        """Every record says whose it is: what the index says must agree."""
        shards = self.shards_of(keys)
        rows = (keys - self.starts[shards]).astype("<i4")
        found = np.ascontiguousarray(records[:, -TAG_BYTES:]).view("<i4")[:, 0]
        if not np.array_equal(rows, found):
            at = int(np.flatnonzero(rows != found)[0])
            file = self.files[int(shards[at])]
            raise StorageError(f"table {file.spec.table!r}, file {file.path}: read row {rows[at]}, "
                               f"found row {found[at]} in its place: the index in memory or the "
                               "file is damaged; restart from the last checkpoint")

    # ------------------------------------------------------------------ write
    def write(self, keys: Ints, records: Bytes) -> None:
        """Takes new records of rows; reads see them from now on.

        Args:
            keys: int64 [n], no two the same.
            records: uint8 [n, record_bytes]; the rows' numbers are put in here.

        Raises:
            StorageError: an earlier write failed.
        """
        shards = self.shards_of(keys)
        rows = (keys - self.starts[shards]).astype("<i4")
        records[:, -TAG_BYTES:] = rows.view(np.uint8).reshape(-1, TAG_BYTES)
        while done := self._cleaned():
            self._absorb(done)
            self._write_full()
        for start in range(0, keys.size, self._intake):
            part = slice(start, start + self._intake)
            self._insert(keys[part], shards[part], rows[part].astype(np.int64), records[part])
            self._write_full()

    def _insert(self, keys: Ints, shards: Ints, rows: Ints, records: Bytes) -> None:
        """Lets records wait; what they replace is stale."""
        old = self._index[keys].astype(np.int64)
        again = (old < 0) & (old != _NEVER_WRITTEN)
        self._waiting[~old[again]] = records[again]
        filed = old >= 0
        if filed.any():
            self.segments.drop_records(self.segments.of_places(shards[filed], old[filed]))
        new = np.flatnonzero(~again)
        places = self._free_places[self._num_free - new.size:self._num_free]
        self._num_free -= new.size
        parts = self.segments.partitions(shards[new], rows[new])
        self._waiting[places] = records[new]
        self._waiting_key[places], self._waiting_part[places] = keys[new], parts
        self._index[keys[new]] = ~places
        self._counts += np.bincount(parts, minlength=self._counts.size)

    def _write_full(self) -> None:
        """Writes partitions until less than a segment of each waits."""
        while True:
            ready = np.flatnonzero(self._counts >= self.segments.segment_rows)
            if not ready.size:
                return
            able = ready[self.segments.free[ready] > 0]
            if able.size:
                self._write_segments(able)
                self._start_cleaning(able)
            else:
                self._clean_now(int(ready[0]))

    def _write_segments(self, parts: Ints) -> None:
        """Writes what fills segments of these partitions, as far as they have free ones."""
        self._moment += 1
        wanted = np.zeros(self._counts.size + 1, dtype=np.bool_)  # the last one: of free places
        wanted[parts] = True
        places = np.flatnonzero(wanted[self._waiting_part])
        places = places[np.argsort(self._waiting_part[places], kind="stable")]
        first, chosen, filed, ranges = 0, [], [], []
        for part in parts.tolist():
            size, count = int(self.segments.segment_rows[part]), int(self._counts[part])
            for number in range(min(count // size, int(self.segments.free[part]))):
                segment = self.segments.take(part, self._moment)
                shard, start = self.segments.first_place(segment, part)
                chosen.append(places[first + number * size:first + (number + 1) * size])
                filed.append(np.arange(start, start + size))
                ranges.append((shard, range(start, start + size)))
                self._counts[part] -= size
            first += count
        taken = np.concatenate(chosen)
        records, keys = self._waiting[taken], self._waiting_key[taken]
        self._index[keys] = np.concatenate(filed)
        self._waiting_part[taken] = -1
        self._free_places[self._num_free:self._num_free + taken.size] = taken
        self._num_free += taken.size
        requests, at = [], 0
        for shard, span in ranges:
            requests.append(RecordRequest(self.files[shard], span,
                                          torch.from_numpy(records[at:at + len(span)])))
            at += len(span)
        self._start_write(requests, records.nbytes)
        if self._ahead:
            self._recent.add(keys, records, self._moment)

    def _start_write(self, requests: list[RecordRequest], num_bytes: int) -> None:
        """Starts a write, and waits for older ones where their memory adds up."""
        self._writes.append((self.disk.start_write(requests), num_bytes))
        under_way = sum(size for _, size in self._writes)
        while self._writes and (under_way > _MOST_UNDER_WAY or self._writes[0][0].done()):
            ticket, size = self._writes.popleft()
            ticket.wait()
            under_way -= size

    # ------------------------------------------------------------------ cleaning
    def _start_cleaning(self, parts: Ints) -> None:
        """Starts reading segments of partitions that run out of free ones."""
        lacking = (self.segments.wanted_free - self.segments.free
                   - self.segments.cleaning)[parts]
        chosen = [(segment, part) for part, lack in zip(parts.tolist(), lacking.tolist(),
                                                        strict=True) if lack > 0
                  for segment in self.segments.begin_cleaning(part, lack)]
        self._read_victims(chosen)

    def _read_victims(self, chosen: list[tuple[int, int]]) -> None:
        if not chosen:
            return
        requests, found = [], []
        for segment, part in chosen:
            size = int(self.segments.segment_rows[part])
            records = np.empty((size, self.record_bytes), np.uint8)
            shard, start = self.segments.first_place(segment, part)
            places = range(start, start + size)
            requests.append(RecordRequest(self.files[shard], places, torch.from_numpy(records)))
            found.append((segment, part, shard, start, records))
        ticket = self.disk.start_read(requests)
        self._victims += [_Victim(*victim, ticket) for victim in found]

    def _clean_now(self, part: int) -> None:
        if not self.segments.cleaning[part]:
            self._read_victims([(segment, part)
                                for segment in self.segments.begin_cleaning(part, 1)])
        self._absorb([next(victim for victim in self._victims if victim.part == part)])

    def _cleaned(self) -> list[_Victim]:
        """Segments that were read, as many as can be taken at a time."""
        done: list[_Victim] = []
        rows = 0
        for victim in self._victims:
            rows += victim.records.shape[0]
            if rows > self._room_for_cleaned or not victim.ticket.done():
                break
            done.append(victim)
        return done

    def _absorb(self, victims: list[_Victim]) -> None:
        """Lets the live records of segments wait, and frees these."""
        victims[-1].ticket.wait()
        self._victims = [victim for victim in self._victims if victim not in victims]
        records = np.concatenate([victim.records for victim in victims])
        sizes = [victim.records.shape[0] for victim in victims]
        places = np.concatenate([np.arange(victim.start, victim.start + size)
                                 for victim, size in zip(victims, sizes, strict=True)])
        shards = np.repeat([victim.shard for victim in victims], sizes)
        rows = np.ascontiguousarray(records[:, -TAG_BYTES:]).view("<i4")[:, 0].astype(np.int64)
        keys = self.starts[shards] + rows
        live = np.flatnonzero(self._index[keys] == places)
        if live.size:
            self._insert(keys[live], shards[live], rows[live], records[live])
        for victim in victims:
            self.segments.give_back(victim.segment, victim.part)

    @property
    def allocated_bytes(self) -> int:
        """Bytes that the file system holds."""
        return sum(file.allocated_bytes() for file in self.files)
