"""Checkpoints: complete or absent, refused by name when damaged, loadable on other ranks."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from shardlab.comm import Groups
from shardlab.errors import CheckpointError
from shardlab.specs import ShardingType
from shardlab.train import checkpoint_writer, save_job
from shardlab.train.checkpoint import load, save
from shardlab.train.retention import latest
from tests.harness import run_ranks
from tests.shardlab.train.fakes import FakeCollection, FakeModel, plan_of, table

TABLES = [table("user", 23, 4), table("item", 6, 2)]
KINDS = [ShardingType.ROW_WISE, ShardingType.DATA_PARALLEL]
ALONE = Groups()
EXTRA = {"position": {"step": 7, "data": None}, "window": torch.arange(3.0), "name": "x"}


def build(groups: Groups, zero: bool = False, num_dense: int = 3) -> tuple[FakeModel,
                                                                         torch.optim.Optimizer]:
    """A model and an optimiser that has taken a step (none when ``zero``)."""
    torch.manual_seed(int(zero))
    plan = plan_of(TABLES, KINDS, groups.world_size)
    model = FakeModel(FakeCollection(TABLES, plan, groups.rank, zero), num_dense)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.5 if zero else 0.01)
    if not zero:
        model.linear(torch.ones(2, num_dense)).sum().backward()
        optimizer.step()
    return model, optimizer


def assert_same_state(left: tuple[FakeModel, torch.optim.Optimizer],
                      right: tuple[FakeModel, torch.optim.Optimizer]) -> None:
    for name, tensor in left[0].state_dict().items():
        assert torch.equal(tensor, right[0].state_dict()[name])
    assert str(left[1].state_dict()) == str(right[1].state_dict())
    for name, shards in left[0].collections()["ebc"].held.items():
        for one, other in zip(shards, right[0].collections()["ebc"].held[name], strict=True):
            assert torch.equal(one.weights, other.weights)
            assert torch.equal(one.state, other.state)


def draws() -> tuple[float, float, float]:
    return float(torch.rand(())), float(np.random.rand()), random.random()


def test_everything_comes_back(tmp_path: Path) -> None:
    saved = build(ALONE)
    path = save(tmp_path / "step-7", *saved, ALONE, EXTRA)
    expected = draws()
    loaded = build(ALONE, zero=True)
    extra = load(path, *loaded, ALONE)
    assert draws() == expected
    assert_same_state(saved, loaded)
    assert torch.equal(extra.pop("window"), EXTRA["window"])
    assert extra == {key: value for key, value in EXTRA.items() if key != "window"}
    assert sorted(entry.name for entry in path.iterdir()) == [
        "dense.safetensors", "manifest.json", "rank-00000.json", "rank-00000.safetensors",
        "rows-00000-00000.safetensors", "shared.json", "shared.safetensors"]


def save_ranks(groups: Groups, path: str) -> list[float]:
    model, optimizer = build(groups)
    torch.manual_seed(100 + groups.rank)
    save(path, model, optimizer, groups, EXTRA)
    return torch.rand(2).tolist()


def load_ranks(groups: Groups, path: str) -> list[float]:
    found = build(groups, zero=True)
    assert load(path, *found, groups)["name"] == "x"
    drawn = torch.rand(2).tolist()
    assert_same_state(build(groups), found)
    return drawn


@pytest.mark.parametrize(("saved", "loaded"), [(2, 2), (2, 1), (1, 2)])
def test_other_world_size_loads(tmp_path: Path, saved: int, loaded: int) -> None:
    path = str(tmp_path / "step-1")
    expected = run_ranks(saved, save_ranks, path)
    found = run_ranks(loaded, load_ranks, path)
    common = min(saved, loaded)
    assert found[:common] == expected[:common]  # each rank draws on from its own generator


def test_existing_path_is_never_overwritten(tmp_path: Path) -> None:
    model, optimizer = build(ALONE)
    save(tmp_path / "a", model, optimizer, ALONE)
    with pytest.raises(CheckpointError, match=r"cannot save .*: rank 0: .*/a exists; save under"):
        save(tmp_path / "a", model, optimizer, ALONE)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("good") / "step-7", *build(ALONE), ALONE, EXTRA)


FILES = ["dense.safetensors", "manifest.json", "rank-00000.json", "rank-00000.safetensors",
         "rows-00000-00000.safetensors", "shared.json", "shared.safetensors"]


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def replace_by_foreign_json(path: Path) -> None:
    path.write_text('{"metadata": {"total_size": 1}, "weight_map": {}}')


@pytest.mark.parametrize("damage", [flip_a_bit, truncate, Path.unlink, replace_by_foreign_json],
                         ids=["flipped", "truncated", "missing", "foreign"])
@pytest.mark.parametrize("file", FILES)
def test_damaged_file_is_refused_by_name(good: Path, tmp_path: Path, file: str,
                                         damage: Callable[[Path], None]) -> None:
    path = Path(shutil.copytree(good, tmp_path / "step-7"))
    damage(path / file)
    with pytest.raises(CheckpointError, match=f"cannot load .*{file}"):
        load(path, *build(ALONE), ALONE)


def test_model_that_does_not_fit_is_refused(good: Path) -> None:
    with pytest.raises(CheckpointError, match=r"parameter 'linear\.weight' is \(1, 5\) in the "
                                              r"model, \(1, 3\) in the checkpoint"):
        load(good, *build(ALONE, num_dense=5), ALONE)
    model, _ = build(ALONE)
    split = torch.optim.Adam([{"params": [each]} for each in model.parameters()])
    with pytest.raises(CheckpointError, match="the optimiser state does not fit"):
        load(good, model, split, ALONE)


def test_missing_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="step-9 is not a checkpoint folder"):
        load(tmp_path / "step-9", *build(ALONE), ALONE)


class Crash(BaseException):
    """Ends a save where it stands, as a kill would."""


@pytest.mark.parametrize(("at", "call", "complete"), [
    ("other_chunks", 1, False), ("write_json", 1, False), ("write_tensors", 2, False),
    ("write_json", 3, False), ("write_bytes", 1, False), ("sync_folder", 1, False),
    ("sync_folder", 2, True),
], ids=["tables", "generators", "shared", "part", "manifest", "before_rename", "after_rename"])
def test_crash_while_saving_leaves_a_loadable_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                  at: str, call: int, complete: bool) -> None:
    saved = build(ALONE)
    first, second = (tmp_path / f"step-{step}" for step in (1, 2))
    save(first, *saved, ALONE, EXTRA)
    module = checkpoint_writer if at == "other_chunks" else save_job
    real, calls = getattr(module, at), []

    def crash(*arguments: object) -> object:
        calls.append(arguments)
        if len(calls) == call:
            raise Crash
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(module, at, crash)
        with pytest.raises(Crash):
            save(second, *saved, ALONE, EXTRA)
    newest = latest(tmp_path)
    assert newest == (second if complete else first)
    found = build(ALONE, zero=True)
    load(newest, *found, ALONE)
    assert_same_state(saved, found)
    if not complete:
        save(second, *saved, ALONE, EXTRA)
    assert latest(tmp_path) == second
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-1", "step-2"]


def fail_on_rank_1(groups: Groups, path: str) -> str:
    model, optimizer = build(groups)
    if groups.rank == 1:
        def chunks(_: int) -> None:
            raise OSError(28, "No space left on device")
        model.collections()["ebc"].chunks = chunks
    with pytest.raises(CheckpointError) as caught:
        save(path, model, optimizer, groups)
    return str(caught.value)


def test_failure_of_one_rank_is_told_by_all(tmp_path: Path) -> None:
    path = tmp_path / "step-1"
    texts = run_ranks(2, fail_on_rank_1, str(path))
    assert texts[0] == texts[1]
    assert texts[0].endswith("rank 1: OSError: [Errno 28] No space left on device")
    assert not path.exists()
