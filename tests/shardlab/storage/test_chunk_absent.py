"""Absent chunks that share a row: trained as one row of a dense table, on any number of ranks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import shardlab as sl
from shardlab.comm import build_groups
from shardlab.errors import CheckpointError
from shardlab.plan import ShardingPlan
from shardlab.specs import EmbeddingBagConfig, ExchangeKind, ShardingType
from shardlab.storage.base import TableChunk
from shardlab.table_plan import build_table_plan
from tests.harness import run_ranks

ROWS, DIM, SAMPLES = 3000, 16, 64
OPTIMIZERS = [sl.optim.RowWiseAdagrad(lr=0.1), sl.optim.Adam(lr=0.01),
              sl.optim.SGD(lr=0.1, weight_decay=0.01), sl.optim.RowWiseAdam(lr=0.01),
              sl.optim.Adagrad(lr=0.1, clip_value=0.02)]


def pruned(**options):
    return {"kind": "pruned", "budget": {"ratio": 0.9}, "absent": "shared", "period": 1 << 30,
            "chunks": 1, **options}


class Model(nn.Module):
    def __init__(self, tables):
        super().__init__()
        self.ebc = sl.EmbeddingBagCollection(tables)
        self.head = nn.Linear(sum(table.embedding_dim for table in tables), 1)

    def forward(self, features):
        return self.head(self.ebc(features).values())


def build(tables, optimizer=OPTIMIZERS[0], plan=None, groups=None):
    torch.manual_seed(0)
    model, stepper = sl.shard(Model(tables), plan, optimizer=optimizer, groups=groups)
    return model, stepper, model.collections()["ebc"]


def table(storage, rows=ROWS, dim=DIM, name="t", **options):
    return EmbeddingBagConfig(rows, dim, name, storage=storage, **options)


def bags(seed, length=-1):
    """(ids, lengths) of a batch; the first and the last row are among them."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.full((SAMPLES,), length) if length > 0 else \
        torch.randint(0, 5, (SAMPLES,), generator=generator)
    lengths[0] = max(2, length)
    ids = (torch.rand(int(lengths.sum()), generator=generator) ** 3 * ROWS).long()
    ids[:2] = torch.tensor([0, ROWS - 1])
    return ids, lengths


def hold(collection, rows, name="t", dim=DIM, chunk=None):
    """Rows with weights of their own; nothing else is admitted from then on."""
    weights = torch.randn(len(rows), dim, generator=torch.Generator().manual_seed(9))
    if chunk is not None:
        weights[chunk] = 0
    collection.begin_load()
    collection.load_chunk(TableChunk(name, 0, 0, weights, {}, present=rows, span=ROWS))
    storage = collection.storage
    if hasattr(storage, "thresholds"):
        storage.thresholds.fill_(float("inf"))
    return weights


def train(parts, features_of, steps=6):
    model, optimizer, _ = parts
    outputs = []
    for step in range(steps):
        optimizer.zero_grad()
        out = model(features_of(step))
        (out - 1).square().mean().backward()
        optimizer.step()
        outputs.append(out.detach().clone())
    return outputs


@pytest.mark.parametrize("length", [1, 3, -1], ids=["one", "three", "jagged"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda one: one.kind)
def test_absent_rows_train_as_one_row_of_a_dense_table(optimizer, length):
    rows = torch.arange(1, 100, 2)
    mine = build([table(pruned())], optimizer)
    weights = hold(mine[2], rows)
    number = torch.full((ROWS,), len(rows))
    number[rows] = torch.arange(len(rows))
    dense = build([table("fp32", len(rows) + 1)], optimizer)
    dense[2].begin_load()
    dense[2].load_chunk(TableChunk("t", 0, 0, torch.cat([weights, torch.zeros(1, DIM)]), {}))

    def features(step, of=None):
        ids, lengths = bags(step, length)
        return sl.KeyedJaggedTensor(["t"], ids if of is None else of[ids], lengths=lengths)

    ours, theirs = train(mine, features), train(dense, lambda step: features(step, number))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)
    assert mine[2].storage.admitted.sum() == 0
    assert (mine[2].storage.absent.records(0).read_rows() != 0).all()


def test_every_chunk_of_a_row_is_shared_for_itself():
    """Rows of two chunks, of which they hold one, both or none: two tables of half the width."""
    rows = torch.arange(0, 90, 3)
    without = (torch.arange(30) % 3 == 0, torch.arange(30) % 3 == 1)
    weights = torch.randn(30, DIM, generator=torch.Generator().manual_seed(9))
    weights[without[0], :8] = 0
    weights[without[1], 8:] = 0
    optimizer = sl.optim.Adagrad(lr=0.1)
    mine = build([table(pruned(chunks=2))], optimizer)
    mine[2].begin_load()
    mine[2].load_chunk(TableChunk("t", 0, 0, weights, {}, present=rows, span=ROWS))
    mine[2].storage.thresholds.fill_(float("inf"))
    dense = build([table("fp32", 31, 8, name) for name in "ab"], optimizer)
    numbers = []
    for i, (name, gone) in enumerate(zip("ab", without, strict=True)):
        number = torch.full((ROWS,), 30)
        number[rows[~gone]] = torch.arange(30)[~gone]
        numbers.append(number)
        own = torch.cat([weights[:, 8 * i:8 * i + 8], torch.zeros(1, 8)])
        dense[2].begin_load() if i == 0 else None
        dense[2].load_chunk(TableChunk(name, 0, 0, own, {}))

    def one(step):
        ids, lengths = bags(step)
        return sl.KeyedJaggedTensor(["t"], ids, lengths=lengths)

    def two(step):
        ids, lengths = bags(step)
        return sl.KeyedJaggedTensor(["a", "b"], torch.cat([numbers[0][ids], numbers[1][ids]]),
                                    lengths=lengths.repeat(2))

    for a, b in zip(train(mine, one), train(dense, two), strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


def _features(step, size=SAMPLES, rank=0):
    ids, lengths = bags(step)
    ends = lengths.cumsum(0)
    first = 0 if rank == 0 else int(ends[rank * size - 1])
    part = slice(rank * size, (rank + 1) * size)
    return sl.KeyedJaggedTensor(["t"], ids[first:int(ends[part][-1])], lengths=lengths[part])


def _rank(groups, kind, exchange, dtype):
    one = table(pruned(dtype=dtype, chunks=4), exchange=exchange)
    where = [0] if kind is ShardingType.TABLE_WISE else list(range(groups.world_size))
    plan = ShardingPlan(groups.world_size,
                        (build_table_plan(one, kind, where, exchange=exchange),))
    parts = build([one], plan=plan, groups=groups)
    hold(parts[2], torch.arange(1, ROWS, 50))
    size = SAMPLES // groups.world_size
    outputs = train(parts, lambda step: _features(step, size, groups.rank))
    storage = parts[2].storage
    shared = [storage.absent.records(block).read_rows()
              for block in range(len(getattr(storage, "stores", ())) and len(storage.shards))]
    return outputs, shared


@pytest.mark.parametrize("exchange", [ExchangeKind.ROWS, ExchangeKind.POOLED],
                         ids=lambda kind: kind.value)
@pytest.mark.parametrize("kind", [ShardingType.TABLE_WISE, ShardingType.ROW_WISE,
                                  ShardingType.COLUMN_WISE], ids=lambda kind: kind.value)
def test_ranks_train_the_row_of_one(kind, exchange):
    (alone, _), = run_ranks(1, _rank, kind, exchange, "fp32")
    for world in (2, 4):
        found = run_ranks(world, _rank, kind, exchange, "fp32")
        for step, whole in enumerate(alone):
            parts = torch.cat([outputs[step] for outputs, _ in found])
            torch.testing.assert_close(parts, whole, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", ["fp32", "int8"])
def test_triton_trains_the_same_row(monkeypatch, dtype):
    pytest.importorskip("triton")

    def run():
        parts = build([table(pruned(chunks=2, dtype=dtype))])
        hold(parts[2], torch.arange(1, 100, 2))
        return train(parts, _features, 2), parts[2].storage.absent.records(0).read_rows()

    native, row = run()
    monkeypatch.setenv("SHARDLAB_FACE", "triton")
    triton, same = run()
    assert row.abs().sum() > 0
    torch.testing.assert_close(same, row, atol=2e-6, rtol=1e-5)
    for a, b in zip(triton, native, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


def test_row_blocks_round_the_row_alike():
    found = run_ranks(2, _rank, ShardingType.ROW_WISE, ExchangeKind.ROWS, "fp16")
    (_, one), (_, two) = found
    assert one[0].abs().sum() > 0
    assert torch.equal(one[0], two[0])


def test_threads_change_nothing():
    def run(threads):
        torch.set_num_threads(threads)
        try:
            parts = build([table(pruned(chunks=2, period=3), 20_000)])
            generator = torch.Generator().manual_seed(3)
            for _ in range(8):
                ids = (torch.rand(6000, generator=generator) ** 2 * 20_000).long()
                features = sl.KeyedJaggedTensor(["t"], ids, fixed_length=1)
                parts[1].zero_grad()
                (parts[0](features) - 1).square().mean().backward()
                parts[1].step()
            return parts[2].storage.absent.records(0).read_rows()
        finally:
            torch.set_num_threads(1)
    one = run(1)
    assert one.abs().sum() > 0
    assert torch.equal(run(2), one)
    assert torch.equal(run(3), one)


def _load_rank(groups, path, kind):
    one = table(pruned(chunks=2))
    plan = ShardingPlan(groups.world_size, (build_table_plan(
        one, kind, list(range(groups.world_size)), exchange=ExchangeKind.ROWS),))
    parts = build([one], plan=plan, groups=groups)
    sl.load(path, parts[0], parts[1], groups)
    with torch.no_grad():
        return parts[0](_features(99, SAMPLES // groups.world_size, groups.rank))


@pytest.mark.parametrize("kind", [ShardingType.ROW_WISE, ShardingType.COLUMN_WISE],
                         ids=lambda kind: kind.value)
def test_checkpoint_gives_every_shard_the_row(tmp_path, kind):
    parts = build([table(pruned(chunks=2, period=4, budget={"ratio": 0.2}))])
    train(parts, _features, 12)
    assert parts[2].storage.evicted.sum() > 0
    assert parts[2].storage.index.numbers(0).used > 0
    sl.save(tmp_path / "c", parts[0], parts[1], build_groups())
    with torch.no_grad():
        expected = parts[0](_features(99))
    found = torch.cat(run_ranks(2, _load_rank, str(tmp_path / "c"), kind))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_checkpoint_that_shares_needs_a_table_that_does():
    parts = build([table(pruned())])
    train(parts, _features, 2)
    chunk = next(iter(parts[2].chunks()))
    other = build([table(pruned(absent="zeros"))])
    with pytest.raises(CheckpointError, match="absent rows of the checkpoint share a row"):
        other[2].load_chunk(chunk)


def test_new_ids_of_an_unbounded_table_read_the_row():
    one = EmbeddingBagConfig("unbounded", 8, "t", storage={
        "kind": "pruned", "budget": {"bytes": "1MB"}, "chunks": 1, "absent": "shared"})
    parts = build([one])
    parts[2].storage.thresholds.fill_(float("inf"))
    features = sl.KeyedJaggedTensor(["t"], torch.tensor([-7, 1 << 62, 5]), fixed_length=1)
    train(parts, lambda step: features)
    with torch.no_grad():
        rows = parts[2](sl.KeyedJaggedTensor(["t"], torch.tensor([3, -7]),
                                             fixed_length=1)).values()
    assert (rows != 0).all()
    assert torch.equal(rows[0], rows[1])


def test_nothing_is_shared_where_nothing_is_pruned():
    full = {"kind": "pruned", "budget": {"ratio": 1.0}}
    one, two = (build([table({**full, "absent": absent})])[2] for absent in ("shared", "zeros"))
    assert one.storage.absent.sums is None
    assert one.tier_bytes() == two.tier_bytes()


def test_shared_chunks_are_counted():
    parts = build([table(pruned(budget={"ratio": 0.2}, period=4))])
    train(parts, _features, 30)
    storage = parts[2].storage
    numbers = storage.index.numbers(0)
    assert numbers.used > 100
    assert numbers.top - numbers.free == numbers.used + 1
    assert sum(storage.part_bytes(0).values()) == storage.held_bytes(0) <= 0.2 * ROWS * DIM * 4
