"""Admitted chunks that start from initial weights: those of a dense table, wherever they lie."""

from __future__ import annotations

import pytest
import torch

import shardlab as sl
from shardlab.codecs import decode
from shardlab.ops.init import init_uniform
from shardlab.plan import ShardingPlan
from shardlab.specs import EmbeddingBagConfig, ExchangeKind, ShardingType
from shardlab.table_plan import Shard, build_table_plan
from tests.harness import run_ranks

ROWS, DIM = 3000, 32
TINY = 1e-20  # a rate whose steps are not seen
IDS = torch.cat([torch.arange(7), torch.tensor([2990, 2999, 1500, 1501, 2999])])


def pruned(ratio=0.4, **options):
    return {"kind": "pruned", "budget": {"ratio": ratio}, "chunks": 2, "period": 1 << 30,
            "admitted": "initial", **options}


def table(name, storage, **options):
    return EmbeddingBagConfig(ROWS, DIM, name, weight_init_min=0.25, weight_init_max=0.75,
                              storage=storage, **options)


class Model(torch.nn.Module):
    def __init__(self, found):
        super().__init__()
        self.names = [one.name for one in found]
        self.ebc = sl.EmbeddingBagCollection(found)

    def forward(self, features):
        return self.ebc(features).values()


def build(found, plan=None, groups=None):
    return sl.shard(Model(found), plan, optimizer=sl.optim.SGD(lr=TINY), groups=groups, seed=3)


def step(parts, ids=IDS, lr=TINY):
    model, optimizer = parts
    names = model.module.names
    optimizer.zero_grad()
    model(sl.KeyedJaggedTensor(names, ids.repeat(len(names)), fixed_length=1)).sum().backward()
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    return model.collections()["ebc"].storage


def expected(one):
    rows = torch.empty(ROWS, DIM)
    init_uniform(rows, one, Shard(0, 0, ROWS, 0, DIM), 3)
    return rows


def held(storage, block):
    """Rows of a shard in its own columns, by row."""
    found = storage.index.list_rows(block)
    pools = storage.pools
    payloads = pools.blocks.payloads(pools.arena, block)[found.places.flatten().long()]
    values = decode(payloads, pools.blocks.encoding(block).codec, pools.width(block))
    return found.rows, values.view(len(found.rows), -1)


@pytest.mark.parametrize("face", ["native", "reference"])
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "int8"])
def test_admitted_rows_start_as_those_of_a_dense_table(monkeypatch, dtype, face):
    monkeypatch.setenv("SHARDLAB_FACE", face)
    found = [table("a", pruned(dtype=dtype)), table("b", pruned(dtype=dtype, chunks=4))]
    storage = step(build(found))
    assert len(storage.stores) == 2  # chunks of 16 and of 8 columns
    for block, one in enumerate(found):
        rows, values = held(storage, block)
        assert torch.equal(rows, IDS.unique())
        error = {"fp32": 0.0, "fp16": 2.0 ** -11, "int8": 1 / 100}[dtype]
        torch.testing.assert_close(values, expected(one)[rows], atol=error, rtol=0)


def test_tables_that_start_from_zeros_lie_elsewhere():
    found = [table("a", pruned()), table("b", pruned(admitted="zeros")), table("c", pruned())]
    storage = step(build(found))
    assert sorted(plan.blocks for plan in storage.stores) == [(0, 2), (1,)]
    for block, one in enumerate(found):
        rows, values = held(storage, block)
        assert torch.equal(values.abs() > 1e-3, (expected(one)[rows] > 0) & (block != 1))


def test_a_row_that_comes_again_starts_as_before():
    one = table("a", pruned())
    parts = build([one])
    storage = step(parts, lr=0.5)
    rows, values = held(storage, 0)
    assert (values != expected(one)[rows]).all()
    storage.decide(0, torch.tensor([1e30]), 1 << 20)
    assert not storage.index.list_rows(0).rows.numel()
    storage.thresholds.zero_()
    step(parts)
    again, values = held(storage, 0)
    assert torch.equal(again, rows)
    assert torch.equal(values, expected(one)[rows])


def _rank(groups, kind, dtype):
    one = table("a", pruned(dtype=dtype))
    where = list(range(groups.world_size))
    plan = ShardingPlan(groups.world_size, (build_table_plan(one, kind, where,
                                                             exchange=ExchangeKind.POOLED),))
    storage = step(build([one], plan, groups))
    shard = storage.shards[0].shard
    return shard, *held(storage, 0)


@pytest.mark.parametrize("dtype", ["fp32", "int8"])
@pytest.mark.parametrize("kind", [ShardingType.ROW_WISE, ShardingType.COLUMN_WISE],
                         ids=lambda kind: kind.value)
def test_any_part_of_a_table_starts_as_the_whole(kind, dtype):
    storage = step(build([table("a", pruned(dtype=dtype))]))
    rows, values = held(storage, 0)
    whole = torch.zeros(ROWS, DIM).index_copy(0, rows, values)
    seen = torch.zeros(ROWS, DIM)
    for shard, some, part in run_ranks(2, _rank, kind, dtype):
        seen[some + shard.row_start, shard.col_start:shard.col_end] = part
    assert torch.equal(seen, whole)

