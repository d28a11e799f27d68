"""Checkpoints of replica groups: written once, by all copies; loaded into any other layout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import shardlab as sl
from shardlab.comm import Groups
from shardlab.sharded import ShardedModel, row_watch
from shardlab.train import CheckpointReader, CheckpointWriter, SaveOptions, load, save, verify
from tests.harness import run_ranks

ROWS = {"user": 90, "item": 7}
KINDS = ("row_wise", "data_parallel")


class Bare(nn.Module):
    """Two tables and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.ebc = sl.EmbeddingBagCollection([
            sl.EmbeddingBagConfig(name=name, num_embeddings=rows, embedding_dim=8, sharding=kind)
            for (name, rows), kind in zip(ROWS.items(), KINDS, strict=True)])
        self.top = nn.Linear(16, 1)

    def forward(self, features: object) -> Tensor:
        return self.top(self.ebc(features).values())


def build(groups: Groups, replicas: int, sync: int) -> tuple[ShardedModel, torch.optim.Optimizer]:
    model = Bare()
    plan = sl.simple_plan(list(model.ebc.tables), groups, replicas, sync)
    return sl.shard(model, plan, groups=groups, seed=3, optimizer=sl.optim.Adam(lr=0.1))


def step(groups: Groups, model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
    """A step of 12 samples, split evenly over the ranks; odd steps leave the last rank out."""
    generator = torch.Generator().manual_seed(number)
    ids = torch.stack([torch.randint(0, rows, (12,), generator=generator)
                       for rows in ROWS.values()])
    mine = ids.chunk(groups.world_size, 1)[groups.rank]
    if number % 2 and groups.rank == groups.world_size - 1:
        mine = mine[:, :0]
    features = sl.KeyedJaggedTensor([*ROWS], mine.flatten(),
                                    lengths=torch.ones(mine.numel(), dtype=torch.int64))
    optimizer.zero_grad()
    model(features).square().sum().backward()
    optimizer.step()


def state_of(model: ShardedModel) -> dict[str, Tensor]:
    held = {f"{chunk.table}.{chunk.row_start}.{name}": tensor.clone()
            for chunk in model.collections()["ebc"].chunks() for name, tensor in
            {"weights": chunk.weights, **chunk.state}.items()}
    return held | {name: value.clone() for name, value in model.state_dict().items()}


def whole(path: str | Path) -> dict[str, Tensor]:
    """Every table of a checkpoint, and its state."""
    found: dict[str, Tensor] = {}
    for _, chunk in CheckpointReader(path).chunks(lambda _: True):
        for name, part in {"weights": chunk.weights, **chunk.state}.items():
            size = (ROWS[chunk.table], *part.shape[1:])
            table = found.setdefault(f"{chunk.table}.{name}", torch.full(size, torch.nan))
            rows = slice(chunk.row_start, chunk.row_start + len(part))
            assert table[rows].isnan().all(), "written twice"
            table[rows] = part
    assert not any(table.isnan().any() for table in found.values())
    return found


def _train(groups: Groups, folder: str, replicas: int, sync: int) -> dict[str, Tensor]:
    """Five steps, a checkpoint after the second; then as it was resumed from there."""
    row_watch._STRIPE_ELEMENTS = 100  # many chunks
    model, optimizer = build(groups, replicas, sync)
    for number in range(5):
        step(groups, model, optimizer, number)
        if number == 1:
            save(f"{folder}/two", model, optimizer, groups)
    expected = state_of(model)
    again, optimizer = build(groups, replicas, sync)
    load(f"{folder}/two", again, optimizer, groups)
    for number in range(2, 5):
        step(groups, again, optimizer, number)
    found = state_of(again)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    return expected


@pytest.mark.parametrize("sync", [1, 3])
def test_resumed_run_ends_with_the_same_bits(sync: int, tmp_path: Path) -> None:
    run_ranks(4, _train, str(tmp_path), 2, sync)
    writers = {entry.file.split("-")[1] for entry in CheckpointReader(tmp_path / "two")
               .manifest.chunks if entry.table == "user"}
    assert writers == {"00000", "00001", "00002", "00003"}
    whole(tmp_path / "two")


def _move(groups: Groups, source: str, target: str, replicas: int, sync: int) -> None:
    model, optimizer = build(groups, replicas, sync)
    load(source, model, optimizer, groups)
    save(target, model, optimizer, groups)


def test_checkpoint_goes_into_any_layout_and_back(tmp_path: Path) -> None:
    run_ranks(4, _train, str(tmp_path), 2, 1)
    layouts = [(2, 1, 1), (1, 1, 1), (4, 4, 2), (2, 2, 1), (4, 1, 1), (4, 2, 1)]
    source = tmp_path / "two"
    expected = whole(source)
    for number, (world, replicas, sync) in enumerate(layouts):
        target = tmp_path / f"moved-{number}"
        run_ranks(world, _move, str(source), str(target), replicas, sync)
        verify(target)
        found = whole(target)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        source = target


def _save_behind(groups: Groups, folder: str, sync: int) -> None:
    """Full and incremental checkpoints behind training; rank 0 keeps what they must hold."""
    row_watch._STRIPE_ELEMENTS = 100
    model, optimizer = build(groups, 2, sync)
    with CheckpointWriter(model, optimizer, groups,
                          SaveOptions(background=True, incremental=True)) as writer:
        for number in range(6):
            step(groups, model, optimizer, number)
            if number % 2 == 1:
                writer.save(f"{folder}/step-{number}")
                save(f"{folder}/whole-{number}", model, optimizer, groups)
        writer.finish()


@pytest.mark.parametrize("sync", [1, 5])
def test_incremental_checkpoints_behind_training(sync: int, tmp_path: Path) -> None:
    run_ranks(4, _save_behind, str(tmp_path), sync)
    for number in (1, 3, 5):
        found, expected = (whole(tmp_path / f"{kind}-{number}") for kind in ("step", "whole"))
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    bases = [CheckpointReader(tmp_path / f"step-{number}").manifest.base for number in (1, 3, 5)]
    assert bases[0] is None
    assert bases[1] is not None
