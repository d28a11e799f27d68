"""An exchange in two stages: equal to the oracle, and fewer bytes between hosts."""

from __future__ import annotations

import dataclasses
import signal

import pytest
import torch

import shardlab as sl
from shardlab import comm
from shardlab.plan import ShardingPlan
from shardlab.specs import EmbeddingBagConfig, ExchangeKind, ShardingType
from shardlab.table_plan import WireDtypes
from tests.fault_ranks import FaultyWorld
from tests.harness import run_ranks
from tests.oracle import PlainOptimizer
from tests.sharded_runs import (
    EXCHANGES,
    Bare,
    Job,
    assert_equals_oracle,
    build_features,
    in_stages,
    merged,
    random_steps,
    random_weights,
    sharded_model,
    sharding_plan,
    table_plan,
    train,
    train_in_stages,
)

#: Two hosts of two ranks: unequal ranks, empty ranks, an empty host, an empty batch.
SIZES = [[4, 0, 3, 2], [0, 0, 2, 5], [2, 2, 2, 2], [0, 0, 0, 0], [5, 1, 4, 0]]


def _tables(exchange):
    """One table for every sharding type, some with several features; one of a single row."""
    widths = [6, 5, 16, 2, 24, 9, 8]
    return [EmbeddingBagConfig(
        num_embeddings=1 + 9 * i, embedding_dim=widths[i], name=kind.value, exchange=exchange,
        sharding=kind, pooling=["sum", "mean"][i % 2],
        feature_names=[f"{kind.value}_{k}" for k in range(1 + i % 3)])
        for i, kind in enumerate(ShardingType)]


def _job(tables, seed, optimizer="row_wise_adagrad", sizes=SIZES, **options):
    generator = torch.Generator().manual_seed(seed)
    return Job(tuple(tables), sharding_plan(tables, 4), PlainOptimizer(optimizer, lr=0.1),
               random_weights(tables, generator),
               random_steps(tables, sizes, generator=generator, **options))


def test_every_sharding_type_and_exchange_equals_the_oracle(seed):
    mixed = [dataclasses.replace(table, exchange=EXCHANGES[i % 2])
             for i, table in enumerate(_tables(ExchangeKind.ROWS))]
    jobs = [_job(_tables(exchange), seed, optimizer, weighted=weighted)
            for exchange, optimizer, weighted in (
                (ExchangeKind.ROWS, "row_wise_adagrad", True), (ExchangeKind.POOLED, "sgd", False),
                (ExchangeKind.POOLED, "adagrad", True), (ExchangeKind.ROWS, "adam", False))]
    jobs.append(_job(mixed, seed, "row_wise_adam"))
    for job, runs in zip(jobs, zip(*run_ranks(4, train_in_stages, jobs), strict=True),
                         strict=True):
        assert_equals_oracle(job, runs)


def test_clipped_gradients_equal_the_oracle(seed):
    job = _job(_tables(ExchangeKind.ROWS), seed)
    clipped = [dataclasses.replace(job, optimizer=PlainOptimizer("row_wise_adagrad", lr=0.1, **{
        name: 0.01})) for name in ("clip_norm", "clip_value")]
    for one, runs in zip(clipped, zip(*run_ranks(4, train_in_stages, clipped), strict=True),
                         strict=True):
        assert_equals_oracle(one, runs)


def _dyadic(seed):
    """Every sum of gradients is exact, whatever its order."""
    tables = [dataclasses.replace(table, exchange=EXCHANGES[i % 2])
              for i, table in enumerate(_tables(ExchangeKind.ROWS))]
    return _job(tables, seed, "adagrad", [[4, 2, 1, 1]] * 4, weighted=True, dyadic=True)


def test_two_stages_give_the_bits_of_one_where_sums_are_exact(seed):
    job = dataclasses.replace(_dyadic(seed), linear=True)
    flat, staged = run_ranks(4, train, [job]), run_ranks(4, train_in_stages, [job])
    for one, other in zip(flat, staged, strict=True):
        assert all(map(torch.equal, one[0].outputs, other[0].outputs))
    (rows, state), (other_rows, other_state) = (
        merged(job, [run for run, in runs]) for runs in (flat, staged))
    for table in job.tables:
        assert torch.equal(rows[table.name], other_rows[table.name])
        assert all(torch.equal(state[table.name][key], value)
                   for key, value in other_state[table.name].items())


def _train_lengths(groups, stages, lengths):
    """Bags of one length per rank, or (0) of any; pooled by the owners. Outputs and rows."""
    groups = in_stages(groups) if stages else groups
    table = EmbeddingBagConfig(20, 4, "t", feature_names=("a", "b"), exchange=ExchangeKind.POOLED)
    plan = ShardingPlan(4, (table_plan(table, ShardingType.TABLE_WISE, 4, first=2,
                                       exchange=ExchangeKind.POOLED),))
    model, optimizer = sl.shard(Bare([table]), plan, groups=groups,
                                optimizer=sl.optim.SGD(lr=0.25))
    length, bags = lengths[groups.rank], 6 * (groups.rank != 1)
    if length:
        values = torch.arange(length * bags) % 20
        features = sl.KeyedJaggedTensor(["a", "b"], values, fixed_length=length)
    else:
        values = torch.arange(bags * (bags - 1) // 2) % 20
        features = sl.KeyedJaggedTensor(["a", "b"], values, lengths=torch.arange(bags))
    out = model(features).values()
    out.sum().backward()
    optimizer.step()
    return [out.detach(), *(chunk.weights.clone() for chunk in
                            model.collections()["ebc"].chunks(1 << 20))]


@pytest.mark.parametrize("lengths", [(2, 2, 2, 2), (1, 2, 3, 1), (3, 0, 0, 1), (0, 0, 0, 0)])
def test_bags_of_any_length_pass_through_their_host(lengths):
    flat = run_ranks(4, _train_lengths, False, lengths)
    for one, other in zip(flat, run_ranks(4, _train_lengths, True, lengths), strict=True):
        assert all(map(torch.equal, one, other))


def _train_skewed(groups, stages):
    """Ids of a few hot rows; what was sent, by rank."""
    groups = in_stages(groups) if stages else sl.comm.build_groups(groups.process_group, 2)
    table = EmbeddingBagConfig(5000, 16, "t")
    plan = ShardingPlan(4, (table_plan(table, ShardingType.ROW_WISE, 4),)).with_wire(
        WireDtypes("fp16", "fp16"))
    model, optimizer = sl.shard(Bare([table]), plan, groups=groups)
    generator = torch.Generator().manual_seed(groups.rank)
    for _ in range(3):
        ids = (5000 * torch.rand(4000, generator=generator) ** 6).long()
        features = sl.KeyedJaggedTensor(["t"], ids, fixed_length=1)
        model(features).values().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    wire = model.collections()["ebc"].wire
    return wire.total, wire.inside_bytes, wire.across_bytes, sum(map(sum, wire.tables.values()))


def test_fewer_bytes_cross_hosts_than_flat():
    """4,000 draws of u^6 ask some 1,450 rows a rank and 2,270 a host."""
    flat, staged = run_ranks(4, _train_skewed, False), run_ranks(4, _train_skewed, True)
    for total, inside, across, by_table in [*flat, *staged]:
        assert total == inside + across
        assert 0 < by_table <= total
    crossed, before = (sum(found[2] for found in runs) for runs in (staged, flat))
    assert crossed < 0.8 * before
    assert sum(found[1] for found in staged) > sum(found[1] for found in flat)


def test_two_stages_repeat_bit_by_bit(seed):
    """Stochastic rounding of gradients follows from the host, and copies of a table stay equal."""
    job = _job(_tables(ExchangeKind.ROWS), seed)
    jobs = [dataclasses.replace(job, plan=job.plan.with_wire(wire)) for wire in (
        WireDtypes("fp16", "int4"), WireDtypes("int8", "fp8", error_feedback=True))]
    first, second = run_ranks(4, train_in_stages, jobs), run_ranks(4, train_in_stages, jobs)
    for number, one in enumerate(jobs):
        rows, again = (merged(one, [run[number] for run in runs])[0] for runs in (first, second))
        assert all(torch.equal(rows[name], again[name]) for name in rows)


def _pull(groups, wire, stages):
    """Rows are pulled to 1; beside that, hosts pull column 0 hard and in opposite directions."""
    groups = in_stages(groups) if stages else groups
    table = EmbeddingBagConfig(6, 8, "t")
    plan = ShardingPlan(4, (table_plan(table, ShardingType.ROW_WISE, 4),)).with_wire(wire)
    model, optimizer = sl.shard(Bare([table]), plan, groups=groups, optimizer=sl.optim.SGD(lr=0.1))
    pull = torch.zeros(6, 8)
    pull[:, 0] = 10.0 * (1 - 2 * (groups.rank // 2))
    features = sl.KeyedJaggedTensor(["t"], torch.arange(6), fixed_length=1)
    for _ in range(100):
        optimizer.zero_grad()
        out = model(features).values()
        (0.5 * (out - 1).square() + pull * out).sum().backward()
        optimizer.step()
    return (model(features).values() - 1).abs()[:, 1:].mean().item()


def test_error_feedback_carries_what_rounding_took_from_a_host():
    plain, fed = (run_ranks(4, _pull, WireDtypes("fp32", "int4", "nearest", feedback), True)[0]
                  for feedback in (False, True))
    assert plain > 0.5
    assert fed < 0.2


def _not_finite(groups, codec):
    groups = in_stages(groups)
    job = _job(_tables(ExchangeKind.ROWS), 3)
    job = dataclasses.replace(job, plan=job.plan.with_wire(WireDtypes("fp32", codec)))
    model, optimizer = sharded_model(groups, job)
    features = build_features(job.steps[2].parts[groups.rank], job.features)
    out = model(features).values()
    (out * (float("inf") if groups.rank == 3 else 1.0)).sum().backward()
    optimizer.step()
    return model(features).values().isfinite().all().item()


@pytest.mark.parametrize("codec", ["fp32", "int8"])
def test_gradients_that_are_not_finite_stay_visible(codec):
    assert not any(run_ranks(4, _not_finite, codec))


def _train_forever(groups):
    groups = comm.with_stages(dataclasses.replace(groups, host_of_rank=(0, 0, 1, 1)))
    table = EmbeddingBagConfig(50, 4, "t")
    plan = ShardingPlan(4, (table_plan(table, ShardingType.ROW_WISE, 4),))
    model, optimizer = sl.shard(Bare([table]), plan, groups=groups)
    features = sl.KeyedJaggedTensor(["t"], torch.arange(20), fixed_length=1)
    while True:
        model(features).values().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("transport", ["shared_memory", "gloo"])
def test_killed_rank_ends_all_others(transport, tmp_path):
    world = FaultyWorld(4, tmp_path, transport, 60.0, _train_forever)
    for rank, end in world.hurt(1, signal.SIGKILL).items():
        assert end.code == 3
        assert f"all_to_all failed on rank {rank} of 4: " in end.error
        assert "rank 1 has ended" in end.error
        assert end.seconds < 20
