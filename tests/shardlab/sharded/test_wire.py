"""Codecs on the wire: every codec, sharding type and exchange against the oracle."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import shardlab as sl
from shardlab.errors import PlanError
from shardlab.plan import ShardingPlan
from shardlab.specs import EmbeddingBagConfig, ShardingType
from shardlab.table_plan import WireDtypes
from tests.harness import run_ranks
from tests.oracle import PlainOptimizer
from tests.sharded_runs import (
    EXCHANGES,
    Bare,
    Job,
    build_features,
    merged,
    random_steps,
    random_weights,
    sharded_model,
    sharding_plan,
    table_plan,
    train,
    train_in_stages,
    train_oracle,
)
from tests.tolerances import UNIT

#: Codec -> most that rounding to nearest moves an element, over the largest of its row. Floats:
#: half a step of the largest's binade; scaled ones add that the scale's byte is up to 1/8 too wide
#: and that the row's largest may be clamped or stretched by a step. A stochastic step is twice it.
NEAREST = {"fp32": UNIT, "fp16": 2.0**-11, "bf16": 2.0**-8, "fp8": 1.25 * 2.0**-4,
           "fp8_e5m2": 1.25 * 2.0**-3, "int8": 1.125 / 127, "int4": 1.125 / 7}
LONGEST, LR, TARGET = 3, 0.1, 2.0
SIZES = {1: [[7], [4], [0], [9], [6]], 2: [[5, 3], [0, 6], [4, 4], [0, 0], [7, 2]],
         4: [[4, 0, 3, 2], [1, 2, 0, 5], [2, 2, 2, 2], [0, 0, 0, 0], [5, 1, 4, 0]]}


def _tables():
    """One table for every sharding type and exchange; odd widths, one of a single row."""
    widths = [6, 5, 16, 2, 24, 9, 33]
    return [EmbeddingBagConfig(
        num_embeddings=1 + 6 * i, embedding_dim=widths[i], sharding=kind, exchange=exchange,
        name=f"{kind.value}_{exchange.value}", pooling=["sum", "mean"][(i + j) % 2],
        feature_names=[f"{kind.value}_{exchange.value}_{k}" for k in range(1 + i % 2)])
        for j, exchange in enumerate(EXCHANGES)
        for i, kind in enumerate(ShardingType)]


def _plan(tables, world, wire):
    plan = sharding_plan(tables, world)
    return plan.with_wire(WireDtypes()) if wire is None else dataclasses.replace(
        plan, tables=tuple(dataclasses.replace(entry, wire=wire(i))
                           for i, entry in enumerate(plan.tables)))


def _job(world, wire, seed, **options):
    tables, generator = _tables(), torch.Generator().manual_seed(seed)
    steps = random_steps(tables, SIZES[world], generator=generator, longest=LONGEST, **options)
    for step in steps:
        for target in step.targets:
            target.clamp_(-TARGET, TARGET)
    return Job(tuple(tables), _plan(tables, world, wire), PlainOptimizer("sgd", lr=LR),
               random_weights(tables, generator), steps, linear=True)


def _largest_sums(job):
    """By table, [rows, 1]: sum over steps and ranks of the largest gradient a row can get.

    The loss is linear, so that gradients are the targets; with all targets at their bound every
    column is alike, and the oracle's step of rate 1 from zero adds these sums up.
    """
    steps = [dataclasses.replace(step, targets=[torch.full_like(target, TARGET)
                                                for target in step.targets])
             for step in job.steps]
    bound = dataclasses.replace(job, steps=steps, optimizer=PlainOptimizer("sgd", lr=1.0), weights={
        name: torch.zeros_like(rows) for name, rows in job.weights.items()})
    oracle = train_oracle(bound)[1]
    return {table.name: -oracle.rows(table.name).amin(1, keepdim=True) for table in job.tables}


def _assert_within_bits(job, runs):
    expected, oracle = train_oracle(job)
    rows, _ = merged(job, runs)
    sums = _largest_sums(job)
    wires = {entry.table: entry.wire for entry in job.plan.tables}
    column, allowed = 0, {}
    for table in job.tables:
        name, wire = table.name, wires[table.name]
        allowed[name] = LR * 2 * NEAREST[wire.backward] * sums[name] + 1e-5
        error = (rows[name].double() - oracle.rows(name)).abs()
        assert bool((error <= allowed[name]).all()), (name, wire, float(error.max()))
    for table in job.tables:
        name, wire = table.name, wires[table.name]
        largest = float(job.weights[name].abs().max() + LR * sums[name].max())
        moved = LONGEST * (NEAREST[wire.forward] * largest + float(allowed[name].max()))
        for _ in table.feature_names:
            part = slice(column, column + table.embedding_dim)
            column = part.stop
            for number, pooled in enumerate(expected):
                out = torch.cat([run.outputs[number] for run in runs])[:, part]
                error = (out.double() - pooled[:, part]).abs()
                assert not error.numel() or float(error.max()) <= moved, (name, wire, number)


@pytest.mark.parametrize("world", [1, 2, 4], ids="ranks_{}".format)
def test_every_codec_stays_within_its_bits(world, seed):
    wires = [lambda i, codec=codec: WireDtypes(codec, codec) for codec in NEAREST]
    names = list(NEAREST)
    wires.append(lambda i: WireDtypes(names[i % 7], names[(3 * i + 1) % 7],
                                      ["stochastic", "nearest"][i % 2]))
    jobs = [_job(world, wire, seed + number, weighted=number % 2 == 1)
            for number, wire in enumerate(wires)]
    for job, runs in zip(jobs, zip(*run_ranks(world, train, jobs), strict=True), strict=True):
        _assert_within_bits(job, runs)


def test_every_codec_stays_within_its_bits_in_two_stages(seed):
    """Gradients are rounded once a host: what its ranks' sum is rounded by is less than theirs."""
    names = list(NEAREST)
    wires = [lambda i: WireDtypes("fp16", "bf16"), lambda i: WireDtypes("int8", "int8"),
             lambda i: WireDtypes(names[i % 7], names[(3 * i + 1) % 7],
                                  ["stochastic", "nearest"][i % 2])]
    jobs = [_job(4, wire, seed + number, weighted=number % 2 == 1)
            for number, wire in enumerate(wires)]
    for job, runs in zip(jobs, zip(*run_ranks(4, train_in_stages, jobs), strict=True),
                         strict=True):
        _assert_within_bits(job, runs)


def test_gradients_are_scaled_where_a_codec_lacks_exponents(seed):
    """Gradients of 2^-60 would vanish in fp16, fp8, int8 and int4."""
    tiny = 2.0**-60
    jobs = []
    for codec in NEAREST:
        job = _job(2, lambda i, codec=codec: WireDtypes("fp32", codec), seed)
        steps = [dataclasses.replace(step, targets=[target * tiny for target in step.targets])
                 for step in job.steps]
        zeros = {name: torch.zeros_like(rows) for name, rows in job.weights.items()}
        jobs.append(dataclasses.replace(job, steps=steps, weights=zeros))
    for job, runs in zip(jobs, zip(*run_ranks(2, train, jobs), strict=True), strict=True):
        codec = job.plan.tables[0].wire.backward
        rows, _ = merged(job, runs)
        oracle, sums = train_oracle(job)[1], _largest_sums(job)
        for table in job.tables:
            error = (rows[table.name].double() - oracle.rows(table.name)).abs() / tiny
            # The largest gradient is at most 2^16 times a row's: of a scale's 2^-26 2^10 are left.
            allowed = LR * 2 * NEAREST[codec] * sums[table.name] + 1e-3
            assert bool((error <= allowed).all()), (table.name, codec, float(error.max()))


@pytest.mark.parametrize(("wire", "message"), [
    (WireDtypes("fp17"), "table 'row_wise_rows': wire.forward: unknown codec 'fp17'.*known: fp32"),
    (WireDtypes(backward="int9"), "wire.backward: unknown codec 'int9'"),
    (WireDtypes(rounding="up"), "wire.rounding: unknown 'up'; known: stochastic, nearest"),
    (WireDtypes(error_feedback=True),
     "table 'row_wise_pooled': wire.error_feedback: needs exchange rows"),
])
def test_impossible_wires_are_refused(wire, message):
    plan = _plan(_tables(), 2, None)
    with pytest.raises(PlanError, match=message):
        plan.with_wire(wire)
    with pytest.raises(PlanError, match=r"the plan has no tables \['nobody'\]"):
        plan.with_wire(WireDtypes(), {"nobody": WireDtypes()})


def _pull(groups, wire, sharding):
    """Rows are pulled to 1; beside that, ranks pull column 0 hard and in opposite directions."""
    table = EmbeddingBagConfig(num_embeddings=6, embedding_dim=8, name="t", sharding=sharding)
    plan = ShardingPlan(2, (table_plan(table, sharding, 2),)).with_wire(wire)
    model, optimizer = sl.shard(Bare([table]), plan, groups=groups, optimizer=sl.optim.SGD(lr=0.05))
    pull = torch.zeros(6, 8)
    pull[:, 0] = 10.0 * (1 - 2 * groups.rank)
    features = sl.KeyedJaggedTensor(["t"], torch.arange(6),
                                    lengths=torch.ones(6, dtype=torch.int64))
    for _ in range(200):
        optimizer.zero_grad()
        out = model(features).values()
        (0.5 * (out - 1).square() + pull * out).sum().backward()
        optimizer.step()
    return (model(features).values() - 1).abs()[:, 1:].mean().item()


@pytest.mark.parametrize("sharding", [ShardingType.ROW_WISE, ShardingType.DATA_PARALLEL],
                         ids=lambda kind: kind.value)
def test_error_feedback_converges_where_plain_int4_does_not(sharding):
    """A step of int4 is 1/7 of 10: to the nearest, gradients below 0.7 are never sent."""
    plain, fed, rows = (run_ranks(2, _pull, wire, sharding)[0] for wire in (
        WireDtypes("fp32", "int4", "nearest"), WireDtypes("fp32", "int4", "nearest", True),
        WireDtypes("fp32", "fp32")))
    assert rows < 1e-3
    assert plain > 0.5
    assert fed < 0.1  # a code is 1.5, of which lr / 2 reaches a row


def _backward_twice(groups, codec):
    job = _job(2, lambda i: WireDtypes("fp32", codec), 3)
    model, optimizer = sharded_model(groups, job)
    step = job.steps[0]
    features = build_features(step.parts[groups.rank], job.features)
    grads = []
    for _ in range(2):
        optimizer.zero_grad()
        for _ in range(2):
            (model(features).values() * step.targets[groups.rank]).sum().backward()
        collection = model.collections()["ebc"]
        for pending in collection.pending:
            pending.work.wait()
            grads.append(pending.grads.clone())
        optimizer.step()
    return grads


def test_every_backward_takes_random_bits_of_its_own():
    first, second, third, _ = run_ranks(2, _backward_twice, "int4")[0]
    assert not torch.equal(first, second)
    assert not torch.equal(first, third)


def _not_finite(groups, codec):
    job = _job(2, lambda i: WireDtypes("fp32", codec), 3)
    model, optimizer = sharded_model(groups, job)
    features = build_features(job.steps[0].parts[groups.rank], job.features)
    out = model(features).values()
    scale = float("inf") if groups.rank else 1.0
    (out * scale).sum().backward()
    pending = model.collections()["ebc"].pending
    for one in pending:
        one.work.wait()
    arrived = any(bool(one.grads.isnan().any()) for one in pending)
    optimizer.step()
    return arrived, model(features).values().isfinite().all().item()


@pytest.mark.parametrize("codec", ["fp16", "int8", "bf16", "fp8_e5m2"])
def test_gradients_that_are_not_finite_stay_visible(codec):
    """Codecs saturate; a saturated infinity would train on in silence."""
    assert run_ranks(2, _not_finite, codec) == [(True, False)] * 2
