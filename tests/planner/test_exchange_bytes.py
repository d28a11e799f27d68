"""Bytes that the planner counts for a batch are those that the runtime sends, to the byte."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from shardlab.plan import ShardingPlan
from shardlab.plan_problems import hot_row_obstacle
from shardlab.planner.exchange_bytes import ExchangeBytes, RankBatch, head_bytes, table_bytes
from shardlab.specs import EmbeddingBagConfig, ExchangeKind, ShardingType
from shardlab.table_plan import WireDtypes
from tests.harness import run_ranks
from tests.oracle import PlainOptimizer
from tests.sharded_runs import (
    Job,
    build_features,
    random_steps,
    random_weights,
    sharded_model,
    table_plan,
)

CODECS = ["fp32", "fp16", "bf16", "fp8", "fp8_e5m2", "int8", "int4"]


def _job(world, generator, hot):
    tables = [EmbeddingBagConfig(
        num_embeddings=[3, 300, 70_000][i % 3], embedding_dim=[5, 16, 8, 24][i % 4],
        name=f"{kind.value}_{exchange.value}", sharding=kind, exchange=exchange,
        feature_names=[f"{kind.value}_{exchange.value}_{k}" for k in range(1 + i % 2)])
        for exchange in (ExchangeKind.ROWS, ExchangeKind.POOLED)
        for i, kind in enumerate(ShardingType)]
    plan = ShardingPlan(world, tuple(
        dataclasses.replace(table_plan(table, table.sharding, world, exchange=table.exchange,
                                       first=i),
                            wire=WireDtypes(CODECS[i % 7], CODECS[(2 * i + 1) % 7]))
        for i, table in enumerate(tables)))
    if hot:
        plan = plan.with_hot_rows({
            table.name: {0, 1, table.num_embeddings // 2, table.num_embeddings - 1}
            for table, entry in zip(tables, plan.tables, strict=True)
            if hot_row_obstacle(entry) is None})
        assert sum(bool(entry.hot_rows) for entry in plan.tables) == 3
    steps = random_steps(tables, [list(range(3, 3 + world))], generator=generator)
    return Job(tuple(tables), plan, PlainOptimizer("sgd"), random_weights(tables, generator), steps)


def _sent(groups, job):
    """By table, and in all: what this rank sent in a step."""
    model, optimizer = sharded_model(groups, job)
    optimizer.zero_grad()
    features = build_features(job.steps[0].parts[groups.rank], job.features)
    model(features).values().sum().backward()
    optimizer.step()
    wire = model.collections()["ebc"].wire
    return wire.tables, [wire.ids_bytes, wire.rows_bytes, wire.gradients_bytes]


@pytest.mark.parametrize("hot", [False, True], ids=["plain", "hot rows"])
@pytest.mark.parametrize("world", [2, 4], ids="ranks_{}".format)
def test_prediction_is_exact(world, hot, seed):
    import torch

    job = _job(world, torch.Generator().manual_seed(seed), hot)
    found = run_ranks(world, _sent, job)
    total = head_bytes(job.plan)
    for table, entry in zip(job.tables, job.plan.tables, strict=True):
        batches = [RankBatch([np.array([row for bag in part[name].ids for row in bag], np.int64)
                              for name in table.feature_names],
                             len(part[table.feature_names[0]]), length_bytes=1)
                   for part in job.steps[0].parts]
        predicted = table_bytes(entry, batches)
        measured = ExchangeBytes(*np.sum([tables[table.name] for tables, _ in found], 0).tolist())
        assert predicted == measured, table.name
        total += predicted
    assert total == ExchangeBytes(*np.sum([sums for _, sums in found], 0).tolist())
