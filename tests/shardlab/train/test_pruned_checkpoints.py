"""Checkpoints of pruned tables, written while they train and by change: the moment comes back.

A gate lets the writer read one piece of rows at a time, so that admissions, evictions, decisions
and compactions of slabs happen between the save and the reading of rows.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import shardlab as sl
from shardlab.comm import Groups
from shardlab.inspection.scan import read_rows
from shardlab.plan import ShardingPlan
from shardlab.sharded.pruning import pruned_part
from shardlab.specs import EmbeddingBagConfig, ShardingType
from shardlab.storage import chunk_snapshot
from shardlab.storage.chunk_snapshot import ChunkSnapshot
from shardlab.storage.pruned import PrunedStorage
from shardlab.table_plan import build_table_plan
from shardlab.train import CheckpointWriter, SaveOptions, compact, load, verify
from shardlab.train import checkpoint_writer as module
from shardlab.train.checkpoint_reader import CheckpointReader
from tests.harness import run_ranks

ROWS = (12_000, 60, 4000)
PATIENCE_S = 30


def pruned(**options: object) -> dict[str, object]:
    return {"kind": "pruned", "budget": {"ratio": 0.25}, "period": 5, "warmup": 0, **options}


KINDS = {"K1": (pruned(chunks=1), "fp32", pruned(chunks=1)),
         "K4": (pruned(chunks=4), "fp32", pruned(chunks=2)),
         "fp16": (pruned(chunks=2, dtype="fp16"), "fp16", pruned(chunks=2)),
         "dense": (pruned(chunks=4, start="dense", ramp=30), "fp32", pruned(chunks=4)),
         "shared": (pruned(chunks=4, absent="shared"), "fp32",
                    pruned(chunks=1, absent="shared", normalize="together")),
         "units": (pruned(chunks=2, normalize=False, gamma=0.9), "fp32", "fp32"),
         # Utilities decay without a decision, too: 0.2^5 < 2^-10.
         "stale": (pruned(chunks=1, gamma=0.2), "fp32", pruned(chunks=2, gamma=0.2))}


class Bare(nn.Module):
    """Tables and a linear layer."""

    def __init__(self, storages: tuple[object, ...], rows: tuple[int | str, ...]) -> None:
        super().__init__()
        self.ebc = sl.EmbeddingBagCollection([
            EmbeddingBagConfig(count, 8, f"t{i}", storage=storage)
            for i, (count, storage) in enumerate(zip(rows, storages, strict=True))])
        self.top = nn.Linear(8 * len(rows), 1)

    def forward(self, features: object) -> Tensor:
        return self.top(self.ebc(features).values())


class Run:
    """A model whose batches follow from the step; what is popular moves on."""

    def __init__(self, groups: Groups, storages: tuple[object, ...],
                 kind: ShardingType = ShardingType.TABLE_WISE,
                 rows: tuple[int | str, ...] = ROWS) -> None:
        self.groups, self.storages, self.kind, self.rows = groups, storages, kind, rows
        torch.manual_seed(1)
        model = Bare(storages, rows)
        world = groups.world_size
        plan = ShardingPlan(world, tuple(
            build_table_plan(table, kind, range(world) if kind is not ShardingType.TABLE_WISE
                             else [i % world]) for i, table in enumerate(model.ebc.tables)))
        self.model, self.optimizer = sl.shard(model, plan, groups=groups, seed=3,
                                              optimizer=sl.optim.RowWiseAdagrad(lr=0.1))

    @property
    def storage(self) -> PrunedStorage:
        found = pruned_part(self.model.collections()["ebc"].storage)
        assert found is not None
        return found

    def step(self, number: int, size: int = 250) -> Tensor:
        generator = torch.Generator().manual_seed(100 * number + self.groups.rank)
        values = []
        for rows in self.rows:
            count = rows if isinstance(rows, int) else 1 << 40
            skewed = (torch.rand(size, generator=generator).double() ** 3 * count).long()
            values.append((skewed + 37 * number) % count)
        features = sl.KeyedJaggedTensor([f"t{i}" for i in range(len(values))], torch.cat(values),
                                        fixed_length=1)
        self.optimizer.zero_grad()
        out = self.model(features)
        (out - 1).square().sum().backward()
        self.optimizer.step()
        return out.detach()

    def steps(self, first: int, count: int, size: int = 250) -> list[Tensor]:
        return [self.step(number, size) for number in range(first, first + count)]

    def tables(self) -> dict[str, Tensor]:
        return {f"{chunk.table}.{chunk.row_start}.{chunk.col_start}.{name}": tensor.clone()
                for chunk in self.model.collections()["ebc"].chunks() for name, tensor in
                {"weights": chunk.weights, **chunk.state, **chunk.extra}.items()}

    def writer(self, **options: object) -> CheckpointWriter:
        return CheckpointWriter(self.model, self.optimizer, self.groups,
                                SaveOptions(background=True, **options))

    def loaded(self, path: Path) -> Run:
        """A run of the same kind that did something else, and loads a checkpoint."""
        fresh = Run(self.groups, self.storages, self.kind, self.rows)
        fresh.step(777)
        load(path, fresh.model, fresh.optimizer, self.groups)
        return fresh


class Gate:
    """Lets the writer through, a reading at a time."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._allowed, self._waiting, self.is_open = 0, False, False

    def enter(self) -> None:
        with self._changed:
            self._waiting = True
            self._changed.notify_all()
            assert self._changed.wait_for(lambda: self._allowed or self.is_open, PATIENCE_S)
            self._allowed -= 1
            self._waiting = False

    def allow(self, count: int, done: threading.Event) -> None:
        """Until the writer has read ``count`` pieces more, or is done."""
        for _ in range(count):
            with self._changed:
                while not self._waiting and not done.is_set():
                    self._changed.wait(0.01)
                self._allowed, self._waiting = 1, False
                self._changed.notify_all()

    def open(self) -> None:
        with self._changed:
            self.is_open = True
            self._changed.notify_all()


@contextmanager
def gated() -> Iterator[Gate]:
    """Small pieces, each behind a gate."""
    gate, real = Gate(), ChunkSnapshot._read
    sizes = {"_STRIPE_ELEMENTS": 9 * 256, "_READ_ELEMENTS": 9 * 64, "_LISTED_ROWS": 300}

    def read(self: ChunkSnapshot, *arguments: object) -> object:
        gate.enter()
        return real(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        for name, size in sizes.items():
            patch.setattr(chunk_snapshot, name, size)
        patch.setattr(ChunkSnapshot, "_read", read)
        yield gate
        gate.open()


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name


@pytest.mark.parametrize(("kind", "face", "size"), [
    *((kind, "native", 250) for kind in KINDS), ("K4", "reference", 12)])
def test_training_beside_the_writer_does_not_get_into_a_checkpoint(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, face: str, size: int) -> None:
    if face == "reference":
        monkeypatch.setenv("SHARDLAB_FACE", "reference")
    run = Run(Groups(), KINDS[kind])
    run.steps(0, 23, size)
    before, had = run.tables(), (run.storage.evicted.clone(), run.storage.admitted.clone())
    with gated() as gate:
        writer = run.writer()
        path = writer.save(tmp_path / "step-23")
        done = writer._job.written
        after = []
        for number in range(23, 41):
            gate.allow(1, done)
            after.append(run.step(number, size))
        assert not done.is_set() or face == "reference"
        assert face == "reference" or (run.storage.evicted > had[0]).any()
        assert (run.storage.admitted > had[1]).any()
        gate.open()
        writer.finish()
    assert run.storage.watch._snapshot is None
    resumed = run.loaded(path)
    assert_same(before, resumed.tables())
    assert all(map(torch.equal, resumed.steps(23, 18, size), after))
    assert resumed.storage.tier_bytes() == run.storage.tier_bytes()
    for store in range(len(run.storage.stores)):
        assert resumed.storage.index.numbers(store) == run.storage.index.numbers(store)


@pytest.mark.parametrize(("kind", "seed"), [*((kind, 0) for kind in KINDS), ("K4", 1),
                                            ("dense", 1)])
def test_any_history_of_saves_comes_back(tmp_path: Path, kind: str, seed: int) -> None:
    """Full and incremental saves at random, steps while the writer is held at random."""
    generator = torch.Generator().manual_seed(seed)

    def draw(most: int) -> int:
        return int(torch.randint(most, (1,), generator=generator))

    run, moments, number = Run(Groups(), KINDS[kind]), {}, 12
    writer = run.writer(incremental=True, full_every=4, keep=99)
    run.steps(0, number)
    for _ in range(7):
        with gated() as gate:
            run.steps(number, more := draw(8), 60)
            number += more
            expected = run.tables()
            path = writer.save(tmp_path / f"step-{len(moments)}")
            later = []
            for _ in range(draw(7)):
                gate.allow(draw(12), writer._job.written)
                later.append((number, run.step(number, 60)))
                number += 1
            moments[path] = expected, later
            gate.open()
            writer.finish()
    bases = [CheckpointReader(path).base for path in moments]
    assert sum(base is not None for base in bases) >= 3
    for path, (expected, later) in moments.items():
        verify(path)
        resumed = run.loaded(path)
        assert_same(expected, resumed.tables())
        for step, out in later:
            assert torch.equal(resumed.step(step, 60), out)
        compact(path)
        assert CheckpointReader(path).base is None
        assert_same(expected, run.loaded(path).tables())


def save_on_rank(groups: Groups, folder: str, kind: ShardingType) -> int:
    run = Run(groups, KINDS["shared"], kind)
    run.steps(0, 12)
    writer, number = run.writer(incremental=True, keep=9), 12
    for save in range(3):
        with gated() as gate:
            expected = run.tables()
            path = writer.save(Path(folder) / f"step-{save}")
            after = []
            for more in range(6):
                gate.allow(2, writer._job.written)
                after.append(run.step(number + more, 20))
            gate.open()
            writer.finish()
        resumed = run.loaded(path)
        assert_same(expected, resumed.tables())
        assert all(map(torch.equal, resumed.steps(number, 6, 20), after))
        number += 6
    return sum(run.storage.evicted.tolist())


@pytest.mark.parametrize("kind", [ShardingType.ROW_WISE, ShardingType.COLUMN_WISE])
def test_ranks_save_behind_and_by_change(tmp_path: Path, kind: ShardingType) -> None:
    assert all(run_ranks(2, save_on_rank, str(tmp_path), kind))
    assert any(CheckpointReader(tmp_path / f"step-{save}").base is not None for save in (1, 2))


def test_a_small_buffer_makes_steps_and_decisions_wait(tmp_path: Path,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_buffer_bytes", lambda _: 64)
    run = Run(Groups(), KINDS["K4"])
    run.steps(0, 23)
    before = run.tables()
    with gated() as gate:
        writer = run.writer()
        path = writer.save(tmp_path / "step-23")
        opener = threading.Timer(0.3, gate.open)
        opener.start()
        started = time.monotonic()
        run.steps(23, 4)  # step 25 decides
        assert time.monotonic() - started > 0.2
        writer.finish()
        opener.join()
    assert writer.stalled_s > 0.2
    assert_same(before, run.loaded(path).tables())


def test_a_writer_that_fails_keeps_nothing_and_nobody_waits(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_buffer_bytes", lambda _: 64)
    run = Run(Groups(), KINDS["K1"])
    run.steps(0, 8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ChunkSnapshot, "_read", lambda *_: 1 // 0)
        writer = run.writer(incremental=True)
        writer.save(tmp_path / "step-8")
        run.steps(8, 8)
        with pytest.raises(sl.errors.CheckpointError, match="rank 0: ZeroDivisionError"):
            writer.finish()
    path = writer.save(tmp_path / "step-16")
    writer.finish()
    assert CheckpointReader(path).base is None
    assert_same(run.tables(), run.loaded(path).tables())


def test_another_save_in_between_makes_the_next_one_full(tmp_path: Path) -> None:
    run = Run(Groups(), KINDS["K1"])
    writer = run.writer(incremental=True)
    for number in range(3):
        run.steps(4 * number, 4, 250 if not number else 20)
        expected = run.tables()
        path = writer.save(tmp_path / f"step-{number}")
        writer.finish()
        assert (CheckpointReader(path).base is None) == (number in (0, 2))
        assert_same(expected, run.loaded(path).tables())
        if number == 1:
            sl.save(tmp_path / "mine", run.model, run.optimizer, Groups())
            run.step(99)


def table_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.glob("rows-*"))


def test_incremental_size_follows_the_rows_that_changed(tmp_path: Path) -> None:
    run = Run(Groups(), (pruned(chunks=1, budget={"ratio": 0.5}, period=10),), rows=(60_000,))
    for number in range(29):
        run.step(number, size=3000)
    writer = run.writer(incremental=True, full_every=99)
    path = writer.save(tmp_path / "step-0")
    writer.finish()
    full = table_bytes(path)
    sizes, marked = [], []
    for number in range(29, 33):  # decisions take place, and change all utilities
        run.step(number, size=20)
        changed = writer._changed["ebc"].count()
        path = writer.save(tmp_path / f"step-{number}")
        writer.finish()
        assert CheckpointReader(path).base is not None
        sizes.append(table_bytes(path))
        marked.append(changed)
        assert_same(run.tables(), run.loaded(path).tables())
    assert run.storage.since[0] == 30
    assert sizes == sorted(sizes)
    assert sizes[-1] < 0.1 * full
    assert marked[-1] <= 4 * 20 * 3
    row = (sizes[-1] - sizes[0]) / (marked[-1] - marked[0])
    assert row < 3 * 46  # weights, state, utility, number


def test_unbounded_tables_are_kept_and_saved_by_change(tmp_path: Path) -> None:
    storage = pruned(chunks=1, budget={"bytes": "200KB"})
    run = Run(Groups(), (storage, "fp32"), rows=("unbounded", 60))
    run.steps(0, 15)
    writer, number = run.writer(incremental=True, full_every=4, keep=9), 15
    for save in range(6):
        with gated() as gate:
            expected = run.tables()
            path = writer.save(tmp_path / f"step-{save}")
            after = []
            for more in range(4):
                gate.allow(3, writer._job.written)
                after.append(run.step(number + more, 60))
            gate.open()
            writer.finish()
        assert (CheckpointReader(path).base is None) == (save in (0, 4))
        resumed = run.loaded(path)
        assert_same(expected, resumed.tables())
        assert all(map(torch.equal, resumed.steps(number, 4, 60), after))
        number += 4
    assert run.storage.evicted.sum() > 0


@pytest.mark.parametrize("kind", ["K4", "shared"])
def test_chains_load_into_other_storages_and_shards(tmp_path: Path, kind: str) -> None:
    run = Run(Groups(), KINDS[kind])
    run.steps(0, 12)
    writer = run.writer(incremental=True)
    writer.save(tmp_path / "step-12")
    run.steps(12, 5, 40)
    path = writer.save(tmp_path / "step-14")
    writer.finish()
    reader = CheckpointReader(path)
    assert reader.base is not None
    whole = {table.name: torch.full((table.rows, table.columns), torch.nan)
             for table in reader.tables}
    for chunk in run.model.collections()["ebc"].chunks():
        for part in chunk.dense(50):
            whole[chunk.table][part.row_start:part.row_start + part.num_rows] = part.weights
    for storages in [("fp32", "fp32", "fp32"),
                     tuple(pruned(chunks=2, budget={"ratio": 1.0}) for _ in ROWS)]:
        other = Run(Groups(), storages)
        load(path, other.model, other.optimizer, Groups())
        for chunk in other.model.collections()["ebc"].chunks():
            for part in chunk.dense(50):
                rows = slice(part.row_start, part.row_start + part.num_rows)
                assert torch.equal(part.weights, whole[chunk.table][rows])
    rows = [0, 5, 11_999]
    for row, found in zip(rows, read_rows(reader, reader.table("t0"), rows), strict=True):
        assert torch.equal(torch.tensor(found.weights), whole["t0"][row])
