"""Batches announced one early: same results, every batch, and rows read from the disk ahead."""

from __future__ import annotations

import pytest
import torch

import shardlab as sl
from shardlab.errors import BoundsError
from shardlab.sharded import simple_plan

ROWS, DIM, BATCH = 400, 8, 16
ON_DISK = {"levels": [{"tier": "ddr", "fraction": 0.05}, {"tier": "ssd"}]}


class _Model(torch.nn.Module):
    def __init__(self, storage) -> None:
        super().__init__()
        self.tables = sl.EmbeddingBagCollection([sl.EmbeddingBagConfig(
            ROWS, DIM, "t", feature_names=("a", "b"), storage=storage)])
        self.out = torch.nn.Linear(2 * DIM, 1)

    def forward(self, features):
        return self.out(self.tables(features).values())


def _sharded(storage, tmp_path):
    torch.manual_seed(0)
    model = _Model(storage)
    return sl.shard(model, simple_plan(list(model.tables.tables), sl.comm.init()),
                    optimizer=sl.optim.Adagrad(lr=0.1), ssd_dir=str(tmp_path))


def _batches(count, fixed, bad=None):
    generator = torch.Generator().manual_seed(1)
    batches = []
    for i in range(count):
        lengths = torch.ones(2 * BATCH, dtype=torch.int64) if fixed else \
            torch.randint(0, 4, (2 * BATCH,), generator=generator)
        ids = torch.randint(0, ROWS, (int(lengths.sum()),), generator=generator)
        if i == bad:
            ids[0] = ROWS
        batches.append(sl.KeyedJaggedTensor(["a", "b"], ids, lengths=None if fixed else lengths,
                                            fixed_length=1 if fixed else None))
    return batches


def _train(loader, model, optimizer):
    losses = []
    for features in loader:
        optimizer.zero_grad()
        loss = model(features).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("fixed", [True, False], ids=["one id a bag", "bags"])
@pytest.mark.parametrize("storage", ["fp32", ON_DISK], ids=["memory", "disk"])
def test_prefetched_training_equals_plain_training(storage, fixed, tmp_path):
    batches = _batches(9, fixed)
    plain = _train(batches, *_sharded("fp32", tmp_path / "a"))
    model, optimizer = _sharded(storage, tmp_path / "b")
    assert _train(sl.prefetching(iter(batches), model), model, optimizer) == plain


def test_rows_of_the_next_batch_are_read_before_it_is_looked_up(tmp_path):
    model, _ = _sharded(ON_DISK, tmp_path)
    (home,) = model.collections()["tables"].storage.chains.disk_homes
    first, second = _batches(2, fixed=False)
    model.collections()["tables"].prefetch(first)
    home.disk.drain()
    reads = home.disk.counters().reads
    assert reads > 0
    with torch.no_grad():
        model(first)
    assert home.disk.counters().reads == reads
    with torch.no_grad():
        model(second)  # not announced
    assert home.disk.counters().reads > reads


@pytest.mark.parametrize("count", [0, 1, 2])
def test_no_batch_is_lost(count, tmp_path):
    model, _ = _sharded("fp32", tmp_path)
    batches = _batches(count, fixed=True)
    assert list(sl.prefetching(batches, model)) == batches


def test_bad_id_of_the_next_batch_is_named(tmp_path):
    model, optimizer = _sharded(ON_DISK, tmp_path)
    with pytest.raises(BoundsError, match="table 't'"):
        _train(sl.prefetching(_batches(3, fixed=False, bad=1), model), model, optimizer)
