"""Batches exchanged ahead of their turn: the same bits as without, and staleness as promised."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import shardlab as sl
from shardlab.errors import BoundsError, ConfigError
from shardlab.plan import ShardingPlan
from shardlab.specs import EmbeddingBagConfig, ExchangeKind, PoolingType, ShardingType
from shardlab.table_plan import WireDtypes
from tests.harness import run_ranks
from tests.oracle import PlainOptimizer
from tests.sharded_runs import (
    Bare,
    Job,
    TwoCollections,
    build_features,
    in_stages,
    loss_of,
    make_optimizer,
    random_steps,
    random_weights,
    sharded_model,
    table_plan,
)

#: Table: sharding type, exchange, storage. Ids are few, so that batches share many rows.
_TABLES = [
    ("row", ShardingType.ROW_WISE, ExchangeKind.ROWS, "fp32"),
    ("table", ShardingType.TABLE_WISE, ExchangeKind.ROWS, "int8"),
    ("column", ShardingType.COLUMN_WISE, ExchangeKind.ROWS, "fp16"),
    ("every", ShardingType.DATA_PARALLEL, ExchangeKind.ROWS, "fp32"),
    ("bags", ShardingType.ROW_WISE, ExchangeKind.POOLED, "fp32"),
    ("cached", ShardingType.ROW_WISE, ExchangeKind.ROWS,
     {"levels": [{"fraction": 0.2}, {"dtype": "int8"}]}),
    ("cores", ShardingType.ROW_WISE, ExchangeKind.ROWS, {"kind": "tensor_train", "rank": 3}),
    ("pruned", ShardingType.TABLE_WISE, ExchangeKind.ROWS,
     {"kind": "pruned", "budget": {"ratio": 0.5}, "chunks": 2, "period": 2, "start": "empty"}),
]
#: These start as they like; the others hold the job's rows.
_OWN_START = ("cores", "pruned")


def _job(world, names, steps=7, optimizer="row_wise_adagrad", rows=40, wire=None, **options):
    generator = torch.Generator().manual_seed(world)
    chosen = [entry for entry in _TABLES if entry[0] in names]
    tables = tuple(EmbeddingBagConfig(
        rows + 10 * i, 4 + 4 * (i % 2), name, feature_names=(f"{name}_a", f"{name}_b"),
        pooling=PoolingType.MEAN if i % 2 else PoolingType.SUM, storage=storage)
        for i, (name, _, _, storage) in enumerate(chosen))
    plan = ShardingPlan(world, tuple(
        table_plan(table, kind, world, exchange=exchange, first=i)
        for i, (table, (_, kind, exchange, _)) in enumerate(zip(tables, chosen, strict=True))))
    plan = plan.with_wire(wire) if wire else plan
    sizes = [[(3 * step + rank) % 5 + (step == 1 and rank == 0) for rank in range(world)]
             for step in range(steps)]
    return Job(tables, plan, PlainOptimizer(optimizer, lr=0.1),
               random_weights(tables, generator),
               random_steps(tables, sizes, generator=generator), **options)


def _fresh_model(groups, job):
    return sl.shard(Bare(job.tables), job.plan, groups=groups,
                    optimizer=make_optimizer(job.optimizer))


def _train(groups, job, depth=0, staleness=0, every=1, extra=-1):
    """Outputs and rows; an optimiser step ``every`` batches; ``extra`` trains one not announced."""
    build = _fresh_model if _OWN_START[0] in job.weights else sharded_model
    model, optimizer = build(groups, job)
    outputs = []
    batches = [(build_features(step.parts[groups.rank], job.features), step.targets[groups.rank],
                step.samples) for step in job.steps]

    def learn(features, target, samples):
        pooled = model(features)
        out = torch.cat([pooled[feature] for feature in job.features], dim=1)
        (groups.world_size * loss_of(out, target, samples, job.linear)).backward()
        outputs.append(out.detach().clone())

    loader = sl.prefetching(iter(batches), model, lambda batch: batch[0], depth=depth,
                            staleness=staleness)
    for number, batch in enumerate(loader):
        learn(*batch)
        if number == extra:
            step = job.steps[0]
            learn(build_features(step.parts[groups.rank], job.features),
                  step.targets[groups.rank], step.samples)
        if (number + 1) % every == 0:
            optimizer.step()
            optimizer.zero_grad()
    collection = model.collections()["ebc"]
    wire = dataclasses.asdict(collection.wire)
    rows = [(chunk.table, chunk.row_start, chunk.weights.clone(),
             {name: state.clone() for name, state in (chunk.state | chunk.extra).items()})
            for chunk in collection.chunks(1 << 20)]
    return outputs, rows, wire


def _assert_same(found, expected):
    for (outputs, rows, _), (plain_outputs, plain_rows, _) in zip(found, expected, strict=True):
        for number, (one, other) in enumerate(zip(outputs, plain_outputs, strict=True)):
            assert torch.equal(one, other), f"output of batch {number}"
        for (table, start, weights, state), (_, _, plain, plain_state) in zip(rows, plain_rows,
                                                                             strict=True):
            assert torch.equal(weights, plain), f"{table} from row {start}"
            assert all(torch.equal(state[name], plain_state[name]) for name in state)


ALL = tuple(name for name, *_ in _TABLES if name not in _OWN_START)


@pytest.mark.parametrize("depth", [1, 3], ids="depth_{}".format)
@pytest.mark.parametrize("names", [ALL, ("row",), ("bags",), ("table", "column")], ids="+".join)
def test_training_ahead_gives_the_same_bits(names, depth):
    job = _job(2, names)
    _assert_same(run_ranks(2, _train, job, depth), run_ranks(2, _train, job))


@pytest.mark.parametrize("codec", ["fp16", "int8"])
def test_reduced_precision_on_the_wire_gives_the_same_bits(codec):
    job = _job(2, ALL, wire=WireDtypes(codec, codec))
    ahead, plain = run_ranks(2, _train, job, 2), run_ranks(2, _train, job)
    _assert_same(ahead, plain)
    exact = run_ranks(2, _train, _job(2, ALL))
    assert not torch.equal(torch.cat(plain[0][0]), torch.cat(exact[0][0]))


@pytest.mark.parametrize("depth", [1, 2], ids="depth_{}".format)
def test_tables_of_cores_and_of_chunks_give_the_same_bits(depth):
    job = _job(2, (*_OWN_START, "row"), steps=9)
    _assert_same(run_ranks(2, _train, job, depth), run_ranks(2, _train, job))


def test_four_ranks_give_the_same_bits():
    job = _job(4, ALL)
    _assert_same(run_ranks(4, _train, job, 2), run_ranks(4, _train, job))


def _train_in_stages(groups, *args):
    return _train(in_stages(groups), *args)


@pytest.mark.parametrize(("names", "wire"), [
    (ALL, None), (ALL, WireDtypes("int8", "fp16")), ((*_OWN_START, "row"), None)],
    ids=["fp32", "int8", "cores and chunks"])
def test_two_stages_give_the_same_bits(names, wire):
    """Late rows reach the host's rank late; it hands them out with the early ones."""
    job = _job(4, names, wire=wire)
    _assert_same(run_ranks(4, _train_in_stages, job, 2), run_ranks(4, _train_in_stages, job))


def test_two_stages_and_stale_rows_repeat_bit_by_bit():
    job = _job(4, ALL)
    _assert_same(run_ranks(4, _train_in_stages, job, 1, 1),
                 run_ranks(4, _train_in_stages, job, 1, 1))


@pytest.mark.parametrize("depth", [1, 2], ids="depth_{}".format)
def test_accumulated_gradients_give_the_same_bits(depth):
    job = _job(2, ("row", "bags", "every"))
    _assert_same(run_ranks(2, _train, job, depth, 0, 3), run_ranks(2, _train, job, 0, 0, 3))


def test_update_by_a_batch_that_was_not_announced_is_seen():
    job = _job(2, ("row", "bags"))
    _assert_same(run_ranks(2, _train, job, 2, 0, 1, 3), run_ranks(2, _train, job, 0, 0, 1, 3))


def test_rows_travel_once_and_one_bit_says_when():
    job = _job(2, ("row",))
    for (_, _, ahead), (_, _, plain) in zip(run_ranks(2, _train, job, 1),
                                            run_ranks(2, _train, job), strict=True):
        assert plain["ids_bytes"] < ahead["ids_bytes"] <= plain["ids_bytes"] * 1.1
        more = ahead["ids_bytes"] - plain["ids_bytes"]
        assert ahead == plain | {"ids_bytes": plain["ids_bytes"] + more,
                                 "inside_bytes": plain["inside_bytes"] + more}


def _lagging(groups, job):
    """What staleness 1 means: every batch is read before the update of the one in front."""
    model, optimizer = sharded_model(groups, job)
    outputs = []
    for step, behind in zip(job.steps, [*job.steps[1:], None], strict=True):
        features = build_features(step.parts[groups.rank], job.features)
        pooled = model(features)
        out = torch.cat([pooled[feature] for feature in job.features], dim=1)
        if not outputs:
            outputs.append(out.detach().clone())
        (groups.world_size * loss_of(out, step.targets[groups.rank], step.samples,
                                     linear=True)).backward()
        if behind is not None:
            with torch.no_grad():
                seen = model(build_features(behind.parts[groups.rank], job.features))
            outputs.append(torch.cat([seen[feature] for feature in job.features], dim=1))
        optimizer.step()
        optimizer.zero_grad()
    return outputs


def test_stale_rows_lack_exactly_the_last_update():
    job = _job(2, ("row", "bags", "every"), linear=True, optimizer="sgd")
    for (outputs, _, _), expected in zip(run_ranks(2, _train, job, 1, 1),
                                         run_ranks(2, _lagging, job), strict=True):
        for number, (one, other) in enumerate(zip(outputs, expected, strict=True)):
            assert torch.equal(one, other), f"output of batch {number}"


def test_stale_training_repeats_bit_by_bit():
    job = _job(2, ALL)
    _assert_same(run_ranks(2, _train, job, 1, 1), run_ranks(2, _train, job, 1, 1))


def _stop_early(groups, job):
    """Leaves the loop with batches announced, and goes on without."""
    model, _ = sharded_model(groups, job)
    batches = [build_features(step.parts[groups.rank], job.features) for step in job.steps]
    for _ in sl.prefetching(iter(batches), model, depth=2):
        break
    with torch.no_grad():
        return [model(batch).values() for batch in batches]


def test_announced_batches_may_be_left():
    job = _job(2, ALL)
    assert len(run_ranks(2, _stop_early, job)[0]) == len(job.steps)


def _who_goes_first(groups, job):
    """Whether rows of the batch that comes are here, before and after this step's are."""
    model, _ = sharded_model(groups, job)
    collection = model.collections()["ebc"]
    first, second = (build_features(step.parts[groups.rank], job.features)
                     for step in job.steps[2:4])
    collection.prefetch(first)
    collection.prefetch(second)
    coming = collection.announcements._coming
    coming[0].found.result(20)  # nobody is in front of it
    waits = coming[1].found
    with pytest.raises(TimeoutError):
        waits.result(0.2)
    model(first)
    waits.result(20)
    collection.forget_announced()
    return True


def test_rows_of_the_step_go_before_those_of_the_next():
    assert run_ranks(2, _who_goes_first, _job(2, ("row",))) == [True, True]


class _Second(TwoCollections):
    """A call looks up in the second alone."""

    def forward(self, features):
        return self.other(features).values()


def _other_collection(groups):
    """Batches of a collection that no step looks up do not hold up those of another."""
    model, optimizer = sl.shard(_Second(), groups=groups)
    batches = [{name: sl.KeyedJaggedTensor([name], torch.arange(i, i + 5), fixed_length=1)
                for name in "ab"} for i in range(4)]
    for number, batch in enumerate(batches):
        for collection, name in zip(model.collections().values(), "ab", strict=True):
            collection.prefetch(batch[name])
        if number:
            model(batches[number - 1]["b"]).sum().backward()
            optimizer.step()
    for collection in model.collections().values():
        collection.forget_announced()
    return True


def test_a_collection_that_is_not_looked_up_holds_up_no_other():
    assert run_ranks(2, _other_collection, timeout=30) == [True, True]


def _bad_id(groups, job):
    batches = [build_features(step.parts[groups.rank], job.features) for step in job.steps[:3]]
    model, _ = sharded_model(groups, job)
    batches[2].values()[0] = 10_000
    seen = 0
    try:
        for batch in sl.prefetching(iter(batches), model):
            model(batch)
            seen += 1
    except BoundsError as error:
        return seen, str(error)
    return seen, ""


def test_bad_id_of_a_batch_that_comes_is_named_at_its_turn():
    for rank, (seen, message) in enumerate(run_ranks(2, _bad_id, _job(2, ("row",), steps=3))):
        assert seen == 2
        assert f"rank {rank}" in message
        assert "10000" in message


def _tried(groups, job, depth):
    """Losses of training over gloo, where a depth that is not given is tried; and the choices."""
    groups = sl.comm.build_groups(transport="gloo")
    model, optimizer = sharded_model(groups, job)
    losses, choices = [], []
    batches = [(build_features(step.parts[groups.rank], job.features), step) for step in job.steps]
    for features, step in sl.prefetching(batches, model, lambda batch: batch[0], depth=depth,
                                         chosen=choices.append):
        pooled = model(features)
        out = torch.cat([pooled[feature] for feature in job.features], dim=1)
        loss = loss_of(out, step.targets[groups.rank], step.samples, job.linear)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses, [choice.depth for choice in choices]


def test_a_depth_that_nobody_gave_is_tried_and_changes_no_bits():
    job = _job(2, ("row", "table"), steps=55)
    plain, found = run_ranks(2, _tried, job, 0), run_ranks(2, _tried, job, None)
    assert [losses for losses, _ in found] == [losses for losses, _ in plain]
    assert len(found[0][1]) == 1
    assert found[0][1] == found[1][1]
    assert [choices for _, choices in plain] == [[], []]


@pytest.mark.parametrize(("depth", "staleness", "text"), [
    (-1, 0, "found depth -1 and staleness 0"), (1, 2, "found depth 1 and staleness 2"),
    (2, 1, "a depth of 1, found 2"), (0, 1, "a depth of 1, found 0")])
def test_depth_and_staleness_that_do_not_go_together_are_refused(depth, staleness, text):
    with pytest.raises(ConfigError, match=text):
        next(sl.prefetching([], None, depth=depth, staleness=staleness))
