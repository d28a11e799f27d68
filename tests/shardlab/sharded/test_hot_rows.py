"""Copies of hot rows on every rank: training equals the oracle, and training without them."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import shardlab as sl
from shardlab.errors import PlanError
from shardlab.plan import ShardingPlan
from shardlab.specs import BoundsMode, EmbeddingBagConfig, ExchangeKind, ShardingType
from shardlab.table_plan import WireDtypes
from shardlab.train import load, save
from shardlab.train.checkpoint_writer import CheckpointWriter, SaveOptions
from tests.harness import RankError, run_ranks
from tests.oracle import PlainOptimizer
from tests.sharded_runs import (
    PLAIN,
    SIZES,
    Job,
    assert_equals_oracle,
    build_features,
    loss_of,
    merged,
    random_steps,
    random_weights,
    sharded_model,
    sharding_plan,
    table_plan,
    train,
    train_in_stages,
)

WORLDS = [1, 2, 4]
#: Samples per step and rank: unequal ranks, an empty rank, an empty batch.
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


def _job(optimizer, world, generator, tables=None, hot=HOT, wire=None, **options):
    tables = tables or _tables()
    plan = sharding_plan(tables, world, exchange=ExchangeKind.ROWS).with_hot_rows(hot)
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
@pytest.mark.parametrize("optimizer", PLAIN.values(), ids=PLAIN)
def test_training_equals_oracle_and_training_without(optimizer, world, generator):
    jobs = [_job(optimizer, world, generator), _job(optimizer, world, generator, weighted=True)]
    found = list(zip(*run_ranks(world, train, [*jobs, *map(_cold, jobs)]), strict=True))
    for job, runs, without in zip(jobs, found[:2], found[2:], strict=True):
        assert_equals_oracle(job, runs)
        assert_same(job, runs, without)


def test_two_stages_refuse_copies(generator):
    with pytest.raises(RankError, match="copies of hot rows are made beside a flat exchange only"):
        run_ranks(4, train_in_stages, [_job(PLAIN["row_wise_adagrad"], 4, generator)])


@pytest.mark.parametrize("storage", ["fp16", "int8"])
@pytest.mark.parametrize("world", [2, 4], ids="ranks_{}".format)
def test_narrow_copies_round_as_their_rows_do(storage, world, generator):
    job = _job(PLAIN["adagrad"], world, generator, tables=_tables(storage=storage))
    hot, cold = zip(*run_ranks(world, train, [job, _cold(job)]), strict=True)
    assert_same(job, hot, cold)


@pytest.mark.parametrize("optimizer", [
    dataclasses.replace(PLAIN["adagrad"], clip_norm=0.5),
    PlainOptimizer("sgd", lr=0.05, clip_value=0.1)], ids=["norm", "value"])
def test_clipping_equals_oracle(optimizer, generator):
    job = _job(optimizer, 4, generator)
    (runs,) = zip(*run_ranks(4, train, [job]), strict=True)
    assert_equals_oracle(job, runs)


def test_rows_travel_in_their_codec_and_gradients_of_hot_rows_in_fp32(generator):
    """Rows are read as they would be without copies; an int8 backward rounds no hot gradient."""
    every = {table.name: range(table.num_embeddings) for table in _tables()
             if table.name in HOT}
    tables = [table for table in _tables() if table.name in HOT]
    forward = _job(PLAIN["adagrad"], 2, generator, wire=WireDtypes("int8", "fp32"))
    both = _job(PLAIN["adagrad"], 2, generator, tables, every, WireDtypes("int8", "int8"))
    exact = dataclasses.replace(both, plan=both.plan.with_wire(WireDtypes("int8", "fp32")))
    rests = _job(PlainOptimizer("sgd", lr=0.05), 2, generator,
                 wire=WireDtypes("fp32", "fp16", error_feedback=True))
    tables = [table for table in _tables() if table.name != "cold"]
    found = list(zip(*run_ranks(2, train, [forward, _cold(forward), both, exact, rests]),
                     strict=True))
    assert_same(forward, found[0], found[1])
    assert_same(both, found[2], found[3])
    assert all(torch.isfinite(rows).all() for rows in merged(rests, found[4])[0].values())


def _steps(groups, job, model, optimizer, **ahead):
    """Outputs of all steps; keywords are those of `sl.prefetching`."""
    batches = [(build_features(step.parts[groups.rank], job.features), step.targets[groups.rank],
                step.samples) for step in job.steps]
    loader = sl.prefetching(iter(batches), model, lambda batch: batch[0], **ahead) if ahead \
        else batches
    outputs = []
    for number, (features, target, samples) in enumerate(loader):
        pooled = model(features)
        out = torch.cat([pooled[feature] for feature in job.features], dim=1)
        (groups.world_size * loss_of(out, target, samples, job.linear)).backward()
        outputs.append(out.detach().clone())
        if number != 1:  # the second batch's gradients wait for the third's
            optimizer.step()
            optimizer.zero_grad()
    return outputs


def _train_ahead(groups, job, **ahead):
    model, optimizer = sharded_model(groups, job)
    outputs = _steps(groups, job, model, optimizer, **ahead)
    chunks = [chunk.weights.clone() for chunk in model.collections()["ebc"].chunks()]
    return outputs, chunks


def _ahead(groups, job):
    return [_train_ahead(groups, job), _train_ahead(groups, job, depth=1),
            _train_ahead(groups, job, depth=2),
            _train_ahead(groups, job, depth=1, staleness=1),
            _train_ahead(groups, _cold(job), depth=1, staleness=1)]


@pytest.mark.parametrize("world", [2, 4], ids="ranks_{}".format)
def test_batches_exchanged_ahead_give_the_same_bits(world, generator):
    job = _job(PLAIN["row_wise_adagrad"], world, generator)
    for plain, one, two, stale, cold in run_ranks(world, _ahead, job):
        for other in (one, two):
            assert all(map(torch.equal, plain[0], other[0]))
            assert all(map(torch.equal, plain[1], other[1]))
        assert not all(map(torch.equal, plain[0], stale[0]))
        for outputs, expected in zip(stale[0], cold[0], strict=True):
            torch.testing.assert_close(outputs, expected)


def _copies(groups, job):
    """After training: a copy of every table with hot rows, and the rows as they are saved."""
    model, optimizer = sharded_model(groups, job)
    _steps(groups, job, model, optimizer)
    collection = model.collections()["ebc"]
    hot = collection._hot
    copies = {local.table.name: hot._copies.read_range(number, 0, local.shard.rows)
              for number, local in enumerate(hot._copies.shards)}
    return copies, list(collection.chunks())


def test_copies_are_bit_identical_on_all_ranks_and_are_what_is_saved(generator):
    job = _job(PLAIN["adam"], 4, generator)
    found = run_ranks(4, _copies, job)
    for table, rows in HOT.items():
        for one, other in zip(found[0][0][table], found[-1][0][table], strict=True):
            assert torch.equal(one, other)
        for _, chunks in found:
            for chunk in chunks:
                for place, row in enumerate(rows):
                    at = row - chunk.row_start
                    if chunk.table == table and 0 <= at < len(chunk.weights):
                        assert torch.equal(chunk.weights[at], found[1][0][table][0][place])


def _go_on(groups, job, folder, names):
    """Saves in the middle under the first plan, goes on under the second one, saves, and so on."""
    plans = {"hot": job.plan, "cold": _cold(job).plan}
    outputs, part = [], len(job.steps) // len(names)
    for number, name in enumerate(names):
        now = dataclasses.replace(job, plan=plans[name],
                                  steps=job.steps[number * part:(number + 1) * part])
        model, optimizer = sharded_model(groups, now)
        if number:
            load(f"{folder}/{number - 1}", model, optimizer, groups)
        outputs += _steps(groups, now, model, optimizer)
        save(f"{folder}/{number}", model, optimizer, groups)
    return outputs, [chunk.weights.clone() for chunk in model.collections()["ebc"].chunks()]


@pytest.mark.parametrize("storage", ["fp32", "int8"])
def test_checkpoints_know_nothing_of_copies(storage, generator, tmp_path):
    job = _job(PLAIN["row_wise_adam"], 2, generator, tables=_tables(storage=storage))
    runs = {" ".join(names): run_ranks(2, _go_on, job, str(tmp_path / names[0] / names[1]), names)
            for names in (("cold", "cold", "cold"), ("hot", "cold", "hot"), ("cold", "hot", "hot"))}
    expected = runs.pop("cold cold cold")
    for found in runs.values():
        for (outputs, rows), (plain, plain_rows) in zip(found, expected, strict=True):
            assert all(map(torch.equal, outputs, plain))
            assert all(map(torch.equal, rows, plain_rows))


def _saved_behind(groups, job, folder):
    """Two checkpoints written behind training, the second of changed rows; then rows and loads."""
    model, optimizer = sharded_model(groups, job)
    writer = CheckpointWriter(model, optimizer, groups,
                              SaveOptions(background=True, incremental=True))
    half = len(job.steps) // 2
    for name, steps in (("one", job.steps[:half]), ("two", job.steps[half:])):
        _steps(groups, dataclasses.replace(job, steps=steps), model, optimizer)
        writer.save(f"{folder}/{name}")
    writer.finish()
    loaded = sharded_model(groups, _cold(job))
    load(f"{folder}/two", *loaded, groups)
    return [[(chunk.weights.clone(), {name: value.clone() for name, value in chunk.state.items()})
             for chunk in one.collections()["ebc"].chunks()] for one in (model, loaded[0])]


def test_changed_copies_are_in_checkpoints_written_behind_training(generator, tmp_path):
    job = _job(PLAIN["row_wise_adam"], 2, generator)
    for trained, loaded in run_ranks(2, _saved_behind, job, str(tmp_path)):
        for (rows, state), (found, found_state) in zip(trained, loaded, strict=True):
            assert torch.equal(rows, found)
            assert all(torch.equal(value, found_state[name]) for name, value in state.items())


def _one_batch(groups, job, ids):
    model, _ = sharded_model(groups, job)
    values = torch.tensor([ids, ids])[groups.rank]
    with torch.no_grad():
        return model(sl.KeyedJaggedTensor(["t"], values, fixed_length=1)).values()


def _small(bounds, hot):
    table = EmbeddingBagConfig(10, 4, "t", bounds=bounds)
    plan = ShardingPlan(2, (table_plan(table, ShardingType.ROW_WISE, 2),)).with_hot_rows({"t": hot})
    rows = torch.arange(1.0, 41.0).view(10, 4)
    return Job((table,), plan, PlainOptimizer("sgd"), {"t": rows}, [])


@pytest.mark.parametrize("hot", [(2, 5), tuple(range(10))], ids=["some", "all"])
@pytest.mark.parametrize("bad", [-1, -2, -10, 10, 11, 2**62, -2**63, 2**63 - 1])
def test_bad_id_is_named_as_it_was_given(bad, hot):
    with pytest.raises(RankError, match=rf"BoundsError: feature 't', table 't', rank \d, row 3 of "
                                        rf"the batch: id {bad} is outside \[0, 10\)"):
        run_ranks(2, _one_batch, _small(BoundsMode.ERROR, hot), [2, 5, 5, bad])


@pytest.mark.parametrize("hot", [(2, 5), (0, 3), tuple(range(10))], ids=["some", "zero", "all"])
def test_bounds_modes_mean_rows_of_the_table(hot):
    ids = [9, -1, 5, 10, 0]
    rows = torch.arange(1.0, 41.0).view(10, 4)
    for bounds, expected in ((BoundsMode.CLAMP_TO_ZERO, rows[[9, 0, 5, 0, 0]]),
                             (BoundsMode.IGNORE, rows[[9, 0, 5, 0, 0]] * torch.tensor(
                                 [[1.0], [0.0], [1.0], [0.0], [1.0]]))):
        for out in run_ranks(2, _one_batch, _small(bounds, hot), ids):
            assert torch.equal(out, expected), bounds


def _stepped(groups, job):
    model, optimizer = sharded_model(groups, job)
    _steps(groups, job, model, optimizer)
    collection = model.collections()["ebc"]
    return collection.tier_bytes(), collection.storage.tier_bytes()


def test_copies_take_the_bytes_of_their_rows_on_every_rank(generator):
    job = _job(PLAIN["adagrad"], 2, generator)
    copies = sum(len(HOT[table.name]) * 2 * 4 * table.embedding_dim for table in job.tables
                 if table.name in HOT)
    for every, homes in run_ranks(2, _stepped, job):
        assert every.total - homes.total == copies


@pytest.mark.parametrize(("kind", "changes", "message"), [
    (ShardingType.DATA_PARALLEL, {}, "it is data_parallel, every rank has all rows already"),
    (ShardingType.COLUMN_WISE, {}, "it is column_wise, its columns spread every row"),
    (ShardingType.ROW_WISE, {"exchange": ExchangeKind.POOLED}, "bags are pooled at their owners"),
    (ShardingType.ROW_WISE, {"storage": {"levels": [{"fraction": 0.5}, {"dtype": "int8"}]}},
     "copies need one level of rows"),
    (ShardingType.ROW_WISE, {"storage": {"kind": "tensor_train", "rank": 2}},
     "copies need one level of rows"),
])
def test_tables_that_cannot_have_copies_say_why(kind, changes, message):
    table = EmbeddingBagConfig(12, 4, "t", **changes)
    plan = ShardingPlan(2, (table_plan(table, kind, 2, exchange=table.exchange),))
    with pytest.raises(PlanError, match=rf"table 't': hot_rows: .*{message}"):
        plan.with_hot_rows({"t": [1]})


@pytest.mark.parametrize(("rows", "message"), [
    ([12], "row 12 is outside the table, whose last row is 11"),
    ([-1, 3], "row -1 is outside"),
    ([3, 5, 3], "found row 3 twice")])
def test_wrong_hot_rows_are_named(rows, message):
    table = EmbeddingBagConfig(12, 4, "t")
    plan = ShardingPlan(2, (table_plan(table, ShardingType.ROW_WISE, 2),))
    with pytest.raises(PlanError, match=f"table 't': hot_rows: .*{message}"):
        plan.with_hot_rows({"t": rows})
    with pytest.raises(PlanError, match=r"hot rows: the plan has no tables \['other'\]"):
        plan.with_hot_rows({"other": rows})


def test_plan_with_hot_rows_is_read_back():
    table = EmbeddingBagConfig(1000, 4, "t")
    plan = ShardingPlan(2, (table_plan(table, ShardingType.ROW_WISE, 2),))
    hot = plan.with_hot_rows({"t": [7, 0, 1, 2, 999]})
    assert '"hot_rows": "0-2 7 999"' in hot.to_json()
    assert ShardingPlan.from_json(hot.to_json()) == hot
    with pytest.raises(PlanError, match="rows must be written like '0-63 70', found '3-'"):
        ShardingPlan.from_json(hot.to_json().replace("0-2 7", "3- 7"))
