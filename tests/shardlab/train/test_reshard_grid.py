"""Any ranks, sharding type and storage to any other: outputs and optimiser state are equal.

45 checkpoints ({1, 2, 4} ranks x 5 sharding types x 3 storages), each loaded on {1, 2, 4} ranks
with another sharding type and another storage.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import shardlab as sl
from shardlab.comm import Groups
from shardlab.plan import ShardingPlan
from shardlab.specs import EmbeddingBagConfig, ShardingType
from shardlab.table_plan import build_table_plan
from shardlab.train import CheckpointReader, load, save
from tests.harness import run_ranks

KINDS = (ShardingType.TABLE_WISE, ShardingType.ROW_WISE, ShardingType.COLUMN_WISE,
         ShardingType.TABLE_ROW_WISE, ShardingType.DATA_PARALLEL)
#: All hold fp32, so that equal means equal. int8 has a scale per row of a shard, so
#: that its rows would change by a rounding where columns are cut anew.
STORAGES = ("fp32", {"levels": [{"fraction": 0.2}, {"dtype": "fp32"}]},
            {"levels": [{"tier": "ddr", "fraction": 0.3}, {"tier": "ssd"}]})
SIZES = {"user": 37, "item": 8}
WORLDS = (1, 2, 4)
IDS = torch.tensor([0, 36, 5, 7, 7, 20, 0, 7, 3, 3, 1, 2])


class Bare(nn.Module):
    """Two tables."""

    def __init__(self, storage: object) -> None:
        super().__init__()
        self.ebc = sl.EmbeddingBagCollection([
            EmbeddingBagConfig(name=name, num_embeddings=rows, embedding_dim=8, storage=storage)
            for name, rows in SIZES.items()])

    def forward(self, features: object) -> Tensor:
        return self.ebc(features).values()


def build(groups: Groups, kind: ShardingType, storage: object,
          folder: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = Bare(storage)
    ranks = range(groups.world_size)
    plan = ShardingPlan(groups.world_size, tuple(
        build_table_plan(table, kind, [number % groups.world_size]
                         if kind is ShardingType.TABLE_WISE else ranks)
        for number, table in enumerate(model.ebc.tables)))
    return sl.shard(model, plan, groups=groups, seed=3, optimizer=sl.optim.Adam(lr=0.1),
                    ssd_dir=f"{folder}/ssd")


def batch() -> sl.KeyedJaggedTensor:
    return sl.KeyedJaggedTensor(["user", "item"], IDS, lengths=torch.ones(12, dtype=torch.int64))


def save_all(groups: Groups, folder: str) -> None:
    for number, (kind, storage) in enumerate(product(KINDS, STORAGES)):
        model, optimizer = build(groups, kind, storage, folder)
        for _ in range(2):
            optimizer.zero_grad()
            model(batch()).square().sum().backward()
            optimizer.step()
        with torch.no_grad():
            outputs = model(batch())
        save(f"{folder}/{groups.world_size}-{number}", model, optimizer, groups,
             {"outputs": outputs})
        model.collections()["ebc"].storage.close()


def whole_tables(path: str) -> dict[str, Tensor]:
    """Every table and its state, put together from the checkpoint's chunks."""
    reader, found = CheckpointReader(path), {}
    for table in reader.tables:
        for chunk in reader.table_chunks(table):
            for name, value in {"weights": chunk.weights, **chunk.state}.items():
                whole = found.setdefault(f"{table.name}.{name}",
                                         torch.full((table.rows, table.columns), torch.nan))
                whole[chunk.row_start:chunk.row_start + len(value),
                      chunk.col_start:chunk.col_start + value.shape[1]] = value
    return found


def load_all(groups: Groups, folder: str) -> int:
    checked = 0
    for shift, world in enumerate(WORLDS):
        for number, _ in enumerate(product(KINDS, STORAGES)):
            path = f"{folder}/{world}-{number}"
            other = KINDS[(number // 3 + 1 + shift) % len(KINDS)]
            model, optimizer = build(groups, other, STORAGES[(number + 1) % 3], folder)
            extra = load(path, model, optimizer, groups)
            with torch.no_grad():
                assert torch.equal(model(batch()), extra["outputs"]), path
            expected = whole_tables(path)
            for chunk in model.collections()["ebc"].chunks():
                for name, value in {"weights": chunk.weights, **chunk.state}.items():
                    part = expected[f"{chunk.table}.{name}"][
                        chunk.row_start:chunk.row_start + len(value),
                        chunk.col_start:chunk.col_start + value.shape[1]]
                    assert torch.equal(value, part), (path, chunk.table, name)
            model.collections()["ebc"].storage.close()
            checked += 1
    return checked


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("grid")
    for world in WORLDS:
        run_ranks(world, save_all, str(folder))
    return folder


@pytest.mark.parametrize("world", WORLDS)
def test_every_checkpoint_loads_on(saved: Path, world: int) -> None:
    assert run_ranks(world, load_all, str(saved)) == [45] * world
