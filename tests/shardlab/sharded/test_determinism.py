"""Same seed, plan and batches: bit-identical weights, whatever the threads and whenever."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import shardlab as sl
from shardlab.ops.init import init_uniform_reference
from shardlab.specs import EmbeddingBagConfig, ExchangeKind, ShardingType
from shardlab.table_plan import Shard
from tests.harness import run_ranks
from tests.oracle import PlainOptimizer
from tests.sharded_runs import (
    Bare,
    Job,
    Run,
    make_optimizer,
    merged,
    random_steps,
    random_weights,
    sharding_plan,
    train,
)


def _tables(rows=211):
    """One table per sharding type, wide and long enough for two threads to share the work."""
    return [EmbeddingBagConfig(num_embeddings=rows + 10 * i, embedding_dim=8 + 3 * i,
                               name=kind.value, sharding=kind, pooling=["sum", "mean"][i % 2],
                               exchange=[ExchangeKind.ROWS, ExchangeKind.POOLED][i // 2 % 2])
            for i, kind in enumerate(ShardingType)]


def _job(world, optimizer, seed):
    tables, generator = _tables(), torch.Generator().manual_seed(seed)
    steps = random_steps(tables, [[160 // world] * world] * 3, generator=generator, weighted=True)
    return Job(tuple(tables), sharding_plan(tables, world), PlainOptimizer(optimizer, lr=0.1),
               random_weights(tables, generator), steps)


def _assert_identical(first: Run, second: Run) -> None:
    assert all(map(torch.equal, first.outputs, second.outputs))
    for one, other in zip(first.chunks, second.chunks, strict=True):
        assert (one.table, one.row_start, one.col_start) == (
            other.table, other.row_start, other.col_start)
        assert torch.equal(one.weights, other.weights)
        assert all(torch.equal(one.state[key], other.state[key]) for key in one.state)


@pytest.mark.parametrize("world", [1, 2], ids="ranks_{}".format)
@pytest.mark.parametrize("optimizer", ["sgd", "row_wise_adagrad", "adam"])
def test_runs_are_bit_identical_twice_and_with_two_threads(optimizer, world, seed):
    job = _job(world, optimizer, seed)
    for runs in run_ranks(world, train, [job, job, dataclasses.replace(job, threads=2)]):
        _assert_identical(runs[0], runs[1])
        _assert_identical(runs[0], runs[2])


def _initial(groups, tables, plan, seed):
    model, _ = sl.shard(Bare(tables), plan, groups=groups, seed=seed,
                        optimizer=make_optimizer(PlainOptimizer("adam")))
    return Run([], [dataclasses.replace(chunk, weights=chunk.weights.clone())
                    for chunk in model.collections()["ebc"].chunks()])


@pytest.mark.parametrize("world", [1, 2, 4], ids="ranks_{}".format)
def test_initial_rows_depend_on_seed_table_row_and_column_alone(world):
    tables = [*_tables(rows=6), EmbeddingBagConfig(
        num_embeddings=5, embedding_dim=3, name="narrow", sharding="row_wise", exchange="rows",
        weight_init_min=0.25, weight_init_max=0.5)]
    job = Job(tuple(tables), sharding_plan(tables, world), PlainOptimizer("adam"), {}, [])
    rows, state = merged(job, run_ranks(world, _initial, tables, job.plan, 17))
    for table in tables:
        size = (table.num_embeddings, table.embedding_dim)
        expected = torch.empty(size)
        init_uniform_reference(expected, table, Shard(0, 0, size[0], 0, size[1]), 17)
        assert torch.equal(rows[table.name], expected), table.name
        low, high = table.init_range
        assert low <= expected.min() <= expected.max() < high
        assert not any(part.any() for part in state[table.name].values())


def test_another_seed_gives_other_rows():
    tables = _tables(rows=6)
    first, second = (run_ranks(1, _initial, tables, sharding_plan(tables, 1), seed)[0].chunks
                     for seed in (1, 2))
    assert not any(torch.equal(one.weights, other.weights)
                   for one, other in zip(first, second, strict=True))
