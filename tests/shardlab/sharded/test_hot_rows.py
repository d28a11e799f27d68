"""Copies of hot rows on every rank: training equals the oracle, and training without them."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from shardlab.errors import BoundsError, PlanError
from shardlab.plan import ShardingPlan, WireDtypes
from shardlab.specs import EmbeddingBagConfig, ExchangeKind, ShardingType
from tests.harness import run_ranks
from tests.oracle import PlainOptimizer
from tests.sharded_runs import (
    Job,
    assert_equals_oracle,
    merged,
    random_steps,
    random_weights,
    table_plan,
    train,
)

WORLDS = [1, 2, 4]
#: Samples per step and rank: unequal ranks, an empty rank, an empty batch.
SIZES = {
    1: [[7], [4], [0], [9], [1], [6]],
    2: [[5, 3], [0, 6], [4, 4], [0, 0], [7, 2], [3, 3]],
    4: [[4, 0, 3, 2], [1, 2, 0, 5], [2, 2, 2, 2], [0, 0, 0, 0], [5, 1, 4, 0], [0, 0, 0, 3]],
}
OPTIMIZERS = [
    PlainOptimizer("sgd", lr=0.05, weight_decay=0.1),
    PlainOptimizer("adagrad", lr=0.05, eps=1e-10),
    PlainOptimizer("row_wise_adagrad", lr=0.05, eps=1e-10),
    PlainOptimizer("adam", lr=0.05, eps=1e-8),
    PlainOptimizer("row_wise_adam", lr=0.05, betas=(0.8, 0.99), eps=1e-3),
]
#: Of `_tables`: hot rows over several owners, all rows, one row, the last row; "cold" has none.
HOT = {"user": (0, 1, 2, 7, 12), "tiny": (0, 1, 2), "wide": (36,), "thin": (0, 4, 8)}


def _tables(**changes):
    """Odd widths, fewer rows than ranks, a table read by three features, one without hot rows."""
    shapes = [("user", 13, 5, "sum", ("user", "friend", "guest"), ShardingType.ROW_WISE),
              ("tiny", 3, 16, "mean", (), ShardingType.ROW_WISE),
              ("cold", 11, 4, "sum", (), ShardingType.COLUMN_WISE),
              ("wide", 37, 24, "sum", (), ShardingType.TABLE_ROW_WISE),
              ("thin", 9, 2, "mean", ("left", "right"), ShardingType.TABLE_WISE)]
    return [EmbeddingBagConfig(num_embeddings=rows, embedding_dim=columns, name=name,
                               pooling=pooling, feature_names=features, sharding=kind, **changes)
            for name, rows, columns, pooling, features, kind in shapes]


def _plan(tables, world):
    return ShardingPlan(world, tuple(table_plan(table, table.sharding, world, first=i)
                                     for i, table in enumerate(tables)))


def _job(optimizer, world, generator, tables=None, hot=HOT, wire=None, **options):
    tables = tables or _tables()
    plan = _plan(tables, world).with_hot_rows(hot)
    steps = random_steps(tables, SIZES[world], generator=generator, **options)
    return Job(tuple(tables), plan.with_wire(wire or WireDtypes()), optimizer,
               random_weights(tables, generator), steps)


def _cold(job):
    """The same job without hot rows."""
    return dataclasses.replace(job, plan=job.plan.with_hot_rows(
        {entry.table: () for entry in job.plan.tables}))


def assert_same(job, runs, others):
    for run, other in zip(runs, others, strict=True):
        for number, (one, two) in enumerate(zip(run.outputs, other.outputs, strict=True)):
            assert torch.equal(one, two), f"output of step {number}"
    assert_same_rows(merged(job, runs), merged(job, others))


def assert_same_rows(one, two):
    for table, rows in one[0].items():
        assert torch.equal(rows, two[0][table]), table
        for name, state in one[1][table].items():
            assert torch.equal(state, two[1][table][name]), f"{name} of {table}"


@pytest.fixture
def generator(seed):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("world", WORLDS, ids="ranks_{}".format)
@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda optimizer: optimizer.kind)
def test_training_equals_oracle_and_training_without(optimizer, world, generator):
    jobs = [_job(optimizer, world, generator), _job(optimizer, world, generator, weighted=True)]
    found = list(zip(*run_ranks(world, train, [*jobs, *map(_cold, jobs)]), strict=True))
    for job, runs, without in zip(jobs, found[:2], found[2:], strict=True):
        assert_equals_oracle(job, runs)
        assert_same(job, runs, without)
