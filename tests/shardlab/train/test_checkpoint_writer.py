"""Real sharded tables, saved behind training and incrementally: the moment of the save comes back.

Every test compares with chunks that were copied when the save began: whatever steps change while
the writer runs, a checkpoint holds that moment.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import shardlab as sl
from shardlab.comm import Groups
from shardlab.errors import CheckpointError
from shardlab.plan import ShardingPlan
from shardlab.sharded import row_watch
from shardlab.sharded.clock import PhaseClock
from shardlab.specs import EmbeddingBagConfig, ShardingType
from shardlab.storage import TableChunk
from shardlab.table_plan import build_table_plan
from shardlab.train import (
    CheckpointWriter,
    SaveOptions,
    compact,
    load,
    save_job,
    tensor_file,
    verify,
)
from shardlab.train import checkpoint_writer as module
from shardlab.train.checkpoint_reader import CheckpointReader
from shardlab.train.manifest import CHANGED, PRESENT
from shardlab.train.table_files import NamedChunk, other_chunks
from shardlab.train.watchdog import Watchdog
from tests.harness import run_ranks

ROWS = 300
STORAGES = {"fp32": "fp32", "int8": "int8", "cached": {"levels": [{"fraction": 0.2},
                                                                 {"dtype": "fp16"}]},
            "disk": {"levels": [{"tier": "ddr", "fraction": 0.2}, {"tier": "ssd"}]}}
TRAIN = {"kind": "tensor_train", "rank": 3, "row_factors": [4, 5, 6], "column_factors": [2, 2, 2]}
PRUNED = {"kind": "pruned", "budget": {"ratio": 0.6}, "chunks": 2, "period": 2, "warmup": 0}
SIZES = {"user": ROWS, "item": 40, "word": 120, "old": 4000, "hour": 24}
#: All kinds on a rank.
MIXED = {"old": PRUNED, "user": STORAGES["cached"], "word": {**TRAIN, "cache_fraction": 0.1},
         "item": "int8", "hour": "fp32"}


def storages_of(storage: object) -> dict[str, object]:
    """Storages by table: as given, or two tables of one."""
    mixed = isinstance(storage, dict) and not storage.keys().isdisjoint(SIZES)
    return storage if mixed else {"user": storage, "item": storage}


class Bare(nn.Module):
    """Tables and a linear layer."""

    def __init__(self, storages: dict[str, object]) -> None:
        super().__init__()
        self.ebc = sl.EmbeddingBagCollection([
            EmbeddingBagConfig(name=name, num_embeddings=SIZES[name], embedding_dim=8,
                               storage=storage) for name, storage in storages.items()])
        self.top = nn.Linear(8 * len(storages), 1)

    def forward(self, features: object) -> Tensor:
        return self.top(self.ebc(features).values())


@dataclass
class Run:
    """A model, its optimiser, and batches of ids that follow from the step."""

    groups: Groups
    folder: str
    storage: object = "fp32"
    kind: ShardingType = ShardingType.ROW_WISE
    seen: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        torch.manual_seed(1)
        model = Bare(storages_of(self.storage))
        world = self.groups.world_size
        plan = ShardingPlan(world, tuple(
            build_table_plan(table, self.kind, range(world)) for table in model.ebc.tables))
        self.model, self.optimizer = sl.shard(
            model, plan, groups=self.groups, seed=3, optimizer=sl.optim.RowWiseAdagrad(lr=0.1),
            ssd_dir=f"{self.folder}/ssd-{world}")

    def step(self, number: int, ids: int = 12, top: int = ROWS) -> None:
        generator = torch.Generator().manual_seed(100 * number + self.groups.rank)
        names = list(storages_of(self.storage))
        values = [torch.randint(0, min(SIZES[name], top), (ids,), generator=generator)
                  for name in names]
        features = sl.KeyedJaggedTensor(
            names, torch.cat(values), lengths=torch.ones(len(names) * ids, dtype=torch.int64))
        self.optimizer.zero_grad()
        self.model(features).square().sum().backward()
        self.optimizer.step()

    def tables(self) -> dict[str, Tensor]:
        return chunks_of(self.model.collections()["ebc"].chunks())


def chunks_of(chunks: Iterator[TableChunk]) -> dict[str, Tensor]:
    return {f"{chunk.table}.{chunk.row_start}.{chunk.col_start}.{name}": tensor.clone()
            for chunk in chunks for name, tensor in
            {"weights": chunk.weights, **chunk.state, **chunk.extra}.items()}


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name


def loaded(path: Path, groups: Groups, run: Run) -> dict[str, Tensor]:
    """This rank's tables after loading into a fresh model of the same kind."""
    fresh = Run(groups, f"{run.folder}/fresh", run.storage, run.kind)
    fresh.step(99)
    load(path, fresh.model, fresh.optimizer, groups)
    return fresh.tables()


def hold_writer(monkeypatch: pytest.MonkeyPatch) -> tuple[threading.Event, threading.Event]:
    """The writer stops before its second stripe, until the second event is set."""
    reached, go = threading.Event(), threading.Event()
    real = row_watch.Snapshot._read

    def read(self: row_watch.Snapshot, block: int, stripe: int) -> object:
        if (block, stripe) != (0, 0):
            reached.set()
            assert go.wait(60)
        return real(self, block, stripe)

    monkeypatch.setattr(row_watch.Snapshot, "_read", read)
    return reached, go


@pytest.mark.parametrize("storage", [*STORAGES.values(), MIXED], ids=[*STORAGES, "mixed"])
def test_steps_during_a_save_do_not_get_into_it(tmp_path: Path, storage: object,
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_watch, "_STRIPE_ELEMENTS", 9 * 50)
    run = Run(Groups(), str(tmp_path), storage)
    for number in range(3):
        run.step(number)
    before = run.tables()
    reached, go = hold_writer(monkeypatch)
    writer = CheckpointWriter(run.model, run.optimizer, Groups(), SaveOptions(background=True))
    path = writer.save(tmp_path / "step-3")
    assert reached.wait(60)
    for number in range(3, 9):
        run.step(number)
    assert not path.exists()
    go.set()
    writer.finish()
    assert not run.model.collections()["ebc"].updater.watches
    monkeypatch.undo()
    assert_same(before, loaded(path, Groups(), run))
    assert not any(torch.equal(before[name], tensor) for name, tensor in run.tables().items()
                   if name.startswith(("user", "item")))


@pytest.mark.parametrize("storage", [*STORAGES.values(), MIXED], ids=[*STORAGES, "mixed"])
@pytest.mark.parametrize("background", [False, True], ids=["at_once", "behind"])
def test_incremental_saves_and_their_compaction_hold_their_moment(
        tmp_path: Path, storage: object, background: bool) -> None:
    run = Run(Groups(), str(tmp_path), storage)
    writer = CheckpointWriter(run.model, run.optimizer, Groups(),
                              SaveOptions(background, incremental=True, full_every=3, keep=9))
    moments = {}
    for number in range(6):
        run.step(number, top=80)
        moments[writer.save(tmp_path / f"step-{number}")] = run.tables()
    writer.finish()
    bases = [CheckpointReader(path).base for path in moments]
    assert [base and base.path.name for base in bases] == [
        None, "step-0", "step-0", None, "step-3", "step-3"]
    for path, expected in moments.items():
        assert_same(expected, loaded(path, Groups(), run))
        verify(path)
        compact(path)
        assert CheckpointReader(path).base is None
        assert_same(expected, loaded(path, Groups(), run))


def test_incremental_size_follows_the_rows_that_changed(tmp_path: Path) -> None:
    run = Run(Groups(), str(tmp_path))
    writer = CheckpointWriter(run.model, run.optimizer, Groups(), SaveOptions(incremental=True))
    writer.save(tmp_path / "step-0")
    run.step(1, ids=1)
    path = writer.save(tmp_path / "step-1")
    held = sum(chunk.weights.shape[0] for name, chunk in CheckpointReader(path).chunks(
        lambda entry: entry.holds == CHANGED))
    entries = [entry for entry in CheckpointReader(path).manifest.chunks if entry.holds == CHANGED]
    assert [(entry.table, entry.rows) for entry in entries] == [("user", 1), ("item", 1)]
    assert held == 0  # readers are given rows of the base with the changed ones laid over
    for number in range(2, 40):
        run.step(number, ids=40)
    assert CheckpointReader(writer.save(tmp_path / "step-2")).base is None  # most rows changed


def test_a_step_waits_where_the_buffer_of_kept_rows_is_full(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_watch, "_STRIPE_ELEMENTS", 9 * 50)
    monkeypatch.setattr(module, "_buffer_bytes", lambda _: 100)
    run = Run(Groups(), str(tmp_path))
    before = run.tables()
    reached, go = hold_writer(monkeypatch)
    writer = CheckpointWriter(run.model, run.optimizer, Groups(), SaveOptions(background=True))
    path = writer.save(tmp_path / "step-0")
    assert reached.wait(60)
    threading.Timer(0.2, go.set).start()
    run.step(1, ids=60)
    assert go.is_set()
    writer.finish()
    assert writer.stalled_s > 0.1
    monkeypatch.undo()
    assert_same(before, loaded(path, Groups(), run))


def test_failure_behind_is_told_by_the_next_call(tmp_path: Path,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(Groups(), str(tmp_path))
    writer = CheckpointWriter(run.model, run.optimizer, Groups(),
                              SaveOptions(background=True, incremental=True))
    writer.save(tmp_path / "step-0")
    writer.finish()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(save_job, "write_tensors", full)
        writer.save(tmp_path / "step-1")
        run.step(1)
        with pytest.raises(CheckpointError, match=r"cannot save .*step-1: rank 0: OSError.*No spa"):
            writer.finish()
    assert not (tmp_path / "step-1").exists()
    path = writer.save(tmp_path / "step-2")
    writer.finish()
    assert CheckpointReader(path).base is None  # what the failed one had marked is not trusted


def save_and_load(groups: Groups, folder: str, kind: ShardingType) -> None:
    run = Run(groups, folder, kind=kind)
    writer = CheckpointWriter(run.model, run.optimizer, groups,
                              SaveOptions(background=True, incremental=True, keep=1))
    moments = []
    for number in range(3):
        run.step(number, top=60)
        moments.append(run.tables())
        path = writer.save(Path(folder) / f"step-{number}")
        run.step(50 + number, top=60)
    writer.finish()
    assert_same(moments[-1], loaded(path, groups, run))
    if groups.rank == 0:
        assert sorted(entry.name for entry in Path(folder).glob("step-*")) == ["step-0", "step-2"]


@pytest.mark.parametrize("kind", [ShardingType.ROW_WISE, ShardingType.COLUMN_WISE,
                                  ShardingType.DATA_PARALLEL])
def test_ranks_save_behind_and_load(tmp_path: Path, kind: ShardingType) -> None:
    run_ranks(2, save_and_load, str(tmp_path), kind)


def fail_behind(groups: Groups, folder: str) -> str:
    run = Run(groups, folder)
    writer = CheckpointWriter(run.model, run.optimizer, groups, SaveOptions(background=True))
    real: Callable[..., object] = save_job.write_tensors

    def full(*arguments: object) -> object:
        if groups.rank == 1:
            raise OSError(28, "No space left on device")
        return real(*arguments)

    save_job.write_tensors = full
    try:
        writer.save(Path(folder) / "step-0")
        with pytest.raises(CheckpointError) as caught:
            writer.finish()
    finally:
        save_job.write_tensors = real
    return str(caught.value)


def test_failure_of_one_rank_is_told_by_all(tmp_path: Path) -> None:
    texts = run_ranks(2, fail_behind, str(tmp_path))
    assert texts[0] == texts[1]
    assert texts[0].endswith("rank 1: OSError: [Errno 28] No space left on device")
    assert not (tmp_path / "step-0").exists()


def save_pair(groups: Groups, folder: str) -> None:
    run = Run(groups, folder)
    writer = CheckpointWriter(run.model, run.optimizer, groups, SaveOptions(incremental=True))
    for number in range(2):
        run.step(number, top=60)
        writer.save(Path(folder) / f"step-{number}")


@pytest.mark.parametrize("damage", ["flipped", "truncated"])
def test_damage_anywhere_is_refused_by_file(tmp_path: Path, damage: str) -> None:
    """50 random places of a checkpoint of two ranks and of what it builds on."""
    run_ranks(2, save_pair, str(tmp_path))
    run = Run(Groups(), str(tmp_path))
    own = sorted((tmp_path / "step-1").iterdir())
    below = [path for path in (tmp_path / "step-0").iterdir() if path.name.startswith(
        ("rows", "manifest"))]
    assert len(own) == 10
    places = random.Random(5)
    for number in range(50):
        path = (own + below)[number % len(own + below)]
        whole = path.read_bytes()
        place = places.randrange(len(whole))
        damaged = bytearray(whole)
        damaged[place] ^= 1 << places.randrange(8)
        path.write_bytes(damaged if damage == "flipped" else whole[:place])
        with pytest.raises(CheckpointError, match=f"cannot load .*{path.name}"):
            load(tmp_path / "step-1", run.model, run.optimizer, Groups())
        path.write_bytes(whole)
    load(tmp_path / "step-1", run.model, run.optimizer, Groups())


def test_incremental_saves_of_all_kinds_hold_changed_rows_but_whole_trains(tmp_path: Path) -> None:
    run = Run(Groups(), str(tmp_path), MIXED)
    writer = CheckpointWriter(run.model, run.optimizer, Groups(), SaveOptions(incremental=True))
    writer.save(tmp_path / "step-0")
    run.step(1, ids=2)
    path = writer.save(tmp_path / "step-1")
    held = {entry.table: entry.holds for entry in CheckpointReader(path).manifest.chunks}
    assert held == {"user": CHANGED, "item": CHANGED, "hour": CHANGED, "word": PRESENT,
                    "old": CHANGED}


def test_tables_that_are_not_kept_as_rows_are_saved_whole(tmp_path: Path) -> None:
    run = Run(Groups(), str(tmp_path), {"user": {**TRAIN, "row_factors": [5, 6, 10]},
                                        "word": TRAIN})
    writer = CheckpointWriter(run.model, run.optimizer, Groups(), SaveOptions(True, True))
    for number in range(3):
        run.step(number)
        expected = run.tables()
        path = writer.save(tmp_path / f"step-{number}")
        run.step(50 + number)
        writer.finish()
        assert CheckpointReader(path).base is None
        assert_same(expected, loaded(path, Groups(), run))


@pytest.mark.parametrize("fit", [0, 1, 2])
def test_what_finds_no_room_is_written_before_training_goes_on(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fit: int) -> None:
    run = Run(Groups(), str(tmp_path), {"word": TRAIN,
                                        "user": {**TRAIN, "row_factors": [5, 6, 10]}})
    run.step(0)
    before = run.tables()
    sizes = [named.num_bytes for named in other_chunks("ebc", run.model.collections()["ebc"])]
    assert len(sizes) == 2
    monkeypatch.setattr(module, "_buffer_bytes", lambda _: 2 * sum(sizes[:fit]))
    copied: list[NamedChunk] = []
    real = NamedChunk.copy
    monkeypatch.setattr(NamedChunk, "copy", lambda named: (copied.append(named), real(named))[1])
    writer = CheckpointWriter(run.model, run.optimizer, Groups(), SaveOptions(background=True))
    path = writer.save(tmp_path / "step-0")
    run.step(1)
    writer.finish()
    assert len(copied) == fit
    assert_same(before, loaded(path, Groups(), run))


def save_mixed(groups: Groups, folder: str, kind: ShardingType) -> dict[str, Tensor]:
    run = Run(groups, folder, MIXED, kind)
    writer = CheckpointWriter(run.model, run.optimizer, groups, SaveOptions(True, True))
    for number in range(2):
        run.step(number, top=60)
        expected = run.tables()
        path = writer.save(Path(folder) / f"step-{number}")
        run.step(50 + number, top=60)
    writer.finish()
    assert_same(expected, loaded(path, groups, run))
    return {}


def logical(groups: Groups, folder: str, kind: ShardingType) -> dict[str, Tensor]:
    """Whole tables of the last checkpoint as other ranks see them: row by row, with state."""
    run = Run(groups, f"{folder}/{groups.world_size}", MIXED, kind)
    load(Path(folder) / "step-1", run.model, run.optimizer, groups)
    cells = {}
    for chunk in run.model.collections()["ebc"].chunks():
        for part in chunk.dense(64):
            for i, (row, sums) in enumerate(zip(part.weights, part.state.get(
                    "sum", torch.zeros(part.weights.shape[0])), strict=True)):
                cells[f"{part.table} {part.row_start + i} {part.col_start}"] = \
                    torch.cat([row, sums[None]])
    return cells


def test_all_kinds_of_two_ranks_load_on_one(tmp_path: Path) -> None:
    run_ranks(2, save_mixed, str(tmp_path), ShardingType.ROW_WISE)
    two = run_ranks(2, logical, str(tmp_path), ShardingType.ROW_WISE)
    one, = run_ranks(1, logical, str(tmp_path), ShardingType.TABLE_WISE)
    whole = {name: cell for ranks in two for name, cell in ranks.items()}
    assert whole.keys() == one.keys()
    for name, cell in whole.items():
        torch.testing.assert_close(cell, one[name], rtol=0, atol=1e-6, msg=name)


def save_slowly(groups: Groups, folder: str, slow_rank: int,
                file_s: list[float]) -> tuple[float, list[str]]:
    """Seconds of a save on this rank, and what a watchdog of a second said, where the first files
    of one rank take so long."""
    module._TICK_S = 0.1
    delays = iter(file_s)
    if groups.rank == slow_rank:
        tensor_file.os = SimpleNamespace(fsync=lambda _: time.sleep(next(delays, 0.0)),
                                         open=os.open, close=os.close, O_RDONLY=os.O_RDONLY)
    run, seen = Run(groups, folder), []
    with Watchdog(PhaseClock(), groups, 1.0, seen.append) as dog:
        writer = CheckpointWriter(run.model, run.optimizer, groups, on_progress=dog.beat)
        dog.beat("checkpoint step-0")
        started = time.monotonic()
        try:
            writer.save(Path(folder) / "step-0")
        finally:
            tensor_file.os = os
    return time.monotonic() - started, [str(error) for error in seen]


def test_a_slow_checkpoint_of_one_rank_is_no_stall(tmp_path: Path) -> None:
    for seconds, said in run_ranks(2, save_slowly, str(tmp_path), 1, [0.7] * 3):
        assert seconds > 2
        assert not said


def test_a_checkpoint_without_progress_is_a_stall(tmp_path: Path) -> None:
    (_, said), = run_ranks(1, save_slowly, str(tmp_path), 0, [2.0])
    assert "no progress for 1 s" in said[0]
    assert "rank 0 is at checkpoint step-0, which rank 0 writes, 0 MB so far" in said[0]
