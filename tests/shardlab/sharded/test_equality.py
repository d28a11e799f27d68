"""Sharded training equals the unsharded oracle: every sharding type, exchange and optimiser."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.nn import functional

from shardlab.specs import EmbeddingBagConfig, ExchangeKind, ShardingType
from tests.harness import run_ranks
from tests.oracle import PlainOptimizer, join
from tests.sharded_runs import (
    EXCHANGES,
    PLAIN,
    SIZES,
    Job,
    assert_equals_oracle,
    merged,
    mixed_tables,
    random_steps,
    random_weights,
    sharding_plan,
    train,
)

WORLDS = [1, 2, 4]
KINDS = list(ShardingType)


def _tables(**changes):
    """Odd widths, fewer rows than ranks, a table of one row, one read by three features."""
    shapes = [("user", 13, 5, "sum", ("user", "friend", "guest")), ("tiny", 3, 16, "mean", ()),
              ("wide", 37, 24, "sum", ()), ("thin", 9, 1, "mean", ("left", "right")),
              ("one", 1, 7, "sum", ())]
    return [EmbeddingBagConfig(num_embeddings=rows, embedding_dim=columns, name=name,
                               pooling=pooling, feature_names=features, **changes)
            for name, rows, columns, pooling, features in shapes]


def _job(tables, plan, optimizer, generator, **options):
    linear = options.pop("linear", False)
    steps = random_steps(tables, options.pop("sizes", SIZES[plan.world_size]),
                         generator=generator, **options)
    return Job(tuple(tables), plan, optimizer, random_weights(tables, generator), steps,
               linear=linear)


@pytest.fixture
def generator(seed):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("world", WORLDS, ids="ranks_{}".format)
@pytest.mark.parametrize("exchange", EXCHANGES, ids=lambda kind: kind.value)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.value)
def test_training_equals_oracle(kind, exchange, world, generator):
    tables = _tables()
    plan = sharding_plan(tables, world, kind, exchange)
    jobs = [_job(tables, plan, PlainOptimizer("sgd", lr=0.1, weight_decay=0.02), generator),
            _job(tables, plan, PlainOptimizer("adagrad", lr=0.1, eps=1e-10), generator,
                 weighted=True)]
    for job, runs in zip(jobs, zip(*run_ranks(world, train, jobs), strict=True), strict=True):
        assert_equals_oracle(job, runs)


@pytest.mark.parametrize("world", WORLDS, ids="ranks_{}".format)
@pytest.mark.parametrize("optimizer", [
    PlainOptimizer("sgd", lr=0.05),
    *PLAIN.values(),
    PlainOptimizer("sgd", lr=0.05, clip_value=0.1),
    dataclasses.replace(PLAIN["adagrad"], clip_norm=0.5),
    dataclasses.replace(PLAIN["adam"], clip_value=0.2, clip_norm=0.9),
    PlainOptimizer("row_wise_adam", lr=0.05, eps=1e-8, clip_norm=100.0),
], ids=lambda o: "-".join([o.kind, *(["decay"] if o.weight_decay else []),
                           *(["value"] if o.clip_value else []),
                           *(["norm"] if o.clip_norm else [])]))
def test_every_optimizer_equals_oracle_on_every_sharding_type(optimizer, world, generator):
    tables = mixed_tables()
    plan = sharding_plan(tables, world)
    sizes = [[8 // world] * world] * 5
    jobs = [_job(tables, plan, optimizer, generator),
            _job(tables, plan, optimizer, generator, weighted=True, dyadic=True, linear=True,
                 sizes=sizes)]
    for job, runs in zip(jobs, zip(*run_ranks(world, train, jobs), strict=True), strict=True):
        assert_equals_oracle(job, runs)


@pytest.mark.parametrize("pooling", ["sum", "mean"])
@pytest.mark.parametrize("kind", [ShardingType.TABLE_WISE, ShardingType.COLUMN_WISE],
                         ids=lambda kind: kind.value)
def test_lookup_is_bit_exact_at_every_world_size(kind, pooling, generator):
    tables = [dataclasses.replace(table, pooling=pooling) for table in _tables()]
    weights = random_weights(tables, generator)
    steps = {weighted: random_steps(tables, [[4, 0, 3, 2]], generator=generator,
                                    weighted=weighted) for weighted in (False, True)}
    outputs = {}
    for world in WORLDS:
        plan = sharding_plan(tables, world, kind, ExchangeKind.ROWS)
        jobs = [Job(tuple(tables), plan, PlainOptimizer("sgd"), weights, _regrouped(step, world))
                for step in steps.values()]
        runs = run_ranks(world, train, jobs)
        outputs[world] = [torch.cat([run[i].outputs[0] for run in runs]) for i in range(2)]
        assert all(map(torch.equal, outputs[world], outputs[1]))
    unweighted = _embedding_bags(tables, weights, join(steps[False][0].parts))
    assert torch.equal(outputs[1][0], unweighted)


def _regrouped(steps, world):
    """The same samples in the same order on fewer ranks."""
    each = 4 // world
    return [dataclasses.replace(
        step, parts=[join(step.parts[i:i + each]) for i in range(0, 4, each)],
        targets=[torch.cat(step.targets[i:i + each]) for i in range(0, 4, each)])
        for step in steps]


def _embedding_bags(tables, weights, batch):
    """fp32 outputs of torch's own embedding_bag."""
    out = []
    for table in tables:
        for feature in table.feature_names:
            bags = batch[feature]
            offsets = torch.tensor([0, *bags.lengths]).cumsum(0)
            ids = torch.tensor([row for bag in bags.ids for row in bag], dtype=torch.int64)
            out.append(functional.embedding_bag(ids, weights[table.name], offsets,
                                                mode=table.pooling.value,
                                                include_last_offset=True))
    return torch.cat(out, dim=1)


@pytest.mark.parametrize("kind", ["sgd", "adagrad", "adam"])
def test_training_is_bit_exact_at_every_world_size_where_sums_are_exact(kind, generator):
    """Gradients of few bits sum exactly in any order, so nothing may depend on the sharding."""
    tables = mixed_tables()
    weights = random_weights(tables, generator)
    steps = random_steps(tables, [[4, 2, 1, 1]] * 5, generator=generator, weighted=True,
                         dyadic=True)
    trained = {}
    for world in WORLDS:
        job = Job(tuple(tables), sharding_plan(tables, world), PlainOptimizer(kind, lr=0.25),
                  weights, _regrouped(steps, world), linear=True)
        runs = [run for run, in run_ranks(world, train, [job])]
        assert_equals_oracle(job, runs)
        trained[world] = merged(job, runs)
    for world in WORLDS[1:]:
        for table in tables:
            assert torch.equal(trained[world][0][table.name], trained[1][0][table.name])
            for key, value in trained[1][1][table.name].items():
                assert torch.equal(trained[world][1][table.name][key], value)
