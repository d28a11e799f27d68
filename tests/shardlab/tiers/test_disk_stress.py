"""Long random histories: submissions that overlap, tickets that linger, threads that race."""

from __future__ import annotations

import shutil
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import Tensor

from shardlab.tiers import Disk, FileSpec, ReadTicket, RecordFile, RecordRequest
from tests.shardlab.tiers.disk_cases import ENGINES, as_index

ROWS = (1, 130, 700)
THREAD_SECONDS = 1.0
LONG_STEPS = 4000


@dataclass
class Held:
    """A read under way: what it must show, and which of its records later writes touched."""

    ticket: ReadTicket
    expected: list[Tensor]
    stale: list[Tensor] = field(default_factory=list)


class History:
    """Random work on three files, each kept a second time in memory."""

    def __init__(self, engine: str, sizes: tuple[int, int, int], checksums: bool,
                 seed: int) -> None:
        self.random = torch.Generator().manual_seed(seed)
        self.folder = Path(tempfile.mkdtemp())
        self.engine, self.depth = engine, 1 + seed % 9
        self.specs = [FileSpec(f"t{i}", rows, size, i, checksums)
                      for i, (rows, size) in enumerate(zip(ROWS, sizes, strict=True))]
        self.truth = [self.bytes(spec.rows, spec.record_bytes) for spec in self.specs]
        self.held: list[Held] = []
        self.open(fresh=True)

    def open(self, fresh: bool) -> None:
        self.disk = Disk(self.engine, queue_depth=self.depth)
        make = RecordFile.create if fresh else RecordFile.open
        self.files = [make(self.disk, self.folder / spec.table, spec) for spec in self.specs]
        if fresh:
            self.disk.start_write([RecordRequest(file, range(len(truth)), truth.clone())
                                   for file, truth in zip(self.files, self.truth, strict=True)])

    def number(self, low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=self.random))

    def bytes(self, *shape: int) -> Tensor:
        return torch.randint(0, 256, shape, generator=self.random, dtype=torch.uint8)

    def rows(self, total: int) -> Tensor | range:
        if self.number(0, 2):
            start = self.number(0, total)
            return range(start, self.number(start, total + 1))
        rows = torch.randint(0, total, (self.number(0, min(total, 60)),), generator=self.random)
        return rows.sort().values if self.number(0, 2) else rows

    def some_files(self) -> list[int]:
        return [i for i in range(3) if self.number(0, 2)]

    def write(self, wait: bool) -> None:
        requests = []
        for i in self.some_files():
            rows = self.rows(len(self.truth[i]))
            records = self.bytes(len(rows), self.specs[i].record_bytes)
            requests.append(RecordRequest(self.files[i], rows, records))
            for entry, row in enumerate(as_index(rows).tolist()):
                self.truth[i][row] = records[entry]
            self.touch(self.files[i], as_index(rows))
        ticket = self.disk.start_write(requests)
        if wait:
            ticket.wait()

    def touch(self, file: RecordFile, rows: Tensor) -> None:
        for held in self.held:
            for request, stale in zip(held.ticket.requests, held.stale, strict=True):
                if request.file is file:
                    stale |= torch.isin(as_index(request.rows), rows)

    def start_read(self) -> None:
        requests, expected = [], []
        for i in self.some_files():
            rows = self.rows(len(self.truth[i]))
            requests.append(RecordRequest(self.files[i], rows,
                                          self.bytes(len(rows), self.specs[i].record_bytes)))
            expected.append(self.truth[i][as_index(rows)].clone())
        held = Held(self.disk.start_read(requests), expected)
        held.stale = [torch.zeros(len(rows), dtype=torch.bool) for rows in expected]
        self.held.append(held)

    def finish_read(self, refresh: bool) -> None:
        held = self.held.pop(self.number(0, len(self.held)))
        held.ticket.wait()
        for request, expected in zip(held.ticket.requests, held.expected, strict=True):
            assert torch.equal(request.records, expected), "not what was written before the read"
        if not refresh:
            for found, expected in zip(held.ticket.take_stale(), held.stale, strict=True):
                assert torch.equal(found, expected)
            return
        assert held.ticket.refresh() == sum(int(stale.sum()) for stale in held.stale)
        for request in held.ticket.requests:
            truth = self.truth[self.files.index(request.file)]
            assert torch.equal(request.records, truth[as_index(request.rows)])

    def reopen(self) -> None:
        while self.held:
            self.finish_read(refresh=True)
        for file in self.files:
            file.sync()
        self.disk.close()
        self.open(fresh=False)

    def check_all(self) -> None:
        for file, truth in zip(self.files, self.truth, strict=True):
            out = torch.zeros_like(truth)
            file.read_records(range(len(truth)), out)
            assert torch.equal(out, truth)

    def close(self) -> None:
        self.disk.close()
        shutil.rmtree(self.folder)


def machine_for(engine: str) -> type[RuleBasedStateMachine]:
    class DiskMachine(RuleBasedStateMachine):
        history: History | None = None

        @initialize(sizes=st.tuples(*[st.sampled_from([1, 68, 1363, 4088, 4089, 9000])] * 3),
                    checksums=st.booleans(), seed=st.integers(0, 2**31))
        def begin(self, sizes: tuple[int, int, int], checksums: bool, seed: int) -> None:
            self.history = History(engine, sizes, checksums, seed)

        @rule(wait=st.booleans())
        def write(self, wait: bool) -> None:
            self.history.write(wait)

        @rule()
        def start_read(self) -> None:
            self.history.start_read()

        @precondition(lambda self: self.history is not None and self.history.held)
        @rule(refresh=st.booleans())
        def finish_read(self, refresh: bool) -> None:
            self.history.finish_read(refresh)

        @rule()
        def check(self) -> None:
            self.history.check_all()

        @rule()
        def reopen(self) -> None:
            self.history.reopen()

        @invariant()
        def sizes_stay(self) -> None:
            if self.history is not None:
                assert [file.rows_written for file in self.history.files] == list(ROWS)

        def teardown(self) -> None:
            if self.history is not None:
                self.history.close()

    return DiskMachine


@pytest.mark.parametrize("engine", ENGINES)
def test_history_matches_memory(engine: str):
    run_state_machine_as_test(machine_for(engine),
                              settings=settings(max_examples=3 if engine == "reference" else 15,
                                                stateful_step_count=30))


@pytest.mark.parametrize("engine", ENGINES[:-1])
@pytest.mark.parametrize("sizes", [(68, 68, 68), (4089, 1363, 1)], ids=str)
def test_long_history_matches_memory(engine: str, sizes: tuple[int, int, int], seed: int):
    history = History(engine, sizes, True, seed)
    for step in range(LONG_STEPS):
        choice = history.number(0, 100)
        if choice < 45:
            history.write(wait=choice < 5)
        elif choice < 75 and len(history.held) < 6:
            history.start_read()
        elif history.held:
            history.finish_read(refresh=choice % 2 == 0)
        if step % 1000 == 999:
            history.check_all()
            history.reopen()
    history.close()


def stamped(rows: Tensor, version: int) -> Tensor:
    """Records of 64 B whose words all hold the version, above the row's number."""
    words = (rows + version * 2**32)[:, None].expand(-1, 8).contiguous()
    return words.view(torch.uint8)


@pytest.mark.parametrize("engine", ENGINES[:-1])
def test_threads_see_whole_records_and_their_own_writes(engine: str, tmp_path: Path):
    """Each thread writes rows of its own, shares every page with the others, and reads all."""
    rows_total, threads = 2000, 3
    errors: list[BaseException] = []
    with Disk(engine, queue_depth=16) as disk:
        file = RecordFile.create(disk, tmp_path / "f", FileSpec("user", rows_total, 64, 1))
        file.write_records(range(rows_total), stamped(torch.arange(rows_total), 0))
        stop = time.monotonic() + THREAD_SECONDS

        def work(number: int) -> None:
            random = torch.Generator().manual_seed(number)
            version, newest = 0, torch.zeros(rows_total, dtype=torch.int64)
            try:
                while time.monotonic() < stop:
                    version += 1
                    mine = torch.randint(0, rows_total // threads, (50,), generator=random)
                    mine = mine * threads + number
                    disk.start_write([RecordRequest(file, mine, stamped(mine, version))])
                    newest[mine] = version
                    rows = torch.randint(0, rows_total, (200,), generator=random)
                    out = torch.empty(200, 64, dtype=torch.uint8)
                    disk.start_read([RecordRequest(file, rows, out)]).wait()
                    words = out.view(torch.int64)
                    assert (words == words[:, :1]).all(), "half of a record"
                    assert torch.equal(words[:, 0] % 2**32, rows), "another row's record"
                    own = rows % threads == number
                    assert torch.equal(words[own, 0] // 2**32, newest[rows[own]])
            except BaseException as error:
                errors.append(error)

        workers = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    assert not errors, errors
