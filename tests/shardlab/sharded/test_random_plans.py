"""Random tables, plans, batches and optimisers against the oracle, on 2 and on 4 ranks."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shardlab.plan import ShardingPlan
from shardlab.specs import EmbeddingBagConfig, ExchangeKind, ShardingType
from shardlab.storage_bytes import OPTIMIZER_STATE
from tests.harness import run_ranks
from tests.oracle import PlainOptimizer
from tests.sharded_runs import (
    Job,
    assert_equals_oracle,
    random_steps,
    random_weights,
    table_plan,
    train,
)

EXCHANGES = st.sampled_from([ExchangeKind.ROWS, ExchangeKind.POOLED])


@st.composite
def _tables(draw):
    return [EmbeddingBagConfig(
        num_embeddings=draw(st.integers(1, 40)), embedding_dim=draw(st.integers(1, 20)),
        name=f"t{i}", feature_names=[f"t{i}_{k}" for k in range(draw(st.integers(1, 3)))],
        pooling=draw(st.sampled_from(["sum", "mean"])),
        sharding=draw(st.sampled_from(list(ShardingType))), exchange=draw(EXCHANGES))
        for i in range(draw(st.integers(1, 4)))]


@st.composite
def _optimizers(draw):
    kind = draw(st.sampled_from(list(OPTIMIZER_STATE)))
    return PlainOptimizer(kind, lr=draw(st.sampled_from([0.01, 0.1])), eps=1e-6,
                          weight_decay=draw(st.sampled_from([0.0, 0.1])) * (kind == "sgd"),
                          clip_value=draw(st.sampled_from([None, 0.3])),
                          clip_norm=draw(st.sampled_from([None, 0.5])))


@st.composite
def _jobs(draw, world):
    tables = draw(_tables())
    plan = ShardingPlan(world, tuple(
        table_plan(table, table.sharding, world, exchange=table.exchange,
                   first=draw(st.integers(0, world - 1))) for table in tables))
    sizes = draw(st.lists(st.lists(st.integers(0, 6), min_size=world, max_size=world),
                          min_size=5, max_size=6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2 ** 32 - 1)))
    steps = random_steps(tables, sizes, generator=generator, weighted=draw(st.booleans()),
                         longest=draw(st.integers(0, 7)))
    return Job(tuple(tables), plan, draw(_optimizers()), random_weights(tables, generator), steps)


def _check(jobs, world):
    for job, runs in zip(jobs, zip(*run_ranks(world, train, jobs), strict=True), strict=True):
        assert_equals_oracle(job, runs)


_rich = settings(max_examples=10, suppress_health_check=list(HealthCheck))


@_rich
@given(jobs=st.lists(_jobs(2), min_size=1, max_size=3))
def test_two_ranks(jobs):
    _check(jobs, 2)


@_rich
@given(jobs=st.lists(_jobs(4), min_size=1, max_size=3))
def test_four_ranks(jobs):
    _check(jobs, 4)
