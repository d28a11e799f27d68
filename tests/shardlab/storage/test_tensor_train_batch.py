"""All tensor trains of a rank at once: equal to a storage for each, bit for bit."""

from __future__ import annotations

import pytest
import torch

from shardlab.ops.unique import Segments, unique_segments
from shardlab.specs import EmbeddingBagConfig, ShardingType
from shardlab.storage import LocalShard, StorageOptions, build_storage
from shardlab.storage.tensor_train_init import MIDDLE_PACE, lr_multiples
from shardlab.storage_bytes import OPTIMIZER_STATE, tier_bytes
from shardlab.table_plan import build_table_plan
from tests.shardlab.storage.test_tensor_train import CPU, step_of

#: Ranks, cores, dtypes, starts, learning rates and caches that differ.
CHANGES = [{"rank": 6}, {"rank": 9, "init": "gaussian"}, {"rank": 4, "cores": 2, "lr_scale": 0.5},
           {"rank": 5, "dtype": "bf16"}, {"rank": 6, "cache_fraction": 0.02,
                                          "cache_warmup_steps": 2}, {"rank": 3, "cores": 4}]


def build_tables():
    return [EmbeddingBagConfig(num_embeddings=500, embedding_dim=8, name=f"t{number}",
                               storage={"kind": "tensor_train", **changes})
            for number, changes in enumerate(CHANGES)]


def storage_of(tables, optimizer):
    shards = []
    for table in tables:
        plan = build_table_plan(table, ShardingType.TABLE_WISE, [0])
        shards.append(LocalShard(table, plan.shards[0], plan.storage, plan.replicated))
    return build_storage(shards, StorageOptions(optimizer, 1, CPU))


def step(storage, ids, grads, number):
    """A read and an update; ``ids`` by table, with repetitions. The rows that were read."""
    chunks, at = [], 0
    for block, one in enumerate(ids):
        chunks.append([block, at, len(one), 8 * at, 8])
        at += len(one)
    limits = torch.full((len(ids),), 500)
    uniques = unique_segments(torch.cat(ids), torch.tensor(chunks),
                              Segments(limits, torch.zeros(len(ids), dtype=torch.int64)))
    out = torch.empty(8 * at)
    storage.begin_step(number)
    storage.read_scattered(uniques, None, out)
    storage.update(uniques, None, grads, step_of(storage.optimizer, clip_value=1.5))
    return out


@pytest.mark.parametrize("optimizer", list(OPTIMIZER_STATE))
def test_tables_together_equal_each_alone(optimizer):
    tables, generator = build_tables(), torch.Generator().manual_seed(0)
    together, alone = storage_of(tables, optimizer), [storage_of([table], optimizer)
                                                      for table in tables]
    for number in range(1, 6):
        ids = [torch.randint(40, (0 if (number + t) % 4 == 0 else 25,), generator=generator)
               for t in range(len(tables))]
        grads = [torch.randn(8 * len(one), generator=generator) for one in ids]
        rows = step(together, ids, torch.cat(grads), number)
        wanted = [step(storage, [one], part, number)
                  for storage, one, part in zip(alone, ids, grads, strict=True)]
        assert torch.equal(rows, torch.cat(wanted)), number
    assert together.trains[4].hot.hits > 0
    for train, storage in zip(together.trains, alone, strict=True):
        for core in range(len(train.cores.shape.row_factors)):
            assert torch.equal(train.cores.read_core(core), storage.trains[0].cores.read_core(core))
    held = sum(memory.data.numel() for memory in together.memories)
    hot = together.trains[4].hot.held_bytes
    assert held + hot == sum(tier_bytes(local.storage, 500, 8, optimizer).total
                             for local in together.shards) == together.tier_bytes().total


def test_a_step_on_an_isometric_train_is_that_of_a_row():
    """SGD moves the row of an id as a plain table would, and rows of its slices little."""
    table = EmbeddingBagConfig(num_embeddings=100_000, embedding_dim=16, name="t",
                               storage={"kind": "tensor_train", "rank": 32})
    storage = storage_of([table], "sgd")
    train = storage.trains[0]
    middle, last = train.cores.shape.row_factors[1:]
    ids = torch.tensor([7 * middle * last + 5 * last + 3])
    same_slice = 5 * last + torch.arange(4) * middle * last + torch.tensor([11, 13, 17, 19])
    other = torch.sort(torch.cat([same_slice, ids])).values
    before = train.core_rows(other).clone()
    grads = torch.randn(1, 16, generator=torch.Generator().manual_seed(0))
    chunks = torch.tensor([[0, 0, 1, 0, 16]])
    uniques = unique_segments(ids, chunks, Segments(torch.tensor([100_000]), torch.tensor([0])))
    storage.update(uniques, None, grads.view(-1), step_of("sgd"))
    moved = (train.core_rows(other) - before)[other == ids]
    torch.testing.assert_close(moved, -0.1 * grads, rtol=0, atol=0.1)
    cosine = torch.cosine_similarity(moved, -grads)
    assert float(cosine) > 0.9
    beside = (train.core_rows(other) - before)[other != ids].norm(dim=1)
    assert float(beside.max()) < 0.2 * float(moved.norm())


@pytest.mark.parametrize("cores", [2, 3, 4])
def test_balanced_rates_move_slices_as_far_as_rows(cores):
    table = EmbeddingBagConfig(num_embeddings=1000, embedding_dim=16, name="t",
                               storage={"kind": "tensor_train", "rank": 8, "cores": cores})
    spec = table.storage
    shape = spec.shape(1000, 16)
    multiples = lr_multiples(spec, shape, "row_wise_adagrad")
    for core, ((before, _, columns, after), multiple) in enumerate(
            zip(shape.core_shapes, multiples, strict=True)):
        pace = MIDDLE_PACE if core == cores // 2 else 1.0
        assert multiple * (before * columns * after) ** 0.5 == pytest.approx(pace * 4)
    assert lr_multiples(spec, shape, "sgd") == [1.0] * cores
